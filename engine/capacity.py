"""How much fits: resolves a Config's automatic sizes against the model and the machine. Pure but for `machine()`; no torch.

Capacity comes from arithmetic, not from a warm-up run (the paper's TE-Post-Load), so a start costs nothing and an impossible
setting is refused before a process is made, with the value that would do.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import msgspec

from engine import devices
from engine.config import Config, most_pools, most_processes, ranks, seats
from engine.models import PANEL_ROWS, Model
from engine.native import cpu
from engine.types import OutOfMemory, Packing, UserError

log = logging.getLogger(__name__)

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Without a setting a TE's KV cache may grow to this share of the memory that is free after the weights: the box has other users.
FREE_SHARE = 0.5
# ... and to no more than this, as vLLM's CPU backend has it; memory is committed as blocks are first written.
AUTO_KV_BYTES = 4 << 30
# KV memory that RTC puts to use before it recycles idle blocks: a share of all, by default 22 000 tokens of the default model,
# and at least so many bytes. It grows with what is asked for again.
REACH_SHARE = 1 / 8
REACH_BYTES = 256 << 20
# An accelerator's memory has no other users: a TE's KV cache takes this share of what is free once the weights are there. The
# rest is for activations, logits, the sampler's rows and captured graphs.
OWN_SHARE = 0.85
# Kept for the interpreter, libraries and activations of one TE. Measured: torch and a 135M model's buffers take about 0.4 GB;
# a TE on the compiled kernels has no torch and takes a tenth.
PROCESS_BYTES = 512 << 20
COMPILED_PROCESS_BYTES = 48 << 20


class Machine(msgspec.Struct, frozen=True):
    """What this process may use: bytes free, cores by affinity and cgroup."""

    free_bytes: int
    cores: int
    compiled: bool = False  # the compiled CPU kernels are there, for this processor
    models: int = 1  # that share it


def machine(kernels: bool = True) -> Machine:
    """Read from the kernel: MemAvailable, the cgroup's memory and CPU limits, this process's affinity. `kernels`: look for the
    compiled CPU kernels too, and build them where they are missing."""
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
    return Machine(free, cores, kernels and has_compiled_kernels())


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


def kv_bytes_per_token(model: Model, dtype: str, kv_dtype: str = "auto") -> int:
    """K and V of one token in every layer, for --dtype and --kv-cache-dtype; integers have a scale of two bytes a head."""
    head = model.head_dim + 2 if kv_dtype == "int8" else model.head_dim * ITEM_BYTES[dtype]
    return 2 * model.layers * model.kv_heads * head


def packing(config: Config, box: Machine) -> Packing:
    """How the weights are packed for the device and dtype that `config` means here. Raises `UserError`."""
    device, _ = devices.choose(config.device)
    dtype = devices.auto_dtype(device, box.compiled)[0] if config.dtype == "auto" else config.dtype
    return Packing(dtype, devices.weight_format(device, dtype, box.compiled), config.quantization)


def resolve(config: Config, model: Model, weight_bytes: int, box: Machine) -> tuple[Config, dict[str, str]]:
    """A Config without automatic values, and for each field resolved here why it has its value. Where the device has memory of
    its own, only the TE that opens it can say how large the KV cache is (`own_kv_bytes`): that one stays open.

    Raises `OutOfMemory` or `UserError` naming the flag and a value that works."""
    why: dict[str, str] = {}
    device, reason = devices.choose(config.device)
    if reason:
        why["device"] = reason
    kind = devices.kind(device)
    tokens = config.max_num_batched_tokens or max(kind.step_tokens, config.max_num_seqs)
    if config.max_num_batched_tokens is None:
        enough = tokens == kind.step_tokens
        why["max_num_batched_tokens"] = kind.why_step_tokens if enough else "one token for each sequence"
    if tokens < config.max_num_seqs:
        raise UserError(
            f"--max-num-batched-tokens {tokens} is less than --max-num-seqs {config.max_num_seqs}: every"
            f" running sequence needs one token a step; use --max-num-batched-tokens {config.max_num_seqs} or more",
            "max_num_batched_tokens",
        )
    dtype = config.dtype
    if dtype == "auto":
        dtype, why["dtype"] = devices.auto_dtype(device, box.compiled)
    if dtype not in kind.dtypes:
        raise UserError(f"--dtype {dtype}: --device {device} has {', '.join(kind.dtypes)}", "dtype")
    if config.quantization == "int8" and (needs := devices.int8_needs(device, dtype, box.compiled)):
        raise UserError(f"--quantization int8 needs {needs}", "quantization")
    panels = devices.weight_format(device, dtype, box.compiled) == "panels"
    check_ranks(config, model, device, dtype, panels, box.compiled)
    if needs := devices.kv_dtype_needs(device, dtype, config.kv_cache_dtype, box.compiled):
        raise UserError(f"--kv-cache-dtype {config.kv_cache_dtype} needs {needs}", "kv_cache_dtype")
    if config.pin_threads and not panels:
        raise UserError("--pin-threads: only the compiled cpu kernels' threads can be pinned; leave it out", "pin_threads")
    block_size = config.block_size or kind.block_size
    if panels and block_size % 16:
        raise UserError(
            f"--block-size {block_size}: the compiled cpu kernels read keys in groups of 16; use a multiple of 16", "block_size"
        )
    if block_size % kind.block_multiple or block_size > kind.largest_block:
        raise UserError(
            f"--block-size {block_size}: --device {device} reads blocks of {kind.block_multiple} to {kind.largest_block} tokens,"
            f" in multiples of {kind.block_multiple}; leave it out for {kind.block_size}",
            "block_size",
        )
    if config.block_size is None:
        why["block_size"] = f"what {device} likes"

    check_pd(config, device)
    check_scaling(config)
    block_bytes = kv_bytes_per_token(model, dtype, config.kv_cache_dtype) * block_size
    free = box.free_bytes - weight_bytes - process_bytes(panels) * most_processes(config)
    if free <= 0:
        raise OutOfMemory(
            f"--model: its weights take {gib(weight_bytes)} as {dtype} and a process {gib(process_bytes(panels))};"
            f" {gib(box.free_bytes)} is free."
            + (" Use --dtype bfloat16 or a smaller model." if dtype == "float32" else " Use a smaller model."),
            "dtype" if dtype == "float32" else "model",
        )
    check_tiers(config, device, dtype, box, block_bytes, free)
    resolved = msgspec.structs.replace(config, device=device, dtype=dtype, block_size=block_size, max_num_batched_tokens=tokens)
    if kind.own_memory:
        check_length(config.max_model_len, model)
        if config.max_model_len is None:
            why["max_model_len"] = "the model's own limit"
        if config.kv_cache_memory_bytes is None:
            why["kv_cache_memory_bytes"] = f"{OWN_SHARE:.0%} of what the {device} has free beside the weights"
        return msgspec.structs.replace(resolved, max_model_len=config.max_model_len or model.max_len), why
    pools = most_pools(config)
    room = (free - config.kv_dram_bytes) // pools
    if config.kv_cache_memory_bytes is not None and config.kv_cache_memory_bytes > room:
        raise OutOfMemory(
            f"--kv-cache-memory-bytes {config.kv_cache_memory_bytes}: {pools} x {gib(config.kv_cache_memory_bytes)} do not"
            f" fit the {gib(free)} that are free beside the weights;"
            f" --kv-cache-memory-bytes {room // block_bytes * block_bytes} would fit",
            "kv_cache_memory_bytes",
        )
    budget = config.kv_cache_memory_bytes or min(int(room * FREE_SHARE / box.models), AUTO_KV_BYTES)
    asked = config.max_model_len
    check_length(asked, model)
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
        why["kv_cache_memory_bytes"] = f"{blocks} blocks: of {gib(box.free_bytes)} free memory, for {pools} TE"
    return msgspec.structs.replace(resolved, max_model_len=length, kv_cache_memory_bytes=blocks * block_bytes), why


def check_ranks(config: Config, model: Model, device: str, dtype: str, panels: bool, compiled: bool) -> None:
    """Raises `UserError` where so many ranks can't share the model, naming a number that can."""
    if config.prefill_tensor_parallel_size is not None and not any(seat.role == "prefill" for seat in seats(config)):
        raise UserError(
            f"--prefill-tensor-parallel-size {config.prefill_tensor_parallel_size}: no TE is a prefill TE; use it with --pd 1p1d",
            "prefill_tensor_parallel_size",
        )
    for field in ("tensor_parallel_size", "prefill_tensor_parallel_size"):
        asked = getattr(config, field)
        flag = f"--{field.replace('_', '-')} {asked}"
        if asked in (None, 1):
            continue
        if needs := devices.ranks_need(device, dtype, compiled):
            raise UserError(f"{flag} needs {needs}", field)
        if why := unshared(asked, model, panels):
            fits = [n for n in range(1, model.heads + 1) if not unshared(n, model, panels)]
            raise UserError(f"{flag}: {why}; use {' or '.join(map(str, fits))}", field)


