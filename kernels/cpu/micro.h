// The one inner kernel: C[MR x 16*NV] (+)= A[MR x K] * B[K x 16*NV], used by linear layers, q.k and p.v alike.
//
// B is a panel: for each word of K (two bf16 or one float), 16*NV columns side by side. Every output has one accumulator
// that walks K in order, so its value depends on neither MR nor its row: this is what makes the engine batch invariant.
// 12 x 2 accumulators + 2 B vectors + 1 broadcast stay inside 32 registers, and 24 independent chains hide the latency.
#pragma once
#include "simd.h"

namespace braid {

constexpr int kMaxRows = 12;

struct MicroArgs {
  const uint32_t* a;
  long a_row;  // words between rows of A (ignored when packed: rows of one word of K are then adjacent)
  const uint32_t* b;
  long steps;  // words of K
  float* c;
  long c_row;
  bool accumulate;       // continue from what C holds
  const char* prefetch;  // first byte to pull towards the cores while computing
  int prefetch_lines;    // cache lines per step: 0, 1 or 2
};

template <class T, int MR, int NV, bool PACKED>
static void micro(const MicroArgs& g) {
  vf acc[MR][NV];
  for (int r = 0; r < MR; r++)
    for (int v = 0; v < NV; v++) acc[r][v] = g.accumulate ? load<vf>(g.c + r * g.c_row + v * kLanes) : vf{};
  const uint32_t* a = g.a;
  const uint32_t* b = g.b;
  const char* ahead = g.prefetch;
  const long a_row = PACKED ? 1 : g.a_row;
  const int lines = g.prefetch_lines;
  for (long k = 0; k < g.steps; k++) {
    if (lines) {
      __builtin_prefetch(ahead, 0, 2);
      if (lines > 1) __builtin_prefetch(ahead + 64, 0, 2);
      ahead += 64 * lines;
    }
    vu columns[NV];
    for (int v = 0; v < NV; v++) columns[v] = load<vu>(b + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < MR; r++)
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) acc[r][v] = Word<T>::dot(acc[r][v], columns[v], a[r * a_row]);
    a += PACKED ? MR : 1;
    b += NV * kLanes;
  }
  for (int r = 0; r < MR; r++)
    for (int v = 0; v < NV; v++) store(g.c + r * g.c_row + v * kLanes, acc[r][v]);
}

using MicroFn = void (*)(const MicroArgs&);

template <class T, int NV, bool PACKED>
BRAID_INLINE MicroFn micro_for(int rows) {
  static constexpr MicroFn table[kMaxRows] = {
      micro<T, 1, NV, PACKED>, micro<T, 2, NV, PACKED>,  micro<T, 3, NV, PACKED>,  micro<T, 4, NV, PACKED>,
      micro<T, 5, NV, PACKED>, micro<T, 6, NV, PACKED>,  micro<T, 7, NV, PACKED>,  micro<T, 8, NV, PACKED>,
      micro<T, 9, NV, PACKED>, micro<T, 10, NV, PACKED>, micro<T, 11, NV, PACKED>, micro<T, 12, NV, PACKED>};
  return table[rows - 1];
}

// Rows [first, first + count) of block `i` when `rows` rows are cut into near-equal blocks of at most 12.
struct RowBlocks {
  long blocks, base, extra;
  explicit RowBlocks(long rows) : blocks((rows + kMaxRows - 1) / kMaxRows), base(0), extra(0) {
    if (blocks) base = rows / blocks, extra = rows % blocks;
  }
  long first(long i) const { return i * base + (i < extra ? i : extra); }
  long count(long i) const { return base + (i < extra ? 1 : 0); }
};

}  // namespace braid
