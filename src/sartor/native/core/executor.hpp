// Runs a whole step of a program in one call.
//
// The program arrives as instructions over numbered values; buffers are planned once from the
// lifetimes of the values. Nothing here knows Python.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <iterator>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "custom_kernel.hpp"
#include "kernels.hpp"
#include "sampler.hpp"
#include "thread_pool.hpp"

namespace sartor {

constexpr int64_t kInlineWork =
    8192;  // floats below which waking the pool costs more than it gives

inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
inline size_t index(int64_t i) { return static_cast<size_t>(i); }

// Numbers of rows that share a variant: up to each of these, and all above the last.
constexpr int64_t kRowTops[] = {1, 2, 4, 8, 16, 32, 64};
constexpr size_t kRowBuckets = std::size(kRowTops) + 1;
inline size_t row_bucket(int64_t rows) {
  return index(std::lower_bound(std::begin(kRowTops), std::end(kRowTops), rows) -
               std::begin(kRowTops));
}

enum class Op : int32_t {
  kEmbedding,
  kLinear,
  kRmsNorm,
  kLayerNorm,
  kRope,
  kKvWrite,
  kAttention,
  kActivation,
  kGatedActivation,
  kAdd,
  kMul,
  kScale,
  kSoftcap,
  kGatherRows,
  kAddRmsNorm,
  kSample,
  kSelfAttention,
  kLatentWrite,
  kShortConv,
  kRecurrentScan,
  kRouteExperts,
  kGroupedLinear,
  kHeadLinear,
  kCombineExperts,
  kL2Norm,
  kSplit,
  kConcat,
  kReplaceRows,
  kPool,
};

enum class Pool : int32_t { kMean, kFirst, kLast };

// What route_experts does with the router's logits (ops/experts.py).
struct Routing {
  int64_t top_k = 0, groups = 1, top_groups = 1;
  bool sigmoid = false, normalize = false, by_best_two = false;
};

// What stands in the way of one row of a value.
enum class Rows : int32_t { kTokens, kOutputs, kSequences };

// One operator. `inputs` and `outputs` are values; `matrices` and `vectors` are weights
// (a vector of -1 is absent). kLinear may have several matrices: one output each.
struct Instruction {
  Op op = Op::kAdd;
  std::string name;
  std::vector<int32_t> inputs, outputs, matrices, vectors;
  int32_t state = -1, rope = -1, tap = -1;
  int64_t heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0, window = 0;
  int64_t key_heads = 0, key_dim = 0;  // recurrent_scan
  int64_t run = 0;                     // l2_norm: features; split, concat: runs
  std::vector<int64_t> widths;         // split, concat: features of a run in each part
  bool delta = false;
  bool positions = false;  // embedding: of positions, not of tokens
  Routing routing;
  Pool pool = Pool::kMean;
  // Chunks of the inputs that keep 16 bits (kernels.hpp, quantize_residual); negative for none.
  float residual_threshold = -1;
  float eps = 0, weight_offset = 0, factor = 1, softcap = 0;
  Activation activation = Activation::kSilu;
  RowKernel custom;  // runs instead of the built-in kernel where it is set
};

struct ValueInfo {
  int64_t width = 0;
  Rows rows = Rows::kTokens;
};

struct RopeInfo {
  int64_t dim = 0;
  bool interleaved = false;
  float factor = 1;
  std::vector<float> inverse_frequencies;
};

// Keys and values in pages, or a state of `slot_floats` that every token changes. A latent state
// is one kv head whose value is a part of its key.
struct StateInfo {
  Storage kv = Storage::kBf16;
  int64_t kv_heads = 0, head_dim = 0, value_dim = 0;
  int32_t group = 0;
  int64_t slot_floats = 0;  // 0: pages
};

struct ProgramInfo {
  std::vector<ValueInfo> values;
  std::vector<Instruction> instructions;
  std::vector<Matrix> matrices;
  std::vector<std::vector<float>> vectors;
  std::vector<RopeInfo> ropes;
  std::vector<StateInfo> states;
  std::vector<std::string> taps;
  int64_t vocab = 0;
  int64_t block_size = 32;
  bool int8_activations = true;
  int32_t embedding = -1;  // the value that an encoder gives

