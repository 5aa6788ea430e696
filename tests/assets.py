"""Files that tests need and the repository does not hold."""

import functools
from pathlib import Path

import pytest

from engine.types import UserError
from scale import pull

DEFAULT_MODEL = "smollm2-135m-instruct"


@functools.cache
def default_model() -> Path:
    """The default model's GGUF file, pulled once into the user's cache; skips the test where that can't be done."""
    try:
        return pull.pull(DEFAULT_MODEL, lambda line: None)
    except UserError as e:
        pytest.skip(f"the default model is not there: {e}")
