// The operators that are not matrix products, and the vectors they are written with. Included once for each instruction
// set, inside that set's namespace; the including file has included <math.h>, <string.h>, <stdint.h>, "cpu.h" and, on
// x86, <immintrin.h> before it opens the namespace.
//
// Everything is written once over GCC's vector extensions: a vector F is as wide as the instruction set's registers. A
// sum's order depends on its length alone (and on the instruction set), never on the batch: fma() is asked for by name,
// and the compiler is told to contract nothing else (-ffp-contract=off).

#if defined(__AVX512F__)
#define DS_WIDTH 16
#elif defined(__AVX2__)
#define DS_WIDTH 8
#else
#define DS_WIDTH 4
#endif

enum { WIDTH = DS_WIDTH };
typedef float F __attribute__((vector_size(4 * DS_WIDTH)));
typedef int32_t I __attribute__((vector_size(4 * DS_WIDTH)));
typedef uint32_t U __attribute__((vector_size(4 * DS_WIDTH)));
typedef uint16_t B __attribute__((vector_size(2 * DS_WIDTH)));  // bf16

#define DS_INLINE static inline __attribute__((always_inline))

// ---- vectors -------------------------------------------------------------------------------------------------------

DS_INLINE F load(const float *p) { F v; __builtin_memcpy(&v, p, sizeof v); return v; }
DS_INLINE U load_words(const void *p) { U v; __builtin_memcpy(&v, p, sizeof v); return v; }
DS_INLINE void store(float *p, F v) { __builtin_memcpy(p, &v, sizeof v); }
DS_INLINE F splat(float x) { return F{} + x; }

// The first n < WIDTH elements; the others are zero.
DS_INLINE F load_part(const float *p, int64_t n) {
    float all[WIDTH] = {};
    __builtin_memcpy(all, p, (size_t)n * sizeof(float));
    return load(all);
}
DS_INLINE void store_part(float *p, F v, int64_t n) { __builtin_memcpy(p, &v, (size_t)n * sizeof(float)); }

