// The kernels of one instruction-set path, as plain functions over plain memory.
//
// Weights are packed in columns: 16 output features side by side (one lane each), the input
// dimension K in chunks of 32. Every output is one lane's sum over the chunks in order, so a
// result does not depend on how rows or columns are tiled.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kv_layout.hpp"
#include "storage.hpp"

namespace sartor {

constexpr int kChunk = 32;       // input features that share an activation scale
constexpr int kPanelChunks = 8;  // chunks whose codes are unpacked together
constexpr int64_t kPanelBytes = kPanelChunks * kChunk * kLanes;
constexpr int kTaskRows = 64;   // rows that one task multiplies, at most,
constexpr int kTaskBlocks = 8;  // and column blocks, where panels are unpacked for so many rows

// A packed weight matrix [n, k]. Padding: n to 16 columns, k to `k_padded`.
//
// Dense: `codes` is [n / 16][k][16] floats of the storage type.
// Affine and lookup: `codes` is [n / 16][k_padded / 32][64 * bits] bytes (see packing.hpp),
// `scales` and `offsets` are fp16 [n / 16][k_padded / group][16]. The true scale is
// scale * scale_multiplier, the true offset is offset * offset_multiplier (powers of two).
// Fp8 (E4M3): codes as dense, one byte each; scales as above.
//
// A matrix an expert: `experts` of them behind each other. Column k of the codes belongs to
// input `permutation[k]` where there is one.
struct Matrix {
  Storage storage = Storage::kFp32;
  int64_t n = 0, k = 0, k_padded = 0;
  int32_t bits = 0, group = 0, zero = 0;
  bool has_offset = false;
  const uint8_t* codes = nullptr;
  const uint16_t* scales = nullptr;
  const uint16_t* offsets = nullptr;
  float scale_multiplier = 1.0f, offset_multiplier = 1.0f;
  int8_t table[16] = {};
  int64_t experts = 1;
  const int32_t* permutation = nullptr;

  int64_t code_bytes() const;  // of one expert
  Matrix expert(int64_t index) const;
  bool integer_codes() const { return storage == Storage::kAffine || storage == Storage::kLookup; }
  int64_t blocks() const { return (n + kLanes - 1) / kLanes; }
  int64_t chunks() const { return k_padded / kChunk; }
};

// Activations of a row tile, quantised to int8 by chunks. `half_sums` are the sums of the codes
// of each 16 features: two a chunk.
struct QuantizedRows {
  const int8_t* codes = nullptr;       // [rows][stride]
  const float* scales = nullptr;       // [rows][stride / 32]
  const int32_t* half_sums = nullptr;  // [rows][stride / 16]
  int64_t stride = 0;                  // features, a multiple of 128
};

// [begin, end)
struct Range {
  int64_t begin = 0, end = 0;
  SARTOR_INLINE int64_t count() const { return end - begin; }
  SARTOR_INLINE Range within(const Range& other) const {
    return {begin > other.begin ? begin : other.begin, end < other.end ? end : other.end};
  }
};

// Rows that arrange_rows() has put in the order in which linear_int8 walks through them: tiles of
// rows, `stride` int32 a row.
struct ArrangedRows {
  const int32_t* data = nullptr;
  int64_t stride = 0, count = 0;
};

// One of the ways to multiply that give the same bits. Which is fastest depends on the machine, the
// matrix and the number of rows; the values here are right where nothing was measured.
struct LinearVariant {
  int32_t streams = 0;      // column blocks that few rows read at once: 1, or 0 for the path's own
  bool tiles = true;        // tile registers, where the path has them
  int32_t task_blocks = 0;  // column blocks a task; 0: by the number of threads
  int32_t task_rows = kTaskRows;  // rows a task, at most; a multiple of 16
};

// What variants a path has.
struct LinearTraits {
  int32_t streams = 1, direct_rows = 1;  // `streams` matters to so many rows
  int32_t tile_rows = 1;                 // rows that are arranged together, at most
  bool tiles = false;
};

// Where a linear kernel writes: rows of `stride` floats; columns are absolute.
struct LinearOutput {
  float* data = nullptr;
  int64_t stride = 0;
  const float* bias = nullptr;
  bool accumulate = false;  // add to what is there
};

// One kv head of one sequence: rows are its query heads by token, [tokens][group].
struct AttentionTask {
  KvLayout layout;
  const uint8_t* keys = nullptr;  // of the kv head in block 0
  const uint8_t* values = nullptr;
  int64_t key_stride = 0, value_stride = 0;  // bytes from block to block
  const int32_t* block_table = nullptr;
  int64_t kv_head = 0, group = 1;
  int64_t window = 0;
  bool causal = true;
  int64_t length = 0;  // positions there are; read where attention is not causal
  float scale = 1.0f, softcap = 0.0f;
  const float* sinks = nullptr;  // [heads] or null
  const float* q = nullptr;      // [tokens][q_stride]
  int64_t q_stride = 0;
  float* out = nullptr;  // [tokens][out_stride]
  int64_t out_stride = 0;
  int64_t first_position = 0;          // position of token 0
  int64_t row_begin = 0, row_end = 0;  // kAttentionTaskRows at most
  int64_t segment_begin = 0, segment_end = 0;
  // Where each segment's result goes, [segments][rows of the task][attention_record()], for
  // attention_merge to combine; null: the task has all segments, and the result goes to `out`.
  float* parts = nullptr;
  float* scratch = nullptr;  // attention_scratch() floats

