"""Continuous batching: a step is a map {sequence: number of tokens}. Prefill, chunk, decode, replay and the verification of
drafts are all that.

A plan depends on messages and counters alone, never on wall time and never on which ids came out, so the next step is planned
while this one runs. What a sequence counts stands in engine/sequence.py.

Speculation is the exception: drafts are made from ids, and how many hold is seen in the step's outcome, so while a sequence
may have drafts the next plan waits for that (`must_wait`). The step samples after every drafted id with the noise of that
very position. While a drafted id is the one sampled in its place, the row after it has computed what a step without drafts
would have; the first other one is the last that counts. So the text is the same, on the compiled CPU backend bit for bit,
greedy or sampled. What rejected ids left in the KV cache lies past `done` and is overwritten before it is read.
"""

from __future__ import annotations

import heapq

import numpy as np

from engine.config import Speculation
from engine.devices import StepOutput
from engine.report import Report
from engine.rtc import RTC, Match, block_keys, root_key
from engine.rtc.loads import Loads
from engine.rtc.wire import Fetched, Found
from engine.sequence import Plan, Sequence, Work, counts_ids, decodes, leader_is_through, scored_rows, share, token_logprobs
from engine.speculate import agreeing, next_length, propose
from engine.types import (
    Finish,
    FromWorker,
    HandedOver,
    Handover,
    Load,
    PromptDone,
    Refused,
    Reserved,
    Start,
    TokenLogprobs,
    Tokens,
    sequence_id,
    split_sequence_id,
)

# With more sequences than this nobody speculates, since rows cost arithmetic then and not bytes. Recorded texts of
# SmolLM2-135M replayed with assumed costs of a step (6 ms, and 0.55 ms a row: a rough fit on two cores): with 8 sequences
# decoding is 0.98 to 1.5 times as fast, with 16 it is 0.96 to 1.2 times.
SPECULATING_SEQS = 8

