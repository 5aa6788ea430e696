// Packs weights into the layout of ds_packed_bytes: [ceil(n / 16)][ceil(k / 2)][16][2] bf16.
#include "cpu.h"

#include <string.h>

static const int64_t ROWS = 16, SPAN = 32;  // a square of 16 rows x 32 columns is read row by row and written as 16 pairs of 16 rows

static inline ds_bf16 round_to_bf16(uint32_t bits) {
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even; overflow gives infinity
    uint32_t quiet = (bits >> 16) | 0x40;                           // a NaN stays one: adding could make it an infinity
    return (ds_bf16)((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

// Rows [n0, n1) of a matrix [n, k], `src` and `dst` being where the whole matrix begins; n0 is a multiple of 16 and n1 too,
// or n. `is_float`: src is float32, else bf16; row-major, at any address. Ranges may be packed by several threads at once.
extern "C" void ds_pack_bf16(ds_bf16 *dst, const void *src, int64_t n, int64_t k, int is_float, int64_t n0, int64_t n1) {
    const char *from = (const char *)src;
    int64_t pairs = (k + 1) / 2, size = is_float ? 4 : 2;
    for (int64_t row = n0; row < n1; row += ROWS) {
        ds_bf16 *block = dst + row / ROWS * pairs * 32;
        int64_t rows = n - row < ROWS ? n - row : ROWS;
        for (int64_t column = 0; column < k; column += SPAN) {
            int64_t columns = k - column < SPAN ? k - column : SPAN;
            uint32_t square[ROWS][SPAN / 2] = {};  // pairs
            for (int64_t r = 0; r < rows; r++) {
                const char *line = from + ((row + r) * k + column) * size;
                if (!is_float) {
                    memcpy(square[r], line, columns * 2);
                    continue;
                }
                uint32_t bits[SPAN] = {};
                ds_bf16 rounded[SPAN];
                memcpy(bits, line, columns * 4);
                for (int i = 0; i < SPAN; i++) rounded[i] = round_to_bf16(bits[i]);
                memcpy(square[r], rounded, sizeof rounded);
            }
            uint32_t *to = (uint32_t *)block + column / 2 * ROWS;
            for (int64_t pair = 0; pair < (columns + 1) / 2; pair++)
                for (int r = 0; r < ROWS; r++) to[pair * ROWS + r] = square[r][pair];
        }
    }
}
