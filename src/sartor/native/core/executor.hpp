// Runs a whole step of a program in one call.
//
// The program arrives as instructions over numbered values; buffers are planned once from the
// lifetimes of the values. Nothing here knows Python.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "sampler.hpp"
#include "thread_pool.hpp"

namespace sartor {

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
};

// One operator. `inputs` and `outputs` are values; `matrices` and `vectors` are weights
// (a vector of -1 is absent). kLinear may have several matrices: one output each.
struct Instruction {
  Op op = Op::kAdd;
  std::string name;
  std::vector<int32_t> inputs, outputs, matrices, vectors;
  int32_t state = -1, rope = -1, tap = -1;
  int64_t heads = 0, kv_heads = 0, head_dim = 0, value_dim = 0, window = 0;
  // Chunks of the inputs that keep 16 bits (kernels.hpp, quantize_residual); negative for none.
  float residual_threshold = -1;
  float eps = 0, weight_offset = 0, factor = 1, softcap = 0;
  Activation activation = Activation::kSilu;
};

struct ValueInfo {
  int64_t width = 0;
  bool per_output = false;  // one row an output row, not a token
};

struct RopeInfo {
  int64_t dim = 0;
  bool interleaved = false;
  float factor = 1;
  std::vector<float> inverse_frequencies;
};

struct StateInfo {
  int64_t kv_heads = 0, head_dim = 0, value_dim = 0;
  int32_t group = 0;
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
  Storage kv = Storage::kBf16;
  bool int8_activations = true;
};

struct BlockTable {
  const int32_t* data = nullptr;
  int64_t width = 0;  // entries a sequence
};

struct StepInput {
  int64_t tokens = 0, sequences = 0, outputs = 0;
  const int32_t* token_ids = nullptr;
  const int32_t* positions = nullptr;
  const int32_t* starts = nullptr;
  const int32_t* contexts = nullptr;
  std::vector<BlockTable> tables;
  const int32_t* output_rows = nullptr;
  const SamplingRow* sampling = nullptr;
  const int32_t *history = nullptr, *history_starts = nullptr;
  const int32_t *bias_tokens = nullptr, *bias_starts = nullptr;
  const float* bias_values = nullptr;
  // Frequencies by sequence [sequences][dim / 2] for ropes that depend on length, else null.
  std::vector<const float*> rope_frequencies;
  std::vector<bool> wanted_taps;
};

struct StepResult {
  std::vector<SampleResult> samples;
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

  int64_t state_bytes() const;
  int64_t scratch_bytes() const;
  // Seconds spent in each instruction since profiling was switched on; empty when it is off.
  void profile(bool on);
  const std::vector<double>& seconds() const { return seconds_; }
  const ProgramInfo& program() const { return program_; }

 private:
  void plan_buffers();
  int64_t rows(int32_t value, const StepInput& step) const;
  float* value(int32_t id) {
    return slots_[static_cast<size_t>(slot_of_[static_cast<size_t>(id)])].floats(0);
  }
  void prepare_ropes(const StepInput& step);
  void execute(const Instruction& instruction, const StepInput& step, StepResult& result);
  void linear(const Instruction& instruction, int64_t rows);
  void kv_write(const Instruction& instruction, const StepInput& step);
  void attention(const Instruction& instruction, const StepInput& step);
  void sample_rows(const Instruction& instruction, const StepInput& step, StepResult& result);
  void quantize(int32_t value, int64_t rows, int64_t width, float threshold);
  // body(begin, end) over rows: in place when there is little to do, else on the pool.
  template <typename Body>
  void each_row(int64_t rows, int64_t width, const Body& body);

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
    Buffer codes, scales, sums;
    QuantizedRows rows(int64_t first, int64_t stride);
  };
  Quantized quantized_, residual_;
  int32_t quantized_value_ = -1, refined_value_ = -1;
  float refined_threshold_ = 0;
  int64_t quantized_stride_ = 0;
  bool profiling_ = false;
  std::vector<double> seconds_;
};

}  // namespace sartor
