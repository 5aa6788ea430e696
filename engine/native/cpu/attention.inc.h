// Attention over the paged cache. Included by ops.inc.h.
//
// A unit of work is some consecutive queries of one sequence with some key heads. It walks tiles of KEYS keys, at
// absolute positions, from the oldest key its first query sees to its last query's own. The cache holds keys and values in
// pairs, ready to be multiplied (cpu.h), so a tile's are read as they lie, by all query heads of their group and all queries
// of the unit.
//
// What a query gets does not depend on the unit it is in: a score is one sum along the head's dimensions, in order; a
// tile's scores meet the running maximum and sum in order of position; each output element adds the values in order of
// position. Keys that a query doesn't see, but another of its unit does, enter with weight zero, which changes nothing.
//
// A cache of integers (DS_KV_INT8) meets queries and weights of 16 bits: sums of such products are exact, widening a byte takes
// one instruction where making a bf16 of it takes five, and 16 bits are finer than a bf16. Scales are applied to the sums: of a
// query and its key to a score, of a row's weights in a tile to what they add to an output.

enum {
    KEYS = 64,       // keys in a tile
    UNIT_ROWS = 48,  // query rows (queries times heads of the group) in a unit: enough to read a tile from the first-level cache
    GROUPS = KEYS / DS_KV_GROUP,
    VECTORS = KEYS / WIDTH
};
enum {
    ROW_BLOCK = DS_WIDTH == 16 ? 6 : DS_WIDTH == 8 ? 4 : 2,  // rows and vectors held in registers together
    VECTOR_BLOCK = DS_WIDTH == 16 ? 4 : 2
};

// ---- products of pairs -----------------------------------------------------------------------------------------------
// A word holds two bf16 that meet two consecutive values of the other side: dimensions of a query, or weights of keys.

#if defined(__AVX512BF16__)
typedef ds_bf16 Half;
typedef U Words;
DS_INLINE Words open_words(U words) { return words; }
DS_INLINE F multiply_pair(F sum, Words words, const Half *x) {
    int pair;
    __builtin_memcpy(&pair, x, 4);
    return (F)_mm512_dpbf16_ps((__m512)sum, (__m512bh)words, (__m512bh)_mm512_set1_epi32(pair));
}
DS_INLINE F store_halves(Half *to, F v) {  // and what has been stored
    __m256bh halves = _mm512_cvtneps_pbh((__m512)v);
    __builtin_memcpy(to, &halves, sizeof halves);
    return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)halves), 16);
}
#else
typedef float Half;
struct Words { F even, odd; };
DS_INLINE Words open_words(U words) { return {(F)(words << 16), (F)(words & 0xffff0000u)}; }
DS_INLINE F multiply_pair(F sum, Words words, const Half *x) {
    return fma(words.odd, splat(x[1]), fma(words.even, splat(x[0]), sum));
}
DS_INLINE F store_halves(Half *to, F v) {
    store(to, v);
    return v;
}
#endif

DS_INLINE U load_words_part(const void *p, int64_t n) {
    uint32_t all[WIDTH] = {};
    __builtin_memcpy(all, p, (size_t)n * 4);
    return load_words(all);
}

// A cache's kind: what it holds, what its pairs are multiplied by, and where they are summed up.
struct Halves {
    typedef ds_bf16 Item;
    typedef Half Side;
    typedef Words Opened;
    typedef F Sum;
    static constexpr bool INTEGERS = false;
    enum { LINES = 4 * 64 };
};

typedef uint16_t Pairs __attribute__((vector_size(2 * WIDTH)));  // of bytes
#if defined(__AVX512F__) || defined(__AVX2__) || defined(__SSE2__)
typedef U WordsOfBytes;  // a pair of 16 bits in each
#else
struct WordsOfBytes { I even, odd; };
#endif

struct Bytes {
    typedef int8_t Item;
    typedef int16_t Side;
    typedef WordsOfBytes Opened;
    typedef I Sum;
    static constexpr bool INTEGERS = true;
    enum { LINES = 3 * 64 };
};

DS_INLINE Pairs load_pairs(const int8_t *p) {
    Pairs v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}
