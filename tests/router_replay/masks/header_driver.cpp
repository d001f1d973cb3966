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

#include "block.h"
#include "codes.h"
#include "guess.h"
#include "mask_codec.h"
#include "warp.h"

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
  template <class Rank>
  using Search = Bisection<Rank>;
};
struct OnHost {
  template <class Rank>
  using Search = Guess<Rank>;
};

// Whether some field of the code is illegal. Codes without order have one legal field for each set.
template <class Code>
bool has_illegal_field(const Code& code) {
  const int experts = code.num_experts, top_k = code.top_k;
  if constexpr (std::is_same_v<Code, OrderedCode<Code::KMax>>) return top_k > 1 || (experts & (experts - 1)) != 0;
  return code.bits() >= 63 || count_of_sets(experts, top_k) < Wide{1} << code.bits();
}

// Packs as a block of CUDA threads does, its threads in any order between two barriers, to rows that begin anywhere, and
// finds the bytes of `expected` and no illegal layer but those of row 0 if `first_is_illegal`.
template <class Code, class Load>
void drive_block(
    const Code& code, const Load& load, int64_t num_rows, int64_t num_layers, const uint8_t* expected,
    bool first_is_illegal) {
  const Tiling tiling = Tiling::of(num_rows, num_layers);
  const int64_t row_bytes = (num_layers * code.bits() + 7) / 8, all = num_rows * row_bytes;
  for (const int offset : {0, 1, 15}) {
    std::unique_ptr<Chunk[]> memory(new Chunk[(offset + all) / sizeof(Chunk) + 2]);
    uint8_t* const bytes = reinterpret_cast<uint8_t*>(memory.get());
    std::fill_n(bytes, offset + all + 16, 0x5a);
    std::vector<int> illegal(num_rows, 0);
    for (int64_t tile : shuffled(tiling.num_tiles())) {
      for (int64_t number : shuffled(tiling.num_passes())) {
        std::unique_ptr<Chunk[]> shared(new Chunk[Tiling::shared_bytes(code.bits()) / sizeof(Chunk)]);
        const PackingPass<Code> pass(
            code, tiling, row_bytes, bytes + offset, shared.get(), tile, static_cast<int>(number));
        for (int64_t thread : shuffled(kBlockThreads)) pass.clear(static_cast<int>(thread));
        for (int64_t thread : shuffled(kBlockThreads)) {
          int row;
          if (!pass.put(load, static_cast<int>(thread), &row)) illegal.at(pass.first_row() + row) = 1;
        }
        for (int64_t thread : shuffled(kBlockThreads)) pass.store(static_cast<int>(thread));
      }
    }
    demand(std::equal(expected, expected + all, bytes + offset), "a block packs the same bytes");
    demand(std::count(bytes, bytes + offset, 0x5a) == offset, "a block writes nothing before the rows");
    demand(std::count(bytes + offset + all, bytes + offset + all + 16, 0x5a) == 16, "a block writes nothing behind");
    for (int64_t row = 0; row < num_rows; ++row) {
      demand(illegal.at(row) == (row == 0 && first_is_illegal), "a block finds what is illegal");
    }
  }
}

// Calls run with the code that searches in a table, as a block has it in shared memory.
template <class Code, class Run>
void run_in_table(const Code& code, const Run& run) {
  std::unique_ptr<uint64_t[]> table(new uint64_t[code.table_words()]);
  for (int64_t thread : shuffled(7)) code.fill_table(table.get(), static_cast<int>(thread), 7);
  run(code.in_table(table.get()));
}

template <class Code, class Run>
void with_tables(const Code&, const Run&) {}

template <int KMax, class Number, class Run>
void with_tables(const RankCode<KMax, Number, Bisection<Number>>& code, const Run& run) {
  run_in_table(code, run);
}

template <int KMax, class Run>
void with_tables(const RankCode<KMax, Wide, Split<Bisection<Wide>, Bisection<uint64_t>>>& code, const Run& run) {
  run_in_table(code, run);
}

// Calls run with the code that a warp reads by, which is another one where there is a plan of a table for it.
template <class Code, class Run>
void with_estimates(const Code& code, const Run& run) {
  run(code);
}

