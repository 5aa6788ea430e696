"""The shares of semi pairs: what their workers show goes to each pair's controller, and what it decides to them.

Without promised latencies (`--slo-ttft-ms`, `--slo-tpot-ms`) there is no controller, and both workers may use all of the device.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from engine.config import Config
from engine.types import Share
from sched.cluster import TE
from sched.handover import say
from sched.shares import WHOLE, Controller, Promise, Shares

log = logging.getLogger(__name__)


class SemiPairs:
    """A pair is known by the number of its decode worker."""

    def __init__(self, config: Config):
        ttft, tpot = config.slo_ttft_ms, config.slo_tpot_ms
        self.promise = None if ttft is None or tpot is None else Promise(ttft / 1e3, tpot / 1e3)
        self.controllers: dict[int, Controller] = {}
        self.workers: dict[int, TE] = {}

    @staticmethod
    def of(te: TE) -> int:
        """The pair that a TE is of."""
        return te.id if te.lender < 0 else te.lender

    def ready(self, te: TE) -> None:
        """A TE is new: as a worker of a pair it gets its share."""
        if te.role != "semi" or self.promise is None:
            return
        self.workers[te.id] = te
        controller = self.controllers.setdefault(self.of(te), Controller(self.promise, Shares(WHOLE, WHOLE)))
        self.give(te, controller.shares)

    def give(self, te: TE, shares: Shares) -> None:
        te.share = shares.decode if te.lender < 0 else shares.prefill
        say(te, Share(te.share))

    def first_token(self, te: TE, seconds: float) -> None:
        if (controller := self.controllers.get(self.of(te))) is not None:
            controller.first_token(seconds)

    def step(self, te: TE, gaps: dict[float, int], now: float, waiting: Callable[[int], Sequence[float]]) -> None:
        """A TE has finished a step. `gaps`: when sequences spoke before -> how many; `waiting`: seconds that a pair's requests
        without a first token have waited."""
        pair = self.of(te)
        if (controller := self.controllers.get(pair)) is None:
            return
        for last, count in gaps.items():
            controller.tokens([now - last] * count)
        decision = controller.step(lambda: waiting(pair))
        if decision is None:
            return
        log.info("event=shares te=%d %s", pair, decision.reason)
        if decision.changed:
            for worker in self.workers.values():
                if self.of(worker) == pair:
                    self.give(worker, decision.state.shares)
