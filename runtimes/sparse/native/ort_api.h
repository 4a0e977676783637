// ONNX Runtime's C API, as far as this library uses it: an own declaration of the members, by position in `OrtApi` and
// by offset in the structs of the plugin interface (64-bit). Both only grow at their ends, so the numbers hold for every
// version from 1.23 on.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {
struct OrtStatus;
struct OrtLogger;
struct OrtValue;
struct OrtValueInfo;
struct OrtTypeInfo;
struct OrtTensorTypeAndShapeInfo;
struct OrtGraph;
struct OrtNode;
struct OrtOpAttr;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtHardwareDevice;
struct OrtKeyValuePairs;
struct OrtEpDevice;
struct OrtEpGraphSupportInfo;
struct OrtMemoryInfo;
struct OrtNodeComputeContext;
struct OrtEp;
struct OrtEpFactory;
struct OrtNodeComputeInfo;

enum OrtErrorCode { ORT_OK = 0, ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum ElementType { ELEMENT_UNDEFINED = 0, ELEMENT_FLOAT = 1, ELEMENT_INT64 = 7 };
enum AttributeType {
  ATTRIBUTE_UNDEFINED = 0, ATTRIBUTE_INT = 1, ATTRIBUTE_INTS = 2, ATTRIBUTE_FLOAT = 3, ATTRIBUTE_FLOATS = 4, ATTRIBUTE_STRING = 5
};
enum LoggingLevel { LOG_VERBOSE = 0, LOG_INFO = 1, LOG_WARNING = 2 };
enum DeviceType { DEVICE_CPU = 0 };
}

namespace spdy {

constexpr uint32_t kApiVersion = 23;  // the first that has every member below

struct NodeFusionOptions {
  uint32_t ort_version_supported;
  bool drop_constant_initializers;
};

struct EpApi {
  OrtStatus* (*CreateEpDevice)(OrtEpFactory*, const OrtHardwareDevice*, const OrtKeyValuePairs*, const OrtKeyValuePairs*,
                               OrtEpDevice**);
  void (*ReleaseEpDevice)(OrtEpDevice*);
  OrtStatus* (*AddNodesToFuse)(OrtEpGraphSupportInfo*, const OrtNode* const*, size_t, const NodeFusionOptions*);
};

struct Api {
  void* slots[380];