DS_INLINE Pairs load_pairs_part(const int8_t *p, int64_t n) {
    uint16_t all[WIDTH] = {};
    __builtin_memcpy(all, p, (size_t)n * 2);
    return load_pairs((const int8_t *)all);
}

#if defined(__AVX512F__)
DS_INLINE U widen_pairs(Pairs pairs) { return (U)_mm512_cvtepi8_epi16((__m256i)pairs); }
DS_INLINE I multiply_pair(I sum, U words, const int16_t *x) {
    int pair;
    __builtin_memcpy(&pair, x, 4);
#if defined(__AVX512VNNI__)
    return (I)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)words, _mm512_set1_epi32(pair));
#else
    return sum + (I)_mm512_madd_epi16((__m512i)words, _mm512_set1_epi32(pair));
#endif
}
#elif defined(__AVX2__)
DS_INLINE U widen_pairs(Pairs pairs) { return (U)_mm256_cvtepi8_epi16((__m128i)pairs); }
DS_INLINE I multiply_pair(I sum, U words, const int16_t *x) {
    int pair;
    __builtin_memcpy(&pair, x, 4);
    return sum + (I)_mm256_madd_epi16((__m256i)words, _mm256_set1_epi32(pair));
}
#elif defined(__SSE2__)
DS_INLINE U widen_pairs(Pairs pairs) {
    __m128i bytes = _mm_loadl_epi64((const __m128i *)&pairs);
    return (U)_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
}
DS_INLINE I multiply_pair(I sum, U words, const int16_t *x) {
    int pair;
    __builtin_memcpy(&pair, x, 4);
    return sum + (I)_mm_madd_epi16((__m128i)words, _mm_set1_epi32(pair));
}
#else
DS_INLINE WordsOfBytes widen_pairs(Pairs pairs) {
    I words = (I)__builtin_convertvector(pairs, U);
    return {words << 24 >> 24, words << 16 >> 24};
}
DS_INLINE I multiply_pair(I sum, WordsOfBytes words, const int16_t *x) { return sum + words.even * x[0] + words.odd * x[1]; }
#endif

DS_INLINE Words open_pairs(const ds_bf16 *p) { return open_words(load_words(p)); }
DS_INLINE WordsOfBytes open_pairs(const int8_t *p) { return widen_pairs(load_pairs(p)); }
DS_INLINE F in_floats(F sum) { return sum; }
DS_INLINE F in_floats(I sum) { return __builtin_convertvector(sum, F); }

// ---- fetching ahead --------------------------------------------------------------------------------------------------
// Blocks lie anywhere in memory, and no hardware prefetcher knows the table. The tile that comes next is asked for a cache
// line at a time, all along the arithmetic: asked for at once it would stall it.

typedef struct {
    const char *runs[2 * GROUPS];  // of each group of keys, the keys and the values of one head
    int64_t bytes, at;             // of a run, and asked for so far
    int run, count;
} Ahead;

// C::LINES bytes at each step: one query of one head has 64 steps to ask for a tile of 16 KB, or half of that in integers, which
// spread over most of them (as many at once as for 16 KB took 1.2 times as long).
template <typename C>
DS_INLINE void fetch_lines(Ahead *a) {
    if (a->run == a->count) return;
    const char *at = a->runs[a->run] + a->at;
#pragma GCC unroll 4
    for (int i = 0; i < C::LINES; i += 64) __builtin_prefetch(at + i, 0, 2);
    a->at += C::LINES;
    if (a->at >= a->bytes) a->at = 0, a->run++;
}

// ---- products -------------------------------------------------------------------------------------------------------

// A tile of one head: where each group of 16 keys lies.
template <typename C>
struct Rows {
    const typename C::Item *keys[GROUPS];    // [dim / 2][16][2]
    const typename C::Item *values[GROUPS];  // [16 / 2][dim][2]
};

