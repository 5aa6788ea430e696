// The compiled CPU backend: a step of the model as a program of operators, run by a team of threads in one call.
//
// A program is recorded once: an array of ds_op over buffers at fixed addresses. Only row counts and the step's
// description (ds_step) change from step to step. Threads share an operator by taking chunks of it; it is done when
// nothing is left to take and everyone who entered has left, and then the next begins. So a kernel shares work through
// ds_take alone, returns only when nothing is left, and writes nothing shared before its first take.
//
// Batch invariance: what is computed for one row (a token, a sequence) depends on that row alone, bit for bit. One
// accumulator for each output walks along K in order, whatever the number of rows; a chunk is a range of outputs,
// never of K; attention walks the KV blocks of a sequence in order. So who takes which chunk never shows.
//
// Kernels are compiled once for each instruction set (portable, avx2, avx512, avx512bf16, amx), from the same sources, in
// namespaces of their own; `ds_cpu_select` picks a table of them at run time.
#pragma once
#include "quant.h"

#include <stddef.h>
#include <stdint.h>

typedef uint16_t ds_bf16;  // the upper half of a float, rounded to nearest even

enum ds_kind {
    DS_EMBED,       // out f32 [T, n] = rows `ids` of w (packed [vocabulary, n], of kind i[0], a ds_weights)
    DS_RMS_NORM,    // out bf16 [rows, n] = rms_norm(x f32 [rows, n]) * w f32 [n], eps f[0]; y f32, where given: x += y first
    DS_LINEAR,      // out f32 [rows, n] = x bf16 [rows, k] @ w (packed, of kind i[0]) + b f32 [n] (or null); i[1]: GGML's kinds
                    // take x in 16 bits instead of 8; i[2]: the attention so many operators later, or 0: its keys and values
                    // from share f[0] of them to f[1] are asked for on the way; y: room for quantised activations,
                    // DS_QUANT_BYTES for each value, k rounded up to DS_QUANT_COLUMNS; or null
    DS_HEAD_NORM,   // x f32 [T, (i[0] + 2 i[1]) * i[2]]: each of i[0] query heads times w, each of i[1] key heads times y
    DS_ROPE_STORE,  // x f32 [T, (i[0] + 2 i[1]) * i[2]]: q rotated in place, k rotated and v written to caches y and b, of kind k
    DS_ATTENTION,   // out bf16 [T, i[0] * i[2]] from x (as above) and the caches y (keys) and b (values), of kind k, a ds_kv;
                    // scale f[0], window i[3]
    DS_SWIGLU,      // out bf16 [rows, n] = silu(x f32 [rows, 2 n], first half) * second half
    DS_TAKE_ROWS,   // out f32 [sampled, n] = rows `rows` of x f32 [T, n]
    DS_SAMPLE,      // ids (and log-probabilities) of the first rows of x f32 [rows, n], as w, a ds_sampling, asks
    DS_SCORE,       // log-probabilities of given ids of the rows of x f32 [rows, n]; w: a ds_sampling
    DS_MEET,        // waits until all n ranks of a group have come here; x: a ds_meeting in memory that they share
    DS_KINDS,
};

typedef struct ds_op {
    int32_t kind;
    int32_t sampled;  // rows: 0: the step's tokens T; 1: its sampled rows
    void *out, *x, *y, *w, *b;
    int64_t n, k;
    int64_t stride;  // of DS_LINEAR, DS_ATTENTION and DS_SWIGLU: values from one row of `out` to the next, so that parts of it can
                     // be written side by side; 0: none lie between
    int64_t i[4];  // heads, kv_heads, head_dim, window; kind of weights, activations of 16 bits, attention to come
    float f[2];
} ds_op;

typedef struct ds_step {
    int32_t tokens, sequences, sampled;
    int32_t block_size, table_width;
    const int32_t *ids, *positions, *kv_slots;  // [tokens]
    const int32_t *feed, *last;                 // [tokens], or null: where it is not negative, the id is last[feed]
    const int32_t *q_start;                     // [sequences + 1]
    const int32_t *kv_len;                      // [sequences], this step's tokens counted in
    const int32_t *blocks;                      // [sequences, table_width]
    const int32_t *rows;                        // [sampled]
    const float *cos_sin;                       // [positions, rotary dim]: cos of each pair, then sin; pairs are (j, j + dim / 2)
} ds_step;

// A layer's caches hold tokens in groups of DS_KV_GROUP (a block is some whole groups), each head's by itself, two values in a
// word as they will be multiplied: keys bf16 [slots / 16][kv_heads][head_dim / 2][16][2], two dimensions of a token;
// values bf16 [slots / 16][kv_heads][16 / 2][head_dim][2], one dimension of two tokens. head_dim is even. From one group to the
// next it is ds_op.n words of 16 bits, or 0 where nothing lies between them: a block can hold all layers side by side.
//
// DS_KV_INT8 has half of that: a group's heads one after another in y (b isn't used), of each keys int8 [head_dim / 2][16][2],
// values int8 [16 / 2][head_dim][2] and scales, of its keys bf16 [16], of its values bf16 [16]: one run of memory, whose scales
// fill a cache line. A scale is rounded up, so that nothing is clipped, and the integers are taken by the rounded one: a bf16
// loses nothing, and unlike f16 it holds whatever a float does. It isn't a number where a key or a value isn't finite.
enum ds_kv { DS_KV_BF16, DS_KV_INT8 };
enum { DS_KV_GROUP = 16 };

// Bytes of a group's keys and values of one head.
static inline int64_t ds_kv_run(int64_t kind, int64_t head_dim) {
    return DS_KV_GROUP * 2 * (kind == DS_KV_INT8 ? head_dim + 2 : 2 * head_dim);
}

// A member's view of the team while it runs one operator.
typedef struct ds_team {
    int thread, threads;
    int64_t *next;    // shared: the next chunk to be taken; zero when an operator begins
    int64_t *ready;   // shared: for what a kernel counts; zero when an operator begins
    void *scratch;    // this thread's own, ds_scratch_bytes long, 64-byte aligned
    int64_t cache;    // bytes of the last-level cache, or 0
} ds_team;

// Where the ranks of a group meet (DS_MEET): zero at first, in memory that all of them map.
typedef struct ds_meeting {
    uint32_t value, sleepers;  // a bell that they share, rung when all have come
    uint32_t came;
} ds_meeting;

enum { DS_SCRATCH_BYTES = 4 << 20 };
enum { DS_QUANT_BYTES = 4, DS_QUANT_COLUMNS = 64 };  // groups of 16 with 16 bytes of scales, twice: the most there is

// A moment of a member that waits for another.
static inline void ds_relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("isb");  // `yield` does nothing on most cores; this takes about as long as x86's pause
#endif
}

static inline int64_t ds_take(ds_team *team) { return __atomic_fetch_add(team->next, 1, __ATOMIC_RELAXED); }

// Comes to a meeting and waits until all `ranks` have.
extern "C" void ds_meet(ds_meeting *meeting, int64_t ranks);

typedef void (*ds_kernel)(const ds_op *, const ds_step *, ds_team *);
