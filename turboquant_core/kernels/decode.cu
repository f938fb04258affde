// Attention of one new token per request over its exact tokens and its blocks: what reference.py defines as
// decode_attention. record.py defines the bytes; its names g, t, r, j, Q, R are used here too.
//
// Three launches, each of which starts while the one before it is still busy:
//   prepare  keeps the new keys and values, transforms the queries;
//   decode   attends: a persistent grid, among which all work is divided evenly;
//   merge    joins what its blocks have found, brings sums of stored values back, divides.
//
// The work of a request and kv head is two segments: its exact tokens in tiles of 16, then its blocks in halves
// of 32 tokens. Tiles and halves are numbered through all requests, kv heads and segments; thread block c gets
// the c-th of equal shares of the numbers. Its warps take them one by one, so that none waits for another, while
// one warp copies halves to a ring in shared memory ahead of their turn.
//
// Codes are the A operand of mma.m16n8k16, in registers, queries and weights the B operand: 16 tokens (scores)
// or 16 dimensions (sums) by 8 query heads. Where a kv head has at most 4 query heads, the columns hold the
// heads twice, and the two 16-token tiles of a half share one set of registers from the scores on: lanes with
// t < 2 hold the first tile, the others the second.
//
// Weights are 2 to the power of scores less a reference, which is raised when a score, weighed by the size of
// its value, is 2^6 above it; so weights times values stay in the range of float16.
//
// Constants set by the compiler: KEY_DIM, VALUE_DIM (multiples of 16), KEY_BITS, VALUE_BITS, GROUP (query heads
// of a kv head), NUM_SINKS, RING_SIZE, IS_BFLOAT16 (the exact tokens' type; else float16), NUM_WARPS,
// (that attend), RING_SLOTS (halves that shared memory has room for), KEY_LEVELS_LOW/HIGH and VALUE_LEVELS_LOW/HIGH (the e4m3 bytes of magnitudes 0-3 and 4-7).

#include "instructions.cuh"

constexpr int KEY_TILES = KEY_DIM / 16, VALUE_TILES = VALUE_DIM / 16;
constexpr bool IS_SHARED = GROUP <= 4;         // both tiles of a half in one set of columns
constexpr int NUM_COLS = GROUP > 8 ? 2 : 1;    // sets of 8 columns
constexpr int NUM_SETS = IS_SHARED ? 1 : 2;    // token tiles with registers of their own
constexpr int NUM_PLACES = NUM_SINKS + RING_SIZE;
constexpr int NUM_EXACT_TILES = (NUM_PLACES + 15) / 16;
constexpr bool IS_PLAIN = KEY_BITS == 16;      // blocks are as exact as the newest tokens
constexpr bool IN_BFLOAT16 = IS_PLAIN && IS_BFLOAT16;  // products with blocks

__host__ __device__ constexpr int code_bytes(int tiles, int bits) {
  return 128 * (bits == 2 ? tiles / 2 : bits == 3 ? tiles / 2 + (tiles + 3) / 4 : tiles * bits / 4);
}
constexpr int VALUES_AT = code_bytes(2 * KEY_TILES, KEY_BITS);
constexpr int NORMS_AT = VALUES_AT + code_bytes(2 * VALUE_TILES, VALUE_BITS);
constexpr int KEY_MEAN_AT = NORMS_AT + 128;
constexpr int VALUE_MEAN_AT = KEY_MEAN_AT + KEY_DIM;
constexpr int STEPS_AT = VALUE_MEAN_AT + VALUE_DIM;
constexpr int HALF_BYTES = IS_PLAIN ? NORMS_AT : (STEPS_AT + 4 + 15) / 16 * 16;

// A half lies in its place as it does in 128 bytes of memory: copies between other places are a tenth slower.
constexpr int SLOT_BYTES = (HALF_BYTES + 112 + 127) / 128 * 128;
constexpr int NUM_THREADS = 32 * (NUM_WARPS + 1);  // and a warp that copies
constexpr int SUMS = GROUP * VALUE_DIM;        // numbers of a weighted sum
constexpr int PARTIAL = SUMS + 2 * GROUP;      // then references, then denominators

