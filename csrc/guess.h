// The search for the largest C(c, i) <= r on a CPU, where it takes most of the time of unpacking.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "binomials.h"

namespace routing_masks {

// Looks up by the leading bits of r how large c can be, then steps down.
//
// r + 1 as a float, cut to its exponent and kMantissa bits, is a key that never falls as r grows. For each key the table
// has the largest c whose C(c, i) has no larger key: the answer for any r of this key, or at most steps[i] above it.
class Guess {
 public:
  // Tables for one geometry, whose ranks are below 2^63; made once and kept.
  static Guess of(int num_experts, int top_k) {
    static std::mutex mutex;
    static std::map<std::pair<int, int>, std::unique_ptr<const Tables>> kept;
    const std::lock_guard<std::mutex> lock(mutex);
    std::unique_ptr<const Tables>& tables = kept[{num_experts, top_k}];
    if (!tables) tables = std::make_unique<const Tables>(num_experts, top_k);
    return Guess(tables.get());
  }

  uint64_t coefficient(int i, int c) const { return coefficients_[i * columns_ + c]; }

  template <int N>
  ROUTING_MASKS_FN void largest(int i, const uint64_t (&rank)[N], int (&c)[N]) const {
    const uint16_t* guesses = tables_->guesses[i].data();
    const uint64_t* row = coefficients_ + i * columns_;
    for (int n = 0; n < N; ++n) c[n] = guesses[key(rank[n])];
    for (int step = tables_->steps[i]; step > 0; --step) {
      for (int n = 0; n < N; ++n) c[n] -= row[c[n]] > rank[n];
    }
  }

 private:
  static constexpr int kMantissa = 5;

  static int key(uint64_t rank) {
    const float number = static_cast<float>(static_cast<int64_t>(rank + 1));
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof bits);
    return static_cast<int>(bits >> (23 - kMantissa)) - (127 << kMantissa);
  }

  struct Tables {
    // A copy without gaps: rows of the compiler's table lie a power of two apart, and evict each other from the cache.
    std::vector<uint64_t> coefficients;
    std::vector<std::vector<uint16_t>> guesses;
    std::vector<int> steps;

    Tables(int num_experts, int top_k) : guesses(top_k + 1), steps(top_k + 1) {
      coefficients.reserve(static_cast<size_t>(top_k + 1) * num_experts);
      for (int i = 0; i <= top_k; ++i) {
        for (int c = 0; c < num_experts; ++c) coefficients.push_back(binomial<uint64_t>(i, c));
      }
      for (int i = 1; i <= top_k; ++i) {
        // c_i is at most E - K + i - 1, since K - i experts are above it.
        const int end = num_experts - top_k + i;
        const int num_keys = key(sum(i, end - 1) - 1) + 1;
        for (int k = 0, c = i - 1; k < num_keys; ++k) {
          const int before = k > 0 ? c : i - 1;
          while (c + 1 < end && key(binomial<uint64_t>(i, c + 1)) <= k) ++c;
          guesses[i].push_back(static_cast<uint16_t>(c));
          if (c - before > steps[i]) steps[i] = c - before;
        }
      }
    }

    // C(c + 1, i), also for c + 1 = kMaxExperts.
    static uint64_t sum(int i, int c) { return binomial<uint64_t>(i, c) + binomial<uint64_t>(i - 1, c); }
  };

  explicit Guess(const Tables* tables)
      : tables_(tables),
        coefficients_(tables->coefficients.data()),
        columns_(tables->coefficients.size() / tables->steps.size()) {}

  const Tables* tables_;
  const uint64_t* coefficients_;
  int64_t columns_;
};

}  // namespace routing_masks
