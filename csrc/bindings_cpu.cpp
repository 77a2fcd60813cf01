// CPU kernels of the point ops: torch's own threads over clouds and queries, so that no second pool oversubscribes.
#include "bindings.h"
#include "point_ops_cpu.h"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

namespace pointalign {
namespace {

const int64_t* valid_lengths(const std::optional<Tensor>& lengths, const Tensor& points) {
  if (!lengths.has_value()) return nullptr;
  const auto* values = static_cast<const int64_t*>(lengths->data_ptr());
  for (int64_t b = 0; b < points.size(0); ++b)
    check(1 <= values[b] && values[b] <= points.size(1), "lengths[", b, "]: expected 1 to ", points.size(1), ", got ",
          values[b]);
  return values;
}

void check_finite(const std::vector<int64_t>& bad, const char* name) {
  for (size_t b = 0; b < bad.size(); ++b)
    check(bad[b] < 0, name, "[", b, ", ", bad[b], "]: a coordinate is NaN or infinite; remove such points first");
}

std::vector<Cloud> sorted_clouds(const Tensor& points, const int64_t* lengths) {
  const PointOps& ops = point_ops();
  const auto* data = static_cast<const float*>(points.data_ptr());
  std::vector<Cloud> clouds(points.size(0));
  std::vector<int64_t> bad(points.size(0));
  torch::stable::parallel_for(0, points.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      bad[b] = ops.build(clouds[b], data + b * points.stride(0), lengths == nullptr ? points.size(1) : lengths[b],
                         points.stride(1));
  });
  check_finite(bad, "points");
  return clouds;
}

Tensor farthest_point_sample_cpu(const Tensor& points_, int64_t num_samples, int64_t start_index,
                                 const std::optional<Tensor>& lengths_) {
  const Tensor points = rows_of(points_, "points");
  check_sampling(points, num_samples, start_index);
  const auto lengths_held = lengths_of(lengths_, points);
  const int64_t* lengths = valid_lengths(lengths_held, points);
  const int64_t batch = points.size(0);
  Tensor index = empty(points, {batch, num_samples}, ScalarType::Long);
  const PointOps& ops = point_ops();
  const auto* data = static_cast<const float*>(points.data_ptr());
  auto* out = static_cast<int64_t*>(index.data_ptr());
  std::vector<int64_t> bad(batch);
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const float* rows = data + b * points.stride(0);
      const int64_t count = lengths == nullptr ? points.size(1) : lengths[b], start = std::min(start_index, count - 1);
      Cloud cloud;
      bad[b] = ops.build(cloud, rows, count, points.stride(1));
      if (bad[b] < 0)
        ops.farthest_point_sample(cloud, num_samples, rows + start * points.stride(1), start, out + b * num_samples);
    }
  });
  check_finite(bad, "points");
  return index;
}

// Calls visit(b, q, keys) with the sorted neighbours of every query, in parallel; query(b, q) gives coordinates.
template <typename Query, typename Visit>
void for_each_neighbourhood(const std::vector<Cloud>& clouds, int64_t queries, int64_t k, const Query& query,
                            const Visit& visit) {
  const PointOps& ops = point_ops();
  int64_t groups = 0;
  for (const Cloud& cloud : clouds) groups = std::max(groups, cloud.groups);
  constexpr int64_t kGrain = 64;  // queries: about 0.1 ms
  torch::stable::parallel_for(0, static_cast<int64_t>(clouds.size()) * queries, kGrain, [&](int64_t begin, int64_t end) {
    const Scratch scratch(knn_scratch_bytes(groups, k)), keys(k * sizeof(uint64_t));
    for (int64_t i = begin; i < end; ++i) {
      ops.knn(clouds[i / queries], query(i / queries, i % queries), k, scratch.as<void>(), keys.as<uint64_t>());
      visit(i / queries, i % queries, keys.as<uint64_t>());
    }
  });
}