constexpr float LOWEST = -1e30f, HIDDEN = -1e38f;  // of references, of scores
constexpr float HEADROOM = 6.f;
constexpr float QUERY_PEAK = 32512;  // 127 * 256: of queries as 16-bit integers
constexpr float SMALLEST_VALUE = 5.9604645e-8f;

#include "codes.cuh"

typedef Codes<KEY_BITS, 2 * KEY_TILES, KEY_LEVELS_LOW, KEY_LEVELS_HIGH> KeyCodes;
typedef Codes<VALUE_BITS, 2 * VALUE_TILES, VALUE_LEVELS_LOW, VALUE_LEVELS_HIGH> ValueCodes;

#include "copies.cuh"

// ---- shares of the work ----

struct Shares {  // of `total` numbers among `count` thread blocks
  u32 quotient, rest;
  DEVICE Shares(u32 total, u32 count) : quotient(total / count), rest(total % count) {}
  DEVICE u32 start(u32 c) const { return c * quotient + min(c, rest); }
  DEVICE u32 owner(u32 number) const {
    const u32 longer = rest * (quotient + 1);
    return number < longer ? number / (quotient + 1) : rest + (number - longer) / quotient;
  }
};

// What a number stands for. Found by going on from that of a smaller number.
struct Item {
  int request, head;     // kv head
  u32 start;             // number of the first item of this request and head
  u32 count;             // of its items, exact tiles included
  DEVICE void advance(u32 number, const int* item_starts, int num_heads) {
    while (number >= start + count) {
      start += count;
      if (++head == num_heads) {
        head = 0;
        request++;
        count = item_starts[request + 1] - item_starts[request];
      }
    }
  }
  DEVICE void find(u32 number, const int* item_starts, int num_heads, int batch) {
    int low = 0, high = batch - 1;
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if ((u32)item_starts[middle] * num_heads <= number) low = middle; else high = middle - 1;
    }
    request = low;
    count = item_starts[low + 1] - item_starts[low];
    const u32 inside = number - item_starts[low] * num_heads;
    head = inside / count;
    start = number - inside % count;
  }
};

// ---- one thread block's part ----

struct Softmax {  // of this lane's columns 2t, 2t + 1 of each set of 8
  float reference[NUM_COLS][2], denominator[NUM_COLS][2];
  float sums[NUM_COLS][VALUE_TILES][4];
  DEVICE void reset() {
    for (int n = 0; n < NUM_COLS; n++) {
      reference[n][0] = reference[n][1] = LOWEST;
      denominator[n][0] = denominator[n][1] = 0;
#pragma unroll
      for (int i = 0; i < VALUE_TILES; i++) sums[n][i][0] = sums[n][i][1] = sums[n][i][2] = sums[n][i][3] = 0;
    }
  }
  // Raise the references of columns if scores, plus the logarithms of value sizes, are far above them.
  // scores: [set][column set][2r + column], sizes: [set][r].
  template <int SETS>
  DEVICE void raise(const float (&scores)[SETS][NUM_COLS][4], const float (&sizes)[SETS][2]) {
#pragma unroll
    for (int n = 0; n < NUM_COLS; n++) {
      float highest[2] = {LOWEST, LOWEST};
#pragma unroll
      for (int s = 0; s < SETS; s++)
#pragma unroll
        for (int c = 0; c < 2; c++)
          highest[c] = fmaxf(highest[c], fmaxf(scores[s][n][c] + sizes[s][0], scores[s][n][2 + c] + sizes[s][1]));
      const bool is_high = highest[0] > reference[n][0] + HEADROOM || highest[1] > reference[n][1] + HEADROOM;
      if (!__any_sync(~0u, is_high)) continue;
#pragma unroll
      for (int c = 0; c < 2; c++) {
#pragma unroll
        for (int d = IS_SHARED ? 2 : 4; d < 32; d <<= 1)
          highest[c] = fmaxf(highest[c], __shfl_xor_sync(~0u, highest[c], d));
        const float raised = fmaxf(highest[c], reference[n][c]), decay = exp2_(reference[n][c] - raised);
        reference[n][c] = raised;
        denominator[n][c] *= decay;
#pragma unroll
        for (int i = 0; i < VALUE_TILES; i++) {
          sums[n][i][c] *= decay;
          sums[n][i][2 + c] *= decay;
        }
      }
    }
  }
};

