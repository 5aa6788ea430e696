"""Batch, executor and core over a real device and a tiny model, driven a step at a time in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.batch import Batch
from engine.core import Core
from engine.executor import Executor
from engine.rtc import RTC
from tests.fake_device import Engine, ListInbox
from tests.harness import Rig

BLOCK = 128  # on cpu too, so that prefixes are shared at the same places


class ModelEngine(Engine):
    """`Engine`, with `device` (the cpu device of `dtype`, if None) in place of the fake one."""

    def __init__(
        self,
        path: Path,
        device: Any = None,
        *,
        dtype: str = "float32",
        blocks: int = 24,
        max_seqs: int = 8,
        max_tokens: int = 64,
        max_len: int = 384,
    ):
        self.rig = Rig(path, dtype=dtype, block_size=BLOCK, blocks=blocks, max_len=max_len, device=device)
        self.rtc = RTC(blocks, BLOCK, True)
        self.batch = Batch(self.rtc, max_seqs=max_seqs, max_tokens=max_tokens, max_len=max_len)
        self.device = self.rig.device
        self.executor = Executor(self.device, self.rig.model, self.rig.kv, self.batch.tables, BLOCK, max_tokens)
        self.told = []
        self.core = Core(self.batch, self.executor, ListInbox(), self.tell, clock=lambda: 1.0)
        self.flying = []
        self.texts, self.ends, self.cached, self.scores, self.refused = {}, {}, {}, {}, []
        self.logprobs: dict[int, list[tuple[float, int, list[int]]]] = {}

    def tell(self, message: Any) -> None:
        self.told.append(message)
        for seq, found in zip(getattr(message, "seqs", ()), getattr(message, "logprobs", None) or (), strict=False):
            if found is not None:
                self.logprobs.setdefault(seq, []).append((found.chosen, found.rank, found.top_ids))

    def run(self, overlapped: bool = True, check: bool = False, limit: int = 2000) -> None:
        super().run(overlapped, check, limit)
