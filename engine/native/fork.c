/* What a worker or the keeper needs from the operating system and the standard library does not give. */

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

/* ---- the end of the control process -------------------------------------------------------------------------------- */

static void *watch(void *argument) {
    struct pollfd gone = {.fd = (int)(intptr_t)argument, .events = POLLIN};
    while (poll(&gone, 1, -1) < 0 && errno == EINTR) {}
    /* Also when polling failed: a process that can't see its owner any more must not outlive it. */
    _exit(0);
}

/* Ends this process at once when `fd` (a pidfd, or a pipe that the watched process holds open) becomes readable. A native
 * thread, so that neither a busy interpreter nor a held lock delays it. A forked child needs a watch of its own. Not
 * PR_SET_PDEATHSIG: that follows the thread that forked, which is the keeper's and not the control process's. 0 or -errno. */
int ds_watch(int fd) {
    int own = fcntl(fd, F_DUPFD_CLOEXEC, 3); /* the caller may close its copy */
    if (own < 0) return -errno;
    pthread_attr_t attributes;
    pthread_t thread;
    sigset_t all, before;
    pthread_attr_init(&attributes);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    pthread_attr_setstacksize(&attributes, 256 << 10); /* a library's thread-local data is taken from it too */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals belong to the interpreter's threads */
    int failed = pthread_create(&thread, &attributes, watch, (void *)(intptr_t)own);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    pthread_attr_destroy(&attributes);
    if (failed) close(own);
    return -failed;
}

/* The name that ps, top and /proc show; 15 bytes of it count. */
void ds_set_name(const char *name) { prctl(PR_SET_NAME, name, 0, 0, 0); }

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

static uint64_t rotl(uint64_t x, int bits) { return (x << bits) | (x >> (64 - bits)); }
static uint64_t word64(const uint8_t *p) { uint64_t x; memcpy(&x, p, 8); return x; }
static uint64_t round64(uint64_t lane, uint64_t word) { return rotl(lane + word * P2, 31) * P1; }

/* XXH64 with seed 0, as published by its author (little-endian hosts only): weight manifests carry it, so its values
 * are part of a file format and can be checked with any other implementation. Memory speed on one core. */
uint64_t ds_checksum(const uint8_t *p, uint64_t length) {
    const uint8_t *stop = p + length;
    uint64_t h = P5;
    if (length >= 32) {
        uint64_t a = P1 + P2, b = P2, c = 0, d = 0 - P1; /* an array here makes gcc vectorise, at half the speed */
        for (; stop - p >= 32; p += 32) {
            a = round64(a, word64(p)), b = round64(b, word64(p + 8));
            c = round64(c, word64(p + 16)), d = round64(d, word64(p + 24));
        }
        h = rotl(a, 1) + rotl(b, 7) + rotl(c, 12) + rotl(d, 18);
        h = (h ^ round64(0, a)) * P1 + P4, h = (h ^ round64(0, b)) * P1 + P4;
        h = (h ^ round64(0, c)) * P1 + P4, h = (h ^ round64(0, d)) * P1 + P4;
    }
    h += length;
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
