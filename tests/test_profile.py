"""`deepserve.py profile`: what is measured and how, the stored profile and who finds it, the pictures; a run on a tiny model."""

import math
import zlib

import msgspec
import numpy as np
import pytest

import deepserve
from bench import canvas, profile_picture
from bench import profile as bench_profile
from bench.profile import FEWEST, MOST, Plan, Timed, arrival_times, begun, compared, costs_of, line, plan
from engine.capacity import Machine
from engine.config import Config
from engine.types import UserError
from sched import profile_store
from sched.costs import Costs, Step
from sched.files import write
from sched.heatmap import HeatMap, MapData
from sched.profile_store import Key, Profile, TeCosts
from tests import tiny

COSTS = Costs(p0=0.002, p1=0.0004, p2=1e-8, p3=2e-8, d0=0.004, d1=0.0005, d2=1e-7, chunk=256)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DEEPSERVE_HOME", str(tmp_path / "home"))


# ---- what is measured ---------------------------------------------------------------------------------------------------


def test_a_rate_is_a_part_of_what_the_machine_can_do():
    cells = [c for c in HeatMap().cells() if (c.prefill, c.decode) == (1024, 128)]
    plans = [plan(cell, COSTS, 8192, 3) for cell in cells]
    work = plans[0].rate / cells[0].load
    assert [p.rate / work for p in plans] == pytest.approx([c.load for c in cells])
    assert all(FEWEST <= p.requests <= MOST for p in plans)
    assert [p.seconds for p in plans] == sorted((p.seconds for p in plans), reverse=True)  # the sooner they come, the sooner done
    assert plan(cells[0], COSTS, 1151, 3) is None and plan(cells[0], COSTS, 1152, 3) is not None


def test_arrivals_come_at_the_rate_and_in_another_order_each_time():
    rng = np.random.default_rng(0)
    one, other = arrival_times(400, 20.0, rng), arrival_times(400, 20.0, rng)
    assert one[0] == 0.0 and one == sorted(one) and one != other
    assert one[-1] == pytest.approx(400 / 20.0, rel=0.1)


def test_a_comparison_is_of_mean_jcts():
    whole = [Timed(0.0, [1.0, 2.0]), Timed(1.0, [2.0, 5.0]), Timed(2.0, [3.0, 5.0])]
    split = [Timed(0.0, [0.5, 1.0]), Timed(1.0, [2.0, 3.0]), Timed(2.0, [3.0, 3.5])]
    ratio, variance = compared(whole, split)
    assert ratio == pytest.approx(math.log(9 / 4.5)) and variance == 0.0
    assert compared(whole, whole) == (0.0, 0.0)
    _, variance = compared(whole, [Timed(0.0, [1.0, 4.0]), *split[1:]])
    assert variance > 0


def test_costs_are_those_that_the_steps_show():
    shapes = [(n, 0.0, 0.0, 0.0) for n in (32, 64, 128, 256)] + [(256, c, 0.0, 0.0) for c in (256, 640, 1500)]
    shapes += [(0.0, 0.0, s, s * n) for s, n in ((1, 128), (4, 128), (16, 128), (1, 1088), (4, 1088))]
    steps = [Step(*shape, COSTS.step(*shape)) for shape in shapes]
    found = costs_of(steps, [(512, 0.006), (1024, 0.010)], Costs(p1=0.0, d0=0.0, chunk=256, dram=1e-6))
    for tokens in (100.0, 256.0, 2000.0):
        assert found.prefill(tokens) == pytest.approx(COSTS.prefill(tokens), rel=1e-3)
    assert found.step(0, 0, 8, 4000) == pytest.approx(COSTS.step(0, 0, 8, 4000), rel=1e-3)
    assert found.transfer(1000) == pytest.approx(0.0098, rel=0.02)
    assert (found.chunk, found.dram) == (256, 1e-6)


def test_a_line_never_goes_below_nought():
    assert line([]) == (0.0, 0.0)
    assert line([(512, 0.003)]) == (0.003, 0.0)
    at_0, slope = line([(512, 0.004), (1024, 0.002)])
    assert (at_0, slope) == (pytest.approx(0.003), 0.0)
    at_0, slope = line([(512, 0.001), (1024, 0.004)])
    assert at_0 == 0.0 and slope > 0


