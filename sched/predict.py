"""How long a text will get, told from its prompt: buckets of 128 tokens, as the paper has them, with calibrated probabilities.

Two sources each give the probability of every bucket:

- the classifier, a linear model over hashed pieces of the prompt and of what is asked, trained for one model by
  `deepserve.py profile --lengths` (`sched/predict_training.py`);
- the key: how long the newest texts of the same caller were, pulled towards everybody's.

Whichever has told the newest texts better speaks. Many texts don't end but are cut, by max_tokens or by a caller who leaves: such
a text says that it got so far, and nothing about the buckets behind.

What is kept of a request are hashes of its prompt's tokens, from which the prompt can't be read. numpy alone; no I/O, no clock.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Collection, Sequence
from math import ceil
from typing import Literal, TypeVar
from zlib import crc32

import msgspec
import numpy as np
from numpy.typing import NDArray

from engine.types import SamplingParams, UserError

BUCKET = 128  # tokens
BUCKETS = 65  # the last is open: of texts with more than 8192 tokens a bucket more or less decides nothing
# Hashed features, three blocks of them: what is in the prompt, how its last turn begins and ends, and what the request is like.
# The few thousand texts that there are to learn from fill no larger ones.
TEXT, TURN, FORM = 4096, 4096, 256
SLOTS = TEXT + TURN + FORM
BLOCKS = (TEXT, TEXT + TURN)  # where the second and the third begin
WINDOW = 512  # tokens at each end of a longer prompt: what is asked stands at one of them, and the work stays bounded
OPENING, CLOSING = 8, 4  # tokens of the last turn that count by their place: "Write", "Which", the question mark
FORMAT = 1  # of the files and of the hash: with another hash old files are useless

FIRST_GUESS = 0.45  # of texts that get to a bucket end in it, where nothing is known yet: as in Azure's conversations of 2023
PULL = 8.0  # texts: a key with as many is believed as much as everybody together
NEWEST = 256  # texts of a key that count; a workload that changes is forgotten after as many
EVERYBODY = 2048  # ... and of everybody
KEYS = 1024  # callers remembered, some 10 KB each; the longest silent one is dropped
TRIAL = 32  # texts that a new classifier speaks for whatever its score
HISTORY = 8192  # texts kept for the next training: 5 MB at 300 features each, 34 MB at most
WORTH_TRAINING = 1024  # new texts; with fewer a classifier learns little beyond what keys tell

Source = Literal["asked", "classifier", "key", "everybody"]
Slots = NDArray[np.uint16]
Floats = NDArray[np.float64]
F = TypeVar("F", "History", "Classifier")


class Clues(msgspec.Struct, frozen=True, gc=False):
    """What is known of a request before it runs, and the bounds of its length in tokens."""

    slots: Slots  # the features that it has, ascending
    key: str  # the caller's name; history keeps it, so never its secret
    least: int
    most: int


class Predicted(msgspec.Struct, frozen=True, gc=False):
    """Tokens that a text will have. It ends in [`low`, `high`] with 80 % probability or a little more, and in `bucket`, the
    likeliest, with probability `confidence`."""

    mean: float
    low: int
    high: int
    confidence: float
    bucket: int
    source: Source


class Sample(msgspec.Struct, array_like=True, gc=False):
    """A text that is over, as history keeps it."""

    slots: bytes  # of its clues; uint16, little-endian
    key: str
    most: int  # tokens that it could have had
    length: int  # that it had
    ended: bool  # by itself; else it was cut at `length`

    def clues(self) -> Clues:
        """What was known before it ran."""
        return Clues(np.frombuffer(self.slots, "<u2"), self.key, 0, self.most)


class History(msgspec.Struct):
    """A file of texts that are over."""

    format: int
    model: str
    samples: list[Sample]


class Classifier(msgspec.Struct):
    """Trained for one model. The last of its buckets is open."""

    format: int
    model: str
    weights: bytes  # int8, SLOTS x buckets
    scales: list[float]  # of each bucket's weights
    bias: list[float]
    means: list[float]  # tokens, of the texts that ended in each bucket
    made: dict[str, float | int | str]  # from what, and how well it told texts that it had not seen


# ---- what is known of a request (pure) ----------------------------------------------------------------------------------


def clues(ids: Sequence[int], params: SamplingParams, key: str, room: int, ends: Collection[int]) -> Clues:
    """Of a request with the prompt `ids`, `room` tokens of context behind it, and `ends`, the ids that end a turn or a text."""
    most = room if params.max_tokens is None else min(room, params.max_tokens)
    fixed = params.ignore_eos and not params.stop and not params.stop_token_ids
    slots = slots_of(ids, params, key, ends)
    return Clues(slots, key, most if fixed else min(params.min_tokens, most), most)


def slots_of(ids: Sequence[int], params: SamplingParams, key: str, ends: Collection[int]) -> Slots:
    """The features that a request has, ascending: tokens and pairs of neighbours anywhere, tokens of the last turn by their
    place, and the form."""
    window = np.asarray(ids if len(ids) <= 2 * WINDOW else [*ids[:WINDOW], *ids[-WINDOW:]], np.uint32)
    words = window * MIX[0]
    pairs = (words[:-1] ^ (window[1:] * MIX[1])) * MIX[2]
    turn = last_turn(window, ends)
    opening, closing = turn[:OPENING], turn[::-1][:CLOSING]
    placed = np.concatenate((opening * MIX[1] ^ PLACES[: len(opening)], closing * MIX[1] ^ PLACES[OPENING:][: len(closing)]))
    found = np.zeros(SLOTS, np.bool_)
    found[words >> bits(TEXT)] = found[pairs >> bits(TEXT)] = True
    found[TEXT + (placed * MIX[2] >> bits(TURN))] = True
    found[[TEXT + TURN + crc32(text.encode()) % FORM for text in form_of(len(ids), params, key)]] = True
    return np.flatnonzero(found).astype(np.uint16)


# Odd factors with well-spread bits (the golden ratio's, and those that murmur3 and xxhash use).
MIX = np.array([0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35], np.uint32)
PLACES = (np.arange(1, OPENING + CLOSING + 1) * 0x27D4EB2F % (1 << 32)).astype(np.uint32)


def bits(size: int) -> np.uint32:
    """How far a hash is shifted so that `size`, a power of two, slots are left."""
    return np.uint32(32 - (size - 1).bit_length())


def last_turn(ids: NDArray[np.uint32], ends: Collection[int]) -> NDArray[np.uint32]:
    """What stands between the last two ends; a prompt without turns is all of it one."""
    places = np.flatnonzero(np.isin(ids, list(ends)))
    if not len(places):
        return ids
    return ids[places[-2] + 1 if len(places) > 1 else 0 : places[-1]]


def values_of(slots: Slots) -> NDArray[np.float32]:
    """What a request's features count: each block has the length 1, however much is in it."""
    first, second = np.searchsorted(slots, BLOCKS)
    counts = np.array([first, second - first, len(slots) - second])
    return np.repeat(1 / np.sqrt(np.maximum(counts, 1)), counts).astype(np.float32)


