// The Python face of the core: arrays in, arrays out; no logic of its own.
#include "binding.hpp"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <unordered_map>

#include "cpu_features.hpp"
#include "executor.hpp"
#include "packing.hpp"
#include "probe.hpp"
#include "recording.hpp"

using namespace nb::literals;
using namespace sartor;

const Kernels* kernels_of(const std::string& isa) {
  const Kernels* kernels = select_kernels(isa);
  if (!kernels)
    throw std::invalid_argument("instruction-set path '" + isa + "' cannot run on this machine");
  return kernels;
}

void check_ids(const int32_t* ids, int64_t count, int64_t vocab, const char* what) {
  uint32_t largest = 0;  // negative ones are very large: one comparison each, for long histories
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, static_cast<uint32_t>(ids[i]));
  if (largest < vocab) return;
  for (int64_t i = 0; i < count; ++i)
    if (ids[i] < 0 || ids[i] >= vocab)
      throw std::out_of_range(std::string(what) + ": token id " + std::to_string(ids[i]) +
                              " is outside the vocabulary of " + std::to_string(vocab));
}

namespace {

Storage storage_of(const std::string& name) {
  if (name == "fp32") return Storage::kFp32;
  if (name == "fp16") return Storage::kFp16;
  if (name == "bf16") return Storage::kBf16;
  if (name == "affine") return Storage::kAffine;
  if (name == "lookup") return Storage::kLookup;
  if (name == "fp8") return Storage::kFp8;
  if (name == "int8") return Storage::kInt8;
  throw std::invalid_argument("unknown storage '" + name + "'");
}

constexpr int64_t kMostNumbers = int64_t{1} << 48;

// A packed matrix, and the arrays that its pointers look into.
struct HeldMatrix {
  Matrix matrix;
  nb::object codes, scales, offsets, permutation;
};

struct PyExecutor {
  Executor executor;
  std::vector<nb::object> held;
  // What the adapters' matrices look into.
  std::unordered_map<int32_t, std::vector<nb::object>> adapters;
  std::vector<int64_t> blocks;  // of each state group
};

struct PyProgram {
  ProgramInfo info;
  std::vector<nb::object> held;

