// What a node, or a group of nodes as exporters write them, means to this engine.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "pack.h"
#include "region.h"

namespace spdy {

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Refused {
  std::string reason;
};

bool is_scalar(const Value& value) { return value.is_constant && value.is_float && value.constant.count == 1; }

bool is_scalar_near(const Graph& graph, int value, float wanted) {
  return value >= 0 && is_scalar(graph.values[value]) &&
         std::fabs(*graph.values[value].constant.data - wanted) <= 1e-4f * std::fabs(wanted);
}

bool is_op(const Node& node, const char* op) { return node.op == op && (node.domain.empty() || node.domain == "ai.onnx"); }

// The value is read by one node only, so it may vanish into an item.
bool is_inner(const Graph& graph, int value) {
  return value >= 0 && !graph.values[value].is_graph_output && graph.values[value].consumers.size() == 1;
}

void only_attributes(const Node& node, std::initializer_list<const char*> known) {
  for (const auto& entry : node.attributes) {
    if (std::none_of(known.begin(), known.end(), [&](const char* one) { return entry.first == one; }))
      throw Refused{"unknown attribute " + entry.first};
    if (entry.second.type == ATTRIBUTE_UNDEFINED) throw Refused{"unreadable attribute " + entry.first};
  }
}

int64_t int_of(const Node& node, const char* name, int64_t otherwise) {
  auto found = node.attributes.find(name);
  if (found == node.attributes.end()) return otherwise;
  if (found->second.type != ATTRIBUTE_INT) throw Refused{std::string("attribute ") + name + " is no integer"};
  return found->second.ints[0];
}

float float_of(const Node& node, const char* name, float otherwise) {
  auto found = node.attributes.find(name);
  if (found == node.attributes.end()) return otherwise;
  if (found->second.type != ATTRIBUTE_FLOAT) throw Refused{std::string("attribute ") + name + " is no float"};
  return found->second.real;
}

void ints_of(const Node& node, const char* name, int rank, int64_t* out, int64_t low, int64_t high) {
  auto found = node.attributes.find(name);
  if (found == node.attributes.end()) return;
  const auto& ints = found->second.ints;
  if (found->second.type != ATTRIBUTE_INTS || static_cast<int>(ints.size()) != rank)
    throw Refused{std::string("attribute ") + name + " has another length"};
  for (int axis = 0; axis < rank; ++axis) {
    if (ints[axis] < low || ints[axis] > high) throw Refused{std::string("attribute ") + name + " is out of range"};
    out[axis] = ints[axis];
  }
}

void must_be_float(const Graph& graph, int value) {
  if (value < 0 || !graph.values[value].is_float) throw Refused{"not float32"};
  if (!graph.values[value].has_shape) throw Refused{"its rank is unknown"};
}

const Constant& weight_of(const Graph& graph, const Node& node, size_t rank) {
  const Value& value = graph.values[node.inputs[1]];
  if (!value.is_float) throw Refused{"not float32"};
  if (!value.is_constant || !value.constant.data) throw Refused{"its weights are not constant"};
  if (value.constant.dims.size() != rank) throw Refused{"its weights have another rank"};
  return value.constant;
}

void count_zeros(Item& item, const Constant& weight, double min_sparsity) {
  size_t zeros = 0;
  for (size_t k = 0; k < weight.count; ++k) zeros += weight.data[k] == 0;  // a NaN is no zero
  item.sparsity = static_cast<double>(zeros) / static_cast<double>(weight.count);
  if (item.sparsity < min_sparsity) {
    char text[64];
    snprintf(text, sizeof(text), "%.1f %% zeros", 100 * item.sparsity);
    throw Refused{text};
  }
}

Item convolution(const Graph& graph, const Node& node, double min_sparsity) {
  only_attributes(node, {"kernel_shape", "strides", "dilations", "pads", "auto_pad", "group"});
  if (node.inputs.size() < 2) throw Refused{"it has no weights"};
  must_be_float(graph, node.inputs[0]);
  const int rank = static_cast<int>(graph.values[node.inputs[0]].dims.size()) - 2;
  if (rank != 1 && rank != 2) throw Refused{"neither 1-D nor 2-D"};
  const Constant& weight = weight_of(graph, node, static_cast<size_t>(rank) + 2);
  Item item;
  item.groups = int_of(node, "group", 1);
  if (item.groups < 1 || weight.dims[0] % item.groups) throw Refused{"its channels can't be divided by its groups"};
  item.op = Op::Convolution;
  item.kind = Kind::Image;
  Window& window = item.window;
  window.rank = rank;
  constexpr int64_t most = 1 << 24;
  const int first = 2 - rank;
  int64_t kernel[2] = {weight.dims[2], weight.dims[rank + 1]};
  ints_of(node, "kernel_shape", rank, kernel, 1, most);
  ints_of(node, "strides", rank, window.stride + first, 1, most);
  ints_of(node, "dilations", rank, window.dilation + first, 1, most);
  int64_t pads[4] = {0, 0, 0, 0};
  ints_of(node, "pads", 2 * rank, pads, 0, most);
  for (int axis = 0; axis < rank; ++axis) {
    if (kernel[axis] != weight.dims[axis + 2]) throw Refused{"kernel_shape isn't that of its weights"};
    window.kernel[first + axis] = kernel[axis];
    window.begin[first + axis] = pads[axis];
    window.end[first + axis] = pads[rank + axis];
  }
  auto found = node.attributes.find("auto_pad");
  if (found != node.attributes.end()) {
    const std::string& mode = found->second.text;
    if (mode == "SAME_UPPER") window.auto_pad = AutoPad::SameUpper;
    else if (mode == "SAME_LOWER") window.auto_pad = AutoPad::SameLower;
    else if (mode == "VALID") window.auto_pad = AutoPad::Valid;
    else if (mode != "NOTSET" && !mode.empty()) throw Refused{"unknown auto_pad"};
  }
  item.weight = weight.data;
  item.outputs = weight.dims[0];
  item.inputs = weight.dims[1];
  item.input_step = item.positions();
  item.output_step = item.inputs * item.positions();
  if (!weight.count) throw Refused{"its weights are empty"};
  item.is_connector = item.groups > 1 && item.inputs == 1 && item.positions() <= 32;
  count_zeros(item, weight, item.is_connector ? -1 : min_sparsity);
  item.bias.assign(static_cast<size_t>(item.outputs), 0.f);
  if (node.inputs.size() > 2 && node.inputs[2] >= 0) {
    const Value& bias = graph.values[node.inputs[2]];
    if (!bias.is_constant || !bias.constant.data || bias.constant.count != static_cast<size_t>(item.outputs))
      throw Refused{"its bias is not constant"};
    item.bias.assign(bias.constant.data, bias.constant.data + item.outputs);
  }
  return item;
}

Item product(const Graph& graph, const Node& node, double min_sparsity) {
  const bool is_gemm = node.op == "Gemm";
  if (is_gemm) only_attributes(node, {"alpha", "beta", "transA", "transB"});
  else only_attributes(node, {});
  if (node.inputs.size() < 2) throw Refused{"it has no weights"};
  must_be_float(graph, node.inputs[0]);
  const size_t rank = graph.values[node.inputs[0]].dims.size();
  if (rank < 2 || (is_gemm && rank != 2)) throw Refused{"its left operand has another rank"};
  const Constant& weight = weight_of(graph, node, 2);
  const bool transposed = is_gemm && int_of(node, "transB", 0);
  if (is_gemm && int_of(node, "transA", 0)) throw Refused{"transA"};
  Item item;
  item.op = Op::Product;
  item.kind = Kind::Rows;
  item.weight = weight.data;
  item.outputs = weight.dims[transposed ? 0 : 1];
  item.inputs = weight.dims[transposed ? 1 : 0];
  item.output_step = transposed ? item.inputs : 1;
  item.input_step = transposed ? 1 : item.outputs;
  if (!weight.count) throw Refused{"its weights are empty"};
  count_zeros(item, weight, min_sparsity);
  item.bias.assign(static_cast<size_t>(item.outputs), 0.f);
  if (!is_gemm) return item;
  item.scale = float_of(node, "alpha", 1.f);
  const float beta = float_of(node, "beta", 1.f);
  if (node.inputs.size() > 2 && node.inputs[2] >= 0 && beta != 0) {
    const Value& bias = graph.values[node.inputs[2]];
    const auto& dims = bias.constant.dims;
    if (!bias.is_constant || !bias.constant.data) throw Refused{"its bias is not constant"};
    const size_t count = bias.constant.count;
    const bool is_row = count == static_cast<size_t>(item.outputs) && !dims.empty() && dims.back() == item.outputs;
    if (count != 1 && !is_row) throw Refused{"its bias is no row"};
    for (int64_t k = 0; k < item.outputs; ++k) item.bias[k] = beta * bias.constant.data[count == 1 ? 0 : k];
  }
  return item;
}

// A constant that adds one number to each channel (or one to all).
bool is_channel_constant(const Value& value, const Item& item, size_t rank) {
  if (!value.is_constant || !value.is_float || !value.constant.data) return false;
  const auto& dims = value.constant.dims;
  if (dims.size() > rank) return false;
  if (value.constant.count == 1) return true;
  if (value.constant.count != static_cast<size_t>(item.outputs)) return false;
  const size_t after = item.kind == Kind::Rows ? 0 : rank - 2;  // axes behind the channels
  return dims.size() > after && dims[dims.size() - 1 - after] == item.outputs;
}

struct Finder {
  const Graph& graph;
  std::vector<Item> items;
  std::vector<int> owner;  // of each node: its item, or -1

