// Attention over tokens that lie as they came.

// Keep a new token if its place is in one of these tiles, before they are read: no other warp reads it.
DEVICE void keep_newest(const Arguments& args, const Item& item, int first_tile, int end_tile, int lane) {
  const int position = args.positions[item.request], in_ring = position - NUM_SINKS;
  const int place = in_ring < 0 ? position : NUM_SINKS + in_ring % RING_SIZE;
  if (!args.new_keys || place / 16 < first_tile || place / 16 >= end_tile) return;
  const long long source = (long long)item.request * args.num_heads + item.head;
  const long long target = ((long long)args.slots[item.request] * args.num_heads + item.head) * NUM_PLACES + place;
  for (int i = 4 * lane; i < max(KEY_DIM, VALUE_DIM); i += 128) {
    uint2 key, value;
    if (i < KEY_DIM) key = *(const uint2*)(args.new_keys + source * KEY_DIM + i);
    if (i < VALUE_DIM) value = *(const uint2*)(args.new_values + source * VALUE_DIM + i);
    if (i < KEY_DIM) *(uint2*)(args.exact_keys + target * KEY_DIM + i) = key;
    if (i < VALUE_DIM) *(uint2*)(args.exact_values + target * VALUE_DIM + i) = value;
  }
  __syncwarp();
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

  // Values are on their way while the keys are multiplied. What is not seen may be anything.
  uint2 values[2][VALUE_TILES];
#pragma unroll
  for (int r = 0; r < 2; r++)
#pragma unroll
    for (int q = 0; q < VALUE_TILES; q++) {
      values[r][q] = make_uint2(0, 0);
      if (is_seen[r]) values[r][q] = *(const uint2*)(args.exact_values + row[r] * VALUE_DIM + 16 * q + 4 * t);
    }
  float scores[2][NUM_COLS][4] = {};  // [0] is used
  const u16* queries = args.queries + ((long long)item.request * args.num_heads + item.head) * GROUP * KEY_DIM;
#pragma unroll
  for (int q = 0; q < KEY_TILES; q++) {
    const uint2 x = *(const uint2*)(args.exact_keys + row[0] * KEY_DIM + 16 * q + 4 * t);
    const uint2 y = *(const uint2*)(args.exact_keys + row[1] * KEY_DIM + 16 * q + 4 * t);
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
#pragma unroll
  for (int q = 0; q < VALUE_TILES; q++) {
    const uint2 x = values[0][q], y = values[1][q];
    const u32 a[4] = {transposed(x.x), transposed(x.y), transposed(y.x), transposed(y.y)};
#pragma unroll
    for (int n = 0; n < NUM_COLS; n++) multiply<IS_BFLOAT16>(softmax.sums[n][q], a, b[n][0], b[n][1]);
  }
}
