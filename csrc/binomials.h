// Binomial coefficients C(c, i) for i <= kMaxTopK and c < kMaxExperts, made by the compiler.
#pragma once

#include <cstdint>

#include "bits.h"

// These come from router_replay/masks/limits.py, through the build.
#if !defined(ROUTING_MASKS_MAX_EXPERTS) || !defined(ROUTING_MASKS_MAX_TOP_K) || !defined(ROUTING_MASKS_MAX_RANK_BITS)
#error "define ROUTING_MASKS_MAX_EXPERTS, ROUTING_MASKS_MAX_TOP_K and ROUTING_MASKS_MAX_RANK_BITS (see setup.py)"
#endif

namespace routing_masks {

using Wide = unsigned __int128;

constexpr int bit_length(Wide value) {
  int length = 0;
  for (; value != 0; value >>= 1) ++length;
  return length;
}

constexpr int kMaxExperts = ROUTING_MASKS_MAX_EXPERTS;
constexpr int kMaxTopK = ROUTING_MASKS_MAX_TOP_K;
static_assert((kMaxExperts & (kMaxExperts - 1)) == 0, "the binary search steps through a power of two");
static_assert(8 * sizeof(Wide) == ROUTING_MASKS_MAX_RANK_BITS, "the limit of ranks is the width of their word");
static_assert(kMaxExperts < INT16_MAX, "experts are held as int16");

// Coefficients that do not fit into Rank are its largest value, which is above every rank that does.
template <class Rank>
struct BinomialTable {
  Rank at[kMaxTopK + 1][kMaxExperts];
};

template <class Rank>
constexpr BinomialTable<Rank> make_binomials() {
  constexpr Rank kTooLarge = ~Rank{0};
  BinomialTable<Rank> table{};
  for (int c = 0; c < kMaxExperts; ++c) table.at[0][c] = 1;
  for (int i = 1; i <= kMaxTopK; ++i) {
    for (int c = 1; c < kMaxExperts; ++c) {
      const Rank without = table.at[i][c - 1];
      const Rank with = table.at[i - 1][c - 1];
      table.at[i][c] = with > kTooLarge - without ? kTooLarge : without + with;
    }
  }
  return table;
}

#ifdef __CUDACC__
__device__ constexpr BinomialTable<uint64_t> kDeviceBinomials64 = make_binomials<uint64_t>();
__device__ constexpr BinomialTable<Wide> kDeviceBinomials128 = make_binomials<Wide>();
#endif
constexpr BinomialTable<uint64_t> kBinomials64 = make_binomials<uint64_t>();
constexpr BinomialTable<Wide> kBinomials128 = make_binomials<Wide>();

// C(c, i) for all c in [0, kMaxExperts), 1 <= i <= kMaxTopK.
template <class Rank>
ROUTING_MASKS_FN const Rank* binomials(int i);

template <>
ROUTING_MASKS_FN const uint64_t* binomials<uint64_t>(int i) {
#ifdef __CUDA_ARCH__
  return kDeviceBinomials64.at[i];
#else
  return kBinomials64.at[i];
#endif
}

template <>
ROUTING_MASKS_FN const Wide* binomials<Wide>(int i) {
#ifdef __CUDA_ARCH__
  return kDeviceBinomials128.at[i];
#else
  return kBinomials128.at[i];
#endif
}

template <class Rank>
ROUTING_MASKS_FN Rank binomial(int i, int c) {
  return binomials<Rank>(i)[c];
}

// Number of K-subsets of E experts, saturated; C(E, K) = C(E - 1, K) + C(E - 1, K - 1).
constexpr Wide count_of_sets(int num_experts, int top_k) {
  const Wide without = kBinomials128.at[top_k][num_experts - 1];
  const Wide with = kBinomials128.at[top_k - 1][num_experts - 1];
  return with > ~Wide{0} - without ? ~Wide{0} : without + with;
}

// How many of the K lowest places, from the first on, have ranks below 2^63 among themselves; i places do, if the sets of
// i of E - K + i experts are as many at most, since K - i experts are above them.
inline int num_low_places(int num_experts, int top_k) {
  int low = top_k;
  while (low > 1 && count_of_sets(num_experts - top_k + low, low) > Wide{1} << 63) --low;
  return low;
}

}  // namespace routing_masks
