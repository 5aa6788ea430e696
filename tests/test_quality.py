"""No loss on the compiled kernels: perplexity of the default model, as shipped and in bfloat16, beside the float32 reference.

The text is one that ships with the project; `python -m bench.quality` does the same over twenty thousand tokens.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.quality import BAR, Variant, converted, engine, perplexity, reference_engine, relative, score, windows
from engine import capacity
from engine.tokenizer import Tokenizer
from tests.assets import default_model

TEXT = Path(__file__).parent / "data" / "quality.txt"
# Of the relative difference, over as few tokens as these: bench.quality judges the bar itself.
STANDARD_ERROR = 0.0019
SIZE = 768  # tokens of a window: two of them, since the reference takes some three seconds for each


@pytest.fixture(scope="module")
def parts() -> list[list[int]]:
    """Two windows of the text, which share no context."""
    if not capacity.has_compiled_kernels():
        pytest.skip("this machine has no compiled kernels")
    return windows(Tokenizer.load(default_model()).encode(TEXT.read_text()), [], SIZE, 2 * (SIZE - 1))


def loss(v: Variant, parts: list[list[int]]) -> float:
    """How much larger the variant's perplexity is than the reference's, as a share."""
    with reference_engine(v.model) as llm:
        reference = perplexity(score(llm, parts))
    assert 10 < reference < 60, "a small model reads ordinary English"
    with engine(v.model, v.settings) as llm:
        return relative(perplexity(score(llm, parts)), reference)


def test_the_shipped_file(parts):
    assert 0 < abs(loss(Variant("q4_1", default_model(), {}), parts)) <= BAR + STANDARD_ERROR


def test_bfloat16(parts, tmp_path):
    model = converted(default_model(), tmp_path, "BF16")
    try:
        assert 0 < abs(loss(Variant("bf16", model, {"dtype": "bfloat16"}), parts[:1])) <= BAR + STANDARD_ERROR
    finally:
        model.unlink()  # 270 MB: not for the folder that pytest keeps
