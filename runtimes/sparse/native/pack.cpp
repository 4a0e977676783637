#include "pack.h"

#include <algorithm>

#include "failure.h"
#include "kernels.h"

namespace spdy {

namespace {

// Seconds of one tap and one output channel, in those of a single weight (measured: AVX-512, ResNet-18 at 160 px).
// A single weight waits for its load; channels that share one are bound by their multiplications.
constexpr double kCost[3] = {1.0, 0.58, 0.39};

using Taps = std::vector<uint32_t>;

Taps taps_of(const Item& layer, int64_t output) {
  Taps taps;
  const float* weight = layer.weight + output * layer.output_step;
  const int64_t first = output / (layer.outputs / layer.groups) * layer.inputs;  // input channel of its group
  for (int64_t input = 0; input < layer.inputs; ++input)
    for (int64_t position = 0; position < layer.positions(); ++position)
      if (weight[input * layer.input_step + position] != 0)
        taps.push_back(static_cast<uint32_t>((first + input) * layer.positions() + position));
  return taps;
}

Taps merged(const Taps& a, const Taps& b) {
  Taps both;
  std::set_union(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both));
  return both;
}

struct Packer {
  const Item& layer;
  Packed packed;

  void add(int block, int64_t first, const Taps& taps) {
    Group group;
    group.block = block;
    group.first = first;
    group.begin = static_cast<int64_t>(packed.taps.size());
    group.taps = static_cast<int64_t>(taps.size());
    group.values = static_cast<int64_t>(packed.values.size());
    packed.taps.insert(packed.taps.end(), taps.begin(), taps.end());
    for (uint32_t tap : taps)
      for (int64_t output = first; output < first + kBlocks[block]; ++output) packed.values.push_back(value(output, tap));
    packed.work += cost(block, taps);
    packed.groups.push_back(group);
  }

  float value(int64_t output, uint32_t tap) const {
    const int64_t group = output / (layer.outputs / layer.groups);
    const int64_t input = tap / layer.positions() - group * layer.inputs;
    if (input < 0 || input >= layer.inputs) return 0;  // a tap of another channel of the tile, in another group
    return layer.scale * layer.weight[output * layer.output_step + input * layer.input_step + tap % layer.positions()];
  }

  static double cost(int block, const Taps& taps) { return kCost[block] * kBlocks[block] * static_cast<double>(taps.size()); }

  void add_pair(int64_t first, const Taps& a, const Taps& b, const Taps& both) {
    if (cost(1, both) <= cost(0, a) + cost(0, b)) return add(1, first, both);
    add(0, first, a);
    add(0, first + 1, b);
  }

  void run() {
    int64_t output = 0;
    for (; output + 4 <= layer.outputs; output += 4) {
      Taps one[4];
      for (int k = 0; k < 4; ++k) one[k] = taps_of(layer, output + k);
      const Taps pairs[2] = {merged(one[0], one[1]), merged(one[2], one[3])};
      const Taps all = merged(pairs[0], pairs[1]);
      double apart = 0;
      for (int k : {0, 2}) apart += std::min(cost(1, pairs[k / 2]), cost(0, one[k]) + cost(0, one[k + 1]));
      if (cost(2, all) <= apart) {
        add(2, output, all);
        continue;
      }
      add_pair(output, one[0], one[1], pairs[0]);
      add_pair(output + 2, one[2], one[3], pairs[1]);
    }
    for (; output < layer.outputs; ++output) add(0, output, taps_of(layer, output));
  }
};

}  // namespace

std::string Packed::summary() const {
  int64_t channels[3] = {0, 0, 0};
  for (const Group& group : groups) channels[group.block] += kBlocks[group.block];
  return "channels in tiles of 1/2/4: " + std::to_string(channels[0]) + "/" + std::to_string(channels[1]) + "/" +
         std::to_string(channels[2]);
}

Packed pack(const Item& layer) {
  if (layer.groups * layer.inputs * layer.positions() >= (int64_t{1} << 32)) throw Failure("a layer has too many weights");
  Packer packer{layer, {}};
  packer.run();
  return std::move(packer.packed);
}

}  // namespace spdy
