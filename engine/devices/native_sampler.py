"""Sampling by the compiled kernels: what the slots remember, and a step's columns as native/cpu/sample.inc.h reads them.

By the rules in `engine/sampler.py`. Imports no torch.
"""

from __future__ import annotations

from ctypes import Structure, addressof, c_int64, c_void_p
from dataclasses import dataclass

import numpy as np

from engine.devices import Logprobs, SamplingRows, SlotSetup


class Slot(Structure):
    """ds_slot."""

    _fields_ = (
        ("bias_ids", c_void_p),
        ("bias", c_void_p),
        ("biases", c_int64),
        ("stop_ids", c_void_p),
        ("stops", c_int64),
        ("output", c_void_p),
        ("prompt", c_void_p),
    )


class Sampling(Structure):
    """ds_sampling."""

    _fields_ = (
        ("rows", c_int64),
        ("slot", c_void_p),
        ("position", c_void_p),
        ("seed", c_void_p),
        ("temperature", c_void_p),
        ("top_k", c_void_p),
        ("top_p", c_void_p),
        ("min_p", c_void_p),
        ("presence", c_void_p),
        ("frequency", c_void_p),
        ("repetition", c_void_p),
        ("hold_stop", c_void_p),
        ("has_setup", c_void_p),
        ("logprobs", c_void_p),
        ("slots", c_void_p),
        ("last", c_void_p),
        ("ids", c_void_p),
        ("top", c_int64),
        ("chosen", c_void_p),
        ("rank", c_void_p),
        ("top_ids", c_void_p),
        ("top_values", c_void_p),
    )


@dataclass(slots=True)
class Answer:
    """Where the kernels write, and the columns they read: kept alive until they have run."""

    ids: np.ndarray  # int32 [n]
    logprobs: Logprobs | None
    columns: list[np.ndarray]


class NativeSampler:
    """State of every slot, and what a step's two sampling structs say (`Sampling`: a program's last two operators point to
    them)."""

    def __init__(self, vocab: int, slots: int):
        self.vocab = vocab
        self.last = np.zeros(slots, np.int32)  # each slot's newest id
        self.slots = (Slot * slots)()
        self.kept: dict[int, list[np.ndarray]] = {}

    def set_up(self, setup: SlotSetup) -> None:
        """A new sequence owns the slot, which no launched step may still read. Ids beyond the vocabulary are nobody's and
        dropped."""
        inside = setup.bias_ids < self.vocab
        bias_ids = np.ascontiguousarray(setup.bias_ids[inside], np.int32)
        bias = np.ascontiguousarray(setup.bias[inside], np.float32)
        stop_ids = np.ascontiguousarray(setup.stop_ids[setup.stop_ids < self.vocab], np.int32)
        slot = self.slots[setup.slot]
        slot.bias_ids, slot.bias, slot.biases = at(bias_ids), at(bias), len(bias)
        slot.stop_ids, slot.stops = at(stop_ids), len(stop_ids)
        slot.output = slot.prompt = None
        self.kept[setup.slot] = [bias_ids, bias, stop_ids]
        if setup.counts:
            output = np.bincount(setup.generated, minlength=self.vocab).astype(np.int32)
            prompt = (np.bincount(setup.prompt, minlength=self.vocab) > 0).astype(np.uint8)
            slot.output, slot.prompt = at(output), at(prompt)
            self.kept[setup.slot] += [output, prompt]

    def ask(self, struct: Sampling, rows: SamplingRows) -> Answer:
        """Fill `struct` for a step's sampled rows."""
        columns = [np.ascontiguousarray(getattr(rows, name)) for name in COLUMNS]
        ids = np.zeros(len(rows.slot), np.int32)
        answer = self.fill(struct, ids, columns[-1], columns)
        for name, column in zip(COLUMNS, columns, strict=True):
            setattr(struct, name, at(column))
        struct.slots = addressof(self.slots)
        struct.last = at(self.last)
        return answer

    def ask_scores(self, struct: Sampling, ids: np.ndarray, top: int) -> Answer:
        """Fill `struct` for rows whose tokens are known."""
        ids = np.ascontiguousarray(ids, np.int32)
        logprobs = np.full(len(ids), top, np.int32)
        answer = self.fill(struct, ids, logprobs, [logprobs])
        struct.logprobs = at(logprobs)
        return answer

    def fill(self, struct: Sampling, ids: np.ndarray, asked: np.ndarray, columns: list[np.ndarray]) -> Answer:
        struct.rows, struct.ids = len(ids), at(ids)
        if not len(ids) or asked.max() < 0:
            return Answer(ids, None, columns)
        top = int(asked.max())
        found = Logprobs(
            np.zeros(len(ids), np.float32),
            np.zeros(len(ids), np.int32),
            np.zeros((len(ids), top), np.int32),
            np.zeros((len(ids), top), np.float32),
        )
        struct.top = top
        struct.chosen, struct.rank, struct.top_ids, struct.top_values = (
            at(found.chosen), at(found.rank), at(found.top_ids), at(found.top)
        )  # fmt: skip
        return Answer(ids, found, columns)


# Of SamplingRows, by the names that the struct has too; logprobs last.
COLUMNS = (
    "slot", "position", "seed", "temperature", "top_k", "top_p", "min_p", "presence", "frequency", "repetition", "hold_stop",
    "has_setup", "logprobs",
)  # fmt: skip


def at(array: np.ndarray) -> int:
    return array.ctypes.data
