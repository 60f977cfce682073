// Exact top-k of rows of fp32 logits, one thread block per row, or one cluster of blocks that share its streaming pass.
//
// A row is read from DRAM once in the common case:
//   short row  (one tile)   keys stay in registers; radix select on them.
//   long row                a sample of the row gives a threshold that about 1.5k to 3k logits pass; one streaming pass
//                           collects those in shared memory; radix select on the collected candidates.
//   long row, bad sample    (ties, or an order that fools the sample: too few or too many candidates)
//                           radix select straight on global memory: correct for any input, reads the row 4 times.
//
// Radix select: histogram of the top 11 bits of an order-preserving key, find the bin that holds the k-th largest,
// repeat inside that bin with the next 11, then the last 10 bits. It stops early once the bin is needed whole.
//
// Defines: THREADS (block size), CLUSTER (blocks per row; more than 1 from sm_90 on), DETERMINISTIC (0 or 1: ties to
// the lowest index, rows sorted by index), MAX_K, SHARED_BYTES (dynamic shared memory of the launch).
//
// Sources: radix select, Alabi et al. 2012; threshold from a sample, Floyd and Rivest 1975.

#include "block.cuh"
#include "sources.cuh"

// ---------------------------------------------------------------- radix select

struct Threshold {
  u32 key;    // the rank-th largest is in [key, key | ~mask]
  u32 above;  // how many are larger than that range
  u32 count;  // how many are in it
};

// One radix step: histogram of the digit at `shift` of the keys that share `prefix` above it. The histogram is zero
// before, as the kernel's start and find_bin leave it.
template <class Source, class Project>
__device__ __forceinline__ void count_bins(const Source& source, Project project, u32 prefix, u32 mask, int shift,
                                           u32 digit_mask) {
  Shared& s = shared();
  u32 zeros = 0;  // a ReLU makes many: counted one by one they would queue up at one bin
#pragma unroll 1
  for (int tile = 0; tile < source.tiles(); ++tile) {
    u32 keys[Source::kSlots];
    const u32 exists = source.load(tile, keys);
#pragma unroll
    for (int i = 0; i < Source::kSlots; ++i) {
      if (!(exists >> i & 1)) continue;
      u32 key = keys[i];
      if (project(key, source, tile, i) && (key & mask) == prefix) {
        if (key == kZeroKey) {
          ++zeros;
        } else {
          atomicAdd(&s.histogram[key >> shift & digit_mask], 1u);
        }
      }
    }
  }
  zeros = __reduce_add_sync(kFull, zeros);
  if (zeros && threadIdx.x % 32 == 0) atomicAdd(&s.histogram[kZeroKey >> shift & digit_mask], zeros);
  __syncthreads();
}

// Find the bin that holds the rank-th largest (rank from 1), counting bins from the top.
__device__ __forceinline__ void find_bin(u32 rank) {
  Shared& s = shared();
  // Thread t owns bins from the top: the prefix sum then counts what lies above its bins.
  const int top = kBins - 1 - static_cast<int>(threadIdx.x) * kBinsPerThread;
  u32 own = 0;
#pragma unroll
  for (int b = 0; b < kBinsPerThread; ++b) own += s.histogram[top - b];
  u32 total;
  u32 above = exclusive_sum(own, total);
  if (above < rank && rank <= above + own) {
    int b = 0;
    while (above + s.histogram[top - b] < rank) above += s.histogram[top - b++];
    s.bin = top - b;
    s.above = above;
    s.bin_count = s.histogram[top - b];
  }
#pragma unroll
  for (int b = 0; b < kBinsPerThread; ++b) s.histogram[top - b] = 0;
  __syncthreads();
}

