"""The house: imports go one way, heavy libraries stay in their rooms, every route and flag is in the README."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# deepserve -> sched -> scale -> engine; bench measures from outside and may use any of them.
MAY_IMPORT = {
    "engine": {"engine"},
    "scale": {"scale", "engine"},
    "sched": {"sched", "scale", "engine"},
    "deepserve": {"deepserve", "sched", "scale", "engine", "bench"},
    "bench": {"bench", "deepserve", "sched", "scale", "engine"},
}
LEAVES = {"engine/types.py": set(), "engine/config.py": {"engine.types"}}
TORCH_ROOMS = {"engine/devices"}
HTTP_ROOMS = {"sched/gateway"}
DECISIONS = ("admission", "baselines", "costs", "fairness", "heatmap", "job", "policy", "predict", "prompt_tree", "text", "view")
PURE = (*(f"sched/{name}.py" for name in DECISIONS), "scale/autoscale.py", "scale/fork.py")


def sources() -> list[Path]:
    return [p for room in MAY_IMPORT for p in [*sorted((ROOT / room).rglob("*.py")), ROOT / f"{room}.py"] if p.exists()]


def imports(path: Path) -> set[str]:
    """Every module a file imports, also inside functions; `from a import b` counts as `a` and `a.b`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute from the top"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_imports_go_one_way(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    tops = {m.split(".")[0] for m in imports(path)} & MAY_IMPORT.keys()
    assert tops <= MAY_IMPORT[room], f"{name_of(path)} imports {tops - MAY_IMPORT[room]}"
    if name_of(path) in LEAVES:
        ours = {m for m in imports(path) if m in {f"engine.{p.stem}" for p in (ROOT / "engine").glob("*.py")}}
        assert ours <= LEAVES[name_of(path)]


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_heavy_libraries_stay_in_their_rooms(path):
    tops = {m.split(".")[0] for m in imports(path)}
    room = path.relative_to(ROOT).parent.as_posix()
    assert "torch" not in tops or room in TORCH_ROOMS
    assert "torch_npu" not in tops or name_of(path) == "engine/devices/npu.py"
    assert "aiohttp" not in tops or room in HTTP_ROOMS or room == "bench"
    if name_of(path) in PURE:
        assert not tops & {"asyncio", "socket", "os", "subprocess", "threading"}


def test_the_engine_without_torch():
    """Models, weights, batch and core can be imported, and a model built, where torch can't be imported."""
    code = """
import sys
sys.modules["torch"] = None
import engine.batch, engine.core, engine.executor, engine.models.llama, engine.weights, engine.worker
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_control_process_never_imports_torch():
    code = "import deepserve, sched.gateway.app, sys; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_standard_library_sched_still_works():
    """A host program may `import sched` for the standard module after importing deepserve."""
    code = "import deepserve, sched; s = sched.scheduler(); assert s.empty(); sched.service"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_nothing_is_compared_with_a_devices_name_outside_devices():
    """What differs between devices is behind the protocol, or a fact that engine/devices tells (`Kind`). bench measures from
    outside."""
    for path in sources():
        if name_of(path).startswith(("engine/devices/", "bench/")):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                named = [c.value for side in sides for c in ast.walk(side) if isinstance(c, ast.Constant)]
                assert not {"cpu", "npu", "cuda"} & set(named), f"{name_of(path)}:{node.lineno}"
            elif isinstance(node, ast.MatchValue) and isinstance(node.value, ast.Constant):
                assert node.value.value not in {"cpu", "npu", "cuda"}, f"{name_of(path)}:{node.lineno}"
        assert "device.name" not in path.read_text(), name_of(path)


def test_the_docs_name_every_route_flag_and_metric():
    from engine.config import Config
    from sched.gateway.app import ROUTES
    from sched.metrics import Families
    from tests.fake import FakeCluster, FakeDeployment

    readme, operations = (ROOT / "README.md").read_text(), (ROOT / "docs" / "operations.md").read_text()
    for route in ROUTES:
        assert route.path.replace(":.+", "") in readme, route.path
    for name in Config.__struct_fields__:
        assert f"`--{name.replace('_', '-')}`" in operations, name
    families = Families()
    families.watch(FakeCluster(), [FakeDeployment()])
    for family in families.registry.collect():
        assert f"`{family.name}" in operations, family.name
