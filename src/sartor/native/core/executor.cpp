#include "executor.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>

namespace sartor {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kInlineWork =
    8192;  // floats below which waking the pool costs more than it gives

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
int64_t value_stride(const StateInfo& state) { return round_up(state.value_dim, kLanes); }

size_t index(int64_t i) { return static_cast<size_t>(i); }

}  // namespace

Buffer::Buffer(Buffer&& other) noexcept : raw_(other.raw_), data_(other.data_), size_(other.size_) {
  other.raw_ = nullptr;
  other.data_ = nullptr;
  other.size_ = 0;
}

void Buffer::free() {
  std::free(raw_);
  raw_ = nullptr;
  data_ = nullptr;
  size_ = 0;
}

void Buffer::reserve(int64_t bytes) {
  free();
  // calloc of a large size maps fresh pages: zero, and resident only once touched.
  raw_ = std::calloc(1, index(bytes + kAlignment));
  if (!raw_) throw std::bad_alloc();
  const auto address = reinterpret_cast<uintptr_t>(raw_);
  data_ = reinterpret_cast<uint8_t*>((address + kAlignment - 1) / kAlignment * kAlignment);
  size_ = bytes;
}

float* Buffer::floats(int64_t count) {
  if (count * 4 > size_) reserve(count * 4);
  return reinterpret_cast<float*>(data_);
}

uint8_t* Buffer::zeroed(int64_t bytes) {
  reserve(bytes);
  return data_;
}

Executor::Executor(ProgramInfo program, std::shared_ptr<ThreadPool> pool, const Kernels* kernels)
    : program_(std::move(program)), pool_(std::move(pool)), kernels_(kernels) {
  plan_buffers();
  const auto threads = index(pool_->threads());
  sampler_scratch_.resize(threads);
  int64_t scratch = 0;
  for (const Matrix& matrix : program_.matrices)
    scratch = std::max(scratch, linear_scratch(matrix.k_padded));
  for (const StateInfo& state : program_.states)
    scratch = std::max(scratch,
                       attention_scratch(state.head_dim, value_stride(state), program_.block_size));
  for (size_t i = 0; i < threads; ++i) {
    thread_scratch_.emplace_back();
    thread_scratch_.back().floats(scratch);
  }
  for (size_t i = 0; i < program_.ropes.size(); ++i) rope_tables_.emplace_back();
}

// Values that are never alive together share a buffer.
void Executor::plan_buffers() {
  const auto count = program_.values.size();
  std::vector<size_t> last_use(count, 0);
  for (size_t i = 0; i < program_.instructions.size(); ++i) {
    for (const int32_t v : program_.instructions[i].inputs) last_use[index(v)] = i;
    for (const int32_t v : program_.instructions[i].outputs)
      last_use[index(v)] = std::max(last_use[index(v)], i);
  }
  slot_of_.assign(count, -1);
  std::vector<int32_t> free_slots;
  int32_t slots = 0;
  for (size_t i = 0; i < program_.instructions.size(); ++i) {
    const Instruction& instruction = program_.instructions[i];
    for (const int32_t v : instruction.outputs) {
      if (free_slots.empty()) free_slots.push_back(slots++);
      slot_of_[index(v)] = free_slots.back();
      free_slots.pop_back();
    }
    const auto release = [&](const std::vector<int32_t>& values) {
      for (const int32_t v : values) {
        int32_t& slot = slot_of_[index(v)];
        if (last_use[index(v)] != i || slot < 0) continue;
        if (std::find(free_slots.begin(), free_slots.end(), slot) == free_slots.end())
          free_slots.push_back(slot);
      }
    };
    release(instruction.inputs);
    release(instruction.outputs);
  }
  for (int32_t i = 0; i < slots; ++i) slots_.emplace_back();
}

int64_t Executor::rows(int32_t value, const StepInput& step) const {
  return program_.values[index(value)].per_output ? step.outputs : step.tokens;
}

