// What a judge needs to know of each row of logits, in two passes over it: the greatest and the second logit, log-sum-exp,
// entropy. Sums are float64 and over fixed lanes, so a row's numbers are the same in any company.
#include <cmath>

#include "pool.h"
#include "simd.h"

namespace braid {
namespace {

struct Top2 {  // of each lane; the earlier id wins a tie because later ones must be greater
  vf best = splat(-__builtin_inff()), second = splat(-__builtin_inff());
  vi id = splat_i(INT32_MAX);
  BRAID_INLINE void offer(vf x, vi ids) {
    vi better = x > best;
    second = better ? best : vmax(x, second);
    best = better ? x : best;
    id = better ? ids : id;
  }
};

struct Row {
  float best, second, lse, entropy;
  int64_t id;
};

Row measure(const float* logits, long vocab) {
  Top2 top;
  for (long v = 0; v < vocab; v += kLanes)
    top.offer(load_tail(logits + v, vocab - v, -__builtin_inff()), lane_ids() + int32_t(v));
  int winner = 0;
  for (int i = 1; i < kLanes; i++) {
    bool ties = top.best[i] == top.best[winner] && top.id[i] < top.id[winner];
    if (top.best[i] > top.best[winner] || ties) winner = i;
  }
  float best = top.best[winner], second = -__builtin_inff();
  for (int i = 0; i < kLanes; i++) {
    float rival = i == winner ? top.second[i] : top.best[i];
    second = rival > second ? rival : second;
  }
  double sums[kLanes] = {}, spreads[kLanes] = {};
  for (long v = 0; v < vocab; v += kLanes) {
    vf below = load_tail(logits + v, vocab - v, -__builtin_inff()) - best;
    vf weight = vexp(below);
    // A banned id has weight 0 and distance minus infinity: together they are nothing, not NaN.
    vf spread = weight > 0.f ? weight * below : splat(0.f);
    for (int i = 0; i < kLanes; i++) {
      sums[i] += weight[i];
      spreads[i] += spread[i];
    }
  }
  double sum = 0, spread = 0;
  for (int i = 0; i < kLanes; i++) {
    sum += sums[i];
    spread += spreads[i];
  }
  double log_sum = std::log(sum);
  int64_t id = top.id[winner] == INT32_MAX ? 0 : top.id[winner];  // every id banned
  return Row{best, second, float(best + log_sum), float(log_sum - spread / sum), id};
}

}  // namespace
}  // namespace braid

using namespace braid;

// values: [5, rows], best, second, log-sum-exp, entropy, the logit of the row's given id
extern "C" void braid_row_statistics(void* pool, const float* logits, int64_t rows, int64_t vocab, const int64_t* ids,
                                     int64_t* best_id, float* values) {
  auto row = [&](long r) {
    const float* at = logits + r * vocab;
    Row found = measure(at, vocab);
    best_id[r] = found.id;
    values[r] = found.best;
    values[rows + r] = found.second;
    values[2 * rows + r] = found.lse;
    values[3 * rows + r] = found.entropy;
    values[4 * rows + r] = at[ids[r]];
  };
  parallel(static_cast<Pool*>(pool), rows, row);
}
