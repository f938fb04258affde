// Reads memory and does nothing else: what a device's bandwidth allows at most. For benchmarks.

extern "C" __global__ void __launch_bounds__(512) read(const uint4* data, unsigned int* sink, int num_vectors) {
  const int stride = gridDim.x * 512;
  unsigned int bits = 0;
  int i = blockIdx.x * 512 + threadIdx.x;
  for (; i + 7 * stride < num_vectors; i += 8 * stride) {
    uint4 vectors[8];
#pragma unroll
    for (int j = 0; j < 8; j++) vectors[j] = __ldcs(data + i + j * stride);
#pragma unroll
    for (int j = 0; j < 8; j++) bits |= vectors[j].x ^ vectors[j].y ^ vectors[j].z ^ vectors[j].w;
  }
  for (; i < num_vectors; i += stride) bits |= data[i].x ^ data[i].y ^ data[i].z ^ data[i].w;
  if (bits == 0x12345678) *sink = bits;  // never, which the compiler cannot know
}
