// What a step does with pages of keys and values.
#include <cstring>

#include "executor.hpp"

namespace sartor {
namespace {

constexpr int64_t kTasksAThread = 4;  // so that no thread waits long for the last one

int64_t tiles_of(int64_t rows) { return (rows + kAttentionTile - 1) / kAttentionTile; }

// The segments that rows of a task see.
Range segments_of(const AttentionTask& t, int64_t row_begin, int64_t row_end) {
  return {t.positions(row_begin).begin / kAttentionSegment,
          (t.positions(row_end - 1).end - 1) / kAttentionSegment + 1};
}

// Rows of a sequence with all their segments or, where few rows have many, with some of them.
struct Part {
  int64_t sequence, row_begin, row_end;
  Range segments;
  int64_t floats = -1, head_floats = 0;  // where the results of its segments go, by kv head
  int64_t work() const { return tiles_of(row_end - row_begin) * segments.count(); }
};

}  // namespace

Executor::Pages Executor::pages_of(const Instruction& n, const StepInput& step) {
  const StateInfo& state = program_.states[index(n.state)];
  return {layout_of(state),
          state.kv_heads,
          keys_[index(n.state)].bytes(),
          values_[index(n.state)].bytes(),
          step.tables[index(state.group)],
          step.contexts};
}

// Token t's keys are k[t * k_stride] and on, kv_heads * head_dim of them; values likewise.
void Executor::write_pages(const Pages& pages, const StepInput& step, const float* k,
                           int64_t k_stride, const float* v, int64_t v_stride) {
  const KvLayout& layout = pages.layout;
  const int64_t size = layout.block_size;
  // Runs of tokens within one block: neighbours in a block share cache lines, so one thread
  // writes them.
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
  const auto write = [&](int64_t task, int) {
    const Run& run = runs[index(task)];
    for (int64_t h = 0; h < pages.kv_heads; ++h) {
      const int64_t slot = run.block * pages.kv_heads + h;
      KvWriteTask t;
      t.layout = layout;
      t.k = k + run.token * k_stride + h * layout.head_dim;
      t.v = v + run.token * v_stride + h * layout.value_dim;
      t.k_stride = k_stride;
      t.v_stride = v_stride;
      t.at = run.at;
      t.count = run.count;
      t.keys = pages.keys + slot * layout.key_bytes();
      t.values = pages.values + slot * layout.value_bytes();
      kernels_->write_kv(t);
    }
  };
  // A run waits for its cache lines more than it computes: a few are worth a second thread.
  const auto tasks = static_cast<int64_t>(runs.size());
  if (tasks * pages.kv_heads < 2 * kTasksAThread)
    for (int64_t task = 0; task < tasks; ++task) write(task, 0);
  else pool_->run(tasks, write);
}

void Executor::attend_pages(const Instruction& n, const Pages& pages, const StepInput& step,
                            const float* q, float* out, bool causal) {
  const KvLayout& layout = pages.layout;
  const int64_t group = n.heads / pages.kv_heads, threads = pool_->threads();
  const auto task_of = [&](int64_t s) {
    AttentionTask a;
    a.layout = layout;
    a.key_stride = pages.kv_heads * layout.key_bytes();
    a.value_stride = pages.kv_heads * layout.value_bytes();
    a.block_table = pages.table.data + s * pages.table.width;
    a.group = group;
    a.window = n.window;
    a.causal = causal;
    a.length = step.starts[s + 1] - step.starts[s];
    a.scale = n.factor;
    a.softcap = n.softcap;
    a.sinks = vector(n, 0);
    a.q_stride = n.heads * layout.head_dim;
    a.out_stride = n.heads * layout.value_dim;
    a.q = q + step.starts[s] * a.q_stride;
    a.out = out + step.starts[s] * a.out_stride;
    a.first_position = pages.contexts[s];
    return a;
  };

  int64_t work = 0;
  for (int64_t s = 0; s < step.sequences; ++s) {
    const AttentionTask a = task_of(s);
    const int64_t rows = a.length * group;
    work += Part{s, 0, rows, segments_of(a, 0, rows)}.work() * pages.kv_heads;
  }
  const int64_t share = threads > 1 ? std::max<int64_t>(1, work / (kTasksAThread * threads)) : work;
  std::vector<Part> parts, split;
  int64_t floats = 0;
  for (int64_t s = 0; s < step.sequences; ++s) {
    const AttentionTask a = task_of(s);
    const Part whole{s, 0, a.length * group, segments_of(a, 0, a.length * group)};
    const auto [first, last] = whole.segments;
    if (whole.row_end <= kAttentionTile && whole.work() > share) {
      const int64_t segment = whole.row_end * attention_record(layout);
      split.push_back(whole);
      split.back().floats = floats;
      split.back().head_floats = whole.segments.count() * segment;
      for (int64_t begin = first; begin < last; begin += share) {
        parts.push_back(split.back());
        parts.back().segments = {begin, std::min(last, begin + share)};
        parts.back().floats += (begin - first) * segment;
      }
      floats += pages.kv_heads * split.back().head_floats;
      continue;
    }
    const int64_t tiles =
        std::clamp<int64_t>(share / whole.segments.count(), 1, kAttentionTaskRows / kAttentionTile);
    for (int64_t begin = 0; begin < whole.row_end; begin += tiles * kAttentionTile) {
      const int64_t end = std::min(whole.row_end, begin + tiles * kAttentionTile);
      parts.push_back({s, begin, end, segments_of(a, begin, end)});
    }
  }
  // The longest first, so that no thread is left with one at the end.
  std::stable_sort(parts.begin(), parts.end(),
                   [](const Part& a, const Part& b) { return a.work() > b.work(); });
  float* results = parts_.floats(floats);

  const auto run = [&](const std::vector<Part>& of, void (*kernel)(const AttentionTask&)) {
    const auto count = static_cast<int64_t>(of.size());
    // All kv heads of a block lie together: one thread reads them where there is enough to do.
    const int64_t together = count >= kTasksAThread * threads ? pages.kv_heads : 1;
    pool_->run(count * (pages.kv_heads / together), [&](int64_t task, int thread) {
      const Part& part = of[index(task * together / pages.kv_heads)];
      AttentionTask a = task_of(part.sequence);
      a.row_begin = part.row_begin;
      a.row_end = part.row_end;
      a.segment_begin = part.segments.begin;
      a.segment_end = part.segments.end;
      a.scratch = thread_scratch_[index(thread)].floats(0);
      const int64_t head = task * together % pages.kv_heads;
      for (a.kv_head = head; a.kv_head < head + together; ++a.kv_head) {
        a.keys = pages.keys + a.kv_head * layout.key_bytes();
        a.values = pages.values + a.kv_head * layout.value_bytes();
        if (part.floats >= 0) a.parts = results + part.floats + a.kv_head * part.head_floats;
        kernel(a);
      }
    });
  };
  run(parts, kernels_->attention);
  run(split, kernels_->attention_merge);
}

void Executor::kv_write(const Instruction& n, const StepInput& step) {
  const Pages pages = pages_of(n, step);
  write_pages(pages, step, value(n.inputs[0]), pages.kv_heads * pages.layout.head_dim,
              value(n.inputs[1]), pages.kv_heads * pages.layout.value_dim);
}

// A key is the latent and its rotated part, a value the latent alone. Both are kept, each in the
// order in which attention reads it: twice the memory of one, and one kernel for all attention.
void Executor::latent_write(const Instruction& n, const StepInput& step) {
  const Pages pages = pages_of(n, step);
  const int64_t dim = pages.layout.head_dim, rank = pages.layout.value_dim, rope = dim - rank;
  const float* latent = value(n.inputs[0]);
  const float* rotated = value(n.inputs[1]);
  float* keys = gathered_.floats(step.tokens * dim);
  for (int64_t t = 0; t < step.tokens; ++t) {
    std::memcpy(keys + t * dim, latent + t * rank, index(rank) * 4);
    std::memcpy(keys + t * dim + rank, rotated + t * rope, index(rope) * 4);
  }
  write_pages(pages, step, keys, dim, latent, rank);
}

void Executor::attention(const Instruction& n, const StepInput& step) {
  attend_pages(n, pages_of(n, step), step, value(n.inputs[0]), value(n.outputs[0]), true);
}

// Keys and values of the step alone, in pages that last as long as this call.
void Executor::self_attention(const Instruction& n, const StepInput& step) {
  const KvLayout layout{Storage::kFp32, n.head_dim, n.value_dim, program_.block_size};
  const int64_t size = layout.block_size;
  int64_t width = 0, blocks = 0;
  for (int64_t s = 0; s < step.sequences; ++s)
    width = std::max(width, (step.starts[s + 1] - step.starts[s] + size - 1) / size);
  std::vector<int32_t> table(index(step.sequences * width), -1);
  for (int64_t s = 0; s < step.sequences; ++s) {
    const int64_t own = (step.starts[s + 1] - step.starts[s] + size - 1) / size;
    for (int64_t b = 0; b < own; ++b) table[index(s * width + b)] = static_cast<int32_t>(blocks++);
  }
  const std::vector<int32_t> contexts(index(step.sequences), 0);
  float* keys = gathered_.floats(blocks * n.kv_heads * layout.key_bytes() / 4);
  float* values = products_.floats(blocks * n.kv_heads * layout.value_bytes() / 4);
  const Pages pages{layout,
                    n.kv_heads,
                    reinterpret_cast<uint8_t*>(keys),
                    reinterpret_cast<uint8_t*>(values),
                    {table.data(), width},
                    contexts.data()};
  write_pages(pages, step, value(n.inputs[1]), n.kv_heads * n.head_dim, value(n.inputs[2]),
              n.kv_heads * n.value_dim);
  attend_pages(n, pages, step, value(n.inputs[0]), value(n.outputs[0]), false);
}

}  // namespace sartor