struct Arguments {
  const u8* records;
  const void *exact_keys, *exact_values;
  const void* queries;
  const u16* stored_queries;       // transformed, divided by their scale
  const u8* stored_bytes;          // the same as 16-bit integers: KEY_DIM upper bytes, then the lower ones
  const float* stored_scales;      // what their products are to be multiplied with
  const int *slots, *positions, *exact_starts, *first_visible, *block_tables, *block_starts;
  const int* item_starts;
  float* partials;
  int batch, num_heads, table_stride;
  float scale, softcap;            // both times log2 e; no softcap is 0
  float key_unit, value_unit;      // what the level 1 stands for
};

DEVICE float capped(float score, float softcap) {
  if (softcap > 0) score = softcap * tanhf(score / softcap);
  return score;
}

// 16 tokens that lie in a slot as they came. Rows of the sums: dimension 16Q + 4 (g / 2) + 2r + g % 2.
DEVICE void attend_exact(const Arguments& args, const Item& item, int tile, int lane, Softmax& softmax) {
  const int g = lane >> 2, t = lane & 3;
  const int position = args.positions[item.request], newest = position - NUM_SINKS;
  const int exact_start = args.exact_starts[item.request], first_visible = args.first_visible[item.request];
  long long row[2];
  bool is_seen[2];
#pragma unroll
  for (int r = 0; r < 2; r++) {
    const int place = 16 * tile + 4 * (g >> 1) + 2 * r + (g & 1), in_ring = place - NUM_SINKS;
    int held = place;
    if (in_ring >= 0) {
      int age = (newest - in_ring) % RING_SIZE;
      if (age < 0) age += RING_SIZE;
      held = NUM_SINKS + newest - age;
    }
    is_seen[r] = place < NUM_PLACES && held >= 0 && held <= position && held >= first_visible &&
                 (place < NUM_SINKS || held >= max(exact_start, NUM_SINKS));
    row[r] = ((long long)args.slots[item.request] * args.num_heads + item.head) * NUM_PLACES + min(place, NUM_PLACES - 1);
  }
  if (!__any_sync(~0u, is_seen[0] || is_seen[1])) return;

  float scores[2][NUM_COLS][4] = {};  // [0] is used
  const u16* keys = (const u16*)args.exact_keys;
  const u16* queries = (const u16*)args.queries + ((long long)item.request * args.num_heads + item.head) * GROUP * KEY_DIM;
#pragma unroll
  for (int q = 0; q < KEY_TILES; q++) {
    const uint2 x = *(const uint2*)(keys + row[0] * KEY_DIM + 16 * q + 4 * t);
    const uint2 y = *(const uint2*)(keys + row[1] * KEY_DIM + 16 * q + 4 * t);
    const u32 a[4] = {x.x, y.x, x.y, y.y};
#pragma unroll
    for (int n = 0; n < NUM_COLS; n++) {
      const int head = IS_SHARED ? min(g & 3, GROUP - 1) : min(8 * n + g, GROUP - 1);
      const uint2 b = *(const uint2*)(queries + head * KEY_DIM + 16 * q + 4 * t);
      multiply<IS_BFLOAT16>(scores[0][n], a, b.x, b.y);
    }
  }
  float one[1][NUM_COLS][4];
  const float sizes[1][2] = {{0, 0}};
#pragma unroll
  for (int n = 0; n < NUM_COLS; n++)
#pragma unroll
    for (int c = 0; c < 4; c++)
      one[0][n][c] = is_seen[c >> 1] ? capped(scores[0][n][c] * args.scale, args.softcap) : HIDDEN;
  softmax.raise<1>(one, sizes);
  u32 b[NUM_COLS][2];
#pragma unroll
  for (int n = 0; n < NUM_COLS; n++) {
    float p[4];
#pragma unroll
    for (int c = 0; c < 4; c++) {
      p[c] = exp2_(one[0][n][c] - softmax.reference[n][c & 1]);
      // Columns that hold the same heads a second time count nothing.
      if (IS_SHARED && t >= 2) p[c] = 0;
      softmax.denominator[n][c & 1] += p[c];
    }
    b[n][0] = transposed(to_exact_type(p[0], p[1]));
    b[n][1] = transposed(to_exact_type(p[2], p[3]));
  }
  const u16* values = (const u16*)args.exact_values;
#pragma unroll
  for (int q = 0; q < VALUE_TILES; q++) {
    const uint2 x = *(const uint2*)(values + row[0] * VALUE_DIM + 16 * q + 4 * t);
    const uint2 y = *(const uint2*)(values + row[1] * VALUE_DIM + 16 * q + 4 * t);
    const u32 a[4] = {transposed(x.x), transposed(x.y), transposed(y.x), transposed(y.y)};
#pragma unroll
    for (int n = 0; n < NUM_COLS; n++) multiply<IS_BFLOAT16>(softmax.sums[n][q], a, b[n][0], b[n][1]);
  }
}

