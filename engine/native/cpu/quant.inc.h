// DS_LINEAR and DS_EMBED over quantised weights (quant.h). Included by linear.inc.h, once for each instruction set.
//
// A row of activations is quantised too, on the fly: each group of columns that share a scale of the weights (16, 32 or 64)
// to integers of 8 bits times a scale d_x of its own, its largest magnitude / 127. A group's dot product s is exact in 32 bits;
// then, in float32 and in the order of K,
//     sum = fma(s * d_x, d_w, sum)    and where weights have a minimum    sum = fma(d_x * (sum of the group's integers), m, sum)
// so that every instruction set with fused multiply-add computes the same bits, whatever the number of rows. A row's
// quantisation depends on that row alone. What is not finite among a row's activations makes all of its outputs NaN.
//
// Two TERMS: what rounding left of each value is quantised as well, to integers times d_x / 254, and that product is added to
// the sum after the first, group by group: activations of 16 bits for twice the work.
//
// The products are of unsigned weights with signed activations, as x86 has them; the weights' offset (8, 32 or 128) is taken
// off by starting s at minus the offset times the group's sum. AMX's tiles of bytes are not used: its machines have VNNI.

#if defined(__AVX512VNNI__)
enum { LANES = 16, QUANT_ROWS = 6, QUANT_UNITS = 2, QUANT_WIDE = 4 };  // 12 sums of each sort, 2 weights, an activation
#elif defined(__AVX512F__)
enum { LANES = 16, QUANT_ROWS = 4, QUANT_UNITS = 2, QUANT_WIDE = 4 };  // products on their way to sums need registers too
#elif defined(__AVX2__)
enum { LANES = 8, QUANT_ROWS = 4, QUANT_UNITS = 2, QUANT_WIDE = 4 };  // the float sums, used once a group, lie on the stack
#elif defined(__aarch64__)
enum { LANES = 4, QUANT_ROWS = 4, QUANT_UNITS = 4, QUANT_WIDE = 4 };
#else
enum { LANES = 4, QUANT_ROWS = 2, QUANT_UNITS = 4, QUANT_WIDE = 4 };
#endif
enum { UNITS = 16 / LANES };  // a unit is a register's worth of a panel's 16 outputs

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(4 * LANES)));
typedef uint16_t Float16s __attribute__((vector_size(2 * LANES)));

#define DS_QUANT static inline __attribute__((always_inline))

template <class T> DS_QUANT T load(const void *at) { T v; __builtin_memcpy(&v, at, sizeof v); return v; }
DS_QUANT Words spread_word(const void *at) { return Words{} + load<int32_t>(at); }
DS_QUANT Floats spread_float(const float *at) { return (Floats)spread_word(at); }  // as 0 + x it would be an addition

DS_QUANT Floats fused(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
    return a * b + c;
#endif
}

DS_QUANT float widen_half(uint16_t half) {
    uint32_t size = half & 0x7fff, bits = size << 13;  // read as a float: 2^-112 of it
    float scaled;
    if (size >= 0x7c00) bits += 0x70000000u;  // infinite or not a number: the largest exponent stays that
    memcpy(&scaled, &bits, 4);
    if (size < 0x7c00) scaled *= 0x1p112f;
    return half & 0x8000 ? -scaled : scaled;
}

// Float16 as float32.
DS_QUANT Floats widen_halves(const char *at) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
#elif defined(__AVX2__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
#else
    Bits half = __builtin_convertvector(load<Float16s>(at), Bits), size = half & 0x7fffu, bits = size << 13;
    Bits odd = (Bits)(size >= 0x7c00u);  // as in widen_half
    Bits value = (Bits)((Floats)bits * 0x1p112f);
    return (Floats)((odd & (bits + 0x70000000u)) | (~odd & value) | (half & 0x8000u) << 16);
#endif
}

