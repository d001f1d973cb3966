// Drives csrc/mask_codec.h as the CUDA kernels do, one lane to a thread and in any order, and as the CPU ops do.
// Buffers have their exact sizes, so that a sanitizer sees every access beyond them.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <type_traits>
#include <vector>

#include "guess.h"
#include "mask_codec.h"

using namespace routing_masks;

namespace {

std::mt19937 generator(0);

void require(bool condition, const char* what) {
  if (condition) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

std::vector<int64_t> shuffled(int64_t count) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), generator);
  return order;
}

// Below 2^bits if and only if some field of the code is illegal.
template <class Code>
uint64_t legal_fields(const Code& code) {
  if constexpr (std::is_same_v<Code, BitsetCode<Code::KMax>>) return 0;
  const int experts = code.num_experts, top_k = code.top_k;
  if constexpr (std::is_same_v<Code, OrderedCode<Code::KMax>>) {
    const bool every = top_k == 1 && (experts & (experts - 1)) == 0;
    return every ? uint64_t{1} << code.bits() : 0;
  }
  return static_cast<uint64_t>(count_of_sets(experts, top_k));
}

template <int N, class Code>
void drive(const Code& code, int64_t num_rows, int64_t num_layers) {
  const int experts = code.num_experts, top_k = code.top_k;
  const int64_t row_bytes = (num_layers * code.bits() + 7) / 8, items = num_rows * num_layers;
  std::vector<int> indices;
  for (int64_t item = 0; item < items; ++item) {
    const std::vector<int64_t> order = shuffled(experts);
    indices.insert(indices.end(), order.begin(), order.begin() + top_k);
  }
  const auto read = [&](int64_t row, int64_t layer, int k) -> int64_t {
    return indices.at((row * num_layers + layer) * top_k + k);
  };

  // Two sentinels: a byte that still holds either was not written.
  std::unique_ptr<uint8_t[]> rows(new uint8_t[num_rows * row_bytes]), again(new uint8_t[num_rows * row_bytes]);
  std::fill_n(rows.get(), num_rows * row_bytes, 0x5a);
  std::fill_n(again.get(), num_rows * row_bytes, 0xa5);
  for (int64_t group : shuffled(num_rows * num_groups(num_layers))) {
    require(pack_group<N>(code, num_layers, row_bytes, rows.get(), read, group) == -1, "legal indices are packed");
  }
  for (int64_t group : shuffled(num_rows * num_groups(num_layers))) {
    pack_group<N>(code, num_layers, row_bytes, again.get(), read, group);
  }
  require(std::equal(rows.get(), rows.get() + num_rows * row_bytes, again.get()), "every byte of the rows is written");

  // Rows as a slice of wider ones, whose last ends where the allocation ends.
  const int64_t stride = row_bytes + 3;
  std::unique_ptr<uint8_t[]> wide(new uint8_t[(num_rows - 1) * stride + row_bytes]);
  for (int64_t row = 0; row < num_rows; ++row) {
    std::copy_n(rows.get() + row * row_bytes, row_bytes, wide.get() + row * stride);
  }
  const PackedRows all{wide.get(), stride, row_bytes, num_layers, 0, num_layers};
  std::unique_ptr<int[]> found(new int[items * top_k]);
  std::unique_ptr<bool[]> legal(new bool[items]());
  std::fill_n(found.get(), items * top_k, -7);
  for (int64_t task : shuffled((items + N - 1) / N)) {
    const int64_t illegal = unpack_items<N>(code, all, items, task * N, [&](int64_t item, int k, int expert) {
      found[item * top_k + k] = expert;
    });
    require(illegal == -1, "packed rows are legal");
    check_items<N>(code, all, items, task * N, legal.get());
  }
  require(std::all_of(legal.get(), legal.get() + items, [](bool each) { return each; }), "packed rows pass the check");
  const int64_t middle = num_layers / 2;
  const PackedRows layer{wide.get(), stride, row_bytes, num_layers, middle, 1};
  for (int64_t task : shuffled((num_rows + N - 1) / N)) {
    unpack_items<N>(code, layer, num_rows, task * N, [&](int64_t row, int k, int expert) {
      require(found[(row * num_layers + middle) * top_k + k] == expert, "a layer by itself reads as among all");
    });
  }
  for (int64_t item = 0; item < items; ++item) {
    int* const first = found.get() + item * top_k;
    std::sort(first, first + top_k);
    std::sort(indices.begin() + item * top_k, indices.begin() + (item + 1) * top_k);
    require(std::equal(first, first + top_k, indices.begin() + item * top_k), "the experts come back");
  }

  // An expert twice, and one out of range: found, and marked by a field that is illegal if any field of the code is.
  const bool has_mark = code.bits() >= 63 || legal_fields<Code>(code) < (uint64_t{1} << code.bits());
  for (const int wrong : {indices.at(0), experts, -1, INT32_MAX, INT32_MIN}) {
    if (top_k == 1 && wrong == indices.at(0)) continue;
    const int right = indices.at(top_k - 1);
    indices.at(top_k - 1) = wrong;
    require(pack_group<N>(code, num_layers, row_bytes, rows.get(), read, 0) == 0, "illegal indices are found");
    check_group<N, Code::KMax>(experts, top_k, num_layers, read, 0, legal.get());
    require(!legal[0], "illegal indices do not pass the check");
    const PackedRows packed{rows.get(), row_bytes, row_bytes, num_layers, 0, num_layers};
    const int64_t illegal = unpack_items<N>(code, packed, items, 0, [&](int64_t item, int, int expert) {
      require(expert >= 0 && expert <= experts, "what is read is an expert, or E");
      require(item != 0 || !has_mark || expert == experts, "an illegal field reads as E");
    });
    require(illegal == (has_mark ? 0 : -1), "illegal indices leave an illegal field");
    indices.at(top_k - 1) = right;
  }

  // Any bytes at all: nothing is read or written out of bounds.
  for (int64_t row = 0; row < num_rows; ++row) {
    std::generate_n(wide.get() + row * stride, row_bytes, [] { return static_cast<uint8_t>(generator()); });
  }
  for (int64_t task = 0; task < (items + N - 1) / N; ++task) {
    unpack_items<N>(code, all, items, task * N, [&](int64_t item, int k, int expert) {
      require(expert >= 0 && expert <= experts, "what is read is an expert, or E");
      found[item * top_k + k] = expert;
    });
  }
}

