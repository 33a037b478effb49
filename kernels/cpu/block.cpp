// The two halves of a decoder layer, each one call: a step of a few rows would otherwise pay more for Python than for norms.
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

template <class T>
void mlp_block(Pool* pool, const MlpBlockArgs& g) {
  long hidden = g.gate_up->k, inner = g.down->k;
  T* normed = scratch_of<T>(4, g.rows * (hidden + 3 * inner));
  T *gate_up = normed + g.rows * hidden, *active = gate_up + g.rows * 2 * inner;
  rms_norm(pool, static_cast<const T*>(g.x), static_cast<const T*>(g.norm), g.rows, hidden, g.eps, normed);
  linear(pool, *g.gate_up, normed, g.rows, nullptr, gate_up, false);
  silu_mul(pool, gate_up, g.rows, inner, active);
  linear(pool, *g.down, active, g.rows, g.x, g.out, false);
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

void braid_mlp_block(void* pool, const MlpBlockArgs* args) {
  if (args->is_bf16)
    mlp_block<bf16>(static_cast<Pool*>(pool), *args);
  else
    mlp_block<float>(static_cast<Pool*>(pool), *args);
}
}
