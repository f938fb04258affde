// Codes of keys and values to float16, in the order of tensor cores: see record.py. 16 bits are numbers of the
// exact tokens' type, see exact_codec.py.

// The A operand of tile `tile`, from the words of its codes.
template <int BITS, int NUM_TILES, u32 LEVELS_LOW, u32 LEVELS_HIGH>
struct Codes {
  // LEVELS_LOW in a register for good. What the compiler knows to be the same in all lanes it fetches for every
  // tile again; of threadIdx.y it does not know that it is 0.
  u32 low;
  DEVICE Codes() : low(LEVELS_LOW + threadIdx.y) {}
  static constexpr int PLANE = BITS == 16 ? 4 * NUM_TILES : BITS == 8 ? 2 * NUM_TILES : BITS == 4 ? NUM_TILES : NUM_TILES / 2;
  static constexpr int SIGNS = BITS == 3 ? (NUM_TILES + 3) / 4 : 0;

  // Word i of a plane of N words, for this lane.
  template <int N>
  static DEVICE u32 word(const u8* plane, int lane, int i) {
    const int rest = N % 4, full = N - rest;
    if (i >= full) return *(const u32*)(plane + full * 128 + lane * rest * 4 + (i - full) * 4);
    const uint4 v = *(const uint4*)(plane + i / 4 * 512 + lane * 16);  // the same load for four words
    return i % 4 == 0 ? v.x : i % 4 == 1 ? v.y : i % 4 == 2 ? v.z : v.w;
  }
  static DEVICE void bytes_to_halves(u32 bytes, u32& low, u32& high) {  // of e4m3
#if __CUDA_ARCH__ >= 890
    asm("{.reg .b16 x,y; mov.b32 {x,y},%2; cvt.rn.f16x2.e4m3x2 %0,x; cvt.rn.f16x2.e4m3x2 %1,y;}"
        : "=r"(low), "=r"(high) : "r"(bytes));
#else  // sign, 4 bits of exponent, 3 of mantissa; the exponents' biases are 8 apart, none is 0
    const u32 even = permute(bytes, 0, 0x1404), odd = permute(bytes, 0, 0x3424);  // to the upper byte of each half
    low = (even & 0x80008000u) | (((even & 0x7F007F00u) >> 1) + 0x20002000u);
    high = (odd & 0x80008000u) | (((odd & 0x7F007F00u) >> 1) + 0x20002000u);
#endif
  }
  static DEVICE void int8_to_halves(u32 bytes, u32& low, u32& high) {
    const u32 offset = bytes ^ 0x80808080u;  // 1024 + 128 + x as a float16
    u32 l = permute(offset, 0x64646464u, 0x4140), h = permute(offset, 0x64646464u, 0x4342);
    asm("sub.rn.f16x2 %0,%1,%2;" : "=r"(low) : "r"(l), "r"(0x64806480u));
    asm("sub.rn.f16x2 %0,%1,%2;" : "=r"(high) : "r"(h), "r"(0x64806480u));
  }
  DEVICE void tile(const u8* codes, int lane, int tile, u32 (&a)[4]) const {
    if (BITS == 16) {
      const uint4 v = *(const uint4*)(codes + tile * 512 + lane * 16);
      a[0] = v.x;
      a[1] = v.z;
      a[2] = v.y;
      a[3] = v.w;
      return;
    }
    if (BITS == 8) {
      int8_to_halves(word<PLANE>(codes, lane, 2 * tile), a[0], a[2]);
      int8_to_halves(word<PLANE>(codes, lane, 2 * tile + 1), a[1], a[3]);
      return;
    }
    u32 first, second;  // e4m3 bytes of r = 0, r = 1
    if (BITS == 4) {
      const u32 w = word<PLANE>(codes, lane, tile), magnitudes = w & 0x77777777u;
      first = permute(low, LEVELS_HIGH, magnitudes) ^ (w & 0x80808080u);
      second = permute(low, LEVELS_HIGH, magnitudes >> 16) ^ ((w << 4) & 0x80808080u);
    } else {
      u32 selector = (word<PLANE>(codes, lane, tile / 2) >> (2 * (tile % 2))) & 0x33333333u;
      constexpr u32 NEGATIVE = BITS == 3 ? LEVELS_LOW | 0x80808080u : 0;
      if (BITS == 3) {
        const u32 signs = word<SIGNS>(codes + PLANE * 128, lane, tile / 4);
        const int shift = tile % 4 - 2;
        selector |= (shift < 0 ? signs << -shift : signs >> shift) & 0x44444444u;
      }
      first = permute(low, NEGATIVE, selector);
      second = permute(low, NEGATIVE, selector >> 16);
    }
    bytes_to_halves(first, a[0], a[2]);
    bytes_to_halves(second, a[1], a[3]);
  }
};
