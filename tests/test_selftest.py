"""`doctor --selftest`: on cpu for real, with a tiny model; on devices and operators that are wrong, which it must say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import deepserve
from engine import capacity
from engine.devices import cuda, npu_calls, operator_cases, selftest
from engine.devices.cpu import CpuDevice
from engine.devices.npu_reference import REFERENCES
from engine.types import UserError
from tests import tiny
from tests.test_devices_cuda import device as cuda_device

ROOT = Path(__file__).resolve().parent.parent
HOST = torch.device("cpu")


def nothing(line: str) -> None: ...


def empty(device: str = "cpu") -> selftest.Report:
    return selftest.Report(device=device, date="", command="", versions={})


# ---- operators ------------------------------------------------------------------------------------------------------


def test_the_cpus_operators_pass():
    report, lines = empty(), []
    selftest.check_operators("cpu", report, lines.append)
    assert not report.failed
    names = {c.name for c in report.checks}
    assert names >= {
        "embed",
        "rms_norm",
        "add_rms_norm",
        "linear",
        "linear, bias",
        "swiglu",
        "take_rows",
        "head_norm",
        "attention",
    }
    assert names >= {"rope_store, rotation", "rope_store, cache", "choices", "log-probabilities"}
    assert {c.case.split(",")[0] for c in report.checks} == {"float32", "bfloat16"}
    # The bounds are bounds: no check is passed by far more than its dtype's rounding explains.
    assert max(c.error for c in report.checks if c.case.startswith("bfloat16")) > 1e-3
    assert len(lines) == 2 * len(names)


def test_the_cudas_operators_pass_on_the_host(few, monkeypatch):
    """In both forms of its attention; the graphs need a GPU."""
    monkeypatch.setattr(operator_cases, "open_device", lambda name, dtype, threads: cuda_device(f"captured {dtype}"))
    forms = set()
    attend = cuda.CudaDevice.attention

    def seen(self, out, qkv, kv, attention, *rest):
        forms.add(attention.pages is None)
        attend(self, out, qkv, kv, attention, *rest)

    monkeypatch.setattr(cuda.CudaDevice, "attention", seen)
    report = empty("cuda")
    selftest.check_operators("cuda", report, nothing)
    assert not report.failed and forms == {True, False}
    assert {c.case.split(",")[0] for c in report.checks} == {"float32", "bfloat16", "float16"}


WRONG = {
    "rms_norm": ("rms_norm", lambda device, out, x, weight, eps: out.copy_(x)),
    "linear": ("linear", lambda device, out, x, weight, *more: out.copy_(x @ weight.t() * 1.001)),
    "not a number": ("swiglu", lambda device, out, gate_up: out.fill_(torch.nan)),
    "raises": ("swiglu", lambda device, out, gate_up: 1 / 0),
}


@pytest.fixture
def few(monkeypatch):
    """The same cases in fewer shapes."""
    monkeypatch.setattr(operator_cases, "HEADS", ((4, 2, 16),))
    monkeypatch.setattr(operator_cases, "VOCAB", 300)
    monkeypatch.setattr(operator_cases, "WINDOWS", (0, 6))


@pytest.fixture(scope="session")
def all_calls():
    """Of each operator two."""
    found: dict[str, list[npu_calls.Call]] = {}
    for call in npu_calls.calls():
        found.setdefault(call.operator, []).append(call)
    return [call for each in found.values() for call in (each[0], each[-1])]


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_operator_is_named_and_the_rest_runs(name, few, monkeypatch):
    operator, wrong = WRONG[name]
    monkeypatch.setattr(CpuDevice, operator, wrong)
    report, lines = empty(), []
    selftest.check_operators("cpu", report, lines.append)
    failed = {c.name for c in report.failed if c.case.startswith("float32")}
    assert failed <= {operator, "linear, bias", "row_cases"} and failed
    assert any(line.startswith("FAIL") for line in lines)
    assert "attention" in {c.name for c in report.checks}


def test_attention_that_sees_one_key_too_many_is_found(few, monkeypatch):
    attention = CpuDevice.attention

    def wrong(self, out, qkv, kv, paging, heads, kv_heads, scale, window):
        attention(self, out, qkv, kv, paging, heads, kv_heads, scale, window and window + 1)

    monkeypatch.setattr(CpuDevice, "attention", wrong)
    report = empty()
    selftest.check_operators("cpu", report, nothing)
    assert {c.name for c in report.failed} == {"attention"}
    assert all("window 0" not in c.case for c in report.failed)


# ---- the plugin's operators, played by their references ------------------------------------------------------------------


def test_every_operator_of_the_npu_device_is_called():
    used = set(REFERENCES) & {
        word.strip("(.")
        for word in (ROOT / "engine/devices/npu.py").read_text().replace("torch_npu.", " ").replace("(", " ").split()
    }
    called = {call.operator for call in npu_calls.calls()} | {"npu_format_cast"}
    sizing = {name for name in REFERENCES if name.endswith(("max_workspace", "infer_output"))}
    assert used and used - sizing <= called


def test_references_agree_with_themselves():
    report = empty("npu")
    selftest.check_npu_operators(REFERENCES.__getitem__, HOST, report, nothing)
    assert not report.failed and len(report.checks) > 50
    assert all(c.error == 0 for c in report.checks)


@pytest.mark.parametrize(
    ("operator", "wrong"),
    [
        ("npu_rms_norm", lambda *a: tuple(x * 1.1 for x in REFERENCES["npu_rms_norm"](*a))),
        ("npu_swiglu", lambda x: REFERENCES["npu_swiglu"](x).double()),
        ("npu_swiglu", lambda x: x),
        ("npu_scatter_pa_kv_cache", lambda *a, **how: None),
        ("npu_rotary_mul", lambda x, r1, r2: x / 0),
        ("npu_quant_matmul", lambda *a, **how: 1 / 0),
        ("npu_top_k_top_p", lambda logits, p, k: logits),
    ],
)
def test_a_wrong_plugin_is_found(operator, wrong, all_calls, monkeypatch):
    monkeypatch.setattr(npu_calls, "calls", lambda: all_calls)
    report = empty("npu")
    selftest.check_npu_operators(lambda name: wrong if name == operator else REFERENCES[name], HOST, report, nothing)
    assert {c.name for c in report.failed} == {operator}
    assert all(not c.ok for c in report.checks if c.name == operator)


# ---- a model --------------------------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(selftest, "DECODES", {False: ((1, 20), (3, 20))})
    monkeypatch.setattr(selftest, "COPY_BYTES", {False: 1 << 20})
    monkeypatch.setattr(selftest, "MATRIX", {False: 64})
    return tiny.make(tmp_path / "model")


def test_text_of_a_device_that_must_give_the_very_tokens(path, monkeypatch):
    """A device with memory of its own is held to float32, and to its 16 bits within bounds: here the cuda device on the host."""
    opened = selftest.open_device

    def there(name, dtype, threads, *more):
        return cuda_device(f"captured {dtype}") if name == "cuda" else opened(name, dtype, threads, *more)

    monkeypatch.setattr(selftest, "open_device", there)
    monkeypatch.setattr(selftest, "TEXT_TOKENS", 12)
    report = empty("cuda")
    selftest.check_text("cuda", path, report, nothing)
    assert not report.failed
    texts = [c for c in report.checks if c.name == "greedy text"]
    assert len(texts) == len(selftest.PROMPTS) and all("12 of 12" in c.found for c in texts)
    assert {f.name: f.value for f in report.figures}["greedy ids equal, float32, operators"] == 1.0

    monkeypatch.setattr(cuda.CudaDevice, "swiglu", lambda self, out, gate_up: out.set(gate_up.value.chunk(2, 1)[0]))
    wrong = empty("cuda")
    selftest.check_text("cuda", path, wrong, nothing)
    assert {c.name for c in wrong.failed} == {"greedy text", "log-probabilities"}


def test_the_whole_report_on_cpu(path, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(selftest, "check_operators", lambda *a: None)
    to = tmp_path / "report.json"
    assert deepserve.main(["doctor", "--selftest", "--device", "cpu", "--model", str(path), "--json", str(to)]) == 0
    out = capsys.readouterr().out
    report = json.loads(to.read_bytes())
    assert report["device"] == "cpu" and report["versions"]["torch"] == torch.__version__
    assert report["command"].startswith("deepserve.py doctor --selftest --device cpu")
    figures = {f["name"]: f["value"] for f in report["figures"]}
    dtype = selftest.packings("cpu")[-1].dtype
    assert figures[f"decode, {dtype}"] > 0 and figures[f"prefill, {dtype}"] > 0 and figures["memory, read"] > 0
    texts = [c for c in report["checks"] if c["part"] == "text"]
    assert len(texts) == 1 + capacity.has_compiled_kernels() and all(c["ok"] for c in texts)
    assert f"{len(report['checks'])} checks, 0 failed" in out and "tokens/s" in out


def test_without_a_model_the_operators_run_and_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(operator_cases, "STEPS", {"decode": [(1, 40), (1, 3)]} | {"mixed": [(2, 5)]})
    monkeypatch.setattr(selftest, "check_operators", lambda *a: None)
    assert deepserve.main(["doctor", "--selftest", "--model", "/nowhere/model.gguf"]) == 0
    assert "text and rates were not run: /nowhere/model.gguf" in capsys.readouterr().out


def test_a_failed_check_is_in_the_exit_status(monkeypatch, capsys):
    def failing(name, report, tell):
        selftest.add(report, tell, "operators", "linear", "float32", False, "1.0e+00, at most 3e-05")

    monkeypatch.setattr(selftest, "check_operators", failing)
    assert selftest.main("cpu", None, "not asked", None, "") == 1
    assert "1 checks, 1 failed:\nFAIL linear: float32: 1.0e+00" in capsys.readouterr().out


def test_its_flags_alone_are_refused(capsys):
    assert deepserve.main(["doctor", "--json", "report.json"]) == 2
    assert "--selftest" in capsys.readouterr().err


def test_a_device_that_is_not_there(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is there")
    assert deepserve.main(["doctor", "--selftest", "--device", "cuda", "--model", "/nowhere"]) == 2
    assert "--device cuda" in capsys.readouterr().err
    with pytest.raises(UserError):
        selftest.main("cuda", None, "", None, "")


def test_bench_cuda_is_the_selftest(path, monkeypatch, tmp_path):
    from bench import cuda as bench

    monkeypatch.setattr(selftest, "check_operators", lambda *a: None)
    to = tmp_path / "cpu.json"
    assert bench.main(["--device", "cpu", "--model", str(path), "--json", str(to)]) == 0
    assert json.loads(to.read_bytes())["command"].startswith("python -m bench.cuda --device cpu")
    if not torch.cuda.is_available():
        assert bench.main(["--model", str(path)]) == 2
        assert not bench.RESULTS.exists() or json.loads(bench.RESULTS.read_bytes())["device"] == "cuda"


def test_the_command_line_knows_it_without_torch():
    code = "import deepserve, sys; deepserve.parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_errors_that_are_not_numbers_fail():
    assert np.isnan(operator_cases.worst([0.1, float("nan")]))
    assert not operator_cases.error(np.array([np.nan]), np.array([1.0])) <= 1


# ---- the whole of it on an npu that is played -----------------------------------------------------------------------------


def test_the_whole_report_on_npu_over_the_stub(tmp_path):
    """The real plugin; operators are played by their references, so that this shows the way there and back and no more."""
    from tests.npu import environment

    try:
        environment.python()
    except environment.Unavailable as e:
        pytest.skip(str(e))
    path, to = tiny.make(tmp_path / "model"), tmp_path / "report.json"
    code = f"""
    from dataclasses import replace
    from pathlib import Path
    from engine import devices
    from engine.devices import npu_calls, operator_cases, selftest
    devices.KINDS["npu"] = replace(devices.KINDS["npu"], step_tokens=80, dtypes=("bfloat16", "float32"))
    operator_cases.HEADS, operator_cases.WINDOWS = ((4, 2, 16),), (0, 6)
    del operator_cases.STEPS["prefill"], operator_cases.STEPS["chunks"]
    calls = {{call.operator: call for call in npu_calls.calls()}}
    npu_calls.calls = calls.values
    selftest.DECODES, selftest.COPY_BYTES, selftest.MATRIX = {{True: ((3, 20),)}}, {{True: 1 << 20}}, {{True: 64}}
    selftest.TEXT_TOKENS, selftest.DECODE_STEPS, selftest.PREFILL_STEPS = 6, 4, 1
    assert selftest.main("npu", Path({str(path)!r}), "", Path({str(to)!r}), "") == 0
    """
    environment.run(code)
    report = json.loads(to.read_bytes())
    assert {c["part"] for c in report["checks"]} == {"operators", "sampling", "npu operators", "text", "forks"}
    assert [c["case"].split(" by")[0] for c in report["checks"] if c["part"] == "forks"][1:] == ["mapped", "copied"]
    assert report["versions"]["torch-npu"] == "2.13.0"
    assert {c["case"].split(",")[0] for c in report["checks"] if c["part"] == "text"} == {"float32", "bfloat16"}