struct StoredQueries {
  u32 operand[NUM_COLS][KEY_TILES][2];
  // The same as 16-bit integers, their upper and lower bytes: in columns 0-3 and 4-7, or one after the other.
  u32 bytes[NUM_COLS][NUM_SETS][KEY_TILES];
  float scale[NUM_COLS][2];
  DEVICE void load(const Arguments& args, const Item& item, int lane) {
    const int g = lane >> 2, t = lane & 3;
    const long long first = ((long long)item.request * args.num_heads + item.head) * GROUP;
#pragma unroll
    for (int n = 0; n < NUM_COLS; n++) {
      const int head = IS_SHARED ? min(g & 3, GROUP - 1) : min(8 * n + g, GROUP - 1);
#pragma unroll
      for (int q = 0; q < KEY_TILES; q++) {
        const u16* source = IS_PLAIN ? (const u16*)args.queries : args.stored_queries;
        const uint2 b = *(const uint2*)(source + (first + head) * KEY_DIM + 16 * q + 4 * t);
        operand[n][q][0] = b.x;
        operand[n][q][1] = b.y;
#pragma unroll
        for (int s = 0; s < NUM_SETS && !IS_PLAIN; s++) {
          const int is_low = IS_SHARED ? g >> 2 : s;
          bytes[n][s][q] = *(const u32*)(args.stored_bytes + (2 * (first + head) + is_low) * KEY_DIM + 16 * q + 4 * t);
        }
      }
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int column = IS_SHARED ? (2 * t + c) & 3 : 8 * n + 2 * t + c;
        scale[n][c] = IS_PLAIN ? args.scale : args.stored_scales[first + min(column, GROUP - 1)] * args.key_unit;
      }
    }
  }
};

// Products of a mean of keys, from the words of this lane, with the queries of its columns, up to their scale.
DEVICE void key_mean_products(const StoredQueries& queries, const u8* words, int t, float (&products)[NUM_COLS][2]) {
  auto word = [&](int q) -> u32 {
    if (q >= KEY_TILES) return 0;
    if (KEY_TILES % 4) return *(const u32*)(words + 4 * q);
    const uint4 v = *(const uint4*)(words + q / 4 * 16);
    return q % 4 == 0 ? v.x : q % 4 == 1 ? v.y : q % 4 == 2 ? v.z : v.w;
  };
#pragma unroll
  for (int n = 0; n < NUM_COLS; n++) {
    int sums[NUM_SETS][4] = {};
#pragma unroll
    for (int q = 0; q < KEY_TILES; q += 2)
#pragma unroll
      for (int s = 0; s < NUM_SETS; s++)
        multiply_bytes(sums[s], word(q), word(q + 1), queries.bytes[n][s][q], q + 1 < KEY_TILES ? queries.bytes[n][s][q + 1] : 0);
#pragma unroll
    for (int c = 0; c < 2; c++) {
      if (IS_SHARED) {
        const float mine = (float)sums[0][c] * (t < 2 ? 256 / QUERY_PEAK : 1 / QUERY_PEAK);
        products[n][c] = mine + __shfl_xor_sync(~0u, mine, 2);
      } else {
        products[n][c] = (float)(256 * sums[0][c] + sums[NUM_SETS - 1][c]) * (1 / QUERY_PEAK);
      }
    }
  }
}

