/* Memory: device memory is memory files, mapped shared, so that another process can map the same pages. */
#define _GNU_SOURCE
#include "stub.h"
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define HUGE_PAGE (2ul << 20) /* exports, physical allocations and their mappings come in these */
#define SMALL_PAGE 4096ul

enum kind { DEVICE, PINNED, REGISTERED, RESERVED, MAPPED, IMPORTED };

struct range { /* of addresses */
    enum kind kind;
    char *start;
    size_t size;
    int device;
    int fd;        /* DEVICE, IMPORTED */
    int record;    /* DEVICE: of its last export, or -1 */
    char key[65];  /* IMPORTED */
    struct range *next;
};
static struct range *ranges; /* all under `lock`, as what follows */
static size_t used[DEVICES];

struct physical {
    int fd, device;
    size_t size;
    bool imported;
    int record; /* of its export, or -1 */
};

static size_t up(size_t size, size_t unit) { return (size + unit - 1) / unit * unit; }

static struct range *add(enum kind kind, void *start, size_t size) {
    struct range *r = calloc(1, sizeof *r);
    *r = (struct range){.kind = kind, .start = start, .size = size, .device = current_device(), .fd = -1, .record = -1};
    pthread_mutex_lock(&lock);
    r->next = ranges;
    ranges = r;
    pthread_mutex_unlock(&lock);
    return r;
}

/* Takes the range that starts here off the list; the caller frees it. */
static struct range *take(enum kind kind, const void *start) {
    struct range *found = NULL;
    pthread_mutex_lock(&lock);
    for (struct range **at = &ranges; *at; at = &(*at)->next)
        if ((*at)->kind == kind && (*at)->start == start) {
            found = *at;
            *at = found->next;
            break;
        }
    pthread_mutex_unlock(&lock);
    return found;
}

static struct range *around(const char *address) { /* with `lock` held */
    for (struct range *r = ranges; r; r = r->next)
        if (r->kind != RESERVED && address >= r->start && address < r->start + r->size)
            return r;
    return NULL;
}

bool pinned(const void *address) {
    pthread_mutex_lock(&lock);
    struct range *r = around(address);
    bool is = r && (r->kind == PINNED || r->kind == REGISTERED);
    pthread_mutex_unlock(&lock);
    return is;
}

/* Charges `size` bytes to the current device. */
static int charge(size_t size) {
    int device = current_device(), error = OK;
    if (device < 0)
        return fail(NO_CONTEXT, "this thread has set no device");
    if (lost(device))
        return fail(DEVICE_LOST, "device %d is lost", device);
    const struct settings *s = settings();
    pthread_mutex_lock(&lock);
    if (used[device] + size > s->memory || (s->oom_after && used[device] + size > s->oom_after))
        error = OUT_OF_MEMORY;
    else
        used[device] += size;
    pthread_mutex_unlock(&lock);
    if (error)
        return fail(error, "device %d is out of memory: %zu bytes asked", device, size);
    count(ALLOCATIONS);
    return OK;
}

static void discharge(int device, size_t size) {
    pthread_mutex_lock(&lock);
    used[device] -= size;
    pthread_mutex_unlock(&lock);
}

static int memory_file(size_t size) {
    int fd = memfd_create("npu-memory", MFD_CLOEXEC);
    if (fd >= 0 && ftruncate(fd, size)) {
        close(fd);
        fd = -1;
    }
    return fd;
}

/* `size` bytes of address space that start at a multiple of a huge page. */
static char *reserve(size_t size) {
    char *raw = mmap(NULL, size + HUGE_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED)
        return NULL;
    char *start = (char *)up((uintptr_t)raw, HUGE_PAGE);
    if (start > raw)
        munmap(raw, start - raw);
    munmap(start + size, raw + HUGE_PAGE - start);
    return start;
}

static int map_at(char *start, size_t size, int fd, size_t offset) {
    void *at = mmap(start, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, offset);
    return at == MAP_FAILED ? fail(DRIVER_FAILED, "memory can't be mapped") : OK;
}

/* ---- device memory ------------------------------------------------------------------------------------------------- */

aclError aclrtMalloc(void **out, size_t size, aclrtMemMallocPolicy policy) {
    *out = NULL;
    if (!size)
        return fail(BAD_PARAMETER, "an allocation of no bytes");
    size_t whole = up(size, size >= HUGE_PAGE ? HUGE_PAGE : SMALL_PAGE);
    int error = charge(whole);
    if (error)
        return error;
    int fd = memory_file(whole);
    char *start = fd < 0 ? NULL : reserve(whole);
    if (!start || map_at(start, whole, fd, 0)) {
        discharge(current_device(), whole);
        return fail(OUT_OF_MEMORY, "the host has no %zu bytes left", whole);
    }
    add(DEVICE, start, whole)->fd = fd;
    *out = start;
    return OK;
}

