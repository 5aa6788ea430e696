"""The stub of the ACL runtime: builds it with the system's compiler, and speaks to the copy that this process has loaded.

The sources are in acl/. Knows nothing of torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).resolve().parent / "acl"
EMPTY = (
    "libhccl.so",
    "libge_runner.so",
    "libgraph.so",
    "libacl_tdt_channel.so",
)  # looked for by the plugin; nothing in them is used


class Unavailable(Exception):
    """Why the npu tests can't run here."""


@dataclass(frozen=True)
class Faults:
    """What goes wrong, and how the devices are: the settings of acl/stub.h."""

    devices: int = 2
    memory: int = 4 << 30  # bytes of each device
    oom_after: int = 0  # a process that holds so many bytes gets no more, whatever mem_get_info says
    lose_after: int = 0  # the device is lost at the so manieth piece of work
    copy_ms: int = 0  # each asynchronous copy takes so long
    copy_fails_after: int = 0  # the so manieth asynchronous copy fails
    refuse_export: int = 0  # no memory can be exported
    no_mappings: int = 0  # no physical memory to be mapped: exports go by keys
    queued: int = 0  # streams work in threads of their own even where nothing makes them wait

    def environment(self) -> str:
        """The value of ACL_STUB."""
        return ",".join(f"{f.name}={int(getattr(self, f.name))}" for f in fields(self))


@dataclass(frozen=True)
class Counters:
    """How often this process did what, in the order of acl/stub.h."""

    stream_synchronisations: int = 0
    device_synchronisations: int = 0
    event_synchronisations: int = 0
    copies_to_device: int = 0  # synchronous
    copies_to_host: int = 0
    copies_on_device: int = 0
    async_copies_to_device: int = 0
    async_copies_to_host: int = 0
    async_copies_on_device: int = 0
    pageable_copies: int = 0  # asynchronous ones whose host memory is not pinned: the real runtime may wait in them
    launches: int = 0  # operators, also those that a capture records
    replays: int = 0
    updates: int = 0
    allocations: int = 0

    def __sub__(self, other: Counters) -> Counters:
        return Counters(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    @property
    def synchronisations(self) -> int:
        """Every way in which the host waited for the device, but for events: waiting for one is how a step's ids are fetched."""
        copies = self.copies_to_device + self.copies_to_host + self.copies_on_device + self.pageable_copies
        return self.stream_synchronisations + self.device_synchronisations + copies


def build() -> Path:
    """The folder with the stub's libraries, compiled once for each content of the sources. Raises `Unavailable`."""
    if not sys.platform.startswith("linux"):
        raise Unavailable(f"the ACL stub is made of Linux memory files, this is {sys.platform}")
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        raise Unavailable("no C compiler for the ACL stub (for example: apt install gcc)")
    digest = hashlib.sha256(repr(EMPTY).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"deepserve-acl-stub-{os.getuid()}" / digest.hexdigest()[:16]
    if folder.exists():
        return folder
    folder.parent.mkdir(mode=0o700, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        made = Path(scratch) / "lib"
        for part in (".", "runtime", "compiler"):  # the plugin wants to see these two in what it takes for CANN
            (made / part).mkdir()
        flags = [compiler, "-std=gnu17", "-O2", "-fPIC", "-shared", "-pthread", "-Wall", "-ldl"]
        runtime = [SOURCES / f"{name}.c" for name in ("runtime", "memory", "streams", "absent")]
        for library, sources in {
            "libascendcl.so": runtime,
            "libacl_op_compiler.so": [SOURCES / "compiler.c"],
            **{name: ["-x", "c", os.devnull] for name in EMPTY},
        }.items():
            subprocess.run([*flags, f"-Wl,-soname,{library}", "-o", made / library, *sources], check=True)
        try:
            made.rename(folder)
        except OSError:  # another process was first
            if not folder.exists():
                raise
    return folder


@cache
def library() -> ctypes.CDLL:
    """The stub in this process; LD_LIBRARY_PATH leads to it."""
    library = ctypes.CDLL("libascendcl.so")
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    library.aclstubLaunch.argtypes = [ctypes.c_void_p, ctypes.c_uint64]
    return library


def counters() -> Counters:
    values = (ctypes.c_uint64 * len(fields(Counters)))()
    library().aclstubCounters(values, ctypes.c_size_t(len(values)))
    return Counters(*values)


def lose_device(device: int) -> None:
    """The device is gone: every call that needs it fails from now on, and waiting for it ends at once."""
    library().aclstubLoseDevice(device)
