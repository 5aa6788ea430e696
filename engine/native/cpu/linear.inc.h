// DS_LINEAR: out = x @ w + b, for one row and for thousands. Compiled once for each instruction set, inside its namespace.
//
// Batch invariance: an output is one sum, begun at zero, that walks K in order by the same instruction whatever the number
// of rows; the bias is added last. Register tiles decide only which outputs are walked side by side. The sums of two
// instruction sets differ in the last bits.
//
// Rows are cut into panels whose activations stay in the second-level cache; within a panel the weights stream by once, a
// group of blocks (of 16 outputs) at a time. A chunk is some groups of a panel. While a group is multiplied, the vector
// kernels ask for the next: left to the hardware, the first tile of rows waits for memory and the others leave it idle (16
// rows took 1.5 times as long on a Zen 5).

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- keys and values of the attention to come ------------------------------------------------------------------------
// Decode attention is bound by memory and matrix products of many rows by arithmetic, so while these run the cache lines of the
// next attention's keys and values are asked for. They go through the second-level cache into the third, where attention finds
// them. DS_CACHE_SHARE of that cache at most: on a Zen 5 with 32 MB of it for eight cores, of which we have two, more brought nothing.

enum { DS_CACHE_SHARE = 6 };

struct Fetch {
    const ds_op *to;  // the attention
    const ds_step *step;
    int64_t run;       // bytes of a group of 16 tokens, keys and values of all heads: they lie side by side
    int64_t runs;      // to be asked for by this operator, from number `first` on
    int64_t first;
    int64_t sequence, before;  // of the last run found, and runs of earlier sequences
    int64_t at, end;           // numbers of runs: of the next, and where this chunk's share ends
    const char *line;          // and what is left of the current one
    int64_t left;
};

enum { FETCHED_QUERIES = 8 };  // a sequence with more reads each key so often that arithmetic is its bound too

// Runs that a sequence's queries look at, to be asked for.
static inline int64_t runs_of(const ds_op *to, const ds_step *step, int64_t s, int64_t *oldest) {
    const int64_t queries = step->q_start[s + 1] - step->q_start[s], length = step->kv_len[s], window = to->i[3];
    if (queries > FETCHED_QUERIES) return *oldest = 0;
    *oldest = (window > 0 && length - queries + 1 > window ? length - queries + 1 - window : 0) / DS_KV_GROUP;
    return (length + DS_KV_GROUP - 1) / DS_KV_GROUP - *oldest;
}

static Fetch plan_fetch(const ds_op *op, const ds_step *step, const ds_team *team) {
    Fetch f = {};
    if (!op->i[2]) return f;
    f.to = op + op->i[2], f.step = step;
    f.run = f.to->i[1] * ds_kv_run(f.to->k, f.to->i[2]);
    int64_t all = 0, oldest;
    for (int64_t s = 0; s < step->sequences; s++) all += runs_of(f.to, step, s, &oldest);
    all = least(all, team->cache / DS_CACHE_SHARE / f.run);
    f.first = (int64_t)((float)all * op->f[0]);
    f.runs = (int64_t)((float)all * op->f[1]) - f.first;
    return f;
}

static inline void begin_share(Fetch *f, int64_t chunk, int64_t chunks) {
    f->at = f->first + f->runs * chunk / chunks, f->end = f->first + f->runs * (chunk + 1) / chunks;
    f->left = 0;
    if (f->at < f->before) f->sequence = f->before = 0;
}

struct Lines {  // `many` of 64 bytes
    const char *at;
    int64_t many;
};

