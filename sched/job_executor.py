"""The JE: one a model. Splits requests into jobs and tasks, places tasks on TEs, follows them, replays them after a TE's death.

One dictionary of live tasks is the truth about what runs. A TE's `Tokens` message is worked off in one callback for the
whole batch: detokenise, look for stop strings, hand each stream its deltas, which it writes at once.
"""

from __future__ import annotations

import time
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable
from random import Random

from engine.config import Config, Role
from engine.tokenizer import Tokenizer
from engine.types import (
    Abort,
    Adopted,
    BlockNews,
    Closed,
    Finish,
    Forget,
    FromWorker,
    HandedOver,
    Handover,
    Move,
    PromptDone,
    Refused,
    Reserved,
    SamplingParams,
    Share,
    TokenLogprobs,
    Tokens,
    pack_ids,
    sequence_id,
    split_sequence_id,
)
from scale.autoscale import Signals
from sched.admission import Refusal, Targets, out_of_reach, queue_is_full, retry_after
from sched.cluster import TE
from sched.fairness import free
from sched.handover import Passage, Passages, say
from sched.job import Job, Request, Task, born
from sched.knowledge import Knowledge
from sched.live import LiveRequest, LiveSample, LiveTask
from sched.metrics import Metrics
from sched.placing import Placing
from sched.policy import Choice
from sched.semi import SemiPairs
from sched.shares import WHOLE
from sched.slo import Slo
from sched.stream import Delta, Overloaded, Stream, Submission, TaskFailed, Unavailable
from sched.text import Text
from sched.turns import Turns

# A task under which so many TEs die in a row, none of them with a new token, is taken for the cause and failed.
MAX_ATTEMPTS = 4
KEPT_REQUESTS = 4096  # ended requests that `GET /v1/jobs` still finds
RATE_WINDOW = 64  # ended sequences that the predicted wait is judged by