template <int KMax, class Number, class Search, class Run>
void run_planned(const RankCode<KMax, Number, Search>& code, const Run& run) {
  if constexpr (KMax <= kEstimatedPlaces) {
    const auto plan = EstimatePlan<KMax>::of(code.num_experts, code.top_k);
    std::unique_ptr<uint64_t[]> table(new uint64_t[plan.words]);
    for (int64_t thread : shuffled(7)) plan.fill(table.get(), static_cast<int>(thread), 7);
    run(code.template searching<KMax>(Estimates<KMax>(plan, table.get())));
  } else {
    run(code);
  }
}

template <int KMax, class Number, class Run>
void with_estimates(const RankCode<KMax, Number, Bisection<Number>>& code, const Run& run) {
  run_planned(code, run);
}

template <int KMax, class Run>
void with_estimates(const RankCode<KMax, Wide, Split<Bisection<Wide>, Bisection<uint64_t>>>& code, const Run& run) {
  run_planned(code, run);
}

// Reads as warps of CUDA threads do, their lanes in any order between two barriers, to places that begin anywhere.
template <class Tile, class Number, class Code, class MakeTarget>
void drive_warps(
    const Code& code, const PackedRows& packed, const MakeTarget& target_of, int64_t width,
    const std::vector<Number>& expected) {
  const int64_t items = packed.num_items();
  for (const int64_t offset : {0, 1, 3}) {
    std::unique_ptr<Chunk[]> memory(new Chunk[(offset + items * width + 16) * sizeof(Number) / sizeof(Chunk) + 1]);
    Number* const out = reinterpret_cast<Number*>(memory.get());
    std::fill_n(out, offset + items * width + 16, Number{0x5a});
    const typename Tile::Target target = target_of(out + offset);
    // Two warps, which take every second tile.
    for (const int64_t warp : {1, 0}) {
      std::vector<ItemWalk> walks;
      for (int lane = 0; lane < kWarpLanes; ++lane) {
        walks.emplace_back(packed, warp * kWarpLanes + lane, 2 * kWarpLanes);
      }
      for (int64_t first = warp * kWarpLanes; first < items; first += 2 * kWarpLanes) {
        const int count = static_cast<int>(std::min<int64_t>(items - first, kWarpLanes));
        std::unique_ptr<Chunk[]> shared(new Chunk[Tile::shared_chunks(code)]);
        std::fill_n(shared.get(), Tile::shared_chunks(code), Chunk{{~0u, ~0u, ~0u, ~0u}});
        const Tile tile(code, target, shared.get());
        for (int64_t lane : shuffled(kWarpLanes)) tile.clear(static_cast<int>(lane));
        for (int64_t lane : shuffled(count)) tile.put(static_cast<int>(lane), walks[lane].field(code.bits()));
        for (int64_t lane : shuffled(kWarpLanes)) tile.store(static_cast<int>(lane), first, count);
        for (ItemWalk& walk : walks) walk.next();
      }
    }
    demand(std::equal(expected.begin(), expected.end(), out + offset), "warps read the same");
    const auto untouched = [](Number each) { return each == Number{0x5a}; };
    demand(std::all_of(out, out + offset, untouched), "a warp writes nothing before");
    demand(std::all_of(out + offset + items * width, out + offset + items * width + 16, untouched), "nor behind");
  }
}

// Reads the rows by warps, indices of every dtype and maps, and finds what a lane by itself finds.
template <class Code>
void drive_reading(const Code& code, const PackedRows& packed) {
  const int64_t top_k = code.top_k, experts = code.num_experts, items = packed.num_items();
  std::vector<int64_t> expected(items * top_k, -7);
  std::vector<uint8_t> maps(items * experts, 0);
  for (int64_t item = 0; item < items; ++item) {
    unpack_items<1>(code, packed, items, item, [&](int64_t at, int k, int expert) {
      expected.at(at * top_k + k) = expert;
      if (expert < experts) maps.at(at * experts + expert) = 1;
    });
  }
  with_estimates(code, [&](const auto& reading) {
    using Reading = std::decay_t<decltype(reading)>;
    const auto drive_indices = [&](auto example, int log_bytes) {
      using Index = decltype(example);
      const std::vector<Index> indices(expected.begin(), expected.end());
      const auto target = [&](Index* out) { return IndicesTarget{out, log_bytes}; };
      drive_warps<IndicesTile<Reading>>(reading, packed, target, top_k, indices);
    };
    drive_indices(int16_t{}, 1);
    drive_indices(int32_t{}, 2);
    drive_indices(int64_t{}, 3);
    const auto target = [](uint8_t* out) { return reinterpret_cast<bool*>(out); };
    drive_warps<MapTile<Reading>>(reading, packed, target, experts, maps);
  });
}

