// Running an instance: each action is divided on ONNX Runtime's threads.
#include "instance.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>

#include "graph.h"

namespace spdy {

namespace {

MapOp map_op(Op op) {
  switch (op) {
    case Op::Add: return MapOp::Add;
    case Op::Mul: return MapOp::Mul;
    case Op::Clamp: return MapOp::Clamp;
    case Op::Leaky: return MapOp::Leaky;
    case Op::HardSwish: return MapOp::HardSwish;
    case Op::HardSigmoid: return MapOp::HardSigmoid;
    case Op::Sigmoid: return MapOp::Sigmoid;
    case Op::Silu: return MapOp::Silu;
    default: return MapOp::Gelu;
  }
}

// One row of a phase: target[x] = source[x * stride + first], zeros beyond the source.
void copy_row(const float* source, int64_t width, int64_t first, int64_t stride, float* target, int64_t count) {
  const int64_t there = std::min(count, first < width ? (width - first + stride - 1) / stride : 0);
  if (stride == 1) std::memcpy(target, source + first, static_cast<size_t>(there) * sizeof(float));
  else if (stride == 2)  // a constant, so it becomes shuffles of vectors
    for (int64_t x = 0; x < there; ++x) target[x] = source[x * 2 + first];
  else
    for (int64_t x = 0; x < there; ++x) target[x] = source[x * stride + first];
  std::fill(target + there, target + count, 0.f);
}

}  // namespace

void Instance::apply_maps(const Action& action, const float* source, float* target, int64_t channel, int64_t pixel, int64_t vectors) const {
  MapStep steps[kMostSteps];
  int count = 0;
  for (const auto& [fused, other] : action.maps) {
    MapStep& step = steps[count++];
    step.op = map_op(fused.op);
    step.other = other < 0 ? nullptr : planes_[other].data + channel * planes_[other].step + pixel;
    step.low = fused.low;
    step.high = fused.high;
  }
  program_.kernels->map(source, target, vectors, planes_[action.target].valid, pixel, steps, count);
}

void Instance::run_layer(const Action& action, size_t task) const {
  const Kernels& kernels = *program_.kernels;
  const Step& step = *action.step;
  const Plane &source = planes_[action.source], &target = planes_[action.target];
  const Plane* residual = action.residual < 0 ? nullptr : &planes_[action.residual];
  const size_t parts = action.parts.size() - 1;
  const int64_t chunk = static_cast<int64_t>(task / parts), part = static_cast<int64_t>(task % parts);
  const int64_t first = chunk * action.vectors / action.chunks, end = (chunk + 1) * action.vectors / action.chunks;
  Tile tile;
  tile.output_step = target.step;
  tile.residual = nullptr;
  tile.residual_step = residual ? residual->step : 0;
  tile.valid = target.valid;
  tile.low = action.low;
  tile.high = action.high;
  // The next chunk's lines come while this one is computed: hardware doesn't follow that many channels.
  const int64_t pixels = (end - first) * kernels.lanes, next = end * kernels.lanes;
  const int64_t ahead = next + source.readers.front().high[0] * target.pitch;
  const bool is_ahead = chunk + 1 < action.chunks;
  int64_t channel_ahead = 0;
  auto fetch = [&](const Plane& plane, int64_t channel, int64_t pixel) {
    const float* line = plane.data + channel * plane.step + pixel;
    for (int64_t x = 0; x < pixels; x += kAlign) __builtin_prefetch(line + x, 0, 2);
  };
  for (int64_t block = 0; block < action.blocks; ++block)
    for (size_t at = action.parts[part]; at < action.parts[part + 1]; ++at) {
      const Group& group = step.packed.groups[at];
      const int64_t* cut = action.cuts.data() + static_cast<int64_t>(at) * (action.blocks + 1) + block;
      const int outputs = kBlocks[group.block], widest = kernels.widest[group.block];
      if (is_ahead && !block) {
        for (int one = 0; one < outputs; ++one) {
          for (int64_t k = 0; k * step.outputs < source.channels && channel_ahead < source.channels; ++k)
            fetch(source, channel_ahead++, ahead);
          if (residual) fetch(*residual, group.first + one, next);
          fetch(target, group.first + one, next);
        }
      }
      tile.is_last = block + 1 == action.blocks;
      tile.offsets = action.offsets.data() + group.begin + cut[0];
      tile.values = step.packed.values.data() + group.values + cut[0] * outputs;
      tile.taps = cut[1] - cut[0];
      tile.bias = block ? nullptr : step.bias.data() + group.first;
      const int64_t pieces = (end - first + widest - 1) / widest;
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const int64_t from = first + piece * (end - first) / pieces, to = first + (piece + 1) * (end - first) / pieces;
        tile.pixel = from * kernels.lanes;
        tile.input = source.data + tile.pixel;
        tile.output = target.data + group.first * target.step + tile.pixel;
        if (residual) tile.residual = residual->data + group.first * residual->step + tile.pixel;
        kernels.tile[group.block][to - from](tile);
      }
      if (action.maps.empty() || !tile.is_last) continue;
      for (int64_t channel = group.first; channel < group.first + outputs; ++channel) {
        float* data = target.data + channel * target.step + first * kernels.lanes;
        apply_maps(action, data, data, channel, first * kernels.lanes, end - first);
      }
    }
}

