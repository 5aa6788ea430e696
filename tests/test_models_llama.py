"""The Llama family on the reference operators, against `transformers` on the same random weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import models
from engine.models.rope import Rope
from engine.tokenizer import Tokenizer
from engine.types import UserError
from tests import tiny
from tests.harness import Rig

ROOT = Path(__file__).resolve().parent.parent
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + 0.3 * i for i in range(8)],
    "factor": 4.0,
    "original_max_position_embeddings": 512,
}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
VARIANTS = {
    "llama": ("LlamaForCausalLM", {}),
    "llama tied": ("LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama biases": ("LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama wide heads": ("LlamaForCausalLM", {"head_dim": 32}),
    "llama one kv head": ("LlamaForCausalLM", {"num_key_value_heads": 1}),
    "llama no grouping": ("LlamaForCausalLM", {"num_key_value_heads": 4}),
    "llama linear": ("LlamaForCausalLM", {"rope_scaling": {"type": "linear", "factor": 2.5}}),
    "llama dynamic": ("LlamaForCausalLM", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "llama 3": ("LlamaForCausalLM", {"rope_scaling": LLAMA3, "rope_theta": 500000.0}),
    "llama yarn": ("LlamaForCausalLM", {"rope_scaling": YARN}),
    "llama yarn mscale": (
        "LlamaForCausalLM",
        {"rope_scaling": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7, "truncate": False}},
    ),
    "llama yarn given": ("LlamaForCausalLM", {"rope_scaling": {**YARN, "attention_factor": 1.3, "beta_fast": 8, "beta_slow": 2}}),
    "llama longrope": ("LlamaForCausalLM", {"rope_scaling": LONG}),
    "llama rope_parameters": ("LlamaForCausalLM", {"rope_parameters": {**LLAMA3, "rope_theta": 300000.0}, "rope_theta": None}),
    "mistral": ("MistralForCausalLM", {"sliding_window": None}),
    "mistral window": ("MistralForCausalLM", {"sliding_window": 7}),
    "qwen2": ("Qwen2ForCausalLM", {}),
    "qwen2 window": ("Qwen2ForCausalLM", QWEN_WINDOW),
    "qwen3": ("Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3 biases": ("Qwen3ForCausalLM", {"attention_bias": True, "rope_scaling": YARN, **QWEN_WINDOW}),
}


def reference(path: Path, ids: list[int]) -> np.ndarray:
    """Logits by transformers, float32, one whole pass."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].numpy()


@pytest.fixture(params=VARIANTS, ids=lambda name: name.replace(" ", "_"))
def variant(request, tmp_path):
    architecture, overrides = VARIANTS[request.param]
    return tiny.make(
        tmp_path / "model", architecture, **{k: v for k, v in overrides.items() if v is not None or k == "sliding_window"}
    )


def test_logits_agree_with_transformers(variant):
    """Whole, in chunks of random sizes, and in a batch where prefills, chunks and decodes of several sequences meet."""
    rng = np.random.default_rng(1)
    rig = Rig(variant)
    sequences = [rng.integers(0, tiny.VOCAB, n).tolist() for n in (97, 33, 70, 5)]
    expected = [reference(variant, ids) for ids in sequences]
    spread = np.ptp(expected[0], axis=1).min()
    assert spread > 1, "the tiny model's logits are too flat to tell anything"

    whole = rig.logits([(sequences[0], 0, 97)], [rig.table(97)])
    np.testing.assert_allclose(whole, expected[0], atol=1e-4)

    done = [0] * len(sequences)
    tables = [rig.table(len(ids)) for ids in sequences]
    while any(d < len(ids) for d, ids in zip(done, sequences, strict=True)):
        parts, taken = [], []
        for i in rng.permutation(len(sequences)):
            left = len(sequences[i]) - done[i]
            if left and rng.random() < 0.8:
                count = min(left, int(rng.choice([1, 1, 2, 5, 17, 66])))
                parts.append((sequences[i], done[i], count))
                taken.append(i)
        if not parts:
            continue
        found = rig.logits(parts, [tables[i] for i in taken])
        at = 0
        for i, (_, start, count) in zip(taken, parts, strict=True):
            np.testing.assert_allclose(found[at : at + count], expected[i][start : start + count], atol=1e-4)
            at += count
            done[i] = start + count
    rig.close()


def test_a_tiny_model_says_something(tmp_path):
    """Greedy text of the model that other tests serve depends on the prompt and isn't one token over and over."""
    rig = Rig(tiny.make(tmp_path / "model"))
    texts = [rig.greedy(prompt, 24) for prompt in ([72, 105], [1, 2, 3], [200] * 9)]
    assert all(len(set(text)) > 8 for text in texts)
    assert len({tuple(text) for text in texts}) == 3
    rig.close()