// Small integers as float32: unsigned or signed bytes (T).
template <class T>
DS_QUANT Floats widen_bytes(const char *at) {
#if defined(__AVX512F__)
    __m128i bytes = _mm_loadu_si128((const __m128i *)at);
    return (Floats)_mm512_cvtepi32_ps(T(-1) < 0 ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__)
    __m128i bytes = _mm_loadl_epi64((const __m128i *)at);
    return (Floats)_mm256_cvtepi32_ps(T(-1) < 0 ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#else
    Floats v;
    for (int i = 0; i < LANES; i++) v[i] = (float)(T)at[i];
    return v;
#endif
}

// ---- dot products ----------------------------------------------------------------------------------------------------
// Of four unsigned bytes with four signed ones in each lane; MOST is the largest weight, WORDS how many such are summed.

#if !defined(__AVX512VNNI__)
DS_QUANT Words multiply_shorts(Shorts a, Shorts b) {  // neighbouring products are added, in 32 bits
#if defined(__AVX512F__)
    return (Words)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
    return (Words)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
    return (Words)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    Words low = ((Words)a << 16 >> 16) * ((Words)b << 16 >> 16), high = ((Words)a >> 16) * ((Words)b >> 16);
    return low + high;
#endif
}

DS_QUANT Shorts even_bytes(Words w) { return (Shorts)((Halves)w & 0xff); }
DS_QUANT Shorts odd_bytes(Words w) { return (Shorts)((Halves)w >> 8); }
DS_QUANT Shorts even_signed(Words x) { return (Shorts)x << 8 >> 8; }
DS_QUANT Shorts odd_signed(Words x) { return (Shorts)x >> 8; }

// Neighbouring products are added, in 16 bits: exact up to weights of 127.
DS_QUANT Shorts multiply_bytes(Words w, Words x) {
#if defined(__AVX512F__)
    return (Shorts)_mm512_maddubs_epi16((__m512i)w, (__m512i)x);
#elif defined(__AVX2__)
    return (Shorts)_mm256_maddubs_epi16((__m256i)w, (__m256i)x);
#else
    return even_bytes(w) * even_signed(x) + odd_bytes(w) * odd_signed(x);
#endif
}

DS_QUANT Words add_pairs(Shorts v) { return multiply_shorts(v, Shorts{} + (int16_t)1); }
#endif

template <int MOST, int WORDS>
struct Dot {
#if defined(__AVX512VNNI__)
    Words sum;
    static inline Dot begin(int32_t start) { return {Words{} + start}; }
    void add(Words w, Words x) { sum = (Words)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x); }
    Words end(int32_t) const { return sum; }
#else
    static const bool SHORT = MOST * 127 * 2 * WORDS < 32768;  // sums of 16 bits hold them all
    Words sum;
    static inline Dot begin(int32_t start) { return {Words{} + (SHORT ? 0 : start)}; }
    void add(Words w, Words x) {
        if constexpr (SHORT) sum = (Words)((Shorts)sum + multiply_bytes(w, x));
        else if constexpr (MOST * 127 * 2 < 32768) sum += add_pairs(multiply_bytes(w, x));
        else sum += multiply_shorts(even_bytes(w), even_signed(x)) + multiply_shorts(odd_bytes(w), odd_signed(x));
    }
    Words end(int32_t start) const { return SHORT ? add_pairs((Shorts)sum) + start : sum; }
#endif
};

// ---- kinds of weights ------------------------------------------------------------------------------------------------
// A stretch is what is stored together: PARTS groups of GROUP columns in QUANTS bytes of a panel. `at` points into a panel, at
// a unit's first output.

struct NibbleQuants {
    enum { GROUP = 32, PARTS = 1, MOST = 15, QUANTS = 256 };
    static constexpr int word(int i) { return i / 2 + i % 2 * 4; }  // a vector's low halves, its high halves, the next vector
    DS_QUANT Words weights(const char *at, int, int word) {
        Bits raw = load<Bits>(at + word % 4 * 64);
        return (Words)((word < 4 ? raw : raw >> 4) & 0x0f0f0f0fu);
    }
};

struct ByteQuants {
    static constexpr int word(int i) { return i; }
    DS_QUANT Words weights(const char *at, int, int word) { return load<Words>(at + word * 64); }
};

struct OneScale {  // of a group, and no minimum
    enum { MINIMUM = 0 };
    DS_QUANT Floats scale(const char *at, int64_t g, int lane) { return widen_halves(at + g * 32 + lane * 2); }
};

struct Q4_0 : NibbleQuants, OneScale {
    enum { OFFSET = 8 };
};

struct Q4_1 : NibbleQuants {
    enum { OFFSET = 0, MINIMUM = 1 };
    DS_QUANT Floats scale(const char *at, int64_t g, int lane) { return widen_halves(at + g * 64 + lane * 2); }
    DS_QUANT Floats minimum(const char *at, int64_t g, int lane) { return widen_halves(at + g * 64 + 32 + lane * 2); }
};