// 32 tokens of a block, in shared memory. Rows of the sums: dimension 16R + 8r + g.
DEVICE void attend_half(const Arguments& args, const StoredQueries& queries, const KeyCodes& key_codes,
                        const ValueCodes& value_codes, const u8* half, int num_hidden, int lane, Softmax& softmax) {
  const int g = lane >> 2, t = lane & 3;
  const u32 steps = IS_PLAIN ? 0 : *(const u32*)(half + STEPS_AT);
  const float key_step = half_to_float(steps & 0xFFFF) / args.key_unit;
  const float value_step = half_to_float(steps >> 16) / args.value_unit;
  const float smallest_size = fmaxf(value_step, SMALLEST_VALUE);

  float mean_products[NUM_COLS][2] = {};
  if (!IS_PLAIN) key_mean_products(queries, half + KEY_MEAN_AT + t * 4 * KEY_TILES, t, mean_products);
  float products[2][NUM_COLS][4] = {};
#pragma unroll
  for (int q = 0; q < KEY_TILES; q++) {
#pragma unroll
    for (int row = 0; row < 2; row++) {
      u32 a[4];
      key_codes.tile(half, lane, row * KEY_TILES + q, a);
#pragma unroll
      for (int n = 0; n < NUM_COLS; n++)
        multiply<IN_BFLOAT16>(products[row][n], a, queries.operand[n][q][0], queries.operand[n][q][1]);
    }
  }
  float scores[NUM_SETS][NUM_COLS][4], sizes[NUM_SETS][2], norms[NUM_SETS][2];
#pragma unroll
  for (int s = 0; s < NUM_SETS; s++) {
    const int row = IS_SHARED ? t >> 1 : s;
    constexpr u32 ONES = 0x3C003C00;
    const uint2 pair = IS_PLAIN ? make_uint2(ONES, ONES) : *(const uint2*)(half + NORMS_AT + (2 * g + row) * 8);
    const float key_norms[2] = {half_to_float(pair.x & 0xFFFF), half_to_float(pair.x >> 16)};
    norms[s][0] = half_to_float(pair.y & 0xFFFF);
    norms[s][1] = half_to_float(pair.y >> 16);
#pragma unroll
    for (int n = 0; n < NUM_COLS; n++)
#pragma unroll
      for (int c = 0; c < 4; c++) {
        const float product = IS_SHARED ? (t < 2 ? products[0][n][c] : products[1][n][c]) : products[s][n][c];
        scores[s][n][c] = (product * key_norms[c >> 1] + mean_products[n][c & 1] * key_step) * queries.scale[n][c & 1];
      }
#pragma unroll
    for (int r = 0; r < 2; r++) sizes[s][r] = log2_(fmaxf(norms[s][r], smallest_size));
  }
  if (args.softcap > 0 || num_hidden > 0) {
#pragma unroll
    for (int s = 0; s < NUM_SETS; s++)
#pragma unroll
      for (int n = 0; n < NUM_COLS; n++)
#pragma unroll
        for (int c = 0; c < 4; c++) {
          const int token = 16 * (IS_SHARED ? t >> 1 : s) + 4 * (g >> 1) + 2 * (c >> 1) + (g & 1);
          scores[s][n][c] = token < num_hidden ? HIDDEN : capped(scores[s][n][c], args.softcap);
        }
  }
  softmax.raise<NUM_SETS>(scores, sizes);

  u32 b[2][NUM_COLS][2], mean_b[NUM_COLS][2];
#pragma unroll
  for (int n = 0; n < NUM_COLS; n++) {
    float column_sums[2] = {0, 0};
#pragma unroll
    for (int s = 0; s < NUM_SETS; s++) {
      float p[4];
#pragma unroll
      for (int c = 0; c < 4; c++) {
        p[c] = exp2_(scores[s][n][c] - softmax.reference[n][c & 1]);
        column_sums[c & 1] += p[c];
      }
      for (int c = 0; c < 4; c++) p[c] *= norms[s][c >> 1];
      const u32 first = transposed(IS_PLAIN ? to_exact_type(p[0], p[1]) : to_halves(p[0], p[1]));
      const u32 second = transposed(IS_PLAIN ? to_exact_type(p[2], p[3]) : to_halves(p[2], p[3]));
      if (IS_SHARED) {  // after the transpose, g is the column
        const u32 is_first = g < 4 ? ~0u : 0u;
        b[0][n][0] = first & is_first;
        b[0][n][1] = second & is_first;
        b[1][n][0] = first & ~is_first;
        b[1][n][1] = second & ~is_first;
      } else {
        b[s][n][0] = first;
        b[s][n][1] = second;
      }
    }
    softmax.denominator[n][0] += column_sums[0];
    softmax.denominator[n][1] += column_sums[1];
    if (IS_PLAIN) continue;
    // Sums of pairs of rows, in both halves.
    const u32 rows = transposed(to_halves(column_sums[0] * value_step, column_sums[1] * value_step));
    u32 pairs;
    asm("add.rn.f16x2 %0,%1,%2;" : "=r"(pairs) : "r"(rows), "r"(permute(rows, 0, 0x1032)));
    mean_b[n][0] = pairs & 0xFFFF;
    mean_b[n][1] = pairs & 0xFFFF0000;
  }
  // The mean's numbers for r = 0, 1 are a pair: the first counts for rows g, the second for rows g + 8.
  const u8* mean_row = half + VALUE_MEAN_AT + g * 2 * VALUE_TILES;
#pragma unroll
  for (int i = 0; i < VALUE_TILES; i++) {
    u32 even = 0, odd = 0;
    if (IS_PLAIN) {
    } else if (VALUE_TILES % 8 == 0) {
      const uint4 v = *(const uint4*)(mean_row + i / 8 * 16);
      const int w = i / 2 % 4;
      KeyCodes::int8_to_halves(w == 0 ? v.x : w == 1 ? v.y : w == 2 ? v.z : v.w, even, odd);
    } else {
      KeyCodes::int8_to_halves(*(const u16*)(mean_row + 2 * i), even, odd);
      odd = even;
    }
    const u32 pair = i % 2 ? odd : even, mean[4] = {pair, 0, 0, pair};
#pragma unroll
    for (int n = 0; n < NUM_COLS && !IS_PLAIN; n++)
      multiply<false>(softmax.sums[n][i], mean, mean_b[n][0], mean_b[n][1]);
#pragma unroll
    for (int col = 0; col < 2; col++) {
      u32 a[4];
      value_codes.tile(half + VALUES_AT, lane, 2 * i + col, a);
#pragma unroll
      for (int n = 0; n < NUM_COLS; n++) multiply<IN_BFLOAT16>(softmax.sums[n][i], a, b[col][n][0], b[col][n][1]);
    }
  }
}