  Item unary(const Node& node, Op op, float low = 0, float high = 0) {
    must_be_float(graph, node.inputs.at(0));
    Item item;
    item.op = op;
    item.input = node.inputs[0];
    item.low = low;
    item.high = high;
    return item;
  }

  Item clip(const Node& node) {
    only_attributes(node, {"min", "max"});
    float ends[2] = {float_of(node, "min", -kInfinity), float_of(node, "max", kInfinity)};
    for (size_t k = 1; k < node.inputs.size() && k < 3; ++k) {
      if (node.inputs[k] < 0) continue;
      if (!is_scalar(graph.values[node.inputs[k]])) throw Refused{"its ends are not constant"};
      ends[k - 1] = *graph.values[node.inputs[k]].constant.data;
    }
    if (!(ends[0] <= ends[1])) throw Refused{"its ends cross"};
    return unary(node, Op::Clamp, ends[0], ends[1]);
  }

  Item binary(const Node& node, Op op) {
    for (int value : node.inputs) {
      must_be_float(graph, value);
      if (graph.values[value].is_constant) throw Refused{"it has a constant"};
    }
    Item item;
    item.op = op;
    item.input = node.inputs.at(0);
    item.other = node.inputs.at(1);
    return item;
  }

  // x * sigmoid(x) and x * hard_sigmoid(x)
  bool gated(int index, Item& item) {
    const Node& node = graph.nodes[index];
    for (int side : {0, 1}) {
      const int gate = node.inputs[side], x = node.inputs[1 - side];
      if (!is_inner(graph, gate) || graph.values[gate].producer < 0) continue;
      const int producer = graph.values[gate].producer;
      const Node& source = graph.nodes[producer];
      const bool is_hard = is_op(source, "HardSigmoid");
      if ((!is_hard && !is_op(source, "Sigmoid")) || source.inputs[0] != x) continue;
      if (is_hard && (std::fabs(float_of(source, "alpha", 0.2f) - 1.f / 6) > 1e-6f || float_of(source, "beta", 0.5f) != 0.5f))
        continue;
      must_be_float(graph, x);
      item.op = is_hard ? Op::HardSwish : Op::Silu;
      item.input = x;
      item.nodes = {producer, index};
      return true;
    }
    return false;
  }