def unshared(count: int, model: Model, panels: bool) -> str:
    """What of the model so many ranks can't share; "" for nothing. Heads go to ranks whole, and in panels the rows of a matrix by
    the 16."""
    if count == 1:
        return ""
    heads = [f"{has} {name}" for name, has in (("query heads", model.heads), ("KV heads", model.kv_heads)) if has % count]
    if heads:
        return f"the model has {' and '.join(heads)}, which {count} ranks can't share equally"
    unit = PANEL_ROWS if panels else 1
    own = model.kv_heads // count * model.head_dim
    if own % unit:
        return f"a rank's {own} rows of keys are no multiple of the {unit} that the compiled cpu kernels read together"
    sizes = (("hidden", model.hidden), ("intermediate", model.intermediate), ("vocabulary", model.vocab))
    small = [f"{name} size of {size}" for name, size in sizes if size < count * PANEL_ROWS]
    if small:
        return f"the model's {small[0]} is too small for {count} ranks"
    if model.intermediate % unit:
        return f"the intermediate size of {model.intermediate} is no multiple of {unit}"
    return ""


def check_pd(config: Config, device: str) -> None:
    """Raises `UserError` where prefill and decode can't be on TEs of their own, or shares not be steered."""
    for field, other in (("slo_ttft_ms", "slo_tpot_ms"), ("slo_tpot_ms", "slo_ttft_ms")):
        scaled = config.max_te is not None
        if getattr(config, field) is not None and not scaled and (getattr(config, other) is None or "semi" not in config.pd):
            flag, needed = (f"--{name.replace('_', '-')}" for name in (field, other))
            raise UserError(
                f"{flag} steers the shares of a semi pair, or how many TEs there are: use it with {needed} and --pd semi, or with"
                " --max-te",
                field,
            )
    if not config.pd:
        return
    if devices.kind(device).own_memory and "semi" in config.pd:
        raise UserError(
            f"--pd {config.pd}: the workers of a semi pair share a KV cache on --device cpu so far; use --pd 1p1d on {device}",
            "pd",
        )
    if devices.kind(device).own_memory and max(ranks(config)) > 1:
        raise UserError(
            f"--pd {config.pd}: KV blocks move between TEs of one {device} each so far; leave out --tensor-parallel-size", "pd"
        )


