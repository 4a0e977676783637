// Weights as lists of taps: which input, and by what it is multiplied.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "region.h"

namespace spdy {

struct Group {  // neighbouring output channels with one list of taps
  int block = 0;         // their number is kBlocks[block]
  int64_t first = 0;     // output channel
  int64_t begin = 0;     // in `taps`
  int64_t taps = 0;
  int64_t values = 0;    // begin in `values`
};

struct Packed {
  std::vector<Group> groups;
  std::vector<uint32_t> taps;   // input channel * positions + position in the kernel
  std::vector<float> values;    // (taps, channels of the group), group after group
  double work = 0;              // of all groups, in taps of single weights

  std::string summary() const;
};

// Channels share a list where that is estimated to be faster. Throws Failure if the indices don't fit.
Packed pack(const Item& layer);

}  // namespace spdy
