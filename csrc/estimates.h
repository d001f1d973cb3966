// How a CUDA thread finds the experts of a rank: for each place one look into a table gives a line, on which the largest c
// with C(c, i) <= r is found or missed by one. Bisection takes log2 E looks, which are what unpacking would wait for.
#pragma once

#ifdef __CUDACC__
#include <cuda_pipeline_primitives.h>
#endif

#include <cstdint>
#include <cstring>

#include "binomials.h"
#include "experts.h"

namespace routing_masks {

// Numbers r + 1 lie in octaves of eight keys each: the exponent, and the highest three bits of the mantissa.
constexpr int kKeysPerOctave = 8;
// As many as the ranks of up to 16 of 1,024 experts fill.
constexpr int kOctaves = 120;
constexpr int kKeys = kOctaves * kKeysPerOctave;
constexpr int kEstimatedPlaces = kMostUnrolled;
static_assert(kMaxExperts <= 1024 && kEstimatedPlaces <= 16, "estimates fit into 16 bits, and ranks into the octaves");

// The places i - 1, i up to this, have ranks below 2^63 among any experts.
constexpr int kAlwaysLow = 7;
static_assert(count_of_sets(kMaxExperts, kAlwaysLow) < Wide{1} << 63, "the lowest places are low places");

// Neither falls as the number grows.
struct Located {
  int key;
  uint32_t part;  // of the way from the key's first number to the next key's, in 1 / 2^16, rounded down
};

ROUTING_MASKS_FN Located locate(uint64_t number) {
  const float rounded = static_cast<float>(number);
  uint32_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return {static_cast<int>(bits >> 20) - 127 * kKeysPerOctave, bits >> 4 & 0xffff};
}

ROUTING_MASKS_FN Located locate(Wide number) {
  const uint64_t high = static_cast<uint64_t>(number >> 64), low = static_cast<uint64_t>(number);
  const int zeros = leading_zeros(high != 0 ? high : low);
  const uint64_t top = high != 0 ? high << zeros | low >> 1 >> (63 - zeros) : low << zeros;
  const int octave = (high != 0 ? 127 : 63) - zeros;
  return {octave * kKeysPerOctave + static_cast<int>(top >> 60 & 7), static_cast<uint32_t>(top >> 44 & 0xffff)};
}

// A line over the numbers of a key: in the high half where it begins, in the low half how far it rises, in 1 / 32.
ROUTING_MASKS_FN int estimate(uint32_t line, uint32_t part) {
  return static_cast<int>((line + (line & 0xffff) * part) >> 21);
}

struct EstimateTable {
  uint32_t at[kEstimatedPlaces + 1][kKeys];
};

// Between C(c, i) and C(c + 1, i) let c grow in proportion to r: a concave function, whose chord over a key is less than
// half an expert below it. Raised by that much, and by what rounding takes, the chord is c or c + 1 when rounded down.
constexpr EstimateTable make_estimates() {
  EstimateTable table{};
  for (int i = 2; i <= kEstimatedPlaces; ++i) {
    const Wide* const coefficients = kBinomials128.at[i];
    int c = i - 1;
    uint32_t before = 0;
    for (int key = 0; key <= kKeys; ++key) {
      const int octave = key / kKeysPerOctave, first = kKeysPerOctave + key % kKeysPerOctave;
      const Wide rank = (octave >= 3 ? static_cast<Wide>(first) << (octave - 3) : static_cast<Wide>(first >> (3 - octave))) - 1;
      while (c + 1 < kMaxExperts && coefficients[c + 1] <= rank) ++c;
      // Behind the last column it goes on as before it, as far as 16 bits reach.
      const int low = c + 1 < kMaxExperts ? c : c - 1;
      const Wide point = 32 * c + 32 * (rank - coefficients[c]) / (coefficients[low + 1] - coefficients[low]);
      const uint32_t begin = static_cast<uint32_t>(point < 60000 ? point : 60000) + 2 + c / 64;
      if (key > 0) table.at[i][key - 1] = before << 16 | (begin - before);
      before = begin;
    }
  }
  return table;
}

#ifdef __CUDACC__
__device__ constexpr EstimateTable kDeviceEstimates = make_estimates();
#endif
constexpr EstimateTable kEstimates = make_estimates();

// The lines of place i - 1, 2 <= i <= kEstimatedPlaces.
ROUTING_MASKS_FN const uint32_t* lines_of(int i) {
#ifdef __CUDA_ARCH__
  return kDeviceEstimates.at[i];
#else
  return kEstimates.at[i];
#endif
}

// A CUDA device copies without waiting for what it loads.
template <class Word>
ROUTING_MASKS_FN void begin_copy(Word* to, const Word* from) {
#ifdef __CUDA_ARCH__
  __pipeline_memcpy_async(to, from, sizeof(Word));
#else
  *to = *from;
#endif
}

// Before the barrier behind which others look at the copies.
ROUTING_MASKS_FN void wait_for_copies() {
#ifdef __CUDA_ARCH__
  __pipeline_commit();
  __pipeline_wait_prior(0);
#endif
}

// What a block's table holds for one geometry, and where: of the low places i - 1, see num_low_places, the coefficients
// C(c, i) in 64 bits, and the lines behind them. Places above take theirs from the compiler's tables.
template <int KMax>
struct EstimatePlan {
  static_assert(KMax <= kEstimatedPlaces, "there are lines for each place");
  int num_experts, top_k, num_low;
  int coefficients_at[KMax + 1];  // in words of 64 bits
  int lines_at[KMax + 2];         // in words of 32 bits
  int words;                      // of 64 bits, an even number