  int constant_side(const Node& node, float wanted) const {  // the side that is *not* the constant, or -1
    if (node.inputs.size() != 2) return -1;
    if (is_scalar_near(graph, node.inputs[1], wanted)) return 0;
    if (is_scalar_near(graph, node.inputs[0], wanted)) return 1;
    return -1;
  }

  // Gelu as exporters write it: x * (1 + erf(x / sqrt(2))) * 0.5, the half before or after.
  bool gelu(int index, Item& item) {
    const Node& erf = graph.nodes[index];
    const int scaled = erf.inputs.at(0), error = erf.outputs.at(0);
    if (!is_inner(graph, scaled) || !is_inner(graph, error) || graph.values[scaled].producer < 0) return false;
    const int divide = graph.values[scaled].producer;
    const Node& divider = graph.nodes[divide];
    int x = -1;
    if (is_op(divider, "Div") && is_scalar_near(graph, divider.inputs[1], 1.41421356f)) x = divider.inputs[0];
    if (is_op(divider, "Mul") && constant_side(divider, 0.70710678f) >= 0) x = divider.inputs[constant_side(divider, 0.70710678f)];
    if (x < 0) return false;
    const int plus = graph.values[error].consumers[0];
    const Node& adder = graph.nodes[plus];
    if (!is_op(adder, "Add") || constant_side(adder, 1.f) < 0 || !is_inner(graph, adder.outputs[0])) return false;
    const int times = graph.values[adder.outputs[0]].consumers[0];
    const Node& multiplier = graph.nodes[times];
    if (!is_op(multiplier, "Mul") || multiplier.inputs.size() != 2) return false;
    const int rest = multiplier.inputs[multiplier.inputs[0] == adder.outputs[0] ? 1 : 0];
    must_be_float(graph, x);
    item.op = Op::Gelu;
    item.input = x;
    if (rest == x && is_inner(graph, multiplier.outputs[0])) {
      const int half = graph.values[multiplier.outputs[0]].consumers[0];
      if (!is_op(graph.nodes[half], "Mul") || constant_side(graph.nodes[half], 0.5f) < 0) return false;
      item.nodes = {divide, index, plus, times, half};
      return true;
    }
    if (!is_inner(graph, rest) || graph.values[rest].producer < 0) return false;
    const int half = graph.values[rest].producer;
    const Node& halver = graph.nodes[half];
    const int side = is_op(halver, "Mul") ? constant_side(halver, 0.5f) : -1;
    if (side < 0 || halver.inputs[side] != x) return false;
    item.nodes = {divide, index, plus, half, times};
    std::sort(item.nodes.begin(), item.nodes.end());
    return true;
  }

