/* A byte ring between one sending and one receiving process, in memory that both map.
 *
 * The mapping is HEADER bytes of control words followed by `capacity` bytes of data, a power of two. Every control word
 * has one writer at a time and stands on its own 128 bytes: two cache lines of an x86 host (which fetches them in pairs),
 * one of the widest aarch64 hosts.
 *
 *   offset  word                       written by
 *        0  magic, version, capacity   the creator, once
 *      128  head                       the sender: bytes ever written
 *      256  tail                       the receiver: bytes ever read
 *      384  sender: waits, closed      `waits` is set by its owner before it sleeps and taken back by whoever rings;
 *      512  receiver: waits, closed    `closed` is set by its owner, for good
 *      640  beat                       whichever end the user chose: CLOCK_MONOTONIC in ns
 *     1024  data
 *
 * A record is a 4-byte word (length, and bit 31: the message goes on in the next record), then the bytes, padded to 8, so
 * that the word never straddles the end of the data; the bytes may. A record takes at most half the ring; longer messages
 * travel as several. `head` moves by a single release store after a record is complete: an end killed at any point leaves
 * whole records behind, or none.
 *
 * Sleeping: an end sets its `waits`, fences, looks once more, and only then sleeps: in an event loop on its doorbell (an
 * eventfd; the receiver's is `data`, the sender's is `space`), or blocking on the word `waits` itself (a futex: one system
 * call a side). The other end moves its index, fences, and rings in the way that `waits` says, if it is set. Of the two
 * fences one comes first, so either the sleeper sees the new index or the other sees that it sleeps: no wake-up is lost,
 * and no system call is made while both are busy. The sender is rung only once half the ring is free: that is room for any
 * record, and keeps the two from waking each other for every message. A process killed between its store and the ring
 * leaves the other asleep beside a message: who learns of that death looks into the ring once more.
 *
 * All indices that the peer writes are checked before use; what can't be is reported as CORRUPT, never followed.
 */

#include <errno.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

_Static_assert(ATOMIC_LLONG_LOCK_FREE == 2 && ATOMIC_INT_LOCK_FREE == 2, "atomics must work across processes");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "magic and records are little-endian");

#define MAGIC 0x00676e69722d7364ull /* "ds-ring" and a zero byte */
#define VERSION 1u
#define HEADER 1024u
#define MIN_CAPACITY 64u
#define MAX_CAPACITY (1u << 30)
#define MORE 0x80000000u

/* what calls return besides counts; engine/shmq.py knows the same numbers */
enum { FULL = -1, CORRUPT = -2, GONE = -3, CLOSED = -4, FOREIGN = -5, INTERRUPTED = -6 };
enum { LEFT = 1 << 16, FRAGMENTS = 1 << 17 };
/* what `waits` says */
enum { AWAKE = 0, IN_A_LOOP = 1, BLOCKED = 2 };

typedef struct {
    _Alignas(128) _Atomic uint32_t waits;
    _Atomic uint32_t closed;
} side;

typedef struct {
    _Atomic uint64_t magic;
    uint32_t version, capacity;
    _Alignas(128) _Atomic uint64_t head;
    _Alignas(128) _Atomic uint64_t tail;
    side sender, receiver;
    _Alignas(128) _Atomic uint64_t beat;
} shared;

_Static_assert(sizeof(shared) <= HEADER, "the header outgrew its place");

typedef struct {
    shared *ring;
    uint8_t *data;
    uint64_t capacity;
    uint64_t mine, theirs; /* own index, and the last seen of the peer's */
    side *me, *peer;
    int my_bell, peer_bell;
    int sends;
    uint8_t *out; /* a receiver's: where records go, `size` bytes, and where each one ends */
    uint64_t size;
    int32_t *ends;
    int most;
    atomic_int roused; /* set by ds_ring_rouse, cleared by the wait that it ends */
} end;

static uint64_t padded(uint64_t length) { return (4 + length + 7) & ~7ull; }

