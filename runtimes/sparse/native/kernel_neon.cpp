#include "kernels.h"

#ifdef __ARM_NEON
#define LANES 4
#define WIDEST_1 16
#define WIDEST_2 12
#define WIDEST_4 6
#include "kernel_template.h"

const spdy::Kernels* spdy::kernels_neon() {
  static const Kernels kernels = make("neon");
  return &kernels;
}
#else
const spdy::Kernels* spdy::kernels_neon() { return nullptr; }
#endif
