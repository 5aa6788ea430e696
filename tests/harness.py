"""Runs a model on a device step by step, without batch, core or processes: what the tests of models and devices drive."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engine import models, weights
from engine.devices import ALONE, Device, Rank, SamplingRows, SlotSetup, StepInputs, StepOutput
from engine.devices.cpu import CpuDevice
from engine.devices.cpu_native import NativeCpuDevice
from engine.devices.torch_device import StreamDevice
from engine.types import Packing, Quantization

Part = tuple[Sequence[int], int, int]  # (all ids of a sequence, first to compute, how many)


def rows(count: int, **columns: object) -> SamplingRows:
    """Sampling columns for `count` greedy rows, but for `columns` (a value for all, or one for each)."""
    base = {
        "slot": (np.arange(count), np.int32),
        "position": (0, np.int64),
        "seed": (0, np.uint64),
        "temperature": (0.0, np.float32),
        "top_k": (0, np.int32),
        "top_p": (1.0, np.float32),
        "min_p": (0.0, np.float32),
        "presence": (0.0, np.float32),
        "frequency": (0.0, np.float32),
        "repetition": (1.0, np.float32),
        "hold_stop": (False, bool),
        "has_setup": (False, bool),
        "logprobs": (-1, np.int32),
    }
    assert columns.keys() <= base.keys()
    made = {
        name: np.broadcast_to(np.asarray(columns.get(name, value), dtype), (count,)).copy()
        for name, (value, dtype) in base.items()
    }
    return SamplingRows(**made)


class Rig:
    """One model on a cpu device with a small paged cache, sequences in tables of shuffled blocks.

    `native`: the compiled kernels (bfloat16, and what `quantization` and `kv_dtype` say) on so many threads; None: the reference
    operators.
    `device`: another device of this dtype instead, in blocks of its own size.
    `rank`: which rank of several this is; each must be given the same steps, at the same time.
    `tensors`: weights that are on the device already."""

    def __init__(
        self,
        path: Path,
        *,
        dtype: str = "float32",
        blocks: int = 128,
        block_size: int = 4,
        max_len: int = 256,
        seed: int = 0,
        native: int | None = None,
        quantization: Quantization = "auto",
        device: Device | None = None,
        kv_dtype: str = "auto",
        rank: Rank = ALONE,
        tensors: dict[str, Any] | None = None,
    ):
        self.block_size = block_size if native is None else 16  # the compiled kernels' smallest
        if device is not None:
            self.block_size = device.block_size
        checkpoint = weights.open_checkpoint(path)
        self.model = models.build(checkpoint.config, rank.index, rank.count)
        compiled = NativeCpuDevice(native, kv_dtype=kv_dtype, rank=rank) if native is not None else None
        self.device: Any = device or compiled or CpuDevice(dtype, threads=1)
        fd = os.memfd_create("weights")
        packing = Packing(dtype, "rows", quantization) if native is None else Packing("bfloat16", "panels", quantization)
        mapped = weights.map_slabs(weights.pack(checkpoint, self.model.weights(), packing, fd), [fd])
        os.close(fd)
        if tensors is None:
            tensors = {name: self.device.weight(parts) for name, parts in self.model.own(mapped).items()}
        self.model.bind(self.device, tensors, max_len)
        self.kv = self.device.kv_cache(self.model.layers, blocks, self.block_size, self.model.own_kv_heads, self.model.head_dim)
        self.device.configure(vocab=self.model.vocab, slots=64, tokens=1024)
        self.free = np.random.default_rng(seed).permutation(blocks).tolist()

    def table(self, tokens: int) -> list[int]:
        """Blocks for a sequence of up to `tokens` tokens."""
        return [self.free.pop() for _ in range(-(-tokens // self.block_size))]

    def inputs(self, parts: Sequence[Part], tables: Sequence[Sequence[int]], want: Sequence[int] | None = None) -> StepInputs:
        """A step that computes `parts`; rows `want` (all, if None) are to be scored, none sampled."""
        size = self.block_size
        positions = np.concatenate([np.arange(start, start + count) for _, start, count in parts]).astype(np.int32)
        owner = np.repeat(np.arange(len(parts)), [count for _, _, count in parts])
        ends = np.array([start + count for _, start, count in parts], np.int32)
        # What stands in a table past a sequence's end must not matter; -1 would be an error if it were ever read.
        blocks = np.full((len(parts), max(-(-int(e) // size) for e in ends)), -1, np.int32)
        for row, (table, end) in enumerate(zip(tables, ends, strict=True)):
            needed = -(-int(end) // size)
            blocks[row, :needed] = table[:needed]
        total = len(positions)
        picked = np.arange(total, dtype=np.int32) if want is None else np.asarray(want, np.int32)
        return StepInputs(
            ids=np.concatenate([np.asarray(ids[start : start + count]) for ids, start, count in parts]).astype(np.int32),
            feed=np.full(total, -1, np.int32),
            positions=positions,
            kv_slots=blocks[owner, positions // size] * size + positions % size,
            q_start=np.cumsum([0] + [count for _, _, count in parts]).astype(np.int32),
            kv_len=ends,
            blocks=blocks,
            rows=picked,
            sampling=rows(0),
            score_ids=np.zeros(len(picked), np.int32),
        )

    def logits(self, parts: Sequence[Part], tables: Sequence[Sequence[int]], want: Sequence[int] | None = None) -> np.ndarray:
        """float32 logits of the wanted rows of one step."""
        kept = []

        def forward(device, step):
            logits = self.model.forward(device, step, self.kv)
            kept.append(logits.float().numpy().copy() if isinstance(device, CpuDevice) else logits)
            return logits

        step = self.inputs(parts, tables, want)
        self.device.launch(forward, step).result()
        if isinstance(self.device, StreamDevice):
            return kept[0].value.float().cpu().numpy()
        if isinstance(self.device, NativeCpuDevice):
            count = len(step.rows) * self.model.vocab
            return np.frombuffer(self.device.memory["logits.full"], np.float32, count).reshape(-1, self.model.vocab).copy()
        return kept[0]

    def launch(self, step: StepInputs):
        return self.device.launch(lambda device, view: self.model.forward(device, view, self.kv), step)

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """Continue `prompt` by `count` ids, sampled on the device."""
        ids = list(prompt)
        table = self.table(len(prompt) + count)
        while len(ids) < len(prompt) + count:
            start = 0 if len(ids) == len(prompt) else len(ids) - 1
            step = self.inputs([(ids, start, len(ids) - start)], [table], [])
            step.rows = np.array([len(step.ids) - 1], np.int32)
            step.sampling = rows(1, position=len(ids))
            ids.append(int(self.launch(step).result().ids[0]))
        return ids[len(prompt) :]

    def close(self) -> None:
        self.device.close()


def setup(
    slot: int,
    *,
    prompt: Sequence[int] = (),
    generated: Sequence[int] = (),
    bias: dict[int, float] | None = None,
    stop_ids: Sequence[int] = (),
    counts: bool = False,
) -> SlotSetup:
    bias = bias or {}
    return SlotSetup(
        slot=slot,
        prompt=np.array(prompt, np.int32),
        generated=np.array(generated, np.int32),
        bias_ids=np.array(list(bias), np.int32),
        bias=np.array(list(bias.values()), np.float32),
        stop_ids=np.array(stop_ids, np.int32),
        counts=counts,
    )


__all__ = ["Rig", "StepOutput", "rows", "setup"]
