// How weights lie in memory: panels of 16 rows of the matrix (16 outputs), as the kernels read them. Rows and columns that
// a panel has beyond the matrix contribute exactly zero.
//
// A panel of bf16 weights is [ceil(k / 2)][16][2] bf16. A quantised one is first all of its scales, [groups] as told below,
// rounded up to 64 bytes, and then all of its quants, [groups] too, in vectors of 64 bytes: byte 4 o + j belongs to output o.
// What the dot product of four bytes with four bytes takes at once are four neighbouring columns.
//
//           a group of columns: scales of 16 outputs              its quants                               a weight
//   q4_0     32: d f16 [16]                                       4 vectors of nibbles                      d (q - 8)
//   q4_1     32: d f16 [16], m f16 [16]                           4 vectors of nibbles                      d q + m
//   q8_0     32: d f16 [16]                                       8 vectors of bytes                        d (q - 128)
//   q4_k    256: D f16 [16], M f16 [16], 8 of (s u8 [16], m u8 [16])   8 of 4 vectors of nibbles            D s q - M m
//   q6_k    256: D f16 [16], 16 of s i8 [16]                      8 of (4 vectors of nibbles, 2 of upper bits)  D s (q - 32)
//   int8     64: d f16 [16]                                       16 vectors of bytes                       d (q - 128)
//
// Byte vector v holds columns 4 v + j. Nibble vector v of 32 columns holds columns 4 v + j in the low halves and 16 + 4 v + j
// in the high halves, as GGML's blocks of 32 do, so that these are packed by copying words. In q6_k, vector u of the upper
// two bits holds, from the lowest bits on, those of columns 8 u + j, 8 u + 4 + j, 16 + 8 u + j and 16 + 8 u + 4 + j.
#pragma once
#include <stdint.h>

enum ds_weights { DS_BF16, DS_Q4_0, DS_Q4_1, DS_Q8_0, DS_Q4_K, DS_Q6_K, DS_INT8, DS_WEIGHTS };

typedef struct ds_panel {
    int64_t columns;         // in a group
    int64_t scales, quants;  // bytes in a group, of 16 outputs
} ds_panel;

static inline ds_panel ds_panel_of(int64_t kind) {
    switch (kind) {
        case DS_Q4_0: return {32, 32, 256};
        case DS_Q4_1: return {32, 64, 256};
        case DS_Q8_0: return {32, 32, 512};
        case DS_Q4_K: return {256, 320, 2048};
        case DS_Q6_K: return {256, 288, 3072};
        case DS_INT8: return {64, 32, 1024};
        default: return {2, 0, 64};
    }
}

static inline int64_t ds_scales_bytes(int64_t kind, int64_t k) {
    ds_panel panel = ds_panel_of(kind);
    return ((k + panel.columns - 1) / panel.columns * panel.scales + 63) / 64 * 64;
}

// Of 16 outputs. All of a matrix: as many times that as there are panels.
static inline int64_t ds_panel_bytes(int64_t kind, int64_t k) {
    ds_panel panel = ds_panel_of(kind);
    return ds_scales_bytes(kind, k) + (k + panel.columns - 1) / panel.columns * panel.quants;
}
