// Paged attention: one tile = up to 48 query rows (query tokens of one span x the heads that share a kv head), all keys.
//
// Keys are visited in chunks of whole pages at absolute positions (about 128 keys), with the online softmax of
// Dao, "FlashAttention-2" (2023), section 3.1. A row's value depends on its own visible keys only: chunks and keys that
// other rows of the tile see enter it as exact zeros, so chunking and company cannot change a bit.
// Unwritten slots may hold NaN: their scores are masked, and they never reach the value product.
// A sparse row is a tile of its own (with its group of heads): what it reads becomes all of its sequence, and is walked alike.
#include "sparse.h"

#include <vector>

namespace braid {
namespace {

constexpr long kTileRows = 48;
constexpr long kChunkKeys = 128;
constexpr float kMinusInf = -__builtin_inff();

struct Tile {
  long first, count, head;  // query tokens [first, first + count) of one span, one kv head
  bool chooses;             // of one sparse row that has more keys than it may read
};

void prefetch_bytes(const void* p, long bytes) {
  for (long i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i, 0, 2);
}

BRAID_INLINE void put_weights(float* p, vf x) { store(p, x); }
BRAID_INLINE void put_weights(bf16* p, vf x) {
#if defined(__AVX512BF16__)
  store(p, (vh)_mm512_cvtneps_pbh((__m512)x));
#else
  store(p, to_bf16(x));
#endif
}

template <class T>
class Attend {
 public:
  explicit Attend(const AttentionArgs& args)
      : g(args), layout(args.page_size, args.num_kv, args.head_dim), group(args.num_q / args.num_kv),
        chunk_pages(args.page_size >= kChunkKeys ? 1 : kChunkKeys / args.page_size),
        columns(chunk_pages * layout.padded_keys) {}

  // `next` is the tile this thread most likely takes next, or null: its first keys are fetched behind this one's values.
  void run(const Tile& tile, const Tile* next) {
    following = next;
    rows = tile.count * group;
    blocks = RowBlocks(rows);
    pages = g.page_table + g.row_seq[tile.first] * g.max_pages;
    head = tile.head;
    prepare(tile);
    if (tile.chooses) choose(tile.first);
    long last_key = 0, first_key = INT64_MAX;
    for (long r = 0; r < rows; r++) {
      last_key = last_key > high[r] ? last_key : high[r];
      first_key = first_key < low[r] ? first_key : low[r];
    }
    long end_page = (last_key + g.page_size - 1) / g.page_size;
    long page = first_key / g.page_size;
    for (; page < end_page;) {
      long chunk = page / chunk_pages, chunk_end = (chunk + 1) * chunk_pages;
      chunk_end = chunk_end < end_page ? chunk_end : end_page;
      scores_of(page, chunk_end, chunk * chunk_pages, last_key);
      if (raw_scores) keep_scores(page, chunk_end, chunk * chunk_pages);
      if (hidden) hide_keys(page, chunk_end, chunk * chunk_pages);
      if (g.tree)
        for (long r = 0; r < rows; r++) hide_branches(r, page, chunk_end, chunk * chunk_pages);
      for (long r = 0; r < rows; r++) softmax_row(r, page, chunk_end, chunk * chunk_pages);
      values_of(page, chunk_end, chunk * chunk_pages, last_key, end_page);
      page = chunk_end;
    }
    finish(tile);
    if (raw_scores) choose_keys(g, tile.first, raw_scores, list_of(tile.first));
  }

 private:
  int32_t* list_of(long token) const {
    return g.sparse->lists + (g.sparse->index[token] * g.num_kv + head) * g.sparse->most;
  }

