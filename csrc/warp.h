// How a warp of CUDA threads reads a tile of items: a lane an item, what it finds put beside the others' in shared memory,
// and all of it stored 16 bytes at a time.
//
// A phase is called by every lane of the warp, in any order, and a barrier of the warp stands between two of them.
#pragma once

#include <cstdint>

#include "chunk.h"
#include "estimates.h"
#include "mask_codec.h"

namespace routing_masks {

constexpr int kWarpLanes = 32;

// Calls store(at) for each whole chunk of numbers [at, at + Places) that this lane stores of [0, count), and put(at) for
// each other number: chunks begin `skew` numbers before 0.
template <int Places, class Store, class Put>
ROUTING_MASKS_FN void for_chunks(int skew, int count, int lane, const Store& store, const Put& put) {
  for (int first = lane * Places - skew; first < count; first += kWarpLanes * Places) {
    if (first >= 0 && first + Places <= count) {
      store(first);
      continue;
    }
    ROUTING_MASKS_NO_UNROLL
    for (int at = first < 0 ? 0 : first; at < first + Places && at < count; ++at) put(at);
  }
}

// Where indices go, and of which integers they are: of 2, 4 or 8 bytes.
struct IndicesTarget {
  void* data;
  int log_bytes;
};

// Indices of a tile of items [first, first + 32), which lie in shared memory as int16 and as far from 16 bytes as where they
// go: as far as those of the first tile, since 32 of anything are whole chunks.
template <class Code>
class IndicesTile {
 public:
  using Target = IndicesTarget;

  static ROUTING_MASKS_FN int shared_chunks(const Code& code) {
    constexpr int kPlaces = sizeof(Chunk) / sizeof(int16_t);
    return (kWarpLanes * code.top_k + 2 * kPlaces - 2) / kPlaces;
  }

  ROUTING_MASKS_FN IndicesTile(const Code& code, const Target& target, Chunk* shared)
      : code_(code), target_(target), skew_(offset_in_chunk(target.data) >> target.log_bytes),
        found_(reinterpret_cast<int16_t*>(shared) + skew_) {}

  ROUTING_MASKS_FN void clear(int) const {}

  // The lane's item, if it has one.
  ROUTING_MASKS_FN void put(int lane, const Field& field) const {
    const Field fields[1] = {field};
    bool legal[1];
    int16_t* const found = found_ + lane * code_.top_k;
    if constexpr (Code::KMax > 1 && Code::KMax <= kMostUnrolled) {
      // Such codes are unrolled, so that these words are registers.
      uint32_t pairs[Code::KMax / 2] = {};
      code_.read(fields, legal, [&](int, int k, int expert) { pairs[k / 2] |= static_cast<uint32_t>(expert) << 16 * (k % 2); });
      put_pairs(pairs, found);
    } else {
      code_.read(fields, legal, [&](int, int k, int expert) { found[k] = static_cast<int16_t>(expert); });
    }
  }

  ROUTING_MASKS_FN void store(int lane, int64_t first, int items) const {
    if (target_.log_bytes == 1) return store_as<int16_t>(lane, first, items);
    if (target_.log_bytes == 2) return store_as<int32_t>(lane, first, items);
    store_as<int64_t>(lane, first, items);
  }

 private:
  // Words wider than the bytes that they are at a multiple of would be split, and a warp's narrow ones meet in a bank.
  template <int NumPairs>
  ROUTING_MASKS_FN void put_pairs(const uint32_t (&pairs)[NumPairs], int16_t* found) const {
    if ((skew_ | code_.top_k) % 8 == 0) {
      ROUTING_MASKS_UNROLL
      for (int p = 0; p < NumPairs; p += 4) {
        const Chunk chunk{{pairs[p], pairs[p + 1], pairs[p + 2], pairs[p + 3]}};
        if (2 * p < code_.top_k) *reinterpret_cast<Chunk*>(found + 2 * p) = chunk;
      }
    } else if ((skew_ | code_.top_k) % 2 == 0) {
      ROUTING_MASKS_UNROLL
      for (int p = 0; p < NumPairs; ++p) {
        if (2 * p < code_.top_k) *reinterpret_cast<uint32_t*>(found + 2 * p) = pairs[p];
      }
    } else {
      ROUTING_MASKS_UNROLL
      for (int k = 0; k < 2 * NumPairs; ++k) {
        if (k < code_.top_k) found[k] = static_cast<int16_t>(pairs[k / 2] >> 16 * (k % 2));
      }
    }
  }