struct Q8_0 : ByteQuants, OneScale {
    enum { GROUP = 32, PARTS = 1, OFFSET = 128, MOST = 255, QUANTS = 512 };
};

struct Int8 : ByteQuants, OneScale {
    enum { GROUP = 64, PARTS = 1, OFFSET = 128, MOST = 255, QUANTS = 1024 };
};

struct Q4_K : NibbleQuants {
    enum { OFFSET = 0, MINIMUM = 1 };
    DS_QUANT Floats scale(const char *at, int64_t g, int lane) {
        const char *block = at + g / 8 * 320;
        return widen_halves(block + lane * 2) * widen_bytes<uint8_t>(block + 64 + g % 8 * 32 + lane);
    }
    DS_QUANT Floats minimum(const char *at, int64_t g, int lane) {
        const char *block = at + g / 8 * 320;
        return -(widen_halves(block + 32 + lane * 2) * widen_bytes<uint8_t>(block + 80 + g % 8 * 32 + lane));
    }
};

struct Q6_K {
    enum { GROUP = 16, PARTS = 2, OFFSET = 32, MOST = 63, QUANTS = 384, MINIMUM = 0 };
    static constexpr int word(int i) { return i; }
    DS_QUANT Words weights(const char *at, int part, int word) {
        Bits low = load<Bits>(at + word * 64), high = load<Bits>(at + 256 + word / 2 * 64);
        low = (part ? low >> 4 : low) & 0x0f0f0f0fu;
        high = part ? (word % 2 ? high >> 2 : high) : (word % 2 ? high << 2 : high << 4);
        return (Words)(low | (high & 0x30303030u));
    }
    DS_QUANT Floats scale(const char *at, int64_t g, int lane) {
        const char *block = at + g / 16 * 288;
        return widen_halves(block + lane * 2) * widen_bytes<int8_t>(block + 32 + g % 16 * 16 + lane);
    }
};

// ---- activations -----------------------------------------------------------------------------------------------------

template <int GROUP>
struct Quantised {  // a group of one row
    int8_t q[GROUP];
    float scale, sum;  // d_x, and d_x times the sum of q
    int32_t start;     // minus the weights' offset times the sum of q
    int32_t none;
};

// A tile of rows is [groups][rows] of these. Tiles are as equal in height as can be.
static inline int64_t tiles_of(int64_t rows) { return (rows + QUANT_ROWS - 1) / QUANT_ROWS; }

// Where the largest magnitude is below 2^-100, 127 over it could overflow: such a group counts as zero.
enum { SMALLEST = (127 - 100) << 7, INFINITE = 0x7f80 };  // bf16

// 127 over a largest magnitude, given as bf16, and it as a float; NaN where it is not finite, which goes on to all outputs.
DS_QUANT float inverse_of(int size, float *largest) {
    uint32_t bits = (uint32_t)size << 16;
    memcpy(largest, &bits, 4);
    if (size >= SMALLEST && size < INFINITE) return 127.0f / *largest;
    *largest = size < SMALLEST ? 0 : NAN;
    return 0;
}

// The integers of a group, x * 127 / largest rounded to nearest, ties to even. Returns their sum.
#if defined(__AVX512F__)
// Compilers make four times as many instructions of the plain form below, which shows: every member of a team prepares a panel.
template <int GROUP>
DS_QUANT int32_t quantise_values(const ds_bf16 *x, int64_t columns, int8_t *q, float *largest) {
    __m256i values[GROUP / 16], most = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int i = 0; i < GROUP / 16; i++) {
        int64_t many = columns - 16 * i;
        __mmask16 mask = many >= 16 ? 0xffff : many > 0 ? (__mmask16)((1u << many) - 1) : 0;
        values[i] = _mm256_maskz_loadu_epi16(mask, x + 16 * i);
        most = _mm256_max_epu16(most, _mm256_and_si256(values[i], _mm256_set1_epi16(0x7fff)));
    }
    __m128i half = _mm_max_epu16(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    int size = 0xffff - (_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi16(-1)))) & 0xffff);
    __m512 inverse = _mm512_set1_ps(inverse_of(size, largest));
    __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < GROUP / 16; i++) {
        __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values[i]), 16));
        __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(value, inverse));
        sum = _mm512_add_epi32(sum, rounded);
        _mm_storeu_si128((__m128i *)(q + 16 * i), _mm512_cvtepi32_epi8(rounded));
    }
    return _mm512_reduce_add_epi32(sum);
}
#else
template <int GROUP>
DS_QUANT int32_t quantise_values(const ds_bf16 *x, int64_t columns, int8_t *q, float *largest) {
    ds_bf16 whole[GROUP] = {};
    if (columns < GROUP) {
        memcpy(whole, x, columns * sizeof(ds_bf16));
        x = whole;
    }
    int16_t size = 0;  // magnitudes of bf16 are ordered as integers are
    for (int i = 0; i < GROUP; i++) {
        int16_t here = (int16_t)(x[i] & 0x7fff);
        size = here > size ? here : size;
    }
    float inverse = inverse_of(size, largest);
    int32_t sum = 0;
    int8_t rounded[GROUP];
    for (int i = 0; i < GROUP; i++) {
        uint32_t bits = (uint32_t)x[i] << 16;
        float value;
        __builtin_memcpy(&value, &bits, 4);
        value = value * inverse + 12582912.0f;  // 1.5 * 2^23: leaves the nearest integer, ties to even, in the low bits
        __builtin_memcpy(&bits, &value, 4);
        rounded[i] = (int8_t)bits;
        sum += rounded[i];
    }
    memcpy(q, rounded, GROUP);
    return sum;
}
#endif

