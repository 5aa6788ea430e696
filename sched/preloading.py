"""What is made ready before it is asked for: packed weights of the models that are likely to be, and warm processes.

`scale.preload` decides, from when each model was asked for and how many processes were started lately; here it is carried out,
one model at a time and only while nothing else is being packed.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence

from engine.types import UserError
from scale.keeper_client import KeeperDied
from scale.preload import Predictor, pool_size, what_to_load
from sched.cluster import Cluster
from sched.deployment import Deployment
from sched.residency import Residency

log = logging.getLogger(__name__)

# How often is looked who may be asked for next. What is expected changes over minutes.
LOOK = 15.0
KEPT_STARTS = 1024


class Preloading:
    def __init__(self, deployments: Sequence[Deployment], residency: Residency, cluster: Cluster, warm_te: int | None):
        """`warm_te`: warm processes to keep; None: as many as the demand asks for."""
        self.deployments = deployments
        self.residency = residency
        self.cluster = cluster
        self.warm_te = warm_te
        self.predictor = Predictor()
        residency.expected = lambda: self.predictor.expected(time.time())
        self.starts: deque[float] = deque(maxlen=KEPT_STARTS)
        self.task: asyncio.Task[None] | None = None

    def asked(self, deployment: Deployment) -> None:
        """A request has come for a model."""
        self.predictor.asked(deployment.id, time.time())

    def start(self) -> None:
        self.task = asyncio.create_task(self.run(), name="deepserve-preload")

    async def run(self) -> None:
        while True:
            try:
                await self.keep_warm()
                if len(self.deployments) > 1:
                    await self.load_ahead()
            except (UserError, KeeperDied) as e:  # a model that can't be packed says so again when it is asked for
                log.warning("event=preload_failed why=%s", e)
            except Exception:  # a bug; nobody waits for this
                log.exception("event=preload_failed")
            await asyncio.sleep(LOOK)

    async def keep_warm(self) -> None:
        """Have as many warm processes as are wanted. One that takes its place later counts from its first look on."""
        size = self.warm_te
        if size is None and len(self.deployments) == 1 and self.deployments[0].autoscaler.fixed:
            size = 0  # nothing comes up but after a death
        elif size is None:
            self.starts.extend(self.cluster.take_starts())
            size = pool_size(list(self.starts), time.monotonic())
        await self.cluster.keep_warm(size)

    async def load_ahead(self) -> None:
        """Have the weights packed that are likely to be asked for, in place of others that are less."""
        if any(d.state == "loading" for d in self.deployments):
            return
        by_id = {d.id: d for d in self.deployments if d.made is not None and d.state in ("off", "asleep")}
        sizes = {id: d.plan.weight_bytes for id, d in by_id.items()}
        kept = [entry for entry in self.residency.kept() if entry.key in by_id]
        predictions = self.predictor.predict(time.time())
        for step in what_to_load(predictions, kept, sizes, self.residency.weights_budget):
            d, keeper = by_id[step.key], self.cluster.keeper
            if keeper is None or "dram" in d.config.scale_without or d.state != "off":
                return
            await self.residency.drop(step.drop)
            d.may_have_changed()
            await d.describe()
            log.info("event=preload model=%s instead_of=%s", d.id, ",".join(step.drop) or "-")
            await keeper.order_pack(d.plan.key, d.plan.path, d.plan.packing, d.config.device)
            await keeper.packed(d.plan.key)
            self.residency.look()

    async def close(self) -> None:
        if self.task is not None:
            self.task.cancel()
            await asyncio.wait((self.task,))
