"""`python -m bench.kernels`: the compiled CPU backend's matrix kernels beside the machine's peaks, measured in the same run.

The matrices are those of SmolLM2-135M, a copy for each of its 30 layers, so that a step of few rows reads its weights from
memory as in life; of kinds whose blocks are longer, with as many columns as make whole blocks. Peaks: bytes read from memory
by all threads, and arithmetic on registers alone with the instruction that the kernel uses. Rounds of everything are
interleaved; the median counts. A share is the larger of the two: bytes of weights over the memory peak, operations over the
arithmetic peak (where the instruction set multiplies bytes by several instructions, bytes alone count for quantised weights).
It passes 100 % where a large cache keeps some of the weights from step to step, or where something else had the cores while
the peaks were measured.
"""

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from ctypes import c_double, c_int64, c_void_p
from pathlib import Path

import numpy as np

from engine import native
from engine.native import cpu

LAYERS = 30
LAYER = (("qkv", 960, 576), ("attention out", 576, 576), ("gate and up", 3072, 576), ("down", 576, 1536))
HEAD = ("head", 49152, 576)
ROWS = (1, 4, 16, 64, 256)
READ_BYTES = 256 << 20  # a thread; more than any cache
ARITHMETIC_SECONDS = 0.03  # threads start within some tenths of a millisecond, which must not show

PEAKS = r"""
#include <stdint.h>
#include <string.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef uint64_t Lanes __attribute__((vector_size(64)));
extern "C" double read_all(const void *at, int64_t bytes) {
    Lanes sums[8] = {};
    for (int64_t i = 0; i < bytes; i += sizeof sums)
        for (int j = 0; j < 8; j++) sums[j] += *(const Lanes *)((const char *)at + i + 64 * j);
    Lanes all = {};
    for (int j = 0; j < 8; j++) all += sums[j];
    return (double)all[0];
}

// Operations a second's worth of loops does; the result keeps the loop alive.
extern "C" double multiply(int64_t loops) {
#if defined(__AMX_BF16__)
    struct alignas(64) { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    __asm__ volatile("" : : "r"(&config) : "memory");  // the intrinsic doesn't say that it reads all of it
    _tile_loadconfig(&config);
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);
    for (int64_t i = 0; i < loops; i++) {
        _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 4, 7); _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7);
    }
    _tile_release();
    return loops * 4 * 16384.0;
#else
    enum { SUMS = 12 };
#if defined(__AVX512BF16__)
    typedef __m512 V; const double each = 64; volatile int one = 0x3f803f80;
    const __m512bh a = (__m512bh)_mm512_set1_epi32(one);
#define STEP(v) v = _mm512_dpbf16_ps(v, a, a)
#elif defined(__AVX512F__)
    typedef __m512 V; const double each = 32; volatile float one = 1;
    const V a = _mm512_set1_ps(one);
#define STEP(v) v = _mm512_fmadd_ps(a, a, v)
#elif defined(__AVX2__)
    typedef __m256 V; const double each = 16; volatile float one = 1;
    const V a = _mm256_set1_ps(one);
#define STEP(v) v = _mm256_fmadd_ps(a, a, v)
#else
    typedef float V __attribute__((vector_size(16))); const double each = 8; volatile float one = 1;
    V a = V{} + one;
#define STEP(v) __asm__ volatile("" : "+" REGISTER(a)); v = v + a * a
#if defined(__x86_64__)
#define REGISTER(v) "x"(v)
#else
#define REGISTER(v) "w"(v)
#endif
#endif
    V sums[SUMS];
    volatile float zero = 0;  // read anew for each sum: the compiler makes one of sums that it knows to be equal
    for (int j = 0; j < SUMS; j++) sums[j] = V{} + zero;
    for (int64_t i = 0; i < loops; i++) {
#pragma GCC unroll 12
        for (int j = 0; j < SUMS; j++) { STEP(sums[j]); }
    }
    volatile V kept;
    for (int j = 0; j < SUMS; j++) kept = sums[j];
    return loops * SUMS * each;
#endif
}

// The same with products of bytes summed in 32 bits; 0 where these instruction sets have no such product.
extern "C" double multiply_bytes(int64_t loops) {
#if defined(__AMX_INT8__)
    struct alignas(64) { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; } config = {};
    config.palette = 1;
    for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
    __asm__ volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
    _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3); _tile_zero(4); _tile_zero(5); _tile_zero(6); _tile_zero(7);
    for (int64_t i = 0; i < loops; i++) {
        _tile_dpbssd(0, 4, 6); _tile_dpbssd(1, 4, 7); _tile_dpbssd(2, 5, 6); _tile_dpbssd(3, 5, 7);
    }
    _tile_release();
    return loops * 4 * 32768.0;
#elif defined(__AVX512VNNI__)
    enum { SUMS = 12 };
    volatile int one = 0x01010101;
    const __m512i a = _mm512_set1_epi32(one);
    __m512i sums[SUMS];
    volatile int zero = 0;
    for (int j = 0; j < SUMS; j++) sums[j] = _mm512_set1_epi32(zero);
    for (int64_t i = 0; i < loops; i++) {
#pragma GCC unroll 12
        for (int j = 0; j < SUMS; j++) sums[j] = _mm512_dpbusd_epi32(sums[j], a, a);
    }
    volatile __m512i kept;
    for (int j = 0; j < SUMS; j++) kept = sums[j];
    return loops * SUMS * 128.0;
#else
    return 0;
#endif
}
"""


