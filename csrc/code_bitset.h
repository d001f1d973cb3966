// Codec 'bitset': the mask itself.
#pragma once

#include <cstdint>

#include "bits.h"
#include "experts.h"

namespace routing_masks {

static_assert(kMaxExperts <= 64 * BitCount::kMostWords, "the experts of a mask are counted in one go");

// E bits, expert e at bit e.
template <int KMax_>
struct BitsetCode {
  static constexpr int KMax = KMax_;
  int num_experts, top_k;

  ROUTING_MASKS_FN int bits() const { return num_experts; }

  ROUTING_MASKS_FN int word_bits(int first) const { return num_experts - first < 64 ? num_experts - first : 64; }

  template <class Out, int N>
  ROUTING_MASKS_FN void write(
      Out& out, const Experts<KMax, N>&, const Experts<KMax, N>& sorted, const bool (&legal)[N], int lanes) const {
    for (int n = 0; n < lanes; ++n) {
      if constexpr (N > 1) {
        uint64_t words[kMaxWords] = {};
        for (int k = 0; k < top_k; ++k) {
          const unsigned expert = static_cast<unsigned>(sorted.at[k][n]);
          words[expert / 64] |= static_cast<uint64_t>(legal[n]) << expert % 64;
        }
        for (int first = 0; first < num_experts; first += 64) out.append(words[first / 64], word_bits(first));
      } else {
        // A CUDA thread has no array that is indexed at run time but in memory.
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
  }

  template <int N>
  ROUTING_MASKS_FN void check(const Field (&fields)[N], bool (&legal)[N]) const {
    for (int n = 0; n < N; ++n) {
      BitCount found;
      for (int first = 0; first < num_experts; first += 64) found.add(word_at(fields[n], first));
      legal[n] = found.total() == top_k;
    }
  }

  template <int N, class Visit>
  ROUTING_MASKS_FN void read(const Field (&fields)[N], bool (&legal)[N], const Visit& visit) const {
    if constexpr (N > 1) {
      for (int n = 0; n < N; ++n) legal[n] = read_words(fields[n], [&](int k, int expert) { visit(n, k, expert); });
    } else {
      check(fields, legal);
      int k = 0;
      for (int first = 0; legal[0] && first < num_experts; first += 64) {
        for (uint64_t word = word_at(fields[0], first); word != 0; word &= word - 1) {
          visit(0, k++, first + lowest_bit(word));
        }
      }
      for (; k < top_k; ++k) visit(0, k, num_experts);
    }
  }

 private:
  static constexpr int kMaxWords = kMaxExperts / 64;

  // Which of the words have bits left is a word itself, so that nothing branches on where the experts are.
  template <class Visit>
  bool read_words(const Field& field, const Visit& visit) const {
    uint64_t words[kMaxWords], left = 0;
    BitCount found;
    for (int first = 0; first < num_experts; first += 64) {
      const uint64_t word = word_at(field, first);
      words[first / 64] = word;
      left |= static_cast<uint64_t>(word != 0) << first / 64;
      found.add(word);
    }
    if (found.total() != top_k) {
      for (int k = 0; k < top_k; ++k) visit(k, num_experts);
      return false;
    }
    if (4 * num_experts <= 64 * top_k) {
      // Words of many experts each: the loop over a word's experts is long.
      for (int first = 0, k = 0; first < num_experts; first += 64) {
        for (uint64_t word = words[first / 64]; word != 0; word &= word - 1) visit(k++, first + lowest_bit(word));
      }
      return true;
    }
    for (int k = 0; k < top_k; ++k) {
      const int at = lowest_bit(left);
      const uint64_t word = words[at], rest = word & (word - 1);
      visit(k, 64 * at + lowest_bit(word));
      words[at] = rest;
      left ^= static_cast<uint64_t>(rest == 0) << at;
    }
    return true;
  }

  ROUTING_MASKS_FN uint64_t word_at(const Field& field, int first) const {
    return read_bits(field, field.first_bit + first, word_bits(first));
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
