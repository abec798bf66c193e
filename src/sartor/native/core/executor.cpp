#include "executor.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>

#include "program_check.hpp"

namespace sartor {
namespace {

constexpr int64_t kAlignment = 64;

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
  check_program(program_);
  plan_buffers();
  variants_.resize(program_.instructions.size());
  const auto threads = index(pool_->threads());
  sampler_scratch_.resize(threads);
  int64_t scratch = linear_scratch();
  for (const StateInfo& state : program_.states)
    if (!state.slot_floats) scratch = std::max(scratch, attention_scratch(layout_of(state)));
  for (const Instruction& n : program_.instructions)
    if (n.op == Op::kSelfAttention)
      scratch = std::max(scratch, attention_scratch({Storage::kFp32, n.head_dim, n.value_dim,
                                                     program_.block_size}));
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
  if (program_.embedding >= 0) last_use[index(program_.embedding)] = program_.instructions.size();
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
  switch (program_.values[index(value)].rows) {
    case Rows::kOutputs:
      return step.outputs;
    case Rows::kSequences:
      return step.sequences;
    default:
      return step.tokens;
  }
}

int64_t Executor::block_bytes(int32_t group) const {
  int64_t total = 0;
  for (const StateInfo& state : program_.states)
    if (state.group == group)
      total +=
          state.slot_floats
              ? state.slot_floats * 4
              : state.kv_heads * (layout_of(state).key_bytes() + layout_of(state).value_bytes());
  return total;
}

void Executor::allocate_state(const std::vector<int64_t>& blocks) {
  keys_.clear();
  values_.clear();
  for (const StateInfo& state : program_.states) {
    const int64_t count = blocks.at(index(state.group));
    keys_.emplace_back();
    values_.emplace_back();
    if (state.slot_floats) {
      keys_.back().zeroed(count * state.slot_floats * 4);
      continue;
    }
    const int64_t slots = count * state.kv_heads;
    keys_.back().zeroed(slots * layout_of(state).key_bytes());
    values_.back().zeroed(slots * layout_of(state).value_bytes());
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
  for (const Buffer* buffer : {&gathered_, &products_, &low_rank_, &arranged_, &parts_})
    total += buffer->size();
  for (const auto* buffers : {&slots_, &rope_tables_, &thread_scratch_})
    for (const Buffer& buffer : *buffers) total += buffer.size();
  return total;
}

void Executor::profile(bool on) {
  profiling_ = on;
  seconds_.assign(on ? program_.instructions.size() : 0, 0.0);
}

StepResult Executor::run(const StepInput& step) {
  StepResult result;
  result.taps.resize(program_.taps.size());
  result.tap_rows.resize(program_.taps.size());
  quantized_value_ = refined_value_ = kNoValue;
  std::vector<int64_t> needed(slots_.size(), 0);
  for (size_t v = 0; v < program_.values.size(); ++v) {
    if (slot_of_[v] < 0) continue;
    int64_t& floats = needed[index(slot_of_[v])];
    floats = std::max(floats, rows(static_cast<int32_t>(v), step) * program_.values[v].width + 16);
  }
  for (size_t s = 0; s < slots_.size(); ++s) slots_[s].floats(needed[s]);
  prepare_ropes(step);
  copy_blocks(step);
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
  if (program_.embedding >= 0) {
    const float* data = value(program_.embedding);
    result.embeddings.assign(data, data + step.sequences * width_of(program_.embedding));
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
  if (n.custom.function) return custom(n, step);
  switch (n.op) {
    case Op::kEmbedding: {
      const Matrix& table = program_.matrices[index(n.matrices[0])];
      const int32_t* ids = n.positions ? step.positions : step.token_ids;
      for (int64_t t = 0; t < step.tokens; ++t)
        if (ids[t] < 0 || ids[t] >= table.n)
          throw std::out_of_range(n.name + ": row " + std::to_string(ids[t]) + " of a table of " +
                                  std::to_string(table.n));
      float* out = value(n.outputs[0]);
      each_row(step.tokens, table.k * 4, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
          kernels_->dequantize_row(table, ids[t], n.factor, out + t * table.k);
      });
      return;
    }
    case Op::kLinear:
      linear(n, step);
      return adapt(n, step);
    case Op::kGroupedLinear:
    case Op::kHeadLinear:
      return grouped_linear(n, step);
    case Op::kRouteExperts:
      return route(n, rows(n.inputs[0], step));
    case Op::kCombineExperts: {
      const float* parts = value(n.inputs[0]);
      const float* weights = value(n.inputs[1]);
      const int64_t count = width_of(n.inputs[1]), width = width_of(n.outputs[0]);
      float* out = value(n.outputs[0]);
      each_row(rows(n.inputs[0], step), count * width, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
          kernels_->weighted_sum(parts + t * count * width, weights + t * count, count, width,
                                 out + t * width);
      });
      return;
    }
    case Op::kSplit:
    case Op::kConcat:
    case Op::kReplaceRows:
      return rearrange(n, step);
    case Op::kPool:
      return pool(n, step);
    case Op::kSelfAttention:
      return self_attention(n, step);
    case Op::kLatentWrite:
      return latent_write(n, step);
    case Op::kShortConv:
      return short_conv(n, step);
    case Op::kRecurrentScan:
      return recurrent_scan(n, step);
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
          kernels_->layer_norm(from + t * width, vector(n, 0), vector(n, 1), n.eps, width,
                               out + t * width);
      });
      return;
    }
    case Op::kL2Norm: {
      const int64_t width = width_of(n.inputs[0]);
      const float* from = value(n.inputs[0]);
      float* out = value(n.outputs[0]);
      each_row(rows(n.inputs[0], step), width, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t)
          kernels_->l2_norm(from + t * width, n.eps, width, n.run, out + t * width);
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
      const float* row = vector(n, 0);  // the second operand of every row
      float* out = value(n.outputs[0]);
      each_row(rows(n.inputs[0], step), width, [&](int64_t begin, int64_t end) {
        if (row) {
          const auto apply = n.op == Op::kAdd ? kernels_->add : kernels_->mul;
          for (int64_t t = begin; t < end; ++t) apply(x + t * width, row, width, out + t * width);
          return;
        }
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

// Calls a kernel of another package: the same rows, as the public interface describes them.
void Executor::custom(const Instruction& n, const StepInput& step) {
  std::vector<sartor_rows> inputs, outputs;
  std::vector<sartor_vector> weights;
  for (const int32_t v : n.inputs) inputs.push_back({value(v), width_of(v)});
  for (const int32_t v : n.outputs) outputs.push_back({value(v), width_of(v)});
  for (size_t i = 0; i < n.vectors.size(); ++i) {
    const float* data = vector(n, i);
    const auto size = data ? program_.vectors[index(n.vectors[i])].size() : 0;
    weights.push_back({data, static_cast<int64_t>(size)});
  }
  const bool norm = n.op == Op::kRmsNorm || n.op == Op::kAddRmsNorm;
  each_row(rows(n.inputs[0], step), inputs[0].width, [&](int64_t begin, int64_t end) {
    sartor_kernel_call call{};
    call.abi = SARTOR_KERNEL_ABI;
    call.op = n.custom.op.c_str();
    call.kind = n.custom.kind.c_str();
    call.inputs = static_cast<int32_t>(inputs.size());
    call.input = inputs.data();
    call.weights = static_cast<int32_t>(weights.size());
    call.weight = weights.data();
    call.outputs = static_cast<int32_t>(outputs.size());
    call.output = outputs.data();
    call.row_begin = begin;
    call.row_end = end;
    call.eps = n.eps;
    call.weight_offset = n.weight_offset;
    call.factor = n.factor;
    call.cap = n.softcap;
    call.run = norm ? weights[0].size : n.run;
    n.custom.function(&call, n.custom.context);
  });
}

void Executor::rearrange(const Instruction& n, const StepInput& step) {
  if (n.op == Op::kReplaceRows) {
    const int64_t width = width_of(n.inputs[0]);
    float* out = value(n.outputs[0]);
    std::memcpy(out, value(n.inputs[0]), index(step.tokens * width) * 4);
    for (int64_t i = 0; i < step.embeddings; ++i)
      std::memcpy(out + step.embedding_rows[i] * width, step.embedding_values + i * width,
                  index(width) * 4);
    return;
  }
  const bool split = n.op == Op::kSplit;
  const int32_t whole = split ? n.inputs[0] : n.outputs[0];
  const auto& parts = split ? n.outputs : n.inputs;
  const int64_t width = width_of(whole);
  float* all = value(whole);
  each_row(rows(whole, step), width, [&](int64_t begin, int64_t end) {
    int64_t at = 0;  // of a part in a run
    for (size_t p = 0; p < parts.size(); ++p) {
      const int64_t piece = n.widths[p];
      float* part = value(parts[p]);
      for (int64_t i = begin * n.run; i < end * n.run; ++i) {
        float* in_whole = all + i * (width / n.run) + at;
        float* in_part = part + i * piece;
        std::memcpy(split ? in_part : in_whole, split ? in_whole : in_part, index(piece) * 4);
      }
      at += piece;
    }
  });
}

void Executor::pool(const Instruction& n, const StepInput& step) {
  const int64_t width = width_of(n.inputs[0]);
  const float* x = value(n.inputs[0]);
  float* out = value(n.outputs[0]);
  for (int64_t s = 0; s < step.sequences; ++s, out += width) {
    const int64_t begin = step.starts[s], end = step.starts[s + 1];
    if (n.pool != Pool::kMean) {
      const int64_t row = n.pool == Pool::kFirst ? begin : end - 1;
      std::memcpy(out, x + row * width, index(width) * 4);
      continue;
    }
    std::memcpy(out, x + begin * width, index(width) * 4);
    for (int64_t t = begin + 1; t < end; ++t) kernels_->add(out, x + t * width, width, out);
    kernels_->scale(out, 1.0f / static_cast<float>(end - begin), width, out);
  }
}

void Executor::route(const Instruction& n, int64_t count) {
  const Routing& routing = n.routing;
  const int64_t experts = width_of(n.inputs[0]), k = routing.top_k;
  const int64_t size = experts / routing.groups;  // of a group
  const float* logits = value(n.inputs[0]);
  const float* bias = vector(n, 0);
  auto* chosen = reinterpret_cast<int32_t*>(value(n.outputs[0]));
  float* weights = value(n.outputs[1]);
  each_row(count, experts * 16, [&](int64_t begin, int64_t end) {
    constexpr float kNever = -std::numeric_limits<float>::infinity();
    std::vector<float> scores(index(experts)), choice(index(experts)), merit(index(routing.groups));
    for (int64_t t = begin; t < end; ++t) {
      const float* row = logits + t * experts;
      if (routing.sigmoid) {
        kernels_->activation(Activation::kSigmoid, row, experts, scores.data());
      } else {
        const float top = kernels_->max(row, experts);
        float total = 0;
        for (int64_t e = 0; e < experts; ++e) total += scores[index(e)] = std::exp(row[e] - top);
        for (float& score : scores) score /= total;
      }
      for (int64_t e = 0; e < experts; ++e)
        choice[index(e)] = scores[index(e)] + (bias ? bias[e] : 0.0f);
      if (routing.groups > 1) {
        for (int64_t g = 0; g < routing.groups; ++g) {
          float best = kNever, second = kNever;
          for (int64_t e = g * size; e < (g + 1) * size; ++e) {
            const float c = choice[index(e)];
            second = std::max(second, std::min(best, c));
            best = std::max(best, c);
          }
          merit[index(g)] = routing.by_best_two && size > 1 ? best + second : best;
        }
        for (int64_t g = 0; g < routing.groups; ++g) {
          int64_t better = 0;  // groups before this one
          for (int64_t o = 0; o < routing.groups; ++o)
            better +=
                merit[index(o)] > merit[index(g)] || (merit[index(o)] == merit[index(g)] && o < g);
          if (better >= routing.top_groups) std::fill_n(choice.begin() + g * size, size, kNever);
        }
      }
      float total = 0;
      for (int64_t j = 0; j < k; ++j) {
        const auto best = std::max_element(choice.begin(), choice.end()) - choice.begin();
        chosen[t * k + j] = static_cast<int32_t>(best);
        weights[t * k + j] = scores[index(best)];
        total += scores[index(best)];
        choice[index(best)] = kNever;
      }
      for (int64_t j = 0; j < k; ++j)
        weights[t * k + j] =
            (routing.normalize ? weights[t * k + j] / total : weights[t * k + j]) * n.factor;
    }
  });
}

void Executor::load_adapter(int32_t number, Adapter adapter) {
  adapters_[number] = std::move(adapter);
}

void Executor::sample_rows(const Instruction& n, const StepInput& step, StepResult& result) {
  float* logits = value(n.inputs[0]);
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
