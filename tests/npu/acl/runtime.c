/* A stub of the Ascend runtime (libascendcl.so) over host memory, so that the real torch-npu plugin runs on a machine
 * without CANN: devices, memory, streams, events, graphs and memory across processes behave as documented; operators are
 * not there (tests/npu/dispatch.py runs them as launches on the stub's streams).
 *
 * This file: settings, devices, errors, counters. memory.c: memory. streams.c: streams, events, graphs. absent.c: what is
 * asked for and never matters. */
#define _GNU_SOURCE
#include "stub.h"
#include <dlfcn.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
pthread_cond_t changed = PTHREAD_COND_INITIALIZER;

/* ---- settings ------------------------------------------------------------------------------------------------------ */

static struct settings read_settings;
static pthread_once_t read_once = PTHREAD_ONCE_INIT;

static void read_environment(void) {
    struct settings s = {.devices = 2, .memory = 4ull << 30};
    const char *text = getenv("ACL_STUB");
    char *copy = strdup(text ? text : ""), *rest = copy, *part;
    while ((part = strsep(&rest, ","))) {
        char *value = part;
        const char *name = strsep(&value, "=");
        if (!*name)
            continue;
        long long number = value ? atoll(value) : 1;
        if (!strcmp(name, "devices")) s.devices = number;
        else if (!strcmp(name, "memory")) s.memory = number;
        else if (!strcmp(name, "oom_after")) s.oom_after = number;
        else if (!strcmp(name, "lose_after")) s.lose_after = number;
        else if (!strcmp(name, "copy_ms")) s.copy_ms = number;
        else if (!strcmp(name, "copy_fails_after")) s.copy_fails_after = number;
        else if (!strcmp(name, "refuse_export")) s.refuse_export = number;
        else if (!strcmp(name, "no_mappings")) s.no_mappings = number;
        else if (!strcmp(name, "queued")) s.queued = number;
        else {
            fprintf(stderr, "ACL_STUB: %s is not one of the stub's settings\n", name);
            exit(2);
        }
    }
    free(copy);
    if (s.devices > DEVICES)
        s.devices = DEVICES;
    read_settings = s;
}

const struct settings *settings(void) {
    pthread_once(&read_once, read_environment);
    return &read_settings;
}

/* ---- counters ------------------------------------------------------------------------------------------------------ */

static atomic_uint_least64_t counters[COUNTERS];

void count(enum counter which) { atomic_fetch_add(&counters[which], 1); }

void aclstubCounters(uint64_t *out, size_t n) {
    for (size_t i = 0; i < n && i < COUNTERS; i++)
        out[i] = atomic_load(&counters[i]);
}

/* ---- errors -------------------------------------------------------------------------------------------------------- */

static char message[4096];

int fail(int error, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    static pthread_mutex_t writing = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_lock(&writing);
    vsnprintf(message, sizeof message, format, arguments);
    pthread_mutex_unlock(&writing);
    va_end(arguments);
    return error;
}

void aclstubSetMessage(const char *text) { fail(0, "%s", text); }

const char *aclGetRecentErrMsg() { return message; }
aclError aclrtPeekAtLastError(aclrtLastErrLevel level) { return OK; }
aclError aclrtGetLastError(aclrtLastErrLevel level) { return OK; }

/* ---- waiting --------------------------------------------------------------------------------------------------------- */

void *let_go_of_python(void) {
    int (*holds)(void) = (int (*)(void))dlsym(RTLD_DEFAULT, "PyGILState_Check");
    int (*runs)(void) = (int (*)(void))dlsym(RTLD_DEFAULT, "Py_IsInitialized");
    void *(*save)(void) = (void *(*)(void))dlsym(RTLD_DEFAULT, "PyEval_SaveThread");
    return holds && runs && save && runs() && holds() ? save() : NULL;
}

void take_python_back(void *held) {
    void (*restore)(void *) = (void (*)(void *))dlsym(RTLD_DEFAULT, "PyEval_RestoreThread");
    if (held)
        restore(held);
}

/* ---- devices ------------------------------------------------------------------------------------------------------- */

static __thread int current = -1;
static bool opened[DEVICES];
static atomic_bool is_lost[DEVICES];

int current_device(void) { return current; }
bool lost(int device) { return device >= 0 && atomic_load(&is_lost[device]); }

/* From now on every call that needs the device fails, and waiting for it ends at once. */
void aclstubLoseDevice(int device) {
    pthread_mutex_lock(&lock);
    atomic_store(&is_lost[device], true);
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

aclError aclInit(const char *path) { return OK; }
aclError aclFinalize() { return OK; }

aclError aclrtSetDevice(int32_t device) {
    if (device < 0 || device >= settings()->devices)
        return fail(BAD_DEVICE, "there is no device %d", device);
    current = device; /* of a lost one too: what needs the device itself fails */
    opened[device] = true;
    return OK;
}

aclError aclrtResetDevice(int32_t device) {
    opened[device] = false;
    return OK;
}

aclError aclrtGetDevice(int32_t *device) {
    if (current < 0)
        return fail(NO_CONTEXT, "this thread has set no device");
    *device = current;
    return OK;
}

aclError aclrtGetDeviceCount(uint32_t *n) {
    *n = settings()->devices;
    return OK;
}

/* A context is a device here: the one that aclrtSetDevice makes. */
aclError aclrtGetCurrentContext(aclrtContext *context) {
    if (current < 0)
        return fail(NO_CONTEXT, "this thread has set no device");
    *context = &opened[current];
    return OK;
}

aclError aclrtSetCurrentContext(aclrtContext context) {
    current = (int)((bool *)context - opened);
    return OK;
}

aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t *flags, int32_t *active) {
    if (flags)
        *flags = 0;
    *active = opened[device];
    return OK;
}

const char *aclrtGetSocName() { return "Ascend910B3"; }

aclError aclGetDeviceCapability(uint32_t device, aclDeviceInfo what, int64_t *value) {
    *value = 24; /* the cube cores of this part */
    return OK;
}

aclError aclrtGetDeviceInfo(uint32_t device, aclrtDevAttr what, int64_t *value) {
    *value = 24;
    return OK;
}

aclError aclrtDeviceGetUuid(int32_t device, aclrtUuid *uuid) {
    memset(uuid, 0, sizeof *uuid);
    snprintf(uuid->bytes, sizeof uuid->bytes, "stub-device-%d", device);
    return OK;
}

aclError aclrtDeviceGetBareTgid(int32_t *pid) {
    *pid = getpid();
    return OK;
}

aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t device, int32_t peer) {
    *can = device != peer;
    return OK;
}

aclError aclrtDeviceEnablePeerAccess(int32_t peer, uint32_t flags) { return peer < settings()->devices ? OK : BAD_DEVICE; }
