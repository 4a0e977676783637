#include "kernels.h"

#ifdef __cplusplus
#define LANES 4
#define WIDEST_1 8
#define WIDEST_2 4
#define WIDEST_4 2
#include "kernel_template.h"

const spdy::Kernels* spdy::kernels_plain() {
  static const Kernels kernels = make("plain");
  return &kernels;
}
#else
const spdy::Kernels* spdy::kernels_plain() { return nullptr; }
#endif
