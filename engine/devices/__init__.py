"""The device protocol: everything that differs between cpu, npu and cuda, and nothing else.

Models are written once on top of it. They see opaque tensors, name every output, and never do arithmetic on a row count:
a device may run the operators at once (torch) or record them as a program and replay it (compiled CPU, captured graphs).
A device runs steps in the order they are launched; `launch` returns at once, and the token ids a step samples stay on the
device, where the next step finds them (`StepInputs.feed`), so that planning never waits for sampling.

This module imports no torch; only the files beside it do.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from engine.devices import ascend
from engine.devices.kv_pool import DevicePool, KVPool
from engine.models import WeightPart
from engine.models.rope import Table
from engine.native import cpu
from engine.types import KVLayout, Memory, UserError, WeightFormat

# An installed torch-npu would be imported by `import torch`, which fails where there is no CANN: --device npu imports it itself.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

Tensor = Any  # opaque outside this folder
Rows = Any  # opaque row count of a step: `StepView.tokens` or `StepView.sampled`


@dataclass(slots=True, frozen=True)
class Rank:
    """Which of a TE's ranks this process is, and the memory that they share."""

    index: int
    count: int
    memory: int  # a memfd, empty at first and never shortened; -1: there is none
    pool: int  # a memfd for the KV cache of all of them


ALONE = Rank(0, 1, -1, -1)


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

    def wait_layer(self, layer: int) -> None:
        """From one other thread: wait until the step's keys and values of a layer are in the cache, or as much longer as the
        device can tell only the end of a step."""
        ...


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
    pool: KVPool | DevicePool | None  # what other processes can reach; None where it lies on the devices of several ranks
    layout: KVLayout | None  # ... and how it lies there

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """(K, V) of one layer: [blocks, block_size, kv_heads, head_dim]."""
        ...

    def commit(self, blocks: int) -> None:
        """Have memory for the first so many blocks now, where it would else come page by page in the middle of a step."""
        ...


Forward = Callable[["Device", StepView], Tensor]  # -> logits [sampled, vocabulary]


class Device(Protocol):
    name: str
    block_size: int  # tokens a KV block holds unless the Config says otherwise

    # ---- memory -----------------------------------------------------------------------------------------------------
    def weight(self, parts: Sequence[WeightPart]) -> Tensor:
        """A packed weight as the device reads it; on cpu a view of the parts' data, which must outlive it."""
        ...

    def rope_table(self, table: Table) -> Tensor:
        """What `rope_store` reads; on the compiled kernels its rows come when a step first needs them."""
        ...

    def kv_cache(
        self, layers: int, blocks: int, block_size: int, kv_heads: int, head_dim: int, lender: Memory | None = None
    ) -> KVCache:
        """`lender`: the pool of another TE on the same device, to be used instead of an own one. On cpu memory is committed when
        first written. Raises `OutOfMemory`."""
        ...

    def free_bytes(self) -> int:
        """Of the device's own memory; asked only where it has some (`Kind.own_memory`)."""
        ...

    def configure(self, *, vocab: int, slots: int, tokens: int) -> None:
        """Sizes the sampling state and the scratch (`tokens`: the most a step has): once, before the first launch."""
        ...

    # ---- execution --------------------------------------------------------------------------------------------------
    def set_share(self, percent: int) -> None:
        """Compute with at most `percent` (10 to 100) of the device from now on, beside who has the rest. Results don't change by
        more than the device's tolerance, on the compiled kernels not at all. Raises `UserError` where a process can't be given
        such a share, or no other than it started with."""
        ...

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

    # ---- ranks ------------------------------------------------------------------------------------------------------
    def shard(self, out: Tensor, bounds: Sequence[int]) -> Tensor:
        """What this rank writes of the buffer `out`: columns bounds[r] to bounds[r + 1] are rank r's. Alone: `out` itself."""
        ...

    def all_gather(self, out: Tensor, shard: Tensor) -> None:
        """`out` whole on every rank, once each has written its `shard`: side by side in rank order, so that no sum changes."""
        ...


