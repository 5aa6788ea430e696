// Attention over the paged cache. Included by ops.inc.h.
//
// A unit of work is some consecutive queries of one sequence with some key heads. It walks tiles of KEYS keys, at
// absolute positions, from the oldest key its first query sees to its last query's own. A tile's keys and values are
// widened once and serve all query heads of their group and all queries of the unit.
//
// What a query gets does not depend on the unit it is in: a score is one sum along the head's dimensions, in order; a
// tile's scores meet the running maximum and sum in order of position; each output element adds the values in order of
// position. Keys that a query doesn't see, but another of its unit does, enter with weight zero, which changes nothing.

enum {
    KEYS = 64,      // keys in a tile: with 64 dimensions, K and V of a tile are 32 KB of float
    UNIT_ROWS = 48  // query rows (queries times heads of the group) in a unit: enough to pay for widening
};
enum {
    ROW_BLOCK = DS_WIDTH == 16 ? 6 : 4,   // rows and vectors held in registers together
    VECTOR_BLOCK = DS_WIDTH == 16 ? 4 : 2
};

// ---- fetching ahead --------------------------------------------------------------------------------------------------
// Blocks lie anywhere in memory, and no hardware prefetcher knows the table. The rows that come next are asked for a
// cache line at a time, all along the arithmetic: asked for at once they would stall it.

typedef struct {
    const ds_bf16 *const *rows;  // `left` rows of dim elements
    int64_t dim, column;
    int left;
} Ahead;

DS_INLINE void fetch_line(Ahead *a) {
    if (!a->left) return;
    __builtin_prefetch(*a->rows + a->column, 0, 2);
    a->column += 32;
    if (a->column >= a->dim) a->column = 0, a->rows++, a->left--;
}

// ---- a tile's keys and values, widened ------------------------------------------------------------------------------

template <int S> struct Exchange {
    // Lanes whose number has the bit S are exchanged with lanes S lower of the vector S further.
    DS_INLINE void apply(U *v) {
        U low, high;
        for (int i = 0; i < WIDTH; i++) {
            low[i] = i & S ? WIDTH + i - S : i;
            high[i] = i & S ? WIDTH + i : i + S;
        }
#pragma GCC unroll 16
        for (int i = 0; i < WIDTH; i++)
            if (!(i & S)) {
                U a = v[i], b = v[i + S];
                v[i] = __builtin_shuffle(a, b, low);
                v[i + S] = __builtin_shuffle(a, b, high);
            }
        Exchange<S / 2>::apply(v);
    }
};
template <> struct Exchange<0> {
    DS_INLINE void apply(U *) {}
};

// keys[d][KEYS] = K of `rows` (pointers to KEYS rows of the cache), transposed so that lanes are keys.
DS_INLINE void widen_keys(float *keys, const ds_bf16 *const *rows, int64_t dim, int groups) {
    for (int g = 0; g < groups; g++)
        for (int64_t d = 0; d < dim; d += 2 * WIDTH) {
            int64_t many = dim - d < 2 * WIDTH ? dim - d : (int64_t)(2 * WIDTH);
            U v[WIDTH];
            if (many == 2 * WIDTH) {
#pragma GCC unroll 16
                for (int i = 0; i < WIDTH; i++) v[i] = load_words(rows[g * WIDTH + i] + d);
            } else {
                for (int i = 0; i < WIDTH; i++) {
                    v[i] = U{};
                    __builtin_memcpy(&v[i], rows[g * WIDTH + i] + d, (size_t)many * sizeof(ds_bf16));
                }
            }
            Exchange<WIDTH / 2>::apply(v);
            float *out = keys + d * KEYS + g * WIDTH;
#pragma GCC unroll 16
            for (int i = 0; i < WIDTH; i++) {
                store(out + (2 * i) * KEYS, (F)(v[i] << 16));
                store(out + (2 * i + 1) * KEYS, (F)(v[i] & 0xffff0000u));
            }
        }
}

// values[key][padded]: of each 2 * WIDTH dimensions the even ones, then the odd ones (`write_out` puts them together again).
DS_INLINE void widen_values(float *values, const ds_bf16 *const *rows, int64_t dim, int64_t padded, int from, int to,
                            Ahead *ahead) {
    for (int k = from; k < to; k++) {
        float *out = values + k * padded;
        for (int64_t d = 0; d < dim; d += 2 * WIDTH) {
            fetch_line(ahead);
            U pairs = U{};
            if (dim - d >= 2 * WIDTH)
                pairs = load_words(rows[k] + d);
            else
                __builtin_memcpy(&pairs, rows[k] + d, (size_t)(dim - d) * sizeof(ds_bf16));
            store(out + d, (F)(pairs << 16));
            store(out + d + WIDTH, (F)(pairs & 0xffff0000u));
        }
    }
}

// ---- products -------------------------------------------------------------------------------------------------------

