// What a step does with the state of its sequences: pages of keys and values, recurrent state.
#include <cstring>

#include "executor.hpp"

namespace sartor {
namespace {

int64_t value_stride(int64_t value_dim) { return round_up(value_dim, kLanes); }

}  // namespace

Executor::Pages Executor::pages_of(const Instruction& n, const StepInput& step) {
  const StateInfo& state = program_.states[index(n.state)];
  return {program_.kv,
          state.kv_heads,
          state.head_dim,
          state.value_dim,
          keys_[index(n.state)].bytes(),
          values_[index(n.state)].bytes(),
          step.tables[index(state.group)],
          step.contexts};
}

// Token t's keys are k[t * k_stride] and on, kv_heads * head_dim of them; values likewise.
void Executor::write_pages(const Pages& pages, const StepInput& step, const float* k,
                           int64_t k_stride, const float* v, int64_t v_stride) {
  const int64_t size = program_.block_size, element = storage_bytes(pages.storage);
  const int64_t stride = value_stride(pages.value_dim);
  // Runs of tokens within one block: neighbours in a block share the cache lines of its keys,
  // so one thread writes them.
  struct Run {
    int64_t token, count, block, at;
  };
  std::vector<Run> runs;
  for (int64_t s = 0; s < step.sequences; ++s) {
    for (int64_t t = step.starts[s]; t < step.starts[s + 1];) {
      const int64_t position = pages.contexts[s] + (t - step.starts[s]), at = position % size;
      const int64_t count = std::min<int64_t>(size - at, step.starts[s + 1] - t);
      runs.push_back({t, count, pages.table.data[s * pages.table.width + position / size], at});
      t += count;
    }
  }
  const auto write = [&](int64_t task, int thread) {
    const Run& run = runs[index(task / pages.kv_heads)];
    const int64_t h = task % pages.kv_heads, slot = run.block * pages.kv_heads + h;
    uint8_t* narrow = thread_scratch_[index(thread)].bytes();
    for (int64_t i = 0; i < run.count; ++i) {
      const int64_t row = run.token + i, at = run.at + i;
      kernels_->narrow(k + row * k_stride + h * pages.head_dim, pages.head_dim, pages.storage,
                       narrow);
      uint8_t* key = pages.keys + (slot * pages.head_dim * size + at) * element;
      for (int64_t d = 0; d < pages.head_dim; ++d) {
        if (element == 2) std::memcpy(key + 2 * d * size, narrow + 2 * d, 2);
        else std::memcpy(key + 4 * d * size, narrow + 4 * d, 4);
      }
      kernels_->narrow(v + row * v_stride + h * pages.value_dim, pages.value_dim, pages.storage,
                       pages.values + (slot * size + at) * stride * element);
    }
  };
  const int64_t tasks = static_cast<int64_t>(runs.size()) * pages.kv_heads;
  if (step.tokens * pages.kv_heads * pages.head_dim <= kInlineWork)
    for (int64_t task = 0; task < tasks; ++task) write(task, 0);
  else pool_->run(tasks, write);
}

void Executor::attend_pages(const Instruction& n, const Pages& pages, const StepInput& step,
                            const float* q, float* out, bool causal) {
  const int64_t group = n.heads / pages.kv_heads;
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
  const auto count = static_cast<int64_t>(parts.size());
  pool_->run(count * pages.kv_heads, [&](int64_t task, int thread) {
    // The longest contexts first, so that no thread is left with one at the end.
    const Part& part = parts[index(count - 1 - task / pages.kv_heads)];
    AttentionTask a;
    a.kv = pages.storage;
    a.keys = pages.keys;
    a.values = pages.values;
    a.block_table = pages.table.data + part.sequence * pages.table.width;
    a.block_size = static_cast<int32_t>(program_.block_size);
    a.kv_heads = static_cast<int32_t>(pages.kv_heads);
    a.kv_head = static_cast<int32_t>(task % pages.kv_heads);
    a.group = static_cast<int32_t>(group);
    a.head_dim = static_cast<int32_t>(pages.head_dim);
    a.value_dim = static_cast<int32_t>(pages.value_dim);
    a.window = static_cast<int32_t>(n.window);
    a.causal = causal;
    a.length = step.starts[part.sequence + 1] - step.starts[part.sequence];
    a.scale = n.factor;
    a.softcap = n.softcap;
    a.sinks = vector(n, 0);
    a.q_stride = n.heads * pages.head_dim;
    a.out_stride = n.heads * pages.value_dim;
    a.q = q + step.starts[part.sequence] * a.q_stride;
    a.out = out + step.starts[part.sequence] * a.out_stride;
    a.first_position = pages.contexts[part.sequence];
    a.token_begin = part.begin;
    a.token_end = part.end;
    a.scratch = thread_scratch_[index(thread)].floats(0);
    kernels_->attention(a);
  });
}

void Executor::kv_write(const Instruction& n, const StepInput& step) {
  const Pages pages = pages_of(n, step);
  write_pages(pages, step, value(n.inputs[0]), pages.kv_heads * pages.head_dim, value(n.inputs[1]),
              pages.kv_heads * pages.value_dim);
}

// A key is the latent and its rotated part, a value the latent alone. Both are kept, each in the
// order in which attention reads it: twice the memory of one, and one kernel for all attention.
void Executor::latent_write(const Instruction& n, const StepInput& step) {
  const Pages pages = pages_of(n, step);
  const int64_t rank = pages.value_dim, rope = pages.head_dim - rank;
  const float* latent = value(n.inputs[0]);
  const float* rotated = value(n.inputs[1]);
  float* keys = gathered_.floats(step.tokens * pages.head_dim);
  for (int64_t t = 0; t < step.tokens; ++t) {
    std::memcpy(keys + t * pages.head_dim, latent + t * rank, index(rank) * 4);
    std::memcpy(keys + t * pages.head_dim + rank, rotated + t * rope, index(rope) * 4);
  }
  write_pages(pages, step, keys, pages.head_dim, latent, rank);
}

void Executor::attention(const Instruction& n, const StepInput& step) {
  attend_pages(n, pages_of(n, step), step, value(n.inputs[0]), value(n.outputs[0]), true);
}

// Keys and values of the step alone, in pages that last as long as this call.
void Executor::self_attention(const Instruction& n, const StepInput& step) {
  const int64_t size = program_.block_size;
  int64_t width = 0, blocks = 0;
  for (int64_t s = 0; s < step.sequences; ++s)
    width = std::max(width, (step.starts[s + 1] - step.starts[s] + size - 1) / size);
  std::vector<int32_t> table(index(step.sequences * width), -1);
  for (int64_t s = 0; s < step.sequences; ++s) {
    const int64_t own = (step.starts[s + 1] - step.starts[s] + size - 1) / size;
    for (int64_t b = 0; b < own; ++b) table[index(s * width + b)] = static_cast<int32_t>(blocks++);
  }
  const std::vector<int32_t> contexts(index(step.sequences), 0);
  const int64_t slots = blocks * n.kv_heads * size;
  float* keys = gathered_.floats(slots * n.head_dim);
  float* values = products_.floats(slots * value_stride(n.value_dim));
  const Pages pages{Storage::kFp32,
                    n.kv_heads,
                    n.head_dim,
                    n.value_dim,
                    reinterpret_cast<uint8_t*>(keys),
                    reinterpret_cast<uint8_t*>(values),
                    {table.data(), width},
                    contexts.data()};
  write_pages(pages, step, value(n.inputs[1]), n.kv_heads * n.head_dim, value(n.inputs[2]),
              n.kv_heads * n.value_dim);
  attend_pages(n, pages, step, value(n.inputs[0]), value(n.outputs[0]), false);
}

Executor::Slots Executor::slots_of(const Instruction& n, const StepInput& step, int64_t s) {
  const StateInfo& state = program_.states[index(n.state)];
  const BlockTable& table = step.tables[index(state.group)];
  const int64_t context = step.contexts[s], length = step.starts[s + 1] - step.starts[s];
  const auto slot = [&](int64_t position) {
    const int64_t block = table.data[s * table.width + position / program_.block_size];
    return reinterpret_cast<float*>(keys_[index(n.state)].bytes()) + block * state.slot_floats;
  };
  return {context ? slot(context - 1) : nullptr, slot(context + length - 1)};
}

void Executor::short_conv(const Instruction& n, const StepInput& step) {
  const int64_t width = width_of(n.inputs[0]);
  const int64_t taps = static_cast<int64_t>(program_.vectors[index(n.vectors[0])].size()) / width;
  constexpr int64_t kFeatures = 256;
  const int64_t parts = (width + kFeatures - 1) / kFeatures;
  pool_->run(step.sequences * parts, [&](int64_t task, int) {
    const int64_t s = task / parts, begin = task % parts * kFeatures, first = step.starts[s];
    const Slots slots = slots_of(n, step, s);
    ConvTask t;
    t.x = value(n.inputs[0]) + first * width;
    t.out = value(n.outputs[0]) + first * width;
    t.before = slots.before;
    t.after = slots.after;
    t.weight = vector(n, 0);
    t.bias = vector(n, 1);
    t.tokens = step.starts[s + 1] - first;
    t.width = width;
    t.taps = taps;
    t.begin = begin;
    t.end = std::min(width, begin + kFeatures);
    kernels_->short_conv(t);
  });
}

void Executor::recurrent_scan(const Instruction& n, const StepInput& step) {
  const int64_t parts = (n.value_dim + kScanFeatures - 1) / kScanFeatures;
  pool_->run(step.sequences * n.heads * parts, [&](int64_t task, int) {
    const int64_t part = task % parts, head = task / parts % n.heads, s = task / parts / n.heads;
    const int64_t first = step.starts[s], key = head / (n.heads / n.key_heads) * n.key_dim;
    const int64_t state = head * n.key_dim * n.value_dim;
    const Slots slots = slots_of(n, step, s);
    ScanTask t;
    t.key_stride = n.key_heads * n.key_dim;
    t.value_stride = n.heads * n.value_dim;
    t.head_stride = n.heads;
    t.q = value(n.inputs[0]) + first * t.key_stride + key;
    t.k = value(n.inputs[1]) + first * t.key_stride + key;
    t.v = value(n.inputs[2]) + first * t.value_stride + head * n.value_dim;
    t.decay = value(n.inputs[3]) + first * n.heads + head;
    t.beta = value(n.inputs[4]) + first * n.heads + head;
    t.out = value(n.outputs[0]) + first * t.value_stride + head * n.value_dim;
    t.before = slots.before ? slots.before + state : nullptr;
    t.after = slots.after + state;
    t.tokens = step.starts[s + 1] - first;
    t.key_dim = n.key_dim;
    t.value_dim = n.value_dim;
    t.begin = part * kScanFeatures;
    t.end = std::min(n.value_dim, t.begin + kScanFeatures);
    t.scale = n.factor;
    t.delta = n.delta;
    kernels_->recurrent_scan(t);
  });
}

}  // namespace sartor
