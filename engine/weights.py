"""Checkpoints on disk, and the packed slab that is made of one at load.

A checkpoint is memory-mapped safetensors or GGUF; both give the same Hugging Face names. `pack` lays the tensors a model asks for
into one slab (a memfd), which is what is shared, mapped and forked. Knows neither devices nor models: specs say what is wanted.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from engine.gguf import BLOCKS, GGUF, hf_config, hf_tensor_names, rope_heads
from engine.hub import is_gguf, model_config, read_json
from engine.models import PANEL_ROWS, WeightPart, WeightSpec
from engine.native import checksum, collapse_slab, map_slab
from engine.quants import CHUNK, dequantize
from engine.types import Packing, UserError, WeightFormat

log = logging.getLogger(__name__)

SLAB_ALIGN = 2 << 20  # a huge page, so that a slab can be made of them
TENSOR_ALIGN = 64  # a cache line, and the widest vector register
NUMPY_DTYPE: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(np.uint16),  # travels as its bits
    "float16": np.dtype(np.float16),
}
FLOAT16_MAX = np.float32(np.finfo(np.float16).max)  # what a larger bfloat16 becomes
SAFETENSORS_TYPES = FLOATS = ("F32", "F16", "BF16")
# In files, but of no use to anybody: rope tables that every implementation computes for itself.
NOT_WEIGHTS = ("rotary_emb.inv_freq",)


# ---- reading --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it lies in a file: `type` is GGML's or safetensors' name, `data` its bytes in a mapping."""

    type: str
    shape: tuple[int, ...]
    data: np.ndarray  # uint8
    rope_heads: int = 0  # heads whose rows a GGUF converter interleaved (see `hf_row_order`)