// scores[r][KEYS] = q[r] . keys, for R rows; the first `vectors` of the tile, a multiple of VECTOR_BLOCK.
template <typename C, int R>
static void score_rows(float *scores, const typename C::Side *q, const Rows<C> *rows, int64_t dim, int vectors, Ahead *behind) {
    Ahead ahead = *behind;
    for (int g = 0; g < vectors; g += VECTOR_BLOCK) {
        typename C::Sum sum[R][VECTOR_BLOCK] = {};
        const typename C::Item *at[VECTOR_BLOCK];
#pragma GCC unroll 8
        for (int v = 0; v < VECTOR_BLOCK; v++) {
            int key = (g + v) * WIDTH;
            at[v] = rows->keys[key / DS_KV_GROUP] + key % DS_KV_GROUP * 2;
        }
        for (int64_t d = 0; d < dim; d += 2) {
            fetch_lines<C>(&ahead);
            typename C::Opened k[VECTOR_BLOCK];
#pragma GCC unroll 8
            for (int v = 0; v < VECTOR_BLOCK; v++) k[v] = open_pairs(at[v] + d * DS_KV_GROUP);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                for (int v = 0; v < VECTOR_BLOCK; v++) sum[r][v] = multiply_pair(sum[r][v], k[v], q + r * dim + d);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTOR_BLOCK; v++) store(scores + r * KEYS + (g + v) * WIDTH, in_floats(sum[r][v]));
    }
    *behind = ahead;
}

// out[r][d] = out[r][d] * fade[r] + sum over keys of weights[r][key] * values[key][d], for R rows and N vectors of d, of
// which the last may be a part; integers' sums times part[r]. What lies beyond `count` keys may be anything; its weight is zero.
template <typename C, int R, int N>
DS_INLINE void mix_block(float *out, const float *fade, const float *part, const typename C::Side *weights, const Rows<C> *rows,
                         int64_t d, int64_t dim, int64_t padded, int count, Ahead *behind) {
    Ahead ahead = *behind;
    const int64_t last = dim - d - (N - 1) * WIDTH;  // columns of the last vector, or more
    typename C::Sum sum[R][N] = {};
    if constexpr (!C::INTEGERS) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < N; v++) sum[r][v] = load(out + r * padded + d + v * WIDTH) * fade[r];
    }
    for (int k = 0; k < count; k += 2) {
        fetch_lines<C>(&ahead);
        const typename C::Item *at = rows->values[k / DS_KV_GROUP] + (k % DS_KV_GROUP / 2 * dim + d) * 2;
        typename C::Opened x[N];
        if (__builtin_expect((C::INTEGERS || k + 1 < count) && last >= WIDTH, 1)) {
#pragma GCC unroll 8
            for (int v = 0; v < N; v++) x[v] = open_pairs(at + v * WIDTH * 2);
        } else if constexpr (C::INTEGERS) {
            for (int v = 0; v < N - 1; v++) x[v] = open_pairs(at + v * WIDTH * 2);
            x[N - 1] = widen_pairs(load_pairs_part(at + (N - 1) * WIDTH * 2, last));
        } else {
            const U mask = U{} + (k + 1 < count ? 0xffffffffu : 0xffffu);
            for (int v = 0; v < N - 1; v++) x[v] = open_words(load_words(at + v * WIDTH * 2) & mask);
            x[N - 1] = open_words(load_words_part(at + (N - 1) * WIDTH * 2, last < WIDTH ? last : (int64_t)WIDTH) & mask);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < N; v++) sum[r][v] = multiply_pair(sum[r][v], x[v], weights + r * KEYS + k);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) {
            float *to = out + r * padded + d + v * WIDTH;
            if constexpr (C::INTEGERS) store(to, fma(in_floats(sum[r][v]), splat(part[r]), load(to) * fade[r]));
            else store(to, sum[r][v]);
        }
    *behind = ahead;
}

template <typename C, int R>
static void mix_rows(float *out, const float *fade, const float *part, const typename C::Side *weights, const Rows<C> *rows,
                     int64_t dim, int64_t padded, int count, Ahead *ahead) {
    int64_t d = 0;
    for (; d + VECTOR_BLOCK * WIDTH <= dim; d += VECTOR_BLOCK * WIDTH)
        mix_block<C, R, VECTOR_BLOCK>(out, fade, part, weights, rows, d, dim, padded, count, ahead);
    for (; d < dim; d += WIDTH) mix_block<C, R, 1>(out, fade, part, weights, rows, d, dim, padded, count, ahead);
}

