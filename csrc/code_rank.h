// Codec 'rank': the number of the expert set.
#pragma once

#include <cstdint>

#include "bits.h"
#include "experts.h"
#include "ranks.h"
#include "require.h"

namespace routing_masks {

// The rank of the set in colexicographic order, in ceil(log2 C(E, K)) bits: see ranks.h.
template <int KMax_, class Rank, class Search>
struct RankCode {
  static constexpr int KMax = KMax_;
  int num_experts, top_k, width;
  Rank num_sets;
  Search search;

  ROUTING_MASKS_FN int bits() const { return width; }

  template <class Out, int N>
  ROUTING_MASKS_FN void write(
      Out& out, const Experts<KMax, N>&, const Experts<KMax, N>& sorted, const bool (&legal)[N], int lanes) const {
    Rank rank[N];
    rank_lanes(search, sorted, top_k, rank);
    for (int n = 0; n < lanes; ++n) {
      const Rank value = legal[n] ? rank[n] : ~Rank{0};
      out.append(static_cast<uint64_t>(value) & low_bits(width), width < 64 ? width : 64);
      if constexpr (sizeof(Rank) > 8) out.append(static_cast<uint64_t>(value >> 64) & low_bits(width - 64), width - 64);
    }
  }

  template <int N>
  ROUTING_MASKS_FN void check(const Field (&fields)[N], bool (&legal)[N]) const {
    for (int n = 0; n < N; ++n) legal[n] = rank_at(fields[n]) < num_sets;
  }

  template <int N, class Visit>
  ROUTING_MASKS_FN void read(const Field (&fields)[N], bool (&legal)[N], const Visit& visit) const {
    Rank rank[N];
    for (int n = 0; n < N; ++n) {
      rank[n] = rank_at(fields[n]);
      legal[n] = rank[n] < num_sets;
      rank[n] = legal[n] ? rank[n] : 0;
    }
    bool all_legal = true;
    for (int n = 0; n < N; ++n) all_legal &= legal[n];
    if (N > 1 && all_legal) return unrank_lanes(search, top_k, rank, visit);
    unrank_lanes(search, top_k, rank, [&](int n, int k, int c) { visit(n, k, legal[n] ? c : num_experts); });
  }

  // The same code with another search, and another bound of K.
  template <int OtherKMax, class Other>
  ROUTING_MASKS_FN RankCode<OtherKMax, Rank, Other> searching(const Other& other) const {
    return {num_experts, top_k, width, num_sets, other};
  }

  // To write by a code whose searches are bisections: the 64-bit words of a table for them, its contents, and the code
  // with it.
  ROUTING_MASKS_FN int table_words() const {
    if constexpr (kIsWide) {
      return routing_masks::table_words(search.low, search.num_low);
    } else {
      return routing_masks::table_words(search, top_k);
    }
  }

  ROUTING_MASKS_FN void fill_table(uint64_t* table, int thread, int threads) const {
    if constexpr (kIsWide) {
      routing_masks::fill_table(search.low, search.num_low, table, thread, threads);
    } else {
      routing_masks::fill_table(search, top_k, table, thread, threads);
    }
  }

  ROUTING_MASKS_FN auto in_table(const uint64_t* table) const {
    if constexpr (kIsWide) {
      const CoefficientsInTable low(table, 2 * search.low.first_step());
      return searching<KMax>(Split<decltype(search.high), CoefficientsInTable>{search.high, low, search.num_low});
    } else {
      return searching<KMax>(CoefficientsInTable(table, 2 * search.first_step()));
    }
  }

 private:
  static constexpr bool kIsWide = sizeof(Rank) > sizeof(uint64_t);

  ROUTING_MASKS_FN Rank rank_at(const Field& field) const {
    Rank rank = read_bits(field, field.first_bit, width < 64 ? width : 64);
    if constexpr (sizeof(Rank) > 8) {
      rank |= static_cast<Rank>(read_bits(field, field.first_bit + 64, width - 64)) << 64;
    }
    return rank;
  }
};

struct Rank {
  static constexpr const char* kName = "rank";
  static constexpr bool kHoldsLayerToRead = false;

  // `Device::Search<uint64_t>` is for ranks below 2^63, `Device::Search<Wide>` for all; both have of(num_experts, top_k).
  template <int KMax, class Device, class Run>
  static void with_code(int num_experts, int top_k, const Run& run) {
    const Wide num_sets = count_of_sets(num_experts, top_k);
    require(
        num_sets != ~Wide{0}, "codec 'rank' has ranks of at most ", ROUTING_MASKS_MAX_RANK_BITS,
        " bits, and the sets of ", top_k, " of ", num_experts, " experts need more: choose 'auto', 'bitset' or 'ordered'");
    const int width = bit_length(num_sets - 1);
    using Narrow = typename Device::template Search<uint64_t>;
    if (width < 64) {
      return run(RankCode<KMax, uint64_t, Narrow>{
          num_experts, top_k, width, static_cast<uint64_t>(num_sets), Narrow::of(num_experts, top_k)});
    }
    using Both = Split<typename Device::template Search<Wide>, Narrow>;
    run(RankCode<KMax, Wide, Both>{num_experts, top_k, width, num_sets, Both::of(num_experts, top_k)});
  }
};

}  // namespace routing_masks
