/* An accelerator's memory across processes of one box: exported under a name, opened by it, copied between.
 *
 * One interface over the runtimes that offer it, found by dlopen when first asked for: no header or library of a vendor is needed
 * to build this, and none is loaded where it isn't used. `kind` names the runtime as engine/devices does. A process calls this
 * with its device in use already (torch has initialised the runtime), from any thread. Calls return 0, or -1 with the reason in
 * ds_ipc_error() of the same thread. */

#include <dlfcn.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#define NAME 80     /* bytes of a name, whatever the kind */
#define DEVICES 64  /* of one process */
#define BATCH ((int64_t)16 << 20) /* bytes copied between two looks at `stop`: 0.7 ms over PCIe 4 */

static _Thread_local char error[256];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards loading and `streams` */

const char *ds_ipc_error(void) { return error; }

static int fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error, sizeof error, format, arguments);
    va_end(arguments);
    return -1;
}

struct runtime {
    const char *kind, *library;
    const char *const *names; /* of its functions, up to NULL */
    void **functions;         /* the same, once loaded */
    int (*enter)(int device); /* make the device this thread's */
    void (*leave)(void);
    int (*export)(char *at, uint64_t bytes, char *name);
    int (*open)(const char *name, void **out);
    int (*close)(const char *name, char *at); /* `at` NULL: the export itself */
    int (*new_stream)(void **out);
    int (*copy)(void *to, const void *from, int64_t bytes, int direction, void *stream);
    int (*wait)(void *stream);
    int loaded;
    void *streams[DEVICES];
};

/* Two runtimes call functions of known prototypes by address: the cast is each function's own. */
#define CALL(at, result, ...) ((result(*)(__VA_ARGS__))(at))

/* ---- Ascend (shared/NPU.md has the rules: slabs are exported whole, the exporter closes last) ------------------------------ */

enum { ACL_SET, ACL_EXPORT, ACL_IMPORT, ACL_CLOSE, ACL_STREAM, ACL_COPY, ACL_WAIT, ACL_WHY, ACL_COUNT };
static const char *const acl_names[] = {
    "aclrtSetDevice", "aclrtIpcMemGetExportKey", "aclrtIpcMemImportByKey", "aclrtIpcMemClose", "aclrtCreateStream",
    "aclrtMemcpyAsync", "aclrtSynchronizeStream", "aclGetRecentErrMsg", NULL};
static void *acl[ACL_COUNT];
#define ACL_KEY 65            /* the length the runtime asks for */
#define ACL_ANY_PROCESS 1     /* export: without a list of the processes that may import */
#define ACL_OTHER_DEVICES 1   /* import: also what another device exported */

static int acl_check(const char *what, int code) {
    if (!code) return 0;
    const char *why = CALL(acl[ACL_WHY], const char *, void)();
    return fail("%s: error %d%s%s", what, code, why ? ": " : "", why ? why : "");
}
static int acl_enter(int device) { return acl_check("aclrtSetDevice", CALL(acl[ACL_SET], int, int32_t)(device)); }
static void acl_leave(void) {} /* a thread's device stays */
static int acl_export(char *at, uint64_t bytes, char *name) {
    return acl_check("aclrtIpcMemGetExportKey", CALL(acl[ACL_EXPORT], int, void *, size_t, char *, size_t, uint64_t)(
                                                    at, bytes, name, ACL_KEY, ACL_ANY_PROCESS));
}
static int acl_open(const char *name, void **out) {
    return acl_check("aclrtIpcMemImportByKey",
                     CALL(acl[ACL_IMPORT], int, void **, const char *, uint64_t)(out, name, ACL_OTHER_DEVICES));
}
static int acl_close(const char *name, char *at) {
    (void)at;
    return acl_check("aclrtIpcMemClose", CALL(acl[ACL_CLOSE], int, const char *)(name));
}
static int acl_new_stream(void **out) { return acl_check("aclrtCreateStream", CALL(acl[ACL_STREAM], int, void **)(out)); }
static int acl_copy(void *to, const void *from, int64_t bytes, int direction, void *stream) {
    return acl_check("aclrtMemcpyAsync", CALL(acl[ACL_COPY], int, void *, size_t, const void *, size_t, int, void *)(
                                             to, bytes, from, bytes, direction, stream));
}
static int acl_wait(void *stream) { return acl_check("aclrtSynchronizeStream", CALL(acl[ACL_WAIT], int, void *)(stream)); }

/* ---- CUDA (driver interface) ----------------------------------------------------------------------------------------------- */

