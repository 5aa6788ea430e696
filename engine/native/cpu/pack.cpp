// Packs weights into the panels that quant.h tells of.
#include "quant.h"

#include <math.h>
#include <stddef.h>
#include <string.h>

static const int64_t ROWS = 16;

static inline uint32_t load32(const void *at) {
    uint32_t word;
    memcpy(&word, at, 4);
    return word;
}

// ---- bfloat16 --------------------------------------------------------------------------------------------------------

typedef uint16_t bf16;

static const int64_t SPAN = 32;  // a square of 16 rows x 32 columns is read row by row and written as 16 pairs of 16 rows

static inline bf16 round_to_bf16(uint32_t bits) {
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even; overflow gives infinity
    uint32_t quiet = (bits >> 16) | 0x40;                           // a NaN stays one: adding could make it an infinity
    return (bf16)((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

static void pack_bf16(char *panel, const char *from, int64_t rows, int64_t k, int is_float) {
    int64_t size = is_float ? 4 : 2;
    for (int64_t column = 0; column < k; column += SPAN) {
        int64_t columns = k - column < SPAN ? k - column : SPAN;
        uint32_t square[ROWS][SPAN / 2] = {};  // pairs
        for (int64_t r = 0; r < rows; r++) {
            const char *line = from + (r * k + column) * size;
            if (!is_float) {
                memcpy(square[r], line, columns * 2);
                continue;
            }
            uint32_t bits[SPAN] = {};
            bf16 rounded[SPAN];
            memcpy(bits, line, columns * 4);
            for (int i = 0; i < SPAN; i++) rounded[i] = round_to_bf16(bits[i]);
            memcpy(square[r], rounded, sizeof rounded);
        }
        uint32_t *to = (uint32_t *)panel + column / 2 * ROWS;
        for (int64_t pair = 0; pair < (columns + 1) / 2; pair++)
            for (int r = 0; r < ROWS; r++) to[pair * ROWS + r] = square[r][pair];
    }
}

// ---- int8 ------------------------------------------------------------------------------------------------------------
// Symmetric, a scale for 64 columns of a row: the largest magnitude / 127.

// The least float16 that is not below `v` >= 0: what is quantised with it never clips. Infinity above 65504; NaN stays NaN.
static inline uint16_t f16_not_below(float v) {
    if (!(v <= 65504.0f)) return v != v ? 0x7e00 : 0x7c00;
    if (v < 0x1p-14f) return (uint16_t)ceilf(v * 0x1p24f);  // subnormal: a multiple of 2^-24; exact, being a power of two
    uint32_t bits;
    memcpy(&bits, &v, 4);
    return (uint16_t)((bits + 0x1fff - (112u << 23)) >> 13);  // the exponent's bias from 127 to 15, 10 of 23 bits kept
}

// Of one that is not negative.
static inline float f16_value(uint16_t half) {
    if (half >= 0x7c00) return half > 0x7c00 ? NAN : INFINITY;
    if (half < 0x400) return (float)half * 0x1p-24f;
    uint32_t bits = ((uint32_t)half << 13) + (112u << 23);
    float v;
    memcpy(&v, &bits, 4);
    return v;
}

static void quantise_group(const float *w, uint16_t *scale, uint8_t *q) {
    float most = 0, nan = 0;
    for (int i = 0; i < 64; i++) {
        float size = fabsf(w[i]);
        most = size > most ? size : most;
        nan += w[i] - w[i];  // of an infinity too
    }
    *scale = f16_not_below(most / 127 + nan);
    float d = f16_value(*scale);
    if (!(d > 0 && d <= 65504.0f)) {  // all zero, or nothing that a float16 can scale: then d says so, whatever the quants
        memset(q, 128, 64);
        return;
    }
    for (int i = 0; i < 64; i++) {
        float rounded = w[i] / d + 12582912.0f;  // 1.5 * 2^23: leaves the nearest integer, ties to even, in the low bits
        uint32_t bits;
        memcpy(&bits, &rounded, 4);
        q[i] = (uint8_t)(bits + 128);
    }
}

static void pack_int8(char *panel, const char *from, int64_t rows, int64_t k, int is_float) {
    uint16_t *scales = (uint16_t *)panel;
    char *quants = panel + ds_scales_bytes(DS_INT8, k);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t column = 0, g = 0; column < k; column += 64, g++) {
            int64_t columns = k - column < 64 ? k - column : 64;
            float w[64] = {};
            uint8_t q[64];
            if (is_float) {
                memcpy(w, from + (r * k + column) * 4, columns * 4);
            } else {
                bf16 narrow[64] = {};
                uint32_t wide[64];
                memcpy(narrow, from + (r * k + column) * 2, columns * 2);
                for (int i = 0; i < 64; i++) wide[i] = (uint32_t)narrow[i] << 16;
                memcpy(w, wide, sizeof w);
            }
            quantise_group(w, &scales[g * ROWS + r], q);
            for (int v = 0; v < 16; v++) memcpy(quants + ((g * 16 + v) * ROWS + r) * 4, q + 4 * v, 4);
        }
}

// ---- GGML's blocks ---------------------------------------------------------------------------------------------------
// One row of a panel; `from` are the row's blocks, `r` is its place among the 16.

static const uint32_t LOW = 0x0f0f0f0f, HIGH = 0xf0f0f0f0;

static void put_scale(char *scales, int64_t at, int64_t r, const uint8_t *from) {
    memcpy(scales + (at * ROWS + r) * 2, from, 2);
}

static void put_word(char *quants, int64_t vector, int64_t r, uint32_t word) {
    memcpy(quants + (vector * ROWS + r) * 4, &word, 4);
}

static void pack_q4_0(char *scales, char *quants, const uint8_t *from, int64_t k, int64_t r) {
    for (int64_t g = 0; g < k / 32; g++, from += 18) {  // d, 16 bytes
        put_scale(scales, g, r, from);
        for (int v = 0; v < 4; v++) put_word(quants, g * 4 + v, r, load32(from + 2 + 4 * v));
    }
}

static void pack_q4_1(char *scales, char *quants, const uint8_t *from, int64_t k, int64_t r) {
    for (int64_t g = 0; g < k / 32; g++, from += 20) {  // d, m, 16 bytes
        put_scale(scales, 2 * g, r, from);
        put_scale(scales, 2 * g + 1, r, from + 2);
        for (int v = 0; v < 4; v++) put_word(quants, g * 4 + v, r, load32(from + 4 + 4 * v));
    }
}

static void pack_q8_0(char *scales, char *quants, const uint8_t *from, int64_t k, int64_t r) {
    for (int64_t g = 0; g < k / 32; g++, from += 34) {  // d, 32 signed bytes
        put_scale(scales, g, r, from);
        for (int v = 0; v < 8; v++) put_word(quants, g * 8 + v, r, load32(from + 2 + 4 * v) ^ 0x80808080);
    }
}

static void pack_q4_k(char *scales, char *quants, const uint8_t *from, int64_t k, int64_t r) {
    for (int64_t b = 0; b < k / 256; b++, from += 144, scales += 320, quants += 2048) {  // D, M, 12 bytes of scales, 128 bytes
        put_scale(scales, 0, r, from);
        put_scale(scales, 1, r, from + 2);
        const uint8_t *six = from + 4, *nibbles = from + 16;
        for (int g = 0; g < 8; g++) {
            // Scales and minima of the first four stand whole; of the last four the upper two bits stand above those.
            int s = g < 4 ? six[g] & 63 : (six[g + 4] & 15) | (six[g - 4] >> 6 << 4);
            int m = g < 4 ? six[g + 4] & 63 : six[g + 4] >> 4 | (six[g] >> 6 << 4);
            scales[64 + g * 32 + r] = (char)s;
            scales[64 + g * 32 + 16 + r] = (char)m;
        }
        for (int pair = 0; pair < 4; pair++, nibbles += 32)  // 32 bytes: the low halves are one group, the high halves the next
            for (int v = 0; v < 4; v++) {
                uint32_t first = load32(nibbles + 4 * v), second = load32(nibbles + 16 + 4 * v);
                put_word(quants, pair * 8 + v, r, (first & LOW) | (second & LOW) << 4);
                put_word(quants, pair * 8 + 4 + v, r, (first >> 4 & LOW) | (second & HIGH));
            }
    }
}

static void pack_q6_k(char *scales, char *quants, const uint8_t *from, int64_t k, int64_t r) {
    for (int64_t b = 0; b < k / 256; b++, from += 210, scales += 288, quants += 3072) {  // 128, 64 and 16 bytes, D
        put_scale(scales, 0, r, from + 208);
        for (int g = 0; g < 16; g++) scales[32 + g * 16 + r] = (char)from[192 + g];
        for (int g = 0; g < 8; g++) {
            // Each half of the block: 64 bytes whose low halves are two groups and whose high halves are two more, and 32
            // bytes with two bits for each of the four.
            const uint8_t *low = from + g / 4 * 64 + g % 2 * 32, *high = from + 128 + g / 4 * 32;
            uint32_t nibble[8], upper[8];  // of columns 4 i to 4 i + 3
            for (int i = 0; i < 8; i++) {
                nibble[i] = load32(low + 4 * i) >> (g % 4 / 2 * 4) & LOW;
                upper[i] = load32(high + 4 * i) >> (g % 4 * 2) & 0x03030303;
            }
            for (int v = 0; v < 4; v++) put_word(quants, g * 6 + v, r, nibble[v] | nibble[v + 4] << 4);
            for (int u = 0; u < 2; u++) {
                uint32_t word = upper[2 * u] | upper[2 * u + 1] << 2 | upper[2 * u + 4] << 4 | upper[2 * u + 5] << 6;
                put_word(quants, g * 6 + 4 + u, r, word);
            }
        }
    }
}

// ---- all -------------------------------------------------------------------------------------------------------------

struct Stored {  // a GGML block
    int64_t columns, bytes;
    void (*pack_row)(char *scales, char *quants, const uint8_t *from, int64_t k, int64_t r);
};

static Stored stored(int kind) {
    switch (kind) {
        case DS_Q4_0: return {32, 18, pack_q4_0};
        case DS_Q4_1: return {32, 20, pack_q4_1};
        case DS_Q8_0: return {32, 34, pack_q8_0};
        case DS_Q4_K: return {256, 144, pack_q4_k};
        case DS_Q6_K: return {256, 210, pack_q6_k};
        default: return {};
    }
}

// Rows [n0, n1) of a matrix [n, k], `src` and `dst` being where the whole matrix begins; n0 is a multiple of 16 and n1 too,
// or n. Source rows are contiguous, at any address. DS_BF16 and DS_INT8: float32 where `is_float`, else bf16. The others: that
// type's GGML blocks, k being a multiple of a block. Ranges may be packed by several threads at once.
extern "C" void ds_pack(int kind, void *dst, const void *src, int64_t n, int64_t k, int is_float, int64_t n0, int64_t n1) {
    int64_t panel_bytes = ds_panel_bytes(kind, k);
    for (int64_t row = n0; row < n1; row += ROWS) {
        char *panel = (char *)dst + row / ROWS * panel_bytes;
        int64_t rows = n - row < ROWS ? n - row : ROWS;
        if (kind == DS_BF16) {
            pack_bf16(panel, (const char *)src + row * k * (is_float ? 4 : 2), rows, k, is_float);
            continue;
        }
        char *quants = panel + ds_scales_bytes(kind, k);
        // Scales of zero are what makes rows and columns beyond the matrix nothing.
        if (rows < ROWS || k % ds_panel_of(kind).columns) memset(panel, 0, panel_bytes);
        memset(quants - 64, 0, 64);  // what rounding the scales up to 64 bytes leaves unwritten
        if (kind == DS_INT8) {
            pack_int8(panel, (const char *)src + row * k * (is_float ? 4 : 2), rows, k, is_float);
            continue;
        }
        Stored from = stored(kind);
        for (int64_t r = 0; r < rows; r++)
            from.pack_row(panel, quants, (const uint8_t *)src + (row + r) * (k / from.columns) * from.bytes, k, r);
    }
}

// Columns of a group of a kind's weights: a matrix of GGML's kinds has some whole ones.
extern "C" int64_t ds_group_columns(int kind) { return ds_panel_of(kind).columns; }

// Of a packed matrix [n, k].
extern "C" int64_t ds_packed_bytes(int kind, int64_t n, int64_t k) { return (n + ROWS - 1) / ROWS * ds_panel_bytes(kind, k); }
