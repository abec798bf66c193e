// Programs of any parts: check_program refuses them, or a step of them runs within its memory.
//
// With clang's libFuzzer this is its target; with -DSARTOR_REPLAY it is a program that gives the
// target the files it is called with, and as many random inputs as its first argument says.
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "cpu_features.hpp"
#include "executor.hpp"

namespace {

using namespace sartor;

// Takes numbers off the input; zeros when it is used up.
class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}
  bool empty() const { return left_ == 0; }
  uint8_t byte() {
    if (!left_) return 0;
    --left_;
    return *data_++;
  }
  // Mostly a small number, at times one at which sizes wrap around.
  int64_t size() {
    static constexpr int64_t kOdd[] = {0,
                                       -1,
                                       -16,
                                       INT32_MAX,
                                       INT64_MAX,
                                       INT64_MIN,
                                       1LL << 31,
                                       1LL << 32,
                                       1LL << 47,
                                       1LL << 62,
                                       4611686018427387904LL - 1,
                                       3037000500};
    static constexpr int64_t kEven[] = {1, 2, 3, 4, 8, 16, 32, 48, 64, 96, 128, 7, 15, 33, 5, 6};
    const uint8_t b = byte();
    if (b >= 244) return kOdd[b - 244];
    return kEven[b % 16];
  }
  int32_t number(int64_t count) {  // one of `count`, or just outside
    const uint8_t b = byte();
    if (b == 255) return static_cast<int32_t>(count);
    if (b == 254) return -1;
    return count ? static_cast<int32_t>(b % count) : 0;
  }

 private:
  const uint8_t* data_;
  size_t left_;
};

constexpr int kTokens = 5, kSequences = 2, kBlocks = 4, kBlockSize = 32;

// A matrix as make_matrix of binding.cpp would accept it: arrays of just the sizes that it states.
struct Held {
  std::vector<uint8_t> codes;
  std::vector<uint16_t> scales, offsets;
};

Matrix matrix_of(Input& in, std::vector<std::unique_ptr<Held>>& held) {
  static constexpr int64_t kSizes[] = {1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 7, 15, 33, 5, 3, 6};
  static constexpr Storage kStorages[] = {Storage::kFp32,   Storage::kFp16,   Storage::kBf16,
                                          Storage::kAffine, Storage::kLookup, Storage::kFp8};
  Matrix m;
  m.storage = kStorages[in.byte() % 6];
  m.n = kSizes[in.byte() % 16];
  m.k = kSizes[in.byte() % 16];
  m.k_padded = round_up(m.k, kChunk);
  m.experts = 1 + in.byte() % 3;
  auto arrays = std::make_unique<Held>();
  if (m.integer_codes() || m.storage == Storage::kFp8) {
    m.bits = m.storage == Storage::kLookup ? 4 : 2 + in.byte() % 7;
    m.group = in.byte() % 2 ? 16 : static_cast<int>(kChunk);
    const auto groups = index(m.experts * m.blocks() * kLanes * (m.k_padded / m.group));
    arrays->scales.assign(groups, 0x2c00);
    m.scales = arrays->scales.data();
    if (m.storage == Storage::kAffine && in.byte() % 2) {
      arrays->offsets.assign(groups, 0x2c00);
      m.offsets = arrays->offsets.data();
      m.has_offset = true;
    }
  }
  arrays->codes.assign(index(m.experts * m.code_bytes()), 0x11);
  m.codes = arrays->codes.data();
  held.push_back(std::move(arrays));
  return m;
}

