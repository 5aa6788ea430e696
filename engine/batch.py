"""Continuous batching: a step is a map {sequence: number of tokens}. Prefill, chunk, decode and replay are all that.

A plan depends on messages and counters alone, never on wall time and never on which ids came out, so the next step is planned
while this one runs. What a sequence counts:

    known      ids we have: the prompt and what was generated
    flying     sampled ids that a launched step will bring (0 or 1)
    done       tokens whose KV is written, or will be by launched steps
    committed  full blocks that are in RTC's prefix tree

    0 .. done .. known + flying      the next step computes from `done`; reaching the end, it samples one more
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from engine.devices import Logprobs, StepOutput
from engine.rtc import RTC, block_keys, root_key
from engine.types import (
    Finish,
    Load,
    PromptDone,
    Refused,
    SamplingParams,
    Start,
    TokenLogprobs,
    Tokens,
    sequence_id,
    split_sequence_id,
)

# Prompt log-probabilities need logits of every prompt row: at 49 152 entries of 4 bytes, 128 rows are 25 MB.
SCORED_CHUNK = 128


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample of a task while it lives in this TE."""

    id: int
    params: SamplingParams
    ids: np.ndarray  # int32, room for prompt and output
    prompt: int  # tokens of the caller's prompt
    known: int
    limit: int  # ends when known reaches it
    stop_ids: frozenset[int]
    seed: int
    order: tuple[int, int]  # (priority, arrival): smaller goes first
    key: bytes  # root of its prefix keys
    keys: list[bytes] = field(default_factory=list)  # of its full blocks, as far as computed
    leader: Sequence | None = None  # sibling whose prefill this one waits for, to share its blocks
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    done: int = 0
    flying: int = 0
    committed: int = 0
    cached: int = -1  # prompt tokens found cached at first admission; -1: not admitted yet
    started: float = 0.0
    epoch: int = 0  # grows when the sequence loses its blocks; a launched step of an older epoch computed nothing to keep
    ended: bool = False
    setup_sent: bool = False  # the device's sampling state for this slot is this sequence's
    scores: list[TokenLogprobs | None] | None = None

    @property
    def target(self) -> int:
        return self.known + self.flying


@dataclass(slots=True)
class Work:
    """A sequence's share of one step: tokens `start` to `start + count`; `sample` where that reaches the end."""

    seq: Sequence
    start: int
    count: int
    sample: bool
    epoch: int


Plan = list[Work]