enum { CU_INIT, CU_DEVICE, CU_RETAIN, CU_PUSH, CU_POP, CU_EXPORT, CU_RANGE, CU_IMPORT, CU_CLOSE, CU_STREAM, CU_COPY, CU_WAIT,
       CU_WHY, CU_COUNT };
static const char *const cu_names[] = {
    "cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuIpcGetMemHandle",
    "cuMemGetAddressRange_v2", "cuIpcOpenMemHandle_v2", "cuIpcCloseMemHandle", "cuStreamCreate", "cuMemcpyAsync",
    "cuStreamSynchronize", "cuGetErrorString", NULL};
static void *cu[CU_COUNT];
#define CU_OTHER_DEVICES 1 /* open: with access between devices */
#define CU_NON_BLOCKING 1  /* a stream that doesn't wait for the default one */

struct cu_handle { char bytes[64]; };
struct cu_name { struct cu_handle handle; uint64_t offset; }; /* the runtime exports whole allocations: where in it */
_Static_assert(sizeof(struct cu_name) <= NAME && ACL_KEY <= NAME, "a name has room for both");

static int cu_check(const char *what, int code) {
    if (!code) return 0;
    const char *why = NULL;
    CALL(cu[CU_WHY], int, int, const char **)(code, &why);
    return fail("%s: error %d%s%s", what, code, why ? ": " : "", why ? why : "");
}
static int cu_retain(int device, void **context) {
    int handle;
    if (cu_check("cuInit", CALL(cu[CU_INIT], int, unsigned)(0))) return -1;
    if (cu_check("cuDeviceGet", CALL(cu[CU_DEVICE], int, int *, int)(&handle, device))) return -1;
    return cu_check("cuDevicePrimaryCtxRetain", CALL(cu[CU_RETAIN], int, void **, int)(context, handle));
}
static int cu_enter(int device) {
    static void *contexts[DEVICES]; /* the ones that torch works in; kept for good */
    pthread_mutex_lock(&lock);
    int failed = contexts[device] ? 0 : cu_retain(device, &contexts[device]);
    pthread_mutex_unlock(&lock);
    return failed ? -1 : cu_check("cuCtxPushCurrent", CALL(cu[CU_PUSH], int, void *)(contexts[device]));
}
static void cu_leave(void) {
    void *context;
    CALL(cu[CU_POP], int, void **)(&context);
}
static int cu_export(char *at, uint64_t bytes, char *name) {
    struct cu_name made = {0};
    uint64_t base;
    size_t size;
    if (cu_check("cuMemGetAddressRange",
                 CALL(cu[CU_RANGE], int, uint64_t *, size_t *, uint64_t)(&base, &size, (uint64_t)(uintptr_t)at)))
        return -1;
    made.offset = (uint64_t)(uintptr_t)at - base;
    if (bytes > size - made.offset) return fail("the range to export is not inside one allocation");
    if (cu_check("cuIpcGetMemHandle", CALL(cu[CU_EXPORT], int, struct cu_handle *, uint64_t)(&made.handle, base))) return -1;
    memcpy(name, &made, sizeof made);
    return 0;
}
static int cu_open(const char *name, void **out) {
    struct cu_name given;
    uint64_t base;
    memcpy(&given, name, sizeof given);
    if (cu_check("cuIpcOpenMemHandle",
                 CALL(cu[CU_IMPORT], int, uint64_t *, struct cu_handle, unsigned)(&base, given.handle, CU_OTHER_DEVICES)))
        return -1;
    *out = (void *)(uintptr_t)(base + given.offset);
    return 0;
}
static int cu_close(const char *name, char *at) {
    struct cu_name given;
    memcpy(&given, name, sizeof given);
    if (!at) return 0; /* an export ends with the allocation */
    return cu_check("cuIpcCloseMemHandle", CALL(cu[CU_CLOSE], int, uint64_t)((uint64_t)(uintptr_t)at - given.offset));
}
static int cu_new_stream(void **out) {
    return cu_check("cuStreamCreate", CALL(cu[CU_STREAM], int, void **, unsigned)(out, CU_NON_BLOCKING));
}
static int cu_copy(void *to, const void *from, int64_t bytes, int direction, void *stream) {
    (void)direction; /* addresses tell */
    return cu_check("cuMemcpyAsync", CALL(cu[CU_COPY], int, uint64_t, uint64_t, size_t, void *)(
                                         (uint64_t)(uintptr_t)to, (uint64_t)(uintptr_t)from, bytes, stream));
}
static int cu_wait(void *stream) { return cu_check("cuStreamSynchronize", CALL(cu[CU_WAIT], int, void *)(stream)); }

