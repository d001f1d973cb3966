// The ops on a CPU: rows are spread over torch's threads, and every index and row is checked.

#include "python_module.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <type_traits>

#include "arguments.h"
#include "guess.h"

namespace routing_masks {
namespace {

// Enough work for a thread to be worth waking: some tens of microseconds.
constexpr int64_t kGroupsPerTask = 128;
constexpr int kLanes = kGroup;
constexpr int kNone = -1;

// Calls run with a bound of K as an integral constant.
template <class Run>
void with_top_k(int top_k, const Run& run) {
  if (top_k <= 8) return run(std::integral_constant<int, 8>{});
  run(std::integral_constant<int, kMaxTopK>{});
}

template <class Run>
void with_cpu_code(Codec codec, const Geometry& geometry, int held, const Run& run) {
  with_top_k(held, [&](auto k_max) { with_code<k_max, Guess>(codec, geometry, &Guess::of, run); });
}

template <class Run>
void with_reading_code(const std::string& name, const Geometry& geometry, const Run& run) {
  const Codec codec = codec_named(name);
  with_cpu_code(codec, geometry, held_while_reading(codec, geometry.top_k), run);
}

// Calls run(i) for i < count in parallel; returns the smallest result that is not negative, or -1.
template <class Run>
int64_t first_found(int64_t count, const Run& run) {
  std::atomic<int64_t> first{INT64_MAX};
  torch::stable::parallel_for(0, count, kGroupsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t found = run(i);
      if (found < 0) continue;
      int64_t known = first.load();
      while (found < known && !first.compare_exchange_weak(known, found)) {
      }
      return;  // what follows in this range is not smaller
    }
  });
  return first.load() == INT64_MAX ? kNone : first.load();
}

// Calls run(read) with the reader for the dtype of the indices.
template <class Run>
void with_reader(const Indices& indices, const Run& run) {
  const auto reader = [&](auto example) {
    using Index = decltype(example);
    const Index* data = static_cast<const Index*>(indices.data);
    const int64_t row_stride = indices.row_stride, layer_stride = indices.layer_stride, k_stride = indices.k_stride;
    run([=](int64_t row, int64_t layer, int k) -> int64_t {
      return data[row * row_stride + layer * layer_stride + k * k_stride];
    });
  };
  switch (indices.flat.scalar_type()) {
    case ScalarType::Byte:
      return reader(uint8_t{});
    case ScalarType::Short:
      return reader(int16_t{});
    case ScalarType::UInt16:
      return reader(uint16_t{});
    case ScalarType::Int:
      return reader(int32_t{});
    case ScalarType::Long:
      return reader(int64_t{});
    default:
      require_index_type(false);
  }
}

void require_legal_indices(int64_t place, const Geometry& geometry) {
  require(
      place == kNone, "token ", place / geometry.num_layers, ", MoE layer ", place % geometry.num_layers,
      ": the indices are not ", geometry.top_k, " different experts in [0, ", geometry.num_experts, ")");
}

void require_legal_rows(int64_t item, const PackedRows& packed, const Geometry& geometry) {
  require(
      item == kNone, "token ", item / packed.layers, ", MoE layer ", packed.first_layer + item % packed.layers,
      ": these bits are no ", geometry.top_k, " different experts of ", geometry.num_experts, ": corrupted rows");
}

Tensor pack(const Tensor& indices, int64_t num_experts, const std::string& codec) {
  const Indices in = Indices::of(indices, num_experts);
  Tensor rows;
  with_cpu_code(codec_named(codec), in.geometry, in.geometry.top_k, [&](const auto& code) {
    const int64_t num_layers = in.geometry.num_layers, row_bytes = in.geometry.row_bytes(code.bits());
    rows = empty_beside(indices, sizes_with(indices, indices.dim() - 2, {row_bytes}), ScalarType::Byte);
    uint8_t* out = static_cast<uint8_t*>(rows.mutable_data_ptr());
    with_reader(in, [&](const auto& read) {
      const int64_t place = first_found(in.num_rows * num_groups(num_layers), [&](int64_t group) {
        return pack_group<kLanes>(code, num_layers, row_bytes, out, read, group);
      });
      require_legal_indices(place, in.geometry);
    });
  });
  return rows;
}

// Reads layers [first, first + layers) of every row; `visit` as in unpack_items.
template <class Code, class Visit>
void read_rows(const Code& code, const PackedRows& packed, int64_t num_rows, const Geometry& geometry, const Visit& visit) {
  const int64_t items = num_rows * packed.layers;
  const auto run = [&](int64_t task) { return unpack_items<kLanes>(code, packed, items, task * kLanes, visit); };
  require_legal_rows(first_found((items + kLanes - 1) / kLanes, run), packed, geometry);
}

