#include "program_check.hpp"

#include <stdexcept>

namespace sartor {
namespace {

// Sizes below this have products of two that do not wrap around; so have most of three, of which
// two were compared with the width of a value before.
constexpr int64_t kMostSize = int64_t{1} << 31;

bool is_size(int64_t size, int64_t least) { return size >= least && size < kMostSize; }

// One instruction, and what it refers to.
class Checked {
 public:
  // `writers`: the instruction that writes each value, null where none has yet.
  Checked(const ProgramInfo& program, const Instruction& instruction,
          const std::vector<const Instruction*>& writers)
      : program_(program), n_(instruction), writers_(writers) {}

  void require(bool holds, const char* what) const {
    if (!holds) throw std::invalid_argument("program: " + n_.name + ": " + what);
  }
  void arity(size_t inputs, size_t outputs) const {
    require(n_.inputs.size() == inputs && n_.outputs.size() == outputs,
            "wrong number of inputs or outputs");
  }
  int64_t in(size_t i) const { return program_.values[index(n_.inputs.at(i))].width; }
  int64_t out(size_t i) const { return program_.values[index(n_.outputs.at(i))].width; }
  // Numbers of a vector; -1 where it is absent.
  int64_t vector(size_t i) const {
    if (i >= n_.vectors.size() || n_.vectors[i] < 0) return -1;
    return static_cast<int64_t>(program_.vectors[index(n_.vectors[i])].size());
  }
  void vector_is(size_t i, int64_t size, bool optional) const {
    require(vector(i) == size || (optional && vector(i) < 0), "a vector of the wrong length");
  }
  const Matrix& matrix(size_t i) const {
    require(i < n_.matrices.size(), "a matrix is missing");
    return program_.matrices[index(n_.matrices[i])];
  }
  const StateInfo& state(bool pages) const {
    require(n_.state >= 0 && n_.state < std::ssize(program_.states), "no such state");
    const StateInfo& found = program_.states[index(n_.state)];
    require((found.slot_floats == 0) == pages, "a state of another kind");
    return found;
  }

  void references() const;
  void sizes() const;
  void rows() const;
  void shapes() const;

 private:
  void attention(int64_t kv_heads, int64_t head_dim, int64_t value_dim) const;
  void parts(const std::vector<int32_t>& values, int64_t whole) const;