  // Makes what the row reads its whole sequence; a row that lists keys reads all and keeps its scores.
  void choose(long token) {
    long at = g.sparse->index[token], budget = g.sparse->budgets[at], visible = g.visible[token];
    int32_t role = g.layer->roles[g.sparse->methods[at]];
    long room = (visible + g.page_size - 1) / g.page_size * g.page_size + kLanes;
    if (role == kList) {
      raw_scores = scratch_of<float>(1, room);
      return;
    }
    following = nullptr;
    if (role == kFollow) return read_only(list_of(token), token, budget);
    if (of_pages(g.sparse->methods[at])) {
      long count = budget / g.page_size;
      chosen_pages.resize(count);
      choose_pages<T>(g, token, head, chosen_pages.data());
      for (int32_t& page : chosen_pages) page = pages[page];
      for (long p = 0; p < count && p < chunk_pages; p++)
        prefetch_bytes(layout.keys(static_cast<const T*>(g.k_pages), chosen_pages[p], head), layout.padded_keys * layout.dim_words * 4);
      return take_pages(visible);
    }
    float* label = scratch_of<float>(1, room + budget);
    int32_t* keys = reinterpret_cast<int32_t*>(label + room);
    label_scores<T>(g, token, head, 0, (visible + g.page_size - 1) / g.page_size, label);
    choose_keys(g, token, label, keys);
    read_only(keys, token, budget);
  }

  // The pages of single keys, in which all others are hidden: a tile of K holds its keys side by side, so that one of them costs
  // the cache lines of all.
  void read_only(const int32_t* keys, long token, long count) {
    hidden = scratch_of<int32_t>(2, (count + 1) * layout.padded_keys);
    long last = -1;
    for (long i = 0; i < count; i++) {
      long page = keys[i] / g.page_size;
      if (page != last) {
        int32_t* flags = hidden + long(chosen_pages.size()) * layout.padded_keys;
        for (long s = 0; s < layout.padded_keys; s++) flags[s] = -1;
        chosen_pages.push_back(pages[page]);
        last = page;
      }
      hidden[(long(chosen_pages.size()) - 1) * layout.padded_keys + keys[i] % g.page_size] = 0;
    }
    take_pages(g.visible[token]);
  }

  // The row's own page is the last of those chosen: its sequence, for this walk, ends where it ends there.
  void take_pages(long visible) {
    pages = chosen_pages.data();
    for (long r = 0; r < rows; r++) high[r] = (long(chosen_pages.size()) - 1) * g.page_size + (visible - 1) % g.page_size + 1;
  }

  void hide_keys(long page, long end, long origin) {
    for (long r = 0; r < rows; r++)
      for (long p = page; p < end; p++)
        for (long s = 0; s < layout.padded_keys; s += kLanes) {
          float* at = scores + r * columns + (p - origin) * layout.padded_keys + s;
          store(at, load<vi>(hidden + p * layout.padded_keys + s) ? splat(kMinusInf) : load<vf>(at));
        }
  }

  // Of each key the highest q.k of the group's heads. What is past a page's end is written over by the next page.
  void keep_scores(long page, long end, long origin) {
    for (; page < end; page++)
      for (long s = 0; s < g.page_size; s += kLanes) {
        const float* at = scores + (page - origin) * layout.padded_keys + s;
        vf best = load<vf>(at);
        for (long r = 1; r < rows; r++) best = vmax(load<vf>(at + r * columns), best);
        store(raw_scores + page * g.page_size + s, best);
      }
  }

  void prepare(const Tile& tile) {
    long words = layout.dim_words;
    long need = rows * (words + columns + layout.padded_dims + columns) + 4 * 1024;
    uint32_t* at = static_cast<uint32_t*>(scratch(0, need * 4 + 4096));
    auto take = [&](long count) {
      uint32_t* p = at;
      at += (count + 15) / 16 * 16;
      return p;
    };
    q = take(rows * words);
    scores = reinterpret_cast<float*>(take(rows * columns));
    weights = reinterpret_cast<T*>(take(rows * columns));
    out = reinterpret_cast<float*>(take(rows * layout.padded_dims));
    std::memset(out, 0, size_t(rows * layout.padded_dims) * 4);
    for (long r = 0; r < rows; r++) {
      long token = tile.first + r / group, q_head = tile.head * group + r % group;
      q[(r + 1) * words - 1] = 0;
      std::memcpy(q + r * words, static_cast<const T*>(g.q) + (token * g.num_q + q_head) * g.head_dim,
                  size_t(g.head_dim) * sizeof(T));
      high[r] = g.visible[token];
      long start = g.window > 0 ? long(g.positions[token]) - g.window + 1 : 0;
      low[r] = start > 0 ? start : 0;
      peak[r] = kMinusInf;
      total[r] = 0.f;
      if (g.tree) set_branch(r, token);
    }
  }

