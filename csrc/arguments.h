// What the ops of every device check and allocate before their kernels run.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <vector>

#include "block.h"
#include "require.h"

namespace routing_masks {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// More than any model has, and so few that bits are counted without overflow.
constexpr int64_t kMaxLayers = 1 << 20;

struct Geometry {
  int64_t num_layers;
  int num_experts, top_k;

  Geometry(int64_t layers, int64_t experts, int64_t k)
      : num_layers(layers), num_experts(static_cast<int>(experts)), top_k(static_cast<int>(k)) {
    require(layers >= 1 && layers <= kMaxLayers, layers, " MoE layers, but a row has 1 to ", kMaxLayers);
    require(experts >= 1 && experts <= kMaxExperts, experts, " experts, but the kernels take 1 to ", kMaxExperts);
    require(k >= 1 && k <= kMaxTopK, "top-k ", k, ", but the kernels take 1 to ", kMaxTopK);
    require(k <= experts, "top-k ", k, " of only ", experts, " experts");
  }

  int64_t row_bytes(int bits_per_layer) const { return (num_layers * bits_per_layer + 7) / 8; }
};

// Sizes of the leading dimensions, then `last`.
inline std::vector<int64_t> sizes_with(const Tensor& like, int64_t kept_dims, std::vector<int64_t> last) {
  std::vector<int64_t> sizes;
  for (int64_t dim = 0; dim < kept_dims; ++dim) sizes.push_back(like.size(dim));
  sizes.insert(sizes.end(), last.begin(), last.end());
  return sizes;
}

// The leading dimensions as one, copied only where strides do not allow a view; `last_dims` dimensions stay.
inline Tensor with_one_leading_dim(const Tensor& tensor, int64_t last_dims) {
  const int64_t leading = tensor.dim() - last_dims;
  if (leading == 0) return torch::stable::unsqueeze(tensor, 0);
  return leading == 1 ? tensor : torch::stable::flatten(tensor, 0, leading - 1);
}

inline Tensor empty_beside(const Tensor& tensor, const std::vector<int64_t>& sizes, ScalarType dtype) {
  return torch::stable::new_empty(tensor, {sizes.data(), sizes.size()}, dtype);
}

inline void require_index_type(bool known) {
  require(known, "indices must be uint8, int16, uint16, int32 or int64");
}

// Indices `int [..., L, K]`.
struct Indices {
  Tensor flat;
  Geometry geometry;
  const void* data;
  int64_t num_rows, row_stride, layer_stride, k_stride;

  static Indices of(const Tensor& indices, int64_t num_experts) {
    require(
        indices.dim() >= 2, "indices have ", indices.dim(), " dimension(s), but [..., MoE layers, top-k] has two or more");
    const int64_t dim = indices.dim();
    const Geometry geometry(indices.size(dim - 2), num_experts, indices.size(dim - 1));
    const Tensor flat = with_one_leading_dim(indices, 2);
    return {flat, geometry, flat.const_data_ptr(), flat.size(0), flat.stride(0), flat.stride(1), flat.stride(2)};
  }
};

// A tensor to write indices to, of the dtype that the caller chose.
struct IndicesOut {
  ScalarType dtype;
  void* data;

  // Refuses a tensor that is not `[..., last]` beside `rows` without gaps.
  static IndicesOut of(const Tensor& out, const Tensor& rows, const std::vector<int64_t>& last) {
    const std::vector<int64_t> sizes = sizes_with(rows, rows.dim() - 1, last);
    bool fits = out.dim() == static_cast<int64_t>(sizes.size());
    for (size_t dim = 0; fits && dim < sizes.size(); ++dim) fits = out.size(dim) == sizes[dim];
    require(fits, "out has another shape than the indices of these rows");
    const ScalarType dtype = out.scalar_type();
    require(
        dtype == ScalarType::Short || dtype == ScalarType::Int || dtype == ScalarType::Long,
        "out must be int16, int32 or int64");
    require(out.is_cpu() == rows.is_cpu() && out.get_device() == rows.get_device(), "out is not on the rows' device");
    require(out.is_contiguous(), "out must be contiguous");
    return {dtype, out.mutable_data_ptr()};
  }
};

// The staging buffer `int16 [max_tokens, L, K or more]`, of which rows [first, last) are packed and all are reset.
struct Staged {
  int16_t* data;
  int64_t max_tokens, first, last, end, row_size;

  static Staged of(const Tensor& staging, int64_t first, int64_t last, int64_t end) {
    require(
        staging.scalar_type() == ScalarType::Short && staging.dim() == 3 && staging.is_contiguous(),
        "staging must be contiguous int16 [tokens, MoE layers, top-k or more]");
    const int64_t max_tokens = staging.size(0);
    require(
        first >= 0 && first <= last && last <= max_tokens && end >= 0, "tokens [", first, ", ", last, ") of a pass of ",
        end, " are not in a staging buffer of ", max_tokens);
    return {
        static_cast<int16_t*>(staging.mutable_data_ptr()), max_tokens, first, last, end,
        staging.size(1) * staging.size(2)};
  }

  // Whether there is a row behind those of the pass, which tells if the pass wrote more.
  bool has_row_behind() const { return end < max_tokens; }

  // Only where there is one: `end` may be so large that its place is no number.
  const int16_t* row_behind() const { return data + end * row_size; }

  // The rows that are packed; what follows the K in a layer are shared experts.
  Indices indices(const Tensor& staging, int64_t num_experts, int64_t top_k) const {
    const int64_t columns = staging.size(2);
    require(columns >= top_k, "staging has ", columns, " columns, but top-k is ", top_k);
    const Geometry geometry(staging.size(1), num_experts, top_k);
    return {staging, geometry, data + first * row_size, last - first, row_size, columns, 1};
  }
};

// Rows `uint8 [..., row_bytes]`, as packed by `code`.
template <class Code>
PackedRows packed_rows(
    const Tensor& flat, const Geometry& geometry, const Code& code, int64_t first_layer, int64_t layers) {
  const int64_t expected = geometry.row_bytes(code.bits());
  require(
      flat.size(1) == expected, "rows of ", flat.size(1), " bytes, but this codec writes ", expected, " for ",
      geometry.num_layers, " MoE layers of ", geometry.top_k, " of ", geometry.num_experts, " experts");
  return {
      static_cast<const uint8_t*>(flat.const_data_ptr()), flat.size(0), flat.stride(0), expected, geometry.num_layers,
      first_layer, layers};
}

inline Tensor flat_rows(const Tensor& rows) {
  require(rows.scalar_type() == ScalarType::Byte && rows.dim() >= 1, "rows must be uint8 [..., row_bytes]");
  const Tensor flat = with_one_leading_dim(rows, 1);
  return flat.size(1) > 1 && flat.stride(1) != 1 ? torch::stable::contiguous(flat) : flat;
}

inline void require_layer_index(int64_t layer_index, const Geometry& geometry) {
  require(
      layer_index >= 0 && layer_index < geometry.num_layers, "layer_index ", layer_index, " is none of the ",
      geometry.num_layers, " MoE layers");
}

}  // namespace routing_masks
