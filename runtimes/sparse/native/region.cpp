#include "region.h"

#include <algorithm>
#include <cstdlib>
#include <set>

namespace spdy {

namespace {

using Dims = std::vector<std::string>;

// A size along one axis behind a window, written so that equal expressions are equal numbers:
// (size + what the window adds) / stride + 1. Empty: it must be looked up elsewhere.
std::string behind(const std::string& size, const Window& window, int axis) {
  const int64_t stride = window.stride[axis];
  int64_t added = window.begin[axis] + window.end[axis] - (window.kernel[axis] - 1) * window.dilation[axis] - 1;
  if (window.auto_pad == AutoPad::Valid) added -= window.begin[axis] + window.end[axis];
  if (window.auto_pad == AutoPad::SameUpper || window.auto_pad == AutoPad::SameLower) added = -1;
  if (stride == 1 && added == -1) return size;
  char* end = nullptr;
  const long long number = std::strtoll(size.c_str(), &end, 10);
  if (!size.empty() && !*end) return std::to_string((number + added) / stride + 1);
  return "((" + size + ")+" + std::to_string(added) + ")/" + std::to_string(stride) + "+1";
}

bool is_number(const std::string& text) { return !text.empty() && text.find_first_not_of("0123456789") == std::string::npos; }

// Sizes of every value; those that nobody knows are named after the value, so they equal nothing else.
std::vector<Dims> shapes_of(const Graph& graph, const std::vector<Item>& items) {
  std::vector<Dims> shapes;
  for (const Value& value : graph.values) {
    Dims dims = value.dims;
    for (size_t axis = 0; axis < dims.size(); ++axis)
      if (dims[axis].empty()) dims[axis] = "?" + value.name + ":" + std::to_string(axis);
    shapes.push_back(dims);
  }
  for (const Item& item : items) {
    Dims dims = shapes[item.input];
    if (item.op == Op::Convolution) {
      for (int axis = 0; axis < item.window.rank; ++axis) dims[axis + 2] = behind(dims[axis + 2], item.window, 2 - item.window.rank + axis);
      dims[1] = std::to_string(item.outputs);
    }
    if (item.op == Op::Product) dims.back() = std::to_string(item.outputs);
    Dims& known = shapes[item.output];
    if (known.size() == dims.size())
      for (size_t axis = 0; axis < dims.size(); ++axis)
        if (is_number(known[axis])) dims[axis] = known[axis];
    known = dims;
  }
  return shapes;
}

// Nodes in clusters, of which two may be joined where that makes no cycle among the clusters.
struct Clusters {
  const Graph& graph;
  std::vector<int> of;                    // cluster of each node
  std::vector<std::vector<int>> members;  // nodes

  explicit Clusters(const Graph& source) : graph(source) {
    for (size_t k = 0; k < graph.nodes.size(); ++k) {
      of.push_back(static_cast<int>(k));
      members.push_back({static_cast<int>(k)});
    }
  }

  bool reaches(int from, int to) const {  // by at least one other cluster
    std::vector<char> seen(members.size(), 0);
    std::vector<int> open = {from};
    seen[from] = 1;
    while (!open.empty()) {
      const int cluster = open.back();
      open.pop_back();
      for (int node : members[cluster])
        for (int value : graph.nodes[node].outputs) {
          if (value < 0) continue;
          for (int reader : graph.values[value].consumers) {
            const int next = of[reader];
            if (next == to && cluster != from) return true;
            if (next == to || seen[next]) continue;
            seen[next] = 1;
            open.push_back(next);
          }
        }
    }
    return false;
  }

  bool may_join(int a, int b) const { return a != b && !reaches(a, b) && !reaches(b, a); }

  int join(int a, int b) {
    for (int node : members[b]) of[node] = a;
    members[a].insert(members[a].end(), members[b].begin(), members[b].end());
    members[b].clear();
    return a;
  }
};

struct RegionFinder {
  const Graph& graph;
  std::vector<Item>& items;
  std::vector<Dims> shapes;
  Clusters clusters;
  std::vector<int> item_of;                  // of each node
  std::vector<char> is_taken;                // clusters
  std::vector<Kind> kinds;                   // of values

  RegionFinder(const Graph& source, std::vector<Item>& all)
      : graph(source), items(all), shapes(shapes_of(source, all)), clusters(source),
        item_of(source.nodes.size(), -1), is_taken(source.nodes.size(), 0), kinds(source.values.size(), Kind::Unknown) {}

  int cluster_of(const Item& item) const { return clusters.of[item.nodes[0]]; }

  int producing_cluster(int value) const {  // a taken one, or -1
    const int producer = value < 0 ? -1 : graph.values[value].producer;
    if (producer < 0 || !is_taken[clusters.of[producer]]) return -1;
    return clusters.of[producer];
  }

  // Every value between the two is read as it is written: as images, or as rows.
  bool agree(int a, int b) const {
    for (int cluster : {a, b})
      for (int node : clusters.members[cluster]) {
        const Item& item = items[item_of[node]];
        for (int value : {item.input, item.other}) {
          const int source = producing_cluster(value);
          if ((source == a || source == b) && kinds[value] != item.kind) return false;
        }
      }
    return true;
  }

  bool fits(const Item& item) const {
    const size_t rank = shapes[item.input].size();
    if (item.kind == Kind::Image && rank != 3 && rank != 4) return false;
    return item.other < 0 || shapes[item.input] == shapes[item.other];
  }

  void take(Item& item) {
    int own = cluster_of(item);
    if (!item.is_layer()) {
      for (int value : {item.input, item.other})
        if (item.kind == Kind::Unknown && producing_cluster(value) >= 0) item.kind = kinds[value];
      if (item.kind == Kind::Unknown || !fits(item)) return;
    }
    bool is_joined = item.is_layer() && !item.is_connector;
    for (int value : {item.input, item.other}) {
      const int source = producing_cluster(value);
      if (source < 0 || source == own || !clusters.may_join(source, own)) continue;
      if (kinds[value] != item.kind || !agree(source, own)) continue;
      own = clusters.join(source, own);
      is_joined = true;
    }
    if (!is_joined) return;
    is_taken[own] = 1;
    kinds[item.output] = item.kind;
  }

  std::vector<std::vector<int>> run() {
    for (size_t k = 0; k < items.size(); ++k)
      for (int node : items[k].nodes) {
        item_of[node] = static_cast<int>(k);
        if (node != items[k].nodes[0]) clusters.join(clusters.of[items[k].nodes[0]], clusters.of[node]);
      }
    for (Item& item : items) take(item);
    std::vector<std::vector<int>> regions;
    for (size_t cluster = 0; cluster < clusters.members.size(); ++cluster) {
      if (!is_taken[cluster] || clusters.members[cluster].empty()) continue;
      std::set<int> found;
      for (int node : clusters.members[cluster]) found.insert(item_of[node]);
      regions.emplace_back(found.begin(), found.end());
    }
    return regions;
  }
};

}  // namespace

std::vector<std::vector<int>> find_regions(const Graph& graph, std::vector<Item>& items) {
  return RegionFinder(graph, items).run();
}

void spread_kinds(const Graph& graph, std::vector<Item>& items) {
  std::vector<Kind> kinds(graph.values.size(), Kind::Unknown);
  for (Item& item : items) {
    for (int value : {item.input, item.other})
      if (item.kind == Kind::Unknown && value >= 0) item.kind = kinds[value];
    kinds[item.output] = item.kind;
  }
}

}  // namespace spdy
