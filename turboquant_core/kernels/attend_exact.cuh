// Attention over tokens that lie as they came.

// What is a lane's of a row's 16 dimensions 16i to 16i + 15 and of the next 16, if there are any: two words of each. It
// lies together: of these 32 dimensions the first two words have 8t to 8t + 3, the others 8t + 4 to 8t + 7; of 16 alone
// they have 4t to 4t + 3.
DEVICE uint4 four_at(u32 address) { return load_four(address); }
DEVICE uint2 pair_at(u32 address) { return load_pair(address); }
DEVICE uint4 four_at(const u8* address) { return *(const uint4*)address; }
DEVICE uint2 pair_at(const u8* address) { return *(const uint2*)address; }
template <int TILES, typename Address>
DEVICE uint4 load_dims(Address row, int i, int t) {
  if (i + 1 < TILES) return four_at(row + 32 * i + 16 * t);
  const uint2 x = pair_at(row + 32 * i + 8 * t);
  return make_uint4(x.x, x.y, 0, 0);
}

// Those of a request and kv head.
struct ExactTokens {
  int position, start, first_visible;
  uint4 queries[NUM_COLS][(KEY_TILES + 1) / 2];
  uint4 new_key, new_value;  // of the new token, this lane's numbers

  DEVICE ExactTokens(const Arguments& args, const Item& item, int lane) {
    const int g = lane >> 2, t = lane & 3;
    position = args.positions[item.request];
    start = max(args.exact_starts[item.request], NUM_SINKS);
    first_visible = args.first_visible[item.request];
    const long long head = item.index(args.num_heads);
    if (args.new_keys && lane < KEY_DIM / 8) new_key = ((const uint4*)(args.new_keys + head * KEY_DIM))[lane];
    if (args.new_keys && lane < VALUE_DIM / 8) new_value = ((const uint4*)(args.new_values + head * VALUE_DIM))[lane];
    const u8* rows = (const u8*)(args.queries + head * GROUP * KEY_DIM);
#pragma unroll
    for (int n = 0; n < NUM_COLS; n++) {
      const int column = IS_SHARED ? min(g & 3, GROUP - 1) : min(8 * n + g, GROUP - 1);
#pragma unroll
      for (int q = 0; q < KEY_TILES; q += 2)
        queries[n][q / 2] = load_dims<KEY_TILES>(rows + column * KEY_ROW, q, t);
    }
  }

  // A tile. A new token is kept if it is in it, after it has been read from shared memory only.
  DEVICE void attend(const Arguments& args, int tile, int lane, Ring& turn, Feed& feed, Softmax& softmax) const {
    for (int first = 0; first < TILE; first += 16) attend_16(args, tile, first, lane, turn, feed, softmax);
    turn.release(feed, VALUE_PARTS, lane);
    const int place = newest_place();
    if (!args.new_keys || (u32)(place - TILE * tile) >= TILE) return;  // place / TILE != tile, without a register for it
    const long long row = args.first_place(feed.own.item) + place;
    if (lane < KEY_DIM / 8) ((uint4*)(args.exact_keys + row * KEY_DIM))[lane] = new_key;
    if (lane < VALUE_DIM / 8) ((uint4*)(args.exact_values + row * VALUE_DIM))[lane] = new_value;
  }