  template <class Index>
  ROUTING_MASKS_FN void store_as(int lane, int64_t first, int items) const {
    Index* const out = static_cast<Index*>(target_.data) + first * code_.top_k;
    for_chunks<sizeof(Chunk) / sizeof(Index)>(
        skew_, items * code_.top_k, lane,
        [&](int at) { store_chunk(out + at, widened<Index>(found_ + at)); },
        [&](int at) { out[at] = found_[at]; });
  }

  // As many numbers as are 16 bytes of this type; none is negative.
  template <class Index>
  static ROUTING_MASKS_FN Chunk widened(const int16_t* found) {
    struct alignas(8) Two {
      uint32_t words[2];
    };
    if constexpr (sizeof(Index) == 2) {
      return *reinterpret_cast<const Chunk*>(found);
    } else if constexpr (sizeof(Index) == 4) {
      const Two two = *reinterpret_cast<const Two*>(found);
      return {{two.words[0] & 0xffff, two.words[0] >> 16, two.words[1] & 0xffff, two.words[1] >> 16}};
    } else {
      const uint32_t pair = *reinterpret_cast<const uint32_t*>(found);
      return {{pair & 0xffff, 0, pair >> 16, 0}};
    }
  }

  const Code& code_;
  const Target& target_;
  int skew_;
  int16_t* found_;
};

// Maps `bool [E]` of a tile's items, which lie in shared memory as bits, as far from a chunk's first as where they go.
template <class Code>
class MapTile {
 public:
  using Target = bool*;

  static ROUTING_MASKS_FN int shared_chunks(const Code& code) {
    constexpr int kBits = 8 * sizeof(Chunk);
    return (kWarpLanes * code.num_experts + static_cast<int>(sizeof(Chunk)) + kBits - 2) / kBits;
  }

  ROUTING_MASKS_FN MapTile(const Code& code, Target map, Chunk* shared)
      : code_(code), map_(map), shared_(shared), skew_(offset_in_chunk(map)) {}

  ROUTING_MASKS_FN void clear(int lane) const {
    for (int chunk = lane; chunk < shared_chunks(code_); chunk += kWarpLanes) shared_[chunk] = Chunk{};
  }

  // The lane's item, if it has one.
  ROUTING_MASKS_FN void put(int lane, const Field& field) const {
    const Field fields[1] = {field};
    bool legal[1];
    const int first = skew_ + lane * code_.num_experts;
    code_.read(fields, legal, [&](int, int, int expert) {
      const int bit = first + expert;
      if (expert < code_.num_experts) or_into(reinterpret_cast<uint32_t*>(shared_) + bit / 32, 1u << bit % 32);
    });
  }

  ROUTING_MASKS_FN void store(int lane, int64_t first, int items) const {
    bool* const out = map_ + first * code_.num_experts;
    for_chunks<sizeof(Chunk)>(
        skew_, items * code_.num_experts, lane,
        [&](int at) {
          const uint32_t bits = bits_from(at) & 0xffff;
          Chunk bools;
          // A bit to a byte: the four products do not overlap.
          for (int i = 0; i < 4; ++i) bools.words[i] = (bits >> 4 * i & 0xf) * 0x00204081 & 0x01010101;
          store_chunk(out + at, bools);
        },
        [&](int at) { out[at] = bits_from(at) & 1; });
  }

 private:
  // 16 of them at least where `at` is a chunk's first.
  ROUTING_MASKS_FN uint32_t bits_from(int at) const {
    const int bit = skew_ + at;
    return reinterpret_cast<const uint32_t*>(shared_)[bit / 32] >> bit % 32;
  }

  const Code& code_;
  bool* map_;
  Chunk* shared_;
  int skew_;
};

}  // namespace routing_masks
