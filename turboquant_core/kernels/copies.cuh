// Shared memory, by 32-bit addresses: copies to it that go on while warps work, barriers that tell
// when they are done, and what reads it.

DEVICE void init_barrier(u32 barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(barrier), "r"(count) : "memory");
}
DEVICE void wait(u32 barrier, u32 parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .pred p; L_%=: mbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1; @!p bra L_%=;}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{.reg .pred p; L_%=: mbarrier.test_wait.parity.shared::cta.b64 p,[%0],%1; @!p bra L_%=;}" ::"r"(barrier),
      "r"(parity)
      : "memory");
#endif
}
// Copy a multiple of 16 bytes: on sm_90 one lane does, before all lanes of a warp do. `barrier` turns when what has been
// copied until `arrive`, so many bytes, is there.
#if __CUDA_ARCH__ >= 900
constexpr int NUM_COPIERS = 1;
DEVICE void copy_bytes(u32 target, const u8* source, int count, u32 barrier) {
  u64 policy;  // what is read once a step does not have to stay in the cache
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0,1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0],[%1],%2,[%3],%4;" ::"r"(
          target),
      "l"(source), "r"(count), "r"(barrier), "l"(policy)
      : "memory");
}
DEVICE void arrive(u32 barrier, int num_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(barrier), "r"(num_bytes) : "memory");
}
#else
constexpr int NUM_COPIERS = 32;
DEVICE void copy_bytes(u32 target, const u8* source, int count, u32 barrier) {
  for (int at = (threadIdx.x & 31) * 16; at < count; at += 512)
    asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(target + at), "l"(source + at)
                 : "memory");
}
DEVICE void arrive(u32 barrier, int num_bytes) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
#endif
DEVICE bool is_copier(int lane) { return lane < NUM_COPIERS; }

// What lanes have stored comes before copies to the same place that one of them starts.
DEVICE void order_stores_and_copies() {
#if __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
  __syncwarp();
}

DEVICE void store_four(u32 address, u32 x, u32 y, u32 z, u32 w) {
  asm volatile("st.shared.v4.u32 [%0],{%1,%2,%3,%4};" ::"r"(address), "r"(x), "r"(y), "r"(z), "r"(w) : "memory");
}
DEVICE void store_pair(u32 address, u32 x, u32 y) {
  asm volatile("st.shared.v2.u32 [%0],{%1,%2};" ::"r"(address), "r"(x), "r"(y) : "memory");
}
// In assembly, since the compiler would split what is only used in parts. Volatile: not before a wait.
DEVICE u32 load_byte_pair(u32 address) {
  u16 x;
  asm volatile("ld.shared.u16 %0,[%1];" : "=h"(x) : "r"(address));
  return x;
}
DEVICE u32 load_word(u32 address) {
  u32 x;
  asm volatile("ld.shared.u32 %0,[%1];" : "=r"(x) : "r"(address));
  return x;
}
DEVICE uint2 load_pair(u32 address) {
  uint2 x;
  asm volatile("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(x.x), "=r"(x.y) : "r"(address));
  return x;
}
DEVICE uint4 load_four(u32 address) {
  uint4 x;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address));
  return x;
}
// COUNT words in a row, at a multiple of 4 bytes, or of 16 if there are a multiple of four. In shared memory, or not.
template <int COUNT>
DEVICE void load_row(u32 (&words)[COUNT], const u32* source) {
#pragma unroll
  for (int i = 0; i < COUNT; i += 4) {
    if (COUNT % 4 == 0) {
      const uint4 x = *(const uint4*)(source + i);
      words[i] = x.x;
      words[i + 1] = x.y;
      words[i + 2] = x.z;
      words[i + 3] = x.w;
    } else {
      for (int j = i; j < i + 4 && j < COUNT; j++) words[j] = source[j];
    }
  }
}
template <int COUNT>
DEVICE void load_row(u32 (&words)[COUNT], u32 address) {
  if (COUNT % 4 == 0) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
      const uint4 x = load_four(address + 4 * i);
      words[i] = x.x;
      words[i + 1] = x.y;
      words[i + 2] = x.z;
      words[i + 3] = x.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < COUNT; i++) words[i] = load_word(address + 4 * i);
  }
}
