// Ranks of expert sets in colexicographic order, and how the largest C(c, i) <= r is found.
//
// The combinatorial number system (D. H. Lehmer 1964; D. E. Knuth, The Art of Computer Programming 4A, section 7.2.1.3,
// theorem L): experts c_1 < c_2 < ... < c_K have the rank C(c_1, 1) + C(c_2, 2) + ... + C(c_K, K), a bijection onto
// [0, C(E, K)). Back, from i = K down to 1: c_i is the largest c with C(c, i) <= r, and r loses C(c_i, i).
#pragma once

#include <cstdint>

#include "binomials.h"
#include "experts.h"

namespace routing_masks {

// Looks C(c, i) up in the compiler's table, and searches it by bisection.
template <class Rank>
class Bisection {
 public:
  static Bisection of(int num_experts, int) {
    Bisection search;
    while (2 * search.first_step_ < num_experts) search.first_step_ *= 2;
    return search;
  }

  ROUTING_MASKS_FN Rank coefficient(int i, int c) const { return binomial<Rank>(i, c); }

  template <int N>
  ROUTING_MASKS_FN void largest(int i, const Rank (&rank)[N], int (&c)[N]) const {
    for (int n = 0; n < N; ++n) c[n] = 0;
    for (int step = first_step_; step > 0; step /= 2) {
      for (int n = 0; n < N; ++n) c[n] = coefficient(i, c[n] + step) <= rank[n] ? c[n] + step : c[n];
    }
  }

 private:
  int first_step_ = 1;
};

// Ranks of the sorted lanes.
template <class Rank, class Search, int KMax, int N>
ROUTING_MASKS_FN void rank_lanes(const Search& search, const Experts<KMax, N>& sorted, int top_k, Rank (&rank)[N]) {
  for (int n = 0; n < N; ++n) rank[n] = 0;
  ROUTING_MASKS_UNROLL
  for (int k = 0; k < places<KMax>(top_k); ++k) {
    if (k >= top_k) break;
    for (int n = 0; n < N; ++n) rank[n] += search.coefficient(k + 1, sorted.at[k][n]);
  }
}

// Calls visit(n, k, expert) for every lane and k < K; `rank` is used up.
template <class Rank, class Search, int N, class Visit>
ROUTING_MASKS_FN void unrank_lanes(const Search& search, int top_k, Rank (&rank)[N], const Visit& visit) {
  for (int i = top_k; i > 1; --i) {
    int c[N];
    search.largest(i, rank, c);
    for (int n = 0; n < N; ++n) {
      rank[n] -= search.coefficient(i, c[n]);
      visit(n, i - 1, c[n]);
    }
  }
  for (int n = 0; n < N; ++n) visit(n, 0, static_cast<int>(rank[n]));
}

}  // namespace routing_masks
