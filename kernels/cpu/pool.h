// A persistent thread pool: the caller works too, each thread owns a contiguous range of tiles and steals when it is done.
//
// A busy neighbour on one core therefore delays only the tile it holds; a worker that never wakes delays nothing.
#pragma once
#include <cstdint>
#include <utility>

namespace braid {

class Pool;

Pool* pool_create(int num_threads);
int pool_threads(const Pool*);
void pool_run(Pool*, long tiles, void (*fn)(void* context, long tile), void* context);

// Calls body(tile) for every tile in [0, tiles), in parallel; returns when all are done. body must not throw.
template <class Body>
void parallel(Pool* pool, long tiles, Body&& body) {
  using Plain = typename std::remove_reference<Body>::type;
  pool_run(pool, tiles, [](void* context, long tile) { (*static_cast<Plain*>(context))(tile); }, &body);
}

// 64-byte aligned scratch of the calling thread; `which` names one of five independent buffers. Never shrinks.
void* scratch(int which, long bytes);
template <class T>
T* scratch_of(int which, long count) {
  return static_cast<T*>(scratch(which, count * long(sizeof(T))));
}

}  // namespace braid
