"""A whole `AsyncLLM` whose keepers and TEs are played in this process: what it does with them, without their weight.

A played TE continues every prompt by letters that depend on the prompt alone, one a step, so that a text shows whether it was
put together rightly whatever happened to the TEs on the way. `World` says how long things take and what fails.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from engine import capacity
from engine.config import Config, resolve
from engine.types import (
    Abort,
    Adopt,
    Adopted,
    Finish,
    HandedOver,
    Load,
    Move,
    Packing,
    PromptDone,
    Ready,
    Reserved,
    SamplingParams,
    Start,
    Stop,
    Tokens,
    UserError,
    pack_ids,
    sequence_id,
    unpack_ids,
)
from scale import ladder
from scale.keeper_client import KeeperDied
from sched.service import AsyncLLM
from sched.stream import Submission

EOS = 0
STEPS = dict.fromkeys(ladder.STEPS[1:4], 0.001)
NO_PROCESS = 1 << 30  # process ids from here on are nobody's


class Letters:
    """Token 65 is A."""

    eos_ids = frozenset({EOS})
    vocab_size = 128

    def detokenizer(self, skip_special: bool, continues: bool) -> Letters:
        return self

    def feed(self, token: int) -> str:
        return chr(token)

    def flush(self) -> str:
        return ""


def letter(prompt: Sequence[int], number: int) -> int:
    return 65 + (sum(prompt) * 7 + number * (1 + len(prompt) % 5)) % 26


def text(prompt: Sequence[int], count: int) -> str:
    """What every TE makes of a prompt."""
    return "".join(chr(letter(prompt, i)) for i in range(count))


class Running(msgspec.Struct):
    prompt: list[int]
    ids: list[int]
    most: int
    begun: bool = False


class PlayedTE:
    """A TE and the link to it. Takes `World.step` seconds a step."""

    def __init__(self, world: World, messages: Any, closed: Any):
        self.world, self.messages, self.closed = world, messages, closed
        self.loop = asyncio.get_running_loop()
        self.number = self.pid = -1
        self.model = ""
        self.alive = self.open = False
        self.watched = False
        self.running: dict[int, Running] = {}
        self.expected: dict[int, Start] = {}
        self.timer: asyncio.TimerHandle | None = None

    @property
    def rings(self) -> PlayedTE:
        return self

    def start(self, number: int, model: str) -> None:
        self.number, self.model, self.pid, self.alive = number, model, next(self.world.pids), True
        self.world.living.add(self)

    def watch(self, pidfd: int) -> None:
        self.watched = self.open = True
        if not self.alive:
            self.loop.call_soon(self.tell_death)
            return
        delay = self.world.load_s
        if delay is not None:
            self.loop.call_later(delay, self.announce)

    def announce(self) -> None:
        self.say(Ready(self.number, self.pid, 8, 16, dict(STEPS), 0.0, {"kv": 1}, path="dram"))

    def say(self, message: Any) -> None:
        if self.alive and self.open:
            self.messages(message)

    def send(self, message: Any) -> None:
        if not self.alive:
            return
        if isinstance(message, Stop):
            if not self.world.deaf:
                self.die()
        elif isinstance(message, Start) and message.expect:
            seq = sequence_id(message.task, message.samples[0].index)
            self.expected[seq] = message
            self.loop.call_soon(self.say, Reserved(seq, b"", 0))
        elif isinstance(message, Start):
            for sample in message.samples:
                ids = list(unpack_ids(sample.generated))
                self.running[sequence_id(message.task, sample.index)] = Running(
                    list(unpack_ids(message.prompt)), ids, message.max_tokens
                )
            self.go_on()
        elif isinstance(message, Move):
            moved = self.running.pop(message.seq, None)
            self.loop.call_soon(self.say, HandedOver(message.seq, len(moved.ids) if moved is not None else -1))
        elif isinstance(message, Adopt):
            start = self.expected.pop(message.seq)
            ids = list(unpack_ids(message.generated))
            self.running[message.seq] = Running(list(unpack_ids(start.prompt)), ids, start.max_tokens, begun=True)
            self.loop.call_soon(self.say, Adopted(message.seq))
            self.go_on()
        elif isinstance(message, Abort):
            for seq in [
                s
                for s in (*self.running, *self.expected)
                if s in range(sequence_id(message.task, 0), sequence_id(message.task + 1, 0))
            ]:
                self.running.pop(seq, None)
                self.expected.pop(seq, None)

    def go_on(self) -> None:
        if self.timer is None and self.running and self.alive:
            self.timer = self.loop.call_later(self.world.step_s, self.step)

    def step(self) -> None:
        self.timer = None
        if not (self.alive and self.open) or not self.running:
            return
        message = Tokens([], [], [], Load(len(self.running)), None, [])
        assert message.prompts is not None
        for seq, one in list(self.running.items()):
            token = letter(one.prompt, len(one.ids))
            one.ids.append(token)
            over = len(one.ids) >= one.most
            message.seqs.append(seq)
            message.ids.append(token)
            message.finish.append(Finish.LENGTH if over else Finish.NONE)
            if not one.begun:
                one.begun = True
                message.prompts.append(PromptDone(seq, 0, 0.0))
            if over:
                del self.running[seq]
        self.say(message)
        self.go_on()

    def die(self) -> None:
        """As by SIGKILL."""
        if self.alive:
            self.alive = False
            self.world.living.discard(self)
            if self.watched:
                self.loop.call_soon(self.tell_death)

    def tell_death(self) -> None:
        if self.open:
            self.closed()

    def beat_age(self, now: float) -> float:
        return 0.0

    async def ended(self, timeout: float) -> bool:
        await asyncio.sleep(0)
        return not self.alive

    def kill(self) -> None:
        self.die()

    def close(self) -> None:
        self.die()
        self.open = False


class PlayedKeeper:
    def __init__(self, world: World, on_exit: Any, preload: Any = ()):
        if world.keeper_fails:
            raise OSError(11, "Resource temporarily unavailable")
        self.world = world
        self.pid = next(world.pids)
        self.gone = asyncio.Event()
        self.packed_keys: dict[str, int] = {}
        self.closed = False
        self.sizes: list[int] = []
        world.keepers.append(self)

    def die(self) -> None:
        self.gone.set()
        self.packed_keys.clear()

    def check(self) -> None:
        if self.gone.is_set():
            raise KeeperDied("the keeper process died")

    async def pool(self, size: int) -> None:
        self.check()
        self.sizes.append(size)

    async def order_pack(self, key: str, path: str, packing: Packing, device: str, on_progress: Any = None) -> None:
        self.check()

    async def packed(self, key: str) -> None:
        await asyncio.sleep(self.world.pack_s)
        self.check()
        self.packed_keys[key] = self.world.weight_bytes

    async def drop(self, key: str) -> int:
        self.check()
        await asyncio.sleep(self.world.step_s)
        self.check()
        return self.packed_keys.pop(key, 0)

    async def close(self) -> None:
        self.die()
        self.closed = True


class World:
    """What the played keepers and TEs have in common, and what happens to them."""

    weight_bytes = 100
    te_bytes = 10

    def __init__(self, patch: pytest.MonkeyPatch, free_bytes: int = 1 << 20):
        self.pids = iter(range(NO_PROCESS, NO_PROCESS + (1 << 20)))
        self.living: set[PlayedTE] = set()
        self.keepers: list[PlayedKeeper] = []
        self.step_s = 0.001
        self.pack_s = 0.001
        self.load_s: float | None = 0.001  # None: it never ends
        self.deaf = False  # TEs don't hear Stop
        self.keeper_fails = False
        self.stillborn = 0  # so many TEs from now on die before they are ready
        self.unmade: list[Exception] = []  # what the next TEs fail with
        self.files: dict[str, str] = {}  # model -> its content; absent: there is no such file
        patch.setattr("sched.cluster.LocalLink", lambda messages, closed: PlayedTE(self, messages, closed))
        patch.setattr("sched.cluster.KeeperClient", lambda on_exit, preload=(): PlayedKeeper(self, on_exit, preload))
        patch.setattr("sched.cluster.ladder.fork_te", self.fork_te)
        patch.setattr("sched.cluster.BACKOFF", (0.0, 0.002))
        patch.setattr("sched.cluster.STOP_GRACE", 0.02)
        patch.setattr("sched.deployment.native", SimpleNamespace(load=lambda: None))
        patch.setattr("sched.deployment.pull.resolve", self.resolve)
        patch.setattr("sched.deployment.make_plan", self.make_plan)
        patch.setattr("sched.deployment.stamp", lambda path: self.files.get(str(path), ""))
        patch.setattr("sched.deployment.Tokenizer.load", lambda path, template: Letters())
        patch.setattr("sched.service.capacity.machine", lambda kernels: capacity.Machine(free_bytes, 2))
        patch.setattr("sched.autoscaling.LOOK", 0.005)

    def resolve(self, model: str) -> Path:
        if model not in self.files:
            raise UserError(f"{model}: there is no such file or folder", "model")
        return Path(model)

    def make_plan(self, path: Path, stamp: str, asked: Config, box: Any = None) -> tuple[ladder.Plan, dict[str, str]]:
        if str(path) not in self.files:
            raise UserError(f"{path}: there is no such file or folder", "model")
        config = msgspec.structs.replace(
            asked, device="cpu", max_model_len=asked.max_model_len or 256, block_size=16, max_num_batched_tokens=256
        )
        key = f"{path}:{stamp}"
        return ladder.Plan(key, Packing("float32", "rows"), str(path), config, self.weight_bytes, self.te_bytes), {}

    async def fork_te(
        self,
        keeper: Any,
        plan: ladder.Plan,
        place: Any,
        climb: ladder.Climb,
        rings: Any,
        *,
        lender: Any = None,
        sources: Any = (),
        progress: Any,
    ) -> tuple[int, int]:
        if self.unmade:
            raise self.unmade.pop(0)
        if plan.key not in keeper.packed_keys:
            progress(f"{climb.model}: weights from disk, 0 %")
            await asyncio.sleep(self.pack_s)
            if plan.path not in self.files:
                raise UserError(f"{plan.path}: there is no such file or folder", "model")
            keeper.check()
            keeper.packed_keys[plan.key] = self.weight_bytes
        await asyncio.sleep(0)
        keeper.check()
        rings.start(climb.te, climb.model)
        if self.stillborn > 0:
            self.stillborn -= 1
            rings.die()
        return rings.pid, -1

    def engine(self, *models: str, **settings: Any) -> AsyncLLM:
        for model in models:
            self.files.setdefault(model, "1")
        configs = [resolve({"model": model, "max_num_seqs": 4, **settings})[0] for model in models]
        return AsyncLLM(configs=configs)

    def of(self, model: str) -> list[PlayedTE]:
        return sorted((te for te in self.living if te.model == model), key=lambda te: te.number)

    def nothing_left(self, engine: AsyncLLM) -> None:
        """After `close`."""
        assert not self.living and all(keeper.closed for keeper in self.keepers)
        assert engine.residency.used == 0 or engine.closed
        others = asyncio.all_tasks() - {asyncio.current_task()}
        assert not others, others


async def ask(engine: AsyncLLM, model: str, prompt: Sequence[int] = (65, 66), count: int = 5, name: str = "r") -> str:
    """A request's text, however it is brought about."""
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    got: list[str] = []
    async with engine.submit(Submission(id=name, model=model, prompts=[array("i", prompt)], params=params)) as stream:
        async for deltas in stream:
            got += [delta.text for delta in deltas]
    return "".join(got)


__all__ = ["World", "ask", "pack_ids", "text"]
