"""GGML's block formats as float32, in numpy.

Each format is a table entry: the block's layout and a function from blocks to floats. Work goes in chunks whose temporaries
stay in the processor's cache, since a model is far larger than that and every pass over memory costs as much as the arithmetic.
Knows nothing of files.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from engine.gguf import BLOCKS

CHUNK = 1 << 16  # weights a chunk: 256 KiB of floats and as much again of temporaries, inside a 1 MiB L2


BLOCK_LAYOUT = {
    "Q4_0": np.dtype([("d", "<f2"), ("qs", "u1", 16)]),
    "Q4_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)]),
    "Q5_0": np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)]),
    "Q5_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)]),
    "Q8_0": np.dtype([("d", "<f2"), ("qs", "i1", 32)]),
    "Q4_K": np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)]),
    "Q5_K": np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)]),
    "Q6_K": np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")]),
}


def dequantize(raw: np.ndarray, ggml_type: str, out: np.ndarray) -> None:
    """Whole blocks of `ggml_type` in `raw` (uint8) as floats into `out` (contiguous float32 of as many weights)."""
    assert out.dtype == np.float32 and out.flags.c_contiguous
    weights, nbytes = BLOCKS[ggml_type]
    flat, data = out.reshape(-1), raw.reshape(-1)
    assert flat.size // weights * nbytes == data.size
    if ggml_type == "F32":
        flat.view(np.uint8)[:] = data
        return
    step = CHUNK // weights
    blocks = data.view(BLOCK_LAYOUT.get(ggml_type, np.dtype("<u2")))
    convert = CONVERT[ggml_type]
    for at in range(0, len(blocks), step):
        part = blocks[at : at + step]
        convert(part, flat[at * weights : at * weights + len(part) * weights].reshape(len(part), weights))


def f16(b: np.ndarray, out: np.ndarray) -> None:
    out[:, 0] = b.view("<f2")


def bf16(b: np.ndarray, out: np.ndarray) -> None:
    bits = out.reshape(-1).view(np.uint32)
    bits[:] = b
    bits <<= 16


def scale(b: np.ndarray, name: str) -> np.ndarray:
    """A float16 field as a float32 column."""
    return b[name].astype(np.float32)[:, None]


def nibbles(qs: np.ndarray) -> np.ndarray:
    """[n, k] bytes -> [n, 2k]: the low halves, then the high halves."""
    n, k = qs.shape
    q = np.empty((n, 2, k), np.uint8)
    np.bitwise_and(qs, 15, out=q[:, 0])
    np.right_shift(qs, 4, out=q[:, 1])
    return q.reshape(n, 2 * k)


def q4_0(b: np.ndarray, out: np.ndarray) -> None:
    out[:] = nibbles(b["qs"])
    out -= 8
    out *= scale(b, "d")


def q4_1(b: np.ndarray, out: np.ndarray) -> None:
    out[:] = nibbles(b["qs"])
    out *= scale(b, "d")
    out += scale(b, "m")


def fifth_bits(b: np.ndarray) -> np.ndarray:
    """[n, 32] bytes: 16 where the block's bit mask has the weight's bit."""
    return np.unpackbits(b["qh"], axis=1, bitorder="little") << 4


def q5_0(b: np.ndarray, out: np.ndarray) -> None:
    out[:] = nibbles(b["qs"]) | fifth_bits(b)
    out -= 16
    out *= scale(b, "d")


def q5_1(b: np.ndarray, out: np.ndarray) -> None:
    out[:] = nibbles(b["qs"]) | fifth_bits(b)
    out *= scale(b, "d")
    out += scale(b, "m")


def q8_0(b: np.ndarray, out: np.ndarray) -> None:
    out[:] = b["qs"]
    out *= scale(b, "d")


def scales_and_mins(b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The eight scales and minima of a super-block, [n, 8, 1] each.

    6 bits each: the first four of both stand whole in bytes 0 to 7; the last four have their low bits in bytes 8 to 11
    (scale low nibble, minimum high nibble) and their upper two in the spare bits of bytes 0 to 7.
    """
    first, second, low = b["scales"][:, 0:4], b["scales"][:, 4:8], b["scales"][:, 8:12]
    scales = np.concatenate([first & 63, (low & 15) | ((first >> 2) & 48)], axis=1)
    mins = np.concatenate([second & 63, (low >> 4) | ((second >> 2) & 48)], axis=1)
    return (scale(b, "d") * scales)[:, :, None], (scale(b, "dmin") * mins)[:, :, None]


def k_nibbles(b: np.ndarray) -> np.ndarray:
    """[n, 8, 32]: four runs of 32 bytes, each first its low halves, then its high halves."""
    return nibbles(b["qs"].reshape(-1, 32)).reshape(-1, 8, 32)


def q4_k(b: np.ndarray, out: np.ndarray) -> None:
    scales, mins = scales_and_mins(b)
    values = out.reshape(-1, 8, 32)
    values[:] = k_nibbles(b)
    values *= scales
    values -= mins


def q5_k(b: np.ndarray, out: np.ndarray) -> None:
    scales, mins = scales_and_mins(b)
    q = k_nibbles(b)
    for group in range(8):  # bit `group` of qh is the fifth bit of that group of 32
        q[:, group] |= ((b["qh"] >> group) & 1) << 4
    values = out.reshape(-1, 8, 32)
    values[:] = q
    values *= scales
    values -= mins


def q6_k(b: np.ndarray, out: np.ndarray) -> None:
    q = np.empty((len(b), 2, 4, 32), np.uint8)
    for half in range(2):  # each half of the block: 64 bytes of low bits, 32 of high bits
        low = b["ql"][:, 64 * half : 64 * half + 64]
        q[:, half, 0:2] = (low & 15).reshape(-1, 2, 32)
        q[:, half, 2:4] = (low >> 4).reshape(-1, 2, 32)
        high = b["qh"][:, 32 * half : 32 * half + 32]
        for run in range(4):
            q[:, half, run] |= ((high >> (2 * run)) & 3) << 4
    values = out.reshape(-1, 16, 16)
    values[:] = q.reshape(-1, 16, 16)
    values -= 32
    values *= (scale(b, "d") * b["scales"])[:, :, None]


CONVERT: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    "F16": f16,
    "BF16": bf16,
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
}