int64_t Executor::block_bytes(int32_t group) const {
  int64_t total = 0;
  for (const StateInfo& state : program_.states)
    if (state.group == group)
      total += state.kv_heads * (state.head_dim + value_stride(state)) * program_.block_size *
               storage_bytes(program_.kv);
  return total;
}

void Executor::allocate_state(const std::vector<int64_t>& blocks) {
  keys_.clear();
  values_.clear();
  for (const StateInfo& state : program_.states) {
    const int64_t slots = blocks.at(index(state.group)) * state.kv_heads * program_.block_size *
                          storage_bytes(program_.kv);
    keys_.emplace_back();
    keys_.back().zeroed(slots * state.head_dim);
    values_.emplace_back();
    values_.back().zeroed(slots * value_stride(state));
  }
}

int64_t Executor::state_bytes() const {
  int64_t total = 0;
  for (const Buffer& buffer : keys_) total += buffer.size();
  for (const Buffer& buffer : values_) total += buffer.size();
  return total;
}

int64_t Executor::scratch_bytes() const {
  int64_t total = 0;
  for (const Quantized* q : {&quantized_, &residual_})
    total += q->codes.size() + q->scales.size() + q->sums.size();
  for (const auto* buffers : {&slots_, &rope_tables_, &thread_scratch_})
    for (const Buffer& buffer : *buffers) total += buffer.size();
  return total;
}

void Executor::profile(bool on) {
  profiling_ = on;
  seconds_.assign(on ? program_.instructions.size() : 0, 0.0);
}

template <typename Body>
void Executor::each_row(int64_t count, int64_t width, const Body& body) {
  if (count * width <= kInlineWork || pool_->threads() == 1) {
    body(0, count);
    return;
  }
  const int64_t step = std::max<int64_t>(1, kInlineWork / 2 / width);
  pool_->run((count + step - 1) / step,
             [&](int64_t task, int) { body(task * step, std::min(count, (task + 1) * step)); });
}

StepResult Executor::run(const StepInput& step) {
  StepResult result;
  result.taps.resize(program_.taps.size());
  result.tap_rows.resize(program_.taps.size());
  quantized_value_ = refined_value_ = -1;
  std::vector<int64_t> needed(slots_.size(), 0);
  for (size_t v = 0; v < program_.values.size(); ++v) {
    if (slot_of_[v] < 0) continue;
    int64_t& floats = needed[index(slot_of_[v])];
    floats = std::max(floats, rows(static_cast<int32_t>(v), step) * program_.values[v].width + 16);
  }
  for (size_t s = 0; s < slots_.size(); ++s) slots_[s].floats(needed[s]);
  prepare_ropes(step);
  using Clock = std::chrono::steady_clock;
  for (size_t i = 0; i < program_.instructions.size(); ++i) {
    const Instruction& instruction = program_.instructions[i];
    const auto begin = profiling_ ? Clock::now() : Clock::time_point{};
    execute(instruction, step, result);
    if (profiling_) seconds_[i] += std::chrono::duration<double>(Clock::now() - begin).count();
    if (instruction.tap >= 0 && step.wanted_taps[index(instruction.tap)]) {
      const int32_t v = instruction.outputs.back();
      const int64_t count = rows(v, step);
      const float* data = value(v);
      result.taps[index(instruction.tap)].assign(data,
                                                 data + count * program_.values[index(v)].width);
      result.tap_rows[index(instruction.tap)] = count;
    }
  }
  return result;
}

void Executor::prepare_ropes(const StepInput& step) {
  for (size_t r = 0; r < program_.ropes.size(); ++r) {
    const RopeInfo& rope = program_.ropes[r];
    const int64_t half = rope.dim / 2;
    float* cosines = rope_tables_[r].floats(2 * step.tokens * half);
    float* sines = cosines + step.tokens * half;
    for (int64_t s = 0; s < step.sequences; ++s) {
      const float* inverse = rope.inverse_frequencies.data();
      if (step.rope_frequencies[r]) inverse = step.rope_frequencies[r] + s * half;
      const int64_t begin = step.starts[s];
      each_row(step.starts[s + 1] - begin, half * 16, [&](int64_t from, int64_t to) {
        for (int64_t t = begin + from; t < begin + to; ++t) {
          const auto position = static_cast<float>(step.positions[t]);
          for (int64_t i = 0; i < half; ++i) {
            const float angle = position * inverse[i];
            cosines[t * half + i] = std::cos(angle) * rope.factor;
            sines[t * half + i] = std::sin(angle) * rope.factor;
          }
        }
      });
    }
  }
}