  // A row of a draft tree: [low, high) spans what it sees, and the bits say which of the tree's own keys that is.
  // A path's n-th bit stands at position start + n, so that a window keeps its last bits.
  void set_branch(long r, long token) {
    branch[r] = uint64_t(g.tree[token]);
    if (!branch[r]) return;
    if (g.window > 0)
      while (__builtin_popcountll(branch[r]) > g.window) branch[r] &= branch[r] - 1;
    branch_start[r] = g.tree_starts[token];
    high[r] = branch_start[r] + 64 - __builtin_clzll(branch[r]);
    low[r] = low[r] < branch_start[r] ? low[r] : branch_start[r];
  }

  // Scores of the tree's keys that are not on the row's path, as if masked: what other branches hold cannot be seen.
  void hide_branches(long r, long page, long end, long origin) {
    if (!branch[r]) return;
    long key = branch_start[r] > page * g.page_size ? branch_start[r] : page * g.page_size;
    long last = high[r] < end * g.page_size ? high[r] : end * g.page_size;
    for (; key < last; key++)
      if (!(branch[r] >> (key - branch_start[r]) & 1))
        scores[r * columns + (key / g.page_size - origin) * layout.padded_keys + key % g.page_size] = kMinusInf;
  }

  // ahead: what to fetch behind this product, as many cache lines a step as it reads; null: nothing. Spread like this it costs
  // nothing; a burst of 64 lines waits for the 24 that a core has under way (32 rows x 288 keys, one thread: 10.9 ms, now 7.8).
  template <int NV, class W>
  void product(const uint32_t* a, long a_row, const uint32_t* b, long steps, float* c, long c_row, bool accumulate,
               const uint32_t* ahead) {
    for (long i = 0; i < blocks.blocks; i++) {
      long r = blocks.first(i);
      micro_for<W, NV, false>(int(blocks.count(i)))(
          MicroArgs{a + r * a_row, a_row, b, steps, c + r * c_row, c_row, accumulate,
                    reinterpret_cast<const char*>(ahead), ahead && !i ? NV : 0});
    }
  }

  // Fetches the values of these pages on the way: all of a full page, what is needed of the last one.
  void scores_of(long page, long end, long origin, long last_key) {
    for (; page < end; page++) {
      const uint32_t* keys = layout.keys(static_cast<const T*>(g.k_pages), pages[page], head);
      const uint32_t* values = layout.values(static_cast<const T*>(g.v_pages), pages[page], head);
      long filled = last_key - page * g.page_size, words = (filled + Word<T>::k - 1) / Word<T>::k;
      bool full = filled >= g.page_size;
      for (long d = 0; d < layout.padded_dims && !full; d += layout.dim_panel)
        prefetch_bytes(values + d * layout.key_words, words * layout.dim_panel * 4);
      for (long t = 0; t < layout.padded_keys; t += layout.key_tile) {
        float* c = scores + (page - origin) * layout.padded_keys + t;
        const uint32_t *b = keys + t * layout.dim_words, *ahead = full ? values + t * layout.dim_words : nullptr;
        if (layout.key_tile == 32)
          product<2, T>(q, layout.dim_words, b, layout.dim_words, c, columns, false, ahead);
        else
          product<1, T>(q, layout.dim_words, b, layout.dim_words, c, columns, false, ahead);
      }
    }
  }

