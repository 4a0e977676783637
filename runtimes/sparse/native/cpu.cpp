#include "cpu.h"

#include "failure.h"

namespace spdy {

namespace {

const Kernels* runnable(const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (isa == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return kernels_avx512();
  if (isa == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kernels_avx2();
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
