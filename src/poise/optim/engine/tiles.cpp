// The multi-tensor driver: runs a list of compiled kernels over tiles of many tensors, on several threads.
//
// A tile is a piece of one tensor. For each tile the kernels run one after another (decode the state, apply the rule, round
// the weights, encode the state), handing values on through a scratch that stays in the core's cache. Tensors stay where they
// are; nothing is copied but the last, short block of a row whose length no block divides.
//
// Everything arrives as flat arrays of int64, laid out as tiles.py says. No torch headers: this file compiles in a second.

#include <cstdint>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

using Run = void (*)(char**, int64_t);

enum Source : int64_t { COLUMN = 0, SCRATCH = 1, NOISE = 2, PARTIAL = 3 };

// One argument of a kernel: where it is, and how far a tile's offset moves it.
struct Arg {
  int64_t source;   // Source
  int64_t index;    // column of the pointer table, number of the scratch, or byte offset within a tile's partial results
  int64_t block;    // elements per block (1: elementwise; 0: does not move with the tile)
  int64_t bytes;    // bytes stored per block
  int64_t entry;    // bytes of one stored entry
  int64_t entries;  // stored per block
};

struct Op {
  Run run;
  int64_t block;    // the kernel counts in blocks of this many elements
  int64_t first;    // its arguments in the list of all arguments
  int64_t count;
};

struct Tile {
  int64_t tensor, offset, length, index;  // index: global element index of its first element
};

// A tile in blocks of one size. Divisions cost more than anything else here, so they are made once for each size.
struct Cut {
  int64_t block = 0;
  int64_t units;               // blocks of the tile, the last one perhaps short
  int64_t full, rest;          // whole blocks, and elements behind them
  int64_t rows_before, before; // whole rows before it, and whole blocks before it in its row
  int64_t row_full, row_rest;  // the same of a row
  bool ragged;

  void of(const Tile& tile, int64_t row, int64_t size) {
    block = size;
    full = tile.length / size;
    rest = tile.length - full * size;
    ragged = rest != 0;
    units = full + ragged;
    rows_before = tile.offset / row;
    before = (tile.offset - rows_before * row) / size;
    row_full = row / size;
    row_rest = row - row_full * size;
  }
};

// Bytes of whole blocks and of a short one, which stores at most as many entries as it has elements.
int64_t stored(const Arg& arg, int64_t full, int64_t rest) {
  return full * arg.bytes + (rest < arg.entries ? rest : arg.entries) * arg.entry;
}

struct Scratch {
  std::vector<char> memory;
  std::vector<char*> pointers;
  std::vector<char*> homes;    // where a padded copy belongs; null: worked on in place
  char* base = nullptr;
  void reserve(int64_t bytes, int64_t arguments) {
    if (static_cast<int64_t>(memory.size()) < bytes + 64) memory.resize(bytes + 64);
    base = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
    if (static_cast<int64_t>(pointers.size()) < arguments) pointers.resize(arguments), homes.resize(arguments);
  }
};
thread_local Scratch scratch;

}  // namespace

extern "C" void poise_launch(const Op* ops, int64_t op_count, const Arg* args, const int64_t* table, int64_t columns,
                             const int64_t* rows,   // per tensor: elements of a row
                             const int32_t* keys,   // per tensor: key of its noise in this step
                             const Tile* tiles, int64_t tile_count, int64_t scratch_count, int64_t scratch_bytes,
                             int64_t longest, char* partial, int64_t partial_bytes, int64_t threads) {
  int64_t widest = 0;
  for (int64_t o = 0; o < op_count; ++o) widest = ops[o].count > widest ? ops[o].count : widest;
  // room behind the scratch for the padded last block of a row, one piece for each argument
  const int64_t stage_bytes = (longest + 4096) * 8;

#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(threads)) if (threads > 1)
  for (int64_t t = 0; t < tile_count; ++t) {
    const Tile& tile = tiles[t];
    Scratch& own = scratch;
    own.reserve(scratch_count * scratch_bytes + widest * stage_bytes, widest);
    char* const stage = own.base + scratch_count * scratch_bytes;
    char** const pointers = own.pointers.data();
    char** const homes = own.homes.data();
    const int64_t* const entries = table + tile.tensor * columns;
    int32_t noise[2] = {keys[tile.tensor] + static_cast<int32_t>(tile.index >> 32) * 0x27D4EB2F, static_cast<int32_t>(tile.index)};
    Cut cut;

    for (int64_t o = 0; o < op_count; ++o) {
      const Op& op = ops[o];
      if (cut.block != op.block) cut.of(tile, rows[tile.tensor], op.block);
      for (int64_t a = 0; a < op.count; ++a) {
        const Arg& arg = args[op.first + a];
        char*& pointer = pointers[a];
        homes[a] = nullptr;
        if (arg.source == SCRATCH) {
          pointer = own.base + arg.index * scratch_bytes;
          if (cut.ragged) std::memset(pointer + tile.length * arg.bytes, 0, (cut.units * op.block - tile.length) * arg.bytes);
        } else if (arg.source == NOISE) {
          pointer = reinterpret_cast<char*>(noise);
        } else if (arg.source == PARTIAL) {
          pointer = partial + t * partial_bytes + arg.index;
        } else {
          pointer = reinterpret_cast<char*>(entries[arg.index]);
          if (arg.block == 1) {
            pointer += tile.offset * arg.bytes;
          } else if (arg.block > 1) {  // the op's own block
            pointer += cut.rows_before * stored(arg, cut.row_full, cut.row_rest) + cut.before * arg.bytes;
            const int64_t padded = cut.units * arg.bytes, have = stored(arg, cut.full, cut.rest);
            if (have != padded) {  // work on a padded copy
              homes[a] = pointer;
              pointer = stage + a * stage_bytes;
              std::memset(pointer, 0, padded);
              std::memcpy(pointer, homes[a], have);
            }
          }
        }
      }
      op.run(pointers, cut.units);
      for (int64_t a = 0; a < op.count; ++a) {
        if (homes[a] != nullptr) std::memcpy(homes[a], pointers[a], stored(args[op.first + a], cut.full, cut.rest));
      }
    }
  }
}
