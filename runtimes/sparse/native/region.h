// Which nodes are taken, what each of them means, and which of them form one region.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "graph.h"

namespace spdy {

enum class Op { Convolution, Product, Add, Mul, Clamp, Leaky, HardSwish, HardSigmoid, Sigmoid, Silu, Gelu };

// Images have their channels at axis 1, rows at the last one: (N, C, L), (N, C, H, W), and (..., C).
enum class Kind { Unknown, Image, Rows };

enum class AutoPad { NotSet, SameUpper, SameLower, Valid };

struct Window {  // of a convolution; the first axis of a 1-D one is of size 1
  int rank = 2;
  int64_t kernel[2] = {1, 1}, stride[2] = {1, 1}, dilation[2] = {1, 1};
  int64_t begin[2] = {0, 0}, end[2] = {0, 0};  // pads
  AutoPad auto_pad = AutoPad::NotSet;
};

struct Item {  // one operation, of one node or of several that an exporter writes for it
  Op op = Op::Add;
  Kind kind = Kind::Unknown;
  std::vector<int> nodes;
  int input = -1, other = -1, output = -1;  // indices of values
  Window window;
  const float* weight = nullptr;
  int64_t outputs = 0, inputs = 0;          // channels; inputs of one group
  int64_t groups = 1;
  bool is_connector = false;                // taken only behind a taken layer, to keep the layout
  int64_t output_step = 0, input_step = 0;  // in the weight: between channels; a kernel's positions are neighbours
  float scale = 1;                          // of the weight (Gemm's alpha)
  std::vector<float> bias;                  // (outputs,)
  float low = 0, high = 0;                  // Clamp's ends; Leaky's and HardSigmoid's alpha and beta
  double sparsity = 0;

  bool is_layer() const { return op == Op::Convolution || op == Op::Product; }
  int64_t positions() const { return window.kernel[0] * window.kernel[1]; }
};

using Log = std::function<void(const std::string&)>;

// Which layers are taken: those with at least that share of zeros whose estimated time is at most that share of a dense
// layer of single weights.
struct Policy {
  double min_sparsity = 0.5;
  double max_work = 0.28;
};

// Items of the graph in topological order. Layers that the policy refuses are none.
std::vector<Item> find_items(const Graph& graph, const Policy& policy, const Log& log);

// Sets of items (indices, ascending) that can each run as one node: no path leaves one and comes back.
std::vector<std::vector<int>> find_regions(const Graph& graph, std::vector<Item>& items);

// The kinds of items of one region, found along its values.
void spread_kinds(const Graph& graph, std::vector<Item>& items);

}  // namespace spdy
