"""`bench.cpu`: what it makes of figures, how it knows a server's processes and memory. No server, no peers."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bench import cpu, cpu_report, peers
from bench.cpu_report import Bar, Described, Peaks, Report, Round, Run, Shape, Step
from bench.cpu_servers import SPECS, Server, Spec, command, cpu_seconds, memory_of, settings
from engine.types import UserError
from tests import tiny
from tests.server import alive, wait_until

SMOL = Shape(layers=30, hidden=576, intermediate=1536, heads=9, kv_heads=3, head_dim=64, vocab=49152)
PEAKS = Peaks(memory=40e9, bfloat16=1e12, int8=2e12)
MADE = peers.Peers(
    Path("/peers/llama.cpp/bin/llama-server"),
    Path("/peers/vllm/bin/python"),
    (Path("/lib/libtcmalloc_minimal.so.4"), Path("/peers/vllm/lib/libiomp5.so")),
    {kind: Path(f"/models/model.{kind}") for kind in ("q4_1", "q8_0", "bf16", "safetensors")},
    Path("/peers/vllm-cache"),
)


def run(server: str, scenario: str, round: int, session: str = "now", error: str = "", **values: float) -> Run:
    return Run(session, round, server, scenario, values, error)


def report(*runs: Run, **fields: object) -> Report:
    servers = {s.name: Described(s.title, "1", "as it is", 2.0 if s.ours else 0.0, s.arithmetic) for s in SPECS}
    return msgspec.structs.replace(Report(servers=servers, runs=list(runs)), **fields)


# ---- bounds ---------------------------------------------------------------------------------------------------------


def test_shape_counts_the_weights():
    layer = 960 * 576 + 576 * 576 + 3072 * 576 + 576 * 1536
    assert SMOL.layer_weights == 30 * layer
    assert SMOL.head_weights == 49152 * 576
    assert 2 * (SMOL.layer_weights + SMOL.head_weights) == pytest.approx(269e6, rel=0.001)  # BASELINES' bf16 step


def test_one_stream_is_bound_by_bytes():
    step = cpu_report.decode_step(1, 192)
    weights = 2 * (SMOL.layer_weights + SMOL.head_weights)
    kv = 192 * 30 * 2 * 3 * 64 * 2
    assert cpu_report.bound_seconds(SMOL, step, 2.0, PEAKS) == pytest.approx((weights + kv) / 40e9)
    quarter = cpu_report.bound_seconds(SMOL, step, 0.5, PEAKS)
    assert quarter == pytest.approx((weights / 4 + kv) / 40e9)


def test_many_rows_are_bound_by_operations():
    step = cpu_report.prefill_step(1024)
    matrices = 2 * (SMOL.layer_weights * 1024 + SMOL.head_weights)
    attention = 4 * 30 * 9 * 64 * 1024 * 1025 / 2
    assert cpu_report.bound_seconds(SMOL, step, 2.0, PEAKS) == pytest.approx((matrices + attention) / 1e12)
    # Attention stays in bfloat16 where the matrices are in int8; without an int8 peak all is at bfloat16's.
    assert cpu_report.bound_seconds(SMOL, step, 1.0, PEAKS, "int8") == pytest.approx(matrices / 2e12 + attention / 1e12)
    unknown = Peaks(40e9, 1e12)
    assert cpu_report.bound_seconds(SMOL, step, 1.0, unknown, "int8") == pytest.approx((matrices + attention) / 1e12)


def test_bound_grows_with_rows_and_context():
    def seconds(streams: int, context: float) -> float:
        return cpu_report.bound_seconds(SMOL, cpu_report.decode_step(streams, context), 2.0, PEAKS)

    assert seconds(1, 100) < seconds(1, 1000) < seconds(16, 1000) < seconds(64, 1000)
    assert Step(64, 64, 64 * 9, 64 * 9) == cpu_report.decode_step(64, 9)


def test_bounds_set_measured_steps_beside_the_best_peaks():
    rounds = [Round("now", 0, 0.1, Peaks(20e9, 5e11)), Round("now", 1, 0.1, Peaks(40e9, 4e11))]
    runs = [
        run("deepserve-bf16", "decode-1", 0, tpot_ms=10.0, output_tok_s=90.0),
        run("deepserve-bf16", "prefill", 0, ttft_ms=500.0, prompt_tok_s=2000.0),
        run("vllm-bf16", "decode-1", 0, tpot_ms=12.0, output_tok_s=70.0),
    ]
    found = cpu_report.bounds(report(*runs, rounds=rounds, shape=SMOL))
    assert [(b.server, b.scenario) for b in found] == [("deepserve-bf16", "decode-1"), ("deepserve-bf16", "prefill")]
    want = cpu_report.bound_seconds(SMOL, cpu_report.decode_step(1, 192), 2.0, Peaks(40e9, 5e11))
    assert found[0].bound_ms == pytest.approx(want * 1e3)
    assert found[0].share == pytest.approx(want * 100)


# ---- rounds, cells, ratios ------------------------------------------------------------------------------------------


def test_rotation_spreads_the_starts_over_the_list():
    names = list("abcdef")
    assert [cpu_report.rotated(names, i, 3)[0] for i in range(3)] == ["a", "c", "e"]
    assert all(sorted(cpu_report.rotated(names, i, 4)) == names for i in range(4))
    assert cpu_report.rotated(names, 0, 1) == names
    assert cpu_report.rotated([], 1, 2) == []


def test_cells_are_medians_with_their_spread():
    runs = [run("a", "decode-1", i, output_tok_s=v) for i, v in enumerate((3.0, 1.0, 10.0))]
    runs.append(run("a", "decode-1", 3, error="it broke"))
    assert cpu_report.cells(runs)["a"]["decode-1"]["output_tok_s"] == (3.0, 1.0, 10.0, 3)


def test_a_new_session_replaces_only_what_it_measured():
    old = [run("a", "decode-1", 0, "then", x=1.0), run("a", "decode-4", 0, "then", x=2.0), run("b", "decode-1", 0, "then", x=3.0)]
    first = cpu_report.merge(old, run("a", "decode-1", 0, x=4.0))
    both = cpu_report.merge(first, run("a", "decode-1", 1, x=5.0))
    assert cpu_report.merge([run("a", "start", 0, "then", error="it broke")], both[-1]) == both[-1:]
    left = {(r.server, r.scenario, r.session, r.round) for r in both}
    assert left == {
        ("a", "decode-4", "then", 0),
        ("b", "decode-1", "then", 0),
        ("a", "decode-1", "now", 0),
        ("a", "decode-1", "now", 1),
    }


def test_ratio_is_taken_round_by_round_against_the_best_peer_of_each():
    bar = Bar("us", ("p", "q"), "decode-1", "output_tok_s", 1.5)
    runs = []
    for i, (us, p, q) in enumerate(((30.0, 10.0, 20.0), (36.0, 18.0, 9.0), (50.0, 10.0, 10.0))):
        for name, value in (("us", us), ("p", p), ("q", q)):
            runs.append(run(name, "decode-1", i, output_tok_s=value))
    found = cpu_report.ratio(report(*runs), bar)
    assert found is not None and (found.median, found.min, found.max, found.n) == (2.0, 1.5, 5.0, 3)
    assert found.reached


def test_ratio_of_a_cost_takes_the_least_and_must_stay_below():
    bar = Bar("us", ("p", "q"), "memory", "peak_mb", 0.5)
    runs = [run("us", "memory", 0, peak_mb=6.0), run("p", "memory", 0, peak_mb=10.0), run("q", "memory", 0, peak_mb=20.0)]
    found = cpu_report.ratio(report(*runs), bar)
    assert found is not None and found.median == 0.6 and not found.reached


def test_no_ratio_across_sessions_nor_past_a_peer_that_is_missing():
    bar = Bar("us", ("p", "q"), "decode-1", "output_tok_s", 1.0)
    ours = run("us", "decode-1", 0, output_tok_s=2.0)
    assert cpu_report.ratio(report(ours, run("p", "decode-1", 0, "then", output_tok_s=1.0)), bar) is None
    assert cpu_report.ratio(report(ours), bar) is None
    # q has a figure in another round only: this round, in which the better peer may be missing, doesn't count.
    runs = [ours, run("p", "decode-1", 0, output_tok_s=1.0), run("q", "decode-1", 1, output_tok_s=1.0)]
    assert cpu_report.ratio(report(*runs), bar) is None


def test_every_bar_names_servers_and_scenarios_that_exist():
    names = {s.name for s in SPECS}
    for bar in cpu_report.BARS:
        assert bar.server in names and set(bar.against) <= names and bar.scenario in (*cpu.SCENARIOS, "te")


# ---- file and table -------------------------------------------------------------------------------------------------


def whole() -> Report:
    runs = []
    for i in range(2):
        for name, speed in (("deepserve-bf16", 150.0), ("llama.cpp-bf16", 100.0), ("vllm-bf16", 60.0)):
            runs.append(run(name, "decode-1", i, output_tok_s=speed + i, tpot_ms=7.0, ttft_ms=1000 / speed))
            runs.append(run(name, "start", i, first_token_s=100 / speed))
        runs += [run("te-1", "te", i, output_tok_s=800.0), run("te-2", "te", i, output_tok_s=640.0)]
        runs.append(run("deepserve-bf16", "idle", i, idle_core_percent=0.04))
        runs.append(run("deepserve-bf16", "idle_memory", i, private_mb=60.0, shared_mb=300.0))
    runs.append(run("vllm-bf16", "decode-4", 1, error="not done within 400 s"))
    rounds = [Round("now", i, 0.2, Peaks(40e9, 9e11, 2e12)) for i in range(2)]
    machine = {"cpu": "Some CPU", "cores": 2, "flags": "avx512f"}
    return report(*runs, rounds=rounds, shape=SMOL, date="2026-11-21", machine=machine, model="a model")


def test_table_has_spreads_ratios_with_bars_and_failures():
    text = cpu_report.table(whole())
    lines = text.splitlines()
    assert lines[0].startswith("2026-11-21, 2 cores of Some CPU (avx512f), a model; 2 rounds")
    assert "busy" not in lines[0]
    assert "| DeepServe bf16 | 150 (150–151) |  |  |  |  |  | 0.667 (0.667–0.667) |  |" in lines
    assert "| **bf16 / best bf16 peer** | 1.50x, reached (≥ 1.25) |  |  |  |  |  | 0.67x, reached (≤ 1) |  |" in lines
    assert any(line.startswith("| DeepServe bf16 | 7 / 6.83 (98%)") for line in lines)
    assert "- two TEs / one TE: 0.80x, reached (≥ 0.7)." in lines
    assert "- DeepServe bf16, idle: 0.04 (0.04–0.04) % of a core, 60 (60–60) MB private, 300 (300–300) MB shared" in text
    assert "- Failed: vLLM CPU BF16, bound threads, decode-4, round 1: not done within 400 s" in lines
    tables = [line for line in lines if line.startswith("|")]
    assert all(line.count("|") == 10 for line in tables[:6])


def test_table_says_that_a_bar_is_missed_and_that_the_machine_was_busy():
    slow = whole()
    slow.runs = [
        msgspec.structs.replace(r, values={k: v / 2 for k, v in r.values.items()}) if r.server == "deepserve-bf16" else r
        for r in slow.runs
    ]
    slow.rounds[0] = msgspec.structs.replace(slow.rounds[0], load=3.4)
    text = cpu_report.table(slow)
    assert "0.75x, missed (≥ 1.25)" in text
    assert "load average up to 3.4" in text


def test_table_says_what_is_of_an_earlier_run():
    mixed = whole()
    mixed.runs.append(run("llama.cpp-q4_1", "decode-1", 0, "earlier", output_tok_s=100.0))
    lines = cpu_report.table(mixed).splitlines()
    assert "- Of an earlier run: llama.cpp Q4_1, decode-1." in lines
    assert not any("Of an earlier run: vLLM" in line for line in lines)


def test_an_empty_report_has_a_table_too():
    assert cpu_report.table(Report())


def test_file_is_written_whole_and_read_back(tmp_path: Path):
    path = tmp_path / "results" / "cpu.json"
    assert cpu_report.load(path) == Report()
    cpu_report.save(path, whole())
    content = json.loads(path.read_text())
    assert content["cells"]["te-2"]["te"]["output_tok_s"] == {"median": 640.0, "min": 640.0, "max": 640.0, "n": 2}
    first = content["ratios"][0]
    assert (first["server"], first["scenario"], first["bar"], first["reached"]) == ("deepserve-bf16", "decode-1", 1.25, True)
    again = cpu_report.load(path)
    assert again.rounds == whole().rounds and len(again.runs) == len(whole().runs)
    assert cpu_report.table(again) == cpu_report.table(whole())
    assert [p.name for p in path.parent.iterdir()] == ["cpu.json"]


# ---- servers --------------------------------------------------------------------------------------------------------


def test_commands_name_model_port_and_threads():
    spec = {s.name: s for s in SPECS}
    argv, env = command(spec["llama.cpp-q8_0"], MADE, 4321, [0, 1])
    assert argv[:3] == ["/peers/llama.cpp/bin/llama-server", "-m", "/models/model.q8_0"] and argv[-1] == "4321"
    assert argv[argv.index("-t") + 1] == "2" and not env
    argv, env = command(spec["vllm-bf16"], MADE, 4321, [0, 1, 2])
    assert env["VLLM_CPU_OMP_THREADS_BIND"] == "0-2" and "libiomp5" in env["LD_PRELOAD"]
    assert command(spec["vllm-bf16"], MADE, 4321, [0, 2])[1]["VLLM_CPU_OMP_THREADS_BIND"] == "0,2"
    argv, env = command(spec["deepserve-int8"], MADE, 4321, [0, 1])
    assert argv[-2:] == ["--quantization", "int8"] and not env


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: s.name)
def test_settings_in_the_result_name_no_path(spec: Spec):
    text = settings(spec, MADE, [0, 1])
    assert "/" not in text and "port" not in text
    assert "model." + spec.model in text


def test_memory_and_cpu_time_of_this_process():
    memory = memory_of({os.getpid()})
    assert memory.private > 1 << 20 and memory.shared > 1 << 20
    assert memory.pss == memory.private + memory.shared
    kept = mmap.mmap(
        -1, 32 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    )  # memory of its own: an allocator may have some left
    kept.write(b"x" * len(kept))
    assert memory_of({os.getpid()}).private >= memory.private + len(kept) // 2
    before = cpu_seconds({os.getpid()})
    sum(range(1_000_000))
    assert cpu_seconds({os.getpid()}) > before


def test_processes_that_have_ended_count_nothing():
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert memory_of({child.pid}).pss == 0 and cpu_seconds({child.pid}) == 0


def test_a_server_that_ends_says_why_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    # One child in a session of its own, as ours are; one whose environment can't be read any more, as vLLM's.
    code = """