void Executor::execute(const Instruction& n, const StepInput& step, StepResult& result) {
  const auto width_of = [&](int32_t v) { return program_.values[index(v)].width; };
  const auto vector = [&](size_t i) -> const float* {
    return i < n.vectors.size() && n.vectors[i] >= 0 ? program_.vectors[index(n.vectors[i])].data()
                                                     : nullptr;
  };
  switch (n.op) {
    case Op::kEmbedding: {
      const Matrix& table = program_.matrices[index(n.matrices[0])];
      float* out = value(n.outputs[0]);
      each_row(step.tokens, table.k * 4, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
          kernels_->dequantize_row(table, step.token_ids[t], n.factor, out + t * table.k);
      });
      return;
    }
    case Op::kLinear:
      return linear(n, rows(n.outputs[0], step));
    case Op::kRmsNorm:
    case Op::kAddRmsNorm: {
      const bool fused = n.op == Op::kAddRmsNorm;
      const int32_t x = n.inputs[0];
      const int64_t width = width_of(x);
      const auto& weight = program_.vectors[index(n.vectors[0])];
      const auto run = static_cast<int64_t>(weight.size());
      const float* from = value(x);
      const float* other = fused ? value(n.inputs[1]) : nullptr;
      float* sum = fused ? value(n.outputs[0]) : nullptr;
      float* out = value(n.outputs.back());
      each_row(rows(x, step), width, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          const float* row = from + t * width;
          if (fused) {
            kernels_->add(row, other + t * width, width, sum + t * width);
            row = sum + t * width;
          }
          kernels_->rms_norm(row, weight.data(), n.weight_offset, n.eps, width, run,
                             out + t * width);
        }
      });
      return;
    }
    case Op::kLayerNorm: {
      const int64_t width = width_of(n.inputs[0]);
      const float* from = value(n.inputs[0]);
      float* out = value(n.outputs[0]);
      each_row(rows(n.inputs[0], step), width, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
          kernels_->layer_norm(from + t * width, vector(0), vector(1), n.eps, width,
                               out + t * width);
      });
      return;
    }
    case Op::kRope: {
      const RopeInfo& rope = program_.ropes[index(n.rope)];
      const int64_t width = width_of(n.inputs[0]), half = rope.dim / 2;
      const float* from = value(n.inputs[0]);
      float* out = value(n.outputs[0]);
      const float* cosines = rope_tables_[index(n.rope)].floats(0);
      const float* sines = cosines + step.tokens * half;
      each_row(step.tokens, width, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
          kernels_->rope(from + t * width, cosines + t * half, sines + t * half, width / n.head_dim,
                         n.head_dim, rope.dim, rope.interleaved, out + t * width);
      });
      return;
    }
    case Op::kKvWrite:
      return kv_write(n, step);
    case Op::kAttention:
      return attention(n, step);
    case Op::kActivation:
    case Op::kGatedActivation:
    case Op::kAdd:
    case Op::kMul:
    case Op::kScale:
    case Op::kSoftcap: {
      const int64_t width = width_of(n.inputs[0]);
      const float* x = value(n.inputs[0]);
      const float* y = n.inputs.size() > 1 ? value(n.inputs[1]) : nullptr;
      float* out = value(n.outputs[0]);
      each_row(rows(n.inputs[0], step), width, [&](int64_t begin, int64_t end) {
        const int64_t at = begin * width, count = (end - begin) * width;
        switch (n.op) {
          case Op::kActivation:
            return kernels_->activation(n.activation, x + at, count, out + at);
          case Op::kGatedActivation:
            return kernels_->gated_activation(n.activation, x + at, y + at, count, out + at);
          case Op::kAdd:
            return kernels_->add(x + at, y + at, count, out + at);
          case Op::kMul:
            return kernels_->mul(x + at, y + at, count, out + at);
          case Op::kScale:
            return kernels_->scale(x + at, n.factor, count, out + at);
          default:
            return kernels_->softcap(x + at, n.softcap, count, out + at);
        }
      });
      return;
    }
    case Op::kGatherRows: {
      const int64_t width = width_of(n.inputs[0]);
      const float* from = value(n.inputs[0]);
      float* out = value(n.outputs[0]);
      for (int64_t r = 0; r < step.outputs; ++r)
        std::memcpy(out + r * width, from + step.output_rows[r] * width, index(width) * 4);
      return;
    }
    case Op::kSample:
      return sample_rows(n, step, result);
  }
}

