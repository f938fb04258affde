// Attention of one new token per request over its exact tokens and its blocks: what reference.py defines as
// decode_attention. record.py defines the bytes; its names g, t, r, j, Q, R are used here too.
//
// Launches, each of which starts while the one before it is still busy:
//   prepare  transforms the queries, if there are blocks with codes to multiply them with;
//   decode   keeps the new keys and values, attends: a persistent grid, among whose warps all work is divided evenly;
//   merge    joins what its thread blocks have found, brings sums of stored values back, divides.
//
// The work of a request and kv head is two segments: its exact tokens in tiles of 16 or 32, then its blocks in halves
// of 32 tokens. The work on them, TILE_WORK and HALF_WORK for each, is numbered through all requests, kv heads and
// segments; each warp gets one of equal shares of the numbers and goes through it alone, while what follows is copied
// to its ring in shared memory. What it finds of a segment that ends in its share it writes itself; what the warps of
// a thread block have found of one that goes on they join at the end.
//
// Codes are the A operand of mma.m16n8k16, in registers, queries and weights the B operand: 16 tokens (scores)
// or 16 dimensions (sums) by 8 query heads. Keys' levels of 2, 3 and 8 bits are integers and multiplied as such, by
// mma.m16n8k32, with queries of 16 bits in two parts; so are those of 4 bits, see `bytes_to_add`, for at most 4 heads:
// for more, as many products cost more than a conversion. Where a kv head has at most 4 query heads, the columns hold
// the heads twice, and the two 16-token tiles of a half share one set of registers from the scores on: lanes with t < 2
// hold the first tile, the others the second.
//
// Weights are 2 to the power of scores less a reference, which is raised when a score, weighed by the size of
// its value, is 2^6 above it; so weights times values stay in the range of float16.
//
// Constants set by the compiler: KEY_DIM, VALUE_DIM (multiples of 16), KEY_BITS, VALUE_BITS, GROUP (query heads
// of a kv head), NUM_SINKS, RING_SIZE, IS_BFLOAT16 (the exact tokens' type; else float16), NUM_WARPS,
// RING_SLOTS (places of a warp's ring in shared memory), QUERY_BYTES (of its queries there, if any), AROUND_THREADS (of
// the other kernels), MANY (requests of one of their thread blocks, where there are many), KEY_LEVELS_LOW/HIGH and
// VALUE_LEVELS_LOW/HIGH (bytes of the levels: of 4 bits the magnitudes, else all; e4m3, but 8-bit integers if
// IN_BYTES, of 4 bits those less than 255).

#include "instructions.cuh"

constexpr int KEY_TILES = KEY_DIM / 16, VALUE_TILES = VALUE_DIM / 16;
constexpr bool IS_SHARED = GROUP <= 4;         // both tiles of a half in one set of columns
constexpr int NUM_COLS = GROUP > 8 ? 2 : 1;    // sets of 8 columns
constexpr int NUM_SETS = IS_SHARED ? 1 : 2;    // token tiles with registers of their own
constexpr int NUM_PLACES = NUM_SINKS + RING_SIZE;
constexpr bool IS_PLAIN = KEY_BITS == 16;      // blocks are as exact as the newest tokens
constexpr bool IN_BFLOAT16 = IS_PLAIN && IS_BFLOAT16;  // products with blocks
constexpr bool IN_PARTS = KEY_BITS == 4 && IS_SHARED;  // levels of keys are two bytes that add up
constexpr bool QUERIES_IN_SHARED = QUERY_BYTES > 0;
constexpr bool IN_BYTES = IN_PARTS || KEY_BITS == 2 || KEY_BITS == 3 || KEY_BITS == 8;  // products with keys

