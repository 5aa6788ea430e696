"""A service with a scripted model behind the gateway's face: no TE, no weights, every moment under the test's control."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from engine.types import TokenLogprobs, UserError
from sched.contexts import Contexts
from sched.stream import Delta, Stream, Submission, TaskFailed, UnknownModel, Usage

BOS, EOS = 256, 257
SPECIAL = {BOS: "<|begin|>", EOS: "<|end|>"}


class ByteTokenizer:
    """A token a byte, and two special ones."""

    vocab_size = 258

    def encode(self, text: str, add_special: bool = True) -> list[int]:
        return [BOS] * add_special + list(text.encode())

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        parts = [b"" if skip_special and i in SPECIAL else self.token_bytes(i) for i in ids]
        return b"".join(parts).decode("utf-8", "replace")

    def token_bytes(self, id: int) -> bytes:
        return SPECIAL[id].encode() if id in SPECIAL else bytes([id])

    def token(self, id: int) -> str:
        return SPECIAL.get(id) or chr(id)

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[Any] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        if any(m["content"] == "untemplatable" for m in messages):
            raise UserError("the chat template refuses these messages")
        text = "".join(f"[{m['role']}]{m['content']}{m.get('tool_calls', '')}" for m in messages)
        text += "".join(f"{{{k}={v}}}" for k, v in kwargs.items())
        return text + "[assistant]" * add_generation_prompt


class FakeModel(msgspec.Struct):
    """Card and served model in one."""

    id: str = "tiny"
    created: int = 1_700_000_000
    max_model_len: int = 256
    root: str = "models/tiny"
    state: str = "ready"
    te: int = 1
    tokenizer: ByteTokenizer = msgspec.field(default_factory=ByteTokenizer)


class FakeService:
    """Answers every prompt with `text`, a token (byte) a step, all choices in each step."""

    def __init__(self, text: str = "Hello, wörld!"):
        self.text = text
        self.card = FakeModel()
        self.submissions: list[Submission] = []
        self.reasons: list[str] = []  # of the tasks of every request
        self.refusals: list[tuple[str, str]] = []  # before they became submissions
        self.live: set[str] = set()  # submissions whose context has not been left
        self.steps = 0
        self.state: dict[str, Any] = {"status": "ok"}
        self.refuse: Exception | None = None  # raised on entering
        self.fail_after: int | None = None  # steps until the task fails
        self.hold_after: int | None = None  # steps until the model falls silent, until `go`
        self.go = asyncio.Event()
        self.silent = asyncio.Event()  # it has fallen silent
        self.left = asyncio.Event()  # a context has been left
        self.now = 1_700_000_000.0  # Unix seconds, of `contexts`
        self.orders: list[tuple[str, dict[str, Any]]] = []  # to scale, sleep, wake, drain: the model, and how
        self.notes: list[str] = []  # told before the first step
        self.forgotten: list[str] = []
        self.contexts = Contexts(self.forgotten.append, lambda: self.now)

    def models(self) -> list[FakeModel]:
        return [self.card]

    async def model(self, name: str, wake: bool = True) -> FakeModel:
        if name and name != self.card.id:
            raise UnknownModel(f"The model `{name}` does not exist; here is `{self.card.id}`", "model")
        return self.card

    def refused(self, model: str, cause: str) -> None:
        self.refusals.append((model, cause))

    def health(self) -> dict[str, Any]:
        return self.state

    def job(self, id: str) -> dict[str, Any] | None:
        found = next((s for s in self.submissions if id in (s.id, s.trace_id)), None)
        jobs = [{"tasks": [{"reason": reason or None}]} for reason in self.reasons]
        return None if found is None else {"id": found.id, "request_id": found.trace_id, "jobs": jobs}

    async def executors(self) -> list[dict[str, Any]]:
        return [
            {
                "id": 0,
                "pid": 4711,
                "role": "colocated",
                "model": self.card.id,
                "state": "ready",
                "step": None,
                "path": "fork",
                "draining": False,
                "since": self.now - 150,
                "load": {"running": 3, "waiting": 1, "blocks_used": 25},
                "kv_blocks": 100,
                "memory_bytes": {"weights": 98_000_000, "kv": 50_000_000},
                "private_bytes": 31_000_000,
            }
        ]

    def give_role(self, te: int, role: str) -> dict[str, Any]:
        if te:
            raise UserError(f"there is no TE {te} that is ready", "id")
        return {"id": te, "object": "task_executor", "role": role, "moving": 0, "draining": 0}

    def metrics(self) -> bytes:
        return b"# TYPE deepserve:num_requests_running gauge\ndeepserve:num_requests_running 0.0\n"

    def scale_state(self) -> dict[str, Any]:
        return {
            "object": "scale",
            "climbs": [],
            "models": [
                {
                    "id": self.card.id,
                    "state": self.card.state,
                    "te_ready": self.card.te,
                    "te_wanted": {"colocated": self.card.te},
                    "held": 0,
                    "weights_bytes": 98_000_000,
                    "idle_s": 7.25,
                    "reason": None,
                }
            ],
            "memory": {"budget_bytes": 1_000_000_000, "used_bytes": 140_000_000},
            "dram": {"budget_bytes": 0, "used_bytes": 98_000_000, "entries": []},
            "pool": {"wanted": 3},
        }

    async def scale(self, model: str, te: int, role: str | None) -> dict[str, Any]:
        return self.ordered(model, te=te, role=role)

    async def sleep(self, model: str, level: int) -> dict[str, Any]:
        self.card.state, self.card.te = "asleep" if level == 1 else "off", 0
        return self.ordered(model, level=level)

    async def wake(self, model: str) -> dict[str, Any]:
        self.card.state, self.card.te = "ready", 1
        return self.ordered(model)

    async def drain(self, te: int) -> dict[str, Any]:
        if te:
            raise UserError(f"there is no TE {te} that is ready", "te")
        return self.ordered("", te=te)

    def ordered(self, model: str, **what: Any) -> dict[str, Any]:
        if model not in ("", self.card.id):
            raise UnknownModel(f"The model `{model}` does not exist; here is `{self.card.id}`", "model")
        self.orders.append((model, what))
        return {"model": self.card.id, "state": self.card.state}

    @contextlib.asynccontextmanager
    async def submit(self, submission: Submission) -> AsyncIterator[Stream]:
        if self.refuse is not None:
            raise self.refuse
        self.submissions.append(submission)
        self.live.add(submission.id)
        stream = Stream(len(submission.prompts) * submission.params.n)
        player = asyncio.create_task(self.play(submission, stream))
        try:
            yield stream
        finally:
            player.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await player
            self.live.discard(submission.id)
            self.left.set()

    async def play(self, submission: Submission, stream: Stream) -> None:
        params, choices = submission.params, stream.open
        ids = [*self.text.encode(), EOS]
        room = self.card.max_model_len - max(map(len, submission.prompts))
        ids = ids[: room if params.max_tokens is None else params.max_tokens]
        cached = sum(len(p) // 2 for p in submission.prompts)
        stream.usage = Usage(sum(map(len, submission.prompts)), 0, cached)
        if params.prompt_logprobs is not None:
            for i, prompt in enumerate(submission.prompts):
                stream.prompt_logprobs[i] = [None, *(logprob(id, params.prompt_logprobs) for id in prompt[1:])]
        if not ids:
            stream.feed([Delta(i, "", [], [] if params.logprobs is not None else None, "length") for i in range(choices)])
        for note in self.notes:
            stream.note(note)
        held = b""
        for step, id in enumerate(ids, 1):
            if step - 1 == self.fail_after:
                return stream.fail(TaskFailed("the task executor died three times on this request"))
            if step - 1 == self.hold_after:
                self.silent.set()
                await self.go.wait()
            await asyncio.sleep(0)
            held += b"" if id == EOS else bytes([id])
            try:
                text, held = held.decode(), b""
            except UnicodeDecodeError:
                text = ""
            finish = None if step < len(ids) else "stop" if id == EOS else "length"
            self.steps += 1
            stream.usage.completion_tokens += choices
            found = None if params.logprobs is None else [logprob(id, params.logprobs)]
            stream.feed([Delta(i, text, [id], found, finish) for i in range(choices)])


class FakeCluster:
    """What metrics read of the cluster manager."""

    def __init__(self) -> None:
        self.table: dict[int, Any] = {}
        self.packed: dict[str, int] = {}
        self.restarts, self.keeper_starts, self.pool_size = 0, 1, 0


class FakeDeployment(msgspec.Struct):
    """... and of a deployment."""

    id: str = "tiny"
    state: Any = "ready"
    wanted: dict[Any, int] = {}
    held: int = 0
    decisions: dict[Any, int] = {}


def logprob(id: int, top: int) -> TokenLogprobs:
    return TokenLogprobs(-0.5, 1, [id, (id + 1) % 256][:top], [-0.5, -math.inf][:top])
