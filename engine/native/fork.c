/* Memory of one process in another: slabs, their checksums, copies, and NPU-fork: export, import, copy and checksum of a
 * device's memory between processes of one box.
 *
 * The last is one interface over the runtimes that offer it, found by dlopen when first asked for: no header or library of a
 * vendor is needed to build this, and none is loaded where it isn't used. `kind` names the runtime as engine/devices does; "cpu" is
 * this machine's memory, in memfds that others map read-only and so without a copy. A process calls it with its device in use
 * already (torch has initialised the runtime), from any thread. Calls return 0, or -1 with the reason in ds_ipc_error() of the
 * same thread. */

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

/* ---- slabs --------------------------------------------------------------------------------------------------------- */

#define HUGE_PAGE ((uint64_t)2 << 20)
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25 /* Linux 6.1 */
#endif

/* Maps all `bytes` of a memfd, a multiple of a huge page, at an address that is one too: so huge pages of it are mapped as such.
 * 0 or -errno. Unmap with ds_unmap_slab. */
int ds_map_slab(int fd, uint64_t bytes, int writable, void **out) {
    char *room = mmap(NULL, bytes + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (room == MAP_FAILED) return -errno;
    char *at = room + (-(uintptr_t)room & (HUGE_PAGE - 1)), *end = at + bytes;
    void *slab = mmap(at, bytes, PROT_READ | (writable ? PROT_WRITE : 0), MAP_SHARED | MAP_FIXED, fd, 0);
    int failed = slab == MAP_FAILED ? errno : 0;
    if (at > room) munmap(room, (size_t)(at - room));
    munmap(failed ? at : end, (size_t)(room + bytes + HUGE_PAGE - (failed ? at : end)));
    *out = slab;
    return -failed;
}

void ds_unmap_slab(void *slab, uint64_t bytes) { munmap(slab, bytes); }

/* Makes a part of a slab, mapped writable, of huge pages: a few hundred MB of weights are read with that many fewer misses of
 * address translation. MADV_COLLAPSE does that whatever the system's setting for shared memory is (few have it on), and costs no
 * more than faulting small pages in. A page must have been touched; what is in it stays. Returns the bytes that are huge now: where
 * the kernel doesn't know it or finds no memory in one piece, small pages serve. */
uint64_t ds_collapse_slab(void *slab, uint64_t bytes) {
    uint64_t done = 0;
    for (char *at = slab, *end = at + bytes; at < end; at += HUGE_PAGE) {
        __atomic_fetch_or(at, 0, __ATOMIC_RELAXED); /* a write that changes nothing, also beside others' */
        if (madvise(at, HUGE_PAGE, MADV_COLLAPSE) == 0) done += HUGE_PAGE;
        else if (errno == EINVAL) break;
    }
    return done;
}

/* ---- checksums ----------------------------------------------------------------------------------------------------- */

#define P1 0x9E3779B185EBCA87ull
#define P2 0xC2B2AE3D27D4EB4Full
#define P3 0x165667B19E3779F9ull
#define P4 0x85EBCA77C2B2AE63ull
#define P5 0x27D4EB2F165667C5ull
#define STRIPE ((uint64_t)32) /* bytes taken in at a time */

static uint64_t rotl(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }
static uint64_t word64(const uint8_t *p) { uint64_t x; memcpy(&x, p, 8); return x; }
static uint64_t round64(uint64_t lane, uint64_t word) { return rotl(lane + word * P2, 31) * P1; }

/* XXH64 with seed 0, as published by its author (little-endian hosts only): weight manifests carry it, so its values
 * are part of a file format and can be checked with any other implementation. Memory speed on one core. */
struct sum { uint64_t a, b, c, d, length; };
static const struct sum empty_sum = {P1 + P2, P2, 0, 0 - P1, 0};

static void take_in(struct sum *sum, const uint8_t *p, uint64_t length) { /* whole stripes */
    uint64_t a = sum->a, b = sum->b, c = sum->c, d = sum->d; /* an array here makes gcc vectorise, at half the speed */
    for (const uint8_t *stop = p + length; p < stop; p += STRIPE) {
        a = round64(a, word64(p)), b = round64(b, word64(p + 8));
        c = round64(c, word64(p + 16)), d = round64(d, word64(p + 24));
    }
    sum->a = a, sum->b = b, sum->c = c, sum->d = d, sum->length += length;
}

static uint64_t summed(const struct sum *sum, const uint8_t *p, uint64_t rest) { /* the last `rest` bytes, less than a stripe */
    const uint8_t *stop = p + rest;
    uint64_t a = sum->a, b = sum->b, c = sum->c, d = sum->d, h = P5;
    if (sum->length) {
        h = rotl(a, 1) + rotl(b, 7) + rotl(c, 12) + rotl(d, 18);
        h = (h ^ round64(0, a)) * P1 + P4, h = (h ^ round64(0, b)) * P1 + P4;
        h = (h ^ round64(0, c)) * P1 + P4, h = (h ^ round64(0, d)) * P1 + P4;
    }
    h += sum->length + rest;
    for (; stop - p >= 8; p += 8) h = rotl(h ^ round64(0, word64(p)), 27) * P1 + P4;
    if (stop - p >= 4) {
        uint32_t half;
        memcpy(&half, p, 4);
        h = rotl(h ^ half * P1, 23) * P2 + P3;
        p += 4;
    }
    for (; p < stop; p++) h = rotl(h ^ *p * P5, 11) * P1;
    h = (h ^ h >> 33) * P2;
    h = (h ^ h >> 29) * P3;
    return h ^ h >> 32;
}

uint64_t ds_checksum(const uint8_t *p, uint64_t length) {
    struct sum sum = empty_sum;
    uint64_t rest = length % STRIPE;
    take_in(&sum, p, length - rest);
    return summed(&sum, p + length - rest, rest);
}

/* ---- copies -------------------------------------------------------------------------------------------------------- */

#define COPY_PIECE ((int64_t)256 << 10) /* some tens of microseconds: how late a stop or the deadline is noticed */

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}

