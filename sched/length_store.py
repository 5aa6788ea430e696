"""Where a model's classifier of text lengths and its history are: in DEEPSERVE_HOME, by the fingerprint of the model's files.

Both are soft: what can't be read is told in the log, and the server goes on by what its callers' newest texts tell. A classifier
that was trained here goes before the one that DeepServe brings for its default model.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from engine.config import Config
from engine.tokenizer import Tokenizer
from engine.types import UserError
from scale import pull
from sched import profile_store
from sched.files import write
from sched.predict import Classifier, Lengths, read_classifier, read_history
from sched.predict_training import Told, samples_of, table, train

log = logging.getLogger(__name__)
T = TypeVar("T")

BROUGHT = Path(__file__).parent / "lengths"  # made by `python -m bench.lengths --ship`
ROOT = str(Path(__file__).parent.parent)
NICENESS = 19  # of a training beside TEs that serve


def folder() -> Path:
    return pull.home() / "lengths"


def classifier_path(fingerprint: str) -> Path:
    return folder() / f"{fingerprint}.classifier"


def history_path(fingerprint: str) -> Path:
    return folder() / f"{fingerprint}.history"


def load(fingerprint: str) -> Lengths:
    """What is known of the lengths of a model's texts."""
    own = classifier_path(fingerprint)
    lengths = Lengths(read(own, read_classifier) or read(BROUGHT / own.name, read_classifier))
    past = read(history_path(fingerprint), read_history)
    for sample in past.samples if past is not None else ():
        lengths.learn(sample)
    return lengths


def read(path: Path, decode: Callable[[bytes, str], T]) -> T | None:
    """None where there is no such file, or none that is of use."""
    try:
        return decode(path.read_bytes(), path.name)
    except FileNotFoundError:
        return None
    except (OSError, UserError) as e:
        log.warning("event=lengths_unreadable path=%s why=%s", path, e)
        return None


# ---- training -----------------------------------------------------------------------------------------------------------


def train_from_history(fingerprint: str) -> tuple[Classifier, dict[str, Told]]:
    """Train on what the server has kept, and store the classifier. Raises `UserError`."""
    path = history_path(fingerprint)
    try:
        data = path.read_bytes()
    except OSError:
        raise UserError(
            f"there is no history of this model in {folder()} yet: serve it for a while, or give texts as --history FILE.jsonl",
            "history",
        ) from None
    past = read_history(data, path.name)
    classifier, found = train(past.samples, past.model)
    write(classifier_path(fingerprint), msgspec.msgpack.encode(classifier))
    return classifier, found


async def keep(fingerprint: str, model: str, lengths: Lengths) -> bool:
    """Write a server's history, for the next training and the next start. False, and told in the log, where that can't be."""
    try:
        await asyncio.to_thread(write, history_path(fingerprint), lengths.export(model))
    except UserError as e:
        log.warning("event=lengths_unwritable why=%s", e)
        return False
    return True


async def retrain(fingerprint: str, model: str, lengths: Lengths) -> None:
    """Train again in a process of its own, which has time only when nobody else wants it, and go on with what it has learnt.
    Where it fails, the log tells why, and all stays as it is."""
    if not await keep(fingerprint, model, lengths):
        return
    code = f"import sys; sys.path.insert(0, {ROOT!r}); from sched.length_store import trainer; trainer({fingerprint!r})"
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", code),
        stdin=asyncio.subprocess.PIPE,  # closed when this process ends, whatever ends it
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )
    assert process.stderr is not None
    try:
        said = await process.stderr.read()
        await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        log.warning("event=lengths_not_trained model=%s why=%s", model, said.decode(errors="replace").strip()[-500:])
        return
    classifier = await asyncio.to_thread(read, classifier_path(fingerprint), read_classifier)
    if classifier is not None:
        lengths.adopt(classifier)
        log.info("event=lengths_trained model=%s texts=%s", model, classifier.made["texts"])


def trainer(fingerprint: str) -> None:
    """The process that `retrain` starts. It ends with the one that started it."""
    os.nice(NICENESS)

    def watch() -> None:
        os.read(0, 1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        train_from_history(fingerprint)
    except UserError as e:
        sys.exit(str(e))


def main(config: Config, history: Path | None, say: Callable[[str], None]) -> int:
    """`profile --lengths`: train on the server's own history, or on a JSONL file, and tell how well that does. Raises
    `UserError`."""
    path = pull.pull(config.model, say) if config.model in pull.KNOWN else pull.resolve(config.model)
    own = profile_store.fingerprint(path)
    if history is None:
        classifier, found = train_from_history(own)
    else:
        tokenizer = Tokenizer.load(path, config.chat_template)

        def encode(text: str) -> list[int]:
            return tokenizer.encode(tokenizer.render([{"role": "user", "content": text}]), add_special=False)

        classifier, found = train(list(samples_of(history, encode, tokenizer.eos_ids)), config.model)
        write(classifier_path(own), msgspec.msgpack.encode(classifier))
    print(table(found))
    say(f"that is of prompts it had not seen; trained on all {classifier.made['texts']} texts, it is {classifier_path(own)}")
    return 0
