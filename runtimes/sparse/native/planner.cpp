// Shapes, planes and actions of an instance.
#include <algorithm>
#include <limits>
#include <set>

#include "failure.h"
#include "instance.h"

namespace spdy {

namespace {

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

struct Pads {
  int64_t begin[2], end[2];
};

// (height, width) behind a convolution, and its pads. Throws Failure if the kernel is larger than what it reads.
Pads pads_of(const Window& window, const int64_t size[2], int64_t out[2]) {
  Pads pads;
  for (int axis = 0; axis < 2; ++axis) {
    const int64_t extent = (window.kernel[axis] - 1) * window.dilation[axis] + 1, stride = window.stride[axis];
    pads.begin[axis] = window.begin[axis];
    pads.end[axis] = window.end[axis];
    if (window.auto_pad != AutoPad::NotSet) pads.begin[axis] = pads.end[axis] = 0;
    if (window.auto_pad == AutoPad::SameUpper || window.auto_pad == AutoPad::SameLower) {
      const int64_t wanted = (size[axis] + stride - 1) / stride;
      const int64_t total = std::max<int64_t>((wanted - 1) * stride + extent - size[axis], 0);
      pads.begin[axis] = window.auto_pad == AutoPad::SameUpper ? total / 2 : total - total / 2;
      pads.end[axis] = total - pads.begin[axis];
    }
    const int64_t room = size[axis] + pads.begin[axis] + pads.end[axis] - extent;
    if (room < 0) throw Failure("a convolution's kernel is larger than its padded input");
    out[axis] = room / stride + 1;
  }
  return pads;
}

}  // namespace

struct Planner {
  Instance& self;
  const Program& program = self.program_;
  std::vector<Plane>& planes = self.planes_;
  std::vector<int> parent = {};                          // of each plane: union-find of those with one pitch
  std::map<std::pair<int, Kind>, int> plane_of = {};     // of each value as it is read
  std::vector<int> outside = std::vector<int>(program.values, 1);
  std::vector<std::vector<int64_t>> positions = {};      // of each layer's kernel: (plane row, column, phase)

  int root(int plane) { return parent[plane] == plane ? plane : parent[plane] = root(parent[plane]); }
  void join(int a, int b) { parent[root(a)] = root(b); }

  int add(Plane plane) {
    parent.push_back(static_cast<int>(planes.size()));
    planes.push_back(std::move(plane));
    return parent.back();
  }

  void sizes(int value, Kind kind, int64_t out[4]) const {  // images, channels, height, width
    const Shape& dims = self.dims_[value];
    if (kind == Kind::Image) {
      out[0] = dims.at(0);
      out[1] = dims.at(1);
      out[2] = dims.size() > 3 ? dims[2] : 1;
      out[3] = dims.back();
    } else {
      out[0] = out[2] = out[3] = 1;
      for (size_t axis = 0; axis + 1 < dims.size(); ++axis) out[3] *= dims[axis];
      out[1] = dims.back();
    }
  }

  int plain(int value, Kind kind) {
    auto [place, is_new] = plane_of.emplace(std::make_pair(value, kind), 0);
    if (is_new) {
      int64_t size[4];
      sizes(value, kind, size);
      Plane plane;
      plane.images = size[0];
      plane.channels = size[1];
      plane.height = size[2];
      plane.width = size[3];
      place->second = add(plane);
      if (outside[value]) {
        Action action;
        action.what = Action::In;
        action.target = place->second;
        action.copy.value = value;
        action.copy.kind = kind;
        action.copy.phases = {{0, 0}};
        std::copy(size, size + 4, action.copy.size);
        self.actions_.push_back(std::move(action));
      }
    }
    return place->second;
  }

  void infer(const Step& step) {
    Shape dims = self.dims_[step.input];
    if (step.is_layer) {
      const size_t rank = dims.size(), axis = step.kind == Kind::Image ? 1 : rank - 1;
      if (step.kind == Kind::Image && rank != static_cast<size_t>(step.window.rank) + 2) throw Failure("a convolution's input has another rank");
      if (rank < 2 || dims[axis] != step.inputs)
        throw Failure("a layer of " + std::to_string(step.inputs) + " input channels got another number");
      dims[axis] = step.outputs;
      if (step.kind == Kind::Image) {
        int64_t size[4], out[2];
        sizes(step.input, step.kind, size);
        pads_of(step.window, size + 2, out);
        for (int at = 0; at < step.window.rank; ++at) dims[at + 2] = out[2 - step.window.rank + at];
      }
    }
    for (const Fused& fused : step.fused)
      if (fused.other >= 0 && self.dims_[fused.other] != dims) throw Failure("operands of an element-wise node differ in shape");
    self.dims_[step.output] = dims;
  }