// The next lines, at most `most` of them, of one run. None are left: a line that is asked for again and again, which costs nothing.
static inline Lines next_lines(Fetch *f, int64_t most, const void *none) {
    if (!f->left) {
        if (f->at == f->end) return {(const char *)none, 0};
        int64_t oldest, runs;
        while (f->at >= f->before + (runs = runs_of(f->to, f->step, f->sequence, &oldest))) f->before += runs, f->sequence++;
        const int64_t token = (oldest + f->at++ - f->before) * DS_KV_GROUP, size = f->step->block_size;
        const int64_t slot = f->step->blocks[f->sequence * f->step->table_width + token / size] * size + token % size;
        f->line = (const char *)f->to->y + slot / DS_KV_GROUP * f->to->n * 2;
        f->left = (f->run + 63) / 64;
    }
    Lines lines = {f->line, least(f->left, most)};
    f->line += lines.many * 64, f->left -= lines.many;
    return lines;
}

struct Linear {
    const ds_bf16 *w;  // or a panel of quantised weights (quant.h)
    const float *bias;  // or null
    float *out;
    int64_t n, stride, blocks;  // stride: floats from one row of `out` to the next
    int64_t block;   // bytes in a block of weights, / 2: what they are as bf16
    int64_t pairs;   // along K
    int64_t scales;  // bytes at the beginning of a block that are scales
    Fetch *fetch;
};

enum { SHARED_ROWS = 8 };
enum { TURNS = 1000 };  // of waiting for tiles that others prepare, some 40 us, before the core is offered to whoever wants it
enum { GROUP = 4, PANEL = 96 };  // a panel is cut into tiles of 6, 16 or 32 rows without rest; 96 rows of K = 4096 take 768 KB

#if defined(__AMX_BF16__)
// ---- AMX: tiles of 16 rows by 32 values of K, times 32 values of K by 16 outputs -------------------------------------
// A packed block of weights is such tiles already, one after another. The panel is copied into tiles too, zero beyond its
// rows and beyond K; the last tile of a block, where K is no multiple of 32, is completed in scratch. Sixteen rows always
// go through, also for one row: the weights' way from memory takes longer.

enum { TILE = 512 };  // bf16 values

struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

// GCC's intrinsics don't say that they read memory (the configuration beyond 8 bytes, tiles at all): without this, what has
// been written for them need not be there yet.
static inline void written(const void *at) { __asm__ volatile("" : : "r"(at) : "memory"); }

static void begin_linear() {
    TileConfig config = {};
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    written(&config);
    _tile_loadconfig(&config);
}

// Without it every switch of threads would save the tiles.
static void end_linear() { _tile_release(); }

static int64_t row_bytes(int64_t pairs) { return (pairs + 15) / 16 * 64; }

// Room for the completed tiles of a group, and for 16 x 16 outputs.
enum { ROOM = GROUP * TILE * 2 + 1024 };

static const void *prepare(const ds_bf16 *x, int64_t rows, int64_t k, void *scratch) {
    ds_bf16 *to = (ds_bf16 *)((char *)scratch + ROOM);
    int64_t tiles = (k + 31) / 32, bands = (rows + 15) / 16;
    for (int64_t band = 0; band < bands; band++)
        for (int64_t t = 0; t < tiles; t++, to += TILE)
            for (int64_t r = 0; r < 16; r++) {
                int64_t row = band * 16 + r;
                __mmask32 mask = row < rows ? (__mmask32)((1ull << least(32, k - t * 32)) - 1) : 0;
                const ds_bf16 *from = mask ? x + row * k + t * 32 : x;
                _mm512_store_si512(to + r * 32, _mm512_maskz_loadu_epi16(mask, from));
            }
    return (char *)scratch + ROOM;
}