  // What a row sees; neither end falls from row to row.
  SARTOR_INLINE Range positions(int64_t row) const {
    const int64_t position = first_position + row / group;
    const int64_t begin = window > 0 && position >= window ? position + 1 - window : 0;
    if (causal) return {begin, position + 1};
    return {begin, window > 0 && position + window < length ? position + window : length};
  }
};

constexpr int64_t kAttentionTaskRows = 256;
constexpr int64_t kAttentionTile = 32;      // most rows that a path takes at a time
constexpr int64_t kAttentionSegment = 512;  // positions that are combined before segments are
// Over an int8 state: most rows at a time, and bytes of a plane of one row's weights.
constexpr int64_t kAttentionByteRows = 16;
constexpr int64_t kAttentionPlane = kAttentionSegment + 64;
// Features that a key or value of an int8 state may have: sums of their products fit int32.
constexpr int64_t kMostByteFeatures = 512;

// Floats of a row's sums, its highest score and its total.
SARTOR_INLINE int64_t attention_record(const KvLayout& layout) {
  return layout.value_stride() + kLanes;
}
// Parts of the scratch in its order, in floats: queries; records, scores and sums; of an int8
// state weights in two planes, and the values of a segment.
SARTOR_INLINE int64_t attention_queries(const KvLayout& layout) {
  // Over an int8 state two planes of a row, in whole lines.
  const int64_t lines = (layout.head_dim + 63) / 64 * 32;
  return kAttentionTaskRows * (lines > layout.head_dim + kLanes ? lines : layout.head_dim + kLanes);
}
SARTOR_INLINE int64_t attention_sums(const KvLayout& layout) {
  return kAttentionTaskRows * attention_record(layout) +
         kAttentionTile * (kAttentionSegment + kLanes + layout.value_stride());
}
SARTOR_INLINE int64_t attention_values_at(const KvLayout& layout) {
  return attention_queries(layout) + attention_sums(layout) +
         kAttentionByteRows * kAttentionPlane / 2;
}
SARTOR_INLINE int64_t attention_scratch(const KvLayout& layout) {
  if (layout.storage != Storage::kInt8) return attention_queries(layout) + attention_sums(layout);
  return attention_values_at(layout) + kAttentionSegment * layout.value_stride() / 4;
}

// `count` tokens of one kv head, for positions `at` and on of one block.
struct KvWriteTask {
  KvLayout layout;
  const float *k = nullptr, *v = nullptr;  // of the first token
  int64_t k_stride = 0, v_stride = 0;      // floats from token to token
  int64_t at = 0, count = 0;
  uint8_t *keys = nullptr, *values = nullptr;  // of the block
};

enum class Activation : int32_t {
  kSilu,
  kGelu,
  kGeluTanh,
  kRelu,
  kSigmoid,
  kSoftplus,
  kExp,
  kTanh,
  kClampedSilu,  // gated only
};

// Features [begin, end) of a causal convolution over `tokens` rows of `width` features. `before`
// has the `taps - 1` rows that came earlier, oldest first, or is null at the start of a sequence;
// `after`, which may be the same memory, gets the last `taps - 1` rows.
struct ConvTask {
  const float *x = nullptr, *before = nullptr;
  const float *weight = nullptr, *bias = nullptr;  // weight [taps][width]
  float *after = nullptr, *out = nullptr;
  int64_t tokens = 0, width = 0, taps = 0, begin = 0, end = 0;
};

// Value features [begin, end) of one head of a linear recurrence (ops/recurrent.py). Pointers are
// to the first token and the head; strides are from token to token. `before` and `after` are
// [key_dim][value_dim] and may be the same memory; `before` is null at the start of a sequence.
struct ScanTask {
  const float *q = nullptr, *k = nullptr, *v = nullptr, *decay = nullptr, *beta = nullptr;
  const float* before = nullptr;
  float *after = nullptr, *out = nullptr;
  int64_t tokens = 0, key_stride = 0, value_stride = 0, head_stride = 0;
  int64_t key_dim = 0, value_dim = 0, begin = 0, end = 0;
  float scale = 1.0f;
  bool delta = false;
};
constexpr int64_t kScanFeatures = 64;  // of a task: its part of the state stays in the cache

// Operations that a core can start in a cycle at most, a multiply and an add counting as two; 0
// where that is not known.
struct PeakWidths {
  double int8 = 0, fp32 = 0, bf16 = 0;
};
// The weight of a logit is 2^(16 (x - top) slope), or 0 below the cut, which is finite.
struct Weighing {
  float top = 0.0f, cut = 0.0f;
  double slope = 1.0;
};
constexpr int64_t kSampleBlock = 256;  // logits
constexpr int32_t kBuckets = 4096;     // and kLanes that end the list

struct Kernels {
  const char* name;
  void (*quantize_rows)(const float* x, int64_t rows, int64_t k, int64_t x_stride, int8_t* codes,
                        float* scales, int32_t* half_sums, int64_t stride);
  // What quantize_rows left over, quantised with 1/256 of its scales: in chunks whose scale is
  // above `threshold` times the root mean square of the row's scales, 0 in the others.
  void (*quantize_residual)(const float* x, int64_t rows, int64_t k, int64_t x_stride,
                            float threshold, const int8_t* codes, const float* scales,
                            int8_t* residual_codes, float* residual_scales, int32_t* half_sums,
                            int64_t stride);
  // Quantised rows, with what their codes left over or null, in the order in which linear_int8
  // walks through them in the same variant, for any matrix that arrange_alike() says is like w.
  // Done once, and not by every task. `part` of the rows: it begins and ends with a multiple of
  // traits.tile_rows, or with the last row. arranged: arranged_rows(rows) times arranged_ints()
  // int32, wherever the part begins.
  void (*arrange_rows)(const Matrix& w, const QuantizedRows& x, const QuantizedRows* residual,
                       int64_t rows, Range part, const LinearVariant& variant, int32_t* arranged);
  // Column blocks [block_begin, block_end) of w, most_blocks(rows) at most. scratch:
  // linear_scratch() floats.
  void (*linear_int8)(const Matrix& w, int64_t block_begin, int64_t block_end,
                      const ArrangedRows& x, const LinearVariant& variant, const LinearOutput& out,
                      float* scratch);
  void (*linear_fp32)(const Matrix& w, int64_t block_begin, int64_t block_end, const float* x,
                      int64_t x_stride, int64_t rows, const LinearOutput& out);
  void (*dequantize_row)(const Matrix& w, int64_t row, float scale, float* out);
  void (*rms_norm)(const float* x, const float* weight, float weight_offset, float eps,
                   int64_t width, int64_t run, float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps,
                     int64_t width, float* out);
  void (*l2_norm)(const float* x, float eps, int64_t width, int64_t run, float* out);
  void (*add)(const float* x, const float* y, int64_t n, float* out);
  // out = sum of parts[i] * weights[i], in order; the parts lie `n` floats apart.
  void (*weighted_sum)(const float* parts, const float* weights, int64_t count, int64_t n,
                       float* out);
  void (*short_conv)(const ConvTask& task);
  void (*recurrent_scan)(const ScanTask& task);
  void (*mul)(const float* x, const float* y, int64_t n, float* out);
  void (*scale)(const float* x, float factor, int64_t n, float* out);
  void (*softcap)(const float* x, float cap, int64_t n, float* out);
  void (*activation)(Activation kind, const float* x, int64_t n, float* out);
  void (*gated_activation)(Activation kind, const float* gate, const float* up, int64_t n,
                           float* out);
  void (*rope)(const float* x, const float* cosines, const float* sines, int64_t heads,
               int64_t head_dim, int64_t dim, bool interleaved, float* out);
  void (*attention)(const AttentionTask& task);
  void (*attention_merge)(const AttentionTask& task);  // the parts of all its segments
  void (*write_kv)(const KvWriteTask& task);
  float (*max)(const float* x, int64_t n);
  void (*block_maxima)(const float* x, int64_t n, float* maxima);  // of kSampleBlock logits each
  double (*sum_weights)(const float* x, int64_t n, const Weighing& w);
  // Adds the weight of each logit, or 1 for it, to bucket (top - x) * scale, rounded to the
  // nearest. That of the cut is kBuckets at most; logits below it add nothing.
  void (*sort_into_buckets)(const float* x, int64_t n, const Weighing& w, float scale, bool count,
                            double* buckets);
  // Writes `first` + i for every x[i] in [low, high), rising; how many.
  int64_t (*collect)(const float* x, int64_t n, float low, float high, int32_t first, int32_t* ids);
  void (*narrow)(const float* x, int64_t n, Storage storage, uint8_t* out);
  // Probes of the machine's ceilings (see probe.hpp); each returns operations or bytes done, 0
  // where the processor has no such arithmetic. An iteration also goes through `links` of a chain.
  double (*probe_int8)(int64_t iterations, int64_t links);
  double (*probe_fp32)(int64_t iterations, int64_t links);
  double (*probe_bf16)(int64_t iterations, int64_t links);
  double (*probe_read)(const uint8_t* data, int64_t bytes, int streams);
  PeakWidths peak_widths;
  LinearTraits linear;
};

constexpr int64_t kFewRows = 2;         // rows that no path multiplies from unpacked panels
constexpr int64_t kMostBlocks = 512;    // column blocks of a task, whatever the rows
constexpr int64_t kEntryInts = 16;      // int32 that a row takes, at most, for a chunk
constexpr int64_t kBlocksAtOnce = 4;    // column blocks that a path reads together, at most
constexpr int64_t kBlocksUnpacked = 2;  // and unpacks together, at most

// int32 slots before the chunks of a row tile.
inline int64_t tile_header_ints(int64_t k_padded) {
  const int64_t panels = (k_padded / kChunk + kPanelChunks - 1) / kPanelChunks;
  return (panels + 1 + 15) / 16 * 16;
}
// int32 slots a row, whatever the tiles are that rows are put together in.
inline int64_t arranged_ints(int64_t k_padded, bool residual) {
  return tile_header_ints(k_padded) + k_padded / kChunk * kEntryInts * (residual ? 2 : 1);
}
// Rows that tiles for `rows` rows may have.
inline int64_t arranged_rows(int64_t rows) {
  return rows <= 2 ? rows : rows <= 4 ? 4 : rows <= 8 ? 8 : (rows + 15) / 16 * 16;
}
// Whether rows arranged for one matrix are right for the other.
inline bool arrange_alike(const Matrix& a, const Matrix& b) {
  return a.k_padded == b.k_padded && a.zero == b.zero && a.group == b.group &&
         a.has_offset == b.has_offset && (a.has_offset || a.bits == b.bits) &&
         a.offset_multiplier * b.scale_multiplier == b.offset_multiplier * a.scale_multiplier;
}
inline int64_t linear_scratch() {
  return kBlocksAtOnce * kPanelBytes / 4 + kTaskRows * kTaskBlocks * kLanes;
}
// Column blocks that a task may have: their totals lie in the scratch.
inline int64_t most_blocks(int64_t rows) {
  return rows <= kFewRows ? kMostBlocks : kTaskRows * kTaskBlocks / ((rows + 15) / 16 * 16);
}

inline int64_t Matrix::code_bytes() const {
  const int64_t padded = blocks() * kLanes * k_padded;
  return integer_codes() ? padded * bits / 8 : padded * storage_bytes(storage);
}

inline Matrix Matrix::expert(int64_t index) const {
  Matrix one = *this;
  one.experts = 1;
  one.codes += index * code_bytes();
  const int64_t groups = group ? index * blocks() * kLanes * (k_padded / group) : 0;
  if (scales) one.scales += groups;
  if (offsets) one.offsets += groups;
  return one;
}

const Kernels* portable_kernels();
const Kernels* avx2_kernels();  // null where the build has no x86 paths
const Kernels* avxvnni_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512bf16_kernels();
void attention_tiles(const AttentionTask& task);  // of amx_kernels()
const Kernels* amx_kernels();   // null also where the system does not grant the tiles
const Kernels* neon_kernels();  // null where the build has no ARM64 paths
const Kernels* i8mm_kernels();

}  // namespace sartor