  // The plane that a layer reads: the value's own, or its phases if there is a stride.
  int source_of(const Step& step) {
    int64_t size[4], out[2] = {1, 0};
    sizes(step.input, step.kind, size);
    positions.emplace_back();
    std::vector<int64_t>& places = positions.back();
    if (step.kind == Kind::Rows) {
      places = {0, 0, 0};
      const int plane = plain(step.input, step.kind);
      planes[plane].readers.push_back({{0, 0}, {0, 0}, {1, size[3]}});
      return plane;
    }
    const Window& window = step.window;
    const Pads pads = pads_of(window, size + 2, out);
    Reach reach;
    reach.size[0] = out[0];
    reach.size[1] = out[1];
    for (int axis = 0; axis < 2; ++axis) {
      reach.low[axis] = floor_div(-pads.begin[axis], window.stride[axis]);
      reach.high[axis] = floor_div((window.kernel[axis] - 1) * window.dilation[axis] - pads.begin[axis], window.stride[axis]);
    }
    Copy copy;
    std::map<std::pair<int64_t, int64_t>, int64_t> phases;
    for (int64_t y = 0; y < window.kernel[0]; ++y)
      for (int64_t x = 0; x < window.kernel[1]; ++x) {
        const int64_t at[2] = {y * window.dilation[0] - pads.begin[0], x * window.dilation[1] - pads.begin[1]};
        const int64_t row = floor_div(at[0], window.stride[0]), column = floor_div(at[1], window.stride[1]);
        const std::pair<int64_t, int64_t> phase(at[0] - row * window.stride[0], at[1] - column * window.stride[1]);
        auto [place, is_new] = phases.emplace(phase, static_cast<int64_t>(phases.size()));
        if (is_new) copy.phases.push_back(phase);
        places.insert(places.end(), {row, column, place->second});
      }
    if (window.stride[0] == 1 && window.stride[1] == 1) {
      const int plane = plain(step.input, step.kind);
      planes[plane].readers.push_back(reach);
      return plane;
    }
    Plane plane;
    plane.images = size[0];
    plane.channels = size[1] * static_cast<int64_t>(copy.phases.size());
    plane.height = (size[2] + window.stride[0] - 1) / window.stride[0];
    plane.width = (size[3] + window.stride[1] - 1) / window.stride[1];
    plane.readers.push_back(reach);
    Action action;
    action.what = Action::In;
    if (outside[step.input]) copy.value = step.input;
    else copy.source = plain(step.input, step.kind);
    copy.kind = step.kind;
    std::copy(window.stride, window.stride + 2, copy.stride);
    std::copy(size, size + 4, copy.size);
    action.target = add(plane);
    action.copy = std::move(copy);
    self.actions_.push_back(std::move(action));
    return self.actions_.back().target;
  }

  void add_step(const Step& step) {
    Action action;
    action.what = step.is_layer ? Action::Layer : Action::Map;
    action.step = &step;
    action.source = step.is_layer ? source_of(step) : plain(step.input, step.kind);
    if (!step.is_layer) positions.emplace_back();
    outside[step.output] = 0;
    action.target = plain(step.output, step.kind);
    join(action.source, action.target);
    action.low = -std::numeric_limits<float>::infinity();
    action.high = -action.low;
    size_t next = 0;
    if (step.is_layer && next < step.fused.size() && step.fused[next].op == Op::Add) {
      action.residual = plain(step.fused[next++].other, step.kind);
      join(action.residual, action.target);
    }
    if (step.is_layer && next < step.fused.size() && step.fused[next].op == Op::Clamp) {
      action.low = step.fused[next].low;
      action.high = step.fused[next++].high;
    }
    for (; next < step.fused.size(); ++next) {
      const Fused& fused = step.fused[next];
      const int other = fused.other >= 0 ? plain(fused.other, step.kind) : -1;
      if (other >= 0) join(other, action.target);
      action.maps.emplace_back(fused, other);
    }
    self.actions_.push_back(std::move(action));
    for (const auto& [value, index] : program.outputs) {
      if (value != step.output) continue;
      Action out;
      out.what = Action::Out;
      out.source = plain(value, step.kind);
      out.copy.kind = step.kind;
      out.copy.value = value;
      sizes(value, step.kind, out.copy.size);
      self.actions_.push_back(std::move(out));
    }
  }

