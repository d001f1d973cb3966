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
  int at_once;  // indices that fit into a word

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
  // The indices of a field in the order of k, several out of each word. Where the loop over them is unrolled all words are
  // read before it, since each place would have its own code to read the next one.
  class Words {
   public:
    ROUTING_MASKS_FN Words(const OrderedCode& code, const Field& field) : code_(code), field_(field) {
      ROUTING_MASKS_UNROLL
      for (int w = 0; w < kWords; ++w) words_[w] = read(w * code.at_once);
      left_ = code.at_once;
    }

    ROUTING_MASKS_FN int64_t next(int k) {
      if (left_ == 0) {
        if constexpr (kWords > 1) {
          ROUTING_MASKS_UNROLL
          for (int w = 0; w + 1 < kWords; ++w) words_[w] = words_[w + 1];
        } else {
          words_[0] = read(k);
        }
        left_ = code_.at_once;
      }
      --left_;
      const int64_t index = static_cast<int64_t>(words_[0] & low_bits(code_.index_bits));
      words_[0] >>= code_.index_bits;
      return index;
    }

   private:
    static constexpr int kMostIndexBits = bit_length(kMaxExperts - 1), kAtOnce = 64 / kMostIndexBits;
    static constexpr int kWords = KMax <= kMostUnrolled ? (KMax + kAtOnce - 1) / kAtOnce : 1;

    // From index k on.
    ROUTING_MASKS_FN uint64_t read(int k) const {
      const int left = code_.top_k - k, count = left < code_.at_once ? left : code_.at_once;
      return count > 0 ? read_bits(field_, field_.first_bit + k * code_.index_bits, count * code_.index_bits) : 0;
    }

    const OrderedCode& code_;
    const Field& field_;
    uint64_t words_[kWords];
    int left_;
  };

  template <int N>
  ROUTING_MASKS_FN void load_and_check(const Field (&fields)[N], Experts<KMax, N>& given, bool (&legal)[N]) const {
    for (int n = 0; n < N; ++n) {
      Words words(*this, fields[n]);
      load_lane(given, n, top_k, [&](int k) { return words.next(k); });
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
    const int index_bits = bit_length(num_experts - 1);
    run(OrderedCode<KMax>{num_experts, top_k, index_bits, index_bits > 0 ? 64 / index_bits : top_k});
  }
};

}  // namespace routing_masks
