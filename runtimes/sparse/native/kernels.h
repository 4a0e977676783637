// The interface of the kernels. One translation unit an instruction set implements it from kernel_template.h; these
// files include no standard header, so no code compiled for a newer machine is linked into the rest.
#pragma once

#include <stdint.h>

namespace spdy {

constexpr int kMostVectors = 24;  // of pixels in one tile
constexpr int kMostSteps = 8;     // of one map
constexpr int kBlocks[3] = {1, 2, 4};  // output channels of one tile

// A few output channels that share their taps, over some vectors of neighbouring pixels:
// output[r][p] = clamp(bias[r] + sum over taps of values[tap][r] * input[offsets[tap] + p] (+ residual[r][p])).
// A layer whose input doesn't fit the cache has several parts: the first starts with the bias, the others with what is
// in the output, and only the last one adds the residual, clamps, and writes zeros between images.
struct Tile {
  const float* input;
  const int32_t* offsets;  // (taps,)
  const float* values;     // (taps, channels of the tile)
  int64_t taps;
  const float* bias;       // (channels of the tile,), or null: start with the output
  float* output;
  int64_t output_step;     // between channels
  const float* residual;   // or null
  int64_t residual_step;
  const uint8_t* valid;    // one bit a pixel: it belongs to an image; the others are written as zeros
  int64_t pixel;           // the tile's first, in `valid`
  float low, high;
  bool is_last;
};

enum class MapOp { Add, Mul, Clamp, Leaky, HardSwish, HardSigmoid, Sigmoid, Silu, Gelu };

struct MapStep {
  MapOp op;
  const float* other;  // of Add and Mul
  float low, high;     // of Clamp; alpha of Leaky; alpha and beta of HardSigmoid
};

using TileKernel = void (*)(const Tile&);
using MapKernel = void (*)(const float* source, float* target, int64_t vectors, const uint8_t* valid, int64_t pixel,
                           const MapStep* steps, int count);

struct Kernels {
  const char* isa;
  int lanes;
  int widest[3];                            // vectors of pixels of a tile with 1, 2, 4 output channels
  TileKernel tile[3][kMostVectors + 1];     // null beyond the widest
  MapKernel map;
};

const Kernels* kernels_avx512();  // null where this build has none
const Kernels* kernels_avx2();
const Kernels* kernels_neon();
const Kernels* kernels_plain();

}  // namespace spdy
