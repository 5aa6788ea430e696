"""The compiled helper: builds it, loads it and binds it. What it does is told at the top of each C file.

Plain C behind ctypes, so that a machine with Python and a C compiler is enough; a machine that has the built library needs
no compiler. The library's name carries a hash of all that went into it: one that exists is never out of date. Knows nothing
of messages or devices.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_char_p, c_double, c_int, c_int64, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from engine.types import UserError

HERE = Path(__file__).parent
SOURCES = ("process.c", "ring.c", "fork.c", "outlook.c")
FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-O2", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra")
COMPILERS = ("cc", "gcc", "clang")

# name: (result, arguments). These return at once and keep the interpreter lock: giving it up costs more than they do.
# Arguments None: called for every message, so ctypes converts nothing (0.1 us an argument otherwise). The caller passes
# a c_void_p (or None), bytes, and ints of 32 bits, and nothing else.
QUICK: dict[str, tuple[Any, list[Any] | None]] = {
    "ds_ring_format": (c_int, [c_int, c_uint32]),
    "ds_ring_size": (c_uint64, [c_uint32]),
    "ds_ring_open": (c_int, [c_int, c_int, c_int, c_int, POINTER(c_void_p)]),
    "ds_ring_close": (None, [c_void_p]),
    "ds_ring_scratch": (None, [c_void_p, c_void_p, c_uint64, c_void_p, c_int]),
    "ds_ring_capacity": (c_uint64, [c_void_p]),
    "ds_ring_peer_closed": (c_int, [c_void_p]),
    "ds_ring_beat": (None, None),
    "ds_ring_last_beat": (c_uint64, [c_void_p]),
    "ds_ring_push": (c_int, None),
    "ds_ring_push_from": (c_int64, [c_void_p, c_char_p, c_uint64, c_uint64]),
    "ds_ring_pop": (c_int, None),
    "ds_ring_sleep": (c_int, None),
    "ds_ring_wake": (None, None),
    "ds_ring_rouse": (None, [c_void_p]),
    "ds_watch": (c_int, [c_int]),
    "ds_set_name": (None, [c_char_p]),
    "ds_map_slab": (c_int, [c_int, c_uint64, c_int, POINTER(c_void_p)]),
    "ds_unmap_slab": (None, [c_void_p, c_uint64]),
    "ds_dlpack": (c_void_p, [c_void_p, c_int, c_int, c_int, c_int, c_int64]),
    "ds_outlook": (None, [c_void_p, c_void_p, c_void_p, c_void_p, c_int64]),
    "ds_predict": (None, [c_void_p, c_int64, c_void_p]),
    "ds_best": (None, [c_void_p, c_int, c_void_p, c_int64, c_void_p]),
    "ds_loads": (None, [c_void_p, c_int, c_void_p, c_int64, c_void_p]),
    "ds_least_load": (c_int64, [c_void_p, c_int, c_void_p, c_int64, c_double, c_void_p]),
}
# These wait, or read gigabytes: without the lock.
SLOW: dict[str, tuple[Any, list[Any] | None]] = {
    "ds_ring_wait": (c_int, [c_void_p, c_int64]),
    "ds_checksum": (c_uint64, [c_void_p, c_uint64]),
    "ds_collapse_slab": (c_uint64, [c_void_p, c_uint64]),
    "ds_copy": (c_int64, [c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64]),
    "ds_ipc_error": (c_char_p, []),
    "ds_ipc_allocate": (c_int, [c_char_p, c_int, c_uint64, POINTER(c_void_p)]),
    "ds_ipc_free": (c_int, [c_char_p, c_int, c_void_p]),
    "ds_ipc_export": (c_int, [c_char_p, c_int, c_void_p, c_uint64, c_char_p]),
    "ds_ipc_open": (c_int, [c_char_p, c_int, c_char_p, c_uint64, POINTER(c_void_p)]),
    "ds_ipc_close": (c_int, [c_char_p, c_int, c_char_p, c_void_p]),
    "ds_ipc_copy": (
        c_int64,
        [c_char_p, c_int, c_int, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64],
    ),
    "ds_ipc_checksum": (c_int, [c_char_p, c_int, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_void_p]),
}


class Library:
    """The bound C functions, as attributes without their `ds_` prefix."""

    ring_format: Callable[[int, int], int]
    ring_size: Callable[[int], int]
    ring_open: Callable[..., int]
    ring_close: Callable[[c_void_p], None]
    ring_scratch: Callable[[c_void_p, int, int, int, int], None]
    ring_capacity: Callable[[c_void_p], int]
    ring_peer_closed: Callable[[c_void_p], int]
    ring_beat: Callable[[c_void_p], None]
    ring_last_beat: Callable[[c_void_p], int]
    ring_push: Callable[[c_void_p | None, bytes, int], int]
    ring_push_from: Callable[[c_void_p | None, bytes, int, int], int]
    ring_pop: Callable[[c_void_p | None, int, int, bool], int]
    ring_sleep: Callable[[c_void_p], int]
    ring_wake: Callable[[c_void_p], None]
    ring_rouse: Callable[[c_void_p], None]
    ring_wait: Callable[[c_void_p | None, int], int]
    watch: Callable[[int], int]
    set_name: Callable[[bytes], None]
    map_slab: Callable[..., int]
    unmap_slab: Callable[[int, int], None]
    dlpack: Callable[[int, int, int, int, int, int], int]
    outlook: Callable[..., None]
    predict: Callable[..., None]
    best: Callable[..., None]
    loads: Callable[..., None]
    least_load: Callable[..., int]
    checksum: Callable[[int, int], int]
    collapse_slab: Callable[[int, int], int]
    copy: Callable[[int, int, int, int, int, int, int, int], int]
    ipc_error: Callable[[], bytes]
    ipc_allocate: Callable[..., int]
    ipc_free: Callable[[bytes, int, int], int]
    ipc_export: Callable[[bytes, int, int, int, Any], int]
    ipc_open: Callable[..., int]
    ipc_close: Callable[[bytes, int, bytes, int], int]
    ipc_copy: Callable[..., int]
    ipc_checksum: Callable[[bytes, int, int, int, int, int, int, int], int]

    def __init__(self, path: Path):
        self.path = path
        for bound, table in ((ctypes.PyDLL(str(path)), QUICK), (ctypes.CDLL(str(path)), SLOW)):
            for name, (result, arguments) in table.items():
                function = getattr(bound, name)
                function.restype = result
                if arguments is not None:
                    function.argtypes = arguments
                setattr(self, name.removeprefix("ds_"), function)


# ---- building ------------------------------------------------------------------------------------------------------


def content_name(stem: str, flags: Sequence[str], sources: Sequence[Path]) -> str:
    """A library's name: the same sources, flags and kind of machine give the same one."""
    digest = hashlib.sha256(" ".join((*flags, sys.platform, platform.machine())).encode())
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return f"{stem}-{digest.hexdigest()[:16]}.so"