  // Width of the vectors that may stand for tokens; -1 where none may.
  int64_t embedding_width() const {
    for (const Instruction& n : instructions)
      if (n.op == Op::kReplaceRows) return values[index(n.inputs[0])].width;
    return -1;
  }
};

// What an adapter adds to a linear layer: `up(down(x))`, both dense.
struct LowRank {
  Matrix down, up;
};
using Adapter = std::unordered_map<int32_t, LowRank>;  // by matrix

struct BlockTable {
  const int32_t* data = nullptr;
  int64_t width = 0;  // entries a sequence
};

// Blocks of one group whose state goes on in others: pairs of source and destination.
struct BlockCopies {
  const int32_t* pairs = nullptr;
  int64_t count = 0;
};

struct StepInput {
  int64_t tokens = 0, sequences = 0, outputs = 0;
  const int32_t* token_ids = nullptr;
  const int32_t* positions = nullptr;
  const int32_t* starts = nullptr;
  const int32_t* contexts = nullptr;
  std::vector<BlockTable> tables;
  std::vector<BlockCopies> copies;  // of each group, made before the step; empty: none at all
  const int32_t* output_rows = nullptr;
  const SamplingRow* sampling = nullptr;
  const int32_t *history = nullptr, *history_starts = nullptr;
  const int32_t *bias_tokens = nullptr, *bias_starts = nullptr;
  const float* bias_values = nullptr;
  const int32_t* adapters = nullptr;  // of each sequence, -1 for none; null: none at all
  int64_t embeddings = 0;             // rows that are given
  const int32_t* embedding_rows = nullptr;
  const float* embedding_values = nullptr;
  // Frequencies by sequence [sequences][dim / 2] for ropes that depend on length, else null.
  std::vector<const float*> rope_frequencies;
  std::vector<bool> wanted_taps;
};

struct StepResult {
  std::vector<SampleResult> samples;
  std::vector<float> embeddings;  // [sequences][width] of an encoder
  std::vector<std::vector<float>> taps;
  std::vector<int64_t> tap_rows;
};

// Memory aligned for the widest loads; zeroed lazily by the system when large.
class Buffer {
 public:
  float* floats(int64_t count);  // at least that many; contents are lost when it grows
  uint8_t* zeroed(int64_t bytes);
  uint8_t* bytes() const { return data_; }
  int64_t size() const { return size_; }
  void free();
  Buffer() = default;
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&&) = delete;
  Buffer(const Buffer&) = delete;
  ~Buffer() { free(); }

 private:
  void reserve(int64_t bytes);
  void* raw_ = nullptr;
  uint8_t* data_ = nullptr;
  int64_t size_ = 0;
};

class Executor {
 public:
  Executor(ProgramInfo program, std::shared_ptr<ThreadPool> pool, const Kernels* kernels);

  int64_t block_bytes(int32_t group) const;
  void allocate_state(const std::vector<int64_t>& blocks);
  StepResult run(const StepInput& step);

  void load_adapter(int32_t number, Adapter adapter);
  void drop_adapter(int32_t number) { adapters_.erase(number); }

  // How a linear instruction multiplies the rows of a bucket; changes no result. Rows of
  // kGroupedLinear and kHeadLinear are all that its matrices see: tokens times slots.
  void set_variant(int64_t instruction, int64_t bucket, const LinearVariant& variant);
  // Seconds that each of some linear instructions takes in a variant, one after the other, over
  // `tokens` rows of random values: quantising, arranging and multiplying. Between steps only.
  std::vector<double> time_linears(const std::vector<int64_t>& instructions, int64_t tokens,
                                   const LinearVariant& variant);

  int64_t state_bytes() const;
  int64_t scratch_bytes() const;
  // Seconds spent in each instruction since profiling was switched on; empty when it is off.
  void profile(bool on);
  const std::vector<double>& seconds() const { return seconds_; }
  const ProgramInfo& program() const { return program_; }

 private:
  void plan_buffers();
  int64_t rows(int32_t value, const StepInput& step) const;
  int64_t width_of(int32_t value) const {
    return program_.values[static_cast<size_t>(value)].width;
  }
  const float* vector(const Instruction& n, size_t i) const {
    return i < n.vectors.size() && n.vectors[i] >= 0
               ? program_.vectors[static_cast<size_t>(n.vectors[i])].data()
               : nullptr;
  }
  float* value(int32_t id) {
    return slots_[static_cast<size_t>(slot_of_[static_cast<size_t>(id)])].floats(0);
  }
  void prepare_ropes(const StepInput& step);
  void execute(const Instruction& instruction, const StepInput& step, StepResult& result);
  void custom(const Instruction& instruction, const StepInput& step);
  void rearrange(const Instruction& instruction, const StepInput& step);
  void pool(const Instruction& instruction, const StepInput& step);
  void route(const Instruction& instruction, int64_t rows);
  void sample_rows(const Instruction& instruction, const StepInput& step, StepResult& result);

