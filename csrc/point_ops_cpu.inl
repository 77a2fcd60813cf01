// The CPU point ops for one instruction set; included by point_ops_cpu.cpp only. Vectors are 16 floats wide everywhere
// and the compiler splits them into what the target has. Comparisons are written so that NaN is never selected.

#if POINTALIGN_LEVEL == 2
constexpr int kWidth = 16;
#elif POINTALIGN_LEVEL == 1
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kParts = 16 / kWidth;
using part = float __attribute__((vector_size(4 * kWidth), may_alias));
using int_part = int32_t __attribute__((vector_size(4 * kWidth), may_alias));
#define POINTALIGN_INLINE static inline __attribute__((always_inline))
#define POINTALIGN_EACH for (int p = 0; p < kParts; ++p)

struct floats {
  part parts[kParts];
};
struct ints {
  int_part parts[kParts];
};

#define POINTALIGN_OPERATOR(type, symbol)                    \
  POINTALIGN_INLINE type operator symbol(type a, type b) {   \
    POINTALIGN_EACH a.parts[p] = a.parts[p] symbol b.parts[p]; \
    return a;                                                \
  }
POINTALIGN_OPERATOR(floats, +)
POINTALIGN_OPERATOR(floats, -)
POINTALIGN_OPERATOR(floats, *)
#undef POINTALIGN_OPERATOR

POINTALIGN_INLINE floats broadcast(float value) {
  floats row;
  POINTALIGN_EACH row.parts[p] = part{} + value;
  return row;
}
POINTALIGN_INLINE floats load(const float* from) { return *reinterpret_cast<const floats*>(from); }
POINTALIGN_INLINE void store(float* to, floats value) { *reinterpret_cast<floats*>(to) = value; }

// `a < b ? a : b` returns b when either is NaN, as minps does.
POINTALIGN_INLINE floats lower(floats a, floats b) {
  POINTALIGN_EACH a.parts[p] = a.parts[p] < b.parts[p] ? a.parts[p] : b.parts[p];
  return a;
}
POINTALIGN_INLINE floats higher(floats a, floats b) {
  POINTALIGN_EACH a.parts[p] = a.parts[p] > b.parts[p] ? a.parts[p] : b.parts[p];
  return a;
}

// One bit for every place where the comparison holds.
POINTALIGN_INLINE uint32_t bits_of(int_part mask) {
#if POINTALIGN_LEVEL == 2
  return _mm512_movepi32_mask((__m512i)mask);
#elif POINTALIGN_LEVEL == 1
  return _mm256_movemask_ps((__m256)mask);
#elif defined(__x86_64__)
  return _mm_movemask_ps((__m128)mask);
#else
  return (mask[0] & 1) | (mask[1] & 2) | (mask[2] & 4) | (mask[3] & 8);
#endif
}
POINTALIGN_INLINE uint32_t less(floats a, floats b) {
  uint32_t bits = 0;
  POINTALIGN_EACH bits |= bits_of(a.parts[p] < b.parts[p]) << (p * kWidth);
  return bits;
}
POINTALIGN_INLINE uint32_t less_equal(floats a, floats b) {
  uint32_t bits = 0;
  POINTALIGN_EACH bits |= bits_of(a.parts[p] <= b.parts[p]) << (p * kWidth);
  return bits;
}
POINTALIGN_INLINE uint32_t equal(floats a, floats b) {
  uint32_t bits = 0;
  POINTALIGN_EACH bits |= bits_of(a.parts[p] == b.parts[p]) << (p * kWidth);
  return bits;
}

POINTALIGN_INLINE float highest(floats row) {
  using four = float __attribute__((vector_size(16)));
  four quarters[4];
  std::memcpy(quarters, &row, 64);
  const four a = quarters[0] > quarters[1] ? quarters[0] : quarters[1];
  const four b = quarters[2] > quarters[3] ? quarters[2] : quarters[3];
  const four c = a > b ? a : b;
  const float d = c[0] > c[2] ? c[0] : c[2], e = c[1] > c[3] ? c[1] : c[3];
  return d > e ? d : e;
}
POINTALIGN_INLINE float lowest(floats row) { return -highest(broadcast(0) - row); }

// (dx^2 + dy^2) + dz^2 in fp32; -ffp-contract=off keeps it bit-equal to the reference and to the GPU.
POINTALIGN_INLINE floats squared_distance(const Cloud& cloud, int64_t leaf, const floats query[3]) {
  const floats dx = load(cloud.xyz[0] + leaf * 16) - query[0];
  const floats dy = load(cloud.xyz[1] + leaf * 16) - query[1];
  const floats dz = load(cloud.xyz[2] + leaf * 16) - query[2];
  return (dx * dx + dy * dy) + dz * dz;
}

