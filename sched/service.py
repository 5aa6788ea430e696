"""`AsyncLLM`: the one client API. HTTP, the command line and embedding programs all submit here.

`submit` is an async context manager: leaving it, for whatever cause, cancels the request everywhere. The object lives
in whatever loop it is started in, installs no signal handler, prints nothing and ends all its processes in `close`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import uuid
from array import array
from collections.abc import AsyncIterator, Collection, Sequence
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from engine import capacity, devices, models, native, weights
from engine.config import Config, Role, resolve
from engine.tokenizer import Tokenizer
from engine.types import SamplingParams, UserError, checked
from scale import ladder, pull
from sched.cluster import Cluster
from sched.contexts import Contexts
from sched.job import describe
from sched.job_executor import JobExecutor
from sched.metrics import Metrics
from sched.off_loop import off_loop
from sched.stream import CompletionOutput, RequestOutput, Stream, Submission, Unavailable, UnknownModel

Message = dict[str, Any]
log = logging.getLogger(__name__)


class ModelCard(msgspec.Struct):
    """A served model's name as /v1/models lists it."""

    id: str
    created: int
    max_model_len: int
    root: str


class ServedModel(msgspec.Struct):
    """What a caller needs to turn text into a submission."""

    id: str
    max_model_len: int
    tokenizer: Tokenizer