Tensor unpack(
    const Tensor& rows, int64_t first_layer, int64_t layers, const std::vector<int64_t>& last_sizes,
    const Geometry& geometry, const std::string& codec) {
  const Tensor flat = flat_rows(rows);
  const Tensor indices = empty_beside(rows, sizes_with(rows, rows.dim() - 1, last_sizes), ScalarType::Int);
  int32_t* out = static_cast<int32_t*>(indices.mutable_data_ptr());
  with_reading_code(codec, geometry, [&](const auto& code) {
    const int64_t top_k = geometry.top_k;
    read_rows(
        code, packed_rows(flat, geometry, code, first_layer, layers), flat.size(0), geometry,
        [=](int64_t item, int k, int expert) { out[item * top_k + k] = expert; });
  });
  return indices;
}

Tensor unpack_indices(
    const Tensor& rows, int64_t num_layers, int64_t num_experts, int64_t top_k, const std::string& codec) {
  return unpack(rows, 0, num_layers, {num_layers, top_k}, Geometry(num_layers, num_experts, top_k), codec);
}

Tensor unpack_layer(
    const Tensor& rows, int64_t slot, int64_t num_layers, int64_t num_experts, int64_t top_k, const std::string& codec) {
  const Geometry geometry(num_layers, num_experts, top_k);
  require_slot(slot, geometry);
  return unpack(rows, slot, 1, {top_k}, geometry, codec);
}

Tensor unpack_bitset(
    const Tensor& rows, int64_t slot, int64_t num_layers, int64_t num_experts, int64_t top_k, const std::string& codec) {
  const Geometry geometry(num_layers, num_experts, top_k);
  require_slot(slot, geometry);
  const Tensor flat = flat_rows(rows);
  const Tensor map = zeros_beside(rows, sizes_with(rows, rows.dim() - 1, {num_experts}), ScalarType::Bool);
  bool* out = static_cast<bool*>(map.mutable_data_ptr());
  with_reading_code(codec, geometry, [&](const auto& code) {
    read_rows(
        code, packed_rows(flat, geometry, code, slot, 1), flat.size(0), geometry,
        [=](int64_t item, int, int expert) { if (expert < num_experts) out[item * num_experts + expert] = true; });
  });
  return map;
}

Tensor scalar(const Tensor& beside, int64_t value) {
  const Tensor result = empty_beside(beside, {}, ScalarType::Long);
  *static_cast<int64_t*>(result.mutable_data_ptr()) = value;
  return result;
}

Tensor first_illegal_indices(const Tensor& indices, int64_t num_experts) {
  const Indices in = Indices::of(indices, num_experts);
  const int64_t num_layers = in.geometry.num_layers;
  int64_t place = kNone;
  with_top_k(in.geometry.top_k, [&](auto k_max) {
    const NoCode<k_max> code{in.geometry.num_experts, in.geometry.top_k};
    with_reader(in, [&](const auto& read) {
      place = first_found(in.num_rows * num_groups(num_layers), [&](int64_t group) {
        return pack_group<kLanes>(code, num_layers, 0, nullptr, read, group);
      });
    });
  });
  return scalar(indices, place);
}

Tensor first_illegal_row(
    const Tensor& rows, int64_t num_layers, int64_t num_experts, int64_t top_k, const std::string& codec) {
  const Geometry geometry(num_layers, num_experts, top_k);
  const Tensor flat = flat_rows(rows);
  int64_t place = kNone;
  with_reading_code(codec, geometry, [&](const auto& code) {
    const PackedRows packed = packed_rows(flat, geometry, code, 0, num_layers);
    const int64_t items = flat.size(0) * num_layers;
    place = first_found((items + kLanes - 1) / kLanes, [&](int64_t task) {
      return check_items<kLanes>(code, packed, items, task * kLanes);
    });
  });
  return scalar(rows, place);
}

}  // namespace
}  // namespace routing_masks

STABLE_TORCH_LIBRARY_IMPL(routing_masks, CPU, library) {
  library.impl("pack", TORCH_BOX(&routing_masks::pack));
  library.impl("unpack_indices", TORCH_BOX(&routing_masks::unpack_indices));
  library.impl("unpack_layer", TORCH_BOX(&routing_masks::unpack_layer));
  library.impl("unpack_bitset", TORCH_BOX(&routing_masks::unpack_bitset));
  library.impl("first_illegal_indices", TORCH_BOX(&routing_masks::first_illegal_indices));
  library.impl("first_illegal_row", TORCH_BOX(&routing_masks::first_illegal_row));
}