  const ProgramInfo& program_;
  const Instruction& n_;
  const std::vector<const Instruction*>& writers_;
};

void Checked::references() const {
  const auto within = [&](const std::vector<int32_t>& ids, int64_t least, int64_t count) {
    for (const int32_t id : ids)
      require(id >= least && id < count, "it refers to what is not there");
  };
  within(n_.inputs, 0, std::ssize(program_.values));
  within(n_.outputs, 0, std::ssize(program_.values));
  within(n_.matrices, 0, std::ssize(program_.matrices));
  within(n_.vectors, -1, std::ssize(program_.vectors));
  within({n_.tap}, -1, std::ssize(program_.taps));
  for (const int32_t v : n_.inputs)
    require(writers_[index(v)], "it reads what no instruction before it writes");
  for (size_t i = 0; i < n_.outputs.size(); ++i) {
    require(!writers_[index(n_.outputs[i])], "it writes what another instruction writes");
    for (size_t j = 0; j < i; ++j)
      require(n_.outputs[i] != n_.outputs[j], "it writes a value twice");
  }
  require(n_.tap < 0 || !n_.outputs.empty(), "a tap of nothing");
}

void Checked::sizes() const {
  for (const int64_t size :
       {n_.heads, n_.kv_heads, n_.head_dim, n_.value_dim, n_.key_heads, n_.key_dim, n_.run,
        n_.routing.top_k, n_.routing.groups, n_.routing.top_groups})
    require(is_size(size, 0), "a size that nothing has");
  for (const int64_t width : n_.widths) require(is_size(width, 0), "a size that nothing has");
  require(n_.window >= 0, "a window of less than nothing");
}

// Rows of values are tokens, outputs or sequences: there are not as many of each.
void Checked::rows() const {
  const auto are = [&](const std::vector<int32_t>& ids, Rows wanted) {
    for (const int32_t id : ids)
      require(program_.values[index(id)].rows == wanted, "rows that stand for something else");
  };
  Rows from = n_.inputs.empty() ? Rows::kTokens : program_.values[index(n_.inputs[0])].rows;
  Rows to = from;
  switch (n_.op) {
    case Op::kGatherRows:
      from = Rows::kTokens;
      to = Rows::kOutputs;
      break;
    case Op::kPool:
      from = Rows::kTokens;
      to = Rows::kSequences;
      break;
    case Op::kSample:
      from = to = Rows::kOutputs;
      break;
    case Op::kEmbedding:
    case Op::kReplaceRows:
    case Op::kRope:
    case Op::kKvWrite:
    case Op::kLatentWrite:
    case Op::kAttention:
    case Op::kSelfAttention:
    case Op::kShortConv:
    case Op::kRecurrentScan:
      from = to = Rows::kTokens;
      break;
    default:
      break;
  }
  are(n_.inputs, from);
  are(n_.outputs, to);
}

// Query heads over kv heads of these sizes.
void Checked::attention(int64_t kv_heads, int64_t head_dim, int64_t value_dim) const {
  require(kv_heads > 0 && n_.heads > 0 && n_.heads % kv_heads == 0, "heads that do not fit");
  require(in(0) == n_.heads * head_dim && out(0) == n_.heads * value_dim,
          "queries or results of another width than its heads");
  vector_is(0, n_.heads, true);
}

void Checked::parts(const std::vector<int32_t>& values, int64_t whole) const {
  require(n_.run > 0 && n_.widths.size() == values.size(), "parts that do not fit");
  int64_t total = 0;
  for (size_t i = 0; i < values.size(); ++i) {
    const int64_t width = n_.widths[i];
    require(width > 0 && program_.values[index(values[i])].width == width * n_.run,
            "a part of another width");
    total += width;
  }
  require(total * n_.run == whole, "parts that are not the whole");
}

void Checked::shapes() const {
  if (n_.custom.function) return;  // a kernel of another package is told the widths
  switch (n_.op) {
    case Op::kEmbedding:
      arity(0, 1);
      return require(matrix(0).experts == 1 && matrix(0).k == out(0), "a table of another width");
    case Op::kLinear:
      require(
          n_.inputs.size() == 1 && !n_.outputs.empty() && n_.outputs.size() == n_.matrices.size(),
          "wrong number of inputs or outputs");
      for (size_t i = 0; i < n_.matrices.size(); ++i) {
        const Matrix& m = matrix(i);
        require(m.experts == 1 && m.k == in(0) && m.n == out(i), "a matrix of another shape");
        vector_is(i, m.n, true);
      }
      return;
    case Op::kGroupedLinear:
    case Op::kHeadLinear: {
      const bool heads = n_.op == Op::kHeadLinear;
      arity(heads ? 1 : 2, 1);
      const Matrix& m = matrix(0);
      const int64_t slots = heads ? m.experts : in(1);
      require(slots > 0 && m.n < kMostSize && m.k < kMostSize && out(0) == slots * m.n &&
                  (in(0) == m.k || in(0) == slots * m.k),
              "a matrix of another shape");
      if (!heads) {  // the numbers of experts are not looked at when it runs
        const Instruction& router = *writers_[index(n_.inputs[1])];
        require(router.op == Op::kRouteExperts && !router.custom.function &&
                    router.outputs[0] == n_.inputs[1] &&
                    program_.values[index(router.inputs[0])].width <= m.experts,
                "a matrix of fewer experts than are chosen from");
      }
      return vector_is(0, m.experts * m.n, true);
    }
    case Op::kRouteExperts: {
      arity(1, 2);
      const Routing& r = n_.routing;
      require(r.groups > 0 && in(0) % r.groups == 0 && r.top_groups > 0 && r.top_groups <= r.groups,
              "groups that do not fit");
      require(r.top_k > 0 && r.top_k <= in(0) / r.groups * r.top_groups && out(0) == r.top_k &&
                  out(1) == r.top_k,
              "another number of experts");
      return vector_is(0, in(0), true);
    }
    case Op::kCombineExperts:
      arity(2, 1);
      return require(in(0) == in(1) * out(0), "parts of another width");
    case Op::kRmsNorm:
    case Op::kAddRmsNorm: {
      const bool fused = n_.op == Op::kAddRmsNorm;
      arity(fused ? 2 : 1, fused ? 2 : 1);
      require(vector(0) > 0 && in(0) % vector(0) == 0, "a weight of another length");
      require(!fused || (in(1) == in(0) && out(1) == in(0)), "rows of another width");
      return require(out(0) == in(0), "rows of another width");
    }
    case Op::kLayerNorm:
      arity(1, 1);
      vector_is(0, in(0), false);
      vector_is(1, in(0), true);
      return require(out(0) == in(0), "rows of another width");
    case Op::kL2Norm:
      arity(1, 1);
      return require(n_.run > 0 && in(0) % n_.run == 0 && out(0) == in(0), "runs that do not fit");
    case Op::kRope: {
      arity(1, 1);
      require(n_.rope >= 0 && n_.rope < std::ssize(program_.ropes), "no such rope");
      const int64_t dim = program_.ropes[index(n_.rope)].dim;
      require(dim > 0 && dim % 2 == 0 && dim <= n_.head_dim && in(0) % n_.head_dim == 0 &&
                  out(0) == in(0),
              "heads that do not fit the rope");
      return;
    }
    case Op::kKvWrite: {
      arity(2, 0);
      const StateInfo& s = state(true);
      return require(in(0) == s.kv_heads * s.head_dim && in(1) == s.kv_heads * s.value_dim,
                     "keys or values of another width than the state");
    }
    case Op::kLatentWrite: {
      arity(2, 0);
      const StateInfo& s = state(true);
      return require(s.kv_heads == 1 && in(0) == s.value_dim && in(1) == s.head_dim - s.value_dim,
                     "a latent of another width than the state");
    }
    case Op::kAttention: {
      arity(1, 1);
      const StateInfo& s = state(true);
      return attention(s.kv_heads, s.head_dim, s.value_dim);
    }
    case Op::kSelfAttention:
      arity(3, 1);
      require(in(1) == n_.kv_heads * n_.head_dim && in(2) == n_.kv_heads * n_.value_dim,
              "keys or values of another width than its heads");
      return attention(n_.kv_heads, n_.head_dim, n_.value_dim);
    case Op::kShortConv: {
      arity(1, 1);
      const int64_t taps = vector(0) / in(0);
      require(taps > 0 && vector(0) == taps * in(0) && out(0) == in(0), "taps that do not fit");
      vector_is(1, in(0), true);
      return require(state(false).slot_floats == (taps - 1) * in(0), "a state of another size");
    }
    case Op::kRecurrentScan: {
      arity(5, 1);
      require(n_.heads > 0 && n_.key_heads > 0 && n_.heads % n_.key_heads == 0,
              "heads that do not fit");
      require(in(0) == n_.key_heads * n_.key_dim && in(1) == in(0) &&
                  in(2) == n_.heads * n_.value_dim && in(3) == n_.heads && in(4) == n_.heads &&
                  out(0) == in(2),
              "inputs of another width than its heads");
      return require(state(false).slot_floats == n_.heads * n_.key_dim * n_.value_dim,
                     "a state of another size");
    }
    case Op::kActivation:
    case Op::kScale:
    case Op::kSoftcap:
      arity(1, 1);
      require(vector(0) < 0, "a vector that it has no use for");
      return require(out(0) == in(0), "rows of another width");
    case Op::kGatedActivation:
      arity(2, 1);
      require(vector(0) < 0, "a vector that it has no use for");
      return require(out(0) == in(0) && in(1) == in(0), "rows of another width");
    case Op::kAdd:
    case Op::kMul:
      if (vector(0) >= 0) {
        arity(1, 1);
        vector_is(0, in(0), false);
      } else {
        arity(2, 1);
        require(in(1) == in(0), "rows of another width");
      }
      return require(out(0) == in(0), "rows of another width");
    case Op::kGatherRows:
    case Op::kReplaceRows:
    case Op::kPool:
      arity(1, 1);
      return require(out(0) == in(0), "rows of another width");
    case Op::kSplit:
      arity(1, n_.widths.size());
      return parts(n_.outputs, in(0));
    case Op::kConcat:
      arity(n_.widths.size(), 1);
      return parts(n_.inputs, out(0));
    case Op::kSample:
      arity(1, 1);
      return require(in(0) == program_.vocab, "logits of another width than the vocabulary");
  }
  require(false, "an operator that this build does not have");
}

}  // namespace

namespace {

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("program: ") + what);
}