std::tuple<Tensor, Tensor> knn_cpu(const Tensor& query_, const Tensor& points_, int64_t k,
                                   const std::optional<Tensor>& lengths_) {
  const Tensor points = rows_of(points_, "points"), query = queries_of(query_, points);
  check_neighbours(k);
  const auto lengths_held = lengths_of(lengths_, points);
  const int64_t batch = points.size(0), queries = query.size(1);
  const auto* query_data = static_cast<const float*>(query.data_ptr());
  const auto at = [&](int64_t b, int64_t q) { return query_data + b * query.stride(0) + q * query.stride(1); };
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t q = 0; q < queries; ++q) {
      const float* c = at(b, q);
      check(c[0] - c[0] == 0 && c[1] - c[1] == 0 && c[2] - c[2] == 0, "query[", b, ", ", q,
            "]: a coordinate is NaN or infinite");
    }
  const auto clouds = sorted_clouds(points, valid_lengths(lengths_held, points));
  Tensor distance = empty(points, {batch, queries, k}, ScalarType::Float);
  Tensor index = empty(points, {batch, queries, k}, ScalarType::Long);
  auto* distance_out = static_cast<float*>(distance.data_ptr());
  auto* index_out = static_cast<int64_t*>(index.data_ptr());
  for_each_neighbourhood(clouds, queries, k, at, [&](int64_t b, int64_t q, const uint64_t* keys) {
    const int64_t row = (b * queries + q) * k;
    for (int64_t j = 0; j < k; ++j) {
      const uint32_t bits = keys[j] >> 32;
      std::memcpy(distance_out + row + j, &bits, sizeof(bits));
      index_out[row + j] = static_cast<uint32_t>(keys[j]);
    }
  });
  return {distance, index};
}

template <typename Out, typename Round>
void write_groups(const std::vector<Cloud>& clouds, const Tensor& points, const int64_t* centre_index, int64_t centres,
                  int64_t k, void* out_data, const Round& round) {
  const auto* data = static_cast<const float*>(points.data_ptr());
  const int64_t columns = points.size(2), row_stride = points.stride(1);
  const auto centre_of = [&](int64_t b, int64_t g) {
    return data + b * points.stride(0) + centre_index[b * centres + g] * row_stride;
  };
  for_each_neighbourhood(clouds, centres, k, centre_of, [&](int64_t b, int64_t g, const uint64_t* keys) {
    const float *cloud = data + b * points.stride(0), *centre = centre_of(b, g);
    Out* out = static_cast<Out*>(out_data) + (b * centres + g) * k * columns;
    for (int64_t j = 0; j < k; ++j, out += columns) {
      const float* row = cloud + static_cast<uint32_t>(keys[j]) * row_stride;
      for (int64_t c = 0; c < 3; ++c) out[c] = round(row[c] - centre[c]);
      for (int64_t c = 3; c < columns; ++c) out[c] = round(row[c]);
    }
  });
}

Tensor group_points_cpu(const Tensor& points_, const Tensor& centre_index_, int64_t k,
                        const std::optional<Tensor>& lengths_, ScalarType dtype) {
  const Tensor points = rows_of(points_, "points"), centre_index = centres_of(centre_index_, points);
  check_neighbours(k);
  check_output(dtype);
  const auto lengths_held = lengths_of(lengths_, points);
  const int64_t* lengths = valid_lengths(lengths_held, points);
  const int64_t batch = points.size(0), centres = centre_index.size(1);
  const auto* centre_data = static_cast<const int64_t*>(centre_index.data_ptr());
  for (int64_t i = 0; i < batch * centres; ++i) {
    const int64_t count = lengths == nullptr ? points.size(1) : lengths[i / centres];
    check(0 <= centre_data[i] && centre_data[i] < count, "centre_index[", i / centres, ", ", i % centres,
          "]: expected 0 to ", count - 1, ", got ", centre_data[i]);
  }
  const auto clouds = sorted_clouds(points, lengths);
  Tensor groups = empty(points, {batch, centres, k, points.size(2)}, dtype);
  void* out = groups.data_ptr();
  if (dtype == ScalarType::Float)
    write_groups<float>(clouds, points, centre_data, centres, k, out, [](float value) { return value; });
  else if (dtype == ScalarType::Half)
    write_groups<uint16_t>(clouds, points, centre_data, centres, k, out, [](float value) { return to_half(value); });
  else
    write_groups<uint16_t>(clouds, points, centre_data, centres, k, out, [](float value) { return to_bfloat16(value); });
  return groups;
}

std::string instruction_set() { return point_ops().instruction_set; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pointalign_kernels, CPU, library) {
  library.impl("farthest_point_sample", TORCH_BOX(&farthest_point_sample_cpu));
  library.impl("knn", TORCH_BOX(&knn_cpu));
  library.impl("group_points", TORCH_BOX(&group_points_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(pointalign_kernels, CompositeExplicitAutograd, library) {
  library.impl("instruction_set", TORCH_BOX(&instruction_set));
}

}  // namespace pointalign
