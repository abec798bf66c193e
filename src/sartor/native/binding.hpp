// What the files of the binding share: arrays in and out, and their checks.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.hpp"
#include "sampler.hpp"

namespace nb = nanobind;

template <typename T>
using In = nb::ndarray<const T, nb::c_contig, nb::device::cpu>;
template <typename T>
using InOut = nb::ndarray<T, nb::c_contig, nb::device::cpu>;
template <typename T>
using Out = nb::ndarray<nb::numpy, T, nb::c_contig>;

template <typename T>
Out<T> to_numpy(std::vector<T>&& values, std::vector<size_t> shape) {
  auto* kept = new std::vector<T>(std::move(values));
  nb::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return Out<T>(kept->data(), shape.size(), shape.data(), owner);
}

template <typename T>
Out<T> to_numpy(std::vector<T>&& values) {
  const size_t count = values.size();
  return to_numpy(std::move(values), {count});
}

inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

const sartor::Kernels* kernels_of(const std::string& isa);
void check_ids(const int32_t* ids, int64_t count, int64_t vocab, const char* what);
// What was drawn, as arrays: tokens, log probabilities, alternatives, theirs, where they start.
nb::tuple samples_to_numpy(const std::vector<sartor::SampleResult>& samples);
void bind_sampler(nb::module_& m);
