"""DistFlow between accelerators' memories: the npu over the stub of its runtime, in two processes; cuda where a driver is."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engine.config import Config, Role, Seat
from engine.devices.kv_pool import DevicePool, KVPool
from engine.distflow import Completion, DistFlow, Spans
from engine.native import checksum, ipc
from engine.native.ipc import DeviceRange
from engine.types import DeviceMemory, KVLayout, Peer, UserError
from engine.worker import to_be_shown
from tests.npu import stub
from tests.npu.stub import Faults, Unavailable

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
SIZE = 40 * MIB  # more than ipc.c copies at once
LAYOUT = KVLayout("any", 1, SIZE, 1, SIZE, 1, SIZE, 16, 1, SIZE)
OWN, OTHER = 1, 2

# A process that exports device memory, and says what is in it when asked.
OWNER = """
import sys
from tests.test_distflow_devices import SIZE, Npu, checksum, ipc, noise
npu = Npu(int(sys.argv[1]))
memory = npu.allocate(SIZE)
noise(npu.bytes(memory), 5)
name = ipc.export(memory)
print(name.hex(), flush=True)
for line in sys.stdin:
    print(checksum(npu.bytes(memory)), flush=True)
ipc.close_export(memory, name)
npu.free(memory)
"""

# A process whose device fails at the second asynchronous copy, and whose exports are refused.
FAULTY = """
import contextlib
from tests.test_distflow_devices import OWN, SIZE, DistFlow, Npu, ipc, spans
npu = Npu(0)
memory = npu.allocate(SIZE)
with contextlib.closing(DistFlow(memory, OWN)) as flow:
    for _ in range(3):
        done = flow.transfer(spans(OWN, (0, 1000)), spans(OWN, (2000, 1000)))
        assert done.wait(30)
        print(done.error, done.nbytes)
try:
    ipc.export(memory)
except OSError as e:
    print(e)
"""


class Npu:
    """A device of the stub in this process; its memory can be read and written like any other."""

    def __init__(self, device: int):
        self.acl = ctypes.CDLL(str(stub.build() / "libascendcl.so"))
        self.device = device
        assert self.acl.aclrtSetDevice(device) == 0

    def allocate(self, nbytes: int) -> DeviceRange:
        at = ctypes.c_void_p()
        assert self.acl.aclrtMalloc(ctypes.byref(at), ctypes.c_size_t(nbytes), 0) == 0 and at.value
        return DeviceRange("npu", self.device, at.value, nbytes)

    def free(self, memory: DeviceRange) -> None:
        assert self.acl.aclrtFree(ctypes.c_void_p(memory.address)) == 0

    @staticmethod
    def bytes(memory: DeviceRange) -> np.ndarray:
        return np.frombuffer((ctypes.c_char * memory.nbytes).from_address(memory.address), np.uint8)


def noise(view: np.ndarray, seed: int) -> np.ndarray:
    view[:] = np.random.default_rng(seed).integers(0, 256, len(view), np.uint8)
    return view


def spans(te: int, *runs: tuple[int, int]) -> Spans:
    offsets, lengths = np.array(runs, np.int64).reshape(-1, 2).T
    return Spans(te, offsets, lengths)


def finished(completion: Completion) -> Completion:
    assert completion.wait(30)
    return completion


@pytest.fixture(scope="module")
def npu() -> Npu:
    try:
        return Npu(0)
    except Unavailable as e:
        pytest.skip(str(e))


def start(code: str, *arguments: str, faults: Faults = Faults()) -> subprocess.Popen[str]:  # noqa: B008 - it is frozen
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACL_STUB": faults.environment()},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


class Owner:
    """Another process that has exported memory of a device."""

    def __init__(self, device: int = 0):
        self.process = start(OWNER, str(device))
        assert self.process.stdout
        name = bytes.fromhex(self.process.stdout.readline())
        self.peer = Peer(OTHER, DeviceMemory(self.process.pid, "npu", device, name, SIZE), LAYOUT, 16)

    def checksum(self) -> int:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("?\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@contextlib.contextmanager
def owner(device: int = 0) -> Iterator[Owner]:
    made = Owner(device)
    try:
        yield made
    finally:
        made.process.communicate(timeout=30)
        assert made.process.returncode in (0, -9)


@pytest.fixture(scope="module")
def neighbour(npu: Npu) -> Iterator[Owner]:
    with owner() as made:
        yield made


RUNS = [(3 * MIB, 20 * MIB), (0, 7), (30 * MIB, 3), (MIB, 5)]
LANDED = [(0, 20 * MIB), (39 * MIB, 15)]


def expected(target: np.ndarray, source: np.ndarray) -> np.ndarray:
    data, at = np.concatenate([source[o : o + n] for o, n in RUNS]), 0
    for offset, length in LANDED:
        target[offset : offset + length] = data[at : at + length]
        at += length
    return target


@pytest.mark.parametrize("device", [0, 1])
def test_between_devices_memories(npu, device):
    """Own memory of device 0, the other process's of device 0 or 1: read and written, as the other sees it."""
    memory = npu.allocate(SIZE)
    mine, far = noise(npu.bytes(memory), 1), noise(np.zeros(SIZE, np.uint8), 5)
    with owner(device) as other, contextlib.closing(DistFlow(memory, OWN)) as flow:
        flow.link_cluster([other.peer])
        done = finished(flow.transfer(spans(OWN, *RUNS), spans(OTHER, *LANDED)))
        assert done.error is None and done.nbytes == 20 * MIB + 15
        expected(far, mine)
        assert other.checksum() == checksum(far)
        want = expected(mine.copy(), far)
        assert finished(flow.transfer(spans(OTHER, *RUNS), spans(OWN, *LANDED))).error is None
        assert (mine == want).all()
    npu.free(memory)