class Checkpoint:
    """The tensors and the configuration of one model on disk, under Hugging Face's names."""

    def __init__(self, path: Path, config: dict[str, Any], tensors: dict[str, Stored]):
        self.path = path
        self.config = config
        self.nbytes = sum(t.data.nbytes for t in tensors.values())
        self._tensors = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored(name).shape

    def dtype(self, name: str) -> str:
        """The stored type's name: F32, F16, BF16, or a GGML type."""
        return self._stored(name).type

    def _stored(self, name: str) -> Stored:
        if name not in self._tensors:
            raise UserError(f"{self.path}: has no tensor {name}; the model's config asks for it", "model")
        return self._tensors[name]

    def raw_rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows as the file stores them: uint8 [rows, bytes of a row], in Hugging Face's order."""
        stored = self._stored(name)
        data = stored.data.reshape(stored.shape[0], -1)
        if not stored.rope_heads:
            return data[first:last]
        return data[hf_row_order(stored.shape[0], stored.rope_heads)[first:last]]

    def read_into(self, name: str, out: np.ndarray, rows: slice | None = None) -> None:
        """Rows of a tensor, converted to `out`'s dtype: float32, float16, or uint16 for bfloat16's bits (rounded to nearest
        even)."""
        stored = self._stored(name)
        count = stored.shape[0]
        start, stop, step = (rows or slice(None)).indices(count)
        assert step == 1 and out.shape == (max(stop - start, 0), *stored.shape[1:]), (name, rows, out.shape)
        width = prod(stored.shape[1:])
        data = stored.data.reshape(count, -1)
        order = hf_row_order(count, stored.rope_heads) if stored.rope_heads else None
        flat = out.reshape(stop - start, width)
        many = max(1, CHUNK // width) if out.itemsize == 2 or order is not None else max(1, stop - start)
        for at in range(start, stop, many):
            to = min(at + many, stop)
            raw = data[at:to] if order is None else data[order[at:to]]
            convert(raw, stored.type, flat[at - start : to - start])


def convert(raw: np.ndarray, stored_type: str, out: np.ndarray) -> None:
    """Stored rows into float32, float16, or bfloat16's bits."""
    if out.dtype == np.float32:
        dequantize(raw, stored_type, out)
    elif out.dtype == np.float16:
        wide = np.empty(out.shape, np.float32)
        dequantize(raw, stored_type, wide)
        np.copyto(out, np.clip(wide, -FLOAT16_MAX, FLOAT16_MAX, out=wide), casting="same_kind")
    elif stored_type == "BF16":
        out.reshape(-1)[:] = raw.reshape(-1).view(np.uint16)
    else:
        values = np.empty(out.shape, np.float32)
        dequantize(raw, stored_type, values)
        round_to_bfloat16(values, out)


def round_to_bfloat16(values: np.ndarray, out: np.ndarray) -> None:
    """float32 -> bfloat16's bits, to nearest even; overwrites `values`."""
    nan = np.isnan(values)
    bits = values.view(np.uint32)
    # Adding just under half of the last kept bit, and one more where that bit is odd, carries exactly when rounding up.
    bits += ((bits >> 16) & 1) + np.uint32(0x7FFF)
    np.copyto(out, bits >> 16, casting="unsafe")
    if nan.any():
        out[nan] = 0x7FC0  # the carry would have turned some NaNs into infinities


def hf_row_order(rows: int, heads: int) -> np.ndarray:
    """For each row of Hugging Face's q or k, the row a GGUF file keeps it in.

    A head's rows are [first half | second half] there, and pairs of both halves one after another here.
    """
    return np.arange(rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The model in a folder (config.json and safetensors) or a GGUF file. Raises `UserError`."""
    path = Path(path)
    return open_gguf(path) if is_gguf(path) else open_folder(path)


def open_gguf(path: Path) -> Checkpoint:
    gguf = GGUF(path)
    config = hf_config(gguf)
    tensors = {}
    for name, theirs in hf_tensor_names(gguf).items():
        info = gguf.tensors[theirs]
        if len(info.shape) == 1 and BLOCKS[info.type][0] > 1:
            raise UserError(f"{path}: tensor {theirs} is a vector in {info.type}; F32, F16 or BF16 is expected")
        tensors[name] = Stored(info.type, info.shape, gguf.raw(theirs), rope_heads(gguf, theirs))
    return Checkpoint(path, config, tensors)


def open_folder(folder: Path) -> Checkpoint:
    config = model_config(folder)
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        hint = "take the unquantised model, or a GGUF file"
        raise UserError(f"{folder}: its weights are quantised by {method}, which can't be read; {hint}", "model")
    tensors = {}
    for file in weight_files(folder):
        tensors.update(read_safetensors(file))
    return Checkpoint(folder, config, tensors)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those of the index, or the only one."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.exists():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise UserError(f"{index}: has no weight_map; download it again", "model")
        files = [folder / name for name in sorted(set(names.values()))]
    elif single.exists():
        files = [single]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        other = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        found = f"only {other[0]}, which may run code when read: convert it to safetensors" if other else "no *.safetensors"
        raise UserError(f"{folder}: has {found}", "model")
    for file in files:
        if not file.exists():
            raise UserError(f"{file}: is named in {index.name} but missing; download the model again", "model")
    return files


def read_safetensors(path: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file, over a mapping of it. Raises `UserError`."""
    damaged = UserError(f"{path}: not a whole safetensors file; download it again", "model")
    try:
        with open(path, "rb") as file:
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}", "model") from None
    except ValueError:  # an empty file can't be mapped
        raise damaged from None
    if len(data) < 8:
        raise damaged
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    try:
        header = json.loads(data[8:start].tobytes())
        header.pop("__metadata__", None)
        entries = [(name, e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()]
    except (ValueError, TypeError, KeyError, AttributeError):
        raise damaged from None
    tensors = {}
    for name, dtype, shape, begin, end in entries:
        if name.endswith(NOT_WEIGHTS):
            continue
        if dtype not in SAFETENSORS_TYPES:
            kinds = ", ".join(SAFETENSORS_TYPES)
            raise UserError(f"{path}: tensor {name} is {dtype}, which can't be read; these can: {kinds}", "model")
        if end - begin != prod(shape) * BLOCKS[dtype][1] or begin < 0 or start + end > len(data):
            raise damaged
        tensors[name] = Stored(dtype, shape, data[start + begin : start + end])
    return tensors


# ---- packing --------------------------------------------------------------------------------------------------------


# GGML's types that have kernels of their own, and are packed without loss.
KEPT = {"Q4_0": "q4_0", "Q4_1": "q4_1", "Q8_0": "q8_0", "Q4_K": "q4_k", "Q6_K": "q6_k"}
SOME_BYTES = 1 << 20  # of a matrix packed at a time, so that what is read stays in cache
PROGRESS_SECONDS = 0.1  # between two reports: a person reads no faster


class Entry(msgspec.Struct, frozen=True):
    """One packed tensor, or a part of one: entries of the same name are rows one under another."""

    name: str
    dtype: str  # float32 | bfloat16 | float16 | a quantised kind (of engine/native/cpu in panels, int8 in rows)
    shape: tuple[int, ...]
    format: WeightFormat
    slab: int
    offset: int
    nbytes: int
    checksum: int  # XXH64 of its bytes
    kind: str = "matrix"  # the spec's


class Manifest(msgspec.Struct, frozen=True):
    """What lies where in the slabs of one packed model."""

    entries: list[Entry]
    slabs: list[int]  # bytes of each
    nbytes: int  # of all slabs
    format: WeightFormat = "rows"  # of matrices


class Description(msgspec.Struct, frozen=True):
    """What a TE must know of packed weights besides their bytes. It lies in a memfd of its own beside the slabs, as msgpack."""

    config: dict[str, Any]  # the model's
    manifest: Manifest
    placed: Manifest | None = None  # of the slabs on the device of a TE that has one (engine/weight_slabs.py)


DESCRIPTION = msgspec.msgpack.Decoder(Description)  # made where TEs are forked from, since making it takes longer than using it


class Piece(NamedTuple):
    """An entry to be written: sources of one spec that are packed alike."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    format: WeightFormat
    offset: int
    nbytes: int
    kind: str  # the spec's


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


def packed_kind(stored: str, matrix: bool, packing: Packing) -> str:
    """What a tensor stored as `stored` becomes in panels; `matrix`: it is multiplied with, not only looked up."""
    if packing.quantization == "none":
        return packing.dtype
    if stored in KEPT:
        return KEPT[stored]
    if stored not in FLOATS or (matrix and packing.quantization == "int8"):
        return "int8"
    return packing.dtype


def packed_dtype(checkpoint: Checkpoint, spec: WeightSpec, packing: Packing, tied: bool, source: str) -> str:
    """What a source of a spec is packed as; `tied`: the embedding is the head's matrix too."""
    if spec.kind == "vector":
        return "float32"
    if packing.format == "rows":
        return "int8" if packing.quantization == "int8" and spec.kind == "matrix" else packing.dtype
    return packed_kind(checkpoint.dtype(source), spec.kind == "matrix" or tied, packing)


def layout(checkpoint: Checkpoint, specs: Sequence[WeightSpec], packing: Packing) -> list[Piece]:
    """What `pack` writes, in order. Raises `UserError` where the checkpoint doesn't fit the specs."""
    from engine.native import cpu

    tied = not any(source == "lm_head.weight" for spec in specs for source in spec.sources)
    offset = 0
    pieces: list[Piece] = []
    for spec in specs:
        check_present(checkpoint, spec)
        format: WeightFormat = "rows" if spec.kind == "vector" else packing.format
        for dtype, alike in groupby(spec.sources, partial(packed_dtype, checkpoint, spec, packing, tied)):
            sources = tuple(alike)
            shape = (sum(checkpoint.shape(source)[0] for source in sources), *spec.shape[1:])
            nbytes = cpu.packed_bytes(dtype, *shape) if format == "panels" else row_bytes(dtype, shape)
            pieces.append(Piece(spec.name, dtype, shape, sources, format, offset, nbytes, spec.kind))
            offset = round_up(offset + nbytes, TENSOR_ALIGN)
    return pieces


def row_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a row-major tensor; int8 has its rows' float32 scales behind it."""
    if dtype == "int8":
        return round_up(prod(shape), 4) + 4 * shape[0]
    return prod(shape) * NUMPY_DTYPE[dtype].itemsize


def slab_bytes(pieces: Sequence[Piece]) -> int:
    return round_up(max((p.offset + p.nbytes for p in pieces), default=0), SLAB_ALIGN)


def packed_size(checkpoint: Checkpoint, specs: Sequence[WeightSpec], packing: Packing) -> int:
    """Bytes of the slab that `pack` makes."""
    return slab_bytes(layout(checkpoint, specs, packing))


def pack(
    checkpoint: Checkpoint,
    specs: Sequence[WeightSpec],
    packing: Packing,
    fd: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Manifest:
    """Write the tensors of `specs` into the memfd `fd`. `progress` is told at times how many bytes of how many are there.
    Raises `UserError` where the checkpoint doesn't fit the specs."""
    pieces = layout(checkpoint, specs, packing)
    report_unused(checkpoint, specs)
    report_repacked(checkpoint, pieces)
    size = slab_bytes(pieces)
    os.ftruncate(fd, size)
    mapped = map_slab(fd, size, writable=True)
    if size:
        collapse_slab(mapped, 0, size)
    slab = np.frombuffer(mapped, np.uint8)

    def write(piece: Piece) -> Entry:
        data = slab[piece.offset : piece.offset + piece.nbytes]
        if piece.format == "panels":
            write_panels(checkpoint, piece, data)
        elif piece.dtype == "int8":
            write_int8_rows(checkpoint, piece, data)
        else:
            read_rows(checkpoint, piece.sources, 0, data.view(NUMPY_DTYPE[piece.dtype]).reshape(piece.shape))
        place = (0, piece.offset, piece.nbytes)
        return Entry(piece.name, piece.dtype, piece.shape, piece.format, *place, checksum(data), piece.kind)

    # numpy gives up the interpreter lock inside its loops: a second thread nearly halves the time, more wait for the lock.
    entries: list[Entry] = []
    done, total, told = 0, sum(piece.nbytes for piece in pieces), time.monotonic()
    with ThreadPoolExecutor(min(2, len(os.sched_getaffinity(0)))) as pool:
        for entry in pool.map(write, pieces):
            entries.append(entry)
            done += entry.nbytes
            if time.monotonic() - told >= PROGRESS_SECONDS:
                told = time.monotonic()
                progress(done, total)
    progress(total, total)
    return Manifest(entries, [size], size, packing.format)


def spans(checkpoint: Checkpoint, sources: Sequence[str], first: int, last: int) -> Iterator[tuple[str, int, int]]:
    """Rows `first` to `last` of the sources one under another, as (source, first, last) within each."""
    begin = 0
    for source in sources:
        rows = checkpoint.shape(source)[0]
        low, high = max(first, begin), min(last, begin + rows)
        if low < high:
            yield source, low - begin, high - begin
        begin += rows


def read_rows(checkpoint: Checkpoint, sources: Sequence[str], first: int, out: np.ndarray) -> None:
    """Rows `first` to `first + len(out)` of the sources, one under another, in `out`'s dtype."""
    at = 0
    for source, low, high in spans(checkpoint, sources, first, first + len(out)):
        checkpoint.read_into(source, out[at : at + high - low], slice(low, high))
        at += high - low


def write_panels(checkpoint: Checkpoint, piece: Piece, data: np.ndarray) -> None:
    """A matrix into panels of 16 rows, some at a time."""
    from engine.native import cpu

    rows, columns = piece.shape
    panel_bytes = cpu.packed_bytes(piece.dtype, PANEL_ROWS, columns)
    some = max(PANEL_ROWS, SOME_BYTES // (2 * columns) // PANEL_ROWS * PANEL_ROWS)
    # What the file has in 16 bits needs no float32 on its way; int8 is made from the finer of the two.
    is_float = piece.dtype == "int8" and any(checkpoint.dtype(source) != "BF16" for source in piece.sources)
    for first in range(0, rows, some):
        last = min(first + some, rows)
        if piece.dtype in KEPT.values():
            parts = [checkpoint.raw_rows(*span) for span in spans(checkpoint, piece.sources, first, last)]
            part = np.ascontiguousarray(parts[0]) if len(parts) == 1 else np.concatenate(parts)
        else:
            part = np.empty((last - first, columns), np.float32 if is_float else np.uint16)
            read_rows(checkpoint, piece.sources, first, part)
        to = data[first // PANEL_ROWS * panel_bytes :]
        cpu.pack(piece.dtype, to.ctypes.data, part.ctypes.data, last - first, columns, is_float=is_float)


def write_int8_rows(checkpoint: Checkpoint, piece: Piece, data: np.ndarray) -> None:
    """A matrix in 8 bits, each row with a scale of its own: [rows, columns] int8, then [rows] float32. The largest of a row
    becomes 127."""
    rows, columns = piece.shape
    scales = data[-4 * rows :].view(np.float32)
    values = data[: rows * columns].view(np.int8).reshape(rows, columns)
    some = max(1, SOME_BYTES // (4 * columns))
    for first in range(0, rows, some):
        last = min(first + some, rows)
        part = np.empty((last - first, columns), np.float32)
        read_rows(checkpoint, piece.sources, first, part)
        scale = np.abs(part).max(axis=1) / np.float32(127)
        scales[first:last] = scale
        np.divide(part, scale[:, None], out=part, where=scale[:, None] > 0)
        np.copyto(values[first:last], np.rint(part, out=part), casting="unsafe")


def check_present(checkpoint: Checkpoint, spec: WeightSpec) -> None:
    """Raises `UserError` for a tensor that is missing or misshapen."""
    shapes = [checkpoint.shape(source) for source in spec.sources]
    whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    if whole != spec.shape or any(shape[1:] != shapes[0][1:] for shape in shapes):
        found = " + ".join(str(list(shape)) for shape in shapes)
        names, asked = " + ".join(spec.sources), list(spec.shape)
        raise UserError(f"{checkpoint.path}: tensor {names} has shape {found}; the model's config asks for {asked}", "model")


def report_unused(checkpoint: Checkpoint, specs: Sequence[WeightSpec]) -> None:
    """Say which tensors no spec takes: usually parts for something else, but a model that needs them would be wrong."""
    used = {source for spec in specs for source in spec.sources}
    unused = [name for name in checkpoint.names() if name not in used]
    if unused == ["lm_head.weight"] and checkpoint.config.get("tie_word_embeddings"):
        return  # some files repeat the tied embedding
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        log.warning("event=unused_tensors path=%s tensors=%s%s", checkpoint.path, ",".join(unused[:3]), more)


def report_repacked(checkpoint: Checkpoint, pieces: Sequence[Piece]) -> None:
    """Say which of a file's quantised types have no kernel and are quantised anew."""
    stored = Counter(checkpoint.dtype(source) for piece in pieces if piece.dtype == "int8" for source in piece.sources)
    for name, count in stored.items():
        if name not in FLOATS:
            log.warning("event=weights_repacked path=%s type=%s to=int8 tensors=%d", checkpoint.path, name, count)


def describe(fd: int, description: Description) -> None:
    """Write a description into the memfd `fd`, whole."""
    data = msgspec.msgpack.encode(description)
    os.ftruncate(fd, len(data))
    os.pwrite(fd, data, 0)


def read_description(fd: int) -> Description:
    """What `describe` has written."""
    return DESCRIPTION.decode(os.pread(fd, os.fstat(fd).st_size, 0))


def map_slabs(manifest: Manifest, fds: Sequence[int], copy: bool = False) -> dict[str, list[WeightPart]]:
    """Each packed tensor's parts, read-only, over mappings that live as long as the views; `copy`: over private copies of the
    slabs."""
    take = copy_slab if copy else map_slab
    slabs = [take(fd, size) for fd, size in zip(fds, manifest.slabs, strict=True)]
    parts: dict[str, list[WeightPart]] = {}
    for e in manifest.entries:
        data = slabs[e.slab][e.offset : e.offset + e.nbytes]
        parts.setdefault(e.name, []).append(WeightPart(data, e.dtype, e.shape, e.kind, e.format))
    return parts


def copy_slab(fd: int, nbytes: int) -> memoryview:
    """All of a memfd in memory of this process's own, in huge pages where the system has them."""
    if not nbytes:
        return memoryview(b"")
    memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    view = memoryview(memory)
    at = 0
    while at < nbytes:  # Linux reads 2 GiB at once and no more
        read = os.preadv(fd, [view[at:]], at)
        assert read, "a slab is never shortened"
        at += read
    return view.toreadonly()