QuantizedRows Executor::Quantized::rows(int64_t first, int64_t stride) {
  return {reinterpret_cast<const int8_t*>(codes.bytes()) + first * stride,
          scales.floats(0) + first * (stride / kChunk),
          reinterpret_cast<const int32_t*>(sums.bytes()) + first * (stride / 16), stride};
}

void Executor::quantize(int32_t v, int64_t count, int64_t width, float threshold) {
  // Neighbouring layers share their input, and so its codes.
  const bool coarse = quantized_value_ != v;
  const bool refined =
      threshold >= 0.0f && (refined_value_ != v || refined_threshold_ != threshold);
  if (!coarse && !refined) return;
  quantized_stride_ = round_up(width, 128);  // whole groups of any weight format
  const int64_t stride = quantized_stride_;
  struct Target {
    int8_t* codes;
    float* scales;
    int32_t* sums;
  };
  const auto target = [&](Quantized& q) {
    return Target{reinterpret_cast<int8_t*>(q.codes.floats(count * stride / 4 + 16)),
                  q.scales.floats(count * stride / kChunk + 16),
                  reinterpret_cast<int32_t*>(q.sums.floats(count * stride / 16 + 16))};
  };
  const Target to = target(quantized_);
  const Target fine = refined ? target(residual_) : Target{};
  const float* x = value(v);
  each_row(count, width * 2, [&](int64_t begin, int64_t end) {
    const int64_t chunk = begin * (stride / kChunk);
    if (coarse)
      kernels_->quantize_rows(x + begin * width, end - begin, width, width,
                              to.codes + begin * stride, to.scales + chunk, to.sums + 2 * chunk,
                              stride);
    if (refined)
      kernels_->quantize_residual(x + begin * width, end - begin, width, width, threshold,
                                  to.codes + begin * stride, to.scales + chunk,
                                  fine.codes + begin * stride, fine.scales + chunk,
                                  fine.sums + 2 * chunk, stride);
  });
  quantized_value_ = v;
  if (refined) {
    refined_value_ = v;
    refined_threshold_ = threshold;
  }
}

