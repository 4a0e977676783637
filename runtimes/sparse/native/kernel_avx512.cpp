#include "kernels.h"

#ifdef __AVX512F__
#define LANES 16
#define WIDEST_1 8
#define WIDEST_2 6
#define WIDEST_4 6
#include "kernel_template.h"

const spdy::Kernels* spdy::kernels_avx512() {
  static const Kernels kernels = make("avx512");
  return &kernels;
}
#else
const spdy::Kernels* spdy::kernels_avx512() { return nullptr; }
#endif