// The rank-th largest projected key (1 <= rank <= number of keys). With fewer than 3 steps, its leading bits only.
template <class Source, class Project>
__device__ __forceinline__ Threshold find_threshold(const Source& source, u32 rank, int steps, Project project) {
  u32 prefix = 0, mask = 0, above = 0, count = 0;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int shift = step == 0 ? 21 : step == 1 ? 10 : 0;
    const u32 digit_mask = step == 2 ? 1023u : 2047u;
    count_bins(source, project, prefix, mask, shift, digit_mask);
    find_bin(rank - above);
    prefix |= shared().bin << shift;
    mask |= digit_mask << shift;
    above += shared().above;
    count = shared().bin_count;
    if (above + count == rank) break;  // the whole bin is wanted: no need to look inside
  }
  return {prefix, above, count};
}

struct WholeKey {
  template <class Source>
  __device__ __forceinline__ bool operator()(u32&, const Source&, int, int) const { return true; }
};

// Among keys equal to `key`, the lowest index is the largest.
struct IndexOfTies {
  u32 key;
  template <class Source>
  __device__ __forceinline__ bool operator()(u32& value, const Source& source, int tile, int slot) const {
    const bool tie = value == key;
    value = ~static_cast<u32>(source.index(tile, slot));
    return tie;
  }
};

// ---------------------------------------------------------------- collecting

// Position in a list, for each set bit of `take` of every lane: the warp reserves its places with one atomic.
// `store(position, slot)` is called for each. All lanes of the warp must call.
template <int kSlots, class Store>
__device__ __forceinline__ void append(u32 take, u32* counter, Store store) {
  const int lane = threadIdx.x % 32;
  const u32 own = __popc(take);
  u32 inclusive = own;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const u32 other = __shfl_up_sync(kFull, inclusive, d);
    if (lane >= d) inclusive += other;
  }
  const u32 total = __shfl_sync(kFull, inclusive, 31);
  if (total == 0) return;
  u32 position = 0;
  if (lane == 31) position = atomicAdd(counter, total);
  position = __shfl_sync(kFull, position, 31) + inclusive - own;
#pragma unroll
  for (int slot = 0; slot < kSlots; ++slot) {
    if (take >> slot & 1) store(position++, slot);
  }
}

// Put the keys at or above `threshold` into the candidate list; the count may exceed its capacity.
// The blocks of a cluster take turns at the tiles, and the list is the first block's.
__device__ __forceinline__ int filter(const Row<kVectors>& row, u32 threshold) {
  using Source = Row<kVectors>;
  Shared& s = shared();
#pragma unroll 1
  for (int tile = static_cast<int>(cluster_rank()); tile < row.tiles(); tile += CLUSTER) {
    u32 keys[Source::kSlots];
    const u32 exists = row.load(tile, keys);
    u32 take = 0;
#pragma unroll
    for (int i = 0; i < Source::kSlots; ++i) take |= static_cast<u32>(keys[i] >= threshold) << i;
    append<Source::kSlots>(take & exists, &s.taken, [&](u32 position, int slot) {
      if (position < kMaxCandidates) {
        s.candidate.key[position] = keys[slot];
        s.candidate.index[position] = row.index(tile, slot);
      }
    });
  }
  __syncthreads();
  const int count = static_cast<int>(s.taken);
#if CLUSTER == 1
  __syncthreads();
  if (threadIdx.x == 0) s.taken = 0;
  return count;
#else
  cluster_barrier();  // every block's count is final
  int before = 0, total = 0;
#pragma unroll
  for (u32 rank = 0; rank < CLUSTER; ++rank) {
    const int other = static_cast<int>(*in_block(&s.taken, rank));
    before += rank < cluster_rank() ? other : 0;
    total += other;
  }
  if (cluster_rank() != 0) {
    Shared* first = in_block(&s, 0);
    for (int i = threadIdx.x; i < min(count, kMaxCandidates - before); i += THREADS) {
      first->candidate.key[before + i] = s.candidate.key[i];
      first->candidate.index[before + i] = s.candidate.index[i];
    }
  }
  cluster_barrier();  // the list is whole, and the counts are read
  if (threadIdx.x == 0) s.taken = 0;
  return total;
#endif
}

