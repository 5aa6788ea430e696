"""What `deepserve.py profile` found out about a model on a machine, as a file, and how `serve` finds it by itself.

A profile is of a model (by its files, not by its path), of the machine (processor or accelerator, cores, instruction set) and of
the settings that change what a step costs. Only where all of them are the same is it this server's own; another one of the same
machine is better than none, and says so (`Found.foreign`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import msgspec

from engine import capacity, devices
from engine.config import Config
from engine.devices import ascend
from engine.native import cpu
from scale import pull
from sched.costs import Costs
from sched.files import write
from sched.heatmap import HeatMap, MapData

log = logging.getLogger(__name__)

VERSION = 1  # of the file
HEAD_BYTES = 1 << 16  # of a weights file that its fingerprint goes by: names, shapes and the first weights
# Settings that change what a step costs, or how keys and values get from TE to TE.
SETTINGS = (
    "dtype",
    "quantization",
    "kv_cache_dtype",
    "block_size",
    "max_num_batched_tokens",
    "tensor_parallel_size",
    "prefill_tensor_parallel_size",
    "kv_transfer",
    "async_scheduling",
    "pin_threads",
)


class Key(msgspec.Struct, frozen=True):
    """What a profile is of."""

    model: str  # fingerprint
    hardware: str
    settings: str

    @property
    def name(self) -> str:
        """Of the file."""
        return "-".join(blake2b(part.encode(), digest_size=6).hexdigest() for part in (self.hardware, self.settings, self.model))


class TeCosts(msgspec.Struct):
    """The costs of a TE that has so many cores (0: a device of its own)."""

    cores: int
    costs: Costs


class Profile(msgspec.Struct):
    key: Key
    model: str  # its name, for people
    costs: list[TeCosts]
    heat: MapData
    made: float = 0.0  # unix seconds, of the last run
    seconds: float = 0.0  # that all runs took
    cells: int = 0  # measured, those that were measured again included
    version: int = VERSION

    def costs_for(self, cores: int) -> Costs:
        """Of a TE with so many cores, or as near as was measured."""
        return min(self.costs, key=lambda one: abs(one.cores - cores)).costs


class Found(msgspec.Struct):
    profile: Profile
    path: Path
    foreign: bool = False  # of another model, or with other settings: only its heat map is of use, and isn't to be stored

    def heat(self, costs: Costs, cores: int) -> HeatMap:
        """The map for a model of such `costs` on TEs with so many cores."""
        if not self.foreign:
            return HeatMap(self.profile.heat)
        return HeatMap(self.profile.heat).scaled(steps_a_token(costs), steps_a_token(self.profile.costs_for(cores)))


def steps_a_token(costs: Costs) -> float:
    """For how many decode steps a token of a prompt lasts."""
    return costs.prefill(512.0) / 512 / costs.step(0.0, 0.0, 1.0, 512.0)


def folder() -> Path:
    return pull.home() / "profiles"


def path_of(key: Key) -> Path:
    return folder() / f"{key.name}.json"


def fingerprint(path: Path) -> str:
    """Of a model's files: the same wherever they lie. Reads their beginnings only."""
    files = [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*.gguf"), path / "config.json"])
    digest = blake2b(digest_size=16)
    for file in files:
        with open(file, "rb") as data:
            head = data.read(HEAD_BYTES)
        digest.update(b"%d %d " % (file.stat().st_size, len(head)) + head)
    return digest.hexdigest()


def hardware(device: str, cores: int) -> str:
    """The machine in words, the same after a restart: what a step runs on, and how many cores there are."""
    if devices.kind(device).own_memory:
        return f"{device} {ascend.driver() or 'unknown driver'}, {cores} cores"
    kernels = "reference" if os.environ.get(cpu.VARIABLE) == "reference" else cpu.choose()
    return f"{device} {processor()} {kernels}, {cores} cores"


def processor() -> str:
    """As the kernel names it."""
    names = ("model name", "CPU part", "Hardware")
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in names:
            return value.strip()
    return os.uname().machine


def key_of(path: Path, config: Config, box: capacity.Machine) -> Key:
    """Of a model's files with a resolved config on this machine."""
    settings = {name: getattr(config, name) for name in SETTINGS}
    return Key(fingerprint(path), hardware(config.device, box.cores), msgspec.json.encode(settings, order="sorted").decode())


def save(profile: Profile, path: Path) -> None:
    """Store it. Raises `UserError`."""
    write(path, msgspec.json.format(msgspec.json.encode(profile), indent=1))


def read(path: Path) -> Profile | None:
    """None where there is none, or one of another version; what is no profile is logged and left alone."""
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
        HeatMap(profile.heat)
        if not profile.costs:
            raise ValueError("there are no costs in it")
    except FileNotFoundError:
        return None
    except (OSError, msgspec.MsgspecError, ValueError, IndexError) as e:
        log.warning("event=profile_unreadable path=%s why=%s", path, e)
        return None
    return profile if profile.version == VERSION else None


def load_profile(key: Key) -> Found | None:
    """What is known of this model on this machine; else, of it with other settings, else of another model: the newest."""
    own = path_of(key)
    if (profile := read(own)) is not None and profile.key == key:
        return Found(profile, own)
    others = same_machine(key)
    return max(others, key=lambda found: (found.profile.key.model == key.model, found.profile.made), default=None)


def same_machine(key: Key) -> Iterator[Found]:
    prefix = key.name.split("-", 1)[0]
    for path in sorted(folder().glob(f"{prefix}-*.json")):
        profile = read(path)
        if profile is not None and profile.key.hardware == key.hardware:
            yield Found(profile, path, foreign=True)