  int32_t add_matrix(const HeldMatrix& m) {
    info.matrices.push_back(m.matrix);
    held.insert(held.end(), {m.codes, m.scales, m.offsets, m.permutation});
    return static_cast<int32_t>(info.matrices.size()) - 1;
  }
  int32_t add_vector(In<float> v) {
    info.vectors.emplace_back(v.data(), v.data() + v.size());
    return static_cast<int32_t>(info.vectors.size()) - 1;
  }
};

HeldMatrix make_matrix(const std::string& storage, int64_t n, int64_t k, int64_t k_padded,
                       In<uint8_t> codes, std::optional<In<uint16_t>> scales,
                       std::optional<In<uint16_t>> offsets, int bits, int group, int zero,
                       float scale_multiplier, float offset_multiplier, std::vector<int> table,
                       int64_t experts, std::optional<In<int32_t>> permutation) {
  HeldMatrix held;
  Matrix& m = held.matrix;
  m.storage = storage_of(storage);
  require(m.storage != Storage::kInt8, "matrix: int8 is a storage of keys and values");
  m.n = n;
  m.k = k;
  m.k_padded = k_padded;
  m.bits = bits;
  m.group = group;
  m.zero = zero;
  m.scale_multiplier = scale_multiplier;
  m.offset_multiplier = offset_multiplier;
  m.experts = experts;
  require(experts > 0 && n > 0 && k > 0 && k_padded >= k && k_padded % kChunk == 0,
          "matrix: bad dimensions");
  // Beyond that no product of them below could be told from one that wrapped around.
  require(
      n < kMostNumbers && k_padded < kMostNumbers && experts < kMostNumbers &&
          static_cast<double>(experts) * static_cast<double>(n) * static_cast<double>(k_padded) <
              static_cast<double>(kMostNumbers),
      "matrix: too large");
  const bool scaled = m.integer_codes() || m.storage == Storage::kFp8;
  const int64_t bytes = experts * m.code_bytes();
  require(static_cast<int64_t>(codes.size()) == bytes, "matrix: codes have the wrong size");
  m.codes = codes.data();
  held.codes = nb::cast(codes);
  if (permutation) {
    require(static_cast<int64_t>(permutation->size()) == k, "matrix: bad permutation");
    for (int64_t i = 0; i < k; ++i)
      require(permutation->data()[i] >= 0 && permutation->data()[i] < k, "matrix: bad permutation");
    m.permutation = permutation->data();
    held.permutation = nb::cast(*permutation);
  }
  if (scaled) {
    require(!m.integer_codes() || (bits >= 2 && bits <= 8), "matrix: bits out of range");
    require(group >= 16 && group % 16 == 0 && (group == 16 || group % kChunk == 0) &&
                k_padded % group == 0,
            "matrix: bad group");
    const auto scale_count =
        static_cast<size_t>(experts * m.blocks() * kLanes * (k_padded / group));
    require(scales && scales->size() == scale_count, "matrix: scales have the wrong size");
    m.scales = scales->data();
    held.scales = nb::cast(*scales);
    if (offsets) {
      require(offsets->size() == scale_count, "matrix: offsets have the wrong size");
      m.offsets = offsets->data();
      m.has_offset = true;
      require(zero == 0, "matrix: a zero point beside offsets");
      held.offsets = nb::cast(*offsets);
    }
    if (m.storage == Storage::kLookup) {
      require(table.size() == 16 && bits == 4, "matrix: a lookup table has 16 entries of 4 bits");
      for (size_t i = 0; i < 16; ++i) m.table[i] = static_cast<int8_t>(table[i]);
    }
  }
  return held;
}

Activation activation_of(const std::string& kind) {
  // In the order of the enumeration.
  static const char* const names[] = {"silu",     "gelu", "gelu_tanh", "relu",        "sigmoid",
                                      "softplus", "exp",  "tanh",      "clamped_silu"};
  for (size_t i = 0; i < std::size(names); ++i)
    if (kind == names[i]) return static_cast<Activation>(i);
  throw std::invalid_argument("unknown activation '" + kind + "'");
}

Pool pool_of(const std::string& kind) {
  if (kind == "mean") return Pool::kMean;
  if (kind == "cls") return Pool::kFirst;
  if (kind == "last") return Pool::kLast;
  throw std::invalid_argument("unknown pooling '" + kind + "'");
}

Rows rows_of(const std::string& symbol) {
  if (symbol == "R") return Rows::kOutputs;
  if (symbol == "S") return Rows::kSequences;
  return Rows::kTokens;
}

// Reads an attribute-style instruction: every field by name, so that nothing depends on order.
Instruction make_instruction(int op, const std::string& name, std::vector<int32_t> inputs,
                             std::vector<int32_t> outputs, std::vector<int32_t> matrices,
                             std::vector<int32_t> vectors, nb::dict fields) {
  Instruction n;
  n.op = static_cast<Op>(op);
  n.name = name;
  n.inputs = std::move(inputs);
  n.outputs = std::move(outputs);
  n.matrices = std::move(matrices);
  n.vectors = std::move(vectors);
  for (auto [key, value] : fields) {
    const auto field = nb::cast<std::string>(key);
    if (field == "state") n.state = nb::cast<int32_t>(value);
    else if (field == "rope") n.rope = nb::cast<int32_t>(value);
    else if (field == "run" || field == "runs") n.run = nb::cast<int64_t>(value);
    else if (field == "widths") n.widths = nb::cast<std::vector<int64_t>>(value);
    else if (field == "positions") n.positions = nb::cast<bool>(value);
    else if (field == "key_heads") n.key_heads = nb::cast<int64_t>(value);
    else if (field == "key_dim") n.key_dim = nb::cast<int64_t>(value);
    else if (field == "delta") n.delta = nb::cast<bool>(value);
    else if (field == "top_k") n.routing.top_k = nb::cast<int64_t>(value);
    else if (field == "groups") n.routing.groups = nb::cast<int64_t>(value);
    else if (field == "top_groups") n.routing.top_groups = nb::cast<int64_t>(value);
    else if (field == "normalize") n.routing.normalize = nb::cast<bool>(value);
    else if (field == "sigmoid") n.routing.sigmoid = nb::cast<bool>(value);
    else if (field == "by_best_two") n.routing.by_best_two = nb::cast<bool>(value);
    else if (field == "pool") n.pool = pool_of(nb::cast<std::string>(value));
    else if (field == "residual_threshold") n.residual_threshold = nb::cast<float>(value);
    else if (field == "tap") n.tap = nb::cast<int32_t>(value);
    else if (field == "heads") n.heads = nb::cast<int64_t>(value);
    else if (field == "kv_heads") n.kv_heads = nb::cast<int64_t>(value);
    else if (field == "head_dim") n.head_dim = nb::cast<int64_t>(value);
    else if (field == "value_dim") n.value_dim = nb::cast<int64_t>(value);
    else if (field == "window") n.window = nb::cast<int64_t>(value);
    else if (field == "eps") n.eps = nb::cast<float>(value);
    else if (field == "weight_offset") n.weight_offset = nb::cast<float>(value);
    else if (field == "factor" || field == "scale") n.factor = nb::cast<float>(value);
    else if (field == "softcap" || field == "cap") n.softcap = nb::cast<float>(value);
    else if (field == "kind") n.activation = activation_of(nb::cast<std::string>(value));
    else if (field == "custom") {
      auto [address, context, op, kind] =
          nb::cast<std::tuple<uintptr_t, uintptr_t, std::string, std::string>>(value);
      n.custom = {reinterpret_cast<sartor_kernel>(address), reinterpret_cast<void*>(context), op,
                  kind};
    } else {
      throw std::invalid_argument("unknown instruction field '" + field + "'");
    }
  }
  return n;
}

// streams, tiles, task_blocks, task_rows.
using Variant = std::tuple<int32_t, bool, int32_t, int32_t>;

LinearVariant variant_of(const Variant& v) {
  return {std::get<0>(v), std::get<1>(v), std::get<2>(v), std::get<3>(v)};
}

// The arrays are checked, and belong to the caller.
StepInput make_step(const PyExecutor& self, const In<int32_t>& tokens, const In<int32_t>& positions,
                    const In<int32_t>& starts, const In<int32_t>& contexts,
                    const std::vector<In<int32_t>>& tables, const In<int32_t>& output_rows,
                    const In<uint8_t>& sampling, const In<int32_t>& history,
                    const In<int32_t>& history_starts, const In<int32_t>& bias_tokens,
                    const In<int32_t>& bias_starts, const In<float>& bias_values,
                    const std::vector<std::optional<In<float>>>& rope_frequencies,
                    const std::vector<bool>& wanted_taps, const In<int32_t>& adapters,
                    const In<int32_t>& embedding_rows, const In<float>& embeddings,
                    const std::vector<In<int32_t>>& copies) {
  const ProgramInfo& program = self.executor.program();
  StepInput step;
  step.tokens = static_cast<int64_t>(tokens.size());
  step.sequences = static_cast<int64_t>(contexts.size());
  step.outputs = static_cast<int64_t>(output_rows.size());
  require(static_cast<int64_t>(starts.size()) == step.sequences + 1 &&
              static_cast<int64_t>(positions.size()) == step.tokens,
          "batch: lengths of positions and starts do not fit");
  require(static_cast<int64_t>(sampling.size()) == step.outputs * int64_t{sizeof(SamplingRow)} &&
              static_cast<int64_t>(history_starts.size()) == step.outputs + 1 &&
              static_cast<int64_t>(bias_starts.size()) == step.outputs + 1 &&
              bias_tokens.size() == bias_values.size(),
          "batch: sampling arrays do not fit the output rows");
  step.token_ids = tokens.data();
  step.positions = positions.data();
  step.starts = starts.data();
  step.contexts = contexts.data();
  step.output_rows = output_rows.data();
  step.sampling = reinterpret_cast<const SamplingRow*>(sampling.data());
  step.history = history.data();
  step.history_starts = history_starts.data();
  step.bias_tokens = bias_tokens.data();
  step.bias_starts = bias_starts.data();
  step.bias_values = bias_values.data();
  step.wanted_taps = wanted_taps;
  require(step.wanted_taps.size() == program.taps.size(), "batch: taps do not fit the program");
  require(adapters.size() == 0 || static_cast<int64_t>(adapters.size()) == step.sequences,
          "batch: adapters do not fit the sequences");
  if (adapters.size()) step.adapters = adapters.data();
  for (size_t s = 0; s < adapters.size(); ++s)
    require(adapters.data()[s] < 0 || self.adapters.count(adapters.data()[s]),
            "batch: an adapter that is not loaded");
  step.embeddings = static_cast<int64_t>(embedding_rows.size());
  step.embedding_rows = embedding_rows.data();
  step.embedding_values = embeddings.data();
  require(static_cast<int64_t>(embeddings.size()) ==
              step.embeddings * std::max<int64_t>(program.embedding_width(), 0),
          "batch: embeddings do not have the model's width");
  for (int64_t i = 0; i < step.embeddings; ++i)
    require(step.embedding_rows[i] >= 0 && step.embedding_rows[i] < step.tokens,
            "batch: an embedding outside the tokens");
  check_ids(step.token_ids, step.tokens, program.vocab, "batch tokens");
  check_ids(step.history, step.history_starts[step.outputs], program.vocab, "batch history");
  check_ids(step.bias_tokens, step.bias_starts[step.outputs], program.vocab, "logit bias");
  for (int64_t r = 0; r < step.outputs; ++r)
    require(step.output_rows[r] >= 0 && step.output_rows[r] < step.tokens,
            "batch: output row outside the tokens");
  int32_t groups = 0;
  for (const StateInfo& state : program.states) groups = std::max(groups, state.group + 1);
  require(static_cast<int32_t>(tables.size()) == groups,
          "batch: one block table a state group is needed");
  for (const auto& table : tables) {
    require(table.ndim() == 2 && static_cast<int64_t>(table.shape(0)) == step.sequences,
            "batch: block table shape");
    step.tables.push_back({table.data(), static_cast<int64_t>(table.shape(1))});
  }
  require(copies.empty() || copies.size() == step.tables.size(),
          "batch: copies for some state groups only");
  for (size_t g = 0; g < copies.size(); ++g) {
    require(copies[g].size() % 2 == 0, "batch: a copy needs a source and a destination");
    const int64_t count = g < self.blocks.size() ? self.blocks[g] : 0;
    for (size_t i = 0; i < copies[g].size(); ++i)
      require(copies[g].data()[i] >= 0 && copies[g].data()[i] < count,
              "batch: a copy of a block that was not allocated");
    step.copies.push_back({copies[g].data(), static_cast<int64_t>(copies[g].size() / 2)});
  }
  std::vector<bool> recurrent(step.tables.size(), false);
  for (const StateInfo& state : program.states)
    if (state.slot_floats) recurrent[index(state.group)] = true;
  for (int64_t s = 0; s < step.sequences; ++s) {
    const int64_t end = int64_t{step.contexts[s]} + step.starts[s + 1] - step.starts[s];
    for (const BlockTable& table : step.tables)
      require((end + program.block_size - 1) / program.block_size <= table.width,
              "batch: a block table is shorter than its sequence");
    for (size_t g = 0; g < step.tables.size(); ++g) {
      const int32_t* row = step.tables[g].data + s * step.tables[g].width;
      const int64_t count = g < self.blocks.size() ? self.blocks[g] : 0;
      const auto at = [&](int64_t position) { return row[position / program.block_size]; };
      const int64_t context = step.contexts[s];
      if (recurrent[g]) {
        const int32_t before = context ? at(context - 1) : 0, after = at(end - 1);
        require(before >= 0 && before < count && after >= 0 && after < count,
                "batch: a recurrent state without its block");
        continue;
      }
      for (int64_t position = context; position < end; position += program.block_size)
        require(at(position) >= 0, "batch: a token without a block");
      require(at(end - 1) >= 0, "batch: a token without a block");
      for (int64_t b = 0; b <= (end - 1) / program.block_size; ++b)
        require(row[b] < count, "batch: a block that was not allocated");
    }
  }
  require(rope_frequencies.size() == program.ropes.size(), "batch: one entry a rope is needed");
  for (size_t r = 0; r < program.ropes.size(); ++r) {
    const auto& given = rope_frequencies[r];
    if (given)
      require(static_cast<int64_t>(given->size()) == step.sequences * program.ropes[r].dim / 2,
              "batch: rope frequencies");
    step.rope_frequencies.push_back(given ? given->data() : nullptr);
  }
  return step;
}

// A method that takes the arrays of a step, after `More`: body(executor, step, more...).
template <typename... More, typename Body, typename... Arrays>
auto step_method(StepInput (*make)(const PyExecutor&, const Arrays&...), Body body) {
  return [=](PyExecutor& self, More... more, Arrays... arrays) {
    return body(self, make(self, arrays...), more...);
  };
}

nb::bytes record_step(PyExecutor& self, const StepInput& step, const std::string& name,
                      double tolerance, const In<float>& expected) {
  const std::vector<uint8_t> bytes =
      write_recording({name,
                       tolerance,
                       {expected.data(), expected.data() + expected.size()},
                       self.executor.program(),
                       self.blocks,
                       step});
  return nb::bytes(bytes.data(), bytes.size());
}

nb::tuple run_step(PyExecutor& self, const StepInput& step) {
  StepResult result;
  {
    nb::gil_scoped_release release;
    result = self.executor.run(step);
  }
  nb::list taps;
  for (size_t t = 0; t < result.taps.size(); ++t) {
    const auto rows = static_cast<size_t>(result.tap_rows[t]);
    const size_t width = rows ? result.taps[t].size() / rows : 0;
    taps.append(to_numpy(std::move(result.taps[t]), {rows, width}));
  }
  const size_t width =
      step.sequences ? result.embeddings.size() / static_cast<size_t>(step.sequences) : 0;
  const nb::tuple samples = samples_to_numpy(result.samples);
  return nb::make_tuple(samples[0], samples[1], samples[2], samples[3], samples[4], taps,
                        to_numpy(std::move(result.embeddings),
                                 {width ? static_cast<size_t>(step.sequences) : 0, width}));
}

}  // namespace

