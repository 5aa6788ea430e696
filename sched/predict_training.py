"""Training for `sched/predict.py`: from texts that are over to a classifier, and how well it does.

A multinomial regression, fitted by accelerated gradient descent on all texts at once: a few thousand of them by a few thousand
features are one matrix, and numpy turns it over in seconds. A text that was cut counts for all the buckets that it may have ended
in. When the fit ends, and how sharp the probabilities come out, is decided on texts that the fit hasn't seen; texts with the same
prompt are never on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Annotated
from zlib import crc32

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from engine.types import SamplingParams, UserError
from sched.predict import (
    BUCKETS,
    FORMAT,
    MIDDLES,
    SLOTS,
    TEXT,
    TURN,
    Classifier,
    Lengths,
    Sample,
    Source,
    bucket_of,
    log_score,
    seen_bucket,
    slots_of,
    values_of,
)

FEWEST = 200  # texts; with fewer a classifier has nothing to tell that a key's newest texts don't
DECAY = 2e-4  # holds the weights down; how soon the fit ends does more
LOOK = 10  # steps of the fit between two looks at the texts that it doesn't see
PATIENCE = 3  # looks that may go by without ...
GAIN = 0.998  # ... the loss on those texts falling to this part of the least one
MOST_STEPS = 400
PART = 5  # one of so many texts is not seen by the fit
REACH = 0.98  # of the texts are over where the open bucket begins
OPEN = 1 << 20  # tokens that a text could have had where its line doesn't say
PRIOR = 0.5  # texts that every bucket is thought to have had

Floats = NDArray[np.float32]


class Line(msgspec.Struct):
    """A line of a JSONL file of prompts and lengths."""

    length: Annotated[int, Meta(ge=0)]
    prompt: str = ""  # a user's message, for the chat template ...
    ids: list[Annotated[int, Meta(ge=0, lt=1 << 32)]] = []  # ... or the prompt's token ids as the model had them
    ended: bool = True
    temperature: Annotated[float, Meta(ge=0.0)] = 1.0
    max_tokens: int | None = None
    key: str = ""


class Told(msgspec.Struct):
    """How well a source told texts."""

    texts: int
    accuracy: float  # part that ended in the bucket that was held likeliest
    surest_half: float  # ... of the half of which the source was surest
    within_one: float  # ... or in one beside it
    confidence: float  # mean probability of the likeliest bucket: calibrated where it is the accuracy
    calibration_error: float  # mean distance of confidence and accuracy, over ten parts of equal size by confidence
    inside: float  # part between `low` and `high`: 0.8 where calibrated
    mean_error: float  # mean distance of `mean` and length, tokens
    log_loss: float  # mean, nats


# ---- texts --------------------------------------------------------------------------------------------------------------


def samples_of(path: Path, encode: Callable[[str], Sequence[int]], ends: frozenset[int]) -> Iterator[Sample]:
    """The texts of a JSONL file; `encode` is what the model is given for a user's message. Raises `UserError`."""
    form = '{"prompt": "…", "length": 93}, with "ids" for "prompt" where they are at hand'
    try:
        lines = path.read_bytes().splitlines()
    except OSError as e:
        raise UserError(f"--history {path}: {e.strerror}") from None
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        try:
            line = msgspec.json.decode(text, type=Line)
        except msgspec.DecodeError as e:
            raise UserError(f"--history {path}, line {number}: {e}; lines look like {form}") from None
        if not line.ids and not line.prompt:
            raise UserError(f"--history {path}, line {number}: there is no prompt; lines look like {form}")
        ids = line.ids or encode(line.prompt)
        yield sample_of(line, ids, ends)


def sample_of(line: Line, ids: Sequence[int], ends: frozenset[int], keyed: bool = True) -> Sample:
    """`keyed`: the key is a feature, too."""
    params = SamplingParams(temperature=line.temperature, max_tokens=line.max_tokens)
    most = line.max_tokens if line.max_tokens is not None else OPEN if line.ended else line.length
    slots = slots_of(ids, params, line.key if keyed else "", ends)
    return Sample(slots.astype("<u2").tobytes(), line.key, most, line.length, line.ended)


def prompt_of(sample: Sample) -> int:
    """A number that texts with the same prompt have in common."""
    slots = np.frombuffer(sample.slots, "<u2")
    return crc32(slots[slots < TEXT + TURN].tobytes())


def used_by(samples: Sequence[Sample]) -> NDArray[np.intp]:
    """The features that tell texts apart. What all have is left out: the bias is enough, and holds for requests without it."""
    count = np.zeros(SLOTS, np.intp)
    for sample in samples:
        count[np.frombuffer(sample.slots, "<u2")] += 1
    return np.flatnonzero((count > 0) & (count < len(samples)))


