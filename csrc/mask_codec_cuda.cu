// The ops on a CUDA device: no synchronisation and no look at values; the ops named legal_* are the check.

#include "python_module.h"

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <type_traits>

#include "block.h"
#include "ops.h"
#include "warp.h"

namespace routing_masks {
namespace {

constexpr int kThreads = 256;
// Threads of a block that share a table to read by.
constexpr int kMostReadingThreads = 512;
// A thread takes more than one piece of work only where a grid cannot be as large as the work.
constexpr int64_t kMaxBlocks = 1 << 20;

enum class IndexType { kUInt8, kInt16, kUInt16, kInt32, kInt64 };

// Reads indices of a dtype known only at run time: all threads take the same branch, once for a layer.
struct IndexReader {
  const void* data;
  int64_t row_stride, layer_stride, k_stride;
  IndexType type;
  int top_k;

  template <int KMax>
  __device__ __forceinline__ void operator()(Experts<KMax, 1>& experts, int64_t row, int64_t layer) const {
    const int64_t at = row * row_stride + layer * layer_stride;
    switch (type) {
      case IndexType::kUInt8:
        return load(experts, static_cast<const uint8_t*>(data) + at);
      case IndexType::kInt16:
        return load(experts, static_cast<const int16_t*>(data) + at);
      case IndexType::kUInt16:
        return load(experts, static_cast<const uint16_t*>(data) + at);
      case IndexType::kInt32:
        return load(experts, static_cast<const int32_t*>(data) + at);
      default:
        return load(experts, static_cast<const int64_t*>(data) + at);
    }
  }

 private:
  template <int KMax, class Index>
  __device__ __forceinline__ void load(Experts<KMax, 1>& experts, const Index* layer) const {
    load_lane(experts, 0, top_k, [&](int k) { return static_cast<int64_t>(layer[k * k_stride]); });
  }
};

// Reads 8 or 16 int16 of a layer by loads of 16 bytes; strides are in such chunks.
template <int K>
struct ChunkReader {
  const Chunk* data;
  int64_t row_stride, layer_stride;

  __device__ __forceinline__ void operator()(Experts<K, 1>& experts, int64_t row, int64_t layer) const {
    constexpr int kChunks = K * sizeof(int16_t) / sizeof(Chunk);
    Chunk chunks[kChunks];
    const Chunk* at = data + row * row_stride + layer * layer_stride;
    for (int chunk = 0; chunk < kChunks; ++chunk) chunks[chunk] = at[chunk];
    const auto read = [&](int k) -> int64_t {
      const uint32_t pair = chunks[k / 8].words[k % 8 / 2];
      return static_cast<int16_t>(k % 2 == 0 ? pair : pair >> 16);
    };
    load_lane(experts, 0, K, read);
  }
};

__device__ __forceinline__ int64_t first_of_thread() { return blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x; }

__device__ __forceinline__ int64_t all_threads() { return gridDim.x * static_cast<int64_t>(kThreads); }

// The staging buffer of a pass whose rows are taken; of none, where rows are only packed.
struct Taking {
  int16_t* data;
  int64_t max_tokens, first, last, end, row_size;
  bool* valid;

  // All threads of the block call it, and all know.
  __device__ bool wrote_more() const {
    bool written = false;
    if (end < max_tokens) {
      for (int64_t at = threadIdx.x; at < row_size; at += kBlockThreads) written |= data[end * row_size + at] != kUnwritten;
    }
    return __syncthreads_or(written);
  }

