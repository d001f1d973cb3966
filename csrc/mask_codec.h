// How one token's experts are written into its row and read back: the same code on the host and on the device.
//
// A code writes one MoE layer as a field of `bits()` bits. Fields follow each other without gaps, so eight of them fill
// `bits()` whole bytes: such a group of layers is the unit of packing, and no two groups share a byte.
// Indices that are not K different experts become a field that is illegal wherever the code has one to spare; an illegal
// field reads back as K times `num_experts`, which is no expert.
//
// Codes work on N fields ("lanes") at once, which suits the vector units of a CPU; a CUDA thread has one lane.
// KMax >= K bounds the arrays, so that they fit into a CUDA thread's registers.
#pragma once

#include <cstdint>

#include "bits.h"
#include "experts.h"
#include "rank.h"

namespace routing_masks {

constexpr int kGroup = 8;

ROUTING_MASKS_FN int64_t num_groups(int64_t num_layers) { return (num_layers + kGroup - 1) / kGroup; }

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

// K indices of ceil(log2 E) bits, in the router's column order.
template <int KMax_>
struct OrderedCode {
  static constexpr int KMax = KMax_;
  int num_experts, top_k, index_bits;

  ROUTING_MASKS_FN int bits() const { return top_k * index_bits; }

  template <int N>
  ROUTING_MASKS_FN void write(
      BitWriter& out, const Experts<KMax, N>& given, const Experts<KMax, N>&, const bool (&legal)[N], int lanes) const {
    for (int n = 0; n < lanes; ++n) {
      ROUTING_MASKS_UNROLL
      for (int k = 0; k < places<KMax>(top_k); ++k) {
        if (k >= top_k) break;
        out.append(legal[n] ? given.at[k][n] : 0, index_bits);
      }
    }
  }

  template <int N>
  ROUTING_MASKS_FN void check(const Field (&fields)[N], bool (&legal)[N]) const {
    Experts<KMax, N> experts;
    load_and_check(fields, experts, legal);
  }

  template <int N, class Visit>
  ROUTING_MASKS_FN void read(const Field (&fields)[N], bool (&legal)[N], const Visit& visit) const {
    Experts<KMax, N> given;
    load_and_check(fields, given, legal);
    for (int n = 0; n < N; ++n) {
      ROUTING_MASKS_UNROLL
      for (int k = 0; k < places<KMax>(top_k); ++k) {
        if (k >= top_k) break;
        visit(n, k, legal[n] ? given.at[k][n] : num_experts);
      }
    }
  }

 private:
  template <int N>
  ROUTING_MASKS_FN void load_and_check(const Field (&fields)[N], Experts<KMax, N>& given, bool (&legal)[N]) const {
    for (int n = 0; n < N; ++n) {
      load_lane(given, n, top_k, [&](int k) {
        const int64_t first = fields[n].first_bit + k * index_bits;
        return static_cast<int64_t>(read_bits(fields[n].row, fields[n].row_bytes, first, index_bits));
      });
    }
    Experts<KMax, N> sorted = given;
    sort_lanes(sorted, top_k, num_experts, legal);
  }
};

// The rank of the set in colexicographic order, in ceil(log2 C(E, K)) bits: see rank.h.
template <int KMax_, class Rank, class Search>
struct RankCode {
  static constexpr int KMax = KMax_;
  int num_experts, top_k, width;
  Rank num_sets;
  Search search;

  ROUTING_MASKS_FN int bits() const { return width; }

  template <int N>
  ROUTING_MASKS_FN void write(
      BitWriter& out, const Experts<KMax, N>&, const Experts<KMax, N>& sorted, const bool (&legal)[N], int lanes) const {
    Rank rank[N];
    rank_lanes<Rank>(search, sorted, top_k, rank);
    for (int n = 0; n < lanes; ++n) {
      const Rank value = legal[n] ? rank[n] : ~Rank{0};
      out.append(static_cast<uint64_t>(value) & low_bits(width), width < 64 ? width : 64);
      if constexpr (sizeof(Rank) > 8) out.append(static_cast<uint64_t>(value >> 64) & low_bits(width - 64), width - 64);
    }
  }

  template <int N>
  ROUTING_MASKS_FN void check(const Field (&fields)[N], bool (&legal)[N]) const {
    for (int n = 0; n < N; ++n) legal[n] = rank_at(fields[n]) < num_sets;
  }

  template <int N, class Visit>
  ROUTING_MASKS_FN void read(const Field (&fields)[N], bool (&legal)[N], const Visit& visit) const {
    Rank rank[N];
    for (int n = 0; n < N; ++n) {
      rank[n] = rank_at(fields[n]);
      legal[n] = rank[n] < num_sets;
      rank[n] = legal[n] ? rank[n] : 0;
    }
    bool all_legal = true;
    for (int n = 0; n < N; ++n) all_legal &= legal[n];
    if (N > 1 && all_legal) return unrank_lanes<Rank>(search, top_k, rank, visit);
    unrank_lanes<Rank>(search, top_k, rank, [&](int n, int k, int c) { visit(n, k, legal[n] ? c : num_experts); });
  }

