// Linear layers of a step: plain, of experts, and what adapters add.
#include <chrono>
#include <cstring>
#include <stdexcept>

#include "executor.hpp"

namespace sartor {

void Executor::Quantized::reserve(int64_t rows, int64_t stride) {
  codes.floats(rows * stride / 4 + 16);
  scales.floats(rows * stride / kChunk + 16);
  sums.floats(rows * stride / 16 + 16);
}

Executor::Quantized::Rows Executor::Quantized::rows(int64_t first, int64_t stride) const {
  return {reinterpret_cast<int8_t*>(codes.bytes()) + first * stride,
          reinterpret_cast<float*>(scales.bytes()) + first * (stride / kChunk),
          reinterpret_cast<int32_t*>(sums.bytes()) + first * (stride / 16)};
}

const float* Executor::permuted(const Matrix& m, const float* x, int64_t count, int64_t width) {
  float* out = gathered_.floats(count * width + 16);
  each_row(count, width, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      for (int64_t i = 0; i < width; ++i) out[t * width + i] = x[t * width + m.permutation[i]];
  });
  return out;
}

void Executor::multiply(int32_t v, const float* x, int64_t count, int64_t width, float threshold,
                        const LinearVariant& variant, const std::vector<Product>& products) {
  int64_t blocks = 0;
  for (const Product& product : products) blocks += product.matrix->blocks();
  const int64_t row_tasks = (count + variant.task_rows - 1) / variant.task_rows;
  const int64_t block_step = blocks_a_task(blocks * row_tasks, count, variant);
  std::vector<int64_t> first_task;
  int64_t column_tasks = 0;
  for (const Product& product : products) {
    first_task.push_back(column_tasks);
    column_tasks += (product.matrix->blocks() + block_step - 1) / block_step;
  }
  std::vector<RowRun> runs;
  for (int64_t row = 0; row < count; row += variant.task_rows)
    runs.push_back({row, std::min<int64_t>(variant.task_rows, count - row)});
  std::vector<const Matrix*> matrices;
  for (const Product& product : products) matrices.push_back(product.matrix);
  const std::vector<Arranged> arranged = prepare(v, x, width, threshold, matrices, runs, variant);
  pool_->run(column_tasks * row_tasks, [&](int64_t task, int thread) {
    const int64_t column = task / row_tasks;
    const auto r = index(task % row_tasks);
    const RowRun& run = runs[r];
    size_t p = products.size() - 1;
    while (first_task[p] > column) --p;
    const Matrix& m = *products[p].matrix;
    const int64_t begin = (column - first_task[p]) * block_step;
    const int64_t end = std::min(m.blocks(), begin + block_step);
    LinearOutput out = products[p].out;
    out.data += run.begin * out.stride;
    if (rounds(m))
      kernels_->linear_int8(m, begin, end, arranged[p][r], variant, out,
                            thread_scratch_[index(thread)].floats(0));
    else kernels_->linear_fp32(m, begin, end, x + run.begin * width, width, run.count, out);
  });
}

// Enough tasks for every thread to end at about the same time.
int64_t Executor::blocks_a_task(int64_t blocks, int64_t rows, const LinearVariant& variant) const {
  if (variant.task_blocks > 0) return variant.task_blocks;
  // Whole groups of the column blocks that are read, or unpacked, together. The tasks of a thread
  // lie side by side, so smaller ones cost little, and the threads' shares come out more even.
  const bool streams = rows <= kernels_->linear.direct_rows;
  const int64_t group = streams ? kBlocksAtOnce : kBlocksUnpacked;
  const int64_t share = std::max<int64_t>(1, blocks / (pool_->threads() * (streams ? 6 : 16)));
  const int64_t most = most_blocks(std::min<int64_t>(rows, variant.task_rows));
  return std::min({round_up(share, group), most, int64_t{rows <= kFewRows ? 32 : 16}});
}

