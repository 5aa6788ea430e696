"""Models: one file an architecture family, written on the device protocol, importing no torch.

A model is data: `parse` turns a Hugging Face style config dict into a struct, `weights` lists the packed tensors it wants and
where each comes from, `forward` says the step. `ARCHITECTURES` maps the config's architecture name to the family's module.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from engine.types import UserError, WeightFormat

ARCHITECTURES = {
    "LlamaForCausalLM": "engine.models.llama",
    "MistralForCausalLM": "engine.models.llama",
    "Qwen2ForCausalLM": "engine.models.llama",
    "Qwen3ForCausalLM": "engine.models.llama",
}


PANEL_ROWS = 16  # of a matrix packed in panels (engine/native/cpu/quant.h)


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One packed tensor: the rows of `sources` one under another.

    kind "matrix" and "embedding" (rows that are looked up; where it is tied, also the head's matrix) take the Config's dtype or
    a quantised form; "vector" (norm gains, biases) stays float32."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]  # Hugging Face tensor names
    kind: str = "matrix"


class WeightPart(NamedTuple):
    """Rows of a packed tensor as they lie in memory. A tensor has one part, unless its sources are stored differently."""

    data: memoryview
    dtype: str  # float32, bfloat16, float16, or a quantised kind (of engine/native/cpu in panels, int8 in rows)
    shape: tuple[int, ...]
    kind: str = "matrix"  # the spec's
    format: WeightFormat = "rows"


def take_rows(parts: Sequence[WeightPart], ranges: Sequence[tuple[int, int]]) -> list[WeightPart]:
    """Rows `first` to `last` of a packed tensor for each of `ranges`, one under another. Matrices in panels are not copied; a
    range of them begins and ends with a panel, or with a part."""
    taken: list[WeightPart] = []
    for first, last in ranges:
        begin = 0
        for part in parts:
            low, high = max(first, begin), min(last, begin + part.shape[0])
            if low < high:
                taken.append(rows_of(part, low - begin, high - begin))
            begin += part.shape[0]
    if parts[0].format == "panels" or len(taken) < 2:
        return taken
    return [joined(taken)]


def rows_of(part: WeightPart, first: int, last: int) -> WeightPart:
    rows, shape = part.shape[0], (last - first, *part.shape[1:])
    if part.format == "panels":
        panel = len(part.data) // -(-rows // PANEL_ROWS)
        assert first % PANEL_ROWS == 0 and (last % PANEL_ROWS == 0 or last == rows), "capacity.resolve lets no other through"
        return part._replace(data=part.data[first // PANEL_ROWS * panel : -(-last // PANEL_ROWS) * panel], shape=shape)
    if part.dtype == "int8":  # a float32 scale for each row stands behind the rows
        values, scales = part.data[: rows * part.shape[1]], part.data[-4 * rows :]
        data = values[first * part.shape[1] : last * part.shape[1]], scales[4 * first : 4 * last]
        return part._replace(data=with_scales(*data), shape=shape)
    row = len(part.data) // rows
    return part._replace(data=part.data[first * row : last * row], shape=shape)


def joined(parts: Sequence[WeightPart]) -> WeightPart:
    """Row-major parts as one."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    if parts[0].dtype != "int8":
        return parts[0]._replace(data=memoryview(b"".join(part.data for part in parts)), shape=shape)
    values = b"".join(part.data[: part.shape[0] * part.shape[1]] for part in parts)
    scales = b"".join(part.data[-4 * part.shape[0] :] for part in parts)
    return parts[0]._replace(data=with_scales(values, scales), shape=shape)


def with_scales(values: bytes | memoryview, scales: bytes | memoryview) -> memoryview:
    """Rows of int8 as `weights.py` packs them: scales begin at a multiple of 4 bytes."""
    return memoryview(b"".join((values, bytes(-len(values) % 4), scales)))


def bounds(width: int, unit: int, ranks: int) -> list[int]:
    """Where each rank's share of `width` columns begins, and the end: as equal as whole units allow."""
    units = -(-width // unit)
    return [min(width, units * rank // ranks * unit) for rank in range(ranks + 1)]


class Model(Protocol):
    """What the executor needs of a model."""

    layers: int
    heads: int
    kv_heads: int
    own_kv_heads: int  # of these, this rank's
    head_dim: int
    hidden: int
    intermediate: int
    vocab: int
    max_len: int  # longest context the model was made for

    def weights(self) -> list[WeightSpec]:
        """All packed tensors, whatever the rank."""
        ...

    def own(self, weights: dict[str, list[WeightPart]]) -> dict[str, list[WeightPart]]:
        """Of the packed tensors, what this rank multiplies with."""
        ...

    def bind(self, device: Any, weights: dict[str, Any], max_len: int) -> None:
        """Keep the opaque weights, and a rope table for `max_len` positions."""
        ...

    def forward(self, device: Any, step: Any, kv: Any) -> Any: ...


def build(config: dict[str, Any], rank: int = 0, ranks: int = 1) -> Model:
    """The model that `config` (config.json's content) describes, as rank `rank` of `ranks` computes it. Raises `UserError` for
    one we don't have."""
    names = config.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return importlib.import_module(ARCHITECTURES[name]).Model(config, rank, ranks)
    raise UserError(
        f"model architecture {', '.join(names) or 'not named in config.json'} is not supported;"
        f" these are: {', '.join(ARCHITECTURES)}",
        "model",
    )