def file_name() -> str:
    return content_name("deepserve", FLAGS, [HERE / source for source in SOURCES])


def folders() -> list[Path]:
    """Where libraries may be, best first: beside their sources, or in the user's cache where those are read-only."""
    home = Path(os.environ.get("DEEPSERVE_HOME") or "~/.cache/deepserve").expanduser()
    return [HERE / "build", home / "native"]


def find_built(name: str) -> Path | None:
    return next((path for folder in folders() if (path := folder / name).is_file()), None)


def find() -> Path | None:
    """The built library, if there is one."""
    return find_built(file_name())


def find_compiler(variable: str = "CC", names: Sequence[str] = COMPILERS, language: str = "C", package: str = "gcc") -> str:
    """The compiler that the environment variable names, else the first of `names` on the PATH."""
    named = os.environ.get(variable)
    if named:
        if shutil.which(named.split()[0]) is None:
            raise UserError(f"{variable}={named}: there is no such compiler; unset {variable} or name one that is installed")
        return named
    for name in names:
        if shutil.which(name):
            return name
    raise UserError(f"no {language} compiler ({', '.join(names)}) found; install one, for example: apt install {package}")


def put_built(name: str, make: Callable[[Path], None]) -> Path:
    """Let `make` write a library to the path it is given, then put it whole where `find_built` looks. Raises `UserError`."""
    denied = ""
    for folder in folders():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle, draft_name = tempfile.mkstemp(suffix=".tmp", dir=folder)
        except OSError as e:
            denied = f"{folder}: {e.strerror}"
            continue
        os.close(handle)
        draft = Path(draft_name)
        try:
            make(draft)
            draft.chmod(0o755)
            path = folder / name
            os.replace(draft, path)  # whole or not at all, also for a process that builds at the same time
            return path
        finally:
            draft.unlink(missing_ok=True)
    raise UserError(f"nowhere to put the native helper ({denied}); set DEEPSERVE_HOME to a folder that can be written")