static inline void zero_sums() {  // the intrinsics are statements, not expressions
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Also, they take the number of a tile as it is spelt.
template <int C>
static inline void store_sum(float *to, int64_t stride) {
    if constexpr (C == 0) _tile_stored(0, to, stride);
    if constexpr (C == 1) _tile_stored(1, to, stride);
    if constexpr (C == 2) _tile_stored(2, to, stride);
    if constexpr (C == 3) _tile_stored(3, to, stride);
}

// The sums in tile C, to `block`'s columns of 16 rows, or as many as there are before `rows`.
template <int C>
static inline void put(const Linear &l, int64_t row, int64_t rows, int64_t block, float *buffer) {
    if (row >= rows || block >= l.blocks) return;
    float *out = l.out + row * l.stride + block * 16;
    int64_t columns = least(16, l.n - block * 16);
    if (rows - row >= 16 && columns == 16 && !l.bias) {
        store_sum<C>(out, l.stride * sizeof(float));
        return;
    }
    store_sum<C>(buffer, 64);
    __mmask16 mask = (__mmask16)((1u << columns) - 1);
    __m512 bias = l.bias ? _mm512_maskz_loadu_ps(mask, l.bias + block * 16) : _mm512_setzero_ps();
    for (int64_t r = 0; r < least(16, rows - row); r++) {
        __m512 sum = _mm512_load_ps(buffer + r * 16);
        _mm512_mask_storeu_ps(out + r * l.stride, mask, l.bias ? _mm512_add_ps(sum, bias) : sum);
    }
}

static inline const ds_bf16 *tile_of(const Linear &l, const ds_bf16 *block, const ds_bf16 *tail, int64_t t) {
    return (t + 1) * 16 <= l.pairs ? block + t * TILE : tail;
}

static void group(const Linear &l, int64_t first, const void *panel, int64_t row0, int64_t rows, int64_t, void *scratch) {
    const ds_bf16 *w[GROUP], *tail[GROUP], *x = (const ds_bf16 *)panel;
    float *buffer = (float *)((char *)scratch + GROUP * TILE * 2);
    int64_t tiles = (l.pairs + 15) / 16, rest = l.pairs % 16;
    for (int64_t b = 0; b < GROUP; b++) {  // blocks beyond the last are computed as the last and not stored
        ds_bf16 *whole = (ds_bf16 *)scratch + b * TILE;
        w[b] = l.w + least(first + b, l.blocks - 1) * l.block;
        tail[b] = whole;
        if (!rest) continue;
        memcpy(whole, w[b] + tiles * TILE - TILE, rest * 64);
        memset(whole + rest * 32, 0, (16 - rest) * 64);
    }
    written(scratch);  // the panel lies there too
    int64_t end = row0 + rows;
    if (rows <= 16) {
        zero_sums();
        for (int64_t t = 0; t < tiles; t++) {
            _tile_loadd(4, x + t * TILE, 64);
            _tile_loadd(5, tile_of(l, w[0], tail[0], t), 64);
            _tile_dpbf16ps(0, 4, 5);
            _tile_loadd(6, tile_of(l, w[1], tail[1], t), 64);
            _tile_dpbf16ps(1, 4, 6);
            _tile_loadd(7, tile_of(l, w[2], tail[2], t), 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_loadd(5, tile_of(l, w[3], tail[3], t), 64);
            _tile_dpbf16ps(3, 4, 5);
        }
        put<0>(l, row0, end, first, buffer), put<1>(l, row0, end, first + 1, buffer);
        put<2>(l, row0, end, first + 2, buffer), put<3>(l, row0, end, first + 3, buffer);
        return;
    }
    int64_t bands = (rows + 15) / 16, couples = (bands + 1) / 2;
    for (int64_t half = 0; half < 2; half++)
        for (int64_t c = 0; c < couples; c++) {
            const ds_bf16 *x0 = x + 2 * c * tiles * TILE, *x1 = 2 * c + 1 < bands ? x0 + tiles * TILE : x0;
            int64_t b = 2 * half;
            zero_sums();
            for (int64_t t = 0; t < tiles; t++) {
                _tile_loadd(4, x0 + t * TILE, 64);
                _tile_loadd(6, tile_of(l, w[b], tail[b], t), 64);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, tile_of(l, w[b + 1], tail[b + 1], t), 64);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, x1 + t * TILE, 64);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            int64_t row = row0 + c * 32;
            put<0>(l, row, end, first + b, buffer), put<1>(l, row, end, first + b + 1, buffer);
            put<2>(l, row + 16, end, first + b, buffer), put<3>(l, row + 16, end, first + b + 1, buffer);
        }
}

#else
// ---- vectors: a Sum is 16 outputs of one row ------------------------------------------------------------------------
// What an instruction set brings: X, the form of a pair of activations; PASSES, how many multiply-adds a pair takes;
// `weights` and `spread`, the operands of one pass; the shape of the register tile (ROWS x BLOCKS, or one row x WIDE).

static void begin_linear() {}
static void end_linear() {}

#if defined(__AVX512F__)
typedef __m512 Sum;
enum { ROWS = 6, BLOCKS = 4, WIDE = 4 };  // 24 sums, 4 weights, 1 activation: 29 of 32 registers
static inline Sum nothing() { return _mm512_setzero_ps(); }
static inline void put(float *out, Sum sum, const float *bias, int64_t columns) {
    __mmask16 mask = (__mmask16)((1u << columns) - 1);
    if (bias) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, bias));
    _mm512_mask_storeu_ps(out, mask, sum);
}
#endif