def matrix(samples: Sequence[Sample], used: NDArray[np.intp]) -> Floats:
    """A row for each text, a column for each of the features `used`; others are left out."""
    place = np.full(SLOTS, -1)
    place[used] = np.arange(len(used))
    rows = np.zeros((len(samples), len(used)), np.float32)
    for row, sample in zip(rows, samples, strict=True):
        slots = np.frombuffer(sample.slots, "<u2")
        there = place[slots] >= 0
        row[place[slots][there]] = values_of(slots)[there]
    return rows


def possible(samples: Sequence[Sample], buckets: int) -> NDArray[np.bool_]:
    """Which buckets each text may have ended in: the one where it did, or all from the one on where it was cut."""
    first = np.array([min(seen_bucket(s.length, s.ended), buckets - 1) for s in samples])[:, None]
    ended = np.array([s.ended for s in samples])[:, None]
    every = np.arange(buckets)
    return np.where(ended, every == first, every >= first)


# ---- the fit ------------------------------------------------------------------------------------------------------------


class Fit(msgspec.Struct):
    weights: Floats  # of the columns of its matrix
    bias: Floats
    steps: int


def fits(rows: Floats, possible: NDArray[np.bool_]) -> Iterator[Fit]:
    """The fit after every LOOK steps."""
    shares = (possible / possible.sum(1, keepdims=True)).sum(0) + PRIOR
    weights = np.zeros((rows.shape[1], possible.shape[1]), np.float32)
    bias = np.log(shares / shares.sum()).astype(np.float32)
    before = weights, bias
    rate = np.float32(1 / (0.5 * steepest(rows) + 0.5))
    for step in range(MOST_STEPS):
        ahead = np.float32(step / (step + 3))  # Nesterov's
        looking = weights + ahead * (weights - before[0]), bias + ahead * (bias - before[1])
        before = weights, bias
        found = softmax(rows @ looking[0] + looking[1])
        likely = np.where(possible, found, 0)
        slope = (found - likely / likely.sum(1, keepdims=True)) / np.float32(len(rows))
        weights = looking[0] - rate * (rows.T @ slope + np.float32(DECAY) * looking[0])
        bias = looking[1] - rate * slope.sum(0)
        if (step + 1) % LOOK == 0:
            yield Fit(weights, bias, step + 1)


def best_of(fits: Iterable[Fit], rows: Floats, possible: NDArray[np.bool_]) -> tuple[Fit, Floats]:
    """The fit that tells the texts of `rows`, which it hasn't seen, best, and its logits for them. Later ones know the texts that
    they are fitted to by heart."""
    best: tuple[Fit, Floats] | None = None
    least, since = np.inf, 0
    for fit in fits:
        logits = rows @ fit.weights + fit.bias
        found = loss(softmax(logits), possible)
        since = 0 if found < GAIN * least else since + 1
        if found < least:
            best, least = (fit, logits), found
        if since == PATIENCE:
            break
    assert best is not None
    return best


def steepest(rows: Floats) -> float:
    """The largest eigenvalue of the features' second moments, by power iteration: how far a step may go."""
    vector, norm = np.ones(rows.shape[1], np.float32), np.float32(1.0)
    for _ in range(10):
        vector = rows.T @ (rows @ (vector / norm)) / np.float32(len(rows))
        norm = np.float32(np.linalg.norm(vector))
    return float(norm)


def softmax(logits: Floats) -> Floats:
    found = np.exp(logits - logits.max(1, keepdims=True))
    return found / found.sum(1, keepdims=True)


def loss(found: Floats, possible: NDArray[np.bool_]) -> float:
    """Mean log loss, nats."""
    return float(-np.log(np.maximum(np.where(possible, found, 0).sum(1), 1e-6)).mean())


def sharpness(logits: Floats, possible: NDArray[np.bool_]) -> float:
    """What logits are to be multiplied by for calibrated probabilities: the least log loss on texts the fit hasn't seen."""
    steps = np.geomspace(0.3, 3.0, 47)
    return float(steps[np.argmin([loss(softmax(logits * step), possible) for step in steps])])


def train(samples: Sequence[Sample], model: str) -> tuple[Classifier, dict[str, Told]]:
    """A classifier for the texts of a model, and how well such a one and the other sources tell texts that they haven't seen.
    Raises `UserError` where there are too few."""
    seen, unseen = apart(samples)
    if len(samples) < FEWEST or not seen or not unseen:
        raise UserError(
            f"{len(samples)} texts are too few to learn from, or too alike; give a history of {FEWEST} and more", "history"
        )
    buckets = buckets_of(samples)
    used, ends = used_by(seen), possible(unseen, buckets)
    best, logits = best_of(fits(matrix(seen, used), possible(seen, buckets)), matrix(unseen, used), ends)
    sharp = sharpness(logits, ends)
    found = compared(classifier_of(best, used, sharp, seen, model), seen, unseen)
    used = used_by(samples)
    last = next(fit for fit in fits(matrix(samples, used), possible(samples, buckets)) if fit.steps == best.steps)
    classifier = classifier_of(last, used, sharp, samples, model)
    classifier.made = {"texts": len(samples), "steps": best.steps, "sharpness": round(sharp, 3)} | {
        name: round(value, 4) for name, value in msgspec.structs.asdict(found["classifier"]).items() if name != "texts"
    }
    return classifier, found


