"""Weights on an accelerator: a few slabs of its memory, as its operators want them, that other TEs can take them from (NPU-fork).

The first TE of a model fills its slabs from the packed ones in this machine's memory: it copies them over once, has the device
make its own form of them and puts that into the slabs. A manifest says what lies where, with a checksum of each tensor. A further
TE of the same model opens the slabs. On the same device it uses them where they are: weights are never written. On another it
copies each slab once, without the source's help, and checks what has come.

Who uses or copies a source's slabs holds a lock on the memfd of its description, which the system lets go when that process ends;
the source frees its memory only while nobody does. Imports no torch; what is the device's is behind engine.devices.SlabDevice.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from engine.devices import Form, SlabDevice
from engine.devices.kv_pool import open_memory, shown
from engine.models import WeightPart
from engine.native import ipc
from engine.native.ipc import SLAB_ALIGN, DeviceRange
from engine.types import DeviceMemory, LoadPath, Memory, OutOfMemory, UserError, WeightSource
from engine.weights import Description, Entry, Manifest, describe, read_description, round_up

Parts = dict[str, list[WeightPart]]

SLAB_BYTES = 4 << 30  # of one slab at most, unless a single weight is larger: few to export, and each still finds room
ALIGN = 512  # bytes: where a tensor may begin; what torch's own allocators give, and so what operators have been tried with
# Copied between two looks at whether the source still lives: some milliseconds over HCCS or NVLink.
PIECE = 256 << 20


@dataclass(slots=True)
class Slabs:
    """Slabs of one device: own ones, or opened ones that are another TE's."""

    ranges: list[DeviceRange]
    names: list[bytes] = field(default_factory=list)  # under which they were exported, or opened
    lease: int = -1  # opened ones have it: the descriptor that holds a lock on their owner's description
    description: int = -1  # exported: a memfd

    @property
    def mapped(self) -> bool:
        """They are another TE's."""
        return self.lease >= 0

    def close(self) -> None:
        """Let go of them; no tensor over them may be used any more. Raises `UserError` where another TE still uses them: the
        runtime wants that one to close first."""
        if self.mapped:
            for memory, name in zip(self.ranges, self.names, strict=True):
                ipc.close_range(memory, name)
            os.close(self.lease)
            self.ranges, self.lease = [], -1
            return
        if self.description >= 0:
            try:
                fcntl.flock(self.description, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError("another TE uses these weights or copies them; stop it first") from None
        for memory, name in zip(self.ranges, self.names, strict=False):
            ipc.close_export(memory, name)
        for memory in self.ranges:
            ipc.free(memory)
        if self.description >= 0:
            os.close(self.description)
        self.ranges, self.names, self.description = [], [], -1


@dataclass(slots=True)
class Loaded:
    """The weights of a TE."""

    tensors: dict[str, Any]  # opaque, by the model's names
    slabs: Slabs
    path: LoadPath
    placed: Manifest
    source: int = -1  # with "fork": the TE they came from
    fell: list[str] = field(default_factory=list)  # sources that did not work, and why


def load(device: SlabDevice, own: Callable[[Parts], Parts], sources: Sequence[WeightSource], host: Parts | None) -> Loaded:
    """A model's weights on `device`: from the first of `sources` that works, else from `host`, the packed ones in this machine's
    memory where they are there. `own`: which of them this rank wants. Raises `OutOfMemory`; `UserError` where all sources fail
    and there is nothing else."""
    fell: list[str] = []
    for source in sources:
        try:
            loaded = take(device, source)
        except OutOfMemory:
            raise
        except (OSError, UserError) as e:
            fell.append(f"the weights of TE {source.te} can't be had: {e}")
        else:
            return replace(loaded, fell=fell)
    if host is None:
        raise UserError("; ".join((*fell, "and no packed weights are in memory")))
    return replace(fill(device, own(host)), fell=fell)


# ---- from packed weights in this machine's memory -------------------------------------------------------------------


def fill(device: SlabDevice, parts: Parts) -> Loaded:
    """Fill slabs of our own. Raises `OutOfMemory`."""
    placed = layout({name: device.forms(part) for name, (part,) in parts.items()})  # row-major weights are of one dtype
    slabs = allocate(device, placed)
    try:
        places = [[slabs.ranges[e.slab].address + e.offset for e in group] for group in by_name(placed).values()]
        device.fill([part for (part,) in parts.values()], places)
        if device.several():  # else nobody will ever copy them
            placed = summed(slabs, placed)
    except BaseException:
        slabs.close()
        raise
    return Loaded(tensors(device, slabs, placed), slabs, "dram", placed)


def layout(forms: dict[str, list[Form]]) -> Manifest:
    """Where each tensor goes: one behind the other, in this order."""
    entries: list[Entry] = []
    sizes = [0]
    for name, made in forms.items():
        for form in made:
            begin = round_up(sizes[-1], ALIGN)
            if begin + form.nbytes > SLAB_BYTES and sizes[-1]:
                begin, sizes = 0, [*sizes, 0]
            place = (len(sizes) - 1, begin, form.nbytes)
            entries.append(Entry(name, form.dtype, form.shape, form.format, *place, 0, form.kind))
            sizes[-1] = begin + form.nbytes
    sizes = [round_up(size, SLAB_ALIGN) for size in sizes]
    return Manifest(entries, sizes, sum(sizes))


def allocate(device: SlabDevice, placed: Manifest) -> Slabs:
    slabs = Slabs([])
    try:
        for size in placed.slabs:
            slabs.ranges.append(ipc.allocate(device.memory, device.index, size))
    except OSError as e:
        slabs.close()
        raise OutOfMemory(
            f"--model: its weights, {placed.nbytes} bytes, don't fit the device's memory ({e}); use a smaller model", "model"
        ) from None
    return slabs


def summed(slabs: Slabs, placed: Manifest) -> Manifest:
    """The same with the checksums of what lies there."""
    found = iter(sums(slabs, placed))
    return msgspec.structs.replace(placed, entries=[msgspec.structs.replace(e, checksum=next(found)) for e in placed.entries])


def sums(slabs: Slabs, placed: Manifest) -> Iterator[int]:
    """Of each entry; they are in the order of the slabs."""
    for number, memory in enumerate(slabs.ranges):
        entries = [e for e in placed.entries if e.slab == number]
        yield from ipc.checksums(memory, [e.offset for e in entries], [e.nbytes for e in entries])


def by_name(placed: Manifest) -> dict[str, list[Entry]]:
    grouped: dict[str, list[Entry]] = {}
    for e in placed.entries:
        grouped.setdefault(e.name, []).append(e)
    return grouped


def tensors(device: SlabDevice, slabs: Slabs, placed: Manifest) -> dict[str, Any]:
    """The weights, over the slabs."""
    made = {}
    for name, entries in by_name(placed).items():
        forms = [form_of(e) for e in entries]
        addresses = [slabs.ranges[e.slab].address + e.offset for e in entries]
        made[name] = device.assembled(forms, [device.over(*pair) for pair in zip(forms, addresses, strict=True)])
    return made


def form_of(e: Entry) -> Form:
    return Form(e.kind, e.dtype, e.shape, e.format, e.nbytes)


# ---- from another TE ------------------------------------------------------------------------------------------------


def export(loaded: Loaded, te: int, description: Description) -> WeightSource | None:
    """What others take these weights by; None where they are another TE's. `description`: of the packed weights. Raises `OSError`
    where the runtime refuses."""
    slabs = loaded.slabs
    if slabs.mapped:
        return None
    for memory in slabs.ranges[len(slabs.names) :]:
        slabs.names.append(ipc.export(memory))
    slabs.description = os.memfd_create("deepserve-placed", os.MFD_CLOEXEC)
    describe(slabs.description, msgspec.structs.replace(description, placed=loaded.placed))
    made: list[Memory | DeviceMemory] = [
        DeviceMemory(os.getpid(), memory.kind, memory.device, name, memory.nbytes)
        for memory, name in zip(slabs.ranges, slabs.names, strict=True)
    ]
    return WeightSource(te, shown(slabs.description), made)


def take(device: SlabDevice, source: WeightSource) -> Loaded:
    """The weights of another TE, used where they are or copied. Raises `OSError` or `UserError` where that doesn't work."""
    memories = [m for m in source.slabs if isinstance(m, DeviceMemory) and m.kind == device.memory]
    if not memories or len(memories) != len(source.slabs):
        raise UserError("they are not in memory of this kind of device")
    with contextlib.ExitStack() as held:
        life = os.pidfd_open(source.description.pid)
        held.callback(os.close, life)
        lease = open_memory(source.description, writable=False)  # also says that it is that process and no later one of its id
        held.callback(os.close, lease)
        try:
            fcntl.flock(lease, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("it is freeing them") from None
        placed = fitting(device, read_description(lease))
        if [m.nbytes for m in memories] != placed.slabs:
            raise UserError("its slabs are not those of its manifest")
        if all(m.device == device.index for m in memories):
            slabs = Slabs([], lease=os.dup(lease))  # the same lock, held until both are closed
            with undoing(slabs):
                for memory in memories:
                    slabs.ranges.append(ipc.open_range(memory.kind, device.index, memory.name, memory.nbytes))
                    slabs.names.append(memory.name)
                alive(life, "")
        else:
            slabs = allocate(device, placed)
            with undoing(slabs):
                for to, memory in zip(slabs.ranges, memories, strict=True):
                    copy(to, memory, life)
                check(slabs, placed)
        return Loaded(tensors(device, slabs, placed), slabs, "fork", placed, source.te)


@contextlib.contextmanager
def undoing(slabs: Slabs) -> Iterator[None]:
    try:
        yield
    except BaseException:
        slabs.close()
        raise


def fitting(device: SlabDevice, description: Description) -> Manifest:
    """The manifest of a source's slabs, if they hold what this device would make itself of the packed weights."""
    if description.placed is None:
        raise UserError("its description names no slabs on a device")
    wanted = {
        e.name: device.forms(WeightPart(memoryview(b""), e.dtype, e.shape, e.kind, e.format))
        for e in description.manifest.entries
    }
    found = {name: [form_of(e) for e in entries] for name, entries in by_name(description.placed).items()}
    if found != wanted:
        raise UserError("they are laid out for other settings; give both the same --dtype and --quantization")
    return description.placed


def copy(to: DeviceRange, memory: DeviceMemory, life: int) -> None:
    """Copy a slab from another device of the box."""
    far = ipc.open_range(memory.kind, to.device, memory.name, memory.nbytes)
    try:
        for at in range(0, to.nbytes, PIECE):
            ipc.copy(to, far, at, min(PIECE, to.nbytes - at))
            alive(life, f" when {min(at + PIECE, to.nbytes)} of a slab's {to.nbytes} bytes were copied")
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            ipc.close_range(far, memory.name)
        raise
    ipc.close_range(far, memory.name)


def alive(life: int, when: str) -> None:
    """Raises `UserError` where the process behind the pidfd has ended."""
    ended, _, _ = select.select([life], [], [], 0)
    if ended:
        raise UserError(f"its process ended{when}")


def check(slabs: Slabs, placed: Manifest) -> None:
    """Raises `UserError` where copied slabs don't hold what they should."""
    for e, found in zip(placed.entries, sums(slabs, placed), strict=True):
        if found != e.checksum:
            raise UserError(f"{e.name} has checksum {found:016x} here, and {e.checksum:016x} there")