#if defined(__AVX512BF16__)
enum { PASSES = 1 };
typedef uint32_t X;  // two bf16 as they stand
typedef __m512bh Weights;
typedef __m512bh Spread;
template <int P> static inline Weights weights(const ds_bf16 *w) { return (__m512bh)_mm512_loadu_si512(w); }
template <int P> static inline Spread spread(const X *x) {
    int pair;
    memcpy(&pair, x, 4);  // a row of x begins at any even address
    return (__m512bh)_mm512_set1_epi32(pair);
}
static inline Sum multiply_add(Sum sum, Weights w, Spread x) { return _mm512_dpbf16_ps(sum, w, x); }
#else
enum { PASSES = 2 };  // the even value of each pair, then the odd one, in float32
struct X { float value[2]; };

#if defined(__AVX512F__)
typedef __m512 Weights;
typedef __m512 Spread;
template <int P> static inline Weights weights(const ds_bf16 *w) {
    __m512i pairs = _mm512_loadu_si512(w);
    return _mm512_castsi512_ps(P ? _mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)) : _mm512_slli_epi32(pairs, 16));
}
template <int P> static inline Spread spread(const X *x) { return _mm512_set1_ps(x->value[P]); }
static inline Sum multiply_add(Sum sum, Weights w, Spread x) { return _mm512_fmadd_ps(w, x, sum); }

#elif defined(__AVX2__)
enum { ROWS = 6, BLOCKS = 1, WIDE = 2 };  // 12 sums, 2 weights, 1 activation: 15 of 16 registers
struct Sum { __m256 low, high; };
typedef Sum Weights;
typedef __m256 Spread;
static inline Sum nothing() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
template <int P> static inline __m256 part(const ds_bf16 *w) {
    __m256i pairs = _mm256_loadu_si256((const __m256i *)w);
    return _mm256_castsi256_ps(P ? _mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000)) : _mm256_slli_epi32(pairs, 16));
}
template <int P> static inline Weights weights(const ds_bf16 *w) { return {part<P>(w), part<P>(w + 16)}; }
template <int P> static inline Spread spread(const X *x) { return _mm256_set1_ps(x->value[P]); }
static inline Sum multiply_add(Sum sum, Weights w, Spread x) {
    return {_mm256_fmadd_ps(w.low, x, sum.low), _mm256_fmadd_ps(w.high, x, sum.high)};
}
static inline void put(float *out, Sum sum, const float *bias, int64_t columns) {
    float values[16];
    _mm256_storeu_ps(values, sum.low), _mm256_storeu_ps(values + 8, sum.high);
    for (int64_t i = 0; i < columns; i++) out[i] = bias ? values[i] + bias[i] : values[i];
}