void Instance::run_map(const Action& action, size_t task) const {
  const Plane &source = planes_[action.source], &target = planes_[action.target];
  const int64_t channel = static_cast<int64_t>(task);
  apply_maps(action, source.data + channel * source.step, target.data + channel * target.step, channel, 0, action.vectors);
}

void Instance::copy_in(const Action& action, size_t task) const {
  const Copy& copy = action.copy;
  const Plane& target = planes_[action.target];
  const int64_t* size = copy.size;
  if (copy.kind == Kind::Rows) {
    const int64_t row = static_cast<int64_t>(task) * kRows, count = std::min(kRows, size[3] - row);
    const float* source = sources_[copy.value] + row * size[1];
    for (int64_t channel = 0; channel < size[1]; ++channel) {
      float* to = target.data + channel * target.step + row;
      for (int64_t x = 0; x < count; ++x) to[x] = source[x * size[1] + channel];
    }
    return;
  }
  const int64_t first = static_cast<int64_t>(task) * kCopied, end = std::min(first + kCopied, size[1]);
  for (int64_t channel = first; channel < end; ++channel)
    for (int64_t image = 0; image < size[0]; ++image) {
      int64_t pitch = size[3];
      const float* source = nullptr;
      if (copy.source < 0) {
        source = sources_[copy.value] + (image * size[1] + channel) * size[2] * size[3];
      } else {
        const Plane& plane = planes_[copy.source];
        pitch = plane.pitch;
        source = plane.data + channel * plane.step + image * plane.rows * plane.pitch;
      }
      for (int64_t y = 0; y < target.height; ++y) {
        float* line = target.data + channel * target.step + (image * target.rows + y) * target.pitch;
        for (const auto& [down, right] : copy.phases) {
          const int64_t row = y * copy.stride[0] + down;
          if (row >= size[2]) std::fill(line, line + target.width, 0.f);
          else copy_row(source + row * pitch, size[3], right, copy.stride[1], line, target.width);
          line += size[1] * target.step;
        }
      }
    }
}

void Instance::copy_out(const Action& action, size_t task) const {
  const Copy& copy = action.copy;
  const Plane& source = planes_[action.source];
  const int64_t* size = copy.size;
  float* target = targets_[copy.value];
  if (copy.kind == Kind::Rows) {
    // Blocks of channels whose lines stay in the first cache while each row is written along them.
    const int64_t row = static_cast<int64_t>(task) * kRows, end = std::min(row + kRows, size[3]);
    for (int64_t first = 0; first < size[1]; first += kRows)
      for (int64_t x = row; x < end; ++x)
        for (int64_t channel = first; channel < std::min(first + kRows, size[1]); ++channel)
          target[x * size[1] + channel] = source.data[channel * source.step + x];
    return;
  }
  const int64_t first = static_cast<int64_t>(task) * kCopied, end = std::min(first + kCopied, size[1]);
  for (int64_t channel = first; channel < end; ++channel)
    for (int64_t image = 0; image < size[0]; ++image)
      for (int64_t y = 0; y < size[2]; ++y)
        std::memcpy(target + ((image * size[1] + channel) * size[2] + y) * size[3],
                    source.data + channel * source.step + (image * source.rows + y) * source.pitch, static_cast<size_t>(size[3]) * sizeof(float));
}

void Instance::run_task(const Action& action, size_t task) const {
  switch (action.what) {
    case Action::In: return copy_in(action, task);
    case Action::Out: return copy_out(action, task);
    case Action::Layer: return run_layer(action, task);
    case Action::Map: return run_map(action, task);
  }
}

