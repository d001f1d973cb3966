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

// The exponent and kMantissa bits of r + 1: a number that never falls as r grows.
constexpr int kMantissa = 5;

inline int key_of(uint64_t rank) {
  const float number = static_cast<float>(static_cast<int64_t>(rank + 1));
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return static_cast<int>(bits >> (23 - kMantissa)) - (127 << kMantissa);
}

inline int key_of(Wide rank) {
  // Of 2^128 - 1, which is above every rank, r + 1 would be 0; and the word is shifted up to its highest bit.
  const Wide number = rank + (rank != ~Wide{0});
  const uint64_t high = static_cast<uint64_t>(number >> 64), low = static_cast<uint64_t>(number);
  const int zeros = high != 0 ? __builtin_clzll(high) : 64 + __builtin_clzll(low);
  const uint64_t top = static_cast<uint64_t>((number << zeros) >> 64);
  return ((127 - zeros) << kMantissa) + static_cast<int>(top >> (63 - kMantissa) & ((1 << kMantissa) - 1));
}

// Looks up by the key of r how large c can be, then steps down: for each key the table has the largest c whose C(c, i) has
// no larger key, which is the answer for any r of this key, or at most steps[i] above it.
//
// The tables of uint64_t are those of the low places, `num_low_places`; those of Wide are of the places above.
template <class Rank>
class Guess {
 public:
  // Tables for one geometry, made once and kept.
  static Guess of(int num_experts, int top_k) {
    static std::mutex mutex;
    static std::map<std::pair<int, int>, std::unique_ptr<const Tables>> kept;
    const std::lock_guard<std::mutex> lock(mutex);
    std::unique_ptr<const Tables>& tables = kept[{num_experts, top_k}];
    if (!tables) tables = std::make_unique<const Tables>(num_experts, top_k);
    return Guess(tables.get());
  }

  Rank coefficient(int i, int c) const { return row(i)[c]; }

  template <int N>
  ROUTING_MASKS_FN void largest(int i, const Rank (&rank)[N], int (&c)[N]) const {
    const uint16_t* guesses = tables_->guesses[i].data();
    const Rank* coefficients = row(i);
    for (int n = 0; n < N; ++n) c[n] = guesses[key_of(rank[n])];
    for (int step = tables_->steps[i]; step > 0; --step) {
      for (int n = 0; n < N; ++n) c[n] -= coefficients[c[n]] > rank[n];
    }
  }

 private:
  struct Tables {
    int first, columns;
    // A copy without gaps: rows of the compiler's table lie a power of two apart, and evict each other from the cache.
    std::vector<Rank> coefficients;
    std::vector<std::vector<uint16_t>> guesses;
    std::vector<int> steps;

    Tables(int num_experts, int top_k) : columns(num_experts), guesses(top_k + 1), steps(top_k + 1) {
      const int num_low = num_low_places(num_experts, top_k);
      const bool is_low = sizeof(Rank) == sizeof(uint64_t);
      first = is_low ? 1 : num_low + 1;
      const int last = is_low ? num_low : top_k;
      for (int i = first; i <= last; ++i) {
        for (int c = 0; c < num_experts; ++c) coefficients.push_back(binomial<Rank>(i, c));
        // c_i is at most E - K + i - 1, since K - i experts are above it.
        const int end = num_experts - top_k + i;
        const int num_keys = key_of(static_cast<Rank>(count_of_sets(end, i) - 1)) + 1;
        for (int k = 0, c = i - 1; k < num_keys; ++k) {
          const int before = k > 0 ? c : i - 1;
          while (c + 1 < end && key_of(binomial<Rank>(i, c + 1)) <= k) ++c;
          guesses[i].push_back(static_cast<uint16_t>(c));
          if (c - before > steps[i]) steps[i] = c - before;
        }
      }
    }
  };

  explicit Guess(const Tables* tables)
      : tables_(tables), coefficients_(tables->coefficients.data()), first_(tables->first), columns_(tables->columns) {}

  const Rank* row(int i) const { return coefficients_ + static_cast<int64_t>(i - first_) * columns_; }

  const Tables* tables_;
  const Rank* coefficients_;
  int64_t first_, columns_;
};

}  // namespace routing_masks
