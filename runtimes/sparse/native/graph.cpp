#include "graph.h"

#include <algorithm>
#include <cstring>
#include <queue>

#include "failure.h"

namespace spdy {

void check(const Api& api, OrtStatus* status) {
  if (!status) return;
  std::string message = api.GetErrorMessage(status);
  api.ReleaseStatus(status);
  throw Failure(message);
}

namespace {

std::string name_of(const Api& api, const OrtValueInfo* info) {
  if (!info) return "";
  const char* name = nullptr;
  check(api, api.GetValueInfoName(info, &name));
  return name ? name : "";
}

std::vector<const OrtValueInfo*> infos_of(const Api& api, const OrtNode* node, bool inputs) {
  size_t count = 0;
  check(api, inputs ? api.Node_GetNumInputs(node, &count) : api.Node_GetNumOutputs(node, &count));
  std::vector<const OrtValueInfo*> infos(count);
  if (count) check(api, inputs ? api.Node_GetInputs(node, infos.data(), count) : api.Node_GetOutputs(node, infos.data(), count));
  return infos;
}

void read_type(const Api& api, const OrtValueInfo* info, Value& value) {
  const OrtTypeInfo* type = nullptr;
  check(api, api.GetValueInfoTypeInfo(info, &type));
  const OrtTensorTypeAndShapeInfo* tensor = nullptr;
  if (type) check(api, api.CastTypeInfoToTensorInfo(type, &tensor));
  if (!tensor) return;
  ElementType element = ELEMENT_UNDEFINED;
  check(api, api.GetTensorElementType(tensor, &element));
  value.is_float = element == ELEMENT_FLOAT;
  size_t rank = 0;
  check(api, api.GetDimensionsCount(tensor, &rank));
  // A tensor of unknown rank reads as one of rank 0; none of what is taken has rank 0, so it stays with ONNX Runtime.
  if (!rank) return;
  std::vector<int64_t> dims(rank);
  std::vector<const char*> symbols(rank, nullptr);
  check(api, api.GetDimensions(tensor, dims.data(), rank));
  check(api, api.GetSymbolicDimensions(tensor, symbols.data(), rank));
  value.has_shape = true;
  for (size_t axis = 0; axis < rank; ++axis)
    value.dims.push_back(dims[axis] >= 0 ? std::to_string(dims[axis]) : symbols[axis] ? symbols[axis] : "");
}

void read_constant(const Api& api, const OrtValueInfo* info, Value& value) {
  check(api, api.ValueInfo_IsConstantInitializer(info, &value.is_constant));
  if (!value.is_constant || !value.is_float) return;
  const OrtValue* tensor = nullptr;
  check(api, api.ValueInfo_GetInitializerValue(info, &tensor));
  if (!tensor) return;
  OrtTensorTypeAndShapeInfo* shape = nullptr;
  check(api, api.GetTensorTypeAndShape(tensor, &shape));
  size_t rank = 0;
  OrtStatus* failed = api.GetDimensionsCount(shape, &rank);
  std::vector<int64_t> dims(rank);
  if (!failed && rank) failed = api.GetDimensions(shape, dims.data(), rank);
  api.ReleaseTensorTypeAndShapeInfo(shape);
  check(api, failed);
  size_t count = 1;
  for (int64_t dim : dims) count *= static_cast<size_t>(dim);
  const void* data = nullptr;
  if (count) check(api, api.GetTensorData(tensor, &data));
  value.constant = {dims, static_cast<const float*>(data), count};
}

Attribute read_attribute(const Api& api, const OrtOpAttr* handle) {
  Attribute attribute;
  check(api, api.OpAttr_GetType(handle, &attribute.type));
  char buffer[512];
  size_t size = 0;
  if (attribute.type == ATTRIBUTE_UNDEFINED || attribute.type == ATTRIBUTE_FLOATS || attribute.type > ATTRIBUTE_STRING) {
    return attribute;  // no operator that is taken has one
  }
  OrtStatus* failed = api.ReadOpAttr(handle, attribute.type, buffer, sizeof(buffer), &size);
  if (failed) {  // longer than any that a taken operator has
    api.ReleaseStatus(failed);
    attribute.type = ATTRIBUTE_UNDEFINED;
    return attribute;
  }
  if (attribute.type == ATTRIBUTE_FLOAT) attribute.real = *reinterpret_cast<float*>(buffer);
  if (attribute.type == ATTRIBUTE_STRING) attribute.text.assign(buffer, strnlen(buffer, std::min(size, sizeof(buffer))));
  if (attribute.type == ATTRIBUTE_INT) attribute.ints = {*reinterpret_cast<int64_t*>(buffer)};
  if (attribute.type == ATTRIBUTE_INTS) {
    const int64_t* first = reinterpret_cast<int64_t*>(buffer);
    attribute.ints.assign(first, first + size / sizeof(int64_t));
  }
  return attribute;
}

struct Reader {
  const Api& api;
  Graph graph;

