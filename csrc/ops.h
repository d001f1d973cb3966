// The ops, once for all devices: arguments are checked, outputs allocated, and the code for codec and geometry chosen.
//
// A Device brings the rows to the codes:
//   Guard(tensor)                                       makes the tensor's device the current one
//   NarrowSearch                                        see code_rank.h
//   with_top_k(top_k, run)                              run(an integral constant that is at least `top_k`)
//   pack(code, indices, row_bytes, rows)                all rows
//   unpack(code, packed, rows, geometry, indices)       int32 [num_rows, packed.layers, K]
//   map(code, packed, rows, geometry, map)              bool [num_rows, E] that is all False, for one layer
//   check_indices(indices, legal)                       bool [num_rows, L]
//   check_rows(code, packed, rows, legal)               bool [num_rows, L]
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

#include "arguments.h"

namespace routing_masks {

template <class Device>
struct Ops {
  static Tensor pack(const Tensor& indices, int64_t num_experts, const std::string& codec) {
    const typename Device::Guard guard(indices);
    const Indices in = Indices::of(indices, num_experts);
    Tensor rows;
    Codecs::with(codec, [&](auto chosen) {
      with_code<decltype(chosen)>(in.geometry, [&](const auto& code) {
        const int64_t row_bytes = in.geometry.row_bytes(code.bits());
        rows = empty_beside(indices, sizes_with(indices, indices.dim() - 2, {row_bytes}), ScalarType::Byte);
        Device::pack(code, in, row_bytes, static_cast<uint8_t*>(rows.mutable_data_ptr()));
      });
    });
    return rows;
  }

  static Tensor unpack_indices(
      const Tensor& rows, int64_t num_layers, int64_t num_experts, int64_t top_k, const std::string& codec) {
    return unpack(rows, 0, num_layers, {num_layers, top_k}, Geometry(num_layers, num_experts, top_k), codec);
  }

  static Tensor unpack_layer(
      const Tensor& rows, int64_t layer_index, int64_t num_layers, int64_t num_experts, int64_t top_k,
      const std::string& codec) {
    const Geometry geometry(num_layers, num_experts, top_k);
    require_layer_index(layer_index, geometry);
    return unpack(rows, layer_index, 1, {top_k}, geometry, codec);
  }

  static Tensor unpack_bitset(
      const Tensor& rows, int64_t layer_index, int64_t num_layers, int64_t num_experts, int64_t top_k,
      const std::string& codec) {
    const typename Device::Guard guard(rows);
    const Geometry geometry(num_layers, num_experts, top_k);
    require_layer_index(layer_index, geometry);
    const Tensor flat = flat_rows(rows);
    const Tensor map = zeros_beside(rows, sizes_with(rows, rows.dim() - 1, {num_experts}), ScalarType::Bool);
    with_reading_code(codec, geometry, [&](const auto& code) {
      const PackedRows packed = packed_rows(flat, geometry, code, layer_index, 1);
      Device::map(code, packed, flat, geometry, static_cast<bool*>(map.mutable_data_ptr()));
    });
    return map;
  }

  static Tensor legal_indices(const Tensor& indices, int64_t num_experts) {
    const typename Device::Guard guard(indices);
    const Indices in = Indices::of(indices, num_experts);
    const Tensor legal = empty_beside(indices, sizes_with(indices, indices.dim() - 1, {}), ScalarType::Bool);
    Device::check_indices(in, static_cast<bool*>(legal.mutable_data_ptr()));
    return legal;
  }

  static Tensor legal_rows(
      const Tensor& rows, int64_t num_layers, int64_t num_experts, int64_t top_k, const std::string& codec) {
    const typename Device::Guard guard(rows);
    const Geometry geometry(num_layers, num_experts, top_k);
    const Tensor flat = flat_rows(rows);
    const Tensor legal = empty_beside(rows, sizes_with(rows, rows.dim() - 1, {num_layers}), ScalarType::Bool);
    with_reading_code(codec, geometry, [&](const auto& code) {
      const PackedRows packed = packed_rows(flat, geometry, code, 0, num_layers);
      Device::check_rows(code, packed, flat, static_cast<bool*>(legal.mutable_data_ptr()));
    });
    return legal;
  }

 private:
  static Tensor unpack(
      const Tensor& rows, int64_t first_layer, int64_t layers, const std::vector<int64_t>& last_sizes,
      const Geometry& geometry, const std::string& codec) {
    const typename Device::Guard guard(rows);
    const Tensor flat = flat_rows(rows);
    const Tensor indices = empty_beside(rows, sizes_with(rows, rows.dim() - 1, last_sizes), ScalarType::Int);
    with_reading_code(codec, geometry, [&](const auto& code) {
      const PackedRows packed = packed_rows(flat, geometry, code, first_layer, layers);
      Device::unpack(code, packed, flat, geometry, static_cast<int32_t*>(indices.mutable_data_ptr()));
    });
    return indices;
  }

  template <class Run>
  static void with_reading_code(const std::string& name, const Geometry& geometry, const Run& run) {
    Codecs::with(name, [&](auto chosen) {
      using Codec = decltype(chosen);
      if constexpr (Codec::kHoldsLayerToRead) {
        with_code<Codec>(geometry, run);
      } else {
        Codec::template with_code<1, Device>(geometry.num_experts, geometry.top_k, run);
      }
    });
  }

  template <class Codec, class Run>
  static void with_code(const Geometry& geometry, const Run& run) {
    Device::with_top_k(geometry.top_k, [&](auto k_max) {
      Codec::template with_code<k_max, Device>(geometry.num_experts, geometry.top_k, run);
    });
  }
};

// The schemas are defined in router_replay/masks/codecs/ops.py.
template <class Device, class Library>
void register_ops(Library& library) {
  library.impl("pack", TORCH_BOX(&Ops<Device>::pack));
  library.impl("unpack_indices", TORCH_BOX(&Ops<Device>::unpack_indices));
  library.impl("unpack_layer", TORCH_BOX(&Ops<Device>::unpack_layer));
  library.impl("unpack_bitset", TORCH_BOX(&Ops<Device>::unpack_bitset));
  library.impl("legal_indices", TORCH_BOX(&Ops<Device>::legal_indices));
  library.impl("legal_rows", TORCH_BOX(&Ops<Device>::legal_rows));
}

}  // namespace routing_masks
