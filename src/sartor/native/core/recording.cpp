#include "recording.hpp"

#include <bit>
#include <cstring>
#include <stdexcept>
#include <type_traits>

namespace sartor {
namespace {

static_assert(std::endian::native == std::endian::little);
constexpr size_t kAlignment = 64;

class Writer {
 public:
  std::vector<uint8_t> bytes;

  void raw(const void* from, size_t size) {
    const auto* p = static_cast<const uint8_t*>(from);
    bytes.insert(bytes.end(), p, p + size);
  }
  void align() { bytes.resize(index(round_up(static_cast<int64_t>(bytes.size()), kAlignment))); }
  template <typename T>
  int64_t count(const T& list) {
    const auto size = static_cast<int64_t>(list.size());
    raw(&size, sizeof size);
    return size;
  }
  template <typename T>
  void array(const T* from, int64_t count) {
    if (!from) count = 0;
    raw(&count, sizeof count);
    align();
    raw(from, index(count) * sizeof(T));
  }
};

class Reader {
 public:
  explicit Reader(std::span<const uint8_t> bytes) : all_(bytes), rest_(bytes) {}

  std::span<const uint8_t> rest() const { return rest_; }
  void raw(void* to, size_t size) {
    const uint8_t* from = take(size);
    if (size) std::memcpy(to, from, size);
  }
  void align() { take(index(-static_cast<int64_t>(all_.size() - rest_.size())) % kAlignment); }
  template <typename T>
  int64_t count(T& list) {
    int64_t size = 0;
    raw(&size, sizeof size);
    if (size < 0 || index(size) > rest_.size()) fail();
    list.resize(index(size));
    return size;
  }
  template <typename T>
  void array(const T*& to, int64_t expected) {
    int64_t count = 0;
    raw(&count, sizeof count);
    if (count != 0 && count != expected) fail();
    align();
    if (index(count) > rest_.size()) fail();
    const uint8_t* from = take(index(count) * sizeof(T));
    to = count ? reinterpret_cast<const T*>(from) : nullptr;
  }

