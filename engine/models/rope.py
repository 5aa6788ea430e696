"""Rotary position embedding: the frequencies a config asks for, and the table of their cosines and sines.

The rules are those of Hugging Face `transformers`, with angles in float32 as there: models were trained with those
roundings. Both spellings are read: `rope_theta` with `rope_scaling`, and `rope_parameters` with everything in it. Knows
no device and no model.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from engine.types import UserError

TYPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


class Table(NamedTuple):
    """Cosines and sines of every position, to be computed when they are needed: few contexts come near the longest."""

    length: int  # positions
    inverse: np.ndarray  # radians a position
    factor: float  # on cosine and sine

    @property
    def width(self) -> int:
        return 2 * len(self.inverse)

    def rows(self, first: int, last: int) -> np.ndarray:
        """float32 [last - first, width] of these positions: cosines in the first half of each row, sines in the second."""
        angles = np.arange(first, last, dtype=np.float32)[:, None] * self.inverse
        rows = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
        return rows * np.float32(self.factor) if self.factor != 1.0 else rows


class Rope:
    """The rotary embedding that a config describes. Raises `UserError` for a kind we don't have."""

    def __init__(self, config: dict[str, Any], head_dim: int, max_positions: int):
        params = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
        self.kind = params.get("rope_type") or params.get("type") or "default"
        if any(isinstance(v, dict) for v in params.values()):
            raise UserError("config.json: rope_parameters for each layer type are not supported", "model")
        if self.kind not in TYPES:
            raise UserError(f"config.json: rope type {self.kind!r} is not supported; these are: {', '.join(TYPES)}", "model")
        if params.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
            raise UserError("config.json: partial_rotary_factor is not supported; the whole head must rotate", "model")
        self.params = params
        self.dim = head_dim
        self.theta = float(params.get("rope_theta") or config.get("rope_theta") or 10000.0)
        original = config.get("original_max_position_embeddings") or params.get("original_max_position_embeddings")
        self.original = int(original or max_positions)
        if self.kind in ("linear", "llama3"):
            self.need("factor")
        self.factor = float(params.get("factor") or max_positions / self.original)
        # The longest context it serves, as vLLM counts: factors stretch the original one. "dynamic" changes every
        # frequency once a text outgrows `max_positions`, which cached keys can't follow: up to there it is the default.
        self.max_len = max_positions
        if self.kind in ("linear", "yarn"):
            self.max_len = int((self.original if self.kind == "yarn" else max_positions) * self.factor)

    def table(self, length: int) -> Table:
        """For contexts of up to `length` positions. Raises `UserError`."""
        return Table(length, *self.frequencies(length))

    def frequencies(self, length: int) -> tuple[np.ndarray, float]:
        """float32 radians a position, one for each pair of a head's dimensions, and the factor on cosine and sine."""
        plain = self.theta ** (np.arange(0, self.dim, 2) / self.dim)
        if self.kind == "llama3":
            return self.llama3(plain), 1.0
        if self.kind == "yarn":
            return self.yarn(plain)
        if self.kind == "longrope":
            return self.longrope(plain, length)
        scale = self.factor if self.kind == "linear" else 1.0
        return (1.0 / (scale * plain)).astype(np.float32), 1.0

    def llama3(self, plain: np.ndarray) -> np.ndarray:
        """Llama 3.1's: waves longer than the original context are slowed by the factor, short ones not, the rest in between."""
        low, high = self.need("low_freq_factor"), self.need("high_freq_factor")
        turns = self.original / (2 * math.pi * plain)  # in the original context
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return (((1.0 - smooth) / self.factor + smooth) / plain).astype(np.float32)

    def yarn(self, plain: np.ndarray) -> tuple[np.ndarray, float]:
        """High frequencies as they are, low ones divided by the factor, a ramp between (arXiv 2309.00071)."""

        def dimension(rotations: float) -> float:
            """Where a wave turns `rotations` times in the original context."""
            return self.dim * math.log(self.original / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low = dimension(self.params.get("beta_fast") or 32)
        high = dimension(self.params.get("beta_slow") or 1)
        if self.params.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001  # a step instead of a division by zero
        ramp = np.clip((np.arange(self.dim // 2) - low) / (high - low), 0.0, 1.0)
        inverse = ramp / (self.factor * plain) + (1.0 - ramp) / plain

        given = self.params.get("attention_factor")
        if given is not None:
            return inverse.astype(np.float32), float(given)
        mscale, mscale_all = self.params.get("mscale"), self.params.get("mscale_all_dim")
        attention = yarn_mscale(self.factor, 1.0)
        if mscale and mscale_all:
            attention = yarn_mscale(self.factor, mscale) / yarn_mscale(self.factor, mscale_all)
        return inverse.astype(np.float32), attention

    def longrope(self, plain: np.ndarray, length: int) -> tuple[np.ndarray, float]:
        """Divisors given for each frequency: short ones while the context is the original one, else long ones.

        Which, is fixed by the served context and not by each text: cached keys can't change (vLLM does the same).
        arXiv 2402.13753.
        """
        divisors = np.asarray(self.need("long_factor" if length > self.original else "short_factor"), np.float64)
        if divisors.shape != plain.shape:
            raise UserError(f"config.json: rope factors: {len(divisors)} are given, {len(plain)} are needed", "model")
        attention = self.params.get("attention_factor")
        if attention is None:
            attention = math.sqrt(1 + math.log(self.factor) / math.log(self.original)) if self.factor > 1.0 else 1.0
        return (1.0 / (divisors * plain)).astype(np.float32), float(attention)

    def need(self, name: str) -> Any:
        if self.params.get(name) is None:
            raise UserError(f"config.json: rope type {self.kind} needs {name}", "model")
        return self.params[name]


def yarn_mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0
