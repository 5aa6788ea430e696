"""`AsyncLLM`: the one client API. HTTP, the command line and embedding programs all submit here.

It answers for one model or several, each a deployment; the first is the default. `submit` is an async context manager: leaving
it, for whatever cause, cancels the request everywhere. The object lives in whatever loop it is started in, installs no signal
handler, prints nothing and ends all its processes in `close`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
import uuid
from array import array
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from random import Random
from typing import Any

import msgspec

from engine import capacity, devices
from engine.config import Config, Role, resolve
from engine.rtc.keys import block_keys, root_key
from engine.tokenizer import Tokenizer
from engine.types import SamplingParams, UserError, checked, pack_ids
from scale.ladder import Climb
from scale.memory import available, used_by
from sched.cluster import Cluster
from sched.contexts import Contexts
from sched.deployment import Deployment
from sched.job import describe
from sched.metrics import Families
from sched.off_loop import off_loop
from sched.preloading import Preloading
from sched.residency import Residency
from sched.stream import CompletionOutput, RequestOutput, Stream, Submission, Unavailable, UnknownModel, result_of

Message = dict[str, Any]
log = logging.getLogger(__name__)

# Of the memory that is free at the start, what packed weights of models that are not up may take.
WEIGHTS_SHARE = 0.25


class ModelCard(msgspec.Struct):
    """A served model's name as /v1/models lists it."""

    id: str
    created: int
    max_model_len: int
    root: str
    state: str
    te: int  # that take tasks


class ServedModel(msgspec.Struct):
    """What a caller needs to turn text into a submission."""

    id: str
    max_model_len: int
    tokenizer: Tokenizer


