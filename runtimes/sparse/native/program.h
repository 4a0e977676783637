// A region as a list of steps, and what belongs to it for one set of input shapes.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels.h"
#include "pack.h"
#include "region.h"

namespace spdy {

struct Fused {  // applied to what a step computes, before it is written
  Op op = Op::Add;
  int other = -1;  // value
  float low = 0, high = 0;
};

struct Step {
  Op op = Op::Add;
  Kind kind = Kind::Image;
  int input = -1, output = -1;  // values
  std::vector<Fused> fused;
  Window window;
  int64_t inputs = 0, outputs = 0;
  std::vector<float> bias;
  Packed packed;  // of a layer
  bool is_layer = false;
  std::vector<std::string> names;  // of the tensors that it makes, in order
};

// Where the seconds of each step go when a session ends; nowhere if the path is empty.
struct Profile {
  std::string path;
  int64_t warmup = 0;  // runs that don't count
};

struct Program {
  std::vector<Step> steps;
  size_t values = 0;
  std::vector<std::pair<int, size_t>> inputs;   // value, index of ONNX Runtime's input
  std::vector<std::pair<int, size_t>> outputs;
  const Kernels* kernels = nullptr;
  std::string summary;
};

// The graph holds nothing but the region's nodes. Throws Failure if it holds others.
Program make_program(const Graph& graph, const std::vector<std::string>& inputs, const std::vector<std::string>& outputs,
                     const Kernels& kernels);

using Shape = std::vector<int64_t>;

class Instance;

// One state of a fused node. Runs may overlap: each takes an instance of its own, and gives it back.
class State {
 public:
  State(const Api& api, const Program& program, Profile profile);
  ~State();
  void compute(OrtKernelContext* context);

 private:
  std::unique_ptr<Instance> take(const std::vector<Shape>& shapes);

  const Api& api_;
  const Program& program_;
  const Profile profile_;
  std::mutex mutex_;
  int64_t runs_ = 0;
  std::vector<double> seconds_;  // of each step, and of all copies
  std::vector<std::unique_ptr<Instance>> idle_;  // the most recently used last
};

}  // namespace spdy