// scores[r][KEYS] = q[r] . keys, for R rows.
template <int R>
static void score_rows(float *scores, const float *q, const float *keys, int64_t dim, int groups, Ahead *behind) {
    Ahead ahead = *behind;
    for (int g = 0; g < groups; g += VECTOR_BLOCK) {
        F sum[R][VECTOR_BLOCK] = {};
        const float *at = keys + g * WIDTH;
        for (int64_t d = 0; d < dim; d++) {
            fetch_line(&ahead);
            fetch_line(&ahead);
            F k[VECTOR_BLOCK];
#pragma GCC unroll 8
            for (int v = 0; v < VECTOR_BLOCK; v++) k[v] = load(at + d * KEYS + v * WIDTH);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                F x = splat(q[r * dim + d]);
#pragma GCC unroll 8
                for (int v = 0; v < VECTOR_BLOCK; v++) sum[r][v] = fma(x, k[v], sum[r][v]);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int v = 0; v < VECTOR_BLOCK; v++) store(scores + r * KEYS + (g + v) * WIDTH, sum[r][v]);
    }
    *behind = ahead;
}

// out[r][d] = out[r][d] * fade[r] + sum over keys of weights[r][key] * values[key][d], for R rows and N vectors of d.
template <int R, int N>
DS_INLINE void mix_block(float *out, const float *fade, const float *weights, const float *values, int64_t padded, int from,
                         int to, Ahead *behind) {
    Ahead ahead = *behind;
    F sum[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) sum[r][v] = load(out + r * padded + v * WIDTH) * fade[r];
    for (int k = from; k < to; k++) {
        fetch_line(&ahead);
        F x[N];
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) x[v] = load(values + k * padded + v * WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            F w = splat(weights[r * KEYS + k]);
#pragma GCC unroll 8
            for (int v = 0; v < N; v++) sum[r][v] = fma(w, x[v], sum[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < N; v++) store(out + r * padded + v * WIDTH, sum[r][v]);
    *behind = ahead;
}

template <int R>
static void mix_rows(float *out, const float *fade, const float *weights, const float *values, int64_t padded, int from,
                     int to, Ahead *ahead) {
    int64_t d = 0;
    for (; d + VECTOR_BLOCK * WIDTH <= padded; d += VECTOR_BLOCK * WIDTH)
        mix_block<R, VECTOR_BLOCK>(out + d, fade, weights, values + d, padded, from, to, ahead);
    for (; d < padded; d += 2 * WIDTH) mix_block<R, 2>(out + d, fade, weights, values + d, padded, from, to, ahead);
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
DS_INLINE float weigh(float *scores, int64_t first, int64_t last, float *peak, F *total) {
    enum { VECTORS = KEYS / WIDTH };
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
    float before = *peak, now = largest_lane(top);
    now = now > before ? now : before;
    *peak = now;
    F sum = F{};
    for (int v = 0; v < VECTORS; v++) {
        F w = exp2_of(s[v] - now);
        store(scores + v * WIDTH, w);
        sum += w;
    }
    float fade = exp2_of(splat(before - now))[0];
    *total = *total * fade + sum;
    return fade;
}

// ---- a unit ---------------------------------------------------------------------------------------------------------

typedef struct {
    int64_t sequence, from, count;  // queries `from` .. of the step's rows
    int64_t position;               // of the first
    int64_t head, heads;            // key heads
} Unit;

typedef struct {
    int64_t start;           // position of its first key
    int from, to;            // of its keys, those that some query of the unit sees
    const int64_t *places;   // [KEYS]: where in the cache each stands; those out of sight stand where another does
} Tile;

DS_INLINE Tile find_tile(const ds_step *step, int64_t sequence, int64_t oldest, int64_t start, int64_t end, int64_t width,
                         int64_t *places) {
    const int32_t *table = step->blocks + sequence * step->table_width;
    int from = (int)(oldest > start ? oldest - start : 0), to = (int)(end - start < KEYS ? end - start : (int64_t)KEYS);
    if (to <= from) return Tile{start, 0, 0, places};
    int64_t block = (start + from) / step->block_size, offset = (start + from) % step->block_size;
    for (int k = from; k < to; k++) {
        places[k] = ((int64_t)table[block] * step->block_size + offset) * width;
        if (++offset == step->block_size) offset = 0, block++;
    }
    for (int k = 0; k < from; k++) places[k] = places[from];
    for (int k = to; k < KEYS; k++) places[k] = places[to - 1];
    return Tile{start, from, to, places};
}

// Pointers to a tile's rows of one head, the keys and then the values.
DS_INLINE void point(const ds_bf16 **rows, const ds_op *op, const Tile *tile, int64_t column) {
    for (int k = 0; k < KEYS; k++) {
        rows[k] = (const ds_bf16 *)op->y + tile->places[k] + column;
        rows[KEYS + k] = (const ds_bf16 *)op->b + tile->places[k] + column;
    }
}

DS_INLINE float *carve(char **at, int64_t floats) {
    float *p = (float *)*at;
    *at += (floats * (int64_t)sizeof(float) + 63) / 64 * 64;
    return p;
}

static void attend(const ds_op *op, const ds_step *step, const Unit *u, void *scratch) {
    const int64_t kv_heads = op->i[1], dim = op->i[2], window = op->i[3];
    const int64_t group = op->i[0] / kv_heads, rows = u->count * group, wide = (op->i[0] + 2 * kv_heads) * dim;
    const int64_t padded = (dim + 2 * WIDTH - 1) / (2 * WIDTH) * (2 * WIDTH);
    char *at = (char *)scratch;
    float *keys = carve(&at, padded * KEYS), *values = carve(&at, KEYS * padded), *scores = carve(&at, rows * KEYS);
    float *fade = carve(&at, rows), *q = carve(&at, u->heads * rows * dim), *sums = carve(&at, u->heads * rows * padded);
    float *peak = carve(&at, u->heads * rows);
    F *total = (F *)carve(&at, u->heads * rows * WIDTH);

    // Row (head, query, head of the group); scores are taken to base 2.
    const float scale = op->f[0] * 1.44269504088896f;
    for (int64_t h = 0; h < u->heads; h++)
        for (int64_t i = 0; i < u->count; i++)
            for (int64_t g = 0; g < group; g++) {
                const float *from = (const float *)op->x + (u->from + i) * wide + ((u->head + h) * group + g) * dim;
                float *to = q + ((h * u->count + i) * group + g) * dim;
                for (int64_t d = 0; d < dim; d++) to[d] = from[d] * scale;
            }
    __builtin_memset(sums, 0, (size_t)(u->heads * rows * padded) * sizeof(float));
    for (int64_t r = 0; r < u->heads * rows; r++) {
        peak[r] = -__FLT_MAX__;  // finite, so that a tile of which a row sees nothing leaves the row as it was
        total[r] = F{};
    }

    const int64_t end = u->position + u->count;  // keys before it are seen
    const int64_t oldest = window > 0 && u->position + 1 > window ? u->position + 1 - window : 0;
    int64_t places[2][KEYS];
    const ds_bf16 *rows_of_two[2][2 * KEYS], **now = rows_of_two[0], **then = rows_of_two[1];
    Tile tile = find_tile(step, u->sequence, oldest, oldest / KEYS * KEYS, end, kv_heads * dim, places[0]);
    point(now, op, &tile, u->head * dim);
    for (int turn = 1; tile.from < tile.to; turn ^= 1) {
        const Tile next = find_tile(step, u->sequence, oldest, tile.start + KEYS, end, kv_heads * dim, places[turn]);
        const int groups = (tile.to + WIDTH * VECTOR_BLOCK - 1) / (WIDTH * VECTOR_BLOCK) * VECTOR_BLOCK;

        for (int64_t h = 0; h < u->heads; h++) {
            Ahead ahead = {then, dim, 0, 0};
            const Tile *following = h + 1 < u->heads ? &tile : &next;
            if (following->from < following->to) {
                point(then, op, following, (u->head + (h + 1) % u->heads) * dim);
                ahead.left = 2 * KEYS;
            }
            widen_keys(keys, now, dim, groups);
            const float *q_head = q + h * rows * dim;
            DS_ROW_BLOCKS(rows, score_rows, r, scores + r * KEYS, q_head + r * dim, keys, dim, groups, &ahead);
            for (int64_t r = 0; r < rows; r++) {
                int64_t last = u->position + r / group - tile.start;
                int64_t first = window > 0 ? last + 1 - window : 0, state = h * rows + r;
                fade[r] = weigh(scores + r * KEYS, first, last, peak + state, total + state);
            }
            widen_values(values, now + KEYS, dim, padded, tile.from, tile.to, &ahead);
            float *sum = sums + h * rows * padded;
            DS_ROW_BLOCKS(rows, mix_rows, r, sum + r * padded, fade + r, scores + r * KEYS, values, padded, tile.from, tile.to,
                          &ahead);
            const ds_bf16 **done = now;
            now = then;
            then = done;
        }
        tile = next;
    }

    for (int64_t h = 0; h < u->heads; h++)
        for (int64_t r = 0; r < rows; r++) {
            F over = splat(1.0f / sum_lanes(total[h * rows + r]));
            const float *sum = sums + (h * rows + r) * padded;
            const int64_t query = u->from + r / group, head = (u->head + h) * group + r % group;
            ds_bf16 *out = (ds_bf16 *)op->out + (query * op->i[0] + head) * dim;
            for (int64_t d = 0; d < dim; d += 2 * WIDTH) {
                U pairs = round_bf16(load(sum + d) * over) | round_bf16(load(sum + d + WIDTH) * over) << 16;
                int64_t many = dim - d < 2 * WIDTH ? dim - d : (int64_t)(2 * WIDTH);
                __builtin_memcpy(out + d, &pairs, (size_t)many * sizeof(ds_bf16));
            }
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
