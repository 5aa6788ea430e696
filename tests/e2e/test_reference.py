"""The default model against an independent implementation: greedy ids must be equal in float32, however the work is cut.

tests/data/reference_greedy.json is made by tests/make_reference.py (transformers on the same file, dequantised by the
gguf package).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepserve import LLM, SamplingParams
from tests.assets import default_model

VECTORS = json.loads((Path(__file__).resolve().parent.parent / "data" / "reference_greedy.json").read_text())
GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
SMALL = {"max_model_len": 2560, "kv_cache_memory_bytes": "2G", "dtype": "float32"}
COMPILED = SMALL | {"dtype": "bfloat16"}


def answers(llm: LLM, vectors: list[dict]) -> list[list[int]]:
    return [out.outputs[0].token_ids for out in llm.generate([v["prompt"] for v in vectors], GREEDY)]


WANT = [v["greedy"] for v in VECTORS]


def test_there_are_twenty_prompts_of_mixed_length():
    lengths = [len(v["prompt"]) for v in VECTORS]
    assert len(lengths) == 20 and min(lengths) <= 2 and max(lengths) > 800 and all(len(w) == 64 for w in WANT)


def test_all_at_once_then_alone_on_prefix_hits():
    with LLM(default_model(), **SMALL) as llm:
        assert answers(llm, VECTORS) == WANT, "cold, whole, all at once"
        for vector in VECTORS:
            (out,) = llm.generate([vector["prompt"]], GREEDY)
            assert out.outputs[0].token_ids == vector["greedy"], "alone, on a prefix hit"
            assert out.num_cached_tokens == (len(vector["prompt"]) - 1) // 16 * 16


@pytest.mark.parametrize("overlapped", [True, False], ids=["overlapped", "plain"])
def test_chunked_and_cold(overlapped):
    with LLM(
        default_model(), **SMALL, max_num_batched_tokens=80, enable_prefix_caching=False, async_scheduling=overlapped
    ) as llm:
        assert answers(llm, VECTORS) == WANT


def test_alone_and_cold():
    with LLM(default_model(), **SMALL, enable_prefix_caching=False) as llm:
        for vector in VECTORS[::3]:
            assert answers(llm, [vector]) == [vector["greedy"]]


@pytest.mark.parametrize(("quantization", "kv", "alike"), [("none", "auto", 16), ("auto", "auto", 14), ("none", "int8", 14)])
def test_on_the_compiled_kernels_every_text_is_the_same_however_the_work_is_cut(quantization, kv, alike):
    """bfloat16 (and more so a quantised matrix, with activations rounded for it, or integers as keys and values) is not float32,
    but equal to itself bit for bit: all at once cold, on prefix hits, chunked, alone, on two TEs; and it mostly says what the
    float32 reference says."""
    settings = COMPILED | {"quantization": quantization, "kv_cache_dtype": kv}
    with LLM(default_model(), **settings) as llm:
        texts = answers(llm, VECTORS)
        assert answers(llm, VECTORS) == texts, "on prefix hits"
    with LLM(default_model(), **settings, te=2, max_num_batched_tokens=80, enable_prefix_caching=False) as llm:
        assert answers(llm, VECTORS) == texts, "chunked, on two TEs"
        assert [answers(llm, [v])[0] for v in VECTORS[::4]] == texts[::4], "alone"
    for how in ({"pd": "1p1d"}, {"pd": "1p1d", "kv_transfer": "request"}, {"pd": "semi"}):
        with LLM(default_model(), **settings, **how) as llm:
            assert answers(llm, VECTORS) == texts, f"prefill and decode apart, {how}"
    # Once a text differs in one word it goes its own way, so count first words only.
    firsts = [a[:8] == b[:8] for a, b in zip(texts, WANT, strict=True)]
    assert sum(firsts) >= alike


def test_three_vectors_made_again():
    """The stored ids are what the independent implementation says today."""
    import torch

    from tests.make_reference import greedy, load

    model = load(default_model())
    with torch.inference_mode():
        for i in (1, 7, 14):
            assert greedy(model, VECTORS[i]["prompt"], 64) == VECTORS[i]["greedy"]