  void place_planes() {
    for (size_t k = 0; k < planes.size(); ++k) {
      Plane& top = planes[root(static_cast<int>(k))];
      const Plane& plane = planes[k];
      top.rows = std::max(top.rows, plane.height + plane.gap(0));
      top.pitch = std::max(top.pitch, plane.width + plane.gap(1));
    }
    for (size_t k = 0; k < planes.size(); ++k) {
      planes[k].rows = planes[root(static_cast<int>(k))].rows;
      planes[k].pitch = planes[root(static_cast<int>(k))].pitch;
      planes[k].place();
    }
  }

  const uint8_t* valid_of(const Plane& plane) {
    std::vector<uint8_t> bits(static_cast<size_t>(round_up(plane.span) / 8 + 2), 0);
    if (!plane.is_empty())
      for (int64_t image = 0; image < plane.images; ++image)
        for (int64_t y = 0; y < plane.height; ++y) {
          const int64_t first = (image * plane.rows + y) * plane.pitch;
          for (int64_t x = first; x < first + plane.width; ++x) bits[x >> 3] |= static_cast<uint8_t>(1 << (x & 7));
        }
    self.valid_.push_back(std::move(bits));
    return self.valid_.back().data();
  }

  // Planes of the same form follow each other in one buffer: their gaps stay zero.
  void place_buffers() {
    std::vector<size_t> last(planes.size(), 0);
    for (size_t k = 0; k < self.actions_.size(); ++k) {
      const Action& action = self.actions_[k];
      for (int plane : {action.source, action.target, action.residual, action.copy.source})
        if (plane >= 0) last[plane] = k;
      for (const auto& [fused, plane] : action.maps)
        if (plane >= 0) last[plane] = k;
    }
    struct Lent {
      int plane;
      float* data;
      size_t until;
    };
    std::vector<Lent> lent;
    for (size_t k = 0; k < self.actions_.size(); ++k) {
      const int target = self.actions_[k].target;
      if (target < 0) continue;
      Plane& plane = planes[target];
      auto same = [&](const Plane& other) {
        return plane.images == other.images && plane.channels == other.channels && plane.height == other.height &&
               plane.width == other.width && plane.pitch == other.pitch && plane.rows == other.rows && plane.step == other.step &&
               plane.start == other.start && plane.floats == other.floats;
      };
      auto found = std::find_if(lent.begin(), lent.end(), [&](const Lent& one) { return one.until < k && same(planes[one.plane]); });
      if (found == lent.end()) {
        self.memory_.emplace_back(plane.floats);
        lent.push_back({target, self.memory_.back().first, last[target]});
        plane.data = lent.back().data + plane.start;
      } else {
        plane.data = found->data + plane.start;
        *found = {target, found->data, last[target]};
      }
    }
  }

  // Blocks of input channels whose pixels of one tile stay in the first cache while all output channels read them.
  void cut(Action& action, int64_t pixels, int64_t kernel) const {
    constexpr int64_t cache = 9000;       // floats: 36 kB of 48; the rest is for weights and results
    constexpr int64_t fewest = 24;        // taps of a block: each one reads and writes the output once more
    const Step& step = *action.step;
    const Packed& packed = step.packed;
    const Plane& source = planes[action.source];
    const Reach& reach = source.readers.front();
    const int64_t lines = reach.high[0] - reach.low[0], line = pixels + reach.high[1] - reach.low[1];
    const int64_t touched = std::min(lines * source.pitch + line, (lines + 1) * line) * (source.channels / step.inputs);
    const int64_t taps = static_cast<int64_t>(packed.taps.size()) / static_cast<int64_t>(packed.groups.size());
    action.blocks = std::max<int64_t>(std::min((touched * step.inputs + cache - 1) / cache, taps / fewest), 1);
    for (const Group& group : packed.groups) {
      const uint32_t* first = packed.taps.data() + group.begin;
      for (int64_t block = 0; block <= action.blocks; ++block) {
        const int64_t channel = step.inputs * block / action.blocks;
        action.cuts.push_back(std::lower_bound(first, first + group.taps, channel * kernel) - first);
      }
    }
  }