/* Copies `n` runs of `bytes[i]` from `from + from_at[i]` to `to + to_at[i]`, in that order, until all are copied, `*stop` isn't 0
 * or CLOCK_MONOTONIC has reached `deadline` (ns; 0: none). Returns the bytes copied. Plain stores: who receives a block reads it
 * next, so what the caches can hold of it should stay there. */
int64_t ds_copy(char *to, const char *from, const int64_t *to_at, const int64_t *from_at, const int64_t *bytes, int64_t n,
                const int32_t *stop, int64_t deadline) {
    int64_t done = 0, unchecked = COPY_PIECE;
    for (int64_t i = 0; i < n; i++)
        for (int64_t at = 0, piece; at < bytes[i]; at += piece) {
            if (unchecked >= COPY_PIECE) {
                if (__atomic_load_n(stop, __ATOMIC_RELAXED) || (deadline && now_ns() >= deadline)) return done;
                unchecked = 0;
            }
            piece = bytes[i] - at < COPY_PIECE - unchecked ? bytes[i] - at : COPY_PIECE - unchecked;
            memmove(to + to_at[i] + at, from + from_at[i] + at, (size_t)piece);
            unchecked += piece, done += piece;
        }
    return done;
}

/* ---- across processes: what every kind of memory shares -------------------------------------------------------------------- */

#define NAME 80     /* bytes of a name, whatever the kind */
#define DEVICES 64  /* of one process */
#define BATCH ((int64_t)16 << 20) /* bytes copied between two looks at `stop`: 0.7 ms over PCIe 4 */

static _Thread_local char error[256];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* guards loading, `streams` and `slabs` */

const char *ds_ipc_error(void) { return error; }

static int fail(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error, sizeof error, format, arguments);
    va_end(arguments);
    return -1;
}

/* Memory that was allocated here or opened here: a whole slab, a multiple of 2 MiB. */
struct slab {
    char *at;
    uint64_t bytes;
    int device;
    void *handle; /* npu: of physical memory mapped at `at`; NULL: it is an allocation, or was opened by a key */
    int fd;       /* cpu, allocated here */
    char name[NAME]; /* opened here: by this */
    struct slab *next;
};
static struct slab *slabs;

static int is_open(const char *name) {
    int found = 0;
    pthread_mutex_lock(&lock);
    for (struct slab *s = slabs; s; s = s->next) found |= !memcmp(s->name, name, NAME);
    pthread_mutex_unlock(&lock);
    return found;
}