/* The longest payload of one record: with its word and padding, half the ring. */
static uint64_t record_limit(const end *e) { return e->capacity / 2 - 4; }

static void ring_bell(side *sleeper, int bell) {
    if (atomic_load_explicit(&sleeper->waits, memory_order_relaxed) == AWAKE) return;
    uint32_t how = atomic_exchange_explicit(&sleeper->waits, AWAKE, memory_order_relaxed);
    if (how == BLOCKED) syscall(SYS_futex, &sleeper->waits, FUTEX_WAKE, 1, NULL, NULL, 0);
    if (how == IN_A_LOOP) {
        uint64_t one = 1;
        while (write(bell, &one, sizeof one) < 0 && errno == EINTR) {}
    }
}

/* ---- life ---------------------------------------------------------------------------------------------------------- */

/* Writes an empty ring's header into a mapping-sized file. 0 or -errno. */
int ds_ring_format(int memfd, uint32_t capacity) {
    shared *ring = mmap(NULL, HEADER, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    if (ring == MAP_FAILED) return -errno;
    ring->version = VERSION;
    ring->capacity = capacity;
    atomic_store_explicit(&ring->magic, MAGIC, memory_order_release);
    munmap(ring, HEADER);
    return 0;
}

uint64_t ds_ring_size(uint32_t capacity) { return (uint64_t)HEADER + capacity; }

/* Maps one end. The bells stay the caller's and must outlive it. Gives 0, FOREIGN, or -errno - 1000. */
int ds_ring_open(int memfd, int data_bell, int space_bell, int sends, void **out) {
    struct stat st;
    if (fstat(memfd, &st) < 0) return -errno - 1000;
    if (st.st_size < (off_t)(HEADER + MIN_CAPACITY)) return FOREIGN;
    shared *ring = mmap(NULL, (size_t)st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
    if (ring == MAP_FAILED) return -errno - 1000;
    uint64_t capacity = ring->capacity;
    int good = atomic_load_explicit(&ring->magic, memory_order_acquire) == MAGIC && ring->version == VERSION &&
               capacity >= MIN_CAPACITY && capacity <= MAX_CAPACITY && (capacity & (capacity - 1)) == 0 &&
               ds_ring_size((uint32_t)capacity) == (uint64_t)st.st_size;
    end *e = good ? malloc(sizeof *e) : NULL;
    if (!e) {
        munmap(ring, (size_t)st.st_size);
        return good ? -ENOMEM - 1000 : FOREIGN;
    }
    uint64_t head = atomic_load_explicit(&ring->head, memory_order_acquire);
    uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_acquire);
    *e = (end){
        .ring = ring, .data = (uint8_t *)ring + HEADER, .capacity = capacity, .sends = sends,
        .mine = sends ? head : tail, .theirs = sends ? tail : head,
        .me = sends ? &ring->sender : &ring->receiver, .peer = sends ? &ring->receiver : &ring->sender,
        .my_bell = sends ? space_bell : data_bell, .peer_bell = sends ? data_bell : space_bell,
    };
    *out = e;
    return 0;
}

/* Tells the peer, wakes it, and unmaps. */
void ds_ring_close(void *handle) {
    end *e = handle;
    atomic_store_explicit(&e->me->closed, 1, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    ring_bell(e->peer, e->peer_bell);
    munmap(e->ring, HEADER + e->capacity);
    free(e);
}

/* Where `ds_ring_pop` puts what it reads: `size` bytes, at least half the ring, and `most` ends. */
void ds_ring_scratch(void *handle, uint8_t *out, uint64_t size, int32_t *ends, int most) {
    end *e = handle;
    e->out = out, e->size = size, e->ends = ends, e->most = most;
}

uint64_t ds_ring_capacity(void *handle) { return ((end *)handle)->capacity; }

int ds_ring_peer_closed(void *handle) {
    return (int)atomic_load_explicit(&((end *)handle)->peer->closed, memory_order_acquire);
}

/* ---- heartbeat ----------------------------------------------------------------------------------------------------- */

void ds_ring_beat(void *handle) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    uint64_t ns = (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
    atomic_store_explicit(&((end *)handle)->ring->beat, ns, memory_order_release);
}

uint64_t ds_ring_last_beat(void *handle) {
    return atomic_load_explicit(&((end *)handle)->ring->beat, memory_order_acquire);
}

/* ---- records ------------------------------------------------------------------------------------------------------- */

static void copy_in(end *e, uint64_t at, const uint8_t *from, uint64_t length) {
    uint64_t start = at & (e->capacity - 1), first = e->capacity - start;
    if (first > length) first = length;
    memcpy(e->data + start, from, first);
    memcpy(e->data, from + first, length - first);
}

static void copy_out(const end *e, uint64_t at, uint8_t *to, uint64_t length) {
    uint64_t start = at & (e->capacity - 1), first = e->capacity - start;
    if (first > length) first = length;
    memcpy(to, e->data + start, first);
    memcpy(to + first, e->data, length - first);
}

/* Pushes as much of the message from `offset` as fits in whole records. Gives the new offset (the message is in when it
 * equals `length`), FULL if not one record fitted, GONE if the receiver has closed, CLOSED, or CORRUPT. */
int64_t ds_ring_push_from(void *handle, const uint8_t *payload, uint64_t length, uint64_t offset) {
    end *e = handle;
    if (!e) return CLOSED;
    if (atomic_load_explicit(&e->peer->closed, memory_order_relaxed)) return GONE;
    uint64_t before = e->mine;
    do {
        uint64_t part = length - offset, limit = record_limit(e);
        uint32_t word = 0;
        if (part > limit) part = limit, word = MORE;
        uint64_t need = padded(part);
        if (e->capacity - (e->mine - e->theirs) < need) {
            e->theirs = atomic_load_explicit(&e->ring->tail, memory_order_acquire);
            if (e->mine - e->theirs > e->capacity) return CORRUPT;
            if (e->capacity - (e->mine - e->theirs) < need) break;
        }
        word |= (uint32_t)part;
        memcpy(e->data + (e->mine & (e->capacity - 1)), &word, 4);
        copy_in(e, e->mine + 4, payload + offset, part);
        e->mine += need;
        offset += part;
        atomic_store_explicit(&e->ring->head, e->mine, memory_order_release);
    } while (offset < length);
    if (e->mine == before) return FULL;
    atomic_thread_fence(memory_order_seq_cst);
    ring_bell(e->peer, e->peer_bell);
    return (int64_t)offset;
}

/* The usual case: a message of one record. Gives `length` when it is in, else as above. */
int ds_ring_push(void *handle, const uint8_t *payload, int length) {
    return (int)ds_ring_push_from(handle, payload, (uint64_t)length, 0);
}

/* Copies up to `most` records, back to back, into the scratch memory and stops early once `enough` bytes are there.
 * ends[i] is where record i ends there, as ~end if its message goes on in the next record. Looks only at what was there at
 * the last call with `fresh` set. Gives the count, with LEFT if records remain of that and FRAGMENTS if one goes on; or
 * CLOSED or CORRUPT. */
int ds_ring_pop(void *handle, int most, int enough, int fresh) {
    end *e = handle;
    if (!e) return CLOSED;
    uint64_t used = 0;
    if (most > e->most) most = e->most;
    int count = 0, flags = 0;
    if (fresh) e->theirs = atomic_load_explicit(&e->ring->head, memory_order_acquire);
    uint64_t head = e->theirs;
    if (head - e->mine > e->capacity) return CORRUPT;
    while (e->mine != head && count < most && used < (uint64_t)enough) {
        uint32_t word;
        memcpy(&word, e->data + (e->mine & (e->capacity - 1)), 4);
        uint64_t length = word & ~MORE;
        if (length > record_limit(e) || padded(length) > head - e->mine) return CORRUPT;
        if (used + length > e->size) break;
        copy_out(e, e->mine + 4, e->out + used, length);
        used += length;
        e->ends[count++] = word & MORE ? ~(int32_t)used : (int32_t)used;
        if (word & MORE) flags |= FRAGMENTS;
        e->mine += padded(length);
    }
    if (count == 0) return 0;
    atomic_store_explicit(&e->ring->tail, e->mine, memory_order_release);
    atomic_thread_fence(memory_order_seq_cst);
    if (head - e->mine <= e->capacity / 2) ring_bell(e->peer, e->peer_bell);
    return count | flags | (e->mine != head ? LEFT : 0);
}

/* ---- sleeping ------------------------------------------------------------------------------------------------------ */

/* What this end sleeps for: a record to read, or room for any record. A corrupt index counts, and for the sender a peer
 * that has closed: its next call reports it. */
static int ready(const end *e) {
    if (atomic_load_explicit(&e->roused, memory_order_relaxed)) return 1; /* ordered by the fence in announce */
    if (!e->sends) return atomic_load_explicit(&e->ring->head, memory_order_acquire) != e->mine;
    uint64_t used = e->mine - atomic_load_explicit(&e->ring->tail, memory_order_acquire);
    return used <= e->capacity / 2 || used > e->capacity || ds_ring_peer_closed((void *)e);
}

static int announce(end *e, uint32_t how) {
    atomic_store_explicit(&e->me->waits, how, memory_order_relaxed);
    atomic_thread_fence(memory_order_seq_cst);
    if (!ready(e)) return 1;
    atomic_store_explicit(&e->me->waits, AWAKE, memory_order_relaxed);
    return 0;
}

/* Announces that this end sleeps until its doorbell rings. 1: it may; 0: there is something to do (nothing announced). */
int ds_ring_sleep(void *handle) { return announce(handle, IN_A_LOOP); }

/* Takes the announcement back and silences the doorbell. */
void ds_ring_wake(void *handle) {
    end *e = handle;
    uint64_t rings;
    atomic_store_explicit(&e->me->waits, AWAKE, memory_order_relaxed);
    while (read(e->my_bell, &rings, sizeof rings) < 0 && errno == EINTR) {}
}

/* Blocks until there is something to do (1), the peer has closed and there never will be (GONE), `timeout_ns` has passed (0;
 * negative: never) or a signal came (INTERRUPTED). May return 0 early: the caller keeps the deadline. */
int ds_ring_wait(void *handle, int64_t timeout_ns) {
    end *e = handle;
    if (!e) return CLOSED;
    if (ready(e) || !announce(e, BLOCKED)) {
        atomic_store(&e->roused, 0);
        return 1;
    }
    int interrupted = 0;
    if (!ds_ring_peer_closed(e)) {
        struct timespec limit = {timeout_ns / 1000000000, timeout_ns % 1000000000};
        long slept = syscall(SYS_futex, &e->me->waits, FUTEX_WAIT, BLOCKED, timeout_ns < 0 ? NULL : &limit, NULL, 0);
        interrupted = slept < 0 && errno == EINTR;
    }
    atomic_store_explicit(&e->me->waits, AWAKE, memory_order_relaxed);
    int closed = ds_ring_peer_closed(e); /* first: what was sent before closing counts */
    if (atomic_exchange(&e->roused, 0) || ready(e)) return 1;
    return closed ? GONE : interrupted ? INTERRUPTED : 0;
}

/* From another thread of the process: ends the wait of this end's owner, or its next one. */
void ds_ring_rouse(void *handle) {
    end *e = handle;
    atomic_store(&e->roused, 1);
    atomic_store(&e->me->waits, AWAKE); /* a wait that is about to begin finds another value than it announced */
    syscall(SYS_futex, &e->me->waits, FUTEX_WAKE, 1, NULL, NULL, 0);
}