  __device__ void reset(int64_t begin, int64_t behind, int64_t thread, int64_t threads) const {
    reset_rows(data, row_size, begin, behind, end, thread, threads);
  }
};

template <bool kTake, class Code, class Load>
__device__ __forceinline__ void pack_tiles(
    const Code& code, const Load& load, const Tiling& tiling, int64_t row_bytes, uint8_t* rows, Chunk* shared,
    const Taking& taking) {
  __shared__ int illegal[kBlockGroups];
  const int thread = threadIdx.x;
  bool wrote_more = false;
  if constexpr (kTake) wrote_more = taking.wrote_more();
  for (int64_t tile = blockIdx.x; tile < tiling.num_tiles(); tile += gridDim.x) {
    if (kTake && thread < kBlockGroups) illegal[thread] = wrote_more;
    int64_t first_row = 0;
    int num_rows = 0;
    for (int number = 0; number < tiling.num_passes(); ++number) {
      const PackingPass<Code> pass(code, tiling, row_bytes, rows, shared, tile, number);
      first_row = pass.first_row();
      num_rows = pass.num_rows();
      pass.clear(thread);
      __syncthreads();
      int row;
      const bool legal = pass.put(load, thread, &row);
      if (kTake && !legal) atomicOr(&illegal[row], 1);
      __syncthreads();
      pass.store(thread);
      __syncthreads();
    }
    if constexpr (kTake) {
      if (thread < num_rows) taking.valid[first_row + thread] = illegal[thread] == 0;
      const int64_t first = taking.first + first_row;
      taking.reset(first, first + num_rows, thread, kBlockThreads);
      __syncthreads();
    }
  }
  if constexpr (kTake) {
    const int64_t all = blockIdx.x * static_cast<int64_t>(kBlockThreads) + thread;
    const int64_t threads = gridDim.x * static_cast<int64_t>(kBlockThreads);
    taking.reset(0, taking.first, all, threads);
    taking.reset(taking.last, taking.max_tokens, all, threads);
  }
}

template <bool kTable, bool kTake, class Code, class Load>
__global__ void __launch_bounds__(kBlockThreads)
    pack_kernel(Code code, Load load, Tiling tiling, int64_t row_bytes, uint8_t* rows, Taking taking) {
  extern __shared__ Chunk shared[];
  if constexpr (kTable) {
    uint64_t* table = reinterpret_cast<uint64_t*>(shared);
    // The blocks of a short pass have rows to set back, and most of them none to pack.
    if (blockIdx.x < tiling.num_tiles()) code.fill_table(table, threadIdx.x, kBlockThreads);
    __syncthreads();
    Chunk* behind = shared + code.table_words() * sizeof(uint64_t) / sizeof(Chunk);
    pack_tiles<kTake>(code.in_table(table), load, tiling, row_bytes, rows, behind, taking);
  } else {
    pack_tiles<kTake>(code, load, tiling, row_bytes, rows, shared, taking);
  }
}

// Alone, since all blocks of a pass look at this row.
__global__ void __launch_bounds__(kThreads) reset_kernel(int16_t* data, int64_t begin, int64_t end) {
  reset_places(data, begin, end, threadIdx.x, kThreads);
}

// Whether a code finds its experts in a table of the block's, which its search has a plan of.
template <class Code>
constexpr bool kHasPlan = false;
template <int KMax, class Rank>
constexpr bool kHasPlan<RankCode<KMax, Rank, EstimatePlan<KMax>>> = true;

template <template <class> class Tile, class Code>
__device__ __forceinline__ void
read_tiles(const Code& code, const PackedRows& packed, const typename Tile<Code>::Target& target, Chunk* shared) {
  const int lane = threadIdx.x % kWarpLanes, warp = threadIdx.x / kWarpLanes;
  const Tile<Code> tile(code, target, shared + warp * Tile<Code>::shared_chunks(code));
  const int64_t num_items = packed.num_items();
  const int step = gridDim.x * blockDim.x;
  int64_t first = blockIdx.x * static_cast<int64_t>(blockDim.x) + warp * kWarpLanes;
  for (ItemWalk walk(packed, first + lane, step); first < num_items; first += step, walk.next()) {
    const int items = static_cast<int>(num_items - first < kWarpLanes ? num_items - first : kWarpLanes);
    tile.clear(lane);
    __syncwarp();
    if (lane < items) tile.put(lane, walk.field(code.bits()));
    __syncwarp();
    tile.store(lane, first, items);
    __syncwarp();
  }
}

template <template <class> class Tile, class Code>
__device__ __forceinline__ void
read_rows(const Code& code, const PackedRows& packed, const typename Tile<Code>::Target& target) {
  extern __shared__ Chunk shared[];
  if constexpr (kHasPlan<Code>) {
    uint64_t* const table = reinterpret_cast<uint64_t*>(shared);
    code.search.fill(table, threadIdx.x, blockDim.x);
    __syncthreads();
    const Estimates<Code::KMax> estimates(code.search, table);
    Chunk* const behind = shared + code.search.words * sizeof(uint64_t) / sizeof(Chunk);
    read_tiles<Tile>(code.template searching<Code::KMax>(estimates), packed, target, behind);
  } else {
    read_tiles<Tile>(code, packed, target, shared);
  }
}

template <class Code>
__global__ void __launch_bounds__(kMostReadingThreads)
    unpack_kernel(const __grid_constant__ Code code, const __grid_constant__ PackedRows packed, IndicesTarget indices) {
  read_rows<IndicesTile>(code, packed, indices);
}

template <class Code>
__global__ void __launch_bounds__(kThreads)
    map_kernel(const __grid_constant__ Code code, const __grid_constant__ PackedRows packed, bool* map) {
  read_rows<MapTile>(code, packed, map);
}

template <int KMax>
__global__ void __launch_bounds__(kThreads)
    check_indices_kernel(IndexReader load, int num_experts, int64_t num_layers, int64_t items, bool* is_legal) {
  for (int64_t item = first_of_thread(); item < items; item += all_threads()) {
    const int64_t row = quotient(item, num_layers);
    Experts<KMax, 1> experts;
    load(experts, row, item - row * num_layers);
    bool legal[1];
    sort_lanes(experts, load.top_k, num_experts, legal);
    is_legal[item] = legal[0];
  }
}

template <class Code>
__global__ void __launch_bounds__(kThreads) check_rows_kernel(Code code, PackedRows packed, int64_t items, bool* legal) {
  for (int64_t item = first_of_thread(); item < items; item += all_threads()) {
    check_items<1>(code, packed, items, item, legal);
  }
}

cudaStream_t current_stream(const Tensor& on) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Launches on the current stream of the tensor's device.
template <class... Parameter, class... Argument>
void launch(const Tensor& on, void (*kernel)(Parameter...), int64_t threads, const Argument&... arguments) {
  if (threads == 0) return;
  const int64_t blocks = (threads + kThreads - 1) / kThreads;
  kernel<<<blocks < kMaxBlocks ? blocks : kMaxBlocks, kThreads, 0, current_stream(on)>>>(arguments...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// As many threads as all multiprocessors can hold.
int64_t resident_threads(const Tensor& on) {
  int multiprocessors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, on.get_device()));
  return multiprocessors * int64_t{2048};
}

// Blocks that run at a time, with room for twice as many: each fills its table once and then packs tile after tile.
int64_t resident_blocks(const Tensor& on) { return resident_threads(on) / kBlockThreads * 2; }

// Whether a code searches in tables, which are worth shared memory where they leave room for more than a few blocks.
template <class Code>
constexpr bool kSearches = false;
template <int KMax, class Rank, class Search>
constexpr bool kSearches<RankCode<KMax, Rank, Search>> = true;
constexpr int kMaxTableBytes = 40 << 10;

template <bool kTake, class Code, class Load>
void launch_packing(
    const Tensor& on, const Code& code, const Load& load, const Tiling& tiling, int64_t row_bytes, uint8_t* rows,
    const Taking& taking) {
  // A pass without rows of this rank still leaves a buffer to be set back.
  const int64_t work = kTake ? tiling.num_tiles() + resident_blocks(on) : tiling.num_tiles();
  if (work == 0) return;
  const int64_t most = resident_blocks(on), blocks = work < most ? work : most;
  const int bytes = Tiling::shared_bytes(code.bits());
  const auto run = [&](auto kernel, int shared) {
    kernel<<<blocks, kBlockThreads, shared, current_stream(on)>>>(code, load, tiling, row_bytes, rows, taking);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if constexpr (kSearches<Code>) {
    const int table_bytes = code.table_words() * static_cast<int>(sizeof(uint64_t));
    if (table_bytes <= kMaxTableBytes) return run(pack_kernel<true, kTake, Code, Load>, table_bytes + bytes);
  }
  run(pack_kernel<false, kTake, Code, Load>, bytes);
}

// What a block has without asking for more, and what it may ask for on every device since compute capability 8.0.
constexpr int kSharedBytes = 48 << 10;
constexpr int kMostSharedBytes = 96 << 10;

template <template <class> class Tile, class Code, class Target>
void launch_reading(
    const Tensor& on, void (*kernel)(Code, PackedRows, Target), const Code& code, const PackedRows& packed,
    const Target& target, int threads) {
  if (packed.num_items() == 0) return;
  const int64_t needed = (packed.num_items() + threads - 1) / threads, most = resident_threads(on) / threads;
  int bytes = threads / kWarpLanes * Tile<Code>::shared_chunks(code) * static_cast<int>(sizeof(Chunk));
  if constexpr (kHasPlan<Code>) bytes += code.search.words * static_cast<int>(sizeof(uint64_t));
  if (bytes > kSharedBytes) {
    // The same for all geometries, since another thread may be about to launch.
    STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMostSharedBytes));
  }
  kernel<<<needed < most ? needed : most, threads, bytes, current_stream(on)>>>(code, packed, target);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Calls run(code) with the code that has a plan, if there is one for it.
template <class Code, class Run>
void with_plan(const Code& code, const Run& run) {
  run(code);
}

template <int KMax, class Rank, class Search, class Run>
void with_plan(const RankCode<KMax, Rank, Search>& code, const Run& run) {
  const auto run_planned = [&](auto k_max) {
    run(code.template searching<k_max>(EstimatePlan<k_max>::of(code.num_experts, code.top_k)));
  };
  if (code.top_k <= 8) return run_planned(std::integral_constant<int, 8>{});
  if (code.top_k <= kEstimatedPlaces) return run_planned(std::integral_constant<int, kEstimatedPlaces>{});
  run(code);
}

IndexReader reader(const Indices& in) {
  IndexReader reader{in.data, in.row_stride, in.layer_stride, in.k_stride, IndexType::kInt64, in.geometry.top_k};
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
  template <class Rank>
  using Search = Bisection<Rank>;

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
    pack_or_take<false>(code, in, row_bytes, rows, Taking{});
  }

