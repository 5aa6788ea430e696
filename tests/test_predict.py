"""Lengths of texts told from their prompts: bounds, learning, calibration, files, and the training beside a server."""

from __future__ import annotations

import asyncio
import json
import os
import random
from array import array
from itertools import islice

import msgspec
import numpy as np
import pytest

from engine.types import SamplingParams, UserError
from sched import length_store, predict_training
from sched.predict import (
    BUCKETS,
    FIRST_GUESS,
    FORMAT,
    HISTORY,
    KEYS,
    MIDDLES,
    SLOTS,
    TEXT,
    TURN,
    Classifier,
    Ends,
    History,
    Lengths,
    Sample,
    bucket_of,
    clues,
    judged,
    log_score,
    read_classifier,
    read_history,
    shares_of,
    slots_of,
    values_of,
)
from sched.predict_training import (
    apart,
    compared,
    fits,
    loss,
    matrix,
    possible,
    prompt_of,
    samples_of,
    sharpness,
    softmax,
    train,
    used_by,
)

END = 2  # ends a turn
GREEDY = SamplingParams(temperature=0.0, max_tokens=1024)


def prompt(kind: int, rng: random.Random) -> list[int]:
    """A chat whose last turn begins with what its length hangs on."""
    words = [rng.randrange(100, 110) for _ in range(rng.randrange(5, 40))]
    return [1, 9, END, 1, 5, 3000 + kind, *words, END, 1, 6]


def text(kind: int, rng: random.Random, key: str = "", most: int = 1024) -> Sample:
    """Kind 0 is short, kind 1 some 300 tokens, kind 2 is cut."""
    length = min(most, (rng.randrange(1, 100), rng.randrange(270, 380), 5000)[kind])
    params = SamplingParams(temperature=0.0, max_tokens=most)
    slots = slots_of(prompt(kind, rng), params, key, {END})
    return Sample(slots.tobytes(), key, most, length, length < most)


