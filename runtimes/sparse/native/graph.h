// A graph of ONNX Runtime, read once into plain values.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

#include "ort_api.h"

namespace spdy {

struct Attribute {
  AttributeType type = ATTRIBUTE_UNDEFINED;
  std::vector<int64_t> ints;  // of INT, too
  float real = 0;
  std::string text;
};

struct Constant {
  std::vector<int64_t> dims;
  const float* data = nullptr;
  size_t count = 0;
};

struct Value {
  std::string name;
  bool is_float = false;             // a float32 tensor
  bool has_shape = false;
  std::vector<std::string> dims;     // a number, a symbol, or "" where ONNX Runtime knows neither
  bool is_graph_output = false;
  bool is_constant = false;          // and then a float32 tensor has `constant`
  Constant constant;
  int producer = -1;                 // index of a node
  std::vector<int> consumers;        // indices of nodes, one entry a use
};

struct Node {
  const OrtNode* handle = nullptr;
  std::string name, op, domain;
  std::vector<int> inputs;           // indices of values, -1: left out
  std::vector<int> outputs;
  std::vector<int> implicit;         // what its subgraphs read
  std::map<std::string, Attribute> attributes;
};

struct Graph {
  std::vector<Node> nodes;           // in topological order
  std::vector<Value> values;
  std::unordered_map<std::string, int> by_name;
};

// Throws Failure if ONNX Runtime refuses an answer.
Graph read_graph(const Api& api, const OrtGraph* graph);

// Throws Failure with ONNX Runtime's own message.
void check(const Api& api, OrtStatus* status);

// Names of a node's inputs or outputs, "" for one left out.
std::vector<std::string> names_of(const Api& api, const OrtNode* node, bool inputs);

}  // namespace spdy