def test_between_a_device_and_the_host(neighbour):
    """What the DRAM tier needs: host memory of this process, device memory of another's."""
    pool = KVPool(SIZE)
    mine = noise(np.frombuffer(pool.view, np.uint8), 1)
    with contextlib.closing(DistFlow(pool.view, OWN)) as flow:
        flow.link_cluster([neighbour.peer])
        assert finished(flow.transfer(spans(OWN, (0, SIZE)), spans(OTHER, (0, SIZE)))).error is None
        assert neighbour.checksum() == checksum(mine)
        mine[:] = 0
        assert finished(flow.transfer(spans(OTHER, *RUNS), spans(OWN, *LANDED))).error is None
        assert (mine == expected(np.zeros(SIZE, np.uint8), noise(np.zeros(SIZE, np.uint8), 1))).all()


def test_stopped_between_batches(neighbour):
    """Cancel and timeout act within a batch; what is copied has arrived whole."""
    runs = 20_000
    src, dst = (Spans(te, np.zeros(runs, np.int64), np.full(runs, 16 * MIB)) for te in (OTHER, OWN))
    pool = KVPool(SIZE)
    with contextlib.closing(DistFlow(pool.view, OWN)) as flow:
        flow.link_cluster([neighbour.peer])
        late = finished(flow.transfer(src, dst, timeout=0.02))
        assert late.error == "timed out" and late.nbytes % (16 * MIB) == 0
        pool.view[:8] = bytes(8)
        stopped = flow.transfer(src, dst)
        while bytes(pool.view[:8]) == bytes(8):
            assert not stopped.wait(0.001)
        stopped.cancel()
        assert finished(stopped).cancelled and 0 < stopped.nbytes < runs * 16 * MIB and stopped.nbytes % (16 * MIB) == 0


def test_an_owner_that_dies(npu):
    memory = npu.allocate(2 * MIB)
    with owner() as other, contextlib.closing(DistFlow(memory, OWN)) as flow:
        flow.link_cluster([other.peer])
        other.process.kill()
        other.process.wait()
        assert finished(flow.transfer(spans(OWN, (0, 9)), spans(OTHER, (0, 9)))).error == "TE 2 has ended"
        flow.unlink(OTHER)
        with pytest.raises(UserError, match="TE 2"):
            flow.link_cluster([other.peer])
    npu.free(memory)


def test_what_the_runtime_says_is_told(npu):
    process = start(FAULTY, faults=Faults(copy_fails_after=2, refuse_export=1))
    out, _ = process.communicate(timeout=30)
    fine, failed, again, refused = out.splitlines()
    assert fine == again == "None 1000"
    assert failed.startswith("aclrtMemcpyAsync: error") and "a copy of 1000 bytes failed" in failed
    assert refused.startswith("aclrtIpcMemGetExportKey: error") and "exports no memory" in refused