struct runtime {
    const char *kind, *library;      /* library NULL: none is needed */
    const char *const *names;        /* of its functions, up to NULL; those that some versions lack stand last */
    int needed;                      /* of these, how many it can't do without */
    void **functions;                /* the same, once loaded */
    int (*enter)(int device);        /* make the device this thread's */
    void (*leave)(void);
    int (*allocate)(struct slab *slab);
    int (*release)(const struct slab *slab);
    int (*export)(char *at, uint64_t bytes, const struct slab *slab, char *name); /* slab NULL: another allocator's memory */
    int (*open)(const char *name, struct slab *slab);
    int (*close)(const char *name, const struct slab *slab); /* slab NULL: the export itself */
    int (*pinned)(uint64_t bytes, void **out); /* host memory that a copy engine reaches; NULL: memory is read in place */
    int (*unpin)(void *at);
    int (*new_stream)(void **out);
    int (*copy)(void *to, const void *from, int64_t bytes, int direction, void *stream);
    int (*wait)(void *stream);
    int loaded;
    void *streams[DEVICES];
};

/* Two runtimes call functions of known prototypes by address: the cast is each function's own. */
#define CALL(at, result, ...) ((result(*)(__VA_ARGS__))(at))

/* ---- this machine's memory ------------------------------------------------------------------------------------------------- */

struct memfd_name { int32_t pid, fd; uint64_t inode; }; /* the inode: a process id may have passed to another process */