// Calls f<C, R> for blocks of ROW_BLOCK rows, and for what is left.
#define DS_ROW_BLOCKS(rows, f, at, ...)                                                 \
    do {                                                                                \
        int64_t at = 0;                                                                 \
        for (; at + ROW_BLOCK <= (rows); at += ROW_BLOCK) f<C, ROW_BLOCK>(__VA_ARGS__); \
        switch ((rows) - at) {                                                          \
            case 1: f<C, 1>(__VA_ARGS__); break;                                        \
            case 2: f<C, 2>(__VA_ARGS__); break;                                        \
            case 3: f<C, 3>(__VA_ARGS__); break;                                        \
            case 4: f<C, 4>(__VA_ARGS__); break;                                        \
            case 5: f<C, 5>(__VA_ARGS__); break;                                        \
        }                                                                               \
    } while (0)

// ---- softmax, a tile after another ----------------------------------------------------------------------------------

// Scores of keys other than `first` to `last` of the tile become minus infinity.
DS_INLINE void hide(F *s, int64_t first, int64_t last) {
    if (first > 0 || last < KEYS - 1) {
        I number;
        for (int i = 0; i < WIDTH; i++) number[i] = i;
        int32_t low = (int32_t)(first > 0 ? first : 0), high = (int32_t)(last < KEYS ? (last < -1 ? -1 : last) : (int64_t)KEYS);
        for (int v = 0; v < VECTORS; v++) {
            I key = number + v * WIDTH;
            s[v] = (key >= low) & (key <= high) ? s[v] : splat(-__builtin_inff());
        }
    }
}

// A row's scores become weights, 2^(score - peak); `first` and `last` are the keys of the tile that it sees. Returns
// what the row's earlier sums must be multiplied by.
DS_INLINE float weigh(Half *weights, const float *scores, int64_t first, int64_t last, float *peak, F *total) {
    F s[VECTORS];
    for (int v = 0; v < VECTORS; v++) s[v] = load(scores + v * WIDTH);
    hide(s, first, last);
    F top = s[0];
    for (int v = 1; v < VECTORS; v++) top = larger(top, s[v]);
    F before = splat(*peak), now = larger(before, fold_largest<WIDTH / 2>(top));
    *peak = now[0];
    F sum = F{};
    for (int v = 0; v < VECTORS; v++) sum += store_halves(weights + v * WIDTH, exp2_of(s[v] - now));
    F fade = exp2_of(before - now);
    *total = *total * fade + sum;
    return fade[0];
}

DS_INLINE void store_integers(int16_t *to, F v) {  // |v| < 32768, rounded to nearest
    Pairs low = __builtin_convertvector(nearest(v), Pairs);
    __builtin_memcpy(to, &low, sizeof low);
}

enum { LARGEST_WEIGHT = 32767 };
static const float FAINT = 1e-30f;  // its inverse times LARGEST_WEIGHT is a float; what is smaller counts as zero

// What the integers of a tile of one head are multiplied by.
typedef struct {
    float keys[KEYS], values[KEYS];
    float largest;  // of those of values
} Scales;

DS_INLINE float steps_in(float largest) { return largest > FAINT ? LARGEST_WEIGHT / largest : 0.0f; }