  // Add of a constant behind a layer: its bias.
  bool absorb_bias(int index) {
    const Node& node = graph.nodes[index];
    for (int side : {0, 1}) {
      const int value = node.inputs[side];
      if (!is_inner(graph, value) || graph.values[value].producer < 0) continue;
      const int at = owner[graph.values[value].producer];
      if (at < 0 || !items[at].is_layer() || items[at].output != value) continue;
      const size_t rank = items[at].kind == Kind::Image ? static_cast<size_t>(items[at].window.rank) + 2
                                                        : graph.values[items[at].input].dims.size();
      const Value& constant = graph.values[node.inputs[1 - side]];
      if (!is_channel_constant(constant, items[at], rank)) continue;
      for (int64_t k = 0; k < items[at].outputs; ++k)
        items[at].bias[k] += constant.constant.data[constant.constant.count == 1 ? 0 : k];
      items[at].nodes.push_back(index);
      items[at].output = node.outputs[0];
      owner[index] = at;
      return true;
    }
    return false;
  }

  void add(Item item, int index) {
    if (item.nodes.empty()) item.nodes = {index};
    if (item.is_layer()) item.input = graph.nodes[index].inputs[0];
    item.output = graph.nodes[item.nodes.back()].outputs.at(0);
    for (int node : item.nodes) owner[node] = static_cast<int>(items.size());
    items.push_back(std::move(item));
  }

