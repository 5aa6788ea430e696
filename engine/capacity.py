"""How much fits: resolves a Config's automatic sizes against the model and the machine. Pure but for `machine()`; no torch.

Capacity comes from arithmetic, not from a warm-up run (the paper's TE-Post-Load), so a start costs nothing and an impossible
setting is refused before a process is made, with the value that would do.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec

from engine.config import Config
from engine.devices import default_block_size
from engine.models import Model
from engine.native import cpu
from engine.types import OutOfMemory, UserError

log = logging.getLogger(__name__)

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
# Without a setting a TE's KV cache may grow to this share of the memory that is free after the weights: the box has other users.
FREE_SHARE = 0.5
# ... and to no more than this, as vLLM's CPU backend has it; memory is committed as blocks are first written.
AUTO_KV_BYTES = 4 << 30
# Tokens of a step: matrix products are as efficient with 256 rows as with more, and a step of so many takes some 90 ms for the
# default model on two cores, which is what a decode waits for when prompts come in.
AUTO_BATCHED_TOKENS = 256
# Kept for the interpreter, libraries and activations of one TE. Measured: torch and a 135M model's buffers take about 0.4 GB;
# a TE on the compiled kernels has no torch and takes a tenth.
PROCESS_BYTES = 512 << 20


class Machine(msgspec.Struct, frozen=True):
    """What this process may use: bytes free, cores by affinity and cgroup."""

    free_bytes: int
    cores: int
    compiled: bool = False  # the compiled CPU kernels are there, for this processor


def machine() -> Machine:
    """Read from the kernel: MemAvailable, the cgroup's memory and CPU limits, this process's affinity."""
    free = 1 << 62
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = read_number("/sys/fs/cgroup/memory.max"), read_number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        free = min(free, limit - used)
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = max(1, min(cores, int(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return Machine(free, cores, has_compiled_kernels())


def has_compiled_kernels() -> bool:
    """Whether the compiled CPU kernels can be used, building them where they are missing. Without them the reference operators
    serve, and that is logged; DEEPSERVE_CPU_ISA=reference asks for that. Raises `UserError` for an instruction set that
    isn't there."""
    if os.environ.get(cpu.VARIABLE) == "reference":
        return False
    try:
        cpu.load()
    except UserError as e:
        log.warning("event=no_compiled_kernels why=%s", e)
        return False
    cpu.choose()
    return True


def read_number(path: str) -> int | None:
    """A cgroup file's number, or None where there is no file or no limit."""
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def gib(n: float) -> str:
    return f"{n / (1 << 30):.2f} GiB"


def kv_bytes_per_token(model: Model, dtype: str) -> int:
    """K and V of one token in every layer."""
    return 2 * model.layers * model.kv_heads * model.head_dim * ITEM_BYTES[dtype]


