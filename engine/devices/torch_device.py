"""What torch devices with a stream of their own (npu, cuda) share: the way of a step from host arrays to ids and back.

`launch` queues a whole step on the device's stream and returns; nothing in it waits for the device. Host arrays are gathered in
pinned memory and go over in one copy, always to the same place; what the step answers comes back in one copy, behind which
an event is recorded. `result` waits for that event alone, so the steps launched after it run on meanwhile. The ids stay on
the device besides, where the next step finds them.

Host time is the only thing a step may cost here: values that operators give are named by cells and never copied.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from engine.devices import ALONE, Form, Forward, Logprobs, Rank, StepInputs, StepOutput, StepView
from engine.devices.kv_pool import DevicePool
from engine.devices.torch_sampler import Asked, Sampler, in_order, measure, spread
from engine.models import WeightPart
from engine.models.rope import Table
from engine.native import load
from engine.types import KVLayout, OutOfMemory

# Sequences of a captured decode step. Between two of them at most a third of the rows is padding.
BUCKETS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
# Steps on their way at once: the core loop has two, the third is a frame that nobody has to wait for.
FRAMES = 3
ALIGN = 64  # bytes: where an array may begin
SETUP_BYTES = 64 << 10  # room for a step's sampling columns besides those that grow with its rows
ANSWER_WORDS = 1 << 14  # 32-bit words that a step may answer before its pinned memory has to grow
# Packed weights that go over in one copy, if they lie side by side, and so what loading takes of the device beside them. Some
# 10 ms over PCIe 4, against which starting a copy is nothing.
WINDOW_BYTES = 256 << 20
STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
# DLPack's numbers: of devices, and (kind, bits) of types.
DLPACK_DEVICES = {"cpu": 1, "cuda": 2, "npu": 12}
DLPACK_TYPES = {torch.float32: (2, 32), torch.float16: (2, 16), torch.bfloat16: (4, 16), torch.int8: (0, 8), torch.uint8: (1, 8)}


new_capsule = ctypes.pythonapi.PyCapsule_New
new_capsule.restype, new_capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Cell:
    """A buffer as models see it: a name for the newest value that an operator gave it."""

    __slots__ = ("parts", "value")

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self.parts: tuple[Tensor, Tensor, Tensor] | None = None  # q, k and v of a packed value, once they are apart

    def set(self, value: Tensor) -> None:
        self.value, self.parts = value, None


class Share(Cell):
    """What one rank gives of a buffer: columns."""

    __slots__ = ("widths",)

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.widths = widths  # of each rank's


class Frame:
    """What one launched step needs of its own: pinned memory for what goes in and what comes out, and the event at its end."""

    def __init__(self, device: StreamDevice, nbytes: int):
        self.device = device
        self.sent = torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.pinned)
        self.host = self.sent.numpy()
        self.answers = torch.empty(ANSWER_WORDS, dtype=torch.int32, pin_memory=device.pinned)
        self.event = device.api.Event()
        self.used = 0
        self.kept: list[Tensor] = []  # arrays that found no room, until the step is over
        self.launched: Launched | None = None

    def begin(self) -> None:
        """Take a step on; the one before it in this frame is over, unless more were launched ahead than there are frames."""
        if self.launched is not None:
            self.launched.collect()
        self.launched = Launched(self)
        self.used = 0
        self.kept.clear()

    def add(self, array: np.ndarray) -> Tensor:
        """`array` as the device will see it once `send` was called."""
        array = np.ascontiguousarray(array)
        begin, nbytes = self.used, array.nbytes
        if begin + nbytes > len(self.host):
            return self.add_apart(array)
        self.used = -(-(begin + nbytes) // ALIGN) * ALIGN
        self.host[begin : begin + nbytes] = array.reshape(-1).view(np.uint8)
        dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        return self.device.inlet[begin : begin + nbytes].view(dtype).view(array.shape)

    def add_apart(self, array: np.ndarray) -> Tensor:
        """An array too long for the common copy (a prompt that penalties count, the mask of a long chunk)."""
        pinned = torch.from_numpy(array)
        if self.device.pinned:
            pinned = pinned.pin_memory()
        self.kept.append(pinned)
        return pinned.to(self.device.where, non_blocking=True)

    def send(self) -> None:
        self.device.inlet[: self.used].copy_(self.sent[: self.used], non_blocking=True)

    def receive(self, tensors: Sequence[Tensor]) -> None:
        """Have `tensors`, of 4-byte values, copied back, and mark the step's end."""
        flat = [t.reshape(-1).view(torch.int32) for t in tensors]
        answer = flat[0] if len(flat) == 1 else torch.cat(flat) if flat else None
        if answer is not None and len(answer):
            if len(answer) > len(self.answers):
                self.answers = torch.empty(len(answer), dtype=torch.int32, pin_memory=self.device.pinned)
            self.answers[: len(answer)].copy_(answer, non_blocking=True)
        self.event.record()


