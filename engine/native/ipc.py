"""Memory across processes of one box, an accelerator's above all: what the end of fork.c offers, for whole slabs and pools.

`kind` and `device` are the engine's own words for it ("cpu" is this machine's memory, which has no devices: 0); the device is in
use in this process already. Every call raises `OSError` with what the runtime says, and runs without the interpreter lock.
"""

import ctypes
from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from engine.native import load

NAME_BYTES = 80  # fork.c: NAME
SLAB_ALIGN = 2 << 20  # what slabs begin at and are a multiple of


class DeviceRange(NamedTuple):
    """Memory of one of this process's devices."""

    kind: str
    device: int
    address: int
    nbytes: int


class Direction(IntEnum):
    """Of a copy (fork.c: ds_ipc_copy)."""

    TO_DEVICE = 1
    TO_HOST = 2
    WITHIN = 3  # from device memory to device memory


def allocate(kind: str, device: int, nbytes: int) -> DeviceRange:
    """A slab of `nbytes`, a multiple of 2 MiB, in the runtime's own memory and not torch's. To be freed."""
    assert nbytes and nbytes % SLAB_ALIGN == 0, nbytes
    at = ctypes.c_void_p()
    _check(load().ipc_allocate(kind.encode(), device, nbytes, ctypes.byref(at)))
    assert at.value
    return DeviceRange(kind, device, at.value, nbytes)


def free(memory: DeviceRange) -> None:
    """The inverse of `allocate`. No other process may have it open, and nobody look at it any more."""
    _check(load().ipc_free(memory.kind.encode(), memory.device, memory.address))


def export(memory: DeviceRange) -> bytes:
    """The name by which other processes open it. On Ascend it starts and ends at multiples of 2 MiB. Close it when all have."""
    name = ctypes.create_string_buffer(NAME_BYTES)
    _check(load().ipc_export(memory.kind.encode(), memory.device, memory.address, memory.nbytes, name))
    return name.raw


def close_export(memory: DeviceRange, name: bytes) -> None:
    _check(load().ipc_close(memory.kind.encode(), memory.device, name, 0))


def open_range(kind: str, device: int, name: bytes, nbytes: int) -> DeviceRange:
    """What another process exported, in reach of this process's `device`. To be closed."""
    at = ctypes.c_void_p()
    if len(name) != NAME_BYTES:
        raise OSError(f"the name of {kind} memory has {len(name)} bytes, not {NAME_BYTES}")
    _check(load().ipc_open(kind.encode(), device, name, nbytes, ctypes.byref(at)))
    assert at.value
    return DeviceRange(kind, device, at.value, nbytes)


def close_range(memory: DeviceRange, name: bytes) -> None:
    """The inverse of `open_range`."""
    _check(load().ipc_close(memory.kind.encode(), memory.device, name, memory.address))


def copy(to: DeviceRange, source: DeviceRange, at: int, nbytes: int) -> None:
    """Bytes `at` to `at + nbytes` of a slab to the same place of another of its kind, by the device of `to`, on a stream of their
    own. They have arrived when this returns; who writes the source has been waited for."""
    place, length = np.array([at], np.int64), np.array([nbytes], np.int64)
    offsets = place.ctypes.data, place.ctypes.data, length.ctypes.data, 1, None, 0
    where = to.kind.encode(), to.device, Direction.WITHIN
    if load().ipc_copy(*where, to.address, source.address, *offsets) != nbytes:
        raise OSError(error())


def checksums(memory: DeviceRange, offsets: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """XXH64 of ranges of a slab, as `native.checksum` gives it of the same bytes."""
    at, sizes = np.array(offsets, np.int64), np.array(lengths, np.int64)
    found, stop = np.zeros(len(at), np.uint64), np.zeros(1, np.int32)
    where = memory.kind.encode(), memory.device, memory.address
    _check(load().ipc_checksum(*where, at.ctypes.data, sizes.ctypes.data, len(at), stop.ctypes.data, found.ctypes.data))
    return found.tolist()


def _check(code: int) -> None:
    if code:
        raise OSError(error())


def error() -> str:
    """Why this thread's last call failed."""
    return load().ipc_error().decode(errors="replace")