DS_INLINE F fma(F a, F b, F c) {
#if defined(__AVX512F__)
    return (F)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (F)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

// Where `a` is not a number the result is.
DS_INLINE F larger(F a, F b) { return a < b ? b : a; }
DS_INLINE F smaller(F a, F b) { return a > b ? b : a; }

// The halves are folded onto each other until one lane is left.
template <int S> DS_INLINE F swap_lanes(F v) {
    I other;
    for (int i = 0; i < WIDTH; i++) other[i] = i ^ S;
    return __builtin_shuffle(v, other);
}
template <int S> DS_INLINE F fold_sum(F v) {
    if constexpr (S == 0) return v;
    else return fold_sum<S / 2>(v + swap_lanes<S>(v));
}
template <int S> DS_INLINE F fold_largest(F v) {
    if constexpr (S == 0) return v;
    else return fold_largest<S / 2>(larger(v, swap_lanes<S>(v)));
}
DS_INLINE float sum_lanes(F v) { return fold_sum<WIDTH / 2>(v)[0]; }
DS_INLINE float largest_lane(F v) { return fold_largest<WIDTH / 2>(v)[0]; }

// A bf16 in the low half of each word, rounded to nearest even; what is not a number stays so.
DS_INLINE U round_bf16(F v) {
    U bits = (U)v;
    U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return v == v ? rounded : U{} + 0x7fc0u;
}
DS_INLINE F load_bf16(const ds_bf16 *p) {
    B half;
    __builtin_memcpy(&half, p, sizeof half);
    return (F)(__builtin_convertvector(half, U) << 16);
}
#if defined(__AVX512BF16__)
DS_INLINE void store_bf16(ds_bf16 *p, F v) {
    __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    __builtin_memcpy(p, &half, sizeof half);
}
DS_INLINE void store_bf16_part(ds_bf16 *p, F v, int64_t n) {
    __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    __builtin_memcpy(p, &half, (size_t)n * sizeof(ds_bf16));
}
#else
DS_INLINE void store_bf16(ds_bf16 *p, F v) {
    B half = __builtin_convertvector(round_bf16(v), B);
    __builtin_memcpy(p, &half, sizeof half);
}
DS_INLINE void store_bf16_part(ds_bf16 *p, F v, int64_t n) {
    B half = __builtin_convertvector(round_bf16(v), B);
    __builtin_memcpy(p, &half, (size_t)n * sizeof(ds_bf16));
}
#endif
DS_INLINE float widen(ds_bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float v;
    __builtin_memcpy(&v, &bits, sizeof v);
    return v;
}

// ---- exponentials --------------------------------------------------------------------------------------------------
// Within 2 units in the last place; exact at 0. Below 2^-125 the result is 0. Infinities and what is not a number
// behave as in libm, but that anything above 2^127 is infinite.

// 2^f for |f| <= 0.5: Taylor's terms as far as they show in a float, ln(2)^i / i!
DS_INLINE F small_exp2(F f) {
    F p = splat(1.5403530393e-4f);
    p = fma(p, f, splat(1.3333558146e-3f));
    p = fma(p, f, splat(9.6181291076e-3f));
    p = fma(p, f, splat(5.5504108665e-2f));
    p = fma(p, f, splat(2.4022650696e-1f));
    p = fma(p, f, splat(6.9314718056e-1f));
    p = fma(p, f, splat(1.0f));
    return p;
}

// e^r for |r| <= 0.35, likewise.
DS_INLINE F small_exp(F r) {
    F p = splat(1.9841270e-4f);
    p = fma(p, r, splat(1.3888889e-3f));
    p = fma(p, r, splat(8.3333333e-3f));
    p = fma(p, r, splat(4.1666668e-2f));
    p = fma(p, r, splat(1.6666667e-1f));
    p = fma(p, r, splat(0.5f));
    p = fma(p, r, splat(1.0f));
    p = fma(p, r, splat(1.0f));
    return p;
}

// 2^f * 2^n for |f| <= 0.5 and n in [-125, 127], by adding n to the exponent.
DS_INLINE F scaled_exp2(F f, I n) {
    F p = small_exp2(f);
    return (F)((I)p + (n << 23));
}

// Adding this rounds to an integer, found in the low bits of the sum.
#define DS_ROUND 12582912.0f  // 1.5 * 2^23

#if defined(__AVX512F__)
// reduce gives what is left of the nearest integer, 0 of an infinity; scalef multiplies by 2 to the power of an integer, and
// takes care of all that is too large, too small, infinite or not a number.
DS_INLINE F exp2_of(F x) {
    F f = (F)_mm512_reduce_ps((__m512)x, 0);
    F p = small_exp2(f);
    return (F)_mm512_scalef_ps((__m512)p, (__m512)(x - f));
}
#else
DS_INLINE F exp2_of(F x) {
    F inside = smaller(larger(x, splat(-125.0f)), splat(127.0f));
    F rounded = inside + DS_ROUND;
    I n = (I)rounded - (I)splat(DS_ROUND);
    F y = scaled_exp2(inside - (rounded - DS_ROUND), n);
    y = x < -125.0f ? F{} : y;
    y = x > 127.0f ? splat(__builtin_inff()) : y;
    return x == x ? y : x;
}

#endif

#if defined(__AVX512F__)
DS_INLINE F exp_of(F x) {
    // x = n ln 2 + r, with ln 2 in two parts of which the first has trailing zeros, so that n times it is exact.
    F n = (F)_mm512_roundscale_ps((__m512)(x * splat(1.44269504f)), 0);
    F r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    // Beyond what a float can hold n decides alone; what is not a number stays so.
    r = smaller(larger(r, splat(-0.35f)), splat(0.35f));
    F p = small_exp(r);
    p = (F)_mm512_scalef_ps((__m512)p, (__m512)n);
    return x == x ? p : x;
}
#else
DS_INLINE F exp_of(F x) {
    // x = n ln 2 + r, with ln 2 in two parts of which the first has trailing zeros, so that n times it is exact.
    F inside = smaller(larger(x, splat(-86.6f)), splat(88.0f));
    F rounded = fma(inside, splat(1.44269504f), splat(DS_ROUND));
    F whole = rounded - DS_ROUND;
    I n = (I)rounded - (I)splat(DS_ROUND);
    F r = fma(whole, splat(-0.693359375f), inside);
    r = fma(whole, splat(2.12194440e-4f), r);
    F p = small_exp(r);
    F y = (F)((I)p + (n << 23));
    y = x < -86.6f ? F{} : y;
    y = x > 88.0f ? splat(__builtin_inff()) : y;
    return x == x ? y : x;
}
#endif

// ---- sharing rows --------------------------------------------------------------------------------------------------

DS_INLINE int64_t rows_of(const ds_op *op, const ds_step *step) { return op->sampled ? step->sampled : step->tokens; }

// Rows that a member takes at once: enough to pay for the taking, few enough to spread.
DS_INLINE int64_t rows_at_once(int64_t rows, const ds_team *team) {
    int64_t share = rows / (4 * team->threads);
    return share < 1 ? 1 : share > 16 ? 16 : share;
}

#define DS_EACH_ROW(row, rows)                                                                              \
    for (int64_t grain_ = rows_at_once(rows, team), from_ = ds_take(team) * grain_; from_ < (rows);         \
         from_ = ds_take(team) * grain_)                                                                    \
        for (int64_t row = from_; row < from_ + grain_ && row < (rows); row++)

// ---- embedding and rows --------------------------------------------------------------------------------------------

static void embed(const ds_op *op, const ds_step *step, ds_team *team) {
    int64_t n = op->n, pairs = (n + 1) / 2;
    DS_EACH_ROW(t, (int64_t)step->tokens) {
        int64_t id = step->feed && step->feed[t] >= 0 ? step->last[step->feed[t]] : step->ids[t];
        float *out = (float *)op->out + t * n;
        if (op->i[0] != DS_BF16) {
            matrix::dequantise_row(op->i[0], op->w, id, n, out);
            continue;
        }
        // Sixteen rows are packed together, pair of columns after pair of columns.
        const ds_bf16 *w = (const ds_bf16 *)op->w + (id / 16 * pairs * 16 + id % 16) * 2;
        for (int64_t p = 0; p < n / 2; p++) {
            out[2 * p] = widen(w[32 * p]);
            out[2 * p + 1] = widen(w[32 * p + 1]);
        }
        if (n % 2) out[n - 1] = widen(w[32 * (pairs - 1)]);
    }
}

static void take_rows(const ds_op *op, const ds_step *step, ds_team *team) {
    const size_t bytes = (size_t)op->n * sizeof(float);
    DS_EACH_ROW(i, (int64_t)step->sampled)
        __builtin_memcpy((float *)op->out + i * op->n, (const float *)op->x + step->rows[i] * op->n, bytes);
}

// ---- ranks ---------------------------------------------------------------------------------------------------------

// One member meets the other ranks; the others find nothing to take and wait for it.
static void meet(const ds_op *op, const ds_step *, ds_team *team) {
    if (ds_take(team) == 0) ds_meet((ds_meeting *)op->x, op->n);
}

// ---- norms ---------------------------------------------------------------------------------------------------------

// 1 / sqrt(mean(x^2) + eps), four sums side by side; y, where given, is added to x first.
DS_INLINE float norm_factor(float *x, const float *y, int64_t n, float eps) {
    F sum[4] = {};
    int64_t j = 0;
    for (; j + 4 * WIDTH <= n; j += 4 * WIDTH)
        for (int i = 0; i < 4; i++) {
            float *at = x + j + i * WIDTH;
            F v = load(at);
            if (y) store(at, v = v + load(y + j + i * WIDTH));
            sum[i] = fma(v, v, sum[i]);
        }
    for (int i = 0; j < n; j += WIDTH, i++) {
        int64_t many = n - j < WIDTH ? n - j : (int64_t)WIDTH;
        F v = load_part(x + j, many);
        if (y) store_part(x + j, v = v + load_part(y + j, many), many);
        sum[i] = fma(v, v, sum[i]);
    }
    return 1.0f / __builtin_sqrtf(sum_lanes((sum[0] + sum[1]) + (sum[2] + sum[3])) / (float)n + eps);
}

static void rms_norm(const ds_op *op, const ds_step *step, ds_team *team) {
    int64_t n = op->n;
    const float *w = (const float *)op->w;
    DS_EACH_ROW(t, rows_of(op, step)) {
        float *x = (float *)op->x + t * n;
        ds_bf16 *out = (ds_bf16 *)op->out + t * n;
        F factor = splat(norm_factor(x, op->y ? (const float *)op->y + t * n : nullptr, n, op->f[0]));
        int64_t j = 0;
        for (; j + WIDTH <= n; j += WIDTH) store_bf16(out + j, load(x + j) * factor * load(w + j));
        if (j < n) store_bf16_part(out + j, load_part(x + j, n - j) * factor * load_part(w + j, n - j), n - j);
    }
}

static void head_norm(const ds_op *op, const ds_step *step, ds_team *team) {
    int64_t heads = op->i[0], kv_heads = op->i[1], dim = op->i[2];
    DS_EACH_ROW(t, (int64_t)step->tokens) {
        for (int64_t h = 0; h < heads + kv_heads; h++) {
            float *x = (float *)op->x + (t * (heads + 2 * kv_heads) + h) * dim;
            const float *w = (const float *)(h < heads ? op->w : op->y);
            F factor = splat(norm_factor(x, nullptr, dim, op->f[0]));
            int64_t j = 0;
            for (; j + WIDTH <= dim; j += WIDTH) store(x + j, load(x + j) * factor * load(w + j));
            if (j < dim) store_part(x + j, load_part(x + j, dim - j) * factor * load_part(w + j, dim - j), dim - j);
        }
    }
}

// ---- activation ----------------------------------------------------------------------------------------------------

DS_INLINE F silu(F x) { return x / (exp_of(-x) + 1.0f); }

enum { SWIGLU_COLUMNS = 512 };  // a chunk's width: one row of a decode step is still shared

static void swiglu(const ds_op *op, const ds_step *step, ds_team *team) {
    int64_t n = op->n, rows = rows_of(op, step), parts = (n + SWIGLU_COLUMNS - 1) / SWIGLU_COLUMNS;
    int64_t stride = op->stride ? op->stride : n;
    DS_EACH_ROW(unit, rows * parts) {
        int64_t t = unit / parts, j = unit % parts * SWIGLU_COLUMNS;
        int64_t end = j + SWIGLU_COLUMNS < n ? j + SWIGLU_COLUMNS : n;
        const float *gate = (const float *)op->x + t * 2 * n, *up = gate + n;
        ds_bf16 *out = (ds_bf16 *)op->out + t * stride;
        for (; j + WIDTH <= end; j += WIDTH) store_bf16(out + j, silu(load(gate + j)) * load(up + j));
        if (j < end) store_bf16_part(out + j, silu(load_part(gate + j, end - j)) * load_part(up + j, end - j), end - j);
    }
}

// ---- rotary positions and the cache --------------------------------------------------------------------------------

DS_INLINE void rotate(float *x, const float *cos, int64_t half) {
    const float *sin = cos + half;
    int64_t j = 0;
    for (; j + WIDTH <= half; j += WIDTH) {
        F a = load(x + j), b = load(x + half + j), c = load(cos + j), s = load(sin + j);
        store(x + j, fma(-b, s, a * c));
        store(x + half + j, fma(a, s, b * c));
    }
    if (j < half) {
        int64_t many = half - j;
        F a = load_part(x + j, many), b = load_part(x + half + j, many);
        F c = load_part(cos + j, many), s = load_part(sin + j, many);
        store_part(x + j, fma(-b, s, a * c), many);
        store_part(x + half + j, fma(a, s, b * c), many);
    }
}

// As integers of 8 bits (DS_KV_INT8):

template <int S> DS_INLINE I fold_largest_bits(I v) {
    if constexpr (S == 0) return v;
    else {
        I other = (I)swap_lanes<S>((F)v);
        return fold_largest_bits<S / 2>(v < other ? other : v);
    }
}

// The largest of the absolute values, or what is not a number where one isn't finite: of positive floats the larger has the
// larger bits, and what isn't finite the largest.
DS_INLINE float largest_size(const float *x, int64_t n) {
    I top = {};
    for (int64_t j = 0; j < n; j += WIDTH) {
        F v = n - j < WIDTH ? load_part(x + j, n - j) : load(x + j);
        I bits = (I)v & 0x7fffffff;
        top = top < bits ? bits : top;
    }
    int32_t bits = fold_largest_bits<WIDTH / 2>(top)[0];
    if (bits >= 0x7f800000) return __builtin_nanf("");
    float size;
    __builtin_memcpy(&size, &bits, sizeof size);
    return size;
}

// The nearest integers, ties to even, in the low bits of the words: |v| < 2^22.
DS_INLINE U nearest(F v) { return (U)(v + DS_ROUND); }

// x[0 .. n) as integers of up to 127, in the low byte of each word, times the bf16 scale that is returned.
DS_INLINE ds_bf16 quantise(uint32_t *to, const float *x, int64_t n) {
    float size = largest_size(x, n) / 127.0f;
    if (!(size == size)) {
        __builtin_memset(to, 0, (size_t)n * sizeof *to);
        return 0x7fc0;
    }
    uint32_t bits;
    __builtin_memcpy(&bits, &size, sizeof bits);
    const ds_bf16 scale = (ds_bf16)((bits + 0xffffu) >> 16);
    const F over = splat(scale ? widen(scale) : 1.0f);
    for (int64_t j = 0; j < n; j += WIDTH) {
        U integers = nearest((n - j < WIDTH ? load_part(x + j, n - j) : load(x + j)) / over);
        __builtin_memcpy(to + j, &integers, sizeof integers);  // may go beyond n
    }
    return scale;
}

static void rope_store_int8(const ds_op *op, const ds_step *step, ds_team *team) {
    int64_t heads = op->i[0], kv_heads = op->i[1], dim = op->i[2], run = ds_kv_run(DS_KV_INT8, dim);
    uint32_t *integers = (uint32_t *)team->scratch;
    DS_EACH_ROW(t, (int64_t)step->tokens) {
        float *x = (float *)op->x + t * (heads + 2 * kv_heads) * dim;
        const float *turn = step->cos_sin + (int64_t)step->positions[t] * dim;
        for (int64_t h = 0; h < heads + kv_heads; h++) rotate(x + h * dim, turn, dim / 2);
        const float *k = x + heads * dim, *v = k + kv_heads * dim;
        const int64_t slot = step->kv_slots[t], lane = slot % DS_KV_GROUP;
        char *group = (char *)op->y + slot / DS_KV_GROUP * (op->n ? op->n * 2 : kv_heads * run);
        for (int64_t h = 0; h < kv_heads; h++, group += run) {
            char *keys = group + lane * 2, *values = group + (DS_KV_GROUP + lane / 2 * 2) * dim + lane % 2;
            ds_bf16 *scales = (ds_bf16 *)(group + DS_KV_GROUP * 2 * dim) + lane;
            ds_bf16 key_scale = quantise(integers, k + h * dim, dim);
            for (int64_t d = 0; d < dim; d += 2) {
                char pair[2] = {(char)integers[d], (char)integers[d + 1]};
                __builtin_memcpy(keys + d * DS_KV_GROUP, pair, 2);
            }
            ds_bf16 value_scale = quantise(integers, v + h * dim, dim);
            for (int64_t d = 0; d < dim; d++) values[d * 2] = (char)integers[d];
            // Weights and values meet as integers, which would hide a value that isn't finite: its key tells of it.
            scales[0] = value_scale == 0x7fc0 ? value_scale : key_scale;
            scales[DS_KV_GROUP] = value_scale;
        }
    }
}

static void rope_store(const ds_op *op, const ds_step *step, ds_team *team) {
    if (op->k == DS_KV_INT8) return rope_store_int8(op, step, team);
    int64_t heads = op->i[0], kv_heads = op->i[1], dim = op->i[2];
    DS_EACH_ROW(t, (int64_t)step->tokens) {
        float *x = (float *)op->x + t * (heads + 2 * kv_heads) * dim;
        const float *turn = step->cos_sin + (int64_t)step->positions[t] * dim;
        for (int64_t h = 0; h < heads + kv_heads; h++) rotate(x + h * dim, turn, dim / 2);
        const float *k = x + heads * dim, *v = k + kv_heads * dim;
        const int64_t slot = step->kv_slots[t], lane = slot % DS_KV_GROUP;
        const int64_t group = slot / DS_KV_GROUP * (op->n ? op->n : kv_heads * dim * DS_KV_GROUP);
        ds_bf16 halves[2 * WIDTH];
        for (int64_t h = 0; h < kv_heads; h++) {
            uint32_t *keys = (uint32_t *)((ds_bf16 *)op->y + group) + h * dim / 2 * DS_KV_GROUP + lane;
            ds_bf16 *values = (ds_bf16 *)op->b + group + (h * DS_KV_GROUP / 2 + lane / 2) * dim * 2 + lane % 2;
            for (int64_t d = 0; d < dim; d += WIDTH) {
                const int64_t many = dim - d < WIDTH ? dim - d : (int64_t)WIDTH;
                store_bf16(halves, many == WIDTH ? load(k + h * dim + d) : load_part(k + h * dim + d, many));
                store_bf16(halves + WIDTH, many == WIDTH ? load(v + h * dim + d) : load_part(v + h * dim + d, many));
                for (int64_t j = 0; j < many; j += 2) __builtin_memcpy(&keys[(d + j) / 2 * DS_KV_GROUP], halves + j, 4);
                for (int64_t j = 0; j < many; j++) values[(d + j) * 2] = halves[WIDTH + j];
            }
        }
    }
}

#include "attention.inc.h"
