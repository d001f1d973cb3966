// How one MoE layer's experts are written into a field of `bits()` bits and read back.
//
// Indices that are not K different experts become a field that is illegal wherever the code has one to spare: no bit set
// for bitset, all for the others. An illegal field reads back as K times `num_experts`, which is no expert.
//
// Codes work on N fields ("lanes") at once, which suits the vector units of a CPU; a CUDA thread has one lane.
// KMax >= K bounds the arrays, so that they fit into a CUDA thread's registers.
#pragma once

#include <cstdint>

#include "bits.h"
#include "experts.h"
#include "rank.h"

namespace routing_masks {

// E bits, expert e at bit e.
template <int KMax_>
struct BitsetCode {
  static constexpr int KMax = KMax_;
  int num_experts, top_k;

  ROUTING_MASKS_FN int bits() const { return num_experts; }

  ROUTING_MASKS_FN int word_bits(int first) const { return num_experts - first < 64 ? num_experts - first : 64; }

  template <int N>
  ROUTING_MASKS_FN void write(
      BitWriter& out, const Experts<KMax, N>&, const Experts<KMax, N>& sorted, const bool (&legal)[N], int lanes) const {
    for (int n = 0; n < lanes; ++n) {
      for (int first = 0; first < num_experts; first += 64) {
        uint64_t word = 0;
        ROUTING_MASKS_UNROLL
        for (int k = 0; k < places<KMax>(top_k); ++k) {
          if (k >= top_k) break;
          const unsigned bit = static_cast<unsigned>(sorted.at[k][n] - first);
          word |= legal[n] && bit < 64 ? uint64_t{1} << bit : 0;
        }
        out.append(word, word_bits(first));
      }
    }
  }

  template <int N>
  ROUTING_MASKS_FN void check(const Field (&fields)[N], bool (&legal)[N]) const {
    for (int n = 0; n < N; ++n) {
      int found = 0;
      for (int first = 0; first < num_experts; first += 64) found += count_bits(word_at(fields[n], first));
      legal[n] = found == top_k;
    }
  }

  template <int N, class Visit>
  ROUTING_MASKS_FN void read(const Field (&fields)[N], bool (&legal)[N], const Visit& visit) const {
    check(fields, legal);
    for (int n = 0; n < N; ++n) {
      int k = 0;
      for (int first = 0; legal[n] && first < num_experts; first += 64) {
        for (uint64_t word = word_at(fields[n], first); word != 0; word &= word - 1) {
          visit(n, k++, first + lowest_bit(word));
        }
      }
      for (; k < top_k; ++k) visit(n, k, num_experts);
    }
  }

 private:
  ROUTING_MASKS_FN uint64_t word_at(const Field& field, int first) const {
    return read_bits(field.row, field.row_bytes, field.first_bit + first, word_bits(first));
  }
};

// K indices of ceil(log2 E) bits, in the router's column order.
template <int KMax_>
struct OrderedCode {
  static constexpr int KMax = KMax_;
  int num_experts, top_k, index_bits;

  ROUTING_MASKS_FN int bits() const { return top_k * index_bits; }

  template <int N>
  ROUTING_MASKS_FN void write(
      BitWriter& out, const Experts<KMax, N>& given, const Experts<KMax, N>&, const bool (&legal)[N], int lanes) const {
    for (int n = 0; n < lanes; ++n) {
      ROUTING_MASKS_UNROLL
      for (int k = 0; k < places<KMax>(top_k); ++k) {
        if (k >= top_k) break;
        out.append(legal[n] ? given.at[k][n] : low_bits(index_bits), index_bits);
      }
    }
  }

  template <int N>
  ROUTING_MASKS_FN void check(const Field (&fields)[N], bool (&legal)[N]) const {
    Experts<KMax, N> experts;
    load_and_check(fields, experts, legal);
  }

  template <int N, class Visit>
  ROUTING_MASKS_FN void read(const Field (&fields)[N], bool (&legal)[N], const Visit& visit) const {
    Experts<KMax, N> given;
    load_and_check(fields, given, legal);
    for (int n = 0; n < N; ++n) {
      ROUTING_MASKS_UNROLL
      for (int k = 0; k < places<KMax>(top_k); ++k) {
        if (k >= top_k) break;
        visit(n, k, legal[n] ? given.at[k][n] : num_experts);
      }
    }
  }

 private:
  template <int N>
  ROUTING_MASKS_FN void load_and_check(const Field (&fields)[N], Experts<KMax, N>& given, bool (&legal)[N]) const {
    for (int n = 0; n < N; ++n) {
      load_lane(given, n, top_k, [&](int k) {
        const int64_t first = fields[n].first_bit + k * index_bits;
        return static_cast<int64_t>(read_bits(fields[n].row, fields[n].row_bytes, first, index_bits));
      });
    }
    Experts<KMax, N> sorted = given;
    sort_lanes(sorted, top_k, num_experts, legal);
  }
};

// The rank of the set in colexicographic order, in ceil(log2 C(E, K)) bits: see rank.h.
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

}  // namespace routing_masks