 private:
  // 16 tokens of a tile. Rows of the sums: see exact_dim.
  DEVICE void attend_16(const Arguments& args, int tile, int first, int lane, Ring& turn, Feed& feed,
                        Softmax& softmax) const {
    const int g = lane >> 2, t = lane & 3;
    u32 rows[2];
    wait_for<KEY_ROWS, KEY_ROW, false>(args, tile, first, lane, turn, new_key, rows);
    float scores[1][NUM_COLS][4] = {};
#pragma unroll
    for (int q = 0; q < KEY_TILES; q += 2) {
      const uint4 x = load_dims<KEY_TILES>(rows[0], q, t), y = load_dims<KEY_TILES>(rows[1], q, t);
      const u32 a[2][4] = {{x.x, y.x, x.y, y.y}, {x.z, y.z, x.w, y.w}};
#pragma unroll
      for (int n = 0; n < NUM_COLS; n++) {
        const uint4& b = queries[n][q / 2];
        multiply<IS_BFLOAT16>(scores[0][n], a[0], b.x, b.y);
        if (q + 1 < KEY_TILES) multiply<IS_BFLOAT16>(scores[0][n], a[1], b.z, b.w);
      }
    }
    if (!IS_TOGETHER) turn.release(feed, KEY_PARTS, lane);
    bool is_seen[2];  // what is not may be anything
#pragma unroll
    for (int r = 0; r < 2; r++) {
      is_seen[r] = sees(TILE * tile + first + token_of(g, r));
#pragma unroll
      for (int n = 0; n < NUM_COLS; n++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          float& score = scores[0][n][2 * r + c];
          score = is_seen[r] ? capped(score * args.scale, args.softcap) : HIDDEN;
        }
    }
    const float sizes[1][2] = {{0, 0}};
    softmax.raise<1>(scores, sizes);
    u32 b[NUM_COLS][2];
#pragma unroll
    for (int n = 0; n < NUM_COLS; n++) {
      float p[4];
#pragma unroll
      for (int c = 0; c < 4; c++) {
        p[c] = exp2_(scores[0][n][c] - softmax.reference[n][c & 1]);
        // Columns that hold the same heads a second time count nothing.
        if (IS_SHARED && t >= 2) p[c] = 0;
        softmax.denominator[n][c & 1] += p[c];
      }
      b[n][0] = transposed(to_exact_type(p[0], p[1]));
      b[n][1] = transposed(to_exact_type(p[2], p[3]));
    }
    wait_for<VALUE_ROWS, VALUE_ROW, true>(args, tile, first, lane, turn, new_value, rows);
#pragma unroll
    for (int i = 0; i < VALUE_TILES; i += 2) {
      uint4 x = load_dims<VALUE_TILES>(rows[0], i, t), y = load_dims<VALUE_TILES>(rows[1], i, t);
      if (!is_seen[0]) x = make_uint4(0, 0, 0, 0);
      if (!is_seen[1]) y = make_uint4(0, 0, 0, 0);
      const u32 a[2][4] = {{transposed(x.x), transposed(x.y), transposed(y.x), transposed(y.y)},
                           {transposed(x.z), transposed(x.w), transposed(y.z), transposed(y.w)}};
#pragma unroll
      for (int n = 0; n < NUM_COLS; n++) {
        multiply<IS_BFLOAT16>(softmax.sums[n][i], a[0], b[n][0], b[n][1]);
        if (i + 1 < VALUE_TILES) multiply<IS_BFLOAT16>(softmax.sums[n][i + 1], a[1], b[n][0], b[n][1]);
      }
    }
  }

  // Of a tile, the token of a lane's row r.
  static DEVICE int token_of(int g, int r) { return 4 * (g >> 1) + 2 * r + (g & 1); }
  DEVICE int newest_place() const {
    return position < NUM_SINKS ? position : NUM_SINKS + (position - NUM_SINKS) % RING_SIZE;
  }
  DEVICE bool sees(int place) const {
    const int in_ring = place - NUM_SINKS, newest = position - NUM_SINKS;
    int held = place;
    if (in_ring >= 0) {
      int age = (newest - in_ring) % RING_SIZE;
      if (age < 0) age += RING_SIZE;
      held = NUM_SINKS + newest - age;
    }
    return place < NUM_PLACES && held >= 0 && held <= position && held >= first_visible &&
           (in_ring < 0 || held >= start);
  }
  // Wait for the keys or values of 16 tokens. A new token's are put into their place, if it is one of them.
  template <int ROWS, int ROW_BYTES, bool ARE_VALUES>
  DEVICE void wait_for(const Arguments& args, int tile, int first, int lane, const Ring& turn, const uint4& news,
                       u32 (&rows)[2]) const {
    const int g = lane >> 2, newest = newest_place() - TILE * tile;
    u32 newest_row = 0;
#pragma unroll
    for (int part = 0; part < TILE / ROWS; part++) {
      const uint2 starts = turn.wait_for(part);
      const u32 start = IS_TOGETHER && ARE_VALUES ? starts.y : starts.x;
      auto find = [&](int token, u32& row) {
        if (token / ROWS == part) row = start + token % ROWS * ROW_BYTES;
      };
      find(first + token_of(g, 0), rows[0]);
      find(first + token_of(g, 1), rows[1]);
      find(newest, newest_row);
    }
    if (!args.new_keys || newest < first || newest >= first + 16) return;
    if (lane < ROW_BYTES / 16) store_four(newest_row + 16 * lane, news.x, news.y, news.z, news.w);
    order_stores_and_copies();
  }
};