aclError aclrtMallocAlign32(void **out, size_t size, aclrtMemMallocPolicy policy) { return aclrtMalloc(out, size, policy); }

static int imported_elsewhere(int record);

aclError aclrtFree(void *address) {
    struct range *r = take(DEVICE, address);
    if (!r)
        return fail(BAD_PARAMETER, "aclrtFree of an address that aclrtMalloc did not give");
    if (imported_elsewhere(r->record)) {
        add(DEVICE, r->start, r->size)->fd = r->fd;
        return fail(DRIVER_FAILED, "another process still imports the memory that is to be freed");
    }
    munmap(r->start, r->size);
    close(r->fd);
    discharge(r->device, r->size);
    free(r);
    return OK;
}

aclError aclrtGetMemInfo(aclrtMemAttr kind, size_t *free_bytes, size_t *total) {
    int device = current_device();
    if (device < 0)
        return fail(NO_CONTEXT, "this thread has set no device");
    pthread_mutex_lock(&lock);
    *total = settings()->memory;
    *free_bytes = *total - used[device];
    pthread_mutex_unlock(&lock);
    return OK;
}

/* ---- host memory --------------------------------------------------------------------------------------------------- */

aclError aclrtMallocHost(void **out, size_t size) {
    size = up(size ? size : 1, SMALL_PAGE);
    *out = aligned_alloc(SMALL_PAGE, size);
    if (!*out)
        return fail(OUT_OF_MEMORY, "the host has no %zu bytes left", size);
    add(PINNED, *out, size);
    return OK;
}

aclError aclrtFreeHost(void *address) {
    struct range *r = take(PINNED, address);
    if (!r)
        return fail(BAD_PARAMETER, "aclrtFreeHost of an address that aclrtMallocHost did not give");
    free(r->start);
    free(r);
    return OK;
}

aclError aclrtHostRegisterV2(void *address, uint64_t size, uint32_t flags) {
    add(REGISTERED, address, size);
    return OK;
}

aclError aclrtHostRegister(void *address, uint64_t size, aclrtHostRegisterType type, void **device_address) {
    add(REGISTERED, address, size);
    *device_address = address;
    return OK;
}

aclError aclrtHostUnregister(void *address) {
    struct range *r = take(REGISTERED, address);
    if (!r)
        return fail(BAD_PARAMETER, "aclrtHostUnregister of an address that is not registered");
    free(r);
    return OK;
}

/* ---- across processes: what both ways share ------------------------------------------------------------------------ */

/* An export is a record in a memory file of its own; its name, process and file descriptor, is what another process is told.
 * The importer reads in it which memory file to map and whether it may. */
#define LISTED 64
struct record {
    int fd, device;
    size_t offset, size;
    bool checked; /* only the listed processes may import */
    int listed, pids[LISTED];
    int importing[LISTED]; /* processes, 0: nobody */
};

static struct record *map_record(int fd) {
    void *at = mmap(NULL, sizeof(struct record), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return at == MAP_FAILED ? NULL : at;
}

static int new_record(struct record content) { /* -> its file descriptor */
    int fd = memory_file(sizeof content);
    struct record *r = fd < 0 ? NULL : map_record(fd);
    if (!r)
        return -1;
    *r = content;
    munmap(r, sizeof *r);
    return fd;
}

static int open_of(int pid, int fd) {
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, fd);
    return open(path, O_RDWR | O_CLOEXEC);
}

/* This process imports by key what the record (pid, fd) tells, or does so no longer. */
static void enlist(int pid, int fd, bool importing) {
    int record_fd = open_of(pid, fd);
    struct record *r = record_fd < 0 ? NULL : map_record(record_fd);
    if (record_fd >= 0)
        close(record_fd);
    if (!r)
        return;
    for (int i = 0; i < LISTED; i++)
        if (r->importing[i] == (importing ? 0 : getpid())) {
            r->importing[i] = importing ? getpid() : 0;
            break;
        }
    munmap(r, sizeof *r);
}

/* Whether a living process imports by key what this one has exported: the runtime wants importers to close first. */
static int imported_elsewhere(int record) {
    struct record *r = record < 0 ? NULL : map_record(record);
    bool found = false;
    for (int i = 0; r && i < LISTED; i++)
        found |= r->importing[i] && !kill(r->importing[i], 0);
    if (r)
        munmap(r, sizeof *r);
    return found;
}

