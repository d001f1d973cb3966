// How a block of CUDA threads packs a tile of rows: a thread a layer, their bits put together in shared memory, and
// stored 16 bytes at a time.
//
// A phase is called by every thread of the block, in any order, and a barrier stands between two of them.
#pragma once

#include <cstdint>

#include "chunk.h"
#include "mask_codec.h"

namespace routing_masks {

constexpr int kBlockGroups = 32;
constexpr int kBlockThreads = kBlockGroups * kGroup;

// No MoE layer wrote to a place of the staging buffer.
constexpr int16_t kUnwritten = -1;

// Appends fields at any bit of words that are zero there, and that other threads write to as well.
class SharedBitWriter {
 public:
  ROUTING_MASKS_FN SharedBitWriter(uint32_t* words, int first_bit) : at_(words + first_bit / 32), filled_(first_bit % 32) {}

  // The low `count` bits of `value`, whose other bits are 0; count in [0, 64].
  ROUTING_MASKS_FN void append(uint64_t value, int count) {
    append_word(static_cast<uint32_t>(value), count < 32 ? count : 32);
    if (count > 32) append_word(static_cast<uint32_t>(value >> 32), count - 32);
  }

  ROUTING_MASKS_FN void finish() {
    if (filled_ > 0) or_into(at_, static_cast<uint32_t>(pending_));
  }

 private:
  ROUTING_MASKS_FN void append_word(uint32_t value, int count) {
    pending_ |= static_cast<uint64_t>(value) << filled_;  // filled_ < 32
    filled_ += count;
    if (filled_ < 32) return;
    or_into(at_++, static_cast<uint32_t>(pending_));
    pending_ >>= 32;
    filled_ -= 32;
  }

  uint32_t* at_;
  uint64_t pending_ = 0;
  int filled_;
};

// How rows are cut into tiles of at most kBlockGroups groups: several whole rows, or a part of one that is longer.
struct Tiling {
  int64_t num_rows;
  int num_layers, num_groups, rows_per_tile;
  uint32_t reciprocal;  // of num_groups, in 1 / 2^16 rounded up: enough to divide numbers below kBlockGroups

  static Tiling of(int64_t num_rows, int64_t num_layers) {
    const int groups = static_cast<int>(routing_masks::num_groups(num_layers));
    const int rows_per_tile = groups < kBlockGroups ? kBlockGroups / groups : 1;
    return {num_rows, static_cast<int>(num_layers), groups, rows_per_tile, (1u << 16) / static_cast<uint32_t>(groups) + 1};
  }

  ROUTING_MASKS_FN int64_t num_tiles() const { return (num_rows + rows_per_tile - 1) / rows_per_tile; }

  // Passes over a tile, each of which takes kBlockGroups groups of a row at most.
  ROUTING_MASKS_FN int num_passes() const { return (num_groups + kBlockGroups - 1) / kBlockGroups; }

  // Bytes of shared memory, whose bits begin as far from 16 bytes as those of the rows.
  static int shared_bytes(int bits) { return (kBlockGroups * bits + 2 * static_cast<int>(sizeof(Chunk))) & ~15; }
};

// A tile's fields, of 'bitset' the widest, lie in the 48 KiB of shared memory that a block has without asking for more;
// half a KiB is for what is beside them.
static_assert(kBlockGroups * kMaxExperts + 512 <= 48 << 10, "a tile of masks fits into a block's shared memory");

// One pass over a tile.
template <class Code>
class PackingPass {
 public:
  ROUTING_MASKS_FN PackingPass(
      const Code& code, const Tiling& tiling, int64_t row_bytes, uint8_t* rows, Chunk* shared, int64_t tile, int pass)
      : code_(code),
        tiling_(tiling),
        shared_(shared),
        first_row_(tile * tiling.rows_per_tile),
        first_group_(pass * kBlockGroups),
        row_bytes_(row_bytes) {
    const int64_t left = tiling.num_rows - first_row_;
    num_rows_ = static_cast<int>(left < tiling.rows_per_tile ? left : tiling.rows_per_tile);
    const bool to_the_end = first_group_ + kBlockGroups >= tiling.num_groups;
    const int64_t first_byte = first_group_ * static_cast<int64_t>(code.bits());
    bytes_ = static_cast<int>(to_the_end ? num_rows_ * row_bytes - first_byte : kBlockGroups * code.bits());
    out_ = rows + first_row_ * row_bytes + first_byte;
    skew_ = offset_in_chunk(out_);
  }