class Form(NamedTuple):
    """A tensor that a device makes of a packed weight, as it lies in the device's memory."""

    kind: str  # the spec's; or "scale" or "scale16", of a matrix in int8
    dtype: str
    shape: tuple[int, ...]
    format: WeightFormat
    nbytes: int


class SlabDevice(Protocol):
    """What a device with memory of its own adds, so that its weights lie in slabs that other processes can open
    (engine/weight_slabs.py). Addresses are this process's."""

    memory: str  # its kind to engine/native/ipc.py
    index: int

    def several(self) -> bool:
        """Whether this process sees other devices of its kind."""
        ...

    def forms(self, part: WeightPart) -> list[Form]:
        """What becomes of a packed weight."""
        ...

    def fill(self, parts: Sequence[WeightPart], places: Sequence[Sequence[int]]) -> None:
        """Copy packed weights here and put each one's `forms` to their places. All of it is there when this returns."""
        ...

    def over(self, form: Form, address: int) -> Tensor:
        """A tensor over memory that holds it."""
        ...

    def assembled(self, forms: Sequence[Form], tensors: Sequence[Tensor]) -> Tensor:
        """A weight as `Device.weight` gives it, of the tensors of its forms."""
        ...


# ---- what is known of a device before it is opened ------------------------------------------------------------------
# Control process and keeper ask here: they import no torch and touch no device.


@dataclass(frozen=True, slots=True)
class Kind:
    """What the rest of the engine must know of a device, without its libraries."""

    name: str
    dtypes: tuple[str, ...]
    block_size: int
    # Where the KV cache lies: in this machine's memory, which `capacity.resolve` divides, or in memory of the device's own, of
    # which only the TE that opens it can tell how much is free.
    own_memory: bool
    step_tokens: int  # of a step, where nothing else is asked for
    why_step_tokens: str
    block_multiple: int = 1  # what the device's attention can read; with panels their own rule goes beside it
    largest_block: int = 1024


KINDS = {
    # Blocks of 16: small enough to share short prefixes. Matrix products are as efficient with 256 rows as with more, and a
    # step of so many takes some 90 ms for the default model on two cores, which is what a decode waits for when prompts come in.
    "cpu": Kind("cpu", ("float32", "bfloat16"), 16, False, 256, "a short step on cpu"),
    # The fused attention wants blocks of 128 to 512 tokens in steps of 128. 2048 rows fill the matrix units.
    "npu": Kind("npu", ("bfloat16", "float16", "float32"), 128, True, 2048, "a step that fills an npu", 128, 512),
    "cuda": Kind("cuda", ("bfloat16", "float16", "float32"), 16, True, 2048, "a step that fills a gpu"),
}


def kind(name: str) -> Kind:
    """Raises `UserError` for a device that isn't of this build."""
    if name not in KINDS:
        raise UserError(f"--device {name}: not a device of this build; use {' or '.join(KINDS)}", "device")
    return KINDS[name]


def choose(name: str) -> tuple[str, str]:
    """The device that --device `name` means here, and why where it was "auto"."""
    if name != "auto":
        return kind(name).name, ""
    lacking = ascend.lacking()
    if not lacking:
        return "npu", "an Ascend NPU with CANN and torch-npu"
    return "cpu", f"an Ascend driver is there, but {lacking[0]}" if ascend.driver() else "no accelerator found"


def auto_dtype(name: str, compiled: bool) -> tuple[str, str]:
    """What --dtype auto means, and why; `compiled`: this machine has the compiled CPU kernels."""
    if name == "npu":
        return "bfloat16", "the matrix units' own precision"
    if name == "cuda":
        return "bfloat16", "the tensor cores' own precision"
    if compiled:
        return "bfloat16", "the compiled kernels' precision on cpu"
    return "float32", "the reference operators' precision on cpu"


def weight_format(name: str, dtype: str, compiled: bool) -> WeightFormat:
    """How weights are packed for a device."""
    return "panels" if name == "cpu" and dtype == "bfloat16" and compiled else "rows"


