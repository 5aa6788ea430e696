"""GGUF files: reads the header, the metadata and the tensor directory, and puts them in Hugging Face terms.

The file is memory-mapped; nothing of a tensor is read here (`engine.quants` turns blocks into floats). The control process reads
metadata alone, so numpy is imported only where a tensor is touched. Knows nothing of devices or packing.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from math import prod, tau
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.types import UserError

if TYPE_CHECKING:
    import numpy as np

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # version 1 had 32-bit counts and is no longer written by anything
ALIGNMENT = 32  # of tensor data, unless general.alignment says otherwise

# ggml's type number: (name, weights a block holds, bytes a block takes). Only types that `engine.quants` reads.
GGML_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
BLOCKS = {name: (weights, nbytes) for name, weights, nbytes in GGML_TYPES.values()}

# Metadata value types: struct codes of the scalars, then the two that have a length.
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One entry of the tensor directory. `shape` is numpy's order: rows first, quantised blocks run along the last axis."""

    type: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    nbytes: int


class GGUF:
    """One open GGUF file. The mapping lives as long as this object or any array made of it. Raises `UserError`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                size = file.seek(0, 2)
                if size < 24:
                    raise UserError(f"{self.path}: {size} bytes is too short for a GGUF file; download it again")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as e:
            raise UserError(f"{self.path}: {e.strerror}") from None
        try:
            self._read()
        except (struct.error, IndexError):
            raise UserError(f"{self.path}: ends within its header ({size} bytes); download it again") from None

    def _read(self) -> None:
        data = self._map
        if data[:4] != MAGIC:
            raise UserError(f"{self.path}: not a GGUF file (it starts with {data[:4]!r}, not {MAGIC!r})")
        version, tensors, keys = struct.unpack_from("<IQQ", data, 4)
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            why = "big-endian" if swapped else f"of version {version}"
            raise UserError(f"{self.path}: this GGUF file is {why}; little-endian versions 2 and 3 can be read")
        at = 24
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            key, at = self._string(at)
            (kind,) = struct.unpack_from("<I", data, at)
            self.metadata[key], at = self._value(kind, at + 4)
        directory = []
        for _ in range(tensors):
            name, at = self._string(at)
            (dims,) = struct.unpack_from("<I", data, at)
            if dims > 4:
                raise UserError(f"{self.path}: tensor {name} has {dims} dimensions: the file is damaged; download it again")
            *shape, kind, offset = struct.unpack_from(f"<{dims}QIQ", data, at + 4)
            at += 4 + 8 * dims + 12
            directory.append((name, tuple(reversed(shape)), kind, offset))
        align = self.metadata.get("general.alignment") or ALIGNMENT
        base = -(-at // align) * align
        self.tensors = {name: self._tensor(name, shape, kind, base + offset) for name, shape, kind, offset in directory}

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorInfo:
        if kind not in GGML_TYPES:
            known = ", ".join(BLOCKS)
            raise UserError(f"{self.path}: tensor {name} has GGML type number {kind}, which can't be read; these can: {known}")
        type_name, block, block_bytes = GGML_TYPES[kind]
        if not shape or shape[-1] % block:
            raise UserError(f"{self.path}: tensor {name} of shape {shape} is not whole {type_name} blocks: the file is damaged")
        nbytes = prod(shape) // block * block_bytes
        if offset + nbytes > len(self._map):
            missing = offset + nbytes - len(self._map)
            raise UserError(f"{self.path}: {missing} bytes are missing at its end (tensor {name}); download it again")
        return TensorInfo(type_name, shape, offset, nbytes)

    def _string(self, at: int) -> tuple[str, int]:
        (length,) = struct.unpack_from("<Q", self._map, at)
        end = at + 8 + length
        if end > len(self._map):
            raise IndexError(end)
        # A vocabulary may hold bytes that are no UTF-8; they come back as they were.
        return self._map[at + 8 : end].decode("utf-8", "surrogateescape"), end

    def _value(self, kind: int, at: int) -> tuple[Any, int]:
        if kind in SCALARS:
            code = "<" + SCALARS[kind]
            return struct.unpack_from(code, self._map, at)[0], at + struct.calcsize(code)
        if kind == STRING:
            return self._string(at)
        if kind != ARRAY:
            raise UserError(f"{self.path}: metadata has a value of unknown type {kind}: the file is damaged")
        kind, count = struct.unpack_from("<IQ", self._map, at)
        at += 12
        if kind in SCALARS:
            code = f"<{count}{SCALARS[kind]}"
            if count > len(self._map):
                raise IndexError(count)
            return list(struct.unpack_from(code, self._map, at)), at + struct.calcsize(code)
        if kind == STRING:
            return self._strings(count, at)
        items = []
        for _ in range(count):
            item, at = self._value(kind, at)
            items.append(item)
        return items, at

    def _strings(self, count: int, at: int) -> tuple[list[str], int]:
        """`_string` count times, without its overhead: a vocabulary has some hundred thousand."""
        data, length_at, end = self._map, struct.Struct("<Q").unpack_from, len(self._map)
        items: list[str] = []
        append = items.append
        for _ in range(count):
            start = at + 8
            at = start + length_at(data, at)[0]
            if at > end:
                raise IndexError(at)
            append(data[start:at].decode("utf-8", "surrogateescape"))
        return items, at

    def raw(self, name: str) -> np.ndarray:
        """A tensor's bytes as they lie in the file: a read-only uint8 view of the mapping."""
        import numpy as np

        info = self.tensors[name]
        return np.frombuffer(self._map, np.uint8, info.nbytes, info.offset)


