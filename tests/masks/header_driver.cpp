// Drives csrc/mask_codec.h as the CUDA kernels do, one lane to a thread and in any order, and as the CPU ops do.
// Buffers have their exact sizes, so that a sanitizer sees every access beyond them.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
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

  const PackedRows packed{rows.get(), row_bytes, row_bytes, num_layers, 0, num_layers};
  std::unique_ptr<int[]> found(new int[items * top_k]);
  std::fill_n(found.get(), items * top_k, -7);
  for (int64_t task : shuffled((items + N - 1) / N)) {
    const int64_t illegal = unpack_items<N>(code, packed, items, task * N, [&](int64_t item, int k, int expert) {
      found[item * top_k + k] = expert;
    });
    require(illegal == -1, "packed rows are legal");
    require(check_items<N>(code, packed, items, task * N) == -1, "packed rows pass the check");
  }
  for (int64_t item = 0; item < items; ++item) {
    int* const first = found.get() + item * top_k;
    std::sort(first, first + top_k);
    std::sort(indices.begin() + item * top_k, indices.begin() + (item + 1) * top_k);
    require(std::equal(first, first + top_k, indices.begin() + item * top_k), "the experts come back");
  }

  // An expert twice, and one out of range: marked so that a check finds it, where the code has a mark.
  for (const int wrong : {indices.at(0), experts, -1}) {
    if (top_k == 1 && wrong == indices.at(0)) continue;
    const int right = indices.at(top_k - 1);
    indices.at(top_k - 1) = wrong;
    require(pack_group<N>(code, num_layers, row_bytes, rows.get(), read, 0) == 0, "illegal indices are found");
    const int64_t illegal = check_items<N>(code, packed, items, 0);
    bool kept = false;
    unpack_items<N>(code, packed, items, 0, [&](int64_t item, int, int expert) {
      require(expert >= 0 && expert <= experts, "what is read is an expert, or E");
      kept |= item == 0 && expert < experts;
    });
    require(kept == (illegal != 0), "an illegal field reads as E");
    indices.at(top_k - 1) = right;
  }

  // Any bytes at all: nothing is read or written out of bounds.
  for (int64_t byte = 0; byte < num_rows * row_bytes; ++byte) rows[byte] = static_cast<uint8_t>(generator());
  for (int64_t task = 0; task < (items + N - 1) / N; ++task) {
    unpack_items<N>(code, packed, items, task * N, [&](int64_t item, int k, int expert) {
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
      drive_all<kMaxTopK, 1>(experts, top_k, 2, num_layers);
      drive_all<kMaxTopK, 8>(experts, top_k, 2, num_layers);
    }
  }
  std::printf("all well\n");
  return 0;
}
