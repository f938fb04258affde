// What comes before and after attention: the kernels prepare and merge of decode.cu.

constexpr int AROUND_THREADS = KEY_DIM > 128 || VALUE_DIM > 128 ? 256 : 512;
constexpr int MANY = GROUP >= 16 ? 1 : 16 / GROUP;  // requests of a thread block, where there are many

DEVICE float load_exact_type(const void* numbers, long long i) {
  const u16 bits = ((const u16*)numbers)[i];
  return IS_BFLOAT16 ? __uint_as_float((u32)bits << 16) : half_to_float(bits);
}

// The product of rows with a matrix [DIM][DIM]. A thread has a column and every PARTS-th number of it, the first
// of which are on their way from the start.
template <int DIM, int ROWS>
struct Product {
  static constexpr int PARTS = AROUND_THREADS / DIM, COUNT = (DIM + PARTS - 1) / PARTS, AT_ONCE = 16;
  static constexpr int PADDED_ROWS = (ROWS + 3) / 4 * 4;
  typedef float Rows[DIM][PADDED_ROWS];  // transposed, for wide reads
  typedef float Parts[PARTS][ROWS][DIM];
  const float* column;
  int part, dim;
  float factors[AT_ONCE];
  DEVICE Product(const float* matrix) : part(threadIdx.x / DIM), dim(threadIdx.x % DIM) {
    column = matrix + dim;
    if (part < PARTS && !IS_PLAIN) fetch(0);
  }
  DEVICE void fetch(int first) {
#pragma unroll
    for (int j = 0; j < AT_ONCE; j++) {
      const int k = part + (first + j) * PARTS;
      factors[j] = first + j < COUNT && k < DIM ? column[k * DIM] : 0;
    }
  }
  // Adds to `sums`, of this thread's column.
  DEVICE void add(const Rows& rows, float (&sums)[ROWS]) {
#pragma unroll 1
    for (int first = 0; first < COUNT; first += AT_ONCE) {
      if (first) fetch(first);
#pragma unroll
      for (int j = 0; j < AT_ONCE; j++) {
        if (first + j >= COUNT) break;
        const float4* row = (const float4*)rows[min(part + (first + j) * PARTS, DIM - 1)];
#pragma unroll
        for (int i = 0; i < ROWS; i += 4) {
          const float4 four = row[i / 4];
          const float numbers[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
          for (int n = 0; n < 4 && i + n < ROWS; n++) sums[i + n] += numbers[n] * factors[j];
        }
      }
    }
  }
  DEVICE void leave(const float (&sums)[ROWS], Parts& parts) const {
    if (part < PARTS)
#pragma unroll
      for (int i = 0; i < ROWS; i++) parts[part][i][dim] = sums[i];
    __syncthreads();
  }
  static DEVICE float total(const Parts& parts, int row, int dim) {
    float sum = 0;
#pragma unroll
    for (int p = 0; p < PARTS; p++) sum += parts[p][row][dim];
    return sum;
  }
};

// Of REQUESTS requests and a kv head. See `prepare`.
template <int REQUESTS>
DEVICE void prepare_requests(const void* queries, const void* keys, const void* values, const float* matrix,
                             int matrix_stride, void* exact_keys, void* exact_values, const int* slots,
                             const int* positions, u16* stored_queries, u8* stored_bytes, float* stored_scales,
                             int batch, int num_heads, float scale) {
  constexpr int ROWS = REQUESTS * GROUP;
  typedef Product<KEY_DIM, ROWS> Transform;
  __shared__ __align__(16) typename Transform::Rows rows;
  __shared__ typename Transform::Parts parts;
  const int head = blockIdx.x % num_heads, first = blockIdx.x / num_heads * REQUESTS, thread = threadIdx.x;
  Transform transform(matrix + (long long)head * matrix_stride);
  const int num_rows = min(REQUESTS, batch - first) * GROUP;
  auto row_of = [&](int i) {  // in memory
    return ((long long)(first + i / GROUP) * num_heads + head) * GROUP + i % GROUP;
  };
  for (int i = thread; i < ROWS * KEY_DIM; i += AROUND_THREADS) {
    const int row = i / KEY_DIM, dim = i % KEY_DIM;
    rows[dim][row] = row < num_rows ? load_exact_type(queries, row_of(row) * KEY_DIM + dim) : 0;
  }
  if (keys)
    for (int request = first; request < min(first + REQUESTS, batch); request++) {
      if (slots[request] < 0) continue;  // a row without a request
      const int position = positions[request];
      const int place = position < NUM_SINKS ? position : NUM_SINKS + (position - NUM_SINKS) % RING_SIZE;
      const long long source = (long long)request * num_heads + head;
      const long long target = ((long long)slots[request] * num_heads + head) * NUM_PLACES + place;
      if (thread < KEY_DIM)
        ((u16*)exact_keys)[target * KEY_DIM + thread] = ((const u16*)keys)[source * KEY_DIM + thread];
      if (thread < VALUE_DIM)
        ((u16*)exact_values)[target * VALUE_DIM + thread] = ((const u16*)values)[source * VALUE_DIM + thread];
    }
  if (IS_PLAIN) return;
  __syncthreads();
  float sums[ROWS] = {};
  if (transform.part < Transform::PARTS) transform.add(rows, sums);
  transform.leave(sums, parts);
  for (int i = thread >> 5; i < num_rows; i += AROUND_THREADS / 32) {
    float numbers[(KEY_DIM + 31) / 32], peak = 0;
#pragma unroll
    for (int j = 0; j < (KEY_DIM + 31) / 32; j++) {
      const int dim = (thread & 31) + 32 * j;
      numbers[j] = dim < KEY_DIM ? Transform::total(parts, i, dim) : 0;
      peak = fmaxf(peak, fabsf(numbers[j]));
    }
    for (int d = 1; d < 32; d <<= 1) peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, d));
    const float factor = peak > 0 ? 1 / peak : 0;
    const long long row = row_of(i);
#pragma unroll
    for (int j = 0; j < (KEY_DIM + 31) / 32; j++) {
      const int dim = (thread & 31) + 32 * j;
      if (dim >= KEY_DIM) break;
      const float number = numbers[j] * factor;
      stored_queries[row * KEY_DIM + dim] = (u16)to_halves(number, 0);
      const int integer = __float2int_rn(number * QUERY_PEAK), upper = (integer + 128) >> 8;
      stored_bytes[2 * row * KEY_DIM + dim] = (u8)upper;
      stored_bytes[(2 * row + 1) * KEY_DIM + dim] = (u8)(integer - 256 * upper);
    }
    if ((thread & 31) == 0) stored_scales[row] = peak * scale;
  }
}