 private:
  [[noreturn]] static void fail() {
    throw std::invalid_argument("not a whole recording of this version; record it again");
  }
  const uint8_t* take(size_t size) {
    if (size > rest_.size()) fail();
    const uint8_t* from = rest_.data();
    rest_ = rest_.subspan(size);
    return from;
  }
  std::span<const uint8_t> all_, rest_;
};

template <typename T>
concept Plain = std::is_arithmetic_v<T> || std::is_enum_v<T> || std::is_array_v<T>;

// One description of the format for both directions. The structured bindings name every member:
// a type that gets another one does not compile before it is recorded here.
template <typename Archive, Plain T>
void transfer(Archive& a, T& x) {
  a.raw(&x, sizeof x);
}
template <typename Archive>
void transfer(Archive& a, std::vector<bool>& list) {
  const int64_t count = a.count(list);
  for (int64_t i = 0; i < count; ++i) {
    bool item = list[index(i)];
    transfer(a, item);
    list[index(i)] = item;
  }
}
template <typename Archive>
void transfer(Archive& a, std::string& text) {
  a.count(text);
  a.raw(text.data(), text.size());
}
template <typename Archive, typename T>
void transfer(Archive& a, std::vector<T>& list) {
  a.count(list);
  for (T& item : list) transfer(a, item);
}
template <typename Archive, typename... T>
void each(Archive& a, T&... x) {
  (transfer(a, x), ...);
}

template <typename Archive>
void transfer(Archive& a, Routing& x) {
  auto& [top_k, groups, top_groups, sigmoid, normalize, by_best_two] = x;
  each(a, top_k, groups, top_groups, sigmoid, normalize, by_best_two);
}
template <typename Archive>
void transfer(Archive& a, Instruction& x) {
  auto& [op, name, inputs, outputs, matrices, vectors, state, rope, tap, heads, kv_heads, head_dim,
         value_dim, window, key_heads, key_dim, run, widths, delta, positions, routing, pool,
         residual_threshold, eps, weight_offset, factor, softcap, activation, custom] = x;
  if (custom.function)
    throw std::invalid_argument("node " + name + " runs a kernel of another package, which " +
                                "cannot be recorded");
  each(a, op, name, inputs, outputs, matrices, vectors, state, rope, tap, heads, kv_heads, head_dim,
       value_dim, window, key_heads, key_dim, run, widths, delta, positions, routing, pool,
       residual_threshold, eps, weight_offset, factor, softcap, activation);
}
template <typename Archive>
void transfer(Archive& a, ValueInfo& x) {
  auto& [width, rows] = x;
  each(a, width, rows);
}
template <typename Archive>
void transfer(Archive& a, RopeInfo& x) {
  auto& [dim, interleaved, factor, inverse_frequencies] = x;
  each(a, dim, interleaved, factor, inverse_frequencies);
}
template <typename Archive>
void transfer(Archive& a, StateInfo& x) {
  auto& [kv, kv_heads, head_dim, value_dim, group, slot_floats] = x;
  each(a, kv, kv_heads, head_dim, value_dim, group, slot_floats);
}
template <typename Archive>
void transfer(Archive& a, Matrix& x) {
  auto& [storage, n, k, k_padded, bits, group, zero, has_offset, codes, scales, offsets,
         scale_multiplier, offset_multiplier, table, experts, permutation] = x;
  each(a, storage, n, k, k_padded, bits, group, zero, has_offset, scale_multiplier,
       offset_multiplier, table, experts);
  const int64_t groups = group ? experts * x.blocks() * kLanes * (k_padded / group) : 0;
  a.array(codes, experts * x.code_bytes());
  a.array(scales, groups);
  a.array(offsets, groups);
  a.array(permutation, k);
}
template <typename Archive>
void transfer(Archive& a, ProgramInfo& x) {
  auto& [values, instructions, matrices, vectors, ropes, states, taps, vocab, block_size,
         int8_activations, embedding] = x;
  each(a, values, instructions, matrices, vectors, ropes, states, taps, vocab, block_size,
       int8_activations, embedding);
}

template <typename Archive>
void transfer_step(Archive& a, StepInput& x, const ProgramInfo& program) {
  auto& [tokens, sequences, outputs, token_ids, positions, starts, contexts, tables, copies,
         output_rows, sampling, history, history_starts, bias_tokens, bias_starts, bias_values,
         adapters, embeddings, embedding_rows, embedding_values, rope_frequencies, wanted_taps] = x;
  each(a, tokens, sequences, outputs, embeddings, wanted_taps);
  a.array(token_ids, tokens);
  a.array(positions, tokens);
  a.array(starts, sequences + 1);
  a.array(contexts, sequences);
  a.count(tables);
  for (BlockTable& table : tables) {
    auto& [data, width] = table;
    transfer(a, width);
    a.array(data, sequences * width);
  }
  a.count(copies);
  for (BlockCopies& group : copies) {
    auto& [pairs, count] = group;
    transfer(a, count);
    a.array(pairs, 2 * count);
  }
  a.array(output_rows, outputs);
  a.array(sampling, outputs);
  a.array(history_starts, outputs + 1);
  a.array(history, history_starts ? history_starts[outputs] : 0);
  a.array(bias_starts, outputs + 1);
  a.array(bias_tokens, bias_starts ? bias_starts[outputs] : 0);
  a.array(bias_values, bias_starts ? bias_starts[outputs] : 0);
  a.array(adapters, sequences);
  for (int64_t s = 0; adapters && s < sequences; ++s)
    if (adapters[s] >= 0) throw std::invalid_argument("a step with adapters cannot be recorded");
  a.array(embedding_rows, embeddings);
  a.array(embedding_values, embeddings * program.embedding_width());
  a.count(rope_frequencies);
  for (size_t r = 0; r < rope_frequencies.size(); ++r)
    a.array(rope_frequencies[r], sequences * program.ropes.at(r).dim / 2);
}

template <typename Archive>
void transfer(Archive& a, Recording& x) {
  auto& [name, tolerance, expected, program, blocks, step] = x;
  each(a, name, tolerance, expected, program, blocks);
  transfer_step(a, step, program);
  a.align();
}

}  // namespace

std::vector<uint8_t> write_recording(Recording recording) {
  Writer writer;
  writer.raw(&kRecordingMark, sizeof kRecordingMark);
  transfer(writer, recording);
  return std::move(writer.bytes);
}

Recording read_recording(std::span<const uint8_t>& bytes) {
  Reader reader(bytes);
  uint64_t mark = 0;
  reader.raw(&mark, sizeof mark);
  if (mark != kRecordingMark)
    throw std::invalid_argument("not a recording of this version; record it again");
  Recording recording;
  transfer(reader, recording);
  bytes = reader.rest();
  return recording;
}

}  // namespace sartor