  void add_layer(Item item, int index, const Policy& policy) {
    const double work = pack(item).work / static_cast<double>(item.outputs * item.inputs * item.positions());
    if (!item.is_connector && work > policy.max_work) {
      char text[128];
      snprintf(text, sizeof(text), "%.1f %% zeros, estimated at %.2f of the time of a dense layer of single weights, more than %.2f",
               100 * item.sparsity, work, policy.max_work);
      throw Refused{text};
    }
    add(std::move(item), index);
  }

  void read(int index, const Policy& policy) {
    const Node& node = graph.nodes[index];
    if (is_op(node, "Conv")) return add_layer(convolution(graph, node, policy.min_sparsity), index, policy);
    if (is_op(node, "Gemm") || is_op(node, "MatMul")) return add_layer(product(graph, node, policy.min_sparsity), index, policy);
    if (is_op(node, "Relu")) return add(unary(node, Op::Clamp, 0, kInfinity), index);
    if (is_op(node, "Clip")) return add(clip(node), index);
    if (is_op(node, "LeakyRelu")) return add(unary(node, Op::Leaky, float_of(node, "alpha", 0.01f)), index);
    if (is_op(node, "HardSwish")) return add(unary(node, Op::HardSwish), index);
    if (is_op(node, "HardSigmoid"))
      return add(unary(node, Op::HardSigmoid, float_of(node, "alpha", 0.2f), float_of(node, "beta", 0.5f)), index);
    if (is_op(node, "Sigmoid")) return add(unary(node, Op::Sigmoid), index);
    if (is_op(node, "Gelu")) {
      auto found = node.attributes.find("approximate");
      if (found == node.attributes.end() || found->second.text == "none") add(unary(node, Op::Gelu), index);
      return;
    }
    if (is_op(node, "Add") && node.inputs.size() == 2 && !absorb_bias(index)) return add(binary(node, Op::Add), index);
    if (is_op(node, "Mul") && node.inputs.size() == 2) return add(binary(node, Op::Mul), index);
  }
};

}  // namespace

std::vector<Item> find_items(const Graph& graph, const Policy& policy, const Log& log) {
  Finder finder{graph, {}, std::vector<int>(graph.nodes.size(), -1)};
  // Groups of nodes first, so that their parts aren't taken alone.
  for (int index = 0; index < static_cast<int>(graph.nodes.size()); ++index) {
    const Node& node = graph.nodes[index];
    Item item;
    try {
      const bool is_group = is_op(node, "Erf") ? finder.gelu(index, item)
                            : is_op(node, "Mul") && node.inputs.size() == 2 && finder.gated(index, item);
      if (is_group) finder.add(std::move(item), index);
    } catch (const Refused&) {
    }
  }
  for (int index = 0; index < static_cast<int>(graph.nodes.size()); ++index) {
    const Node& node = graph.nodes[index];
    if (finder.owner[index] >= 0) continue;
    const bool is_layer = is_op(node, "Conv") || is_op(node, "Gemm") || is_op(node, "MatMul");
    try {
      finder.read(index, policy);
    } catch (const Refused& refused) {
      if (is_layer) log(node.op + " " + node.name + " stays with ONNX Runtime: " + refused.reason);
    }
  }
  auto& items = finder.items;
  std::sort(items.begin(), items.end(), [](const Item& a, const Item& b) { return a.nodes.back() < b.nodes.back(); });
  return std::move(items);
}

}  // namespace spdy
