// See linear.h. Tiles are weight panels: each is read from memory once per call, by one thread, whatever the row count.
//
// Up to 12 rows one pass streams the panel at memory speed; above, the panel stays in L2 for the further passes while the
// first two prefetch the thread's next panel. Splitting K is forbidden: it would make a row depend on its company.
#include "linear.h"

namespace braid {
namespace {

// Bytes the streaming pass prefetches ahead: 4 KB is best at 1 row (8 KB costs 14 %), 8 KB at 8 rows (4 KB costs 6 %).
constexpr long kAheadFewRows = 4096, kAhead = 8192, kFewRows = 3;
constexpr long kPackRows = 24;    // from here on rows are repacked, so that one word of K is one cache line for 12 rows
constexpr long kChunkRows = 384;  // rows of A a tile covers: bounds what one thread holds, and makes tiles for many cores
constexpr long kBlockWords = 64;  // words of K dequantised at a time: 8 KB, stays in L1

struct Job {
  const Weight* w;
  const uint32_t* a;  // packed rows, or the caller's x
  long a_row, rows, steps;
  bool packed;
  const void* residual;
  void* y;
  bool float_out;
};

long words_of(long k, int per_word) { return (k + per_word - 1) / per_word; }

// Bias, residual and the store of a block of finished sums. One rounding, at the end.
template <class T, class Out>
void finish(const Job& job, long row0, long rows, long col0, const float* sums) {
  const Weight& w = *job.w;
  const T* residual = static_cast<const T*>(job.residual);
  Out* y = static_cast<Out*>(job.y);
  for (int v = 0; v < 2; v++) {
    long col = col0 + v * kLanes, width = w.n - col;
    if (width <= 0) break;
    vf bias = w.bias ? load<vf>(w.bias + col) : vf{};
    vf scale = w.format == kInt8 ? load<vf>(w.scales + col) : vf{};
    for (long r = 0; r < rows; r++) {
      vf s = load<vf>(sums + r * kPanel + v * kLanes);
      if (w.format == kInt8) s = s * scale;
      if (w.bias) s = s + bias;
      if (residual) s = s + load_tail(residual + (row0 + r) * w.n + col, width);
      store_tail(y + (row0 + r) * w.n + col, s, width);
    }
  }
}

// Expands `count` words of K from a quantised panel into the words the inner kernel reads.
template <class T>
void dequantise(const Weight& w, long panel, long steps, long first, long count, uint32_t* out) {
  constexpr int per_word = Word<T>::k;
  long k_padded = steps * per_word;
  long groups = (k_padded + kGroup - 1) / kGroup;
  for (long i = 0; i < count; i++) {
    long k = (first + i) * per_word;
    for (int v = 0; v < 2; v++) {
      vf value[2];
      for (int h = 0; h < per_word; h++) {
        if (w.format == kInt8) {  // [panel][k][32] int8
          const int8_t* q = static_cast<const int8_t*>(w.panels) + (panel * k_padded + k + h) * kPanel + v * kLanes;
          value[h] = __builtin_convertvector(load_bytes(q), vf);
        } else {  // [panel][k][16] bytes: low nibble = column c, high nibble = column c + 16, biased by 8
          const uint8_t* q = static_cast<const uint8_t*>(w.panels) + (panel * k_padded + k + h) * kLanes;
          vi nibble = (load_bytes(q) >> (4 * v)) & 15;
          vf scale = load<vf>(w.scales + (panel * groups + (k + h) / kGroup) * kPanel + v * kLanes);
          value[h] = __builtin_convertvector(nibble - 8, vf) * scale;
        }
      }
      uint32_t* at = out + i * kPanel + v * kLanes;
      if (per_word == 1) {
        store(at, value[0]);
      } else {
#if defined(__AVX512BF16__)
        vu lo = __builtin_convertvector((vh)_mm512_cvtneps_pbh((__m512)value[0]), vu);
        vu hi = __builtin_convertvector((vh)_mm512_cvtneps_pbh((__m512)value[1]), vu);
#else
        vu lo = __builtin_convertvector(to_bf16(value[0]), vu), hi = __builtin_convertvector(to_bf16(value[1]), vu);
#endif
        store(at, lo | (hi << 16));
      }
    }
  }
}

template <class T>
MicroFn pick(bool packed, long rows) {
  return packed ? micro_for<T, 2, true>(int(rows)) : micro_for<T, 2, false>(int(rows));
}

template <class T>
void store_block(const Job& job, long row0, long rows, long panel, const float* sums) {
  if (job.float_out)
    finish<T, float>(job, row0, rows, panel * kPanel, sums);
  else
    finish<T, T>(job, row0, rows, panel * kPanel, sums);
}

template <class T>
void run_panel(const Job& job, long panel, long block_begin, long block_end, const RowBlocks& blocks) {
  const uint32_t* b = static_cast<const uint32_t*>(job.w->panels) + panel * job.steps * kPanel;
  const char* here = reinterpret_cast<const char*>(b);
  const char* next = here + job.steps * kPanel * 4;
  alignas(64) float sums[kMaxRows * kPanel];
  bool streaming = block_end - block_begin == 1;
  for (long i = block_begin; i < block_end; i++) {
    long row0 = blocks.first(i), rows = blocks.count(i), pass = i - block_begin;
    MicroArgs g{job.a + row0 * (job.packed ? job.steps : job.a_row), job.a_row, b, job.steps, sums, kPanel, false, here, 0};
    if (streaming)
      g.prefetch = here + (rows <= kFewRows ? kAheadFewRows : kAhead), g.prefetch_lines = 2;
    else if (pass < 2)
      g.prefetch = next + pass * job.steps * 64, g.prefetch_lines = 1;
    pick<T>(job.packed, rows)(g);
    store_block<T>(job, row0, rows, panel, sums);
  }
}

// The quantised twin: blocks of K outside, so that each is expanded once per tile, with the sums of all rows kept.
template <class T>
void run_quantised(const Job& job, long panel, long block_begin, long block_end, const RowBlocks& blocks) {
  long first = blocks.first(block_begin), total = blocks.first(block_end - 1) + blocks.count(block_end - 1) - first;
  float* sums = scratch_of<float>(0, total * kPanel);
  alignas(64) uint32_t expanded[kBlockWords * kPanel];
  for (long k0 = 0; k0 < job.steps; k0 += kBlockWords) {
    long count = job.steps - k0 < kBlockWords ? job.steps - k0 : kBlockWords;
    dequantise<T>(*job.w, panel, job.steps, k0, count, expanded);
    for (long i = block_begin; i < block_end; i++) {
      long row0 = blocks.first(i), rows = blocks.count(i);
      const uint32_t* a = job.packed ? job.a + row0 * job.steps + k0 * rows : job.a + row0 * job.a_row + k0;
      MicroArgs g{a, job.a_row, expanded, count, sums + (row0 - first) * kPanel, kPanel, k0 > 0, nullptr, 0};
      pick<T>(job.packed, rows)(g);
    }
  }
  for (long i = block_begin; i < block_end; i++)
    store_block<T>(job, blocks.first(i), blocks.count(i), panel, sums + (blocks.first(i) - first) * kPanel);
}

// Rows as words; blocks of up to 12 rows interleaved word by word if `interleave`, else row after row (odd K only).
template <class T>
void pack_rows(const T* x, long k, long steps, long row0, long rows, bool interleave, uint32_t* out) {
  constexpr int per_word = Word<T>::k;
  for (long r = 0; r < rows; r++) {
    const T* row = x + (row0 + r) * k;
    for (long s = 0; s < k / per_word; s++) {
      uint32_t word;
      std::memcpy(&word, row + s * per_word, 4);
      out[interleave ? s * rows + r : r * steps + s] = word;
    }
    if (k % per_word) {  // bf16 with odd K: the second half of the last word is zero, never a neighbour's value
      uint32_t word = 0;
      std::memcpy(&word, row + k - 1, sizeof(T));
      out[interleave ? (steps - 1) * rows + r : r * steps + steps - 1] = word;
    }
  }
}

template <class T>
void linear_of(Pool* pool, const Weight& w, const T* x, long rows, const void* residual, void* y, bool float_out) {
  constexpr int per_word = Word<T>::k;
  Job job{&w, reinterpret_cast<const uint32_t*>(x), w.k / per_word, rows, words_of(w.k, per_word), rows >= kPackRows,
          residual, y, float_out};
  RowBlocks blocks(rows);
  if (job.packed || w.k % per_word) {
    uint32_t* packed = scratch_of<uint32_t>(1, rows * job.steps);
    auto pack = [&](long i) {
      pack_rows(x, w.k, job.steps, blocks.first(i), blocks.count(i), job.packed, packed + blocks.first(i) * job.steps);
    };
    if (rows * job.steps < 16384)
      for (long i = 0; i < blocks.blocks; i++) pack(i);
    else
      parallel(pool, blocks.blocks, pack);
    job.a = packed;
    job.a_row = job.steps;
  }
  long panels = (w.n + kPanel - 1) / kPanel;
  long chunks = (rows + kChunkRows - 1) / kChunkRows;
  bool quantised = w.format == kInt8 || w.format == kInt4;
  auto tile = [&](long t) {
    long chunk = t / panels, panel = t % panels;
    long begin = blocks.blocks * chunk / chunks, end = blocks.blocks * (chunk + 1) / chunks;
    if (quantised)
      run_quantised<T>(job, panel, begin, end, blocks);
    else
      run_panel<T>(job, panel, begin, end, blocks);
  };
  parallel(pool, panels * chunks, tile);
}

}  // namespace

void linear(Pool* pool, const Weight& w, const void* x, long rows, const void* residual, void* y, bool float_out) {
  if (!rows) return;
  if (w.dtype == kBf16)
    linear_of(pool, w, static_cast<const bf16*>(x), rows, residual, y, float_out);
  else
    linear_of(pool, w, static_cast<const float*>(x), rows, residual, y, float_out);
}

}  // namespace braid

using namespace braid;

extern "C" {

void braid_linear(void* pool, const Weight* w, const void* x, int64_t rows, const void* residual, void* y, int float_out) {
  linear(static_cast<Pool*>(pool), *w, x, rows, residual, y, float_out != 0);
}

// weight [n, k] of 2- or 4-byte elements -> [ceil(n/32)][steps][32] words, zero outside.
void braid_pack(void* pool, const void* weight, int64_t n, int64_t k, int element_bytes, void* out) {
  long per_word = 4 / element_bytes, steps = words_of(k, int(per_word));
  parallel(static_cast<Pool*>(pool), (n + kPanel - 1) / kPanel, [&](long panel) {
    uint32_t* words = static_cast<uint32_t*>(out) + panel * steps * kPanel;
    std::memset(words, 0, size_t(steps * kPanel * 4));
    for (long c = 0; c < kPanel && panel * kPanel + c < n; c++) {
      const char* row = static_cast<const char*>(weight) + (panel * kPanel + c) * k * element_bytes;
      for (long s = 0; s < steps; s++) {
        long have = (k - s * per_word < per_word ? k - s * per_word : per_word) * element_bytes;
        std::memcpy(words + s * kPanel + c, row + s * 4, size_t(have));
      }
    }
  });
}
}
