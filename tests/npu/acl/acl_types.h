/* The few types of the ACL runtime interface that the stub needs, so that it builds on a machine without CANN. With ACL_HEADERS
 * defined they come from the vendor's own headers instead, and the compiler checks every prototype of the stub against them. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef ACL_HEADERS
#include "acl/acl.h"
#include "acl/acl_op_compiler.h"
#else
typedef int aclError;
typedef void *aclrtStream, *aclrtEvent, *aclrtContext, *aclmdlRI, *aclrtTaskGrp, *aclrtDrvMemHandle;
typedef void *aclrtBinHandle, *aclrtFuncHandle;
typedef void (*aclrtHostFunc)(void *args);
typedef void (*aclrtCallback)(void *data);
typedef struct aclTensorDesc aclTensorDesc;
typedef struct aclDataBuffer aclDataBuffer;
typedef struct aclopAttr aclopAttr;
/* Enumerations are ints to a caller. */
typedef int aclDataType, aclFormat, aclMemType, aclLogLevel, aclDeviceInfo, aclrtMemAttr, aclrtMemcpyKind, aclrtMemMallocPolicy;
typedef int aclrtMemHandleType, aclrtMemAllocationType, aclrtMemLocationType, aclrtMemGranularityOptions, aclrtLastErrLevel;
typedef int aclrtStreamStatus, aclrtEventRecordedStatus, aclrtEventWaitStatus, aclmdlRICaptureMode, aclmdlRICaptureStatus;
typedef int aclrtFloatOverflowMode, aclrtCallbackBlockType, aclrtHostRegisterType, aclCompileOpt, aclOpCompileFlag;
typedef int aclrtDevAttr, aclrtDevResLimitType;
typedef struct { uint32_t id; aclrtMemLocationType type; } aclrtMemLocation;
typedef struct {
    aclrtMemHandleType handleType;
    aclrtMemAllocationType allocationType;
    aclrtMemAttr memAttr;
    aclrtMemLocation location;
    uint64_t reserve;
} aclrtPhysicalMemProp;
typedef struct { char bytes[16]; } aclrtUuid;
#define ACL_IPC_EVENT_HANDLE_SIZE 64
typedef struct { char reserved[ACL_IPC_EVENT_HANDLE_SIZE]; } aclrtIpcEventHandle;
enum { ACL_MEMCPY_HOST_TO_HOST, ACL_MEMCPY_HOST_TO_DEVICE, ACL_MEMCPY_DEVICE_TO_HOST, ACL_MEMCPY_DEVICE_TO_DEVICE, ACL_MEMCPY_DEFAULT };
enum { ACL_STREAM_STATUS_COMPLETE, ACL_STREAM_STATUS_NOT_READY };
enum { ACL_EVENT_RECORDED_STATUS_NOT_READY, ACL_EVENT_RECORDED_STATUS_COMPLETE };
enum { ACL_EVENT_WAIT_STATUS_COMPLETE, ACL_EVENT_WAIT_STATUS_NOT_READY };
enum { ACL_MODEL_RI_CAPTURE_STATUS_NONE, ACL_MODEL_RI_CAPTURE_STATUS_ACTIVE };
#define ACL_EVENT_EXTERNAL 0x20U
#endif

/* Numbers of errors, as the plugin's error table has them. */
enum {
    OK = 0,
    BAD_PARAMETER = 107000,
    BAD_DEVICE = 107001,
    NO_CONTEXT = 107002,
    BAD_HANDLE = 107017,
    STREAM_CAPTURED = 107027,
    NOT_CAPTURED = 107029,
    NOT_WHILE_CAPTURING = 107030,
    NOT_SUPPORTED = 207000,
    OUT_OF_MEMORY = 207001,
    UNALIGNED = 200003,
    EVENT_UNFINISHED = 507006,
    DEVICE_LOST = 507010,
    KERNEL_FAILED = 507035,
    DRIVER_FAILED = 507899,
    UPDATE_MISMATCH = 207019,
    OPERATOR_MISSING = 100024,
};