  template <class Code>
  static void take(
      const Code& code, const Indices& in, const Staged& staged, int64_t row_bytes, uint8_t* rows, bool* valid) {
    const Taking taking{staged.data, staged.max_tokens, staged.first, staged.last, staged.end, staged.row_size, valid};
    pack_or_take<true>(code, in, row_bytes, rows, taking);
    if (staged.has_row_behind()) {
      const int64_t begin = staged.end * staged.row_size;
      launch(in.flat, reset_kernel, 1, staged.data, begin, begin + staged.row_size);
    }
  }

  template <class Code>
  static void unpack(
      const Code& code, const PackedRows& packed, const Tensor& rows, const Geometry&, const IndicesOut& out) {
    const IndicesTarget target{out.data, out.dtype == ScalarType::Short ? 1 : out.dtype == ScalarType::Int ? 2 : 3};
    with_plan(code, [&](const auto& planned) {
      using Planned = std::decay_t<decltype(planned)>;
      const int threads = kHasPlan<Planned> ? kMostReadingThreads : kThreads;
      launch_reading<IndicesTile>(rows, unpack_kernel<Planned>, planned, packed, target, threads);
    });
  }

  template <class Code>
  static void map(const Code& code, const PackedRows& packed, const Tensor& rows, const Geometry&, bool* map) {
    with_plan(code, [&](const auto& planned) {
      launch_reading<MapTile>(rows, map_kernel<std::decay_t<decltype(planned)>>, planned, packed, map, kThreads);
    });
  }