  void divide(Action& action, const std::vector<int64_t>& places) {
    const Step& step = *action.step;
    const Plane& target = planes[action.target];
    planes[action.target].valid = valid_of(target);
    const int lanes = program.kernels->lanes;
    action.vectors = target.is_empty() ? 0 : round_up(target.span, lanes) / lanes;
    if (!step.is_layer) {
      action.tasks = target.channels;
      action.is_small = action.vectors * lanes * target.channels < (1 << 15);
      return;
    }
    const Packed& packed = step.packed;
    const Plane& source = planes[action.source];
    const int64_t kernel = static_cast<int64_t>(places.size() / 3);
    std::vector<int64_t> offsets;
    for (int64_t k = 0; k < kernel; ++k)
      offsets.push_back(places[3 * k + 2] * step.inputs * source.step + places[3 * k] * source.pitch + places[3 * k + 1]);
    action.offsets.resize(packed.taps.size());
    for (size_t k = 0; k < packed.taps.size(); ++k)
      action.offsets[k] = static_cast<int32_t>(packed.taps[k] / kernel * source.step + offsets[packed.taps[k] % kernel]);
    double taps[3] = {0, 0, 0};
    for (const Group& group : packed.groups) taps[group.block] += static_cast<double>(group.taps * kBlocks[group.block]);
    const int most = static_cast<int>(std::max_element(taps, taps + 3) - taps);
    const int64_t widest = program.kernels->widest[most];
    action.chunks = std::max<int64_t>((action.vectors + widest - 1) / widest, 1);
    cut(action, widest * lanes, kernel);
    const int64_t wanted = std::max<int64_t>((32 + action.chunks - 1) / action.chunks, 1);
    double all = 0, done = 0;
    auto weigh = [](const Group& group) { return static_cast<double>((group.taps + 4) * kBlocks[group.block]); };
    for (const Group& group : packed.groups) all += weigh(group);
    action.parts = {0};
    for (size_t k = 0; k < packed.groups.size(); ++k) {
      done += weigh(packed.groups[k]);
      if (done * static_cast<double>(wanted) >= all * static_cast<double>(action.parts.size()) && k + 1 < packed.groups.size())
        action.parts.push_back(k + 1);
    }
    action.parts.push_back(packed.groups.size());
    action.tasks = action.chunks * static_cast<int64_t>(action.parts.size() - 1);
    action.is_small = all * static_cast<double>(action.vectors) < 20000;
  }

  void run() {
    self.dims_.resize(program.values);
    self.sources_.resize(program.values);
    self.targets_.resize(program.values);
    for (size_t k = 0; k < program.inputs.size(); ++k) self.dims_[program.inputs[k].first] = self.shapes_[k];
    for (const Step& step : program.steps) outside[step.output] = 1;
    for (const Step& step : program.steps) {
      infer(step);
      add_step(step);
    }
    place_planes();
    place_buffers();
    size_t step = 0;
    for (Action& action : self.actions_) {
      if (action.what == Action::Layer || action.what == Action::Map) divide(action, positions[step++]);
      if (action.what == Action::Layer || action.what == Action::Map) continue;
      const bool is_rows = action.copy.kind == Kind::Rows;
      action.tasks = is_rows ? (action.copy.size[3] + kRows - 1) / kRows : (action.copy.size[1] + kCopied - 1) / kCopied;
      if (planes[action.what == Action::In ? action.target : action.source].is_empty()) action.tasks = 0;
      action.is_small = action.copy.size[0] * action.copy.size[1] * action.copy.size[2] * action.copy.size[3] < (1 << 14);
    }
  }
};

Instance::Instance(const Program& program, std::vector<Shape> shapes) : program_(program), shapes_(std::move(shapes)) {
  Planner planner{*this};
  planner.run();
}

}  // namespace spdy
