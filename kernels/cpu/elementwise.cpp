// The glue between matrix products: embedding, RMSNorm, SiLU, and the split / norm / rotate / write of a qkv row.
//
// Each works row by row with fp32 arithmetic inside and one rounding where the reference rounds. Small steps stay on the
// calling thread: waking a worker costs more than a few rows of these.
#include <cmath>

#include "sparse.h"

namespace braid {
namespace {

constexpr long kSerialElements = 16384;  // below this a call is not worth a second core

template <class Body>
void rows_in_parallel(Pool* pool, long rows, long row_elements, Body&& body) {
  if (rows * row_elements <= kSerialElements) {
    for (long r = 0; r < rows; r++) body(r);
    return;
  }
  long per_tile = (kSerialElements / 4 + row_elements - 1) / row_elements;
  parallel(pool, (rows + per_tile - 1) / per_tile, [&](long t) {
    long end = (t + 1) * per_tile < rows ? (t + 1) * per_tile : rows;
    for (long r = t * per_tile; r < end; r++) body(r);
  });
}

// Sum of squares in 16 lanes, then a fixed tree: the same for a row wherever it is.
template <class T>
float inverse_rms(const T* x, long n, float eps) {
  vf sum{};
  for (long i = 0; i < n; i += kLanes) {
    vf v = load_tail(x + i, n - i);
    sum = sum + v * v;
  }
  return 1.f / std::sqrt(sum_lanes(sum) / float(n) + eps);
}

// x / rms * weight in fp32, rounded once.
template <class T>
void norm_row(const T* x, const T* weight, long n, float eps, T* out) {
  float inverse = inverse_rms(x, n, eps);
  for (long i = 0; i < n; i += kLanes) {
    store_tail(out + i, load_tail(x + i, n - i) * inverse * load_tail(weight + i, n - i), n - i);
  }
}

// GPT-NeoX halves: (a, b) -> (a cos - b sin, b cos + a sin), pairs rotary_dim / 2 apart.
template <class T>
void rotate(T* x, const float* cos_sin, long rotary_dim) {
  long half = rotary_dim / 2;
  for (long i = 0; i < half; i += kLanes) {
    vf c = load_tail(cos_sin + i, half - i), s = load_tail(cos_sin + half + i, half - i);
    vf a = load_tail(x + i, half - i), b = load_tail(x + half + i, half - i);
    store_tail(x + i, a * c - b * s, half - i);
    store_tail(x + half + i, b * c + a * s, half - i);
  }
}

}  // namespace

template <class T>
void rms_norm(Pool* pool, const T* x, const T* weight, long rows, long n, float eps, T* out) {
  rows_in_parallel(pool, rows, n, [&](long r) { norm_row(x + r * n, weight, n, eps, out + r * n); });
}

template <class T>
void silu_mul(Pool* pool, const T* gate_up, long rows, long n, T* out) {
  rows_in_parallel(pool, rows, n, [&](long r) {
    const T* gate = gate_up + r * 2 * n;
    for (long i = 0; i < n; i += kLanes) {
      vf g = load_tail(gate + i, n - i);
      store_tail(out + r * n + i, g / (1.f + vexp(-g)) * load_tail(gate + n + i, n - i), n - i);
    }
  });
}

template <class T>
void qkv_rope_write(Pool* pool, const QkvArgs& g) {
  long heads = g.num_q + 2 * g.num_kv, d = g.head_dim;
  KvLayout<T> layout(g.page_size, g.num_kv, d);
  rows_in_parallel(pool, g.rows, heads * d, [&](long r) {
    const T* row = static_cast<const T*>(g.qkv) + r * heads * d;
    const float* cos_sin = g.cos_sin + g.positions[r] * g.rotary_dim;
    T* q = static_cast<T*>(g.q_out) + r * g.num_q * d;
    T* key = scratch_of<T>(2, d + kLanes);
    for (long h = 0; h < g.num_q + g.num_kv; h++) {
      bool is_q = h < g.num_q;
      T* at = is_q ? q + h * d : key;
      const T* norm = static_cast<const T*>(is_q ? g.q_norm : g.k_norm);
      if (norm)
        norm_row(row + h * d, norm, d, g.eps, at);
      else
        std::memcpy(at, row + h * d, size_t(d) * sizeof(T));
      rotate(at, cos_sin, g.rotary_dim);
      if (is_q) continue;
      layout.write_key(static_cast<T*>(g.k_pages), g.slots[r], h - g.num_q, key);
      if (g.layer && g.layer->labels) write_label(*g.layer, layout, static_cast<const T*>(g.k_pages), g.slots[r], h - g.num_q);
    }
    for (long h = 0; h < g.num_kv; h++)
      layout.write_value(static_cast<T*>(g.v_pages), g.slots[r], h, row + (g.num_q + g.num_kv + h) * d);
  });
  if (!g.layer || !g.layer->bounds) return;
  rows_in_parallel(pool, g.rows, g.num_kv * d, [&](long r) {  // all keys are written now
    for (long h = 0; h < g.num_kv && completes(g.slots[r], g.page_size); h++)
      write_bounds(*g.layer, layout, static_cast<const T*>(g.k_pages), g.slots[r], h);
  });
}

// A few slots of a tree's accepted path: less work than waking a thread.
template <class T>
static void move_kv(const MoveArgs& g) {
  KvLayout<T> layout(g.page_size, g.num_kv, g.head_dim);
  for (long m = 0; m < g.count; m++)
    for (long h = 0; h < g.num_kv; h++) {
      const T* k_pages = static_cast<const T*>(g.k_pages);
      layout.move(static_cast<const T*>(g.k_from), static_cast<const T*>(g.v_from), static_cast<T*>(g.k_pages),
                  static_cast<T*>(g.v_pages), g.from[m], g.to[m], h);
      if (g.layer && g.layer->labels) write_label(*g.layer, layout, k_pages, g.to[m], h);
      if (g.layer && g.layer->bounds && completes(g.to[m], g.page_size))
        write_bounds(*g.layer, layout, k_pages, g.to[m], h);
    }
}

template void rms_norm(Pool*, const bf16*, const bf16*, long, long, float, bf16*);
template void rms_norm(Pool*, const float*, const float*, long, long, float, float*);
template void silu_mul(Pool*, const bf16*, long, long, bf16*);
template void silu_mul(Pool*, const float*, long, long, float*);
template void qkv_rope_write<bf16>(Pool*, const QkvArgs&);
template void qkv_rope_write<float>(Pool*, const QkvArgs&);

}  // namespace braid