  int value_of(const OrtValueInfo* info) {
    std::string name = name_of(api, info);
    if (name.empty()) return -1;
    auto [place, is_new] = graph.by_name.emplace(name, static_cast<int>(graph.values.size()));
    if (is_new) {
      Value value;
      value.name = name;
      read_type(api, info, value);
      read_constant(api, info, value);
      graph.values.push_back(std::move(value));
    }
    return place->second;
  }

  Node read_node(const OrtNode* handle) {
    Node node;
    node.handle = handle;
    const char* text = nullptr;
    check(api, api.Node_GetName(handle, &text));
    node.name = text ? text : "";
    check(api, api.Node_GetOperatorType(handle, &text));
    node.op = text ? text : "";
    check(api, api.Node_GetDomain(handle, &text));
    node.domain = text ? text : "";
    for (const OrtValueInfo* info : infos_of(api, handle, true)) node.inputs.push_back(value_of(info));
    for (const OrtValueInfo* info : infos_of(api, handle, false)) node.outputs.push_back(value_of(info));
    size_t count = 0;
    check(api, api.Node_GetNumImplicitInputs(handle, &count));
    std::vector<const OrtValueInfo*> implicit(count);
    if (count) check(api, api.Node_GetImplicitInputs(handle, implicit.data(), count));
    for (const OrtValueInfo* info : implicit) node.implicit.push_back(value_of(info));
    check(api, api.Node_GetNumAttributes(handle, &count));
    std::vector<const OrtOpAttr*> attributes(count);
    if (count) check(api, api.Node_GetAttributes(handle, attributes.data(), count));
    for (const OrtOpAttr* attribute : attributes) {
      check(api, api.OpAttr_GetName(attribute, &text));
      node.attributes[text] = read_attribute(api, attribute);
    }
    return node;
  }
};

std::vector<Node> in_order(std::vector<Node> nodes, size_t values) {
  std::vector<int> producer(values, -1), missing(nodes.size(), 0);
  std::vector<std::vector<int>> readers(nodes.size());
  for (size_t k = 0; k < nodes.size(); ++k)
    for (int value : nodes[k].outputs)
      if (value >= 0) producer[value] = static_cast<int>(k);
  for (size_t k = 0; k < nodes.size(); ++k)
    for (const auto* list : {&nodes[k].inputs, &nodes[k].implicit})
      for (int value : *list)
        if (value >= 0 && producer[value] >= 0) {
          readers[producer[value]].push_back(static_cast<int>(k));
          ++missing[k];
        }
  std::priority_queue<int, std::vector<int>, std::greater<int>> ready;
  for (size_t k = 0; k < nodes.size(); ++k)
    if (!missing[k]) ready.push(static_cast<int>(k));
  std::vector<Node> sorted;
  while (!ready.empty()) {
    int k = ready.top();
    ready.pop();
    for (int reader : readers[k])
      if (!--missing[reader]) ready.push(reader);
    sorted.push_back(std::move(nodes[k]));
  }
  if (sorted.size() != nodes.size()) throw Failure("the graph has a cycle");
  return sorted;
}

}  // namespace

std::vector<std::string> names_of(const Api& api, const OrtNode* node, bool inputs) {
  std::vector<std::string> names;
  for (const OrtValueInfo* info : infos_of(api, node, inputs)) names.push_back(name_of(api, info));
  return names;
}

Graph read_graph(const Api& api, const OrtGraph* handle) {
  Reader reader{api, {}};
  size_t count = 0;
  check(api, api.Graph_GetNumNodes(handle, &count));
  std::vector<const OrtNode*> handles(count);
  if (count) check(api, api.Graph_GetNodes(handle, handles.data(), count));
  std::vector<Node> nodes;
  for (const OrtNode* node : handles) nodes.push_back(reader.read_node(node));
  Graph& graph = reader.graph;
  graph.nodes = in_order(std::move(nodes), graph.values.size());
  for (size_t k = 0; k < graph.nodes.size(); ++k) {
    for (int value : graph.nodes[k].outputs)
      if (value >= 0) graph.values[value].producer = static_cast<int>(k);
    for (const auto* list : {&graph.nodes[k].inputs, &graph.nodes[k].implicit})
      for (int value : *list)
        if (value >= 0) graph.values[value].consumers.push_back(static_cast<int>(k));
  }
  check(api, api.Graph_GetNumOutputs(handle, &count));
  std::vector<const OrtValueInfo*> outputs(count);
  if (count) check(api, api.Graph_GetOutputs(handle, outputs.data(), count));
  for (const OrtValueInfo* info : outputs) {
    auto found = graph.by_name.find(name_of(api, info));
    if (found != graph.by_name.end()) graph.values[found->second].is_graph_output = true;
  }
  return std::move(reader.graph);
}

}  // namespace spdy
