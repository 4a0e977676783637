// What a program needs for one set of input shapes: planes, offsets, buffers. Used by one run at a time.
#pragma once

#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "layout.h"
#include "program.h"

namespace spdy {

constexpr int64_t kCopied = 8;  // channels of one task of a copy of images
constexpr int64_t kRows = 16;   // rows of one of a matrix

struct Copy {  // from a tensor of ONNX Runtime or a plane into a plane, or back
  int value = -1;         // of ONNX Runtime, or
  int source = -1;        // a plane
  Kind kind = Kind::Image;
  int64_t stride[2] = {1, 1};
  std::vector<std::pair<int64_t, int64_t>> phases;  // (row, column) of each group of channels that is written
  int64_t size[4] = {0, 0, 0, 0};                   // images, channels, height, width of the source
};

struct Action {
  enum What { In, Out, Layer, Map } what = Layer;
  const Step* step = nullptr;
  int source = -1, target = -1;  // planes
  Copy copy;
  std::vector<int32_t> offsets;  // of each tap
  int residual = -1;             // plane
  float low = 0, high = 0;
  std::vector<std::pair<Fused, int>> maps;  // and the plane of `other`
  int64_t vectors = 0, chunks = 1;
  std::vector<size_t> parts;     // groups [parts[k], parts[k + 1]) are one task
  int64_t blocks = 1;            // of input channels, each small enough for the first cache
  std::vector<int64_t> cuts;     // (groups, blocks + 1) taps of each group where its blocks begin
  int64_t tasks = 1;
  bool is_small = false;         // cheaper than waking a thread
};

class Instance {
 public:
  Instance(const Program& program, std::vector<Shape> shapes);
  const std::vector<Shape>& shapes() const { return shapes_; }
  // Adds the seconds of each step and, behind them, of all copies, where there is room for them.
  void run(const Api& api, OrtKernelContext* context, std::vector<double>* seconds);

 private:
  friend struct Planner;
  void run_action(const Api& api, OrtKernelContext* context, const Action& action) const;
  void run_task(const Action& action, size_t task) const;
  void run_layer(const Action& action, size_t task) const;
  void run_map(const Action& action, size_t task) const;
  void copy_in(const Action& action, size_t task) const;
  void copy_out(const Action& action, size_t task) const;
  void apply_maps(const Action& action, const float* source, float* target, int64_t channel, int64_t pixel, int64_t vectors) const;

  const Program& program_;
  std::vector<Shape> shapes_;           // of the program's inputs
  std::vector<Shape> dims_;             // of every value
  std::vector<Plane> planes_;
  std::vector<Action> actions_;
  std::vector<std::vector<uint8_t>> valid_;
  std::vector<Memory> memory_;
  std::vector<const float*> sources_;   // of every value that comes from outside, for this run
  std::vector<float*> targets_;
};

}  // namespace spdy
