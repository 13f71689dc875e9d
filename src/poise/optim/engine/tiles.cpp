// The multi-tensor driver: runs a list of compiled kernels over tiles of many tensors, on several threads.
//
// A tile is a piece of one tensor, and the unit that threads take. Within it the kernels run one after another (decode the
// state, apply the rule, encode the state) over strips so short that what they hand on, through a scratch, stays in the core's
// first cache. Tensors stay where they are; nothing is copied but the last, short block of a row whose length no block divides.
//
// Everything arrives as flat arrays of int64, laid out as tiles.py says. No torch headers: this file compiles in a second.

#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

using Run = void (*)(char**, int64_t, int64_t);

enum Source : int64_t { COLUMN = 0, SCRATCH = 1, NOISE = 2, PARTIAL = 3 };

// One argument of a kernel: where it is, and how far a tile's offset moves it.
struct Arg {
  int64_t source;   // Source
  int64_t index;    // column of the pointer table, number of the scratch, or byte offset within a tile's partial results
  int64_t block;    // elements per block (1: elementwise; 0: does not move with the tile; -1: the tile's own blocks)
  int64_t bytes;    // bytes stored per block
  int64_t entry;    // bytes of one stored entry
  int64_t entries;  // stored per block
};

struct Op {
  Run run;
  int64_t block;    // the kernel counts in blocks of this many elements (0: in the tile's own blocks)
  int64_t first;    // its arguments in the list of all arguments
  int64_t count;
  int64_t units;    // blocks of a full strip
};

struct Tile {
  int64_t tensor, offset, length, index;  // index: global element index of its first element
  int64_t block, first;                   // elements of each of its own blocks, and the first one's number in the tensor
};

// Bytes that `elements` of a row take: the last block stores at most as many entries as it has elements.
int64_t stored(const Arg& arg, int64_t elements) {
  const int64_t full = elements / arg.block, rest = elements - full * arg.block;
  return full * arg.bytes + (rest < arg.entries ? rest : arg.entries) * arg.entry;
}

// Where an argument is at the beginning of a tile, and how far the next strip is.
struct Place {
  char* base;
  int64_t step;
};

struct Own {  // of a thread
  std::unique_ptr<char[]> memory;  // not touched before it is used: most of the room is not
  int64_t held = 0;
  std::vector<Place> places;
  std::vector<char*> pointers;
  char* scratch = nullptr;
  void reserve(int64_t bytes, int64_t arguments) {
    if (held < bytes + 64) memory.reset(), memory.reset(new char[bytes + 64]), held = bytes + 64;
    scratch = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64);
    if (static_cast<int64_t>(places.size()) < arguments) places.resize(arguments), pointers.resize(arguments);
  }
};
thread_local Own thread_own;

}  // namespace

extern "C" void poise_launch(const Op* ops, int64_t op_count, const Arg* args, int64_t arg_count, const int64_t* table,
                             int64_t columns,
                             const int64_t* rows,   // per tensor: elements of a row
                             const int32_t* keys,   // per tensor: key of its noise in this step
                             const Tile* tiles, int64_t tile_count, int64_t scratch_count, int64_t scratch_bytes,
                             int64_t strip,         // elements, a multiple of every block
                             char* partial, int64_t partial_bytes, int64_t threads) {
  // room behind the scratch for the padded last block of a row, one piece for each argument of a kernel
  int64_t widest = 0;
  for (int64_t o = 0; o < op_count; ++o) widest = ops[o].count > widest ? ops[o].count : widest;
  const int64_t stage_bytes = scratch_bytes;

#pragma omp parallel for schedule(dynamic, 1) num_threads(static_cast<int>(threads)) if (threads > 1)
  for (int64_t t = 0; t < tile_count; ++t) {
    const Tile& tile = tiles[t];
    Own& own = thread_own;
    own.reserve(scratch_count * scratch_bytes + widest * stage_bytes, arg_count);
    char* const stage = own.scratch + scratch_count * scratch_bytes;
    const int64_t row = rows[tile.tensor];
    int32_t noise[2] = {keys[tile.tensor] + static_cast<int32_t>(tile.index >> 32) * 0x27D4EB2F, 0};

    for (int64_t a = 0; a < arg_count; ++a) {
      const Arg& arg = args[a];
      Place& place = own.places[a];
      place.step = 0;
      if (arg.source == SCRATCH) {
        place.base = own.scratch + arg.index * scratch_bytes;
      } else if (arg.source == NOISE) {
        place.base = reinterpret_cast<char*>(noise);
      } else if (arg.source == PARTIAL) {
        place.base = partial + t * partial_bytes + arg.index;
      } else {
        place.base = reinterpret_cast<char*>(table[tile.tensor * columns + arg.index]);
        if (arg.block == 1) {
          place.base += tile.offset * arg.bytes;
          place.step = strip * arg.bytes;
        } else if (arg.block > 1) {
          place.base += tile.offset / row * stored(arg, row) + tile.offset % row / arg.block * arg.bytes;
          place.step = strip / arg.block * arg.bytes;
        } else if (arg.block < 0) {  // tiles of own blocks are one strip
          place.base += tile.first * arg.bytes;
        }
      }
    }

    int64_t number = 0;
    for (int64_t start = 0; start < tile.length; start += strip, ++number) {
      const int64_t length = tile.length - start < strip ? tile.length - start : strip;
      noise[1] = static_cast<int32_t>(tile.index + start);
      for (int64_t o = 0; o < op_count; ++o) {
        const Op& op = ops[o];
        const Arg* const arg = args + op.first;
        const Place* const place = own.places.data() + op.first;
        char** const pointers = own.pointers.data() + op.first;
        for (int64_t a = 0; a < op.count; ++a) pointers[a] = place[a].base + number * place[a].step;
        const int64_t block = op.block > 0 ? op.block : tile.block;
        const int64_t units = length == strip ? op.units : (length + block - 1) / block;
        if (units * block == length) {
          op.run(pointers, units, block);
          continue;
        }
        for (int64_t a = 0; a < op.count; ++a) {  // the last block is short: work on padded copies of it
          if (arg[a].source == SCRATCH) {
            std::memset(pointers[a] + length * arg[a].bytes, 0, (units * block - length) * arg[a].bytes);
          } else if (arg[a].source == COLUMN && arg[a].block > 1) {
            char* const padded = stage + a * stage_bytes;
            std::memset(padded, 0, units * arg[a].bytes);
            std::memcpy(padded, pointers[a], stored(arg[a], length));
            pointers[a] = padded;
          }
        }
        op.run(pointers, units, block);
        for (int64_t a = 0; a < op.count; ++a) {
          if (arg[a].source == COLUMN && arg[a].block > 1) {
            std::memcpy(place[a].base + number * place[a].step, pointers[a], stored(arg[a], length));
          }
        }
      }
    }
  }
}
