"""NPU-fork: slabs of weights between processes. In this machine's memory for real, where the cuda device's own code runs over it;
for the npu over the stub of its runtime, without the plugin here and with it in tests/npu/fork_cases.py. On GPUs:
tests/test_devices_cuda.py."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine import native, weight_slabs
from engine.devices import Form
from engine.models import WeightPart
from engine.native import ipc
from engine.native.ipc import SLAB_ALIGN, DeviceRange
from engine.types import DeviceMemory, Memory, UserError, WeightSource
from tests import tiny
from tests.fork_source import Packed, Source, device, started
from tests.harness import Rig
from tests.npu import environment, stub
from tests.npu.stub import Faults, Unavailable

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
SIZE = 40 * MIB  # more than is copied or summed up at once
RANGES = [(0, 0), (3, 31), (64, 32), (100, 17 * MIB + 5), (20 * MIB, 16 * MIB), (SIZE - 1, 1)]

# A process with a slab of a kind's device 0, which it exports; a line "close" ends the export, the end of its input all of it. It
# imports little: most tests start one.
OWNER = f"""
import ctypes, sys
import numpy as np
from engine.native import ipc
kind, library = sys.argv[1:]
if library:
    assert ctypes.CDLL(library).aclrtSetDevice(0) == 0
memory = ipc.allocate(kind, 0, {SIZE})
view = np.frombuffer((ctypes.c_char * memory.nbytes).from_address(memory.address), np.uint8)
view[:] = np.random.default_rng(5).integers(0, 256, {SIZE}, np.uint8)
name = ipc.export(memory)
print(name.hex(), flush=True)
for line in sys.stdin:
    try:
        ipc.close_export(memory, name)
        ipc.free(memory)
        print("closed", flush=True)
    except OSError as e:
        print(e, flush=True)
"""


def bytes_of(memory: DeviceRange) -> np.ndarray:
    """Of a slab; the stub's devices have host memory too."""
    return np.frombuffer((ctypes.c_char * memory.nbytes).from_address(memory.address), np.uint8)


def noise() -> np.ndarray:
    """What is in an owner's slab."""
    return np.random.default_rng(5).integers(0, 256, SIZE, np.uint8)


