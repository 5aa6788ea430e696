"""The npu device without an NPU: its cases over the stub of the ACL runtime (tests/npu), at once and with streams that run in
threads of their own; a whole server on it; and what can be told of an Ascend box from files."""

from __future__ import annotations

import ast
import json
import urllib.request
from pathlib import Path

import pytest

from engine import capacity, devices
from engine.capacity import Machine
from engine.config import Config
from engine.devices import ascend
from engine.types import OutOfMemory, UserError
from scale import doctor
from tests import tiny
from tests.npu import environment
from tests.npu.stub import Faults, Unavailable
from tests.server import PATIENCE, Server, wait_until
from tests.test_capacity import GIB, Shape

ROOT = Path(__file__).resolve().parent.parent
CASES = ["-m", "pytest", "-p", "no:cacheprovider", "-W", "error::UserWarning", "tests/npu/device_cases.py"]


@pytest.fixture(scope="module")
def npu_python() -> Path:
    try:
        return environment.python()
    except Unavailable as e:
        pytest.skip(str(e))


# ---- over the stub --------------------------------------------------------------------------------------------------


def test_the_keeper_may_fork_until_a_device_is_touched(npu_python):
    told = environment.run("""
        from engine import devices
        devices.preload("npu", "rows")
        print(repr(devices.touched()))
        devices.open_device("npu", "float32", 1)
        print(repr(devices.touched()))
    """)
    assert told.split() == ["''", "'npu'"]


@pytest.mark.parametrize("cases", ["all", "captured or launched or padding or bucket or layer"], ids=["at_once", "queued"])
def test_the_device_over_the_stub(cases, npu_python):
    """Queued: every stream runs in a thread of its own, so that a wait that is missing is seen. Those are the cases of whole
    steps."""
    if cases == "all":
        environment.run(CASES)
    else:
        environment.run([*CASES, "-k", cases], Faults(queued=True))


def test_a_lost_device_comes_out_of_the_pending(npu_python, tmp_path):
    """In a process of its own, which leaves as a TE does: the plugin aborts where it frees memory of a lost device."""
    path = tiny.make(tmp_path / "m")
    code = f"""
    import os
    from pathlib import Path
    import numpy as np
    from engine.devices.npu import NpuDevice
    from tests.harness import Rig
    from tests.npu import stub

    rig = Rig(Path({str(path)!r}), device=NpuDevice("float32"), blocks=8)
    rig.greedy([1, 2], 2)
    stub.lose_device(0)
    try:
        rig.launch(rig.inputs([([1, 2, 3], 0, 3)], [rig.table(4)], [2])).result()
    except RuntimeError as e:
        print("told:", "lost" in str(e), flush=True)
    os._exit(0)
    """
    assert "told: True" in environment.run(code)


