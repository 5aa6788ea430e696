"""`python -m bench.kernels`: the compiled CPU backend's matrix kernel beside the machine's peaks, measured in the same run.

The matrices are those of SmolLM2-135M, a copy for each of its 30 layers, so that a step of few rows reads its weights from
memory as in life. Peaks: bytes read from memory by all threads, and arithmetic on registers alone with the instruction that
the kernel uses. Rounds of everything are interleaved; the median counts. A share is the larger of the two: bytes of weights
over the memory peak, operations over the arithmetic peak. It passes 100 % where a large cache keeps some of the weights from
step to step, or where something else had the cores while the peaks were measured.
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
    V sums[SUMS] = {};
    for (int64_t i = 0; i < loops; i++) {
#pragma GCC unroll 12
        for (int j = 0; j < SUMS; j++) { STEP(sums[j]); }
    }
    volatile V kept;
    for (int j = 0; j < SUMS; j++) kept = sums[j];
    return loops * SUMS * each;
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
        self._library.multiply.argtypes, self._library.multiply.restype = [c_int64], c_double
        self._memory = [np.ones(READ_BYTES // 8, np.uint64) for _ in range(threads)]

    def memory(self) -> float:
        took = self._all(lambda i: self._library.read_all(self._memory[i].ctypes.data & -64, READ_BYTES - 512))
        return READ_BYTES * self.threads / took

    def arithmetic(self) -> float:
        done = [0.0] * self.threads

        def body(i: int) -> None:
            done[i] = self._library.multiply(300_000)

        took = self._all(body)
        return sum(done) / took

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
    """Programs over random weights: one matrix in all layers, all matrices of all layers, the head."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        widest, most = max(k for _, _, k in LAYER), max(ROWS)
        self._x = rng.integers(0x3C00, 0x3C80, most * widest).astype(np.uint16)
        self._out = np.zeros(most * HEAD[1], np.float32)
        self._weights: list[np.ndarray] = []
        layers = [[self._op(n, k, rng) for _, n, k in LAYER] for _ in range(LAYERS)]
        head = [self._op(HEAD[1], HEAD[2], rng)]
        self.programs: dict[str, tuple[list[cpu.Op], int]] = {}  # name: (operators, weights in them)
        for i, (name, n, k) in enumerate(LAYER):
            self.programs[name] = ([layer[i] for layer in layers], n * k * LAYERS)
        self.programs["layers"] = ([op for layer in layers for op in layer], sum(n * k for _, n, k in LAYER) * LAYERS)
        self.programs["head"] = (head, HEAD[1] * HEAD[2])

    def _op(self, n: int, k: int, rng: np.random.Generator) -> cpu.Op:
        size = cpu.packed_bytes(n, k)
        raw = np.empty(size // 2 + 32, np.uint16)
        weights = raw[-(raw.ctypes.data // 2) % 32 :][: size // 2]
        weights[:] = 0x3C00 + rng.integers(0, 128, len(weights), dtype=np.uint16)
        self._weights.append(weights)
        return cpu.Op(kind=cpu.LINEAR, out=self._out.ctypes.data, x=self._x.ctypes.data, w=weights.ctypes.data, n=n, k=k)

    def timed(self, team: cpu.Team, name: str, rows: int) -> float:
        """Seconds for one run."""
        ops = self.programs[name][0]
        program, step = (cpu.Op * len(ops))(*ops), cpu.Step(tokens=rows)
        begin = time.perf_counter()
        team.run(program, step)
        return time.perf_counter() - begin


def measure(isa: str, threads: int, rounds: int) -> dict:
    matrices, team, peaks = Matrices(), cpu.Team(threads, isa=isa), Peaks(isa, threads)
    memory, arithmetic = [], []
    times: dict[tuple[str, int], list[float]] = {(name, rows): [] for rows in ROWS for name in matrices.programs}
    for key in times:
        matrices.timed(team, *key)  # pages are touched, threads awake
    for _ in range(rounds):
        memory.append(peaks.memory())
        arithmetic.append(peaks.arithmetic())
        for key, taken in times.items():
            taken.append(matrices.timed(team, *key))
    team.close()
    # A peak is what the machine can do: the best round, where the kernel's figure is the median.
    peak = {"memory_gb_s": max(memory) / 1e9, "arithmetic_gflop_s": max(arithmetic) / 1e9}
    results = []
    for (name, rows), taken in times.items():
        seconds = statistics.median(taken)
        weights = matrices.programs[name][1]
        gb, gflop = 2 * weights / seconds / 1e9, 2 * weights * rows / seconds / 1e9
        share = max(gb / peak["memory_gb_s"], gflop / peak["arithmetic_gflop_s"])
        ms, best = seconds * 1e3, min(taken) * 1e3
        results.append({"matrix": name, "rows": rows, "ms": ms, "best_ms": best, "gb_s": gb, "gflop_s": gflop, "share": share})
    return {"isa": isa, "threads": threads, "rounds": rounds, **peak, "results": results}


def show(report: dict) -> None:
    print(
        f"{report['isa']}, {report['threads']} threads; peaks: {report['memory_gb_s']:.1f} GB/s from memory, "
        f"{report['arithmetic_gflop_s']:.0f} GFLOP/s in registers"
    )
    print(f"{'rows':>5} {'matrix':<14} {'ms':>8} {'best':>8} {'GB/s':>6} {'GFLOP/s':>8} {'share':>6}")
    for row in report["results"]:
        print(
            f"{row['rows']:>5} {row['matrix']:<14} {row['ms']:8.2f} {row['best_ms']:8.2f} {row['gb_s']:6.1f} "
            f"{row['gflop_s']:8.0f} {row['share']:6.0%}"
        )
    for rows in ROWS:
        step = sum(row["ms"] for row in report["results"] if row["rows"] == rows and row["matrix"] in ("layers", "head"))
        print(f"a step of {rows} rows, layers and head: {step:.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--isa", choices=cpu.available(), default=cpu.choose(), help="instruction set (default: the best)")
    parser.add_argument("--threads", type=int, default=0, help="threads (default: the cores this process may use)")
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds; the median counts")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    args = parser.parse_args()
    threads = args.threads or len(os.sched_getaffinity(0))
    report = measure(args.isa, threads, args.rounds)
    show(report)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
