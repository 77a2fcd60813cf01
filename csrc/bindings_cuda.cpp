// CUDA kernels of the point ops on torch's current stream. Only host code, so that any C++ compiler builds it.
#include "bindings.h"
#include "point_ops_cuda.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <limits>
#include <string_view>

namespace pointalign {
namespace {

Points points_of(const Tensor& points, const std::optional<Tensor>& lengths) {
  return {static_cast<const float*>(points.data_ptr()),
          points.stride(0),
          points.stride(1),
          static_cast<int>(points.size(1)),
          static_cast<int>(points.size(2)),
          lengths.has_value() ? static_cast<const int64_t*>(lengths->data_ptr()) : nullptr};
}

int narrow(int64_t value, const char* name) {
  check(value <= std::numeric_limits<int>::max() - 4096, name, ": ", value, " is too large for CUDA");
  return static_cast<int>(value);
}

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  const auto error = aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream);
  check(error == 0, "no current CUDA stream on device ", tensor.get_device_index());
  return stream;
}

void check_launch(int error) {
  if (error != 0) throw std::runtime_error(std::string("CUDA point ops: ") + cuda_error_text(error));
}

// POINTALIGN_CUDA_POINT_OPS=scan|buckets asks for a variant of every op, so that benchmarks and tests can run both.
Variant wanted_variant() {
  const char* const value = std::getenv("POINTALIGN_CUDA_POINT_OPS");
  const std::string_view name = value == nullptr ? "" : value;
  check(name.empty() || name == "scan" || name == "buckets", "POINTALIGN_CUDA_POINT_OPS=", name,
        ": expected scan or buckets");
  return name.empty() ? Variant::kChosen : name == "scan" ? Variant::kScan : Variant::kBuckets;
}

Tensor workspace_of(const Tensor& points, int64_t floats) { return empty(points, {floats}, ScalarType::Float); }

Tensor farthest_point_sample_cuda(const Tensor& points_, int64_t num_samples, int64_t start_index,
                                  const std::optional<Tensor>& lengths_) {
  const Tensor points = rows_of(points_, "points");
  check_sampling(points, num_samples, start_index);
  const auto lengths = lengths_of(lengths_, points);
  const torch::stable::accelerator::DeviceGuard guard(points.get_device_index());
  Tensor index = empty(points, {points.size(0), num_samples}, ScalarType::Long);
  const int clouds = narrow(points.size(0), "batch"), count = static_cast<int>(points.size(1));
  Variant variant = wanted_variant();
  check_launch(choose_sampling(count, &variant));
  const Tensor workspace = workspace_of(points, sampling_workspace(clouds, count, variant));
  check_launch(launch_farthest_point_sample(points_of(points, lengths), clouds, narrow(num_samples, "num_samples"),
                                            static_cast<int>(start_index), variant,
                                            static_cast<float*>(workspace.data_ptr()),
                                            static_cast<int64_t*>(index.data_ptr()), current_stream(points)));
  return index;
}

std::tuple<Tensor, Tensor> knn_cuda(const Tensor& query_, const Tensor& points_, int64_t k,
                                    const std::optional<Tensor>& lengths_) {
  const Tensor points = rows_of(points_, "points"), query = queries_of(query_, points);
  check_neighbours(k);
  const auto lengths = lengths_of(lengths_, points);
  const torch::stable::accelerator::DeviceGuard guard(points.get_device_index());
  Tensor distance = empty(points, {points.size(0), query.size(1), k}, ScalarType::Float);
  Tensor index = empty(points, {points.size(0), query.size(1), k}, ScalarType::Long);
  const int clouds = narrow(points.size(0), "batch"), count = static_cast<int>(points.size(1));
  const Variant variant = choose_search(count, narrow(query.size(1), "queries"), wanted_variant());
  const Tensor workspace = workspace_of(points, search_workspace(clouds, count, variant));
  check_launch(launch_knn(points_of(points, lengths), points_of(query, std::nullopt), clouds, narrow(k, "k"), variant,
                          static_cast<float*>(workspace.data_ptr()), static_cast<float*>(distance.data_ptr()),
                          static_cast<int64_t*>(index.data_ptr()), current_stream(points)));
  return {distance, index};
}

Tensor group_points_cuda(const Tensor& points_, const Tensor& centre_index_, int64_t k,
                         const std::optional<Tensor>& lengths_, ScalarType dtype) {
  const Tensor points = rows_of(points_, "points"), centre_index = centres_of(centre_index_, points);
  check_neighbours(k);
  check_output(dtype);
  const auto lengths = lengths_of(lengths_, points);
  const torch::stable::accelerator::DeviceGuard guard(points.get_device_index());
  Tensor groups = empty(points, {points.size(0), centre_index.size(1), k, points.size(2)}, dtype);
  const GroupType type = dtype == ScalarType::Float  ? GroupType::kFloat
                         : dtype == ScalarType::Half ? GroupType::kHalf
                                                     : GroupType::kBFloat16;
  const int clouds = narrow(points.size(0), "batch"), count = static_cast<int>(points.size(1));
  const int centres = narrow(centre_index.size(1), "centres");
  const Variant variant = choose_search(count, centres, wanted_variant());
  const Tensor workspace = workspace_of(points, search_workspace(clouds, count, variant));
  check_launch(launch_group_points(points_of(points, lengths), static_cast<const int64_t*>(centre_index.data_ptr()),
                                   clouds, centres, narrow(k, "k"), type, variant,
                                   static_cast<float*>(workspace.data_ptr()), groups.data_ptr(),
                                   current_stream(points)));
  return groups;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pointalign_kernels, CUDA, library) {
  library.impl("farthest_point_sample", TORCH_BOX(&farthest_point_sample_cuda));
  library.impl("knn", TORCH_BOX(&knn_cuda));
  library.impl("group_points", TORCH_BOX(&group_points_cuda));
}

}  // namespace pointalign