template <int KMax, int N>
void drive_all(int experts, int top_k, int64_t num_rows, int64_t num_layers) {
  drive<N>(BitsetCode<KMax>{experts, top_k}, num_rows, num_layers);
  int index_bits = 0;
  while ((1 << index_bits) < experts) ++index_bits;
  drive<N>(OrderedCode<KMax>{experts, top_k, index_bits}, num_rows, num_layers);
  const Wide sets = count_of_sets(experts, top_k);
  if (sets == ~Wide{0}) return;
  int width = 0;
  for (Wide rest = sets - 1; rest != 0; rest >>= 1) ++width;
  if (width >= 64) {
    return drive<N>(RankCode<KMax, Wide, Bisection<Wide>>{experts, top_k, width, sets, Bisection<Wide>(experts)}, num_rows, num_layers);
  }
  const uint64_t narrow = static_cast<uint64_t>(sets);
  drive<N>(RankCode<KMax, uint64_t, Bisection<uint64_t>>{experts, top_k, width, narrow, Bisection<uint64_t>(experts)}, num_rows, num_layers);
  drive<N>(RankCode<KMax, uint64_t, Guess>{experts, top_k, width, narrow, Guess::of(experts, top_k)}, num_rows, num_layers);
}

}  // namespace

int main() {
  const int geometries[][2] = {{1, 1}, {8, 2}, {8, 8}, {9, 8}, {60, 4}, {64, 8}, {65, 3}, {128, 1}, {128, 8}, {256, 8},
                               {384, 8}, {512, 8}, {1024, 8}, {1023, 5}};
  const int more[][2] = {{67, 33}, {64, 32}, {512, 10}, {512, 22}, {64, 64}, {1024, 64}, {66, 64}, {130, 16}};
  for (const int64_t num_layers : {1, 7, 8, 9, 17}) {
    for (const auto& [experts, top_k] : geometries) {
      drive_all<8, 1>(experts, top_k, 3, num_layers);
      drive_all<8, 8>(experts, top_k, 3, num_layers);
    }
    for (const auto& [experts, top_k] : more) {
      if (top_k <= 16) drive_all<16, 1>(experts, top_k, 2, num_layers);
      drive_all<kMaxTopK, 1>(experts, top_k, 2, num_layers);
      drive_all<kMaxTopK, 8>(experts, top_k, 2, num_layers);
    }
  }
  std::printf("all well\n");
  return 0;
}
