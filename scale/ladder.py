"""The scaling ladder: how one TE comes to be, in the paper's five steps, each timed.

scaler_pre     a keeper is there, its code imported
te_pre_load    there is a process (a warm one, one forked from the keeper, or a fresh interpreter), its device open, its model
built te_load        weights: from a running TE (fork), packed and in memory (DRAM), or packed from the files (disk)
te_post_load   KV blocks, and one dummy request answered scaler_post    the TE's announcement has reached the scheduler

Each step takes the fastest path that is there; the climb says which it was, and why a faster one failed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

import msgspec

from engine import shmq
from engine.config import Config, Seat
from engine.types import LoadPath, Memory, Packing, Ready, UserError, WeightSource
from scale.keeper_client import KeeperClient, NothingPacked

# What is packed may be dropped again before the TE takes it, by somebody who needs the room; then it is packed once more.
MOST_PACKS = 3
STEPS = ("scaler_pre", "te_pre_load", "te_load", "te_post_load", "scaler_post")


class Plan(msgspec.Struct, frozen=True):
    """What the TEs of a model are."""

    key: str  # of the packed model
    packing: Packing
    path: str
    config: Config  # resolved
    weight_bytes: int  # of the packed model
    te_bytes: int  # that a TE may take beside the weights: its KV cache and its process


class Place(msgspec.Struct, frozen=True):
    """What one TE is."""

    seat: Seat
    ranks: int
    index: int  # of its first rank, among the cores or devices of the box
    threads: int
    reachable: bool  # other TEs may use its KV pool
    lends: bool  # ... and one computes in it


class Climb(msgspec.Struct):
    """One TE's way up: seconds by step. The worker's own steps arrive with its `Ready`."""

    te: int
    began: float  # CLOCK_MONOTONIC seconds
    steps: dict[str, float] = {}
    model: str = ""
    role: str = "colocated"
    why: str = ""  # it was started
    at: float = 0.0  # Unix seconds when it began
    how: str = ""  # how its process came: warm, fork, exec
    path: LoadPath | None = None  # how its weights came
    source: int = -1  # with "fork": from which TE
    fell: list[str] = []  # faster paths that were tried, and why they failed
    now: str | None = "scaler_pre"  # the step it is in; None: it is up

    def finish(self, ready: Ready, now: float) -> None:
        for name, seconds in ready.steps.items():
            self.steps[name] = self.steps.get(name, 0.0) + seconds
        self.steps["scaler_post"] = now - ready.at
        if self.path is None:  # else weights were packed for it, and that took the time
            self.path, self.source = ready.path, ready.source
        self.fell += ready.fell
        self.now = None

    @property
    def total(self) -> float:
        return sum(self.steps.values())

    def said(self) -> str:
        """A line for a person."""
        source = f" from TE {self.source}" if self.path == "fork" else ""
        steps = ", ".join(f"{step} {self.steps.get(step, 0.0):.3f}" for step in STEPS)
        came = f"{self.how}, weights by {self.path}{source}" + "".join(f"; {why}" for why in self.fell)
        return f"TE {self.te} ({self.model}) ready after {self.total:.3f} s: {came}: {steps}"


async def fork_te(
    keeper: KeeperClient,
    plan: Plan,
    place: Place,
    climb: Climb,
    rings: tuple[shmq.RingFds, shmq.RingFds],
    *,
    lender: Memory | None = None,
    sources: Sequence[WeightSource] = (),
    progress: Callable[[str], None] = lambda line: None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[int, int]:
    """Climb up to the process: (pid, pidfd). The rest happens in the TE and ends with its `Ready`. `progress` is told what a
    person who waits would want to read.

    Raises `UserError` (the model can't be packed) or `KeeperDied`."""
    without = plan.config.scale_without
    mark = clock()

    def step(name: str, next: str) -> None:
        nonlocal mark
        now = clock()
        climb.steps[name] = climb.steps.get(name, 0.0) + now - mark
        mark, climb.now = now, next

    async def pack() -> None:
        """Have the weights packed from the files, and wait for it."""
        climb.path = "disk"

        def packing(done: int, total: int) -> None:
            progress(f"{climb.model}: weights from disk, {100 * done // max(1, total)} %")

        await keeper.order_pack(plan.key, plan.path, plan.packing, plan.config.device, packing)
        await asyncio.shield(keeper.warm)
        await keeper.packed(plan.key)

    packs = 0
    usable = [] if "fork" in without else list(sources)
    unpacked = plan.key not in keeper.packed_keys and not usable and "dram" not in without
    if unpacked:  # goes on beside the imports of a keeper that has just begun
        await keeper.order_pack(plan.key, plan.path, plan.packing, plan.config.device)
    await asyncio.shield(keeper.warm)
    step("scaler_pre", "te_load")
    if unpacked:
        await pack()
        step("te_load", "te_pre_load")
    while True:
        try:
            spawned, pidfd = await keeper.spawn(
                te=climb.te,
                key=plan.key,
                config=plan.config,
                threads=place.threads,
                rings=rings,
                seat=place.seat,
                ranks=place.ranks,
                index=place.index,
                reachable=place.reachable,
                lends=place.lends,
                lender=lender,
                sources=usable,
            )
            break
        except NothingPacked as e:
            if packs == MOST_PACKS:
                raise UserError(str(e)) from None
            packs += 1
            climb.fell.append(str(e))
            usable = []
            await pack()
            step("te_load", "te_pre_load")
    climb.how = spawned.how
    # The worker counts te_pre_load from just before the fork; what is left here is the way to the keeper.
    climb.steps["te_pre_load"] = max(0.0, clock() - mark - spawned.seconds - spawned.waited)
    climb.steps["te_load"] = climb.steps.get("te_load", 0.0) + spawned.waited
    return spawned.pid, pidfd
