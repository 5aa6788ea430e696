"""An accelerator's memory across processes of one box: what ipc.c offers, for the memory of a whole slab or pool.

`kind` and `device` are the engine's own words for it; the device is in use in this process already. Every call raises `OSError`
with what the runtime says.
"""

import ctypes
from enum import IntEnum
from typing import NamedTuple

from engine.native import load

NAME_BYTES = 80  # ipc.c: NAME


class DeviceRange(NamedTuple):
    """Memory of one of this process's devices."""

    kind: str
    device: int
    address: int
    nbytes: int


class Direction(IntEnum):
    """Of a copy (ipc.c: ds_ipc_copy)."""

    TO_DEVICE = 1
    TO_HOST = 2
    WITHIN = 3  # from device memory to device memory


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
    _check(load().ipc_open(kind.encode(), device, name, ctypes.byref(at)))
    assert at.value
    return DeviceRange(kind, device, at.value, nbytes)


def close_range(memory: DeviceRange, name: bytes) -> None:
    """The inverse of `open_range`."""
    _check(load().ipc_close(memory.kind.encode(), memory.device, name, memory.address))


def _check(code: int) -> None:
    if code:
        raise OSError(error())


def error() -> str:
    """Why this thread's last call failed."""
    return load().ipc_error().decode(errors="replace")