def check_scaling(config: Config) -> None:
    """Raises `UserError` where the numbers of TEs contradict each other."""
    most = max(config.max_te or 0, config.te)
    if config.max_te is not None and config.max_te < config.te:
        raise UserError(f"--max-te {config.max_te} is less than the --te {config.te} that it starts with", "max_te")
    if config.min_te is not None and config.min_te > most:
        raise UserError(f"--min-te {config.min_te} is more than the {most} TEs there may be; raise --max-te too", "min_te")
    if config.min_te == 0 and config.keep_alive is None:
        raise UserError("--min-te 0: say with --keep-alive after how many seconds without a request there may be none", "min_te")
    if "semi" in config.pd and (config.max_te or config.min_te):
        raise UserError(f"--pd {config.pd}: a semi pair isn't scaled; leave out --min-te and --max-te", "pd")


def process_bytes(panels: bool) -> int:
    """What a process takes beside weights and KV cache; `panels`: on the compiled kernels."""
    return COMPILED_PROCESS_BYTES if panels else PROCESS_BYTES


def check_tiers(config: Config, device: str, dtype: str, box: Machine, block_bytes: int, free: int) -> None:
    """Raises `UserError` where the DRAM or SSD tier that is asked for can't be had."""
    flags = {"kv_dram_bytes": bool(config.kv_dram_bytes), "kv_ssd_dir": bool(config.kv_ssd_dir)}
    for field in (field for field, asked in flags.items() if asked):
        flag = f"--{field.replace('_', '-')} {getattr(config, field)}"
        if needs := devices.tiers_need(device, dtype, box.compiled):
            raise UserError(f"{flag} needs {needs}", field)
        if not config.enable_prefix_caching:
            raise UserError(f"{flag}: keeps what prefix caching finds; leave out --no-enable-prefix-caching", field)
    if 0 < config.kv_dram_bytes < block_bytes:
        raise UserError(
            f"--kv-dram-bytes {config.kv_dram_bytes}: a KV block has {block_bytes} bytes; use that or more", "kv_dram_bytes"
        )
    if config.kv_dram_bytes > free - block_bytes:
        fits = max(0, int(free * FREE_SHARE)) // block_bytes * block_bytes
        raise OutOfMemory(
            f"--kv-dram-bytes {config.kv_dram_bytes}: {gib(free)} are free beside the weights; --kv-dram-bytes {fits} would fit",
            "kv_dram_bytes",
        )


