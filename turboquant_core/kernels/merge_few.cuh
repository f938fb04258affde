// What comes after attention where there are few requests: a thread block for each request and query head. Arguments
// are those of merge_requests. Every instruction of it is waited for: what can be done before, is, while other thread
// blocks of decode still work, and what several partials hold comes at once.

// A row of numbers in two parts of bfloat16, as row 0 of 16; the others are not used.
struct __align__(8) OneRow {
  static constexpr bool HAS_REST = true;
  u32 words[2][VALUE_DIM / 2];
  DEVICE void load(int step, u32 (&a)[4], u32 (&left)[4]) const {
    const uint2 x = *(const uint2*)&words[0][8 * step + 2 * (threadIdx.x & 3)];
    const uint2 y = *(const uint2*)&words[1][8 * step + 2 * (threadIdx.x & 3)];
    a[0] = x.x;
    a[2] = x.y;
    left[0] = y.x;
    left[2] = y.y;
    a[1] = a[3] = left[1] = left[3] = 0;
  }
};

extern "C" __global__ void __launch_bounds__(AROUND_THREADS, 1)
    merge_few(const float* partials, const int* before, int before_stride, const uint4* operands, int operands_stride,
              const float* sink_scores, void* output, int batch, int num_heads, int grid, float value_unit) {
  constexpr int WARPS = AROUND_THREADS / 32, LANES = VALUE_DIM / 4, WORDS = VALUE_DIM / 2;
  // Each of PARTS parts of the threads adds up every PARTS-th partial, AT_ONCE of a chunk.
  constexpr int MOST = AROUND_THREADS / LANES, PARTS = MOST >= 32 ? 32 : MOST >= 16 ? 16 : MOST >= 8 ? 8 : 4;
  constexpr int AT_ONCE = 4, CHUNK = PARTS * AT_ONCE, LOADS = (CHUNK + 31) / 32;
  typedef Matrix<VALUE_DIM, WARPS> Transform;
  __shared__ float4 found[2][PARTS][LANES];  // of exact tokens, of blocks
  __shared__ OneRow row;
  __shared__ float2 exact_sums[WORDS];
  __shared__ Parted segments[2];
  extern __shared__ int places[];  // of partials, in numbers, those of exact tokens first; less than 0: there is none

  const WorkStarts work_starts = {before, before_stride};
  const int request = blockIdx.x / (num_heads * GROUP), query_head = blockIdx.x % (num_heads * GROUP);
  const int head = query_head / GROUP, m = query_head % GROUP, thread = threadIdx.x, lane = thread & 31;
  const int part = thread / LANES, own = thread % LANES;
  const Transform transform(operands + (long long)head * operands_stride);
  const Shares shares(work_starts[batch] * num_heads, grid * NUM_WARPS);
  if (thread < 2) segments[thread] = Parted(shares, work_starts, request, head, num_heads, thread);
  __syncthreads();
  const int num_exact = segments[0].count, count = num_exact + segments[1].count;
  for (int i = thread; i < (count + CHUNK - 1) / CHUNK * CHUNK; i += AROUND_THREADS) {
    const int place = i < num_exact ? segments[0].place(shares, i)
                      : i < count   ? segments[1].place(shares, i - num_exact)
                                    : -1;
    places[i] = PARTIAL * place;
  }
  __syncthreads();
  const float* references = partials + SUMS + m;
  const float4* sums = (const float4*)(partials + m * VALUE_DIM) + own;
  Joined joined;
  for (int first = 0; first < count; first += CHUNK) {
    int at[AT_ONCE], at_of_lane[LOADS];
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) at[j] = part < PARTS ? places[first + part + j * PARTS] : -1;
#pragma unroll
    for (int j = 0; j < LOADS; j++) at_of_lane[j] = 32 * j + lane < CHUNK ? places[first + 32 * j + lane] : -1;
    wait_for_previous();  // at once but the first time
    float weights[LOADS], denominators[LOADS], highest = joined.reference;
#pragma unroll
    for (int j = 0; j < LOADS; j++) {
      weights[j] = at_of_lane[j] < 0 ? LOWEST : references[at_of_lane[j]];
      denominators[j] = at_of_lane[j] < 0 ? 0 : references[at_of_lane[j] + GROUP];
    }
    float4 numbers[AT_ONCE] = {};
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++)
      if (at[j] >= 0) numbers[j] = sums[at[j] / 4];
#pragma unroll
    for (int j = 0; j < LOADS; j++) highest = fmaxf(highest, weights[j]);
    for (int d = 1; d < 32; d <<= 1) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, d));
    joined.raise(highest);
#pragma unroll
    for (int j = 0; j < LOADS; j++) {
      weights[j] = exp2_(weights[j] - joined.reference);
      joined.denominator += weights[j] * denominators[j];
    }
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      const int i = j * PARTS;
      const float weight = __shfl_sync(~0u, weights[i / 32], i % 32 + part % PARTS);
      joined.add_numbers(weight, first + part + i < num_exact, numbers[j]);
    }
  }
  wait_for_previous();
  for (int d = 1; d < 32; d <<= 1) joined.denominator += __shfl_xor_sync(~0u, joined.denominator, d);
  if (sink_scores) {
    const float sink = sink_scores[query_head] * 1.44269504f;
    joined.raise(fmaxf(joined.reference, sink));
    joined.denominator += exp2_(sink - joined.reference);
  }
  const float factor = joined.denominator == 0 ? 0 : 1 / joined.denominator;
  scale(joined.exact, factor);
  scale(joined.stored, factor * value_unit);
  if (part < PARTS) {
    found[0][part][own] = joined.exact;
    found[1][part][own] = joined.stored;
  }
  __syncthreads();
  auto total = [&](int which, int word) {
    float2 sum = {};
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
      const float2 x = ((const float2*)found[which][p])[word];
      sum.x += x.x;
      sum.y += x.y;
    }
    return sum;
  };
  u32* target = (u32*)output + (long long)blockIdx.x * WORDS;
  if (thread < WORDS) {
    const float2 sum = total(1, thread);
    if (IS_PLAIN) {
      const float2 exact_sum = total(0, thread);
      target[thread] = to_exact_type(exact_sum.x + sum.x, exact_sum.y + sum.y);
    } else {
      split(sum.x, sum.y, row.words[0][thread], row.words[1][thread]);
    }
  } else if (thread < 2 * WORDS && !IS_PLAIN) {
    exact_sums[thread - WORDS] = total(0, thread - WORDS);
  }
  if (IS_PLAIN) return;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Transform::OWN; i++) {
    const int tile = (thread >> 5) + i * WARPS, word = 4 * tile + lane;
    if (tile >= Transform::TILES) break;
    float products[4];
    transform.multiply_rows(row, i, products);
    if (lane < 4) target[word] = to_exact_type(exact_sums[word].x + products[0], exact_sums[word].y + products[1]);
  }
}
