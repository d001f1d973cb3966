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

  template <int N>
  ROUTING_MASKS_FN void write(
      BitWriter& out, const Experts<KMax, N>&, const Experts<KMax, N>& sorted, const bool (&legal)[N], int lanes) const {
    Rank rank[N];
    rank_lanes<Rank>(search, sorted, top_k, rank);
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
    if (N > 1 && all_legal) return unrank_lanes<Rank>(search, top_k, rank, visit);
    unrank_lanes<Rank>(search, top_k, rank, [&](int n, int k, int c) { visit(n, k, legal[n] ? c : num_experts); });
  }

 private:
  ROUTING_MASKS_FN Rank rank_at(const Field& field) const {
    Rank rank = read_bits(field.row, field.row_bytes, field.first_bit, width < 64 ? width : 64);
    if constexpr (sizeof(Rank) > 8) {
      rank |= static_cast<Rank>(read_bits(field.row, field.row_bytes, field.first_bit + 64, width - 64)) << 64;
    }
    return rank;
  }
};

struct Rank {
  static constexpr const char* kName = "rank";
  static constexpr bool kHoldsLayerToRead = false;

  // `Device::NarrowSearch::of(num_experts, top_k)` finds ranks below 2^63.
  template <int KMax, class Device, class Run>
  static void with_code(int num_experts, int top_k, const Run& run) {
    const Wide num_sets = count_of_sets(num_experts, top_k);
    require(
        num_sets != ~Wide{0}, "codec 'rank' has ranks of at most ", ROUTING_MASKS_MAX_RANK_BITS,
        " bits, and the sets of ", top_k, " of ", num_experts, " experts need more: choose 'auto', 'bitset' or 'ordered'");
    const int width = bit_length(num_sets - 1);
    if (width < 64) {
      using Search = typename Device::NarrowSearch;
      return run(RankCode<KMax, uint64_t, Search>{
          num_experts, top_k, width, static_cast<uint64_t>(num_sets), Search::of(num_experts, top_k)});
    }
    using Search = Bisection<Wide>;
    run(RankCode<KMax, Wide, Search>{num_experts, top_k, width, num_sets, Search::of(num_experts, top_k)});
  }
};

}  // namespace routing_masks
