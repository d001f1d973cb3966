// The experts of a few layers side by side ("lanes"), so that a CPU works on them with vector instructions.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

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
constexpr int kMostUnrolled = 16;

template <int KMax>
ROUTING_MASKS_FN constexpr int places(int top_k) {
  return KMax <= kMostUnrolled ? KMax : top_k;
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

// Calls exchange(a, b), a < b, for the comparators of a network that sorts `count` places: K. E. Batcher's merge exchange
// (D. E. Knuth, The Art of Computer Programming 3, section 5.2.2, algorithm M), 19 comparators for 8 and 63 for 16.
template <class Exchange>
ROUTING_MASKS_FN constexpr void merge_exchange(int count, const Exchange& exchange) {
  int half = 1;
  while (2 * half < count) half *= 2;
  for (int p = half; p > 0; p /= 2) {
    int q = half, r = 0, d = p;
    while (true) {
      for (int i = 0; i + d < count; ++i) {
        if ((i & p) == r) exchange(i, i + d);
      }
      if (q == p) break;
      d = q - p;
      q /= 2;
      r = p;
    }
  }
}

// The network as a list, so that unrolled code has constants for the places, which then are registers.
template <int Count>
struct Network {
  int num_comparators = 0;
  int below[Count * Count] = {}, above[Count * Count] = {};

  constexpr Network() {
    merge_exchange(Count, Append{*this});
  }

  struct Append {
    Network& network;
    constexpr void operator()(int a, int b) const {
      network.below[network.num_comparators] = a;
      network.above[network.num_comparators++] = b;
    }
  };
};

template <int Count>
constexpr Network<Count> kNetwork{};

template <int Count, class Exchange, std::size_t... Step>
ROUTING_MASKS_FN void exchange_all(const Exchange& exchange, std::index_sequence<Step...>) {
  (exchange(
       std::integral_constant<int, kNetwork<Count>.below[Step]>{},
       std::integral_constant<int, kNetwork<Count>.above[Step]>{}),
   ...);
}

// Sorts every lane in ascending order, without branches on what it holds. legal[n]: lane n holds K different experts;
// where it does not, it holds some numbers in [0, E) afterwards.
template <int KMax, int N>
ROUTING_MASKS_FN void sort_lanes(Experts<KMax, N>& experts, int top_k, int num_experts, bool (&legal)[N]) {
  using Place = typename Lanes<N>::type;
  Place place[KMax];
  const auto exchange = [&](auto below, auto above) {
    const Place a = place[below], b = place[above];
    place[below] = a < b ? a : b;
    place[above] = a < b ? b : a;
  };
  ROUTING_MASKS_UNROLL
  for (int k = 0; k < places<KMax>(top_k); ++k) {
    if (k < top_k) {
      std::memcpy(&place[k], experts.at[k], sizeof(Place));
    } else {
      place[k] = Place{} + kNoExpert;  // stays above the K
    }
  }
  if constexpr (KMax <= kMostUnrolled) {
    constexpr std::size_t kSteps = kNetwork<KMax>.num_comparators;
    exchange_all<KMax>(exchange, std::make_index_sequence<kSteps>{});
  } else {
    merge_exchange(top_k, exchange);
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
