"""The device protocol: everything that differs between cpu, npu and cuda, and nothing else.

Models are written once on top of it. They see opaque tensors, name every output, and never do arithmetic on a row count:
a device may run the operators at once (torch) or record them as a program and replay it (compiled CPU, captured graphs).
A device runs steps in the order they are launched; `launch` returns at once, and the token ids a step samples stay on the
device, where the next step finds them (`StepInputs.feed`), so that planning never waits for sampling.

This module imports no torch; only the files beside it do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from engine.models import WeightPart
from engine.types import UserError, WeightFormat

Tensor = Any  # opaque outside this folder
Rows = Any  # opaque row count of a step: `StepView.tokens` or `StepView.sampled`


@dataclass(slots=True)
class SlotSetup:
    """What sampling must remember about the sequence that now owns a slot. Sent once, with the first step that samples
    for the sequence, and only where it asks for something that plain columns can't say."""

    slot: int
    prompt: np.ndarray  # int32 ids; repetition_penalty counts them
    generated: np.ndarray  # int32 ids; every penalty counts them
    bias_ids: np.ndarray  # int32
    bias: np.ndarray  # float32, added to the logits
    stop_ids: np.ndarray  # int32: masked while `SamplingRows.hold_stop` is set
    counts: bool  # whether penalties need token counts kept


@dataclass(slots=True)
class SamplingRows:
    """How each sampled row chooses its token: columns of length R."""

    slot: np.ndarray  # int32: the sequence's slot; its last id is kept there for `feed`
    position: np.ndarray  # int64: position the sampled token will have; with `seed` it fixes the noise
    seed: np.ndarray  # uint64
    temperature: np.ndarray  # float32; 0: greedy
    top_k: np.ndarray  # int32; 0: all
    top_p: np.ndarray  # float32
    min_p: np.ndarray  # float32
    presence: np.ndarray  # float32
    frequency: np.ndarray  # float32
    repetition: np.ndarray  # float32
    hold_stop: np.ndarray  # bool: min_tokens is not reached, mask the slot's stop_ids
    has_setup: np.ndarray  # bool: the slot has a SlotSetup (penalties, bias or stop ids)
    logprobs: np.ndarray  # int32: -1 none, else how many of the likeliest beside the chosen one


@dataclass(slots=True)
class StepInputs:
    """One step as host arrays: T tokens of S sequences, R sampled rows, P scored rows (prompt log-probabilities)."""

    ids: np.ndarray  # int32 [T]; ignored where feed >= 0
    feed: np.ndarray  # int32 [T]: slot whose last sampled id is this input, or -1
    positions: np.ndarray  # int32 [T]
    kv_slots: np.ndarray  # int32 [T]: block * block_size + offset where this token's K and V go
    q_start: np.ndarray  # int32 [S + 1]: sequence s has tokens q_start[s] to q_start[s + 1]
    kv_len: np.ndarray  # int32 [S]: tokens in the cache once this step has run
    blocks: np.ndarray  # int32 [S, B]: block tables; entries past kv_len are not read
    rows: np.ndarray  # int32 [R + P]: indices into T whose logits are wanted
    sampling: SamplingRows
    score_ids: np.ndarray  # int32 [P]: the token whose log-probability row R + i is asked
    score_top: int = 0  # how many of the likeliest, for scored rows
    setups: list[SlotSetup] = field(default_factory=list)


@dataclass(slots=True)
class Logprobs:
    """Natural logs of the raw distribution, before penalties, bias and temperature."""

    chosen: np.ndarray  # float32 [n]
    rank: np.ndarray  # int32 [n]; 1: no other token is likelier
    top_ids: np.ndarray  # int32 [n, K], likeliest first; K the largest asked in the step
    top: np.ndarray  # float32 [n, K]


@dataclass(slots=True)
class StepOutput:
    ids: np.ndarray  # int32 [R]
    logprobs: Logprobs | None = None  # [R], where any row asked
    scores: Logprobs | None = None  # [P]


class Pending(Protocol):
    """A launched step. `result` blocks, without holding the interpreter lock, until the step has run."""

    def result(self) -> StepOutput: ...


@dataclass(slots=True)
class StepView:
    """What a model's forward sees of a step: opaque tensors and row counts."""

    tokens: Rows
    sampled: Rows
    ids: Tensor
    positions: Tensor
    kv_slots: Tensor
    rows: Tensor
    attention: Any  # the device's own form of q_start, kv_len and block tables


