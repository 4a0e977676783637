// From a region's items to steps: what can be applied while a result is in registers joins the step that computes it.
#include "program.h"

#include <algorithm>

#include "failure.h"

namespace spdy {

namespace {

struct Builder {
  const Graph& graph;
  Program program;
  std::vector<int> step_of;  // of each value: the step that computes it, -1: it comes from outside

  bool is_last_in(const Item& item, int value) const {
    const Value& known = graph.values[value];
    if (known.is_graph_output) return false;
    const int uses = (item.input == value) + (item.other == value);
    // A group of nodes may read its input more than once.
    return std::all_of(known.consumers.begin(), known.consumers.end(), [&](int node) {
             return std::find(item.nodes.begin(), item.nodes.end(), node) != item.nodes.end();
           }) && uses == 1;
  }

  // The value whose step may apply the item, or -1.
  int host_of(const Item& item) const {
    if (item.is_layer()) return -1;
    if (item.other < 0) return step_of[item.input] >= 0 && is_last_in(item, item.input) ? item.input : -1;
    const bool is_later = step_of[item.input] >= step_of[item.other];
    const int later = is_later ? item.input : item.other;
    return step_of[later] >= 0 && is_last_in(item, later) ? later : -1;
  }

  void add(Item& item) {
    const int host = host_of(item);
    const Fused own{item.op, item.other, item.low, item.high};
    if (host >= 0 && program.steps[step_of[host]].fused.size() < kMostSteps) {
      Step& step = program.steps[step_of[host]];
      step.fused.push_back(own);
      step.names.push_back(graph.values[item.output].name);
      if (host == item.other) step.fused.back().other = item.input;
      step.output = item.output;
      step_of[item.output] = step_of[host];
      return;
    }
    Step step;
    step.op = item.op;
    step.kind = item.kind;
    step.input = item.input;
    step.output = item.output;
    if (item.is_layer()) {
      step.is_layer = true;
      step.window = item.window;
      step.inputs = item.inputs * item.groups;
      step.outputs = item.outputs;
      step.packed = pack(item);
      step.bias = std::move(item.bias);
    } else {
      step.fused.push_back(own);
    }
    step.names.push_back(graph.values[item.output].name);
    step_of[item.output] = static_cast<int>(program.steps.size());
    program.steps.push_back(std::move(step));
  }
};

}  // namespace

Program make_program(const Graph& graph, const std::vector<std::string>& inputs, const std::vector<std::string>& outputs,
                     const Kernels& kernels) {
  std::string refused;
  std::vector<Item> items = find_items(graph, Policy{-1, 2}, [&](const std::string& text) { refused += text + "; "; });
  spread_kinds(graph, items);
  size_t covered = 0;
  for (const Item& item : items) covered += item.nodes.size();
  if (covered != graph.nodes.size()) throw Failure("a region holds nodes that can't be run: " + refused);

  Builder builder{graph, {}, std::vector<int>(graph.values.size(), -1)};
  for (Item& item : items) builder.add(item);

  Program program = std::move(builder.program);
  program.values = graph.values.size();
  program.kernels = &kernels;
  for (size_t k = 0; k < inputs.size(); ++k) {
    auto found = graph.by_name.find(inputs[k]);
    if (found != graph.by_name.end() && !graph.values[found->second].is_constant) program.inputs.emplace_back(found->second, k);
  }
  for (size_t k = 0; k < outputs.size(); ++k) {
    auto found = graph.by_name.find(outputs[k]);
    if (found == graph.by_name.end()) throw Failure("an output of the region isn't in its graph");
    program.outputs.emplace_back(found->second, k);
  }
  for (const Step& step : program.steps)
    if (step.is_layer) program.summary += "\n  " + graph.values[step.output].name + ": " + step.packed.summary();
  return program;
}

}  // namespace spdy
