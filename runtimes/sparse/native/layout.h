// Where a tensor's elements lie inside the engine.
//
// Each channel is one run of pixels: the images of a batch behind each other, and of each image its rows at a `pitch`.
// Pitch and rows are larger than the image by a gap of zeros, so that a tap that points outside the image reads a zero
// of the gap (the gap behind a row is also the one before the next), and every tap of a convolution is one offset.
// Rows of a matrix are the pixels of one image with one line.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "failure.h"

namespace spdy {

constexpr int64_t kAlign = 16;  // floats: one line of the cache, and the widest vector

inline int64_t round_up(int64_t value, int64_t to = kAlign) { return (value + to - 1) / to * to; }

struct Reach {  // of one reader, in rows and columns of the plane: pixel (y, x) reads (y + low..high, x + low..high)
  int64_t low[2] = {0, 0}, high[2] = {0, 0};
  int64_t size[2] = {0, 0};  // of what it writes
};

struct Plane {
  int64_t images = 1, channels = 0, height = 1, width = 0;
  std::vector<Reach> readers;
  int64_t pitch = 0, rows = 0;  // of its class: all planes that are read and written in one run of pixels
  int64_t span = 0;             // pixels from the first to the last one
  int64_t step = 0;             // floats between channels
  int64_t start = 0;            // of channel 0 in the buffer
  int64_t floats = 0;           // of the buffer
  float* data = nullptr;        // pixel 0 of channel 0
  const uint8_t* valid = nullptr;

  bool is_empty() const { return !images || !channels || !height || !width; }

  int64_t gap(int axis) const {
    const int64_t own = axis ? width : height;
    int64_t most = 0;
    for (const Reach& reach : readers) {
      if (-reach.low[axis] > most) most = -reach.low[axis];
      if (reach.size[axis] + reach.high[axis] - own > most) most = reach.size[axis] + reach.high[axis] - own;
    }
    return most;
  }

  static int64_t span_of(int64_t images, int64_t height, int64_t width, int64_t rows, int64_t pitch) {
    return images && height && width ? ((images - 1) * rows + height - 1) * pitch + width : 0;
  }

  // Places everything, once pitch and rows are known.
  void place() {
    span = span_of(images, height, width, rows, pitch);
    int64_t before = 0, after = 0, beyond = 0;
    for (const Reach& reach : readers) {
      const int64_t written = span_of(images, reach.size[0], reach.size[1], rows, pitch);
      const int64_t high = reach.high[0] * pitch + reach.high[1];
      const int64_t low = reach.low[0] * pitch + reach.low[1];
      if (-low > before) before = -low;
      if (written + high - round_up(span) > after) after = written + high - round_up(span);
      if (round_up(written) + high - round_up(span) > beyond) beyond = round_up(written) + high - round_up(span);
    }
    const int64_t gap = round_up(before > after ? before : after);
    step = round_up(span) + gap;
    if (step / kAlign % 2 == 0) step += kAlign;  // channels don't fall onto the same lines of the cache
    start = round_up(before);
    // What a vector reads beyond the last pixel is thrown away, but must be there.
    floats = start + channels * step + gap + round_up(beyond) + kAlign;
    if (span < 0 || floats < 0 || floats > (int64_t{1} << 31) - (int64_t{1} << 20))
      throw Failure("a tensor is too large for the sparse engine: 2^31 floats or more with its padding");
  }
};

struct Freed {
  void operator()(float* data) const { std::free(data); }
};
using Buffer = std::unique_ptr<float, Freed>;

// Zeros, aligned to a line of the cache at `start`, which is a multiple of it.
struct Memory {
  Buffer owner;
  float* first = nullptr;

  explicit Memory(int64_t floats) {
    owner.reset(static_cast<float*>(std::calloc(static_cast<size_t>(floats + kAlign), sizeof(float))));
    if (!owner) throw std::bad_alloc();
    first = owner.get() + (64 - reinterpret_cast<uintptr_t>(owner.get()) % 64) % 64 / sizeof(float);
  }
};

}  // namespace spdy
