// Attention over half a block, in shared memory.

// Products of a mean of keys, from the words of this lane, with the queries of its columns, up to their scale.
DEVICE void key_mean_products(const StoredQueries& queries, u32 words, int t, float (&products)[NUM_COLS][2]) {
  u32 bytes[KEY_TILES];
  load_row(bytes, words);
  int sums[NUM_COLS][NUM_SETS][2] = {};
#pragma unroll
  for (int q = 0; q < KEY_TILES; q++) {
    StoredQueries::Bytes b;
    queries.load_bytes(q, b);
#pragma unroll
    for (int n = 0; n < NUM_COLS; n++)
#pragma unroll
      for (int s = 0; s < NUM_SETS; s++) multiply_bytes(sums[n][s], bytes[q], b[n][s]);
  }
#pragma unroll
  for (int n = 0; n < NUM_COLS; n++)
#pragma unroll
    for (int c = 0; c < 2; c++) products[n][c] = (float)joined(sums[n], c, t) * QUERY_UNIT;
}

// Products of the keys of a half with the queries, up to the scale of each. Where both tiles share the columns, lanes
// with t < 2 have those of the first.
DEVICE void half_products(const StoredQueries& queries, const KeyCodes& codes, u32 half, int lane,
                          float (&products)[NUM_SETS][NUM_COLS][4]) {
  typename KeyCodes::Words words;
  words.load(half, lane);
  float both[2][NUM_COLS][4] = {};
#pragma unroll
  for (int q = 0; q < KEY_TILES; q++) {
    StoredQueries::Operand b;
    queries.load_operand(q, b);
#pragma unroll
    for (int row = 0; row < 2; row++) {
      u32 a[4];
      codes.tile(words, row * KEY_TILES + q, a);
#pragma unroll
      for (int n = 0; n < NUM_COLS; n++) multiply<IN_BFLOAT16>(both[row][n], a, b[n][0], b[n][1]);
    }
  }
#pragma unroll
  for (int s = 0; s < NUM_SETS; s++)
#pragma unroll
    for (int n = 0; n < NUM_COLS; n++)
#pragma unroll
      for (int c = 0; c < 4; c++)
        products[s][n][c] = !IS_SHARED ? both[s][n][c] : (lane & 3) < 2 ? both[0][n][c] : both[1][n][c];
}

// The same where levels are 8-bit integers: exact, without a conversion.
DEVICE void byte_products(const StoredQueries& queries, const KeyCodes& codes, u32 half, int lane,
                          float (&products)[NUM_SETS][NUM_COLS][4]) {
  typename KeyCodes::Words words;
  words.load(half, lane);
  int sums[2][NUM_SETS][NUM_COLS][4] = {};  // row tile; where nothing is shared: upper, lower bytes of queries
#pragma unroll
  for (int q = 0; q < KEY_TILES; q += 2) {
    StoredQueries::Bytes b, next = {};
    queries.load_bytes(q, b);
    if (q + 1 < KEY_TILES) queries.load_bytes(q + 1, next);
#pragma unroll
    for (int row = 0; row < 2; row++) {
      u32 a[4] = {}, negative[4] = {};
#pragma unroll
      for (int i = 0; i < 2 && q + i < KEY_TILES; i++) {
        const int tile = row * KEY_TILES + q + i;
        if (IN_PARTS)
          codes.bytes_to_add(words, tile, a[2 * i], a[2 * i + 1], negative[2 * i], negative[2 * i + 1]);
        else
          codes.bytes(words, tile, a[2 * i], a[2 * i + 1]);
      }
#pragma unroll
      for (int n = 0; n < NUM_COLS; n++)
#pragma unroll
        for (int s = 0; s < NUM_SETS; s++) {
          multiply_bytes<IN_PARTS>(sums[row][s][n], a, b[n][s], next[n][s]);
          if (IN_PARTS) multiply_bytes<true>(sums[row][s][n], negative, b[n][s], next[n][s]);
        }
    }
  }
  constexpr float UNIT = (IN_PARTS ? -1 : 1) * QUERY_UNIT;
  const bool is_first = (lane & 3) < 2;
#pragma unroll
  for (int n = 0; n < NUM_COLS; n++)
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const int start = IN_PARTS ? queries.start[n][c & 1] : 0;
      if (IS_SHARED) {  // the upper bytes' columns have t < 2
        const int own = is_first ? sums[0][0][n][c] : sums[1][0][n][c];
        const int other = __shfl_xor_sync(~0u, is_first ? sums[1][0][n][c] : sums[0][0][n][c], 2);
        products[0][n][c] = (float)((is_first ? 256 * own + other : 256 * other + own) + start) * UNIT;
      } else {
#pragma unroll
        for (int row = 0; row < NUM_SETS; row++)
          products[row][n][c] = (float)(256 * sums[row][0][n][c] + sums[row][NUM_SETS - 1][n][c] + start) * UNIT;
      }
    }
}