void Executor::linear(const Instruction& n, int64_t count) {
  if (count == 0) return;
  const int64_t width = program_.values[index(n.inputs[0])].width;
  const auto is_int8 = [&](const Matrix& m) {
    return program_.int8_activations &&
           (m.storage == Storage::kAffine || m.storage == Storage::kLookup);
  };
  int64_t blocks = 0;
  for (size_t i = 0; i < n.matrices.size(); ++i) {
    const Matrix& m = program_.matrices[index(n.matrices[i])];
    blocks += m.blocks();
    if (is_int8(m)) quantize(n.inputs[0], count, width, n.residual_threshold);
  }
  // Rows that stay in the first-level cache while a few column blocks pass over them; few rows
  // leave the columns as the only thing to share out.
  const int64_t row_step = count <= 2 * kMaxRowTile ? count : 4 * kMaxRowTile;
  const int64_t row_tasks = (count + row_step - 1) / row_step;
  const int64_t share = blocks * row_tasks / (pool_->threads() * 8);
  const int64_t block_step = std::clamp<int64_t>(share, 1, 32);
  struct Part {
    const Matrix* matrix;
    LinearOutput out;
    int64_t first_task;
  };
  std::vector<Part> parts;
  int64_t column_tasks = 0;
  for (size_t i = 0; i < n.matrices.size(); ++i) {
    const Matrix& m = program_.matrices[index(n.matrices[i])];
    const int32_t bias = i < n.vectors.size() ? n.vectors[i] : -1;
    parts.push_back(
        {&m,
         {value(n.outputs[i]), m.n, bias >= 0 ? program_.vectors[index(bias)].data() : nullptr},
         column_tasks});
    column_tasks += (m.blocks() + block_step - 1) / block_step;
  }
  const float* x = value(n.inputs[0]);
  const int64_t stride = quantized_stride_;
  pool_->run(column_tasks * row_tasks, [&](int64_t task, int thread) {
    const int64_t column = task / row_tasks, row = task % row_tasks * row_step;
    size_t p = parts.size() - 1;
    while (parts[p].first_task > column) --p;
    const Matrix& m = *parts[p].matrix;
    const int64_t begin = (column - parts[p].first_task) * block_step;
    const int64_t end = std::min(m.blocks(), begin + block_step);
    const int64_t height = std::min(row_step, count - row);
    LinearOutput out = parts[p].out;
    out.data += row * out.stride;
    if (is_int8(m)) {
      auto* scratch = reinterpret_cast<int32_t*>(thread_scratch_[index(thread)].bytes());
      kernels_->linear_int8(m, begin, end, quantized_.rows(row, stride), height, out, scratch);
      if (n.residual_threshold >= 0.0f) {  // the weights of this task are still in the cache
        out.bias = nullptr;
        out.accumulate = true;
        kernels_->linear_int8(m, begin, end, residual_.rows(row, stride), height, out, scratch);
      }
    } else {
      kernels_->linear_fp32(m, begin, end, x + row * width, width, height, out);
    }
  });
}

void Executor::kv_write(const Instruction& n, const StepInput& step) {
  const StateInfo& state = program_.states[index(n.state)];
  const BlockTable& table = step.tables[index(state.group)];
  const int64_t size = program_.block_size, element = storage_bytes(program_.kv);
  const int64_t stride = value_stride(state);
  const float* k = value(n.inputs[0]);
  const float* v = value(n.inputs[1]);
  uint8_t* keys = keys_[index(n.state)].bytes();
  uint8_t* values = values_[index(n.state)].bytes();
  // Runs of tokens within one block: neighbours in a block share the cache lines of its keys,
  // so one thread writes them.
  struct Run {
    int64_t token, count, block, at;
  };
  std::vector<Run> runs;
  for (int64_t s = 0; s < step.sequences; ++s) {
    for (int64_t t = step.starts[s]; t < step.starts[s + 1];) {
      const int64_t position = step.contexts[s] + (t - step.starts[s]), at = position % size;
      const int64_t count = std::min<int64_t>(size - at, step.starts[s + 1] - t);
      runs.push_back({t, count, table.data[s * table.width + position / size], at});
      t += count;
    }
  }
  const auto write = [&](int64_t task, int thread) {
    const Run& run = runs[index(task / state.kv_heads)];
    const int64_t h = task % state.kv_heads, slot = run.block * state.kv_heads + h;
    uint8_t* narrow = thread_scratch_[index(thread)].bytes();
    for (int64_t i = 0; i < run.count; ++i) {
      const int64_t row = (run.token + i) * state.kv_heads + h, at = run.at + i;
      kernels_->narrow(k + row * state.head_dim, state.head_dim, program_.kv, narrow);
      uint8_t* key = keys + (slot * state.head_dim * size + at) * element;
      for (int64_t d = 0; d < state.head_dim; ++d) {
        if (element == 2) std::memcpy(key + 2 * d * size, narrow + 2 * d, 2);
        else std::memcpy(key + 4 * d * size, narrow + 4 * d, 4);
      }
      kernels_->narrow(v + row * state.value_dim, state.value_dim, program_.kv,
                       values + (slot * size + at) * stride * element);
    }
  };
  const int64_t tasks = static_cast<int64_t>(runs.size()) * state.kv_heads;
  if (step.tokens * state.kv_heads * state.head_dim <= kInlineWork)
    for (int64_t task = 0; task < tasks; ++task) write(task, 0);
  else pool_->run(tasks, write);
}