  // Scales the scores of row r, with -inf where it does not see the key; returns the lanes' maxima.
  vf mask_row(long r, long page, long end, long origin) {
    vf best = splat(kMinusInf);
    for (long p = page; p < end; p++)
      for (long s = 0; s < layout.padded_keys; s += kLanes) {
        float* at = scores + r * columns + (p - origin) * layout.padded_keys + s;
        vi lane = lane_ids() + int32_t(s);
        vi key = lane + int32_t(p * g.page_size);
        vi seen = (key < int32_t(high[r])) & (key >= int32_t(low[r])) & (lane < int32_t(g.page_size));
        vf x = seen ? load<vf>(at) * g.scale : splat(kMinusInf);
        store(at, x);
        best = vmax(x, best);
      }
    return best;
  }

  void softmax_row(long r, long page, long end, long origin) {
    float* row = scores + r * columns;
    T* weight = weights + r * columns;
    long from = (page - origin) * layout.padded_keys, to = (end - origin) * layout.padded_keys;
    vf best = splat(kMinusInf);
    bool sees_all = low[r] <= page * g.page_size && end * g.page_size <= high[r] && layout.padded_keys == g.page_size;
    if (!sees_all) best = mask_row(r, page, end, origin);
    for (long i = from; i < to && sees_all; i += kLanes) {  // the same values as mask_row gives
      vf x = load<vf>(row + i) * g.scale;
      store(row + i, x);
      best = vmax(x, best);
    }
    float chunk_peak = max_lanes(best);
    if (chunk_peak == kMinusInf) {  // no visible key in this chunk, unless its scores are all NaN, which must show
      for (long i = from; i < to; i++)
        if (row[i] != row[i]) total[r] = row[i];
      std::memset(static_cast<void*>(weight + from), 0, size_t(to - from) * sizeof(T));
      return;
    }
    float before = peak[r], now = before > chunk_peak ? before : chunk_peak;
    vf sum{};
    for (long i = from; i < to; i += kLanes) {
      vf e = vexp(load<vf>(row + i) - now);
      sum = sum + e;
      put_weights(weight + i, e);
    }
    float fade = now == before ? 1.f : vexp(splat(before - now))[0];
    if (fade != 1.f)
      for (long i = 0; i < layout.padded_dims; i += kLanes)
        store(out + r * layout.padded_dims + i, load<vf>(out + r * layout.padded_dims + i) * fade);
    total[r] = total[r] * fade + sum_lanes(sum);
    peak[r] = now;
  }

  // Keys of the page a chunk further on, in this tile or the one that this thread most likely takes next; null past its end.
  const uint32_t* keys_ahead(long page, long end_page) const {
    page += chunk_pages;
    if (page < end_page) return layout.keys(static_cast<const T*>(g.k_pages), pages[page], head);
    if (!following) return nullptr;
    long token = following->first;
    long start = g.window > 0 ? long(g.positions[token]) - g.window + 1 : 0;
    page += (start > 0 ? start : 0) / g.page_size - end_page;
    if (page * g.page_size >= g.visible[token]) return nullptr;
    long id = g.page_table[g.row_seq[token] * g.max_pages + page];
    return layout.keys(static_cast<const T*>(g.k_pages), id, following->head);
  }

  // Values of keys below last_key. With bf16 an odd end leaves half a word that nobody has written: it is cleared in a copy.
  void values_of(long page, long end, long origin, long last_key, long end_page) {
    constexpr int per_word = Word<T>::k;
    for (; page < end; page++) {
      const uint32_t* values = layout.values(static_cast<const T*>(g.v_pages), pages[page], head);
      const uint32_t* ahead = keys_ahead(page, end_page);
      long keys = last_key - page * g.page_size;
      if (keys < g.page_size) {
        if (ahead) prefetch_bytes(ahead, layout.padded_keys * layout.dim_words * 4);
        ahead = nullptr;
      } else {
        keys = g.page_size;
      }
      const uint32_t* a = reinterpret_cast<const uint32_t*>(weights + (page - origin) * layout.padded_keys);
      for (long d = 0; d < layout.padded_dims; d += layout.dim_panel) {
        const uint32_t* b = values + d * layout.key_words;
        add_values(a, b, keys / per_word, out + d, ahead ? ahead + d * layout.key_words : nullptr);
        if (keys % per_word == 0) continue;
        alignas(64) uint32_t half[32];
        const uint32_t* last = b + keys / per_word * layout.dim_panel;
        for (long i = 0; i < layout.dim_panel; i++) half[i] = last[i] & 0xffffu;
        add_values(a + keys / per_word, half, 1, out + d, nullptr);
      }
    }
  }

