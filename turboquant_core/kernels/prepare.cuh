// What comes before attention, the kernel prepare of decode.cu; and products of few rows with a matrix.

DEVICE float from_exact_type(u32 bits) { return IS_BFLOAT16 ? __uint_as_float(bits << 16) : half_to_float(bits); }

// 16 rows in bfloat16, in PARTS that add up. Rows lie so that 8 of them do not meet in a bank.
template <int DIM, int PARTS>
struct Rows {
  static constexpr int ROW = DIM / 2 + 4;
  u32 words[PARTS][16][ROW];
  // Two neighbours of a row.
  DEVICE void store(int row, int word, float even, float odd) {
#pragma unroll
    for (int p = 0; p < PARTS; p++) {
      const u32 rounded = to_bfloats(even, odd);
      words[p][row][word] = rounded;
      even -= __uint_as_float(rounded << 16);
      odd -= __uint_as_float(rounded & 0xFFFF0000);
    }
  }
  DEVICE void load(int part, int step, int lane, u32 (&a)[4]) const {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = words[part][g + 8 * (i % 2)][8 * step + t + 4 * (i / 2)];
  }
};

// A matrix [DIM][DIM] that rows are multiplied with: in two parts of bfloat16, as `_operands` in cuda_decode.py
// orders them. A warp has every NUM_WARPS_AROUND-th tile of 8 columns; its first is on its way from the start.
constexpr int NUM_WARPS_AROUND = AROUND_THREADS / 32;
template <int DIM>
struct Matrix {
  static constexpr int TILES = DIM / 8, STEPS = DIM / 16, OWN = (TILES + NUM_WARPS_AROUND - 1) / NUM_WARPS_AROUND;
  const uint4* operands;
  uint4 first[STEPS];
  DEVICE Matrix(const uint4* matrix) : operands(matrix + (threadIdx.x & 31)) {
    const int tile = threadIdx.x >> 5;
#pragma unroll
    for (int step = 0; step < STEPS && !IS_PLAIN; step++)
      if (tile < TILES) first[step] = operands[(tile * STEPS + step) * 32];
  }
  // Rows g and g + 8, columns 2t and 2t + 1, of this warp's i-th tile.
  template <int PARTS>
  DEVICE void multiply_rows(const Rows<DIM, PARTS>& rows, int i, float (&product)[4]) const {
    const int tile = (threadIdx.x >> 5) + i * NUM_WARPS_AROUND, lane = threadIdx.x & 31;
    float rest[4] = {};
#pragma unroll
    for (int c = 0; c < 4; c++) product[c] = 0;
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const uint4 b = i == 0 ? first[step] : operands[(tile * STEPS + step) * 32];
      u32 a[4];
      rows.load(0, step, lane, a);
      multiply<true>(product, a, b.x, b.y);
      multiply<true>(rest, a, b.z, b.w);
      if (PARTS > 1) {
        rows.load(PARTS - 1, step, lane, a);
        multiply<true>(rest, a, b.x, b.y);
      }
    }
#pragma unroll
    for (int c = 0; c < 4; c++) product[c] += rest[c];
  }
};

