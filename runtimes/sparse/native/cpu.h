// Which instruction set runs on this machine.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace spdy {

// The best kernels of this machine, or those of the name. Throws Failure if this machine or build lacks them.
const Kernels& choose_kernels(const std::string& isa);

}  // namespace spdy
