"""The selftest's look at NPU-fork: a model's weights into slabs of the device, and from there to another process, on the same
device and on the next one where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from engine import models, weight_slabs, weights
from engine.devices import open_device
from engine.types import Packing, UserError, WeightSource

PATIENCE = 300.0  # seconds for a process that imports torch, opens a device and takes the weights


class Taken(msgspec.Struct):
    """What a process says that took the weights."""

    mapped: bool
    seconds: float
    wrong: list[str]  # weights whose bytes are not the source's


class Found(NamedTuple):
    case: str
    ok: bool
    found: str
    rate: float = 0.0  # GB/s


def looked_at(name: str, path: Path, packing: Packing) -> Iterator[Found]:
    """The checks, as they are made. Raises `OSError` or `UserError` where the runtime doesn't offer what it takes."""
    checkpoint = weights.open_checkpoint(path)
    model = models.build(checkpoint.config)
    fd = os.memfd_create("weights")
    manifest = weights.pack(checkpoint, model.weights(), packing, fd)
    parts = model.own(weights.map_slabs(manifest, [fd]))
    os.close(fd)
    device: Any = open_device(name, packing.dtype, 1, packing.format)
    began = time.perf_counter()
    loaded = weight_slabs.fill(device, parts)
    seconds = time.perf_counter() - began
    loaded.placed = weight_slabs.summed(loaded.slabs, loaded.placed)
    size = loaded.placed.nbytes / 1e9
    yield Found("filled from this machine's memory", True, f"{size:.2f} GB in {seconds:.3f} s", size / seconds)
    offer = weight_slabs.export(loaded, 0, weights.Description(checkpoint.config, manifest))
    for index in (0, 1) if device.several() else (0,):
        taken = in_another_process(name, packing.dtype, index, offer)
        how = "mapped" if taken.mapped else "copied"
        case = f"{how} by another process, " + ("on the same device" if index == 0 else "on the next device")
        found = f"{taken.seconds:.3f} s" + "".join(f"; {wrong} is not what it was" for wrong in taken.wrong[:1])
        yield Found(case, not taken.wrong and taken.mapped == (index == 0), found, size / taken.seconds)
    loaded.slabs.close()


def in_another_process(name: str, dtype: str, index: int, offer: WeightSource | None) -> Taken:
    code = "import sys; from engine.devices.fork_check import taker; taker(*sys.argv[1:])"
    arguments = [name, dtype, str(index), msgspec.msgpack.encode(offer).hex()]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False)
    if done.returncode:
        raise UserError((done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"])[-1])
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Taken)


def taker(name: str, dtype: str, index: str, offer: str) -> None:
    """In a process of its own: take the weights, look at them, say how it went."""
    device: Any = open_device(name, dtype, 1, index=int(index))
    source = msgspec.msgpack.decode(bytes.fromhex(offer), type=WeightSource)
    began = time.perf_counter()
    loaded = weight_slabs.take(device, source)
    seconds = time.perf_counter() - began
    found = weight_slabs.sums(loaded.slabs, loaded.placed)
    wrong = [e.name for e, checksum in zip(loaded.placed.entries, found, strict=True) if e.checksum != checksum]
    told = Taken(loaded.slabs.mapped, seconds, wrong)
    loaded.slabs.close()
    print(msgspec.json.encode(told).decode(), flush=True)
