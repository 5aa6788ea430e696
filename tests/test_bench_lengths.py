"""`bench.lengths` on made-up answers, and `profile --lengths` from the command line. The answers themselves need a real model."""

from __future__ import annotations

import random

import msgspec
import pytest

import deepserve
from bench import lengths
from engine.tokenizer import Tokenizer
from sched import length_store, predict_training, profile_store
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("DEEPSERVE_HOME", str(tmp_path))
    monkeypatch.setattr(predict_training, "MOST_STEPS", 30)


def lines(tokenizer: Tokenizer, count: int) -> list[lengths.Answer]:
    """Prompts of one kind get short answers, of the other long ones."""
    rng = random.Random(0)
    found = []
    for number, temperature, seed in lengths.wanted(count):
        long = number % 2
        text = ("Tell me " if long else "Is it so ") + " ".join(rng.choices(("a", "bb", "c"), k=9))
        ids = tokenizer.encode(tokenizer.render([{"role": "user", "content": text}]), add_special=False)
        length = rng.randrange(400, 500) if long else rng.randrange(1, 60)
        found.append(lengths.Answer(number=number, seed=seed, ids=ids, length=length, temperature=temperature, max_tokens=1024))
    return found


def test_what_is_asked_for():
    found = lengths.wanted(1000)
    assert len(set(found)) == len(found) and found == lengths.wanted(1000)
    assert {number for number, _, _ in found} == set(range(1000))
    greedy = sum(temperature == 0 for _, temperature, _ in found)
    assert greedy == 500 and len(found) == 1100


def test_how_alike_two_answers_are():
    def two(number: int, *tokens: int) -> list[lengths.Answer]:
        return [lengths.Answer(number=number, seed=i, length=n, temperature=0.7) for i, n in enumerate(tokens)]

    found = lengths.chance([*two(0, 10, 20), *two(1, 10, 200), *two(2, 10, 900), *two(3, 10), *two(4, 500, 400)])
    assert found == {"prompts": 4, "same_bucket": 0.5, "within_one": 0.75}


def test_the_figures(model, monkeypatch):
    monkeypatch.setattr(lengths, "TIMED", 20)
    monkeypatch.setattr(lengths, "FEWER", (200, 1000))
    tokenizer = Tokenizer.load(model)
    found = lengths.measure(lines(tokenizer, 300), tokenizer)
    assert found["told"]["classifier"]["accuracy"] > 0.9 > found["told"]["everybody"]["accuracy"]
    assert {"classifier", "key", "everybody", "with key"} == set(found["told"])
    assert found["two_answers"]["prompts"] == 30 and [one["learnt_from"] for one in found["fewer"]] == [200]
    assert {"temperature 0", "temperature 0.7"} < set(found["parts"])
    assert 0 < found["time"]["median_us"] <= found["time"]["p99_us"]


def test_training_from_the_command_line(model, tmp_path, capsys):
    file = tmp_path / "texts.jsonl"
    tokenizer = Tokenizer.load(model)
    with open(file, "wb") as out:
        for line in lines(tokenizer, 300):
            out.write(msgspec.json.encode(line) + b"\n")
    assert deepserve.main(["profile", str(model), "--lengths", "--history", str(file)]) == 0
    assert "classifier" in capsys.readouterr().out
    made = length_store.load(profile_store.fingerprint(model)).classifier
    assert made is not None and made.made["texts"] == 330


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--lengths"], "serve it for a while"),
        (["--lengths", "--history", "/nowhere.jsonl"], "/nowhere.jsonl: No such file"),
        (["--history", "x.jsonl"], "add --lengths"),
    ],
)
def test_what_it_says_where_it_can_not(model, capsys, flags, said):
    assert deepserve.main(["profile", str(model), *flags]) == 2
    assert said in capsys.readouterr().err


def test_the_classifier_that_is_brought_fits_this_version():
    for file in length_store.BROUGHT.glob("*.classifier"):
        assert file.stat().st_size < 200_000
        assert length_store.read_classifier(file.read_bytes(), file.name).made["texts"] >= 2000