@dataclass(slots=True)
class Launched:
    """A step on the device's stream."""

    frame: Frame
    shapes: list[tuple[tuple[int, ...], type]] = field(default_factory=list)  # of what it answers
    rows: int = 0  # sampled
    logprob_rows: np.ndarray | None = None
    scores: bool = False
    output: StepOutput | None = None
    error: Exception | None = None
    layers: list[Any] = field(default_factory=list)  # events behind each layer's K and V, where somebody may wait for them

    def result(self) -> StepOutput:
        self.collect()
        if self.error is not None:
            raise self.error
        assert self.output is not None
        return self.output

    def wait_layer(self, layer: int) -> None:
        if self.output is None and self.error is None:  # else it is over, and the frame another step's
            device = self.frame.device
            device.api.set_device(device.where)  # this thread may not have used it yet
            (self.layers[layer] if self.layers else self.frame.event).synchronize()
        if self.error is not None:
            raise self.error

    def collect(self) -> None:
        """Wait for the step, without the interpreter lock, and copy its answers."""
        if self.output is not None or self.error is not None:
            return
        try:
            self.frame.event.synchronize()
        except Exception as e:  # what an operator met comes out where the device is waited for
            self.error = e
            return
        words = self.frame.answers.numpy()
        parts, at = [], 0
        for shape, dtype in self.shapes:
            size = int(np.prod(shape))
            parts.append(words[at : at + size].view(dtype).reshape(shape).copy())
            at += size
        self.output = StepOutput(np.empty(0, np.int32))
        if self.rows:
            self.output.ids = parts.pop(0)
        if self.logprob_rows is not None:
            found = in_order(*parts[:4])
            self.output.logprobs = self.spread(found)
            del parts[:4]
        if self.scores:
            self.output.scores = in_order(*parts)

    def spread(self, found: Logprobs) -> Logprobs:
        assert self.logprob_rows is not None
        return found if len(self.logprob_rows) == self.rows else spread(found, self.logprob_rows, self.rows)