// What no instruction answers for.
void check_sizes(const ProgramInfo& program) {
  require(is_size(program.block_size, 1), "a block of no size");
  for (const ValueInfo& value : program.values)
    require(is_size(value.width, 1), "a value of no width");
  for (const StateInfo& state : program.states) {
    require(state.group >= 0, "a state of no group");
    if (state.slot_floats) {
      require(is_size(state.slot_floats, 1), "a state of no size");
      continue;
    }
    require(is_size(state.kv_heads, 1) && is_size(state.head_dim, 1) && is_size(state.value_dim, 1),
            "a state of no size");
    const double floats = static_cast<double>(state.kv_heads) *
                          static_cast<double>(state.head_dim + state.value_dim) *
                          static_cast<double>(program.block_size);
    require(floats < static_cast<double>(int64_t{1} << 48), "a state that is too large");
  }
}

}  // namespace

void check_program(const ProgramInfo& program) {
  check_sizes(program);
  std::vector<const Instruction*> writers(program.values.size(), nullptr);
  for (const Instruction& instruction : program.instructions) {
    const Checked checked(program, instruction, writers);
    checked.references();
    checked.sizes();
    checked.rows();
    checked.shapes();
    for (const int32_t v : instruction.outputs) writers[index(v)] = &instruction;
  }
  const int64_t encoded = program.embedding;
  if (encoded < 0) return;
  require(encoded < std::ssize(program.values) && writers[index(encoded)],
          "no instruction writes the embedding");
  require(program.values[index(encoded)].rows == Rows::kSequences,
          "an embedding of something else than sequences");
}

}  // namespace sartor
