/* What the plugin links or looks up and no test of ours depends on: operator descriptions of the old interface (kept because
 * the plugin reads them back), logs, dumps, profiling, and functions that may do nothing. */
#include "stub.h"
#include <stdlib.h>
#include <string.h>

struct aclTensorDesc { aclDataType type; aclFormat format; int count; int64_t sizes[16]; };
struct aclDataBuffer { void *data; size_t size; };
struct aclopAttr { int unused; };

aclTensorDesc *aclCreateTensorDesc(aclDataType type, int count, const int64_t *sizes, aclFormat format) {
    aclTensorDesc *d = calloc(1, sizeof *d);
    d->type = type, d->format = format, d->count = count < 16 ? count : 16;
    for (int i = 0; i < d->count; i++)
        d->sizes[i] = sizes[i];
    return d;
}
void aclDestroyTensorDesc(const aclTensorDesc *d) { free((void *)d); }
aclError aclGetTensorDescDimV2(const aclTensorDesc *d, size_t index, int64_t *size) { *size = d->sizes[index]; return OK; }
aclFormat aclGetTensorDescFormat(const aclTensorDesc *d) { return d->format; }
size_t aclGetTensorDescNumDims(const aclTensorDesc *d) { return d->count; }
aclDataType aclGetTensorDescType(const aclTensorDesc *d) { return d->type; }
void aclSetTensorDescName(aclTensorDesc *d, const char *name) {}
aclError aclSetTensorFormat(aclTensorDesc *d, aclFormat format) { return OK; }
aclError aclSetTensorPlaceMent(aclTensorDesc *d, aclMemType where) { return OK; }
aclError aclSetTensorShape(aclTensorDesc *d, int count, const int64_t *sizes) { return OK; }
aclDataBuffer *aclCreateDataBuffer(void *data, size_t size) {
    aclDataBuffer *b = malloc(sizeof *b);
    b->data = data, b->size = size;
    return b;
}
aclError aclDestroyDataBuffer(const aclDataBuffer *b) { free((void *)b); return OK; }
aclopAttr *aclopCreateAttr() { return calloc(1, sizeof(aclopAttr)); }
void aclopDestroyAttr(const aclopAttr *a) { free((void *)a); }
aclError aclopSetAttrBool(aclopAttr *a, const char *n, uint8_t v) { return OK; }
aclError aclopSetAttrDataType(aclopAttr *a, const char *n, aclDataType v) { return OK; }
aclError aclopSetAttrFloat(aclopAttr *a, const char *n, float v) { return OK; }
aclError aclopSetAttrInt(aclopAttr *a, const char *n, int64_t v) { return OK; }
aclError aclopSetAttrListBool(aclopAttr *a, const char *n, int c, const uint8_t *v) { return OK; }
aclError aclopSetAttrListFloat(aclopAttr *a, const char *n, int c, const float *v) { return OK; }
aclError aclopSetAttrListInt(aclopAttr *a, const char *n, int c, const int64_t *v) { return OK; }
aclError aclopSetAttrListListInt(aclopAttr *a, const char *n, int c, const int *s, const int64_t *const v[]) { return OK; }
aclError aclopSetAttrString(aclopAttr *a, const char *n, const char *v) { return OK; }

void aclAppLog(aclLogLevel level, const char *function, const char *file, uint32_t line, const char *format, ...) {}
aclError aclmdlInitDump() { return OK; }
aclError aclmdlFinalizeDump() { return OK; }
aclError aclmdlSetDump(const char *path) { return OK; }
aclError aclrtProcessReport(int32_t timeout) { return OK; }
aclError aclrtSubscribeReport(uint64_t thread, aclrtStream stream) { return OK; }
aclError aclrtUnSubscribeReport(uint64_t thread, aclrtStream stream) { return OK; }
aclError aclrtSetOpWaitTimeout(uint32_t timeout) { return OK; }
aclError aclrtSetOpExecuteTimeOut(uint32_t timeout) { return OK; }
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode mode) { return OK; }
aclError aclrtSetStreamFailureMode(aclrtStream stream, uint64_t mode) { return OK; }

#ifndef ACL_HEADERS /* their prototypes are the plugin's own or long; a caller sees an operator that is not there, or success */
aclError aclopCompileAndExecute(const char *name, ...) { return fail(OPERATOR_MISSING, "the stub has no operator %s", name); }
aclError aclrtBinaryGetFunction(void) { return OPERATOR_MISSING; }
aclError aclrtBinaryLoadFromData(void) { return OPERATOR_MISSING; }
aclError aclrtGetFunctionAddr(void) { return OPERATOR_MISSING; }
int rtDevBinaryRegister(void) { return OK; }
int rtFunctionRegister(void) { return OK; }
int rtGetC2cCtrlAddr(void) { return OK; }
int rtKernelLaunch(void) { return OPERATOR_MISSING; }
int MsprofRegisterCallback(void) { return OK; }
int MsprofReportAdditionalInfo(void) { return OK; }
int MsprofReportApi(void) { return OK; }
int MsprofReportCompactInfo(void) { return OK; }
uint64_t MsprofGetHashId(const char *text, size_t size) { return size; }
uint64_t MsprofSysCycleTime(void) { return 1; }
#endif