class Owner:
    """That process. `way`: "cpu", or how the npu's memory is exported."""

    def __init__(self, way: str):
        self.way, self.kind = way, "cpu" if way == "cpu" else "npu"
        library = str(stub.build() / "libascendcl.so") if self.kind == "npu" else ""
        if library:  # the device is in use here too, as torch would have it
            assert ctypes.CDLL(library).aclrtSetDevice(0) == 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWNER, self.kind, library],
            cwd=ROOT,
            env={**os.environ, "ACL_STUB": Faults(no_mappings=way == "keys").environment()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        self.name = bytes.fromhex(self.process.stdout.readline())

    def close(self) -> str:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("close\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()


@pytest.fixture(params=["cpu", "mappings", "keys"])
def owner(request) -> Iterator[Owner]:
    try:
        made = Owner(request.param)
    except Unavailable as e:
        pytest.skip(str(e))
    yield made
    made.process.communicate(timeout=30)


# ---- the interface: one for every kind of memory --------------------------------------------------------------------


def test_another_process_reads_a_slab(owner):
    """Opened, it is the same memory; copied, another's; checksums are those of the bytes, within batches and across them."""
    there = ipc.open_range(owner.kind, 0, owner.name, SIZE)
    assert there.address % SLAB_ALIGN == 0 and np.array_equal(bytes_of(there), noise())
    found = ipc.checksums(there, *zip(*RANGES, strict=True))
    assert found == [native.checksum(noise()[at : at + count].tobytes()) for at, count in RANGES]
    own = ipc.allocate(owner.kind, 0, SIZE)
    ipc.copy(own, there, 0, 18 * MIB)
    ipc.copy(own, there, 18 * MIB, SIZE - 18 * MIB)
    ipc.close_range(there, owner.name)
    assert np.array_equal(bytes_of(own), noise())
    ipc.free(own)
    with pytest.raises(OSError, match="no slab of this process"):
        ipc.free(own)
    with pytest.raises(OSError, match="nothing is open there"):
        ipc.close_range(there, owner.name)


def test_the_exporter_closes_last(owner):
    there = ipc.open_range(owner.kind, 0, owner.name, SIZE)
    if owner.way == "keys":
        with pytest.raises(OSError, match="it is open already"):
            ipc.open_range(owner.kind, 0, owner.name, SIZE)
        assert "another process still imports" in owner.close()
        ipc.close_range(there, owner.name)
        assert owner.close() == "closed"
    else:  # who has it mapped keeps it
        assert owner.close() == "closed" and np.array_equal(bytes_of(there), noise())
        ipc.close_range(there, owner.name)
    with pytest.raises(OSError, match=r"gone|closed"):
        ipc.open_range(owner.kind, 0, owner.name, SIZE)


def test_an_owner_that_is_gone(owner):
    owner.process.kill()
    owner.process.wait()
    with pytest.raises(OSError, match="gone"):
        ipc.open_range(owner.kind, 0, owner.name, SIZE)


def test_a_descriptor_that_is_something_else_now():
    slab = ipc.allocate("cpu", 0, 2 * MIB)
    name = ipc.export(slab)
    with pytest.raises(OSError, match="something else now"):
        ipc.open_range("cpu", 0, name, 4 * MIB)
    with pytest.raises(OSError, match="only whole slabs"):
        ipc.export(slab._replace(nbytes=MIB))
    ipc.free(slab)
    with pytest.raises(OSError, match="gone"):
        ipc.open_range("cpu", 0, name, 2 * MIB)


def test_what_is_opened_is_read_only():
    """A write to another TE's weights must end the writer, not the others."""
    owner = Owner("cpu")
    code = f"""
import ctypes
from engine.native import ipc
ctypes.memset(ipc.open_range("cpu", 0, bytes.fromhex({owner.name.hex()!r}), {SIZE}).address, 0, 1)
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True).returncode == -11
    owner.process.communicate(timeout=30)


# ---- weights in slabs -----------------------------------------------------------------------------------------------


def test_where_tensors_go(monkeypatch):
    """One behind the other at multiples of what operators want, in slabs of a bounded size unless one tensor is larger."""
    monkeypatch.setattr(weight_slabs, "SLAB_BYTES", 3 * MIB)
    sizes = [100, 600, 2 * MIB, MIB, 5 * MIB, 10]
    forms = {f"w{i}": [Form("matrix", "int8", (n,), "rows", n)] for i, n in enumerate(sizes)}
    placed = weight_slabs.layout(forms)
    assert [(e.slab, e.offset) for e in placed.entries] == [(0, 0), (0, 512), (0, 1536), (1, 0), (2, 0), (3, 0)]
    assert placed.slabs == [4 * MIB, 2 * MIB, 6 * MIB, 2 * MIB] and placed.nbytes == sum(placed.slabs)


def test_what_lies_side_by_side_goes_over_in_one_copy(monkeypatch):
    from engine.devices import torch_device

    data = np.arange(1000, dtype=np.uint8).data.cast("B")
    spans = [(0, 60), (64, 10), (128, 100), (256, 300), (600, 20), (640, 40)]
    parts = [WeightPart(data[a : a + n], "int8", (n,)) for a, n in spans]
    assert list(torch_device.windows(parts)) == [slice(0, 4), slice(4, 6)] or spans[4][0] % 64
    monkeypatch.setattr(torch_device, "WINDOW_BYTES", 200)
    whole = [p for w in torch_device.windows(parts) for p in parts[w]]
    assert whole == parts
    for window in torch_device.windows(parts):
        some = parts[window]
        assert len(some) == 1 or len(torch_device.spanning(some)) <= 200
    assert list(torch_device.windows([])) == []


@pytest.fixture(scope="session")
def path(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny", "Qwen2ForCausalLM")


@pytest.fixture(scope="session")
def source(path) -> Iterator[Source]:
    with started("host", path) as made:
        yield made


def text(path: Path, opened, tensors=None) -> list[int]:
    return Rig(path, device=opened, blocks=8, tensors=tensors).greedy([3, 1, 4, 1, 5, 9, 2, 6], 16)


@pytest.mark.parametrize("index", [0, 1])
def test_the_text_of_a_forked_te_is_that_of_a_loaded_one(path, source, index):
    plain, packed = text(path, device("host", "float32", index)), Packed(path, "float32")
    opened = device("host", "float32", index)
    loaded = weight_slabs.load(opened, packed.model.own, [source.offer], None)
    assert (loaded.path, loaded.source, loaded.fell, loaded.slabs.mapped) == ("fork", 7, [], index == 0)
    assert text(path, opened, loaded.tensors) == plain
    loaded.slabs.close()
    filled = weight_slabs.load(opened, packed.model.own, [], packed.parts)
    assert filled.path == "dram" and text(path, opened, filled.tensors) == plain
    filled.slabs.close()


def test_a_source_keeps_what_others_map(path):
    with started("host", path) as source:
        opened = device("host", "float32", 0)
        first, second = weight_slabs.take(opened, source.offer), weight_slabs.take(opened, source.offer)
        assert source.ask("close") == "another TE uses these weights or copies them; stop it first"
        first.slabs.close()
        assert "another TE" in source.ask("close")
        second.slabs.close()
        assert source.ask("close") == "closed"


def test_it_falls_to_the_next_source_and_then_to_packed_weights(path, source, monkeypatch):
    packed, opened = Packed(path, "float32"), device("host", "float32", 1)
    monkeypatch.setattr(weight_slabs, "PIECE", 64 << 10)
    plain = ipc.copy
    with started("host", path) as dying:

        def copy(to, far, at, nbytes) -> None:
            plain(to, far, at, nbytes)
            if at:
                dying.kill()

        monkeypatch.setattr(ipc, "copy", copy)
        loaded = weight_slabs.load(opened, packed.model.own, [dying.offer, source.offer], packed.parts)
    assert loaded.path == "fork" and loaded.fell == [
        "the weights of TE 7 can't be had: its process ended when 131072 of a slab's 2097152 bytes were copied"
    ]
    loaded.slabs.close()
    monkeypatch.setattr(ipc, "copy", plain)
    with started("host", path) as spoilt:
        assert spoilt.ask("layers.1.gate_up") == "spoilt"
        loaded = weight_slabs.load(opened, packed.model.own, [dying.offer, spoilt.offer], packed.parts)
    assert loaded.path == "dram" and "TE 7" in loaded.fell[0]
    assert "layers.1.gate_up has checksum" in loaded.fell[1] and text(path, opened, loaded.tensors)
    loaded.slabs.close()
    with pytest.raises(UserError, match="no packed weights are in memory"):
        weight_slabs.load(opened, packed.model.own, [dying.offer], None)


def test_what_is_not_taken(path, source):
    opened = device("host", "float32", 0)
    with pytest.raises(UserError, match="other settings"):
        weight_slabs.take(device("host", "bfloat16", 0), source.offer)
    te, description, (slab,) = source.offer.te, source.offer.description, source.offer.slabs
    assert isinstance(slab, DeviceMemory)
    with pytest.raises(UserError, match="not in memory of this kind"):
        weight_slabs.take(opened, WeightSource(te, description, [Memory(slab.pid, 0, 0, slab.nbytes)]))
    with pytest.raises(UserError, match="not those of its manifest"):
        weight_slabs.take(opened, WeightSource(te, description, [slab, slab]))
    with pytest.raises(UserError, match="something else now"):
        weight_slabs.take(opened, WeightSource(te, Memory(slab.pid, 0, description.inode, description.nbytes), [slab]))


def test_nothing_is_left_behind(path, source):
    """Descriptors and mappings of what was taken and given back, and of what could not be taken."""
    packed = Packed(path, "float32")

    def around() -> None:
        for index in (0, 1):
            opened = device("host", "float32", index)
            weight_slabs.take(opened, source.offer).slabs.close()
            loaded = weight_slabs.fill(opened, packed.model.own(packed.parts))
            assert weight_slabs.export(loaded, 1, packed.description) is not None
            loaded.slabs.close()
        with pytest.raises(UserError):
            weight_slabs.take(device("host", "bfloat16", 1), source.offer)

    def held() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), maps.count("deepserve-slab")

    around()
    before = held()
    for _ in range(3):
        around()
    assert held() == before


# ---- on the npu, with the plugin ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cases", ["all", "texts"], ids=["at_once", "queued"])
def test_npu_fork_over_the_stub(cases):
    """Queued: every stream of the process that takes weights, or fills slabs, runs in a thread of its own, so that a wait that is
    missing is seen."""
    try:
        environment.python()
    except Unavailable as e:
        pytest.skip(str(e))
    command = ["-m", "pytest", "-p", "no:cacheprovider", "-W", "error::UserWarning", "tests/npu/fork_cases.py"]
    if cases == "all":
        environment.run(command, timeout=300)
    else:
        environment.run([*command, "-k", cases], Faults(queued=1), timeout=300)