def test_a_second_run_goes_on_where_the_rates_are_the_same():
    told: list[str] = []
    key = Key("m", "h", "s")
    stored = Profile(key, "m", [], MapData(loads=(0.3, 0.9), kinds=("disaggregated",)), cells=7)
    assert begun(key, "m", stored, [0.9, 0.3], ["disaggregated"], told.append) is stored
    assert begun(key, "m", None, [0.5], ["semi"], told.append).heat.loads == (0.5,)
    fresh = begun(key, "m", stored, [0.5], ["disaggregated"], told.append)
    assert fresh.cells == 0 and "other rates (0.3 0.9)" in told[-1]
    assert begun(Key("n", "h", "s"), "n", stored, [0.9, 0.3], ["disaggregated"], told.append).cells == 0


def test_settings_that_the_ways_give_are_refused(capsys):
    assert deepserve.main(["profile", "--te", "3"]) == 2
    assert "leave out --te" in capsys.readouterr().err
    assert deepserve.main(["profile", "a", "b"]) == 2
    assert "one model at a time" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"0\.3 0\.6 0\.9"):
        bench_profile.main(Config(), 10, [0.5, 1.5], None, None, print)
    with pytest.raises(UserError, match="--budget 0"):
        bench_profile.main(Config(), 0, [0.5], None, None, print)


# ---- where it is stored -------------------------------------------------------------------------------------------------


def test_a_model_is_known_by_its_files_wherever_they_lie(tmp_path):
    one, same, other = tiny.make(tmp_path / "a"), tiny.make(tmp_path / "b"), tiny.make(tmp_path / "c", seed=1)
    assert profile_store.fingerprint(one) == profile_store.fingerprint(same) != profile_store.fingerprint(other)


def test_a_profile_is_of_a_model_a_machine_and_settings(tmp_path):
    model = tiny.make(tmp_path / "a")
    config, box = Config(device="cpu", dtype="float32", max_num_batched_tokens=256), Machine(1 << 30, 4)
    key = profile_store.key_of(model, config, box)
    assert profile_store.key_of(model, msgspec.structs.replace(config, port=1, te=3), box) == key
    for changed in ({"dtype": "bfloat16"}, {"max_num_batched_tokens": 512}, {"kv_transfer": "request"}):
        assert profile_store.key_of(model, msgspec.structs.replace(config, **changed), box).settings != key.settings
    assert profile_store.key_of(model, config, Machine(1 << 30, 8)).hardware != key.hardware


def test_serve_finds_its_own_profile_else_one_of_the_same_machine(caplog):
    own, sibling, stranger = Key("m", "box", "s"), Key("other", "box", "s"), Key("m", "elsewhere", "s")
    again = Key("m", "box", "t")
    assert profile_store.load_profile(own) is None
    heat = MapData()

    def store(key: Key, made: float) -> None:
        profile_store.save(Profile(key, key.model, [TeCosts(2, COSTS)], heat, made=made), profile_store.path_of(key))

    store(stranger, 9.0)
    assert profile_store.load_profile(own) is None
    store(sibling, 3.0)
    found = profile_store.load_profile(own)
    assert found.foreign and found.profile.key == sibling
    store(again, 2.0)
    assert profile_store.load_profile(own).profile.key == again  # of the same model, with other settings
    store(own, 1.0)
    found = profile_store.load_profile(own)
    assert not found.foreign and found.profile.key == own and found.profile.costs[0].costs == COSTS
    profile_store.path_of(own).write_text("{")
    assert profile_store.load_profile(own).profile.key == again
    assert "profile_unreadable" in caplog.text


def test_costs_are_of_a_te_with_as_many_cores_as_there_are():
    faster = msgspec.structs.replace(COSTS, p1=0.0002)
    profile = Profile(Key("m", "h", "s"), "m", [TeCosts(1, COSTS), TeCosts(4, faster)], MapData())
    assert [profile.costs_for(n) for n in (1, 2, 4, 64)] == [COSTS, COSTS, faster, faster]


