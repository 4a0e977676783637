// The one exception of this library. It never leaves it: provider.cpp turns it into an OrtStatus.
#pragma once

#include <stdexcept>
#include <string>

namespace spdy {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace spdy