// Write what a warp has found to `target`, in the order of a partial.
DEVICE void write_warp(const Softmax& softmax, bool is_exact, int lane, float* target) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int n = 0; n < NUM_COLS; n++)
#pragma unroll
    for (int c = 0; c < 2; c++) {
      float total = softmax.denominator[n][c];
#pragma unroll
      for (int d = IS_SHARED ? 2 : 4; d < 32; d <<= 1) total += __shfl_xor_sync(~0u, total, d);
      const int column = 8 * n + 2 * t + c;
      if (g == 0 && column < GROUP) {
        target[SUMS + column] = softmax.reference[n][c];
        target[SUMS + GROUP + column] = total;
      }
#pragma unroll
      for (int i = 0; i < VALUE_TILES; i++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          float sum = softmax.sums[n][i][2 * r + c];
          if (IS_SHARED) sum += __shfl_xor_sync(~0u, sum, 2);
          const int dim = 16 * i + (is_exact ? 4 * (g >> 1) + 2 * r + (g & 1) : 8 * r + g);
          if (column < GROUP) target[column * VALUE_DIM + dim] = sum;
        }
    }
}

// Shared memory of a thread block: the ring of halves, what each warp has found, a pair of barriers for each place
// in the ring (it is full; it is empty), the number that is taken next, where in its place each half starts.
struct Shared {
  u8* ring;
  float* found;
  u64 *full, *empty;
  u32 *next, *offsets;
  DEVICE Shared(u8* memory) {
    ring = memory;
    full = (u64*)(memory + RING_SLOTS * SLOT_BYTES);
    empty = full + RING_SLOTS;
    found = (float*)(empty + RING_SLOTS);
    next = (u32*)(found + NUM_WARPS * PARTIAL);
    offsets = next + 1;
  }
};

