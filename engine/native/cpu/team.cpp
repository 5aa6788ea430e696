// The team of threads that runs a program of operators (cpu.h), and the choice of instruction set.
//
// Programs are launched into a queue, which member 0 works off in order: while one runs, the next can wait behind it, so that
// nothing the caller does between two steps keeps the processor waiting. An operator is done when all of its chunks have
// been taken and whoever took one has left it: a member that comes late, because the system let its core do
// something else, finds nothing to take and holds nobody up. Who waits (for a program, or for the others to finish their
// chunks, or for the other ranks of a group) spins for SPIN_NS and then sleeps on a futex, so that an idle team takes no processor time and two teams on the
// same cores don't keep each other from running.
//
// A team can be held to a share of its threads' time: fewer members than there are take part, and these rest between operators.
//
// A team belongs to the process that made it: make it after the last fork. One thread at a time launches.
#include "cpu.h"

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

// ---- waiting ---------------------------------------------------------------------------------------------------------

enum { SPIN_NS = 40000 };  // about what a futex takes to put a thread to sleep and wake it up, some times over

static int64_t clock_ns(clockid_t which) {
    struct timespec t;
    clock_gettime(which, &t);
    return t.tv_sec * 1000000000ll + t.tv_nsec;
}

static int64_t now_ns() { return clock_ns(CLOCK_MONOTONIC); }

// A number that grows, and those who sleep until it has.
struct alignas(64) Bell {
    uint32_t value;
    uint32_t sleepers;
};

static void sleep_until_change(Bell *bell, uint32_t seen) {
    // Whoever rings either sees the sleeper, or has changed the value before the futex looks at it.
    __atomic_fetch_add(&bell->sleepers, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&bell->value, __ATOMIC_SEQ_CST) == seen)
        syscall(SYS_futex, &bell->value, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
    __atomic_fetch_sub(&bell->sleepers, 1, __ATOMIC_RELAXED);
}

static void wait_for_change(Bell *bell, uint32_t seen) {
    int64_t stop = 0;
    for (;;) {
        for (int i = 0; i < 32; i++) {
            if (__atomic_load_n(&bell->value, __ATOMIC_ACQUIRE) != seen) return;
            ds_relax();
        }
        int64_t now = now_ns();
        if (!stop) stop = now + SPIN_NS;
        if (now >= stop) return sleep_until_change(bell, seen);
    }
}

// The same, but no longer than until `end`, as now_ns has it.
static void sleep_at_most(Bell *bell, uint32_t seen, int64_t end) {
    const struct timespec at = {end / 1000000000, end % 1000000000};
    __atomic_fetch_add(&bell->sleepers, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&bell->value, __ATOMIC_SEQ_CST) == seen)
        if (syscall(SYS_futex, &bell->value, FUTEX_WAIT_BITSET_PRIVATE, seen, &at, nullptr, FUTEX_BITSET_MATCH_ANY) &&
            errno == ETIMEDOUT)
            break;
    __atomic_fetch_sub(&bell->sleepers, 1, __ATOMIC_RELAXED);
}

static void wake_sleepers(Bell *bell) {
    if (__atomic_load_n(&bell->sleepers, __ATOMIC_SEQ_CST))
        syscall(SYS_futex, &bell->value, FUTEX_WAKE_PRIVATE, 0x7fffffff, nullptr, nullptr, 0);
}

static void ring(Bell *bell) {
    __atomic_fetch_add(&bell->value, 1, __ATOMIC_SEQ_CST);
    wake_sleepers(bell);
}

// Numbers of bells wrap around.
static inline bool before(uint32_t a, uint32_t b) { return (int32_t)(a - b) < 0; }