/* Reads the record (pid, fd) and opens the memory it names; -1 with an error otherwise. */
static int open_memory(int pid, int fd, struct record *content, int *error) {
    int record_fd = open_of(pid, fd);
    struct record *r = record_fd < 0 ? NULL : map_record(record_fd);
    if (record_fd >= 0)
        close(record_fd);
    if (!r) {
        *error = fail(DRIVER_FAILED, "the exporting process %d is gone or has closed the export", pid);
        return -1;
    }
    *content = *r;
    munmap(r, sizeof *r);
    bool may = !content->checked;
    for (int i = 0; i < content->listed && i < LISTED; i++)
        may |= content->pids[i] == getpid();
    if (!may) {
        *error = fail(DRIVER_FAILED, "process %d is not on the export's list", getpid());
        return -1;
    }
    int memory = open_of(pid, content->fd);
    if (memory < 0)
        *error = fail(DRIVER_FAILED, "the exporting process %d has freed the memory", pid);
    return memory;
}

static int list_pids(int pid, int fd, const int32_t *pids, size_t n) {
    int record_fd = open_of(pid, fd);
    struct record *r = record_fd < 0 ? NULL : map_record(record_fd);
    if (record_fd >= 0)
        close(record_fd);
    if (!r)
        return fail(BAD_HANDLE, "there is no such export");
    for (size_t i = 0; i < n && r->listed < LISTED; i++)
        r->pids[r->listed++] = pids[i];
    munmap(r, sizeof *r);
    return OK;
}

/* ---- by key: a whole allocation or an aligned part of it ------------------------------------------------------------- */

#define KEY "stub-%d-%d" /* process, file descriptor of the record */
#define WITHOUT_LIST 1   /* export flag: any process may import */

aclError aclrtIpcMemGetExportKey(void *address, size_t size, char *key, size_t length, uint64_t flags) {
    if (length < 65)
        return fail(BAD_PARAMETER, "a key takes 65 bytes, not %zu", length);
    if (settings()->refuse_export)
        return fail(DRIVER_FAILED, "this device exports no memory");
    pthread_mutex_lock(&lock);
    struct range *r = around(address);
    struct record content = {0};
    if (r && r->kind == DEVICE)
        content = (struct record){
            .fd = r->fd, .device = r->device, .offset = (char *)address - r->start, .size = size, .checked = !(flags & WITHOUT_LIST)};
    bool inside = r && r->kind == DEVICE && content.offset + size <= r->size;
    pthread_mutex_unlock(&lock);
    if (!inside)
        return fail(BAD_PARAMETER, "the range to export is not inside one allocation");
    if (content.offset % HUGE_PAGE || size % HUGE_PAGE)
        return fail(UNALIGNED, "an export starts and ends at multiples of 2 MiB: offset %zu, %zu bytes", content.offset, size);
    int fd = new_record(content);
    if (fd < 0)
        return fail(DRIVER_FAILED, "the export can't be recorded");
    snprintf(key, length, KEY, getpid(), fd);
    pthread_mutex_lock(&lock);
    around(address)->record = fd;
    pthread_mutex_unlock(&lock);
    return OK;
}

aclError aclrtIpcMemSetImportPid(const char *key, int32_t *pids, size_t n) {
    int pid, fd;
    if (sscanf(key, KEY, &pid, &fd) != 2)
        return fail(BAD_PARAMETER, "%s is not a key", key);
    return list_pids(pid, fd, pids, n);
}

aclError aclrtIpcMemImportByKey(void **out, const char *key, uint64_t flags) {
    int pid, fd, error = OK;
    struct record content;
    if (sscanf(key, KEY, &pid, &fd) != 2)
        return fail(BAD_PARAMETER, "%s is not a key", key);
    int memory = open_memory(pid, fd, &content, &error);
    if (memory < 0)
        return error;
    char *start = reserve(content.size);
    error = start ? map_at(start, content.size, memory, content.offset) : fail(OUT_OF_MEMORY, "no address space is left");
    close(memory);
    if (error)
        return error;
    snprintf(add(IMPORTED, start, content.size)->key, 65, "%s", key);
    enlist(pid, fd, true);
    *out = start;
    return OK;
}

