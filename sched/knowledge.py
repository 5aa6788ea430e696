"""What a model's scheduler knows from earlier runs and leaves to later ones: costs and heat map, and how long texts get.

All of it is soft and in DEEPSERVE_HOME: what can't be read or written is told in the log, and scheduling goes by what it sees.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec

from engine import capacity, devices
from engine.config import Config, most_processes
from engine.types import UserError
from sched import length_store, profile_store
from sched.costs import Costs
from sched.heatmap import HeatMap
from sched.predict import Clues, Lengths
from sched.profile_store import Found

log = logging.getLogger(__name__)

# New texts that are worth a file: those of a server that was tried out for a minute tell nothing.
WORTH_KEEPING = 64
TEXTS_A_TURN = 4  # of the event loop


class Knowledge:
    """Of one model with its settings on this machine."""

    def __init__(self, fingerprint: str = "", lengths: Lengths | None = None, found: Found | None = None, cores: int = 0):
        """`cores`: of a TE; 0: it has a device of its own."""
        self.fingerprint = fingerprint
        self.lengths = lengths or Lengths()
        self.found = found
        self.cores = cores
        self.heat = HeatMap() if found is None or found.foreign else HeatMap(found.profile.heat)
        self.live_before = msgspec.json.encode(self.heat.data.live)
        self.to_learn: deque[tuple[Clues, int, bool]] = deque()  # texts that are over
        self.errands: dict[str, asyncio.Task[None]] = {}

    @classmethod
    def load(cls, path: Path, config: Config, box: capacity.Machine) -> Knowledge:
        """Read what there is of the model whose files are at `path`."""
        try:
            key = profile_store.key_of(path, config, box)
        except OSError as e:
            log.warning("event=nothing_known path=%s why=%s", path, e)
            return cls()
        own_memory = devices.kind(devices.choose(config.device)[0]).own_memory
        cores = 0 if own_memory else capacity.threads_for(box.cores, most_processes(config))
        found = profile_store.load_profile(key)
        if found is not None:
            log.info("event=profile path=%s of=%s foreign=%s", found.path, found.profile.model, found.foreign)
        return cls(key.model, length_store.load(key.model), found, cores)

    @property
    def costs(self) -> Costs | None:
        """As they were measured of this model with these settings."""
        return None if self.found is None or self.found.foreign else self.found.profile.costs_for(self.cores)

    def scale_heat(self, costs: Costs) -> None:
        """The costs have become known: another model's map is of use."""
        if self.found is not None and self.found.foreign:
            self.heat = self.found.heat(costs, self.cores)

    # ---- what takes longer than the event loop may be held ----------------------------------------------------------
    def look(self, model: str) -> None:
        """After texts have ended: draw the heat map anew, or train on the texts, where that is due."""
        if self.heat.due and "heat" not in self.errands:
            self.begin("heat", self.redraw())
        if self.lengths.due and self.fingerprint and "lengths" not in self.errands:
            self.begin("lengths", length_store.retrain(self.fingerprint, model, self.lengths))

    def text_over(self, clues: Clues, length: int, ended: bool) -> None:
        """A text is over, as Lengths.observe has it, which is told of it by and by: many may end with one step, and each takes a
        tenth of a millisecond."""
        if not self.to_learn:
            asyncio.get_running_loop().call_soon(self.learn_some)
        self.to_learn.append((clues, length, ended))

    def learn_some(self, most: int = TEXTS_A_TURN) -> None:
        for _ in range(min(most, len(self.to_learn))):
            self.lengths.observe(*self.to_learn.popleft())
        if self.to_learn:
            asyncio.get_running_loop().call_soon(self.learn_some)

    def begin(self, name: str, errand: Coroutine[Any, Any, None]) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            del self.errands[name]
            if not task.cancelled() and (bug := task.exception()) is not None:
                log.error("event=knowledge_failed what=%s", name, exc_info=bug)

        self.errands[name] = asyncio.create_task(errand, name=f"deepserve-{name}")
        self.errands[name].add_done_callback(ended)

    async def redraw(self) -> None:
        heat, snapshot = self.heat, self.heat.snapshot()
        heat.adopt(await asyncio.to_thread(HeatMap.drawn, snapshot))

    async def close(self, model: str) -> None:
        """Leave what was learnt to the next start."""
        self.learn_some(len(self.to_learn))
        errands = list(self.errands.values())
        for task in errands:
            task.cancel()
        if errands:
            await asyncio.wait(errands)
        if self.fingerprint and self.lengths.untrained >= WORTH_KEEPING:
            await length_store.keep(self.fingerprint, model, self.lengths)
        if self.found is not None and not self.found.foreign and msgspec.json.encode(self.heat.data.live) != self.live_before:
            try:
                await asyncio.to_thread(self.keep_live, self.found)
            except UserError as e:
                log.warning("event=profile_unwritable why=%s", e)

    def keep_live(self, found: Found) -> None:
        """Write what requests have told of the heat map into the profile, which may have been measured anew meanwhile. Raises
        `UserError`."""
        profile = profile_store.read(found.path)
        if profile is not None and profile.heat.prefill == self.heat.data.prefill and profile.heat.ratio == self.heat.data.ratio:
            profile.heat.live = self.heat.data.live
            profile_store.save(profile, found.path)
