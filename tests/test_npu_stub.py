"""The ground the npu tests stand on: the stub of the ACL runtime, the real plugin over it, and the references of the
operators. Most of it runs in processes of the npu environment (tests/npu/checks.py): once with every stream working at once,
once with each in a thread of its own, and under faults."""

from __future__ import annotations

import ast
import ctypes
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from engine.devices import npu_reference as reference
from tests.npu import environment, stub
from tests.npu.stub import Faults, Unavailable

HERE = Path(__file__).resolve().parent / "npu"
CHECKS = [n.name for n in ast.parse((HERE / "checks.py").read_text()).body if isinstance(n, ast.FunctionDef)]
FORKS = [name for name in CHECKS if name.startswith("fork_")]
PLAIN = [name for name in CHECKS if name.startswith("check_")]
# Once is enough for what a stream's thread can't change.
NOT_QUEUED = {"check_devices", "check_schemas_of_the_references", "check_tensors_of_another_process"}
GROUPS = {
    "plain": (Faults(), FORKS + PLAIN),
    "queued": (Faults(queued=1), [name for name in PLAIN if name not in NOT_QUEUED]),
    "short": (
        Faults(oom_after=32 << 20, copy_fails_after=2, refuse_export=1, lose_after=60),
        ["fault_oom_after", "fault_copy_fails", "fault_refused_export", "fault_device_lost_after"],
    ),
    "slow": (Faults(copy_ms=400), ["fault_slow_copy", "fault_device_lost"]),
}  # what loses the device comes last: nothing works after it
CASES = [(group, name) for group, (_, names) in GROUPS.items() for name in names]


def need_plugin() -> None:
    try:
        environment.python()
        stub.build()
    except Unavailable as e:
        pytest.skip(str(e))


@cache
def results(group: str) -> dict[str, str | None]:
    """The error of each check of a group, which runs in one process; those that it did not come to are missing."""
    faults, names = GROUPS[group]
    try:
        output = environment.run(["-m", "tests.npu.checks", *names], faults)
    except (AssertionError, subprocess.TimeoutExpired) as e:
        output = str(e)
    found = [json.loads(line) for line in output.splitlines() if line.startswith('{"name"')]
    if len(found) < len(names):
        print(output)
    return {one["name"]: one["error"] for one in found}


@pytest.mark.parametrize(("group", "name"), CASES, ids=[f"{group}-{name}" for group, name in CASES])
def test_over_the_plugin(group, name):
    need_plugin()
    error = results(group).get(name, f"the process ended before {name}")
    assert error is None, error


def test_every_check_runs():
    """No check is forgotten by the groups above."""
    wanted = {name for name in CHECKS if name.startswith(("check_", "fork_", "fault_"))}
    assert wanted == {name for _, name in CASES}


# ---- the stub by itself -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def acl():
    """The stub in this process, on device 0; no plugin, no torch."""
    try:
        folder = stub.build()
    except Unavailable as e:
        pytest.skip(str(e))
    library = ctypes.CDLL(str(folder / "libascendcl.so"))
    library.aclGetRecentErrMsg.restype = ctypes.c_char_p
    assert library.aclrtSetDevice(0) == 0
    return library


