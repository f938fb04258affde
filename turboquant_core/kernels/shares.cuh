// How work is divided among warps, and what a number of it stands for.

// Of one kv head, the work on all requests before one: its tiles of exact tokens and its halves of blocks.
struct WorkStarts {
  const int* before;  // [2][stride]: requests, rows without one left out; blocks
  int stride;
  DEVICE u32 operator[](int request) const {
    return EXACT_WORK * before[request] + 2 * HALF_WORK * before[stride + request];
  }
};

struct Shares {  // of `total` numbers among `count` warps
  u32 quotient, rest;
  DEVICE Shares(u32 total, u32 count) : quotient(total / count), rest(total % count) {}
  DEVICE u32 start(u32 c) const { return c * quotient + min(c, rest); }
  DEVICE u32 owner(u32 number) const {
    const u32 longer = rest * (quotient + 1);
    return number < longer ? number / (quotient + 1) : rest + (number - longer) / quotient;
  }
};

// Tiles or halves before a place in a segment: one belongs to where it starts.
DEVICE int pieces(u32 work, u32 of_each) { return (work + of_each - 1) / of_each; }

// What a number stands for. Found by going on from that of a smaller number.
struct Item {
  int request, head;     // kv head
  u32 start, count;      // of the work on this request and head
  DEVICE long long index(int num_heads) const { return (long long)request * num_heads + head; }
  DEVICE u32 segment_end(bool is_exact) const { return start + (is_exact ? EXACT_WORK : count); }
  DEVICE void store(Item& target) const {  // for all lanes, each of which has the same
    __syncwarp();
    if ((threadIdx.x & 31) == 0) target = *this;
    __syncwarp();
  }
  DEVICE void advance(u32 number, const WorkStarts& work_starts, int num_heads) {
    while (number >= start + count) {
      start += count;
      if (++head == num_heads) {
        head = 0;
        request++;
        count = work_starts[request + 1] - work_starts[request];
      }
    }
  }
  // start_of_lane: where the work of the request with this lane's number starts.
  DEVICE void find(u32 number, u32 start_of_lane, const WorkStarts& work_starts, int num_heads, int batch, int lane) {
    request = __popc(__ballot_sync(~0u, lane < batch && start_of_lane * num_heads <= number)) - 1;
    for (int first = 32; first < batch; first += 32) {
      const int r = first + lane;
      request += __popc(__ballot_sync(~0u, r < batch && work_starts[r] * num_heads <= number));
    }
    count = work_starts[request + 1] - work_starts[request];
    const u32 inside = number - work_starts[request] * num_heads;
    head = inside / count;
    start = number - inside % count;
  }
};

// What a warp keeps of its share in shared memory, as it is seldom needed and registers are few.
struct Own {
  Item item, copied;  // which is attended to, and whose pieces are copied
  u32 end, stop;      // of the share, and of what is attended to
  DEVICE void attend_to(const Item& item, u32 stop) {
    __syncwarp();
    if ((threadIdx.x & 31) == 0) this->stop = stop;
    item.store(this->item);
  }
};
