#include "cpu.h"

#include "failure.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace spdy {

namespace {

#if defined(__x86_64__)
// Asked of the processor itself: __builtin_cpu_supports says no to everything in what ziglang's compiler links.
struct Processor {
  bool has_avx2 = false, has_avx512 = false;

  Processor() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const bool has_fma = c >> 12 & 1, saves_state = c >> 27 & 1;
    if (!has_fma || !saves_state || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    unsigned low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));  // which registers the system keeps
    has_avx2 = (low & 0x06) == 0x06 && b >> 5 & 1;
    const unsigned wanted = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31;  // F, DQ, BW, VL
    has_avx512 = has_avx2 && (low & 0xe6) == 0xe6 && (b & wanted) == wanted;
  }
};
#endif

const Kernels* runnable(const std::string& isa) {
#if defined(__x86_64__)
  static const Processor processor;
  if (isa == "avx512" && processor.has_avx512) return kernels_avx512();
  if (isa == "avx2" && processor.has_avx2) return kernels_avx2();
#endif
#if defined(__aarch64__)
  if (isa == "neon") return kernels_neon();
#endif
  return isa == "plain" ? kernels_plain() : nullptr;
}

}  // namespace

const Kernels& choose_kernels(const std::string& isa) {
  for (const char* one : {"avx512", "avx2", "neon", "plain"}) {
    if (!isa.empty() && isa != one) continue;
    if (const Kernels* kernels = runnable(one)) return *kernels;
  }
  throw Failure("isa \"" + isa + "\" doesn't run on this machine: choose among avx512, avx2, neon, plain, or leave it out");
}

}  // namespace spdy