#else
// Vectors of four, which every compiler for x86-64 and aarch64 maps to registers; a product is rounded before it is added.
typedef float Four __attribute__((vector_size(16)));
typedef uint32_t FourBits __attribute__((vector_size(16)));
#if defined(__aarch64__)
enum { ROWS = 4, BLOCKS = 1, WIDE = 2 };  // 16 of 32 registers are sums
#else
enum { ROWS = 2, BLOCKS = 1, WIDE = 2 };  // 8 of 16
#endif
struct Sum { Four part[4]; };
typedef Sum Weights;
typedef Four Spread;
static inline Sum nothing() { return {}; }
template <int P> static inline Weights weights(const ds_bf16 *w) {
    Weights values;
    for (int i = 0; i < 4; i++) {
        FourBits pairs;
        memcpy(&pairs, w + 8 * i, 16);  // an even index is the lower half: little-endian, as every target is
        values.part[i] = (Four)(P ? pairs & 0xffff0000u : pairs << 16);
    }
    return values;
}
template <int P> static inline Spread spread(const X *x) { return Four{} + x->value[P]; }
static inline Sum multiply_add(Sum sum, Weights w, Spread x) {
    for (int i = 0; i < 4; i++) sum.part[i] = sum.part[i] + w.part[i] * x;
    return sum;
}
static inline void put(float *out, Sum sum, const float *bias, int64_t columns) {
    float values[16];
    memcpy(values, &sum, 64);
    for (int64_t i = 0; i < columns; i++) out[i] = bias ? values[i] + bias[i] : values[i];
}
#endif
#endif

static int64_t row_bytes(int64_t pairs) { return pairs * sizeof(X); }
enum { ROOM = 0 };

// The panel as X, zero beyond K. Where X is two bf16 and K is even, that is what x is.
static const void *prepare(const ds_bf16 *x, int64_t rows, int64_t k, void *scratch) {
    int64_t pairs = (k + 1) / 2;
    if (PASSES == 1 && k % 2 == 0) return x;
    for (int64_t r = 0; r < rows; r++) {
        if (PASSES == 1) {
            ds_bf16 *to = (ds_bf16 *)scratch + r * 2 * pairs;
            memcpy(to, x + r * k, k * sizeof(ds_bf16));
            to[k] = 0;
            continue;
        }
        uint32_t *to = (uint32_t *)scratch + r * 2 * pairs;
        for (int64_t i = 0; i < k; i++) to[i] = (uint32_t)x[r * k + i] << 16;
        if (k % 2) to[k] = 0;
    }
    return scratch;
}

// R rows by B blocks of outputs. `next` is what will be read after this, P lines of it asked for with each pair.
template <int R, int B, int P>
static void tile(const Linear &l, int64_t first, const X *x, int64_t row, const char *next) {
    Lines lines = R > 1 ? next_lines(l.fetch, l.pairs, x) : Lines{};
    Sum sums[R][B];
    const ds_bf16 *w = l.w + first * l.block;
    const int64_t pairs = l.pairs, block = l.block;
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) sums[r][b] = nothing();
    for (int64_t i = 0; i < pairs; i++, w += 32, x++, next += P * 64) {
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) __builtin_prefetch(next + p * 64, 0, 2);
        if (R > 1) {
            __builtin_prefetch(lines.at, 0, 2);
            lines.at += --lines.many > 0 ? 64 : 0;
        }
        Weights even[B], odd[B];
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) even[b] = weights<0>(w + b * block);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int b = 0; b < B; b++) sums[r][b] = multiply_add(sums[r][b], even[b], spread<0>(x + r * pairs));
        if (PASSES == 1) continue;
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) odd[b] = weights<PASSES - 1>(w + b * block);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int b = 0; b < B; b++) sums[r][b] = multiply_add(sums[r][b], odd[b], spread<PASSES - 1>(x + r * pairs));
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int b = 0; b < B; b++) {
            int64_t column = (first + b) * 16;
            put(l.out + (row + r) * l.stride + column, sums[r][b], l.bias ? l.bias + column : nullptr, least(16, l.n - column));
        }
}

template <int R, int B, int P>
static void tile_of(const Linear &l, int64_t rows, int64_t first, const X *x, int64_t row, const char *next) {
    if constexpr (R == 0) return;
    else if (rows == R) tile<R, B, P>(l, first, x, row, next);
    else tile_of<R - 1, B, P>(l, rows, first, x, row, next);
}

