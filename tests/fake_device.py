"""A device whose "model" is arithmetic over real paged memory: it stores each token id in its KV slot and samples a
hash of all ids that the block table leads to. Any mistake in paging, sharing, chunking, feeding or replaying changes
the text."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

from engine.batch import Batch
from engine.config import Speculation
from engine.core import Core
from engine.devices import Logprobs, StepInputs, StepOutput
from engine.distflow import Completion
from engine.executor import Executor
from engine.handover import Outbound
from engine.rtc import RTC
from engine.types import FromWorker, Refused, Sample, SamplingParams, Start, Tokens, pack_ids

VOCAB = 97


def next_id(ids: Iterable[int], seed: int = 0) -> int:
    """The fake model: what follows `ids`."""
    return zlib.crc32(np.asarray(list(ids), np.int32).tobytes() + seed.to_bytes(8, "little")) % VOCAB


def text_of(prompt: list[int], count: int, seed: int = 0, stop: frozenset[int] = frozenset()) -> list[int]:
    """The plain oracle: one sequence, no cache."""
    ids = list(prompt)
    while len(ids) < len(prompt) + count:
        ids.append(next_id(ids, seed))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


@dataclass
class FakeModel:
    vocab: int = VOCAB


class Lazy:
    """A launched step that runs when asked for: steps run in launch order, as on a stream."""

    def __init__(self, device: FakeDevice, step: StepInputs):
        self.device, self.step = device, step
        self.out: StepOutput | None = None

    def result(self) -> StepOutput:
        while self.out is None:
            first = self.device.queue.pop(0)
            first.out = self.device.run(first.step)
        return self.out

    def wait_layer(self, layer: int) -> None:
        self.result()


class FakeDevice:
    name, block_size = "fake", 4

    def __init__(self, blocks: int, block_size: int):
        self.memory = np.full(blocks * block_size, -1, np.int64)
        self.size = block_size
        self.queue: list[Lazy] = []
        self.tokens_run = 0

    def configure(self, *, vocab: int, slots: int, tokens: int) -> None:
        self.last = np.full(slots, -1, np.int64)

    def launch(self, forward: object, step: StepInputs) -> Lazy:
        pending = Lazy(self, step)
        self.queue.append(pending)
        return pending

    def run(self, step: StepInputs) -> StepOutput:
        ids = np.where(step.feed >= 0, self.last[np.maximum(step.feed, 0)], step.ids)
        assert (ids >= 0).all(), "a step was fed an id that was never sampled"
        assert len(set(step.kv_slots.tolist())) == len(step.kv_slots), "two tokens of a step write one slot"
        self.memory[step.kv_slots] = ids
        self.tokens_run += len(ids)
        owner = np.repeat(np.arange(len(step.kv_len)), np.diff(step.q_start))
        out = []
        sampled = step.sampling
        rows = step.rows.tolist()
        history = []
        for row in rows:
            s = owner[row]
            length = int(step.positions[row]) + 1
            assert length <= step.kv_len[s]
            slots = [int(step.blocks[s, p // self.size]) * self.size + p % self.size for p in range(length)]
            history.append(self.memory[slots])
        for i in range(len(sampled.slot)):
            assert sampled.position[i] == len(history[i])
            token = next_id(history[i], int(sampled.seed[i]))
            out.append(token)
            self.last[sampled.slot[i]] = token
        scores = None
        if len(step.score_ids):
            # The "probability" of a scored id is a number made of its history and itself: enough to see that rows line up.
            chosen = [
                -(zlib.crc32(h.tobytes()) % 1000) - float(t) for h, t in zip(history[len(out) :], step.score_ids, strict=True)
            ]
            top = np.zeros((len(chosen), step.score_top), np.float32)
            scores = Logprobs(np.array(chosen, np.float32), np.ones(len(chosen), np.int32), top.astype(np.int32), top)
        return StepOutput(np.array(out, np.int32), None, scores)

    def close(self) -> None: ...


def score_of(history: list[int], token: int) -> float:
    return -(zlib.crc32(np.asarray(history, np.int64).tobytes()) % 1000) - float(token)


class ListInbox:
    """An inbox that never waits: tests put messages straight into the batch."""

    def receive(self) -> list[bytes]:
        return []

    def wait(self, timeout: float | None) -> bool:
        return True

    def beat(self) -> None: ...

    def rouse(self) -> None: ...


class FakeKV:
    nbytes, pool, layout = 1, None, None

    def commit(self, blocks: int) -> None: ...


class Engine:
    """Batch, executor and core over the fake device, driven a step at a time."""

    def __init__(
        self,
        *,
        blocks: int = 64,
        block_size: int = 4,
        max_seqs: int = 8,
        max_tokens: int = 32,
        max_len: int = 64,
        caching: bool = True,
        speculation: Speculation | None = None,
    ):
        self.rtc = RTC(blocks, block_size, caching)
        self.batch = Batch(self.rtc, max_seqs=max_seqs, max_tokens=max_tokens, max_len=max_len, speculation=speculation)
        self.device = FakeDevice(blocks, block_size)
        self.executor = Executor(self.device, FakeModel(), FakeKV(), self.batch.tables, block_size, max_tokens)  # type: ignore[arg-type]
        self.told: list[FromWorker] = []
        self.core = Core(self.batch, self.executor, ListInbox(), self.told.append, clock=lambda: 1.0)
        self.flying: list = []
        self.texts: dict[int, list[int]] = {}
        self.ends: dict[int, int] = {}
        self.cached: dict[int, int] = {}
        self.scores: dict[int, list] = {}
        self.refused: list[Refused] = []

    def start(
        self,
        task: int,
        prompt: list[int],
        max_tokens: int,
        *,
        n: int = 1,
        seed: int = 0,
        stop: Iterable[int] = (),
        generated=(),
        **more,
    ):
        salt, priority = more.pop("salt", b""), more.pop("priority", 0)
        params = SamplingParams(max_tokens=max_tokens, n=n, **more)
        samples = [Sample(i, pack_ids(list(generated)), seed + i) for i in range(n)]
        self.batch.start(Start(task, pack_ids(prompt), samples, params, max_tokens, list(stop), salt, priority))

    def step(self, overlapped: bool = False, tell: Callable[[FromWorker], None] | None = None) -> bool:
        """One turn of the core's loop; whether there is more to do. What it says goes to `tell` where that is given."""
        plan = self.batch.plan()
        launched = [(plan, self.core.launch(plan))] if plan else []
        if not overlapped:
            self.flying, launched = launched, []
        if self.flying:
            self.core.finish(*self.flying.pop())
        elif not launched:
            self.core.report()
        self.flying = launched
        if tell is not None:
            for message in self.told:
                tell(message)
            self.told.clear()
        self.collect()
        return bool(self.flying or self.batch.has_work())

    def collect(self) -> None:
        for message in self.told:
            if isinstance(message, Refused):
                self.refused.append(message)
            if not isinstance(message, Tokens):
                continue
            for done in message.prompts or []:
                self.cached[done.seq] = done.cached
                if done.logprobs is not None:
                    self.scores[done.seq] = done.logprobs
            for seq, token, finish in zip(message.seqs, message.ids, message.finish, strict=True):
                assert seq not in self.ends, "a sequence spoke after its end"
                if token >= 0:
                    self.texts.setdefault(seq, []).append(token)
                if finish:
                    self.ends[seq] = finish
        self.told.clear()

    def run(self, overlapped: bool = False, check: bool = True, limit: int = 2000) -> None:
        for _ in range(limit):
            more = self.step(overlapped)
            if check:
                self.batch.check()
            if not more:
                return
        raise AssertionError(f"no end after {limit} steps")


