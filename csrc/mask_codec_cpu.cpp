// The ops on a CPU: rows are spread over torch's threads, and every index and row is checked.

#include "python_module.h"

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "guess.h"
#include "ops.h"

namespace routing_masks {
namespace {

// Enough work for a thread to be worth waking: some tens of microseconds.
constexpr int64_t kTasksPerThread = 128;
constexpr int kLanes = kGroup;
constexpr int64_t kNone = -1;

// Calls run(i) for i < count in parallel; returns the smallest result that is not negative, or -1.
template <class Run>
int64_t first_found(int64_t count, const Run& run) {
  std::atomic<int64_t> first{INT64_MAX};
  torch::stable::parallel_for(0, count, kTasksPerThread, [&](int64_t begin, int64_t end) {
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

template <class Run>
void for_all(int64_t count, const Run& run) {
  torch::stable::parallel_for(0, count, kTasksPerThread, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i);
  });
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

struct Cpu {
  template <class Rank>
  using Search = Guess<Rank>;

  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  // Calls run with a bound of K as an integral constant.
  template <class Run>
  static void with_top_k(int top_k, const Run& run) {
    if (top_k <= 8) return run(std::integral_constant<int, 8>{});
    if (top_k <= 16) return run(std::integral_constant<int, 16>{});
    run(std::integral_constant<int, kMaxTopK>{});
  }

  template <class Code>
  static void pack(const Code& code, const Indices& in, int64_t row_bytes, uint8_t* rows) {
    const int64_t num_layers = in.geometry.num_layers;
    int64_t item = kNone;
    with_reader(in, [&](const auto& read) {
      item = first_found(in.num_rows * num_groups(num_layers), [&](int64_t group) {
        return pack_group<kLanes>(code, num_layers, row_bytes, rows, read, group);
      });
    });
    require(
        item == kNone, "token ", item / num_layers, ", MoE layer ", item % num_layers,
        ": the indices are not ", in.geometry.top_k, " different experts in [0, ", in.geometry.num_experts, ")");
  }

  template <class Code>
  static void take(
      const Code& code, const Indices& in, const Staged& staged, int64_t row_bytes, uint8_t* rows, bool* valid) {
    const int16_t* data = static_cast<const int16_t*>(in.data);
    const int64_t row_stride = in.row_stride, layer_stride = in.layer_stride;
    const auto read = [=](int64_t row, int64_t layer, int k) -> int64_t {
      return data[row * row_stride + layer * layer_stride + k];
    };
    const auto unwritten = [](int16_t index) { return index == kUnwritten; };
    const bool as_expected = !staged.has_row_behind() ||
                             std::all_of(staged.row_behind(), staged.row_behind() + staged.row_size, unwritten);
    for_all(in.num_rows, [&](int64_t row) {
      valid[row] = pack_row<kLanes>(code, in.geometry.num_layers, row_bytes, rows, read, row) && as_expected;
    });
    std::fill_n(staged.data, staged.max_tokens * staged.row_size, kUnwritten);
  }

  template <class Code>
  static void unpack(
      const Code& code, const PackedRows& packed, const Tensor&, const Geometry& geometry, const IndicesOut& out) {
    const int64_t top_k = geometry.top_k;
    const auto write = [&](auto example) {
      auto* const indices = static_cast<decltype(example)*>(out.data);
      read(code, packed, geometry, [=](int64_t item, int k, int expert) {
        indices[item * top_k + k] = static_cast<decltype(example)>(expert);
      });
    };
    if (out.dtype == ScalarType::Short) return write(int16_t{});
    if (out.dtype == ScalarType::Int) return write(int32_t{});
    write(int64_t{});
  }

  template <class Code>
  static void map(const Code& code, const PackedRows& packed, const Tensor&, const Geometry& geometry, bool* map) {
    const int64_t num_experts = geometry.num_experts;
    std::fill_n(map, packed.num_items() * num_experts, false);
    read(code, packed, geometry, [=](int64_t item, int, int expert) {
      if (expert < num_experts) map[item * num_experts + expert] = true;
    });
  }

  static void check_indices(const Indices& in, bool* legal) {
    const Geometry& geometry = in.geometry;
    with_top_k(geometry.top_k, [&](auto k_max) {
      with_reader(in, [&](const auto& read) {
        for_all(in.num_rows * num_groups(geometry.num_layers), [&](int64_t group) {
          check_group<kLanes, k_max>(
              geometry.num_experts, geometry.top_k, geometry.num_layers, read, group, legal);
        });
      });
    });
  }

  template <class Code>
  static void check_rows(const Code& code, const PackedRows& packed, const Tensor&, bool* legal) {
    const int64_t items = packed.num_items();
    for_all((items + kLanes - 1) / kLanes, [&](int64_t task) {
      check_items<kLanes>(code, packed, items, task * kLanes, legal);
    });
  }

 private:
  // `visit` as in unpack_items.
  template <class Code, class Visit>
  static void read(const Code& code, const PackedRows& packed, const Geometry& geometry, const Visit& visit) {
    const int64_t items = packed.num_items();
    const int64_t item = first_found((items + kLanes - 1) / kLanes, [&](int64_t task) {
      return unpack_items<kLanes>(code, packed, items, task * kLanes, visit);
    });
    require(
        item == kNone, "token ", item / packed.layers, ", MoE layer ", packed.first_layer + item % packed.layers,
        ": these bits are not ", geometry.top_k, " different experts of ", geometry.num_experts, ": corrupted rows");
  }
};

}  // namespace
}  // namespace routing_masks

STABLE_TORCH_LIBRARY_IMPL(routing_masks, CPU, library) { routing_masks::register_ops<routing_masks::Cpu>(library); }
