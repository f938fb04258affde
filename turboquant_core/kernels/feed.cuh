// What copies halves of blocks to shared memory.

// Brings the halves of a warp's share to its ring, in their order, ahead of their turn.
struct Feed {
  const Arguments& args;
  const u32 ring, places;             // shared memory: see decode
  const u32 end;                      // of the share
  Item& latest;                       // whose halves are copied; in shared memory, as it is seldom needed
  int left;                           // halves of it, and of its block
  bool is_second;
  const u8* source;                   // of the next half
  int index, following, head;         // in the tables, of the block that follows; its id; the kv head

  DEVICE Feed(const Arguments& args, u32 ring, u32 places, Item& latest, u32 number, u32 end)
      : args(args), ring(ring), places(places), end(end), latest(latest) {
    go_on(number);
  }
  DEVICE const u8* address(int block) const {
    return args.records + ((long long)block * args.num_heads + head) * RECORD_BYTES;
  }
  // To the next request and head of which the share has halves, from a number on.
  DEVICE void go_on(u32 next) {
    Item item = latest;
    for (left = 0; left == 0 && next < end; next = item.start + item.count) {
      item.advance(next, args.work_starts, args.num_heads);
      const u32 exact_end = item.start + EXACT_WORK, stop = min(end, item.start + item.count);
      if (stop <= exact_end) continue;
      const int first = pieces(max(next, exact_end) - exact_end, HALF_WORK);
      head = item.head;
      left = pieces(stop - exact_end, HALF_WORK) - first;
      if (left == 0) continue;
      is_second = first % 2;
      index = item.request * args.table_stride + first / 2;
      source = address(args.block_tables[index]) + is_second * HALF_BYTES;
      if (left > 2 - is_second) following = args.block_tables[++index];
    }
    item.store(latest);
  }
  // Fill the ring.
  DEVICE void start(int lane) {
#pragma unroll 1
    for (int place = 0; place < RING_SLOTS; place++) copy(place, lane);
  }
  // Copy the next half to a place, if there is one: places take turns.
  DEVICE void copy(u32 place, int lane) {
    if (left == 0) return;
    const u32 target = ring + place * SLOT_BYTES + (u64)source % 128;
    if (lane == 0)
      store_pair(places + 16 * place + 8, target + (is_second ? MEANS_BYTES : 0), target + (is_second ? 0 : HALF_BYTES));
    if (NUM_COPIERS > 1 || lane == 0) copy_half(target, source, places + 16 * place);
    if (--left == 0) {
      go_on(latest.start + latest.count);
      return;
    }
    if (is_second) {
      source = address(following);
      if (left > 2) following = args.block_tables[++index];
    } else {
      source += HALF_BYTES;
    }
    is_second = !is_second;
  }
};
