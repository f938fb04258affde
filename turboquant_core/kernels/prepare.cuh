// What comes before attention: queries are transformed. And products of few rows with a matrix.

// A matrix [DIM][DIM] that 16 rows are multiplied with: in two parts of bfloat16, as `_operands` in cuda_decode.py
// orders them. Each of WARPS warps has every WARPS-th tile of 8 columns; its first is on its way from the start.
template <int DIM, int WARPS>
struct Matrix {
  static constexpr int TILES = DIM / 8, STEPS = DIM / 16, OWN = (TILES + WARPS - 1) / WARPS;
  const uint4* operands;
  uint4 first[STEPS];
  DEVICE Matrix(const uint4* matrix) : operands(matrix + (threadIdx.x & 31)) {
    const int tile = threadIdx.x >> 5;
#pragma unroll
    for (int step = 0; step < STEPS && !IS_PLAIN; step++)
      if (tile < TILES) first[step] = operands[(tile * STEPS + step) * 32];
  }
  // Rows g and g + 8, columns 2t and 2t + 1, of this warp's i-th tile. rows.load(step, a, rest) gives the A operand of
  // 16 numbers of each row, and what it has left of them.
  template <typename Rows>
  DEVICE void multiply_rows(const Rows& rows, int i, float (&product)[4]) const {
    const int tile = (threadIdx.x >> 5) + i * WARPS;
    float rest[4] = {}, rest_of_rows[4] = {};
#pragma unroll
    for (int c = 0; c < 4; c++) product[c] = 0;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const uint4 b = i == 0 ? first[step] : operands[(tile * STEPS + step) * 32];
      u32 a[4], left[4];
      rows.load(step, a, left);
      multiply<true>(product, a, b.x, b.y);
      multiply<true>(rest, a, b.z, b.w);
      if (Rows::HAS_REST) multiply<true>(rest_of_rows, left, b.x, b.y);
    }
#pragma unroll
    for (int c = 0; c < 4; c++) product[c] += rest[c] + rest_of_rows[c];
  }
};

// Two neighbours of a row in bfloat16, and what is left of them.
DEVICE void split(float even, float odd, u32& rounded, u32& left) {
  rounded = to_bfloats(even, odd);
  left = to_bfloats(even - __uint_as_float(rounded << 16), odd - __uint_as_float(rounded & 0xFFFF0000));
}

// Queries of up to 16 rows, in memory: GROUP rows for each kv head, `stride` kv heads apart.
struct QueryRows {
  static constexpr bool HAS_REST = !IS_BFLOAT16;
  const u16* queries;
  int first, stride, count;  // kv heads
  DEVICE bool has(int i) const { return i < count * GROUP; }
  DEVICE long long row(int i) const { return (first + (long long)(i / GROUP) * stride) * GROUP + i % GROUP; }
  DEVICE void load(int step, u32 (&a)[4], u32 (&left)[4]) const {
    const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
#pragma unroll
    for (int r = 0; r < 2; r++) {
      uint2 x = make_uint2(0, 0);
      if (has(g + 8 * r)) x = *(const uint2*)(queries + row(g + 8 * r) * KEY_DIM + 16 * step + 4 * t);
      a[r] = x.x;
      a[2 + r] = x.y;
      for (int i = r; i < 4 && HAS_REST; i += 2) split(half_to_float(a[i] & 0xFFFF), half_to_float(a[i] >> 16), a[i], left[i]);
    }
  }
};

// Of REQUESTS requests and a kv head: transform the queries and write them as 16-bit integers in two parts, for each
// query KEY_DIM upper bytes and then the lower ones, and what products with them are to be multiplied with. See `prepare`.
template <int REQUESTS>
DEVICE void prepare_requests(const void* queries, const uint4* operands, int operands_stride, u8* stored_bytes,
                             float* stored_scales, int batch, int num_heads, float scale) {
  constexpr int WARPS = AROUND_THREADS / 32;
  typedef Matrix<KEY_DIM, WARPS> Transform;
  __shared__ int peaks[16];  // of rows; as integers, non-negative numbers have the same order
  const int head = blockIdx.x % num_heads, first = blockIdx.x / num_heads * REQUESTS;
  const int warp = threadIdx.x >> 5, g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  const Transform transform(operands + (long long)head * operands_stride);
  if (threadIdx.x < 16) peaks[threadIdx.x] = 0;
  wait_for_previous();
  let_next_start();  // not before: it reads what the one before this one may have written
  const QueryRows rows = {(const u16*)queries, first * num_heads + head, num_heads, min(REQUESTS, batch - first)};
  __syncthreads();
  float products[Transform::OWN][4];
#pragma unroll
  for (int i = 0; i < Transform::OWN; i++) {
    if (warp + i * WARPS >= Transform::TILES) break;
    transform.multiply_rows(rows, i, products[i]);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float peak = fmaxf(fabsf(products[i][2 * r]), fabsf(products[i][2 * r + 1]));
      peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 1));
      peak = fmaxf(peak, __shfl_xor_sync(~0u, peak, 2));
      if (t == 0) atomicMax(&peaks[g + 8 * r], __float_as_int(peak));
    }
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < 2; r++) {
    if (!rows.has(g + 8 * r)) break;
    const long long row = rows.row(g + 8 * r);
    const float peak = __int_as_float(peaks[g + 8 * r]), factor = peak > 0 ? 1 / peak : 0;
    if (warp == 0 && t == 0) stored_scales[row] = peak * scale / (QUERY_PEAK * QUERY_UNIT);
#pragma unroll
    for (int i = 0; i < Transform::OWN; i++) {
      const int tile = warp + i * WARPS;
      if (tile >= Transform::TILES) break;
      const float even = products[i][2 * r] * factor, odd = products[i][2 * r + 1] * factor;
      const int integers[2] = {__float2int_rn(even * QUERY_PEAK), __float2int_rn(odd * QUERY_PEAK)};
      const int uppers[2] = {(integers[0] + 128) >> 8, (integers[1] + 128) >> 8};
      const int place = 2 * (tile & 1) + (t >> 1);  // among four of 4 numbers: a lane reads those of its own
      u8* target = stored_bytes + 2 * row * KEY_DIM + place * 4 * KEY_TILES + 4 * (tile >> 1) + 2 * (t & 1);
      *(u16*)target = (uppers[0] & 255) | uppers[1] << 8;
      *(u16*)(target + KEY_DIM) = (integers[0] & 255) | integers[1] << 8;
    }
  }
}

// A thread block for a kv head and one request, or MANY. operands: of the matrix [KEY_DIM][KEY_DIM] that queries
// are multiplied with from the right, every operands_stride of a head.
#define PREPARE(NAME, REQUESTS)                                                                                      \
  extern "C" __global__ void __launch_bounds__(AROUND_THREADS, 1)                                                    \
      NAME(const void* queries, const uint4* operands, int operands_stride, u8* stored_bytes, float* stored_scales,  \
           int batch, int num_heads, float scale) {                                                                  \
    prepare_requests<REQUESTS>(queries, operands, operands_stride, stored_bytes, stored_scales, batch, num_heads,    \
                               scale);                                                                               \
  }
PREPARE(prepare, 1)
PREPARE(prepare_many, MANY)