__host__ __device__ constexpr int code_bytes(int tiles, int bits) {
  return 128 * (bits == 2 ? tiles / 2 : bits == 3 ? tiles / 2 + (tiles + 3) / 4 : tiles * bits / 4);
}
constexpr int VALUES_AT = code_bytes(2 * KEY_TILES, KEY_BITS);
constexpr int NORMS_AT = VALUES_AT + code_bytes(2 * VALUE_TILES, VALUE_BITS);
constexpr int HALF_BYTES = IS_PLAIN ? NORMS_AT : NORMS_AT + 128;
constexpr int VALUE_MEAN_AT = KEY_DIM, STEPS_AT = VALUE_MEAN_AT + VALUE_DIM;  // among means
constexpr int MEANS_BYTES = IS_PLAIN ? 0 : (STEPS_AT + 4 + 15) / 16 * 16;
// A half is copied with the means, which the first one has behind it and the second before it.
constexpr int COPY_BYTES = HALF_BYTES + MEANS_BYTES;
constexpr int RECORD_BYTES = HALF_BYTES + COPY_BYTES;

// What is copied lies in its place as it does in 128 bytes of memory: copies between other places are a tenth slower.
__host__ __device__ constexpr int slot_bytes(int bytes) { return (bytes + 112 + 127) / 128 * 128; }
constexpr int SLOT_BYTES = slot_bytes(COPY_BYTES);
constexpr int NUM_THREADS = 32 * NUM_WARPS;
constexpr int SUMS = GROUP * VALUE_DIM;        // numbers of a weighted sum
constexpr int PARTIAL = (SUMS + 2 * GROUP + 3) / 4 * 4;  // then references, then denominators

constexpr float LOWEST = -1e30f, HIDDEN = -1e38f;  // of references, of scores
constexpr float HEADROOM = 6.f;
constexpr float QUERY_PEAK = 32512, QUERY_UNIT = 1.f / 32768;  // of queries as 16-bit integers; 32512 is 127 * 256
constexpr float SMALLEST_VALUE = 5.9604645e-8f;

#include "tiles.cuh"
#include "copies.cuh"
#include "codes.cuh"

typedef Codes<KEY_BITS, 2 * KEY_TILES, KEY_LEVELS_LOW, KEY_LEVELS_HIGH> KeyCodes;
typedef Codes<VALUE_BITS, 2 * VALUE_TILES, VALUE_LEVELS_LOW, VALUE_LEVELS_HIGH> ValueCodes;

#include "shares.cuh"

struct Arguments {
  const u8* records;
  const u16 *new_keys, *new_values;  // null: they are kept
  u16 *exact_keys, *exact_values;
  const u16* queries;
  const u8* stored_bytes;          // transformed queries: see prepare_requests
  const float* stored_scales;
  const int *slots, *positions, *exact_starts, *first_visible, *block_tables, *block_starts;
  WorkStarts work_starts;
  int num_heads, table_stride;
  float scale, softcap;            // both times log2 e; no softcap is 0
  float key_unit, value_unit;      // what the level 1 stands for
  // The first of a request's and kv head's exact tokens, among those of all slots.
  DEVICE long long first_place(const Item& item) const {
    return ((long long)slots[item.request] * num_heads + item.head) * NUM_PLACES;
  }
};

// Shared memory of a thread block: each warp's ring, where it leaves what it has found at last; its queries, if
// QUERIES_IN_SHARED; of each place of a ring 16 bytes, its barrier and the addresses of a half and its means in it, or
// of keys and values; what it keeps of its share; of what each warp has left unfinished the segment, and by heads the
// weight that it has among others'.
constexpr int RING_BYTES = RING_SLOTS * SLOT_BYTES;
constexpr int QUERIES_AT = NUM_WARPS * RING_BYTES, PLACES_AT = QUERIES_AT + NUM_WARPS * QUERY_BYTES;
constexpr int OWN_AT = PLACES_AT + 16 * NUM_WARPS * RING_SLOTS;
constexpr int UNFINISHED_AT = OWN_AT + (int)sizeof(Own) * NUM_WARPS;
constexpr int WEIGHTS_AT = UNFINISHED_AT + 4 * NUM_WARPS;
static_assert(RING_BYTES >= 4 * PARTIAL, "a ring has no room for a partial");