// Squared distances to 16 boxes. Rounding is monotonic and the operations are those of squared_distance, so this
// never exceeds the computed distance of a point inside the box: skipping by it is exact.
POINTALIGN_INLINE floats box_distance(float* const bounds[6], int64_t row, const floats query[3]) {
  floats gap[3];
  for (int axis = 0; axis < 3; ++axis) {
    const floats below = load(bounds[axis] + row * 16) - query[axis];
    const floats above = query[axis] - load(bounds[axis + 3] + row * 16);
    gap[axis] = higher(higher(below, above), broadcast(0));
  }
  return (gap[0] * gap[0] + gap[1] * gap[1]) + gap[2] * gap[2];
}

// Interleaves 7 bits of each axis.
POINTALIGN_INLINE ints morton(const floats cells[3]) {
  ints code = {};
  for (int axis = 0; axis < 3; ++axis) POINTALIGN_EACH {
      int_part bits = __builtin_convertvector(cells[axis].parts[p], int_part);
      bits = (bits | bits << 8) & 0x0000f00f;
      bits = (bits | bits << 4) & 0x000c30c3;
      bits = (bits | bits << 2) & 0x00249249;
      code.parts[p] |= bits << axis;
    }
  return code;
}

static int64_t build(Cloud& cloud, const float* rows, int64_t count, int64_t stride) {
  allocate(cloud, count);
  const Unsorted unsorted(cloud.groups * 256);
  const float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  const int64_t points = cloud.groups * 256;
  for (int64_t i = 0; i < count; ++i)
    for (int axis = 0; axis < 3; ++axis) unsorted.xyz[axis][i] = rows[i * stride + axis];
  for (int64_t i = count; i < points; ++i)
    for (int axis = 0; axis < 3; ++axis) unsorted.xyz[axis][i] = nan;

  float low[3], extent = 0;
  uint32_t bad = 0;
  for (int axis = 0; axis < 3; ++axis) {
    floats lows = broadcast(infinity), highs = broadcast(-infinity);
    for (int64_t i = 0; i < points; i += 16) {
      const floats value = load(unsorted.xyz[axis] + i);
      lows = lower(value, lows), highs = higher(value, highs);
      const int64_t valid = count - i;
      const uint32_t finite = equal(value - value, broadcast(0));
      bad |= ~finite & (valid >= 16 ? 0xffffu : valid > 0 ? (1u << valid) - 1 : 0u);
    }
    low[axis] = lowest(lows);
    const float high = highest(highs);
    extent = high - low[axis] > extent ? high - low[axis] : extent;
  }
  if (bad != 0)
    for (int64_t i = 0; i < count; ++i)
      for (int axis = 0; axis < 3; ++axis)
        if (!(unsorted.xyz[axis][i] - unsorted.xyz[axis][i] == 0)) return i;

  const float scale = extent > 0 ? 128 / extent : 0;
  for (int64_t i = 0; i < count; i += 16) {
    floats cells[3];
    for (int axis = 0; axis < 3; ++axis) {
      // An extent that overflows or underflows gives NaN or infinity here: `higher` and `lower` turn them into cells.
      const floats cell = (load(unsorted.xyz[axis] + i) - broadcast(low[axis])) * broadcast(scale);
      cells[axis] = lower(higher(cell, broadcast(0)), broadcast(127));
    }
    const ints code = morton(cells);
    int32_t codes[16];
    std::memcpy(codes, &code, 64);
    const int64_t end = count - i < 16 ? count - i : 16;
    for (int64_t j = 0; j < end; ++j)
      unsorted.order[i + j] = static_cast<uint64_t>(codes[j]) << 32 | static_cast<uint64_t>(i + j);
  }
  radix_sort(unsorted.order, unsorted.swap, count);
  for (int64_t i = 0; i < count; ++i) {
    const int32_t row = static_cast<int32_t>(unsorted.order[i]);
    cloud.index[i] = row;
    for (int axis = 0; axis < 3; ++axis) cloud.xyz[axis][i] = unsorted.xyz[axis][row];
  }
  for (int64_t i = count; i < points; ++i) {
    cloud.index[i] = std::numeric_limits<int32_t>::max();
    for (int axis = 0; axis < 3; ++axis) cloud.xyz[axis][i] = nan;
  }

  const int64_t tops = (cloud.groups + 15) / 16 * 16;
  for (int axis = 0; axis < 3; ++axis) {
    float *lows = cloud.leaf_bounds[axis], *highs = cloud.leaf_bounds[axis + 3];
    for (int64_t leaf = 0; leaf < cloud.groups * 16; ++leaf) {
      const floats value = load(cloud.xyz[axis] + leaf * 16);
      lows[leaf] = lowest(lower(value, broadcast(infinity)));
      highs[leaf] = highest(higher(value, broadcast(-infinity)));
    }
    for (int64_t group = 0; group < tops; ++group) {
      const bool real = group < cloud.groups;
      cloud.group_bounds[axis][group] = real ? lowest(load(lows + group * 16)) : infinity;
      cloud.group_bounds[axis + 3][group] = real ? highest(load(highs + group * 16)) : -infinity;
    }
  }
  return -1;
}