// The same for integers, whose weights take the values' scales in: they are relative to the tile's largest score and largest
// scale, of what the row itself sees. `scale` is the query's. `part`: what the sums of weights and values are multiplied by.
DS_INLINE float weigh(int16_t *weights, const float *scores, int64_t first, int64_t last, float *peak, F *total, float scale,
                      const Scales *scales, float steps, float *part) {
    F s[VECTORS];
    for (int v = 0; v < VECTORS; v++) s[v] = load(scores + v * WIDTH) * (load(scales->keys + v * WIDTH) * splat(scale));
    hide(s, first, last);
    F top = s[0];
    for (int v = 1; v < VECTORS; v++) top = larger(top, s[v]);
    F before = splat(*peak), here = larger(fold_largest<WIDTH / 2>(top), splat(-__FLT_MAX__));  // finite if nothing is seen
    float largest = scales->largest;
    if (first > 0 || last < KEYS - 1) {
        F most = F{};
        for (int v = 0; v < VECTORS; v++)
            most = larger(most, s[v] > -__builtin_inff() ? load(scales->values + v * WIDTH) : F{});
        largest = fold_largest<WIDTH / 2>(most)[0];
        steps = steps_in(largest);
    }
    F sum = F{};
    for (int v = 0; v < VECTORS; v++) {
        F weight = exp2_of(s[v] - here);
        sum += weight;
        store_integers(weights + v * WIDTH, weight * (load(scales->values + v * WIDTH) * splat(steps)));
    }
    // Of the sums so far and this tile's those with the lower peak shrink.
    F shrink = exp2_of(before < here ? before - here : here - before);
    const bool rises = before[0] < here[0];
    *peak = rises ? here[0] : before[0];
    const float fade = rises ? shrink[0] : 1.0f, rise = rises ? 1.0f : shrink[0];
    *total = *total * fade + sum * rise;
    *part = rise * (largest * (1.0f / LARGEST_WEIGHT));
    return fade;
}

// ---- a unit ---------------------------------------------------------------------------------------------------------

typedef struct {
    int64_t sequence, from, count;  // queries `from` .. of the step's rows
    int64_t position;               // of the first
    int64_t head, heads;            // key heads
} Unit;

// A tile's groups: the number each has in the cache. Those beyond the last key are the last one's.
DS_INLINE void find_groups(const ds_step *step, int64_t sequence, int64_t start, int64_t end, int64_t *groups) {
    const int32_t *table = step->blocks + sequence * step->table_width;
    for (int g = 0; g < GROUPS; g++) {
        int64_t at = start + g * DS_KV_GROUP;
        groups[g] = at >= end && g > 0
            ? groups[g - 1]
            : ((int64_t)table[at / step->block_size] * step->block_size + at % step->block_size) / DS_KV_GROUP;
    }
}

DS_INLINE void point(Rows<Bytes> *rows, const ds_op *op, const int64_t *groups, int64_t head) {
    const int64_t run = ds_kv_run(DS_KV_INT8, op->i[2]), stride = op->n ? op->n * 2 : op->i[1] * run;
    for (int g = 0; g < GROUPS; g++) {
        rows->keys[g] = (const int8_t *)op->y + groups[g] * stride + head * run;
        rows->values[g] = rows->keys[g] + DS_KV_GROUP * op->i[2];
    }
}

DS_INLINE void point(Rows<Halves> *rows, const ds_op *op, const int64_t *groups, int64_t head) {
    const int64_t run = op->i[2] * DS_KV_GROUP, stride = op->n ? op->n : op->i[1] * run;
    for (int g = 0; g < GROUPS; g++) {
        rows->keys[g] = (const ds_bf16 *)op->y + groups[g] * stride + head * run;
        rows->values[g] = (const ds_bf16 *)op->b + groups[g] * stride + head * run;
    }
}

// Those of keys that aren't seen may be anything, but for the values', which a weight of zero is multiplied by.
DS_INLINE void find_scales(Scales *scales, const Rows<Bytes> *rows, int64_t dim) {
    F most = F{};
    for (int k = 0; k < KEYS; k += WIDTH) {
        const ds_bf16 *at = (const ds_bf16 *)(rows->values[k / DS_KV_GROUP] + DS_KV_GROUP * dim) + k % DS_KV_GROUP;
        F value = load_bf16(at + DS_KV_GROUP);
        value = value < __builtin_inff() ? value : F{};
        store(scales->keys + k, load_bf16(at));
        store(scales->values + k, value);
        most = larger(most, value);
    }
    scales->largest = largest_lane(most);
}