class StreamDevice:
    """The steps of a device. What a device adds: memory, operators, `describe` where attention wants more than `StepView` says,
    and `compute` where steps are captured. `api` is `torch.npu` or `torch.cuda`."""

    name: str
    block_size: int

    def __init__(self, api: Any, where: torch.device, dtype: torch.dtype, wide: torch.dtype):
        self.api = api
        self.where = where
        self.pinned = where.type != "cpu"  # host memory that a copy engine can read
        self.dtype = dtype
        self.wide = wide  # of sums that must be finer than float32, where there is one
        self.cells: dict[str, Cell] = {}
        self.turns: dict[int, Any] = {}  # this step's rows of each rope table
        self.rank = ALONE
        self.frames: deque[Frame] = deque()
        self.cache: SlabKVCache | None = None
        self.layers: list[Any] | None = None  # `Launched.layers` of the step being launched, where that is wanted

    def configure(self, *, vocab: int, slots: int, tokens: int) -> None:
        self.sampler = Sampler(vocab, slots, self.where, self.wide)
        # ids, feed, positions, kv_slots and rows; the block tables and sampling columns of as many sequences as run at once.
        # Arrays that find no room go over by themselves.
        nbytes = 5 * (4 * tokens + ALIGN) + slots * (4 * self.table_width() + 256) + SETUP_BYTES
        self.inlet = torch.zeros(nbytes, dtype=torch.uint8, device=self.where)
        self.frames = deque(Frame(self, nbytes) for _ in range(FRAMES))

    # ---- weights ----------------------------------------------------------------------------------------------------
    @property
    def memory(self) -> str:
        return self.name if self.where.type != "cpu" else "cpu"

    @property
    def index(self) -> int:
        return self.where.index or 0

    def several(self) -> bool:
        return self.api.device_count() > 1

    def forms(self, part: WeightPart) -> list[Form]:
        raise NotImplementedError

    def converted(self, part: WeightPart, raw: Tensor) -> list[Tensor]:
        """The tensors of a packed weight's `forms`; `raw`: its bytes, on the device."""
        raise NotImplementedError

    def assembled(self, forms: Sequence[Form], tensors: Sequence[Tensor]) -> Any:
        (tensor,) = tensors
        return tensor

    def weight(self, parts: Sequence[WeightPart]) -> Any:
        """A packed weight by itself, in memory of torch's: for looking at operators. A TE's lie in slabs."""
        (part,) = parts  # row-major weights are of one dtype
        return self.assembled(self.forms(part), self.converted(part, over(part.data, torch.uint8).to(self.where)))

    def fill(self, parts: Sequence[WeightPart], places: Sequence[Sequence[int]]) -> None:
        with told_of_memory(f"--model: its weights don't fit the {self.name}'s memory; use a smaller model", "model"):
            for window in windows(parts):
                host = spanning(parts[window])
                raw, begin = host.to(self.where), host.data_ptr()
                for part, addresses in zip(parts[window], places[window], strict=True):
                    at = address_of(part.data) - begin
                    made = self.converted(part, raw[at : at + len(part.data)])
                    for tensor, form, address in zip(made, self.forms(part), addresses, strict=True):
                        self.tensor_at(address, torch.uint8, form.nbytes).copy_(self.bytes_of(tensor, form))
        self.api.synchronize()
        self.api.empty_cache()  # what it took is the KV cache's

    def bytes_of(self, tensor: Tensor, form: Form) -> Tensor:
        return tensor.contiguous().view(-1).view(torch.uint8)

    def over(self, form: Form, address: int) -> Tensor:
        dtype = STORED[form.dtype]
        return self.tensor_at(address, dtype, form.nbytes // dtype.itemsize).view(form.shape)

    def tensor_at(self, address: int, dtype: torch.dtype, count: int) -> Tensor:
        """A flat tensor over memory of the device that torch knows nothing of, and which must outlive it."""
        made = load().dlpack(address, DLPACK_DEVICES[self.where.type], self.index, *DLPACK_TYPES[dtype], count)
        return from_dlpack(new_capsule(made, b"dltensor", None))

    def constant(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self.where)

    def rope_table(self, table: Table) -> Tensor:
        return self.constant(table.rows(0, table.length))

    def table_width(self) -> int:
        """Entries of a block table that `configure` has room for in the common copy."""
        return 256

    def buffer(self, name: str, rows: int, width: int) -> Cell:
        return self.cells.setdefault(name, Cell())

    def join(self, rank: Rank, backend: str) -> None:
        """Compute as one of several ranks, each on a device of its own; `backend`: which collectives they have. Returns when all
        have come."""
        store = dist.FileStore(f"/proc/self/fd/{rank.memory}", rank.count)
        dist.init_process_group(backend, store=store, rank=rank.index, world_size=rank.count)
        self.rank = rank

    def free_bytes(self) -> int:
        """Bytes of the device's memory that nobody has; of several ranks' devices, of that with the least."""
        free = self.api.mem_get_info(self.where)[0]
        if self.rank.count > 1:
            least = torch.tensor([free], device=self.where)
            dist.all_reduce(least, dist.ReduceOp.MIN)
            free = int(least)
        return free

    def close(self) -> None:
        """Wait for launched steps."""
        for frame in self.frames:
            if frame.launched is not None:
                frame.launched.collect()

    # ---- a step -----------------------------------------------------------------------------------------------------
    @torch.inference_mode()
    def launch(self, forward: Forward, step: StepInputs) -> Launched:
        frame = self.frames[0]
        self.frames.rotate(-1)
        frame.begin()
        launched = frame.launched
        assert launched is not None
        try:
            self.run(forward, step, frame, launched)
        except Exception as e:
            launched.error = e
        return launched

    def run(self, forward: Forward, step: StepInputs, frame: Frame, launched: Launched) -> None:
        """Queue one step from ids to ids."""
        self.turns.clear()
        sampling = step.sampling
        described = self.describe(step, frame)
        asked = self.sampler.ask(sampling, frame.add, step.setups)
        with_logprobs = np.flatnonzero(sampling.logprobs >= 0)
        logprob_rows = frame.add(with_logprobs) if len(with_logprobs) else None
        score_ids = frame.add(step.score_ids.astype(np.int64)) if len(step.score_ids) else None
        frame.send()
        # Decodes are never carried while they are computed, and nothing is where nobody has been shown the cache.
        followed = len(step.ids) > len(step.kv_len) and self.cache is not None and self.cache.shown
        self.layers = launched.layers if followed else None
        logits = self.compute(forward, described)
        count = launched.rows = len(sampling.slot)
        answers: list[Tensor] = []
        ids = self.sample(logits[:count], asked)
        if count:
            answers.append(ids.int())
        if logprob_rows is not None:
            launched.logprob_rows = with_logprobs
            some = torch.index_select(logits, 0, logprob_rows)
            answers += measure(some, torch.index_select(ids, 0, logprob_rows), int(sampling.logprobs.max()))
        if score_ids is not None:
            launched.scores = True
            answers += measure(logits[count : count + len(step.score_ids)], score_ids, step.score_top)
        launched.shapes = [(tuple(t.shape), np.float32 if t.dtype == torch.float32 else np.int32) for t in answers]
        frame.receive(answers)

    def sample(self, logits: Tensor, asked: Asked) -> Tensor:
        if asked.rows:
            return self.sampler.choose(logits, asked)
        self.sampler.fill(asked.counts)
        return torch.empty(0, dtype=torch.int64, device=self.where)

    def describe(self, step: StepInputs, frame: Frame) -> Any:
        """The step's inputs on their way to the device: (ids, feed, the rest as a StepView). Nothing may be computed here: the
        copy is not under way yet."""
        ids, feed = frame.add(step.ids), frame.add(step.feed)
        view = StepView(
            tokens=len(step.ids),
            sampled=len(step.rows),
            ids=None,
            positions=frame.add(step.positions),
            kv_slots=frame.add(step.kv_slots),
            rows=frame.add(step.rows),
            attention=self.paging(step, frame),
        )
        return ids, feed, view

    def paging(self, step: StepInputs, frame: Frame) -> Any:
        """The device's own form of q_start, kv_len and block tables."""
        raise NotImplementedError

    def compute(self, forward: Forward, described: Any) -> Tensor:
        """Logits of a described step, operator by operator."""
        ids, feed, view = described
        view.ids = self.sampler.resolve(ids, feed)
        return forward(self, view).value

    def stored(self) -> None:
        """Called by a device behind the operator that writes a layer's keys and values."""
        if self.layers is not None:
            event = self.api.Event()
            event.record()
            self.layers.append(event)

    # ---- operators that plain torch has -----------------------------------------------------------------------------
    def embed(self, out: Cell, table: Tensor, ids: Tensor) -> None:
        out.set(torch.index_select(table, 0, ids))

    def take_rows(self, out: Cell, x: Cell, rows: Tensor) -> None:
        out.set(torch.index_select(x.value, 0, rows))

    def shard(self, out: Cell, bounds: Sequence[int]) -> Cell:
        return out if self.rank.count == 1 else Share([last - first for first, last in pairwise(bounds)])

    def all_gather(self, out: Cell, shard: Cell) -> None:
        if not isinstance(shard, Share):
            return
        own, widths = shard.value, shard.widths
        rows, most = own.shape[0], max(widths)  # collectives want equal parts
        every = own.new_empty((len(widths) * rows, most))
        if rows:
            dist.all_gather_into_tensor(every, F.pad(own, (0, most - own.shape[1])).contiguous())
        parts = every.view(len(widths), rows, most)
        out.set(torch.cat([part[:, :width] for part, width in zip(parts, widths, strict=True)], dim=1))

    def heads(self, qkv: Cell, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of packed rows, each contiguous: [T, heads, head_dim]."""
        if qkv.parts is None:
            packed = qkv.value
            dim = packed.shape[1] // (heads + 2 * kv_heads)
            parts = packed.split([heads * dim, kv_heads * dim, kv_heads * dim], dim=1)
            q, k, v = (p.contiguous().view(-1, p.shape[1] // dim, dim) for p in parts)
            qkv.parts = q, k, v
        return qkv.parts


def over(data: memoryview, dtype: torch.dtype) -> Tensor:
    """A flat tensor over host memory, which it keeps alive. Read-only memory too: torch would warn, and we never write to
    weights."""
    address = np.frombuffer(data, np.uint8).ctypes.data
    memory = (ctypes.c_char * data.nbytes).from_address(address)
    memory.owner = data
    return torch.frombuffer(memory, dtype=dtype)


def address_of(data: memoryview) -> int:
    return np.frombuffer(data, np.uint8).ctypes.data


def windows(parts: Sequence[WeightPart]) -> Iterator[slice]:
    """Runs of parts that lie one behind the other in host memory, of at most `WINDOW_BYTES` unless one alone is longer."""
    first, begin, end = 0, 0, 0
    for i, part in enumerate(parts):
        at = address_of(part.data)
        if i == first or at < end or at - end >= ALIGN or (at - begin) % ALIGN or at + len(part.data) - begin > WINDOW_BYTES:
            if i > first:
                yield slice(first, i)
            first, begin = i, at
        end = at + len(part.data)
    if parts:
        yield slice(first, len(parts))


def spanning(parts: Sequence[WeightPart]) -> Tensor:
    """The bytes from the first part's first to the last one's last, as a tensor over them, which keeps them alive."""
    begin = address_of(parts[0].data)
    memory = (ctypes.c_char * (address_of(parts[-1].data) + len(parts[-1].data) - begin)).from_address(begin)
    memory.owner = [part.data for part in parts]
    return torch.frombuffer(memory, dtype=torch.uint8)


def rows_layout(shape: tuple[int, ...], dtype: torch.dtype, blocks: int) -> KVLayout:
    """Of keys and values in rows, [layers, 2, blocks, block_size, kv_heads, head_dim], of which sequences use the first `blocks`.
    Tokens come before heads, so a block's heads can't be told apart: one head, of all bytes."""
    layers, parts, held, block_size, kv_heads, head_dim = shape
    block = block_size * kv_heads * head_dim * dtype.itemsize  # K or V of one layer
    return KVLayout(
        format=f"rows-{dtype}-{kv_heads}-{head_dim}".replace("torch.", ""),
        layers=layers,
        layer_stride=parts * held * block,
        parts=parts,
        part_stride=held * block,
        units=blocks,
        unit_stride=block,
        unit_tokens=block_size,
        heads=1,
        head_bytes=block,
    )


class SlabKVCache:
    """K and V of every layer in one slab: [layers, 2, blocks, block_size, kv_heads, head_dim]. Behind the blocks that sequences
    use lie some that are nobody's: padding writes there."""

    def __init__(self, slab: Tensor, blocks: int, pool: DevicePool | None):
        """`pool`: the slab's memory as other processes may reach it; None where it is only a part of the TE's cache."""
        self.slab = slab
        self.pool = pool
        self.layout = None if pool is None else rows_layout(tuple(slab.shape), slab.dtype, blocks)
        self.blocks = blocks
        self.block_size = slab.shape[3]
        self.block_bytes = 2 * slab[0, 0, 0].numel() * slab.element_size()  # K and V of one block in one layer
        self.nbytes = slab.numel() * slab.element_size()
        self.layers = [(keys, values) for keys, values in slab]

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        return self.layers[index]

    @property
    def shown(self) -> bool:
        """Other processes have been told where it is."""
        return self.pool is not None and self.pool.exported is not None

    def commit(self, blocks: int) -> None:
        """All of it is there from the start."""


@contextlib.contextmanager
def told_of_memory(message: str, param: str) -> Iterator[None]:
    """Out of memory on the device becomes `OutOfMemory` with `message`."""
    try:
        yield
    except RuntimeError as e:  # torch's own OutOfMemoryError is one
        if "out of memory" not in str(e).lower():
            raise
        raise OutOfMemory(message, param) from None


# ---- decode steps that are captured ---------------------------------------------------------------------------------


def decode_shape(step: StepInputs, widths: Sequence[int]) -> tuple[int, int] | None:
    """(sequences, width of the block tables) that a decode step, one token a sequence, is padded to: the next of `BUCKETS` and
    of `widths`; None for any other step."""
    rows, width = step.blocks.shape
    if len(step.ids) != rows or len(step.rows) > rows or rows > BUCKETS[-1] or width > widths[-1]:
        return None
    return next(b for b in BUCKETS if b >= rows), next(w for w in widths if w >= width)


def common_bytes(shape: tuple[int, int]) -> int:
    """What a padded decode step takes in the common copy at most. A captured one must fit: its inputs must lie where they will
    lie at each replay."""
    rows, width = shape
    return 4 * rows * (width + 6) + 7 * ALIGN


def padded(step: StepInputs, shape: tuple[int, int], spare: int, slots: np.ndarray) -> StepInputs:
    """A decode step with more sequences of one token that nobody looks at: they see block `spare`, nobody's, and write to `slots`
    (int32, as many as are missing). Entries of tables past a sequence's end become blocks that are there."""
    rows = shape[0]

    def pad(array: np.ndarray, fill: int) -> np.ndarray:
        return np.concatenate([array, np.full(rows - len(array), fill, np.int32)])

    blocks = np.full(shape, spare, np.int32)
    blocks[: len(step.blocks), : step.blocks.shape[1]] = np.clip(step.blocks, 0, spare)
    return StepInputs(
        ids=pad(step.ids, 0),
        feed=pad(step.feed, -1),
        positions=pad(step.positions, 0),
        kv_slots=np.concatenate([step.kv_slots, slots]),
        q_start=np.arange(rows + 1, dtype=np.int32),
        kv_len=pad(step.kv_len, 1),
        blocks=blocks,
        rows=pad(step.rows, 0),
        sampling=step.sampling,
        score_ids=step.score_ids,
    )