static void ring_up_to(Bell *bell, uint32_t value) {
    uint32_t now = __atomic_load_n(&bell->value, __ATOMIC_RELAXED);
    while (before(now, value))
        if (__atomic_compare_exchange_n(&bell->value, &now, value, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {
            wake_sleepers(bell);
            return;
        }
}

// ---- ranks -----------------------------------------------------------------------------------------------------------

// The ranks' bell is in shared memory, so its futex isn't private. Ranks may have fewer cores than threads: after YIELD_NS of
// spinning the core is offered to whoever wants it, which may be the rank that is waited for.
enum { YIELD_NS = 4000 };

extern "C" void ds_meet(ds_meeting *meeting, int64_t ranks) {
    const uint32_t seen = __atomic_load_n(&meeting->value, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&meeting->came, 1, __ATOMIC_ACQ_REL) == (uint32_t)ranks) {
        __atomic_store_n(&meeting->came, 0, __ATOMIC_RELAXED);  // nobody comes again before the bell
        __atomic_fetch_add(&meeting->value, 1, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&meeting->sleepers, __ATOMIC_SEQ_CST))
            syscall(SYS_futex, &meeting->value, FUTEX_WAKE, 0x7fffffff, nullptr, nullptr, 0);
        return;
    }
    const int64_t began = now_ns();
    for (int64_t spent = 0; spent < SPIN_NS; spent = now_ns() - began) {
        if (spent > YIELD_NS) sched_yield();
        for (int i = 0; i < 32; i++) {
            if (__atomic_load_n(&meeting->value, __ATOMIC_ACQUIRE) != seen) return;
            ds_relax();
        }
    }
    __atomic_fetch_add(&meeting->sleepers, 1, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&meeting->value, __ATOMIC_SEQ_CST) == seen)
        syscall(SYS_futex, &meeting->value, FUTEX_WAIT, seen, nullptr, nullptr, 0);
    __atomic_fetch_sub(&meeting->sleepers, 1, __ATOMIC_RELAXED);
}

// ---- the team --------------------------------------------------------------------------------------------------------

struct Program {
    const ds_op *ops;
    int64_t count;
    const ds_step *step;
    const ds_kernel *kernels;
    uint32_t base;  // of Crew.done when it begins
};

struct alignas(64) Place {  // an operator's
    int64_t next;    // the next chunk to be taken
    int64_t ready;   // what the operator counts
    int32_t inside;  // members that run it now
};

struct Crew;

struct Member {
    Crew *crew;
    int index;
    pthread_t thread;
    void *scratch;
    // Where the team has a share of its time only; see `rest`.
    int share;          // that the rest of this was counted for
    int64_t counted;    // processor time that has been paid for
    int64_t paid_until; // when all of it has been rested for
};

// Set in Crew.gate while no program may be joined; the rest of it counts the members that have joined.
static const uint32_t CLOSED = 1u << 31;
enum { QUEUE = 8 };  // programs launched and not done; a step loop launches one or two ahead

struct Crew {
    Bell launched;  // grows by one for each program, and when the team ends
    Bell finished;  // grows by one for each program
    Bell start;  // rung when a program has been set, and when the team ends
    Bell done;   // grows by one for each operator
    Bell left;   // rung when nobody is in the program
    Bell watched;  // rung when `done` has come to `watch`, while somebody watches
    uint32_t watch;
    uint32_t watching;
    uint32_t promised;      // what `done` will be when all that was launched is
    uint32_t bases[QUEUE];  // what it is when a queued program begins
    Bell over;   // rung when a program's last operator is done, and when the share changes: ends all rest
    int share;   // permille of its threads' time that the team may take
    alignas(64) uint32_t gate;
    Program queue[QUEUE];
    alignas(64) Program program;
    Place *places;
    int64_t room;  // in places
    int threads;
    int64_t cache;
    int ending;
    pid_t process;
    int *cores;  // or null: members run where the system puts them
    Member *members;
};

static void pin(int core) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(core, &set);
    sched_setaffinity(0, sizeof set, &set);  // a core that is not allowed: the thread stays where it may be
}

// ---- shares ----------------------------------------------------------------------------------------------------------

enum { WHOLE = 1000 };  // permille
enum { REST_NS = 1000000 };    // no rest is shorter: falling asleep and waking up cost some hundredth of it
enum { CREDIT_NS = 5000000 };  // time not used is forgotten after so long, so that an idle team saves nothing up

// How many members take part: as many as fill the share, the last of them perhaps in part.
static int at_work(const Crew *crew, int share) { return (crew->threads * share + WHOLE - 1) / WHOLE; }

// Sleeps while the member has had more processor time than its part of the share, but no longer than until `over` has been rung
// since it was `seen`. Whether it slept. What the system gave to others meanwhile counts as rest, so a share is what a member
// has at most of a core, and two teams that share cores with no more than all of it don't slow each other down.
static bool rest(Crew *crew, Member *member, int share, uint32_t seen) {
    int64_t now = now_ns(), used = clock_ns(CLOCK_THREAD_CPUTIME_ID);
    if (member->share != share) {
        member->share = share;
        member->counted = used;
        member->paid_until = now;
    }
    // A share of all threads, in whole members: each of those that take part has this part of its own time.
    member->paid_until += (used - member->counted) * at_work(crew, share) * WHOLE / ((int64_t)share * crew->threads);
    member->counted = used;
    if (member->paid_until < now - CREDIT_NS) member->paid_until = now - CREDIT_NS;
    if (member->paid_until < now + REST_NS) return false;
    sleep_at_most(&crew->over, seen, member->paid_until);
    return true;
}