// B blocks, all rows of the panel, in tiles of as equal heights as can be. `next`, as many blocks that come later, is asked
// for along the way, a share with each tile (P lines with each pair of K, of the B there are).
template <int R, int B, int P>
static void column(const Linear &l, int64_t first, const X *x, int64_t row0, int64_t rows, const char *next) {
    int64_t tiles = (rows + R - 1) / R;
    for (int64_t t = 0; t < tiles; t++) {
        int64_t from = rows * t / tiles, to = rows * (t + 1) / tiles;
        tile_of<R, B, P>(l, to - from, first, x + from * l.pairs, row0 + from, next + least(t, B / P - 1) * P * l.pairs * 64);
    }
}

static void group(const Linear &l, int64_t first, const void *panel, int64_t row0, int64_t rows, int64_t then, void *) {
    const X *x = (const X *)panel;
    int64_t end = least(first + GROUP, l.blocks), b = first;
    const char *next = (const char *)(l.w + then * l.block);
    const int64_t bytes = l.block * (int64_t)sizeof(ds_bf16);
    if (rows == 1)
        for (; b + WIDE <= end; b += WIDE) column<1, WIDE, WIDE>(l, b, x, row0, rows, next + (b - first) * bytes);
    for (; b + BLOCKS <= end; b += BLOCKS) {
        const char *at = next + (b - first) * bytes;
        if (rows <= ROWS) column<ROWS, BLOCKS, BLOCKS>(l, b, x, row0, rows, at);
        else if (BLOCKS > 1 && rows <= 3 * ROWS) column<ROWS, BLOCKS, BLOCKS / 2 + BLOCKS % 2>(l, b, x, row0, rows, at);
        else column<ROWS, BLOCKS, 1>(l, b, x, row0, rows, at);
    }
    for (; b < end; b++) column<ROWS, 1, 1>(l, b, x, row0, rows, next + (b - first) * bytes);
}
#endif

#include "quant.inc.h"

// ---- chunks ----------------------------------------------------------------------------------------------------------

struct Format {  // what a kind of weights brings
    int64_t row_bytes, room;  // of a row made ready; of scratch that stays free before the panel
    const void *(*prepare)(const ds_bf16 *x, int64_t rows, int64_t k, void *scratch);
    // Where preparing a panel takes time: in how many tiles it can be shared, and one of them; else null.
    int64_t (*tiles)(int64_t rows);
    void (*prepare_tile)(const ds_bf16 *x, int64_t rows, int64_t k, int64_t tile, void *panel);
    // `then`: the block that comes after this group, as far as that can be known
    void (*group)(const Linear &l, int64_t first, const void *panel, int64_t row0, int64_t rows, int64_t then, void *scratch);
};

template <class W, int TERMS = 1>
static Format quantised(int64_t k) {
    int64_t row_bytes = (k + W::GROUP - 1) / W::GROUP * (int64_t)sizeof(Quantised<W::GROUP>) * TERMS;
    return {row_bytes, 0, quant_prepare<W, TERMS>, tiles_of, quant_tile_prepare<W, TERMS>, quant_group<W, TERMS>};
}

// `fine`: activations of 16 bits.
static Format format_of(int64_t kind, bool fine, int64_t k) {
    switch (kind) {
        case DS_Q4_0: return fine ? quantised<Q4_0, 2>(k) : quantised<Q4_0>(k);
        case DS_Q4_1: return fine ? quantised<Q4_1, 2>(k) : quantised<Q4_1>(k);
        case DS_Q8_0: return fine ? quantised<Q8_0, 2>(k) : quantised<Q8_0>(k);
        case DS_Q4_K: return fine ? quantised<Q4_K, 2>(k) : quantised<Q4_K>(k);
        case DS_Q6_K: return fine ? quantised<Q6_K, 2>(k) : quantised<Q6_K>(k);
        case DS_INT8: return quantised<Int8>(k);
        default: return {row_bytes((k + 1) / 2), ROOM, prepare, nullptr, nullptr, group};
    }
}

