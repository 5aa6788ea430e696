"""The compiled CPU backend's library: builds it, loads it and binds it. What it computes is told in cpu.h.

Kernels are compiled once for each instruction set and chosen at run time, so one library serves every machine of its kind.
Programs, steps and weights are handed over by address; who calls keeps them alive. Knows no models, devices or torch.
"""

import ctypes
import errno
import functools
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path

from engine import native
from engine.types import UserError

HERE = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
# No contraction: what is a fused multiply-add is written as one, so that no compiler changes a sum.
FLAGS = ("-std=c++17", "-D_GNU_SOURCE", "-O3", "-fPIC", "-pthread", "-fno-exceptions", "-fno-rtti", "-fno-math-errno")
FLAGS += ("-ffp-contract=off",)
LINK_FLAGS = ("-shared", "-pthread", "-Wl,--as-needed")  # the C++ runtime library isn't needed

AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
AVX512BF16 = (*AVX512, "-mavx512bf16", "-mavx512vnni")
AMX = (*AVX512BF16, "-mamx-tile", "-mamx-bf16")
# Best first. A machine takes the first that it has, unless the variable below names another.
ISA_FLAGS: dict[str, tuple[str, ...]] = {
    "amx": AMX,
    "avx512bf16": AVX512BF16,
    "avx512": AVX512,
    "avx2": AVX2,
    "portable": (),
}
VARIABLE = "DEEPSERVE_CPU_ISA"

# enum ds_kind
KINDS = ("embed", "rms_norm", "linear", "head_norm", "rope_store", "attention", "swiglu", "take_rows", "sample", "score", "meet")
EMBED, RMS_NORM, LINEAR, HEAD_NORM, ROPE_STORE, ATTENTION, SWIGLU, TAKE_ROWS, SAMPLE, SCORE, MEET = range(len(KINDS))


class Op(Structure):
    """ds_op: one operator of a program."""

    _fields_ = (
        ("kind", c_int32),
        ("sampled", c_int32),
        ("out", c_void_p),
        ("x", c_void_p),
        ("y", c_void_p),
        ("w", c_void_p),
        ("b", c_void_p),
        ("n", c_int64),
        ("k", c_int64),
        ("stride", c_int64),
        ("i", c_int64 * 4),
        ("f", c_float * 2),
    )


class Step(Structure):
    """ds_step: what changes from step to step."""

    _fields_ = (
        ("tokens", c_int32),
        ("sequences", c_int32),
        ("sampled", c_int32),
        ("block_size", c_int32),
        ("table_width", c_int32),
        ("ids", c_void_p),
        ("positions", c_void_p),
        ("kv_slots", c_void_p),
        ("feed", c_void_p),
        ("last", c_void_p),
        ("q_start", c_void_p),
        ("kv_len", c_void_p),
        ("blocks", c_void_p),
        ("rows", c_void_p),
        ("cos_sin", c_void_p),
    )


# name: (result, arguments). All give up the interpreter lock: they run steps, pack gigabytes or wait for threads to end.
FUNCTIONS = {
    "ds_cpu_select": (c_void_p, [c_char_p]),
    "ds_team_new": (c_void_p, [c_int, POINTER(c_int)]),
    "ds_team_free": (None, [c_void_p]),
    "ds_team_share": (None, [c_void_p, c_int]),
    "ds_launch": (c_int64, [c_void_p, c_void_p, c_int64, c_void_p, c_void_p]),
    "ds_wait": (None, [c_void_p, c_int64]),
    "ds_wait_operator": (None, [c_void_p, c_int64, c_int64]),
    "ds_kv_bytes": (c_int64, [c_int, c_int64]),
    "ds_group_columns": (c_int64, [c_int]),
    "ds_packed_bytes": (c_int64, [c_int, c_int64, c_int64]),
    "ds_pack": (None, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int, c_int64, c_int64]),
}