// Members that have no part in the share leave the program to the others; they come back when it changes.
static void run_program(Crew *crew, int index) {
    const Program *program = &crew->program;
    for (int64_t i = 0;;) {
        uint32_t over = __atomic_load_n(&crew->over.value, __ATOMIC_ACQUIRE);
        uint32_t done = __atomic_load_n(&crew->done.value, __ATOMIC_ACQUIRE);
        if ((int64_t)(uint32_t)(done - program->base) > i) i = (uint32_t)(done - program->base);
        if (i >= program->count) return;
        int share = __atomic_load_n(&crew->share, __ATOMIC_RELAXED);
        if (share < WHOLE) {
            if (index >= at_work(crew, share)) return;
            if (rest(crew, &crew->members[index], share, over)) continue;  // the others have gone on
        }
        Place *place = &crew->places[i];
        ds_team view = {index, crew->threads, &place->next, &place->ready, crew->members[index].scratch, crew->cache};
        __atomic_add_fetch(&place->inside, 1, __ATOMIC_ACQ_REL);
        program->kernels[program->ops[i].kind](&program->ops[i], program->step, &view);
        // A kernel returns when there is nothing more to take. So the last one out knows that all is done; who enters later
        // takes nothing.
        uint32_t after = program->base + (uint32_t)++i;
        if (__atomic_sub_fetch(&place->inside, 1, __ATOMIC_ACQ_REL) == 0) {
            ring_up_to(&crew->done, after);
            if (__atomic_load_n(&crew->watching, __ATOMIC_SEQ_CST) && !before(after, crew->watch)) ring(&crew->watched);
            if (i == program->count) ring(&crew->over);
        }
        while (before(done = __atomic_load_n(&crew->done.value, __ATOMIC_ACQUIRE), after)) wait_for_change(&crew->done, done);
    }
}

static void leave(Crew *crew) {
    if (__atomic_sub_fetch(&crew->gate, 1, __ATOMIC_ACQ_REL) == CLOSED) ring(&crew->left);
}

static void *live(void *argument) {
    Member *member = (Member *)argument;
    Crew *crew = member->crew;
    char name[16];
    snprintf(name, sizeof name, "ds-cpu-%d", member->index);
    pthread_setname_np(pthread_self(), name);
    if (crew->cores) pin(crew->cores[member->index]);
    for (;;) {
        uint32_t seen = __atomic_load_n(&crew->start.value, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&crew->ending, __ATOMIC_ACQUIRE)) return nullptr;
        if (!(__atomic_fetch_add(&crew->gate, 1, __ATOMIC_ACQ_REL) & CLOSED)) run_program(crew, member->index);
        leave(crew);
        wait_for_change(&crew->start, seen);
    }
}

// Lets whoever is there begin with `next`.
static void open_program(Crew *crew, const Program &next) {
    memset((void *)crew->places, 0, next.count * sizeof(Place));
    crew->program = next;
    crew->program.base = crew->done.value;
    // Whoever joins sees all of the above. One that is about to leave a gate it found closed is still counted in it.
    __atomic_fetch_and(&crew->gate, ~CLOSED, __ATOMIC_ACQ_REL);
    if (crew->threads > 1) ring(&crew->start);
}

// Returns when it is done and nobody is in it.
static void close_program(Crew *crew) {
    __atomic_fetch_or(&crew->gate, CLOSED, __ATOMIC_ACQ_REL);
    for (;;) {
        uint32_t seen = __atomic_load_n(&crew->left.value, __ATOMIC_SEQ_CST);
        if (__atomic_load_n(&crew->gate, __ATOMIC_ACQUIRE) == CLOSED) return;
        wait_for_change(&crew->left, seen);
    }
}

