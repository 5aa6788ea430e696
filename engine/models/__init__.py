"""Models: one file an architecture family, written on the device protocol, importing no torch.

A model is data: `parse` turns a Hugging Face style config dict into a struct, `weights` lists the packed tensors it wants and
where each comes from, `forward` says the step. `ARCHITECTURES` maps the config's architecture name to the family's module.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from engine.types import UserError

ARCHITECTURES = {
    "LlamaForCausalLM": "engine.models.llama",
    "MistralForCausalLM": "engine.models.llama",
    "Qwen2ForCausalLM": "engine.models.llama",
    "Qwen3ForCausalLM": "engine.models.llama",
}


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


class Model(Protocol):
    """What the executor needs of a model."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_len: int  # longest context the model was made for

    def weights(self) -> list[WeightSpec]: ...

    def bind(self, device: Any, weights: dict[str, Any], max_len: int) -> None:
        """Keep the opaque weights and build the rope table for `max_len` positions."""
        ...

    def forward(self, device: Any, step: Any, kv: Any) -> Any: ...


def build(config: dict[str, Any]) -> Model:
    """The model that `config` (config.json's content) describes. Raises `UserError` for one we don't have."""
    names = config.get("architectures") or []
    for name in names:
        if name in ARCHITECTURES:
            return importlib.import_module(ARCHITECTURES[name]).Model(config)
    raise UserError(
        f"model architecture {', '.join(names) or 'not named in config.json'} is not supported;"
        f" these are: {', '.join(ARCHITECTURES)}",
        "model",
    )