void Executor::attention(const Instruction& n, const StepInput& step) {
  const StateInfo& state = program_.states[index(n.state)];
  const BlockTable& table = step.tables[index(state.group)];
  const int64_t group = n.heads / n.kv_heads;
  const int64_t tokens_a_task = std::max<int64_t>(1, 4 * kAttentionRows / group);
  struct Part {
    int64_t sequence, begin, end;
  };
  std::vector<Part> parts;
  for (int64_t s = 0; s < step.sequences; ++s) {
    const int64_t length = step.starts[s + 1] - step.starts[s];
    for (int64_t begin = 0; begin < length; begin += tokens_a_task)
      parts.push_back({s, begin, std::min(length, begin + tokens_a_task)});
  }
  const float* q = value(n.inputs[0]);
  float* out = value(n.outputs[0]);
  const auto count = static_cast<int64_t>(parts.size());
  pool_->run(count * n.kv_heads, [&](int64_t task, int thread) {
    // The longest contexts first, so that no thread is left with one at the end.
    const Part& part = parts[index(count - 1 - task / n.kv_heads)];
    AttentionTask a;
    a.kv = program_.kv;
    a.keys = keys_[index(n.state)].bytes();
    a.values = values_[index(n.state)].bytes();
    a.block_table = table.data + part.sequence * table.width;
    a.block_size = static_cast<int32_t>(program_.block_size);
    a.kv_heads = static_cast<int32_t>(n.kv_heads);
    a.kv_head = static_cast<int32_t>(task % n.kv_heads);
    a.group = static_cast<int32_t>(group);
    a.head_dim = static_cast<int32_t>(n.head_dim);
    a.value_dim = static_cast<int32_t>(n.value_dim);
    a.window = static_cast<int32_t>(n.window);
    a.scale = n.factor;
    a.softcap = n.softcap;
    a.sinks = !n.vectors.empty() && n.vectors[0] >= 0 ? program_.vectors[index(n.vectors[0])].data()
                                                      : nullptr;
    a.q_stride = n.heads * n.head_dim;
    a.out_stride = n.heads * n.value_dim;
    a.q = q + step.starts[part.sequence] * a.q_stride;
    a.out = out + step.starts[part.sequence] * a.out_stride;
    a.first_position = step.contexts[part.sequence];
    a.token_begin = part.begin;
    a.token_end = part.end;
    a.scratch = thread_scratch_[index(thread)].floats(0);
    kernels_->attention(a);
  });
}

void Executor::sample_rows(const Instruction& n, const StepInput& step, StepResult& result) {
  const float* logits = value(n.inputs[0]);
  result.samples.resize(index(step.outputs));
  pool_->run(step.outputs, [&](int64_t r, int thread) {
    SampleInput in;
    in.logits = logits + r * program_.vocab;
    in.vocab = program_.vocab;
    in.row = step.sampling[r];
    in.history = step.history + step.history_starts[r];
    in.history_length = step.history_starts[r + 1] - step.history_starts[r];
    in.bias_tokens = step.bias_tokens + step.bias_starts[r];
    in.bias_values = step.bias_values + step.bias_starts[r];
    in.bias_length = step.bias_starts[r + 1] - step.bias_starts[r];
    result.samples[index(r)] = sample(*kernels_, in, sampler_scratch_[index(thread)]);
  });
}

}  // namespace sartor
