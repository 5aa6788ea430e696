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

// ---- fetching ahead --------------------------------------------------------------------------------------------------
// Blocks lie anywhere in memory, and no hardware prefetcher knows the table. The tile that comes next is asked for a cache
// line at a time, all along the arithmetic: asked for at once it would stall it.

typedef struct {
    const char *runs[2 * GROUPS];  // of each group of keys, the keys and the values of one head
    int64_t bytes, at;             // of a run, and asked for so far
    int run, count;
} Ahead;

enum { LINES = 4 * 64 };  // bytes asked for at each step: one query of one head has 64 steps to ask for a tile of 16 KB

DS_INLINE void fetch_lines(Ahead *a) {
    if (a->run == a->count) return;
    const char *at = a->runs[a->run] + a->at;
#pragma GCC unroll 4
    for (int i = 0; i < LINES; i += 64) __builtin_prefetch(at + i, 0, 2);
    a->at += LINES;
    if (a->at >= a->bytes) a->at = 0, a->run++;
}

// ---- products -------------------------------------------------------------------------------------------------------

// A tile of one head: where each group of 16 keys lies.
typedef struct {
    const ds_bf16 *keys[GROUPS];    // [dim / 2][16][2]
    const ds_bf16 *values[GROUPS];  // [16 / 2][dim][2]
} Rows;

// scores[r][KEYS] = q[r] . keys, for R rows; the first `vectors` of the tile, a multiple of VECTOR_BLOCK.
template <int R>
static void score_rows(float *scores, const Half *q, const Rows *rows, int64_t dim, int vectors, Ahead *behind) {
    Ahead ahead = *behind;
    for (int g = 0; g < vectors; g += VECTOR_BLOCK) {
        F sum[R][VECTOR_BLOCK] = {};
        const ds_bf16 *at[VECTOR_BLOCK];
#pragma GCC unroll 8
        for (int v = 0; v < VECTOR_BLOCK; v++) {
            int key = (g + v) * WIDTH;
            at[v] = rows->keys[key / DS_KV_GROUP] + key % DS_KV_GROUP * 2;
        }
        for (int64_t d = 0; d < dim; d += 2) {
            fetch_lines(&ahead);
            Words k[VECTOR_BLOCK];
#pragma GCC unroll 8
            for (int v = 0; v < VECTOR_BLOCK; v++) k[v] = open_words(load_words(at[v] + d * DS_KV_GROUP));
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                for (int v = 0; v < VECTOR_BLOCK; v++) sum[r][v] = multiply_pair(sum[r][v], k[v], q + r * dim + d);
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTOR_BLOCK; v++) store(scores + r * KEYS + (g + v) * WIDTH, sum[r][v]);
    }
    *behind = ahead;
}