# ---- in Hugging Face terms ------------------------------------------------------------------------------------------

ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
# Converters of these reorder the rows of q and k within each head, from [first half | second half] to interleaved pairs.
INTERLEAVED_ROPE = ("llama", "mistral")

TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"  # part of the config, not a weight: what Llama 3's scaling comes to for each frequency


def hf_tensor_names(gguf: GGUF) -> dict[str, str]:
    """Hugging Face tensor name -> name in the file. A tensor without one is an error: a model that needs it would be wrong."""
    names = {}
    for name in gguf.tensors:
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        known = TENSOR_NAMES.get(match[2]) if match else None
        if name == ROPE_FACTORS:
            continue
        if match is None or known is None:
            raise UserError(f"{gguf.path}: tensor {name} belongs to no model that can be served")
        layer = f"model.layers.{match[1]}." if match[1] else ""
        names[f"{layer}{known}.{match[3]}"] = name
    return names


def rope_heads(gguf: GGUF, name: str) -> int:
    """How many heads' rows of this tensor (its name in the file) are interleaved for rope and must be put back; 0: none."""
    arch = gguf.metadata.get("general.architecture")
    match = re.fullmatch(r"blk\.\d+\.attn_([qk])\.(?:weight|bias)", name)
    if arch not in INTERLEAVED_ROPE or match is None:
        return 0
    heads, kv_heads = head_counts(gguf)
    return heads if match[1] == "q" else kv_heads


def head_counts(gguf: GGUF) -> tuple[int, int]:
    """(query heads, key and value heads)."""
    arch = gguf.metadata["general.architecture"]
    counts: list[int] = []
    for key in ("head_count", "head_count_kv"):
        value = gguf.metadata.get(f"{arch}.attention.{key}", counts[0] if counts else None)
        if isinstance(value, list):  # some models give a count for each layer
            if len(set(value)) > 1:
                raise UserError(f"{gguf.path}: the number of attention heads differs from layer to layer; that is not supported")
            value = value[0]
        if not value:
            raise UserError(f"{gguf.path}: {arch}.attention.{key} is missing: the file is incomplete")
        counts.append(int(value))
    return counts[0], counts[1]