static int host_enter(int device) { (void)device; return 0; }
static void host_leave(void) {}
static int host_allocate(struct slab *slab) {
    slab->fd = memfd_create("deepserve-slab", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (slab->fd < 0) return fail("memfd_create: %s", strerror(errno));
    int failed = ftruncate(slab->fd, (off_t)slab->bytes) ? errno : 0;
    /* Whoever maps it must never find it shorter: that would kill it with SIGBUS. */
    if (!failed && fcntl(slab->fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW)) failed = errno;
    if (!failed) failed = -ds_map_slab(slab->fd, slab->bytes, 1, (void **)&slab->at);
    if (failed) close(slab->fd);
    return failed ? fail("a slab of %llu bytes: %s", (unsigned long long)slab->bytes, strerror(failed)) : 0;
}
static int host_release(const struct slab *slab) { return ds_unmap_slab(slab->at, slab->bytes), close(slab->fd); }
static int host_export(char *at, uint64_t bytes, const struct slab *slab, char *name) {
    struct stat found;
    if (!slab || at != slab->at || bytes != slab->bytes) return fail("only whole slabs of this machine's memory can be exported");
    if (fstat(slab->fd, &found)) return fail("fstat: %s", strerror(errno));
    struct memfd_name made = {(int32_t)getpid(), slab->fd, found.st_ino};
    memcpy(name, &made, sizeof made);
    return 0;
}
static int host_open(const char *name, struct slab *slab) {
    char path[64];
    struct memfd_name given;
    struct stat found;
    memcpy(&given, name, sizeof given);
    snprintf(path, sizeof path, "/proc/%d/fd/%d", given.pid, given.fd);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return fail("the memory of process %d is gone: %s", given.pid, strerror(errno));
    int failed = fstat(fd, &found) || found.st_ino != given.inode || (uint64_t)found.st_size != slab->bytes ? -1 : 0;
    if (failed) fail("the memory of process %d is gone: its descriptor %d is something else now", given.pid, given.fd);
    else if ((failed = ds_map_slab(fd, slab->bytes, 0, (void **)&slab->at))) fail("mapping a slab: %s", strerror(-failed));
    close(fd);
    return failed ? -1 : 0;
}
static int host_close(const char *name, const struct slab *slab) {
    (void)name;
    if (slab) ds_unmap_slab(slab->at, slab->bytes);
    return 0; /* an export ends with the slab */
}
static int host_new_stream(void **out) { return *out = NULL, 0; }
static int host_copy(void *to, const void *from, int64_t bytes, int direction, void *stream) {
    (void)direction, (void)stream;
    memmove(to, from, (size_t)bytes);
    return 0;
}
static int host_wait(void *stream) { return (void)stream, 0; }

/* ---- Ascend (shared/NPU.md has the rules: slabs are exported whole, the exporter closes last) ------------------------------ */

enum { ACL_SET, ACL_EXPORT, ACL_IMPORT, ACL_CLOSE, ACL_STREAM, ACL_COPY, ACL_WAIT, ACL_WHY, ACL_MALLOC, ACL_FREE, ACL_PINNED,
       ACL_UNPIN, ACL_REACHES, ACL_REACH, ACL_NEEDED,
       /* Memory as ranges of addresses and what is mapped there: what a mapping shows outlives the process that made it. */
       ACL_RESERVE = ACL_NEEDED, ACL_UNRESERVE, ACL_MAKE, ACL_UNMAKE, ACL_MAP, ACL_UNMAP, ACL_SHARE, ACL_TAKE, ACL_COUNT };
static const char *const acl_names[] = {
    "aclrtSetDevice", "aclrtIpcMemGetExportKey", "aclrtIpcMemImportByKey", "aclrtIpcMemClose", "aclrtCreateStream",
    "aclrtMemcpyAsync", "aclrtSynchronizeStream", "aclGetRecentErrMsg", "aclrtMalloc", "aclrtFree", "aclrtMallocHost",
    "aclrtFreeHost", "aclrtDeviceCanAccessPeer", "aclrtDeviceEnablePeerAccess",
    "aclrtReserveMemAddress", "aclrtReleaseMemAddress", "aclrtMallocPhysical", "aclrtFreePhysical", "aclrtMapMem",
    "aclrtUnmapMem", "aclrtMemExportToShareableHandle", "aclrtMemImportFromShareableHandle", NULL};
static void *acl[ACL_COUNT];
#define ACL_KEY 65            /* the length the runtime asks for */
#define ACL_ANY_PROCESS 1     /* export: without a list of the processes that may import */
#define ACL_OTHER_DEVICES 1   /* import by key: also what another device exported */
#define ACL_HUGE_ONLY 1       /* aclrtMalloc: pages of 2 MiB, which an export wants */
#define ACL_HUGE_PAGES 1      /* aclrtReserveMemAddress */
#define ACL_NOT_SUPPORTED 207000

struct acl_property { int handle_type, allocation_type, attributes; uint32_t device; int location; uint64_t reserved; };
#define ACL_HBM_HUGE 4
#define ACL_ON_DEVICE 1
struct acl_name { char key[ACL_KEY]; uint8_t device; uint64_t shareable; }; /* key "": it goes by the shareable handle */
_Static_assert(sizeof(struct acl_name) <= NAME, "a name has room for it");

static int acl_check(const char *what, int code) {
    if (!code) return 0;
    const char *why = CALL(acl[ACL_WHY], const char *, void)();
    return fail("%s: error %d%s%s", what, code, why ? ": " : "", why ? why : "");
}
static int acl_enter(int device) { return acl_check("aclrtSetDevice", CALL(acl[ACL_SET], int, int32_t)(device)); }
static void acl_leave(void) {} /* a thread's device stays */
static int acl_has_mappings(void) {
    for (int i = ACL_RESERVE; i < ACL_COUNT; i++)
        if (!acl[i]) return 0;
    return 1;
}
static int acl_unmap(const struct slab *slab) {
    if (acl_check("aclrtUnmapMem", CALL(acl[ACL_UNMAP], int, void *)(slab->at))) return -1;
    if (acl_check("aclrtReleaseMemAddress", CALL(acl[ACL_UNRESERVE], int, void *)(slab->at))) return -1;
    return acl_check("aclrtFreePhysical", CALL(acl[ACL_UNMAKE], int, void *)(slab->handle));
}
static int acl_map(struct slab *slab) { /* slab->handle; lets go of it where that fails */
    int failed = acl_check("aclrtReserveMemAddress", CALL(acl[ACL_RESERVE], int, void **, size_t, size_t, void *, uint64_t)(
                                                         (void **)&slab->at, slab->bytes, 0, NULL, ACL_HUGE_PAGES));
    if (!failed) {
        failed = acl_check("aclrtMapMem", CALL(acl[ACL_MAP], int, void *, size_t, size_t, void *, uint64_t)(
                                              slab->at, slab->bytes, 0, slab->handle, 0));
        if (failed) CALL(acl[ACL_UNRESERVE], int, void *)(slab->at);
    }
    if (failed) CALL(acl[ACL_UNMAKE], int, void *)(slab->handle);
    return failed;
}
static int acl_allocate(struct slab *slab) {
    if (acl_has_mappings()) {
        struct acl_property property = {0, 0, ACL_HBM_HUGE, (uint32_t)slab->device, ACL_ON_DEVICE, 0};
        int code = CALL(acl[ACL_MAKE], int, void **, size_t, const struct acl_property *, uint64_t)(
            &slab->handle, slab->bytes, &property, 0);
        if (!code) return acl_map(slab);
        if (code != ACL_NOT_SUPPORTED) return acl_check("aclrtMallocPhysical", code);
        slab->handle = NULL; /* this device has no such memory: an allocation does, which is exported by a key */
    }
    return acl_check("aclrtMalloc",
                     CALL(acl[ACL_MALLOC], int, void **, size_t, int)((void **)&slab->at, slab->bytes, ACL_HUGE_ONLY));
}
static int acl_release(const struct slab *slab) {
    return slab->handle ? acl_unmap(slab) : acl_check("aclrtFree", CALL(acl[ACL_FREE], int, void *)(slab->at));
}
static int acl_export(char *at, uint64_t bytes, const struct slab *slab, char *name) {
    struct acl_name made = {.device = slab ? (uint8_t)slab->device : 0};
    int failed;
    if (slab && slab->handle)
        failed = acl_check("aclrtMemExportToShareableHandle", CALL(acl[ACL_SHARE], int, void *, int, uint64_t, uint64_t *)(
                                                                  slab->handle, 0, ACL_ANY_PROCESS, &made.shareable));
    else
        failed = acl_check("aclrtIpcMemGetExportKey", CALL(acl[ACL_EXPORT], int, void *, size_t, char *, size_t, uint64_t)(
                                                          at, bytes, made.key, ACL_KEY, ACL_ANY_PROCESS));
    memcpy(name, &made, sizeof made);
    return failed;
}
/* Access to a peer's memory, which a mapping asks for and an import by key has by itself. Asked for once: whether a second time
 * is an error isn't told. */
static int acl_reach(int device, int peer) {
    static uint8_t reached[DEVICES][DEVICES];
    int32_t can = 0;
    if (device == peer || peer >= DEVICES || __atomic_load_n(&reached[device][peer], __ATOMIC_RELAXED)) return 0;
    if (acl_check("aclrtDeviceCanAccessPeer",
                  CALL(acl[ACL_REACHES], int, int32_t *, int32_t, int32_t)(&can, device, peer)))
        return -1;
    if (!can) return fail("NPU %d can't reach the memory of NPU %d", device, peer);
    if (acl_check("aclrtDeviceEnablePeerAccess", CALL(acl[ACL_REACH], int, int32_t, uint32_t)(peer, 0))) return -1;
    __atomic_store_n(&reached[device][peer], 1, __ATOMIC_RELAXED);
    return 0;
}
static int acl_open(const char *name, struct slab *slab) {
    struct acl_name given;
    memcpy(&given, name, sizeof given);
    if (given.key[0] && is_open(name)) return fail("it is open already, and is closed by its key alone: close it first");
    if (given.key[0])
        return acl_check("aclrtIpcMemImportByKey", CALL(acl[ACL_IMPORT], int, void **, const char *, uint64_t)(
                                                       (void **)&slab->at, given.key, ACL_OTHER_DEVICES));
    if (!acl_has_mappings()) return fail("this runtime has no aclrtMapMem, the exporting one had");
    if (acl_reach(slab->device, given.device)) return -1;
    int failed = acl_check("aclrtMemImportFromShareableHandle", CALL(acl[ACL_TAKE], int, uint64_t, int32_t, void **)(
                                                                    given.shareable, slab->device, &slab->handle));
    return failed ? failed : acl_map(slab);
}
static int acl_close(const char *name, const struct slab *slab) {
    struct acl_name given;
    memcpy(&given, name, sizeof given);
    if (!given.key[0]) return slab ? acl_unmap(slab) : 0; /* the export ends with the physical memory */
    return acl_check("aclrtIpcMemClose", CALL(acl[ACL_CLOSE], int, const char *)(given.key));
}
static int acl_pinned(uint64_t bytes, void **out) {
    return acl_check("aclrtMallocHost", CALL(acl[ACL_PINNED], int, void **, size_t)(out, bytes));
}
static int acl_unpin(void *at) { return acl_check("aclrtFreeHost", CALL(acl[ACL_UNPIN], int, void *)(at)); }
static int acl_new_stream(void **out) { return acl_check("aclrtCreateStream", CALL(acl[ACL_STREAM], int, void **)(out)); }
static int acl_copy(void *to, const void *from, int64_t bytes, int direction, void *stream) {
    return acl_check("aclrtMemcpyAsync", CALL(acl[ACL_COPY], int, void *, size_t, const void *, size_t, int, void *)(
                                             to, bytes, from, bytes, direction, stream));
}
static int acl_wait(void *stream) { return acl_check("aclrtSynchronizeStream", CALL(acl[ACL_WAIT], int, void *)(stream)); }

/* ---- CUDA (driver interface) ----------------------------------------------------------------------------------------------- */

enum { CU_INIT, CU_DEVICE, CU_RETAIN, CU_PUSH, CU_POP, CU_EXPORT, CU_RANGE, CU_IMPORT, CU_CLOSE, CU_STREAM, CU_COPY, CU_WAIT,
       CU_WHY, CU_MALLOC, CU_FREE, CU_PINNED, CU_UNPIN, CU_COUNT };
static const char *const cu_names[] = {
    "cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2", "cuIpcGetMemHandle",
    "cuMemGetAddressRange_v2", "cuIpcOpenMemHandle_v2", "cuIpcCloseMemHandle", "cuStreamCreate", "cuMemcpyAsync",
    "cuStreamSynchronize", "cuGetErrorString", "cuMemAlloc_v2", "cuMemFree_v2", "cuMemAllocHost_v2", "cuMemFreeHost", NULL};
static void *cu[CU_COUNT];
#define CU_OTHER_DEVICES 1 /* open: with access between devices */
#define CU_NON_BLOCKING 1  /* a stream that doesn't wait for the default one */

struct cu_handle { char bytes[64]; };
struct cu_name { struct cu_handle handle; uint64_t offset; }; /* the runtime exports whole allocations: where in it */
_Static_assert(sizeof(struct cu_name) <= NAME, "a name has room for it");

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
static int cu_allocate(struct slab *slab) {
    uint64_t at;
    if (cu_check("cuMemAlloc", CALL(cu[CU_MALLOC], int, uint64_t *, size_t)(&at, slab->bytes))) return -1;
    slab->at = (char *)(uintptr_t)at;
    return 0;
}
static int cu_release(const struct slab *slab) {
    return cu_check("cuMemFree", CALL(cu[CU_FREE], int, uint64_t)((uint64_t)(uintptr_t)slab->at));
}
static int cu_export(char *at, uint64_t bytes, const struct slab *slab, char *name) {
    struct cu_name made = {0};
    uint64_t base;
    size_t size;
    (void)slab;
    if (cu_check("cuMemGetAddressRange",
                 CALL(cu[CU_RANGE], int, uint64_t *, size_t *, uint64_t)(&base, &size, (uint64_t)(uintptr_t)at)))
        return -1;
    made.offset = (uint64_t)(uintptr_t)at - base;
    if (bytes > size - made.offset) return fail("the range to export is not inside one allocation");
    if (cu_check("cuIpcGetMemHandle", CALL(cu[CU_EXPORT], int, struct cu_handle *, uint64_t)(&made.handle, base))) return -1;
    memcpy(name, &made, sizeof made);
    return 0;
}
static int cu_open(const char *name, struct slab *slab) {
    struct cu_name given;
    uint64_t base;
    memcpy(&given, name, sizeof given);
    if (cu_check("cuIpcOpenMemHandle",
                 CALL(cu[CU_IMPORT], int, uint64_t *, struct cu_handle, unsigned)(&base, given.handle, CU_OTHER_DEVICES)))
        return -1;
    slab->at = (char *)(uintptr_t)(base + given.offset);
    return 0;
}
static int cu_close(const char *name, const struct slab *slab) {
    struct cu_name given;
    memcpy(&given, name, sizeof given);
    if (!slab) return 0; /* an export ends with the allocation */
    return cu_check("cuIpcCloseMemHandle", CALL(cu[CU_CLOSE], int, uint64_t)((uint64_t)(uintptr_t)slab->at - given.offset));
}
static int cu_pinned(uint64_t bytes, void **out) {
    return cu_check("cuMemAllocHost", CALL(cu[CU_PINNED], int, void **, size_t)(out, bytes));
}
static int cu_unpin(void *at) { return cu_check("cuMemFreeHost", CALL(cu[CU_UNPIN], int, void *)(at)); }
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
    {"cpu", NULL, NULL, 0, NULL, host_enter, host_leave, host_allocate, host_release, host_export, host_open, host_close, NULL,
     NULL, host_new_stream, host_copy, host_wait, 1, {0}},
    {"npu", "libascendcl.so", acl_names, ACL_NEEDED, acl, acl_enter, acl_leave, acl_allocate, acl_release, acl_export, acl_open,
     acl_close, acl_pinned, acl_unpin, acl_new_stream, acl_copy, acl_wait, 0, {0}},
    {"cuda", "libcuda.so.1", cu_names, CU_COUNT, cu, cu_enter, cu_leave, cu_allocate, cu_release, cu_export, cu_open, cu_close,
     cu_pinned, cu_unpin, cu_new_stream, cu_copy, cu_wait, 0, {0}},
};

