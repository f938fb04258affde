// What copies halves of blocks to shared memory.

// Brings the halves of a warp's share to its ring, in their order, ahead of their turn.
struct Feed {
  const Arguments& args;
  const u32 ring, barriers, offsets;  // shared memory: see decode
  const u32 end;                      // of the share
  Item& latest;                       // in shared memory, as it is seldom needed
  u32 next;                           // number after those of the request and head whose halves are copied
  u32 place;
  int left;                           // halves of it, and of its block
  bool is_second;
  const u8* source;                   // of the next half
  const int* ids;
  int following, head;                // id of the block that follows; the kv head

  DEVICE Feed(const Arguments& args, u32 ring, u32 barriers, u32 offsets, Item& latest, u32 number, u32 end)
      : args(args), ring(ring), barriers(barriers), offsets(offsets), end(end), latest(latest), next(number), place(0) {
    go_on();
  }
  DEVICE const u8* address(int block) const {
    return args.records + ((long long)block * args.num_heads + head) * (2 * HALF_BYTES);
  }
  // To the next request and head of which the share has halves.
  DEVICE void go_on() {
    Item item = latest;
    for (left = 0; left == 0 && next < end; next = item.start + item.count) {
      item.advance(next, args.work_starts, args.num_heads);
      const u32 exact_end = item.start + EXACT_WORK, stop = min(end, item.start + item.count);
      if (stop <= exact_end) continue;
      const int index = pieces(max(next, exact_end) - exact_end, HALF_WORK);
      head = item.head;
      left = pieces(stop - exact_end, HALF_WORK) - index;
      if (left == 0) continue;
      is_second = index % 2;
      ids = args.block_tables + (long long)item.request * args.table_stride + index / 2;
      source = address(*ids) + is_second * HALF_BYTES;
      if (left > 2 - is_second) following = *++ids;
    }
    item.store(latest);
  }
  // Copy the next half, if there is one.
  DEVICE void copy(int lane) {
    if (left == 0) return;
    const u32 offset = (u64)source % 128;
    if (lane == 0) store_shared(offsets + 4 * place, offset);
    if (NUM_COPIERS > 1 || lane == 0) copy_half(ring + place * SLOT_BYTES + offset, source, barriers + 8 * place);
    if (++place == RING_SLOTS) place = 0;
    if (--left == 0) {
      go_on();
      return;
    }
    if (is_second) {
      source = address(following);
      if (left > 2) following = *++ids;
    } else {
      source += HALF_BYTES;
    }
    is_second = !is_second;
  }
};
