// The rows that a group of adjacent queries selects, each once, with a bit for every query that owns it.
//
//   block  one group of GROUP queries
//   table  open addressing in shared memory; a word is slot << GROUP | owners, EMPTY where there is none
//
// First every query's slots enter the table, one query after the other. Then the union is either small enough to share,
// or the queries are computed alone; so are they where one of them selects a row twice, which the softmax must count
// twice and an owner's bit cannot. Last the rows are written in the order of the queries' lists, a row where it comes
// first: the places in the table depend on the order of the threads, the result does not.
//
// Compile-time parameters: GROUP, THREADS, TABLE_BITS.

#include "ptx.cuh"

constexpr int TABLE = 1 << TABLE_BITS;
constexpr uint32 EMPTY = ~0u;
constexpr int WARPS = THREADS / 32;
constexpr uint32 OWNERS = (1u << GROUP) - 1;
// The bits that the table has for a slot. The launcher refuses caches that need more; with these two kept in step, a
// broken index gives a wrong row and no endless search.
constexpr uint32 SLOTS = EMPTY >> GROUP;

struct Shared {
  uint32 table[TABLE];
  int rows[GROUP];     // that enter the table with each query
  int entries[GROUP];  // slots of each query
  int lengths[GROUP];  // of each query's list
  int repeats;         // whether a query selects a row twice
  int warp_sums[WARPS];
  int first_slot;
};
static_assert(sizeof(Shared) == SHARED_BYTES, "the launcher asks for another size");

struct Arguments {
  const int* __restrict__ indices;  // [tokens, topk] slots, -1 = none
  const int* __restrict__ lengths;  // [tokens] or null: of each row, how many lead
  int* __restrict__ lists;          // [groups, list_stride]: slot << GROUP | owners, padded to whole tiles
  int* __restrict__ counts;         // [groups] rows of the union; 0 where the queries are computed alone
  int* __restrict__ alone;          // [tokens] keys of a query that is computed alone, else -1
  int tokens, topk, list_stride, tile;
  int most_rows;     // of a union that is shared; less than the table by a query's rows
  int most_percent;  // that a shared union is of all entries
};

DEVICE uint32 home(uint32 slot) { return slot * 2654435761u >> (32 - TABLE_BITS); }

// Enters the slot of one query: whether it is new to the table, and whether this query had it already.
DEVICE void insert(Shared& shared, uint32 slot, uint32 owner, int& rows, int& repeats) {
  for (uint32 at = home(slot);; at = (at + 1) % TABLE) {
    const uint32 found = atomicCAS(&shared.table[at], EMPTY, slot << GROUP | owner);
    if (found == EMPTY) {
      rows++;
      return;
    }
    if (found >> GROUP == slot) {
      repeats |= (atomicOr(&shared.table[at], owner) & owner) != 0;
      return;
    }
  }
}

// Owners of a slot that is in the table.
DEVICE uint32 owners_of(const Shared& shared, uint32 slot) {
  uint32 at = home(slot);
  while (shared.table[at] >> GROUP != slot) at = (at + 1) % TABLE;
  return shared.table[at] & OWNERS;
}

DEVICE int sum_of_warp(int x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// Sum over the threads before this one. All threads call it, once.
DEVICE int sum_before(Shared& shared, int own) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += before;
  }
  if (lane == 31) shared.warp_sums[warp] = sum;
  __syncthreads();
  for (int other = 0; other < warp; other++) sum += shared.warp_sums[other];
  return sum - own;
}

extern "C" __global__ void __launch_bounds__(THREADS) union_lists(const Arguments a) {
  extern __shared__ __align__(16) uint8 shared_bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(shared_bytes);
  const int thread = threadIdx.x, first_token = blockIdx.x * GROUP;

  for (int word = 4 * thread; word < TABLE; word += 4 * THREADS)
    *reinterpret_cast<uint4*>(&shared.table[word]) = make_uint4(EMPTY, EMPTY, EMPTY, EMPTY);
  wait_for_previous_kernel();
  if (thread < GROUP) {
    shared.rows[thread] = shared.entries[thread] = 0;
    const int token = first_token + thread;
    shared.lengths[thread] = token >= a.tokens ? 0 : a.lengths ? a.lengths[token] : a.topk;
  }
  if (thread == 0) shared.repeats = 0;
  __syncthreads();

  auto slots = [&](int query) { return a.indices + int64(first_token + query) * a.topk; };

  // Every thread sees the same sums, so all leave the loop together; the next query's sums are others. A union that is
  // too large already is not shared whatever follows.
  int union_rows = 0, all_entries = 0, repeats = 0;
  for (int query = 0; query < GROUP && union_rows <= a.most_rows; query++) {
    const int count = shared.lengths[query];
    const int* list = slots(query);
    int rows = 0, entries = 0;
#pragma unroll 4
    for (int i = thread; i < count; i += THREADS) {
      const int slot = list[i];
      if (slot < 0) continue;
      entries++;
      insert(shared, slot & SLOTS, 1u << query, rows, repeats);
    }
    rows = sum_of_warp(rows), entries = sum_of_warp(entries);
    if (thread % 32 == 0) {
      atomicAdd(&shared.rows[query], rows);
      atomicAdd(&shared.entries[query], entries);
    }
    if (repeats) shared.repeats = 1;
    __syncthreads();
    union_rows += shared.rows[query], all_entries += shared.entries[query];
  }

  const bool share = union_rows > 0 && union_rows <= a.most_rows && !shared.repeats &&
                     int64(union_rows) * 100 <= int64(all_entries) * a.most_percent;
  if (thread == 0) a.counts[blockIdx.x] = share ? union_rows : 0;
  if (thread < GROUP && first_token + thread < a.tokens) a.alone[first_token + thread] = share ? -1 : shared.lengths[thread];
  if (!share) return;

  // A thread takes neighbouring entries of the lists, one list behind the other, and writes those that come first in
  // their row's first list.
  const int per_thread = (GROUP * a.topk + THREADS - 1) / THREADS;
  auto each_first = [&](auto use) {
    for (int i = thread * per_thread; i < min((thread + 1) * per_thread, GROUP * a.topk); i++) {
      const int query = i / a.topk, place = i % a.topk;
      const int slot = place < shared.lengths[query] ? slots(query)[place] : -1;
      if (slot < 0) continue;
      const uint32 owners = owners_of(shared, slot & SLOTS);
      if ((owners & (1u << query) - 1) == 0) use(slot, owners);
    }
  };
  int rows = 0;
  each_first([&](int, uint32) { rows++; });
  int place = sum_before(shared, rows);
  int* list = a.lists + int64(blockIdx.x) * a.list_stride;
  each_first([&](int slot, uint32 owners) {
    if (place == 0) shared.first_slot = slot;
    list[place++] = uint32(slot) << GROUP | owners;
  });
  __syncthreads();
  // The last tile is filled up with a row that nobody owns; it must exist, for it is read.
  const int end = (union_rows + a.tile - 1) / a.tile * a.tile;
  for (int i = union_rows + thread; i < end; i += THREADS) list[i] = uint32(shared.first_slot) << GROUP;
}