class Peaks:
    """What the machine gives `threads` threads: bytes a second from memory, operations a second on registers."""

    def __init__(self, isa: str, threads: int):
        self.threads = threads
        compiler = native.find_compiler("CXX", cpu.COMPILERS, "C++", "g++").split()
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder) / "peaks.cpp", Path(folder) / "peaks.so"
            source.write_text(PEAKS)
            flags = [*cpu.FLAGS, *cpu.ISA_FLAGS[isa], *cpu.LINK_FLAGS]
            subprocess.run([*compiler, *flags, str(source), "-o", str(library)], check=True)
            self._library = ctypes.CDLL(str(library))
        self._library.read_all.argtypes, self._library.read_all.restype = [c_void_p, c_int64], c_double
        for function in (self._library.multiply, self._library.multiply_bytes):
            function.argtypes, function.restype = [c_int64], c_double
        self._memory = [np.ones(READ_BYTES // 8, np.uint64) for _ in range(threads)]

    def memory(self) -> float:
        took = self._all(lambda i: self._library.read_all(self._memory[i].ctypes.data & -64, READ_BYTES - 512))
        return READ_BYTES * self.threads / took

    def arithmetic(self) -> float:
        return self._operations(self._library.multiply)

    def bytes_arithmetic(self) -> float:
        """Operations a second on 8-bit integers; 0 where the instruction set has no product of them that is measured here."""
        return self._operations(self._library.multiply_bytes) if self._library.multiply_bytes(1) else 0.0

    def _operations(self, function: Callable[[int], float]) -> float:
        """Operations a second of all threads, over loops long enough that starting the threads doesn't count."""
        loops = 100_000
        while (took := self._all(lambda i, n=loops: function(n))) < ARITHMETIC_SECONDS:
            loops = int(loops * min(20.0, 1.5 * ARITHMETIC_SECONDS / took))
        return sum(function(1) for _ in range(self.threads)) * loops / took

    def _all(self, body: Callable[[int], object]) -> float:
        """Seconds that all threads together take."""
        workers = [threading.Thread(target=body, args=(i,)) for i in range(self.threads)]
        begin = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return time.perf_counter() - begin


class Matrices:
    """Programs over random weights of one kind: one matrix in all layers, all matrices of all layers, the head."""

    def __init__(self, kind: str, x: np.ndarray, out: np.ndarray) -> None:
        self._kind, self._x, self._out = kind, x, out
        self._rng = np.random.default_rng(0)
        self._weights: list[np.ndarray] = []
        layers = [[self._op(n, k) for _, n, k in LAYER] for _ in range(LAYERS)]
        head = [self._op(HEAD[1], HEAD[2])]
        self.programs: dict[str, list[cpu.Op]] = {name: [layer[i] for layer in layers] for i, (name, _, _) in enumerate(LAYER)}
        self.programs |= {"layers": [op for layer in layers for op in layer], "head": head}

    def _op(self, n: int, columns: int) -> cpu.Op:
        k = columns if self._kind in ("bfloat16", "int8") else -(-columns // (block := cpu.group_columns(self._kind))) * block
        size = cpu.packed_bytes(self._kind, n, k)
        raw = self._rng.integers(0, 256, size + 64, np.uint8)
        raw &= 0x3F
        raw |= 0x10  # scales and values of ordinary sizes: infinities and subnormal numbers may take longer
        weights = raw[-raw.ctypes.data % 64 :]
        self._weights.append(weights)
        i = (cpu.WEIGHT_KINDS[self._kind],)
        to, x, w = self._out.ctypes.data, self._x.ctypes.data, weights.ctypes.data
        return cpu.Op(kind=cpu.LINEAR, out=to, x=x, w=w, n=n, k=k, i=i)

    def size(self, name: str) -> tuple[int, int]:
        """Weights in a program, and the bytes they take."""
        ops = self.programs[name]
        return sum(op.n * op.k for op in ops), sum(cpu.packed_bytes(self._kind, op.n, op.k) for op in ops)

    def timed(self, team: cpu.Team, name: str, rows: int) -> float:
        """Seconds for one run."""
        ops = self.programs[name]
        program, step = (cpu.Op * len(ops))(*ops), cpu.Step(tokens=rows)
        begin = time.perf_counter()
        team.run(program, step)
        return time.perf_counter() - begin


def measure(isa: str, threads: int, rounds: int, kinds: list[str]) -> dict:
    widest, most = max(k for _, _, k in LAYER), max(ROWS)
    x = np.random.default_rng(0).integers(0x3C00, 0x3C80, most * widest).astype(np.uint16)
    out = np.zeros(most * HEAD[1], np.float32)
    matrices = {kind: Matrices(kind, x, out) for kind in kinds}
    team, peaks = cpu.Team(threads, isa=isa), Peaks(isa, threads)
    memory, arithmetic, bytes_arithmetic = [], [], []
    programs = [(rows, kind, name) for rows in ROWS for kind in kinds for name in matrices[kind].programs]
    times: dict[tuple[int, str, str], list[float]] = {key: [] for key in programs}
    for rows, kind, name in times:
        matrices[kind].timed(team, name, rows)  # pages are touched, threads awake
    for _ in range(rounds):
        memory.append(peaks.memory())
        arithmetic.append(peaks.arithmetic())
        bytes_arithmetic.append(peaks.bytes_arithmetic())
        for (rows, kind, name), taken in times.items():
            taken.append(matrices[kind].timed(team, name, rows))
    team.close()
    # A peak is what the machine can do: the best round, where the kernel's figure is the median.
    peak = {
        "memory_gb_s": max(memory) / 1e9,
        "arithmetic_gflop_s": max(arithmetic) / 1e9,
        "bytes_arithmetic_gop_s": max(bytes_arithmetic) / 1e9,
    }
    results = []
    for (rows, kind, name), taken in times.items():
        seconds = statistics.median(taken)
        weights, nbytes = matrices[kind].size(name)
        gb, gop = nbytes / seconds / 1e9, 2 * weights * rows / seconds / 1e9
        most_gop = peak["arithmetic_gflop_s" if kind == "bfloat16" else "bytes_arithmetic_gop_s"]
        share = max(gb / peak["memory_gb_s"], gop / most_gop if most_gop else 0)
        figures = {"ms": seconds * 1e3, "best_ms": min(taken) * 1e3, "gb_s": gb, "gop_s": gop, "share": share}
        results.append({"weights": kind, "matrix": name, "rows": rows, **figures})
    return {"isa": isa, "threads": threads, "rounds": rounds, **peak, "results": results}


def show(report: dict) -> None:
    print(
        f"{report['isa']}, {report['threads']} threads; peaks: {report['memory_gb_s']:.1f} GB/s from memory, in registers "
        f"{report['arithmetic_gflop_s']:.0f} GFLOP/s and {report['bytes_arithmetic_gop_s']:.0f} GOP/s of bytes"
    )
    print(f"{'rows':>5} {'weights':<9} {'matrix':<14} {'ms':>8} {'best':>8} {'GB/s':>6} {'GOP/s':>8} {'share':>6}")
    steps: dict[tuple[int, str], float] = {}
    for row in report["results"]:
        print(
            f"{row['rows']:>5} {row['weights']:<9} {row['matrix']:<14} {row['ms']:8.2f} {row['best_ms']:8.2f} {row['gb_s']:6.1f} "
            f"{row['gop_s']:8.0f} {row['share']:6.0%}"
        )
        if row["matrix"] in ("layers", "head"):
            key = row["rows"], row["weights"]
            steps[key] = steps.get(key, 0.0) + row["ms"]
    for (rows, kind), ms in steps.items():
        print(f"a step of {rows} rows, layers and head, {kind}: {ms:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--isa", choices=cpu.available(), default=cpu.choose(), help="instruction set (default: the best)")
    parser.add_argument("--threads", type=int, default=0, help="threads (default: the cores this process may use)")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds; the median counts")
    parser.add_argument("--weights", nargs="+", choices=cpu.WEIGHT_KINDS, default=["bfloat16", "q4_1", "int8"], help="kinds")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    threads = args.threads or len(os.sched_getaffinity(0))
    report = measure(args.isa, threads, args.rounds, args.weights)
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