def test_a_pair_needs_pools_that_can_be_exported(npu):
    class Cache:
        pool, layout = DevicePool(DeviceRange("npu", 0, 0, 2 * MIB)), LAYOUT

    def shown(reachable: bool, role: Role = "colocated", pd: str = "") -> Peer | None:
        config = Config(device="npu", block_size=128, pd=pd)
        birth = SimpleNamespace(te=1, config=config, seat=Seat(role), reachable=reachable, lender=None)
        return to_be_shown(birth, Cache())

    with pytest.raises(UserError, match=r"--pd 1p1d: the npu's runtime .*aclrtIpcMemGetExportKey.*; leave it out") as e:
        shown(True, "prefill", "1p1d")
    assert e.value.param == "pd" and shown(True) is shown(False) is None
    memory = npu.allocate(2 * MIB)
    Cache.pool = DevicePool(memory)
    assert shown(False) is None and Cache.pool.exported is None, "one TE alone shows nothing"
    peer = shown(True)
    assert (peer.te, peer.layout, peer.memory.nbytes) == (1, LAYOUT, 2 * MIB) and peer.memory is Cache.pool.memory
    ipc.close_export(memory, peer.memory.name)
    npu.free(memory)


def test_names_that_are_none(npu):
    for name, why in ((b"short", "5 bytes"), (b"stub-1-1".ljust(ipc.NAME_BYTES, b"\0"), "aclrtIpcMemImportByKey")):
        memory = DeviceMemory(os.getpid(), "npu", 0, name, MIB)
        with contextlib.closing(DistFlow(None, OWN)) as flow, pytest.raises(UserError, match=why):
            flow.link_cluster([Peer(OTHER, memory, LAYOUT, 16)])
    with pytest.raises(OSError, match="memory of tpu"):
        ipc.export(DeviceRange("tpu", 0, 0, MIB))
    with pytest.raises(OSError, match="device 64"):
        ipc.export(DeviceRange("npu", 64, 0, MIB))


def test_no_runtime_is_loaded_before_it_is_needed():
    code = """
import contextlib
from engine.devices.kv_pool import KVPool
from engine.distflow import DistFlow
from tests.test_distflow_devices import OWN, DeviceRange, ipc, spans
with contextlib.closing(DistFlow(KVPool(2 << 20).view, OWN)) as flow:
    assert flow.transfer(spans(OWN, (0, 9)), spans(OWN, (100, 9))).wait(30)
assert "libascendcl" not in open("/proc/self/maps").read()
try:
    ipc.export(DeviceRange("npu", 0, 0, 2 << 20))
except OSError as e:
    print(e)
"""
    environment = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert "libascendcl.so" in out.stdout, "what is missing is named"


# ---- cuda ------------------------------------------------------------------------------------------------------------------

CUDA_OWNER = """
import sys
import torch
from engine.native import ipc
from engine.native.ipc import DeviceRange
memory = torch.arange(8 << 20, dtype=torch.int32, device="cuda")
at = DeviceRange("cuda", 0, memory.data_ptr(), memory.nbytes)
torch.cuda.synchronize()
print(ipc.export(at).hex(), flush=True)
for line in sys.stdin:
    print(int(memory.sum()), flush=True)
"""


def test_cuda_between_two_processes():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError as e:
        pytest.skip(f"no CUDA driver: {e}")
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch sees no CUDA device")
    process = start(CUDA_OWNER)
    try:
        assert process.stdin and process.stdout
        name = bytes.fromhex(process.stdout.readline())
        mine = torch.zeros(8 << 20, dtype=torch.int32, device="cuda")
        own = DeviceRange("cuda", 0, mine.data_ptr(), mine.nbytes)
        peer = Peer(OTHER, DeviceMemory(process.pid, "cuda", 0, name, mine.nbytes), LAYOUT, 16)
        with contextlib.closing(DistFlow(own, OWN)) as flow:
            flow.link_cluster([peer])
            done = finished(flow.transfer(spans(OTHER, (0, 20 * MIB)), spans(OWN, (4 * MIB, 20 * MIB))))
            assert done.error is None
            assert (mine[MIB : 6 * MIB].cpu() == torch.arange(5 * MIB, dtype=torch.int32)).all()
            mine.fill_(1)
            torch.cuda.synchronize()
            assert finished(flow.transfer(spans(OWN, (0, mine.nbytes)), spans(OTHER, (0, mine.nbytes)))).error is None
            process.stdin.write("?\n")
            process.stdin.flush()
            assert int(process.stdout.readline()) == 8 << 20
    finally:
        process.communicate(timeout=60)