/* ---- the interface --------------------------------------------------------------------------------------------------------- */

static struct runtime runtimes[] = {
    {"npu", "libascendcl.so", acl_names, acl, acl_enter, acl_leave, acl_export, acl_open, acl_close, acl_new_stream, acl_copy,
     acl_wait, 0, {0}},
    {"cuda", "libcuda.so.1", cu_names, cu, cu_enter, cu_leave, cu_export, cu_open, cu_close, cu_new_stream, cu_copy, cu_wait, 0, {0}},
};

static int load(struct runtime *r) {
    if (r->loaded) return 0;
    void *library = dlopen(r->library, RTLD_NOW | RTLD_LOCAL);
    if (!library) return fail("%s", dlerror());
    for (int i = 0; r->names[i]; i++)
        if (!(r->functions[i] = dlsym(library, r->names[i]))) return fail("%s has no %s", r->library, r->names[i]);
    r->loaded = 1;
    return 0;
}

/* The runtime, loaded, with the device made this thread's; NULL with an error. */
static struct runtime *enter(const char *kind, int device) {
    if (device < 0 || device >= DEVICES) {
        fail("device %d: only 0 to %d can be", device, DEVICES - 1);
        return NULL;
    }
    for (size_t i = 0; i < sizeof runtimes / sizeof *runtimes; i++)
        if (!strcmp(runtimes[i].kind, kind)) {
            pthread_mutex_lock(&lock);
            int failed = load(&runtimes[i]);
            pthread_mutex_unlock(&lock);
            return failed || runtimes[i].enter(device) ? NULL : &runtimes[i];
        }
    fail("memory of %s can't be shared", kind);
    return NULL;
}

/* The name under which other processes open `bytes` at `at`; `name` has 80 bytes. */
int ds_ipc_export(const char *kind, int device, void *at, uint64_t bytes, char *name) {
    struct runtime *r = enter(kind, device);
    if (!r) return -1;
    memset(name, 0, NAME);
    int failed = r->export(at, bytes, name);
    r->leave();
    return failed;
}

int ds_ipc_open(const char *kind, int device, const char *name, void **out) {
    struct runtime *r = enter(kind, device);
    if (!r) return -1;
    int failed = r->open(name, out);
    r->leave();
    return failed;
}

/* What was opened at `at`, or with NULL the export itself; who exported closes last. */
int ds_ipc_close(const char *kind, int device, const char *name, void *at) {
    struct runtime *r = enter(kind, device);
    if (!r) return -1;
    int failed = r->close(name, at);
    r->leave();
    return failed;
}

static int stream_of(struct runtime *r, int device, void **out) {
    pthread_mutex_lock(&lock);
    int failed = r->streams[device] ? 0 : r->new_stream(&r->streams[device]);
    *out = r->streams[device];
    pthread_mutex_unlock(&lock);
    return failed;
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

/* As ds_copy (fork.c), where one side or both are a device's memory; direction 1: host to device, 2: device to host, 3: device to
 * device. What it says is copied has arrived. On a stream of its own: the caller has waited for who writes the source. -1: an error,
 * and how much has arrived is not known. */
int64_t ds_ipc_copy(const char *kind, int device, int direction, char *to, const char *from, const int64_t *to_at,
                    const int64_t *from_at, const int64_t *bytes, int64_t n, const int32_t *stop, int64_t deadline) {
    struct runtime *r = enter(kind, device);
    if (!r) return -1;
    void *stream = NULL;
    int64_t arrived = 0, sent = 0;
    int failed = stream_of(r, device, &stream);
    for (int64_t i = 0; i < n && !failed; i++)
        for (int64_t at = 0, piece; at < bytes[i] && !failed; at += piece) {
            if (sent == arrived && (__atomic_load_n(stop, __ATOMIC_RELAXED) || (deadline && now_ns() >= deadline))) goto out;
            piece = bytes[i] - at < BATCH - (sent - arrived) ? bytes[i] - at : BATCH - (sent - arrived);
            failed = r->copy(to + to_at[i] + at, from + from_at[i] + at, piece, direction, stream);
            if (!failed) sent += piece;
            if (!failed && sent - arrived >= BATCH && !(failed = r->wait(stream))) arrived = sent;
        }
    if (sent > arrived) { /* also after an error: nothing may touch memory once this returns */
        char why[sizeof error];
        memcpy(why, error, sizeof why);
        if (r->wait(stream)) {
            if (failed) memcpy(error, why, sizeof why); /* the first one */
            failed = -1;
        } else arrived = sent;
    }
out:
    r->leave();
    return failed ? -1 : arrived;
}
