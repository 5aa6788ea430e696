/* What the files of the stub share: settings, counters, devices. See runtime.c for what the stub is. */
#pragma once
#include "acl_types.h"
#include <pthread.h>

#define DEVICES 8

struct settings {          /* from the environment variable ACL_STUB, "name=value,name=value" */
    long devices;          /* how many there are; 2 */
    size_t memory;         /* bytes of each device; 4 GiB */
    size_t oom_after;      /* allocations fail once this process holds so many bytes of a device, whatever mem_get_info says; 0: never */
    long lose_after;       /* the device is lost at the so manieth piece of work put on a stream; 0: never */
    long copy_ms;          /* each asynchronous copy takes so long */
    long copy_fails_after; /* the so manieth asynchronous copy fails; 0: never */
    long refuse_export;    /* 1: no memory can be exported at all */
    long no_mappings;      /* 1: no physical memory, and so no mappings of it: exports go by keys */
    long queued;           /* 1: every stream works in its own thread, even where nothing makes it wait */
};
const struct settings *settings(void);

enum counter {
    STREAM_SYNCHRONISATIONS,
    DEVICE_SYNCHRONISATIONS,
    EVENT_SYNCHRONISATIONS,
    COPIES_TO_DEVICE, /* synchronous */
    COPIES_TO_HOST,
    COPIES_ON_DEVICE,
    ASYNC_COPIES_TO_DEVICE,
    ASYNC_COPIES_TO_HOST,
    ASYNC_COPIES_ON_DEVICE,
    PAGEABLE_COPIES, /* asynchronous ones from or to host memory that is not pinned: the real runtime may wait in them */
    LAUNCHES,        /* operators */
    REPLAYS,         /* captured graphs */
    UPDATES,         /* operators of a task group replaced */
    ALLOCATIONS,
    COUNTERS,
};
void count(enum counter which);

extern pthread_mutex_t lock; /* guards everything but the settings; never held while work runs */
extern pthread_cond_t changed;

/* Around waiting: the work that is waited for may need the Python interpreter, which the caller may hold. */
void *let_go_of_python(void);
void take_python_back(void *held);

int current_device(void); /* -1: this thread has set none */
bool lost(int device);
int fail(int error, const char *format, ...) __attribute__((format(printf, 2, 3)));
bool pinned(const void *address);
bool capturing(void); /* in this thread, or anywhere in a process that captures in global mode */