// A query as integers: their scale, with `scale` taken in. As large as the sum of a score allows, `largest`.
DS_INLINE float round_query(int16_t *to, const float *from, int64_t dim, float scale, float largest) {
    const float size = largest_size(from, dim);
    const F over = splat(size > FAINT ? largest / size : 0.0f);
    for (int64_t d = 0; d < dim; d += WIDTH)
        store_integers(to + d, (dim - d < WIDTH ? load_part(from + d, dim - d) : load(from + d)) * over);
    return size / largest * scale;
}

template <typename T>
DS_INLINE T *carve(char **at, int64_t many) {
    T *p = (T *)*at;
    *at += (many * (int64_t)sizeof(T) + 63) / 64 * 64;
    return p;
}

template <typename C>
static void attend(const ds_op *op, const ds_step *step, const Unit *u, void *scratch) {
    const int64_t kv_heads = op->i[1], dim = op->i[2], window = op->i[3];
    const int64_t group = op->i[0] / kv_heads, rows = u->count * group, wide = (op->i[0] + 2 * kv_heads) * dim;
    const int64_t padded = (dim + WIDTH - 1) / WIDTH * WIDTH;
    char *at = (char *)scratch;
    float *scores = carve<float>(&at, rows * KEYS), *fade = carve<float>(&at, rows);
    typedef typename C::Side Side;
    Side *weights = carve<Side>(&at, rows * KEYS), *q = carve<Side>(&at, u->heads * rows * dim + WIDTH);
    float *sums = carve<float>(&at, u->heads * rows * padded), *peak = carve<float>(&at, u->heads * rows);
    F *total = carve<F>(&at, u->heads * rows);
    float *part = nullptr, *q_scale = nullptr;
    if constexpr (C::INTEGERS) part = carve<float>(&at, rows), q_scale = carve<float>(&at, u->heads * rows);

    // Row (head, query, head of the group); scores are taken to base 2.
    const float scale = op->f[0] * 1.44269504088896f;
    for (int64_t h = 0; h < u->heads; h++)
        for (int64_t i = 0; i < u->count; i++)
            for (int64_t g = 0; g < group; g++) {
                const float *from = (const float *)op->x + (u->from + i) * wide + ((u->head + h) * group + g) * dim;
                const int64_t row = (h * u->count + i) * group + g;
                Side *to = q + row * dim;  // in order, so that what is written beyond a row goes
                if constexpr (C::INTEGERS) {
                    const int64_t largest = 0x7fffffff / (127 * dim);
                    q_scale[row] = round_query(to, from, dim, scale, largest < 32767 ? (float)largest : 32767.0f);
                } else {
                    int64_t d = 0;
                    for (; d + WIDTH <= dim; d += WIDTH) store_halves(to + d, load(from + d) * scale);
                    if (d < dim) store_halves(to + d, load_part(from + d, dim - d) * scale);
                }
            }
    __builtin_memset(sums, 0, (size_t)(u->heads * rows * padded) * sizeof(float));
    for (int64_t r = 0; r < u->heads * rows; r++) {
        peak[r] = -__FLT_MAX__;  // finite, so that a tile of which a row sees nothing leaves the row as it was
        total[r] = F{};
    }

    const int64_t end = u->position + u->count;  // keys before it are seen
    const int64_t oldest = window > 0 && u->position + 1 > window ? u->position + 1 - window : 0;
    int64_t groups[2][GROUPS];
    Rows<C> two[2];
    int turn = 0, side = 0;
    find_groups(step, u->sequence, oldest / KEYS * KEYS, end, groups[0]);
    point(&two[0], op, groups[0], u->head);
    for (int64_t start = oldest / KEYS * KEYS; start < end; start += KEYS, turn ^= 1) {
        const int count = (int)(end - start < KEYS ? end - start : (int64_t)KEYS);
        const int vectors = (count + WIDTH * VECTOR_BLOCK - 1) / (WIDTH * VECTOR_BLOCK) * VECTOR_BLOCK;
        if (start + KEYS < end) find_groups(step, u->sequence, start + KEYS, end, groups[turn ^ 1]);
        for (int64_t h = 0; h < u->heads; h++, side ^= 1) {
            const Rows<C> *now = &two[side], *then = &two[side ^ 1];
            // Integers' keys, values and scales are one run.
            Ahead ahead = {{}, C::INTEGERS ? ds_kv_run(DS_KV_INT8, dim) : dim * DS_KV_GROUP * (int64_t)sizeof(ds_bf16), 0, 0, 0};
            const bool next_head = h + 1 < u->heads;
            if (next_head || start + KEYS < end) {
                point(&two[side ^ 1], op, groups[next_head ? turn : turn ^ 1], u->head + (next_head ? h + 1 : 0));
                const int64_t left = next_head ? count : end - start - KEYS;
                for (int g = 0; g < GROUPS && g * DS_KV_GROUP < left; g++) {
                    ahead.runs[ahead.count++] = (const char *)then->keys[g];
                    if (!C::INTEGERS) ahead.runs[ahead.count++] = (const char *)then->values[g];
                }
            }
            const Side *q_head = q + h * rows * dim;
            DS_ROW_BLOCKS(rows, score_rows, r, scores + r * KEYS, q_head + r * dim, now, dim, vectors, &ahead);
            Scales scales;
            float steps = 0;
            if constexpr (C::INTEGERS) find_scales(&scales, now, dim), steps = steps_in(scales.largest);
            for (int64_t r = 0; r < rows; r++) {
                int64_t last = u->position + r / group - start;
                int64_t first = window > 0 ? last + 1 - window : 0, state = h * rows + r;
                Side *w = weights + r * KEYS;
                const float *s = scores + r * KEYS;
                if constexpr (C::INTEGERS)
                    fade[r] = weigh(w, s, first, last, peak + state, total + state, q_scale[state], &scales, steps, part + r);
                else fade[r] = weigh(w, s, first, last, peak + state, total + state);
            }
            float *sum = sums + h * rows * padded;
            DS_ROW_BLOCKS(rows, mix_rows, r, sum + r * padded, fade + r, part + r, weights + r * KEYS, now, dim, padded, count,
                          &ahead);
        }
    }

    for (int64_t h = 0; h < u->heads; h++)
        for (int64_t r = 0; r < rows; r++) {
            F over = splat(1.0f / sum_lanes(total[h * rows + r]));
            const float *sum = sums + (h * rows + r) * padded;
            const int64_t query = u->from + r / group, head = (u->head + h) * group + r % group;
            ds_bf16 *out = (ds_bf16 *)op->out + query * (op->stride ? op->stride : op->i[0] * dim) + head * dim;
            int64_t d = 0;
            for (; d + WIDTH <= dim; d += WIDTH) store_bf16(out + d, load(sum + d) * over);
            if (d < dim) store_bf16_part(out + d, load(sum + d) * over, dim - d);
        }
}