def apart(samples: Sequence[Sample], turn: int = 0, fold: int = 0) -> tuple[list[Sample], list[Sample]]:
    """Texts to learn from, and one of PART to judge by: another one for another `fold`, all others for another `turn`. A prompt's
    texts stay together."""
    seen: list[Sample] = []
    unseen: list[Sample] = []
    for sample in samples:
        (unseen if prompt_of(sample) // PART**turn % PART == fold else seen).append(sample)
    return seen, unseen


def classifier_of(fit: Fit, used: NDArray[np.intp], sharp: float, samples: Sequence[Sample], model: str) -> Classifier:
    weights = np.zeros((SLOTS, len(fit.bias)), np.float32)
    weights[used] = fit.weights * np.float32(sharp)
    scales = np.maximum(np.abs(weights).max(0) / 127, np.float32(1e-9))
    return Classifier(
        format=FORMAT,
        model=model,
        weights=np.rint(weights / scales).astype(np.int8).tobytes(),
        scales=[float(scale) for scale in scales],
        bias=[round(float(b), 5) for b in fit.bias * sharp],
        means=means_of(samples, len(scales)),
        made={},
    )


def buckets_of(samples: Sequence[Sample]) -> int:
    """As many as the texts fill, the open one included."""
    lengths = sorted(s.length for s in samples)
    return min(bucket_of(lengths[int(REACH * (len(lengths) - 1))]) + 2, BUCKETS)


def means_of(samples: Sequence[Sample], buckets: int) -> list[float]:
    means = []
    for bucket in range(buckets):
        lengths = [s.length for s in samples if s.ended and min(bucket_of(s.length), buckets - 1) == bucket]
        means.append(round(sum(lengths) / len(lengths), 1) if lengths else float(MIDDLES[bucket]))
    return means


# ---- how well -----------------------------------------------------------------------------------------------------------


def compared(classifier: Classifier, seen: Sequence[Sample], unseen: Sequence[Sample]) -> dict[str, Told]:
    """How well each source tells unseen texts: the classifier, the newest texts of the key, and everybody's, whose likeliest
    bucket is the same for all requests."""
    lengths = Lengths(classifier)
    for sample in seen:
        lengths.learn(sample)
    sources: tuple[Source, ...] = ("classifier", "key", "everybody")
    return {source: judge(lengths, source, unseen) for source in sources}


def judge(lengths: Lengths, source: Source, samples: Sequence[Sample]) -> Told:
    """Texts whose caller left are passed over: nobody knows how long they would have got. Those that were cut at the length
    that they could have had are told by that."""
    whole = [s for s in samples if s.ended or s.length >= s.most]
    told = [lengths.told_by(source, s.clues()) for s in whole]
    off = np.array([abs(t.bucket - bucket_of(s.length)) for t, s in zip(told, whole, strict=True)])
    sure = np.array([t.confidence for t in told])
    parts = [part for part in np.array_split(np.argsort(sure, kind="stable"), 10) if len(part)]
    return Told(
        texts=len(whole),
        accuracy=float((off == 0).mean()),
        surest_half=float((off[np.argsort(-sure, kind="stable")[: ceil(len(whole) / 2)]] == 0).mean()),
        within_one=float((off <= 1).mean()),
        confidence=float(sure.mean()),
        calibration_error=float(sum(len(p) * abs((off[p] == 0).mean() - sure[p].mean()) for p in parts) / len(whole)),
        inside=float(np.mean([t.low <= s.length <= t.high for t, s in zip(told, whole, strict=True)])),
        mean_error=float(np.mean([abs(t.mean - s.length) for t, s in zip(told, whole, strict=True)])),
        log_loss=-float(np.mean([log_score(lengths.shares(source, s.clues()), s.length, s.ended) for s in whole])),
    )


def table(found: Mapping[str, Told]) -> str:
    """For people."""
    heads = ("in bucket", "surest half", "within one", "sure", "miscalibrated", "low to high", "off by", "log loss")
    lines = [" " * 12 + "".join(f"{head:>14}" for head in heads)]
    lines += [
        f"{name:12}{t.accuracy:>14.1%}{t.surest_half:>14.1%}{t.within_one:>14.1%}{t.confidence:>14.1%}{t.calibration_error:>14.1%}{t.inside:>14.1%}"
        f"{f'{t.mean_error:.0f} tokens':>14}{t.log_loss:>14.3f}"
        for name, t in found.items()
    ]
    return "\n".join(lines)
