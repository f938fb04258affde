// What comes after attention: what thread blocks have found is joined. See merge_few.cuh, too.

// A segment, numbers `start` to `end`, and the partials that decode has written of it: see partial_of.
struct Parted {
  u32 end, owner;
  int first, count, segment;  // thread block; partials, if all were written
  DEVICE Parted() {}
  DEVICE Parted(const Shares& shares, const WorkStarts& work_starts, int request, int head, int num_heads, bool is_stored)
      : count(0), segment(2 * (request * num_heads + head) + is_stored) {
    const u32 work = work_starts[request + 1] - work_starts[request];
    const u32 its_start = work_starts[request] * num_heads + head * work;
    const u32 exact_end = its_start + min(work, (u32)EXACT_WORK);  // a row without a request has none
    const u32 start = is_stored ? exact_end : its_start;
    end = is_stored ? its_start + work : exact_end;
    if (start >= end) return;
    owner = shares.owner(start);
    first = owner / NUM_WARPS;
    count = shares.owner(end - 1) / NUM_WARPS - first + 2;
  }
  // Where the i-th is: of each thread block what its warps have left unfinished, and at last what finishes the
  // segment. -1: a thread block has left nothing.
  DEVICE int place(const Shares& shares, int i) const {
    const bool is_last = i == count - 1;
    const int thread_block = first + i - is_last;
    const bool is_written = is_last || shares.start(max(owner, (u32)thread_block * NUM_WARPS) + 1) < end;
    return is_written ? partial_of(thread_block, segment) + is_last : -1;
  }
};

// Four dimensions of what partials hold of a row, added up. Weights are relative to the reference.
struct Joined {
  float reference = LOWEST, denominator = 0;
  float4 exact = {}, stored = {};  // of exact tokens, of blocks
  DEVICE void raise(float highest) {
    const float decay = exp2_(reference - highest);
    reference = highest;
    denominator *= decay;
    scale(exact, decay);
    scale(stored, decay);
  }
  DEVICE void add_numbers(float weight, bool is_exact, const float4& numbers) {
    add(exact, is_exact ? weight : 0, numbers);
    add(stored, is_exact ? 0 : weight, numbers);
  }
};

// 16 rows in two parts of bfloat16 that add up. Rows lie so that 4 of them do not meet in a bank.
template <int DIM>
struct SharedRows {
  static constexpr bool HAS_REST = true;
  static constexpr int ROW = DIM / 2 + 8;
  u32 words[2][16][ROW];
  DEVICE void store(int row, int word, float even, float odd) {
    split(even, odd, words[0][row][word], words[1][row][word]);
  }
  DEVICE void load(int step, u32 (&a)[4], u32 (&left)[4]) const {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const uint2 x = *(const uint2*)&words[0][g + 8 * r][8 * step + 2 * t];
      const uint2 y = *(const uint2*)&words[1][g + 8 * r][8 * step + 2 * t];
      a[r] = x.x;
      a[2 + r] = x.y;
      left[r] = y.x;
      left[2 + r] = y.y;
    }
  }
};

