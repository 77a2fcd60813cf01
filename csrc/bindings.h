// What the CPU and the CUDA binding share: argument checks and outputs. Written against torch's stable ABI, so that one
// build serves every torch from 2.11 and every Python.
#pragma once

#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <tuple>

namespace pointalign {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Words>
void check(bool condition, const Words&... words) {
  if (condition) return;
  std::ostringstream message;
  (message << ... << words);
  throw std::invalid_argument(message.str());
}

// fp32 [B, N, C], C >= 3, every row contiguous; only the first three columns are read as coordinates.
inline Tensor rows_of(const Tensor& points, const char* name) {
  check(points.dim() == 3 && points.size(2) >= 3, name, ": expected a shape [B, N, 3] or wider, got ", points.dim(),
        " dimensions", points.dim() == 3 ? " with fewer than 3 columns" : "");
  check(points.scalar_type() == ScalarType::Float, name, ": expected float32");
  check(points.size(1) >= 1, name, ": expected at least one point in every cloud, got N = 0");
  check(points.size(1) <= 0x7fffffff - 4096, name, ": at most 2^31 points in a cloud");
  return points.stride(2) == 1 ? points : torch::stable::contiguous(points);
}

inline std::optional<Tensor> lengths_of(const std::optional<Tensor>& lengths, const Tensor& points) {
  if (!lengths.has_value()) return std::nullopt;
  check(lengths->dim() == 1 && lengths->size(0) == points.size(0) && lengths->scalar_type() == ScalarType::Long,
        "lengths: expected int64 [B] with B = ", points.size(0));
  check(lengths->device() == points.device(), "lengths: expected the device of the points");
  return torch::stable::contiguous(*lengths);
}

inline Tensor queries_of(const Tensor& query, const Tensor& points) {
  check(query.dim() == 3 && query.size(2) >= 3 && query.scalar_type() == ScalarType::Float,
        "query: expected float32 [B, Q, 3]");
  check(query.size(0) == points.size(0), "query: expected a batch of ", points.size(0), ", got ", query.size(0));
  check(query.device() == points.device(), "query: expected the device of the points");
  return query.stride(2) == 1 ? query : torch::stable::contiguous(query);
}

inline Tensor centres_of(const Tensor& centre_index, const Tensor& points) {
  check(centre_index.dim() == 2 && centre_index.size(0) == points.size(0) &&
            centre_index.scalar_type() == ScalarType::Long,
        "centre_index: expected int64 [B, G] with B = ", points.size(0));
  check(centre_index.device() == points.device(), "centre_index: expected the device of the points");
  return torch::stable::contiguous(centre_index);
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

inline void check_sampling(const Tensor& points, int64_t num_samples, int64_t start_index) {
  check(num_samples >= 1, "num_samples: expected at least 1, got ", num_samples);
  check(0 <= start_index && start_index < points.size(1), "start_index: expected 0 to ", points.size(1) - 1, ", got ",
        start_index);
}

inline void check_neighbours(int64_t k) { check(k >= 1, "k: expected at least 1, got ", k); }

inline void check_output(ScalarType dtype) {
  check(dtype == ScalarType::Float || dtype == ScalarType::Half || dtype == ScalarType::BFloat16,
        "dtype: expected float32, float16 or bfloat16");
}

}  // namespace pointalign