def test_the_tiny_tokenizer_goes_with_the_model(tmp_path):
    tokenizer = Tokenizer.load(tiny.make(tmp_path / "model"))
    text = "Zürich, 東京\n<|im_end|>"
    ids = tokenizer.encode(text)
    assert len(ids) == len("Zürich, 東京\n".encode()) + 1 and ids[-1] == tiny.IM_END
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.eos_ids == {tiny.IM_END, tiny.END} and tokenizer.vocab_size == tiny.VOCAB
    chat = tokenizer.render([{"role": "user", "content": "hi"}])
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_bfloat16_is_close(tmp_path):
    """In bfloat16 the same model gives nearly the same distribution: no operator loses more than its rounding."""
    path = tiny.make(tmp_path / "model", "Qwen3ForCausalLM", attention_bias=True)
    ids = np.random.default_rng(2).integers(0, tiny.VOCAB, 40).tolist()
    found = {}
    for dtype in ("float32", "bfloat16"):
        rig = Rig(path, dtype=dtype)
        table = rig.table(40)
        found[dtype] = np.concatenate([rig.logits([(ids, 0, 39)], [table]), rig.logits([(ids, 39, 1)], [table])])
        rig.close()
    difference = np.abs(found["float32"] - found["bfloat16"])
    assert np.abs(found["float32"]).mean() > 1
    assert difference.mean() < 0.15


def test_the_head_runs_on_wanted_rows_only(tmp_path):
    rig = Rig(tiny.make(tmp_path / "model"))
    ids = list(range(30))
    table = rig.table(30)
    every = rig.logits([(ids, 0, 30)], [table])
    assert np.allclose(rig.logits([(ids, 0, 30)], [table], [29, 3]), every[[29, 3]], atol=1e-5)
    assert rig.logits([(ids, 0, 30)], [table], []).shape == (0, tiny.VOCAB)
    rig.close()


def test_rope_lengths():
    """What a scaled rope can serve; a length beyond the original context takes longrope's long divisors."""

    def of(scaling: dict) -> Rope:
        return Rope({"rope_scaling": scaling}, 16, 512)

    assert of({"rope_type": "linear", "factor": 2.0}).max_len == 1024
    assert of(YARN).max_len == 512
    assert of({"rope_type": "dynamic", "factor": 2.0}).max_len == 512
    assert of(LLAMA3).max_len == 512
    short, long = of(LONG).frequencies(512)[0], of(LONG).frequencies(513)[0]
    np.testing.assert_allclose(short / long, np.array(LONG["long_factor"]) / np.array(LONG["short_factor"]), rtol=1e-6)
    rows = of({}).table(100).rows(0, 100)
    assert rows.dtype == np.float32 and rows.shape == (100, 16)
    np.testing.assert_allclose(
        rows[7], np.concatenate([f(7.0 * 10000.0 ** (-np.arange(8) / 8)) for f in (np.cos, np.sin)]), atol=1e-6
    )


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope type 'mrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope type linear needs factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "needs low_freq_factor"),
        ({"rope_scaling": {**LONG, "short_factor": [1.0], "long_factor": [1.0]}}, "1 are given, 8 are needed"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "each layer type"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers is '2'"),
        ({"num_attention_heads": 3}, "no multiple"),
        (
            {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "layer_types": ["linear_attention"] * 2},
            "layer_types",
        ),
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not supported"),
    ],
)
def test_what_is_not_supported_is_named(overrides, says):
    with pytest.raises(UserError, match=says) as e:
        model = models.build(tiny.config() | overrides)
        model.rope.table(8)
    assert e.value.param == "model"


def test_fields_that_config_json_may_leave_out():
    fields = tiny.config("Qwen3ForCausalLM")
    for name in (
        "head_dim",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_theta",
        "max_position_embeddings",
        "tie_word_embeddings",
    ):
        del fields[name]
    model = models.build(fields)
    assert (model.head_dim, model.kv_heads, model.eps, model.rope.theta, model.max_len) == (128, 4, 1e-6, 10000.0, 32768)
    assert not model.tied and any(s.name == "lm_head" for s in model.weights())
    assert models.build(tiny.config("MistralForCausalLM")).windows == [4096, 4096]
    assert models.build(tiny.config("LlamaForCausalLM", head_dim=None)).head_dim == 16


def test_models_weights_batch_and_core_need_no_torch():
    code = """
import sys
sys.modules["torch"] = None
import engine.batch, engine.core, engine.sampler, engine.weights
from engine import models
from tests import tiny
assert models.build(tiny.config()).rope.table(64).rows(0, 64).shape == (64, 16)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
