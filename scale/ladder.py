"""The scaling ladder: how one TE comes to be, in the paper's five steps, each timed.

scaler_pre     a keeper is there, its code imported
te_pre_load    the TE is forked, its device opened, its model built
te_load        weights: packed by the keeper (once a model), mapped by the TE
te_post_load   KV blocks, and one dummy request answered
scaler_post    the TE's announcement has reached the scheduler
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import msgspec

from engine import shmq
from engine.config import Config
from engine.types import Memory, Packing
from scale.keeper_client import KeeperClient

STEPS = ("scaler_pre", "te_pre_load", "te_load", "te_post_load", "scaler_post")


class Plan(msgspec.Struct, frozen=True):
    """What to bring up."""

    key: str  # of the packed model
    packing: Packing
    path: str
    config: Config  # resolved
    threads: int


class Climb(msgspec.Struct):
    """One TE's way up: seconds by step. The worker's own steps arrive with its `Ready`."""

    te: int
    began: float  # CLOCK_MONOTONIC seconds
    steps: dict[str, float] = {}

    def finish(self, worker_steps: dict[str, float], announced: float, now: float) -> None:
        for name, seconds in worker_steps.items():
            self.steps[name] = self.steps.get(name, 0.0) + seconds
        self.steps["scaler_post"] = now - announced

    @property
    def total(self) -> float:
        return sum(self.steps.values())


async def fork_te(
    keeper: KeeperClient,
    plan: Plan,
    te: int,
    rings: tuple[shmq.RingFds, shmq.RingFds],
    lender: Memory | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[int, int, Climb]:
    """Climb up to the fork: (pid, pidfd, the climb so far). The rest happens in the TE and ends with its `Ready`.

    Raises `UserError` (the model can't be packed) or `KeeperDied`."""
    climb = Climb(te, clock())
    mark = climb.began
    await keeper.order_pack(plan.key, plan.path, plan.packing, plan.config.device)  # goes on beside the imports
    await asyncio.shield(keeper.warm)
    climb.steps["scaler_pre"] = clock() - mark
    mark = clock()
    await keeper.packed(plan.key)
    climb.steps["te_load"] = clock() - mark
    mark = clock()
    spawned, pidfd = await keeper.spawn(te, plan.key, plan.config, plan.threads, rings, lender)
    # The worker counts te_pre_load from just before the fork; what is left here is the way to the keeper.
    climb.steps["te_pre_load"] = max(0.0, clock() - mark - spawned.seconds)
    return spawned.pid, pidfd, climb