ProgramInfo program_of(Input& in, std::vector<std::unique_ptr<Held>>& held) {
  ProgramInfo p;
  p.vocab = in.size();
  p.block_size = in.byte() == 255 ? in.size() : kBlockSize;
  p.int8_activations = in.byte() % 2;
  p.embedding = in.byte() % 8 ? -1 : in.number(8);
  for (int i = in.byte() % 3; i > 0; --i) p.taps.emplace_back("tap");
  for (int i = 1 + in.byte() % 10; i > 0; --i)
    p.values.push_back(
        {in.size(), in.byte() % 4 ? Rows::kTokens : static_cast<Rows>(in.byte() % 3)});
  for (int i = in.byte() % 4; i > 0; --i) p.matrices.push_back(matrix_of(in, held));
  for (int i = in.byte() % 4; i > 0; --i) p.vectors.emplace_back(index(in.byte()) + 1, 0.5f);
  for (int i = in.byte() % 2; i > 0; --i) {
    const int64_t dim = 2 * (in.byte() % 33);
    p.ropes.push_back({dim, in.byte() % 2 == 1, 1.0f, std::vector<float>(index(dim / 2), 0.1f)});
  }
  for (int i = in.byte() % 3; i > 0; --i) {
    static constexpr Storage kStates[] = {Storage::kFp32, Storage::kFp16, Storage::kBf16,
                                          Storage::kInt8};
    StateInfo state{kStates[in.byte() % 4], in.size(), in.size(), in.size(), 0, 0};
    if (in.byte() % 3 == 0) state.slot_floats = in.size();
    p.states.push_back(state);
  }
  const auto count = std::ssize(p.values);
  const auto list = [&](int64_t most, int64_t of) {
    std::vector<int32_t> ids;
    for (int i = in.byte() % 6; i > 0 && std::ssize(ids) < most; --i) ids.push_back(in.number(of));
    return ids;
  };
  while (!in.empty() && p.instructions.size() < 16) {
    Instruction n;
    n.op = static_cast<Op>(in.byte() % 30);
    n.name = "node";
    n.inputs = list(5, count);
    n.outputs = list(5, count);
    n.matrices = list(3, std::ssize(p.matrices));
    n.vectors = list(3, std::ssize(p.vectors));
    n.state = in.number(std::ssize(p.states));
    n.rope = in.number(std::ssize(p.ropes));
    n.tap = in.byte() % 4 ? -1 : in.number(std::ssize(p.taps));
    for (int64_t* field : {&n.heads, &n.kv_heads, &n.head_dim, &n.value_dim, &n.window,
                           &n.key_heads, &n.key_dim, &n.run})
      *field = in.size();
    for (int i = in.byte() % 4; i > 0; --i) n.widths.push_back(in.size());
    n.delta = in.byte() % 2;
    n.positions = in.byte() % 8 == 0;
    n.routing = {in.size(), in.size(), in.size(), in.byte() % 2 == 1, false, in.byte() % 2 == 1};
    n.pool = static_cast<Pool>(in.byte() % 3);
    n.residual_threshold = in.byte() % 2 ? -1.0f : 0.5f;
    n.eps = 1e-5f;
    p.instructions.push_back(std::move(n));
  }
  return p;
}

// What make_step of binding.cpp lets through: two sequences of new tokens.
void run(Executor& executor) {
  const ProgramInfo& p = executor.program();
  std::vector<int32_t> tokens(kTokens, 0), positions{0, 1, 2, 0, 1}, starts{0, 3, 5};
  std::vector<int32_t> contexts(kSequences, 0), rows{2, 4}, lists(kSequences + 1, 0), table{1, 2};
  std::vector<SamplingRow> sampling(2);
  StepInput step;
  step.tokens = kTokens;
  step.sequences = kSequences;
  step.outputs = 2;
  step.token_ids = tokens.data();
  step.positions = positions.data();
  step.starts = starts.data();
  step.contexts = contexts.data();
  step.output_rows = rows.data();
  step.sampling = sampling.data();
  step.history = step.bias_tokens = tokens.data();
  step.history_starts = step.bias_starts = lists.data();
  int32_t groups = 0;
  for (const StateInfo& state : p.states) groups = std::max(groups, state.group + 1);
  for (int32_t g = 0; g < groups; ++g) step.tables.push_back({table.data(), 1});
  step.rope_frequencies.assign(p.ropes.size(), nullptr);
  step.wanted_taps.assign(p.taps.size(), true);
  executor.run(step);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const auto pool = std::make_shared<ThreadPool>(1);
  static const Kernels* kernels = select_kernels("auto");
  Input in(data, size);
  std::vector<std::unique_ptr<Held>> held;
  try {
    Executor executor(program_of(in, held), pool, kernels);
    double floats = 0;
    for (const ValueInfo& value : executor.program().values)
      floats += static_cast<double>(value.width);
    if (floats > 1e6 || executor.block_bytes(0) > (1 << 20)) return 0;  // sound, but large
    executor.allocate_state({kBlocks});
    run(executor);
  } catch (const std::invalid_argument&) {
  } catch (const std::out_of_range&) {
  } catch (const std::bad_alloc&) {  // sound, but larger than any machine
  }
  return 0;
}

#ifdef SARTOR_REPLAY
#include <cstdio>
#include <fstream>
#include <iterator>
#include <random>

int main(int argc, char** argv) {
  for (int i = 2; i < argc; ++i) {
    std::ifstream file(argv[i], std::ios::binary);
    const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), {});
    LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size());
  }
  std::mt19937 random(1);
  const int count = argc > 1 ? std::atoi(argv[1]) : 0;
  for (int i = 0; i < count; ++i) {
    std::vector<uint8_t> bytes(random() % 300);
    for (uint8_t& b : bytes) b = static_cast<uint8_t>(random());
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  std::printf("%d files and %d random programs\n", argc - 2 < 0 ? 0 : argc - 2, count);
  return 0;
}
#endif