std::vector<Executor::Arranged> Executor::prepare(int32_t v, const float* x, int64_t width,
                                                  float threshold,
                                                  const std::vector<const Matrix*>& matrices,
                                                  const std::vector<RowRun>& runs,
                                                  const LinearVariant& variant) {
  const bool refined = threshold >= 0.0f;
  struct Area {
    const Matrix* matrix;
    int64_t at;
  };
  struct Part {
    size_t run;
    Range rows;  // of the run
  };
  // Where the tiles of each run begin: the last may have more rows than are left.
  std::vector<int64_t> slots;
  std::vector<Part> parts;
  const int64_t tile = kernels_->linear.tile_rows;
  const int64_t step = round_up(std::max<int64_t>(1, kInlineWork / 2 / width), tile);
  int64_t rows = 0, all_slots = 0;
  for (const RowRun& run : runs) {
    for (int64_t begin = 0; begin < run.count; begin += step)
      parts.push_back({slots.size(), {begin, std::min(run.count, begin + step)}});
    slots.push_back(all_slots);
    all_slots += arranged_rows(run.count);
    rows += run.count;
  }
  std::vector<Area> areas;
  std::vector<size_t> area_of(matrices.size());
  int64_t ints = 0;
  for (size_t i = 0; i < matrices.size(); ++i) {
    if (!rounds(*matrices[i])) continue;
    size_t& area = area_of[i];
    while (area < areas.size() && !arrange_alike(*areas[area].matrix, *matrices[i])) ++area;
    if (area < areas.size()) continue;
    areas.push_back({matrices[i], ints});
    ints += all_slots * arranged_ints(matrices[i]->k_padded, refined);
  }
  std::vector<Arranged> arranged(matrices.size());
  if (areas.empty()) return arranged;

  const bool coarse = v == kNoValue || quantized_value_ != v;
  const bool refine = refined && (coarse || refined_value_ != v || refined_threshold_ != threshold);
  quantized_stride_ = round_up(width, 128);  // whole groups of most weight formats
  if (coarse) quantized_.reserve(rows, quantized_stride_);
  if (refine) residual_.reserve(rows, quantized_stride_);
  auto* base = reinterpret_cast<int32_t*>(arranged_.floats(ints + 16));
  const auto rows_of = [&](const Area& area, size_t r) {
    const int64_t stride = arranged_ints(area.matrix->k_padded, refined);
    return std::pair{base + area.at + slots[r] * stride, stride};
  };
  const auto task = [&](int64_t i, int) {
    const auto& [r, part] = parts[index(i)];
    const int64_t first = runs[r].begin + part.begin, stride = quantized_stride_;
    const Quantized::Rows to = quantized_.rows(first, stride);
    if (coarse)
      kernels_->quantize_rows(x + first * width, part.count(), width, width, to.codes, to.scales,
                              to.half_sums, stride);
    if (refine) {
      const Quantized::Rows fine = residual_.rows(first, stride);
      kernels_->quantize_residual(x + first * width, part.count(), width, width, threshold,
                                  to.codes, to.scales, fine.codes, fine.scales, fine.half_sums,
                                  stride);
    }
    const auto of_run = [&, run = r](const Quantized& q) {
      const Quantized::Rows rows_of_run = q.rows(runs[run].begin, stride);
      return QuantizedRows{rows_of_run.codes, rows_of_run.scales, rows_of_run.half_sums, stride};
    };
    const QuantizedRows from = of_run(quantized_);
    QuantizedRows left;
    if (refined) left = of_run(residual_);
    for (const Area& area : areas)
      kernels_->arrange_rows(*area.matrix, from, refined ? &left : nullptr, runs[r].count, part,
                             variant, rows_of(area, r).first);
  };
  const auto count = static_cast<int64_t>(parts.size());
  if (rows * width <= kInlineWork)
    for (int64_t i = 0; i < count; ++i) task(i, 0);
  else pool_->run(count, task);
  quantized_value_ = v;
  if (refine) {
    refined_value_ = v;
    refined_threshold_ = threshold;
  }
  for (size_t i = 0; i < matrices.size(); ++i)
    for (size_t r = 0; r < runs.size() && rounds(*matrices[i]); ++r) {
      const auto [data, stride] = rows_of(areas[area_of[i]], r);
      arranged[i].push_back({data, stride, runs[r].count});
    }
  return arranged;
}

void Executor::linear(const Instruction& n, const StepInput& step) {
  const int64_t count = rows(n.outputs[0], step), width = width_of(n.inputs[0]);
  if (count == 0) return;
  const float* x = value(n.inputs[0]);
  const LinearVariant& how = variant(n, count);
  std::vector<Product> plain;
  for (size_t i = 0; i < n.matrices.size(); ++i) {
    const Matrix& m = program_.matrices[index(n.matrices[i])];
    const Product product{&m, {value(n.outputs[i]), m.n, vector(n, i)}};
    if (m.permutation)
      multiply(kNoValue, permuted(m, x, count, width), count, width, n.residual_threshold, how,
               {product});
    else plain.push_back(product);
  }
  if (!plain.empty()) multiply(n.inputs[0], x, count, width, n.residual_threshold, how, plain);
}