def check_length(asked: int | None, model: Model) -> None:
    if asked is not None and asked > model.max_len:
        raise UserError(
            f"--max-model-len {asked} is more than the {model.max_len} positions the model was made for;"
            f" use {model.max_len} or less",
            "max_model_len",
        )


def own_kv_bytes(config: Config, model: Model, free: int) -> int:
    """Bytes of KV cache in a device's own memory, of which `free` are left beside the weights; `config` is resolved.

    Raises `OutOfMemory` where no text of --max-model-len would fit."""
    assert config.block_size and config.max_model_len
    block_bytes = kv_bytes_per_token(model, config.dtype, config.kv_cache_dtype) * config.block_size
    needed = blocks_for(config.max_model_len, config.block_size)
    asked = config.kv_cache_memory_bytes
    blocks = (asked if asked is not None else int(free * OWN_SHARE)) // block_bytes
    if blocks < needed:
        less = f"--max-model-len {blocks * config.block_size} would fit" if blocks else "not one block fits: use a smaller model"
        more = f"; or --kv-cache-memory-bytes {needed * block_bytes}" if asked is not None else ""
        raise OutOfMemory(
            f"--max-model-len {config.max_model_len} needs {gib(needed * block_bytes)} of KV cache a TE and"
            f" {gib(blocks * block_bytes)} is there ({gib(free)} free on the {config.device} beside the weights); {less}{more}",
            "max_model_len",
        )
    # More than every sequence at full length is never used.
    return min(blocks, config.max_num_seqs * needed) * block_bytes


def blocks_for(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def reach_of(blocks: int, block_bytes: int) -> int:
    """How many of a TE's KV blocks are used before idle ones are recycled, where unused ones cost no memory yet."""
    return max(int(blocks * REACH_SHARE), REACH_BYTES // block_bytes)


def cores_for(te: int, threads: int, usable: set[int]) -> list[int]:
    """The cores that the threads of the TE numbered `te` are pinned to: TEs take turns around the usable ones."""
    cores = sorted(usable)
    return [cores[(te * threads + i) % len(cores)] for i in range(threads)]


def threads_for(cores: int, processes: int) -> int:
    """Compute threads of one process: the cores this process may use, divided among all that compute."""
    return max(1, cores // max(1, processes))
