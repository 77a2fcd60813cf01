// Checks the point ops without Python or torch, so that they can be compiled with sanitizers: every CPU variant, and
// the CUDA kernels under the emulator, against brute force. Arguments: number of random cases, seed.
#include "cuda_emulator.h"

#include <algorithm>

#include "../../csrc/point_ops_cpu.h"
// The emulator has to come first.
#include "../../csrc/point_ops_cuda.cu"

__half __float2half_rn(float value) { return {pointalign::to_half(value)}; }
__nv_bfloat16 __float2bfloat16_rn(float value) { return {pointalign::to_bfloat16(value)}; }

using namespace pointalign;

namespace {

std::mt19937_64 random_bits;

int64_t draw(int64_t low, int64_t high) { return low + static_cast<int64_t>(random_bits() % (high - low + 1)); }

struct Case {
  int clouds, count, columns, k, num_samples, start, centres;
  bool ragged;
  std::vector<float> rows;  // exactly as long as needed, so that a sanitizer sees one element too many
  std::vector<int64_t> lengths;
  const float* row(int cloud, int64_t i) const { return rows.data() + (cloud * count + i) * columns; }
  int length(int cloud) const { return ragged ? static_cast<int>(lengths[cloud]) : count; }
};

Case draw_case(int largest) {
  Case c;
  c.clouds = static_cast<int>(draw(1, 3));
  c.count = static_cast<int>(draw(0, 3) == 0 ? draw(1, 40) : draw(1, largest));
  c.columns = static_cast<int>(draw(0, 1) == 0 ? 3 : draw(3, 9));
  c.k = static_cast<int>(draw(1, std::min(c.count + 3, 100)));
  c.num_samples = static_cast<int>(draw(1, std::min(c.count + 3, 60)));
  c.start = static_cast<int>(draw(0, c.count - 1));
  c.centres = static_cast<int>(draw(1, 70));
  c.ragged = draw(0, 2) == 0;
  for (int b = 0; b < c.clouds; ++b) c.lengths.push_back(draw(1, c.count));
  const int kind = static_cast<int>(draw(0, 6));
  const float scale = std::pow(10.0f, static_cast<float>(draw(-22, 19)));
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < static_cast<int64_t>(c.clouds) * c.count; ++i)
    for (int column = 0; column < c.columns; ++column) {
      float value = normal(random_bits);
      if (kind == 0) value = static_cast<float>(draw(0, 4));                              // ties and duplicates
      if (kind == 1) value = 1;                                                           // one point only
      if (kind == 2) value = column == 0 ? value : 0;                                     // a line
      if (kind == 3) value = column == 0 ? static_cast<float>(i) : value;                 // scan order
      if (kind == 4) value = static_cast<float>(draw(0, 2)) * 100 + value * 1e-3f;        // clusters
      if (kind == 5) value = std::round(value * 8) / 8 * (column == 2 ? 0 : 1);           // a coarse plane
      c.rows.push_back(value * scale);
    }
  if (c.ragged)  // what lies past the length must not matter
    for (int b = 0; b < c.clouds; ++b)
      for (int64_t i = c.lengths[b]; i < c.count; ++i)
        std::fill_n(c.rows.begin() + (b * c.count + i) * c.columns, c.columns, NAN);
  return c;
}

float brute_distance(const float* a, const float* b) {
  const float dx = a[0] - b[0], dy = a[1] - b[1], dz = a[2] - b[2];
  return (dx * dx + dy * dy) + dz * dz;
}

std::vector<int64_t> brute_samples(const Case& c, int cloud) {
  const int length = c.length(cloud);
  std::vector<int64_t> chosen = {std::min(c.start, length - 1)};
  std::vector<float> nearest(length, INFINITY);
  while (static_cast<int>(chosen.size()) < c.num_samples) {
    if (static_cast<int>(chosen.size()) >= length) {
      chosen.push_back(chosen.back());
      continue;
    }
    for (int i = 0; i < length; ++i)
      nearest[i] = std::min(nearest[i], brute_distance(c.row(cloud, i), c.row(cloud, chosen.back())));
    chosen.push_back(std::max_element(nearest.begin(), nearest.end()) - nearest.begin());
  }
  return chosen;
}

