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
  const uint8_t* end;
  int64_t num_rows, row_stride, row_bytes;
  int num_layers, first_layer, layers;

  // What is between rows that are parts of wider ones is memory of the same tensor. Rows of no bytes, of all experts, have
  // no memory, but torch may tell a stride of theirs.
  PackedRows(
      const uint8_t* rows, int64_t num_rows, int64_t row_stride, int64_t row_bytes, int64_t num_layers,
      int64_t first_layer, int64_t layers)
      : rows(rows),
        end(num_rows == 0 || row_bytes == 0 ? rows : rows + (num_rows - 1) * row_stride + row_bytes),
        num_rows(num_rows),
        row_stride(row_stride),
        row_bytes(row_bytes),
        num_layers(static_cast<int>(num_layers)),
        first_layer(static_cast<int>(first_layer)),
        layers(static_cast<int>(layers)) {}

  ROUTING_MASKS_FN int64_t num_items() const { return num_rows * layers; }

  // Of the layer-th that is read.
  ROUTING_MASKS_FN Field field(const uint8_t* row, int layer, int bits) const {
    return {rows, end, row, (first_layer + layer) * bits};
  }

  // The bits between the last layer and the end of the last byte count as the last layer's.
  ROUTING_MASKS_FN bool filled_with_zeros(const uint8_t* row, int layer, int bits) const {
    if (first_layer + layer + 1 != num_layers) return true;
    const int used = num_layers * bits;
    return read_bits(field(row, layer, bits), used, static_cast<int>(row_bytes * 8 - used)) == 0;
  }
};

// a / b of numbers that are not negative. A CUDA device divides 64 bits by a long sequence of instructions.
ROUTING_MASKS_FN int64_t quotient(int64_t a, int64_t b) {
  if (a <= UINT32_MAX && b <= UINT32_MAX) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}

// An item's place in the rows, which goes on by the same number of items each time: only at the start it divides.
class ItemWalk {
 public:
  ROUTING_MASKS_FN ItemWalk(const PackedRows& packed, int64_t first, int step) : packed_(packed) {
    const int64_t row = quotient(first, packed.layers);
    row_ = packed.rows + row * packed.row_stride;
    layer_ = static_cast<int>(first - row * packed.layers);
    step_layers_ = step % packed.layers;
    step_bytes_ = step / packed.layers * packed.row_stride;
  }

  ROUTING_MASKS_FN Field field(int bits) const { return packed_.field(row_, layer_, bits); }

  ROUTING_MASKS_FN void next() {
    row_ += step_bytes_;
    layer_ += step_layers_;
    if (layer_ < packed_.layers) return;
    layer_ -= packed_.layers;
    row_ += packed_.row_stride;
  }

 private:
  const PackedRows& packed_;
  const uint8_t* row_;
  int64_t step_bytes_;
  int layer_, step_layers_;
};

// N items from `first` on, as far as there are `num_items`.
template <int N>
struct Items {
  int64_t at[N];
  Field fields[N];
  bool zeros_after[N];

  ROUTING_MASKS_FN Items(const PackedRows& packed, int bits, int64_t num_items, int64_t first) {
    int64_t item = first;
    const int64_t first_row = quotient(first, packed.layers);
    const uint8_t* row = packed.rows + first_row * packed.row_stride;
    int layer = static_cast<int>(first - first_row * packed.layers);
    for (int n = 0; n < N; ++n) {
      at[n] = item;
      fields[n] = packed.field(row, layer, bits);
      zeros_after[n] = packed.filled_with_zeros(row, layer, bits);
      // Lanes beyond the end take the last item once more.
      if (item + 1 == num_items) continue;
      ++item;
      if (++layer == packed.layers) {
        layer = 0;
        row += packed.row_stride;
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
