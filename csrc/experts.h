// The experts of a few layers side by side ("lanes"), so that a CPU works on them with vector instructions.
#pragma once

#include <cstdint>
#include <cstring>

#include "binomials.h"

namespace routing_masks {

// In the place of an index that is no expert: above every legal one.
constexpr int16_t kNoExpert = INT16_MAX;

// Top-k experts of N lanes; K <= KMax of the rows are used.
template <int KMax, int N>
struct Experts {
  int16_t at[KMax][N];
};

// End of a loop over the places of a lane, which also stops at K: a constant, so that the loop is unrolled and the places
// are registers, as long as they are few.
template <int KMax>
ROUTING_MASKS_FN constexpr int places(int top_k) {
  return KMax <= 16 ? KMax : top_k;
}

// Puts one layer's indices, `read(k)` for k < K, into a lane.
template <int KMax, int N, class Read>
ROUTING_MASKS_FN void load_lane(Experts<KMax, N>& experts, int lane, int top_k, const Read& read) {
  uint64_t any = 0;
  ROUTING_MASKS_UNROLL
  for (int k = 0; k < places<KMax>(top_k); ++k) {
    if (k >= top_k) break;
    const int64_t index = read(k);
    any |= static_cast<uint64_t>(index);
    experts.at[k][lane] = static_cast<int16_t>(index);
  }
  // A bit above those of an int16: some index is negative, or so large that it lost bits here.
  if (any > kNoExpert) experts.at[0][lane] = kNoExpert;
}

// The same place k of N lanes, on which operators work lane by lane.
template <int N>
struct Lanes {
  typedef int16_t type __attribute__((vector_size(2 * N)));
};

template <>
struct Lanes<1> {
  using type = int16_t;
};

// Sorts every lane in ascending order, by insertion without branches. legal[n]: lane n holds K different experts; where
// it does not, it holds some numbers in [0, E) afterwards.
template <int KMax, int N>
ROUTING_MASKS_FN void sort_lanes(Experts<KMax, N>& experts, int top_k, int num_experts, bool (&legal)[N]) {
  using Place = typename Lanes<N>::type;
  Place place[KMax];
  ROUTING_MASKS_UNROLL
  for (int k = 0; k < places<KMax>(top_k); ++k) {
    if (k >= top_k) break;
    std::memcpy(&place[k], experts.at[k], sizeof(Place));
    ROUTING_MASKS_UNROLL
    for (int below = 1; below < places<KMax>(top_k); ++below) {
      if (below > k) break;
      const int j = k - below + 1;
      const Place a = place[j - 1], b = place[j];
      place[j - 1] = a < b ? a : b;
      place[j] = a < b ? b : a;
    }
  }
  const Place zero{}, last = zero + static_cast<int16_t>(num_experts - 1);
  Place wrong{}, before = zero - static_cast<int16_t>(1);
  ROUTING_MASKS_UNROLL
  for (int k = 0; k < places<KMax>(top_k); ++k) {
    if (k >= top_k) break;
    wrong |= (place[k] == before) | (place[k] > last);
    before = place[k];
    place[k] = place[k] < last ? place[k] : last;
    place[k] = place[k] > zero ? place[k] : zero;
    std::memcpy(experts.at[k], &place[k], sizeof(Place));
  }
  int16_t wrong_lanes[N];
  std::memcpy(wrong_lanes, &wrong, sizeof wrong);
  for (int n = 0; n < N; ++n) legal[n] = wrong_lanes[n] == 0;
}

}  // namespace routing_masks
