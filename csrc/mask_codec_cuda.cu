// The ops on a CUDA device: no synchronisation and no look at values; the ops named legal_* are the check.

#include "python_module.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <type_traits>

#include "ops.h"

namespace routing_masks {
namespace {

constexpr int kThreads = 256;
// A thread takes more than one piece of work only where a grid cannot be as large as the work.
constexpr int64_t kMaxBlocks = 1 << 20;

enum class IndexType { kUInt8, kInt16, kUInt16, kInt32, kInt64 };

// Reads indices of a dtype known only at run time: all threads take the same branch.
struct IndexReader {
  const void* data;
  int64_t row_stride, layer_stride, k_stride;
  IndexType type;

  __device__ __forceinline__ int64_t operator()(int64_t row, int64_t layer, int k) const {
    const int64_t at = row * row_stride + layer * layer_stride + k * k_stride;
    switch (type) {
      case IndexType::kUInt8:
        return static_cast<const uint8_t*>(data)[at];
      case IndexType::kInt16:
        return static_cast<const int16_t*>(data)[at];
      case IndexType::kUInt16:
        return static_cast<const uint16_t*>(data)[at];
      case IndexType::kInt32:
        return static_cast<const int32_t*>(data)[at];
      default:
        return static_cast<const int64_t*>(data)[at];
    }
  }
};

__device__ __forceinline__ int64_t first_of_thread() { return blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; }

__device__ __forceinline__ int64_t all_threads() { return gridDim.x * static_cast<int64_t>(kThreads); }

template <class Code>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(Code code, IndexReader read, int64_t num_layers, int64_t row_bytes, uint8_t* rows, int64_t groups) {
  for (int64_t group = first_of_thread(); group < groups; group += all_threads()) {
    pack_group<1>(code, num_layers, row_bytes, rows, read, group);
  }
}

template <class Code>
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(Code code, PackedRows packed, int32_t* indices, int64_t items) {
  for (int64_t item = first_of_thread(); item < items; item += all_threads()) {
    unpack_items<1>(code, packed, items, item, [&](int64_t at, int k, int expert) {
      indices[at * code.top_k + k] = expert;
    });
  }
}

template <class Code>
__global__ void __launch_bounds__(kThreads) map_kernel(Code code, PackedRows packed, bool* map, int64_t items) {
  for (int64_t item = first_of_thread(); item < items; item += all_threads()) {
    unpack_items<1>(code, packed, items, item, [&](int64_t at, int, int expert) {
      if (expert < code.num_experts) map[at * code.num_experts + expert] = true;
    });
  }
}

template <int KMax>
__global__ void __launch_bounds__(kThreads) check_indices_kernel(
    IndexReader read, int num_experts, int top_k, int64_t num_layers, int64_t groups, bool* legal) {
  for (int64_t group = first_of_thread(); group < groups; group += all_threads()) {
    check_group<1, KMax>(num_experts, top_k, num_layers, read, group, legal);
  }
}

template <class Code>
__global__ void __launch_bounds__(kThreads) check_rows_kernel(Code code, PackedRows packed, int64_t items, bool* legal) {
  for (int64_t item = first_of_thread(); item < items; item += all_threads()) {
    check_items<1>(code, packed, items, item, legal);
  }
}

// Launches on the current stream of the tensor's device.
template <class... Parameter, class... Argument>
void launch(const Tensor& on, void (*kernel)(Parameter...), int64_t threads, const Argument&... arguments) {
  if (threads == 0) return;
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device(), &stream));
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  kernel<<<blocks < kMaxBlocks ? blocks : kMaxBlocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

IndexReader reader(const Indices& in) {
  IndexReader reader{in.data, in.row_stride, in.layer_stride, in.k_stride, IndexType::kInt64};
  switch (in.flat.scalar_type()) {
    case ScalarType::Byte:
      reader.type = IndexType::kUInt8;
      break;
    case ScalarType::Short:
      reader.type = IndexType::kInt16;
      break;
    case ScalarType::UInt16:
      reader.type = IndexType::kUInt16;
      break;
    case ScalarType::Int:
      reader.type = IndexType::kInt32;
      break;
    default:
      require_index_type(in.flat.scalar_type() == ScalarType::Long);
  }
  return reader;
}

struct Cuda {
  using NarrowSearch = Bisection<uint64_t>;

  struct Guard {
    explicit Guard(const Tensor& tensor) : guard(tensor.get_device()) {}
    torch::stable::accelerator::DeviceGuard guard;
  };

  // Calls run with a bound of K as an integral constant: arrays of that size stay in registers.
  template <class Run>
  static void with_top_k(int top_k, const Run& run) {
    if (top_k <= 8) return run(std::integral_constant<int, 8>{});
    if (top_k <= 16) return run(std::integral_constant<int, 16>{});
    run(std::integral_constant<int, kMaxTopK>{});
  }

  template <class Code>
  static void pack(const Code& code, const Indices& in, int64_t row_bytes, uint8_t* rows) {
    const int64_t num_layers = in.geometry.num_layers, groups = in.num_rows * num_groups(num_layers);
    launch(in.flat, pack_kernel<Code>, groups, code, reader(in), num_layers, row_bytes, rows, groups);
  }

  template <class Code>
  static void unpack(const Code& code, const PackedRows& packed, const Tensor& rows, const Geometry&, int32_t* indices) {
    const int64_t items = rows.size(0) * packed.layers;
    launch(rows, unpack_kernel<Code>, items, code, packed, indices, items);
  }

  template <class Code>
  static void map(const Code& code, const PackedRows& packed, const Tensor& rows, const Geometry&, bool* map) {
    launch(rows, map_kernel<Code>, rows.size(0), code, packed, map, rows.size(0));
  }

  static void check_indices(const Indices& in, bool* legal) {
    const Geometry& geometry = in.geometry;
    const int64_t groups = in.num_rows * num_groups(geometry.num_layers);
    with_top_k(geometry.top_k, [&](auto k_max) {
      launch(
          in.flat, check_indices_kernel<k_max>, groups, reader(in), geometry.num_experts, geometry.top_k,
          geometry.num_layers, groups, legal);
    });
  }

  template <class Code>
  static void check_rows(const Code& code, const PackedRows& packed, const Tensor& rows, bool* legal) {
    const int64_t items = rows.size(0) * packed.layers;
    launch(rows, check_rows_kernel<Code>, items, code, packed, items, legal);
  }
};

}  // namespace
}  // namespace routing_masks

STABLE_TORCH_LIBRARY_IMPL(routing_masks, CUDA, library) { routing_masks::register_ops<routing_masks::Cuda>(library); }