def texts(count: int, seed: int = 0) -> list[Sample]:
    rng = random.Random(seed)
    return [text(rng.randrange(3), rng) for _ in range(count)]


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """What these texts have to tell is soon learnt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predict_training, "MOST_STEPS", 80)
        yield


@pytest.fixture(scope="module")
def trained(few_steps) -> Classifier:
    return train(texts(600), "tiny")[0]


# ---- what is known of a request -----------------------------------------------------------------------------------------


def test_the_features_of_a_request():
    ids = prompt(1, random.Random(0))
    slots = slots_of(ids, GREEDY, "", {END})
    assert list(slots) == sorted(set(slots.tolist())) and slots.max() < SLOTS
    np.testing.assert_array_equal(slots, slots_of(array("i", ids), GREEDY, "", {END}))
    assert set(slots_of(ids, GREEDY, "somebody", {END})) != set(slots)
    # Another temperature is another form, the text is the same.
    warm = slots_of(ids, SamplingParams(temperature=0.7, max_tokens=1024), "", {END})
    np.testing.assert_array_equal(warm[warm < TEXT + TURN], slots[slots < TEXT + TURN])
    assert set(warm) != set(slots)


def test_each_block_of_features_counts_alike():
    slots = slots_of(prompt(0, random.Random(0)), GREEDY, "", {END})
    values = values_of(slots)
    for low, high in ((0, TEXT), (TEXT, TEXT + TURN), (TEXT + TURN, SLOTS)):
        assert np.square(values[(slots >= low) & (slots < high)]).sum() == pytest.approx(1.0, abs=1e-5)


def test_where_the_last_turn_stands_in_the_prompt_does_not_matter():
    ids = prompt(2, random.Random(1))
    longer = [1, 9, *range(50, 90), END, 1, 5, 7, END, 1, 6, 8, *ids[2:]]
    placed = [slots[(slots >= TEXT) & (slots < TEXT + TURN)] for slots in (slots_of(i, GREEDY, "", {END}) for i in (ids, longer))]
    np.testing.assert_array_equal(*placed)


@pytest.mark.parametrize("ids", [[7], [END], [END, END], [1, END], list(range(5000)), [49151] * 3])
def test_any_prompt_has_features(ids):
    assert len(slots_of(ids, GREEDY, "", {END})) >= 3
    assert len(slots_of(ids, GREEDY, "", set())) >= 3


def test_a_long_prompt_is_no_more_work():
    assert len(slots_of(list(range(100_000)), GREEDY, "", {END})) < 2600


@pytest.mark.parametrize(
    ("params", "room", "bounds"),
    [
        (SamplingParams(max_tokens=None), 500, (0, 500)),
        (SamplingParams(max_tokens=100), 500, (0, 100)),
        (SamplingParams(max_tokens=1000, min_tokens=20), 500, (20, 500)),
        (SamplingParams(max_tokens=100, ignore_eos=True), 500, (100, 100)),
        (SamplingParams(max_tokens=100, ignore_eos=True, stop=["."]), 500, (0, 100)),
    ],
)
def test_the_bounds_that_a_request_sets_itself(params, room, bounds):
    known = clues([5, 6], params, "", room, {END})
    assert (known.least, known.most) == bounds


def test_buckets():
    assert [bucket_of(n) for n in (0, 1, 128, 129, 256, 257, 10**9)] == [0, 0, 0, 1, 1, 2, BUCKETS - 1]


# ---- predictions --------------------------------------------------------------------------------------------------------


def test_a_prediction_keeps_within_the_requests_bounds():
    rng = np.random.default_rng(0)
    for _ in range(300):
        shares = rng.dirichlet(np.full(BUCKETS, 0.1))
        most = int(rng.integers(1, 10_000))
        known = clues([5], SamplingParams(max_tokens=most, min_tokens=int(rng.integers(0, most))), "", 9000, set())
        told = judged(shares, MIDDLES, known, "key")
        assert known.least <= told.low <= told.high <= known.most
        assert known.least <= told.mean <= known.most
        assert bucket_of(known.least) <= told.bucket <= bucket_of(known.most)
        assert 0 < told.confidence <= 1 + 1e-9


def test_a_text_that_must_have_a_length_is_told_exactly():
    told = Lengths().predict(clues([5], SamplingParams(max_tokens=77, ignore_eos=True), "", 500, {END}))
    assert (told.mean, told.low, told.high, told.confidence, told.source) == (77.0, 77, 77, 1.0, "asked")


def test_nothing_is_known_at_first():
    told = Lengths().predict(clues([5], SamplingParams(max_tokens=None), "", 4096, {END}))
    assert told.source == "everybody" and told.bucket == 0
    assert told.confidence == pytest.approx(FIRST_GUESS)
    assert 100 < told.mean < 300


def test_max_tokens_takes_the_probability_of_longer_texts():
    lengths = Lengths()
    for _ in range(200):
        lengths.observe(clues([5], SamplingParams(max_tokens=None), "", 4096, {END}), 600, True)
    told = lengths.predict(clues([5], SamplingParams(max_tokens=200), "", 4096, {END}))
    assert told.bucket == 1 and told.confidence > 0.95
    assert told.mean == pytest.approx(200, abs=5) and told.high == 200


def test_a_key_is_told_by_its_own_newest_texts():
    lengths = Lengths()
    for _ in range(50):
        lengths.observe(clues([5], GREEDY, "short", 4096, {END}), 10, True)
        lengths.observe(clues([5], GREEDY, "long", 4096, {END}), 500, True)
    short, long, new = (lengths.predict(clues([5], GREEDY, key, 4096, {END})) for key in ("short", "long", "new"))
    assert (short.source, long.source, new.source) == ("key", "key", "everybody")
    assert (short.bucket, long.bucket) == (0, 3)
    assert short.mean < 80 < new.mean < 400 < long.mean < 500
    assert short.confidence > 0.85 and long.confidence > 0.85 and new.confidence < 0.7


def test_a_text_that_was_cut_says_nothing_about_longer_ones():
    ends = Ends(1000)
    for _ in range(50):
        ends.add(100, True)
        ends.add(300, False)
    shares = shares_of(ends.hazards(0.5, 1e-6))
    assert shares[0] == pytest.approx(0.5, abs=1e-3)
    assert shares[1] == pytest.approx(0.0, abs=1e-3)  # fifty got through it
    assert shares[2] == pytest.approx(0.25, abs=1e-3)  # nobody knows: the guess
    assert log_score(shares, 300, False) == pytest.approx(np.log(0.5), abs=1e-2)


def test_hazards_and_shares_are_probabilities():
    rng = random.Random(0)
    ends = Ends(64)
    for _ in range(500):
        ends.add(rng.randrange(0, 12_000), rng.random() < 0.6)
        hazards = ends.hazards(FIRST_GUESS, 2.0)
        assert ((hazards >= 0) & (hazards <= 1)).all()
        assert shares_of(hazards).sum() == pytest.approx(1.0)
    assert len(ends.newest) == 64 and ends.seen.sum() == 64 and (ends.seen >= 0).all()
    assert ends.tokens.sum() == sum(text // 2 for text in ends.newest if text % 2)


def test_lengths_that_were_asked_for_teach_nothing():
    lengths = Lengths()
    lengths.observe(clues([5], SamplingParams(max_tokens=900, ignore_eos=True), "", 4096, {END}), 900, False)
    assert not lengths.history and not lengths.keys and not lengths.due


def test_keys_and_history_are_bounded():
    lengths = Lengths()
    known = clues([5], GREEDY, "", 4096, {END})
    for number in range(HISTORY + 10):
        lengths.observe(msgspec.structs.replace(known, key=str(number)), 10, True)
    assert len(lengths.keys) == KEYS and len(lengths.history) == HISTORY
    assert next(iter(lengths.keys)) == str(HISTORY + 10 - KEYS)


# ---- the classifier -----------------------------------------------------------------------------------------------------


def test_the_classifier_tells_what_the_prompt_says(trained):
    lengths = Lengths(trained)
    rng = random.Random(7)
    found = [lengths.predict(clues(prompt(kind, rng), GREEDY, "", 4096, {END})) for kind in (0, 1, 2)]
    assert [told.bucket for told in found] == [0, 2, 7]
    assert all(told.source == "classifier" for told in found)
    assert all(told.confidence > 0.7 for told in found)
    assert found[0].mean < found[1].mean < found[2].mean


def test_what_all_texts_had_in_common_is_not_missed(trained):
    """They all had max_tokens=1024; a request with another bound is told the same, but for the bound."""
    lengths = Lengths(trained)
    ids = prompt(1, random.Random(3))
    same, other = (
        lengths.predict(clues(ids, SamplingParams(temperature=0.0, max_tokens=n), "", 4096, {END})) for n in (1024, 700)
    )
    assert other.bucket == same.bucket and other.confidence == pytest.approx(same.confidence, abs=1e-6)


def test_it_does_better_than_the_key_and_is_calibrated():
    seen, unseen = apart(texts(800), 1)
    classifier, _ = train(seen, "tiny")
    found = compared(classifier, seen, unseen)
    assert found["classifier"].accuracy > 0.95 > 0.6 > found["key"].accuracy
    assert found["classifier"].calibration_error < 0.1
    assert found["classifier"].log_loss < found["key"].log_loss
    assert classifier.made["texts"] == len(seen)


def test_chance_is_told_as_chance():
    """Where the prompt says nothing, the probabilities are those of the lengths."""
    rng = random.Random(3)
    samples = [text(1, rng) for _ in range(900)]
    for sample in samples:
        sample.length = rng.choice((50, 50, 50, 500))
    seen, unseen = apart(samples, 1)
    told = compared(train(seen, "tiny")[0], seen, unseen)["classifier"]
    assert told.confidence == pytest.approx(0.75, abs=0.06)
    assert told.accuracy == pytest.approx(0.75, abs=0.1)


def test_shorter_cuts_do_not_mislead():
    """Half of the texts are cut at 200 of some 300 tokens; uncut ones are told rightly all the same."""
    rng = random.Random(5)
    samples = [text(1, rng, most=most) for most in (200, 1024) for _ in range(200)]
    told = Lengths(train(samples, "tiny")[0]).predict(clues(prompt(1, rng), GREEDY, "", 4096, {END}))
    assert told.bucket == 2 and told.confidence > 0.8


def test_sharpness_finds_what_was_overdone():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 4))
    each = np.array([rng.choice(4, p=p) for p in softmax(logits)])
    ends = np.arange(4) == each[:, None]
    assert sharpness(logits * 2, ends) == pytest.approx(0.5, rel=0.15)


def test_the_fit_descends():
    samples = texts(300)
    rows, ends = matrix(samples, used_by(samples)), possible(samples, 9)
    found = [loss(softmax(rows @ fit.weights + fit.bias), ends) for fit in islice(fits(rows, ends), 5)]
    assert found == sorted(found, reverse=True) and found[-1] < 0.3


def test_buckets_that_a_text_may_have_ended_in():
    def one(length: int, ended: bool) -> list[int]:
        return np.flatnonzero(possible([Sample(b"", "", 1024, length, ended)], 9)[0]).tolist()

    assert one(1, True) == [0] and one(129, True) == [1] and one(5000, True) == [8]
    assert one(100, False) == list(range(9))
    assert one(1024, False) == [8] and one(1023, False) == [7, 8] and one(9999, False) == [8]


def test_answers_to_one_prompt_are_not_on_both_sides():
    rng = random.Random(0)
    ids = [prompt(0, rng) for _ in range(50)]
    samples = [
        Sample(slots_of(i, SamplingParams(temperature=t), "", {END}).tobytes(), "", 16, 5, True) for i in ids for t in (0.0, 0.7)
    ]
    seen, unseen = apart(samples)
    assert seen and unseen and not {prompt_of(s) for s in seen} & {prompt_of(s) for s in unseen}
    assert {prompt_of(s) for s in apart(samples, 1)[1]} != {prompt_of(s) for s in unseen}


def test_too_little_to_learn_from():
    with pytest.raises(UserError, match="30 texts are too few"):
        train(texts(30), "tiny")
    with pytest.raises(UserError, match="too alike"):
        train(texts(1) * 400, "tiny")


def test_whoever_tells_better_speaks(trained):
    """A classifier that is wrong here is overruled by the key's own texts, and comes back when it is right again."""
    lengths = Lengths(trained)
    rng = random.Random(11)

    def go(length: int, count: int) -> str:
        for _ in range(count):
            lengths.observe(clues(prompt(0, rng), GREEDY, "somebody", 4096, {END}), length, True)
        return lengths.predict(clues(prompt(0, rng), GREEDY, "somebody", 4096, {END})).source

    assert go(20, 5) == "classifier"
    assert go(700, 100) == "key"
    lengths.adopt(trained)
    assert go(20, 1) == "classifier"  # a new one has its trial