// Put the indices of the k largest keys into s.chosen.
template <class Source>
__device__ __forceinline__ void choose(const Source& source, u32 k) {
  Shared& s = shared();
  Threshold t = find_threshold(source, k, 3, WholeKey{});
  const u32 wanted = k - t.above;  // of the keys in the threshold's bin
  u32 last_tie = 0;                // ties count as chosen from this inverted index on
  if (DETERMINISTIC && wanted < t.count) {
    last_tie = find_threshold(source, wanted, 3, IndexOfTies{t.key}).key;
  }
  // If the search stopped early the bin holds several keys, all wanted, and all at or above its lower edge.
  const bool take_bin = wanted == t.count;
#pragma unroll 1
  for (int tile = 0; tile < source.tiles(); ++tile) {
    u32 keys[Source::kSlots];
    const u32 exists = source.load(tile, keys);
    u32 take = 0, ties = 0;
#pragma unroll
    for (int i = 0; i < Source::kSlots; ++i) {
      if (keys[i] > t.key || (take_bin && keys[i] == t.key)) {
        take |= 1u << i;
      } else if (keys[i] == t.key && !take_bin) {
        ties |= 1u << i;
      }
    }
    take &= exists;
    ties &= exists;
    if (DETERMINISTIC && !take_bin) {
#pragma unroll
      for (int i = 0; i < Source::kSlots; ++i) {
        if ((ties >> i & 1) && ~static_cast<u32>(source.index(tile, i)) >= last_tie) take |= 1u << i;
      }
    }
    append<Source::kSlots>(take, &s.taken, [&](u32 position, int slot) { s.chosen[position] = source.index(tile, slot); });
    if (!DETERMINISTIC && !take_bin) {
      append<Source::kSlots>(ties, &s.taken_equal, [&](u32 position, int slot) {
        if (position < wanted) s.chosen[t.above + position] = source.index(tile, slot);
      });
    }
  }
  __syncthreads();
}

// ---------------------------------------------------------------- output

// Sort s.chosen (k distinct positions below `length`) by walking a bitmap, a window of positions at a time.
__device__ __forceinline__ void sort_chosen(int k, int length) {
  Shared& s = shared();
  u32* bitmap = s.bitmap;
  constexpr int kOwn = MAX_K / THREADS;
  int own[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int at = i * THREADS + static_cast<int>(threadIdx.x);
    own[i] = at < k ? s.chosen[at] : -1;
  }
  u32 written = 0;
  for (int begin = 0; begin < length; begin += kBitmapWords * 32) {
    const int words = min(kBitmapWords, (length - begin + 31) / 32);
    const int words_per_thread = (words + THREADS - 1) / THREADS;
    for (int w = threadIdx.x; w < words; w += THREADS) bitmap[w] = 0;
    __syncthreads();  // also: every chosen position is in registers before the first is overwritten
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const int at = own[i] - begin;
      if (own[i] >= 0 && at >= 0 && at < words * 32) atomicOr(&bitmap[at / 32], 1u << at % 32);
    }
    __syncthreads();
    const int first = static_cast<int>(threadIdx.x) * words_per_thread;
    const int last = min(words, first + words_per_thread);
    u32 count = 0;
    for (int w = first; w < last; ++w) count += __popc(bitmap[w]);
    u32 total;
    u32 position = written + exclusive_sum(count, total);
    for (int w = first; w < last; ++w) {
      for (u32 bits = bitmap[w]; bits; bits &= bits - 1) s.chosen[position++] = begin + w * 32 + __ffs(bits) - 1;
    }
    written += total;
    __syncthreads();
  }
}