 private:
  ROUTING_MASKS_FN Rank rank_at(const Field& field) const {
    Rank rank = read_bits(field.row, field.row_bytes, field.first_bit, width < 64 ? width : 64);
    if constexpr (sizeof(Rank) > 8) {
      rank |= static_cast<Rank>(read_bits(field.row, field.row_bytes, field.first_bit + 64, width - 64)) << 64;
    }
    return rank;
  }
};

// Writes nothing: `pack_group` then only checks the indices.
template <int KMax_>
struct NoCode {
  static constexpr int KMax = KMax_;
  int num_experts, top_k;

  ROUTING_MASKS_FN int bits() const { return 0; }

  template <int N>
  ROUTING_MASKS_FN void write(
      BitWriter&, const Experts<KMax, N>&, const Experts<KMax, N>&, const bool (&)[N], int) const {}
};

// Packs layers [8 g, 8 g + 8) of a token, g = group % groups of a row; `read(row, layer, k)` is an index.
// Returns the place row * num_layers + layer of its first layer that is not K different experts, or -1.
template <int N, class Code, class Read>
ROUTING_MASKS_FN int64_t
pack_group(const Code& code, int64_t num_layers, int64_t row_bytes, uint8_t* rows, const Read& read, int64_t group) {
  const int64_t row = group / num_groups(num_layers);
  const int64_t begin = group % num_groups(num_layers) * kGroup;
  const int64_t end = begin + kGroup < num_layers ? begin + kGroup : num_layers;
  BitWriter out(rows + row * row_bytes + begin / kGroup * code.bits());
  int64_t illegal = -1;
  for (int64_t first = begin; first < end; first += N) {
    const int lanes = static_cast<int>(end - first < N ? end - first : N);
    Experts<Code::KMax, N> given;
    for (int n = 0; n < N; ++n) {
      const int64_t layer = first + (n < lanes ? n : 0);
      load_lane(given, n, code.top_k, [&](int k) { return read(row, layer, k); });
    }
    Experts<Code::KMax, N> sorted = given;
    bool legal[N];
    sort_lanes(sorted, code.top_k, code.num_experts, legal);
    for (int n = 0; n < lanes; ++n) {
      if (!legal[n] && illegal < 0) illegal = row * num_layers + first + n;
    }
    code.write(out, given, sorted, legal, lanes);
  }
  out.finish();
  return illegal;
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

// N items from `first` on, as far as there are `num_items`.
template <int N>
struct Items {
  int64_t at[N];
  Field fields[N];
  bool zeros_after[N];

  ROUTING_MASKS_FN Items(const PackedRows& packed, int bits, int64_t num_items, int64_t first) {
    int64_t item = first, row = first / packed.layers, slot = first % packed.layers;
    for (int n = 0; n < N; ++n) {
      at[n] = item;
      fields[n] = packed.field(row, packed.first_layer + slot, bits);
      zeros_after[n] = packed.filled_with_zeros(row, packed.first_layer + slot, bits);
      // Lanes beyond the end take the last item once more.
      if (item + 1 == num_items) continue;
      ++item;
      if (++slot == packed.layers) {
        slot = 0;
        ++row;
      }
    }
  }

  ROUTING_MASKS_FN int64_t first_illegal(const bool (&legal)[N]) const {
    for (int n = 0; n < N; ++n) {
      if (!legal[n] || !zeros_after[n]) return at[n];
    }
    return -1;
  }
};

// Reads the items: visit(item, k, expert) for each of their K places, possibly twice for the last item.
// Returns the first item that is not K different experts, or -1.
template <int N, class Code, class Visit>
ROUTING_MASKS_FN int64_t
unpack_items(const Code& code, const PackedRows& packed, int64_t num_items, int64_t first, const Visit& visit) {
  const Items<N> items(packed, code.bits(), num_items, first);
  bool legal[N];
  code.template read<N>(items.fields, legal, [&](int n, int k, int expert) { visit(items.at[n], k, expert); });
  return items.first_illegal(legal);
}

// As unpack_items, without reading what the items hold.
template <int N, class Code>
ROUTING_MASKS_FN int64_t check_items(const Code& code, const PackedRows& packed, int64_t num_items, int64_t first) {
  const Items<N> items(packed, code.bits(), num_items, first);
  bool legal[N];
  code.template check<N>(items.fields, legal);
  return items.first_illegal(legal);
}

}  // namespace routing_masks