// out[r][d] = out[r][d] * fade[r] + sum over keys of weights[r][key] * values[key][d], for R rows and N vectors of d, of
// which the last may be a part. What lies beyond `count` keys may be anything; its weight is zero.
template <int R, int N>
DS_INLINE void mix_block(float *out, const float *fade, const Half *weights, const Rows *rows, int64_t d, int64_t dim,
                         int64_t padded, int count, Ahead *behind) {
    Ahead ahead = *behind;
    const int64_t last = dim - d - (N - 1) * WIDTH;  // columns of the last vector, or more
    F sum[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) sum[r][v] = load(out + r * padded + d + v * WIDTH) * fade[r];
    for (int k = 0; k < count; k += 2) {
        fetch_lines(&ahead);
        const ds_bf16 *at = rows->values[k / DS_KV_GROUP] + (k % DS_KV_GROUP / 2 * dim + d) * 2;
        Words x[N];
        if (__builtin_expect(k + 1 < count && last >= WIDTH, 1)) {
#pragma GCC unroll 8
            for (int v = 0; v < N; v++) x[v] = open_words(load_words(at + v * WIDTH * 2));
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
        for (int v = 0; v < N; v++) store(out + r * padded + d + v * WIDTH, sum[r][v]);
    *behind = ahead;
}

template <int R>
static void mix_rows(float *out, const float *fade, const Half *weights, const Rows *rows, int64_t dim, int64_t padded,
                     int count, Ahead *ahead) {
    int64_t d = 0;
    for (; d + VECTOR_BLOCK * WIDTH <= dim; d += VECTOR_BLOCK * WIDTH)
        mix_block<R, VECTOR_BLOCK>(out, fade, weights, rows, d, dim, padded, count, ahead);
    for (; d < dim; d += WIDTH) mix_block<R, 1>(out, fade, weights, rows, d, dim, padded, count, ahead);
}

// Calls f<R> for blocks of ROW_BLOCK rows, and for what is left.
#define DS_ROW_BLOCKS(rows, f, at, ...)                                              \
    do {                                                                             \
        int64_t at = 0;                                                              \
        for (; at + ROW_BLOCK <= (rows); at += ROW_BLOCK) f<ROW_BLOCK>(__VA_ARGS__); \
        switch ((rows) - at) {                                                       \
            case 1: f<1>(__VA_ARGS__); break;                                        \
            case 2: f<2>(__VA_ARGS__); break;                                        \
            case 3: f<3>(__VA_ARGS__); break;                                        \
            case 4: f<4>(__VA_ARGS__); break;                                        \
            case 5: f<5>(__VA_ARGS__); break;                                        \
        }                                                                            \
    } while (0)

// ---- softmax, a tile after another ----------------------------------------------------------------------------------

// A row's scores become weights, 2^(score - peak); `first` and `last` are the keys of the tile that it sees. Returns
// what the row's earlier sums must be multiplied by.
DS_INLINE float weigh(Half *weights, const float *scores, int64_t first, int64_t last, float *peak, F *total) {
    F s[VECTORS];
    for (int v = 0; v < VECTORS; v++) s[v] = load(scores + v * WIDTH);
    if (first > 0 || last < KEYS - 1) {
        I number;
        for (int i = 0; i < WIDTH; i++) number[i] = i;
        int32_t low = (int32_t)(first > 0 ? first : 0), high = (int32_t)(last < KEYS ? (last < -1 ? -1 : last) : (int64_t)KEYS);
        for (int v = 0; v < VECTORS; v++) {
            I key = number + v * WIDTH;
            s[v] = (key >= low) & (key <= high) ? s[v] : splat(-__builtin_inff());
        }
    }
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

DS_INLINE void point(Rows *rows, const ds_op *op, const int64_t *groups, int64_t head) {
    const int64_t run = op->i[2] * DS_KV_GROUP, stride = op->n ? op->n : op->i[1] * run;
    for (int g = 0; g < GROUPS; g++) {
        rows->keys[g] = (const ds_bf16 *)op->y + groups[g] * stride + head * run;
        rows->values[g] = (const ds_bf16 *)op->b + groups[g] * stride + head * run;
    }
}

template <typename T>
DS_INLINE T *carve(char **at, int64_t many) {
    T *p = (T *)*at;
    *at += (many * (int64_t)sizeof(T) + 63) / 64 * 64;
    return p;
}

static void attend(const ds_op *op, const ds_step *step, const Unit *u, void *scratch) {
    const int64_t kv_heads = op->i[1], dim = op->i[2], window = op->i[3];
    const int64_t group = op->i[0] / kv_heads, rows = u->count * group, wide = (op->i[0] + 2 * kv_heads) * dim;
    const int64_t padded = (dim + WIDTH - 1) / WIDTH * WIDTH;
    char *at = (char *)scratch;
    float *scores = carve<float>(&at, rows * KEYS), *fade = carve<float>(&at, rows);
    Half *weights = carve<Half>(&at, rows * KEYS), *q = carve<Half>(&at, u->heads * rows * dim + WIDTH);
    float *sums = carve<float>(&at, u->heads * rows * padded), *peak = carve<float>(&at, u->heads * rows);
    F *total = carve<F>(&at, u->heads * rows);

    // Row (head, query, head of the group); scores are taken to base 2.
    const float scale = op->f[0] * 1.44269504088896f;
    for (int64_t h = 0; h < u->heads; h++)
        for (int64_t i = 0; i < u->count; i++)
            for (int64_t g = 0; g < group; g++) {
                const float *from = (const float *)op->x + (u->from + i) * wide + ((u->head + h) * group + g) * dim;
                Half *to = q + ((h * u->count + i) * group + g) * dim;  // in order, so that what is written beyond a row goes
                int64_t d = 0;
                for (; d + WIDTH <= dim; d += WIDTH) store_halves(to + d, load(from + d) * scale);
                if (d < dim) store_halves(to + d, load_part(from + d, dim - d) * scale);
            }
    __builtin_memset(sums, 0, (size_t)(u->heads * rows * padded) * sizeof(float));
    for (int64_t r = 0; r < u->heads * rows; r++) {
        peak[r] = -__FLT_MAX__;  // finite, so that a tile of which a row sees nothing leaves the row as it was
        total[r] = F{};
    }

    const int64_t end = u->position + u->count;  // keys before it are seen
    const int64_t oldest = window > 0 && u->position + 1 > window ? u->position + 1 - window : 0;
    int64_t groups[2][GROUPS];
    Rows two[2];
    int turn = 0, side = 0;
    find_groups(step, u->sequence, oldest / KEYS * KEYS, end, groups[0]);
    point(&two[0], op, groups[0], u->head);
    for (int64_t start = oldest / KEYS * KEYS; start < end; start += KEYS, turn ^= 1) {
        const int count = (int)(end - start < KEYS ? end - start : (int64_t)KEYS);
        const int vectors = (count + WIDTH * VECTOR_BLOCK - 1) / (WIDTH * VECTOR_BLOCK) * VECTOR_BLOCK;
        if (start + KEYS < end) find_groups(step, u->sequence, start + KEYS, end, groups[turn ^ 1]);
        for (int64_t h = 0; h < u->heads; h++, side ^= 1) {
            const Rows *now = &two[side], *then = &two[side ^ 1];
            Ahead ahead = {{}, dim * DS_KV_GROUP * (int64_t)sizeof(ds_bf16), 0, 0, 0};
            const bool next_head = h + 1 < u->heads;
            if (next_head || start + KEYS < end) {
                point(&two[side ^ 1], op, groups[next_head ? turn : turn ^ 1], u->head + (next_head ? h + 1 : 0));
                const int64_t left = next_head ? count : end - start - KEYS;
                for (int g = 0; g < GROUPS && g * DS_KV_GROUP < left; g++) {
                    ahead.runs[ahead.count++] = (const char *)then->keys[g];
                    ahead.runs[ahead.count++] = (const char *)then->values[g];
                }
            }
            const Half *q_head = q + h * rows * dim;
            DS_ROW_BLOCKS(rows, score_rows, r, scores + r * KEYS, q_head + r * dim, now, dim, vectors, &ahead);
            for (int64_t r = 0; r < rows; r++) {
                int64_t last = u->position + r / group - start;
                int64_t first = window > 0 ? last + 1 - window : 0, state = h * rows + r;
                fade[r] = weigh(weights + r * KEYS, scores + r * KEYS, first, last, peak + state, total + state);
            }
            float *sum = sums + h * rows * padded;
            DS_ROW_BLOCKS(rows, mix_rows, r, sum + r * padded, fade + r, weights + r * KEYS, now, dim, padded, count, &ahead);
        }
    }

    for (int64_t h = 0; h < u->heads; h++)
        for (int64_t r = 0; r < rows; r++) {
            F over = splat(1.0f / sum_lanes(total[h * rows + r]));
            const float *sum = sums + (h * rows + r) * padded;
            const int64_t query = u->from + r / group, head = (u->head + h) * group + r % group;
            ds_bf16 *out = (ds_bf16 *)op->out + (query * op->i[0] + head) * dim;
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
            attend(op, step, &u, team->scratch);
            break;
        }
    }
}
