// Codes of keys and values to float16, in the order of tensor cores: see record.py. 16 bits are numbers of the
// exact tokens' type, see exact_codec.py.

// Words of this lane: lanes have four in turn, and what is left of four in the end.
template <int COUNT>
DEVICE void load_words(u32 (&words)[COUNT], u32 address, int lane) {
  constexpr int REST = COUNT % 4, FOURS = COUNT - REST;
#pragma unroll
  for (int i = 0; i < FOURS; i += 4) {
    u32 four[4];
    load_row(four, address + i * 128 + lane * 16);
#pragma unroll
    for (int j = 0; j < 4; j++) words[i + j] = four[j];
  }
#pragma unroll
  for (int i = 0; i < REST; i++) words[FOURS + i] = load_word(address + FOURS * 128 + (lane * REST + i) * 4);
}

// The A operand of tile `tile`, from the words of its codes.
template <int BITS, int NUM_TILES, u32 LEVELS_LOW, u32 LEVELS_HIGH>
struct Codes {
  // LEVELS_LOW in a register for good. What the compiler knows to be the same in all lanes it fetches for every
  // tile again; of threadIdx.y it does not know that it is 0.
  u32 low;
  DEVICE Codes() : low(LEVELS_LOW + threadIdx.y) {}
  static constexpr int PLANE = BITS == 16 ? 4 * NUM_TILES : BITS == 8 ? 2 * NUM_TILES : BITS == 4 ? NUM_TILES : NUM_TILES / 2;
  static constexpr int SIGNS = BITS == 3 ? (NUM_TILES + 3) / 4 : 0;

  // The words of this lane; those of 16 bits are many, and come from memory when they are needed.
  struct Words {
    u32 plane[BITS == 16 ? 1 : PLANE], signs[SIGNS ? SIGNS : 1], address;
    DEVICE void load(u32 codes, int lane) {
      address = codes + lane * 16;
      if (BITS == 16) return;
      load_words(plane, codes, lane);
      if (SIGNS) load_words(signs, codes + PLANE * 128, lane);
    }
  };
  static DEVICE void e4m3_to_halves(u32 bytes, u32& low, u32& high) {
#if __CUDA_ARCH__ >= 890
    asm("{.reg .b16 x,y; mov.b32 {x,y},%2; cvt.rn.f16x2.e4m3x2 %0,x; cvt.rn.f16x2.e4m3x2 %1,y;}"
        : "=r"(low), "=r"(high) : "r"(bytes));
#else  // sign, 4 bits of exponent, 3 of mantissa; the exponents' biases are 8 apart, none is 0
    const u32 even = permute(bytes, 0, 0x1404), odd = permute(bytes, 0, 0x3424);  // to the upper byte of each half
    low = (even & 0x80008000u) | (((even & 0x7F007F00u) >> 1) + 0x20002000u);
    high = (odd & 0x80008000u) | (((odd & 0x7F007F00u) >> 1) + 0x20002000u);
#endif
  }
  // Bytes 0, 1 and 2, 3, or those that FIRST and SECOND name.
  template <u32 FIRST = 0x4140, u32 SECOND = 0x4342>
  static DEVICE void int8_to_halves(u32 bytes, u32& low, u32& high) {
    const u32 offset = bytes ^ 0x80808080u;  // 1024 + 128 + x as a float16
    u32 l = permute(offset, 0x64646464u, FIRST), h = permute(offset, 0x64646464u, SECOND);
    asm("sub.rn.f16x2 %0,%1,%2;" : "=r"(low) : "r"(l), "r"(0x64806480u));
    asm("sub.rn.f16x2 %0,%1,%2;" : "=r"(high) : "r"(h), "r"(0x64806480u));
  }
  // Of 4 bits, where LEVELS are 255 less each magnitude: unsigned bytes, for rows r = 0 and r = 1, which are 255 less
  // the level when `negative`, 255 for a negative one and else 0, is added.
  DEVICE void bytes_to_add(const Words& words, int tile, u32& first, u32& second, u32& negative, u32& negative8) const {
    const u32 w = words.plane[tile], magnitudes = w & 0x77777777u;
    negative = permute(w, 0, 0xBA98);  // the sign of each byte
    negative8 = permute(w << 4, 0, 0xBA98);
    first = permute(low, LEVELS_HIGH, magnitudes) ^ negative;
    second = permute(low, LEVELS_HIGH, upper_half(magnitudes)) ^ negative8;
  }
  // Bytes of levels, for rows r = 0 and r = 1; of 8 bits the codes themselves.
  DEVICE void bytes(const Words& words, int tile, u32& first, u32& second) const {
    if (BITS == 8) {
      first = words.plane[2 * tile];
      second = words.plane[2 * tile + 1];
    } else if (BITS == 4) {
      const u32 w = words.plane[tile], magnitudes = w & 0x77777777u;
      first = permute(low, LEVELS_HIGH, magnitudes) ^ (w & 0x80808080u);
      second = permute(low, LEVELS_HIGH, upper_half(magnitudes)) ^ ((w << 4) & 0x80808080u);
    } else {
      u32 selector = (words.plane[tile / 2] >> (2 * (tile % 2))) & 0x33333333u;
      if (BITS == 3) {
        const u32 signs = words.signs[tile / 4];
        const int shift = tile % 4 - 2;
        selector |= (shift < 0 ? signs << -shift : signs >> shift) & 0x44444444u;
      }
      first = permute(low, LEVELS_HIGH, selector);
      second = permute(low, LEVELS_HIGH, upper_half(selector));
    }
  }
  DEVICE void tile(const Words& words, int tile, u32 (&a)[4]) const {
    if (BITS == 16) {
      const uint4 v = load_four(words.address + tile * 512);
      a[0] = v.x;
      a[1] = v.z;
      a[2] = v.y;
      a[3] = v.w;
      return;
    }
    u32 first, second;
    bytes(words, tile, first, second);
    if (BITS == 8) {
      int8_to_halves(first, a[0], a[2]);
      int8_to_halves(second, a[1], a[3]);
    } else {
      e4m3_to_halves(first, a[0], a[2]);
      e4m3_to_halves(second, a[1], a[3]);
    }
  }
};
