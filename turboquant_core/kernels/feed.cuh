// What copies exact tokens and halves of blocks to shared memory.

// Brings to a warp's ring what its share is of, in its order and ahead of its turn: of tiles of exact tokens the keys,
// then the values; halves of blocks.
struct Feed {
  const Arguments& args;
  const u32 slots;                    // shared memory: see slot_of
  Own& own;                           // its item `copied` and the end of the share
  int left;                           // halves of it; less than 0: parts of its tiles
  bool is_second;                     // half of a block
  const u8* source;                   // of the next half
  int index, following;               // in the tables, of the block that follows; its id
  // While there are parts of tiles, `index` is the next one and `following` the number of the first place's row.

  DEVICE Feed(const Arguments& args, u32 ring, u32 places, Own& own, u32 number)
      : args(args), slots(ring - places * (SLOT_BYTES / 16)), own(own) {
    go_on(number);
  }
  DEVICE const u8* address(int block, int head) const {
    return args.records + ((long long)block * args.num_heads + head) * RECORD_BYTES;
  }
  // To the next segment of which the share has something, from a number on.
  DEVICE void go_on(u32 next) {
    Item item = own.copied;
    const u32 end = own.end;
    for (left = 0; left == 0 && next < end;) {
      item.advance(next, args.work_starts, args.num_heads);
      const u32 exact_end = item.segment_end(true), item_end = item.segment_end(false);
      if (next < exact_end) {
        const int first = pieces(next - item.start, TILE_WORK);
        const int last = pieces(min(end, exact_end) - item.start, TILE_WORK);
        left = min(first - min(last, num_tiles(args.positions[item.request])), 0) * TILE_PARTS;
        index = first * TILE_PARTS;
        following = (int)args.first_place(item);
        next = exact_end;
        continue;
      }
      const int first = pieces(next - exact_end, HALF_WORK);
      left = pieces(min(end, item_end) - exact_end, HALF_WORK) - first;
      next = item_end;
      if (left == 0) continue;
      is_second = first % 2;
      index = item.request * args.table_stride + first / 2;
      source = address(args.block_tables[index], item.head) + is_second * HALF_BYTES;
      if (left > 2 - is_second) following = args.block_tables[++index];
    }
    item.store(own.copied);
  }
  // Copy what comes next, if there is anything, to the place with this barrier: places take turns.
  DEVICE void copy(u32 barrier, int lane) {
    if (left == 0) return;
    const bool is_part = left < 0;
    if (__builtin_expect(is_part, false))
      copy_part(barrier, lane);
    else
      copy_half(barrier, lane);
    if (left == 0) go_on(own.copied.segment_end(is_part));
  }

 private:
  DEVICE u32 slot_of(u32 barrier) const { return slots + barrier * (SLOT_BYTES / 16); }
  DEVICE void copy_half(u32 barrier, int lane) {
    const u32 target = slot_of(barrier) + (u64)source % 128;
    if (is_copier(lane)) {
      if (lane == 0)
        store_pair(barrier + 8, target + (is_second ? MEANS_BYTES : 0), target + (is_second ? 0 : HALF_BYTES));
      copy_bytes(target, source, COPY_BYTES, barrier);
      arrive(barrier, COPY_BYTES);
    }
    left--;
    if (!is_second) {
      source += HALF_BYTES;
    } else if (left > 0) {
      source = address(following, own.copied.head);
      if (left > 2) following = args.block_tables[++index];
    }
    is_second = !is_second;
  }
  DEVICE void copy_part(u32 barrier, int lane) {
    const int tile = index / TILE_PARTS, part = index % TILE_PARTS;
    const bool is_value = part >= KEY_PARTS;
    const int row = TILE * tile + (is_value ? (part - KEY_PARTS) * VALUE_ROWS : part * KEY_ROWS);
    const int count = max(0, min(is_value ? VALUE_ROWS : KEY_ROWS, NUM_PLACES - row));
    const u8* values = (const u8*)args.exact_values + (long long)(following + row) * VALUE_ROW;
    const u8* rows = is_value ? values : (const u8*)args.exact_keys + (long long)(following + row) * KEY_ROW;
    const int num_bytes = count * (is_value ? VALUE_ROW : KEY_ROW), beside = IS_TOGETHER ? count * VALUE_ROW : 0;
    const u32 slot = slot_of(barrier), target = slot + (u64)rows % 128;
    const u32 values_target = slot + slot_bytes(TILE * KEY_ROW) + (u64)values % 128;
    if (is_copier(lane)) {
      if (lane == 0) store_pair(barrier + 8, target, values_target);
      if (num_bytes > 0) copy_bytes(target, rows, num_bytes, barrier);
      if (IS_TOGETHER) copy_bytes(values_target, values, beside, barrier);
      arrive(barrier, num_bytes + beside);
    }
    index++;
    left++;
  }
};

// Wait until the queries that an item is attended to with first are in the nearest cache: what is asked for while copies
// to all places are under way comes after them.
DEVICE void fetch_queries(const Arguments& args, const Item& item, bool is_exact, Own& own, int lane) {
  const u8* rows = IS_PLAIN || is_exact ? (const u8*)args.queries : args.stored_bytes;
  rows += item.index(args.num_heads) * GROUP * KEY_ROW;  // of either
  u32 seen = 0;
  for (int i = 32 * lane; i < GROUP * KEY_ROW; i += 32 * 32) seen |= *(const volatile u32*)(rows + i);
  seen = __reduce_or_sync(~0u, seen);
  if (lane == 0) own.stop = seen;  // not yet in use; what is kept nowhere would not be waited for
  __syncwarp();
}

// The places of a warp's ring: their barriers, 16 bytes apart, each with the addresses that Feed leaves behind it.
struct Ring {
  const u32 places;
  u32 turn;  // the barrier of the place whose turn it is, plus 1 in every second round: its parity
  DEVICE Ring(u32 places) : places(places), turn(places) {}
  // Wait until what comes after `others` is there, and return its addresses.
  DEVICE uint2 wait_for(int others) const {
    u32 its = turn + 16 * others;
    if (others > 0 && its >= end()) its = (its ^ 1) - 16 * RING_SLOTS;
    const u32 barrier = its & ~1u;
    wait(barrier, its & 1);
    return load_pair(barrier + 8);
  }
  // What has been read may be overwritten.
  DEVICE void release(Feed& feed, int count, int lane) {
    __syncwarp();
    for (int i = 0; i < count; i++) {
      feed.copy(turn & ~1u, lane);
      turn += 16;
      if (turn >= end()) turn = (turn ^ 1) - 16 * RING_SLOTS;
    }
  }

 private:
  DEVICE u32 end() const { return places + 16 * RING_SLOTS; }
};