# ---- files --------------------------------------------------------------------------------------------------------------


def test_a_damaged_or_foreign_file_is_refused(trained):
    data = msgspec.msgpack.encode(trained)
    assert read_classifier(data, "a file") == trained
    for bad in (b"", data[:-5], b"\x00" * 50, msgspec.msgpack.encode({"format": 1})):
        with pytest.raises(UserError, match=r"a file holds no classifier.*profile --lengths"):
            read_classifier(bad, "a file")
    with pytest.raises(UserError, match="has format 99"):
        read_classifier(msgspec.msgpack.encode(msgspec.structs.replace(trained, format=99)), "a file")
    with pytest.raises(UserError, match="don't fit"):
        read_classifier(msgspec.msgpack.encode(msgspec.structs.replace(trained, weights=b"abc")), "a file")
    with pytest.raises(UserError, match="holds no history"):
        read_history(b"x", "a file")
    for slots in (b"odd", b"\xff\xff"):
        with pytest.raises(UserError, match="features that there aren't"):
            read_history(msgspec.msgpack.encode(History(FORMAT, "tiny", [Sample(slots, "", 16, 5, True)])), "a file")


def test_a_small_file(trained):
    assert len(msgspec.msgpack.encode(trained)) < 200_000


def test_lines_of_prompts_and_lengths(tmp_path):
    file = tmp_path / "lines.jsonl"
    lines = [
        {"prompt": "abc", "length": 12, "more": "ignored"},
        {"ids": [5, 6], "length": 64, "ended": False, "max_tokens": 64, "key": "k", "temperature": 0},
        {"ids": [5, 6], "length": 60, "ended": False},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    plain, cut, left = samples_of(file, lambda text: [ord(c) for c in text], frozenset({END}))
    assert (plain.length, plain.ended, plain.key) == (12, True, "") and plain.most > 10_000
    assert (cut.length, cut.ended, cut.most, cut.key) == (64, False, 64, "k")
    assert (left.length, left.ended, left.most) == (60, False, 60)
    expected = slots_of([ord(c) for c in "abc"], SamplingParams(max_tokens=None), "", {END})
    np.testing.assert_array_equal(plain.clues().slots, expected)


@pytest.mark.parametrize(
    "line", ["{", '{"prompt": "x"}', '{"length": 5}', '{"prompt": "x", "length": -1}', '{"ids": [-4], "length": 1}']
)
def test_lines_that_cannot_be_meant(tmp_path, line):
    file = tmp_path / "lines.jsonl"
    file.write_text('{"prompt": "x", "length": 1}\n' + line)
    with pytest.raises(UserError, match=r"line 2: .*lines look like"):
        list(samples_of(file, lambda text: [1], frozenset()))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSERVE_HOME", str(tmp_path))
    return tmp_path


def served(count: int) -> Lengths:
    """What a server has learnt from so many texts."""
    lengths = Lengths()
    rng = random.Random(2)
    for _ in range(count):
        kind = rng.randrange(3)
        sample = text(kind, rng)
        lengths.observe(clues(prompt(kind, rng), GREEDY, "", 4096, {END}), sample.length, sample.ended)
    return lengths


def test_a_restart_goes_on_where_the_server_was(home, trained):
    lengths = served(40)
    assert asyncio.run(length_store.keep("f", "tiny", lengths))
    length_store.write(length_store.classifier_path("f"), msgspec.msgpack.encode(trained))
    again = length_store.load("f")
    assert again.classifier == trained and list(again.history) == list(lengths.history)
    np.testing.assert_array_equal(again.everybody.seen, lengths.everybody.seen)
    assert length_store.load("another").classifier is None


def test_an_unreadable_file_is_told_and_passed_over(home, caplog):
    length_store.write(length_store.history_path("f"), b"junk")
    lengths = length_store.load("f")
    assert not lengths.history and "lengths_unreadable" in caplog.text


def test_a_history_that_cannot_be_written_is_told(home, caplog):
    (home / "lengths").write_text("a file, not a folder")
    assert not asyncio.run(length_store.keep("f", "tiny", served(5)))
    assert "lengths_unwritable" in caplog.text


def test_no_history_yet(home):
    with pytest.raises(UserError, match="serve it for a while"):
        length_store.train_from_history("f")


def test_training_beside_a_server(home):
    """In a process of its own; what it has learnt is used at once and after a restart."""
    lengths = served(400)
    asyncio.run(length_store.retrain("f", "tiny", lengths))
    told = lengths.predict(clues(prompt(1, random.Random(9)), GREEDY, "", 4096, {END}))
    assert (told.source, told.bucket) == ("classifier", 2)
    assert length_store.load("f").classifier == lengths.classifier
    assert not lengths.untrained


def test_a_training_that_fails_changes_nothing(home, caplog):
    lengths = served(20)
    asyncio.run(length_store.retrain("f", "tiny", lengths))
    assert lengths.classifier is None and "20 texts are too few" in caplog.text


def test_a_cancelled_training_leaves_no_process(home, monkeypatch):
    async def go() -> None:
        started = asyncio.Event()
        start = asyncio.create_subprocess_exec

        async def starting(*args, **options):
            process = await start(*args, **options)
            started.set()
            return process

        monkeypatch.setattr(asyncio, "create_subprocess_exec", starting)
        training = asyncio.create_task(length_store.retrain("f", "tiny", served(400)))
        await started.wait()
        training.cancel()
        with pytest.raises(asyncio.CancelledError):
            await training

    asyncio.run(go())
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_history_is_due_for_training_after_enough_new_texts():
    lengths = Lengths()
    known = clues([5], GREEDY, "", 4096, {END})
    for _ in range(1023):
        lengths.observe(known, 10, True)
    assert not lengths.due
    lengths.observe(known, 10, True)
    assert lengths.due
    lengths.export("tiny")
    assert not lengths.due