// The warp that copies. In the order of the numbers, so that nothing is copied more than a ring ahead of the
// oldest item that is not done: see wait_for_item.
DEVICE void copy_items(const Arguments& args, const Shared& shared, Item item, u32 first, u32 count, int lane) {
  constexpr int AT_ONCE = NUM_COPIERS == 1 ? 4 : 1;  // items, by a lane each, or one by all lanes
  const int offset = NUM_COPIERS == 1 ? lane : 0;
  if (offset >= AT_ONCE) return;
  auto find = [&](u32 k, long long& record) {  // of an exact tile: -1
    item.advance(first + min(k, count - 1), args.item_starts, args.num_heads);
    const int index = (int)(first + min(k, count - 1) - item.start) - NUM_EXACT_TILES;
    record = -1;
    if (index < 0) return;
    const int block = args.block_tables[(long long)item.request * args.table_stride + index / 2];
    record = ((long long)block * args.num_heads + item.head) * 2 + index % 2;
  };
  constexpr u32 LANES = NUM_COPIERS == 1 ? (1u << AT_ONCE) - 1 : ~0u;
  long long record, following;
  find(offset, record);
  for (u32 k = offset; k < count + offset; k += AT_ONCE) {
    find(k + AT_ONCE, following);  // its block's id is on its way meanwhile
    const u32 slot = k % RING_SLOTS, round = k / RING_SLOTS;
    if (k < count && round > 0) wait(shared.empty + slot, (round - 1) & 1);
    __syncwarp(LANES);
    if (k < count) {
      if (record < 0) {
        arrive(shared.full + slot);
      } else {
        const u8* source = args.records + record * HALF_BYTES;
        const u32 offset = (u64)source % 128;
        if (NUM_COPIERS == 1 || lane == 0) shared.offsets[slot] = offset;
        copy_half(shared.ring + slot * SLOT_BYTES + offset, source, shared.full + slot);
      }
    }
    record = following;
  }
}

// By a warp that attends: until item k is in the ring. A barrier tells its last turn from the one before, not from
// the one before that. So the item that had the place before must be done first; as that of two rings before is
// (nothing is copied until then, and warps take no more than two items each that are not), nothing is mistaken.
static_assert(RING_SLOTS >= 2 * NUM_WARPS, "warps take more items than the ring has room for");
DEVICE u8* wait_for_item(const Shared& shared, u32 k) {
  const u32 slot = k % RING_SLOTS, round = k / RING_SLOTS;
  if (round > 0) wait(shared.empty + slot, (round - 1) & 1);
  wait(shared.full + slot, round & 1);
  return shared.ring + slot * SLOT_BYTES + shared.offsets[slot];
}
DEVICE void leave_item(const Shared& shared, u32 k, int lane) {
  __syncwarp();
  if (lane == 0) arrive(shared.empty + k % RING_SLOTS);
}

#define CONSUMERS_MEET asm volatile("bar.sync 1,%0;" ::"n"(32 * NUM_WARPS) : "memory")