// What rounding left of a group's values, likewise.
template <int GROUP, int OFFSET>
DS_QUANT void quantise_rest(const ds_bf16 *x, int64_t columns, const Quantised<GROUP> &first, Quantised<GROUP> *to) {
    typedef int8_t Bytes __attribute__((vector_size(LANES)));
    const float unit = first.scale * (1 / 254.0f), inverse = unit > 0 ? 1 / unit : 0;
    ds_bf16 whole[GROUP];
    if (columns < GROUP) {
        memset(whole, 0, sizeof whole);
        memcpy(whole, x, columns * sizeof(ds_bf16));
        x = whole;
    }
    Words sums = Words{};
#pragma GCC unroll 4
    for (int i = 0; i < GROUP; i += LANES) {
        Floats value = (Floats)(__builtin_convertvector(load<Float16s>(x + i), Bits) << 16);
        Floats taken = __builtin_convertvector(__builtin_convertvector(load<Bytes>(first.q + i), Words), Floats) * first.scale;
        value = (value - taken) * inverse;
        // The first rounding was by 127 / largest, itself rounded: a little more than half of d_x may be left.
        value = value > 127.0f ? Floats{} + 127.0f : value;
        value = value < -127.0f ? Floats{} - 127.0f : value;
        Words rounded = (Words)(value + 12582912.0f) - 0x4b400000;  // 1.5 * 2^23, as a float and as its bits
        sums += rounded;
        Bytes bytes = __builtin_convertvector(rounded, Bytes);
        memcpy(to->q + i, &bytes, sizeof bytes);
    }
    int32_t sum = 0;
    for (int i = 0; i < LANES; i++) sum += sums[i];
    to->scale = unit;
    to->sum = unit * (float)sum;
    to->start = -OFFSET * sum;
    to->none = 0;
}

template <int GROUP, int OFFSET, int TERMS>
DS_QUANT void quantise(const ds_bf16 *x, int64_t columns, Quantised<GROUP> *to) {
    float largest;
    int32_t sum = quantise_values<GROUP>(x, columns, to->q, &largest);
    to->scale = largest * (1 / 127.0f);
    to->sum = to->scale * (float)sum;
    to->start = -OFFSET * sum;
    to->none = 0;
    if constexpr (TERMS == 2) quantise_rest<GROUP, OFFSET>(x, columns, *to, to + 1);
}

// Tile `tile` of a panel of `rows` rows, into the panel `to`.
template <class W, int TERMS>
static void quant_tile_prepare(const ds_bf16 *x, int64_t rows, int64_t k, int64_t tile, void *panel) {
    typedef Quantised<W::GROUP> Group;
    const int64_t groups = (k + W::GROUP - 1) / W::GROUP, tiles = tiles_of(rows);
    const int64_t first = rows * tile / tiles, height = rows * (tile + 1) / tiles - first;
    Group *to = (Group *)panel + first * groups * TERMS;
    for (int64_t r = 0; r < height; r++) {
        const ds_bf16 *from = x + (first + r) * k;
        for (int64_t g = 0; g < k / W::GROUP; g++)
            quantise<W::GROUP, W::OFFSET, TERMS>(from + g * W::GROUP, W::GROUP, to + (g * height + r) * TERMS);
        if (int64_t rest = k % W::GROUP)
            quantise<W::GROUP, W::OFFSET, TERMS>(from + k - rest, rest, to + ((groups - 1) * height + r) * TERMS);
    }
}