std::vector<std::pair<float, int64_t>> brute_neighbours(const Case& c, int cloud, const float* query) {
  std::vector<std::pair<float, int64_t>> all;
  for (int i = 0; i < c.length(cloud); ++i) all.emplace_back(brute_distance(c.row(cloud, i), query), i);
  std::sort(all.begin(), all.end());
  all.resize(std::min<size_t>(all.size(), c.k));
  while (static_cast<int>(all.size()) < c.k) all.push_back(all.back());
  return all;
}

void expect(bool condition, const char* what, const char* where, int number) {
  if (condition) return;
  std::fprintf(stderr, "case %d: wrong %s (%s)\n", number, what, where);
  std::exit(1);
}

void check_cpu(const Case& c, int number) {
  for (auto variant = point_ops_variants(); *variant != nullptr; ++variant) {
    const PointOps& ops = **variant;
    for (int b = 0; b < c.clouds; ++b) {
      Cloud cloud;
      expect(ops.build(cloud, c.row(b, 0), c.length(b), c.columns) == -1, "finiteness", ops.instruction_set, number);
      std::vector<int64_t> index(c.num_samples);
      const int start = std::min(c.start, c.length(b) - 1);
      ops.farthest_point_sample(cloud, c.num_samples, c.row(b, start), start, index.data());
      expect(index == brute_samples(c, b), "samples", ops.instruction_set, number);
      const Scratch scratch(knn_scratch_bytes(cloud.groups, c.k));
      std::vector<uint64_t> keys(c.k);
      for (int q = 0; q < std::min(c.centres, c.length(b)); ++q) {
        ops.knn(cloud, c.row(b, q), c.k, scratch.as<void>(), keys.data());
        const auto wanted = brute_neighbours(c, b, c.row(b, q));
        for (int j = 0; j < c.k; ++j)
          expect(keys[j] == key_of(wanted[j].first, static_cast<int>(wanted[j].second)), "neighbours",
                 ops.instruction_set, number);
      }
      std::vector<float> bad(c.row(b, 0), c.row(b, 0) + c.length(b) * c.columns);
      const int64_t place = draw(0, c.length(b) - 1);
      bad[place * c.columns + draw(0, 2)] = draw(0, 1) == 0 ? NAN : -INFINITY;
      expect(ops.build(cloud, bad.data(), c.length(b), c.columns) == place, "bad point", ops.instruction_set, number);
    }
  }
}

Points points_of(const Case& c) {
  return {c.rows.data(),  static_cast<int64_t>(c.count) * c.columns,    c.columns, c.count, c.columns,
          c.ragged ? c.lengths.data() : nullptr};
}