static void linear(const ds_op *op, const ds_step *step, ds_team *team) {
    int64_t rows = op->sampled ? step->sampled : step->tokens;
    if (rows <= 0 || op->n <= 0) return;
    int64_t pairs = (op->k + 1) / 2, blocks = (op->n + 15) / 16, groups = (blocks + GROUP - 1) / GROUP;
    int64_t kind = op->i[0], stride = op->stride ? op->stride : op->n, block = ds_panel_bytes(kind, op->k) / (int64_t)sizeof(ds_bf16);
    Linear l = {(const ds_bf16 *)op->w, (const float *)op->b, (float *)op->out, op->n, stride, blocks, block, pairs,
                ds_scales_bytes(kind, op->k), nullptr};
    Fetch fetch = plan_fetch(op, step, team);
    l.fetch = &fetch;
    const Format format = format_of(kind, op->i[1] != 0, op->k);
    const ds_bf16 *x = (const ds_bf16 *)op->x;

    // Sixteen rows are one tile of AMX: a panel holds full ones, as many as scratch has room for.
    int64_t height = least(PANEL, (DS_SCRATCH_BYTES - format.room) / format.row_bytes / 16 * 16);
    int64_t panels = (rows + height - 1) / height;
    // A chunk: an eighth of a thread's share, but not more than it takes to make the price of taking one vanish: 256 KB of
    // weights for one row, less where rows give each of them more work.
    int64_t bytes = GROUP * l.block * (int64_t)sizeof(ds_bf16);
    int64_t enough = (256 << 10) / (bytes * (1 + least(rows, height) / 8)) + 1;
    int64_t each = least(enough, panels * groups / (8 * team->threads) + 1);
    int64_t parts = (groups + each - 1) / each, chunks = panels * parts;

    // Activations are quantised once for all members, tile after tile in the first chunks, into y; of a few rows each member makes
    // its own sooner than it would wait for the others.
    const bool shared = format.tiles && op->y && team->threads > 1 && rows >= SHARED_ROWS;
    const int64_t tiles = shared ? format.tiles(height) : 0;
    const int64_t all = shared ? (panels - 1) * tiles + format.tiles(rows - (panels - 1) * height) : 0;

    const void *panel = nullptr;
    int64_t ready = -1;
    begin_linear();
    for (int64_t chunk; (chunk = ds_take(team) - all) < chunks;) {
        if (chunk < 0) {
            int64_t p = (chunk + all) / tiles, row0 = p * height;
            char *to = (char *)op->y + row0 * format.row_bytes;
            format.prepare_tile(x + row0 * op->k, least(height, rows - row0), op->k, (chunk + all) % tiles, to);
            __atomic_add_fetch(team->ready, 1, __ATOMIC_RELEASE);
            continue;
        }
        int64_t p = chunk / parts, row0 = p * height, height_here = least(height, rows - row0);
        if (p != ready) {
            if (shared) {
                for (int turn = 0; __atomic_load_n(team->ready, __ATOMIC_ACQUIRE) < all; turn++)
                    turn < TURNS ? ds_relax() : (void)sched_yield();
                panel = (const char *)op->y + row0 * format.row_bytes;
            } else {
                panel = format.prepare(x + row0 * op->k, height_here, op->k, team->scratch);
            }
            ready = p;
        }
        int64_t begin = chunk % parts * each, end = least(begin + each, groups);
        begin_share(&fetch, chunk, chunks);
        for (int64_t g = begin; g < end; g++) {
            // Chunks are taken in turn, more or less: this thread's next is so many further. There may be none: then nothing
            // comes of it, but that this group's last blocks, which are here, are asked for again.
            int64_t further = g + 1 < end ? g + 1 : (chunk + team->threads) % parts * each;
            int64_t then = least(further * GROUP, blocks - least(GROUP, blocks));
            format.group(l, g * GROUP, panel, row0, height_here, then, team->scratch);
        }
    }
    end_linear();
}
