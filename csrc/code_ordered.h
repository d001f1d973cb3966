// Codec 'ordered': the indices as the router gave them, so that their order comes back.
#pragma once

#include <cstdint>

#include "bits.h"
#include "experts.h"

namespace routing_masks {

// K indices of ceil(log2 E) bits, in the router's column order.
template <int KMax_>
struct OrderedCode {
  static constexpr int KMax = KMax_;
  int num_experts, top_k, index_bits;

  ROUTING_MASKS_FN int bits() const { return top_k * index_bits; }

  template <class Out, int N>
  ROUTING_MASKS_FN void write(
      Out& out, const Experts<KMax, N>& given, const Experts<KMax, N>&, const bool (&legal)[N], int lanes) const {
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

struct Ordered {
  static constexpr const char* kName = "ordered";
  // To see whether its experts differ.
  static constexpr bool kHoldsLayerToRead = true;

  template <int KMax, class Device, class Run>
  static void with_code(int num_experts, int top_k, const Run& run) {
    run(OrderedCode<KMax>{num_experts, top_k, bit_length(num_experts - 1)});
  }
};

}  // namespace routing_masks