// An estimate is right or one too high at the first and the last number of every expert at every place, and between them
// since it never falls: neither does a number's key, nor its part, nor the line from one key to the next.
void check_estimates() {
  const auto holds = [](int i, Wide number, int c) {
    const Located wide = locate(number);
    const int found = estimate(kEstimates.at[i][wide.key], wide.part);
    bool right = found == c || found == c + 1;
    if (number <= Wide{1} << 63) {
      const Located narrow = locate(static_cast<uint64_t>(number));
      const int again = estimate(kEstimates.at[i][narrow.key], narrow.part);
      right &= again == c || again == c + 1;
    }
    return right;
  };
  for (int i = 2; i <= kEstimatedPlaces; ++i) {
    for (int c = i - 1; c < kMaxExperts; ++c) {
      demand(holds(i, kBinomials128.at[i][c] + 1, c), "the estimate of an expert's first number");
      demand(holds(i, count_of_sets(c + 1, i), c), "the estimate of an expert's last number");
    }
    for (int key = 0; key + 1 < kKeys; ++key) {
      const uint32_t line = kEstimates.at[i][key], next = kEstimates.at[i][key + 1];
      demand((line >> 16) + (line & 0xffff) == next >> 16, "a line ends where the next one begins");
    }
  }
}

// Loads of aligned words find what loads at any byte find, and nothing is read outside of the rows' memory.
void check_aligned_reading() {
  for (int bytes = 1; bytes <= 26; ++bytes) {
    for (int offset = 0; offset < 8; ++offset) {
      std::unique_ptr<uint8_t[]> memory(new uint8_t[offset + bytes]);
      std::generate_n(memory.get(), offset + bytes, [] { return static_cast<uint8_t>(generator()); });
      const uint8_t* const row = memory.get() + offset;
      const Field field{row, row + bytes, row, 0};
      for (int first = 0; first < 8 * bytes; ++first) {
        for (int count = 0; count <= 64 && first + count <= 8 * bytes; ++count) {
          uint64_t expected = 0;
          for (int bit = 0; bit < count; ++bit) {
            expected |= static_cast<uint64_t>(row[(first + bit) / 8] >> (first + bit) % 8 & 1) << bit;
          }
          demand(read_aligned(field, first, count) == expected, "bits by aligned words");
          demand(read_anywhere(field, first, count) == expected, "bits by words anywhere");
        }
      }
    }
  }
}

// Rows of the one set of all experts have no bytes, and a tensor of them has no memory but may have a stride.
void read_rows_of_no_bytes() {
  const auto read = [](const auto& code) {
    if (code.bits() == 0) drive_reading(code, PackedRows{nullptr, 70, 1, 0, 3, 0, 3});
  };
  Rank::with_code<8, OnDevice>(8, 8, read);
  Rank::with_code<kMaxTopK, OnDevice>(64, 64, read);
  Ordered::with_code<8, OnDevice>(1, 1, read);
}

