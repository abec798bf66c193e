// What a step does with whole blocks of state, and with recurrent state.
#include <cstring>

#include "executor.hpp"

namespace sartor {

void Executor::copy_blocks(const StepInput& step) {
  if (step.copies.empty()) return;
  for (size_t s = 0; s < program_.states.size(); ++s) {
    const StateInfo& state = program_.states[s];
    const BlockCopies& copies = step.copies[index(state.group)];
    const auto copy = [&](const Buffer& buffer, int64_t bytes) {
      for (int64_t i = 0; i < copies.count; ++i)
        std::memcpy(buffer.bytes() + copies.pairs[2 * i + 1] * bytes,
                    buffer.bytes() + copies.pairs[2 * i] * bytes, index(bytes));
    };
    if (state.slot_floats) {
      copy(keys_[s], state.slot_floats * 4);
      continue;
    }
    copy(keys_[s], state.kv_heads * layout_of(state).key_bytes());
    copy(values_[s], state.kv_heads * layout_of(state).value_bytes());
  }
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
