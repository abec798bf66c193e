// One step of a program, with everything that it needs and what should come of it, as bytes:
// a machine replays it without Python and without the reference.
//
// Bytes are little-endian and in the order of the declarations in kernels.hpp and executor.hpp.
// Numbers are as wide as declared. A list is a count of 64 bits and its items; a string is a
// list of characters. An array (what a pointer points to) is a count of 64 bits, 0 where there is
// none, zeros up to the next multiple of 64 bytes, and the elements. A recording begins with
// kRecordingMark, ends with zeros up to a multiple of 64, and may follow another one.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "executor.hpp"

namespace sartor {

constexpr uint64_t kRecordingMark = 0x33304352'54524153;  // "SARTRC03"; count up with the format

struct Recording {
  std::string name;
  double tolerance = 0;         // the largest error allowed, as a share of the largest value
  std::vector<float> expected;  // the first tap's result
  ProgramInfo program;
  std::vector<int64_t> blocks;  // of each state group
  StepInput step;
};

// Throws std::invalid_argument for what cannot leave the process: adapters, kernels of others.
std::vector<uint8_t> write_recording(Recording recording);

// Takes the first recording off `bytes`, which begin at a multiple of 64 and which it goes on
// pointing into. Throws std::invalid_argument where they are no whole recording.
Recording read_recording(std::span<const uint8_t>& bytes);

}  // namespace sartor