// Add the mean of a block's values, with the weight that its halves have gathered. Rows of the sums: see attend_half.
DEVICE void add_value_mean(u32 means, float value_step, int g, Softmax& softmax) {
  // Bytes of the mean: rows g and g + 8 of one tile, then of the next. The operand has those of both tiles beside
  // each other, and each tile its weights where the other has 0.
  u32 mean[(VALUE_TILES + 1) / 2], b[NUM_COLS][2];
  const u32 mean_row = means + VALUE_MEAN_AT + g * 2 * VALUE_TILES;
  if (VALUE_TILES % 2 == 0) {
    load_row(mean, mean_row);
  } else {
#pragma unroll
    for (int i = 0; i < VALUE_TILES; i += 2)
      mean[i / 2] = load_byte_pair(mean_row + 2 * i) | (i + 1 < VALUE_TILES ? load_byte_pair(mean_row + 2 * i + 2) << 16 : 0);
  }
#pragma unroll
  for (int n = 0; n < NUM_COLS; n++) {  // sums of pairs of rows, in both halves
    float(&weight)[2] = softmax.mean_weight[n];
    const u32 rows = transposed(to_halves(weight[0] * value_step, weight[1] * value_step));
    u32 pairs;
    asm("add.rn.f16x2 %0,%1,%2;" : "=r"(pairs) : "r"(rows), "r"(permute(rows, 0, 0x1032)));
    b[n][0] = pairs & 0xFFFF;
    b[n][1] = pairs & 0xFFFF0000;
    weight[0] = weight[1] = 0;
  }
#pragma unroll
  for (int i = 0; i < VALUE_TILES; i++) {
    u32 rows, rows8;
    ValueCodes::int8_to_halves<0x4240, 0x4341>(mean[i / 2], rows, rows8);
#pragma unroll
    for (int n = 0; n < NUM_COLS; n++) multiply_half(softmax.sums[n][i], rows, rows8, b[n][i % 2]);
  }
}

// Half a block and its means, in shared memory; the mean of values is added when the block, or what this warp has of it,
// ends. Rows of the sums: dimension 16R + 8r + g.
DEVICE void attend_half(const Arguments& args, const StoredQueries& queries, const KeyCodes& key_codes,
                        const ValueCodes& value_codes, u32 half, u32 means, int num_hidden, bool ends_block,
                        int lane, Softmax& softmax) {
  const int g = lane >> 2, t = lane & 3;
  const u32 steps = IS_PLAIN ? 0 : load_word(means + STEPS_AT);
  const float key_step = half_to_float(steps & 0xFFFF) / args.key_unit;
  const float value_step = half_to_float(steps >> 16) / args.value_unit;
  const float smallest_size = fmaxf(value_step, SMALLEST_VALUE);

  float mean_products[NUM_COLS][2] = {};
  if (!IS_PLAIN) key_mean_products(queries, means + t * 4 * KEY_TILES, t, mean_products);
  float products[NUM_SETS][NUM_COLS][4];
  if (IN_BYTES)
    byte_products(queries, key_codes, half, lane, products);
  else
    half_products(queries, key_codes, half, lane, products);
  float scores[NUM_SETS][NUM_COLS][4], sizes[NUM_SETS][2], norms[NUM_SETS][2];
#pragma unroll
  for (int s = 0; s < NUM_SETS; s++) {
    const int row = IS_SHARED ? t >> 1 : s;
    constexpr u32 ONES = 0x3C003C00;
    const uint2 pair = IS_PLAIN ? make_uint2(ONES, ONES) : load_pair(half + NORMS_AT + (2 * g + row) * 8);
    const float key_norms[2] = {half_to_float(pair.x & 0xFFFF), half_to_float(pair.x >> 16)};
    norms[s][0] = half_to_float(pair.y & 0xFFFF);
    norms[s][1] = half_to_float(pair.y >> 16);
#pragma unroll
    for (int n = 0; n < NUM_COLS; n++)
#pragma unroll
      for (int c = 0; c < 4; c++)
        scores[s][n][c] =
            (products[s][n][c] * key_norms[c >> 1] + mean_products[n][c & 1] * key_step) * queries.scale[n][c & 1];
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

  u32 b[2][NUM_COLS][2];
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
#pragma unroll
    for (int c = 0; c < 2; c++) {
      softmax.denominator[n][c] += column_sums[c];
      softmax.mean_weight[n][c] += column_sums[c];
    }
  }
  if (!IS_PLAIN && ends_block) add_value_mean(means, value_step, g, softmax);
  typename ValueCodes::Words value_words;
  value_words.load(half + VALUES_AT, lane);
#pragma unroll
  for (int i = 0; i < VALUE_TILES; i++) {
#pragma unroll
    for (int col = 0; col < 2; col++) {
      u32 a[4];
      value_codes.tile(value_words, 2 * i + col, a);
#pragma unroll
      for (int n = 0; n < NUM_COLS; n++) multiply<IN_BFLOAT16>(softmax.sums[n][i], a, b[col][n][0], b[col][n][1]);
    }
  }
}