def test_a_foreign_map_is_moved_by_how_long_prompts_last(tmp_path):
    heat = HeatMap()
    heat.add("disaggregated", 60, 0.3, 0.01**2)
    heat.refit()
    profile = Profile(Key("m", "h", "s"), "m", [TeCosts(1, COSTS)], heat.data)
    own = profile_store.Found(profile, tmp_path).heat(COSTS, 1)
    assert own.tables == heat.tables and own.data is profile.heat
    slow = msgspec.structs.replace(COSTS, p0=2 * COSTS.p0, p1=2 * COSTS.p1, p2=2 * COSTS.p2, p3=2 * COSTS.p3)
    other = profile_store.Found(profile, tmp_path, foreign=True).heat(slow, 1)
    assert other.value(256, 64).value == heat.value(512, 64).value and other.data is not profile.heat


def test_what_can_not_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="another place"):
        write(tmp_path / "file" / "x.json", b"{}")


# ---- pictures -----------------------------------------------------------------------------------------------------------


def test_the_terminal_shows_signs_doubt_and_what_was_measured():
    heat = HeatMap()
    for point in range(3 * heat.columns * heat.loads, 4 * heat.columns * heat.loads):
        heat.add("disaggregated", point, 0.4, 0.01**2)
    heat.refit()
    lines = list(profile_picture.terminal(heat, "disaggregated"))
    rows = {line.split("|")[0].strip(): line for line in lines if "|" in line}
    assert rows["1024"].count("▒+") == heat.columns and "+49" in rows["1024"]
    assert "(+" in rows["512"] and "?" in rows["128"]
    assert list(rows)[2:] == ["4096", "2048", "1024", "512", "256", "128"]
    assert len({len(row) for name, row in rows.items() if name.isdigit()}) == 1
    assert any("100%" in line for line in lines)


def test_the_png_holds_the_pixels():
    heat = HeatMap()
    heat.add("disaggregated", 60, 0.7, 0.01**2)
    heat.refit()
    data = profile_picture.draw(heat, "a title – with a dash")
    assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
    width, height = (int.from_bytes(data[at : at + 4]) for at in (16, 20))
    assert len(zlib.decompress(data[data.index(b"IDAT") + 4 : -16])) == height * (1 + 3 * width)


def test_a_canvas_cuts_off_what_is_outside():
    small = canvas.Canvas(10, 10)
    small.text(-3, -2, "W", size=1)
    small.text(8, 8, "W", size=1)
    small.box(-5, -5, 7, 7, (1, 2, 3))
    small.line(0, 0, 30, 30, (9, 9, 9))
    assert small.pixels.shape == (10, 10, 3) and tuple(small.pixels[9, 9]) == (9, 9, 9) and tuple(small.pixels[0, 1]) == (9, 9, 9)
    assert canvas.letters("1").sum() == canvas.letters("1–").sum() - canvas.letters("?").sum()


# ---- a real run ---------------------------------------------------------------------------------------------------------


def test_a_run_on_a_tiny_model(tmp_path, monkeypatch, capsys):
    """Two cells in all three ways, by real processes."""
    model = tiny.make(tmp_path / "tiny")
    config = Config(model=str(model), max_num_seqs=8, max_num_batched_tokens=64, max_model_len=512)
    asked = iter([0, 5])

    def choose(heat, seconds, left):
        assert math.isfinite(seconds[0]) and math.isinf(seconds[-1])  # 4096 tokens are more than the model takes
        point = next(asked, None)
        return None if point is None else heat.cell(point)

    monkeypatch.setattr(bench_profile, "next_cell", choose)
    monkeypatch.setattr(bench_profile, "plan", lambda cell, *_: Plan(3, 50.0, 1.0) if cell.prefill < 500 else None)
    monkeypatch.setattr(bench_profile, "DECODE_TOKENS", 16)
    out, png, told = tmp_path / "out.json", tmp_path / "map.png", []
    assert bench_profile.main(config, 1e3, [0.3, 0.6, 0.9], out, png, told.append) == 0
    assert sum("load 0." in line for line in told) == 2
    assert "JCT colocated / JCT semi" in capsys.readouterr().out and png.exists()
    report = msgspec.json.decode(out.read_bytes())
    assert set(report["maps"]) == {"disaggregated", "semi"} and report["profile"]["cells"] == 2
    (path,) = profile_store.folder().glob("*.json")
    profile = profile_store.read(path)
    assert {(m.kind, m.point) for m in profile.heat.measured} == {(k, p) for k in ("disaggregated", "semi") for p in (0, 5)}
    assert all(one.costs.prefill(100.0) > 0 and one.costs.step(0, 0, 1, 100) > 0 for one in profile.costs)
    assert profile_store.load_profile(profile.key).path == path