  void add_values(const uint32_t* a, const uint32_t* b, long steps, float* c, const uint32_t* ahead) {
    long a_row = columns / Word<T>::k;
    if (layout.dim_panel == 32)
      product<2, T>(a, a_row, b, steps, c, layout.padded_dims, true, ahead);
    else
      product<1, T>(a, a_row, b, steps, c, layout.padded_dims, true, ahead);
  }

  void finish(const Tile& tile) {
    for (long r = 0; r < rows; r++) {
      T* to = static_cast<T*>(g.out) + ((tile.first + r / group) * g.num_q + head * group + r % group) * g.head_dim;
      float inverse = total[r] > 0.f || total[r] != total[r] ? 1.f / total[r] : 0.f;  // no visible key: zeros
      for (long i = 0; i < g.head_dim; i += kLanes)
        store_tail(to + i, load<vf>(out + r * layout.padded_dims + i) * inverse, g.head_dim - i);
    }
  }

  const AttentionArgs& g;
  KvLayout<T> layout;
  long group, chunk_pages, columns;
  long rows = 0, head = 0;
  float* raw_scores = nullptr;  // there for a row that lists keys
  int32_t* hidden = nullptr;    // there for a row that reads single keys: -1 for each that it does not
  std::vector<int32_t> chosen_pages;
  RowBlocks blocks{0};
  const int32_t* pages = nullptr;
  const Tile* following = nullptr;
  uint32_t* q = nullptr;
  float *scores = nullptr, *out = nullptr;
  T* weights = nullptr;
  long low[kTileRows + 512], high[kTileRows + 512], branch_start[kTileRows + 512];
  uint64_t branch[kTileRows + 512];  // set in steps with trees only
  float peak[kTileRows + 512], total[kTileRows + 512];
};

}  // namespace

template <class T>
void paged_attention(Pool* pool, const AttentionArgs& g) {
  long group = g.num_q / g.num_kv;
  long tokens = kTileRows / group > 1 ? kTileRows / group : 1;
  long tiles = 0;
  for (long s = 0; s < g.num_spans; s++) tiles += (g.span_starts[s + 1] - g.span_starts[s] + tokens - 1) / tokens;
  if (g.sparse) tiles = g.span_starts[g.num_spans];
  Tile* list = scratch_of<Tile>(3, tiles * g.num_kv + 1);
  long n = 0;
  for (long s = 0; s < g.num_spans; s++)
    for (long first = g.span_starts[s], end = g.span_starts[s + 1], count; first < end; first += count) {
      bool chooses_keys = chooses(g, first);
      count = chooses_keys ? 1 : end - first < tokens ? end - first : tokens;
      for (long i = 1; g.sparse && i < count; i++)
        if (chooses(g, first + i)) count = i;
      for (long h = 0; h < g.num_kv; h++) list[n++] = Tile{first, count, h, chooses_keys};
    }
  parallel(pool, n, [&](long t) { Attend<T>(g).run(list[t], t + 1 < n ? &list[t + 1] : nullptr); });
}

template void paged_attention<bf16>(Pool*, const AttentionArgs&);
template void paged_attention<float>(Pool*, const AttentionArgs&);

}  // namespace braid

using namespace braid;

extern "C" void braid_paged_attention(void* pool, const AttentionArgs* args) {
  if (args->is_bf16)
    paged_attention<bf16>(static_cast<Pool*>(pool), *args);
  else
    paged_attention<float>(static_cast<Pool*>(pool), *args);
}