static void attention(const ds_op *op, const ds_step *step, ds_team *team) {
    const int64_t kv_heads = op->i[1], group = op->i[0] / kv_heads;
    const int64_t queries = group < UNIT_ROWS ? (int64_t)UNIT_ROWS / group : 1;
    // Many sequences: a unit takes all heads of a sequence, whose keys lie side by side. Few: a head, so that all may work.
    const int64_t together = step->sequences >= 4 * team->threads ? kv_heads : 1;
    int64_t sequence = 0, before = 0;  // units of earlier sequences
    for (int64_t unit = ds_take(team); sequence < step->sequences; unit = ds_take(team)) {
        for (; sequence < step->sequences; sequence++) {
            const int64_t start = step->q_start[sequence], count = step->q_start[sequence + 1] - start;
            const int64_t heads = count == 1 ? together : 1, each = kv_heads / heads;
            const int64_t units = (count + queries - 1) / queries * each;
            if (unit >= before + units) {
                before += units;
                continue;
            }
            const int64_t first = (unit - before) / each * queries;
            Unit u = {sequence, start + first, count - first < queries ? count - first : queries,
                      step->kv_len[sequence] - count + first, (unit - before) % each * heads, heads};
            if (op->k == DS_KV_INT8) attend<Bytes>(op, step, &u, team->scratch);
            else attend<Halves>(op, step, &u, team->scratch);
            break;
        }
    }
}
