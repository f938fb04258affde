// Exact tokens as rings hold them, in tiles.

// Keys and values of a tile take one place of a ring, or each their own, or several.
constexpr int KEY_ROW = 2 * KEY_DIM, VALUE_ROW = 2 * VALUE_DIM;  // bytes
__host__ __device__ constexpr bool fit_together(int tokens) {
  return slot_bytes(tokens * KEY_ROW) + slot_bytes(tokens * VALUE_ROW) <= SLOT_BYTES;
}
__host__ __device__ constexpr int rows_of_part(int row_bytes) {
  int rows = 16;
  while (slot_bytes(rows * row_bytes) > SLOT_BYTES) rows /= 2;
  return rows;
}
constexpr bool IS_TOGETHER = fit_together(16);
constexpr int TILE = fit_together(32) ? 32 : 16;  // tokens
constexpr int KEY_ROWS = IS_TOGETHER ? TILE : rows_of_part(KEY_ROW);
constexpr int VALUE_ROWS = IS_TOGETHER ? TILE : rows_of_part(VALUE_ROW);
constexpr int KEY_PARTS = TILE / KEY_ROWS, VALUE_PARTS = TILE / VALUE_ROWS;
constexpr int TILE_PARTS = IS_TOGETHER ? 1 : KEY_PARTS + VALUE_PARTS;
static_assert(KEY_PARTS <= RING_SLOTS && VALUE_PARTS <= RING_SLOTS, "a ring has no room for a tile");

// Tiles of a request that hold any tokens: places are taken in their order.
DEVICE int num_tiles(int position) { return min(position, NUM_PLACES - 1) / TILE + 1; }

// What they count in work, and halves of blocks, as measured on an H200 and an H100.
constexpr int HALF_WORK = 2, TILE_WORK = IS_TOGETHER ? 2 : 3;
constexpr int EXACT_WORK = (NUM_PLACES + TILE - 1) / TILE * TILE_WORK;  // of a request and kv head