NB_MODULE(_native, m) {
  // Pools live as long as the process, on purpose; nobody wants to read of them at its end.
  nb::set_leak_warnings(false);
  m.attr("CHUNK") = kChunk;
  m.attr("LANES") = kLanes;
  m.attr("ROW_TOPS") = nb::cast(std::vector<int64_t>(std::begin(kRowTops), std::end(kRowTops)));
  m.attr("TASK_ROWS") = kTaskRows;
  m.def("most_blocks", &most_blocks, "rows"_a,
        "Column blocks that a task of so many rows may have.");
  m.def(
      "linear_traits",
      [](const std::string& isa) {
        const LinearTraits& traits = kernels_of(isa)->linear;
        return std::make_tuple(traits.streams, traits.direct_rows, traits.tiles);
      },
      "isa"_a, "Streams of few rows, how many rows are few, and whether there are tile registers.");
  m.def("usable_paths", &usable_paths, "Instruction-set paths that run here, best first.");

  nb::class_<ThreadPool>(m, "ThreadPool")
      .def(nb::init<int>(), "threads"_a)
      .def_prop_ro("threads", &ThreadPool::threads);

  m.def(
      "pack_codes",
      [](ThreadPool& pool, In<uint8_t> codes, int64_t n, int64_t k, int64_t k_padded, int bits,
         int zero, InOut<uint8_t> out) {
        const int64_t padded = (n + kLanes - 1) / kLanes * kLanes * k_padded;
        require(static_cast<int64_t>(codes.size()) == n * k &&
                    static_cast<int64_t>(out.size()) == padded * bits / 8,
                "pack_codes: sizes do not fit");
        nb::gil_scoped_release release;
        pack_codes(pool, codes.data(), n, k, k_padded, bits, zero, out.data());
      },
      "pool"_a, "codes"_a, "n"_a, "k"_a, "k_padded"_a, "bits"_a, "zero"_a, "out"_a);
  m.def(
      "pack_scales",
      [](In<float> values, int64_t n, int64_t groups, int64_t padded_groups, float factor,
         InOut<uint16_t> out) {
        require(static_cast<int64_t>(values.size()) == n * groups &&
                    static_cast<int64_t>(out.size()) ==
                        (n + kLanes - 1) / kLanes * kLanes * padded_groups,
                "pack_scales: sizes do not fit");
        nb::gil_scoped_release release;
        return pack_scales(values.data(), n, groups, padded_groups, factor, out.data());
      },
      "values"_a, "n"_a, "groups"_a, "padded_groups"_a, "factor"_a, "out"_a);
  m.def(
      "pack_dense",
      [](ThreadPool& pool, In<uint8_t> values, int64_t n, int64_t k, int64_t k_padded,
         int element_bytes, InOut<uint8_t> out) {
        const int64_t padded = (n + kLanes - 1) / kLanes * kLanes * k_padded * element_bytes;
        require(static_cast<int64_t>(values.size()) == n * k * element_bytes &&
                    static_cast<int64_t>(out.size()) == padded,
                "pack_dense: sizes do not fit");
        nb::gil_scoped_release release;
        pack_dense(pool, values.data(), n, k, k_padded, element_bytes, out.data());
      },
      "pool"_a, "values"_a, "n"_a, "k"_a, "k_padded"_a, "element_bytes"_a, "out"_a);

  nb::class_<HeldMatrix>(m, "Matrix");
  m.def("matrix", &make_matrix, "storage"_a, "n"_a, "k"_a, "k_padded"_a, "codes"_a,
        "scales"_a.none(), "offsets"_a.none(), "bits"_a, "group"_a, "zero"_a, "scale_multiplier"_a,
        "offset_multiplier"_a, "table"_a, "experts"_a = 1, "permutation"_a.none() = nb::none());

  nb::class_<PyProgram>(m, "Program")
      .def(
          "__init__",
          [](PyProgram* self, int64_t vocab, int64_t block_size, bool int8_activations,
             std::vector<std::string> taps, int32_t embedding) {
            new (self) PyProgram();
            self->info.embedding = embedding;
            self->info.vocab = vocab;
            self->info.block_size = block_size;
            self->info.int8_activations = int8_activations;
            self->info.taps = std::move(taps);
          },
          "vocab"_a, "block_size"_a, "int8_activations"_a, "taps"_a, "embedding"_a = -1)
      .def(
          "add_value",
          [](PyProgram& p, int64_t width, const std::string& rows) {
            p.info.values.push_back({width, rows_of(rows)});
          },
          "width"_a, "rows"_a)
      .def("add_matrix", &PyProgram::add_matrix, "matrix"_a)
      .def("add_vector", &PyProgram::add_vector, "vector"_a)
      .def(
          "add_rope",
          [](PyProgram& p, int64_t dim, bool interleaved, float factor, In<float> inverse) {
            require(static_cast<int64_t>(inverse.size()) == dim / 2,
                    "rope: wrong number of frequencies");
            p.info.ropes.push_back(
                {dim, interleaved, factor, {inverse.data(), inverse.data() + inverse.size()}});
          },
          "dim"_a, "interleaved"_a, "factor"_a, "inverse_frequencies"_a)
      .def(
          "add_state",
          [](PyProgram& p, const std::string& kv, int64_t kv_heads, int64_t head_dim,
             int64_t value_dim, int32_t group) {
            const Storage storage = storage_of(kv);
            require(storage != Storage::kInt8 ||
                        (head_dim <= kMostByteFeatures && value_dim <= kMostByteFeatures),
                    "state: int8 keys and values of so many features");
            p.info.states.push_back({storage, kv_heads, head_dim, value_dim, group});
          },
          "kv"_a, "kv_heads"_a, "head_dim"_a, "value_dim"_a, "group"_a)
      .def(
          "add_recurrent_state",
          [](PyProgram& p, int64_t floats, int32_t group) {
            require(floats > 0, "state: a recurrent state needs a size");
            p.info.states.push_back({Storage::kFp32, 0, 0, 0, group, floats});
          },
          "floats"_a, "group"_a)
      .def(
          "add_instruction",
          [](PyProgram& p, int op, const std::string& name, std::vector<int32_t> inputs,
             std::vector<int32_t> outputs, std::vector<int32_t> matrices,
             std::vector<int32_t> vectors, nb::dict fields) {
            p.info.instructions.push_back(make_instruction(op, name, std::move(inputs),
                                                           std::move(outputs), std::move(matrices),
                                                           std::move(vectors), fields));
          },
          "op"_a, "name"_a, "inputs"_a, "outputs"_a, "matrices"_a, "vectors"_a, "fields"_a);

  nb::class_<PyExecutor>(m, "Executor")
      .def(
          "__init__",
          [](PyExecutor* self, const PyProgram& program, std::shared_ptr<ThreadPool> pool,
             const std::string& isa) {
            new (self) PyExecutor{
                Executor(program.info, std::move(pool), kernels_of(isa)), program.held, {}, {}};
          },
          "program"_a, "pool"_a, "isa"_a)
      .def(
          "block_bytes",
          [](const PyExecutor& e, int32_t group) { return e.executor.block_bytes(group); },
          "group"_a)
      .def(
          "allocate_state",
          [](PyExecutor& e, const std::vector<int64_t>& blocks) {
            e.blocks.clear();  // none, should the allocation fail
            e.executor.allocate_state(blocks);
            e.blocks = blocks;
          },
          "blocks"_a)
      .def(
          "load_adapter",
          [](PyExecutor& e, int32_t number,
             const std::vector<std::tuple<int32_t, HeldMatrix, HeldMatrix>>& layers) {
            Adapter adapter;
            std::vector<nb::object> held;
            const auto& matrices = e.executor.program().matrices;
            for (const auto& [matrix, down, up] : layers) {
              const Matrix& base = matrices.at(static_cast<size_t>(matrix));
              require(
                  down.matrix.k == base.k && up.matrix.n == base.n && up.matrix.k == down.matrix.n,
                  "adapter: does not fit its weight");
              adapter[matrix] = {down.matrix, up.matrix};
              held.insert(held.end(), {down.codes, up.codes});
            }
            e.executor.load_adapter(number, std::move(adapter));
            e.adapters[number] = std::move(held);
          },
          "number"_a, "layers"_a)
      .def(
          "drop_adapter",
          [](PyExecutor& e, int32_t number) {
            e.executor.drop_adapter(number);
            e.adapters.erase(number);
          },
          "number"_a)
      .def("run", step_method(&make_step, run_step))
      .def("record", step_method<std::string, double, In<float>>(&make_step, record_step))
      .def_prop_ro("state_bytes", [](const PyExecutor& e) { return e.executor.state_bytes(); })
      .def_prop_ro("scratch_bytes", [](const PyExecutor& e) { return e.executor.scratch_bytes(); })
      .def(
          "profile", [](PyExecutor& e, bool on) { e.executor.profile(on); }, "on"_a)
      .def(
          "set_variant",
          [](PyExecutor& e, int64_t instruction, int64_t bucket, const Variant& variant) {
            e.executor.set_variant(instruction, bucket, variant_of(variant));
          },
          "instruction"_a, "bucket"_a, "variant"_a)
      .def(
          "time_linears",
          [](PyExecutor& e, const std::vector<int64_t>& instructions, int64_t rows,
             const Variant& variant) {
            require(rows > 0, "time_linears: no rows");
            nb::gil_scoped_release release;
            return e.executor.time_linears(instructions, rows, variant_of(variant));
          },
          "instructions"_a, "rows"_a, "variant"_a)
      .def("seconds", [](const PyExecutor& e) {
        std::vector<std::pair<std::string, double>> out;
        const auto& seconds = e.executor.seconds();
        for (size_t i = 0; i < seconds.size(); ++i)
          out.emplace_back(e.executor.program().instructions[i].name, seconds[i]);
        return out;
      });

  m.def(
      "measure_ceilings",
      [](ThreadPool& pool, const std::string& isa, bool own_cores, double seconds) {
        const Kernels* kernels = kernels_of(isa);
        nb::gil_scoped_release release;
        const Ceilings c = measure_ceilings(pool, *kernels, own_cores, seconds);
        const auto peak = [](const Peak& p) { return std::make_tuple(p.ops, p.clock, p.width); };
        return std::make_tuple(c.read_bytes, peak(c.int8), peak(c.fp32), peak(c.bf16));
      },
      "pool"_a, "isa"_a, "own_cores"_a, "seconds"_a,
      "Bytes/s read; then of int8, fp32 and bf16: operations/s, clock in Hz, operations a cycle of "
      "a core at most.");
  bind_sampler(m);
}
