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

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes that `elements` of a row take: the last block stores at most as many entries as it has elements.
int64_t stored(const Arg& arg, int64_t elements) {
  const int64_t entries = arg.bytes / arg.entry, full = elements / arg.block, rest = elements % arg.block;
  return full * arg.bytes + (rest < entries ? rest : entries) * arg.entry;
}

struct Scratch {
  std::vector<char> memory;
  char* base = nullptr;
  void reserve(int64_t bytes) {
    if (static_cast<int64_t>(memory.size()) < bytes + 64) memory.resize(bytes + 64);
    base = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64);
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
    scratch.reserve(scratch_count * scratch_bytes + widest * stage_bytes);
    char* stage = scratch.base + scratch_count * scratch_bytes;
    const int64_t row = rows[tile.tensor];
    int32_t noise[2] = {keys[tile.tensor] + static_cast<int32_t>(tile.index >> 32) * 0x27D4EB2F, static_cast<int32_t>(tile.index)};
    std::vector<char*> pointers(widest);
    std::vector<int64_t> valid(widest);

    for (int64_t o = 0; o < op_count; ++o) {
      const Op& op = ops[o];
      const int64_t units = ceil_div(tile.length, op.block);
      const bool ragged = units * op.block != tile.length;
      for (int64_t a = 0; a < op.count; ++a) {
        const Arg& arg = args[op.first + a];
        char*& pointer = pointers[a];
        valid[a] = 0;
        if (arg.source == SCRATCH) {
          pointer = scratch.base + arg.index * scratch_bytes;
          if (ragged) std::memset(pointer + tile.length * arg.bytes, 0, (units * op.block - tile.length) * arg.bytes);
        } else if (arg.source == NOISE) {
          pointer = reinterpret_cast<char*>(noise);
        } else if (arg.source == PARTIAL) {
          pointer = partial + t * partial_bytes + arg.index;
        } else {
          pointer = reinterpret_cast<char*>(table[tile.tensor * columns + arg.index]);
          if (arg.block == 1) {
            pointer += tile.offset * arg.bytes;
          } else if (arg.block > 1) {
            pointer += tile.offset / row * stored(arg, row) + tile.offset % row / arg.block * arg.bytes;
            const int64_t padded = units * arg.bytes, have = stored(arg, tile.length);
            if (ragged && have != padded) {  // work on a padded copy
              std::memset(stage + a * stage_bytes, 0, padded);
              std::memcpy(stage + a * stage_bytes, pointer, have);
              valid[a] = have;
              pointer = stage + a * stage_bytes;
            }
          }
        }
      }
      op.run(pointers.data(), units);
      for (int64_t a = 0; a < op.count; ++a) {
        if (valid[a] > 0) {
          const Arg& arg = args[op.first + a];
          char* home = reinterpret_cast<char*>(table[tile.tensor * columns + arg.index]) + tile.offset / row * stored(arg, row) +
                       tile.offset % row / arg.block * arg.bytes;
          std::memcpy(home, pointers[a], valid[a]);
        }
      }
    }
  }
}
