// Exact top-k of rows of fp32 logits, one thread block per row, or one cluster of blocks that share a long row.
//
// A row is read from DRAM once in the common case:
//   short row  (one tile)   keys stay in registers; radix select on them.
//   long row, in a cluster  each block keeps its share of the keys in registers; radix steps on the sum of the blocks'
//                           histograms, usually one, leave a threshold that few logits pass; the first block collects
//                           those in shared memory; radix select on the collected candidates.
//   long row                (one block, or too long for the cluster's registers) a sample of the row gives a threshold
//                           that about 1.5k to 3k logits pass; one streaming pass collects those; then the same.
//   too few or many pass    (ties, or an order that fools the sample)
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
  u32 key;    // lower edge of the bin that the rank-th largest is in
  u32 above;  // how many are larger than those in it
  u32 count;  // how many are in it
};

// One radix step: histogram of the digit at `shift` of the keys that share `prefix` above it. The histogram is zero
// before, as the kernel's start and find_bin leave it.
template <class Source, class Project>
__device__ __forceinline__ void count_bins(const Source& source, Project project, u32 prefix, u32 mask, int shift,
                                           u32 digit_mask) {
  Shared& s = shared();
  u32 common = 0;  // a ReLU makes many zeros: counted one by one they would queue up at one bin
#pragma unroll 1
  for (int tile = 0; tile < source.tiles(); ++tile) {
    u32 keys[Source::kSlots];
    const u32 exists = source.load(tile, keys);
#pragma unroll
    for (int i = 0; i < Source::kSlots; ++i) {
      u32 key = keys[i];
      const bool projected = project(key, source, tile, i);
      const bool counts = projected & (exists >> i & 1) & ((key & mask) == prefix);
      const bool is_common = key == Source::kCommonKey;
      common += counts & is_common;
      increment_if(counts & !is_common, &s.histogram[key >> shift & digit_mask]);
    }
  }
  common = __reduce_add_sync(kFull, common);
  if (common && threadIdx.x % 32 == 0) atomicAdd(&s.histogram[Source::kCommonKey >> shift & digit_mask], common);
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

// The same for the sum of all blocks' histograms: the first block adds them up and tells the others what it found.
__device__ __forceinline__ void find_bin_of_cluster(u32 rank) {
  Shared& s = shared();
  if (cluster_rank() != 0) {
    Shared* first = in_block(&s, 0);
#pragma unroll
    for (int b = 0; b < kBinsPerThread; ++b) {
      const int bin = b * THREADS + static_cast<int>(threadIdx.x);
      const u32 count = s.histogram[bin];
      if (count) atomicAdd(&first->histogram[bin], count);
      s.histogram[bin] = 0;
    }
  }
  cluster_barrier();
  if (cluster_rank() == 0) {
    find_bin(rank);
    if (threadIdx.x > 0 && threadIdx.x < CLUSTER) {
      Shared* other = in_block(&s, threadIdx.x);
      other->bin = s.bin;
      other->above = s.above;
      other->bin_count = s.bin_count;
    }
  }
  cluster_barrier();
}

// The rank-th largest projected key (1 <= rank <= number of keys), of keys below 2^bits. Stops at the first bin whose
// lower edge no more than `enough` keys reach.
template <class Source, class Project>
__device__ __forceinline__ Threshold find_threshold(const Source& source, u32 rank, u32 enough, int bits,
                                                    Project project) {
  u32 prefix = 0, above = 0;
#pragma unroll 1
  while (bits > 0) {
    const u32 mask = bits < 32 ? kFull << bits : 0u;
    const int width = min(bits, kDigitBits);
    bits -= width;
    const u32 digit_mask = (1u << width) - 1;
    count_bins(source, project, prefix, mask, bits, digit_mask);
    if constexpr (Source::kIsShare) {
      find_bin_of_cluster(rank - above);
    } else {
      find_bin(rank - above);
    }
    prefix |= shared().bin << bits;
    above += shared().above;
    if (above + shared().bin_count <= enough) break;
  }
  return {prefix, above, shared().bin_count};
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
    forget(tile);  // made anew in every step: all indices at once in registers would spill
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

// Put the keys at or above `threshold` into the candidate list; the count may exceed its capacity. Every block of a
// cluster filters its share of the row, and hands what it took to the first block, whose count is the total.
template <class Source>
__device__ __forceinline__ int filter(const Source& source, u32 threshold) {
  Shared& s = shared();
#pragma unroll 1
  for (int tile = 0; tile < source.tiles(); ++tile) {
    u32 keys[Source::kSlots];
    const u32 exists = source.load(tile, keys);
    u32 take = 0;
#pragma unroll
    for (int i = 0; i < Source::kSlots; ++i) take |= static_cast<u32>(keys[i] >= threshold) << i;
    append<Source::kSlots>(take & exists, &s.taken, [&](u32 position, int slot) {
      if (position < kMaxCandidates) {
        s.candidate.key[position] = keys[slot] - threshold;
        s.candidate.index[position] = source.index(tile, slot);
      }
    });
  }
  __syncthreads();
  if (cluster_rank() != 0) {
    Shared* first = in_block(&s, 0);
    const u32 count = s.taken;
    if (threadIdx.x == 0) s.handed_over = atomicAdd(&first->taken, count);
    __syncthreads();
    const u32 before = s.handed_over;
    for (u32 i = threadIdx.x; i < count && before + i < kMaxCandidates; i += THREADS) {
      first->candidate.key[before + i] = s.candidate.key[i];
      first->candidate.index[before + i] = s.candidate.index[i];
    }
  }
  if constexpr (CLUSTER > 1) cluster_barrier();
  const int count = static_cast<int>(s.taken);
  __syncthreads();
  if (threadIdx.x == 0) s.taken = 0;
  return count;
}

// Put the indices of the k largest keys, all below 2^bits, into s.chosen.
template <class Source>
__device__ __forceinline__ void choose(const Source& source, u32 k, int bits = 32) {
  Shared& s = shared();
  const Threshold t = find_threshold(source, k, k, bits, WholeKey{});
  const u32 wanted = k - t.above;  // of the keys in the threshold's bin
  u32 last_tie = 0;                // ties count as chosen from this inverted index on
  if (DETERMINISTIC && wanted < t.count) {
    last_tie = find_threshold(source, wanted, wanted, 32, IndexOfTies{t.key}).key;
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
    if (!DETERMINISTIC && __any_sync(kFull, ties)) {
      append<Source::kSlots>(ties, &s.taken_equal, [&](u32 position, int slot) {
        if (position < wanted) s.chosen[t.above + position] = source.index(tile, slot);
      });
    }
  }
  __syncthreads();
}

// Choose from the candidate list. Candidates lie close together: counted from their largest key's leading bit, they
// spread over the bins of the first step.
template <int kSlots>
__device__ __forceinline__ void choose_candidates(int count, u32 k) {
  Shared& s = shared();
  const Candidates<kSlots> candidates{count};
  const Resident<Candidates<kSlots>> resident(candidates);
  u32 largest = 0;
#pragma unroll
  for (int i = 0; i < kSlots; ++i) largest = max(largest, resident.keys[i]);
  largest = __reduce_max_sync(kFull, largest);
  if (threadIdx.x % 32 == 0) atomicMax(&s.largest, largest);
  __syncthreads();
  choose(resident, k, 32 - __clz(s.largest | 1));
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

// ---------------------------------------------------------------- long rows

// Collect a row's candidates if every block of the cluster can keep its share of the keys in registers.
template <int kVectors>
__device__ __forceinline__ bool collect_exactly(const float* begin, int length, u32 k, int& count) {
  const Row<kVectors, CLUSTER> share(begin, length);
  if (share.tiles() > 1) return false;
  const Resident<Row<kVectors, CLUSTER>> resident(share);
  count = filter(resident, find_threshold(resident, k, kMaxCandidates, 32, WholeKey{}).key);
  return true;
}

// Collect what passes a threshold that a few more logits than k should pass, by a sample of the row. The count is -1
// where a sample cannot help.
template <int kVectors>
__device__ __forceinline__ int collect_by_sample(const float* begin, int length, u32 k) {
  // Rank in the sample that k expects, and 4 standard deviations more. Sampled logits come in vectors of 4
  // neighbours, which may all be alike: that doubles the deviation.
  constexpr int kSampled = 4 * kVectors * THREADS;
  const float expected = static_cast<float>(k) * (kSampled / static_cast<float>(length));
  const u32 rank = static_cast<u32>(expected + 8.0f * sqrtf(expected)) + 8u;
  if (rank >= kSampled / 2) return -1;
  const Row<kVectors> row(begin, length);
  const Sample<kVectors> sample{row};
  const Resident<Sample<kVectors>> resident(sample);
  const u32 threshold = find_threshold(resident, rank, rank + rank / 16, 32, WholeKey{}).key;
  return filter(Row<::kVectors, CLUSTER>(begin, length), threshold);
}

// Choose from a row of several tiles. Returns whether this block has the result.
__device__ __forceinline__ bool choose_long(const float* begin, int length, u32 k) {
  int count;
  const bool collected = CLUSTER > 1 && (collect_exactly<1>(begin, length, k, count) ||
                                         collect_exactly<2>(begin, length, k, count) ||
                                         collect_exactly<4>(begin, length, k, count) ||
                                         collect_exactly<5>(begin, length, k, count));
  if (!collected) {
    count = length <= 32 * kTile ? collect_by_sample<kSampleVectors>(begin, length, k)
                                 : collect_by_sample<2 * kSampleVectors>(begin, length, k);
  }
  if (cluster_rank() != 0) return false;
  __syncthreads();
  constexpr int kSlots = kMaxCandidates / THREADS;
  if (static_cast<int>(k) <= count && count <= kMaxCandidates / 2) {
    choose_candidates<kSlots / 2>(count, k);
  } else if (static_cast<int>(k) <= count && count <= kMaxCandidates) {
    choose_candidates<kSlots>(count, k);
  } else {
    choose(Row<kVectors>(begin, length), k);
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
  if (threadIdx.x == 0) s.taken = s.taken_equal = s.largest = 0;
  __syncthreads();
  if constexpr (CLUSTER > 1) cluster_arrive();
  // Nothing of the predecessor's output is read before this, and the successor may start, up to where it waits for this
  // kernel's end; it costs nothing without a dependent launch.
  wait_for_previous_kernel();
  let_next_kernel_start();
  const i64 row_number = blockIdx.x / CLUSTER;
  const int length = max(lengths[row_number], 0);
  const int start = row_starts ? row_starts[row_number] : 0;
  const int* table = page_table;
  if (page_table) table += (page_rows ? static_cast<i64>(page_rows[row_number]) : row_number) * page_table_stride;
  if constexpr (CLUSTER > 1) cluster_wait();  // every block has started: the first one's counters are ready
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