static void farthest_point_sample(const Cloud& cloud, int64_t num_samples, const float* start, int64_t start_index,
                                  int64_t* index) {
  const int64_t groups = cloud.groups, tops = (groups + 15) / 16;
  const Scratch memory((groups * 256 + groups * 16 + tops * 16) * sizeof(float));
  float* const nearest = memory.as<float>();  // squared distance of each point to the samples so far
  float* const leaf_highest = nearest + groups * 256;
  float* const group_highest = leaf_highest + groups * 16;
  // Padding has -1 everywhere: it is never the farthest and no distance is below it.
  const float infinity = std::numeric_limits<float>::infinity();
  for (int64_t i = 0; i < groups * 256; ++i) nearest[i] = i < cloud.count ? infinity : -1;
  for (int64_t i = 0; i < groups * 16; ++i) leaf_highest[i] = i * 16 < cloud.count ? infinity : -1;
  for (int64_t i = 0; i < tops * 16; ++i) group_highest[i] = i < groups ? infinity : -1;

  floats newest[3] = {broadcast(start[0]), broadcast(start[1]), broadcast(start[2])};
  index[0] = start_index;
  const int64_t distinct = num_samples < cloud.count ? num_samples : cloud.count;
  for (int64_t step = 1; step < distinct; ++step) {
    floats highs = broadcast(-1);
    for (int64_t top = 0; top < tops; ++top) {
      const floats row = load(group_highest + top * 16);
      uint32_t open = less(box_distance(cloud.group_bounds, top, newest), row);
      for (; open != 0; open &= open - 1) {
        const int place = __builtin_ctz(open);
        const int64_t group = top * 16 + place;
        const floats leaves = load(leaf_highest + group * 16);
        uint32_t open_leaves = less(box_distance(cloud.leaf_bounds, group, newest), leaves);
        if (open_leaves == 0) continue;
        for (; open_leaves != 0; open_leaves &= open_leaves - 1) {
          const int leaf_place = __builtin_ctz(open_leaves);
          const int64_t leaf = group * 16 + leaf_place;
          const floats distance = lower(squared_distance(cloud, leaf, newest), load(nearest + leaf * 16));
          store(nearest + leaf * 16, distance);
          leaf_highest[leaf] = highest(distance);
        }
        group_highest[group] = highest(load(leaf_highest + group * 16));
      }
      highs = higher(load(group_highest + top * 16), highs);
    }

    // The lowest row number among all points at the highest distance, wherever the Morton order put them.
    const float farthest = highest(highs);
    const floats wanted = broadcast(farthest);
    int32_t chosen = std::numeric_limits<int32_t>::max();
    int64_t chosen_place = 0;
    for (int64_t top = 0; top < tops; ++top)
      for (uint32_t open = equal(load(group_highest + top * 16), wanted); open != 0; open &= open - 1) {
        const int64_t group = top * 16 + __builtin_ctz(open);
        for (uint32_t leaves = equal(load(leaf_highest + group * 16), wanted); leaves != 0; leaves &= leaves - 1) {
          const int64_t leaf = group * 16 + __builtin_ctz(leaves);
          for (uint32_t places = equal(load(nearest + leaf * 16), wanted); places != 0; places &= places - 1) {
            const int64_t place = leaf * 16 + __builtin_ctz(places);
            if (cloud.index[place] < chosen) chosen = cloud.index[place], chosen_place = place;
          }
        }
      }
    index[step] = chosen;
    if (farthest == 0) {  // every point coincides with a sample: the tie goes to the same row from here on
      for (++step; step < distinct; ++step) index[step] = chosen;
      break;
    }
    for (int axis = 0; axis < 3; ++axis) newest[axis] = broadcast(cloud.xyz[axis][chosen_place]);
  }
  for (int64_t step = distinct; step < num_samples; ++step) index[step] = index[step - 1];
}

struct Neighbours {  // one query's search, in scratch memory
  floats query[3];
  floats* smallest;     // [kept]: the smallest distances of every lane, so kept * 16 >= k values, sorted within a lane
  int64_t kept;
  float limit;          // at least k points are this near
  float* distance;      // [visited * 16]
  int32_t* leaf;        // [visited]
  int64_t visited;
};

