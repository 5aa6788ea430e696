"""The Llama family: Llama 2 and 3, SmolLM2, Mistral, Qwen2 and Qwen3. Written on the device protocol alone; imports no torch.

One shape serves them all: a stack of layers, each attention (grouped queries, rotary positions) and a gated MLP, each
after an RMS norm and added to the residual. What differs is data: biases, norms of query and key heads (Qwen3),
windows, rope scaling, tied embeddings.

Several ranks share a model by columns of outputs: each multiplies with its own rows of every matrix, has heads of its own, and
what a whole matrix reads next is gathered from all of them. No sum is split, so one rank or many give the same bits. Norms
cost less than gathering them and are computed by every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.devices import Device, KVCache, StepView, Tensor
from engine.models import PANEL_ROWS, WeightPart, WeightSpec, bounds, take_rows
from engine.models.rope import Rope
from engine.types import UserError

# What transformers takes where config.json leaves a field out.
DEFAULT_POSITIONS = {
    "LlamaForCausalLM": 2048,
    "MistralForCausalLM": 131072,
    "Qwen2ForCausalLM": 32768,
    "Qwen3ForCausalLM": 32768,
}
DEFAULT_WINDOW = 4096
QWEN3_HEAD_DIM = 128


@dataclass(slots=True)
class Layer:
    """One layer's weights on the device."""

    attention_norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    window: int  # positions a query sees, itself counted; 0: all


