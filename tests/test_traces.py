"""Simulated users: the same seed gives the same requests, at the rate asked for, that have in common what they should."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from engine.types import UserError
from sched import traces
from sched.traces import Arrival, at_rate, edited, keys_of, read

MADE_UP = pytest.mark.parametrize("name", sorted(traces.MADE_UP))


def some(name: str, count: int, rate: float = 50.0, seed: int = 1) -> list[Arrival]:
    return list(itertools.islice(traces.MADE_UP[name](rate, seed), count))


@MADE_UP
def test_made_up_loads_come_by_time_at_their_rate_and_again(name):
    asked = some(name, 4000)
    assert asked == some(name, 4000)
    assert asked != some(name, 4000, seed=2)
    assert all(a.at <= b.at for a, b in itertools.pairwise(asked)) and asked[0].at >= 0
    assert len(asked) / asked[-1].at == pytest.approx(50.0, rel=0.12)
    assert all(a.prompt >= 1 and a.output >= 1 for a in asked)


@MADE_UP
def test_the_beginning_of_a_load_is_like_its_end(name):
    asked = some(name, 6000)
    first, last = (np.mean([a.prompt for a in part]) for part in (asked[:1500], asked[-1500:]))
    assert first == pytest.approx(last, rel=0.15)


def test_bursts_come_in_clumps():
    poisson, gamma = (np.diff([a.at for a in some(name, 4000)]) for name in ("poisson", "gamma"))
    assert np.var(gamma) / np.var(poisson) == pytest.approx(traces.BURSTINESS, rel=0.3)


def test_a_conversation_repeats_what_was_said():
    turns: dict[int, list[Arrival]] = {}
    for arrival in some("multiturn", 2000):
        (system, until), (who, _) = arrival.spans
        assert system < traces.SYSTEMS <= who and until == traces.SYSTEM_TOKENS
        turns.setdefault(who, []).append(arrival)
    pairs = [pair for own in turns.values() for pair in itertools.pairwise(own)]
    assert len(pairs) > 500
    for before, after in pairs:
        said = keys_of(before.spans, before.prompt + before.output, 128)
        assert keys_of(after.spans, after.prompt, 128)[: len(said)] == said
        assert after.prompt > before.prompt + before.output


def test_completions_repeat_the_prompt_up_to_an_edit():
    asked = some("code", 6000)
    known: set[bytes] = set()
    found = []
    for arrival in asked[3000:]:
        keys = keys_of(arrival.spans, arrival.prompt, 16)
        hits = [key in known for key in keys]
        assert hits == sorted(hits, reverse=True), "what is known is a beginning"
        found.append(sum(hits) / max(1, len(keys)))
        known.update(keys)
    assert 0.2 < np.mean(found) < 0.8


def test_an_edit_keeps_what_is_before_it():
    spans = edited(edited((), 0, 1), 100, 2)
    assert spans == ((1, 100), (2, 1 << 30))
    assert edited(spans, 40, 3) == ((1, 40), (3, 1 << 30))
    assert edited(spans, 200, 3) == ((1, 100), (2, 200), (3, 1 << 30))


def test_a_block_of_several_sources_is_known_by_the_last():
    one, other = ((1, 100), (2, 1000)), ((1, 100), (3, 1000))
    a, b = keys_of(one, 160, 32), keys_of(other, 160, 32)
    assert len(a) == len(b) == 5 and len(set(a + b)) == 7
    assert [x == y for x, y in zip(a, b, strict=True)] == [True, True, True, False, False]
    assert keys_of(one, 31, 32) == []
    assert keys_of(((1, 10), (2, 20), (3, 90)), 96, 32)[0] == keys_of(((3, 90),), 96, 32)[0]
    assert len(keys_of(((1, 10),), 96, 32)) == 3, "the last source goes on"


def test_recorded_traces(tmp_path):
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"at": 7, "prompt": 5, "output": 2, "key": "alice"}\n\n{"at": 6.5, "prompt": 9, "output": 1}\n')
    assert read(plain) == [Arrival(0.0, 9, 1), Arrival(0.5, 5, 2, key="alice")]
    mooncake = tmp_path / "mooncake.jsonl"
    row = {"timestamp": 1000, "input_length": 700, "output_length": 3, "hash_ids": [4, 9]}
    mooncake.write_text(json.dumps(row) + "\n" + json.dumps({**row, "timestamp": 3000, "hash_ids": [4, 8]}) + "\n")
    first, second = read(mooncake)
    assert (first.at, second.at, first.prompt, first.output) == (0.0, 2.0, 700, 3)
    assert [a == b for a, b in zip(*(keys_of(x.spans, 700, 128) for x in (first, second)), strict=True)] == [True] * 4 + [False]
    azure = tmp_path / "azure.csv"
    azure.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.1805900,1,0\n"
    )
    assert read(azure) == [Arrival(0.0, 374, 44), Arrival(3.5, 1, 1)]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", "", "no requests"),
        ("a.jsonl", '{"at": 1}\n', "line 1"),
        ("a.jsonl", '{"at": 1, "prompt": 0, "output": 1}\n', '"prompt" and "output" 1 or more'),
        ("a.jsonl", '{"at": 1, "prompt": 1, "output": 1}\nx\n', "line 2"),
        ("a.jsonl", '{"input_length": 3}\n', "hash_ids"),
        ("a.csv", "time,tokens\n1,2\n", "ContextTokens"),
    ],
)
def test_bad_traces_are_told_apart(tmp_path, name, text, said):
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(UserError, match="--trace ") as error:
        read(file)
    assert said in str(error.value)


def test_an_absent_trace(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "none.jsonl")


def test_another_rate():
    asked = [Arrival(0.0, 1, 1), Arrival(1.0, 1, 1), Arrival(4.0, 1, 1)]
    assert [a.at for a in at_rate(asked, 1.5)] == [0.0, 0.5, 2.0]
    with pytest.raises(UserError, match="all requests of the trace come at once"):
        at_rate(asked[:1], 1.0)
