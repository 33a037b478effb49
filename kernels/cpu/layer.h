// The parts of a decoder layer and the arguments Python fills in (kernels/cpu/library.py mirrors these structs).
#pragma once
#include "linear.h"

namespace braid {

// How K and V lie in their pages: as panels of the inner kernel, so that attention is the same product as a linear layer.
//   K of (page, head): [tiles of 16 or 32 keys][words of head_dim][keys]    a lane is a key, no horizontal sums
//   V of (page, head): [panels of 16 or 32 dims][words of keys][dims]       a bf16 word pairs keys 2i and 2i + 1
template <class T>
struct KvLayout {
  static constexpr int per_word = Word<T>::k;
  long page_size, num_kv, head_dim;
  long key_tile, padded_keys, dim_words;    // K
  long dim_panel, padded_dims, key_words;   // V
  KvLayout(long page, long kv, long dim)
      : page_size(page), num_kv(kv), head_dim(dim), key_tile(page <= 16 ? 16 : 32),
        padded_keys((page + key_tile - 1) / key_tile * key_tile), dim_words((dim + per_word - 1) / per_word),
        dim_panel(dim <= 16 ? 16 : 32), padded_dims((dim + dim_panel - 1) / dim_panel * dim_panel),
        key_words(padded_keys / per_word) {}
  const uint32_t* keys(const T* pages, long page, long head) const {
    return reinterpret_cast<const uint32_t*>(pages) + (page * num_kv + head) * padded_keys * dim_words;
  }
  const uint32_t* values(const T* pages, long page, long head) const {
    return reinterpret_cast<const uint32_t*>(pages) + (page * num_kv + head) * padded_dims * key_words;
  }
  // Element 0 of a slot's key or value, and how far from it element i lies.
  T* key_at(T* pages, long slot, long head) const {
    long s = slot % page_size;
    return reinterpret_cast<T*>(const_cast<uint32_t*>(keys(pages, slot / page_size, head)) +
                                s / key_tile * key_tile * dim_words + s % key_tile);
  }
  long key_step(long i) const { return i / per_word * key_tile * per_word + i % per_word; }
  T* value_at(T* pages, long slot, long head) const {
    long s = slot % page_size;
    return reinterpret_cast<T*>(const_cast<uint32_t*>(values(pages, slot / page_size, head)) + s / per_word * dim_panel) +
           s % per_word;
  }
  long value_step(long i) const { return (i / dim_panel * dim_panel * key_words + i % dim_panel) * per_word; }

