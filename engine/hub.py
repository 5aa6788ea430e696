"""A model's folder as hubs lay it out: which files it has and what its configuration says.

Light on purpose: the control process reads configurations, and needs neither numpy nor the tensors for it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.gguf import GGUF, hf_config
from engine.types import UserError


def is_gguf(path: Path) -> bool:
    """Whether `path` is to be read as a GGUF file. Raises `UserError` where it is no model at all."""
    if path.is_dir():
        return False
    if not path.exists():
        raise UserError(f"{path}: there is no such file or folder", "model")
    if path.suffix != ".gguf":
        raise UserError(f"{path}: not a model; give a folder with config.json and safetensors, or a .gguf file", "model")
    return True


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `UserError`."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"{path}: not JSON: {e}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a JSON object")
    return content


def read_optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def token_ids(value: Any) -> list[int]:
    """The ids of a setting that is absent, one id or a list of them."""
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def model_config(path: str | Path) -> dict[str, Any]:
    """config.json's content, or what a GGUF file says instead; `eos_token_id` has generation_config.json's ids too.

    Raises `UserError`.
    """
    path = Path(path)
    if is_gguf(path):
        return hf_config(GGUF(path))
    if not (path / "config.json").exists():
        ggufs = sorted(p.name for p in path.glob("*.gguf"))
        hint = f"; it holds {ggufs[0]}: give that file" if ggufs else "; a model's folder has one"
        raise UserError(f"{path}: has no config.json{hint}", "model")
    config = read_json(path / "config.json")
    ids = token_ids(config.get("eos_token_id"))
    for token in token_ids(read_optional_json(path / "generation_config.json").get("eos_token_id")):
        if token not in ids:
            ids.append(token)
    if ids:
        config["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    return config