class AsyncLLM:
    """Models on task executors.

    Settings are Config's fields: `AsyncLLM("folder", te=2, max_model_len=2048)`; `configs` has one for each of several models, of
    which the first is the default and says what is the server's. Use it as `async with AsyncLLM(...) as engine:`, or let the
    first call start it and call `close` at the end. The default model is brought up at the start, the others when they are
    asked for.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        config: Config | None = None,
        configs: Sequence[Config] = (),
        on_climb: Callable[[Climb], None] | None = None,
        **settings: Any,
    ):
        """`on_climb` is told of every TE that is up."""
        if not configs:
            if config is None:
                if model is not None:
                    settings["model"] = os.fspath(model)
                config, _ = resolve(settings)
            configs = [config]
        self.asked = configs[0]
        self.draining = False
        self.closed = False
        self.starting: asyncio.Task[None] | None = None
        self.running: asyncio.Task[None] | None = None
        self.rng = Random(self.asked.seed) if self.asked.seed is not None else Random()
        self.failure: UserError | None = None  # nothing will ever be served
        self.failed = asyncio.Event()  # set with `failure`
        self.contexts = Contexts(self.forget_context)
        self.families = Families()
        self.box: capacity.Machine | None = None
        self.cluster = Cluster(self.asked.stall_timeout, on_climb)
        self.residency = Residency(0, 0)
        self.deployments = [Deployment(asked, self.cluster, self.residency, self.families, self.rng) for asked in configs]
        self.residency.deployments = self.deployments
        self.preloading = Preloading(self.deployments, self.residency, self.cluster, self.asked.warm_te)
        self.families.watch(self.cluster, self.deployments)

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
        """Begin loading; the task ends when every model is described and the default one's requests can be tokenised.
        Idempotent."""
        if self.starting is None:
            if self.closed:
                raise RuntimeError("this engine is closed")
            self.starting = asyncio.create_task(self.load(), name="deepserve-load")
            self.starting.add_done_callback(lambda t: t.cancelled() or t.exception())  # retrieved: told by `ready` and /health
        return self.starting

    async def ready(self) -> None:
        """Wait until the default model takes tasks, or has been put to sleep. Raises `UserError` where that never will be."""
        await result_of(self.start())
        first = self.deployments[0]
        await first.wait_while(lambda: first.state == "loading")
        if first.failure is not None:
            raise first.failure

    async def load(self) -> None:
        """Measure the box, read every model's description, and bring the default model up."""
        try:
            await self.measure()
            self.running = asyncio.create_task(self.keep_running(), name="deepserve-cluster")
            first = self.deployments[0]
            await first.describe()
            first.wake("the server starts")  # weights are packed while the rest goes on
            for deployment in self.deployments[1:]:
                try:
                    await deployment.describe()
                except UserError as e:  # it alone can't be served
                    log.error("event=model_failed model=%s why=%s", deployment.id, e)
                    deployment.give_up(e)
            self.check_names()
            await first.tokens()
            self.preloading.start()
        except UserError as e:
            self.fail(e)
            raise

    async def measure(self) -> None:
        """What the models may use of this box. Raises `UserError`."""
        kernels = not devices.kind(devices.choose(self.asked.device)[0]).own_memory
        box = await asyncio.to_thread(capacity.machine, kernels)
        budget = self.asked.memory_budget or box.free_bytes
        self.box = msgspec.structs.replace(box, free_bytes=min(box.free_bytes, budget), models=len(self.deployments))
        self.residency.budget = budget
        asked = self.asked.weights_dram_bytes
        self.residency.weights_budget = int(box.free_bytes * WEIGHTS_SHARE) if asked is None else asked
        self.cluster.cores = box.cores
        for deployment in self.deployments:
            deployment.box = self.box
            device, _ = devices.choose(deployment.asked.device)
            self.cluster.formats.add((device, capacity.packing(deployment.asked, box).format))

    def check_names(self) -> None:
        """Raises `UserError` where two models answer to one name."""
        taken: dict[str, Deployment] = {}
        for deployment in self.deployments:
            for name in deployment.names:
                if (other := taken.setdefault(name, deployment)) is not deployment:
                    raise UserError(
                        f"{name} would be a name of {other.asked.model} and of {deployment.asked.model}; give one of them another"
                        " by served-model-name in a [models.NAME] table of --config",
                        "served_model_name",
                    )

    async def keep_running(self) -> None:
        try:
            await self.cluster.run()
        except Exception as e:  # a bug: told like any other failure, and not only when somebody awaits this task
            log.exception("event=cluster_failed")
            self.fail(UserError(f"internal error in the cluster manager: {e!r}"))

    def fail(self, error: UserError) -> None:
        """Nothing will ever be served with these settings."""
        self.failure = error
        self.failed.set()
        for deployment in self.deployments:
            deployment.give_up(error)

    async def drain(self, te: int) -> dict[str, Any]:
        """Have a TE take no new task, its running decodes go on elsewhere or end, and then leave. Raises `UserError`."""
        deployment, slot = self.slot(te, "te")
        there = self.cluster.table.get(te)
        went = there.sequences if there is not None else 0
        draining = deployment.drain(slot)
        await asyncio.wait((draining,))
        if draining.cancelled():
            raise Unavailable("the server is shutting down", 10.0)
        return {"id": te, "object": "task_executor", "drained": True, "sequences": went}

    async def finish(self, timeout: float) -> bool:
        """Take no new request and wait for the running ones; False where some were still running after `timeout` seconds."""
        self.draining = True
        idle = asyncio.Event()

        def look() -> None:
            if not any(d.busy for d in self.deployments):
                idle.set()

        for deployment in self.deployments:
            if deployment.je is not None:
                deployment.je.idle_listeners.append(look)
        look()
        try:
            await asyncio.wait_for(idle.wait(), timeout)
            return True
        except TimeoutError:
            return False

    async def close(self) -> None:
        """End every process and fail what still runs. Idempotent."""
        self.closed = self.draining = True
        await self.preloading.close()
        if self.starting is not None:
            self.starting.cancel()
            await asyncio.wait((self.starting,))  # its error, if any, was told by `ready` and /health
        if self.running is not None:
            self.running.cancel()
            await asyncio.wait((self.running,))
        self.running = None
        for deployment in self.deployments:
            await deployment.close()
        await self.residency.close()

    # ---- what the gateway asks --------------------------------------------------------------------------------------
    @property
    def needs_key(self) -> bool:
        """Whether callers over HTTP are asked for an API key."""
        return bool(self.asked.api_key or self.asked.api_keys_file)

    @property
    def config(self) -> Config:
        """Of the default model; resolved once its files are read."""
        return self.deployments[0].config

    @property
    def names(self) -> list[str]:
        """Every name that this server answers to."""
        return [name for deployment in self.deployments for name in deployment.names]

    @property
    def described(self) -> bool:
        """Every model's files have been read."""
        return self.starting is not None and self.starting.done()

    def deployment(self, name: str) -> Deployment:
        """The model called `name`; "" is the default one. Raises `UnknownModel`."""
        if not name:
            return self.deployments[0]
        for deployment in self.deployments:
            if name in deployment.names:
                return deployment
        raise UnknownModel(f"the model {name!r} is not served here; there is {', '.join(self.names)}", "model")

    def models(self) -> list[ModelCard]:
        """Every name this server answers to."""
        return [
            ModelCard(name, d.created, d.config.max_model_len or 0, d.id, d.state, len(d.takers()))
            for d in self.deployments
            for name in d.names
        ]

    async def model(self, name: str, wake: bool = True) -> ServedModel:
        """The model called `name` ("" is the default one), once its tokenizer is there. With `wake` it is brought up where it
        isn't: who only wants tokens counted needs no TE. Raises `UnknownModel`, `Unavailable`."""
        starting = self.start()
        with contextlib.suppress(UserError):
            await result_of(starting)  # names are known only then
        if self.failure is not None:
            raise Unavailable(f"the model can't be served: {self.failure}", 30.0)
        deployment = self.deployment(name)
        if wake:
            deployment.wake("a request has come")
        try:
            tokenizer = await deployment.tokens()
        except UserError as e:
            raise Unavailable(f"{deployment.id} can't be served: {e}", 30.0) from None
        assert deployment.config.max_model_len is not None
        return ServedModel(name or deployment.id, deployment.config.max_model_len, tokenizer)

    @contextlib.asynccontextmanager
    async def submit(self, submission: Submission) -> AsyncIterator[Stream]:
        """Run a submission. Leaving the context cancels what is left of it on every TE.

        Raises `UserError` (bad parameters), `Overloaded`, `Unavailable`; `TaskFailed` comes out of the stream."""
        served = await self.model(submission.model)
        deployment = self.deployment(submission.model)
        if self.draining:
            raise Unavailable("the server is shutting down", 10.0)
        if deployment.failure is not None:
            raise Unavailable(f"{deployment.id} can't be served: {deployment.failure}", 30.0)
        check_fits(submission, served)
        assert deployment.je is not None
        if deployment.has_choice and deployment.config.enable_prefix_caching and submission.params.prompt_logprobs is None:
            await find_keys(submission, deployment.config)
        self.preloading.asked(deployment)
        live = deployment.je.admit(submission)
        try:
            yield live.stream
        finally:
            deployment.je.leave(live)

    def refused(self, model: str, cause: str) -> None:
        """A request for a served model was refused before it got to `submit`."""
        metrics = self.deployment(model).metrics
        assert metrics is not None, "the model's prompt was tokenised"
        metrics.refusals.labels(metrics.model, cause).inc()

    def forget_context(self, id: str) -> None:
        """An explicit context was deleted or has expired."""
        for deployment in self.deployments:
            if deployment.je is not None:
                deployment.je.forget_context(id)

    def health(self) -> dict[str, Any]:
        """The workers' state, not the web server's: "ok" only while every TE that should be there is ready and its step loop
        comes round. A model that sleeps is well."""
        now = time.monotonic()
        wanted = sum(slot.missed for d in self.deployments for slot in d.slots) + sum(d.lacking for d in self.deployments)
        tes = [te for te in self.cluster.ready_tes() if not te.draining]
        healthy = [te for te in tes if te.healthy(now, self.asked.stall_timeout)]
        first = self.deployments[0]
        failure = self.failure or next((d.failure for d in self.deployments if d.failure is not None), None)
        if self.failure is not None or all(d.failure is not None for d in self.deployments):
            status = "dead"
        elif self.draining:
            status = "draining"
        elif not self.described or (not tes and any(d.state == "loading" for d in self.deployments)):
            status = "loading"
        elif len(healthy) >= wanted:
            status = "ok"
        else:
            status = "degraded"
        detail = {
            "te": wanted,
            "te_ready": len(tes),
            "te_healthy": len(healthy),
            "model": first.names[0] if first.names else None,
        }
        return {"status": status, **detail, "error": str(failure) if failure is not None else None}

    def job(self, name: str) -> dict[str, Any] | None:
        """A request's jobs, tasks, states and times, by the response's id or the caller's X-Request-Id."""
        for deployment in self.deployments:
            if deployment.je is not None and (record := deployment.je.find(name)) is not None:
                return describe(record)
        return None

    async def executors(self) -> list[dict[str, Any]]:
        """Every TE, with what it takes of memory now."""
        shown = self.cluster.describe()
        pids = [(te.pid, *te.ranks) for te in self.cluster.table.values()]
        private = await asyncio.to_thread(lambda: [used_by(family).private for family in pids])
        return [one | {"private_bytes": nbytes} for one, nbytes in zip(shown, private, strict=True)]

    def give_role(self, te: int, role: Role) -> dict[str, Any]:
        """Change what a TE does. Running decodes leave a TE that is to prefill only: `moving` are on their way to another one,
        `draining` sequences end where they are. Raises `UserError`."""
        je = self.slot(te, "id")[0].listener
        changed = self.cluster.give_role(te, role)
        moving, draining = je.move_away(changed) if role == "prefill" else (0, changed.sequences)
        je.place()
        return {"id": te, "object": "task_executor", "role": role, "moving": moving, "draining": draining}

    def metrics(self) -> bytes:
        """Prometheus text."""
        return self.families.text()

    # ---- how many TEs there are -------------------------------------------------------------------------------------
    def slot(self, te: int, field: str) -> tuple[Deployment, Any]:
        """Whose TE that is, and its slot. Raises `UserError` that names the `field` which the number came in."""
        for deployment in self.deployments:
            for slot in deployment.slots:
                if slot.te == te:
                    return deployment, slot
        raise UserError(f"there is no TE {te}; GET /v1/admin/te lists them", field)

    def scale_state(self) -> dict[str, Any]:
        """How TEs came up, and what there is of every model."""
        cluster, residency, now = self.cluster, self.residency, time.monotonic()
        climbs = [
            {
                "te": climb.te,
                "model": climb.model,
                "role": climb.role,
                "began": round(climb.at, 3),
                "why": climb.why,
                "how": climb.how,
                "path": climb.path,
                "source": climb.source if climb.source >= 0 else None,
                "fell": climb.fell,
                "steps": {name: round(seconds, 6) for name, seconds in climb.steps.items()},
                "total_s": round(climb.total, 6),
            }
            for climb in cluster.climbs
        ]
        kept = [
            {"model": e.key, "nbytes": e.nbytes, "pinned": e.pinned, "last_used_s": round(now - e.last_used, 3)}
            for e in residency.kept()
        ]
        keeper = cluster.keeper
        return {
            "object": "scale",
            "climbs": climbs,
            "models": [deployment.shown() for deployment in self.deployments],
            "dram": {
                "budget_bytes": residency.weights_budget,
                "used_bytes": sum(e["nbytes"] for e in kept if not e["pinned"]),
                "entries": kept,
            },
            "memory": {"budget_bytes": residency.budget, "used_bytes": residency.used},
            "pool": {"wanted": cluster.pool_size},
            "keeper": {"pid": keeper.pid if keeper is not None else None, "starts": cluster.keeper_starts},
        }

    async def scale(self, model: str, te: int, role: Role | None) -> dict[str, Any]:
        """Bring a model to so many TEs of a role, and answer when they are ready. Raises `UserError`, `Unavailable`."""
        deployment = self.deployment(model)
        began = time.monotonic()
        await self.up(deployment, "asked for")
        roles: list[Role] = [role] if role is not None else [*deployment.wanted, "colocated"]
        which = roles[0]
        await deployment.told(which, te)
        return {
            "model": deployment.id,
            "role": which,
            "te": deployment.count(which),
            "state": deployment.state,
            "seconds": round(time.monotonic() - began, 6),
        }

    async def sleep(self, model: str, level: int) -> dict[str, Any]:
        """Let a model's TEs go, and with level 2 its packed weights too; what runs ends first. The next request wakes it."""
        deployment = self.deployment(model)
        before = await asyncio.to_thread(available)
        freed, verified = await result_of(deployment.fall_asleep(level))
        return {
            "model": deployment.id,
            "state": deployment.state,
            "freed": {"private_bytes": freed.private, "kv_bytes": freed.kv, "weights_bytes": freed.weights},
            "verified": verified,
            "available_before": before,
            "available_after": await asyncio.to_thread(available),
        }

    async def wake(self, model: str) -> dict[str, Any]:
        """Bring a model up, and answer when it is. Raises `UserError`, `Unavailable`."""
        deployment = self.deployment(model)
        began = time.monotonic()
        await self.up(deployment, "asked for")
        climb = next((c for c in reversed(self.cluster.climbs) if c.model == deployment.id), None)
        return {
            "model": deployment.id,
            "state": deployment.state,
            "seconds": round(time.monotonic() - began, 6),
            "path": climb.path if climb is not None else None,
        }

    async def up(self, deployment: Deployment, why: str) -> None:
        """A model that isn't up comes up. Raises `UserError`, `Unavailable`."""
        if self.draining:
            raise Unavailable("the server is shutting down", 10.0)
        await result_of(self.start())
        began = deployment.clock()
        deployment.wake(why, again=True)
        await deployment.wait_while(lambda: deployment.state == "loading")
        if deployment.state != "ready" and (deployment.failure is not None or deployment.up_since < began):
            raise deployment.asleep_again()

    # ---- embedding: vLLM's shapes -----------------------------------------------------------------------------------
    async def generate(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        model: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """The growing output of one prompt (text or token ids). Leaving the loop early cancels the request."""
        served = await self.model(model)
        if isinstance(prompt, str):
            text: str | None = prompt
            ids = await off_loop(len(prompt), lambda: served.tokenizer.encode(prompt))
        else:
            text, ids = None, list(prompt)
            check_ids(ids, served.tokenizer.vocab_size, "prompt")
        async for output in self.outputs(text, ids, sampling_params, request_id, model):
            yield output

    async def chat(
        self,
        messages: list[Message],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        model: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """The growing answer to a conversation, through the model's chat template."""
        served = await self.model(model)
        text = served.tokenizer.render(messages)
        ids = await off_loop(len(text), lambda: served.tokenizer.encode(text, add_special=False))
        async for output in self.outputs(text, ids, sampling_params, request_id, model):
            yield output

    async def outputs(
        self, text: str | None, ids: list[int], params: SamplingParams | None, request_id: str | None, model: str
    ) -> AsyncIterator[RequestOutput]:
        params = checked(params or SamplingParams())
        name = request_id or f"gen-{uuid.uuid4().hex}"
        submission = Submission(id=name, model=model, prompts=[array("i", ids)], params=params, kind="embedded")
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


async def find_keys(submission: Submission, config: Config) -> None:
    """The keys of the prompts' full KV blocks, but for a last token: one is always computed."""
    size = config.block_size
    assert size is not None
    root = root_key(submission.salt)
    for prompt in submission.prompts:
        ids = memoryview(pack_ids(prompt))[: (len(prompt) - 1) // size * size * 4]
        # A block's key takes a microsecond and more, and has 16 tokens or so.
        submission.keys.append(await off_loop(len(prompt), lambda ids=ids: list(block_keys(root, ids, size))))  # type: ignore[misc]


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