// The sampled threshold that a few more logits than k pass.
template <int kVectors>
__device__ __forceinline__ u32 sample_threshold(const float* begin, int length, u32 k, bool& usable) {
  // Rank in the sample that k expects, and 4 standard deviations more. Sampled logits come in vectors of 4
  // neighbours, which may all be alike: that doubles the deviation.
  constexpr int kSampled = 4 * kVectors * THREADS;
  const float expected = static_cast<float>(k) * (kSampled / static_cast<float>(length));
  const u32 rank = static_cast<u32>(expected + 8.0f * sqrtf(expected)) + 8u;
  usable = rank < kSampled / 2;
  if (!usable) return 0;
  const Row<kVectors> row(begin, length);
  const Sample<kVectors> sample{row};
  return find_threshold(Resident<Sample<kVectors>>(sample), rank, 2, WholeKey{}).key;
}

// Choose from a row of several tiles. Returns whether this block has the result.
__device__ __forceinline__ bool choose_long(const float* begin, int length, u32 k) {
  const Row<kVectors> row(begin, length);
  bool usable;
  const u32 threshold = length <= 32 * kTile ? sample_threshold<kSampleVectors>(begin, length, k, usable)
                                             : sample_threshold<2 * kSampleVectors>(begin, length, k, usable);
  const int count = usable ? filter(row, threshold) : -1;
  if (cluster_rank() != 0) return false;
  __syncthreads();
  constexpr int kSlots = kMaxCandidates / THREADS;
  if (static_cast<int>(k) <= count && count <= kMaxCandidates / 2) {
    const Candidates<kSlots / 2> candidates{count};
    choose(Resident<Candidates<kSlots / 2>>(candidates), k);
  } else if (static_cast<int>(k) <= count && count <= kMaxCandidates) {
    const Candidates<kSlots> candidates{count};
    choose(Resident<Candidates<kSlots>>(candidates), k);
  } else {
    choose(row, k);
  }
  return true;
}

extern "C" __global__ void __launch_bounds__(THREADS) CLUSTER_DIMS
    topk(const float* __restrict__ logits, const int* __restrict__ lengths, const int* __restrict__ row_starts,
         const int* __restrict__ page_table, const int* __restrict__ page_rows, int* __restrict__ out,
         i64 logits_stride, i64 page_table_stride, int k, int page_size) {
  Shared& s = shared();
#pragma unroll
  for (int b = 0; b < kBinsPerThread; ++b) s.histogram[b * THREADS + threadIdx.x] = 0;
  if (threadIdx.x == 0) s.taken = s.taken_equal = 0;
  __syncthreads();
  // Nothing of the predecessor's output is read before this, and the successor may start, up to where it waits for this
  // kernel's end; it costs nothing without a dependent launch.
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\ngriddepcontrol.launch_dependents;" ::: "memory");
#endif
  const i64 row_number = blockIdx.x / CLUSTER;
  const int length = max(lengths[row_number], 0);
  const int start = row_starts ? row_starts[row_number] : 0;
  const int* table = page_table;
  if (page_table) table += (page_rows ? static_cast<i64>(page_rows[row_number]) : row_number) * page_table_stride;
  const bool all = length <= k;
  if (all && cluster_rank() != 0) return;
  if (!all) {
    const float* begin = logits + row_number * logits_stride + start;
    const Row<kVectors / 2> short_row(begin, length);
    const Row<kVectors> row(begin, length);
    if (row.tiles() > 1) {
      if (!choose_long(begin, length, k)) return;
    } else if (cluster_rank() != 0) {
      return;
    } else if (short_row.tiles() == 1) {
      choose(Resident<Row<kVectors / 2>>(short_row), k);
    } else {
      choose(Resident<Row<kVectors>>(row), k);
    }
    if (DETERMINISTIC) sort_chosen(k, length);
  }

  int* row_out = out + row_number * k;
  const int found = min(length, k);
  for (int i = threadIdx.x; i < k; i += THREADS) {
    int index = -1;
    if (i < found) {
      index = all ? i : s.chosen[i];
      if (table) index = table[index / page_size] * page_size + index % page_size;
    }
    row_out[i] = index;
  }
}