// Of REQUESTS requests and a kv head. See `merge`.
template <int REQUESTS>
DEVICE void merge_requests(const float* partials, const WorkStarts& work_starts, const uint4* operands,
                           int operands_stride, const float* sink_scores, void* output, int batch, int num_heads,
                           int grid, float value_unit) {
  constexpr int WARPS = AROUND_THREADS / 32, ROWS = REQUESTS * GROUP, WORDS = VALUE_DIM / 2;
  // Four dimensions of a row are a thread's; of few rows each of PARTS parts of the threads adds up every PARTS-th
  // partial, AT_ONCE of which come together.
  constexpr int QUADS = VALUE_DIM / 4, ALL = ROWS * QUADS, MOST = ALL < AROUND_THREADS ? AROUND_THREADS / ALL : 1;
  constexpr int PARTS = MOST < 32 ? MOST : 32, AT_ONCE = 4;
  typedef Matrix<VALUE_DIM, WARPS> Transform;
  typedef float4 Found[PARTS][ROWS][QUADS];
  __shared__ __align__(8) SharedRows<VALUE_DIM> rows;
  __shared__ float references[PARTS][ROWS], denominators[PARTS][ROWS];
  __shared__ Parted segments[REQUESTS][2];  // exact tokens, blocks
  extern __shared__ __align__(16) u8 shared[];
  Found* found = (Found*)shared;            // of exact tokens, of blocks
  int* places = (int*)(found + 2);          // [REQUESTS][max_count]: of partials, those of exact tokens first
  const int max_count = 2 * (grid + 1);

  const int head = blockIdx.x % num_heads, first = blockIdx.x / num_heads * REQUESTS, thread = threadIdx.x;
  const Transform transform(operands + (long long)head * operands_stride);
  const int num_requests = min(REQUESTS, batch - first), num_rows = num_requests * GROUP;
  const Shares shares(work_starts[batch] * num_heads, grid * NUM_WARPS);
  if (thread < 2 * num_requests)
    segments[thread / 2][thread % 2] = Parted(shares, work_starts, first + thread / 2, head, num_heads, thread % 2);
  __syncthreads();
  auto count_of = [&](int r) { return segments[r][0].count + segments[r][1].count; };
  for (int r = 0; r < num_requests; r++) {
    const int num_exact = segments[r][0].count;
    for (int i = thread; i < count_of(r); i += AROUND_THREADS)
      places[r * max_count + i] =
          i < num_exact ? segments[r][0].place(shares, i) : segments[r][1].place(shares, i - num_exact);
  }
  wait_for_previous();
  __syncthreads();
  for (int index = thread; index < PARTS * ALL; index += AROUND_THREADS) {
    const int part = index / ALL, row = index % ALL / QUADS, quad = index % QUADS, r = row / GROUP, m = row % GROUP;
    if (row >= num_rows) continue;
    const int num_exact = segments[r][0].count, count = count_of(r), *its_places = places + r * max_count;
    Joined joined;
    for (int i = part; i < count; i += AT_ONCE * PARTS) {
      float weights[AT_ONCE], sums[AT_ONCE] = {}, highest = joined.reference;
      float4 numbers[AT_ONCE] = {};
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) {
        const int place = i + j * PARTS < count ? its_places[i + j * PARTS] : -1;
        const float* source = partials + (long long)place * PARTIAL;
        weights[j] = LOWEST;
        if (place < 0) continue;
        weights[j] = source[SUMS + m];
        sums[j] = source[SUMS + GROUP + m];
        numbers[j] = ((const float4*)source)[m * QUADS + quad];
      }
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) highest = fmaxf(highest, weights[j]);
      joined.raise(highest);
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) {
        const float weight = exp2_(weights[j] - joined.reference);
        joined.denominator += weight * sums[j];
        joined.add_numbers(weight, i + j * PARTS < num_exact, numbers[j]);
      }
    }
    found[0][part][row][quad] = joined.exact;
    found[1][part][row][quad] = joined.stored;
    if (quad == 0) {
      references[part][row] = joined.reference;
      denominators[part][row] = joined.denominator;
    }
  }
  __syncthreads();

  auto target = [&](int row, int word) -> u32& {
    const long long query_row = ((long long)(first + row / GROUP) * num_heads + head) * GROUP + row % GROUP;
    return ((u32*)output)[query_row * WORDS + word];
  };
  for (int i = thread; i < num_rows * WORDS; i += AROUND_THREADS) {  // other rows' products are not used
    const int row = i / WORDS, word = i % WORDS;
    const float sink = sink_scores ? sink_scores[head * GROUP + row % GROUP] * 1.44269504f : LOWEST;
    float highest = sink, denominator = 0;
    float2 exact = {}, stored = {};
#pragma unroll
    for (int p = 0; p < PARTS; p++) highest = fmaxf(highest, references[p][row]);
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
      const float weight = exp2_(references[p][row] - highest);
      const float2 x = ((const float2*)found[0][p][row])[word], y = ((const float2*)found[1][p][row])[word];
      denominator += weight * denominators[p][row];
      exact.x += weight * x.x;
      exact.y += weight * x.y;
      stored.x += weight * y.x;
      stored.y += weight * y.y;
    }
    if (sink_scores) denominator += exp2_(sink - highest);
    const float factor = denominator == 0 ? 0 : 1 / denominator, unit = factor * value_unit;
    if (IS_PLAIN) {
      target(row, word) = to_exact_type((exact.x + stored.x) * factor, (exact.y + stored.y) * factor);
      continue;
    }
    rows.store(row, word, stored.x * unit, stored.y * unit);
    ((float2*)found[0][0][row])[word] = make_float2(exact.x * factor, exact.y * factor);
  }
  if (IS_PLAIN) return;
  __syncthreads();
  const int g = thread % 32 / 4, t = thread % 4;
#pragma unroll
  for (int i = 0; i < Transform::OWN; i++) {
    const int tile = thread / 32 + i * WARPS, word = 4 * tile + t;
    if (tile >= Transform::TILES) break;
    float products[4];
    transform.multiply_rows(rows, i, products);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = g + 8 * r;
      if (row >= num_rows) continue;
      const float2 exact = ((const float2*)found[0][0][row])[word];
      target(row, word) = to_exact_type(exact.x + products[2 * r], exact.y + products[2 * r + 1]);
    }
  }
}

// A thread block for a kv head and one request, or MANY. operands: of the matrix [VALUE_DIM][VALUE_DIM] that stored
// values are multiplied with from the right, every operands_stride of a kv head. grid: of decode. value_unit: what sums
// of levels are to be multiplied with.
#define MERGE(NAME, REQUESTS)                                                                                        \
  extern "C" __global__ void __launch_bounds__(AROUND_THREADS, 1)                                                    \
      NAME(const float* partials, const int* before, int before_stride, const uint4* operands, int operands_stride,  \
           const float* sink_scores, void* output, int batch, int num_heads, int grid, float value_unit) {           \
    merge_requests<REQUESTS>(partials, {before, before_stride}, operands, operands_stride, sink_scores, output,      \
                             batch, num_heads, grid, value_unit);                                                    \
  }
MERGE(merge, 1)
MERGE(merge_many, MANY)