def int8_needs(name: str, dtype: str, compiled: bool) -> str:
    """What --quantization int8 needs that isn't there; "" for nothing."""
    if name == "npu":
        return "16-bit activations on npu; use --dtype bfloat16 or float16" if dtype == "float32" else ""
    if name == "cuda":
        return "the compiled cpu kernels or an npu: leave it out on cuda"
    if weight_format(name, dtype, compiled) == "panels":
        return ""
    return compiled_needs(dtype, compiled)


def compiled_needs(dtype: str, compiled: bool) -> str:
    lacks = f"--dtype {dtype}" if compiled else "this machine's reference operators"
    return f"the compiled cpu kernels with --dtype bfloat16; {lacks} can't: leave it out"


def kv_dtype_needs(name: str, dtype: str, kv_dtype: str, compiled: bool) -> str:
    """What --kv-cache-dtype needs that isn't there; "" for nothing."""
    if kv_dtype in ("auto", dtype) or (kv_dtype == "int8" and weight_format(name, dtype, compiled) == "panels"):
        return ""
    if kv_dtype != "int8":
        return f"--dtype {kv_dtype}: with --dtype {dtype} keys and values have that; leave it out"
    return compiled_needs(dtype, compiled) if name == "cpu" else f"the compiled cpu kernels: leave it out on {name}"


def tiers_need(name: str, dtype: str, compiled: bool) -> str:
    """What KV tiers beside the device's need that isn't there; "" for nothing."""
    if name != "cpu":
        return f"--device cpu so far: leave it out on {name}"
    return "" if weight_format(name, dtype, compiled) == "panels" else compiled_needs(dtype, compiled)


def ranks_need(name: str, dtype: str, compiled: bool) -> str:
    """What --tensor-parallel-size above 1 needs that isn't there; "" for nothing."""
    return compiled_needs(dtype, compiled) if name == "cpu" and weight_format(name, dtype, compiled) != "panels" else ""


def preload(name: str, weights: WeightFormat) -> None:
    """Import what `open_device` will need, touching no device and starting no thread: the keeper forks afterwards."""
    if weights == "panels":
        import engine.devices.cpu_native

        cpu.load()
    elif name == "npu":
        with contextlib.suppress(ImportError, OSError):  # `open_device` says what is missing
            import engine.devices.npu
    elif name == "cuda":
        import engine.devices.cuda
    else:
        import engine.devices.cpu  # noqa: F401


def touched() -> str:
    """The kind of accelerator that this process has used, or "". What a driver keeps of it does not survive a fork, and neither
    torch-npu nor CANN stops one."""
    torch = sys.modules.get("torch")
    apis = {name: getattr(torch, name, None) for name in ("npu", "cuda")}
    return next((name for name, api in apis.items() if api is not None and api.is_initialized()), "")


def open_device(
    name: str,
    dtype: str,
    threads: int,
    weights: WeightFormat = "rows",
    cores: Sequence[int] | None = None,
    index: int = 0,
    kv_dtype: str = "auto",
    rank: Rank = ALONE,
) -> Device:
    """The device called `name` that reads packed `weights`. `cores`: where the compiled kernels' threads are pinned; `index`:
    which one of an accelerator's devices, among those this process may see; `kv_dtype`: of the compiled kernels' KV cache, which
    `kv_dtype_needs` let through. Raises `UserError` for a device that isn't there."""
    kind(name)
    if weights == "panels":
        from engine.devices.cpu_native import NativeCpuDevice

        return NativeCpuDevice(threads, cores, kv_dtype, rank)
    if name == "npu":
        try:
            from engine.devices.npu import NpuDevice
        except (ImportError, OSError) as e:
            raise UserError(
                f"--device npu: torch-npu can't be loaded ({e}); `./run.sh doctor` says what is missing, or use --device cpu",
                "device",
            ) from None
        npu = NpuDevice(dtype, index)
        if rank.count > 1:
            npu.join(rank, "hccl")
        return npu
    if name == "cuda":
        from engine.devices.cuda import open_cuda

        cuda = open_cuda(dtype, index)
        if rank.count > 1:
            cuda.join(rank, "nccl")
        return cuda
    from engine.devices.cpu import CpuDevice

    return CpuDevice(dtype, threads)