def build() -> Path:
    """Compile the library; harmless beside another process that does the same. Raises `UserError`."""
    compiler = find_compiler()

    def make(draft: Path) -> None:
        command = [*compiler.split(), *FLAGS, *(str(HERE / s) for s in SOURCES), "-o", str(draft)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"{compiler} can't build the native helper: {done.stderr.strip() or done.stdout.strip()}")

    return put_built(file_name(), make)


@functools.cache
def load() -> Library:
    """The bound library, built first where it is missing. Raises `UserError`."""
    return Library(find() or build())


# ---- what process.c and fork.c offer ---------------------------------------------------------------------------------


def watch_process(pidfd: int) -> None:
    """End this process, from a native thread, as soon as the one behind `pidfd` has ended; `pidfd` may be closed after.

    A pipe that only the watched process holds open for writing does as well. A forked child must call it again.
    """
    code = load().watch(pidfd)
    if code:
        raise OSError(-code, os.strerror(-code), f"watching pidfd {pidfd}")


def set_process_name(name: str) -> None:
    """What ps and top call this process (the first 15 bytes). Call it from the main thread."""
    load().set_name(name.encode())


def map_slab(fd: int, nbytes: int, writable: bool = False) -> memoryview:
    """All `nbytes` of a memfd, a multiple of 2 MiB, mapped until the last view of it is gone. Raises `OSError`."""
    if not nbytes:
        return memoryview(b"")
    helper, at = load(), c_void_p()
    code = helper.map_slab(fd, nbytes, writable, ctypes.byref(at))
    if code:
        raise OSError(-code, os.strerror(-code), f"mapping a slab of {nbytes} bytes")
    assert at.value
    memory = (ctypes.c_char * nbytes).from_address(at.value)
    weakref.finalize(memory, helper.unmap_slab, at.value, nbytes).atexit = False  # views may outlive the interpreter's end
    view = memoryview(memory).cast("B")
    return view if writable else view.toreadonly()


def collapse_slab(slab: memoryview, start: int, stop: int) -> int:
    """Have bytes `start` to `stop`, multiples of 2 MiB, of a slab mapped writable in memory, in huge pages where the system can:
    how many bytes are. What is written there stays."""
    at = ctypes.addressof(ctypes.c_char.from_buffer(slab, start))
    return load().collapse_slab(at, stop - start)


def checksum(buffer: Any) -> int:
    """XXH64 (seed 0) of a contiguous buffer; runs without the interpreter lock."""
    import numpy as np  # here alone, so that building needs nothing but the compiler

    flat = np.frombuffer(buffer, np.uint8)  # the one way to a read-only buffer's address without Python's headers
    return load().checksum(flat.ctypes.data, flat.nbytes)
