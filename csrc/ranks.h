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

template <class Rank, class Search, int N>
ROUTING_MASKS_FN void bisect(const Search& search, int first_step, int i, const Rank (&rank)[N], int (&c)[N]) {
  for (int n = 0; n < N; ++n) c[n] = 0;
  for (int step = first_step; step > 0; step /= 2) {
    for (int n = 0; n < N; ++n) c[n] = search.coefficient(i, c[n] + step) <= rank[n] ? c[n] + step : c[n];
  }
}

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
    bisect(*this, first_step_, i, rank, c);
  }

  ROUTING_MASKS_FN int first_step() const { return first_step_; }

 private:
  int first_step_ = 1;
};

// A copy of the rows i = 1, 2, ... of the compiler's table: a CUDA block has it in shared memory, where threads look up
// what they like.
class CoefficientsInTable {
 public:
  ROUTING_MASKS_FN CoefficientsInTable(const uint64_t* table, int columns) : table_(table), columns_(columns) {}

  ROUTING_MASKS_FN uint64_t coefficient(int i, int c) const { return table_[(i - 1) * columns_ + c]; }

 private:
  const uint64_t* table_;
  int columns_;
};

// What of a search a table in shared memory can do.
ROUTING_MASKS_FN int table_words(const Bisection<uint64_t>& search, int num_places) {
  return num_places * 2 * search.first_step();
}

ROUTING_MASKS_FN void
fill_table(const Bisection<uint64_t>& search, int num_places, uint64_t* table, int thread, int threads) {
  const int columns = 2 * search.first_step();
  for (int at = thread; at < num_places * columns; at += threads) {
    table[at] = search.coefficient(1 + at / columns, at % columns);
  }
}

// Two searches for ranks that are wider than a machine's word: most of their work is on what fits into one.
//
// Of K experts, those at the low places [0, num_low) have ranks below 2^63 among themselves.
template <class High, class Low>
struct Split {
  High high;
  Low low;
  int num_low;

  static Split of(int num_experts, int top_k) {
    return {High::of(num_experts, top_k), Low::of(num_experts, top_k), num_low_places(num_experts, top_k)};
  }
};

// Adds the coefficients of the places [begin, end) of sorted lanes.
template <class Rank, class Search, int KMax, int N>
ROUTING_MASKS_FN void
add_places(const Search& search, const Experts<KMax, N>& sorted, int begin, int end, Rank (&rank)[N]) {
  ROUTING_MASKS_UNROLL
  for (int k = 0; k < places<KMax>(end); ++k) {
    if (k >= end) break;
    if (k < begin) continue;
    for (int n = 0; n < N; ++n) rank[n] += search.coefficient(k + 1, sorted.at[k][n]);
  }
}

// Takes the experts at the places [end, begin) out of the ranks, the highest first.
template <class Rank, class Search, int N, class Visit>
ROUTING_MASKS_FN void take_places(const Search& search, int begin, int end, Rank (&rank)[N], const Visit& visit) {
  for (int i = begin; i > end; --i) {
    int c[N];
    search.largest(i, rank, c);
    for (int n = 0; n < N; ++n) {
      rank[n] -= search.coefficient(i, c[n]);
      visit(n, i - 1, c[n]);
    }
  }
}

// Ranks of the sorted lanes.
template <class Rank, class Search, int KMax, int N>
ROUTING_MASKS_FN void rank_lanes(const Search& search, const Experts<KMax, N>& sorted, int top_k, Rank (&rank)[N]) {
  for (int n = 0; n < N; ++n) rank[n] = 0;
  add_places(search, sorted, 0, top_k, rank);
}

template <class Rank, class High, class Low, int KMax, int N>
ROUTING_MASKS_FN void
rank_lanes(const Split<High, Low>& search, const Experts<KMax, N>& sorted, int top_k, Rank (&rank)[N]) {
  uint64_t low[N];
  rank_lanes(search.low, sorted, search.num_low, low);
  for (int n = 0; n < N; ++n) rank[n] = low[n];
  add_places(search.high, sorted, search.num_low, top_k, rank);
}

// Calls visit(n, k, expert) for every lane and k < K; `rank` is used up.
template <class Rank, class Search, int N, class Visit>
ROUTING_MASKS_FN void unrank_lanes(const Search& search, int top_k, Rank (&rank)[N], const Visit& visit) {
  take_places(search, top_k, 1, rank, visit);
  for (int n = 0; n < N; ++n) visit(n, 0, static_cast<int>(rank[n]));
}

template <class Rank, class High, class Low, int N, class Visit>
ROUTING_MASKS_FN void
unrank_lanes(const Split<High, Low>& search, int top_k, Rank (&rank)[N], const Visit& visit) {
  take_places(search.high, top_k, search.num_low, rank, visit);
  uint64_t low[N];
  for (int n = 0; n < N; ++n) low[n] = static_cast<uint64_t>(rank[n]);
  unrank_lanes(search.low, search.num_low, low, visit);
}

}  // namespace routing_masks