// Of REQUESTS requests and a kv head. See `prepare`.
template <int REQUESTS>
DEVICE void prepare_requests(const void* queries, const void* keys, const void* values, const uint4* operands,
                             int operands_stride, void* exact_keys, void* exact_values, const int* slots,
                             const int* positions, u16* stored_queries, u8* stored_bytes, float* stored_scales,
                             int batch, int num_heads, float scale) {
  typedef Matrix<KEY_DIM> Transform;
  __shared__ Rows<KEY_DIM, IS_BFLOAT16 ? 1 : 2> rows;
  __shared__ int peaks[16];  // of rows; as integers, non-negative numbers have the same order
  const int head = blockIdx.x % num_heads, first = blockIdx.x / num_heads * REQUESTS, thread = threadIdx.x;
  const Transform transform(operands + (long long)head * operands_stride);
  if (thread < 16) peaks[thread] = 0;
  wait_for_previous();
  let_next_start();  // not before: it reads what the one before this one may have written
  const int num_requests = min(REQUESTS, batch - first);
  auto row_of = [&](int i) {  // in memory
    return ((long long)(first + i / GROUP) * num_heads + head) * GROUP + i % GROUP;
  };
  constexpr int KEY_WORDS = KEY_DIM / 2, VALUE_WORDS = VALUE_DIM / 2, WORDS = KEY_WORDS + VALUE_WORDS;
  for (int i = thread; i < 16 * KEY_WORDS && !IS_PLAIN; i += AROUND_THREADS) {
    const int row = i / KEY_WORDS, word = i % KEY_WORDS;
    const u32 pair = row < num_requests * GROUP ? ((const u32*)queries)[row_of(row) * KEY_WORDS + word] : 0;
    rows.store(row, word, from_exact_type(pair & 0xFFFF), from_exact_type(pair >> 16));
  }
  for (int i = thread; keys && i < num_requests * WORDS; i += AROUND_THREADS) {
    const int request = first + i / WORDS, word = i % WORDS, slot = slots[request], position = positions[request];
    if (slot < 0) continue;  // a row without a request
    const int place = position < NUM_SINKS ? position : NUM_SINKS + (position - NUM_SINKS) % RING_SIZE;
    const long long source = (long long)request * num_heads + head;
    const long long target = ((long long)slot * num_heads + head) * NUM_PLACES + place;
    if (word < KEY_WORDS)
      ((u32*)exact_keys)[target * KEY_WORDS + word] = ((const u32*)keys)[source * KEY_WORDS + word];
    else
      ((u32*)exact_values)[target * VALUE_WORDS + word - KEY_WORDS] =
          ((const u32*)values)[source * VALUE_WORDS + word - KEY_WORDS];
  }
  if (IS_PLAIN) return;
  __syncthreads();
  const int warp = thread >> 5, g = (thread & 31) >> 2, t = thread & 3;
  float products[Transform::OWN][4];
#pragma unroll
  for (int i = 0; i < Transform::OWN; i++) {
    if (warp + i * NUM_WARPS_AROUND >= Transform::TILES) break;
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
    if (g + 8 * r >= num_requests * GROUP) break;
    const long long row = row_of(g + 8 * r);
    const float peak = __int_as_float(peaks[g + 8 * r]), factor = peak > 0 ? 1 / peak : 0;
    if (warp == 0 && t == 0) stored_scales[row] = peak * scale;
#pragma unroll
    for (int i = 0; i < Transform::OWN; i++) {
      const int tile = warp + i * NUM_WARPS_AROUND, dim = 8 * tile + 2 * t;
      if (tile >= Transform::TILES) break;
      const float even = products[i][2 * r] * factor, odd = products[i][2 * r + 1] * factor;
      *(u32*)(stored_queries + row * KEY_DIM + dim) = to_halves(even, odd);
      const int integers[2] = {__float2int_rn(even * QUERY_PEAK), __float2int_rn(odd * QUERY_PEAK)};
      const int uppers[2] = {(integers[0] + 128) >> 8, (integers[1] + 128) >> 8};
      *(u16*)(stored_bytes + 2 * row * KEY_DIM + dim) = (uppers[0] & 255) | uppers[1] << 8;
      *(u16*)(stored_bytes + (2 * row + 1) * KEY_DIM + dim) = (integers[0] & 255) | integers[1] << 8;
    }
  }
}

// A thread block for a kv head and one request, or MANY. operands: of the matrix [KEY_DIM][KEY_DIM] that queries
// are multiplied with from the right, every operands_stride of a head. keys and values may be null: then nothing is
// kept.
#define PREPARE(NAME, REQUESTS)                                                                                      \
  extern "C" __global__ void __launch_bounds__(AROUND_THREADS, 1)                                                    \
      NAME(const void* queries, const void* keys, const void* values, const uint4* operands, int operands_stride,    \
           void* exact_keys, void* exact_values, const int* slots, const int* positions, u16* stored_queries,        \
           u8* stored_bytes, float* stored_scales, int batch, int num_heads, float scale) {                          \
    prepare_requests<REQUESTS>(queries, keys, values, operands, operands_stride, exact_keys, exact_values, slots,    \
                               positions, stored_queries, stored_bytes, stored_scales, batch, num_heads, scale);     \
  }
PREPARE(prepare, 1)
PREPARE(prepare_many, MANY)
