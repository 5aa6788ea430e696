"""`bench.quality`: its figures from given log-probabilities, its texts and windows, and the command on a tiny model."""

from __future__ import annotations

import json
import math

import pytest

from bench import quality
from bench.quality import Agreement, Row, Text
from engine import capacity
from engine.types import UserError
from tests import tiny

# ---- figures --------------------------------------------------------------------------------------------------------


def test_perplexity_of_even_odds_is_their_number():
    assert quality.perplexity([math.log(1 / 8)] * 50) == pytest.approx(8)
    assert quality.perplexity([0.0]) == 1
    assert quality.perplexity(math.log(p) for p in (0.5, 0.125)) == pytest.approx(4)


def test_relative_is_signed_and_of_the_reference():
    assert quality.relative(10.1, 10) == pytest.approx(0.01)
    assert quality.relative(9.9, 10) == pytest.approx(-0.01)


def test_agreement_counts_steps_and_keeps_the_gaps_of_those_that_differ():
    texts = [Text([1], [5, 6, 7], [2.0, 0.05, 3.0]), Text([1, 2], [8], [0.5]), Text([1], [9], [0.2])]
    found = quality.agreement(texts, [[5, 60, 7], [80], [90]])
    assert found == Agreement(steps=5, agreed=2, share=0.4, largest_gap=0.5, wide_gaps=[0.5, 0.2])


def test_agreement_of_equal_choices():
    found = quality.agreement([Text([], [1, 2], [0.0, 0.3])], [[1, 2]])
    assert found == Agreement(2, 2, 1.0, 0.0, [])


def test_agreement_wants_a_choice_for_every_step():
    with pytest.raises(ValueError, match="zip"):
        quality.agreement([Text([], [1, 2], [0.0, 0.3])], [[1]])


def row(**fields) -> Row:
    good = {"stored": "BF16", "relative_difference": 0.001, "agreement": Agreement(1000, 995, 0.995, 0.05, [])}
    return Row("x", "x.gguf", **({"settings": {}} | good | fields))


@pytest.mark.parametrize(
    ("fields", "missed"),
    [
        ({}, []),
        ({"relative_difference": -0.004}, ["perplexity -0.400%, bar 0.3%"]),
        ({"relative_difference": 0.004, "bar": quality.QUANTISED_BAR}, []),
        ({"agreement": Agreement(1000, 980, 0.98, 0.05, [])}, ["agreement 98.00%, bar 99%"]),
        ({"agreement": Agreement(1000, 995, 0.995, 0.25, [0.25])}, ["a gap of 0.250, bar 0.1"]),
        ({"agreement": Agreement(1000, 900, 0.9, 0.25, [0.25]), "stored": "Q4_1"}, []),
        ({"agreement": Agreement(1000, 900, 0.9, 0.25, [0.25]), "settings": {"quantization": "int8"}}, []),
        ({"agreement": Agreement(1000, 900, 0.9, 0.25, [0.25]), "settings": {"kv_cache_dtype": "int8"}}, []),
    ],
)
def test_bars(fields, missed):
    assert quality.missed_bars(row(**fields)) == missed


# ---- texts ----------------------------------------------------------------------------------------------------------


def test_windows_score_as_much_as_asked_and_share_nothing():
    assert quality.windows(range(10), [], 4, 6) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert quality.windows(range(10), [99], 4, 7) == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]
    with pytest.raises(UserError, match="the text has 10 tokens and 12 are wanted"):
        quality.windows(range(10), [], 4, 8)


def test_running_text_joins_txt_and_jsonl(tmp_path):
    (tmp_path / "a.txt").write_text("First.")
    (tmp_path / "b.jsonl").write_text('{"text": "Second."}\n\n{"other": 1}\n{"text": "Third\u2028."}\n')
    assert quality.running_text([tmp_path / "a.txt", tmp_path / "b.jsonl"]) == "First.\n\nSecond.\n\nThird\u2028."


def test_passages_are_the_long_prose_in_an_order_that_stays(tmp_path):
    file = tmp_path / "prompts.jsonl"
    long = [f"{i} " + "word " * 400 for i in range(9)]
    rows = [{"source": "t0", "prompt": p} for p in [*long, "short"]] + [{"source": "code", "prompt": "x" * 5000}]
    file.write_text("\n".join(map(json.dumps, rows)))
    found = quality.passages(file).split("\n\n")
    assert sorted(found) == long and found != long and found == quality.passages(file).split("\n\n")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file.*--data names the folder"),
        ("{", "not a file of JSON lines"),
        ('{"a": 1}', 'no line has a field "prompt"'),
    ],
)
def test_a_file_that_will_not_do(tmp_path, content, why):
    if content is not None:
        (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(UserError, match=why):
        quality.column(tmp_path / "p.jsonl", "prompt")


@pytest.mark.parametrize("text", ["int8", "=x", "int8=", "int8=.,quantization", "int8=.,=int8"])
def test_a_variant_that_can_not_be_read(text):
    with pytest.raises(UserError, match="write NAME=MODEL"):
        quality.variant(text)


def test_a_variant(tmp_path):
    found = quality.variant(f"int8={tmp_path},quantization=int8,block-size=32")
    assert (found.name, found.model, found.settings) == ("int8", tmp_path, {"quantization": "int8", "block_size": "32"})


def test_without_data_it_says_what_to_give(capsys):
    assert quality.main([]) == 2
    assert "--data FOLDER" in capsys.readouterr().err
    assert quality.main(["--data", "nowhere"]) == 2
    assert "No such file" in capsys.readouterr().err


# ---- the command ----------------------------------------------------------------------------------------------------


def test_the_command_on_a_tiny_model(tmp_path, capsys):
    if not capacity.has_compiled_kernels():
        pytest.skip("this machine has no compiled kernels")
    model = tiny.make(tmp_path / "model", max_position_embeddings=quality.WINDOW)
    text, prompts, out = tmp_path / "text.txt", tmp_path / "prompts.jsonl", tmp_path / "out" / "quality.json"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    prompts.write_text("\n".join(json.dumps({"prompt": f"Say {word}."}) for word in ("one", "two", "three")))
    status = quality.main(
        [
            *("--text", str(text), "--prompts", str(prompts), "--tokens", "1000", "--num-prompts", "3"),
            *("--variant", f"bf16={model},dtype=bfloat16", "--variant", f"none={model},no-such-setting=1"),
            *("--cache", str(tmp_path / "cache"), "--json", str(out)),
        ]
    )
    assert len(list((tmp_path / "cache").glob("reference-*.json"))) == 1
    report = json.loads(out.read_text())
    assert report["tokens_scored"] == quality.WINDOW - 1 and report["text"] == ["text.txt"]
    measured, other = report["results"]
    assert measured["stored"] == "F32" and measured["weight_bytes"] > 0 and measured["texts"] == 3
    # The kernels were measured, and not the reference twice.
    assert 0 < abs(measured["relative_difference"]) < 0.05
    assert measured["agreement"]["steps"] == 3 * quality.STEPS and measured["agreement"]["share"] > 0.8
    assert status == int(bool(measured["missed"]))
    assert other["error"].startswith("not in this build: there is no setting 'no_such_setting'")
    shown = capsys.readouterr().out
    assert "not in this build" in shown and "perplexity" in shown