// Rows are put in the order of their experts, multiplied, and put back: a row's result does not
// depend on the rows beside it.
void Executor::grouped_linear(const Instruction& n, const StepInput& step) {
  const bool heads = n.op == Op::kHeadLinear;
  const Matrix& all = program_.matrices[index(n.matrices[0])];
  const int64_t tokens = rows(n.inputs[0], step), k = all.k, width = all.n;
  const int64_t slots = width_of(n.outputs[0]) / width, count = tokens * slots;
  if (count == 0) return;
  const bool shared = width_of(n.inputs[0]) == k;  // one row for all slots of a token
  const auto* chosen = heads ? nullptr : reinterpret_cast<const int32_t*>(value(n.inputs[1]));
  const auto expert_of = [&](int64_t pair) {
    return heads ? pair % slots : static_cast<int64_t>(chosen[pair]);
  };
  // Stable counting sort of the pairs (token, slot) by expert.
  std::vector<int64_t> next(index(all.experts) + 1, 0), order(index(count));
  for (int64_t p = 0; p < count; ++p) ++next[index(expert_of(p)) + 1];
  std::vector<ExpertRows> groups;
  for (int64_t e = 0; e < all.experts; ++e) {
    const int64_t mine = next[index(e) + 1];
    next[index(e) + 1] += next[index(e)];
    if (mine) groups.push_back({e, next[index(e)], mine});
  }
  for (int64_t p = 0; p < count; ++p) order[index(next[index(expert_of(p))]++)] = p;

  const float* x = value(n.inputs[0]);
  float* gathered = gathered_.floats(count * k + 16);
  each_row(count, k, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t p = order[index(i)];
      const float* from = x + (shared ? p / slots : p) * k;
      float* to = gathered + i * k;
      if (!all.permutation) std::memcpy(to, from, index(k) * 4);
      else
        for (int64_t j = 0; j < k; ++j) to[j] = from[all.permutation[j]];
    }
  });
  const bool int8 = rounds(all);
  const LinearVariant& how = variant(n, count);
  std::vector<RowRun> runs;
  std::vector<int64_t> experts;
  for (const ExpertRows& g : groups)
    for (int64_t row = g.begin; row < g.begin + g.count; row += how.task_rows) {
      runs.push_back({row, std::min<int64_t>(how.task_rows, g.begin + g.count - row)});
      experts.push_back(g.expert);
    }
  const auto run_count = static_cast<int64_t>(runs.size());
  const int64_t block_step = blocks_a_task(all.blocks() * run_count, count, how);
  const int64_t column_tasks = (all.blocks() + block_step - 1) / block_step;
  const float* bias = vector(n, 0);
  float* products = products_.floats(count * width + 16);
  float* result = value(n.outputs[0]);
  const Arranged arranged =
      prepare(kNoValue, gathered, k, n.residual_threshold, {&all}, runs, how)[0];
  pool_->run(run_count * column_tasks, [&](int64_t task, int thread) {
    const RowRun& run = runs[index(task / column_tasks)];
    const int64_t expert = experts[index(task / column_tasks)];
    const int64_t begin = task % column_tasks * block_step;
    const int64_t end = std::min(all.blocks(), begin + block_step);
    const Matrix m = all.expert(expert);
    const LinearOutput out{products + run.begin * width, width,
                           bias ? bias + expert * width : nullptr};
    if (int8)
      kernels_->linear_int8(m, begin, end, arranged[index(task / column_tasks)], how, out,
                            thread_scratch_[index(thread)].floats(0));
    else kernels_->linear_fp32(m, begin, end, gathered + run.begin * k, k, run.count, out);
    const int64_t first = begin * kLanes, columns = std::min(width, end * kLanes) - first;
    for (int64_t i = run.begin; i < run.begin + run.count; ++i)
      std::memcpy(result + order[index(i)] * width + first, products + i * width + first,
                  index(columns) * 4);
  });
}

