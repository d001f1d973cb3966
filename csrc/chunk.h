// The 16 bytes that a CUDA thread loads and stores at a time.
#pragma once

#include <cstdint>

#include "bits.h"

namespace routing_masks {

struct alignas(16) Chunk {
  uint32_t words[4];
};

ROUTING_MASKS_FN int offset_in_chunk(const void* at) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(at) % sizeof(Chunk));
}

// To the memory of a tensor, by one instruction: of an assignment nvcc may make one for each word.
ROUTING_MASKS_FN void store_chunk(void* at, const Chunk& chunk) {
#ifdef __CUDA_ARCH__
  const uint32_t(&words)[4] = chunk.words;
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(at)), "r"(words[0]),
               "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
#else
  *static_cast<Chunk*>(at) = chunk;
#endif
}

// Threads share words of their block's memory.
ROUTING_MASKS_FN void or_into(uint32_t* word, uint32_t bits) {
#ifdef __CUDA_ARCH__
  atomicOr(word, bits);
#else
  *word |= bits;
#endif
}

}  // namespace routing_masks
