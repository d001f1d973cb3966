// Drives csrc/mask_codec.h as the CUDA kernels do, one lane to a thread and in any order, and as the CPU ops do.
// Buffers have their exact sizes, so that a sanitizer sees every access beyond them.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "codes.h"
#include "guess.h"
#include "mask_codec.h"

using namespace routing_masks;

namespace {

std::mt19937 generator(0);

void demand(bool condition, const char* what) {
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

// The searches for ranks that the kernels of either device use.
struct OnDevice {
  using NarrowSearch = Bisection<uint64_t>;
};
struct OnHost {
  using NarrowSearch = Guess;
};

// Whether some field of the code is illegal. Codes without order have one legal field for each set.
template <class Code>
bool has_illegal_field(const Code& code) {
  const int experts = code.num_experts, top_k = code.top_k;
  if constexpr (std::is_same_v<Code, OrderedCode<Code::KMax>>) return top_k > 1 || (experts & (experts - 1)) != 0;
  return code.bits() >= 63 || count_of_sets(experts, top_k) < Wide{1} << code.bits();
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
    demand(pack_group<N>(code, num_layers, row_bytes, rows.get(), read, group) == -1, "legal indices are packed");
  }
  for (int64_t group : shuffled(num_rows * num_groups(num_layers))) {
    pack_group<N>(code, num_layers, row_bytes, again.get(), read, group);
  }
  demand(std::equal(rows.get(), rows.get() + num_rows * row_bytes, again.get()), "every byte of the rows is written");

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
    demand(illegal == -1, "packed rows are legal");
    check_items<N>(code, all, items, task * N, legal.get());
  }
  demand(std::all_of(legal.get(), legal.get() + items, [](bool each) { return each; }), "packed rows pass the check");
  const int64_t middle = num_layers / 2;
  const PackedRows layer{wide.get(), stride, row_bytes, num_layers, middle, 1};
  for (int64_t task : shuffled((num_rows + N - 1) / N)) {
    unpack_items<N>(code, layer, num_rows, task * N, [&](int64_t row, int k, int expert) {
      demand(found[(row * num_layers + middle) * top_k + k] == expert, "a layer by itself reads as among all");
    });
  }
  for (int64_t item = 0; item < items; ++item) {
    int* const first = found.get() + item * top_k;
    std::sort(first, first + top_k);
    std::sort(indices.begin() + item * top_k, indices.begin() + (item + 1) * top_k);
    demand(std::equal(first, first + top_k, indices.begin() + item * top_k), "the experts come back");
  }

  // An expert twice, and one out of range: found, and marked by a field that is illegal if any field of the code is.
  const bool has_mark = has_illegal_field(code);
  for (const int wrong : {indices.at(0), experts, -1, INT32_MAX, INT32_MIN}) {
    if (top_k == 1 && wrong == indices.at(0)) continue;
    const int right = indices.at(top_k - 1);
    indices.at(top_k - 1) = wrong;
    demand(pack_group<N>(code, num_layers, row_bytes, rows.get(), read, 0) == 0, "illegal indices are found");
    check_group<N, Code::KMax>(experts, top_k, num_layers, read, 0, legal.get());
    demand(!legal[0], "illegal indices do not pass the check");
    const PackedRows packed{rows.get(), row_bytes, row_bytes, num_layers, 0, num_layers};
    const int64_t illegal = unpack_items<N>(code, packed, items, 0, [&](int64_t item, int, int expert) {
      demand(expert >= 0 && expert <= experts, "what is read is an expert, or E");
      demand(item != 0 || !has_mark || expert == experts, "an illegal field reads as E");
    });
    demand(illegal == (has_mark ? 0 : -1), "illegal indices leave an illegal field");
    indices.at(top_k - 1) = right;
  }

  // Any bytes at all: nothing is read or written out of bounds.
  for (int64_t row = 0; row < num_rows; ++row) {
    std::generate_n(wide.get() + row * stride, row_bytes, [] { return static_cast<uint8_t>(generator()); });
  }
  for (int64_t task = 0; task < (items + N - 1) / N; ++task) {
    unpack_items<N>(code, all, items, task * N, [&](int64_t item, int k, int expert) {
      demand(expert >= 0 && expert <= experts, "what is read is an expert, or E");
      found[item * top_k + k] = expert;
    });
  }
}

template <int KMax, int N>
void drive_all(int experts, int top_k, int64_t num_rows, int64_t num_layers) {
  const Wide sets = count_of_sets(experts, top_k);
  const auto run = [&](const auto& code) { drive<N>(code, num_rows, num_layers); };
  Codecs::for_each([&](auto codec) {
    using Codec = decltype(codec);
    if (std::is_same_v<Codec, Rank> && sets == ~Wide{0}) return;
    Codec::template with_code<KMax, OnDevice>(experts, top_k, run);
  });
  if (sets >> 63 == 0) Rank::with_code<KMax, OnHost>(experts, top_k, run);
}

void look_up_names() {
  Codecs::for_each([](auto each) {
    int calls = 0;
    Codecs::with(each.kName, [&](auto found) { calls += std::is_same_v<decltype(each), decltype(found)> ? 1 : 100; });
    demand(calls == 1, "a name leads to its codec");
  });
  try {
    Codecs::with("zip", [](auto) { demand(false, "an unknown name leads to no codec"); });
    demand(false, "an unknown name is refused");
  } catch (const std::runtime_error& error) {
    const std::string expected = "routing_masks: unknown codec 'zip': the kernels know " + Codecs::names();
    demand(error.what() == expected, "an unknown name is refused with those known");
  }
}

}  // namespace

int main() {
  look_up_names();
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
