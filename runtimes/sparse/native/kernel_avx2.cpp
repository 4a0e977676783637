#include "kernels.h"

#ifdef __AVX2__
#define LANES 8
#define WIDEST_1 10
#define WIDEST_2 6
#define WIDEST_4 3
#include "kernel_template.h"

const spdy::Kernels* spdy::kernels_avx2() {
  static const Kernels kernels = make("avx2");
  return &kernels;
}
#else
const spdy::Kernels* spdy::kernels_avx2() { return nullptr; }
#endif
