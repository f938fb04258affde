// Queries of a kv head, transformed, as a warp multiplies blocks with them.

// A column's product with 16-bit integers, from those with their upper and lower bytes.
DEVICE int joined(const int (&sums)[NUM_SETS][2], int c, int t) {
  if (!IS_SHARED) return 256 * sums[0][c] + sums[NUM_SETS - 1][c];
  const int other = __shfl_xor_sync(~0u, sums[0][c], 2);  // the upper bytes' columns have t < 2
  return t < 2 ? 256 * sums[0][c] + other : 256 * other + sums[0][c];
}

// The queries of a kv head, for each lane: as B operands, unless IN_BYTES, and as 16-bit integers, unless IS_PLAIN:
// their upper and lower bytes, in columns 0-3 and 4-7 or one after the other. They stay in registers, or in shared
// memory, where a lane reads what it has written itself.
struct StoredQueries {
  typedef u32 Operand[NUM_COLS][2];
  typedef u32 Bytes[NUM_COLS][NUM_SETS];
  static constexpr int KEPT = QUERIES_IN_SHARED ? 1 : KEY_TILES;
  Operand operands[KEPT];
  Bytes bytes[KEPT];
  u32 address;
  int start[NUM_COLS][2];  // of products with them: less 255 times the sum of a column, if IN_PARTS
  float scale[NUM_COLS][2];
  DEVICE StoredQueries(u32 address, int lane) : address(address + 16 * lane) {}
  // Those of 16 dimensions.
  DEVICE void load_operand(int q, Operand& operand) const { load(q, operands[q % KEPT], operand, 0); }
  DEVICE void load_bytes(int q, Bytes& its) const { load(q, bytes[q % KEPT], its, 512 * KEY_TILES); }

  DEVICE void load(const Arguments& args, const Item& item, int lane) {
    const int g = lane >> 2, t = lane & 3;
    const long long first = item.index(args.num_heads) * GROUP;
    Operand all_operands[KEY_TILES];
    Bytes all_bytes[KEY_TILES];
#pragma unroll
    for (int n = 0; n < NUM_COLS; n++) {
      const int head = IS_SHARED ? min(g & 3, GROUP - 1) : min(8 * n + g, GROUP - 1);
#pragma unroll
      for (int q = 0; q < KEY_TILES && IS_PLAIN; q++) {
        const uint2 b = *(const uint2*)(args.queries + (first + head) * KEY_DIM + 16 * q + 4 * t);
        all_operands[q][n][0] = b.x;
        all_operands[q][n][1] = b.y;
      }
#pragma unroll
      for (int s = 0; s < NUM_SETS && !IS_PLAIN; s++) {
        const int is_low = IS_SHARED ? g >> 2 : s;
        u32 row[KEY_TILES];
        load_row(row, (const u32*)(args.stored_bytes + (2 * (first + head) + is_low) * KEY_DIM) + t * KEY_TILES);
#pragma unroll
        for (int q = 0; q < KEY_TILES; q++) all_bytes[q][n][s] = row[q];
      }
#pragma unroll
      for (int q = 0; q < KEY_TILES && !IS_PLAIN && !IN_BYTES; q++) {
        u32 upper[2], lower[2];
        KeyCodes::int8_to_halves(all_bytes[q][n][0], upper[0], upper[1]);
        KeyCodes::int8_to_halves(all_bytes[q][n][NUM_SETS - 1], lower[0], lower[1]);
#pragma unroll
        for (int i = 0; i < 2; i++)  // times 2^-7, and 2^-15
          all_operands[q][n][i] = multiply_add(upper[i], 0x20002000, multiply_add(lower[i], 0x02000200, 0));
      }
      if (IN_PARTS) {
        int sums[NUM_SETS][2] = {};
#pragma unroll
        for (int q = 0; q < KEY_TILES; q++)
#pragma unroll
          for (int s = 0; s < NUM_SETS; s++) multiply_bytes(sums[s], 0x01010101, all_bytes[q][n][s]);
        start[n][0] = -255 * joined(sums, 0, t);
        start[n][1] = -255 * joined(sums, 1, t);
      }
#pragma unroll
      for (int c = 0; c < 2; c++) {
        const int column = IS_SHARED ? (2 * t + c) & 3 : 8 * n + 2 * t + c;
        scale[n][c] = IS_PLAIN ? args.scale : args.stored_scales[first + min(column, GROUP - 1)] * args.key_unit;
      }
    }
#pragma unroll
    for (int q = 0; q < KEY_TILES; q++) {
      if (!IN_BYTES) keep(q, all_operands[q], operands[q % KEPT], 0);
      if (!IS_PLAIN) keep(q, all_bytes[q], bytes[q % KEPT], 512 * KEY_TILES);
    }
  }

 private:
  template <int COUNT>
  DEVICE void load(int q, const u32 (&kept)[NUM_COLS][COUNT], u32 (&its)[NUM_COLS][COUNT], int at) const {
    u32 words[4];
    if (QUERIES_IN_SHARED) load_row(words, address + at + 512 * q);
#pragma unroll
    for (int i = 0; i < NUM_COLS * COUNT; i++)
      its[i / COUNT][i % COUNT] = QUERIES_IN_SHARED ? words[i % 4] : kept[i / COUNT][i % COUNT];
  }
  template <int COUNT>
  DEVICE void keep(int q, const u32 (&its)[NUM_COLS][COUNT], u32 (&kept)[NUM_COLS][COUNT], int at) {
    if (QUERIES_IN_SHARED)
      store_four(address + at + 512 * q, its[0][0], its[0][1], its[NUM_COLS - 1][0], its[NUM_COLS - 1][1]);
#pragma unroll
    for (int i = 0; i < NUM_COLS * COUNT && !QUERIES_IN_SHARED; i++)
      kept[i / COUNT][i % COUNT] = its[i / COUNT][i % COUNT];
  }
};