using namespace braid;

extern "C" {

void braid_rms_norm(void* pool, const void* x, const void* weight, int64_t rows, int64_t n, float eps, int is_bf16, void* out) {
  Pool* p = static_cast<Pool*>(pool);
  if (is_bf16)
    rms_norm(p, static_cast<const bf16*>(x), static_cast<const bf16*>(weight), rows, n, eps, static_cast<bf16*>(out));
  else
    rms_norm(p, static_cast<const float*>(x), static_cast<const float*>(weight), rows, n, eps, static_cast<float*>(out));
}

void braid_silu_mul(void* pool, const void* gate_up, int64_t rows, int64_t n, int is_bf16, void* out) {
  Pool* p = static_cast<Pool*>(pool);
  if (is_bf16)
    silu_mul(p, static_cast<const bf16*>(gate_up), rows, n, static_cast<bf16*>(out));
  else
    silu_mul(p, static_cast<const float*>(gate_up), rows, n, static_cast<float*>(out));
}

void braid_qkv_rope_write(void* pool, const QkvArgs* args) {
  if (args->is_bf16)
    qkv_rope_write<bf16>(static_cast<Pool*>(pool), *args);
  else
    qkv_rope_write<float>(static_cast<Pool*>(pool), *args);
}

void braid_move_kv(const MoveArgs* args) {
  if (args->is_bf16)
    move_kv<bf16>(*args);
  else
    move_kv<float>(*args);
}
}
