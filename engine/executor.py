"""One rank's forward pass: turns a plan into host arrays and launches it on the device. Imports no torch.

Per step it does work for each sequence, not for each token of context: block tables and sampling columns live in
persistent arrays and are gathered by slot.
"""

from __future__ import annotations

import numpy as np

from engine.devices import Device, KVCache, Pending, SamplingRows, SlotSetup, StepInputs, StepView, Tensor
from engine.models import Model
from engine.sequence import Plan, Sequence, counts_ids, scored_rows

NOTHING = np.empty(0, np.int32)


class Executor:
    def __init__(self, device: Device, model: Model, kv: KVCache, tables: np.ndarray, block_size: int, max_tokens: int):
        self.device = device
        self.model = model
        self.kv = kv
        self.tables = tables  # int32 [slots, blocks a sequence has at most]; the batch writes it
        self.block_size = block_size
        slots = len(tables)
        device.configure(vocab=model.vocab, slots=slots, tokens=max_tokens)
        # Sampling columns by slot, written when a sequence's sampling state is set up.
        self.temperature = np.zeros(slots, np.float32)
        self.top_k = np.zeros(slots, np.int32)
        self.top_p = np.ones(slots, np.float32)
        self.min_p = np.zeros(slots, np.float32)
        self.presence = np.zeros(slots, np.float32)
        self.frequency = np.zeros(slots, np.float32)
        self.repetition = np.ones(slots, np.float32)
        self.seed = np.zeros(slots, np.uint64)
        self.logprobs = np.full(slots, -1, np.int32)
        self.has_setup = np.zeros(slots, bool)

    def launch(self, plan: Plan) -> Pending:
        """Queue the step that `plan` describes."""
        return self.device.launch(self.forward, self.inputs(plan))

    def forward(self, device: Device, step: StepView) -> Tensor:
        return self.model.forward(device, step, self.kv)

    def inputs(self, plan: Plan) -> StepInputs:
        """The plan as arrays. Sampled rows come in plan order, then scored rows in plan order: `Batch.apply` reads them so."""
        count = len(plan)
        counts = np.fromiter((w.count for w in plan), np.int32, count)
        starts = np.fromiter((w.start for w in plan), np.int32, count)
        slots = np.fromiter((w.seq.slot for w in plan), np.int32, count)
        q_start = np.zeros(count + 1, np.int32)
        np.cumsum(counts, out=q_start[1:])
        total = int(q_start[-1])
        owner = np.repeat(np.arange(count, dtype=np.int32), counts)
        positions = np.arange(total, dtype=np.int32) - q_start[owner] + starts[owner]
        blocks = self.tables[slots][:, : -(-int((starts + counts).max()) // self.block_size)]
        kv_slots = blocks[owner, positions // self.block_size] * self.block_size + positions % self.block_size

        ids = np.zeros(total, np.int32)
        feed = np.full(total, -1, np.int32)
        sampled: list[Sequence] = []
        rows: list[int] = []
        produced: list[int] = []  # generated ids of the sequence once this row has its own
        scores: list[np.ndarray] = []
        score_rows: list[np.ndarray] = []
        score_top = 0
        setups: list[SlotSetup] = []
        at = 0
        for work in plan:
            seq, end = work.seq, work.start + work.count
            if len(work.draft):
                ids[at : at + work.count] = np.concatenate([seq.ids[work.start : seq.known], work.draft])
            elif end <= seq.known:
                ids[at : at + work.count] = seq.ids[work.start : end]
            else:  # the last token is still on the device: the step before this one samples it
                ids[at : at + work.count - 1] = seq.ids[work.start : end - 1]
                feed[at + work.count - 1] = seq.slot
            if seq.scores is not None and (scored := scored_rows(work)):
                scores.append(seq.ids[work.start + 1 : work.start + 1 + scored])
                score_rows.append(np.arange(at, at + scored, dtype=np.int32))
                score_top = max(score_top, seq.params.prompt_logprobs or 0)
            at += work.count
            if work.sample:
                many = 1 + len(work.draft)
                rows += range(at - many, at)
                produced += range(seq.target - seq.prompt, seq.target - seq.prompt + many)
                sampled += [seq] * many
                if not seq.setup_sent:
                    setups += self.set_up(seq)
        return StepInputs(
            ids=ids,
            feed=feed,
            positions=positions,
            kv_slots=kv_slots,
            q_start=q_start,
            kv_len=starts + counts,
            blocks=blocks,
            rows=np.concatenate([np.array(rows, np.int32), *score_rows]),
            sampling=self.sampling(sampled, produced, positions[rows] + 1),
            score_ids=np.concatenate(scores) if scores else NOTHING,
            score_top=score_top,
            setups=setups,
        )

    def set_up(self, seq: Sequence) -> list[SlotSetup]:
        """Write a sequence's sampling columns; the setup the device needs, where columns can't say it all."""
        p, slot = seq.params, seq.slot
        self.temperature[slot] = p.temperature
        self.top_k[slot] = max(p.top_k, 0)
        self.top_p[slot] = p.top_p
        self.min_p[slot] = p.min_p
        self.presence[slot] = p.presence_penalty
        self.frequency[slot] = p.frequency_penalty
        self.repetition[slot] = p.repetition_penalty
        self.seed[slot] = seq.seed
        self.logprobs[slot] = -1 if p.logprobs is None else p.logprobs
        seq.setup_sent = True
        counts = counts_ids(p)
        holds = bool(p.min_tokens and seq.stop_ids)
        self.has_setup[slot] = counts or holds or bool(p.logit_bias)
        if not self.has_setup[slot]:
            return []
        return [
            SlotSetup(
                slot=slot,
                prompt=seq.ids[: seq.prompt],
                generated=seq.ids[seq.prompt : seq.known],
                bias_ids=np.fromiter(p.logit_bias.keys(), np.int32, len(p.logit_bias)),
                bias=np.fromiter(p.logit_bias.values(), np.float32, len(p.logit_bias)),
                stop_ids=np.fromiter(seq.stop_ids, np.int32, len(seq.stop_ids)),
                counts=counts,
            )
        ]

    def sampling(self, sampled: list[Sequence], produced: list[int], positions: np.ndarray) -> SamplingRows:
        slot = np.fromiter((s.slot for s in sampled), np.int32, len(sampled))
        hold = np.fromiter((p <= s.params.min_tokens for s, p in zip(sampled, produced, strict=True)), bool, len(sampled))
        return SamplingRows(
            slot=slot,
            position=positions.astype(np.int64),
            seed=self.seed[slot],
            temperature=self.temperature[slot],
            top_k=self.top_k[slot],
            top_p=self.top_p[slot],
            min_p=self.min_p[slot],
            presence=self.presence[slot],
            frequency=self.frequency[slot],
            repetition=self.repetition[slot],
            hold_stop=hold,
            has_setup=self.has_setup[slot],
            logprobs=self.logprobs[slot],
        )
