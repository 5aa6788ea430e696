"""What a scheduler is given by earlier runs and leaves to later ones: files in a DEEPSERVE_HOME of the test's own."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from engine.capacity import Machine
from engine.config import Config
from sched import length_store, profile_store
from sched.costs import Costs
from sched.heatmap import REFIT, HeatMap
from sched.knowledge import WORTH_KEEPING, Knowledge
from sched.predict import Clues, Lengths
from sched.profile_store import Profile, TeCosts

BOX = Machine(1 << 30, 4)
CONFIG = Config(device="cpu", max_model_len=64, block_size=16, max_num_batched_tokens=256)
COSTS = Costs(p0=0.002, p1=0.0004, d0=0.004, d1=0.0005, chunk=256)
CLUES = Clues(np.arange(3, dtype=np.uint16), "alice", 0, 60)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEEPSERVE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return path


def mapped(kind: str = "disaggregated") -> HeatMap:
    """A pair is quicker everywhere."""
    heat = HeatMap()
    for point in range(heat.points):
        heat.add(kind, point, 0.3, 0.001)  # type: ignore[arg-type]
    heat.refit()
    return heat


def profiled(model: Path, config: Config = CONFIG, made: float = 0.0) -> Path:
    key = profile_store.key_of(model, config, BOX)
    path = profile_store.path_of(key)
    own = [TeCosts(cores, msgspec.structs.replace(COSTS, d0=0.004 * cores)) for cores in (1, 4)]
    profile_store.save(Profile(key, "m", own, mapped().data, made=made), path)
    return path


def several(texts: int) -> Lengths:
    lengths = Lengths()
    for i in range(texts):
        lengths.observe(CLUES, 10 + i % 7, True)
    return lengths


# ---- what there is ------------------------------------------------------------------------------------------------------


def test_where_there_are_no_files_nothing_is_known(model, caplog, home):
    caplog.set_level(logging.WARNING)
    known = Knowledge.load(model, CONFIG, BOX)
    assert known.costs is None and known.found is None and known.fingerprint == profile_store.fingerprint(model)
    assert known.heat.value(512, 64) == (0.0, 0.0) and not known.lengths.history and known.lengths.classifier is None
    assert not caplog.records and not home.exists()


def test_a_model_that_is_not_there_is_told_and_known_nothing_of(tmp_path, caplog):
    known = Knowledge.load(tmp_path / "nowhere", CONFIG, BOX)
    assert known.fingerprint == "" and known.costs is None
    assert "event=nothing_known" in caplog.text


def test_a_models_own_profile_is_its_costs_and_its_map(model):
    profiled(model)
    known = Knowledge.load(model, CONFIG, BOX)
    assert known.found is not None and not known.found.foreign and known.cores == 4
    assert known.costs is not None and known.costs.d0 == 0.016, "of TEs that have as many cores"
    found = known.heat.value(512, 64)
    assert found.value > 0.2 and found.confidence > 0.9
    before = known.heat
    known.scale_heat(COSTS)
    assert known.heat is before
    halves = Knowledge.load(model, msgspec.structs.replace(CONFIG, te=4), BOX)
    assert halves.cores == 1 and halves.costs is not None and halves.costs.d0 == 0.004


def test_a_foreign_profile_gives_its_map_once_costs_are_known(model, tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(b"other weights")
    path = profiled(other)
    known = Knowledge.load(model, CONFIG, BOX)
    assert known.found is not None and known.found.foreign and known.found.path == path
    assert known.costs is None and known.heat.value(512, 64) == (0.0, 0.0)
    known.scale_heat(COSTS)
    found, own = known.heat.value(512, 64), mapped().value(512, 64)
    assert found.value > 0.2 and 0 < found.confidence < own.confidence
    known.heat.observe("colocated", 512, 64, 1.0, 0.5, 0.5)
    written = path.read_bytes()
    asyncio.run(known.close("m"))
    assert path.read_bytes() == written, "it is another model's"


def test_of_several_foreign_ones_the_same_models_goes_first(model, tmp_path):
    other = tmp_path / "other.gguf"
    other.write_bytes(b"other weights")
    profiled(other, made=9.0)
    mine = profiled(model, msgspec.structs.replace(CONFIG, block_size=32), made=1.0)
    known = Knowledge.load(model, CONFIG, BOX)
    assert known.found is not None and known.found.path == mine and known.found.foreign


@pytest.mark.parametrize("data", [b"", b"no profile", b'{"key": 1}', b"\xff\xfe"])
def test_a_profile_that_cant_be_read_is_told_and_left_alone(model, caplog, data):
    path = profiled(model)
    path.write_bytes(data)
    known = Knowledge.load(model, CONFIG, BOX)
    assert known.costs is None and known.found is None
    assert "event=profile_unreadable" in caplog.text and path.read_bytes() == data


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p["costs"].clear(),
        lambda p: p["heat"]["prefill"].clear(),
        lambda p: p["heat"]["measured"].append(["semi", 10**6, 0.1, 0.1]),
    ],
)
def test_a_profile_that_makes_no_sense_is_told_and_left_alone(model, caplog, change):
    path = profiled(model)
    profile = msgspec.json.decode(path.read_bytes())
    change(profile)
    path.write_bytes(msgspec.json.encode(profile))
    assert Knowledge.load(model, CONFIG, BOX).found is None and "event=profile_unreadable" in caplog.text


@pytest.mark.parametrize("data", [b"", b"no history", msgspec.msgpack.encode({"format": 99, "model": "m", "samples": []})])
@pytest.mark.parametrize("file", [length_store.history_path, length_store.classifier_path])
def test_lengths_that_cant_be_read_are_told_and_done_without(model, caplog, file, data):
    path = file(profile_store.fingerprint(model))
    path.parent.mkdir(parents=True)
    path.write_bytes(data)
    known = Knowledge.load(model, CONFIG, BOX)
    assert not known.lengths.history and known.lengths.classifier is None and known.fingerprint
    assert "event=lengths_unreadable" in caplog.text and path.name in caplog.text


def test_a_folder_where_a_file_should_be_is_told_too(model, caplog):
    profile_store.path_of(profile_store.key_of(model, CONFIG, BOX)).mkdir(parents=True)
    length_store.history_path(profile_store.fingerprint(model)).mkdir(parents=True)
    known = Knowledge.load(model, CONFIG, BOX)
    assert known.costs is None and not known.lengths.history
    assert "event=profile_unreadable" in caplog.text and "event=lengths_unreadable" in caplog.text


# ---- what is left to the next start -------------------------------------------------------------------------------------


@pytest.mark.parametrize("texts", [0, WORTH_KEEPING - 1, WORTH_KEEPING])
def test_history_is_written_where_there_are_enough_texts(model, texts):
    known = Knowledge.load(model, CONFIG, BOX)
    known.lengths = several(texts)
    asyncio.run(known.close("m"))
    path = length_store.history_path(known.fingerprint)
    assert path.exists() == (texts >= WORTH_KEEPING)
    again = Knowledge.load(model, CONFIG, BOX)
    assert len(again.lengths.history) == (texts if texts >= WORTH_KEEPING else 0) and not again.lengths.untrained
    assert [one.length for one in again.lengths.history] == [10 + i % 7 for i in range(len(again.lengths.history))]


def test_texts_of_earlier_runs_are_no_reason_to_write(model):
    known = Knowledge.load(model, CONFIG, BOX)
    known.lengths = several(WORTH_KEEPING)
    asyncio.run(known.close("m"))
    path = length_store.history_path(known.fingerprint)
    path.touch()
    before = path.stat().st_ino
    again = Knowledge.load(model, CONFIG, BOX)
    again.lengths.observe(CLUES, 5, True)
    asyncio.run(again.close("m"))
    assert path.stat().st_ino == before


def test_without_a_fingerprint_nothing_is_written(home):
    known = Knowledge(lengths=several(WORTH_KEEPING))
    known.heat.observe("colocated", 512, 64, 1.0, 0.5, 0.5)
    asyncio.run(known.close("m"))
    assert not home.exists()


def test_what_requests_told_of_the_own_map_is_kept(model):
    path = profiled(model)
    known = Knowledge.load(model, CONFIG, BOX)
    written = path.read_bytes()
    asyncio.run(known.close("m"))
    assert path.read_bytes() == written, "nothing was seen"
    known.heat.observe("disaggregated", 512, 64, 1.0, 0.5, 0.5)
    asyncio.run(known.close("m"))
    (live,) = Knowledge.load(model, CONFIG, BOX).heat.live.values()
    assert (live.kind, live.count) == ("disaggregated", 1.0)
    kept = Knowledge.load(model, CONFIG, BOX)
    assert kept.costs == known.costs and kept.heat.value(512, 64) == known.heat.value(512, 64)


def test_what_cant_be_written_is_told(model, caplog, home):
    profiled(model)
    known = Knowledge.load(model, CONFIG, BOX)
    known.lengths = several(WORTH_KEEPING)
    known.heat.observe("colocated", 512, 64, 1.0, 0.5, 0.5)
    for path in home.rglob("*.json"):
        path.unlink()
    (home / "profiles").rmdir()
    for name in ("profiles", "lengths"):
        (home / name).write_text("in the way")
    asyncio.run(known.close("m"))
    assert "event=lengths_unwritable" in caplog.text
    assert "event=profile_unreadable" in caplog.text, "what is there is not written over unread"


def test_a_profile_that_was_measured_anew_meanwhile_gets_the_live_part_alone(model):
    path = profiled(model)
    known = Knowledge.load(model, CONFIG, BOX)
    known.heat.observe("disaggregated", 512, 64, 1.0, 0.5, 0.5)
    profiled(model, made=7.0)
    asyncio.run(known.close("m"))
    found = profile_store.read(path)
    assert found is not None and found.made == 7.0 and len(found.heat.live) == 1


# ---- errands ------------------------------------------------------------------------------------------------------------


def due(known: Knowledge) -> None:
    for _ in range(REFIT):
        known.heat.observe("colocated", 512, 64, 1.0, 0.5, 0.5)


def test_the_map_is_drawn_anew_once_at_a_time_and_only_where_due():
    async def inside() -> None:
        known = Knowledge(found=None)
        known.look("m")
        assert not known.errands
        for kind in ("colocated", "disaggregated"):
            for _ in range(REFIT):
                known.heat.observe(kind, 512, 64, 2.0 if kind == "colocated" else 1.0, 0.5, 0.5)
        heat, tables = known.heat, dict(known.heat.tables)
        known.look("m")
        task = known.errands["heat"]
        due(known)
        known.look("m")
        assert known.errands == {"heat": task} and heat.tables == tables
        await task
        await asyncio.sleep(0)
        assert not known.errands and known.heat is heat and heat.tables != tables
        assert heat.value(512, 64).value > 0.1
        assert not heat.due, "what came before it was begun is in it"

    asyncio.run(inside())


def test_what_comes_while_the_map_is_drawn_is_for_the_next_time():
    async def inside() -> None:
        known = Knowledge()
        due(known)
        known.look("m")
        await asyncio.sleep(0)  # it has begun
        due(known)
        await known.errands["heat"]
        await asyncio.sleep(0)
        assert known.heat.due
        known.look("m")
        await known.errands["heat"]

    asyncio.run(inside())


def test_training_is_begun_once_at_a_time_for_a_model_that_is_known(monkeypatch):
    runs: list[tuple[str, str]] = []
    go_on = asyncio.Event()

    async def retrain(fingerprint: str, model: str, lengths: Lengths) -> None:
        runs.append((fingerprint, model))
        await go_on.wait()
        lengths.untrained = 0

    monkeypatch.setattr(length_store, "retrain", retrain)

    async def inside() -> None:
        lengths = SimpleNamespace(due=True, untrained=0)
        nameless = Knowledge(lengths=lengths)  # type: ignore[arg-type]
        nameless.look("m")
        assert not nameless.errands
        known = Knowledge("abc", lengths)  # type: ignore[arg-type]
        known.look("m")
        known.look("m")
        await asyncio.sleep(0)
        assert runs == [("abc", "m")]
        go_on.set()
        await known.errands["lengths"]
        await asyncio.sleep(0)
        known.look("m")
        await known.errands["lengths"]
        assert len(runs) == 2

    asyncio.run(inside())


def test_an_errand_that_fails_is_told_and_may_be_tried_again(monkeypatch, caplog):
    def drawn(snapshot: bytes) -> HeatMap:
        raise ArithmeticError("singular")

    async def inside() -> None:
        known = Knowledge()
        monkeypatch.setattr(HeatMap, "drawn", drawn)
        due(known)
        known.look("m")
        await asyncio.wait(known.errands.values())
        await asyncio.sleep(0)
        assert "event=knowledge_failed what=heat" in caplog.text and "singular" in caplog.text and not known.errands
        monkeypatch.undo()
        due(known)
        known.look("m")
        await known.errands["heat"]

    asyncio.run(inside())


def test_closing_ends_errands_and_tells_nothing_of_that(monkeypatch, caplog, home):
    ended: list[str] = []

    async def retrain(fingerprint: str, model: str, lengths: Lengths) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(fingerprint)

    monkeypatch.setattr(length_store, "retrain", retrain)

    async def inside() -> None:
        known = Knowledge("abc", SimpleNamespace(due=True, untrained=0))  # type: ignore[arg-type]
        known.look("m")
        await asyncio.sleep(0)
        await known.close("m")
        await asyncio.sleep(0)
        assert ended == ["abc"] and not known.errands
        assert not asyncio.all_tasks() - {asyncio.current_task()}

    asyncio.run(inside())
    assert "knowledge_failed" not in caplog.text and not home.exists()