  void write_key(T* pages, long slot, long head, const T* key) const {
    T* at = key_at(pages, slot, head);
    for (long i = 0; i < head_dim; i++) at[key_step(i)] = key[i];
    if (head_dim % per_word) std::memset(at + key_step(head_dim - 1) + 1, 0, sizeof(T));
  }
  void write_value(T* pages, long slot, long head, const T* value) const {
    T* at = value_at(pages, slot, head);
    for (long i = 0; i < head_dim; i++) at[value_step(i)] = value[i];
  }
  // From the pages of one pool to those of another, or of the same one.
  void move(const T* k_from, const T* v_from, T* k_pages, T* v_pages, long from, long to, long head) const {
    const T *k = key_at(const_cast<T*>(k_from), from, head), *v = value_at(const_cast<T*>(v_from), from, head);
    T *to_k = key_at(k_pages, to, head), *to_v = value_at(v_pages, to, head);
    for (long i = 0; i < dim_words * per_word; i++) to_k[key_step(i)] = k[key_step(i)];
    for (long i = 0; i < head_dim; i++) to_v[value_step(i)] = v[value_step(i)];
  }
};

enum Method : int32_t { kQuest = 0, kDoubleSparsity = 1, kTidal = 2, kDoubleSparsityPages = 3 };  // sparse.py Method
enum Role : int32_t { kDense = 0, kChoose = 1, kList = 2, kFollow = 3 };  // sparse.py Role

// What one layer does for sparse rows, and its metadata of keys under the page ids of K and V. Null in its place: none.
//   bounds of (page, head, sub-page): [largest, smallest][head_dim], then zeros up to bound_words
//   labels of (page, head): as K of keys that have the channels for elements
//   labels of 4 bits: the same of words of four bytes of codes + 8, channel b in the low half of byte b, channel bytes + b in the
//   high half, bytes = ceil(channels / 2)
//   label_scales of (page, head): bf16 [padded keys]; null: labels are elements of the keys as they are
struct SparseLayer {
  void *bounds, *labels, *label_scales;  // null: not kept
  const int32_t* channels;  // [num_kv][num_channels]
  int64_t num_channels;
  int32_t roles[4];
};

// Keys that have bounds of their own (sparse.py sub_page).
inline long sub_page(long page_size) { return page_size % 8 ? page_size : 8; }

// Words of a sub-page's bounds: whole vectors.
template <class T>
long bound_words(long head_dim) {
  return (2 * head_dim + Word<T>::k * kLanes - 1) / (Word<T>::k * kLanes) * kLanes;
}

// The sparse rows of a step. Null in its place: there are none.
struct SparseRows {
  const int32_t *index, *methods, *budgets;
  int32_t* lists;  // [sparse rows][num_kv][most]
  int64_t most;
};

struct QkvArgs {
  const void* qkv;
  void *q_out, *k_pages, *v_pages;
  const float* cos_sin;
  const void *q_norm, *k_norm;
  const int32_t* positions;
  const int64_t* slots;
  const SparseLayer* layer;
  int64_t rows, num_q, num_kv, head_dim, rotary_dim, page_size;
  float eps;
  int32_t is_bf16;
};

struct AttentionArgs {
  const void *q, *k_pages, *v_pages;
  void* out;
  const int32_t *page_table, *row_seq, *positions, *visible, *span_starts;
  const int64_t* tree;          // null in a step without draft trees
  const int32_t* tree_starts;
  const SparseRows* sparse;
  const SparseLayer* layer;
  int64_t max_pages, num_spans, num_q, num_kv, head_dim, page_size, window;  // window 0: none
  float scale;
  int32_t is_bf16;
};

// Single slots' K and V copied in list order, inside one layer's pages or from those of another pool.
struct MoveArgs {
  const void *k_from, *v_from;
  void *k_pages, *v_pages;
  const int64_t *from, *to;
  const SparseLayer* layer;
  int64_t count, num_kv, head_dim, page_size;
  int32_t is_bf16;
};

// Attention with its residual: x [rows, hidden] is the residual stream, out its successor. qkv.qkv, qkv.q_out, attention.q and
// attention.out are filled in here from scratch memory.
struct AttentionBlockArgs {
  const void *x, *norm;
  void* out;
  const Weight *qkv_weight, *out_weight;
  QkvArgs qkv;
  AttentionArgs attention;
};

// What one layer of a run has of its own.
struct DenseLayer {
  const void* norm;
  const Weight *qkv_weight, *out_weight;
  const void *q_norm, *k_norm;
  const float* cos_sin;
  void *k_pages, *v_pages;
  const void* mlp_norm;
  const Weight *gate_up, *down;
  const SparseLayer* sparse;
  int64_t window;
  float scale, eps, mlp_eps;
  int32_t unused;
};

// Whole layers. step: the first layer's attention, of which the others take the rows and sizes; step.out is the result.
struct DenseLayersArgs {
  AttentionBlockArgs step;
  const DenseLayer* layers;
  int64_t num_layers;
};

template <class T>
void rms_norm(Pool*, const T* x, const T* weight, long rows, long n, float eps, T* out);
template <class T>
void silu_mul(Pool*, const T* gate_up, long rows, long n, T* out);
template <class T>
void qkv_rope_write(Pool*, const QkvArgs&);
template <class T>
void paged_attention(Pool*, const AttentionArgs&);

}  // namespace braid