  ROUTING_MASKS_FN int64_t first_row() const { return first_row_; }
  ROUTING_MASKS_FN int num_rows() const { return num_rows_; }

  ROUTING_MASKS_FN void clear(int thread) const {
    for (int chunk = thread; chunk < num_chunks(); chunk += kBlockThreads) shared_[chunk] = Chunk{};
  }

  // The thread's layer, if it has one: `load(experts, row, layer)` fills the one lane. Returns whether it is legal; `row`
  // becomes its row among those of the tile.
  template <class Load>
  ROUTING_MASKS_FN bool put(const Load& load, int thread, int* row) const {
    const int group = thread / kGroup;
    const int row_of_tile = tiling_.num_groups <= kBlockGroups ? static_cast<int>(group * tiling_.reciprocal >> 16) : 0;
    const int group_of_row = first_group_ + group - row_of_tile * tiling_.num_groups;
    const int layer = group_of_row * kGroup + thread % kGroup;
    *row = row_of_tile;
    if (row_of_tile >= num_rows_ || layer >= tiling_.num_layers) return true;
    Experts<Code::KMax, 1> given;
    load(given, first_row_ + row_of_tile, layer);
    Experts<Code::KMax, 1> sorted = given;
    bool legal[1];
    sort_lanes(sorted, code_.top_k, code_.num_experts, legal);
    const int byte = skew_ + row_of_tile * static_cast<int>(row_bytes_);
    SharedBitWriter out(
        reinterpret_cast<uint32_t*>(shared_), 8 * byte + (layer - first_group_ * kGroup) * code_.bits());
    code_.write(out, given, sorted, legal, 1);
    out.finish();
    return legal[0];
  }

  ROUTING_MASKS_FN void store(int thread) const {
    for (int chunk = thread; chunk < num_chunks(); chunk += kBlockThreads) {
      const int begin = chunk * static_cast<int>(sizeof(Chunk)) - skew_, end = begin + static_cast<int>(sizeof(Chunk));
      if (begin >= 0 && end <= bytes_) {
        store_chunk(out_ + begin, shared_[chunk]);
        continue;
      }
      // What is before and behind is written by other blocks, or nobody's.
      const uint8_t* bytes = reinterpret_cast<const uint8_t*>(shared_ + chunk);
      for (int byte = begin < 0 ? 0 : begin; byte < end && byte < bytes_; ++byte) out_[byte] = bytes[byte - begin];
    }
  }

 private:
  ROUTING_MASKS_FN int num_chunks() const { return (skew_ + bytes_ + static_cast<int>(sizeof(Chunk)) - 1) / sizeof(Chunk); }

  const Code& code_;
  const Tiling& tiling_;
  Chunk* shared_;
  int64_t first_row_;
  int first_group_;
  int64_t row_bytes_;
  int num_rows_, bytes_, skew_;
  uint8_t* out_;
};

// Sets places [begin, end) of the staging buffer back, with the threads [0, threads).
ROUTING_MASKS_FN void
reset_places(int16_t* data, int64_t begin, int64_t end, int64_t thread, int64_t threads) {
  constexpr int kPlaces = sizeof(Chunk) / sizeof(int16_t);
  const int64_t skew = offset_in_chunk(data + begin) / static_cast<int>(sizeof(int16_t));
  for (int64_t first = begin - skew + thread * kPlaces; first < end; first += threads * kPlaces) {
    if (first >= begin && first + kPlaces <= end) {
      store_chunk(data + first, {{~0u, ~0u, ~0u, ~0u}});
      continue;
    }
    for (int64_t place = first < begin ? begin : first; place < first + kPlaces && place < end; ++place) {
      data[place] = kUnwritten;
    }
  }
}

// Sets rows [first, last) back, but for the row `kept`, which others still look at.
ROUTING_MASKS_FN void reset_rows(
    int16_t* data, int64_t row_size, int64_t first, int64_t last, int64_t kept, int64_t thread, int64_t threads) {
  const bool inside = first <= kept && kept < last;
  reset_places(data, first * row_size, (inside ? kept : last) * row_size, thread, threads);
  if (inside) reset_places(data, (kept + 1) * row_size, last * row_size, thread, threads);
}

}  // namespace routing_masks
