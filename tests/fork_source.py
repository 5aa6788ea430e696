"""A process that holds a model's weights on a device and offers them to others: the other end of the tests of NPU-fork.

`python -m tests.fork_source DEVICE MODEL DTYPE QUANTIZATION INDEX [OFFER]`; DEVICE: npu, cuda, or host: the cuda device in this
machine's memory; OFFER: where it takes the weights from itself. Prints what it offers, then does what it reads, and prints how
that went.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np

from engine import models, native, weight_slabs, weights
from engine.native import ipc
from engine.native.ipc import DeviceRange, Direction
from engine.types import Packing, Quantization, UserError, WeightSource

ROOT = Path(__file__).resolve().parent.parent


def device(kind: str, dtype: str, index: int) -> Any:
    """A device of `kind` as this file's first argument names it."""
    if kind == "npu":
        from engine.devices.npu import NpuDevice

        return NpuDevice(dtype, index, graphs=False)
    from engine.devices.cuda import CudaDevice, open_cuda

    if kind == "cuda":
        return open_cuda(dtype, index)
    import torch

    from tests.test_devices_cuda import HOST

    class Numbered(CudaDevice):
        """In this machine's memory, which is one; so the number is all that tells a device from the next."""

        @property
        def index(self) -> int:
            return index

    return Numbered(dtype, torch.device("cpu"), graphs=False, api=HOST)


class Packed:
    """A model packed as the keeper packs it."""

    def __init__(self, path: Path, dtype: str, quantization: Quantization = "auto"):
        checkpoint = weights.open_checkpoint(path)
        self.model = models.build(checkpoint.config)
        fd = os.memfd_create("packed")
        manifest = weights.pack(checkpoint, self.model.weights(), Packing(dtype, "rows", quantization), fd)
        self.parts = weights.map_slabs(manifest, [fd])
        self.description = weights.Description(checkpoint.config, manifest)
        os.close(fd)


def overwrite(memory: DeviceRange, at: int, data: bytes) -> None:
    """Write to a slab, as a process that has gone mad would."""
    place, length, stop = np.array([at], np.int64), np.array([len(data)], np.int64), np.zeros(1, np.int32)
    source, zero = np.frombuffer(data, np.uint8), np.zeros(1, np.int64)
    arguments = place.ctypes.data, zero.ctypes.data, length.ctypes.data, 1, stop.ctypes.data, 0
    where = memory.kind.encode(), memory.device, Direction.TO_DEVICE, memory.address, source.ctypes.data
    assert native.load().ipc_copy(*where, *arguments) == len(data), ipc.error()


def main(kind: str, path: str, dtype: str, quantization: Quantization, index: str, offer: str = "") -> None:
    packed, opened = Packed(Path(path), dtype, quantization), device(kind, dtype, int(index))
    loaded = weight_slabs.take(opened, decoded(offer)) if offer else weight_slabs.fill(opened, packed.model.own(packed.parts))
    print(encoded(weight_slabs.export(loaded, 8 if offer else 7, packed.description)), flush=True)
    for line in sys.stdin:
        if line.strip() == "close":
            try:
                loaded.slabs.close()
                print("closed", flush=True)
            except (UserError, OSError) as e:
                print(e, flush=True)
        else:
            entry = next(e for e in loaded.placed.entries if e.name == line.strip())
            overwrite(loaded.slabs.ranges[entry.slab], entry.offset, b"spoilt")
            print("spoilt", flush=True)


def encoded(offer: WeightSource | None) -> str:
    return msgspec.msgpack.encode(offer).hex()


def decoded(offer: str) -> WeightSource:
    return msgspec.msgpack.decode(bytes.fromhex(offer), type=WeightSource)


class Source(SimpleNamespace):
    """This file's process, and what it offers."""

    process: subprocess.Popen[str]
    offer: WeightSource

    def ask(self, line: str) -> str:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def started(
    kind: str,
    path: Path,
    dtype: str = "float32",
    quantization: Quantization = "auto",
    index: int = 0,
    environment: Mapping[str, str] | None = None,
    offer: WeightSource | None = None,
) -> Iterator[Source]:
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "tests.fork_source",
            kind,
            path,
            dtype,
            quantization,
            str(index),
            *([encoded(offer)] if offer else []),
        ],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout
        line = process.stdout.readline().strip()
        assert line, "the source could not load its weights"
        yield Source(process=process, offer=decoded(line))
    finally:
        process.communicate(timeout=60)
        assert process.returncode in (0, -9)


if __name__ == "__main__":
    main(*sys.argv[1:])