def test_prototypes_are_the_vendors():
    """The compiler checks every function of the stub against the headers that come with the plugin."""
    need_plugin()
    (include,) = environment.FOLDER.glob("lib/python3*/site-packages/torch_npu/include/third_party/acl/inc")
    for name in ("runtime", "memory", "streams", "absent"):
        done = subprocess.run(
            [
                "cc",
                "-std=gnu17",
                "-Wall",
                "-Werror",
                "-fsyntax-only",
                "-DACL_HEADERS",
                f"-I{include}",
                HERE / "acl" / f"{name}.c",
            ],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr


def test_a_setting_the_stub_does_not_know():
    need = "import ctypes, sys; ctypes.CDLL(sys.argv[1]).aclrtSetDevice(0)"
    try:
        library = str(stub.build() / "libascendcl.so")
    except Unavailable as e:
        pytest.skip(str(e))
    env = {**os.environ, "ACL_STUB": "memry=3"}
    done = subprocess.run([sys.executable, "-c", need, library], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "memry" in done.stderr


HUGE = 2 << 20

OTHER = """
import ctypes, sys
acl = ctypes.CDLL(sys.argv[1])
acl.aclrtSetDevice(0)
way, name = sys.argv[2:]
at = ctypes.c_void_p()
if way == "key":
    code = acl.aclrtIpcMemImportByKey(ctypes.byref(at), name.encode(), ctypes.c_uint64(0))
else:
    handle = ctypes.c_void_p()
    code = acl.aclrtMemImportFromShareableHandle(ctypes.c_uint64(int(name)), 0, ctypes.byref(handle))
    if not code:
        size = ctypes.c_size_t(2 << 20)
        acl.aclrtReserveMemAddress(ctypes.byref(at), size, ctypes.c_size_t(0), None, ctypes.c_uint64(1))
        code = acl.aclrtMapMem(at, size, ctypes.c_size_t(0), handle, ctypes.c_uint64(0))
if code:
    sys.exit(str(code))
read = ctypes.string_at(at, 5)
ctypes.memmove(at.value + 5, b"other", 5)
sys.stdout.write(read.decode())
"""


def other_process(acl: ctypes.CDLL, way: str, name: str, pids: object = None) -> str:
    """What another process reads at the start of exported memory; it writes "other" behind. `pids(pid)` before it imports."""
    code = OTHER.replace("acl.aclrtSetDevice(0)\n", "acl.aclrtSetDevice(0); sys.stdin.readline()\n", 1)
    process = subprocess.Popen(
        [sys.executable, "-c", code, acl._name, way, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    if callable(pids):
        pids(process.pid)
    out, error = process.communicate("\n", timeout=30)
    return out if process.returncode == 0 else f"error {error.strip()}"


def malloc(acl: ctypes.CDLL, size: int) -> ctypes.c_void_p:
    at = ctypes.c_void_p()
    assert acl.aclrtMalloc(ctypes.byref(at), ctypes.c_size_t(size), 0) == 0
    return at


def export_key(acl: ctypes.CDLL, at: int, size: int, flags: int) -> tuple[int, str]:
    key = ctypes.create_string_buffer(65)
    code = acl.aclrtIpcMemGetExportKey(
        ctypes.c_void_p(at), ctypes.c_size_t(size), key, ctypes.c_size_t(65), ctypes.c_uint64(flags)
    )
    return code, key.value.decode()


def test_memory_by_key(acl):
    """The same pages in another process; only aligned ranges are exported; a closed export can't be imported."""
    at = malloc(acl, 2 * HUGE)
    ctypes.memmove(at.value + HUGE, b"owner", 5)
    code, key = export_key(acl, at.value + HUGE, HUGE, flags=1)
    assert code == 0
    assert other_process(acl, "key", key) == "owner"
    assert ctypes.string_at(at.value + HUGE, 10) == b"ownerother"
    for start, size in ((512, HUGE), (0, HUGE + 512), (HUGE, 4096)):
        assert export_key(acl, at.value + start, size, flags=1)[0] == 200003, "unaligned"
    assert export_key(acl, at.value, 4 * HUGE, flags=1)[0] == 107000, "beyond the allocation"
    assert acl.aclrtIpcMemClose(key.encode()) == 0
    assert other_process(acl, "key", key).startswith("error")
    assert acl.aclrtFree(at) == 0


def test_an_export_may_list_who_imports(acl):
    at = malloc(acl, HUGE)
    ctypes.memmove(at.value, b"owner", 5)
    _, key = export_key(acl, at.value, HUGE, flags=0)
    assert other_process(acl, "key", key) == "error 507899"

    def allow(pid: int) -> None:
        assert acl.aclrtIpcMemSetImportPid(key.encode(), ctypes.byref(ctypes.c_int32(pid)), ctypes.c_size_t(1)) == 0

    assert other_process(acl, "key", key, allow) == "owner"
    acl.aclrtIpcMemClose(key.encode())
    acl.aclrtFree(at)


def test_physical_memory_by_handle(acl):
    """Physical memory, mapped at a reserved address here and in another process; both come in multiples of 2 MiB."""
    unit, handle, at, name = ctypes.c_size_t(), ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_uint64()
    none = ctypes.c_uint64(0)
    acl.aclrtMemGetAllocationGranularity(None, 0, ctypes.byref(unit))
    assert unit.value == HUGE
    assert acl.aclrtMallocPhysical(ctypes.byref(handle), ctypes.c_size_t(HUGE - 4096), None, none) == 200003
    free, total = ctypes.c_size_t(), ctypes.c_size_t()

    def used() -> int:
        acl.aclrtGetMemInfo(1, ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value

    before = used()
    assert acl.aclrtMallocPhysical(ctypes.byref(handle), ctypes.c_size_t(HUGE), None, none) == 0
    assert used() == before + HUGE
    assert acl.aclrtReserveMemAddress(ctypes.byref(at), ctypes.c_size_t(HUGE), ctypes.c_size_t(0), None, none) == 0
    assert acl.aclrtMapMem(at, ctypes.c_size_t(HUGE), ctypes.c_size_t(0), handle, none) == 0
    ctypes.memmove(at, b"owner", 5)
    assert acl.aclrtMemExportToShareableHandle(handle, 0, ctypes.c_uint64(1), ctypes.byref(name)) == 0
    assert other_process(acl, "handle", str(name.value)) == "owner"
    assert ctypes.string_at(at, 10) == b"ownerother"
    assert acl.aclrtUnmapMem(at) == 0
    assert acl.aclrtMapMem(at, ctypes.c_size_t(HUGE), ctypes.c_size_t(0), handle, none) == 0
    assert ctypes.string_at(at, 10) == b"ownerother", "what is unmapped and mapped again is still there"
    assert acl.aclrtUnmapMem(at) == 0 and acl.aclrtReleaseMemAddress(at) == 0 and acl.aclrtFreePhysical(handle) == 0
    assert used() == before


# ---- what the references refuse, as the documentation does ----------------------------------------------------------------

KEY, CACHE = torch.ones(2, 1, 16), torch.zeros(2, 128, 1, 16)
MASK = torch.ones(2048, 2048, dtype=torch.int8).triu(1)
PAGED = {
    "atten_mask": MASK,
    "actual_seq_lengths": [2, 3],
    "actual_seq_lengths_kv": [5, 130],
    "block_table": torch.tensor([[0, -1], [2, 1]], dtype=torch.int32),
    "num_heads": 2,
    "num_key_value_heads": 1,
    "input_layout": "TND",
    "sparse_mode": 3,
    "block_size": 128,
}


def scatter(slots: torch.Tensor, key: torch.Tensor = KEY, **more: object) -> None:
    reference.npu_scatter_pa_kv_cache(key, KEY, CACHE.clone(), CACHE.clone(), slots, **{"cache_mode": "Norm", **more})


def attend(query: torch.Tensor | None = None, **more: object) -> torch.Tensor:
    cache = torch.randn(3, 128, 16)
    arguments = {**PAGED, **more}
    query = torch.randn(3, 2, 16) if query is None else query
    return reference.npu_fused_infer_attention_score(query, cache, cache, **arguments)[0]


REFUSED = {
    "slots not unique": lambda: scatter(torch.tensor([4, 4])),
    "a padding slot": lambda: scatter(torch.tensor([4, -1])),
    "a slot outside": lambda: scatter(torch.tensor([4, 256])),
    "strided keys": lambda: scatter(torch.tensor([4, 5]), torch.ones(2, 1, 32)[..., ::2]),
    "keys of another dtype": lambda: scatter(torch.tensor([4, 5]), KEY.bfloat16()),
    "blocks of 64 and chunks": lambda: attend(block_size=64),
    "a mask of another size": lambda: attend(atten_mask=MASK[:1024, :1024].contiguous()),
    "a mask the other way": lambda: attend(atten_mask=MASK.t().contiguous()),
    "no mask": lambda: attend(atten_mask=None),
    "lengths that don't end with the queries": lambda: attend(actual_seq_lengths=[2, 4]),
    "lengths that are not cumulative": lambda: attend(actual_seq_lengths=[2, 1]),
    "fewer keys than queries": lambda: attend(actual_seq_lengths_kv=[1, 130]),
    "a table too narrow": lambda: attend(actual_seq_lengths_kv=[5, 257]),
    "a block that is not there": lambda: attend(actual_seq_lengths_kv=[129, 130]),
    "a table of int64": lambda: attend(block_table=PAGED["block_table"].long()),
    "strided queries": lambda: attend(torch.randn(3, 2, 32)[..., ::2]),
    "three-dimensional rope": lambda: reference.npu_rotary_mul(torch.ones(2, 2, 4), torch.ones(2, 1, 4), torch.ones(2, 1, 4)),
    "int8 rows": lambda: reference.npu_rms_norm(torch.ones(2, 4, dtype=torch.int8), torch.ones(4)),
    "float32 to quantise": lambda: reference.npu_dynamic_quant(torch.ones(2, 4)),
    "k of 0": lambda: reference.npu_top_k_top_p(torch.ones(1, 4), k=torch.tensor([0], dtype=torch.int32)),
    "neither p nor k": lambda: reference.npu_top_k_top_p(torch.ones(1, 4)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_references_refuse(what):
    with pytest.raises(ValueError, match="npu_"):
        REFUSED[what]()


def test_references_take_what_is_right():
    """The calls that the table above spoils, unspoiled."""
    scatter(torch.tensor([4, 5]))
    assert attend().shape == (3, 2, 16)
    assert attend(actual_seq_lengths=[1, 2], actual_seq_lengths_kv=[5, 10], query=torch.randn(2, 2, 16)).isfinite().all()