import subprocess, sys
children = [subprocess.Popen(["sleep", "300"], start_new_session=True), subprocess.Popen(["sleep", "300"], env={})]
open(sys.argv[1], "w").write(" ".join(str(child.pid) for child in children))
sys.exit("no such model")
"""
    pids = tmp_path / "pids"
    monkeypatch.setattr("bench.cpu_servers.END_SECONDS", 0.5)
    monkeypatch.setattr("bench.cpu_servers.command", lambda *_: ([sys.executable, "-c", code, str(pids)], {}))
    here = msgspec.structs.replace(MADE, models={"bf16": Path(__file__)})
    found = list(cpu.measured(Spec("us", "us", "deepserve", "bf16"), here, ["start"], "seed"))
    assert len(found) == 1 and found[0][0] == "start"
    assert isinstance(found[0][1], str) and "ended with status 1: no such model" in found[0][1]
    children = [int(pid) for pid in pids.read_text().split()]
    assert len(children) == 2 and not any(alive(pid) for pid in children)


def test_tokens_are_counted_in_the_shape_that_the_server_knows():
    asked: list[Any] = []

    class Answering(cpu.Counting):
        """llama-server's answers: it finds no `content` in another server's shape, and says so with an empty list."""

        async def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
            asked.append(body)
            return {"tokens": (body or {}).get("content", "").split()}

    assert asyncio.run(Answering("llama.cpp", "http://server").count_tokens("two words", "bench")) == 2
    # A count of none for a text once made prompts grow until the memory was full.
    with pytest.raises(UserError, match="no tokens"):
        asyncio.run(Answering("vllm", "http://server").count_tokens("two words", "bench"))
    assert asked[1] == {"prompt": "two words", "model": "bench"}


def test_a_server_ends_with_a_benchmark_that_is_killed(tmp_path: Path):
    if not shutil.which("setpriv"):
        pytest.skip("setpriv is not there")
    code = """
