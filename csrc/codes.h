// The codecs that the kernels know, and the choice among them by name.
//
// A codec is how one MoE layer's experts are written into a field of `bits()` bits and read back. Its header has a code
// (BitsetCode, ...) and a struct of static members (Bitset, ...) with
//   kName                                             as in router_replay/masks/codecs/registry.py
//   kHoldsLayerToRead                                 its code reads into arrays of KMax, and not one expert at a time
//   with_code<KMax, Device>(num_experts, top_k, run)  run(code); refuses a geometry that the codec cannot write
//
// Indices that are not K different experts become a field that is illegal wherever the code has one to spare: no bit set
// for bitset, all for the others. An illegal field reads back as K times `num_experts`, which is no expert.
//
// Codes work on N fields ("lanes") at once, which suits the vector units of a CPU; a CUDA thread has one lane.
// KMax >= K bounds the arrays, so that they fit into a CUDA thread's registers.
#pragma once

#include <string>

#include "code_bitset.h"
#include "code_ordered.h"
#include "code_rank.h"
#include "require.h"

namespace routing_masks {

template <class... Codec>
struct CodecList {
  static std::string names() {
    std::string names;
    ((names += (names.empty() ? "" : ", "), names += Codec::kName), ...);
    return names;
  }

  // Calls run(Codec{}) for each of them.
  template <class Run>
  static void for_each(const Run& run) {
    (run(Codec{}), ...);
  }

  // Calls run(Codec{}) for the one of that name.
  template <class Run>
  static void with(const std::string& name, const Run& run) {
    const bool known = ((name == Codec::kName && (run(Codec{}), true)) || ...);
    require(known, "unknown codec '", name, "': the kernels know ", names());
  }
};

// In the order of registry.py, whose list is held against this one when a library is loaded.
using Codecs = CodecList<Bitset, Rank, Ordered>;

// What a library says in its docstring, as ops.py expects it.
inline std::string built_for() {
  return "codecs " + Codecs::names() + "; up to " + std::to_string(kMaxExperts) + " experts, top-" +
         std::to_string(kMaxTopK) + ", ranks of up to " + std::to_string(ROUTING_MASKS_MAX_RANK_BITS) + " bits";
}

}  // namespace routing_masks