void Executor::adapt(const Instruction& n, const StepInput& step) {
  if (!step.adapters) return;
  const Rows kind = program_.values[index(n.outputs[0])].rows;
  const int64_t count = rows(n.outputs[0], step), width = width_of(n.inputs[0]);
  struct Run {
    const Adapter* adapter;
    int64_t begin, end;
  };
  std::vector<Run> runs;
  int64_t s = 0;
  for (int64_t row = 0; row < count; ++row) {
    const int64_t token = kind == Rows::kOutputs ? step.output_rows[row] : row;
    if (kind == Rows::kSequences) s = row;
    else {
      while (token < step.starts[s]) --s;
      while (token >= step.starts[s + 1]) ++s;
    }
    if (step.adapters[s] < 0) continue;
    const Adapter* adapter = &adapters_.at(step.adapters[s]);
    if (!runs.empty() && runs.back().adapter == adapter && runs.back().end == row)
      ++runs.back().end;
    else runs.push_back({adapter, row, row + 1});
  }
  const float* x = value(n.inputs[0]);
  for (const Run& run : runs) {
    for (size_t i = 0; i < n.matrices.size(); ++i) {
      const auto found = run.adapter->find(n.matrices[i]);
      if (found == run.adapter->end()) continue;
      const auto& [down, up] = found->second;
      const int64_t height = run.end - run.begin;
      float* inner = low_rank_.floats(height * down.n + 16);
      multiply(kNoValue, x + run.begin * width, height, width, -1.0f, {},
               {{&down, {inner, down.n}}});
      LinearOutput out{value(n.outputs[i]) + run.begin * up.n, up.n, nullptr, true};
      multiply(kNoValue, inner, height, down.n, -1.0f, {}, {{&up, out}});
    }
  }
}

void Executor::set_variant(int64_t instruction, int64_t bucket, const LinearVariant& variant) {
  const int64_t buckets = kRowBuckets;
  if (instruction < 0 || instruction >= static_cast<int64_t>(variants_.size()) || bucket < 0 ||
      bucket >= buckets)
    throw std::invalid_argument("variant: no such instruction or bucket of rows");
  // The totals of a task lie in its thread's scratch.
  const int64_t top = bucket + 1 < buckets ? kRowTops[bucket] : kTaskRows;
  const int64_t rows = std::min<int64_t>(variant.task_rows, top);
  if (variant.task_rows < 16 || variant.task_rows > kTaskRows || variant.task_rows % 16 ||
      variant.task_blocks < 0 || variant.task_blocks > most_blocks(rows) ||
      (variant.streams != 0 && variant.streams != 1))
    throw std::invalid_argument("variant: out of range for that many rows");
  variants_[index(instruction)][index(bucket)] = variant;
}

std::vector<double> Executor::time_linears(const std::vector<int64_t>& instructions, int64_t tokens,
                                           const LinearVariant& variant) {
  using Clock = std::chrono::steady_clock;
  StepInput step;
  step.tokens = step.outputs = step.sequences = tokens;
  std::vector<double> seconds;
  for (const int64_t i : instructions) {
    const Instruction& n = program_.instructions.at(index(i));
    if (n.op != Op::kLinear && n.op != Op::kGroupedLinear && n.op != Op::kHeadLinear)
      throw std::invalid_argument(n.name + " is no linear layer");
    for (const auto* values : {&n.inputs, &n.outputs})
      for (const int32_t v : *values)
        slots_[index(slot_of_[index(v)])].floats(tokens * width_of(v) + 16);
    fill_inputs(n, tokens);
    quantized_value_ = refined_value_ = kNoValue;
    const Matrix& first = program_.matrices[index(n.matrices[0])];
    const int64_t slots = n.op == Op::kLinear ? 1 : width_of(n.outputs[0]) / first.n;
    const auto bucket = static_cast<int64_t>(row_bucket(tokens * slots));
    const LinearVariant before = variants_[index(i)][index(bucket)];
    set_variant(i, bucket, variant);
    pool_->run(pool_->threads(), [](int64_t, int) {});  // in a step the threads are awake
    const auto begin = Clock::now();
    n.op == Op::kLinear ? linear(n, step) : grouped_linear(n, step);
    seconds.push_back(std::chrono::duration<double>(Clock::now() - begin).count());
    set_variant(i, bucket, before);
  }
  return seconds;
}

void Executor::fill_inputs(const Instruction& n, int64_t rows) {
  uint32_t state = 1;
  const auto next = [&state] { return (state = state * 1664525u + 1013904223u) >> 8; };
  float* x = value(n.inputs[0]);
  for (int64_t i = 0; i < rows * width_of(n.inputs[0]); ++i)
    x[i] = static_cast<float>(next()) * 0x1p-23f - 1.0f;
  if (n.op != Op::kGroupedLinear) return;
  const int64_t experts = program_.matrices[index(n.matrices[0])].experts;
  const int64_t chosen = width_of(n.inputs[1]);
  auto* ids = reinterpret_cast<int32_t*>(value(n.inputs[1]));
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t first = next() % experts;
    for (int64_t j = 0; j < chosen; ++j)
      ids[t * chosen + j] = static_cast<int32_t>((first + j) % experts);
  }
}

}  // namespace sartor