def form_of(prompt_tokens: int, params: SamplingParams, key: str) -> list[str]:
    """A request's features beside its text. Quantities are steps of a ladder: one that training hasn't seen says nothing."""
    return [
        f"prompt {round(2 * float(np.log2(prompt_tokens + 1)))}",
        f"temperature {min(round(4 * params.temperature), 8)}",
        f"greedy {params.temperature == 0 or params.top_k == 1}",
        f"most {0 if params.max_tokens is None else params.max_tokens.bit_length()}",
        f"stops {bool(params.stop)}",
        f"key {key}",
    ]


def bucket_of(length: int) -> int:
    """Bucket 0 has the lengths up to 128, bucket 1 those up to 256."""
    return min(max(length - 1, 0) // BUCKET, BUCKETS - 1)


def seen_bucket(length: int, ended: bool) -> int:
    """The bucket in which a text ended; of one that was cut the first in which it can have: it is longer than `length`."""
    return bucket_of(length if ended else length + 1)


EDGES: Floats = np.linspace(0.0, BUCKET * BUCKETS, BUCKETS + 1)
MIDDLES: Floats = EDGES[:-1] + BUCKET / 2


def judged(shares: Floats, means: Floats, known: Clues, source: Source) -> Predicted:
    """A prediction from the probability of each bucket, and the mean length in each. The request's own bounds cut it."""
    least, most = known.least, known.most
    first, last = bucket_of(least), bucket_of(most)
    inside = shares[first : last + 1].copy()
    inside[0] += shares[:first].sum()
    inside[-1] += shares[last + 1 :].sum()
    bucket = int(inside.argmax())
    # Half of a bucket's texts are taken to end before its mean, the others behind it.
    through = np.repeat(shares / 2, 2).cumsum()
    knots = np.stack((means, EDGES[1:]), axis=1).clip(EDGES[:-1, None], EDGES[1:, None]).reshape(-1)
    low, high = np.interp((0.1, 0.9), np.concatenate(((0.0,), through)), np.concatenate(((0.0,), knots)))
    return Predicted(
        mean=min(max(float(shares @ means.clip(least, most)), least), most),
        low=min(max(int(low), least), most),
        high=min(max(ceil(high), least), most),
        confidence=min(float(inside[bucket]), 1.0),
        bucket=first + bucket,
        source=source,
    )


def log_score(shares: Floats, length: int, ended: bool) -> float:
    """How well probabilities told a text: the log of what they gave to what was seen of it."""
    bucket = seen_bucket(length, ended)
    seen = shares[bucket] if ended else shares[bucket:].sum()
    return float(np.log(max(seen, 1e-6)))


# ---- sources ------------------------------------------------------------------------------------------------------------


class Ends:
    """Where the newest texts ended or were cut, by bucket."""

    def __init__(self, size: int):
        self.newest: deque[int] = deque()  # 2 * tokens, and 1 more where it ended
        self.size = size
        self.seen = np.zeros((2, BUCKETS))  # texts that were cut, and that ended, in each bucket
        self.tokens = np.zeros(BUCKETS)  # of those that ended

    def add(self, length: int, ended: bool) -> None:
        if len(self.newest) == self.size:
            self.count(self.newest.popleft(), -1)
        self.newest.append(2 * length + ended)
        self.count(self.newest[-1], 1)

    def count(self, text: int, sign: int) -> None:
        length, ended = divmod(text, 2)
        bucket = seen_bucket(length, ended == 1)
        self.seen[ended, bucket] += sign
        self.tokens[bucket] += sign * ended * length

    def hazards(self, before: Floats | float, weight: float) -> Floats:
        """Of the texts that got through a bucket or ended in it, the part that ended: pulled towards `before` as by `weight`
        texts."""
        ended = self.seen[1]
        # A text that was cut in a bucket doesn't say whether it would have ended there, so only those of later buckets count.
        through = ended[::-1].cumsum()[::-1] + self.seen[0][::-1].cumsum()[::-1] - self.seen[0]
        return (ended + weight * before) / (through + weight)

    def means(self, before: Floats) -> Floats:
        """Mean tokens of the texts that ended in each bucket, pulled towards `before` as by two texts."""
        return (self.tokens + 2 * before) / (self.seen[1] + 2)


def shares_of(hazards: Floats) -> Floats:
    """The probability of each bucket. What gets to the open one ends in it."""
    staying = np.concatenate(((1.0,), (1 - hazards[:-1]).cumprod()))
    shares = staying * hazards
    shares[-1] = staying[-1]
    return shares


class Lengths:
    """Predicts the lengths of one model's texts, and learns from those that are over."""

    def __init__(self, classifier: Classifier | None = None):
        self.everybody = Ends(EVERYBODY)
        self.keys: OrderedDict[str, Ends] = OrderedDict()
        self.history: deque[Sample] = deque(maxlen=HISTORY)
        self.untrained = 0  # texts that came into history since the last training
        self.classifier: Classifier | None = None
        self.weights = np.zeros((SLOTS, 0), np.float32)
        self.middles = MIDDLES
        self.scores: dict[Source, float] = {"classifier": 0.0, "key": 0.0}  # mean log score over the newest texts
        self.scored = 0
        if classifier is not None:
            self.adopt(classifier)

    def adopt(self, classifier: Classifier) -> None:
        """Go on with a newly trained classifier."""
        self.classifier = classifier
        scales = np.array(classifier.scales, np.float32)
        self.weights = np.frombuffer(classifier.weights, np.int8).reshape(SLOTS, len(scales)) * scales
        self.middles = MIDDLES.copy()
        self.middles[: len(scales) - 1] = classifier.means[:-1]
        self.scores = {"classifier": 0.0, "key": 0.0}
        self.scored = 0

    def predict(self, known: Clues) -> Predicted:
        """How long a request's text will be."""
        if known.least == known.most:
            return Predicted(float(known.most), known.most, known.most, 1.0, bucket_of(known.most), "asked")
        if self.classifier is not None and (self.scored < TRIAL or self.scores["classifier"] >= self.scores["key"]):
            source: Source = "classifier"
        else:
            ends = self.keys.get(known.key)
            source = "key" if ends is not None and len(ends.newest) >= PULL else "everybody"
        return self.told_by(source, known)

    def told_by(self, source: Source, known: Clues) -> Predicted:
        """What one source says."""
        ends = self.keys.get(known.key, self.everybody) if source == "key" else self.everybody
        return judged(self.shares(source, known), ends.means(self.middles), known, source)

    def observe(self, known: Clues, length: int, ended: bool) -> None:
        """A text is over with `length` tokens: by itself (an end token or a stop string), or else it was cut (max_tokens, a
        caller who left). A text that failed isn't told."""
        if known.least > 1:
            return  # its length was asked for: the model would have said less
        if self.classifier is not None:
            self.scored += 1
            rate = 1 / min(self.scored, NEWEST)
            for source in self.scores:
                self.scores[source] += rate * (log_score(self.shares(source, known), length, ended) - self.scores[source])
        self.learn(Sample(known.slots.astype("<u2").tobytes(), known.key, known.most, length, ended))
        self.untrained += 1

    def learn(self, sample: Sample) -> None:
        """Count a text in, here or in an earlier run."""
        ends = self.keys.pop(sample.key, None) or Ends(NEWEST)
        self.keys[sample.key] = ends  # now the last to be dropped
        if len(self.keys) > KEYS:
            self.keys.popitem(last=False)
        ends.add(sample.length, sample.ended)
        self.everybody.add(sample.length, sample.ended)
        self.history.append(sample)

    def shares(self, source: Source, known: Clues) -> Floats:
        """The probability of each bucket, as one source has it."""
        hazards = self.everybody.hazards(FIRST_GUESS, 2.0)
        if source == "key" and (ends := self.keys.get(known.key)) is not None:
            return shares_of(ends.hazards(hazards, PULL))
        if source != "classifier" or self.classifier is None:
            return shares_of(hazards)
        logits = values_of(known.slots) @ self.weights[known.slots] + self.classifier.bias
        found = np.exp(logits - logits.max())
        found /= found.sum()
        last = len(found) - 1
        # What is beyond the classifier's last edge is shared out as everybody's texts are.
        return np.concatenate((found[:last], found[last] * shares_of(hazards[last:])))

    # ---- training ---------------------------------------------------------------------------------------------------
    @property
    def due(self) -> bool:
        """A new training is worth its while: history has many texts that the classifier hasn't seen."""
        return self.untrained >= max(WORTH_TRAINING, len(self.history) // 4)

    def export(self, model: str) -> bytes:
        """History as a file for `profile --lengths`. Another training isn't due before there are many new texts."""
        self.untrained = 0
        return msgspec.msgpack.encode(History(FORMAT, model, list(self.history)))


# ---- files --------------------------------------------------------------------------------------------------------------


def read_history(data: bytes, name: str) -> History:
    """Raises `UserError` where `data`, of the file `name`, is none of ours or of another version."""
    again = "remove it, and the server begins a new one"
    found = decoded(data, History, name, again)
    slots = [s.slots for s in found.samples]
    if any(len(s) % 2 for s in slots) or (np.frombuffer(b"".join(slots), "<u2") >= SLOTS).any():
        raise UserError(f"{name} has features that there aren't; {again}")
    return found


def read_classifier(data: bytes, name: str) -> Classifier:
    """Raises `UserError` where `data`, of the file `name`, is none of ours or of another version."""
    again = "train it again: deepserve.py profile --lengths"
    found = decoded(data, Classifier, name, again)
    count = len(found.scales)
    if not 2 <= count <= BUCKETS or len(found.weights) != SLOTS * count or not len(found.bias) == len(found.means) == count:
        raise UserError(f"{name}: the weights don't fit its {count} buckets; {again}")
    return found


def decoded(data: bytes, kind: type[F], name: str, instead: str) -> F:
    try:
        found = msgspec.msgpack.decode(data, type=kind)
    except msgspec.DecodeError as e:
        raise UserError(f"{name} holds no {kind.__name__.lower()} of text lengths: {e}; {instead}") from None
    if found.format != FORMAT:
        raise UserError(f"{name} has format {found.format}, and this is version {FORMAT}; {instead}")
    return found