# Room that is reserved for an expected sequence beyond what is known of it: one that moves here goes on where it is meanwhile.
SPARE_TOKENS = 32


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
        self.notices: list[FromWorker] = []  # to be told beside tokens
        self.expected: dict[int, Sequence] = {}  # with slot and blocks, until their KV is there
        self.handing: dict[int, Sequence] = {}  # computed here, their blocks kept until the receiver has them
        self.handed: list[Sequence] = []  # of these, new ones
        self.finished: list[Sequence] = []  # ended by themselves before they were handed over
        self.stuck = False  # nothing can run until something arrives, leaves or lets blocks go
        self.loads = Loads()  # from slower tiers
        self.lends = False  # another TE computes prompts in our blocks: what comes before them must be there
        self.report = Report()

    # ---- arrivals and departures ------------------------------------------------------------------------------------
    def start(self, msg: Start) -> None:
        """Take a task in. A sequence that can never run is refused at once."""
        self.rtc.now = max(self.rtc.now, msg.at)
        prompt = np.frombuffer(msg.prompt, np.int32)
        leader: Sequence | None = None
        for sample in msg.samples:
            generated = np.frombuffer(sample.generated, np.int32)
            known = len(prompt) + len(generated)
            limit = len(prompt) + msg.max_tokens
            name = sequence_id(msg.task, sample.index)
            lent = msg.handover is not None and msg.handover.how == "lent"
            if limit > self.max_len or (not lent and -(-limit // self.rtc.block_size) > self.rtc.blocks):
                self.notices.append(Refused(name, f"{limit} tokens do not fit this TE's {self.max_len}"))
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
                begun=known,
                limit=limit,
                stop_ids=frozenset(msg.stop_ids),
                seed=sample.seed & (2**64 - 1),
                order=(msg.priority, self.arrivals),
                key=root_key(msg.salt),
                leader=leader,
                expected=msg.expect and leader is None,
                handover=msg.handover,
                until=msg.at + msg.retain if msg.retain else 0.0,
                context=msg.context if msg.preserve else "",
            )
            if msg.context and not msg.preserve and (match := self.rtc.match_by_id(msg.context)) is not None:
                seq.keys = self.context_keys(seq, match)
            seq.trust = 0 if self.speculation is None or counts_ids(msg.params) else 1
            if msg.params.prompt_logprobs is not None and not len(generated) and not msg.expect:
                seq.scores = [None]
            elif known >= limit:  # nothing to compute: an echo without log-probabilities, or a replay of a full text
                self.report.row(name, -1, Finish.LENGTH)
                continue
            leader = leader or seq
            self.sequences[name] = seq
            self.extend_keys(seq)
            self.look_up(seq)
            heapq.heappush(self.waiting, (seq.order, seq))
        self.stuck = False

    def abort(self, task: int, sample: int) -> list[Sequence]:
        """Forget one sequence, or a task's all: which ones there were."""
        every = [n for n in self.sequences if split_sequence_id(n)[0] == task]
        names = every if sample < 0 else [sequence_id(task, sample)]
        found = [seq for name in names if (seq := self.sequences.get(name)) is not None]
        for seq in found:
            self.end(seq)
        return found

    def end(self, seq: Sequence) -> None:
        seq.ended = True
        del self.sequences[seq.id]
        if self.expected.pop(seq.id, None) is None and seq.slot >= 0:
            self.running.remove(seq)
        self.handing.pop(seq.id, None)
        self.loads.forget(seq)
        self.release(seq)
        self.stuck = False

    def release(self, seq: Sequence) -> None:
        """Give back slot and blocks. What was committed stays findable until evicted."""
        if not seq.lent:
            if seq.until:
                self.rtc.retain(seq.blocks[: seq.committed], seq.until)
            if seq.context and seq.committed:
                self.rtc.preserve(seq.context, seq.keys[: min(seq.committed, seq.prompt // self.rtc.block_size)], seq.until)
            self.rtc.free(seq.blocks)
        if seq.slot >= 0:
            self.slots.append(seq.slot)
        seq.blocks, seq.slot = [], -1
        seq.done = seq.committed = seq.drafted = 0
        seq.epoch += 1
        seq.setup_sent = False

    # ---- from and to other pools ------------------------------------------------------------------------------------
    def arrived(self, seq: Sequence, tokens: int) -> None:
        """The KV of an expected sequence's first `tokens` tokens is in its blocks: it runs from there on."""
        del self.expected[seq.id]
        seq.expected = False
        seq.done = tokens
        self.commit(seq, tokens)
        self.run(seq)

    def adopt(self, name: int, generated: np.ndarray) -> bool:
        """An expected sequence was computed on another TE, up to the last of `generated` (int32). False: it isn't expected."""
        seq = self.expected.get(name)
        if seq is None:
            return False
        seq.known = seq.prompt + len(generated)
        seq.ids[seq.prompt : seq.known] = generated
        self.extend_keys(seq)
        self.arrived(seq, seq.known - 1)
        return True

    def move(self, name: int, handover: Handover) -> str:
        """Hand a running sequence over once no step has it; or why it can't be."""
        seq = self.sequences.get(name)
        if seq is None or seq.slot < 0 or seq.expected or seq.handover is not None:
            return "it doesn't run here now"
        if seq.done < seq.known - 1 or seq.scores is not None:
            return "its prompt isn't computed yet"
        seq.handover, seq.moving = handover, True
        self.leave_when_still(seq)
        return ""

    def leave_when_still(self, seq: Sequence) -> None:
        """A moving sequence that no step has goes."""
        if seq.moving and not seq.flying and not seq.ended and seq.slot >= 0:
            assert seq.handover is not None
            if (seq.known - 1) > len(seq.handover.blocks) // 4 * self.rtc.block_size:
                self.stay(seq, "it has outgrown the blocks that were reserved for it")
            else:
                self.hand_over(seq)

    def stay(self, seq: Sequence, why: str) -> None:
        """A moving sequence can't leave: it goes on here."""
        seq.handover, seq.moving = None, False
        self.notices.append(HandedOver(seq.id, -1, why))

    def hand_over(self, seq: Sequence) -> None:
        """What was asked of this TE is computed: the sequence keeps its blocks until the receiver has them."""
        self.commit(seq, seq.known - 1)
        self.running.remove(seq)
        self.slots.append(seq.slot)
        seq.slot = -1
        self.handing[seq.id] = seq
        self.handed.append(seq)
        self.stuck = False

    def take_back(self, seq: Sequence, why: str) -> None:
        """A moving sequence could not be carried: it waits to go on here."""
        del self.handing[seq.id]
        self.stay(seq, why)
        self.release(seq)
        heapq.heappush(self.waiting, (seq.order, seq))
        self.stuck = False

    def let_go(self, name: int) -> None:
        """The receiver has a handed over sequence."""
        if (seq := self.handing.get(name)) is not None:
            self.end(seq)

    def context_keys(self, seq: Sequence, match: Match) -> list[bytes]:
        """Keys of a prompt that begins with an explicit context, as far as that is here: nothing to hash again. The first is made
        anew, so that a context of another salt than the sequence's is none of its own."""
        keys = [key for block in match.blocks if (key := self.rtc.keys[block]) is not None]
        first = list(block_keys(seq.key, seq.ids[: self.rtc.block_size].tobytes(), self.rtc.block_size))
        return keys if keys[:1] == first else []

    # ---- slower tiers -----------------------------------------------------------------------------------------------
    def look_up(self, seq: Sequence) -> None:
        """Ask the slower tiers for the blocks of its prefix that the device lacks; until the answer it waits."""
        if self.loads.costs is None or seq.scores is not None or seq.lent or seq.leader is not None:
            return
        if seq.expected and not self.lends:
            return  # whoever computes its prompt has what comes before carried here
        seq.asked_from = len(self.rtc.match_by_prefix_token(seq.keys, seq.known).blocks)
        if keys := seq.keys[seq.asked_from : (seq.known - 1) // self.rtc.block_size]:
            self.loads.ask(seq, keys)

    def found(self, answer: Found) -> None:
        """What the slower tiers have of a sequence's prefix."""
        self.loads.found(answer)
        self.stuck = False

    def load_blocks(self, seq: Sequence, need: int, count: int) -> None:
        """Have the first `count` of the `need` blocks that it lacks loaded: it is expected until they are there."""
        first = len(seq.blocks) - seq.asked_from
        blocks = self.rtc.alloc_blocks(need)
        assert blocks is not None, "admit counted them"
        self.tables[seq.slot, len(seq.blocks) : len(seq.blocks) + need] = blocks
        seq.blocks += blocks
        self.rtc.hold(blocks[:count])
        self.loads.fetch(seq, first, blocks[:count], not seq.expected)
        seq.expected = True
        self.expected[seq.id] = seq

    def fetched(self, answer: Fetched) -> None:
        """Blocks were loaded: the sequence computes what comes after them."""
        seq, blocks, runs = self.loads.fetched(answer)
        size = self.rtc.block_size
        self.rtc.free(blocks)
        self.stuck = False
        if seq.ended:
            return
        dram, ssd = answer.blocks["dram"] * size, answer.blocks["ssd"] * size
        if runs:
            self.arrived(seq, seq.done + dram + ssd)
        else:
            seq.done += dram + ssd
            self.commit(seq, seq.done)
            self.tell_reserved(seq, dram, ssd)
        self.load.populates += dram + ssd > 0
        self.load.prefix_hits += dram + ssd
        self.load.dram_hits += dram
        self.load.ssd_hits += ssd
        if not seq.started:  # else it was here before, and lost its blocks
            gained = min(seq.done, seq.prompt) - seq.cached
            seq.cached += gained
            seq.dram = min(dram, gained)
            seq.ssd = gained - seq.dram

    # ---- planning ---------------------------------------------------------------------------------------------------
    def has_work(self) -> bool:
        """Whether another turn of the loop could bring anything before a message does."""
        unsaid = self.report.seqs or self.notices or self.handed or self.loads.lookups
        return bool(self.running or unsaid or (self.waiting and not self.stuck))

    def plan(self) -> Plan:
        """The next step: decodes first, then the rest of the token budget shared by the prefills; what is left goes to drafts."""
        if self.must_wait():
            return []
        plan: Plan = []
        for seq in list(self.running):
            if decodes(seq) and not seq.moving and self.grow(seq, seq.target):
                plan.append(Work(seq, seq.done, 1, True, seq.epoch))
        self.admit()
        planned = {w.seq.id for w in plan}
        prefills = [s for s in self.running if s.done < s.known and s.id not in planned and not s.moving]
        for seq, count in share(prefills, self.max_tokens - len(plan)):
            if seq is self.running[0]:
                self.grow(seq, seq.done + 1)  # the oldest always moves on, so prefills can't wait for each other's blocks
            if seq.slot < 0:
                continue  # the oldest took its blocks
            count = self.fit(seq, count)
            if count > 0:
                sample = seq.done + count == seq.target and seq.target < seq.stays
                plan.append(Work(seq, seq.done, count, sample, seq.epoch))
        plan = [w for w in plan if w.epoch == w.seq.epoch]  # a prefill may have preempted a decode planned before it
        for work in plan:
            work.seq.done += work.count
            work.seq.flying += work.sample
        self.add_drafts(plan)
        self.stuck = not self.running
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
            want = min(seq.trust, left, seq.stays - seq.known - 1)
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
        filling = [*(s for s in self.running if s.done < s.known), *self.expected.values()]
        coming = {key for s in filling for key in s.keys[s.committed :]} if caching else set()
        blocked: list[tuple[tuple[int, int], Sequence]] = []
        while self.waiting and self.slots:
            _, seq = self.waiting[0]
            if seq.ended:
                heapq.heappop(self.waiting)
                continue
            if seq.flying or seq.asking or (seq.leader is not None and not leader_is_through(seq.leader)):
                blocked.append(heapq.heappop(self.waiting))
                continue
            if seq.lent:
                heapq.heappop(self.waiting)
                self.take_lent(seq)
                continue
            match = self.rtc.match_by_prefix_token(seq.keys if seq.scores is None else [], seq.known)
            if seq.scores is None and coming.intersection(seq.keys[len(match.blocks) : len(match.blocks) + 1]):
                blocked.append(heapq.heappop(self.waiting))
                continue
            ahead = SPARE_TOKENS if seq.expected else 1
            need = -(-min(seq.known + ahead, seq.limit) // size) - len(match.blocks)
            # Blocks the match would take out of the idle list are no longer there to be evicted.
            idle = sum(self.rtc.refs[b] == 0 for b in match.blocks)
            # One block of slack for each running sequence keeps the newcomer from being preempted by the next decode.
            if need + idle + promised + len(self.running) > self.rtc.available:
                assert self.running or self.expected or self.handing or self.rtc.copied or self.loads.fetching, "it fits"
                break
            heapq.heappop(self.waiting)
            loaded = self.loads.wanted(seq, len(match.blocks), self.load)
            if loaded is None:
                self.loads.forget(seq)
                self.look_up(seq)
                blocked.append((seq.order, seq))
                continue
            self.take_slot(seq, match.blocks and self.rtc.populate(match))
            if loaded:
                self.load_blocks(seq, need, loaded)
            elif seq.expected:
                self.reserve(seq, need)
            else:
                self.run(seq)
                promised += need
            self.loads.forget(seq)
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

    def take_lent(self, seq: Sequence) -> None:
        """Slot and blocks of a sequence that computes in another TE's blocks."""
        assert seq.handover is not None
        seq.slot = self.slots.pop()
        seq.blocks = np.frombuffer(seq.handover.blocks, np.int32).tolist()
        self.tables[seq.slot, : len(seq.blocks)] = seq.blocks
        seq.done = seq.handover.cached
        seq.cached = min(seq.done, seq.prompt)
        self.run(seq)

    def reserve(self, seq: Sequence, count: int) -> None:
        """Slot and blocks are an expected sequence's: say so."""
        blocks = self.rtc.alloc_blocks(count)
        assert blocks is not None, "admit counted them"
        self.tables[seq.slot, len(seq.blocks) : len(seq.blocks) + count] = blocks
        seq.blocks += blocks
        self.expected[seq.id] = seq
        self.tell_reserved(seq)

    def tell_reserved(self, seq: Sequence, dram: int = 0, ssd: int = 0) -> None:
        self.notices.append(Reserved(seq.id, np.array(seq.blocks, np.int32).tobytes(), seq.done, dram, ssd))

    def run(self, seq: Sequence) -> None:
        """Take a sequence with slot and blocks into the running ones."""
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
        if seq.moving:
            self.stay(seq, "it has lost its blocks")
        self.running.remove(seq)
        self.release(seq)
        seq.pushed = False  # what is computed again is carried again
        self.extend_keys(seq)
        seq.asked = 0
        self.look_up(seq)
        if seq.scores is not None:
            seq.scores = [None]
        self.load.preemptions += 1
        heapq.heappush(self.waiting, (seq.order, seq))

    # ---- results ----------------------------------------------------------------------------------------------------
    def apply(self, plan: Plan, out: StepOutput) -> None:
        """A launched step has run: take its ids, end what has ended, commit full blocks. Fills `report`."""
        load = self.load
        load.steps += 1
        row = score_row = 0
        for work in plan:
            seq = work.seq
            live = not seq.ended
            fresh = work.count - len(work.draft)
            computed = work.start + fresh
            if fresh > 1:
                load.chunk_tokens += fresh
                load.chunk_context += fresh * work.start
            else:
                load.decodes += 1
                load.decode_context += computed
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
                self.emit(seq, -1, Finish.LENGTH)  # scored only: nothing to generate
                self.end(seq)
                if seq.handover is not None:
                    self.finished.append(seq)
            if not seq.ended and work.epoch == seq.epoch:
                load.prompt_tokens += max(0, min(computed, seq.prompt) - work.start)
                self.commit(seq, computed)
                self.leave_when_still(seq)

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
            if seq.handover is not None:
                self.finished.append(seq)
        elif seq.known == seq.stays:
            self.hand_over(seq)

    def commit(self, seq: Sequence, computed: int) -> None:
        """Make blocks that are full, computed and of known ids findable."""
        full = min(computed, seq.known) // self.rtc.block_size
        if full <= seq.committed or seq.lent:
            return
        self.extend_keys(seq)
        for i in range(seq.committed, full):
            if seq.handover is not None and self.rtc.holds(seq.keys[i]):
                return  # committed by another one meanwhile. This block may be on its way to another pool: it stays as it is
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
    def emit(self, seq: Sequence, token: int, finish: Finish, logprobs: TokenLogprobs | None = None) -> None:
        self.report.row(seq.id, token, finish, logprobs)
        if seq.known - seq.prompt <= 1 or seq.scores is not None:
            self.report.prompt(PromptDone(seq.id, max(seq.cached, 0), seq.started, seq.scores, seq.dram, seq.ssd))
            seq.scores = None

    def take_report(self) -> Tokens | None:
        """What happened since the last one, or None where there is nothing that the control process does not know.

        A cancelled sequence brings no token, but it changes the load: a message without rows then tells that."""
        load = self.load
        before = (load.running, load.waiting, load.blocks_used)
        load.running = len(self.running)
        load.waiting = len(self.sequences) - len(self.running) - len(self.expected) - len(self.handing)
        load.blocks_used = self.rtc.used
        changed = before != (load.running, load.waiting, load.blocks_used)
        return self.report.take(load) if self.report.seqs or changed else None

    def check(self) -> None:
        """Verify the counts against RTC; raises AssertionError. For tests."""
        self.rtc.check()
        held: dict[int, int] = {}
        for seq in self.running:
            assert not seq.ended and seq.slot >= 0
            assert 0 <= seq.flying <= 1 and seq.done - seq.drafted <= seq.target <= seq.stays
            assert seq.done <= seq.limit and (not seq.drafted or seq.flying)
            assert len(seq.blocks) * self.rtc.block_size >= seq.done
        slotted = [*self.running, *self.expected.values()]
        for seq in slotted:
            assert list(self.tables[seq.slot, : len(seq.blocks)]) == seq.blocks
        for seq in [*slotted, *self.handing.values()]:
            assert self.sequences[seq.id] is seq
            for block in [] if seq.lent else seq.blocks:
                held[block] = held.get(block, 0) + 1
        for _, blocks, _ in self.loads.fetching.values():
            for block in blocks:
                held[block] = held.get(block, 0) + 1
        assert all(self.rtc.refs[b] == held.get(b, 0) for b in range(self.rtc.blocks)), "a block leaked"
        slots = [s.slot for s in slotted]
        assert sorted(slots + self.slots) == list(range(len(self.tables))), "a slot leaked"
        assert self.running == sorted(self.running, key=lambda s: s.order)
