// How one token's experts are written into its row and read back: the same code on the host and on the device.
//
// The fields of a token's MoE layers follow each other without gaps, so eight of them fill `bits()` whole bytes: such a
// group of layers is the unit of packing, and no two groups share a byte. One layer of one token is the unit of reading.
#pragma once

#include <cstdint>

#include "codes.h"

namespace routing_masks {

constexpr int kGroup = 8;

ROUTING_MASKS_FN int64_t num_groups(int64_t num_layers) { return (num_layers + kGroup - 1) / kGroup; }

// Layers [8 g, 8 g + 8) of a token, g = group % groups of a row, N at a time; `read(row, layer, k)` is an index. Calls
// use(first, lanes, given, sorted, legal), where lane n is the item row * num_layers + layer = first + n.
template <int N, int KMax, class Read, class Use>
ROUTING_MASKS_FN void
for_lanes(int num_experts, int top_k, int64_t num_layers, int64_t group, const Read& read, const Use& use) {
  const int64_t row = group / num_groups(num_layers);
  const int64_t begin = group % num_groups(num_layers) * kGroup;
  const int64_t end = begin + kGroup < num_layers ? begin + kGroup : num_layers;
  for (int64_t first = begin; first < end; first += N) {
    const int lanes = static_cast<int>(end - first < N ? end - first : N);
    Experts<KMax, N> given;
    for (int n = 0; n < N; ++n) {
      const int64_t layer = first + (n < lanes ? n : 0);
      load_lane(given, n, top_k, [&](int k) { return read(row, layer, k); });
    }
    Experts<KMax, N> sorted = given;
    bool legal[N];
    sort_lanes(sorted, top_k, num_experts, legal);
    use(row * num_layers + first, lanes, given, sorted, legal);
  }
}

// Packs a group of layers. Returns the item of the first one that is not K different experts, or -1.
template <int N, class Code, class Read>
ROUTING_MASKS_FN int64_t
pack_group(const Code& code, int64_t num_layers, int64_t row_bytes, uint8_t* rows, const Read& read, int64_t group) {
  const int64_t row = group / num_groups(num_layers), part = group % num_groups(num_layers);
  BitWriter out(rows + row * row_bytes + part * code.bits());
  int64_t illegal = -1;
  for_lanes<N, Code::KMax>(
      code.num_experts, code.top_k, num_layers, group, read,
      [&](int64_t first, int lanes, const auto& given, const auto& sorted, const auto& legal) {
        for (int n = 0; n < lanes; ++n) {
          if (!legal[n] && illegal < 0) illegal = first + n;
        }
        code.write(out, given, sorted, legal, lanes);
      });
  out.finish();
  return illegal;
}

// Packs all groups of a row. Returns whether each of its layers is K different experts.
template <int N, class Code, class Read>
ROUTING_MASKS_FN bool
pack_row(const Code& code, int64_t num_layers, int64_t row_bytes, uint8_t* rows, const Read& read, int64_t row) {
  bool legal = true;
  const int64_t groups = num_groups(num_layers);
  for (int64_t part = 0; part < groups; ++part) {
    legal &= pack_group<N>(code, num_layers, row_bytes, rows, read, row * groups + part) < 0;
  }
  return legal;
}

// Writes for each item of a group whether it is K different experts.
template <int N, int KMax, class Read>
ROUTING_MASKS_FN void
check_group(int num_experts, int top_k, int64_t num_layers, const Read& read, int64_t group, bool* is_legal) {
  for_lanes<N, KMax>(
      num_experts, top_k, num_layers, group, read,
      [&](int64_t first, int lanes, const auto&, const auto&, const auto& legal) {
        for (int n = 0; n < lanes; ++n) is_legal[first + n] = legal[n];
      });
}

// Rows as `pack_group` wrote them, of which layers [first_layer, first_layer + layers) are read.
// Item i is layer first_layer + i % layers of row i / layers.
struct PackedRows {
  const uint8_t* rows;
  int64_t row_stride, row_bytes, num_layers, first_layer, layers;

  ROUTING_MASKS_FN Field field(int64_t row, int64_t layer, int bits) const {
    return {rows + row * row_stride, row_bytes, layer * bits};
  }

  // The bits between the last layer and the end of the last byte count as the last layer's.
  ROUTING_MASKS_FN bool filled_with_zeros(int64_t row, int64_t layer, int bits) const {
    if (layer + 1 != num_layers) return true;
    const int64_t used = num_layers * bits;
    return read_bits(rows + row * row_stride, row_bytes, used, static_cast<int>(row_bytes * 8 - used)) == 0;
  }
};

// a / b of numbers that are not negative. A CUDA device divides 64 bits by a long sequence of instructions.
ROUTING_MASKS_FN int64_t quotient(int64_t a, int64_t b) {
  if (a <= UINT32_MAX && b <= UINT32_MAX) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// N items from `first` on, as far as there are `num_items`.
template <int N>
struct Items {
  int64_t at[N];
  Field fields[N];
  bool zeros_after[N];

  ROUTING_MASKS_FN Items(const PackedRows& packed, int bits, int64_t num_items, int64_t first) {
    int64_t item = first, row = quotient(first, packed.layers), layer = first - row * packed.layers;
    for (int n = 0; n < N; ++n) {
      at[n] = item;
      fields[n] = packed.field(row, packed.first_layer + layer, bits);
      zeros_after[n] = packed.filled_with_zeros(row, packed.first_layer + layer, bits);
      // Lanes beyond the end take the last item once more.
      if (item + 1 == num_items) continue;
      ++item;
      if (++layer == packed.layers) {
        layer = 0;
        ++row;
      }
    }
  }
};

// Reads the items: visit(item, k, expert) for each k < K, possibly twice for the last item.
// Returns the first item that is not K different experts, or -1.
template <int N, class Code, class Visit>
ROUTING_MASKS_FN int64_t
unpack_items(const Code& code, const PackedRows& packed, int64_t num_items, int64_t first, const Visit& visit) {
  const Items<N> items(packed, code.bits(), num_items, first);
  bool legal[N];
  code.template read<N>(items.fields, legal, [&](int n, int k, int expert) { visit(items.at[n], k, expert); });
  for (int n = 0; n < N; ++n) {
    if (!legal[n] || !items.zeros_after[n]) return items.at[n];
  }
  return -1;
}

// Writes for each of the items whether it is K different experts.
template <int N, class Code>
ROUTING_MASKS_FN void
check_items(const Code& code, const PackedRows& packed, int64_t num_items, int64_t first, bool* is_legal) {
  const Items<N> items(packed, code.bits(), num_items, first);
  bool legal[N];
  code.template check<N>(items.fields, legal);
  for (int n = 0; n < N; ++n) is_legal[items.at[n]] = legal[n] && items.zeros_after[n];
}

}  // namespace routing_masks
