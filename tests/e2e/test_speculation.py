"""Speculation through real processes: the same answers, several ids of a sequence in one message, and it shows in the metrics."""

from __future__ import annotations

import asyncio

from deepserve import AsyncLLM, RequestOutput, SamplingParams
from tests import tiny

SMALL = {"max_model_len": 256, "kv_cache_memory_bytes": 32 << 20}
CASES = [
    SamplingParams(temperature=0, max_tokens=80, ignore_eos=True, logprobs=2),
    SamplingParams(temperature=0.5, seed=3, logit_bias={65: 12.0, 66: 12.0}, max_tokens=80, logprobs=1),  # repeats itself
    SamplingParams(temperature=0.3, seed=4, n=3, max_tokens=50, stop=["e", "q"]),
    SamplingParams(temperature=0.4, seed=5, top_p=0.9, max_tokens=61, min_tokens=40),
]


async def answers(folder, **settings) -> tuple[list[RequestOutput], str]:
    async with AsyncLLM(folder, **SMALL, **settings) as engine:

        async def one(params: SamplingParams) -> RequestOutput:
            return [output async for output in engine.generate("abcabcabcabc abc", params)][-1]

        outputs = await asyncio.gather(*(one(p) for p in CASES))
        return outputs, engine.metrics().decode()


def test_answers_are_the_same_and_the_metrics_tell(tmp_path):
    folder = tiny.make(tmp_path / "tiny")
    config = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1}
    plain, _ = asyncio.run(answers(folder))
    drafted, metrics = asyncio.run(answers(folder, speculative_config=config))
    for a, b in zip(plain, drafted, strict=True):
        for x, y in zip(a.outputs, b.outputs, strict=True):
            assert (x.text, list(x.token_ids), x.finish_reason, x.logprobs) == (
                y.text,
                list(y.token_ids),
                y.finish_reason,
                y.logprobs,
            )
    counts = {
        line.split("{")[0]: float(line.split()[-1]) for line in metrics.splitlines() if "spec_decode" in line and line[0] != "#"
    }
    drafts, tokens, accepted = (
        counts[f"deepserve:spec_decode_{what}_total"] for what in ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
    )
    assert 0 < drafts <= tokens and 0 < accepted <= tokens