void drive_resets() {
  const int64_t row_size = 9;
  for (const int64_t kept : {0, 3, 5, 7, 11, 12}) {
    for (const int64_t first : {0, 3}) {
      for (const int64_t last : {3, 7, 12}) {
        std::unique_ptr<int16_t[]> staging(new int16_t[12 * row_size]);
        std::fill_n(staging.get(), 12 * row_size, int16_t{7});
        for (int64_t thread : shuffled(5)) reset_rows(staging.get(), row_size, first, last, kept, thread, 5);
        for (int64_t at = 0; at < 12 * row_size; ++at) {
          const int64_t row = at / row_size;
          const bool set_back = row >= first && row < last && row != kept;
          demand(staging[at] == (set_back ? kUnwritten : 7), "rows are set back, and no others");
        }
      }
    }
  }
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
  const auto load = [&](auto& experts, int64_t row, int64_t layer) {
    load_lane(experts, 0, top_k, [&](int k) { return read(row, layer, k); });
  };
  const auto pack_in_blocks = [&](bool first_is_illegal) {
    if constexpr (N == 1) {
      drive_block(code, load, num_rows, num_layers, rows.get(), first_is_illegal);
      with_tables(code, [&](const auto& in_table) {
        drive_block(in_table, load, num_rows, num_layers, rows.get(), first_is_illegal);
      });
    }
  };
  pack_in_blocks(false);

  // Rows as a slice of wider ones, whose last ends where the allocation ends.
  const int64_t stride = row_bytes + 3;
  std::unique_ptr<uint8_t[]> wide(new uint8_t[(num_rows - 1) * stride + row_bytes]);
  for (int64_t row = 0; row < num_rows; ++row) {
    std::copy_n(rows.get() + row * row_bytes, row_bytes, wide.get() + row * stride);
  }
  const PackedRows all{wide.get(), num_rows, stride, row_bytes, num_layers, 0, num_layers};
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
  const PackedRows layer{wide.get(), num_rows, stride, row_bytes, num_layers, middle, 1};
  for (int64_t task : shuffled((num_rows + N - 1) / N)) {
    unpack_items<N>(code, layer, num_rows, task * N, [&](int64_t row, int k, int expert) {
      demand(found[(row * num_layers + middle) * top_k + k] == expert, "a layer by itself reads as among all");
    });
  }
  const auto read_by_warps = [&] {
    if constexpr (N == 1) {
      drive_reading(code, all);
      drive_reading(code, layer);
    }
  };
  read_by_warps();
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
    if (wrong == experts) {
      // The indices are in another order by now.
      for (int64_t group : shuffled(num_rows * num_groups(num_layers))) {
        pack_group<N>(code, num_layers, row_bytes, rows.get(), read, group);
      }
      pack_in_blocks(true);
    }
    check_group<N, Code::KMax>(experts, top_k, num_layers, read, 0, legal.get());
    demand(!legal[0], "illegal indices do not pass the check");
    const PackedRows packed{rows.get(), num_rows, row_bytes, row_bytes, num_layers, 0, num_layers};
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
  read_by_warps();
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
  if (sets != ~Wide{0}) Rank::with_code<KMax, OnHost>(experts, top_k, run);
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
  drive_resets();
  check_estimates();
  check_aligned_reading();
  read_rows_of_no_bytes();
  const int geometries[][2] = {{1, 1}, {8, 2}, {8, 8}, {9, 8}, {60, 4}, {64, 8}, {65, 3}, {128, 1}, {128, 8}, {256, 8},
                               {384, 8}, {512, 8}, {1024, 8}, {1023, 5}};
  const int more[][2] = {{67, 33}, {64, 32}, {512, 10}, {512, 22}, {64, 64}, {1024, 64}, {66, 64}, {130, 16}};
  for (const int64_t num_layers : {1, 7, 8, 9, 17}) {
    for (const auto& [experts, top_k] : geometries) {
      drive_all<8, 1>(experts, top_k, 3, num_layers);
      drive_all<8, 8>(experts, top_k, 3, num_layers);
    }
    for (const auto& [experts, top_k] : more) {
      if (top_k <= 16) {
        drive_all<16, 1>(experts, top_k, 2, num_layers);
        drive_all<16, 8>(experts, top_k, 2, num_layers);
      }
      drive_all<kMaxTopK, 1>(experts, top_k, 2, num_layers);
      drive_all<kMaxTopK, 8>(experts, top_k, 2, num_layers);
    }
  }
  // Rows that are longer than what a block packs at a time, many rows in a tile, and a last tile that is not full.
  for (const int64_t num_layers : {2, 94, 255, 256, 257, 600}) {
    drive_all<8, 1>(60, 4, 37, num_layers);
    drive_all<16, 1>(512, 10, 5, num_layers);
  }
  std::printf("all well\n");
  return 0;
}