def hf_config(gguf: GGUF) -> dict[str, Any]:
    """What config.json would say of this file's model. Raises `UserError` for a model that can't be served."""
    meta = gguf.metadata
    arch = meta.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise UserError(f"{gguf.path}: model architecture {arch!r} is not supported; these are: {', '.join(ARCHITECTURES)}")

    def get(key: str, default: Any = None) -> Any:
        return meta.get(f"{arch}.{key}", default)

    def need(key: str) -> Any:
        value = get(key)
        if value is None:
            raise UserError(f"{gguf.path}: {arch}.{key} is missing: the file is incomplete")
        return value

    if get("expert_count"):
        raise UserError(f"{gguf.path}: a mixture of {get('expert_count')} experts is not supported; dense models are")
    if "token_embd.weight" not in gguf.tensors:
        raise UserError(f"{gguf.path}: has no token_embd.weight; a file with a vocabulary alone can't be served")
    heads, kv_heads = head_counts(gguf)
    hidden = need("embedding_length")
    head_dim = get("attention.key_length", hidden // heads)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise UserError(f"{gguf.path}: rope over {get('rope.dimension_count')} of {head_dim} dimensions is not supported")
    model_type, name = ARCHITECTURES[arch]
    window = get("attention.sliding_window")
    if arch == "llama" and window:
        model_type, name = ARCHITECTURES["mistral"]
    bias = "blk.0.attn_q.bias" in gguf.tensors
    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": model_type,
        "hidden_size": hidden,
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": need("feed_forward_length"),
        "vocab_size": gguf.tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": need("context_length"),
        # Stored as float32, but meant as a short decimal: 1e-05, not 9.999999747378752e-06.
        "rms_norm_eps": short_float(need("attention.layer_norm_rms_epsilon")),
        "rope_theta": short_float(get("rope.freq_base", 10000.0)),
        "rope_scaling": rope_scaling(gguf, arch),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "attention_bias": bias,
        "sliding_window": window or None,
        "use_sliding_window": bool(window),
        "hidden_act": "silu",
    }
    for ours, theirs in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        if (token := meta.get(f"tokenizer.ggml.{theirs}_token_id")) is not None:
            config[ours] = token
    return config


def rope_scaling(gguf: GGUF, arch: str) -> dict[str, Any] | None:
    """The config's `rope_scaling`. Raises `UserError` for a kind that can't be served."""
    meta = gguf.metadata
    trained = meta.get(f"{arch}.rope.scaling.original_context_length", meta.get(f"{arch}.context_length"))
    if ROPE_FACTORS in gguf.tensors:
        factors = read_f32(gguf, ROPE_FACTORS)
        theta = meta.get(f"{arch}.rope.freq_base", 10000.0)
        original = {"factor": max(factors), **LLAMA3_SCALING}
        if all(abs(a - b) < 1e-4 * b for a, b in zip(factors, llama3_factors(theta, len(factors), **original), strict=True)):
            return {"rope_type": "llama3", **original}
        # Hugging Face's form for divisors that are given: here the same for short and long texts, attention not scaled.
        return {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "attention_factor": 1.0,
            "original_max_position_embeddings": trained,
        }
    kind = meta.get(f"{arch}.rope.scaling.type", "none")
    factor = meta.get(f"{arch}.rope.scaling.factor", meta.get(f"{arch}.rope.scale_linear"))
    if kind == "none" and f"{arch}.rope.scale_linear" in meta:  # the key of older files
        kind = "linear"
    if kind == "none" or not factor or factor == 1.0:
        return None
    if kind == "linear":
        return {"rope_type": "linear", "factor": short_float(factor)}
    if kind == "yarn":
        scaling = {"rope_type": "yarn", "factor": short_float(factor), "original_max_position_embeddings": trained}
        for ours, theirs in (
            ("attention_factor", "attn_factor"),
            ("beta_fast", "yarn_beta_fast"),
            ("beta_slow", "yarn_beta_slow"),
        ):
            if (value := meta.get(f"{arch}.rope.scaling.{theirs}")) is not None:
                scaling[ours] = short_float(value)
        return scaling
    raise UserError(f"{gguf.path}: rope scaling {kind!r} is not supported; linear, yarn and Llama 3's are")


# Beside `factor`, the same in every Llama 3 so far. A GGUF file holds only the divisors of the frequencies they come to.
LLAMA3_SCALING: dict[str, Any] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama3_factors(
    theta: float,
    count: int,
    *,
    factor: float,
    low_freq_factor: float,
    high_freq_factor: float,
    original_max_position_embeddings: int,
) -> list[float]:
    """What Llama 3's scaling divides each of `count` frequencies by: long waves by `factor`, short ones by 1."""
    factors = []
    for i in range(count):
        turns = original_max_position_embeddings * theta ** (-i / count) / tau
        smooth = min(max((turns - low_freq_factor) / (high_freq_factor - low_freq_factor), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors


def read_f32(gguf: GGUF, name: str) -> list[float]:
    info = gguf.tensors[name]
    if info.type != "F32":
        raise UserError(f"{gguf.path}: tensor {name} is {info.type}; F32 is expected")
    data = gguf._map[info.offset : info.offset + info.nbytes]
    return [short_float(x) for (x,) in struct.iter_unpack("<f", data)]


def short_float(value: float) -> float:
    """The shortest decimal that float32 rounds to the same value."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("<f", short) == struct.pack("<f", value):
            return short
    return float(value)