  static void check_indices(const Indices& in, bool* legal) {
    const Geometry& geometry = in.geometry;
    const int64_t items = in.num_rows * geometry.num_layers;
    with_top_k(geometry.top_k, [&](auto k_max) {
      launch(
          in.flat, check_indices_kernel<k_max>, items, reader(in), geometry.num_experts, geometry.num_layers, items,
          legal);
    });
  }

  template <class Code>
  static void check_rows(const Code& code, const PackedRows& packed, const Tensor& rows, bool* legal) {
    const int64_t items = packed.num_items();
    launch(rows, check_rows_kernel<Code>, items, code, packed, items, legal);
  }

 private:
  template <bool kTake, class Code>
  static void pack_or_take(
      const Code& code, const Indices& in, int64_t row_bytes, uint8_t* rows, const Taking& taking) {
    const Tiling tiling = Tiling::of(in.num_rows, in.geometry.num_layers);
    if constexpr (Code::KMax <= kMostUnrolled) {
      constexpr int64_t kPlaces = sizeof(Chunk) / sizeof(int16_t);
      const bool in_chunks = in.geometry.top_k == Code::KMax && in.flat.scalar_type() == ScalarType::Short &&
                             in.k_stride == 1 && in.layer_stride % kPlaces == 0 && in.row_stride % kPlaces == 0 &&
                             offset_in_chunk(in.data) == 0;
      if (in_chunks) {
        const ChunkReader<Code::KMax> chunks{
            static_cast<const Chunk*>(in.data), in.row_stride / kPlaces, in.layer_stride / kPlaces};
        return launch_packing<kTake>(in.flat, code, chunks, tiling, row_bytes, rows, taking);
      }
    }
    launch_packing<kTake>(in.flat, code, reader(in), tiling, row_bytes, rows, taking);
  }
};

}  // namespace
}  // namespace routing_masks

STABLE_TORCH_LIBRARY_IMPL(routing_masks, CUDA, library) { routing_masks::register_ops<routing_masks::Cuda>(library); }