static int load(struct runtime *r) {
    if (r->loaded) return 0;
    void *library = dlopen(r->library, RTLD_NOW | RTLD_LOCAL);
    if (!library) return fail("%s", dlerror());
    for (int i = 0; r->names[i]; i++)
        if (!(r->functions[i] = dlsym(library, r->names[i])) && i < r->needed)
            return fail("%s has no %s", r->library, r->names[i]);
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

static void *keep(const struct slab *slab) { /* -> where it is */
    struct slab *kept = malloc(sizeof *kept);
    if (!kept) abort(); /* some hundred bytes: there is no going on */
    *kept = *slab;
    pthread_mutex_lock(&lock);
    kept->next = slabs;
    slabs = kept;
    pthread_mutex_unlock(&lock);
    return slab->at;
}

/* The slab that begins at `at`, copied to `out`; taken off the list where `taken`. Returns whether there is one. */
static int find(const void *at, struct slab *out, int taken) {
    struct slab *found = NULL;
    pthread_mutex_lock(&lock);
    for (struct slab **link = &slabs; *link && !found; link = &(*link)->next)
        if ((*link)->at == at) {
            found = *link;
            *out = *found;
            if (taken) *link = found->next;
            break;
        }
    pthread_mutex_unlock(&lock);
    if (found && taken) free(found);
    return found != NULL;
}

/* A slab of the device's memory, `bytes` a multiple of 2 MiB, which it begins at. */
int ds_ipc_allocate(const char *kind, int device, uint64_t bytes, void **out) {
    struct runtime *r = enter(kind, device);
    struct slab slab = {.bytes = bytes, .device = device, .fd = -1};
    if (!r) return -1;
    int failed = r->allocate(&slab);
    if (!failed) *out = keep(&slab);
    r->leave();
    return failed;
}

/* The inverse of ds_ipc_allocate: no process may have the slab open any more. */
int ds_ipc_free(const char *kind, int device, void *at) {
    struct runtime *r = enter(kind, device);
    struct slab slab;
    if (!r) return -1;
    int failed = find(at, &slab, 0) ? r->release(&slab) : fail("no slab of this process begins there");
    if (!failed) find(at, &slab, 1);
    r->leave();
    return failed;
}

/* The name under which other processes open `bytes` at `at`; `name` has 80 bytes. */
int ds_ipc_export(const char *kind, int device, void *at, uint64_t bytes, char *name) {
    struct runtime *r = enter(kind, device);
    struct slab slab;
    if (!r) return -1;
    memset(name, 0, NAME);
    int failed = r->export(at, bytes, find(at, &slab, 0) ? &slab : NULL, name);
    r->leave();
    return failed;
}

int ds_ipc_open(const char *kind, int device, const char *name, uint64_t bytes, void **out) {
    struct runtime *r = enter(kind, device);
    struct slab slab = {.bytes = bytes, .device = device, .fd = -1};
    if (!r) return -1;
    memcpy(slab.name, name, NAME);
    int failed = r->open(name, &slab);
    if (!failed) *out = keep(&slab);
    r->leave();
    return failed;
}

/* What was opened at `at`, or with NULL the export itself; who exported closes last. */
int ds_ipc_close(const char *kind, int device, const char *name, void *at) {
    struct runtime *r = enter(kind, device);
    struct slab slab;
    if (!r) return -1;
    int failed = at && !find(at, &slab, 0) ? fail("nothing is open there") : r->close(name, at ? &slab : NULL);
    if (at && !failed) find(at, &slab, 1);
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

/* As ds_copy, where one side or both are a device's memory; direction 1: host to device, 2: device to host, 3: device to device.
 * What it says is copied has arrived. On a stream of its own: the caller has waited for who writes the source. `stop` NULL:
 * nobody stops it, and each range is one copy. -1: an error, and how much has arrived is not known. */
int64_t ds_ipc_copy(const char *kind, int device, int direction, char *to, const char *from, const int64_t *to_at,
                    const int64_t *from_at, const int64_t *bytes, int64_t n, const int32_t *stop, int64_t deadline) {
    struct runtime *r = enter(kind, device);
    if (!r) return -1;
    void *stream = NULL;
    int64_t arrived = 0, sent = 0, batch = stop ? BATCH : INT64_MAX;
    int failed = stream_of(r, device, &stream);
    for (int64_t i = 0; i < n && !failed; i++)
        for (int64_t at = 0, piece; at < bytes[i] && !failed; at += piece) {
            if (stop && sent == arrived && (__atomic_load_n(stop, __ATOMIC_RELAXED) || (deadline && now_ns() >= deadline)))
                goto out;
            piece = bytes[i] - at < batch - (sent - arrived) ? bytes[i] - at : batch - (sent - arrived);
            failed = r->copy(to + to_at[i] + at, from + from_at[i] + at, piece, direction, stream);
            if (!failed) sent += piece;
            if (!failed && sent - arrived >= batch && !(failed = r->wait(stream))) arrived = sent;
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

/* A part of ranges of memory, at most a batch long, and the next one. */
struct part { int64_t i, at, bytes; };

static int next_part(struct part *p, const int64_t *bytes, int64_t n) {
    p->at += p->bytes;
    while (p->i < n && p->at == bytes[p->i]) p->i++, p->at = 0;
    p->bytes = p->i == n ? 0 : bytes[p->i] - p->at < BATCH ? bytes[p->i] - p->at : BATCH;
    return p->bytes > 0;
}

/* Checksums of `n` ranges of a device's memory, `bytes[i]` from `from + from_at[i]` on, into `out`: the very ones that
 * ds_checksum gives of the same bytes in host memory, so one manifest serves every kind. They are read back, one batch while the
 * one before is being summed: no kernel of any vendor is needed, and a core and PCIe go about equally fast, 10 to 20 GB/s. 1:
 * `*stop` was set. */
int ds_ipc_checksum(const char *kind, int device, const char *from, const int64_t *from_at, const int64_t *bytes, int64_t n,
                    const int32_t *stop, uint64_t *out) {
    struct runtime *r = enter(kind, device);
    if (!r) return -1;
    void *stream = NULL, *room[2] = {NULL, NULL};
    int failed = stream_of(r, device, &stream), turn = 0, stopped = 0;
    for (int i = 0; i < 2 && r->pinned && !failed; i++) failed = r->pinned((uint64_t)BATCH, &room[i]);
    struct sum sum = empty_sum;
    struct part here = {0}, next = {0};
    for (int64_t i = 0; i < n; i++)
        if (!bytes[i]) out[i] = ds_checksum(NULL, 0);
    int more = !failed && next_part(&next, bytes, n);
    if (more && r->pinned) failed = r->copy(room[0], from + from_at[next.i] + next.at, next.bytes, 2, stream);
    while (more && !failed && !(stopped = __atomic_load_n(stop, __ATOMIC_RELAXED))) {
        here = next;
        const uint8_t *data = r->pinned ? room[turn] : (const void *)(from + from_at[here.i] + here.at);
        failed = r->wait(stream);
        more = next_part(&next, bytes, n);
        turn = !turn;
        if (more && r->pinned && !failed) failed = r->copy(room[turn], from + from_at[next.i] + next.at, next.bytes, 2, stream);
        uint64_t rest = (uint64_t)here.bytes % STRIPE; /* only the last part of a range has one */
        if (!here.at) sum = empty_sum;
        take_in(&sum, data, (uint64_t)here.bytes - rest);
        if (here.at + here.bytes == bytes[here.i]) out[here.i] = summed(&sum, data + here.bytes - rest, rest);
    }
    if (r->pinned) { /* nothing may be written to the rooms once they are gone */
        char why[sizeof error];
        memcpy(why, error, sizeof why);
        r->wait(stream);
        for (int i = 0; i < 2; i++)
            if (room[i]) r->unpin(room[i]);
        memcpy(error, why, sizeof why);
    }
    r->leave();
    return failed ? -1 : stopped != 0;
}

/* ---- for tensor libraries -------------------------------------------------------------------------------------------------- */

struct dlpack { /* a DLManagedTensor (DLPack 0.x), and the one length that its shape has */
    void *data;
    int32_t device_kind, device, dimensions;
    uint8_t type, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t offset;
    void *context;
    void (*deleter)(struct dlpack *);
    int64_t count;
};

static void end_of_tensor(struct dlpack *tensor) { free(tensor); }

/* A flat tensor of `count` numbers at `data`, for who takes DLPack over; the memory itself stays ours. */
void *ds_dlpack(void *data, int device_kind, int device, int type, int bits, int64_t count) {
    struct dlpack *made = malloc(sizeof *made);
    if (!made) abort();
    *made = (struct dlpack){.data = data, .device_kind = device_kind, .device = device, .dimensions = 1, .type = (uint8_t)type,
                            .bits = (uint8_t)bits, .lanes = 1, .deleter = end_of_tensor, .count = count};
    made->shape = &made->count;
    return made;
}