def resolve(config: Config, model: Model, weight_bytes: int, box: Machine) -> tuple[Config, dict[str, str]]:
    """A Config without automatic values, and for each field resolved here why it has its value.

    Raises `OutOfMemory` or `UserError` naming the flag and a value that works."""
    why: dict[str, str] = {}
    if config.tensor_parallel_size != 1:
        raise UserError(
            "--tensor-parallel-size: only 1 is supported so far; use --te N for more executors", "tensor_parallel_size"
        )
    tokens = config.max_num_batched_tokens or max(AUTO_BATCHED_TOKENS, config.max_num_seqs)
    if config.max_num_batched_tokens is None:
        why["max_num_batched_tokens"] = "a short step on cpu" if tokens == AUTO_BATCHED_TOKENS else "one token for each sequence"
    if tokens < config.max_num_seqs:
        raise UserError(
            f"--max-num-batched-tokens {tokens} is less than --max-num-seqs {config.max_num_seqs}: every"
            f" running sequence needs one token a step; use --max-num-batched-tokens {config.max_num_seqs} or more",
            "max_num_batched_tokens",
        )
    device = "cpu" if config.device == "auto" else config.device
    if config.device == "auto":
        why["device"] = "no accelerator backend in this build"
    dtype = config.dtype
    if dtype == "auto":
        dtype = auto_dtype(box)
        why["dtype"] = "the compiled kernels' precision on cpu" if box.compiled else "the reference operators' precision on cpu"
    if config.quantization == "int8" and not (box.compiled and dtype == "bfloat16"):
        lacks = f"--dtype {dtype}" if box.compiled else "this machine's reference operators"
        raise UserError(
            f"--quantization int8 needs the compiled cpu kernels with --dtype bfloat16; {lacks} can't: leave it out",
            "quantization",
        )
    if config.pin_threads and not (box.compiled and dtype == "bfloat16"):
        raise UserError("--pin-threads: only the compiled cpu kernels' threads can be pinned; leave it out", "pin_threads")
    block_size = config.block_size or default_block_size(device)
    if box.compiled and dtype == "bfloat16" and block_size % 16:
        raise UserError(
            f"--block-size {block_size}: the compiled cpu kernels read keys in groups of 16; use a multiple of 16", "block_size"
        )
    if config.block_size is None:
        why["block_size"] = f"what {device} likes"

    block_bytes = kv_bytes_per_token(model, dtype) * block_size
    free = box.free_bytes - weight_bytes - PROCESS_BYTES * config.te
    if free <= 0:
        raise OutOfMemory(
            f"--model: its weights take {gib(weight_bytes)} as {dtype} and a process {gib(PROCESS_BYTES)};"
            f" {gib(box.free_bytes)} is free."
            + (" Use --dtype bfloat16 or a smaller model." if dtype == "float32" else " Use a smaller model."),
            "dtype" if dtype == "float32" else "model",
        )
    room = free // config.te
    if config.kv_cache_memory_bytes is not None and config.kv_cache_memory_bytes > room:
        raise OutOfMemory(
            f"--kv-cache-memory-bytes {config.kv_cache_memory_bytes}: {config.te} x {gib(config.kv_cache_memory_bytes)} do not"
            f" fit the {gib(free)} that are free beside the weights;"
            f" --kv-cache-memory-bytes {room // block_bytes * block_bytes} would fit",
            "kv_cache_memory_bytes",
        )
    budget = config.kv_cache_memory_bytes or min(int(room * FREE_SHARE), AUTO_KV_BYTES)
    asked = config.max_model_len
    if asked is not None and asked > model.max_len:
        raise UserError(
            f"--max-model-len {asked} is more than the {model.max_len} positions the model was made for;"
            f" use {model.max_len} or less",
            "max_model_len",
        )
    if config.kv_cache_memory_bytes is None and asked is not None:
        # An explicit context is worth more memory than the cautious default share.
        budget = max(budget, min(room, blocks_for(asked, block_size) * block_bytes))
    fits = budget // block_bytes * block_size
    if fits < block_size:
        raise OutOfMemory(
            f"--kv-cache-memory-bytes: {gib(budget)} hold no single KV block of {block_bytes} bytes; use {block_bytes} or more",
            "kv_cache_memory_bytes",
        )
    length = asked or model.max_len
    if length > fits and asked is not None:
        raise OutOfMemory(
            f"--max-model-len {asked} needs {gib(blocks_for(asked, block_size) * block_bytes)} of KV cache a TE and"
            f" {gib(budget)} is there;"
            f" --max-model-len {fits} would fit",
            "max_model_len",
        )
    if asked is None:
        length = min(length, fits)
        why["max_model_len"] = "the model's own limit" if length == model.max_len else "what the KV cache holds"
    # More than every sequence at full length is never used.
    blocks = min(budget // block_bytes, config.max_num_seqs * blocks_for(length, block_size))
    if config.kv_cache_memory_bytes is None:
        why["kv_cache_memory_bytes"] = f"{blocks} blocks: of {gib(box.free_bytes)} free memory, for {config.te} TE"
    resolved = msgspec.structs.replace(
        config,
        device=device,
        dtype=dtype,
        block_size=block_size,
        max_num_batched_tokens=tokens,
        max_model_len=length,
        kv_cache_memory_bytes=blocks * block_bytes,
    )
    return resolved, why


def auto_dtype(box: Machine) -> str:
    """What --dtype auto means on this machine."""
    return "bfloat16" if box.compiled else "float32"


def blocks_for(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def cores_for(te: int, threads: int, usable: set[int]) -> list[int]:
    """The cores that the threads of the TE numbered `te` are pinned to: TEs take turns around the usable ones."""
    cores = sorted(usable)
    return [cores[(te * threads + i) % len(cores)] for i in range(threads)]


def threads_for(config: Config, box: Machine) -> int:
    """Compute threads of one TE: the cores this process may use, divided among the TEs."""
    return max(1, box.cores // config.te)