class KVCache(Protocol):
    """Paged K and V of every layer, in one slab."""

    nbytes: int

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """(K, V) of one layer: [blocks, block_size, kv_heads, head_dim]."""
        ...


Forward = Callable[["Device", StepView], Tensor]  # -> logits [sampled, vocabulary]


class Device(Protocol):
    name: str
    block_size: int  # tokens a KV block holds unless the Config says otherwise

    # ---- memory -----------------------------------------------------------------------------------------------------
    def weight(self, parts: Sequence[WeightPart]) -> Tensor:
        """A packed weight as the device reads it; on cpu a view of the parts' data, which must outlive it."""
        ...

    def constant(self, array: np.ndarray) -> Tensor:
        """A small host array (a rope table) on the device, in its own dtype."""
        ...

    def kv_cache(self, layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int) -> KVCache:
        """Memory is committed when first written. Raises `OutOfMemory`."""
        ...

    def configure(self, *, vocab: int, slots: int, tokens: int) -> None:
        """Sizes the sampling state and the scratch (`tokens`: the most a step has): once, before the first launch."""
        ...

    # ---- execution --------------------------------------------------------------------------------------------------
    def launch(self, forward: Forward, step: StepInputs) -> Pending:
        """Queue one step: resolve `feed`, run `forward`, sample. Errors come out of the Pending."""
        ...

    def close(self) -> None: ...

    # ---- operators, called by models inside `forward`. `out` is written; shapes are [rows, width] ------------------------
    def buffer(self, name: str, rows: Rows, width: int) -> Tensor:
        """Scratch [rows, width] in the activation dtype; the same name is the same memory in every layer and step."""
        ...

    def embed(self, out: Tensor, table: Tensor, ids: Tensor) -> None: ...

    def rms_norm(self, out: Tensor, x: Tensor, weight: Tensor, eps: float) -> None: ...

    def add_rms_norm(self, out: Tensor, residual: Tensor, x: Tensor, weight: Tensor, eps: float) -> None:
        """residual += x, then out = rms_norm(residual)."""
        ...

    def linear(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, sensitive: bool = False) -> None:
        """out = x @ weight.T + bias; weight [N, K]. `sensitive`: what comes of it goes through an exponential, so a device that
        rounds x for quantised weights does it more finely here."""
        ...

    def head_norm(self, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, heads: int, kv_heads: int, eps: float) -> None:
        """RMS norm of each query and key head of the packed [q | k | v] rows, in place (Qwen3)."""
        ...

    def rope_store(
        self,
        qkv: Tensor,
        positions: Tensor,
        cos_sin: Tensor,
        kv: tuple[Tensor, Tensor],
        kv_slots: Tensor,
        heads: int,
        kv_heads: int,
    ) -> None:
        """Rotate q and k of [q | k | v] in place (halves convention, as in Hugging Face) and write k and v to the cache.

        cos_sin is float32 [positions, rotary_dim]: cos in the first half of each row, sin in the second."""
        ...

    def attention(
        self,
        out: Tensor,
        qkv: Tensor,
        kv: tuple[Tensor, Tensor],
        attention: Any,
        heads: int,
        kv_heads: int,
        scale: float,
        window: int,
    ) -> None:
        """Causal attention of this step's queries over the paged cache; window > 0: only the last `window` positions."""
        ...

    def swiglu(self, out: Tensor, gate_up: Tensor) -> None:
        """out = silu(first half of gate_up's columns) * second half."""
        ...

    def take_rows(self, out: Tensor, x: Tensor, rows: Tensor) -> None: ...


def open_device(
    name: str, dtype: str, threads: int, weights: WeightFormat = "rows", cores: Sequence[int] | None = None
) -> Device:
    """The device called `name` that reads packed `weights`; `cores`: where the compiled kernels' threads are pinned. Raises
    `UserError` for one that isn't there."""
    if name == "cpu" and weights == "panels":
        from engine.devices.cpu_native import NativeCpuDevice

        return NativeCpuDevice(threads, cores)
    if name == "cpu":
        from engine.devices.cpu import CpuDevice

        return CpuDevice(dtype, threads)
    raise UserError(f"--device {name}: not a device of this build; use cpu", "device")


def weight_format(name: str, dtype: str, compiled: bool) -> WeightFormat:
    """How weights are packed for a device; `compiled`: this machine has the compiled CPU kernels."""
    return "panels" if name == "cpu" and dtype == "bfloat16" and compiled else "rows"


def default_block_size(name: str) -> int:
    """The block size a device likes, known without importing its libraries. 16 tokens on cpu: small enough to share
    short prefixes."""
    return 16
