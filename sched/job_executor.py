"""The JE: one a model. Splits requests into jobs and tasks, places tasks on TEs, follows them, replays them after a TE's death.

One dictionary of live tasks is the truth about what runs. A TE's `Tokens` message is worked off in one callback for the
whole batch: detokenise, look for stop strings, hand each stream its deltas, which it writes at once.
"""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from engine.config import Config
from engine.tokenizer import Tokenizer
from engine.types import (
    Abort,
    Finish,
    FromWorker,
    PromptDone,
    Refused,
    Sample,
    SamplingParams,
    Start,
    TokenLogprobs,
    Tokens,
    pack_ids,
    split_sequence_id,
)
from sched.admission import queue_is_full, retry_after
from sched.cluster import TE
from sched.job import Job, Request, Task, born
from sched.metrics import Metrics
from sched.policy import Snapshot, least_loaded
from sched.stream import Delta, Overloaded, Stream, Submission, TaskFailed, Unavailable
from sched.text import Text

# A task whose TE dies under it this often is taken for the cause and failed instead of replayed once more.
MAX_ATTEMPTS = 4
KEPT_REQUESTS = 4096  # ended requests that `GET /v1/jobs` still finds
RATE_WINDOW = 64  # ended sequences that the predicted wait is judged by


@dataclass(slots=True, eq=False)
class LiveSample:
    """One sample of a live task: what has been sent of it."""

    choice: int
    seed: int
    text: Text
    ids: array[int]
    first: float = 0.0  # CLOCK_MONOTONIC seconds of its first token
    last: float = 0.0  # ... and of its newest
    over: bool = False


@dataclass(slots=True, eq=False)
class LiveTask:
    task: Task
    request: LiveRequest
    prompt: bytes
    prompt_index: int
    prompt_tokens: int
    params: SamplingParams
    max_tokens: int
    stop_ids: list[int]
    samples: list[LiveSample]
    open_samples: int
    te: TE | None = None
    begun: bool = False  # its first token has come
    charged: bool = False  # dispatched and without a token since: its prompt counts in the TE's `prompt_tokens`


@dataclass(slots=True, eq=False)
class LiveRequest:
    record: Request
    submission: Submission
    stream: Stream
    arrived: float  # CLOCK_MONOTONIC seconds
    tasks: list[LiveTask] = field(default_factory=list)
    open_samples: int = 0


