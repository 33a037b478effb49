// Selections of sparse attention and the metadata they read. Equal scores: the lowest index. Nothing here depends on other rows.
#include "sparse.h"

#include <algorithm>
#include <cmath>
#include <functional>

namespace braid {
namespace {

constexpr int kBinBits = 11;
constexpr long kHeads = 4;  // that are scored together: a label is loaded once for all

// Order of floats as order of integers, so that a NaN has a place, too, and the same one on every machine.
uint32_t sortable(float x) {
  x += 0.f;  // -0 is 0
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// first + the positions of the `count` highest of n scores, ascending. A histogram finds the bin of the last one to take, so
// that only that bin's scores are put in order.
int32_t* take_best(const float* scores, long n, long count, int32_t first, int32_t* out) {
  uint32_t* order = scratch_of<uint32_t>(2, 2 * n + 1);
  uint32_t* in_bin = order + n;
  uint32_t sizes[1 << kBinBits] = {};
  for (long i = 0; i < n; i++) {
    order[i] = sortable(scores[i]);
    sizes[order[i] >> (32 - kBinBits)]++;
  }
  uint32_t bin = (1 << kBinBits) - 1;
  long above = 0;
  for (; above + sizes[bin] < count; bin--) above += sizes[bin];
  long members = 0;
  for (long i = 0; i < n; i++)
    if (order[i] >> (32 - kBinBits) == bin) in_bin[members++] = order[i];
  std::nth_element(in_bin, in_bin + (count - above - 1), in_bin + members, std::greater<uint32_t>());
  uint32_t last = in_bin[count - above - 1];
  long equals = count - above - std::count_if(in_bin, in_bin + members, [&](uint32_t x) { return x > last; });
  for (long i = 0; i < n; i++)
    if (order[i] > last || (order[i] == last && equals-- > 0)) *out++ = int32_t(first + i);
  return out;
}

long code_bytes(const SparseLayer& layer) { return (layer.num_channels + 1) / 2; }

template <class T>
const T* query(const AttentionArgs& g, long token, long head) {
  return static_cast<const T*>(g.q) + (token * g.num_q + head) * g.head_dim;
}

}  // namespace

bool chooses(const AttentionArgs& g, long token) {
  if (!g.sparse || !g.layer) return false;
  long at = g.sparse->index[token];
  return at >= 0 && g.layer->roles[g.sparse->methods[at]] != kDense && g.visible[token] > g.sparse->budgets[at];
}

// A sub-page's bound is sum_d max(q_d smallest_d, q_d largest_d) = max(q, 0) . largest + min(q, 0) . smallest: one product of
// twice the width. The group's queries are laid out for it once. A page is as good as the best of its sub-pages.
template <class T>
void choose_pages(const AttentionArgs& g, long token, long head, int32_t* chosen) {
  const int32_t* pages = g.page_table + g.row_seq[token] * g.max_pages;
  long visible = g.visible[token], group = g.num_q / g.num_kv, dim = g.head_dim, words = bound_words<T>(dim);
  long end = (visible + g.page_size - 1) / g.page_size, late = (visible - kLastKeys) / g.page_size;
  long parts = g.page_size / sub_page(g.page_size), page_words = parts * words, distance = (5 + parts) / parts;
  uint32_t* q = scratch_of<uint32_t>(1, group * words + late);
  float* scores = reinterpret_cast<float*>(q + group * words);
  std::memset(q, 0, size_t(group * words) * 4);
  for (long h = 0; h < group; h++) {
    T* split = reinterpret_cast<T*>(q + h * words);
    const T* from = query<T>(g, token, head * group + h);
    for (long d = 0; d < dim; d++) split[to_float(from[d]) > 0.f ? d : dim + d] = from[d];
  }
  for (long p = 1; p < late; p++) {
    const uint32_t* bounds = static_cast<const uint32_t*>(g.layer->bounds) + (pages[p] * g.num_kv + head) * page_words;
    long soon = pages[p + distance < late ? p + distance : p];
    const uint32_t* ahead = static_cast<const uint32_t*>(g.layer->bounds) + (soon * g.num_kv + head) * page_words;
    for (long w = 0; w < page_words; w += kLanes) __builtin_prefetch(ahead + w);
    float best = 0.f;
    for (long at = 0; at < page_words; at += words)
      for (long h = 0; h < group; h++) {
        vf sum{};
        for (long w = 0; w < words; w += kLanes) sum = Word<T>::each(sum, load<vu>(bounds + at + w), load<vu>(q + h * words + w));
        float bound = sum_lanes(sum);
        best = at + h && best >= bound ? best : bound;
      }
    scores[p] = best;
  }
  *chosen++ = 0;
  long count = g.sparse->budgets[g.sparse->index[token]] / g.page_size - 1 - (end - late);
  chosen = take_best(scores + 1, late - 1, count, 1, chosen);
  for (long p = late; p < end; p++) *chosen++ = int32_t(p);
}

void choose_keys(const AttentionArgs& g, long token, const float* scores, int32_t* chosen) {
  long visible = g.visible[token], count = g.sparse->budgets[g.sparse->index[token]] - kFirstKeys - kLastKeys;
  for (long i = 0; i < kFirstKeys; i++) *chosen++ = int32_t(i);
  chosen = take_best(scores + kFirstKeys, visible - kFirstKeys - kLastKeys, count, kFirstKeys, chosen);
  for (long i = visible - kLastKeys; i < visible; i++) *chosen++ = int32_t(i);
}

// A page's labels, a vector of keys at a time: as they are, and as codes whose scale is multiplied last.
template <class T>
struct PlainLabels {
  const T* labels;
  long padded;
  PlainLabels(const SparseLayer& layer, long record, long padded)
      : labels(static_cast<const T*>(layer.labels) + record * layer.num_channels * padded), padded(padded) {}
  vf channel(long c, long s) const { return load_vec(labels + c * padded + s); }
  vf scaled(vf score, long) const { return score; }
};
struct CodedLabels {
  const uint8_t* codes;
  const bf16* scales;
  long bytes, padded;
  CodedLabels(const SparseLayer& layer, long record, long padded)
      : codes(static_cast<const uint8_t*>(layer.labels) + record * code_bytes(layer) * padded),
        scales(static_cast<const bf16*>(layer.label_scales) + record * padded), bytes(code_bytes(layer)), padded(padded) {}
  vf channel(long c, long s) const {
    vi pairs = __builtin_convertvector(load<vb>(codes + c % bytes * padded + s), vi);
    return __builtin_convertvector(((c < bytes ? pairs : pairs >> 4) & 15) - 8, vf);
  }
  vf scaled(vf score, long s) const { return score * load_vec(scales + s); }
};

template <class T, class Labels>
void scores_of(const AttentionArgs& g, long token, long head, float* scores) {
  KvLayout<T> layout(g.page_size, g.num_kv, g.head_dim);
  const int32_t* pages = g.page_table + g.row_seq[token] * g.max_pages;
  const int32_t* channels = g.layer->channels + head * g.layer->num_channels;
  long group = g.num_q / g.num_kv, num_channels = g.layer->num_channels, padded = layout.padded_keys;
  long heads = (group + kHeads - 1) / kHeads * kHeads;
  float* weights = scratch_of<float>(2, num_channels * heads);  // [channels][heads]
  std::memset(weights, 0, size_t(num_channels * heads) * sizeof(float));
  for (long h = 0; h < group; h++)
    for (long c = 0; c < num_channels; c++)
      weights[c * heads + h] = to_float(query<T>(g, token, head * group + h)[channels[c]]);
  for (long p = 0; p * g.page_size < g.visible[token]; p++) {
    Labels labels(*g.layer, pages[p] * g.num_kv + head, padded);
    for (long s = 0; s < g.page_size; s += kLanes) {
      vf best = splat(-__builtin_inff());
      for (long first = 0; first < group; first += kHeads) {
        vf sum[kHeads] = {};
        for (long c = 0; c < num_channels; c++) {
          vf x = labels.channel(c, s);
          for (long h = 0; h < kHeads; h++) sum[h] = sum[h] + x * weights[c * heads + first + h];
        }
        for (long h = 0; h < kHeads && first + h < group; h++) best = vmax(sum[h], best);
      }
      store(scores + p * g.page_size + s, labels.scaled(best, s));  // what is past the page's end, the next page writes over
    }
  }
}

template <class T>
void label_scores(const AttentionArgs& g, long token, long head, float* scores) {
  if (g.layer->label_scales) return scores_of<T, CodedLabels>(g, token, head, scores);
  scores_of<T, PlainLabels<T>>(g, token, head, scores);
}

// label_codes.py encode, in the same order of the same roundings.
template <class T>
void write_codes(const SparseLayer& layer, const KvLayout<T>& layout, const T* key, long record, long offset, const int32_t* channels) {
  float most = 0.f;
  for (long c = 0; c < layer.num_channels; c++) {
    float x = std::fabs(to_float(key[layout.key_step(channels[c])]));
    most = x > most ? x : most;
  }
  bf16 stored = to_bf16(most * (1.f / 7.f));
  float scale = to_float(stored);
  static_cast<bf16*>(layer.label_scales)[record * layout.padded_keys + offset] = stored;
  long bytes = code_bytes(layer);
  uint8_t* codes = static_cast<uint8_t*>(layer.labels) + record * bytes * layout.padded_keys + offset;
  auto code = [&](long c) {
    if (c >= layer.num_channels) return 8;
    float x = to_float(key[layout.key_step(channels[c])]);
    int above = 0;
    for (int i = 0; i < 7; i++) above += std::fabs(x) > (float(i) + 0.5f) * scale;
    return 8 + (x < 0.f ? -above : above);
  };
  for (long b = 0; b < bytes; b++) codes[b * layout.padded_keys] = uint8_t(code(b) | code(bytes + b) << 4);
}

template <class T>
void write_label(const SparseLayer& layer, const KvLayout<T>& layout, const T* k_pages, long slot, long head) {
  const T* key = layout.key_at(const_cast<T*>(k_pages), slot, head);
  const int32_t* channels = layer.channels + head * layer.num_channels;
  long record = slot / layout.page_size * layout.num_kv + head, offset = slot % layout.page_size;
  if (layer.label_scales) return write_codes(layer, layout, key, record, offset, channels);
  T* label = static_cast<T*>(layer.labels) + record * layer.num_channels * layout.padded_keys + offset;
  for (long c = 0; c < layer.num_channels; c++) label[c * layout.padded_keys] = key[layout.key_step(channels[c])];
}

template <class T>
void write_bounds(const SparseLayer& layer, const KvLayout<T>& layout, const T* k_pages, long slot, long head) {
  long page = slot / layout.page_size, words = bound_words<T>(layout.head_dim), size = sub_page(layout.page_size);
  long parts = layout.page_size / size, part = slot % layout.page_size / size, first = slot - slot % layout.page_size % size;
  T* largest = reinterpret_cast<T*>(static_cast<uint32_t*>(layer.bounds) + ((page * layout.num_kv + head) * parts + part) * words);
  std::memset(largest, 0, size_t(words) * 4);
  for (long d = 0; d < layout.head_dim; d++) {
    float low = 0.f, high = 0.f;
    for (long s = 0; s < size; s++) {
      float x = to_float(layout.key_at(const_cast<T*>(k_pages), first + s, head)[layout.key_step(d)]);
      low = s && low <= x ? low : x;
      high = s && high >= x ? high : x;
    }
    put(largest + d, high);
    put(largest + layout.head_dim + d, low);
  }
}

// The choice alone, for rows whose query is not the layer's own: into their lists.
template <class T>
void choose_all(Pool* pool, const AttentionArgs& g) {
  parallel(pool, g.span_starts[g.num_spans] * g.num_kv, [&](long t) {
    long token = t / g.num_kv, head = t % g.num_kv, at = g.sparse->index[token];
    if (at < 0 || g.sparse->methods[at] != kDoubleSparsity || g.visible[token] <= g.sparse->budgets[at]) return;
    float* scores = scratch_of<float>(1, (g.visible[token] + g.page_size - 1) / g.page_size * g.page_size + kLanes);
    label_scores<T>(g, token, head, scores);
    choose_keys(g, token, scores, g.sparse->lists + (at * g.num_kv + head) * g.sparse->most);
  });
}

template void choose_pages<bf16>(const AttentionArgs&, long, long, int32_t*);
template void choose_pages<float>(const AttentionArgs&, long, long, int32_t*);
template void label_scores<bf16>(const AttentionArgs&, long, long, float*);
template void label_scores<float>(const AttentionArgs&, long, long, float*);
template void write_label<bf16>(const SparseLayer&, const KvLayout<bf16>&, const bf16*, long, long);
template void write_label<float>(const SparseLayer&, const KvLayout<float>&, const float*, long, long);
template void write_bounds<bf16>(const SparseLayer&, const KvLayout<bf16>&, const bf16*, long, long);
template void write_bounds<float>(const SparseLayer&, const KvLayout<float>&, const float*, long, long);

}  // namespace braid

using namespace braid;

extern "C" void braid_choose_keys(void* pool, const AttentionArgs* args) {
  if (args->is_bf16)
    choose_all<bf16>(static_cast<Pool*>(pool), *args);
  else
    choose_all<float>(static_cast<Pool*>(pool), *args);
}
