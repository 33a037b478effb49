// argmax over the vocabulary of logit + Gumbel noise; the noise is a pure function of (seed, position, sample, stream,
// token).
//
// Philox4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). 23-bit uniforms, because a 24-bit
// one can round to 1 in fp32, where the Gumbel is infinite.
#include "pool.h"
#include "simd.h"

namespace braid {
namespace {

// Sixteen counters at once, as plain loops that the compiler turns into 32x32 -> 64 vector multiplies.
struct Philox16 {
  alignas(64) uint32_t c[4][kLanes];
  void rounds(uint32_t k0, uint32_t k1) {
    for (int round = 0; round < 10; round++) {
      for (int i = 0; i < kLanes; i++) {
        uint64_t p0 = uint64_t(c[0][i]) * 0xD2511F53u, p1 = uint64_t(c[2][i]) * 0xCD9E8D57u;
        uint32_t c0 = uint32_t(p1 >> 32) ^ c[1][i] ^ k0, c2 = uint32_t(p0 >> 32) ^ c[3][i] ^ k1;
        c[1][i] = uint32_t(p1);
        c[3][i] = uint32_t(p0);
        c[0][i] = c0;
        c[2][i] = c2;
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
  }
};

BRAID_INLINE vf gumbel(vu bits) {
  vf u = (__builtin_convertvector((vi)(bits >> 9), vf) + 0.5f) * 1.1920928955078125e-07f;
  return -vlog(-vlog(u));
}

struct Best {  // of each lane; the earlier token wins a tie because later ones must be greater
  vf value = splat(-__builtin_inff());
  vi token = splat_i(INT32_MAX);
  BRAID_INLINE void offer(vf x, vi id) {
    vi better = x > value;
    value = better ? x : value;
    token = better ? id : token;
  }
  int64_t winner() const {
    float best = max_lanes(value);
    int32_t id = INT32_MAX;
    for (int i = 0; i < kLanes; i++)
      if (value[i] == best && token[i] < id) id = token[i];
    return id == INT32_MAX ? 0 : id;  // every token banned
  }
};

int64_t greedy_row(const float* logits, long vocab) {
  Best best;
  for (long v = 0; v < vocab; v += kLanes)
    best.offer(load_tail(logits + v, vocab - v, -__builtin_inff()), lane_ids() + int32_t(v));
  return best.winner();
}

// 64 tokens per round of 16 counters: counter i gives words 0..3 to tokens 4i..4i+3, so words are transposed into place.
int64_t noisy_row(const float* logits, long vocab, uint64_t seed, uint32_t position, uint32_t sample,
                  uint32_t stream) {
  Best best;
  alignas(64) uint32_t words[4 * kLanes];
  for (long v = 0; v < vocab; v += 4 * kLanes) {
    Philox16 p;
    for (int i = 0; i < kLanes; i++) {
      p.c[0][i] = uint32_t(v / 4) + uint32_t(i);
      p.c[1][i] = position;
      p.c[2][i] = sample;
      p.c[3][i] = stream;
    }
    p.rounds(uint32_t(seed), uint32_t(seed >> 32));
    for (int i = 0; i < kLanes; i++)
      for (int w = 0; w < 4; w++) words[4 * i + w] = p.c[w][i];
    for (int w = 0; w < 4; w++) {
      long at = v + w * kLanes;
      if (at >= vocab) break;
      vf x = load_tail(logits + at, vocab - at, -__builtin_inff()) + gumbel(load<vu>(words + w * kLanes));
      best.offer(x, lane_ids() + int32_t(at));
    }
  }
  return best.winner();
}

}  // namespace
}  // namespace braid

using namespace braid;

extern "C" void braid_sample(void* pool, const float* logits, int64_t rows, int64_t vocab, const int64_t* seeds,
                             const int64_t* sample_index, const int64_t* positions, const uint8_t* greedy, uint32_t stream,
                             int64_t* out) {
  auto row = [&](long r) {
    const float* at = logits + r * vocab;
    out[r] = greedy[r] ? greedy_row(at, vocab)
                       : noisy_row(at, vocab, uint64_t(seeds[r]), uint32_t(positions[r]), uint32_t(sample_index[r]),
                                   stream);
  };
  parallel(static_cast<Pool*>(pool), rows, row);
}