#include "prepare.cuh"
#include "softmax.cuh"
#include "feed.cuh"
#include "attend_exact.cuh"
#include "stored_queries.cuh"
#include "attend_half.cuh"

// Two partials for each segment of a thread block: of the warps that leave it unfinished, and of the one that
// finishes it.
DEVICE int partial_of(int thread_block, int segment) { return 2 * (thread_block + segment); }

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
    decode(const u8* records, const u16* new_keys, const u16* new_values, u16* exact_keys, u16* exact_values,
           const u16* queries, const u8* stored_bytes, const float* stored_scales, const int* slots,
           const int* positions, const int* exact_starts, const int* first_visible, const int* block_tables,
           const int* block_starts, const int* before, int before_stride, float* partials, int batch, int num_heads,
           int table_stride, float scale, float softcap, float key_unit, float value_unit) {
  const WorkStarts work_starts = {before, before_stride};
  const Arguments args = {records, new_keys, new_values, exact_keys, exact_values, queries, stored_bytes,
                          stored_scales, slots, positions, exact_starts, first_visible, block_tables, block_starts,
                          work_starts, num_heads, table_stride, scale, softcap, key_unit, value_unit};
  extern __shared__ __align__(128) u8 memory[];
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const u32 start_of_shared = (u32)__cvta_generic_to_shared(memory), ring = start_of_shared + warp * RING_BYTES;
  const u32 places = start_of_shared + PLACES_AT + 16 * warp * RING_SLOTS;
  int* unfinished = (int*)(memory + UNFINISHED_AT);
  float* weights = (float*)(memory + WEIGHTS_AT);
  if (IS_PLAIN) wait_for_previous();  // else prepare has: what it writes is all there is to wait for
  let_next_start();
  const u32 start_of_lane = lane < batch ? work_starts[lane] : 0;  // loaded with the total
  const Shares shares(work_starts[batch] * num_heads, gridDim.x * NUM_WARPS);
  const u32 worker = blockIdx.x * NUM_WARPS + warp, end = shares.start(worker + 1);
  u32 number = shares.start(worker);
  Own& own = ((Own*)(memory + OWN_AT))[warp];
  if (lane == 0) {
    own.end = end;
    unfinished[warp] = -1;
  }
  if (number < end) {
    if (lane < RING_SLOTS) init_barrier(places + 16 * lane, NUM_COPIERS);
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
    __syncwarp();
    Item found;
    found.find(number, start_of_lane, work_starts, num_heads, batch, lane);
    found.store(own.item);
    found.store(own.copied);
    Feed feed(args, ring, places, own, number);
    // One loop: a copy of its body before it would take registers.
#pragma unroll 1
    for (int place = 0; place < RING_SLOTS; place++) {
      if (place == 1) {
        wait_for_previous();
        fetch_queries(args, found, number < found.segment_end(true), own, lane);
      }
      feed.copy(places + 16 * place, lane);
    }
    const KeyCodes key_codes;
    const ValueCodes value_codes;
    Softmax softmax;
    StoredQueries operands(start_of_shared + QUERIES_AT + warp * QUERY_BYTES, lane);
    Ring turn(places);
    while (number < own.end) {  // a segment, or what this warp has of it
      Item item = own.item;
      item.advance(number, work_starts, num_heads);
      const bool is_exact = number < item.segment_end(true);
      const u32 stop = min(own.end, item.segment_end(is_exact));
      own.attend_to(item, stop);
      softmax.reset();
      if (is_exact) {
        const ExactTokens tokens(args, item, lane);
        const int end_tile = min(pieces(stop - item.start, TILE_WORK), num_tiles(tokens.position));
        for (int tile = pieces(number - item.start, TILE_WORK); tile < end_tile; tile++)
          tokens.attend(args, tile, lane, turn, feed, softmax);
      } else {
        operands.load(args, item, lane);
        const u32 exact_end = item.segment_end(true);
        const int first = pieces(number - exact_end, HALF_WORK);
        int num_hidden = args.first_visible[item.request] - args.block_starts[item.request] - 32 * first;
        bool is_second = first % 2;  // half of a block
        for (int left = pieces(stop - exact_end, HALF_WORK) - first; left > 0; left--, num_hidden -= 32) {
          const uint2 copied = turn.wait_for(0);
          attend_half(args, operands, key_codes, value_codes, copied.x, copied.y, num_hidden, is_second || left == 1,
                      lane, softmax);
          turn.release(feed, 1, lane);
          is_second = !is_second;
        }
      }
      const Item done = own.item;
      number = own.stop;
      const bool was_exact = number <= done.segment_end(true), is_finished = number == done.segment_end(was_exact);
      const int segment = 2 * (int)done.index(num_heads) + !was_exact;
      float* target = is_finished ? partials + (partial_of(blockIdx.x, segment) + 1ll) * PARTIAL
                                  : (float*)(memory + warp * RING_BYTES);
      if (was_exact)
        write_warp<true>(softmax, lane, target);
      else
        write_warp<false>(softmax, lane, target);
      if (!is_finished && lane == 0) unfinished[warp] = segment;
    }
  }
  wait_for_previous();  // as what comes after this takes prepare for done
  __syncthreads();
  auto left_by = [&](int w) { return (const float*)(memory + w * RING_BYTES); };
  // Warps that have left the same segment follow each other: bit w is set if warp w is the first of such.
  const int segment_of_lane = lane < NUM_WARPS ? unfinished[lane] : -1;
  const int before_it = __shfl_up_sync(~0u, segment_of_lane, 1);
  const u32 firsts = __ballot_sync(~0u, lane == 0 || segment_of_lane != before_it) | 1u << NUM_WARPS;
  auto partial_of_segment = [&](int segment) {
    return partials + (long long)partial_of(blockIdx.x, segment) * PARTIAL;
  };
  const int w = threadIdx.x / GROUP, head = threadIdx.x % GROUP;
  const int its_segment = w < NUM_WARPS ? unfinished[w] : -1;
  auto end_of = [&](int w) { return __ffs(firsts & ~((2u << w) - 1)) - 1; };  // after the warps that have left the same
  const int its_first = 31 - __clz(firsts & ((2u << w % 32) - 1)), its_end = end_of(w % 32);
  if (its_segment >= 0) {
    float reference = LOWEST;
#pragma unroll
    for (int other = 0; other < NUM_WARPS; other++)
      if (other >= its_first && other < its_end) reference = fmaxf(reference, left_by(other)[SUMS + head]);
    weights[threadIdx.x] = exp2_(left_by(w)[SUMS + head] - reference);
    if (w == its_first) partial_of_segment(its_segment)[SUMS + head] = reference;
  }
  __syncthreads();
  if (its_segment >= 0 && w == its_first) {
    float denominator = 0;
    for (int other = w; other < its_end; other++)
      denominator += weights[other * GROUP + head] * left_by(other)[SUMS + GROUP + head];
    partial_of_segment(its_segment)[SUMS + GROUP + head] = denominator;
  }
  // Each of TEAMS teams of threads has every TEAMS-th segment.
  constexpr int QUADS = SUMS / 4, TEAMS = NUM_THREADS > QUADS ? NUM_THREADS / QUADS : 1;
  for (int from = 0, to, team = 0; from < NUM_WARPS; from = to, team = team + 1 == TEAMS ? 0 : team + 1) {
    to = end_of(from);
    const int segment = __shfl_sync(~0u, segment_of_lane, from);
    if (segment < 0 || (TEAMS > 1 && threadIdx.x / QUADS != team)) continue;
    for (int i = TEAMS > 1 ? threadIdx.x % QUADS : threadIdx.x; i < QUADS; i += NUM_THREADS) {
      float4 sum = {};
#pragma unroll 4
      for (int other = from; other < to; other++)
        add(sum, weights[other * GROUP + i / (VALUE_DIM / 4)], ((const float4*)left_by(other))[i]);
      ((float4*)partial_of_segment(segment))[i] = sum;
    }
  }
}

#include "merge.cuh"
#include "merge_few.cuh"
