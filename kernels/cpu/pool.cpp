// See pool.h. One 64-bit word per thread holds (generation, end, next), so that claiming and stealing are single
// compare-and-swaps, and a worker that slept through a whole job can never take a tile of a job it has not seen.
#include "pool.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <climits>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace braid {
namespace {

constexpr int kIndexBits = 20;
constexpr uint64_t kIndexMask = (uint64_t(1) << kIndexBits) - 1;
// Longer than the gap between two calls of one step, far shorter than an idle engine may burn a core for.
constexpr auto kSpin = std::chrono::microseconds(80);

std::atomic<uint32_t> fork_count{0};

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}
void futex_wait(std::atomic<uint32_t>* word, uint32_t expected) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}
void futex_wake_all(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, reinterpret_cast<uint32_t*>(word), FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

struct alignas(64) Range {
  std::atomic<uint64_t> word{0};
};

}  // namespace

class Pool {
 public:
  explicit Pool(int num_threads) : ranges_(size_t(num_threads)) {}

  int num_threads() const { return int(ranges_.size()); }

  void run(long tiles, void (*fn)(void*, long), void* context) {
    // A second caller (another Python thread) must not wait for the first one's step: it works alone.
    if (tiles <= 1 || ranges_.size() == 1 || tiles > long(kIndexMask) || !owner_.try_lock()) {
      for (long tile = 0; tile < tiles; tile++) fn(context, tile);
      return;
    }
    start_workers();
    publish(tiles, fn, context);
    work(0);
    wait_done(tiles);
    owner_.unlock();
  }

 private:
  void start_workers() {
    uint32_t forks = fork_count.load(std::memory_order_relaxed);
    if (started_ && forks == forks_seen_) return;
    started_ = true;  // first use, or the first use in a forked child, where the parent's workers do not exist
    forks_seen_ = forks;
    sleepers_.store(0);
    for (int i = 1; i < num_threads(); i++) {
      sigset_t all, before;  // signals belong to the Python threads
      sigfillset(&all);
      pthread_sigmask(SIG_SETMASK, &all, &before);
      try {
        std::thread([this, i] { worker(i); }).detach();
      } catch (...) {  // no more threads allowed: the others steal this one's tiles
      }
      pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }
  }

  void publish(long tiles, void (*fn)(void*, long), void* context) {
    fn_.store(fn, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    generation_ = (generation_ + 1) & 0xffffff;
    long threads = num_threads();
    for (long i = 0; i < threads; i++) {
      uint64_t first = uint64_t(tiles * i / threads), end = uint64_t(tiles * (i + 1) / threads);
      ranges_[size_t(i)].word.store(generation_ << (2 * kIndexBits) | end << kIndexBits | first,
                                    std::memory_order_release);
    }
    epoch_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) futex_wake_all(&epoch_);
  }

  // Takes the first tile of a thread's own range or the last of another's; -1 when the range is empty.
  long claim(size_t owner, bool steal) {
    auto& word = ranges_[owner].word;
    uint64_t seen = word.load(std::memory_order_acquire);
    while (true) {
      uint64_t next = seen & kIndexMask, end = (seen >> kIndexBits) & kIndexMask;
      if (next >= end) return -1;
      uint64_t wanted = steal ? seen - (uint64_t(1) << kIndexBits) : seen + 1;
      if (word.compare_exchange_weak(seen, wanted, std::memory_order_acq_rel, std::memory_order_acquire))
        return long(steal ? end - 1 : next);
    }
  }

  void work(size_t self) {
    size_t threads = ranges_.size();
    for (size_t i = 0; i < threads; i++) {
      size_t owner = (self + i) % threads;
      for (long tile; (tile = claim(owner, i != 0)) >= 0;) {
        // The claimed tile is not done, so the job cannot have been replaced: fn and context are its own.
        fn_.load(std::memory_order_relaxed)(context_.load(std::memory_order_relaxed), tile);
        done_.fetch_add(1, std::memory_order_release);
      }
    }
  }

  void wait_done(long tiles) {
    for (int spins = 0; done_.load(std::memory_order_acquire) != tiles; spins++) {
      relax();
      if (spins > 4096) sched_yield();
    }
  }

  void worker(int self) {
    uint32_t seen = epoch_.load() - 1;
    while (true) {
      auto deadline = std::chrono::steady_clock::now() + kSpin;
      uint32_t epoch;
      while ((epoch = epoch_.load(std::memory_order_acquire)) == seen) {
        for (int i = 0; i < 64 && epoch_.load(std::memory_order_relaxed) == seen; i++) relax();
        // Whoever else wants this core goes first: the caller takes our tiles meanwhile.
        sched_yield();
        if (std::chrono::steady_clock::now() < deadline) continue;
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        futex_wait(&epoch_, seen);
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
      }
      seen = epoch;
      work(size_t(self));
    }
  }

  std::vector<Range> ranges_;
  std::mutex owner_;
  std::atomic<void (*)(void*, long)> fn_{nullptr};
  std::atomic<void*> context_{nullptr};
  alignas(64) std::atomic<long> done_{0};
  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<int> sleepers_{0};
  uint64_t generation_ = 0;
  uint32_t forks_seen_ = 0;
  bool started_ = false;
};

Pool* pool_create(int num_threads) {
  static std::once_flag once;
  std::call_once(once, [] { pthread_atfork(nullptr, nullptr, [] { fork_count.fetch_add(1); }); });
  return new (std::nothrow) Pool(num_threads < 1 ? 1 : num_threads);
}
int pool_threads(const Pool* pool) { return pool->num_threads(); }
void pool_run(Pool* pool, long tiles, void (*fn)(void*, long), void* context) { pool->run(tiles, fn, context); }

namespace {
struct Buffers {
  void* at[5] = {};
  long size[5] = {};
  ~Buffers() {
    for (void* p : at) std::free(p);
  }
};
}  // namespace

void* scratch(int which, long bytes) {
  static thread_local Buffers buffers;
  if (bytes > buffers.size[which]) {
    std::free(buffers.at[which]);
    long rounded = (bytes + bytes / 2 + 4095) & ~4095L;
    buffers.at[which] = std::aligned_alloc(4096, size_t(rounded));
    if (!buffers.at[which]) std::abort();  // out of memory inside a kernel has no recovery
    buffers.size[which] = rounded;
  }
  return buffers.at[which];
}

}  // namespace braid

extern "C" {
void* braid_pool_create(int num_threads) { return braid::pool_create(num_threads); }

// A hint for memory that is read in no order, as KV pages are: a head's part of a page is as small as a page of the system, so
// that each would miss the TLB. Not obeyed everywhere, and then nothing is lost.
void braid_prefer_huge_pages(void* memory, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  uintptr_t first = (reinterpret_cast<uintptr_t>(memory) + 4095) & ~uintptr_t(4095);
  uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + uintptr_t(bytes)) & ~uintptr_t(4095);
  if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}
int braid_pool_threads(const void* pool) { return braid::pool_threads(static_cast<const braid::Pool*>(pool)); }
}
