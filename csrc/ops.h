// The ops, once for all devices: arguments are checked, outputs allocated, and the code for codec and geometry chosen.
//
// A Device brings the rows to the codes:
//   Guard(tensor)                                       makes the tensor's device the current one
//   Search<Rank>                                        see code_rank.h
//   with_top_k(top_k, run)                              run(an integral constant that is at least `top_k`)
//   pack(code, indices, row_bytes, rows)                all rows
//   take(code, indices, staged, row_bytes, rows, valid) the rows of a pass; bool [num_rows]
//   unpack(code, packed, rows, geometry, indices)       IndicesOut [num_rows, packed.layers, K]
//   map(code, packed, rows, geometry, map)              bool [num_rows, E], for one layer
//   check_indices(indices, legal)                       bool [num_rows, L]
//   check_rows(code, packed, rows, legal)               bool [num_rows, L]
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>
#include <tuple>

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

  static std::tuple<Tensor, Tensor> take_rows(
      Tensor staging, int64_t first, int64_t last, int64_t end, int64_t num_experts, int64_t top_k,
      const std::string& codec) {
    const typename Device::Guard guard(staging);
    const Staged staged = Staged::of(staging, first, last, end);
    const Indices in = staged.indices(staging, num_experts, top_k);
    Tensor rows;
    const Tensor valid = empty_beside(staging, {in.num_rows}, ScalarType::Bool);
    Codecs::with(codec, [&](auto chosen) {
      with_code<decltype(chosen)>(in.geometry, [&](const auto& code) {
        const int64_t row_bytes = in.geometry.row_bytes(code.bits());
        rows = empty_beside(staging, {in.num_rows, row_bytes}, ScalarType::Byte);
        Device::take(
            code, in, staged, row_bytes, static_cast<uint8_t*>(rows.mutable_data_ptr()),
            static_cast<bool*>(valid.mutable_data_ptr()));
      });
    });
    return {rows, valid};
  }

  static Tensor unpack_indices(
      const Tensor& rows, int64_t num_layers, int64_t num_experts, int64_t top_k, const std::string& codec) {
    const Tensor indices = int32_beside(rows, {num_layers, top_k});
    unpack_indices_out(rows, num_layers, num_experts, top_k, codec, indices);
    return indices;
  }

  static void unpack_indices_out(
      const Tensor& rows, int64_t num_layers, int64_t num_experts, int64_t top_k, const std::string& codec,
      Tensor out) {
    unpack(rows, 0, num_layers, {num_layers, top_k}, Geometry(num_layers, num_experts, top_k), codec, out);
  }

  static Tensor unpack_layer(
      const Tensor& rows, int64_t layer_index, int64_t num_layers, int64_t num_experts, int64_t top_k,
      const std::string& codec) {
    const Tensor indices = int32_beside(rows, {top_k});
    unpack_layer_out(rows, layer_index, num_layers, num_experts, top_k, codec, indices);
    return indices;
  }

  static void unpack_layer_out(
      const Tensor& rows, int64_t layer_index, int64_t num_layers, int64_t num_experts, int64_t top_k,
      const std::string& codec, Tensor out) {
    const Geometry geometry(num_layers, num_experts, top_k);
    require_layer_index(layer_index, geometry);
    unpack(rows, layer_index, 1, {top_k}, geometry, codec, out);
  }

  static Tensor unpack_bitset(
      const Tensor& rows, int64_t layer_index, int64_t num_layers, int64_t num_experts, int64_t top_k,
      const std::string& codec) {
    const typename Device::Guard guard(rows);
    const Geometry geometry(num_layers, num_experts, top_k);
    require_layer_index(layer_index, geometry);
    const Tensor flat = flat_rows(rows);
    const Tensor map = empty_beside(rows, sizes_with(rows, rows.dim() - 1, {num_experts}), ScalarType::Bool);
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
  // Before the sizes are checked, which are checked once, with the tensor that is written to.
  static Tensor int32_beside(const Tensor& rows, const std::vector<int64_t>& last_sizes) {
    const typename Device::Guard guard(rows);
    for (const int64_t size : last_sizes) require(size >= 0 && size <= kMaxLayers, size, " MoE layers or top-k");
    const int64_t leading = rows.dim() > 0 ? rows.dim() - 1 : 0;
    return empty_beside(rows, sizes_with(rows, leading, last_sizes), ScalarType::Int);
  }

  static void unpack(
      const Tensor& rows, int64_t first_layer, int64_t layers, const std::vector<int64_t>& last_sizes,
      const Geometry& geometry, const std::string& codec, const Tensor& out) {
    const typename Device::Guard guard(rows);
    const Tensor flat = flat_rows(rows);
    const IndicesOut indices = IndicesOut::of(out, rows, last_sizes);
    with_reading_code(codec, geometry, [&](const auto& code) {
      const PackedRows packed = packed_rows(flat, geometry, code, first_layer, layers);
      Device::unpack(code, packed, flat, geometry, indices);
    });
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
  library.impl("take_rows", TORCH_BOX(&Ops<Device>::take_rows));
  library.impl("unpack_indices", TORCH_BOX(&Ops<Device>::unpack_indices));
  library.impl("unpack_indices_out", TORCH_BOX(&Ops<Device>::unpack_indices_out));
  library.impl("unpack_layer", TORCH_BOX(&Ops<Device>::unpack_layer));
  library.impl("unpack_layer_out", TORCH_BOX(&Ops<Device>::unpack_layer_out));
  library.impl("unpack_bitset", TORCH_BOX(&Ops<Device>::unpack_bitset));
  library.impl("legal_indices", TORCH_BOX(&Ops<Device>::legal_indices));
  library.impl("legal_rows", TORCH_BOX(&Ops<Device>::legal_rows));
}

}  // namespace routing_masks