  template <class Function>
  Function at(int slot) const {
    return reinterpret_cast<Function>(slots[slot]);
  }

#define MEMBER(slot, name, result, ...)                                              \
  template <class... Arguments>                                                      \
  result name(Arguments... arguments) const {                                        \
    return at<result (*)(__VA_ARGS__)>(slot)(arguments...);                          \
  }
  MEMBER(0, CreateStatus, OrtStatus*, OrtErrorCode, const char*)
  MEMBER(2, GetErrorMessage, const char*, const OrtStatus*)
  MEMBER(51, GetTensorMutableData, OrtStatus*, OrtValue*, void**)
  MEMBER(55, CastTypeInfoToTensorInfo, OrtStatus*, const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo**)
  MEMBER(60, GetTensorElementType, OrtStatus*, const OrtTensorTypeAndShapeInfo*, ElementType*)
  MEMBER(61, GetDimensionsCount, OrtStatus*, const OrtTensorTypeAndShapeInfo*, size_t*)
  MEMBER(62, GetDimensions, OrtStatus*, const OrtTensorTypeAndShapeInfo*, int64_t*, size_t)
  MEMBER(63, GetSymbolicDimensions, OrtStatus*, const OrtTensorTypeAndShapeInfo*, const char**, size_t)
  MEMBER(65, GetTensorTypeAndShape, OrtStatus*, const OrtValue*, OrtTensorTypeAndShapeInfo**)
  MEMBER(90, KernelContext_GetInput, OrtStatus*, const OrtKernelContext*, size_t, const OrtValue**)
  MEMBER(91, KernelContext_GetOutput, OrtStatus*, OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)
  MEMBER(93, ReleaseStatus, void, OrtStatus*)
  MEMBER(99, ReleaseTensorTypeAndShapeInfo, void, OrtTensorTypeAndShapeInfo*)
  MEMBER(237, HasSessionConfigEntry, OrtStatus*, const OrtSessionOptions*, const char*, int*)
  MEMBER(238, GetSessionConfigEntry, OrtStatus*, const OrtSessionOptions*, const char*, char*, size_t*)
  MEMBER(247, Logger_LogMessage, OrtStatus*, const OrtLogger*, LoggingLevel, const char*, const char*, int, const char*)
  MEMBER(272, ReadOpAttr, OrtStatus*, const OrtOpAttr*, AttributeType, void*, size_t, size_t*)
  MEMBER(274, KernelContext_ParallelFor, OrtStatus*, const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*)
  MEMBER(289, GetValueInfoName, OrtStatus*, const OrtValueInfo*, const char**)
  MEMBER(290, GetValueInfoTypeInfo, OrtStatus*, const OrtValueInfo*, const OrtTypeInfo**)
  MEMBER(307, HardwareDevice_Type, DeviceType, const OrtHardwareDevice*)
  MEMBER(317, GetEpApi, const EpApi*)
  MEMBER(326, ValueInfo_GetInitializerValue, OrtStatus*, const OrtValueInfo*, const OrtValue**)
  MEMBER(331, ValueInfo_IsConstantInitializer, OrtStatus*, const OrtValueInfo*, bool*)
  MEMBER(340, Graph_GetNumOutputs, OrtStatus*, const OrtGraph*, size_t*)
  MEMBER(341, Graph_GetOutputs, OrtStatus*, const OrtGraph*, const OrtValueInfo**, size_t)
  MEMBER(344, Graph_GetNumNodes, OrtStatus*, const OrtGraph*, size_t*)
  MEMBER(345, Graph_GetNodes, OrtStatus*, const OrtGraph*, const OrtNode**, size_t)
  MEMBER(349, Node_GetName, OrtStatus*, const OrtNode*, const char**)
  MEMBER(350, Node_GetOperatorType, OrtStatus*, const OrtNode*, const char**)
  MEMBER(351, Node_GetDomain, OrtStatus*, const OrtNode*, const char**)
  MEMBER(353, Node_GetNumInputs, OrtStatus*, const OrtNode*, size_t*)
  MEMBER(354, Node_GetInputs, OrtStatus*, const OrtNode*, const OrtValueInfo**, size_t)
  MEMBER(355, Node_GetNumOutputs, OrtStatus*, const OrtNode*, size_t*)
  MEMBER(356, Node_GetOutputs, OrtStatus*, const OrtNode*, const OrtValueInfo**, size_t)
  MEMBER(357, Node_GetNumImplicitInputs, OrtStatus*, const OrtNode*, size_t*)
  MEMBER(358, Node_GetImplicitInputs, OrtStatus*, const OrtNode*, const OrtValueInfo**, size_t)
  MEMBER(359, Node_GetNumAttributes, OrtStatus*, const OrtNode*, size_t*)
  MEMBER(360, Node_GetAttributes, OrtStatus*, const OrtNode*, const OrtOpAttr**, size_t)
  MEMBER(363, OpAttr_GetType, OrtStatus*, const OrtOpAttr*, AttributeType*)
  MEMBER(364, OpAttr_GetName, OrtStatus*, const OrtOpAttr*, const char**)
  MEMBER(378, GetTensorData, OrtStatus*, const OrtValue*, const void**)
#undef MEMBER
};

struct ApiBase {
  const Api* (*GetApi)(uint32_t);
  const char* (*GetVersionString)();
};

// Slots of the structs that a provider fills. Those that stay null are not asked for, or have a default.
struct EpSlots {  // OrtEp
  uint32_t ort_version_supported;
  const char* (*GetName)(const OrtEp*);
  OrtStatus* (*GetCapability)(OrtEp*, const OrtGraph*, OrtEpGraphSupportInfo*);
  OrtStatus* (*Compile)(OrtEp*, const OrtGraph**, const OrtNode**, size_t, OrtNodeComputeInfo**, OrtNode**);
  void (*ReleaseNodeComputeInfos)(OrtEp*, OrtNodeComputeInfo**, size_t);
  void* rest[24];  // GetPreferredDataLayout and on
};

struct FactorySlots {  // OrtEpFactory
  uint32_t ort_version_supported;
  const char* (*GetName)(const OrtEpFactory*);
  const char* (*GetVendor)(const OrtEpFactory*);
  OrtStatus* (*GetSupportedDevices)(OrtEpFactory*, const OrtHardwareDevice* const*, size_t, OrtEpDevice**, size_t, size_t*);
  OrtStatus* (*CreateEp)(OrtEpFactory*, const OrtHardwareDevice* const*, const OrtKeyValuePairs* const*, size_t,
                         const OrtSessionOptions*, const OrtLogger*, OrtEp**);
  void (*ReleaseEp)(OrtEpFactory*, OrtEp*);
  uint32_t (*GetVendorId)(const OrtEpFactory*);
  const char* (*GetVersion)(const OrtEpFactory*);
  void* ValidateCompiledModelCompatibilityInfo;
  OrtStatus* (*CreateAllocator)(OrtEpFactory*, const OrtMemoryInfo*, const OrtKeyValuePairs*, void**);
  void (*ReleaseAllocator)(OrtEpFactory*, void*);
  OrtStatus* (*CreateDataTransfer)(OrtEpFactory*, void**);
  bool (*IsStreamAware)(const OrtEpFactory*);
  void* CreateSyncStreamForDevice;
  void* GetHardwareDeviceIncompatibilityDetails;
  OrtStatus* (*CreateExternalResourceImporterForDevice)(OrtEpFactory*, const OrtEpDevice*, void**);
  OrtStatus* (*GetNumCustomOpDomains)(OrtEpFactory*, size_t*);
  void* rest[8];  // GetCustomOpDomains and on
};

struct ComputeSlots {  // OrtNodeComputeInfo
  uint32_t ort_version_supported;
  OrtStatus* (*CreateState)(OrtNodeComputeInfo*, OrtNodeComputeContext*, void**);
  OrtStatus* (*Compute)(OrtNodeComputeInfo*, void*, OrtKernelContext*);
  void (*ReleaseState)(OrtNodeComputeInfo*, void*);
};

static_assert(offsetof(EpSlots, rest) == 40 && sizeof(EpSlots) >= 208);
static_assert(offsetof(FactorySlots, GetNumCustomOpDomains) == 128 && sizeof(FactorySlots) >= 168);

}  // namespace spdy