/* An importer unmaps; the exporter ends the export. */
aclError aclrtIpcMemClose(const char *key) {
    int pid, fd;
    if (sscanf(key, KEY, &pid, &fd) != 2)
        return fail(BAD_PARAMETER, "%s is not a key", key);
    if (pid == getpid() && imported_elsewhere(fd))
        return fail(DRIVER_FAILED, "another process still imports what is to be closed");
    if (pid == getpid()) {
        pthread_mutex_lock(&lock);
        for (struct range *r = ranges; r; r = r->next)
            if (r->record == fd)
                r->record = -1;
        pthread_mutex_unlock(&lock);
        return close(fd) ? fail(BAD_HANDLE, "this export is closed") : OK;
    }
    char *start = NULL;
    pthread_mutex_lock(&lock);
    for (struct range *r = ranges; r; r = r->next)
        if (r->kind == IMPORTED && !strcmp(r->key, key))
            start = r->start;
    pthread_mutex_unlock(&lock);
    struct range *r = start ? take(IMPORTED, start) : NULL;
    if (!r)
        return fail(BAD_HANDLE, "this key is not imported here");
    munmap(r->start, r->size);
    free(r);
    enlist(pid, fd, false);
    return OK;
}

/* ---- physical memory and mappings of it ------------------------------------------------------------------------------ */

aclError aclrtMemGetAllocationGranularity(aclrtPhysicalMemProp *kind, aclrtMemGranularityOptions option, size_t *size) {
    *size = HUGE_PAGE;
    return OK;
}

aclError aclrtMallocPhysical(aclrtDrvMemHandle *out, size_t size, const aclrtPhysicalMemProp *kind, uint64_t flags) {
    if (settings()->no_mappings)
        return fail(NOT_SUPPORTED, "this device has no memory to be mapped");
    if (!size || size % HUGE_PAGE)
        return fail(UNALIGNED, "physical memory comes in multiples of 2 MiB, not %zu bytes", size);
    int error = charge(size);
    if (error)
        return error;
    struct physical *p = malloc(sizeof *p);
    *p = (struct physical){memory_file(size), current_device(), size, false, -1};
    *out = p;
    return OK;
}

aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
    struct physical *p = handle;
    if (!p->imported) /* who has it mapped keeps it: physical memory is counted by its handles */
        discharge(p->device, p->size);
    if (p->record >= 0)
        close(p->record);
    close(p->fd);
    free(p);
    return OK;
}

aclError aclrtReserveMemAddress(void **out, size_t size, size_t alignment, void *expected, uint64_t flags) {
    size = up(size, HUGE_PAGE);
    *out = reserve(size);
    if (!*out)
        return fail(OUT_OF_MEMORY, "no address space is left");
    add(RESERVED, *out, size);
    return OK;
}

aclError aclrtReleaseMemAddress(void *address) {
    struct range *r = take(RESERVED, address);
    if (!r)
        return fail(BAD_PARAMETER, "this address is not reserved");
    munmap(r->start, r->size);
    free(r);
    return OK;
}

aclError aclrtMapMem(void *address, size_t size, size_t offset, aclrtDrvMemHandle handle, uint64_t flags) {
    struct physical *p = handle;
    if (size % HUGE_PAGE || (uintptr_t)address % HUGE_PAGE || offset + size > p->size)
        return fail(UNALIGNED, "a mapping starts and ends at multiples of 2 MiB inside the physical memory");
    int error = map_at(address, size, p->fd, offset);
    if (!error)
        add(MAPPED, address, size);
    return error;
}

aclError aclrtUnmapMem(void *address) {
    struct range *r = take(MAPPED, address);
    if (!r)
        return fail(BAD_PARAMETER, "nothing is mapped at this address");
    mmap(r->start, r->size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
    free(r);
    return OK;
}

aclError aclrtMemExportToShareableHandle(aclrtDrvMemHandle handle, aclrtMemHandleType type, uint64_t flags, uint64_t *out) {
    struct physical *p = handle;
    if (settings()->refuse_export)
        return fail(DRIVER_FAILED, "this device exports no memory");
    int fd = new_record((struct record){.fd = p->fd, .device = p->device, .size = p->size, .checked = !(flags & WITHOUT_LIST)});
    if (fd < 0)
        return fail(DRIVER_FAILED, "the export can't be recorded");
    p->record = fd;
    *out = (uint64_t)getpid() << 32 | (uint32_t)fd;
    return OK;
}

aclError aclrtMemSetPidToShareableHandle(uint64_t shareable, int32_t *pids, size_t n) {
    return list_pids(shareable >> 32, (uint32_t)shareable, pids, n);
}

aclError aclrtMemImportFromShareableHandle(uint64_t shareable, int32_t device, aclrtDrvMemHandle *out) {
    int error = OK;
    struct record content;
    int memory = open_memory(shareable >> 32, (uint32_t)shareable, &content, &error);
    if (memory < 0)
        return error;
    struct physical *p = malloc(sizeof *p);
    *p = (struct physical){memory, device, content.size, true, -1};
    *out = p;
    return OK;
}