POINTALIGN_INLINE void visit_group(const Cloud& cloud, int64_t group, Neighbours& near) {
  uint32_t open = less_equal(box_distance(cloud.leaf_bounds, group, near.query), broadcast(near.limit));
  for (; open != 0; open &= open - 1) {
    const int64_t leaf = group * 16 + __builtin_ctz(open);
    floats value = squared_distance(cloud, leaf, near.query);
    store(near.distance + near.visited * 16, value);
    near.leaf[near.visited++] = static_cast<int32_t>(leaf);
    for (int64_t i = 0; i < near.kept; ++i) {
      const floats kept = near.smallest[i];
      near.smallest[i] = lower(value, kept);
      value = higher(kept, value);  // NaN padding stays NaN and is never kept
    }
  }
  near.limit = highest(near.smallest[near.kept - 1]);
}

// Sorts by (distance, index): the place of a candidate is the number of candidates before it, counted for 16 at once.
POINTALIGN_INLINE void rank_sort(const float* distance, const int32_t* index, int64_t count, uint64_t* keys) {
  for (int64_t i = 0; i < count; i += 16) {
    const floats distances = load(distance + i);
    const ints indices = *reinterpret_cast<const ints*>(index + i);
    ints rank = {};
    for (int64_t j = 0; j < count; ++j)
      POINTALIGN_EACH {
        const part other = part{} + distance[j];
        const int_part first = (other == distances.parts[p]) & (int_part{} + index[j] < indices.parts[p]);
        rank.parts[p] -= (other < distances.parts[p]) | first;
      }
    int32_t ranks[16];
    uint32_t bits[16];
    std::memcpy(ranks, &rank, 64);
    std::memcpy(bits, &distances, 64);
    for (int64_t j = 0; j < (count - i < 16 ? count - i : 16); ++j)
      keys[ranks[j]] = static_cast<uint64_t>(bits[j]) << 32 | static_cast<uint32_t>(index[i + j]);
  }
}

static void knn(const Cloud& cloud, const float* point, int64_t k, void* scratch, uint64_t* sorted) {
  const int64_t tops = (cloud.groups + 15) / 16, available = k < cloud.count ? k : cloud.count;
  NeighbourScratch memory(scratch, cloud.groups, k);
  Neighbours near = {{broadcast(point[0]), broadcast(point[1]), broadcast(point[2])},
                     reinterpret_cast<floats*>(memory.smallest),
                     (available + 15) / 16,
                     std::numeric_limits<float>::infinity(),
                     memory.visited_distance,
                     memory.leaf,
                     0};
  for (int64_t i = 0; i < near.kept; ++i) near.smallest[i] = broadcast(near.limit);

  // The group around the query first: its bound closes most others.
  int64_t nearest = 0;
  float nearest_distance = near.limit;
  for (int64_t top = 0; top < tops; ++top) {
    const floats distance = box_distance(cloud.group_bounds, top, near.query);
    const float row_lowest = lowest(distance);
    if (row_lowest < nearest_distance) {
      nearest_distance = row_lowest;
      nearest = top * 16 + __builtin_ctz(equal(distance, broadcast(row_lowest)));
    }
  }
  visit_group(cloud, nearest, near);
  for (int64_t top = 0; top < tops; ++top) {
    const floats distance = box_distance(cloud.group_bounds, top, near.query);
    uint32_t real = cloud.groups - top * 16 < 16 ? (1u << (cloud.groups - top * 16)) - 1 : 0xffffu;
    if (nearest / 16 == top) real &= ~(1u << nearest % 16);
    uint32_t open = less_equal(distance, broadcast(near.limit)) & real;
    while (open != 0) {
      visit_group(cloud, top * 16 + __builtin_ctz(open), near);
      open &= open - 1;
      open &= less_equal(distance, broadcast(near.limit));
    }
  }

  const floats limit = broadcast(near.limit);
  int64_t count = 0;
  for (int64_t i = 0; i < near.visited; ++i)
    for (uint32_t open = less_equal(load(near.distance + i * 16), limit); open != 0; open &= open - 1) {
      const int place = __builtin_ctz(open);
      memory.distance[count] = near.distance[i * 16 + place];
      memory.index[count++] = cloud.index[near.leaf[i] * 16 + place];
    }
  if (count <= kRankSorted)
    rank_sort(memory.distance, memory.index, count, memory.keys);
  else
    select_sort(memory.distance, memory.index, count, available, memory.keys);
  std::memcpy(sorted, memory.keys, available * sizeof(uint64_t));
  for (int64_t i = available; i < k; ++i) sorted[i] = sorted[available - 1];
}

static const PointOps ops = {
    POINTALIGN_LEVEL == 2 ? "avx512" : POINTALIGN_LEVEL == 1 ? "avx2" : "default",
    build,
    farthest_point_sample,
    knn,
};

#undef POINTALIGN_INLINE