class JobExecutor:
    """Runs every request of one model. `Cluster` tells it of TEs (it is the cluster's listener)."""

    tokenizer: Tokenizer  # set before the first `admit`; TEs may come earlier

    def __init__(self, config: Config, metrics: Metrics, rng: Random, clock: Callable[[], float] = time.monotonic):
        self.config = config
        self.metrics = metrics
        self.rng = rng
        self.clock = clock
        self.tes: dict[int, TE] = {}  # that take tasks
        self.live: dict[int, LiveTask] = {}
        self.held: deque[LiveTask] = deque()  # tasks without a TE
        self.requests: OrderedDict[str, Request] = OrderedDict()
        self.by_trace: dict[str, str] = {}
        self.next_task = 1
        self.outstanding = 0  # sequences admitted and not ended
        self.ended: deque[float] = deque(maxlen=RATE_WINDOW)  # when the newest sequences ended
        self.idle_listeners: list[Callable[[], None]] = []
        assert config.max_model_len is not None
        self.max_len = config.max_model_len

    # ---- requests ---------------------------------------------------------------------------------------------------
    def admit(self, submission: Submission) -> LiveRequest:
        """Take a request in and place its tasks. Raises `Overloaded`."""
        now, params = time.time(), submission.params
        record = Request(
            id=submission.id,
            trace_id=submission.trace_id,
            model=submission.model,
            kind=submission.kind,
            life=born("request", now),
        )
        self.remember(record)
        count = len(submission.prompts) * params.n
        config = self.config
        if queue_is_full(self.outstanding, count, config.te, config.max_num_seqs, config.max_num_queued_reqs):
            record.life.move("refuse", now)
            self.metrics.refusals.labels(self.metrics.model, "queue_full").inc()
            wait = retry_after(self.outstanding - config.te * config.max_num_seqs, self.rate())
            raise Overloaded(f"the queue is full: {self.outstanding} sequences are running or waiting", wait)
        live = LiveRequest(record, submission, Stream(count), self.clock(), open_samples=count)
        record.life.move("admit", now)
        self.outstanding += count
        for index, prompt in enumerate(submission.prompts):
            self.start_job(live, index, prompt)
        live.stream.usage.prompt_tokens = record.prompt_tokens = sum(map(len, submission.prompts))
        self.metrics.prompt_tokens.inc(record.prompt_tokens)
        return live

    def start_job(self, live: LiveRequest, index: int, prompt: array[int]) -> None:
        """One serving job with one unified task for one prompt."""
        params, now = live.submission.params, time.time()
        task = Task(id=self.next_task, kind="unified", life=born("task", now))
        self.next_task += 1
        live.record.jobs.append(Job(id=f"job-{task.id}", kind="serving", life=born("job", now), tasks=[task]))
        room = self.max_len - len(prompt)
        first_seed = params.seed if params.seed is not None else self.rng.getrandbits(63)
        stop_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            stop_ids |= self.tokenizer.eos_ids
        entry = LiveTask(
            task=task,
            request=live,
            prompt=pack_ids(prompt),
            prompt_index=index,
            prompt_tokens=len(prompt),
            params=params,
            max_tokens=room if params.max_tokens is None else min(room, params.max_tokens),
            stop_ids=sorted(stop_ids),
            samples=[self.sample(index * params.n + i, first_seed + i, params) for i in range(params.n)],
            open_samples=params.n,
        )
        live.tasks.append(entry)
        self.live[task.id] = entry
        self.held.append(entry)
        self.place()

    def sample(self, choice: int, seed: int, params: SamplingParams) -> LiveSample:
        detokenizer = self.tokenizer.detokenizer(params.skip_special_tokens, continues=True)
        text = Text(detokenizer, params.stop, params.include_stop_str_in_output, params.min_tokens)
        return LiveSample(choice, seed & (2**63 - 1), text, array("i"))

    def leave(self, live: LiveRequest) -> None:
        """The caller has gone: cancel what still runs. Ended requests are left as they are."""
        if not live.record.life.over:
            self.drop(live)
            live.record.end("cancel", time.time())
            self.metrics.cancelled.inc()
            self.maybe_idle()

    def fail(self, live: LiveRequest, error: Exception) -> None:
        """The request can't be finished."""
        if not live.record.life.over:
            self.drop(live)
            live.record.error = str(error)
            live.record.end("fail", time.time())
            self.metrics.refusals.labels(self.metrics.model, "failed").inc()
            live.stream.fail(error)
            self.maybe_idle()

    def drop(self, live: LiveRequest) -> None:
        """Take a request's tasks off their TEs and out of the tables."""
        for entry in live.tasks:
            if self.live.pop(entry.task.id, None) is not None and entry.te is not None:
                if entry.te.state == "ready":
                    entry.te.link.send(Abort(entry.task.id))
                entry.te.sequences -= entry.open_samples
                self.uncharge(entry)
            elif entry in self.held:
                self.held.remove(entry)
        self.outstanding -= live.open_samples
        live.open_samples = 0

    def uncharge(self, entry: LiveTask) -> None:
        """The task's prompt no longer loads its TE."""
        if entry.charged:
            assert entry.te is not None
            entry.te.prompt_tokens -= entry.prompt_tokens
            entry.charged = False

    # ---- placing ----------------------------------------------------------------------------------------------------
    def place(self) -> None:
        """Give held tasks to TEs while there are any."""
        while self.held:
            choice = least_loaded([Snapshot(te.id, te.sequences, te.prompt_tokens) for te in self.tes.values()])
            if choice is None:
                return
            entry = self.held.popleft()
            self.dispatch(entry, self.tes[choice.te], choice.reason)

    def dispatch(self, entry: LiveTask, te: TE, reason: str) -> None:
        now, task, record = time.time(), entry.task, entry.request.record
        task.te, task.reason = te.id, reason
        task.attempts += 1
        task.life.move("dispatch", now)
        if record.life.state == "queued":
            record.life.move("run", now)
        for job in record.jobs:
            if job.life.state == "created" and task in job.tasks:
                job.life.move("run", now)
        entry.te = te
        open_samples = [(i, s) for i, s in enumerate(entry.samples) if not s.over]
        te.sequences += entry.open_samples
        te.prompt_tokens += entry.prompt_tokens
        entry.charged = True
        te.link.send(
            Start(
                task=task.id,
                prompt=entry.prompt,
                samples=[Sample(i, pack_ids(s.ids), s.seed) for i, s in open_samples],
                params=entry.params,
                max_tokens=entry.max_tokens,
                stop_ids=entry.stop_ids,
                salt=entry.request.submission.salt,
                priority=entry.request.submission.priority,
            )
        )

    # ---- the cluster's news -----------------------------------------------------------------------------------------
    def ready(self, te: TE) -> None:
        self.tes[te.id] = te
        assert te.climb is not None
        for step, seconds in te.climb.steps.items():
            self.metrics.scale_step(step).observe(seconds)
        self.place()

    def lost(self, te: TE, why: str) -> None:
        """Replay every task of a dead TE from its prompt plus what was sent, oldest first, before whatever else is held."""
        if self.tes.get(te.id) is te:
            del self.tes[te.id]
        now = time.time()
        orphans = [entry for entry in self.live.values() if entry.te is te]
        for entry in reversed(orphans):
            entry.te, entry.charged = None, False
            if entry.task.attempts >= MAX_ATTEMPTS:
                self.fail(entry.request, TaskFailed(f"given up after {entry.task.attempts} attempts, each ended by: {why}"))
            elif entry.task.id in self.live:  # not gone with a sibling that was given up
                entry.task.life.move("lost", now)
                self.metrics.replays.inc()
                self.held.appendleft(entry)
        self.place()

    def give_up(self, why: str) -> None:
        """No TE will come: fail everything."""
        for entry in list(self.live.values()):
            self.fail(entry.request, Unavailable(why))

    def message(self, te: TE, message: FromWorker) -> None:
        if isinstance(message, Tokens):
            self.tokens(te, message)
        elif isinstance(message, Refused):
            task, _ = split_sequence_id(message.seq)
            if (entry := self.live.get(task)) is not None:
                self.fail(entry.request, TaskFailed(message.why))

    # ---- a step's tokens --------------------------------------------------------------------------------------------
    def tokens(self, te: TE, message: Tokens) -> None:
        te.load = message.load
        now = self.clock()
        if message.prompts is not None:
            for done in message.prompts:
                self.prompt_done(done, te)
        brought: dict[LiveTask, list[Delta]] = {}
        gaps: dict[float, int] = {}  # when a sequence spoke before -> how many now follow that; mostly all at once
        live, logprobs, generated = self.live, message.logprobs, 0
        for i, (seq, token, finish) in enumerate(zip(message.seqs, message.ids, message.finish, strict=True)):
            task, index = split_sequence_id(seq)
            entry = live.get(task)
            if entry is None or entry.te is not te:
                continue  # cancelled, or replayed elsewhere: the TE has not heard yet
            sample = entry.samples[index]
            if sample.over:
                continue  # ended by a stop string: the TE has not heard yet
            if token >= 0:
                generated += 1
                if sample.last:
                    gaps[sample.last] = gaps.get(sample.last, 0) + 1
                else:
                    self.first_token(entry, sample, now)
                sample.last = now
                if entry.charged:
                    entry.task.life.move("first_token", time.time())
                    self.uncharge(entry)
            delta = self.take(entry, sample, token, finish, logprobs[i] if logprobs is not None else None)
            brought.setdefault(entry, []).append(delta)
            if delta.finish is not None:
                self.sample_over(entry, sample, delta.finish, now)
        self.metrics.tokens.generated += generated
        for last, count in gaps.items():
            self.metrics.tokens.observe(now - last, count)
        for entry, deltas in brought.items():
            entry.request.stream.feed(deltas)
            if not entry.open_samples:
                self.task_done(entry, now)

    def take(self, entry: LiveTask, sample: LiveSample, token: int, finish: int, logprobs: TokenLogprobs | None) -> Delta:
        """What one row of a step adds to its sample."""
        text, hit = "", None
        ids: list[int] = []
        ended: str | None = None
        stop_reason: str | int | None = None
        if token >= 0:
            ids.append(token)
            sample.ids.append(token)
            if finish == Finish.STOP:
                if token not in self.tokenizer.eos_ids or token in entry.params.stop_token_ids:
                    stop_reason = token
                if entry.params.include_stop_str_in_output:
                    text, hit = sample.text.push(token)
            else:
                text, hit = sample.text.push(token)
        if hit is not None:
            ended, stop_reason = "stop", hit
            if finish == Finish.NONE:
                assert entry.te is not None
                entry.te.link.send(Abort(entry.task.id, split_index(entry, sample)))
        elif finish:
            rest, hit = sample.text.close()
            text += rest
            ended = "length" if finish == Finish.LENGTH else "stop"
            if hit is not None:
                ended, stop_reason = "stop", hit
        found = [logprobs] if logprobs is not None and ids else None
        return Delta(sample.choice, text, ids, found, ended, stop_reason)

    def first_token(self, entry: LiveTask, sample: LiveSample, now: float) -> None:
        sample.first = now
        if not entry.request.record.first_token:
            entry.request.record.first_token = time.time()
            self.metrics.first_token.observe(now - entry.request.arrived)

    def prompt_done(self, done: PromptDone, te: TE) -> None:
        task, _ = split_sequence_id(done.seq)
        entry = self.live.get(task)
        if entry is None or entry.te is not te or entry.begun:
            return
        entry.begun = True
        entry.task.cached_tokens = done.cached
        entry.request.stream.usage.cached_tokens += done.cached
        if done.logprobs is not None:
            entry.request.stream.prompt_logprobs[entry.prompt_index] = done.logprobs
        if done.start and entry.task.attempts == 1:
            self.metrics.queued.observe(max(0.0, done.start - entry.request.arrived))

    def sample_over(self, entry: LiveTask, sample: LiveSample, reason: str, now: float) -> None:
        sample.over = True
        assert entry.te is not None
        entry.te.sequences -= 1
        entry.open_samples -= 1
        entry.request.open_samples -= 1
        entry.request.stream.usage.completion_tokens += len(sample.ids)
        self.outstanding -= 1
        self.ended.append(now)
        self.metrics.success.labels(self.metrics.model, reason).inc()
        if (produced := len(sample.ids)) > 1:
            self.metrics.per_token.observe((now - sample.first) / (produced - 1))
        self.metrics.request_generation.observe(produced)

    def task_done(self, entry: LiveTask, now: float) -> None:
        """A task's last sample has ended; perhaps its request with it."""
        request = entry.request
        del self.live[entry.task.id]
        self.uncharge(entry)
        at = time.time()
        entry.task.life.move("finish", at)
        for job in request.record.jobs:
            if not job.life.over and all(t.life.over for t in job.tasks):
                job.life.move("finish", at)
        if not request.open_samples:
            request.record.completion_tokens = request.stream.usage.completion_tokens
            request.record.end("finish", at)
            self.metrics.whole.observe(now - request.arrived)
            self.metrics.request_prompt.observe(request.record.prompt_tokens)
        self.maybe_idle()

    # ---- bookkeeping ------------------------------------------------------------------------------------------------
    def remember(self, record: Request) -> None:
        self.requests[record.id] = record
        if record.trace_id:
            self.by_trace[record.trace_id] = record.id
        while len(self.requests) > KEPT_REQUESTS:
            old = next(iter(self.requests.values()))
            if not old.life.over:
                break  # everything kept is running: nothing to forget
            del self.requests[old.id]
            if self.by_trace.get(old.trace_id) == old.id:
                del self.by_trace[old.trace_id]

    def find(self, name: str) -> Request | None:
        """A request by its own id or by the caller's X-Request-Id."""
        return self.requests.get(name) or self.requests.get(self.by_trace.get(name, ""))

    def rate(self) -> float:
        """Sequences ended a second, lately."""
        if len(self.ended) < 2:
            return 0.0
        return (len(self.ended) - 1) / max(1e-3, self.clock() - self.ended[0])

    def maybe_idle(self) -> None:
        if not self.outstanding:
            for listener in self.idle_listeners:
                listener()


def split_index(entry: LiveTask, sample: LiveSample) -> int:
    """The sample's index within its task."""
    return sample.choice - entry.prompt_index * entry.params.n
