"""What a caller of the service sees of a request: its prompts in, a stream of deltas out, and the ways to be refused.

A Stream has one owner, who iterates it or gives it a sink. With a sink each step's deltas are delivered inside the
callback that read the TE's message: no coroutine wakes up for a token.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import msgspec

from engine.types import SamplingParams, TokenLogprobs, UserError
from sched.tenants import ANYONE, Tenant

T = TypeVar("T")


class UnknownModel(UserError):
    """No model of that name is served here."""


class Overloaded(Exception):
    """Not now (HTTP 429): the queue is full, the key's limits are reached, or what was promised can't be kept. `retry_after` is
    the predicted wait in seconds."""

    def __init__(self, message: str, retry_after: float, cause: str = "queue_full"):
        """`cause`: that, or one of `admission.Cause`."""
        super().__init__(message)
        self.retry_after = retry_after
        self.cause = cause


class Unavailable(Exception):
    """Can't be served now through no fault of the caller (HTTP 503): draining, or no TE can be brought up."""

    def __init__(self, message: str, retry_after: float = 5.0):
        super().__init__(message)
        self.retry_after = retry_after


class Expired(Exception):
    """The request's deadline has passed before it was done (HTTP 504)."""


class TaskFailed(Exception):
    """The request was accepted and then could not be finished (HTTP 500)."""


async def result_of(task: asyncio.Task[T]) -> T:
    """What a task brings that others wait for too: it goes on when this caller is cancelled. Raises `Unavailable` where the task
    was, since the server ends."""
    await asyncio.wait((task,))
    if task.cancelled():
        raise Unavailable("the server is shutting down", 10.0)
    return task.result()


class Submission(msgspec.Struct, kw_only=True):
    """One external call, tokenised. `prompts` has one entry but for /v1/completions with a list of prompts."""

    id: str  # the response's id: chatcmpl-…, cmpl-…
    model: str
    prompts: list[array[int]]
    params: SamplingParams
    trace_id: str = ""  # the caller's X-Request-Id, where given
    kind: str = "chat"  # or "completion", "embedded", "context"
    salt: bytes = b""  # separates tenants in the prefix cache
    keys: list[list[bytes]] = []  # of each prompt's full KV blocks, where there are TEs to choose from
    priority: int = 0
    retain: float = 0.0  # seconds for which its KV blocks are to be kept with priority
    context: str = ""  # the explicit context that the prompts begin with
    context_tokens: int = 0  # ... and how many tokens that has
    preserve: bool = False  # the prompt is that context
    tenant: Tenant = ANYONE  # whose it is
    deadline: float = 0.0  # CLOCK_MONOTONIC seconds; 0: none
    slo_ttft_ms: float | None = None  # wanted, or promised to its key; None: what the server promises
    slo_tpot_ms: float | None = None
    reject_late: bool = False  # refuse it at once where deadline or targets can't be met


class Delta(msgspec.Struct, gc=False):
    """What one step added to one choice. `text` never holds half a character or half a stop string."""

    index: int  # prompt * n + sample
    text: str
    ids: list[int]
    logprobs: list[TokenLogprobs] | None = None  # one for each of `ids`, where asked
    finish: str | None = None  # "stop" or "length" on the last delta of this choice
    stop_reason: str | int | None = None  # the stop string or stop token id that ended it


class Usage(msgspec.Struct):
    prompt_tokens: int = 0  # each prompt once, however many samples
    completion_tokens: int = 0  # of the choices that have ended
    cached_tokens: int = 0  # prompt tokens that came from the prefix cache, whichever tier of it
    dram_tokens: int = 0  # of these, from the DRAM tier
    ssd_tokens: int = 0  # ... and from the SSD tier


class Stream:
    """The deltas of one submission, in order for each choice. Complete after every choice's `finish`."""

    __slots__ = ("error", "generated", "noted", "open", "prompt_logprobs", "sink", "unheard", "usage", "waiting", "wake")

    def __init__(self, choices: int):
        self.usage = Usage()
        self.prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}  # prompt index -> one for each prompt token
        self.open = choices
        self.generated = 0  # tokens so far, of all choices
        self.sink: Callable[[list[Delta]], None] | None = None
        self.noted: Callable[[str], None] | None = None
        self.unheard = ""  # the newest note from before `run`
        self.waiting: list[Delta] = []
        self.error: BaseException | None = None
        self.wake: asyncio.Future[None] | None = None

    # ---- the service's side -----------------------------------------------------------------------------------------
    def feed(self, deltas: list[Delta]) -> None:
        """One step's deltas of this request."""
        for delta in deltas:
            self.generated += len(delta.ids)
            if delta.finish is not None:
                self.open -= 1
        if self.sink is None:
            self.waiting += deltas
            self.rouse()
            return
        try:
            self.sink(deltas)
        except Exception as e:  # this runs inside the callback for a whole step: what fails here is this request's alone
            self.fail(e)
        if not self.open:
            self.rouse()

    def note(self, line: str) -> None:
        """How it comes along that this request can run, for a person who waits."""
        if self.noted is None:
            self.unheard = line
        elif self.error is None:
            try:
                self.noted(line)
            except Exception as e:  # this runs where the keeper's word is heard: what fails here is this request's alone
                self.fail(e)

    def fail(self, error: BaseException) -> None:
        """No more will come; whoever waits gets `error`."""
        self.error = self.error or error
        self.rouse()

    def rouse(self) -> None:
        if self.wake is not None and not self.wake.done():
            self.wake.set_result(None)

    # ---- the caller's side ------------------------------------------------------------------------------------------
    async def run(self, sink: Callable[[list[Delta]], None], note: Callable[[str], None] | None = None) -> None:
        """Deliver every delta to `sink` (called on the loop, must not block) until the stream is complete, and to `note` a line
        now and then while the model isn't up yet.

        Raises what the service fails the stream with, or what `sink` raised."""
        self.sink, self.noted = sink, note
        if note is not None and self.unheard:
            note(self.unheard)
        if self.waiting:
            first, self.waiting = self.waiting, []
            sink(first)
        while self.open and self.error is None:
            await self.pause()
        if self.error is not None:
            raise self.error

    async def __aiter__(self) -> AsyncIterator[list[Delta]]:
        """The deltas of a step, or of several steps where the caller is slower than the model."""
        while True:
            if self.waiting:
                batch, self.waiting = self.waiting, []
                yield batch
            elif self.error is not None:
                raise self.error
            elif not self.open:
                return
            else:
                await self.pause()

    async def pause(self) -> None:
        self.wake = asyncio.get_running_loop().create_future()
        try:
            await self.wake
        finally:
            self.wake = None


# ---- what embedding programs get: vLLM's shapes -------------------------------------------------------------------------


class CompletionOutput(msgspec.Struct, kw_only=True):
    """One sample, as far as it has come."""

    index: int
    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None

    def add(self, delta: Delta) -> None:
        self.text += delta.text
        self.token_ids += delta.ids
        if delta.logprobs is not None:
            self.logprobs = (self.logprobs or []) + delta.logprobs
        if delta.finish is not None:
            self.finish_reason, self.stop_reason = delta.finish, delta.stop_reason


class RequestOutput(msgspec.Struct, kw_only=True):
    """What a prompt has brought so far; complete when `finished`."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
