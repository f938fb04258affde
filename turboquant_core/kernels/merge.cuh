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
  constexpr int ROWS = REQUESTS * GROUP, PARTS = AROUND_THREADS / VALUE_DIM;
  constexpr int WARPS = AROUND_THREADS / 32;
  typedef Matrix<VALUE_DIM, WARPS> Transform;
  // Of one request each part of the threads adds up some partials, of many all those of some requests.
  constexpr int NUM_FOUND = REQUESTS == 1 ? PARTS : 1, STEP = NUM_FOUND;
  __shared__ __align__(8) SharedRows<VALUE_DIM> rows;
  __shared__ float denominators[ROWS];
  __shared__ Parted segments[REQUESTS][2];  // exact tokens, blocks
  typedef float Found[NUM_FOUND][ROWS][VALUE_DIM];
  extern __shared__ float shared[];         // two Found, weights, places
  Found* found = (Found*)shared;
  const int max_count = 2 * (grid + 1);
  float* weights = shared + 2 * NUM_FOUND * ROWS * VALUE_DIM;  // [ROWS][max_count]
  int* places = (int*)(weights + ROWS * max_count);            // [REQUESTS][max_count]

  const int head = blockIdx.x % num_heads, first = blockIdx.x / num_heads * REQUESTS, thread = threadIdx.x;
  const Transform transform(operands + (long long)head * operands_stride);
  const int part_of_threads = thread / VALUE_DIM, own_dim = thread % VALUE_DIM;
  const int num_requests = min(REQUESTS, batch - first), lane = thread & 31;
  const Shares shares(work_starts[batch] * num_heads, grid * NUM_WARPS);
  if (thread < 2 * num_requests)
    segments[thread / 2][thread % 2] = Parted(shares, work_starts, first + thread / 2, head, num_heads, thread % 2);
  __syncthreads();
  auto count_of = [&](int r) { return segments[r][0].count + segments[r][1].count; };
  for (int j = thread; j < num_requests * max_count; j += AROUND_THREADS) {
    const int r = j / max_count, i = j % max_count, num_exact = segments[r][0].count;
    places[j] = i < num_exact     ? segments[r][0].place(shares, i)
                : i < count_of(r) ? segments[r][1].place(shares, i - num_exact)
                                  : -1;
  }
  wait_for_previous();
  __syncthreads();
  auto partial = [&](int r, int i) -> const float* {  // those of exact tokens first; null: there is none
    const int place = i < max_count ? places[r * max_count + i] : -1;
    return place < 0 ? nullptr : partials + (long long)place * PARTIAL;
  };
  constexpr int AT_ONCE = GROUP <= 4 ? 8 : GROUP <= 8 ? 4 : 1;
  const int part = REQUESTS == 1 ? part_of_threads : 0, own = REQUESTS == 1 ? 0 : part_of_threads;
  float numbers[AT_ONCE][GROUP];
  auto fetch = [&](int r, int i) {
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      const float* source = partial(r, i + j * STEP);
#pragma unroll
      for (int m = 0; m < GROUP; m++)
        numbers[j][m] = source ? source[m * VALUE_DIM + own_dim] : 0;
    }
  };
  const bool adds = part_of_threads < PARTS;
  if (adds && own < num_requests) fetch(own, part);  // on their way while they get their weights

  for (int row = thread >> 5; row < num_requests * GROUP; row += WARPS) {
    const int r = row / GROUP, m = row % GROUP;
    float reference = LOWEST, denominator = 0, *weight = weights + row * max_count;
    for (int i = lane; i < count_of(r); i += 32) {
      const float* source = partial(r, i);
      const float its = source ? source[SUMS + m] : LOWEST, sum = source ? source[SUMS + GROUP + m] : 0;
      const float higher = fmaxf(reference, its);
      denominator = denominator * exp2_(reference - higher) + sum * exp2_(its - higher);
      reference = higher;
      weight[i] = its;
    }
    const float sink = sink_scores ? sink_scores[head * GROUP + m] * 1.44269504f : LOWEST;
    float highest = fmaxf(reference, sink);
    for (int d = 1; d < 32; d <<= 1) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, d));
    denominator *= exp2_(reference - highest);
    for (int d = 1; d < 32; d <<= 1) denominator += __shfl_xor_sync(~0u, denominator, d);
    if (lane == 0) denominators[row] = denominator + (sink_scores ? exp2_(sink - highest) : 0);
    for (int i = lane; i < count_of(r); i += 32)
      weight[i] = exp2_(weight[i] - highest) * (i < segments[r][0].count ? 1 : value_unit);
  }
  __syncthreads();

  for (int r = own; adds && r < num_requests; r += REQUESTS == 1 ? 1 : PARTS) {
    float exact[GROUP] = {}, stored[GROUP] = {};
    const int count = count_of(r), num_exact = segments[r][0].count;
    for (int i = part; i < count; i += AT_ONCE * STEP) {
      if (r != own || i != part) fetch(r, i);
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) {
        const int at = i + j * STEP;
        if (at >= count) break;
        const bool is_exact = at < num_exact;
#pragma unroll
        for (int m = 0; m < GROUP; m++) {
          const float product = weights[(r * GROUP + m) * max_count + at] * numbers[j][m];
          exact[m] += is_exact ? product : 0;
          stored[m] += is_exact ? 0 : product;
        }
      }
    }
#pragma unroll
    for (int m = 0; m < GROUP; m++) {
      found[0][part][r * GROUP + m][own_dim] = exact[m];
      found[1][part][r * GROUP + m][own_dim] = stored[m];
    }
  }
  __syncthreads();
  constexpr int WORDS = VALUE_DIM / 2;
  auto total = [&](int which, int row, int dim) {
    float sum = 0;
#pragma unroll
    for (int p = 0; p < NUM_FOUND; p++) sum += found[which][p][row][dim];
    return sum;
  };
  auto write = [&](int row, int dim, float even, float odd) {
    const long long target = ((long long)(first + row / GROUP) * num_heads + head) * GROUP + row % GROUP;
    const float denominator = denominators[row], factor = denominator == 0 ? 0 : 1 / denominator;
    ((u32*)output)[(target * VALUE_DIM + dim) / 2] = to_exact_type(even * factor, odd * factor);
  };
  const int num_rows = num_requests * GROUP;
  for (int i = thread; i < 16 * WORDS; i += AROUND_THREADS) {
    const int row = i / WORDS, dim = 2 * (i % WORDS);
    const float even = row < num_rows ? total(1, row, dim) : 0, odd = row < num_rows ? total(1, row, dim + 1) : 0;
    if (!IS_PLAIN)
      rows.store(row, dim / 2, even, odd);
    else if (row < num_rows)
      write(row, dim, total(0, row, dim) + even, total(0, row, dim + 1) + odd);
  }
  if (IS_PLAIN) return;
  __syncthreads();
  const int warp = thread >> 5, g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int i = 0; i < Transform::OWN; i++) {
    const int tile = warp + i * WARPS, dim = 8 * tile + 2 * t;
    if (tile >= Transform::TILES) break;
    float products[4];
    transform.multiply_rows(rows, i, products);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const int row = g + 8 * r;
      if (row < num_rows)
        write(row, dim, total(0, row, dim) + products[2 * r], total(0, row, dim + 1) + products[2 * r + 1]);
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
