// The provider as ONNX Runtime sees it: a C ABI that no exception crosses.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "cpu.h"
#include "failure.h"
#include "graph.h"
#include "program.h"
#include "region.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace spdy {
namespace {

constexpr char kName[] = "SpdyExecutionProvider";
constexpr char kOptions[] = "ep.spdyexecutionprovider.";

template <class Function>
OrtStatus* guarded(const Api& api, Function function) noexcept {
  try {
    function();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return api.CreateStatus(ORT_FAIL, "SpdyExecutionProvider: out of memory");
  } catch (const std::exception& error) {
    return api.CreateStatus(ORT_FAIL, (std::string("SpdyExecutionProvider: ") + error.what()).c_str());
  } catch (...) {
    return api.CreateStatus(ORT_FAIL, "SpdyExecutionProvider: unknown error");
  }
}

struct Compiled : ComputeSlots {
  const Api& api;
  Program program;
  Profile profile;

  Compiled(const Api& with, Program made, Profile wanted)
      : ComputeSlots{}, api(with), program(std::move(made)), profile(std::move(wanted)) {
    ort_version_supported = kApiVersion;
    CreateState = [](OrtNodeComputeInfo* self, OrtNodeComputeContext*, void** state) {
      const Compiled& own = *reinterpret_cast<Compiled*>(self);
      return guarded(own.api, [&] { *state = new State(own.api, own.program, own.profile); });
    };
    Compute = [](OrtNodeComputeInfo* self, void* state, OrtKernelContext* context) {
      return guarded(reinterpret_cast<Compiled*>(self)->api, [&] { static_cast<State*>(state)->compute(context); });
    };
    ReleaseState = [](OrtNodeComputeInfo*, void* state) { delete static_cast<State*>(state); };
  }
};

struct Provider : EpSlots {
  const Api& api;
  const OrtLogger* logger;
  const Kernels* kernels = nullptr;
  Policy policy;
  Profile profile;

  Provider(const Api& with, const OrtSessionOptions* options, const OrtLogger* log) : EpSlots{}, api(with), logger(log) {
    ort_version_supported = kApiVersion;
    GetName = [](const OrtEp*) { return kName; };
    GetCapability = [](OrtEp* self, const OrtGraph* graph, OrtEpGraphSupportInfo* info) {
      Provider& own = *reinterpret_cast<Provider*>(self);
      return guarded(own.api, [&] { own.find(graph, info); });
    };
    Compile = [](OrtEp* self, const OrtGraph** graphs, const OrtNode** nodes, size_t count, OrtNodeComputeInfo** infos, OrtNode**) {
      Provider& own = *reinterpret_cast<Provider*>(self);
      return guarded(own.api, [&] {
        for (size_t k = 0; k < count; ++k) infos[k] = reinterpret_cast<OrtNodeComputeInfo*>(own.compile(graphs[k], nodes[k]));
      });
    };
    ReleaseNodeComputeInfos = [](OrtEp*, OrtNodeComputeInfo** infos, size_t count) {
      for (size_t k = 0; k < count; ++k) delete reinterpret_cast<Compiled*>(infos[k]);
    };
    kernels = &choose_kernels(option(options, "isa"));
    profile.path = option(options, "profile");
    profile.warmup = std::atoll(option(options, "profile_warmup").c_str());
    const std::string text = option(options, "min_sparsity");
    if (!text.empty()) {
      char* end = nullptr;
      policy = {std::strtod(text.c_str(), &end), 2};  // who says how many zeros wants no estimate
      if (*end || !(policy.min_sparsity >= 0 && policy.min_sparsity <= 1)) throw Failure("min_sparsity is \"" + text + "\": give a number from 0 to 1");
    }
  }

  std::string option(const OrtSessionOptions* options, const char* name) const {
    const std::string key = std::string(kOptions) + name;
    int is_there = 0;
    check(api, api.HasSessionConfigEntry(options, key.c_str(), &is_there));
    if (!is_there) return "";
    size_t size = 0;
    OrtStatus* asked = api.GetSessionConfigEntry(options, key.c_str(), static_cast<char*>(nullptr), &size);
    if (asked) api.ReleaseStatus(asked);
    std::string text(size, '\0');
    check(api, api.GetSessionConfigEntry(options, key.c_str(), text.data(), &size));
    return text.c_str();
  }

  void log(const std::string& text) const {
    OrtStatus* failed = api.Logger_LogMessage(logger, LOG_INFO, text.c_str(), "provider.cpp", 0, "SpdyExecutionProvider");
    if (failed) api.ReleaseStatus(failed);
  }

