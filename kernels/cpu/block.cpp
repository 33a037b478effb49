// Attention with its residual, and whole layers, in one call: a step of a few rows would otherwise wait for Python, which runs
// slowly after each product because the weights have emptied its caches.
#include "layer.h"

namespace braid {
namespace {

// Intermediate rows live in the calling thread's scratch: they are read by the next product and by nobody else.
template <class T>
void attention_block(Pool* pool, AttentionBlockArgs g) {
  long rows = g.qkv.rows, hidden = g.qkv_weight->k, width = g.qkv_weight->n, heads = g.qkv.num_q * g.qkv.head_dim;
  T* normed = scratch_of<T>(4, rows * (hidden + width + 2 * heads));
  T *qkv = normed + rows * hidden, *q = qkv + rows * width, *attended = q + rows * heads;
  rms_norm(pool, static_cast<const T*>(g.x), static_cast<const T*>(g.norm), rows, hidden, g.qkv.eps, normed);
  linear(pool, *g.qkv_weight, normed, rows, nullptr, qkv, false);
  g.qkv.qkv = qkv;
  g.qkv.q_out = q;
  qkv_rope_write<T>(pool, g.qkv);
  g.attention.q = q;
  g.attention.out = attended;
  paged_attention<T>(pool, g.attention);
  linear(pool, *g.out_weight, attended, rows, g.x, g.out, false);
}

// x becomes x + down(silu_mul(gate_up(norm(x)))).
template <class T>
void gated_mlp(Pool* pool, const DenseLayer& layer, T* x, long rows) {
  long hidden = layer.gate_up->k, inner = layer.down->k;
  T* normed = scratch_of<T>(4, rows * (hidden + 3 * inner));
  T *gate_up = normed + rows * hidden, *active = gate_up + rows * 2 * inner;
  rms_norm(pool, x, static_cast<const T*>(layer.mlp_norm), rows, hidden, layer.mlp_eps, normed);
  linear(pool, *layer.gate_up, normed, rows, nullptr, gate_up, false);
  silu_mul(pool, gate_up, rows, inner, active);
  linear(pool, *layer.down, active, rows, x, x, false);
}

AttentionBlockArgs of_layer(AttentionBlockArgs step, const DenseLayer& layer) {
  step.norm = layer.norm;
  step.qkv_weight = layer.qkv_weight;
  step.out_weight = layer.out_weight;
  step.qkv.q_norm = layer.q_norm;
  step.qkv.k_norm = layer.k_norm;
  step.qkv.cos_sin = layer.cos_sin;
  step.qkv.eps = layer.eps;
  step.qkv.k_pages = layer.k_pages;
  step.qkv.v_pages = layer.v_pages;
  step.qkv.layer = layer.sparse;
  step.attention.layer = layer.sparse;
  step.attention.k_pages = layer.k_pages;
  step.attention.v_pages = layer.v_pages;
  step.attention.window = layer.window;
  step.attention.scale = layer.scale;
  return step;
}

template <class T>
void dense_layers(Pool* pool, const DenseLayersArgs& g) {
  for (long i = 0; i < g.num_layers; i++) {
    AttentionBlockArgs attention = of_layer(g.step, g.layers[i]);
    if (i) attention.x = g.step.out;
    attention_block<T>(pool, attention);
    gated_mlp(pool, g.layers[i], static_cast<T*>(g.step.out), g.step.qkv.rows);
  }
}

}  // namespace
}  // namespace braid

using namespace braid;

extern "C" {

void braid_attention_block(void* pool, const AttentionBlockArgs* args) {
  if (args->qkv.is_bf16)
    attention_block<bf16>(static_cast<Pool*>(pool), *args);
  else
    attention_block<float>(static_cast<Pool*>(pool), *args);
}

void braid_dense_layers(void* pool, const DenseLayersArgs* args) {
  if (args->step.qkv.is_bf16)
    dense_layers<bf16>(static_cast<Pool*>(pool), *args);
  else
    dense_layers<float>(static_cast<Pool*>(pool), *args);
}
}
