// What a warp has found of a segment: weighted sums of values, kept in registers.

struct Softmax {  // of this lane's columns 2t, 2t + 1 of each set of 8
  float reference[NUM_COLS][2], denominator[NUM_COLS][2];
  float mean_weight[NUM_COLS][2];  // of the mean of a block's values: see add_value_mean
  float sums[NUM_COLS][VALUE_TILES][4];
  DEVICE void reset() {
    for (int n = 0; n < NUM_COLS; n++) {
      reference[n][0] = reference[n][1] = LOWEST;
      denominator[n][0] = denominator[n][1] = mean_weight[n][0] = mean_weight[n][1] = 0;
#pragma unroll
      for (int i = 0; i < VALUE_TILES; i++) sums[n][i][0] = sums[n][i][1] = sums[n][i][2] = sums[n][i][3] = 0;
    }
  }
  // Raise the references of columns if scores, plus the logarithms of value sizes, are far above them.
  // scores: [set][column set][2r + column], sizes: [set][r].
  template <int SETS>
  DEVICE void raise(const float (&scores)[SETS][NUM_COLS][4], const float (&sizes)[SETS][2]) {
#pragma unroll
    for (int n = 0; n < NUM_COLS; n++) {
      float highest[2] = {LOWEST, LOWEST};
#pragma unroll
      for (int s = 0; s < SETS; s++)
#pragma unroll
        for (int c = 0; c < 2; c++)
          highest[c] = fmaxf(highest[c], fmaxf(scores[s][n][c] + sizes[s][0], scores[s][n][2 + c] + sizes[s][1]));
      const bool is_high = highest[0] > reference[n][0] + HEADROOM || highest[1] > reference[n][1] + HEADROOM;
      if (!__any_sync(~0u, is_high)) continue;
#pragma unroll
      for (int c = 0; c < 2; c++) {
#pragma unroll
        for (int d = IS_SHARED ? 2 : 4; d < 32; d <<= 1)
          highest[c] = fmaxf(highest[c], __shfl_xor_sync(~0u, highest[c], d));
        const float raised = fmaxf(highest[c], reference[n][c]), decay = exp2_(reference[n][c] - raised);
        reference[n][c] = raised;
        denominator[n][c] *= decay;
        mean_weight[n][c] *= decay;
#pragma unroll
        for (int i = 0; i < VALUE_TILES; i++) {
          sums[n][i][c] *= decay;
          sums[n][i][2 + c] *= decay;
        }
      }
    }
  }
};

DEVICE float capped(float score, float softcap) {
  if (softcap > 0) score = softcap * tanhf(score / softcap);
  return score;
}

// Dimension of row `row` of tile i of sums over exact tokens: see load_dims.
DEVICE int exact_dim(int i, int row) {
  const int in_pair = row / 2 % 4 * 8 + row / 8 * 2 + row % 2;
  return (i | 1) < VALUE_TILES ? i / 2 * 32 + i % 2 * 4 + in_pair : 16 * i + row / 2 % 4 * 4 + row / 8 * 2 + row % 2;
}

// Write what a warp has found to `target`, in the order of a partial.
template <bool IS_EXACT>
DEVICE void write_warp(const Softmax& softmax, int lane, float* target) {
  const int g = lane >> 2, t = lane & 3;
#pragma unroll
  for (int n = 0; n < NUM_COLS; n++)
#pragma unroll
    for (int c = 0; c < 2; c++) {
      float total = softmax.denominator[n][c];
#pragma unroll
      for (int d = IS_SHARED ? 2 : 4; d < 32; d <<= 1) total += __shfl_xor_sync(~0u, total, d);
      const int column = 8 * n + 2 * t + c;
      if (g == 0 && column < GROUP) {
        target[SUMS + column] = softmax.reference[n][c];
        target[SUMS + GROUP + column] = total;
      }
#pragma unroll
      for (int i = 0; i < VALUE_TILES; i++) {
        float sums[2] = {softmax.sums[n][i][c], softmax.sums[n][i][2 + c]};
        const int r_of_lane = t >> 1;
        if (IS_SHARED) {  // lanes with t < 2 write the rows r = 0, the others those of r = 1
          const float others = __shfl_xor_sync(~0u, r_of_lane ? sums[0] : sums[1], 2);
          sums[0] = (r_of_lane ? sums[1] : sums[0]) + others;
        }
#pragma unroll
        for (int j = 0; j < (IS_SHARED ? 1 : 2); j++) {
          const int r = IS_SHARED ? r_of_lane : j;
          const int dim = IS_EXACT ? exact_dim(i, 8 * r + g) : 16 * i + 8 * r + g;
          const int head = IS_SHARED ? column & 3 : column;
          if (head < GROUP) target[head * VALUE_DIM + dim] = sums[j];
        }
      }
    }
}
