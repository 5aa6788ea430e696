"""A device held to a share of itself computes the same: shares that change from another thread at random moments of a program."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from engine.devices.cpu import CpuDevice
from engine.devices.cuda import MPS_SHARE, CudaDevice
from engine.native import cpu
from engine.types import UserError
from tests import tiny
from tests.harness import Rig

PROMPT = list(range(3, 90))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Large enough that a text takes some hundredths of a second: a team rests only when it has worked for milliseconds."""
    shape = {"num_hidden_layers": 8, "hidden_size": 256, "head_dim": 64, "intermediate_size": 1024}
    return tiny.make(tmp_path_factory.mktemp("tiny") / "m", **shape)


@pytest.fixture(scope="module")
def text(path):
    """40 ids after `PROMPT`, from a team that never rests."""
    rig = Rig(path, native=1, blocks=64)
    ids = rig.greedy(PROMPT, 40)
    rig.close()
    return ids


@contextmanager
def restless(set_share: Callable[[int], None], seed: int) -> Iterator[None]:
    """Another thread sets random shares at random moments until the body is done."""
    over = threading.Event()

    def set_and_set() -> None:
        rng = random.Random(seed)
        while not over.wait(rng.choice([0, 0.001, 0.02])):
            set_share(rng.choice([10, 10, 35, 50, 60, 99, 100]))

    thread = threading.Thread(target=set_and_set)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_texts_and_logits_are_the_same_under_changing_shares(path, text, threads):
    rig = Rig(path, native=threads, blocks=64)
    table = rig.table(len(PROMPT))
    logits = rig.logits([(PROMPT, 0, len(PROMPT))], [table])
    with restless(rig.device.set_share, threads):
        for _ in range(4):
            assert (rig.logits([(PROMPT, 0, len(PROMPT))], [table]) == logits).all()
        assert rig.greedy(PROMPT, 40) == text
    rig.close()


@pytest.mark.parametrize("percent", [10, 25, 34, 50, 67, 90])
def test_every_share_comes_to_an_end(path, text, percent):
    """Set before the first step, which makes the team; with one member at work, with all, with all of them resting in turn."""
    for threads in (1, 3):
        rig = Rig(path, native=threads, blocks=64)
        rig.device.set_share(percent)
        assert rig.greedy(PROMPT, 12) == text[:12]
        rig.close()


def test_a_team_ends_while_it_has_a_small_share() -> None:
    a, b = np.zeros((4, 64), np.float32), np.ones((4, 64), np.float32)
    ops = (cpu.Op * 60)(*(cpu.Op(kind=cpu.TAKE_ROWS, sampled=1, out=a.ctypes.data, x=b.ctypes.data, n=64) for _ in range(60)))
    rows = np.arange(4, dtype=np.int32)
    step = cpu.Step(tokens=4, sampled=4, rows=rows.ctypes.data)
    for percent in (1, 10, 40):
        team = cpu.Team(2)
        team.share(percent)
        team.run(ops, step)
        assert (a == b).all()
        for _ in range(8):
            team.launch(ops, step)
        team.close()
        with pytest.raises(RuntimeError, match="closed"):
            team.share(50)


@pytest.mark.parametrize("percent", [0, 101, -5])
def test_what_is_no_share(percent):
    team = cpu.Team(1)
    with pytest.raises(ValueError, match=f"a share of {percent} percent: it must be 1 to 100"):
        team.share(percent)
    team.close()


def test_the_reference_takes_whole_threads(path):
    rig = Rig(path, blocks=64, device=CpuDevice("float32", threads=4))
    want = rig.greedy(PROMPT, 3)
    seen = []
    for percent in (50, 10, 80, 100):
        rig.device.set_share(percent)
        assert rig.greedy(PROMPT, 3) == want
        seen.append(rig.device._worker.submit(torch.get_num_threads).result())
    assert seen == [2, 1, 3, 4]
    rig.close()


def test_cuda_has_the_share_that_it_started_with(monkeypatch, tmp_path):
    device = CudaDevice.__new__(CudaDevice)
    monkeypatch.delenv(MPS_SHARE, raising=False)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    device.set_share(100)
    with pytest.raises(UserError, match=f"started with 100, and .* start it with {MPS_SHARE}=60"):
        device.set_share(60)
    monkeypatch.setenv(MPS_SHARE, "60")
    with pytest.raises(UserError, match="start nvidia-cuda-mps-control -d"):
        device.set_share(60)
    (tmp_path / "control").touch()
    device.set_share(60)