void Instance::run(const Api& api, OrtKernelContext* context, std::vector<double>* seconds) {
  for (const auto& [value, index] : program_.inputs) {
    const OrtValue* tensor = nullptr;
    const void* data = nullptr;
    check(api, api.KernelContext_GetInput(context, index, &tensor));
    check(api, api.GetTensorData(tensor, &data));
    sources_[value] = static_cast<const float*>(data);
  }
  for (const auto& [value, index] : program_.outputs) {
    OrtValue* tensor = nullptr;
    void* data = nullptr;
    check(api, api.KernelContext_GetOutput(context, index, dims_[value].data(), dims_[value].size(), &tensor));
    check(api, api.GetTensorMutableData(tensor, &data));
    targets_[value] = static_cast<float*>(data);
  }
  for (const Action& action : actions_) {
    const bool is_step = action.what == Action::Layer || action.what == Action::Map;
    if (!action.tasks || (is_step && !action.vectors)) continue;
    if (!seconds) {
      run_action(api, context, action);
      continue;
    }
    const auto started = std::chrono::steady_clock::now();
    run_action(api, context, action);
    const size_t at = action.step ? static_cast<size_t>(action.step - program_.steps.data()) : program_.steps.size();
    (*seconds)[at] += std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
  }
}

void Instance::run_action(const Api& api, OrtKernelContext* context, const Action& action) const {
  if (action.is_small || action.tasks == 1) {
    for (int64_t task = 0; task < action.tasks; ++task) run_task(action, static_cast<size_t>(task));
    return;
  }
  struct Job {
    const Instance* self;
    const Action* action;
  } job{this, &action};
  auto work = [](void* data, size_t task) {
    const Job* mine = static_cast<const Job*>(data);
    mine->self->run_task(*mine->action, task);
  };
  void (*function)(void*, size_t) = work;
  check(api, api.KernelContext_ParallelFor(context, function, static_cast<size_t>(action.tasks), size_t{0}, &job));
}

State::State(const Api& api, const Program& program, Profile profile)
    : api_(api), program_(program), profile_(std::move(profile)), seconds_(program.steps.size() + 1, 0.0) {}

// One line a step: its mean seconds, whether it is a layer, and the names of the tensors that it makes. The copies have none.
State::~State() {
  const int64_t counted = runs_ - profile_.warmup;
  if (profile_.path.empty() || counted < 1) return;
  std::FILE* file = std::fopen(profile_.path.c_str(), "a");
  if (!file) return;  // who reads it finds it missing
  for (size_t k = 0; k < seconds_.size(); ++k) {
    const bool is_step = k < program_.steps.size();
    std::fprintf(file, "%.9e\t%d", seconds_[k] / static_cast<double>(counted), is_step && program_.steps[k].is_layer);
    for (size_t name = 0; is_step && name < program_.steps[k].names.size(); ++name)
      std::fprintf(file, "\t%s", program_.steps[k].names[name].c_str());
    std::fputc('\n', file);
  }
  std::fclose(file);
}

std::unique_ptr<Instance> State::take(const std::vector<Shape>& shapes) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = std::find_if(idle_.rbegin(), idle_.rend(), [&](const auto& one) { return one->shapes() == shapes; });
    if (found != idle_.rend()) {
      std::unique_ptr<Instance> taken = std::move(*found);
      idle_.erase(std::next(found).base());
      return taken;
    }
  }
  return std::make_unique<Instance>(program_, shapes);
}

void State::compute(OrtKernelContext* context) {
  constexpr size_t most_idle = 16;
  std::vector<Shape> shapes;
  for (const auto& [value, index] : program_.inputs) {
    const OrtValue* tensor = nullptr;
    check(api_, api_.KernelContext_GetInput(context, index, &tensor));
    OrtTensorTypeAndShapeInfo* info = nullptr;
    check(api_, api_.GetTensorTypeAndShape(tensor, &info));
    size_t rank = 0;
    OrtStatus* failed = api_.GetDimensionsCount(info, &rank);
    Shape shape(rank);
    if (!failed && rank) failed = api_.GetDimensions(info, shape.data(), rank);
    api_.ReleaseTensorTypeAndShapeInfo(info);
    check(api_, failed);
    shapes.push_back(std::move(shape));
  }
  std::unique_ptr<Instance> instance = take(shapes);
  if (profile_.path.empty()) {
    instance->run(api_, context, nullptr);
  } else {
    std::vector<double> seconds(seconds_.size(), 0.0);
    instance->run(api_, context, &seconds);
    std::lock_guard<std::mutex> lock(mutex_);
    if (++runs_ > profile_.warmup)
      for (size_t k = 0; k < seconds.size(); ++k) seconds_[k] += seconds[k];
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (idle_.size() >= most_idle) idle_.erase(idle_.begin());
  idle_.push_back(std::move(instance));
}

}  // namespace spdy