class Library:
    """The bound functions, with their names from C."""

    def __init__(self, path: Path):
        self.path = path
        bound = ctypes.CDLL(str(path))
        for name, (result, arguments) in FUNCTIONS.items():
            function = getattr(bound, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)

    def kernels(self, isa: str) -> int | None:
        """Address of an instruction set's kernels; None where this machine doesn't have it."""
        return self.ds_cpu_select(isa.encode())


# ---- building --------------------------------------------------------------------------------------------------------


def units() -> list[tuple[str, tuple[str, ...]]]:
    """The files to compile for this kind of machine, each with its own flags."""
    built = ISA_FLAGS if platform.machine() == "x86_64" else {"portable": ()}
    return [*((f"isa_{isa}.cpp", flags) for isa, flags in built.items()), ("pack.cpp", ()), ("team.cpp", ())]


def file_name() -> str:
    flags = [*FLAGS, *LINK_FLAGS, *(word for _, own in units() for word in own)]
    headers = sorted(path for path in HERE.iterdir() if path.suffix == ".h")
    return native.content_name("deepserve-cpu", flags, [*(HERE / name for name, _ in units()), *headers])


def find() -> Path | None:
    """The built library, if there is one."""
    return native.find_built(file_name())


def build() -> Path:
    """Compile the library, two files at a time; harmless beside another process that does the same. Raises `UserError`."""
    compiler = native.find_compiler("CXX", COMPILERS, "C++", "g++").split()

    def run(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip() or done.stdout.strip()
            raise UserError(f"{' '.join(compiler)} can't build the CPU backend: {said}")

    def make(draft: Path) -> None:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
            objects = [str(Path(folder) / f"{name}.o") for name, _ in units()]
            commands = [
                [*compiler, *FLAGS, *flags, "-c", str(HERE / name), "-o", to]
                for (name, flags), to in zip(units(), objects, strict=True)
            ]
            list(pool.map(run, commands))  # raises what one of them raised
            run([*compiler, *LINK_FLAGS, *objects, "-o", str(draft)])

    return native.put_built(file_name(), make)


@functools.cache
def load() -> Library:
    """The bound library, built first where it is missing. Raises `UserError`."""
    return Library(find() or build())


# ---- instruction sets ------------------------------------------------------------------------------------------------


def available() -> list[str]:
    """The instruction sets that this machine has kernels for, best first."""
    library = load()
    return [isa for isa in ISA_FLAGS if library.kernels(isa)]


def choose() -> str:
    """The instruction set to use: the best, or the one that DEEPSERVE_CPU_ISA names. Raises `UserError`."""
    have = available()
    named = os.environ.get(VARIABLE)
    if not named:
        return have[0]
    if named in have:
        return named
    why = "this machine doesn't have it" if named in ISA_FLAGS else "there is no such instruction set"
    raise UserError(f"{VARIABLE}={named}: {why}; use one of {', '.join(have)}, or unset it")


# ---- weights ---------------------------------------------------------------------------------------------------------


# enum ds_weights: what a matrix's weights are packed as. "int8" is ours, quantised from float; the others after "bfloat16"
# keep what a GGUF file has, bit for bit.
WEIGHT_KINDS = {"bfloat16": 0, "q4_0": 1, "q4_1": 2, "q8_0": 3, "q4_k": 4, "q6_k": 5, "int8": 6}


def group_columns(kind: str) -> int:
    """Columns of a group of a kind of WEIGHT_KINDS: those of GGML have some whole ones."""
    return int(load().ds_group_columns(WEIGHT_KINDS[kind]))


def packed_bytes(kind: str, n: int, k: int) -> int:
    """Size of a packed matrix [n, k] of a kind of WEIGHT_KINDS: whole panels of 16 rows, a multiple of 64 bytes."""
    return int(load().ds_packed_bytes(WEIGHT_KINDS[kind], n, k))


def pack(
    kind: str, to: int, source: int, n: int, k: int, *, is_float: bool = False, first: int = 0, last: int | None = None
) -> None:
    """Pack rows `first` to `last` (None: n) of the matrix [n, k] at address `source` into `to`, 64-byte aligned.

    `source` and `to` are where the whole matrix begins. Source rows are contiguous and may begin at any address: for
    "bfloat16" and "int8", float32 where `is_float`, else bfloat16; for the others GGML blocks of that type, and k must be a
    multiple of a block's columns (raises `ValueError`). `first` is a multiple of 16, and so is `last` unless it is `n`:
    ranges can be packed by several threads at once.

    "int8" is symmetric with a float16 scale for each 64 columns of a row. Weights beyond 127 x 65504 and what is not finite
    give a scale that is not finite, and so outputs that aren't.
    """
    if kind not in ("bfloat16", "int8") and k % (columns := group_columns(kind)):
        raise ValueError(f"a matrix of {k} columns can't be {kind}: its blocks have {columns}")
    load().ds_pack(WEIGHT_KINDS[kind], to, source, n, k, is_float, first, n if last is None else last)


# ---- the KV cache ----------------------------------------------------------------------------------------------------


KV_GROUP = 16  # cpu.h, DS_KV_GROUP: tokens that lie together in the cache
KV_KINDS = {"bfloat16": 0, "int8": 1}  # enum ds_kv


def kv_run(kind: str, head_dim: int) -> int:
    """Bytes that keys and values of one head take for a group of tokens, with their scales where they have some."""
    return int(load().ds_kv_bytes(KV_KINDS[kind], head_dim))


# ---- the team --------------------------------------------------------------------------------------------------------


class Team:
    """Threads that run programs of operators, one after another. Belongs to the process that made it.

    `cores`: where each thread is pinned, or None.
    """

    def __init__(self, threads: int, cores: Sequence[int] | None = None, isa: str | None = None):
        self.threads = threads
        self.isa = isa or choose()
        self._library = load()
        self._kernels = self._library.kernels(self.isa)
        if self._kernels is None:
            raise UserError(f"this machine has no {self.isa}; use one of {', '.join(available())}")
        self._team = self._library.ds_team_new(threads, (c_int * threads)(*cores) if cores else None)
        if not self._team:
            raise UserError(f"the system gives no {threads} threads for the CPU backend; use fewer, or raise `ulimit -u`")

    def launch(self, ops: ctypes.Array[Op], step: Step, count: int | None = None) -> int:
        """Queue the first `count` operators (None: all) for `step`; everything they point to must live until `wait` has
        returned for the ticket that this gives."""
        if self._team is None:
            raise RuntimeError("the team is closed")
        many = len(ops) if count is None else count
        ticket = self._library.ds_launch(self._team, ctypes.addressof(ops), many, ctypes.addressof(step), self._kernels)
        if ticket >= 0:
            return int(ticket)
        if ticket == -errno.ECHILD:
            raise RuntimeError("a team doesn't survive fork: make one in the child")
        if ticket == -errno.ENOMEM:
            raise MemoryError("no memory for a program's counters")
        if ticket == -errno.E2BIG:
            raise ValueError("a matrix has more than 65536 columns: a thread's scratch holds no panel of its activations")
        raise ValueError("a program has an operator of unknown kind")

    def wait(self, ticket: int) -> None:
        """Sleep, without the interpreter lock, until a launched program and all before it are done."""
        self._library.ds_wait(self._team, ticket)

    def wait_operator(self, ticket: int, op: int) -> None:
        """The same until operator number `op` of the program is done. One thread at a time."""
        self._library.ds_wait_operator(self._team, ticket, op)

    def share(self, percent: int) -> None:
        """Hold the team to `percent`, 1 to 100, of its threads' time, from the next operator on: fewer of them take part, and
        these rest between operators. Results stay the same. From any thread, also while a program runs."""
        if not 1 <= percent <= 100:
            raise ValueError(f"a share of {percent} percent: it must be 1 to 100")
        if self._team is None:
            raise RuntimeError("the team is closed")
        self._library.ds_team_share(self._team, 10 * percent)

    def run(self, ops: ctypes.Array[Op], step: Step, count: int | None = None) -> None:
        """Launch and wait."""
        self.wait(self.launch(ops, step, count))

    def close(self) -> None:
        """Ends the threads; the team can't run any more. Twice is once."""
        self._library.ds_team_free(self._team)
        self._team = None
