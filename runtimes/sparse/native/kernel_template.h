// All kernels, for vectors of LANES floats; widths of tiles come from WIDEST_1, WIDEST_2 and WIDEST_4, which fill the
// registers of the instruction set. Each file that includes this one is compiled with its own flags.
#include "kernels.h"

namespace spdy {
namespace {

constexpr int kLanes = LANES;
constexpr int kWidest[3] = {WIDEST_1, WIDEST_2, WIDEST_4};

typedef float Vector __attribute__((vector_size(LANES * 4)));
typedef float Unaligned __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(LANES * 4)));

// The difference from zero is the value itself, of every sign; compilers make one broadcast of it.
inline Vector splat(float value) { return value - Vector{}; }

inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
inline void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }

// Comparisons are false for NaN, which stays as it is.
inline Vector clamp(Vector x, Vector low, Vector high) {
  x = x < low ? low : x;
  return x > high ? high : x;
}

inline Vector keep_valid(Vector x, const uint8_t* valid, int64_t pixel) {
  Integers lanes;
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = 1 << lane;
  int32_t bits = valid[pixel >> 3];
  if (kLanes == 4) bits >>= pixel & 7;
  if (kLanes == 16) bits |= valid[(pixel >> 3) + 1] << 8;
  return ((bits - Integers{}) & lanes) != 0 ? x : splat(0.f);
}

template <int Outputs, int Vectors>
void tile(const Tile& t) {
  // Few sums wait for each other: then several taps are summed apart.
  constexpr int kApart = Outputs * Vectors >= 8 ? 1 : Outputs * Vectors >= 4 ? 2 : 4;
  Vector sum[kApart][Outputs][Vectors];
#pragma GCC unroll 4
  for (int a = 0; a < kApart; ++a)
#pragma GCC unroll 4
    for (int r = 0; r < Outputs; ++r)
#pragma GCC unroll 24
      for (int v = 0; v < Vectors; ++v)
        sum[a][r][v] = a ? Vector{} : t.bias ? splat(t.bias[r]) : load(t.output + r * t.output_step + v * kLanes);
  const float* input = t.input;
  const int32_t* offsets = t.offsets;
  const float* values = t.values;
  int64_t left = t.taps;
  for (; left >= kApart; left -= kApart) {
#pragma GCC unroll 4
    for (int a = 0; a < kApart; ++a) {
      const float* from = input + offsets[a];
#pragma GCC unroll 24
      for (int v = 0; v < Vectors; ++v) {
        const Vector x = load(from + v * kLanes);
#pragma GCC unroll 4
        for (int r = 0; r < Outputs; ++r) sum[a][r][v] += x * splat(values[a * Outputs + r]);
      }
    }
    offsets += kApart;
    values += kApart * Outputs;
  }
  for (; kApart > 1 && left > 0; --left) {
    const float* from = input + *offsets;
#pragma GCC unroll 24
    for (int v = 0; v < Vectors; ++v) {
      const Vector x = load(from + v * kLanes);
#pragma GCC unroll 4
      for (int r = 0; r < Outputs; ++r) sum[0][r][v] += x * splat(values[r]);
    }
    ++offsets;
    values += Outputs;
  }
  const Vector low = splat(t.low), high = splat(t.high);
#pragma GCC unroll 4
  for (int r = 0; r < Outputs; ++r)
#pragma GCC unroll 24
    for (int v = 0; v < Vectors; ++v) {
      Vector x = sum[0][r][v];
#pragma GCC unroll 4
      for (int a = 1; a < kApart; ++a) x += sum[a][r][v];
      if (!t.is_last) {
        store(t.output + r * t.output_step + v * kLanes, x);
        continue;
      }
      if (t.residual) x += load(t.residual + r * t.residual_step + v * kLanes);
      x = keep_valid(clamp(x, low, high), t.valid, t.pixel + v * kLanes);
      store(t.output + r * t.output_step + v * kLanes, x);
    }
}

// Cephes' expf: 2^n times a polynomial.
inline Vector exponential(Vector x) {
  x = clamp(x, splat(-87.3f), splat(88.3f));
  const Vector magic = splat(12582912.f);
  const Vector n = (x * splat(1.44269504f) + magic) - magic;
  const Vector r = (x - n * splat(0.693359375f)) + n * splat(2.12194440e-4f);
  Vector p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.f);
  const Integers power = (__builtin_convertvector(n == n ? n : splat(0.f), Integers) + 127) << 23;
  return p * (Vector)power;
}

inline Vector sigmoid(Vector x) { return splat(1.f) / (splat(1.f) + exponential(-x)); }

// Abramowitz and Stegun, 7.1.26: within 1.5e-7.
inline Vector erf(Vector x) {
  const Vector positive = x < 0.f ? -x : x;
  const Vector t = splat(1.f) / (splat(1.f) + splat(0.3275911f) * positive);
  Vector p = splat(1.061405429f);
  p = p * t + splat(-1.453152027f);
  p = p * t + splat(1.421413741f);
  p = p * t + splat(-0.284496736f);
  p = p * t + splat(0.254829592f);
  const Vector y = splat(1.f) - p * t * exponential(-positive * positive);
  return x < 0.f ? -y : y;
}

inline Vector apply(const MapStep& step, Vector x, int64_t at) {
  const Vector zero = splat(0.f), one = splat(1.f);
  switch (step.op) {
    case MapOp::Add: return x + load(step.other + at);
    case MapOp::Mul: return x * load(step.other + at);
    case MapOp::Clamp: return clamp(x, splat(step.low), splat(step.high));
    case MapOp::Leaky: return x < 0.f ? x * splat(step.low) : x;
    case MapOp::HardSwish: return x * clamp(x * splat(1.f / 6) + splat(0.5f), zero, one);
    case MapOp::HardSigmoid: return clamp(x * splat(step.low) + splat(step.high), zero, one);
    case MapOp::Sigmoid: return sigmoid(x);
    case MapOp::Silu: return x * sigmoid(x);
    case MapOp::Gelu: return splat(0.5f) * x * (one + erf(x * splat(0.70710678f)));
  }
  return x;
}

void map(const float* source, float* target, int64_t vectors, const uint8_t* valid, int64_t pixel, const MapStep* steps, int count) {
  for (int64_t v = 0; v < vectors; ++v) {
    Vector x = load(source + v * kLanes);
    for (int k = 0; k < count; ++k) x = apply(steps[k], x, v * kLanes);
    store(target + v * kLanes, keep_valid(x, valid, pixel + v * kLanes));
  }
}

template <int Block, int Vectors>
void fill(Kernels& kernels) {
  if constexpr (Vectors > 0) {
    kernels.tile[Block][Vectors] = tile<kBlocks[Block], Vectors>;
    fill<Block, Vectors - 1>(kernels);
  }
}

Kernels make(const char* isa) {
  Kernels kernels = {};
  kernels.isa = isa;
  kernels.lanes = kLanes;
  for (int block = 0; block < 3; ++block) kernels.widest[block] = kWidest[block];
  fill<0, WIDEST_1>(kernels);
  fill<1, WIDEST_2>(kernels);
  fill<2, WIDEST_4>(kernels);
  kernels.map = map;
  return kernels;
}

}  // namespace
}  // namespace spdy