def stream(server: Server, prompt: str) -> tuple[str, int]:
    """A streamed completion: the text, and in how many pieces it came."""
    body = {"model": "m", "prompt": prompt, "max_tokens": 24, "temperature": 0, "stream": True, "ignore_eos": True}
    request = urllib.request.Request(
        server.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
        lines = [line[6:].strip() for line in reply.read().decode().splitlines() if line.startswith("data: ")]
    assert lines.pop() == "[DONE]"
    texts = [choice["text"] for line in lines for choice in json.loads(line)["choices"]]
    return "".join(texts), len(texts)


def test_a_server_on_npu_streams_the_texts_of_cpu(npu_python, tmp_path):
    """`serve --device npu --dtype float32` against `--device cpu --dtype float32`: the control process, the keeper that has
    imported torch-npu and forks, TEs that open one device each."""
    path = tiny.make(tmp_path / "m")
    prompts = ["Hello", "a longer prompt " * 20, "x"]
    texts = {}
    settings = ("--model", path, "--served-model-name", "m", "--dtype", "float32", "--max-num-seqs", "4")
    for device in ("cpu", "npu"):
        there = {"python": npu_python, "environment": environment.environment()} if device == "npu" else {}
        with Server(*settings, "--device", device, "--te", "2", **there) as server:
            server.ready()
            texts[device] = [stream(server, prompt) for prompt in prompts]
            if device == "npu":
                assert {te["state"] for te in server.tes()} == {"ready"} and len(server.tes()) == 2
    assert [text for text, _ in texts["npu"]] == [text for text, _ in texts["cpu"]]
    assert all(text and pieces > 4 for text, pieces in texts["npu"])


def test_more_tes_than_npus_are_refused(npu_python, tmp_path):
    path = tiny.make(tmp_path / "m")
    settings = ("--model", path, "--device", "npu", "--dtype", "bfloat16", "--te", "2")
    with Server(*settings, python=npu_python, environment=environment.environment(Faults(devices=1))) as server:
        wait_until("the server has given up", lambda: server.process.poll() is not None)
    assert "use --te 1 or less" in server.stderr()


# ---- what is known before a device is opened ------------------------------------------------------------------------


def test_npu_is_resolved_without_torch():
    box = Machine(20 * GIB, 2, compiled=True)
    config, why = capacity.resolve(Config(device="npu"), Shape(), GIB // 2, box)
    assert (config.device, config.dtype, config.block_size, config.max_model_len) == ("npu", "bfloat16", 128, 8192)
    assert config.kv_cache_memory_bytes is None and "npu" in why["kv_cache_memory_bytes"]
    assert config.max_num_batched_tokens == 2048
    assert capacity.packing(Config(device="npu", quantization="int8"), box).format == "rows"
    for settings, says in (
        ({"block_size": 16}, "128 to 512"),
        ({"block_size": 640}, "128 to 512"),
        ({"quantization": "int8", "dtype": "float32"}, "--dtype bfloat16 or float16"),
        ({"pin_threads": True}, "--pin-threads"),
        ({"max_model_len": 9000}, "8192"),
        ({"tensor_parallel_size": 2}, "9 query heads and 3 KV heads"),
        ({"pd": "1p1d", "tensor_parallel_size": 3}, "leave out --tensor-parallel-size"),
        ({"pd": "semi"}, "use --pd 1p1d on npu"),
    ):
        with pytest.raises(UserError, match=says):
            capacity.resolve(Config(device="npu", **settings), Shape(), GIB // 2, box)
    with pytest.raises(UserError, match="float32, bfloat16"):
        capacity.resolve(Config(device="cpu", dtype="float16"), Shape(), GIB // 2, box)
    with pytest.raises(OutOfMemory, match="weights"):
        capacity.resolve(Config(device="npu"), Shape(), 30 * GIB, box)


def test_the_kv_cache_takes_what_the_device_has_left():
    box = Machine(20 * GIB, 2)
    config, _ = capacity.resolve(Config(device="npu", max_num_seqs=64), Shape(), GIB, box)
    block = 2 * 30 * 3 * 64 * 2 * 128
    assert capacity.own_kv_bytes(config, Shape(), 8 * GIB) == int(8 * GIB * capacity.OWN_SHARE) // block * block
    # Never more than all sequences at full length.
    assert capacity.own_kv_bytes(config, Shape(), 1 << 50) == 64 * 64 * block
    with pytest.raises(OutOfMemory, match="--max-model-len") as e:
        capacity.own_kv_bytes(config, Shape(), 64 << 20)
    fits = int(str(e.value).split("--max-model-len ")[-1].split()[0])
    config, _ = capacity.resolve(Config(device="npu", max_model_len=fits), Shape(), GIB, box)
    capacity.own_kv_bytes(config, Shape(), 64 << 20)
    config, _ = capacity.resolve(Config(device="npu", kv_cache_memory_bytes=block * 64), Shape(), GIB, box)
    assert capacity.own_kv_bytes(config, Shape(), 8 * GIB) == 64 * block


@pytest.fixture
def ascend_box(monkeypatch, tmp_path):
    """The files of an Ascend box, whole; a test takes away what it wants missing."""
    driver, home = tmp_path / "driver", tmp_path / "ascend-toolkit" / "latest"
    (home / "lib64").mkdir(parents=True)
    driver.mkdir()
    (driver / "version.info").write_text("package_name=Ascend\nVersion=25.3.rc1\n")
    (home / "version.cfg").write_text("# version: 1.0\nruntime_running_version=[8.5.0.0.0:9.1.0]\n")
    (home / "lib64" / "libascendcl.so").touch()
    monkeypatch.setattr(ascend, "DRIVER", driver)
    monkeypatch.setattr(ascend, "TOOLKITS", ())
    monkeypatch.setenv("ASCEND_HOME_PATH", str(home))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(home / "lib64"))
    monkeypatch.setattr(ascend, "plugin", lambda: "2.13.0")
    monkeypatch.setattr(ascend.platform, "machine", lambda: "aarch64")
    return tmp_path


def test_auto_is_npu_where_all_of_it_is_there(ascend_box, monkeypatch):
    assert devices.choose("auto") == ("npu", "an Ascend NPU with CANN and torch-npu")
    monkeypatch.setattr(ascend, "plugin", lambda: "")
    name, why = devices.choose("auto")
    assert name == "cpu" and "torch-npu is missing" in why
    (ascend_box / "driver" / "version.info").unlink()
    assert devices.choose("auto") == ("cpu", "no accelerator found")
    assert devices.choose("cpu") == ("cpu", "")
    with pytest.raises(UserError, match="use cpu or npu"):
        devices.choose("tpu")


def test_the_doctor_looks_at_the_whole_set(ascend_box, monkeypatch):
    def found() -> dict[str, doctor.Finding]:
        return {f.what: f for f in doctor.npu()}

    whole = found()
    assert all(f.ok for name, f in whole.items() if name != "npu devices"), whole
    assert whole["npu driver"].found == "25.3.rc1" and whole["cann"].found.startswith("8.5.0")
    monkeypatch.setenv("LD_LIBRARY_PATH", "")
    assert "set_env.sh" in found()["cann libraries"].mend
    monkeypatch.setattr(ascend, "plugin", lambda: "2.12.0")
    assert not found()["torch-npu"].ok and not found()["torch and torch-npu"].ok
    monkeypatch.setattr(ascend, "plugin", lambda: "")
    assert "./run.sh setup" in found()["torch-npu"].mend
    monkeypatch.setattr(ascend.platform, "machine", lambda: "riscv64")
    assert not found()["npu architecture"].ok
    monkeypatch.delenv("ASCEND_HOME_PATH")
    assert "Ascend-cann-toolkit" in found()["cann"].mend
    (ascend_box / "driver" / "version.info").unlink()
    assert list(found()) == ["ascend npu"]
    monkeypatch.setattr(ascend, "plugin", lambda: "2.13.0")
    assert "uninstall" in found()["torch-npu"].mend


def test_the_doctor_imports_nothing_heavy():
    tree = ast.parse((ROOT / "engine" / "devices" / "ascend.py").read_text() + (ROOT / "scale" / "doctor.py").read_text())
    names = {a.name for node in ast.walk(tree) if isinstance(node, ast.Import) for a in node.names}
    assert not names & {"torch", "torch_npu"}


def test_a_missing_plugin_is_named():
    """Here torch-npu isn't installed, or CANN is missing: what happens on a machine where somebody asks for npu all the same."""
    with pytest.raises(UserError, match="doctor") as e:
        devices.open_device("npu", "bfloat16", 1)
    assert e.value.param == "device"