template <class W, int TERMS>
static const void *quant_prepare(const ds_bf16 *x, int64_t rows, int64_t k, void *scratch) {
    for (int64_t tile = 0; tile < tiles_of(rows); tile++) quant_tile_prepare<W, TERMS>(x, rows, k, tile, scratch);
    return scratch;
}

// ---- tiles -----------------------------------------------------------------------------------------------------------

// R rows by U units, from panel `first` on; units beyond the last panel are computed as that panel's and not stored. `ahead`:
// bytes from a panel to one that will be read after this.
template <class W, int TERMS, int R, int U>
static void quant_tile(const Linear &l, int64_t first, const Quantised<W::GROUP> *x, int64_t row, int64_t ahead) {
    typedef Dot<W::MOST, W::GROUP / 4> D;
    const char *scales[U], *quants[U];
    int64_t groups = (2 * l.pairs + W::GROUP - 1) / W::GROUP;
    for (int u = 0; u < U; u++) {
        scales[u] = (const char *)l.w + least(first + u / UNITS, l.blocks - 1) * l.block * (int64_t)sizeof(ds_bf16);
        quants[u] = scales[u] + l.scales + u % UNITS * 4 * LANES;
    }
    // What will be read next is asked for along the way. One row of weights that need no unpacking is done with a vector so
    // soon that there are always loads enough under way (asking took it 6 % longer on a Zen 5, where it saves nibbles 18 %).
    const bool ask = R > 1 || W::MOST < 255;
    enum { LINES = W::QUANTS / W::PARTS / 64 };
    Lines lines = R > 1 ? next_lines(l.fetch, groups * TERMS * W::GROUP / 4, x) : Lines{};
    Floats sums[R][U];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int u = 0; u < U; u++) sums[r][u] = Floats{};
    for (int64_t g = 0; g < groups;) {
#pragma GCC unroll 8
        for (int step = 0; step < W::PARTS * TERMS; step++) {
            const int part = step / TERMS;
            D dots[R][U];
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
#pragma GCC unroll 8
                for (int u = 0; u < U; u++) dots[r][u] = D::begin(W::OFFSET != 0 ? x[r * TERMS].start : 0);
#pragma GCC unroll 16
            for (int i = 0; i < W::GROUP / 4; i++) {
                Words w[U];
#pragma GCC unroll 8
                for (int u = 0; u < U; u++) w[u] = W::weights(quants[u], part, W::word(i));
                if (ask && step % TERMS == 0 && i < LINES)
#pragma GCC unroll 8
                    for (int u = 0; u < U; u += UNITS) __builtin_prefetch(quants[u] + ahead + (part * LINES + i) * 64, 0, 2);
                if (R > 1) {
                    __builtin_prefetch(lines.at, 0, 2);
                    lines.at += --lines.many > 0 ? 64 : 0;
                }
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    Words four = spread_word(x[r * TERMS].q + 4 * W::word(i));
#pragma GCC unroll 8
                    for (int u = 0; u < U; u++) dots[r][u].add(w[u], four);
                }
            }
#pragma GCC unroll 8
            for (int u = 0; u < U; u++) {
                Floats scale = W::scale(scales[u], g, u % UNITS * LANES);
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) {
                    Floats dot = __builtin_convertvector(dots[r][u].end(W::OFFSET != 0 ? x[r * TERMS].start : 0), Floats);
                    sums[r][u] = fused(dot * spread_float(&x[r * TERMS].scale), scale, sums[r][u]);
                }
                if constexpr (W::MINIMUM) {
                    Floats minimum = W::minimum(scales[u], g, u % UNITS * LANES);
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) sums[r][u] = fused(spread_float(&x[r * TERMS].sum), minimum, sums[r][u]);
                }
            }
            // Else what the parts have in common would be kept from one to the next, for which there are no registers.
            __asm__ volatile("" : : : "memory");
            x++;
            if ((step + 1) % TERMS == 0) g++, x += (R - 1) * TERMS;
        }
        for (int u = 0; u < U; u++) quants[u] += W::QUANTS;
    }