class Carried(NamedTuple):
    """A transfer that waits for its turn."""

    target: Engine
    here: list[int]
    there: list[int]
    after: Callable[[], None] | None
    on_done: Callable[[Completion], None] | None


class SlowOutbound(Outbound):
    """Carries blocks of `here` in order to the engines that it is linked with, `there` by TE: one transfer a `tick`."""

    def __init__(self, here: Engine, there: dict[int, Engine]):
        peer = SimpleNamespace(layout=SimpleNamespace(layers=1), block_size=here.rtc.block_size)
        super().__init__(None, peer, here.core.follow)  # type: ignore[arg-type]
        self.source, self.there = here, there
        self.queue: list[Carried] = []

    def transfer(self, to, here, there, layers=None, after=None, on_done=None):
        if to in self.there:
            self.queue.append(Carried(self.there[to], list(here), list(there), after, on_done))
        else:
            Completion(on_done).end(f"TE {to} is not linked")

    def tick(self, error: str | None = None) -> None:
        """With an `error` nothing is copied."""
        if not self.queue:
            return
        target, here, there, after, on_done = self.queue.pop(0)
        if after is not None:
            after()
        size = self.here.block_size
        for a, b in zip(here, there, strict=True) if error is None else ():
            target.device.memory[b * size : (b + 1) * size] = self.source.device.memory[a * size : (a + 1) * size]
        Completion(on_done).end(error)