// Member 0's life. Who waits for a program is told when the next one is open, where one is queued: woken up, it takes a core from
// a member, and the others go on meanwhile.
static void *live_first(void *argument) {
    Crew *crew = ((Member *)argument)->crew;
    pthread_setname_np(pthread_self(), "ds-cpu-0");
    if (crew->cores) pin(crew->cores[0]);
    bool owing = false;
    for (uint32_t begun = 0;; begun++) {
        if (owing && __atomic_load_n(&crew->launched.value, __ATOMIC_ACQUIRE) == begun) ring(&crew->finished), owing = false;
        wait_for_change(&crew->launched, begun);
        if (__atomic_load_n(&crew->ending, __ATOMIC_ACQUIRE)) break;
        open_program(crew, crew->queue[begun % QUEUE]);
        if (owing) ring(&crew->finished);
        run_program(crew, 0);
        close_program(crew);
        owing = true;
    }
    if (owing) ring(&crew->finished);
    return nullptr;
}

// Bytes of the last-level cache; 0 where the system doesn't tell.
static int64_t last_level_cache() {
    FILE *file = fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r");
    long kilobytes = 0;
    if (!file) return 0;
    if (fscanf(file, "%ldK", &kilobytes) != 1) kilobytes = 0;
    fclose(file);
    return (int64_t)kilobytes << 10;
}