// A thread block for a kv head and one request, or MANY. matrix: [1 or num_heads][KEY_DIM][KEY_DIM], what queries
// are multiplied with from the right. keys and values may be null: then nothing is kept.
#define PREPARE(NAME, REQUESTS)                                                                                      \
  extern "C" __global__ void __launch_bounds__(AROUND_THREADS, 1)                                                    \
      NAME(const void* queries, const void* keys, const void* values, const float* matrix, int matrix_stride,        \
           void* exact_keys, void* exact_values, const int* slots, const int* positions, u16* stored_queries,        \
           u8* stored_bytes, float* stored_scales, int batch, int num_heads, float scale) {                          \
    let_next_start();                                                                                                \
    prepare_requests<REQUESTS>(queries, keys, values, matrix, matrix_stride, exact_keys, exact_values, slots,        \
                               positions, stored_queries, stored_bytes, stored_scales, batch, num_heads, scale);     \
  }
PREPARE(prepare, 1)
PREPARE(prepare_many, MANY)

// Of REQUESTS requests and a kv head. See `merge`.
template <int REQUESTS>
DEVICE void merge_requests(const float* partials, const int* item_starts, const float* matrix, int matrix_stride,
                           const float* sink_scores, void* output, int batch, int num_heads, int grid) {
  constexpr int ROWS = REQUESTS * GROUP;
  typedef Product<VALUE_DIM, ROWS> Transform;
  __shared__ __align__(16) typename Transform::Rows rows;
  __shared__ typename Transform::Parts parts;
  __shared__ float denominators[ROWS];
  __shared__ int exact_begins[REQUESTS], exact_counts[REQUESTS], stored_begins[REQUESTS], counts[REQUESTS];
  extern __shared__ float weights[];  // [ROWS][2 * grid]
  const int head = blockIdx.x % num_heads, first = blockIdx.x / num_heads * REQUESTS, thread = threadIdx.x;
  Transform transform(matrix + (long long)head * matrix_stride);
  const int num_requests = min(REQUESTS, batch - first), lane = thread & 31;
  const Shares shares((u32)item_starts[batch] * num_heads, grid);
  if (thread < num_requests) {
    const int request = first + thread, segment = 2 * (request * num_heads + head);
    const u32 count = item_starts[request + 1] - item_starts[request];
    const u32 start = (u32)item_starts[request] * num_heads + head * count;
    // Partials of the exact tokens, then of the blocks, each of thread blocks that follow each other. A row
    // without a request has none.
    exact_begins[thread] = exact_counts[thread] = 0;
    if (count > 0) {
      exact_begins[thread] = shares.owner(start) + segment;
      exact_counts[thread] = shares.owner(start + NUM_EXACT_TILES - 1) - shares.owner(start) + 1;
    }
    counts[thread] = exact_counts[thread];
    if (count > NUM_EXACT_TILES) {
      const u32 owner = shares.owner(start + NUM_EXACT_TILES);
      stored_begins[thread] = owner + segment + 1;
      counts[thread] += shares.owner(start + count - 1) - owner + 1;
    }
  }
  wait_for_previous();
  __syncthreads();
  auto partial = [&](int r, int i) {
    const int at = i < exact_counts[r] ? exact_begins[r] + i : stored_begins[r] + i - exact_counts[r];
    return partials + (long long)at * PARTIAL;
  };
  for (int row = thread >> 5; row < num_requests * GROUP; row += AROUND_THREADS / 32) {
    const int r = row / GROUP, m = row % GROUP;
    const float sink = sink_scores ? sink_scores[head * GROUP + m] * 1.44269504f : LOWEST;
    float reference = sink, denominator = 0, *weight = weights + row * 2 * grid;
    for (int i = lane; i < counts[r]; i += 32) {
      weight[i] = partial(r, i)[SUMS + m];
      reference = fmaxf(reference, weight[i]);
    }
    for (int d = 1; d < 32; d <<= 1) reference = fmaxf(reference, __shfl_xor_sync(~0u, reference, d));
    for (int i = lane; i < counts[r]; i += 32) {
      weight[i] = exp2_(weight[i] - reference);
      denominator += weight[i] * partial(r, i)[SUMS + GROUP + m];
    }
    for (int d = 1; d < 32; d <<= 1) denominator += __shfl_xor_sync(~0u, denominator, d);
    if (lane == 0) denominators[row] = denominator + (sink_scores ? exp2_(sink - reference) : 0);
  }
  __syncthreads();
  float exact[ROWS] = {}, stored[ROWS] = {};
  if (transform.part < Transform::PARTS)
#pragma unroll
    for (int r = 0; r < REQUESTS; r++) {
      if (r >= num_requests) break;
      for (int i = transform.part; i < exact_counts[r]; i += Transform::PARTS)
#pragma unroll
        for (int m = 0; m < GROUP; m++)
          exact[r * GROUP + m] += weights[(r * GROUP + m) * 2 * grid + i] * partial(r, i)[m * VALUE_DIM + transform.dim];
#pragma unroll 2
      for (int i = exact_counts[r] + transform.part; i < counts[r]; i += Transform::PARTS)
#pragma unroll
        for (int m = 0; m < GROUP; m++)
          stored[r * GROUP + m] += weights[(r * GROUP + m) * 2 * grid + i] * partial(r, i)[m * VALUE_DIM + transform.dim];
    }
  if (IS_PLAIN) {
#pragma unroll
    for (int row = 0; row < ROWS; row++) exact[row] += stored[row];
  } else {
    transform.leave(stored, parts);
    for (int i = thread; i < ROWS * VALUE_DIM; i += AROUND_THREADS)
      rows[i % VALUE_DIM][i / VALUE_DIM] = Transform::total(parts, i / VALUE_DIM, i % VALUE_DIM);
    __syncthreads();
    if (transform.part < Transform::PARTS) transform.add(rows, exact);
  }
  transform.leave(exact, parts);
  for (int i = thread; i < num_requests * SUMS; i += AROUND_THREADS) {
    const int row = i / VALUE_DIM, dim = i % VALUE_DIM;
    const long long target = ((long long)(first + row / GROUP) * num_heads + head) * GROUP + row % GROUP;
    const float denominator = denominators[row];
    const float number = denominator == 0 ? 0 : Transform::total(parts, row, dim) / denominator;
    ((u16*)output)[target * VALUE_DIM + dim] = (u16)to_exact_type(number, 0);
  }
}

// A thread block for a kv head and one request, or MANY. matrix: [1 or num_heads][VALUE_DIM][VALUE_DIM], what
// stored values are multiplied with from the right. grid: of decode; a request has at most two partials of each
// of its thread blocks.
#define MERGE(NAME, REQUESTS)                                                                                        \
  extern "C" __global__ void __launch_bounds__(AROUND_THREADS, 1)                                                    \
      NAME(const float* partials, const int* item_starts, const float* matrix, int matrix_stride,                    \
           const float* sink_scores, void* output, int batch, int num_heads, int grid) {                             \
    merge_requests<REQUESTS>(partials, item_starts, matrix, matrix_stride, sink_scores, output, batch, num_heads,    \
                             grid);                                                                                  \
  }
MERGE(merge, 1)
MERGE(merge_many, MANY)
