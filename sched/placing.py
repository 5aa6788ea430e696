"""Where tasks run: what the JE sees of its TEs, kept as the policy reads it, and the policy's choice for each task.

A TE that may have changed is noted (`changed`), and its columns are written before the next choice, so that a step's tokens cost
a set's entry and a choice costs what has changed since the last one.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from engine import devices
from engine.config import Config
from engine.types import BlockNews, Load, Recount
from sched.cluster import TE
from sched.costs import Costs, Learner, Paces, Step, rough
from sched.handover import say
from sched.heatmap import Kind, Traffic
from sched.knowledge import Knowledge
from sched.live import LiveSample, LiveTask
from sched.policy import Ask, Choice, Expected, Length, Pick, Tree, choose, heir
from sched.policy import Kind as Way
from sched.predict import Predicted, clues
from sched.prompt_tree import PromptTree
from sched.view import View

# Seconds between two steps of a TE that costs are learnt from, since one costs the event loop some 50 µs; and between two looks
# at which TEs are slow.
LEARN_EVERY = 0.1
PACE_EVERY = 0.5
# Without a profile, until steps have been seen: bytes a second of an accelerator's and of a CPU's memory, and for how many decode
# steps' time a full step lasts for each token, both within a factor of ten of what there is.
BANDWIDTH = {True: 1e12, False: 2e10}
TOKENS_A_STEP = {True: 200.0, False: 20.0}
HANDOVER = 0.005  # seconds that a prompt's way to another TE takes beside its bytes': four messages between processes, and a step
HEAT_KINDS: dict[Way, Kind] = {"colocated": "colocated", "pair": "disaggregated", "semi": "semi"}


class Placing:
    """Of one model."""

    def __init__(self, config: Config, knowledge: Knowledge):
        self.follow(config, knowledge)
        self.view = View()
        self.pick: Pick = self.choose_by_policy
        self.tes: dict[int, TE] = {}  # that take tasks
        self.homes: dict[str, int] = {}  # explicit context -> the TE that computed it, or went on from it, last
        self.ahead: int | None = None  # sequences that a TE gets beyond those it runs at once; None: any number
        self.touched: set[TE] = set()  # may have changed since the last choice
        self.paces = Paces()
        self.paced = float("-inf")  # when the column was last written from that; seconds of the JE's clock
        self.turns = 0

    def follow(self, config: Config, knowledge: Knowledge) -> None:
        """The model's files were read, or read again: no TE has what was in the ones before."""
        assert config.block_size is not None
        self.config, self.knowledge = config, knowledge
        self.tree = PromptTree(config.block_size)
        self.traffic = Traffic(knowledge.heat)
        self.learner = Learner(knowledge.costs) if knowledge.costs is not None else None

    # ---- TEs --------------------------------------------------------------------------------------------------------
    def add(self, te: TE) -> None:
        self.tes[te.id] = te
        if self.learner is None:
            self.learner = Learner(first_costs(self.config, te))
            self.knowledge.scale_heat(self.learner.costs)
            self.traffic.heat = self.knowledge.heat
        self.view.add(te.id, te.role, te.lender, seats=self.config.max_num_seqs)
        self.touched.add(te)

    def remove(self, te: TE) -> None:
        if self.tes.get(te.id) is te:
            del self.tes[te.id]
            self.view.remove(te.id)
            self.tree.gone(te.id)
            self.paces.forget(te.id)
            self.homes = {context: home for context, home in self.homes.items() if home != te.id}
            self.touched.discard(te)

    def changed(self, te: TE) -> None:
        """Something of it that the columns tell may have changed."""
        self.touched.add(te)

    def look(self) -> None:
        """Write the columns of TEs that may have changed."""
        size = self.tree.block_size
        for te in self.touched:
            if self.tes.get(te.id) is te:
                load, own = te.load, te.lender < 0
                self.view.update(
                    te.id,
                    role=te.role,
                    takes=self.takes(te),
                    sequences=te.sequences,
                    queued_tokens=te.prompt_tokens,
                    running=load.running,
                    kv_used=load.blocks_used * size if own else 0.0,
                    kv_total=load.blocks_total * size if own and load.blocks_total else float("inf"),
                )
        self.touched.clear()

    def takes(self, te: TE) -> bool:
        """Whether it can be given a task.

        Not after its role has changed, until what it had to do with others in the one before is through: of two TEs that are full
        of sequences whose prompts are to be computed by the other, none would ever have room for a prompt."""
        in_between = te.expecting if te.role == "prefill" else te.role == "decode" and te.computing
        full = self.ahead is not None and te.sequences >= self.config.max_num_seqs + self.ahead
        return te.state == "ready" and not te.draining and not in_between and not full

    # ---- what TEs tell ----------------------------------------------------------------------------------------------
    def news(self, te: TE, news: BlockNews) -> None:
        """Which KV blocks it has got and lost."""
        # Of one that isn't known yet nobody would forget them, should it never be: it tells them again when it is.
        if self.tes.get(te.id) is te and not self.tree.hear(te.id, news):
            say(te, Recount())

    def stepped(self, te: TE, before: Load, now: float) -> None:
        """A TE has told of its load, and `before` was its last one: learn what steps take."""
        self.touched.add(te)
        load = te.load
        if load.tiers_gone > before.tiers_gone:
            self.tree.tiers_gone()
        if self.learner is None or len(self.tes) < 2 or self.tes.get(te.id) is not te:
            return
        if load.steps != before.steps + 1 or now - self.paces.heard.get(te.id, float("-inf")) < LEARN_EVERY:
            return
        prompt = load.chunk_tokens - before.chunk_tokens
        context = (load.chunk_context - before.chunk_context) / max(prompt, 1)
        step = Step(
            prompt,
            context,
            load.decodes - before.decodes,
            load.decode_context - before.decode_context,
            load.step_seconds - before.step_seconds,
        )
        self.paces.hear(te.id, self.learner.learn(step), now)

    def pace(self, now: float) -> None:
        """Write how slow each TE is, unless that was done a moment ago."""
        if now - self.paced >= PACE_EVERY:
            self.paced = now
            slow = self.paces.slow(now)
            for te in self.tes:
                self.view.update(te, slow=slow.get(te, 1.0))

    def sample_over(self, entry: LiveTask, sample: LiveSample, reason: str, now: float) -> None:
        """A text has ended: by itself, by its limit, or because its caller has left ("cancel")."""
        produced = len(sample.ids)
        if entry.clues is not None and (produced or reason == "stop"):
            self.knowledge.text_over(entry.clues, produced, reason == "stop")
        if reason == "cancel" or self.learner is None:
            return
        cached = entry.task.cached_tokens
        self.look()
        self.learner.ended(entry.prompt_tokens, produced, cached, self.view.crowd)
        choice = entry.choice
        alone = len(entry.samples) == 1 and entry.task.attempts == 1
        if choice is not None and alone and produced and choice.kind in HEAT_KINDS and self.splits():
            jct = now - entry.request.arrived
            costs, tes = self.learner.costs, len(self.tes)
            self.traffic.ended(HEAT_KINDS[choice.kind], entry.prompt_tokens, cached, produced, jct, tes, costs, now)
        self.knowledge.look(self.config.model)

    def splits(self) -> bool:
        """Whether there are TEs of more than one kind, so that the heat map matters."""
        view = self.view
        return bool(len(view.candidates("colocated"))) and bool(len(view.candidates("prefill")) or len(view.candidates("semi")))

    # ---- choices ----------------------------------------------------------------------------------------------------
    def expect(self, entry: LiveTask) -> None:
        """Note what is known of the length of a new task's answer."""
        submission = entry.request.submission
        assert self.config.max_model_len is not None
        room = self.config.max_model_len - entry.prompt_tokens
        ids = submission.prompts[entry.prompt_index]
        entry.clues = clues(ids, entry.params, submission.tenant.name, room, entry.stop_ids)

    def choose(self, entry: LiveTask, now: float, without: Iterable[int] = ()) -> Choice | None:
        """The TE, or the two, that a task goes to; None where nothing can take it. `without`: TEs that aren't to be given it."""
        self.look()
        self.pace(now)
        left_out = [te for te in without if self.view.takes[self.view.slots[te]]]
        for te in left_out:
            self.view.update(te, takes=False)
        choice = self.pick(self.ask(entry, now), self.view, self.tree)
        for te in left_out:
            self.view.update(te, takes=True)
        return choice

    def choose_by_policy(self, ask: Ask, view: View, tree: Tree) -> Choice | None:
        assert self.learner is not None or not self.tes
        if self.learner is None:
            return None
        return choose(ask, view, tree, self.knowledge.heat, self.learner.costs, self.config.sched)

    def ask(self, entry: LiveTask, now: float) -> Ask:
        submission, config = entry.request.submission, self.config
        ttft, tpot = submission.slo_ttft_ms or config.slo_ttft_ms, submission.slo_tpot_ms or config.slo_tpot_ms
        had = max(len(sample.ids) for sample in entry.samples)
        scored = entry.params.prompt_logprobs is not None  # then nothing of the prompt is taken from a cache
        return Ask(
            prompt_tokens=entry.prompt_tokens + had,
            answer=self.answer(entry, had),
            keys=() if scored else entry.keys,
            ttft_slo=ttft / 1e3 - (now - entry.request.arrived) if ttft is not None and not had else None,
            tpot_slo=tpot / 1e3 if tpot is not None else None,
            home=self.homes.get(submission.context, -1) if submission.context and not scored else -1,
            home_tokens=submission.context_tokens,
            together=scored,  # most of the work is the prompt, and no token need follow
        )

    def answer(self, entry: LiveTask, had: int) -> Length:
        """The answer's tokens that are to come. Predicted once there is a choice to make."""
        if entry.clues is None or len(self.tes) < 2:
            return Expected(1.0, 1.0, 1.0, 1.0)
        if entry.answer is None:
            entry.answer = self.knowledge.lengths.predict(entry.clues)
        told: Predicted = entry.answer
        if not had:
            return told
        return Expected(max(told.mean - had, 1.0), max(told.low - had, 1.0), max(told.high - had, 1.0), told.confidence)

    def given(self, entry: LiveTask, choice: Choice) -> None:
        """A task goes where it was chosen to."""
        self.turns += 1
        for number in {choice.prefill, choice.decode}:
            self.view.update(number, last=self.turns)
            self.touched.add(self.tes[number])
        if context := entry.request.submission.context:
            self.homes[context] = choice.decode if choice.kind == "semi" else choice.prefill  # whose pool it is in

    def heir(self, entry: LiveTask, leaving: TE, now: float) -> TE | None:
        """The TE that goes on with a sequence, which leaves another one. It counts there from now on."""
        assert self.learner is not None
        self.look()
        choice = heir(self.ask(entry, now), self.view, self.tree, self.learner.costs, leaving.id)
        if choice is None:
            return None
        slot, tokens = self.view.slots[choice.decode], entry.prompt_tokens + len(entry.samples[0].ids)
        sequences = self.view.sequences[slot] + 1.0
        full = self.ahead is not None and sequences >= self.config.max_num_seqs + self.ahead
        self.view.update(choice.decode, sequences=sequences, kv_used=self.view.kv_used[slot] + tokens, takes=not full)
        return self.tes[choice.decode]


def first_costs(config: Config, te: TE) -> Costs:
    """Before any step was seen, and without a profile: from the sizes that a TE tells when it is up. A decode step reads the
    weights once."""
    assert config.block_size is not None and config.max_num_batched_tokens is not None
    own_memory = devices.kind(devices.choose(config.device)[0]).own_memory
    weights, kv = te.memory.get("weights", 0), te.memory.get("kv", 0)
    step = max(weights / BANDWIDTH[own_memory], 1e-4)
    costs = rough(
        TOKENS_A_STEP[own_memory] / step,
        step,
        chunk=config.max_num_batched_tokens,
        kv_bytes=kv // max(te.blocks * config.block_size, 1),
        peer_rate=BANDWIDTH[own_memory] / 10,
        dram_rate=BANDWIDTH[own_memory] / 10,
        ssd_rate=1e9,
        weights_bytes=weights,
    )
    return msgspec.structs.replace(costs, peer0=HANDOVER)