// One variant of every CUDA op, in a workspace that holds NaN and not a float more than it needs.
void check_cuda(const Case& c, Variant variant, int number, bool bad) {
  const char* const name = variant == Variant::kScan ? "cuda, scan" : "cuda, buckets";
  const Points points = points_of(c);
  const size_t clouds = c.clouds;
  std::vector<int64_t> index(clouds * c.num_samples, -7);
  std::vector<float> workspace(sampling_workspace(c.clouds, c.count, variant), NAN);
  launch_farthest_point_sample(points, c.clouds, c.num_samples, c.start, variant, workspace.data(), index.data(),
                               nullptr);
  for (size_t i = 0; i < index.size(); ++i) expect(index[i] >= 0 && index[i] < c.count, "range", name, number);

  std::vector<int64_t> centre_index(clouds * c.centres);
  for (size_t i = 0; i < centre_index.size(); ++i)
    centre_index[i] = bad && draw(0, 3) == 0 ? draw(-1000000000000, 1000000000000)
                                             : draw(0, c.length(static_cast<int>(i / c.centres)) - 1);
  std::vector<float> search_space(search_workspace(c.clouds, c.count, variant), NAN);
  std::vector<float> groups(clouds * c.centres * c.k * c.columns, -7.0f);
  launch_group_points(points, centre_index.data(), c.clouds, c.centres, c.k, GroupType::kFloat, variant,
                      search_space.data(), groups.data(), nullptr);
  std::vector<uint16_t> halves(groups.size());
  launch_group_points(points, centre_index.data(), c.clouds, c.centres, c.k, GroupType::kHalf, variant,
                      search_space.data(), halves.data(), nullptr);
  Points query = points;
  query.count = std::min(c.count, 9);
  query.lengths = nullptr;
  std::vector<float> distance(clouds * query.count * c.k, -7.0f);
  std::vector<int64_t> neighbours(distance.size(), -7);
  launch_knn(points, query, c.clouds, c.k, variant, search_space.data(), distance.data(), neighbours.data(), nullptr);
  for (const int64_t i : neighbours) expect(i >= 0 && i < c.count, "neighbour range", name, number);
  if (bad) return;

  for (int b = 0; b < c.clouds; ++b) {
    const auto wanted = brute_samples(c, b);
    expect(std::equal(wanted.begin(), wanted.end(), index.begin() + b * c.num_samples), "samples", name, number);
    for (int g = 0; g < c.centres; ++g) {
      const size_t group = static_cast<size_t>(b) * c.centres + g;
      const float* centre = c.row(b, centre_index[group]);
      const auto near = brute_neighbours(c, b, centre);
      for (int j = 0; j < c.k; ++j)
        for (int column = 0; column < c.columns; ++column) {
          const float value = c.row(b, near[j].second)[column] - (column < 3 ? centre[column] : 0);
          const size_t place = (group * c.k + j) * c.columns + column;
          expect(groups[place] == value, "groups", name, number);
          expect(halves[place] == to_half(value), "half groups", name, number);
        }
    }
    for (int q = 0; q < query.count; ++q) {
      if (q >= c.length(b)) continue;
      const auto near = brute_neighbours(c, b, c.row(b, q));
      for (int j = 0; j < c.k; ++j) {
        const size_t place = (static_cast<size_t>(b) * query.count + q) * c.k + j;
        expect(distance[place] == near[j].first && neighbours[place] == near[j].second, "neighbours", name, number);
      }
    }
  }
}

void check_cuda_variants(const Case& c, int number, bool bad) {
  const int limits[] = {30, 99, 227};  // KiB: tiles of 1,024 points, a consumer card, H100
  emulator::shared_memory_limit = limits[draw(0, 2)] * 1024;
  for (const Variant variant : {Variant::kScan, Variant::kBuckets}) check_cuda(c, variant, number, bad);
  if (c.count <= kRegisterPoints) {  // the scan for larger clouds gives the same
    const Points points = points_of(c);
    std::vector<int64_t> index(static_cast<size_t>(c.clouds) * c.num_samples, -7);
    std::vector<float> workspace(static_cast<size_t>(c.clouds) * c.count * 4, NAN);
    launch(sample_in_workspace<64>, c.clouds, 64, 0, nullptr, points, c.num_samples, c.start,
           reinterpret_cast<float4*>(workspace.data()), index.data());
    for (int b = 0; b < c.clouds && !bad; ++b) {
      const auto wanted = brute_samples(c, b);
      expect(std::equal(wanted.begin(), wanted.end(), index.begin() + b * c.num_samples), "streamed samples", "cuda",
             number);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 100;
  random_bits.seed(argc > 2 ? std::atoi(argv[2]) : 1);
  for (int number = 0; number < cases; ++number) {
    check_cpu(draw_case(draw(0, 9) == 0 ? 9000 : 600), number);
    Case c = draw_case(number % 20 == 0 ? 9000 : number % 4 == 0 ? 2500 : 300);  // the emulator is slow
    c.num_samples = std::min(c.num_samples, c.count > 600 ? 16 : 60);
    if (c.count > 600) c.centres = std::min(c.centres, 3);
    check_cuda_variants(c, number, false);
    for (int i = 0; i < 20; ++i) c.rows[draw(0, static_cast<int64_t>(c.rows.size()) - 1)] = draw(0, 1) ? NAN : INFINITY;
    if (draw(0, 2) == 0) std::fill(c.rows.begin(), c.rows.end(), NAN);
    for (auto& length : c.lengths) length = draw(-5, 2 * c.count);
    check_cuda_variants(c, number, true);
  }
  std::printf("%d cases\n", cases);
}
