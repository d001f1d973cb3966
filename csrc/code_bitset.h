// Codec 'bitset': the mask itself.
#pragma once

#include <cstdint>

#include "bits.h"
#include "experts.h"

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

struct Bitset {
  static constexpr const char* kName = "bitset";
  static constexpr bool kHoldsLayerToRead = false;

  template <int KMax, class Device, class Run>
  static void with_code(int num_experts, int top_k, const Run& run) {
    run(BitsetCode<KMax>{num_experts, top_k});
  }
};

}  // namespace routing_masks