class AsyncLLM:
    """One model on `te` task executors.

    Settings are Config's fields: `AsyncLLM("folder", te=2, max_model_len=2048)`. Use it as
    `async with AsyncLLM(...) as engine:`, or let the first call start it and call `close` at the end.
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, *, config: Config | None = None, **settings: Any):
        if config is None:
            if model is not None:
                settings["model"] = os.fspath(model)
            config, _ = resolve(settings)
        self.asked = config
        self.config = config  # resolved once the model's files are read
        self.why: dict[str, str] = {}
        self.created = int(time.time())
        self.draining = False
        self.closed = False
        self.names: list[str] = config.served_model_name
        self.starting: asyncio.Task[None] | None = None
        self.running: asyncio.Task[None] | None = None
        self.je: JobExecutor | None = None
        self.cluster: Cluster | None = None
        self.tokenizer: Tokenizer | None = None
        self.metrics_of: Metrics | None = None
        self.rng = Random(config.seed) if config.seed is not None else Random()
        self.failure: UserError | None = None
        self.failed = asyncio.Event()  # set with `failure`
        self.contexts = Contexts(self.forget_context)

    # ---- life -------------------------------------------------------------------------------------------------------
    async def __aenter__(self) -> AsyncLLM:
        try:
            await self.ready()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def start(self) -> asyncio.Task[None]:
        """Begin loading; the task ends when requests can be tokenised. Idempotent."""
        if self.starting is None:
            if self.closed:
                raise RuntimeError("this engine is closed")
            self.starting = asyncio.create_task(self.load(), name="deepserve-load")
            self.starting.add_done_callback(lambda t: t.cancelled() or t.exception())  # retrieved: told by `ready` and /health
        return self.starting

    async def ready(self) -> None:
        """Wait until a TE takes tasks. Raises `UserError` where none ever will."""
        await asyncio.shield(self.start())
        assert self.cluster is not None
        await self.cluster.first_ready.wait()
        if self.cluster.failure is not None:
            raise self.cluster.failure

    async def load(self) -> None:
        """Read the model's description, start the cluster, then build the tokenizer while weights are packed."""
        try:
            path = await asyncio.to_thread(pull.resolve, self.asked.model)
            await asyncio.to_thread(native.load)  # compiles where it is missing
            if not self.names:
                self.names = [pull.model_id(self.asked.model, path)]
            plan, self.why = await asyncio.to_thread(make_plan, path, self.asked)
            config = self.config = plan.config
            metrics = self.metrics_of = Metrics(self.names[0])
            je = self.je = JobExecutor(config, metrics, self.rng)
            cluster = self.cluster = Cluster(plan, self.names[0], je, config.stall_timeout)
            metrics.watch(cluster, lambda: len(je.held))
            self.running = asyncio.create_task(self.keep_running(cluster), name="deepserve-cluster")
            je.tokenizer = self.tokenizer = await asyncio.to_thread(Tokenizer.load, path, config.chat_template)
        except UserError as e:
            self.fail(e)
            raise

    async def keep_running(self, cluster: Cluster) -> None:
        try:
            await cluster.run()
        except Exception as e:  # a bug: told like any other failure, and not only when somebody awaits this task
            log.exception("event=cluster_failed")
            cluster.give_up(UserError(f"internal error in the cluster manager: {e!r}"))
        if cluster.failure is not None:
            self.fail(cluster.failure)

    def fail(self, error: UserError) -> None:
        """No TE will ever come up with these settings."""
        self.failure = error
        self.failed.set()
        if self.je is not None:
            self.je.give_up(str(error))

    async def drain(self, timeout: float) -> bool:
        """Take no new request and wait for the running ones; False where some were still running after `timeout` seconds."""
        self.draining = True
        if self.je is None or not self.je.outstanding:
            return True
        idle = asyncio.Event()
        self.je.idle_listeners.append(idle.set)
        try:
            await asyncio.wait_for(idle.wait(), timeout)
            return True
        except TimeoutError:
            return False

    async def close(self) -> None:
        """End every process and fail what still runs. Idempotent."""
        self.closed = self.draining = True
        for task in (self.starting, self.running):
            if task is not None:
                task.cancel()
                await asyncio.wait((task,))  # its error, if any, was told by `ready` and /health
        self.running = None
        if self.je is not None:
            self.je.give_up("the server is shutting down")

    # ---- what the gateway asks --------------------------------------------------------------------------------------
    @property
    def api_keys(self) -> list[str]:
        return self.config.api_key

    def models(self) -> list[ModelCard]:
        """Every name this server answers to."""
        length = self.config.max_model_len or 0
        return [ModelCard(name, self.created, length, self.names[0]) for name in self.names]

    async def model(self, name: str) -> ServedModel:
        """The model called `name` ("" is the one there is), once its tokenizer is there. Raises `UnknownModel`, `Unavailable`."""
        try:
            await asyncio.shield(self.start())
        except UserError as e:
            raise Unavailable(f"the model can't be served: {e}", 30.0) from None
        if name and name not in self.names:
            raise UnknownModel(f"the model {name!r} is not served here; there is {', '.join(self.names)}", "model")
        assert self.tokenizer is not None and self.config.max_model_len is not None
        return ServedModel(name or self.names[0], self.config.max_model_len, self.tokenizer)

    @contextlib.asynccontextmanager
    async def submit(self, submission: Submission) -> AsyncIterator[Stream]:
        """Run a submission. Leaving the context cancels what is left of it on every TE.

        Raises `UserError` (bad parameters), `Overloaded`, `Unavailable`; `TaskFailed` comes out of the stream."""
        served = await self.model(submission.model)
        if self.draining:
            raise Unavailable("the server is shutting down", 10.0)
        if self.failure is not None:
            raise Unavailable(f"the model can't be served: {self.failure}", 30.0)
        check_fits(submission, served)
        assert self.je is not None
        live = self.je.admit(submission)
        try:
            yield live.stream
        finally:
            self.je.leave(live)

    def forget_context(self, id: str) -> None:
        """An explicit context was deleted or has expired."""
        if self.je is not None:
            self.je.forget_context(id)

    def health(self) -> dict[str, Any]:
        """The workers' state, not the web server's: "ok" only while every TE is ready and its step loop comes round."""
        now = time.monotonic()
        wanted = self.config.te
        tes = self.cluster.ready_tes() if self.cluster is not None else []
        healthy = [te for te in tes if te.healthy(now, self.config.stall_timeout)]
        if self.failure is not None:
            status = "dead"
        elif self.draining:
            status = "draining"
        elif len(healthy) == wanted:
            status = "ok"
        elif self.cluster is None or not self.cluster.first_ready.is_set():
            status = "loading"
        else:
            status = "degraded"
        detail = {"te": wanted, "te_ready": len(tes), "te_healthy": len(healthy), "model": self.names[0] if self.names else None}
        return {"status": status, **detail, "error": str(self.failure) if self.failure is not None else None}

    def job(self, name: str) -> dict[str, Any] | None:
        """A request's jobs, tasks, states and times, by the response's id or the caller's X-Request-Id."""
        record = self.je.find(name) if self.je is not None else None
        return describe(record) if record is not None else None

    def executors(self) -> list[dict[str, Any]]:
        return self.cluster.describe() if self.cluster is not None else []

    def give_role(self, te: int, role: Role) -> dict[str, Any]:
        """Change what a TE does. Running decodes leave a TE that is to prefill only: `moving` are on their way to another one,
        `draining` sequences end where they are. Raises `UserError`."""
        if self.cluster is None or self.je is None:
            raise Unavailable("the model is still loading", 5.0)
        changed = self.cluster.give_role(te, role)
        moving, draining = self.je.move_away(changed) if role == "prefill" else (0, changed.sequences)
        self.je.place()
        return {"id": te, "object": "task_executor", "role": role, "moving": moving, "draining": draining}

    def metrics(self) -> bytes:
        """Prometheus text."""
        return self.metrics_of.text() if self.metrics_of is not None else b""

    # ---- embedding: vLLM's shapes -----------------------------------------------------------------------------------
    async def generate(
        self, prompt: str | Sequence[int], sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """The growing output of one prompt (text or token ids). Leaving the loop early cancels the request."""
        served = await self.model("")
        if isinstance(prompt, str):
            text: str | None = prompt
            ids = await off_loop(len(prompt), lambda: served.tokenizer.encode(prompt))
        else:
            text, ids = None, list(prompt)
            check_ids(ids, served.tokenizer.vocab_size, "prompt")
        async for output in self.outputs(text, ids, sampling_params, request_id):
            yield output

    async def chat(
        self, messages: list[Message], sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """The growing answer to a conversation, through the model's chat template."""
        served = await self.model("")
        text = served.tokenizer.render(messages)
        ids = await off_loop(len(text), lambda: served.tokenizer.encode(text, add_special=False))
        async for output in self.outputs(text, ids, sampling_params, request_id):
            yield output

    async def outputs(
        self, text: str | None, ids: list[int], params: SamplingParams | None, request_id: str | None
    ) -> AsyncIterator[RequestOutput]:
        params = checked(params or SamplingParams())
        name = request_id or f"gen-{uuid.uuid4().hex}"
        submission = Submission(id=name, model="", prompts=[array("i", ids)], params=params, kind="embedded")
        output = RequestOutput(
            request_id=name, prompt=text, prompt_token_ids=ids, outputs=[CompletionOutput(index=i) for i in range(params.n)]
        )
        async with self.submit(submission) as stream:
            async for deltas in stream:
                for delta in deltas:
                    output.outputs[delta.index].add(delta)
                output.finished = not stream.open
                output.num_cached_tokens = stream.usage.cached_tokens
                output.prompt_logprobs = stream.prompt_logprobs.get(0)
                yield output


def make_plan(path: Path, asked: Config) -> tuple[ladder.Plan, dict[str, str]]:
    """What a TE of this model is on this machine, with the Config resolved, and why its values are so. Reads no weights."""
    checkpoint = weights.open_checkpoint(path)
    model = models.build(checkpoint.config)
    name, _ = devices.choose(asked.device)
    box = capacity.machine(kernels=not devices.kind(name).own_memory)
    packing = capacity.packing(asked, box)
    size = weights.packed_size(checkpoint, model.weights(), packing)
    config, why = capacity.resolve(asked, model, size, box)
    key = f"{path}:{packing.dtype}:{packing.format}:{packing.quantization}"
    return ladder.Plan(key, packing, str(path), config, capacity.threads_for(config, box)), why


def check_fits(submission: Submission, served: ServedModel) -> None:
    """Raises `UserError` where a prompt is empty or leaves no room, or a parameter names an id that is none."""
    wanted = submission.params.max_tokens
    for prompt in submission.prompts:
        if not prompt:
            raise UserError("the prompt is empty: it needs at least one token", "prompt")
        if len(prompt) + (wanted is None or wanted > 0) > served.max_model_len:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and the model's context holds {served.max_model_len}, output included",
                "prompt",
            )
    check_ids(submission.params.logit_bias, served.tokenizer.vocab_size, "logit_bias")
    check_ids(submission.params.stop_token_ids, served.tokenizer.vocab_size, "stop_token_ids")


def check_ids(ids: Collection[int], vocab: int, field: str) -> None:
    if ids and not 0 <= min(ids) <= max(ids) < vocab:
        raise UserError(f"{field} has a token id outside 0 to {vocab - 1}", field)
