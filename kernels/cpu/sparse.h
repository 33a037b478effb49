// Which keys a sparse row reads, and the metadata of keys that says so (kernels/sparse.py). One row and one kv head a call.
#pragma once
#include "layer.h"

namespace braid {

constexpr long kFirstKeys = 4, kLastKeys = 64;  // always read; sparse.py FIRST_KEYS, LAST_KEYS

// Whether what rows of this method choose are pages (sparse.py Method.is_of_pages).
inline bool of_pages(int32_t method) { return method == kQuest || method == kDoubleSparsityPages; }

// Whether this layer makes or takes a choice for the row: it is sparse and sees more keys than its budget.
bool chooses(const AttentionArgs&, long token);

// Numbers of the pages that the row reads, ascending: budget / page_size of them. By bounds or by labels, as its method says.
template <class T>
void choose_pages(const AttentionArgs&, long token, long head, int32_t* chosen);

// KV indices of the keys that the row reads, ascending: as many as its budget. scores: of all keys that it sees.
void choose_keys(const AttentionArgs&, long token, const float* scores, int32_t* chosen);

// q.k over the label channels, of a group's query heads the highest, for all keys of some pages of the row's sequence, by KV
// index; scores has room for a vector more.
template <class T>
void label_scores(const AttentionArgs&, long token, long head, long first_page, long end_page, float* scores);

// Metadata of one key of one head, which has been written to its slot.
template <class T>
void write_label(const SparseLayer&, const KvLayout<T>&, const T* k_pages, long slot, long head);

// Whether a key in this slot is the last of its sub-page, whose bounds are written then, from all its keys.
inline bool completes(long slot, long page_size) { return (slot % page_size + 1) % sub_page(page_size) == 0; }
template <class T>
void write_bounds(const SparseLayer&, const KvLayout<T>&, const T* k_pages, long slot, long head);

}  // namespace braid