class Model:
    """A model of the family, as `config` (config.json's content) describes it and rank `rank` of `ranks` computes it. Raises
    `UserError` for what we don't have."""

    def __init__(self, config: dict[str, Any], rank: int = 0, ranks: int = 1):
        architecture = next(name for name in config["architectures"] if name in DEFAULT_POSITIONS)
        self.hidden = number(config, "hidden_size")
        self.layers = number(config, "num_hidden_layers")
        self.heads = number(config, "num_attention_heads")
        self.kv_heads = number(config, "num_key_value_heads", self.heads)
        self.head_dim = number(
            config,
            "head_dim",
            QWEN3_HEAD_DIM if architecture == "Qwen3ForCausalLM" else self.hidden // self.heads,
        )
        self.intermediate = number(config, "intermediate_size")
        self.vocab = number(config, "vocab_size")
        self.eps = float(config.get("rms_norm_eps") or 1e-6)
        self.tied = bool(config.get("tie_word_embeddings", False))
        bias = bool(config.get("attention_bias", False))
        self.qkv_bias = bias or architecture == "Qwen2ForCausalLM"
        self.o_bias = bias and architecture != "Qwen2ForCausalLM"
        self.mlp_bias = bool(config.get("mlp_bias", False))
        self.qk_norm = architecture == "Qwen3ForCausalLM"
        self.windows = windows(config, architecture, self.layers)
        self.rope = Rope(config, self.head_dim, number(config, "max_position_embeddings", DEFAULT_POSITIONS[architecture]))
        self.max_len = self.rope.max_len
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise UserError(f"config.json: hidden_act {activation!r} is not supported; the Llama family's is silu", "model")
        if self.heads % self.kv_heads:
            raise UserError(
                f"config.json: num_attention_heads {self.heads} is no multiple of num_key_value_heads {self.kv_heads}",
                "model",
            )
        self.rank, self.ranks = rank, ranks
        self.own_heads, self.own_kv_heads = self.heads // ranks, self.kv_heads // ranks
        # Columns of each gathered buffer, by rank.
        self.by_head = bounds(self.heads * self.head_dim, self.head_dim, ranks)
        self.by_hidden, self.by_intermediate, self.by_vocab = (
            bounds(width, PANEL_ROWS, ranks) for width in (self.hidden, self.intermediate, self.vocab)
        )

    # ---- weights ----------------------------------------------------------------------------------------------------
    def weights(self) -> list[WeightSpec]:
        """The packed tensors, in the order a step reads them."""
        q_rows, kv_rows = self.heads * self.head_dim, self.kv_heads * self.head_dim
        specs = [WeightSpec("embed", (self.vocab, self.hidden), ("model.embed_tokens.weight",), "embedding")]

        def add(name: str, sources: list[str], rows: int, width: int, biased: bool) -> None:
            matrices = tuple(f"{source}.weight" for source in sources)
            specs.append(WeightSpec(name, (rows, width), matrices))
            if biased:
                specs.append(WeightSpec(f"{name}_bias", (rows,), tuple(f"{source}.bias" for source in sources), "vector"))

        def add_norm(name: str, source: str, width: int) -> None:
            specs.append(WeightSpec(name, (width,), (f"{source}.weight",), "vector"))

        for i in range(self.layers):
            ours, theirs = f"layers.{i}", f"model.layers.{i}"
            attention, mlp = f"{theirs}.self_attn", f"{theirs}.mlp"
            qkv = [f"{attention}.{x}_proj" for x in "qkv"]
            add_norm(f"{ours}.attention_norm", f"{theirs}.input_layernorm", self.hidden)
            add(f"{ours}.qkv", qkv, q_rows + 2 * kv_rows, self.hidden, self.qkv_bias)
            if self.qk_norm:
                add_norm(f"{ours}.q_norm", f"{attention}.q_norm", self.head_dim)
                add_norm(f"{ours}.k_norm", f"{attention}.k_norm", self.head_dim)
            add(f"{ours}.o", [f"{attention}.o_proj"], self.hidden, q_rows, self.o_bias)
            add_norm(f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", self.hidden)
            add(
                f"{ours}.gate_up",
                [f"{mlp}.gate_proj", f"{mlp}.up_proj"],
                2 * self.intermediate,
                self.hidden,
                self.mlp_bias,
            )
            add(f"{ours}.down", [f"{mlp}.down_proj"], self.hidden, self.intermediate, self.mlp_bias)
        add_norm("final_norm", "model.norm", self.hidden)
        if not self.tied:
            add("lm_head", ["lm_head"], self.vocab, self.hidden, False)
        return specs

    def own(self, weights: dict[str, list[WeightPart]]) -> dict[str, list[WeightPart]]:
        """What this rank multiplies with; whole where every rank computes the same (norms) or looks rows up (the embedding)."""
        if self.ranks == 1:
            return weights
        if self.tied:
            weights = weights | {"lm_head": [part._replace(kind="matrix") for part in weights["embed"]]}
        return {name: take_rows(parts, rows) if (rows := self.own_rows(name)) else parts for name, parts in weights.items()}

    def own_rows(self, name: str) -> list[tuple[int, int]]:
        """Rows of a packed tensor, as ranges; none: all of it."""
        here = slice(self.rank, self.rank + 2)
        q, kv = self.heads * self.head_dim, self.own_kv_heads * self.head_dim
        keys, values = q + self.rank * kv, q + (self.ranks + self.rank) * kv
        (q0, q1), (hidden0, hidden1) = self.by_head[here], self.by_hidden[here]
        (gate0, gate1), (vocab0, vocab1) = self.by_intermediate[here], self.by_vocab[here]
        return {
            "qkv": [(q0, q1), (keys, keys + kv), (values, values + kv)],
            "o": [(hidden0, hidden1)],
            "gate_up": [(gate0, gate1), (self.intermediate + gate0, self.intermediate + gate1)],
            "down": [(hidden0, hidden1)],
            "lm_head": [(vocab0, vocab1)],
        }.get(name.rpartition(".")[2].removesuffix("_bias"), [])

    def bind(self, device: Device, weights: dict[str, Tensor], max_len: int) -> None:
        """Keep the weights, and a rope table for `max_len` positions."""

        def layer(i: int) -> Layer:
            own = {name: weights.get(f"layers.{i}.{name}") for name in Layer.__slots__ if name != "window"}
            return Layer(**own, window=self.windows[i])

        self.stack = [layer(i) for i in range(self.layers)]
        self.embed, self.final_norm = weights["embed"], weights["final_norm"]
        self.head = weights.get("lm_head", self.embed)
        self.cos_sin = device.rope_table(self.rope.table(max_len))

    # ---- a step -----------------------------------------------------------------------------------------------------
    def forward(self, device: Device, step: StepView, kv: KVCache) -> Tensor:
        """Logits [sampled rows, vocabulary] of a step, its keys and values written to `kv`."""
        t, heads, kv_heads, dim = step.tokens, self.own_heads, self.own_kv_heads, self.head_dim
        residual = device.buffer("residual", t, self.hidden)
        normed = device.buffer("normed", t, self.hidden)
        delta = device.buffer("delta", t, self.hidden)  # what the next norm adds to the residual
        qkv = device.buffer("qkv", t, (heads + 2 * kv_heads) * dim)
        attended = device.buffer("attended", t, self.heads * dim)
        gated = device.buffer("gated", t, self.intermediate)
        own_attended = device.shard(attended, self.by_head)
        own_delta = device.shard(delta, self.by_hidden)
        own_gated = device.shard(gated, self.by_intermediate)
        gate_up = device.buffer("gate_up", t, 2 * (self.by_intermediate[self.rank + 1] - self.by_intermediate[self.rank]))
        scale = dim**-0.5

        device.embed(residual, self.embed, step.ids)
        for i, layer in enumerate(self.stack):
            cache = kv.layer(i)
            if i == 0:
                device.rms_norm(normed, residual, layer.attention_norm, self.eps)
            else:
                device.add_rms_norm(normed, residual, delta, layer.attention_norm, self.eps)
            device.linear(qkv, normed, layer.qkv, layer.qkv_bias, sensitive=True)
            if self.qk_norm:
                device.head_norm(qkv, layer.q_norm, layer.k_norm, heads, kv_heads, self.eps)
            device.rope_store(qkv, step.positions, self.cos_sin, cache, step.kv_slots, heads, kv_heads)
            device.attention(own_attended, qkv, cache, step.attention, heads, kv_heads, scale, layer.window)
            device.all_gather(attended, own_attended)
            device.linear(own_delta, attended, layer.o, layer.o_bias)
            device.all_gather(delta, own_delta)
            device.add_rms_norm(normed, residual, delta, layer.mlp_norm, self.eps)
            device.linear(gate_up, normed, layer.gate_up, layer.gate_up_bias)
            device.swiglu(own_gated, gate_up)
            device.all_gather(gated, own_gated)
            device.linear(own_delta, gated, layer.down, layer.down_bias)
            device.all_gather(delta, own_delta)

        # Only rows that are sampled or scored go through the last norm and the head, the largest matrix of a small model.
        r = step.sampled
        last = device.buffer("last_residual", r, self.hidden)
        last_delta = device.buffer("last_delta", r, self.hidden)
        last_normed = device.buffer("last_normed", r, self.hidden)
        logits = device.buffer("logits", r, self.vocab)
        device.take_rows(last, residual, step.rows)
        device.take_rows(last_delta, delta, step.rows)
        device.add_rms_norm(last_normed, last, last_delta, self.final_norm, self.eps)
        own_logits = device.shard(logits, self.by_vocab)
        device.linear(own_logits, last_normed, self.head, sensitive=True)
        device.all_gather(logits, own_logits)
        return logits


def number(config: dict[str, Any], name: str, default: int | None = None) -> int:
    """A positive integer of the config; `default` where it is absent or null."""
    value = config.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or value < 1:
        raise UserError(f"config.json: {name} is {value!r}; a positive integer is expected", "model")
    return value


def windows(config: dict[str, Any], architecture: str, layers: int) -> list[int]:
    """Each layer's sliding window, 0 for none."""
    if architecture == "MistralForCausalLM":
        return [config.get("sliding_window", DEFAULT_WINDOW) or 0] * layers
    if architecture == "LlamaForCausalLM" or not config.get("use_sliding_window", False):
        return [0] * layers
    window = number(config, "sliding_window", DEFAULT_WINDOW)
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if i >= config.get("max_window_layers", 28) else "full_attention" for i in range(layers)]
    if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        raise UserError("config.json: layer_types must name full_attention or sliding_attention for each layer", "model")
    return [window if kind == "sliding_attention" else 0 for kind in kinds]