  // executor_linear.cpp
  struct Product {  // one matrix times some rows
    const Matrix* matrix;
    LinearOutput out;
  };
  // Consecutive rows that one expert multiplies.
  struct ExpertRows {
    int64_t expert, begin, count;
  };
  void linear(const Instruction& instruction, const StepInput& step);
  void multiply(int32_t value, const float* x, int64_t rows, int64_t width, float threshold,
                const LinearVariant& variant, const std::vector<Product>& products);
  const LinearVariant& variant(const Instruction& n, int64_t rows) const {
    return variants_[index(&n - program_.instructions.data())][row_bucket(rows)];
  }
  // Random values, and experts, for time_linears.
  void fill_inputs(const Instruction& n, int64_t rows);
  // Rows of x with their features in the order of a matrix's columns.
  const float* permuted(const Matrix& m, const float* x, int64_t rows, int64_t width);
  int64_t blocks_a_task(int64_t blocks, int64_t rows, const LinearVariant& variant) const;
  // Neighbouring rows that one task takes.
  struct RowRun {
    int64_t begin, count;
  };
  // Rows of x, quantised and arranged for each matrix, run by run; matrices that are alike share.
  // Without rows where a matrix does not take codes. `value` tells whose rows they are:
  // neighbouring layers that share their input share its codes.
  using Arranged = std::vector<ArrangedRows>;
  std::vector<Arranged> prepare(int32_t value, const float* x, int64_t width, float threshold,
                                const std::vector<const Matrix*>& matrices,
                                const std::vector<RowRun>& runs, const LinearVariant& variant);
  void grouped_linear(const Instruction& instruction, const StepInput& step);
  void adapt(const Instruction& instruction, const StepInput& step);
  bool rounds(const Matrix& m) const { return program_.int8_activations && m.integer_codes(); }

  // executor_attention.cpp
  KvLayout layout_of(const StateInfo& state) const {
    return {state.kv, state.head_dim, state.value_dim, program_.block_size};
  }
  // Where the positions of a step's sequences lie.
  struct Pages {
    KvLayout layout;
    int64_t kv_heads;
    uint8_t *keys, *values;
    BlockTable table;
    const int32_t* contexts;
  };
  Pages pages_of(const Instruction& instruction, const StepInput& step);
  void write_pages(const Pages& pages, const StepInput& step, const float* k, int64_t k_stride,
                   const float* v, int64_t v_stride);
  void attend_pages(const Instruction& instruction, const Pages& pages, const StepInput& step,
                    const float* q, float* out, bool causal);
  void kv_write(const Instruction& instruction, const StepInput& step);
  void latent_write(const Instruction& instruction, const StepInput& step);
  void attention(const Instruction& instruction, const StepInput& step);
  void self_attention(const Instruction& instruction, const StepInput& step);
  // executor_state.cpp
  void copy_blocks(const StepInput& step);
  void short_conv(const Instruction& instruction, const StepInput& step);
  void recurrent_scan(const Instruction& instruction, const StepInput& step);
  // The slots that hold a sequence's state before and after the step; before is null at its start.
  struct Slots {
    const float* before;
    float* after;
  };
  Slots slots_of(const Instruction& instruction, const StepInput& step, int64_t sequence);

  // body(begin, end) over rows: in place when there is little to do, else on the pool.
  template <typename Body>
  void each_row(int64_t count, int64_t width, const Body& body) {
    if (count * width <= kInlineWork || pool_->threads() == 1) {
      body(0, count);
      return;
    }
    const int64_t step = std::max<int64_t>(1, kInlineWork / 2 / width);
    pool_->run((count + step - 1) / step,
               [&](int64_t task, int) { body(task * step, std::min(count, (task + 1) * step)); });
  }

  ProgramInfo program_;
  std::shared_ptr<ThreadPool> pool_;
  const Kernels* kernels_;
  std::vector<int32_t> slot_of_;
  std::vector<Buffer> slots_;
  std::vector<Buffer> keys_, values_;
  std::vector<Buffer> rope_tables_;  // cos then sin: [tokens][dim / 2] each
  std::vector<Buffer> thread_scratch_;
  std::vector<SamplerScratch> sampler_scratch_;
  struct Quantized {
    struct Rows {
      int8_t* codes;
      float* scales;
      int32_t* half_sums;
    };
    Buffer codes, scales, sums;
    void reserve(int64_t rows, int64_t stride);
    Rows rows(int64_t first, int64_t stride) const;
  };
  Quantized quantized_, residual_;
  // The value that was quantised last; kNoValue for rows that are none.
  static constexpr int32_t kNoValue = -1;
  int32_t quantized_value_ = kNoValue, refined_value_ = kNoValue;
  float refined_threshold_ = 0;
  Buffer gathered_, products_, low_rank_, arranged_, parts_;
  std::unordered_map<int32_t, Adapter> adapters_;
  int64_t quantized_stride_ = 0;
  std::vector<std::array<LinearVariant, kRowBuckets>> variants_;  // of each instruction
  bool profiling_ = false;
  std::vector<double> seconds_;
};

}  // namespace sartor