extern "C" __global__ void __launch_bounds__(NUM_THREADS, 1)
    decode(const u8* records, const void* exact_keys, const void* exact_values, const void* queries,
           const u16* stored_queries, const u8* stored_bytes, const float* stored_scales, const int* slots,
           const int* positions, const int* exact_starts, const int* first_visible, const int* block_tables,
           const int* block_starts, const int* item_starts, float* partials, int batch, int num_heads,
           int table_stride, float scale, float softcap, float key_unit, float value_unit) {
  const Arguments args = {records, exact_keys, exact_values, queries, stored_queries, stored_bytes, stored_scales,
                          slots, positions, exact_starts, first_visible, block_tables, block_starts, item_starts,
                          partials, batch, num_heads, table_stride, scale, softcap, key_unit, value_unit};
  extern __shared__ __align__(128) u8 memory[];
  const Shared shared(memory);
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const Shares shares((u32)item_starts[batch] * num_heads, gridDim.x);
  const u32 first = shares.start(blockIdx.x), count = shares.start(blockIdx.x + 1) - first;
  let_next_start();
  if (count == 0) return;
  for (int i = threadIdx.x; i < RING_SLOTS; i += NUM_THREADS) {
    init_barrier(shared.full + i, NUM_COPIERS);
    init_barrier(shared.empty + i, 1);
  }
  if (threadIdx.x == 0) *shared.next = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  __syncthreads();
  Item segment;
  segment.find(first, item_starts, num_heads, batch);
  if (warp == NUM_WARPS) {
    copy_items(args, shared, segment, first, count, lane);
    return;
  }

  wait_for_previous();
  auto take = [&]() {
    u32 taken = 0;
    if (lane == 0)
      asm volatile("atom.shared.add.u32 %0,[%1],1;" : "=r"(taken) : "r"(shared_address(shared.next)) : "memory");
    return __shfl_sync(~0u, taken, 0);
  };
  const KeyCodes key_codes;
  const ValueCodes value_codes;
  Softmax softmax;
  StoredQueries operands;
  u32 current = take();
  for (u32 begin = 0; begin < count;) {  // a segment, or what this thread block has of it
    segment.advance(first + begin, item_starts, num_heads);
    const u32 offset = first + begin - segment.start;
    const bool is_exact = offset < NUM_EXACT_TILES;
    const u32 end = min(count, begin + (is_exact ? NUM_EXACT_TILES : segment.count) - offset);
    softmax.reset();
    if (is_exact) {
      for (; current < end; current = take()) {
        wait_for_item(shared, current);  // nothing is in its place, but places keep their turns
        attend_exact(args, segment, current - begin + offset, lane, softmax);
        leave_item(shared, current, lane);
      }
    } else {
      operands.load(args, segment, lane);
      const int first_token = block_starts[segment.request] - 32 * (NUM_EXACT_TILES - (int)offset + (int)begin);
      const int hidden_end = first_visible[segment.request] - first_token;
      while (current < end) {
        const u32 next = take();
        attend_half(args, operands, key_codes, value_codes, wait_for_item(shared, current),
                    hidden_end - 32 * (int)current, lane, softmax);
        leave_item(shared, current, lane);
        current = next;
      }
    }
    write_warp(softmax, is_exact, lane, shared.found + warp * PARTIAL);
    CONSUMERS_MEET;
    const u32 segment_index = 2 * (segment.request * num_heads + segment.head) + !is_exact;
    float* partial = partials + (long long)(blockIdx.x + segment_index) * PARTIAL;
    for (int i = threadIdx.x; i < SUMS; i += 32 * NUM_WARPS) {
      const int head = i / VALUE_DIM;
      float reference = LOWEST, sum = 0, denominator = 0;
#pragma unroll
      for (int w = 0; w < NUM_WARPS; w++) reference = fmaxf(reference, shared.found[w * PARTIAL + SUMS + head]);
#pragma unroll
      for (int w = 0; w < NUM_WARPS; w++) {
        const float decay = exp2_(shared.found[w * PARTIAL + SUMS + head] - reference);
        sum += decay * shared.found[w * PARTIAL + i];
        denominator += decay * shared.found[w * PARTIAL + SUMS + GROUP + head];
      }
      partial[i] = is_exact ? sum : sum * value_unit;
      if (i % VALUE_DIM == 0) {
        partial[SUMS + head] = reference;
        partial[SUMS + GROUP + head] = denominator;
      }
    }
    CONSUMERS_MEET;
    begin = end;
  }
}

#include "around_decode.cuh"
