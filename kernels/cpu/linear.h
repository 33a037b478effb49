// Packed weights and the matrix product y = x W^T (+ bias) (+ residual), for any number of rows.
#pragma once
#include "micro.h"
#include "pool.h"

namespace braid {

constexpr int kPanel = 32;  // columns (output features) of a weight panel: two vectors

enum WeightFormat : int32_t { kBf16 = 0, kFloat = 1, kInt8 = 2, kInt4 = 3 };
constexpr long kGroup = 32;  // elements of K that share a scale in kInt4

// Filled in by Python (kernels/cpu/library.py mirrors the layout).
struct Weight {
  const void* panels;   // [N/32][steps][32] words, or the quantised forms of linear.cpp
  const float* scales;  // kInt8: [N padded]; kInt4: [N/32][groups][32]
  const float* bias;    // [N padded] or null
  int64_t n, k;
  int32_t format, dtype;  // dtype: that of the activations, kBf16 or kFloat
};

// x [rows, k], residual [rows, n] or null, y [rows, n] in x's type, or float if float_out. residual may be y itself.
void linear(Pool* pool, const Weight& w, const void* x, long rows, const void* residual, void* y, bool float_out);

}  // namespace braid
