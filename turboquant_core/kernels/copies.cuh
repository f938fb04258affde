// Copies of HALF_BYTES to shared memory that go on while other warps work, and barriers that tell when they are done.

DEVICE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

DEVICE void init_barrier(u64* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
DEVICE void arrive(u64* barrier) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared::cta.b64 state,[%0];}" ::"r"(shared_address(barrier)) : "memory");
}
DEVICE void wait(u64* barrier, u32 parity) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{.reg .pred p; L_%=: mbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1; @!p bra L_%=;}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
#else
  asm volatile(
      "{.reg .pred p; L_%=: mbarrier.test_wait.parity.shared::cta.b64 p,[%0],%1; @!p bra L_%=;}" ::"r"(
          shared_address(barrier)),
      "r"(parity)
      : "memory");
#endif
}
// Copy a half; `barrier` turns when it has arrived. From sm_90 on by one lane, before by all lanes of a warp.
#if __CUDA_ARCH__ >= 900
constexpr int NUM_COPIERS = 1;
DEVICE void copy_half(u8* target, const u8* source, u64* barrier) {
  const u32 b = shared_address(barrier);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(b), "r"(HALF_BYTES) : "memory");
  u64 policy;  // what is read once a step does not have to stay in the cache
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0,1.0;" : "=l"(policy));
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0],[%1],%2,[%3],%4;" ::"r"(
          shared_address(target)),
      "l"(source), "r"(HALF_BYTES), "r"(b), "l"(policy)
      : "memory");
}
#else
constexpr int NUM_COPIERS = 32;
DEVICE void copy_half(u8* target, const u8* source, u64* barrier) {
  for (int at = (threadIdx.x & 31) * 16; at < HALF_BYTES; at += 512)
    asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(shared_address(target + at)), "l"(source + at)
                 : "memory");
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}
#endif
