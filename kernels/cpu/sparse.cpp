// Selections of sparse attention and the metadata they read. Equal scores: the lowest index. Nothing here depends on other rows.
#include "sparse.h"

#include <algorithm>
#include <cmath>

namespace braid {
namespace {

constexpr long kAheadBytes = 4096;  // of metadata that are fetched before they are read

// Order of floats as order of integers, so that a NaN has a place, too, and the same one on every machine.
uint32_t sortable(float x) {
  x += 0.f;  // -0 is 0
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// first + the positions of the `count` highest of n scores, ascending. The last one to take is found a bit at a time: the
// greatest number that `count` of them reach.
int32_t* take_best(const float* scores, long n, long count, int32_t first, int32_t* out) {
  if (count <= 0) return out;
  long padded = (n + kLanes - 1) / kLanes * kLanes;
  uint32_t* order = scratch_of<uint32_t>(2, padded);
  for (long i = 0; i < padded; i++) order[i] = i < n ? sortable(scores[i]) : 0;
  auto num_from = [&](uint32_t least) {
    vi num{};
    for (long i = 0; i < padded; i += kLanes) num = num - (vi)(load<vu>(order + i) >= least);
    long sum = 0;
    for (int lane = 0; lane < kLanes; lane++) sum += num[lane];
    return sum;
  };
  uint32_t last = 0;
  for (uint32_t bit = 1u << 31; bit; bit >>= 1)
    if (num_from(last | bit) >= count) last |= bit;
  long equals = count - (last + 1 ? num_from(last + 1) : 0);
  for (long i = 0; i < n; i++)
    if (order[i] > last || (order[i] == last && equals-- > 0)) *out++ = int32_t(first + i);
  return out;
}

long code_bytes(const SparseLayer& layer) { return (layer.num_channels + 1) / 2; }

template <class T>
long label_words(const SparseLayer& layer) {
  return layer.label_scales ? (code_bytes(layer) + 3) / 4 : (layer.num_channels + Word<T>::k - 1) / Word<T>::k;
}

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
void bound_scores(const AttentionArgs& g, long token, long head, long end, float* scores) {
  const int32_t* pages = g.page_table + g.row_seq[token] * g.max_pages;
  long group = g.num_q / g.num_kv, dim = g.head_dim, words = bound_words<T>(dim);
  long parts = g.page_size / sub_page(g.page_size), page_words = parts * words, distance = (5 + parts) / parts;
  uint32_t* q = scratch_of<uint32_t>(2, group * words);
  std::memset(q, 0, size_t(group * words) * 4);
  for (long h = 0; h < group; h++) {
    T* split = reinterpret_cast<T*>(q + h * words);
    const T* from = query<T>(g, token, head * group + h);
    for (long d = 0; d < dim; d++) split[to_float(from[d]) > 0.f ? d : dim + d] = from[d];
  }
  for (long p = 1; p < end; p++) {
    const uint32_t* bounds = static_cast<const uint32_t*>(g.layer->bounds) + (pages[p] * g.num_kv + head) * page_words;
    long soon = pages[p + distance < end ? p + distance : p];
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
}

template <class T>
void choose_pages(const AttentionArgs& g, long token, long head, int32_t* chosen) {
  long at = g.sparse->index[token], visible = g.visible[token];
  long end = (visible + g.page_size - 1) / g.page_size, late = (visible - kLastKeys) / g.page_size;
  float* scores = scratch_of<float>(1, late * g.page_size + kLanes);
  if (g.sparse->methods[at] == kQuest) {
    bound_scores<T>(g, token, head, late, scores);
  } else {
    label_scores<T>(g, token, head, 1, late, scores);
    for (long p = 1; p < late; p++) {  // in place: page p's keys are not before p
      vf best = splat(-__builtin_inff());
      const float* keys = scores + p * g.page_size;
      for (long s = 0; s < g.page_size; s += kLanes) best = vmax(load_tail(keys + s, g.page_size - s, -__builtin_inff()), best);
      scores[p] = max_lanes(best);
    }
  }
  *chosen++ = 0;
  chosen = take_best(scores + 1, late - 1, g.sparse->budgets[at] / g.page_size - 1 - (end - late), 1, chosen);
  for (long p = late; p < end; p++) *chosen++ = int32_t(p);
}

void choose_keys(const AttentionArgs& g, long token, const float* scores, int32_t* chosen) {
  long visible = g.visible[token], count = g.sparse->budgets[g.sparse->index[token]] - kFirstKeys - kLastKeys;
  for (long i = 0; i < kFirstKeys; i++) *chosen++ = int32_t(i);
  chosen = take_best(scores + kFirstKeys, visible - kFirstKeys - kLastKeys, count, kFirstKeys, chosen);
  for (long i = visible - kLastKeys; i < visible; i++) *chosen++ = int32_t(i);
}

// A tile of keys, 16 NV of them, whose labels are words of 32 bits that lie side by side. What is fetched is as large.
struct LabelTile {
  const uint32_t *labels, *ahead;
  long words;
  vf* best;  // highest score so far of each key
};

// Labels as they are: words of K, whose product is that of attention's scores.
template <class T>
class PlainLabels {
 public:
  // Of the group's queries the label channels.
  PlainLabels(const SparseLayer& layer, long group) : words(label_words<T>(layer)), q(scratch_of<uint32_t>(2, group * words)) {
    std::memset(q, 0, size_t(group * words) * 4);
  }
  void put(const AttentionArgs& g, long h, const T* from, const int32_t* channels) {
    for (long c = 0; c < g.layer->num_channels; c++) reinterpret_cast<T*>(q + h * words)[c] = from[channels[c]];
  }
  template <int H, int NV>
  void score(const LabelTile& tile, long first) const {
    vf sum[H][NV] = {};
    for (long i = 0; i < words; i++) {
      vu x[NV];
      for (int v = 0; v < NV; v++) {
        __builtin_prefetch(tile.ahead + (i * NV + v) * kLanes, 0, 2);
        x[v] = load<vu>(tile.labels + (i * NV + v) * kLanes);
      }
#pragma GCC unroll 4
      for (int h = 0; h < H; h++)
#pragma GCC unroll 2
        for (int v = 0; v < NV; v++) sum[h][v] = Word<T>::dot(sum[h][v], x[v], q[(first + h) * words + i]);
    }
    for (int h = 0; h < H; h++)
      for (int v = 0; v < NV; v++) tile.best[v] = vmax(sum[h][v], tile.best[v]);
  }

 private:
  long words;
  uint32_t* q;
};

// Codes of 4 bits, a word of them eight channels. Queries are rounded to 8 bits, so that sums are of whole numbers: exact, and
// four channels an instruction. Their scale is a power of two: what is a small whole number stays one.
template <class T>
class CodedLabels {
 public:
  CodedLabels(const SparseLayer& layer, long group) : words(label_words<T>(layer)), q(scratch_of<int8_t>(2, group * (words + 1) * 8)) {
    std::memset(q, 0, size_t(group * words) * 8);
    heads = reinterpret_cast<Head*>(q + group * words * 8);
  }
  void put(const AttentionArgs& g, long h, const T* from, const int32_t* channels) {
    float most = 0.f;
    for (long c = 0; c < g.layer->num_channels; c++) most = std::max(most, std::fabs(to_float(from[channels[c]])));
    int exponent;
    std::frexp(most, &exponent);
    float unit = std::ldexp(1.f, 7 - exponent);
    heads[h] = Head{std::ldexp(1.f, exponent - 7), 0};
    long bytes = code_bytes(*g.layer);
    for (long c = 0; c < g.layer->num_channels; c++) {
      float x = std::min(std::nearbyint(to_float(from[channels[c]]) * unit), 127.f);
      q[(h * words + c % bytes / 4) * 8 + c / bytes * 4 + c % bytes % 4] = int8_t(x);
      heads[h].sum += int8_t(x);
    }
  }
  template <int H, int NV>
  void score(const LabelTile& tile, long first) const {
    vi sum[H][NV];
    for (int h = 0; h < H; h++)
      for (int v = 0; v < NV; v++) sum[h][v] = splat_i(-8 * heads[first + h].sum);  // codes are stored with 8 more
    for (long i = 0; i < words; i++)
#pragma GCC unroll 2
      for (int v = 0; v < NV; v++) {
        __builtin_prefetch(tile.ahead + (i * NV + v) * kLanes, 0, 2);
        vu x = load<vu>(tile.labels + (i * NV + v) * kLanes);
        vu low = x & 0x0f0f0f0fu, high = x >> 4 & 0x0f0f0f0fu;
#pragma GCC unroll 4
        for (int h = 0; h < H; h++) {
          const int8_t* of_head = q + ((first + h) * words + i) * 8;
          sum[h][v] = dot_bytes(dot_bytes(sum[h][v], low, of_head), high, of_head + 4);
        }
      }
    for (int h = 0; h < H; h++)
      for (int v = 0; v < NV; v++)
        tile.best[v] = vmax(__builtin_convertvector(sum[h][v], vf) * heads[first + h].scale, tile.best[v]);
  }

 private:
  struct Head {
    float scale;
    int32_t sum;  // of its whole numbers
  };
  long words;
  int8_t* q;  // of each head and word its four channels of low half bytes, then those of high ones
  Head* heads;
};

template <class Labels, int NV>
void score_heads(const Labels& labels, const LabelTile& tile, long group) {
  long h = 0;
  for (; h + 4 <= group; h += 4) labels.template score<4, NV>(tile, h);
  if (group - h == 3) labels.template score<3, NV>(tile, h);
  if (group - h == 2) labels.template score<2, NV>(tile, h);
  if (group - h == 1) labels.template score<1, NV>(tile, h);
}

template <class T, class Labels>
void scores_of(const AttentionArgs& g, long token, long head, long first_page, long end_page, float* scores) {
  const SparseLayer& layer = *g.layer;
  const int32_t* pages = g.page_table + g.row_seq[token] * g.max_pages;
  KvLayout<T> layout(g.page_size, g.num_kv, g.head_dim);
  long group = g.num_q / g.num_kv, words = label_words<T>(layer), record = layout.padded_keys * words;
  long distance = kAheadBytes / (record * 4) + 1;
  Labels labels(layer, group);
  for (long h = 0; h < group; h++) labels.put(g, h, query<T>(g, token, head * group + h), layer.channels + head * layer.num_channels);
  for (long p = first_page; p < end_page; p++) {
    long at = pages[p] * g.num_kv + head, soon = pages[p + distance < end_page ? p + distance : p] * g.num_kv + head;
    const uint32_t* from = static_cast<const uint32_t*>(layer.labels);
    const bf16* scales = static_cast<const bf16*>(layer.label_scales);
    if (scales) __builtin_prefetch(scales + soon * layout.padded_keys, 0, 2);
    for (long t = 0; t < layout.padded_keys; t += layout.key_tile) {
      vf best[2] = {splat(-__builtin_inff()), splat(-__builtin_inff())};
      LabelTile tile{from + at * record + t * words, from + soon * record + t * words, words, best};
      if (layout.key_tile == 32)
        score_heads<Labels, 2>(labels, tile, group);
      else
        score_heads<Labels, 1>(labels, tile, group);
      for (long s = 0; s < layout.key_tile && t + s < g.page_size; s += kLanes) {
        vf x = best[s / kLanes];
        if (scales) x = x * load_vec(scales + at * layout.padded_keys + t + s);
        store(scores + p * g.page_size + t + s, x);  // what is past the page's end, the next page writes over
      }
    }
  }
}

template <class T>
void label_scores(const AttentionArgs& g, long token, long head, long first_page, long end_page, float* scores) {
  if (g.layer->label_scales) return scores_of<T, CodedLabels<T>>(g, token, head, first_page, end_page, scores);
  scores_of<T, PlainLabels<T>>(g, token, head, first_page, end_page, scores);
}

// label_codes.py encode, in the same order of the same roundings.
template <class T>
void write_codes(const SparseLayer& layer, const KvLayout<T>& layout, const T* key, long record, long offset, const int32_t* channels,
                 uint8_t* label) {
  float most = 0.f;
  for (long c = 0; c < layer.num_channels; c++) {
    float x = std::fabs(to_float(key[layout.key_step(channels[c])]));
    most = x > most ? x : most;
  }
  bf16 stored = to_bf16(most * (1.f / 7.f));
  float scale = to_float(stored);
  static_cast<bf16*>(layer.label_scales)[record * layout.padded_keys + offset] = stored;
  auto code = [&](long c) {
    if (c >= layer.num_channels) return 8;
    float x = to_float(key[layout.key_step(channels[c])]);
    int above = 0;
    for (int i = 0; i < 7; i++) above += std::fabs(x) > (float(i) + 0.5f) * scale;
    return 8 + (x < 0.f ? -above : above);
  };
  long bytes = code_bytes(layer);
  for (long b = 0; b < bytes; b++) label[b / 4 * layout.key_tile * 4 + b % 4] = uint8_t(code(b) | code(bytes + b) << 4);
}

template <class T>
void write_label(const SparseLayer& layer, const KvLayout<T>& layout, const T* k_pages, long slot, long head) {
  const T* key = layout.key_at(const_cast<T*>(k_pages), slot, head);
  const int32_t* channels = layer.channels + head * layer.num_channels;
  KvLayout<T> labels(layout.page_size, layout.num_kv, label_words<T>(layer) * Word<T>::k);  // as K of keys so long
  T* label = labels.key_at(static_cast<T*>(layer.labels), slot, head);
  if (layer.label_scales) {
    long record = slot / layout.page_size * layout.num_kv + head, offset = slot % layout.page_size;
    return write_codes(layer, layout, key, record, offset, channels, reinterpret_cast<uint8_t*>(label));
  }
  for (long c = 0; c < layer.num_channels; c++) label[labels.key_step(c)] = key[layout.key_step(channels[c])];
  if (layer.num_channels % Word<T>::k) std::memset(label + labels.key_step(layer.num_channels), 0, sizeof(T));
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
    label_scores<T>(g, token, head, 0, (g.visible[token] + g.page_size - 1) / g.page_size, scores);
    choose_keys(g, token, scores, g.sparse->lists + (at * g.num_kv + head) * g.sparse->most);
  });
}

template void choose_pages<bf16>(const AttentionArgs&, long, long, int32_t*);
template void choose_pages<float>(const AttentionArgs&, long, long, int32_t*);
template void label_scores<bf16>(const AttentionArgs&, long, long, long, long, float*);
template void label_scores<float>(const AttentionArgs&, long, long, long, long, float*);
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