static void *map_scratch() {
    void *at = mmap(nullptr, DS_SCRATCH_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return at == MAP_FAILED ? nullptr : at;
}

extern "C" void ds_team_free(void *team) {
    Crew *crew = (Crew *)team;
    if (!crew) return;
    if (crew->process == getpid()) {  // in a forked child there are no members to join, and their locks may be held
        __atomic_store_n(&crew->ending, 1, __ATOMIC_RELEASE);
        ring(&crew->launched);
        ring(&crew->start);
        for (int i = 0; i < crew->threads; i++) pthread_join(crew->members[i].thread, nullptr);
    }
    for (int i = 0; i < crew->threads; i++)
        if (crew->members[i].scratch) munmap(crew->members[i].scratch, DS_SCRATCH_BYTES);
    free(crew->places);
    free(crew->members);
    free(crew->cores);
    free(crew);
}

// A team of `threads` members; `cores`: where each of them is pinned, or null. Null where the system gives no memory or no
// threads.
extern "C" void *ds_team_new(int threads, const int *cores) {
    Crew *crew = (Crew *)aligned_alloc(64, sizeof(Crew));
    if (!crew) return nullptr;
    memset(crew, 0, sizeof *crew);
    crew->gate = CLOSED;
    crew->share = WHOLE;
    crew->cache = last_level_cache();
    crew->process = getpid();
    crew->members = (Member *)calloc(threads, sizeof(Member));
    if (cores && (crew->cores = (int *)malloc(threads * sizeof(int)))) memcpy(crew->cores, cores, threads * sizeof(int));
    bool whole = crew->members && (!cores || crew->cores);
    // Signals are the interpreter's: a member never runs a handler.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (int i = 0; i < threads && whole; i++) {
        Member *member = &crew->members[i];
        member->crew = crew, member->index = i, member->scratch = map_scratch();
        whole = member->scratch && pthread_create(&member->thread, nullptr, i ? live : live_first, member) == 0;
        // Counts who must be joined. Members read it only after the first program's bell.
        if (whole) crew->threads = i + 1;
        else if (member->scratch) munmap(member->scratch, DS_SCRATCH_BYTES);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (whole) return crew;
    ds_team_free(crew);
    return nullptr;
}

// From now on the team's programs take no more than `permille` (1 to 1000) of its threads' time. From any thread, at any time.
extern "C" void ds_team_share(void *team, int permille) {
    Crew *crew = (Crew *)team;
    __atomic_store_n(&crew->share, permille, __ATOMIC_SEQ_CST);
    ring(&crew->over);   // who rests counts anew
    ring(&crew->start);  // who had no part looks whether it has one now
}

// Sixteen rows of float32 activations this long fill a member's scratch; matrices are sooner too large for other reasons.
static const int64_t LONGEST_K = DS_SCRATCH_BYTES / 16 / 4;

// Waits until program number `ticket` of ds_launch is done.
extern "C" void ds_wait(void *team, int64_t ticket) {
    Crew *crew = (Crew *)team;
    for (uint32_t done; before(done = __atomic_load_n(&crew->finished.value, __ATOMIC_ACQUIRE), (uint32_t)ticket + 1);)
        sleep_until_change(&crew->finished, done);  // spinning would take the core from a member
}

// Waits until operator number `op` of program `ticket` is done. One thread at a time.
extern "C" void ds_wait_operator(void *team, int64_t ticket, int64_t op) {
    Crew *crew = (Crew *)team;
    const uint32_t base = __atomic_load_n(&crew->bases[(uint32_t)ticket % QUEUE], __ATOMIC_ACQUIRE);  // before what follows
    // While it isn't finished no other program has its place, and the base is this one's.
    if (!before(__atomic_load_n(&crew->finished.value, __ATOMIC_ACQUIRE), (uint32_t)ticket + 1)) return;
    const uint32_t target = base + (uint32_t)op + 1;
    __atomic_store_n(&crew->watch, target, __ATOMIC_SEQ_CST);
    __atomic_store_n(&crew->watching, 1, __ATOMIC_SEQ_CST);
    for (;;) {
        uint32_t seen = __atomic_load_n(&crew->watched.value, __ATOMIC_SEQ_CST);
        if (!before(__atomic_load_n(&crew->done.value, __ATOMIC_SEQ_CST), target)) break;
        sleep_until_change(&crew->watched, seen);
    }
    __atomic_store_n(&crew->watching, 0, __ATOMIC_SEQ_CST);
}

// Queues `count` operators to be run in order, each by the whole team, after all that was launched before; waits only where
// the queue is full. What they point to must live until ds_wait has returned for the number that this returns (its low 32
// bits are that of the program). -EINVAL where an operator has no kernel in `kernels`, -E2BIG where a matrix has too many
// columns, -ECHILD in a child of the process that made the team, -ENOMEM; then nothing is queued.
extern "C" int64_t ds_launch(void *team, const ds_op *ops, int64_t count, const ds_step *step, const ds_kernel *kernels) {
    Crew *crew = (Crew *)team;
    if (crew->process != getpid()) return -ECHILD;
    for (int64_t i = 0; i < count; i++) {
        if (ops[i].kind < 0 || ops[i].kind >= DS_KINDS || !kernels[ops[i].kind]) return -EINVAL;
        if (ops[i].kind == DS_LINEAR && ops[i].k > LONGEST_K) return -E2BIG;
    }
    const uint32_t ticket = crew->launched.value;
    if (count > crew->room) {
        ds_wait(team, ticket - 1);  // the places are in use
        Place *places = (Place *)aligned_alloc(64, count * sizeof(Place));
        if (!places) return -ENOMEM;
        free(crew->places);
        crew->places = places;
        crew->room = count;
    }
    ds_wait(team, ticket - QUEUE);
    crew->queue[ticket % QUEUE] = {ops, count, step, kernels, 0};
    __atomic_store_n(&crew->bases[ticket % QUEUE], crew->promised, __ATOMIC_RELAXED);
    crew->promised += (uint32_t)count;
    ring(&crew->launched);
    return ticket;
}

// ---- instruction sets ------------------------------------------------------------------------------------------------

extern "C" {
extern const ds_kernel ds_kernels_portable[DS_KINDS];
#if defined(__x86_64__)
extern const ds_kernel ds_kernels_avx2[DS_KINDS];
extern const ds_kernel ds_kernels_avx512[DS_KINDS];
extern const ds_kernel ds_kernels_avx512bf16[DS_KINDS];
extern const ds_kernel ds_kernels_amx[DS_KINDS];
#endif
}

#if defined(__x86_64__)
static bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq");
}

static bool has_avx512bf16() {
    return has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}

// The system gives a process the tiles' state only when asked (Linux 5.16); children and later threads have it then too.
static bool has_amx() {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    unsigned a, b, c, d;
    if (!has_avx512bf16() || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    bool tiles = d >> 24 & 1, bf16 = d >> 22 & 1;
    return tiles && bf16 && syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
}
#endif

// The kernels of the instruction set called `isa`; null where this machine or this build has none.
extern "C" const ds_kernel *ds_cpu_select(const char *isa) {
    if (!strcmp(isa, "portable")) return ds_kernels_portable;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (!strcmp(isa, "avx2"))
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? ds_kernels_avx2 : nullptr;
    if (!strcmp(isa, "avx512")) return has_avx512() ? ds_kernels_avx512 : nullptr;
    if (!strcmp(isa, "avx512bf16")) return has_avx512bf16() ? ds_kernels_avx512bf16 : nullptr;
    if (!strcmp(isa, "amx")) return has_amx() ? ds_kernels_amx : nullptr;
#endif
    return nullptr;
}

extern "C" int64_t ds_kv_bytes(int kind, int64_t head_dim) { return ds_kv_run(kind, head_dim); }
