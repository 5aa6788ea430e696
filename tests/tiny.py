"""Tiny random models, laid out as hubs lay them out: config, weights, tokenizer, chat template. No downloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from engine import models

SPECIALS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
IM_START, IM_END, END = range(256, 259)
VOCAB = 259

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MODEL_TYPES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}


def config(architecture: str = "LlamaForCausalLM", **overrides: Any) -> dict[str, Any]:
    """config.json of a tiny model; `overrides` replace fields."""
    base = {
        "architectures": [architecture],
        "model_type": MODEL_TYPES[architecture],
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "bos_token_id": END,
        "eos_token_id": IM_END,
        "torch_dtype": "float32",
    }
    return base | overrides


def make(folder: Path, architecture: str = "LlamaForCausalLM", *, seed: int = 0, **overrides: Any) -> Path:
    """Write a whole model into `folder` and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = config(architecture, **overrides)
    write_json(folder / "config.json", fields)
    write_json(folder / "generation_config.json", {"bos_token_id": END, "eos_token_id": [IM_END, END]})
    save_file(tensors(fields, seed), folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


def tensors(fields: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights under Hugging Face's names.

    Matrices are wide enough that the layers outweigh the embedding that enters the residual: the likeliest next token depends
    on the whole text and not on the last token alone.
    """
    rng = np.random.default_rng(seed)
    found = {}
    for spec in models.build(fields).weights():
        # A packed spec is the rows of its sources, in sizes that only the model knows: q, k, v or two equal halves.
        for name, rows in zip(spec.sources, source_rows(fields, spec), strict=True):
            shape = (rows, *spec.shape[1:])
            noise = rng.standard_normal(shape, np.float32)
            if name.endswith("norm.weight"):
                found[name] = 1.0 + 0.2 * noise
            elif len(shape) == 1:
                found[name] = 0.3 * noise
            elif spec.kind == "embedding":
                found[name] = 0.5 * noise
            else:
                found[name] = noise * np.float32(2.0 / shape[1] ** 0.5)
    return found


def source_rows(fields: dict[str, Any], spec: models.WeightSpec) -> list[int]:
    count = len(spec.sources)
    if count == 3:
        model = models.build(fields)
        return [model.heads * model.head_dim] + [model.kv_heads * model.head_dim] * 2
    return [spec.shape[0] // count] * count


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: a token a byte (not of its number), and three special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHATML,
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "model_max_length": 512,
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1))
