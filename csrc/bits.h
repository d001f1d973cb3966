// Bits of a packed row: least significant bit first within a byte, fields one after the other without gaps.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define ROUTING_MASKS_FN __host__ __device__ __forceinline__
#define ROUTING_MASKS_UNROLL _Pragma("unroll")
#define ROUTING_MASKS_NO_UNROLL _Pragma("unroll 1")
#else
#define ROUTING_MASKS_FN inline __attribute__((always_inline))
#define ROUTING_MASKS_UNROLL
#define ROUTING_MASKS_NO_UNROLL
#endif

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "rows are read and written as little-endian words");

namespace routing_masks {

// Bits [0, count) set, count in [0, 64].
ROUTING_MASKS_FN uint64_t low_bits(int count) {
  return count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

// Number of bits set in up to kMostWords words. Not every x86-64 CPU has an instruction for it, so that a compiler calls
// a function for each word; here the words' bytes are added up together.
class BitCount {
 public:
  // A byte of the sums holds eight bits of each.
  static constexpr int kMostWords = 255 / 8;

  ROUTING_MASKS_FN void add(uint64_t word) {
#ifdef __CUDA_ARCH__
    sums_ += __popcll(word);
#else
    word -= word >> 1 & kEvery2nd;
    word = (word & kPairs) + (word >> 2 & kPairs);
    sums_ += (word + (word >> 4)) & kNibbles;
#endif
  }

  ROUTING_MASKS_FN int total() const {
#ifdef __CUDA_ARCH__
    return static_cast<int>(sums_);
#else
    return static_cast<int>(((sums_ & kBytes) + (sums_ >> 8 & kBytes)) * (kBytes / 0xff) >> 48);
#endif
  }

 private:
  static constexpr uint64_t kEvery2nd = 0x5555555555555555, kPairs = 0x3333333333333333, kNibbles = 0x0f0f0f0f0f0f0f0f,
                            kBytes = 0x00ff00ff00ff00ff;

  uint64_t sums_ = 0;
};

// Place of the lowest set bit of a word that has one.
ROUTING_MASKS_FN int lowest_bit(uint64_t word) {
#ifdef __CUDA_ARCH__
  return __ffsll(static_cast<long long>(word)) - 1;
#else
  return __builtin_ctzll(word);
#endif
}

// Zeros above the highest bit of a word that is set.
ROUTING_MASKS_FN int leading_zeros(uint64_t word) {
#ifdef __CUDA_ARCH__
  return __clzll(static_cast<long long>(word));
#else
  return __builtin_clzll(word);
#endif
}

// One field's place in a row. `begin` and `end` are those of the memory of all rows, of which any byte may be read.
struct Field {
  const uint8_t* begin;
  const uint8_t* end;
  const uint8_t* row;
  int first_bit;
};

// Bits [first, first + count) of a field's row, byte by byte and none outside of the row; count in [0, 64].
ROUTING_MASKS_FN uint64_t read_bytes(const Field& field, int first, int count) {
  const uint8_t* at = field.row + (first >> 3);
  const int shift = first & 7;
  uint64_t word = 0;
  ROUTING_MASKS_NO_UNROLL
  for (int byte = 0; byte < 8 && 8 * byte < shift + count; ++byte) word |= static_cast<uint64_t>(at[byte]) << (8 * byte);
  word >>= shift;
  if (shift + count > 64) word |= static_cast<uint64_t>(at[8]) << (64 - shift);
  return word & low_bits(count);
}

// The same by loads of aligned words, as a CUDA device has no others: threads that read neighbouring fields read
// neighbouring words.
ROUTING_MASKS_FN uint64_t read_aligned(const Field& field, int first, int count) {
  const uint8_t* at = field.row + (first >> 3);
  const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(at) % 8);
  const int shift = 8 * skew + (first & 7);
  const uint64_t* words = reinterpret_cast<const uint64_t*>(at - skew);
  if (at - skew < field.begin || field.end - (at - skew) < 16) return read_bytes(field, first, count);
  uint64_t bits = words[0] >> shift;
  if (shift + count > 64) bits |= words[1] << 1 << (63 - shift);
  return bits & low_bits(count);
}

// The same by loads at any byte.
ROUTING_MASKS_FN uint64_t read_anywhere(const Field& field, int first, int count) {
  const uint8_t* at = field.row + (first >> 3);
  if (field.end - at < 8) return read_bytes(field, first, count);
  const int shift = first & 7;
  uint64_t word;
  std::memcpy(&word, at, 8);
  word >>= shift;
  if (shift + count > 64) word |= static_cast<uint64_t>(at[8]) << (64 - shift);
  return word & low_bits(count);
}

ROUTING_MASKS_FN uint64_t read_bits(const Field& field, int first, int count) {
#ifdef __CUDA_ARCH__
  return read_aligned(field, first, count);
#else
  return read_anywhere(field, first, count);
#endif
}

// Appends fields to bytes that nobody else writes; what it writes begins at a byte's first bit.
class BitWriter {
 public:
  ROUTING_MASKS_FN explicit BitWriter(uint8_t* out) : out_(out) {}

  // The low `count` bits of `value`, whose other bits are 0; count in [0, 64].
  ROUTING_MASKS_FN void append(uint64_t value, int count) {
    pending_ |= value << filled_;  // filled_ < 64
    if (filled_ + count < 64) {
      filled_ += count;
      return;
    }
    store(8);
    const int written = 64 - filled_;
    pending_ = written < 64 ? value >> written : 0;
    filled_ += count - 64;
  }

  // Writes what is pending, the last byte filled up with zeros.
  ROUTING_MASKS_FN void finish() { store((filled_ + 7) / 8); }

 private:
  ROUTING_MASKS_FN void store(int bytes) {
#ifndef __CUDA_ARCH__
    if (bytes == 8) {
      std::memcpy(out_, &pending_, 8);
      out_ += 8;
      return;
    }
#endif
    for (int byte = 0; byte < bytes; ++byte) *out_++ = static_cast<uint8_t>(pending_ >> (8 * byte));
  }

  uint8_t* out_;
  uint64_t pending_ = 0;
  int filled_ = 0;
};

}  // namespace routing_masks