class JobExecutor:
    """Runs every request of one model. `Cluster` tells it of TEs (it is the cluster's listener)."""

    tokenizer: Tokenizer  # set before the first `admit`; TEs may come earlier

    def __init__(
        self,
        config: Config,
        metrics: Metrics,
        rng: Random,
        clock: Callable[[], float] = time.monotonic,
        used: Callable[[], None] = lambda: None,
        knowledge: Knowledge | None = None,
    ):
        """`used` is called when a request has come, and when the last one has ended. `knowledge`: from earlier runs."""
        self.used = used
        self.seats = config.te  # TEs that there are, or are on their way
        self.placing = Placing(config, knowledge or Knowledge())
        self.held = Turns(config)  # tasks without a TE
        self.slo = Slo(config)
        self.metrics = metrics
        self.rng = rng
        self.clock = clock
        self.tes = self.placing.tes  # that take tasks
        self.live: dict[int, LiveTask] = {}  # by their number in messages
        self.passages: Passages[LiveTask] = Passages()
        self.moves: dict[int, tuple[LiveTask, TE]] = {}  # sequences that another TE is to reserve for, and that TE
        self.pairs = SemiPairs(config)
        self.newest = ""  # what was last told of a model that comes up
        self.requests: OrderedDict[str, Request] = OrderedDict()
        self.by_trace: dict[str, str] = {}
        self.next_task = 1
        self.outstanding = 0  # sequences admitted and not ended
        self.ended: deque[float] = deque(maxlen=RATE_WINDOW)  # when the newest sequences ended
        self.idle_listeners: list[Callable[[], None]] = []
        assert config.max_model_len is not None
        self.config, self.max_len = config, config.max_model_len

    def follow(self, config: Config, knowledge: Knowledge) -> None:
        """The model's files were read again. It has no TE."""
        assert config.max_model_len is not None
        self.config, self.max_len = config, config.max_model_len
        self.placing.follow(config, knowledge)
        self.held.follow(config)

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
        config, flow = self.config, self.held.flow(submission.tenant)
        if not self.outstanding:
            self.ended.clear()  # at which rate sequences end can't be told over a pause
        full = queue_is_full(self.outstanding, count, self.seats, config.max_num_seqs, config.max_num_queued_reqs)
        most = self.seats * config.max_num_seqs + config.max_num_queued_reqs
        if full and self.held.over_share(flow, count, most, self.clock()):
            record.life.move("refuse", now)
            self.metrics.refusals.labels(self.metrics.model, "queue_full").inc()
            wait = retry_after(self.outstanding - self.seats * config.max_num_seqs, self.rate())
            raise Overloaded(f"the queue is full: {self.outstanding} sequences are running or waiting", wait)
        if submission.reject_late and (refusal := self.too_late(submission)) is not None:
            record.life.move("refuse", now)
            self.metrics.refusals.labels(self.metrics.model, refusal.cause).inc()
            raise Overloaded(refusal.message, refusal.retry_after, refusal.cause)
        live = LiveRequest(record, submission, Stream(count), self.clock(), flow, open_samples=count)
        record.life.move("admit", now)
        self.outstanding += count
        self.held.came(flow, count)
        self.used()
        if self.held.company(flow, self.clock()):
            self.take_back()
        for index, prompt in enumerate(submission.prompts):
            self.start_job(live, index, prompt)
        live.stream.usage.prompt_tokens = record.prompt_tokens = sum(map(len, submission.prompts))
        self.metrics.prompt_tokens.inc(record.prompt_tokens)
        if self.newest and not self.tes:
            live.stream.note(self.newest)
        return live

    def too_late(self, submission: Submission) -> Refusal | None:
        """The refusal of a request whose targets or deadline can't be met, going by how its key's requests fared lately and by
        those that wait now."""
        config, now, flow = self.config, self.clock(), self.held.flow(submission.tenant)
        targets = Targets(
            submission.slo_ttft_ms or config.slo_ttft_ms,
            submission.slo_tpot_ms or config.slo_tpot_ms,
            1e3 * (submission.deadline - now) if submission.deadline else None,
        )
        rate, waiting = self.rate(), self.held.waiting(flow, self.seats * config.max_num_seqs, self.outstanding, now)
        oldest = max((now - entry.request.arrived for entry in self.held if entry.request.flow is flow), default=0.0)
        wait = max(waiting / rate if rate else 0.0, oldest) + self.slo.usual_ttft(flow.tenant.name, now)
        return out_of_reach(targets, 1e3 * wait, 1e3 * self.slo.usual_tpot(now), self.outstanding, rate)

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
            wire=task.id,
            keys=live.submission.keys[index] if live.submission.keys else (),
        )
        self.placing.expect(entry)
        live.tasks.append(entry)
        self.live[entry.wire] = entry
        self.held.add(entry, self.clock())
        self.place()

    def sample(self, choice: int, seed: int, params: SamplingParams) -> LiveSample:
        detokenizer = self.tokenizer.detokenizer(params.skip_special_tokens, continues=True)
        text = Text(detokenizer, params.stop, params.include_stop_str_in_output, params.min_tokens)
        return LiveSample(choice, seed & (2**63 - 1), text, array("i"))

    def leave(self, live: LiveRequest) -> None:
        """The caller has gone: cancel what still runs. Ended requests are left as they are."""
        if not live.record.life.over:
            now = self.clock()
            for entry in live.tasks:
                for sample in entry.samples:
                    if not sample.over:
                        self.placing.sample_over(entry, sample, "cancel", now)
            self.drop(live)
            live.record.end("cancel", time.time())
            self.metrics.cancelled.inc()
            self.maybe_idle()
            self.place()

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
            if self.live.pop(entry.wire, None) is not None and entry.te is not None:
                self.detach(entry)
            elif entry in self.held:
                self.held.remove(entry)
        self.outstanding -= live.open_samples
        self.held.came(live.flow, -live.open_samples)
        live.open_samples = 0

    def detach(self, entry: LiveTask) -> None:
        """Take a task off its TEs, wherever between them it is."""
        te = entry.te
        assert te is not None
        names = [sequence_id(entry.wire, i) for i in entry.open_indices()]
        # Also of a sample that is over: until its writer has said that it is through, its blocks are not free.
        between = self.passages.table.keys() & set(map(entry.sequence, entry.samples))
        if not between:
            say(te, Abort(entry.wire))
        for name in names:
            if between and not self.passages.cancel(name):
                say(te, Abort(*split_sequence_id(name)))
            if (move := self.moves.pop(name, None)) is not None:
                say(move[1], Abort(*split_sequence_id(name)))
        self.count(te, entry, -entry.open_samples)
        te.look_whether_drained()
        self.uncharge(entry)
        if entry.prefill_task is not None and not entry.prefill_task.life.over:
            entry.prefill_task.life.move("cancel", time.time())
        self.unpair(entry)
        entry.te = None

    def unpair(self, entry: LiveTask) -> None:
        """The task's TE waits for no other one, or no longer."""
        if entry.prefill is not None and entry.te is not None:
            entry.te.expecting -= 1
            entry.prefill.computing -= 1
            for te in (entry.te, entry.prefill):
                self.placing.changed(te)
                te.look_whether_drained()
            entry.prefill = None

    def count(self, te: TE, entry: LiveTask, sequences: int = 0, tokens: int = 0) -> None:
        """A TE has so many sequences of a task, and tokens of its prompt to compute, more."""
        te.sequences += sequences
        te.prompt_tokens += tokens
        self.held.count(te, entry, sequences, tokens)
        self.placing.changed(te)

    def uncharge(self, entry: LiveTask) -> None:
        """The task's prompt no longer loads its TE."""
        if entry.charged is not None:
            self.count(entry.charged, entry, tokens=-entry.charge)
            entry.charged = None

    # ---- placing ----------------------------------------------------------------------------------------------------
    def place(self) -> None:
        """Give held tasks to TEs while there are any that take them."""
        while self.held and self.placed():
            pass

    def placed(self) -> bool:
        """Give the foremost task that a TE takes to that TE."""
        now = self.clock()
        kept: set[int] = set()  # TEs that make room for a task that is before
        weight = self.held.line.weight(now)
        for entry in self.held.heads(now):
            share = self.held.share(entry, now, weight)
            if share is not None and not self.held.with_seats(self.tes.values()):
                return False
            choice = self.placing.choose(entry, now, kept.union(self.held.closed(entry, share, self.tes.values())))
            if choice is not None:
                entry.rank = self.held.rank(entry, share, self.tes[choice.decode])
                self.dispatch(entry, choice)
                self.held.sent(entry, now)
                return True
            kept.update(self.held.kept_for(entry, share, self.tes.values(), now))
        return False

    def progress(self, line: str) -> None:
        """Tell those whose requests wait for a TE, and who comes while there is none, how that comes along."""
        self.newest = line
        for request in {entry.request.record.id: entry.request for entry in self.held}.values():
            request.stream.note(line)

    def signals(self, role: Role, idle_s: float, now: float) -> Signals:
        """What the autoscaler is told of the TEs of a role since the last time."""
        tes = [te for te in self.tes.values() if te.role == role and te.state == "ready" and not te.draining]
        draining = sum(te.role == role and te.draining for te in self.tes.values())
        waiting = sum(te.load.waiting for te in tes)
        running = max(0, sum(te.sequences for te in tes) - waiting)
        held = sum(entry.open_samples for entry in self.held)
        blocks = sum(te.load.blocks_total for te in tes)
        oldest = max((self.clock() - e.request.arrived for e in self.held), default=0.0)
        rate = self.rate()
        behind = (held + waiting) / rate if rate and held + waiting else 0.0
        seen = self.slo.take(role)
        return Signals(
            now=now,
            ready=len(tes),
            starting=0,
            queued=held + waiting,
            running=running,
            slots=self.config.max_num_seqs,
            predicted_wait_s=max(oldest, behind),
            kv_usage=sum(te.load.blocks_used for te in tes) / blocks if blocks else 0.0,
            ttft_misses=seen.ttft_misses,
            ttft_total=seen.ttft_total,
            tpot_misses=seen.tpot_misses,
            tpot_total=seen.tpot_total,
            idle_s=idle_s,
            draining=draining,
            role=role,
        )

    def forget_context(self, id: str) -> None:
        """An explicit context was deleted or has expired."""
        self.placing.homes.pop(id, None)
        for entry in self.live.values():  # placed from now on, it would find a home for it again, which nobody forgets
            if entry.request.submission.context == id:
                entry.request.submission.context = ""
        for te in self.tes.values():
            say(te, Forget(id))

    def dispatch(self, entry: LiveTask, choice: Choice) -> None:
        now, task, record = time.time(), entry.task, entry.request.record
        te, prefill = self.tes[choice.decode], self.tes[choice.prefill]
        task.te, task.reason = te.id, choice.reason
        task.attempts += 1
        task.life.move("dispatch", now)
        if record.life.state == "queued":
            record.life.move("run", now)
        for job in record.jobs:
            if task in job.tasks:
                if job.life.state == "created":
                    job.life.move("run", now)
                self.split(entry, job, te, prefill, now)
        entry.te, entry.choice = te, choice
        entry.charged, entry.charge = prefill, max(1, entry.prompt_tokens - choice.cached_tokens)
        self.count(te, entry, entry.open_samples)
        self.count(prefill, entry, tokens=entry.charge)
        self.placing.given(entry, choice)
        te.link.send(entry.start(entry.open_indices(), self.clock(), expect=te is not prefill))

    def split(self, entry: LiveTask, job: Job, te: TE, prefill: TE, now: float) -> None:
        """One task, or one for each TE of a pair."""
        entry.task.kind, entry.prefill, entry.prefill_task = "unified", None, None
        if te is not prefill:
            entry.task.kind, entry.prefill = "decode", prefill
            te.expecting += 1
            prefill.computing += 1
            entry.prefill_task = Task(id=self.next_task, kind="prefill", life=born("task", now), te=prefill.id, attempts=1)
            entry.prefill_task.reason = entry.task.reason
            self.next_task += 1
            job.tasks.append(entry.prefill_task)

    # ---- between two TEs --------------------------------------------------------------------------------------------
    def reserved(self, te: TE, message: Reserved) -> None:
        """A TE has room for a sequence: have it brought there."""
        task, index = split_sequence_id(message.seq)
        entry = self.live.get(task)
        if (move := self.moves.get(message.seq)) is not None and move[1] is te:
            del self.moves[message.seq]
            entry = move[0]
            if entry.te is None or entry.samples[index].over:
                say(te, Abort(task, index))
                return
            entry.te.meet(te)
            self.passages.open(Passage(message.seq, entry.te, te, entry, moving=True))
            say(entry.te, Move(message.seq, Handover(te.id, message.blocks, message.cached, "request")))
        elif entry is not None and entry.te is te and entry.prefill is not None and entry.prefill_task is not None:
            if entry.task.attempts == 1:
                entry.request.stream.usage.dram_tokens += message.dram
                entry.request.stream.usage.ssd_tokens += message.ssd
            self.passages.open(Passage(message.seq, entry.prefill, te, entry))
            entry.prefill_task.life.move("dispatch", time.time())
            entry.prefill_task.life.move("begin", time.time())
            how = "lent" if entry.prefill.lender == te.id else self.config.kv_transfer
            if how != "lent":
                entry.prefill.meet(te)
            handover = Handover(te.id, message.blocks, message.cached, how)
            say(entry.prefill, entry.start([index], self.clock(), handover=handover))

    def handed_over(self, message: HandedOver) -> None:
        task, index = split_sequence_id(message.seq)
        entry = self.live.get(task)
        passage = self.passages.handed_over(message, pack_ids(entry.samples[index].ids) if entry is not None else b"")
        if passage is None or entry is None:
            return
        if passage.moving:
            assert entry.te is not None
            self.count(entry.te, entry, -1)
            self.count(passage.reader, entry, 1)
            entry.te = passage.reader
            entry.task.te, entry.task.reason = passage.reader.id, f"moved from TE {passage.writer.id}"
            self.metrics.moved.inc()
        else:
            self.prefilled(entry)

    def adopted(self, te: TE, message: Adopted) -> None:
        """A TE goes on with a sequence. Where the one that it came from has died, it may be on its way to a third one by now:
        that is another passage."""
        passage = self.passages.table.get(message.seq)
        if passage is not None and passage.reader is te:
            self.passages.adopted(message)

    def closed(self, message: Closed) -> None:
        passage = self.passages.closed(message)
        if passage is None or passage.entry is None:
            return
        entry = passage.entry
        _, index = split_sequence_id(message.seq)
        self.prefilled(entry)
        if not entry.samples[index].over:
            self.replay(entry, f"TE {passage.writer.id} could not hand it over to TE {passage.reader.id}", True)
            self.place()

    def prefilled(self, entry: LiveTask) -> None:
        """The prefill half of a pair is done."""
        self.unpair(entry)
        task = entry.prefill_task
        if task is not None and not task.life.over:
            task.life.move("finish" if task.life.state == "prefill" else "cancel", time.time())  # no token was asked for

    def move_away(self, te: TE) -> tuple[int, int]:
        """Have the decodes of a TE go on elsewhere: how many are asked to, and how many sequences stay until they end."""
        asked: list[TE] = []
        for entry in self.live.values():
            if entry.te is not te or entry.prefill is not None or len(entry.samples) > 1 or not entry.samples[0].ids:
                continue
            seq = sequence_id(entry.wire, 0)
            if seq in self.passages.table or seq in self.moves:
                continue
            target = self.placing.heir(entry, te, self.clock())
            if target is None:
                break
            self.moves[seq] = entry, target
            say(target, entry.start([0], self.clock(), expect=True))
            asked.append(target)
        for target in asked:  # counted there when they come
            self.placing.changed(target)
        return len(asked), te.sequences - len(asked)

    # ---- the cluster's news -----------------------------------------------------------------------------------------
    def ready(self, te: TE) -> None:
        self.placing.add(te)
        self.newest = ""
        if self.config.te_share != WHOLE:
            te.share = self.config.te_share
            say(te, Share(te.share))
        self.pairs.ready(te)
        self.spread(te)
        self.place()

    def changed(self, te: TE) -> None:
        self.placing.changed(te)

    def spread(self, new: TE) -> None:
        """A new TE takes its part of what others have not begun: those who have waited longest for it would else get nothing of
        it. A prompt that is half computed is computed again; the oldest stay where they are."""
        peers = [te for te in self.tes.values() if te.role == "colocated" and te.state == "ready" and not te.draining]
        if new not in peers:
            return
        part = sum(te.sequences for te in peers) // len(peers)
        given = new.sequences
        for entry in sorted(self.live.values(), key=lambda entry: entry.wire, reverse=True):
            te, count = entry.te, entry.open_samples
            begun = entry.prefill is not None or any(sample.ids for sample in entry.samples)
            if te is None or te is new or te not in peers or begun or te.sequences - count < part or given + count > part:
                continue
            given += count
            self.start_again(entry, heard=True)

    def take_back(self) -> None:
        """A second key has come. What the first one has given TEs beyond what they run waits here, the newest first, where it
        hasn't begun: who has just come would else be behind all of it."""
        seats = self.config.max_num_seqs
        for entry in sorted(self.live.values(), key=lambda entry: entry.wire, reverse=True):
            te, begun = entry.te, any(sample.ids for sample in entry.samples)
            if te is not None and not begun and te.sequences - entry.open_samples >= seats - free(seats):
                self.start_again(entry, heard=True)

    def lost(self, te: TE, why: str) -> None:
        """Replay every task of a dead TE from its prompt plus what was sent, oldest first, before whatever else is held."""
        self.placing.remove(te)
        reading = {p.entry for p in self.passages.table.values() if p.reader is te}  # moving there
        self.passages.lost(te)
        self.moves = {seq: move for seq, move in self.moves.items() if move[1] is not te}
        orphans = [e for e in self.live.values() if te in (e.te, e.prefill) or e in reading]
        leaving = {entry for entry, _ in self.moves.values()}  # another TE may be about to answer
        for entry in reversed(orphans):
            self.replay(entry, why, entry.te is not te or entry.task.kind == "decode" or entry in leaving)
        self.place()

    def replay(self, entry: LiveTask, why: str, heard: bool) -> None:
        """Start a task again, from its prompt plus what was sent. `heard`: a live TE may still speak of the last attempt."""
        if self.live.get(entry.wire) is not entry:
            return  # gone with a sibling that was given up
        produced = sum(len(sample.ids) for sample in entry.samples)
        entry.deaths = entry.deaths + 1 if produced == entry.produced else 1
        entry.produced = produced
        if entry.deaths >= MAX_ATTEMPTS:
            self.fail(
                entry.request, TaskFailed(f"given up after {entry.deaths} attempts without a new token, each ended by: {why}")
            )
            return
        self.metrics.replays.inc()
        self.start_again(entry, heard)

    def start_again(self, entry: LiveTask, heard: bool) -> None:
        """Take a task off its TEs, to be placed before all others that are held. `heard`: as for `replay`."""
        self.detach(entry)
        if heard:
            del self.live[entry.wire]
            entry.wire = self.next_task
            self.next_task += 1
            self.live[entry.wire] = entry
        entry.task.life.move("lost", time.time())
        self.held.again(entry, self.clock())

    def give_up(self, why: str) -> None:
        """No TE will come: fail everything."""
        for entry in list(self.live.values()):
            self.fail(entry.request, Unavailable(why))

    def message(self, te: TE, message: FromWorker) -> None:
        if isinstance(message, BlockNews):
            self.placing.news(te, message)
            return
        if isinstance(message, Tokens):
            self.tokens(te, message)
        elif isinstance(message, Reserved):
            self.reserved(te, message)
        elif isinstance(message, HandedOver):
            self.handed_over(message)
        elif isinstance(message, Adopted):
            self.adopted(te, message)
        elif isinstance(message, Closed):
            self.closed(message)
        elif isinstance(message, Refused):
            self.refused(te, message)
        self.place()

    def refused(self, te: TE, message: Refused) -> None:
        task, _ = split_sequence_id(message.seq)
        if (move := self.moves.get(message.seq)) is not None and move[1] is te:
            del self.moves[message.seq]  # it stays where it is
            return
        self.passages.closed(Closed(message.seq))  # whoever should have written writes nothing
        if (entry := self.live.get(task)) is not None:
            self.fail(entry.request, TaskFailed(message.why))

    # ---- a step's tokens --------------------------------------------------------------------------------------------
    def tokens(self, te: TE, message: Tokens) -> None:
        before, te.load, now = te.load, message.load, self.clock()
        self.placing.stepped(te, before, now)
        if message.prompts is not None:
            for done in message.prompts:
                self.prompt_done(done, te)
        brought: dict[LiveTask, list[Delta]] = {}
        gaps: dict[float, int] = {}  # when a sequence spoke before -> how many now follow that; mostly all at once
        live, logprobs, generated = self.live, message.logprobs, 0
        for i, (seq, token, finish) in enumerate(zip(message.seqs, message.ids, message.finish, strict=True)):
            task, index = split_sequence_id(seq)
            entry = live.get(task)
            if entry is None or (entry.te is not te and self.passages.speaker(seq) is not te):
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
                if entry.charged is not None:
                    entry.task.life.move("first_token", time.time())
                    self.uncharge(entry)
            delta = self.take(entry, sample, token, finish, logprobs[i] if logprobs is not None else None)
            brought.setdefault(entry, []).append(delta)
            if delta.finish is not None:
                self.sample_over(entry, sample, delta.finish, now)
        self.metrics.tokens.generated += generated
        for last, count in gaps.items():
            self.metrics.tokens.observe(now - last, count)
            self.slo.tokens(now - last, count, now)
        if self.pairs.controllers:
            self.pairs.step(te, gaps, now, self.waiting_for)
        for entry, deltas in brought.items():
            entry.request.stream.feed(deltas)
            self.held.generated(entry, len(deltas))
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
                seq = entry.sequence(sample)
                if self.passages.cancel(seq):
                    self.prefilled(entry)
                else:
                    say(entry.te, Abort(*split_sequence_id(seq)))
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
            self.slo.first_token(now - entry.request.arrived, entry.request.flow.tenant.name, now)
            if entry.te is not None:
                self.pairs.first_token(entry.te, now - entry.request.arrived)

    def prompt_done(self, done: PromptDone, te: TE) -> None:
        task, _ = split_sequence_id(done.seq)
        entry = self.live.get(task)
        if entry is None or entry.begun or (entry.te is not te and self.passages.speaker(done.seq) is not te):
            return
        entry.begun = True
        entry.task.cached_tokens = done.cached
        self.held.computed(entry, entry.prompt_tokens - done.cached)
        usage = entry.request.stream.usage
        usage.cached_tokens += done.cached
        usage.dram_tokens += done.dram
        usage.ssd_tokens += done.ssd
        if done.logprobs is not None:
            entry.request.stream.prompt_logprobs[entry.prompt_index] = done.logprobs
        if done.start and entry.task.attempts == 1:
            self.metrics.queued.observe(max(0.0, done.start - entry.request.arrived))

    def sample_over(self, entry: LiveTask, sample: LiveSample, reason: str, now: float) -> None:
        sample.over = True
        assert entry.te is not None
        self.count(entry.te, entry, -1)
        self.held.came(entry.request.flow, -1)
        self.placing.sample_over(entry, sample, reason, now)
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
        del self.live[entry.wire]
        self.uncharge(entry)
        self.prefilled(entry)
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

    def waiting_for(self, pair: int) -> list[float]:
        """Seconds that a semi pair's requests without a first token have waited."""
        entries = [e for e in self.live.values() if not e.begun and e.te is not None and self.pairs.of(e.te) == pair]
        return [self.clock() - e.request.arrived for e in entries]

    # ---- bookkeeping ------------------------------------------------------------------------------------------------
    def remember(self, record: Request) -> None:
        self.requests[record.id] = record
        if record.trace_id:
            self.by_trace[record.trace_id] = record.id
        for _ in range(2):  # one more than has come, so that those that still run are got past
            if len(self.requests) <= KEPT_REQUESTS:
                break
            old = next(iter(self.requests.values()))
            if not old.life.over:
                self.requests.move_to_end(old.id)
                continue
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
            self.used()
            for listener in self.idle_listeners:
                listener()