class Batch:
    """Decides each step's plan and keeps every sequence's counts. Owns the slots and, through RTC, the blocks."""

    def __init__(self, rtc: RTC, *, max_seqs: int, max_tokens: int, max_len: int):
        self.rtc = rtc
        self.max_tokens = max_tokens
        self.max_len = max_len
        width = -(-max_len // rtc.block_size)
        self.tables = np.zeros((max_seqs, width), np.int32)  # block table of each slot
        self.slots = list(range(max_seqs - 1, -1, -1))
        self.sequences: dict[int, Sequence] = {}
        self.running: list[Sequence] = []  # by order
        self.waiting: list[tuple[tuple[int, int], Sequence]] = []  # heap
        self.arrivals = 0
        self.load = Load(blocks_total=rtc.blocks)
        self.pending: list[tuple[int, int, Finish]] = []  # (sequence, id or -1, finish) decided outside a step
        self.refused: list[Refused] = []
        self.begin_report()

    # ---- arrivals and departures ------------------------------------------------------------------------------------
    def start(self, msg: Start) -> None:
        """Take a task in. A sequence that can never run is refused at once."""
        prompt = np.frombuffer(msg.prompt, np.int32)
        leader: Sequence | None = None
        for sample in msg.samples:
            generated = np.frombuffer(sample.generated, np.int32)
            known = len(prompt) + len(generated)
            limit = len(prompt) + msg.max_tokens
            name = sequence_id(msg.task, sample.index)
            if limit > self.max_len or -(-limit // self.rtc.block_size) > self.rtc.blocks:
                self.refused.append(Refused(name, f"{limit} tokens do not fit this TE's {self.max_len}"))
                continue
            ids = np.empty(limit, np.int32)
            ids[: len(prompt)] = prompt
            ids[len(prompt) : known] = generated
            self.arrivals += 1
            seq = Sequence(
                id=name,
                params=msg.params,
                ids=ids,
                prompt=len(prompt),
                known=known,
                limit=limit,
                stop_ids=frozenset(msg.stop_ids),
                seed=sample.seed & (2**64 - 1),
                order=(msg.priority, self.arrivals),
                key=root_key(msg.salt),
                leader=leader,
            )
            if msg.params.prompt_logprobs is not None and not len(generated):
                seq.scores = [None]
            elif known >= limit:  # nothing to compute: an echo without log-probabilities, or a replay of a full text
                self.pending.append((name, -1, Finish.LENGTH))
                continue
            leader = leader or seq
            self.sequences[name] = seq
            self.extend_keys(seq)
            heapq.heappush(self.waiting, (seq.order, seq))

    def abort(self, task: int, sample: int) -> None:
        """Forget one sequence, or a task's all."""
        every = [n for n in self.sequences if split_sequence_id(n)[0] == task]
        names = every if sample < 0 else [sequence_id(task, sample)]
        for name in names:
            if (seq := self.sequences.get(name)) is not None:
                self.end(seq)

    def end(self, seq: Sequence) -> None:
        seq.ended = True
        del self.sequences[seq.id]
        if seq.slot >= 0:
            self.running.remove(seq)
            self.release(seq)

    def release(self, seq: Sequence) -> None:
        """Give back slot and blocks. What was committed stays findable until evicted."""
        self.rtc.free(seq.blocks)
        self.slots.append(seq.slot)
        seq.blocks, seq.slot = [], -1
        seq.done = seq.committed = 0
        seq.epoch += 1
        seq.setup_sent = False

    # ---- planning ---------------------------------------------------------------------------------------------------
    def has_work(self) -> bool:
        return bool(self.running or self.waiting or self.pending or self.refused)

    def plan(self) -> Plan:
        """The next step: decodes first, then the rest of the token budget shared by the prefills."""
        plan: Plan = []
        for seq in list(self.running):
            if decodes(seq) and self.grow(seq, seq.target):
                plan.append(Work(seq, seq.done, 1, True, seq.epoch))
        self.admit()
        planned = {w.seq.id for w in plan}
        prefills = [s for s in self.running if s.done < s.known and s.id not in planned]
        for seq, count in share(prefills, self.max_tokens - len(plan)):
            if seq is self.running[0]:
                self.grow(seq, seq.done + 1)  # the oldest always moves on, so prefills can't wait for each other's blocks
            if seq.slot < 0:
                continue  # the oldest took its blocks
            count = self.fit(seq, count)
            if count > 0:
                sample = seq.done + count == seq.target and seq.target < seq.limit
                plan.append(Work(seq, seq.done, count, sample, seq.epoch))
        plan = [w for w in plan if w.epoch == w.seq.epoch]  # a prefill may have preempted a decode planned before it
        for work in plan:
            work.seq.done += work.count
            work.seq.flying += work.sample
        return plan

    def admit(self) -> None:
        """Move waiting sequences to slots while their whole prompt fits beside what running prefills still need."""
        if not self.waiting or not self.slots:
            return
        size = self.rtc.block_size
        promised = sum(max(0, -(-s.target // size) - len(s.blocks)) for s in self.running)
        blocked: list[tuple[tuple[int, int], Sequence]] = []
        while self.waiting and self.slots:
            _, seq = self.waiting[0]
            if seq.ended:
                heapq.heappop(self.waiting)
                continue
            if seq.flying or (seq.leader is not None and not leader_is_through(seq.leader)):
                blocked.append(heapq.heappop(self.waiting))
                continue
            match = self.rtc.match_by_prefix_token(seq.keys if seq.scores is None else [], seq.known)
            need = -(-min(seq.known + 1, seq.limit) // size) - len(match.blocks)
            # Blocks the match would take out of the idle list are no longer there to be evicted.
            idle = sum(self.rtc.refs[b] == 0 for b in match.blocks)
            # One block of slack for each running sequence keeps the newcomer from being preempted by the next decode.
            if need + idle + promised + len(self.running) > self.rtc.available and self.running:
                break
            heapq.heappop(self.waiting)
            self.take_slot(seq, match.blocks and self.rtc.populate(match))
            promised += need
        for entry in blocked:
            heapq.heappush(self.waiting, entry)

    def take_slot(self, seq: Sequence, cached: list[int]) -> None:
        seq.slot = self.slots.pop()
        seq.blocks = cached
        self.tables[seq.slot, : len(cached)] = cached
        seq.done = len(cached) * self.rtc.block_size
        seq.committed = len(cached)
        if seq.cached < 0:
            seq.cached = min(seq.done, seq.prompt)
            self.load.prefix_queries += seq.known
            self.load.prefix_hits += seq.done
        at = len(self.running)
        while at and self.running[at - 1].order > seq.order:
            at -= 1
        self.running.insert(at, seq)

    def grow(self, seq: Sequence, tokens: int) -> bool:
        """Have blocks for `tokens` tokens, preempting sequences that come later in order. False: `seq` itself was preempted."""
        while len(seq.blocks) * self.rtc.block_size < tokens:
            block = self.rtc.append_block()
            if block is not None:
                self.tables[seq.slot, len(seq.blocks)] = block
                seq.blocks.append(block)
                continue
            victim = self.running[-1]
            self.preempt(victim)
            if victim is seq:
                return False
        return True

    def fit(self, seq: Sequence, count: int) -> int:
        """How many of `count` prefill tokens have blocks, preempting nobody."""
        size = self.rtc.block_size
        missing = -(-(seq.done + count) // size) - len(seq.blocks)
        blocks = self.rtc.alloc_blocks(max(0, min(missing, self.rtc.available)))
        assert blocks is not None
        self.tables[seq.slot, len(seq.blocks) : len(seq.blocks) + len(blocks)] = blocks
        seq.blocks += blocks
        return min(count, len(seq.blocks) * size - seq.done)

    def preempt(self, seq: Sequence) -> None:
        """Take slot and blocks; it waits again and recomputes what the prefix tree no longer holds."""
        self.running.remove(seq)
        self.release(seq)
        self.extend_keys(seq)
        if seq.scores is not None:
            seq.scores = [None]
        self.load.preemptions += 1
        heapq.heappush(self.waiting, (seq.order, seq))

    # ---- results ----------------------------------------------------------------------------------------------------
    def apply(self, plan: Plan, out: StepOutput) -> None:
        """A launched step has run: take its ids, end what has ended, commit full blocks. Fills `report`."""
        self.load.steps += 1
        row = score_row = 0
        for work in plan:
            seq = work.seq
            live = not seq.ended
            if seq.scores is not None:
                count = scored_rows(work)
                if live and work.epoch == seq.epoch and out.scores is not None:
                    top = seq.params.prompt_logprobs or 0
                    seq.scores += [token_logprobs(out.scores, score_row + i, top) for i in range(count)]
                score_row += count
            if work.sample:
                seq.flying -= 1
                if live:
                    self.take_id(seq, int(out.ids[row]), self.row_logprobs(seq, out, row))
                row += 1
            elif live and seq.known >= seq.limit and work.start + work.count >= seq.known and work.epoch == seq.epoch:
                self.emit(seq, -1, Finish.LENGTH, None)  # scored only: nothing to generate
                self.end(seq)
            if not seq.ended and work.epoch == seq.epoch:
                self.load.prompt_tokens += max(0, min(work.start + work.count, seq.prompt) - work.start)
                self.commit(seq, work.start + work.count)

    def row_logprobs(self, seq: Sequence, out: StepOutput, row: int) -> TokenLogprobs | None:
        if seq.params.logprobs is None or out.logprobs is None:
            return None
        return token_logprobs(out.logprobs, row, seq.params.logprobs)

    def take_id(self, seq: Sequence, token: int, logprobs: TokenLogprobs | None) -> None:
        seq.ids[seq.known] = token
        seq.known += 1
        produced = seq.known - seq.prompt
        finish = Finish.NONE
        if token in seq.stop_ids and produced >= seq.params.min_tokens:
            finish = Finish.STOP
        elif seq.known >= seq.limit:
            finish = Finish.LENGTH
        self.emit(seq, token, finish, logprobs)
        if finish:
            # Its full blocks stay findable: the next turn of a conversation starts with this text.
            if seq.slot >= 0:
                self.commit(seq, seq.known - 1)
            self.end(seq)

    def commit(self, seq: Sequence, computed: int) -> None:
        """Make blocks that are full, computed and of known ids findable."""
        full = min(computed, seq.known) // self.rtc.block_size
        if full <= seq.committed:
            return
        self.extend_keys(seq)
        for i in range(seq.committed, full):
            block = self.rtc.commit(seq.blocks[i], seq.keys[i], seq.blocks[i - 1] if i else -1)
            if block != seq.blocks[i]:
                seq.blocks[i] = self.tables[seq.slot, i] = block
        seq.committed = full

    def extend_keys(self, seq: Sequence) -> None:
        """Keys of every full block of known ids."""
        if not self.rtc.prefix_caching:
            seq.keys += [b""] * (seq.known // self.rtc.block_size - len(seq.keys))
            return
        size = self.rtc.block_size
        fresh = seq.ids[len(seq.keys) * size : seq.known]
        seq.keys += block_keys(seq.keys[-1] if seq.keys else seq.key, fresh.tobytes(), size)

    # ---- the message of a step --------------------------------------------------------------------------------------
    def emit(self, seq: Sequence, token: int, finish: Finish, logprobs: TokenLogprobs | None) -> None:
        report = self._report
        report.seqs.append(seq.id)
        report.ids.append(token)
        report.finish.append(int(finish))
        if logprobs is not None or report.logprobs is not None:
            if report.logprobs is None:
                report.logprobs = [None] * (len(report.seqs) - 1)
            report.logprobs.append(logprobs)
        if seq.known - seq.prompt <= 1 or seq.scores is not None:
            if report.prompts is None:
                report.prompts = []
            report.prompts.append(PromptDone(seq.id, max(seq.cached, 0), seq.started, seq.scores))
            seq.scores = None

    def begin_report(self) -> None:
        self._report = Tokens([], [], [], self.load)

    def take_report(self) -> Tokens | None:
        """What happened since `begin_report`, or None where there is nothing that the control process does not know.

        A cancelled sequence brings no token, but it changes the load: a message without rows then tells that."""
        report = self._report
        for name, token, finish in self.pending:
            report.seqs.append(name)
            report.ids.append(token)
            report.finish.append(int(finish))
            if report.logprobs is not None:
                report.logprobs.append(None)
        self.pending.clear()
        load = self.load
        before = (load.running, load.waiting, load.blocks_used)
        load.running = len(self.running)
        load.waiting = len(self.sequences) - len(self.running)
        load.blocks_used = self.rtc.used
        changed = before != (load.running, load.waiting, load.blocks_used)
        return report if report.seqs or changed else None

    def check(self) -> None:
        """Verify the counts against RTC; raises AssertionError. For tests."""
        self.rtc.check()
        held: dict[int, int] = {}
        for seq in self.running:
            assert not seq.ended and seq.slot >= 0
            assert 0 <= seq.flying <= 1 and seq.done <= seq.target <= seq.limit
            assert len(seq.blocks) * self.rtc.block_size >= seq.done
            assert list(self.tables[seq.slot, : len(seq.blocks)]) == seq.blocks
            for block in seq.blocks:
                held[block] = held.get(block, 0) + 1
        for blocks in self.rtc.by_id.values():
            for block in blocks:
                held[block] = held.get(block, 0) + 1
        assert all(self.rtc.refs[b] == held.get(b, 0) for b in range(self.rtc.blocks)), "a block leaked"
        slots = [s.slot for s in self.running]
        assert sorted(slots + self.slots) == list(range(len(self.tables))), "a slot leaked"
        assert self.running == sorted(self.running, key=lambda s: s.order)


def leader_is_through(leader: Sequence) -> bool:
    """The leader's prompt is computed (and so committed), or it left."""
    return leader.ended or leader.known > leader.prompt


def decodes(seq: Sequence) -> bool:
    """The next step computes one token of it and samples the next."""
    return seq.slot >= 0 and seq.target - seq.done == 1 and seq.target < seq.limit and seq.scores is None


def share(prefills: Iterable[Sequence], budget: int) -> list[tuple[Sequence, int]]:
    """Split a token budget over prefills so that nobody starves: equal parts; what short ones leave goes to the long."""
    want = [(s, min(s.target - s.done, SCORED_CHUNK) if s.scores is not None else s.target - s.done) for s in prefills]
    out: dict[int, int] = {}
    left = sorted(range(len(want)), key=lambda i: want[i][1])
    for position, i in enumerate(left):
        out[i] = min(want[i][1], -(-budget // (len(left) - position)), budget)
        budget -= out[i]
    return [(want[i][0], out[i]) for i in range(len(want)) if out[i] > 0]


def scored_rows(work: Work) -> int:
    """Rows of a chunk whose next token is in the prompt."""
    return max(0, min(work.start + work.count, work.seq.prompt - 1) - work.start)


def token_logprobs(values: Logprobs, row: int, top: int) -> TokenLogprobs:
    return TokenLogprobs(
        float(values.chosen[row]), int(values.rank[row]), values.top_ids[row, :top].tolist(), values.top[row, :top].tolist()
    )
