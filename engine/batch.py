"""Continuous batching: a step is a map {sequence: number of tokens}. Prefill, chunk, decode, replay and the verification of
drafts are all that.

A plan depends on messages and counters alone, never on wall time and never on which ids came out, so the next step is planned
while this one runs. What a sequence counts:

    known      ids we have: the prompt and what was generated
    flying     1 while a launched step is going to sample for it
    drafted    ids that step takes on trust after the known ones, to verify them
    done       tokens whose KV is written, or will be by launched steps
    committed  full blocks that are in RTC's prefix tree

    0 .. done .. known + flying      the next step computes from `done`; reaching the end, it samples one more

Speculation is the exception: drafts are made from ids, and how many hold is seen in the step's outcome, so while a sequence
may have drafts the next plan waits for that (`must_wait`). The step samples after every drafted id with the noise of that
very position. While a drafted id is the one sampled in its place, the row after it has computed what a step without drafts
would have; the first other one is the last that counts. So the text is the same, on the compiled CPU backend bit for bit,
greedy or sampled. What rejected ids left in the KV cache lies past `done` and is overwritten before it is read.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from engine.config import Speculation
from engine.devices import Logprobs, StepOutput
from engine.rtc import RTC, block_keys, root_key
from engine.speculate import NOTHING, agreeing, next_length, propose
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

# With more sequences than this nobody speculates, since rows cost arithmetic then and not bytes. Recorded texts of
# SmolLM2-135M replayed with assumed costs of a step (6 ms, and 0.55 ms a row: a rough fit on two cores): with 8 sequences
# decoding is 0.98 to 1.5 times as fast, with 16 it is 0.96 to 1.2 times.
SPECULATING_SEQS = 8


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
    drafted: int = 0
    trust: int = 0  # how long its next draft may be
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
    """A sequence's share of one step: tokens `start` to `start + count`; `sample` where that reaches the end.

    The last of the tokens may be a draft (int32 ids); then one more is sampled after each."""

    seq: Sequence
    start: int
    count: int
    sample: bool
    epoch: int
    draft: np.ndarray = field(default_factory=lambda: NOTHING)


Plan = list[Work]


class Batch:
    """Decides each step's plan and keeps every sequence's counts. Owns the slots and, through RTC, the blocks."""

    def __init__(self, rtc: RTC, *, max_seqs: int, max_tokens: int, max_len: int, speculation: Speculation | None = None):
        self.rtc = rtc
        self.speculation = speculation
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
            seq.trust = 0 if self.speculation is None or counts_ids(msg.params) else 1
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
        seq.done = seq.committed = seq.drafted = 0
        seq.epoch += 1
        seq.setup_sent = False

    # ---- planning ---------------------------------------------------------------------------------------------------
    def has_work(self) -> bool:
        return bool(self.running or self.waiting or self.pending or self.refused)

    def plan(self) -> Plan:
        """The next step: decodes first, then the rest of the token budget shared by the prefills; what is left goes to drafts."""
        if self.must_wait():
            return []
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
        self.add_drafts(plan)
        return plan

    def must_wait(self) -> bool:
        """Whether the launched step must be applied first: its drafts are open, or drafts are wanted and need its ids."""
        few = len(self.running) <= SPECULATING_SEQS
        return any(seq.flying and (seq.drafted or (few and seq.trust)) for seq in self.running)

    def add_drafts(self, plan: Plan) -> None:
        """Extend decodes by drafts. They take tokens and blocks that nobody else in this step wants."""
        if self.speculation is None or len(self.running) > SPECULATING_SEQS:
            return
        spec, left = self.speculation, self.max_tokens - sum(w.count for w in plan)
        for work in plan:
            seq = work.seq
            if not work.sample or work.count > 1 or seq.known == work.start:
                continue  # a chunk; or its last id is in flight, since the batch was wide until now
            want = min(seq.trust, left, seq.limit - seq.known - 1)
            draft = propose(seq.ids, seq.known, spec.prompt_lookup_min, spec.prompt_lookup_max, want)
            if count := len(draft) and self.fit(seq, len(draft)):
                work.draft = draft[:count]
                work.count += count
                seq.done += count
                seq.drafted = count
                left -= count

    def admit(self) -> None:
        """Move waiting sequences to slots while their whole prompt fits beside what running prefills still need."""
        if not self.waiting or not self.slots:
            return
        size = self.rtc.block_size
        promised = sum(max(0, -(-s.target // size) - len(s.blocks)) for s in self.running)
        # Blocks that running prefills are about to fill. Who needs one of them next waits for it: that takes no longer than
        # computing it a second time.
        caching = self.rtc.prefix_caching
        coming = {key for s in self.running if s.done < s.known for key in s.keys[s.committed :]} if caching else set()
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
            if seq.scores is None and coming.intersection(seq.keys[len(match.blocks) : len(match.blocks) + 1]):
                blocked.append(heapq.heappop(self.waiting))
                continue
            need = -(-min(seq.known + 1, seq.limit) // size) - len(match.blocks)
            # Blocks the match would take out of the idle list are no longer there to be evicted.
            idle = sum(self.rtc.refs[b] == 0 for b in match.blocks)
            # One block of slack for each running sequence keeps the newcomer from being preempted by the next decode.
            if need + idle + promised + len(self.running) > self.rtc.available and self.running:
                break
            heapq.heappop(self.waiting)
            self.take_slot(seq, match.blocks and self.rtc.populate(match))
            promised += need
            if caching:
                coming.update(seq.keys[seq.committed :])
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
        """How many of the next `count` tokens have blocks, preempting nobody."""
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
            computed = work.start + work.count - len(work.draft)
            if seq.scores is not None:
                count = scored_rows(work)
                if live and work.epoch == seq.epoch and out.scores is not None:
                    top = seq.params.prompt_logprobs or 0
                    seq.scores += [token_logprobs(out.scores, score_row + i, top) for i in range(count)]
                score_row += count
            if work.sample:
                seq.flying -= 1
                if live:
                    computed += self.take_ids(work, out, row)
                row += 1 + len(work.draft)
            elif live and seq.known >= seq.limit and computed >= seq.known and work.epoch == seq.epoch:
                self.emit(seq, -1, Finish.LENGTH, None)  # scored only: nothing to generate
                self.end(seq)
            if not seq.ended and work.epoch == seq.epoch:
                self.load.prompt_tokens += max(0, min(computed, seq.prompt) - work.start)
                self.commit(seq, computed)

    def take_ids(self, work: Work, out: StepOutput, row: int) -> int:
        """Take what was sampled for `work`, first in `row`: an id for each drafted id that holds, and one more. Returns how
        many held."""
        seq, draft = work.seq, work.draft
        sampled = out.ids[row : row + 1 + len(draft)]
        held = agreeing(draft, sampled) if len(draft) else 0
        if self.speculation is not None:
            self.judge(seq, draft, held, int(sampled[0]))
        for i in range(held + 1):
            self.take_id(seq, int(sampled[i]), self.row_logprobs(seq, out, row + i))
            if seq.ended:
                break
        if len(draft) and work.epoch == seq.epoch:
            seq.done -= len(draft) - held
            seq.drafted = 0
        return held

    def judge(self, seq: Sequence, draft: np.ndarray, held: int, first: int) -> None:
        """How long the sequence's next draft may be. Where it may have none, and one would have been right about the id
        that now comes, `first`, it may again: text that repeats nothing costs no rows, and its steps stay overlapped."""
        spec = self.speculation
        assert spec is not None
        if len(draft):
            seq.trust = next_length(held, len(draft), spec.num_speculative_tokens)
            self.load.drafts += 1
            self.load.draft_tokens += len(draft)
            self.load.accepted_tokens += held
        elif not seq.trust and not counts_ids(seq.params) and len(self.running) <= SPECULATING_SEQS:
            guess = propose(seq.ids, seq.known, spec.prompt_lookup_min, spec.prompt_lookup_max, 1)
            seq.trust = int(len(guess) > 0 and guess[0] == first)

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
            assert 0 <= seq.flying <= 1 and seq.done - seq.drafted <= seq.target <= seq.limit
            assert seq.done <= seq.limit and (not seq.drafted or seq.flying)
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


def counts_ids(params: SamplingParams) -> bool:
    """Whether the device counts a sequence's ids for penalties. It counts whatever it samples, so a rejected draft would be
    counted too: such a sequence doesn't speculate."""
    return bool(params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0)


def share(prefills: Iterable[Sequence], budget: int) -> list[tuple[Sequence, int]]:
    """Split a token budget over prefills, given by order. The shortest go first, so that the median prompt waits least; the
    first in order is sure of a quarter, so that a long one moves on too."""
    want = [(s, min(s.target - s.done, SCORED_CHUNK) if s.scores is not None else s.target - s.done) for s in prefills]
    if not want:
        return []
    out = [0] * len(want)
    out[0] = min(want[0][1], -(-budget // 4))
    budget -= out[0]
    for i in sorted(range(len(want)), key=lambda i: want[i][1]):
        more = min(want[i][1] - out[i], budget)
        out[i] += more
        budget -= more
    return [(s, count) for (s, _), count in zip(want, out, strict=True) if count > 0]


def scored_rows(work: Work) -> int:
    """Rows of a chunk whose next token is in the prompt."""
    return max(0, min(work.start + work.count, work.seq.prompt - 1) - work.start)


def token_logprobs(values: Logprobs, row: int, top: int) -> TokenLogprobs:
    return TokenLogprobs(
        float(values.chosen[row]), int(values.rank[row]), values.top_ids[row, :top].tolist(), values.top[row, :top].tolist()
    )