import sys, time
from pathlib import Path
import bench.cpu_servers as servers
from tests.test_bench_cpu import MADE
servers.command = lambda *_: ([sys.executable, "-c", "import time; time.sleep(300)"], {})
with servers.Server(servers.SPECS[0], MADE) as server:
    Path(sys.argv[1]).write_text(str(server.processes[0].pid))
    time.sleep(300)
"""
    pid = tmp_path / "pid"
    bench = subprocess.Popen([sys.executable, "-c", code, str(pid)], cwd=Path(__file__).parent.parent)
    child = int(wait_until("the server runs", lambda: pid.exists() and pid.read_text()))
    wait_until(
        "it is the server",
        lambda: (
            "sleep(300)" in Path(f"/proc/{child}/cmdline").read_text()
            and "setpriv" not in Path(f"/proc/{child}/cmdline").read_text()
        ),
    )
    bench.kill()
    bench.wait()
    wait_until("the server has ended", lambda: not alive(child), 10.0)


def test_a_program_that_is_missing_is_a_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(UserError, match="No such file"), Server(Spec("x", "x", "llama.cpp", "bf16"), MADE):
        pass


# ---- command line and peers -----------------------------------------------------------------------------------------


def test_scenarios_of_tes_are_for_their_servers_alone():
    spec = {s.name: s for s in SPECS}
    chosen = list(cpu.SCENARIOS)
    assert cpu.own_scenarios(spec["te-2"], chosen) == ["te"]
    assert "te" not in cpu.own_scenarios(spec["deepserve-bf16"], chosen)
    assert cpu.own_scenarios(spec["te-2"], ["decode-1"]) == []


def test_a_full_run_of_two_rounds_is_estimated_below_25_minutes():
    assert 5 * 60 < cpu.estimate(list(SPECS), list(cpu.SCENARIOS), 2) < 25 * 60
    assert cpu.estimate([SPECS[0]], ["decode-1"], 1) < 60


def test_table_of_a_file_without_measuring(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    cpu_report.save(tmp_path / "cpu.json", whole())
    assert cpu.main(["--table", "--out", str(tmp_path / "cpu.json")]) == 0
    assert capsys.readouterr().out.startswith("2026-11-21, 2 cores")


def test_stored_bytes_of_a_weight(tmp_path: Path):
    folder = tiny.make(tmp_path / "model")
    assert cpu.weight_bytes(Spec("x", "x", "deepserve", "bf16"), folder) == 4.0  # float32
    assert cpu.weight_bytes(Spec("x", "x", "deepserve", "bf16", ("--quantization", "int8")), folder) == 1.0
    assert cpu.shape_of(folder) == Shape(2, 64, 96, 4, 2, 16, tiny.VOCAB)


def test_peers_are_made_once_for_each_content(tmp_path: Path):
    made = []
    for version in (1, 1, 2):
        peers.once(tmp_path / "stamp.json", {"version": version}, lambda v=version: made.append(v))
    assert made == [1, 2]

    def fails() -> None:
        raise UserError("the compiler is missing")

    with pytest.raises(UserError):
        peers.once(tmp_path / "stamp.json", {"version": 3}, fails)
    assert not (tmp_path / "stamp.json").exists()  # nothing claims to be whole