  void find(const OrtGraph* handle, OrtEpGraphSupportInfo* info) const {
    const Graph graph = read_graph(api, handle);
    std::vector<Item> items = find_items(graph, policy, [&](const std::string& text) { log(text); });
    for (const std::vector<int>& region : find_regions(graph, items)) {
      std::vector<const OrtNode*> nodes;
      for (int at : region) {
        for (int node : items[at].nodes) nodes.push_back(graph.nodes[node].handle);
        if (!items[at].is_layer()) continue;
        const Node& first = graph.nodes[items[at].nodes[0]];
        log(first.op + " " + first.name + " is taken: " + std::to_string(100 * items[at].sparsity).substr(0, 5) + " % zeros, " + kernels->isa);
      }
      const NodeFusionOptions options{kApiVersion, true};
      check(api, api.GetEpApi()->AddNodesToFuse(info, nodes.data(), nodes.size(), &options));
    }
  }

  Compiled* compile(const OrtGraph* handle, const OrtNode* node) const {
    const Graph graph = read_graph(api, handle);
    Program program = make_program(graph, names_of(api, node, true), names_of(api, node, false), *kernels);
    log("compiled a region of " + std::to_string(program.steps.size()) + " steps with " + kernels->isa + ":" + program.summary);
    return new Compiled(api, std::move(program), profile);
  }
};

struct Factory : FactorySlots {
  const Api& api;

  explicit Factory(const Api& with) : FactorySlots{}, api(with) {
    ort_version_supported = kApiVersion;
    GetName = [](const OrtEpFactory*) { return kName; };
    GetVendor = [](const OrtEpFactory*) { return "onnx-spdy"; };
    GetVendorId = [](const OrtEpFactory*) -> uint32_t { return 0; };
    GetVersion = [](const OrtEpFactory*) { return SPDY_VERSION; };
    GetSupportedDevices = [](OrtEpFactory* self, const OrtHardwareDevice* const* devices, size_t count, OrtEpDevice** found, size_t most,
                             size_t* number) {
      const Api& own = reinterpret_cast<Factory*>(self)->api;
      return guarded(own, [&] {
        *number = 0;
        for (size_t k = 0; k < count && *number < most; ++k) {
          if (own.HardwareDevice_Type(devices[k]) != DEVICE_CPU) continue;
          check(own, own.GetEpApi()->CreateEpDevice(self, devices[k], nullptr, nullptr, &found[*number]));
          ++*number;
        }
      });
    };
    CreateEp = [](OrtEpFactory* self, const OrtHardwareDevice* const*, const OrtKeyValuePairs* const*, size_t,
                  const OrtSessionOptions* options, const OrtLogger* logger, OrtEp** ep) {
      const Api& own = reinterpret_cast<Factory*>(self)->api;
      return guarded(own, [&] { *ep = reinterpret_cast<OrtEp*>(static_cast<EpSlots*>(new Provider(own, options, logger))); });
    };
    ReleaseEp = [](OrtEpFactory*, OrtEp* ep) { delete reinterpret_cast<Provider*>(ep); };
    CreateAllocator = [](OrtEpFactory*, const OrtMemoryInfo*, const OrtKeyValuePairs*, void** allocator) -> OrtStatus* {
      *allocator = nullptr;
      return nullptr;
    };
    ReleaseAllocator = [](OrtEpFactory*, void*) {};
    CreateDataTransfer = [](OrtEpFactory*, void** transfer) -> OrtStatus* {
      *transfer = nullptr;
      return nullptr;
    };
    IsStreamAware = [](const OrtEpFactory*) { return false; };
    CreateExternalResourceImporterForDevice = [](OrtEpFactory*, const OrtEpDevice*, void** importer) -> OrtStatus* {
      *importer = nullptr;
      return nullptr;
    };
    GetNumCustomOpDomains = [](OrtEpFactory*, size_t* count) -> OrtStatus* {
      *count = 0;
      return nullptr;
    };
  }
};

}  // namespace
}  // namespace spdy

EXPORTED OrtStatus* CreateEpFactories(const char*, const spdy::ApiBase* base, const OrtLogger*, OrtEpFactory** factories, size_t most,
                                      size_t* count) {
  const spdy::Api* api = base->GetApi(spdy::kApiVersion);
  *count = 0;
  if (!api) {  // older than 1.23: its first version has the means to say so
    const spdy::Api* old = base->GetApi(1);
    return old->CreateStatus(ORT_FAIL, "SpdyExecutionProvider needs ONNX Runtime 1.23 or newer");
  }
  return spdy::guarded(*api, [&] {
    if (!most) throw spdy::Failure("ONNX Runtime has no room for a factory");
    factories[0] = reinterpret_cast<OrtEpFactory*>(static_cast<spdy::FactorySlots*>(new spdy::Factory(*api)));
    *count = 1;
  });
}

EXPORTED OrtStatus* ReleaseEpFactory(OrtEpFactory* factory) {
  delete static_cast<spdy::Factory*>(reinterpret_cast<spdy::FactorySlots*>(factory));
  return nullptr;
}