  static EstimatePlan of(int num_experts, int top_k) {
    EstimatePlan plan{num_experts, top_k, num_low_places(num_experts, top_k), {}, {}, 0};
    int words = 0;
    for (int i = 2; i <= plan.num_low; ++i) {
      plan.coefficients_at[i] = words;
      words += plan.end(i) + 1;
    }
    words *= 2;
    for (int i = 2; i <= plan.num_low + 1; ++i) {
      plan.lines_at[i] = words;
      if (i <= plan.num_low) words += locate(static_cast<uint64_t>(count_of_sets(plan.end(i), i))).key + 1;
    }
    plan.words = (words + 3) / 4 * 2;
    return plan;
  }

  // One more than the highest expert at place i - 1, since K - i experts are above it.
  ROUTING_MASKS_FN int end(int i) const { return num_experts - top_k + i; }

  ROUTING_MASKS_FN void fill(uint64_t* table, int thread, int threads) const {
    uint32_t* const lines = reinterpret_cast<uint32_t*>(table);
    for (int i = 2; i <= num_low; ++i) {
      uint64_t* const coefficients = table + coefficients_at[i];
      for (int c = thread; c < end(i); c += threads) begin_copy(coefficients + c, binomials<uint64_t>(i) + c);
      // An estimate may be one too high, and this is above every rank.
      if (thread == 0) coefficients[end(i)] = ~uint64_t{0};
      const int num_lines = lines_at[i + 1] - lines_at[i];
      for (int key = thread; key < num_lines; key += threads) begin_copy(lines + lines_at[i] + key, lines_of(i) + key);
    }
    wait_for_copies();
  }
};

// The search by a plan and the table that it filled.
template <int KMax>
class Estimates {
 public:
  ROUTING_MASKS_FN Estimates(const EstimatePlan<KMax>& plan, const uint64_t* table) : plan_(plan), table_(table) {}

  ROUTING_MASKS_FN bool is_low(int i) const { return i <= kAlwaysLow || i <= plan_.num_low; }

  // `number` is r + 1; returns the c of the largest C(c, i) <= r, by which the number is made less.
  ROUTING_MASKS_FN int take_low(int i, uint64_t* number) const {
    const uint32_t* const lines = reinterpret_cast<const uint32_t*>(table_) + plan_.lines_at[i];
    const uint64_t* const coefficients = table_ + plan_.coefficients_at[i];
    const Located at = locate(*number);
    return take(estimate(lines[at.key], at.part), coefficients, number);
  }

  ROUTING_MASKS_FN int take_high(int i, Wide* number) const {
    const Located at = locate(*number);
    const int c = estimate(lines_of(i)[at.key], at.part), most = plan_.end(i) - 1;
    return take(c < most ? c : most, binomials<Wide>(i), number);
  }

 private:
  template <class Number>
  ROUTING_MASKS_FN int take(int c, const Number* coefficients, Number* number) const {
    Number coefficient = coefficients[c];
    if (coefficient >= *number) coefficient = coefficients[--c];
    *number -= coefficient;
    return c;
  }

  const EstimatePlan<KMax>& plan_;
  const uint64_t* table_;
};

// As unrank_lanes of ranks.h, for one lane.
template <int KMax, class Rank, class Visit>
ROUTING_MASKS_FN void unrank_lanes(const Estimates<KMax>& search, int top_k, Rank (&rank)[1], const Visit& visit) {
  Rank number = rank[0] + 1;
  ROUTING_MASKS_UNROLL
  for (int i = KMax; i > 1; --i) {
    if (i > top_k) continue;
    int c;
    if (sizeof(Rank) == sizeof(uint64_t) || search.is_low(i)) {
      uint64_t low = static_cast<uint64_t>(number);
      c = search.take_low(i, &low);
      number = low;
    } else {
      Wide high = number;
      c = search.take_high(i, &high);
      number = static_cast<Rank>(high);
    }
    visit(0, i - 1, c);
  }
  visit(0, 0, static_cast<int>(number) - 1);
}

}  // namespace routing_masks