#pragma GCC unroll 8
    for (int u = 0; u < U; u++) {
        int64_t column = first * 16 + u * LANES, columns = least(LANES, l.n - column);
        if (columns <= 0) return;
        float *out = l.out + row * l.stride + column, values[LANES] = {};
        if (l.bias) memcpy(values, l.bias + column, columns * sizeof(float));
        Floats bias = load<Floats>(values);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++, out += l.stride) {
            Floats sum = l.bias ? sums[r][u] + bias : sums[r][u];  // not 0 + sum, which would lose a minus zero
            if (columns == LANES) __builtin_memcpy(out, &sum, sizeof sum);
            else __builtin_memcpy(values, &sum, sizeof sum), memcpy(out, values, columns * sizeof(float));
        }
    }
}

template <class W, int TERMS, int R>
static void quant_tile_of(const Linear &l, int64_t rows, int64_t first, const Quantised<W::GROUP> *x, int64_t row,
                          int64_t ahead) {
    if (rows == R) quant_tile<W, TERMS, R, R == 1 ? QUANT_WIDE : QUANT_UNITS>(l, first, x, row, ahead);
    else if constexpr (R > 1) quant_tile_of<W, TERMS, R - 1>(l, rows, first, x, row, ahead);
}

template <class W, int TERMS>
static void quant_group(const Linear &l, int64_t first, const void *panel, int64_t row0, int64_t rows, int64_t then, void *) {
    typedef Quantised<W::GROUP> Group;
    int64_t groups = (2 * l.pairs + W::GROUP - 1) / W::GROUP, tiles = tiles_of(rows), end = least(first + GROUP, l.blocks);
    const int64_t panels = (rows == 1 ? QUANT_WIDE : QUANT_UNITS) / UNITS;
    for (int64_t b = first; b < end; b += panels) {
        const int64_t ahead = ((b + panels < end ? b + panels : then) - b) * l.block * (int64_t)sizeof(ds_bf16);
        for (int64_t t = 0; t < tiles; t++) {
            int64_t from = rows * t / tiles, to = rows * (t + 1) / tiles;
            const Group *x = (const Group *)panel + from * groups * TERMS;
            quant_tile_of<W, TERMS, QUANT_ROWS>(l, to - from, b, x, row0 + from, ahead);
        }
    }
}

// ---- rows of the matrix ----------------------------------------------------------------------------------------------

// The k weights of row `row` as float32, exactly what GGML's blocks say.
static void dequantise_row(int64_t kind, const void *w, int64_t row, int64_t k, float *out) {
    const char *scales = (const char *)w + row / 16 * ds_panel_bytes(kind, k), *quants = scales + ds_scales_bytes(kind, k);
    const int64_t r = row % 16;
    auto half = [&](int64_t at) { return widen_half(load<uint16_t>(scales + at + 2 * r)); };
    auto byte = [&](int64_t vector, int64_t column) { return (uint8_t)quants[vector * 64 + 4 * r + column % 4]; };
    auto nibble = [&](int64_t vector, int64_t column) {  // of 32 columns that begin at a vector
        int both = byte(vector + column % 16 / 4, column);
        return column % 32 < 16 ? both & 15 : both >> 4;
    };
    for (int64_t i = 0; i < k; i++) {
        int64_t g = i / 32, block = i / 256;
        if (kind == DS_Q4_0) out[i] = half(g * 32) * (float)(nibble(g * 4, i) - 8);
        if (kind == DS_Q4_1) out[i] = half(g * 64) * (float)nibble(g * 4, i) + half(g * 64 + 32);
        if (kind == DS_Q8_0) out[i] = half(g * 32) * (float)(byte(i / 4, i) - 128);
        if (kind == DS_INT8) out[i] = half(i / 64 * 32) * (float)(byte(i / 4, i) - 128);
        if (kind == DS_Q4_K) {
            const char *small = scales + block * 320 + 64 + g % 8 * 32 + r;
            float scale = half(block * 320) * (float)(uint8_t)small[0];
            out[i] = scale * (float)nibble(g * 4, i) - half(block * 320 + 32) * (float)(uint8_t)small[16];
        }
        if (kind == DS_Q6_K) {
            int upper = byte(g * 6 + 4 + i % 16 / 8, i) >> (i % 32 / 16 * 4 + i % 8 / 4 * 2) & 3;
            float scale = half(block * 288) * (float)(int8_t)scales[block * 288 + 32 + i % 256 / 16 * 16 + r];
            out[i] = scale * (float)((nibble(g * 6, i) | upper << 4) - 32);
        }
    }
}
