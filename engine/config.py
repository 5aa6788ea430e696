"""The Config struct: every setting, its meaning, its bounds and its default. A leaf.

Order: defaults < TOML file < flags. "auto" (None here) is resolved into a new Config by whoever knows the model and the
machine; nothing mutates a Config. Field names are the flags' names with underscores; where vLLM has the flag, name and
meaning are vLLM's.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from engine.types import Quantization, UserError

DeviceName = Literal["auto", "cpu", "npu", "cuda"]
DType = Literal["auto", "float32", "bfloat16", "float16"]
KVCacheDType = Literal["auto", "bfloat16", "int8"]
FastPath = Literal["keeper", "warm", "fork", "dram", "lazy-kv"]


class Speculation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`speculative_config`, with vLLM's names. Prompt lookup: where the last `prompt_lookup_max` ids (or fewer, down to
    `prompt_lookup_min`) stand earlier in prompt or output, what followed them there is drafted.

    Raises `ValueError` from the constructor where the two contradict each other."""

    method: Literal["ngram"] = "ngram"
    num_speculative_tokens: Annotated[int, Meta(ge=1, le=32)] = 8  # the most; drafts grow to it while they hold
    prompt_lookup_min: Annotated[int, Meta(ge=1, le=32)] = 2
    prompt_lookup_max: Annotated[int, Meta(ge=1, le=32)] = 6

    def __post_init__(self) -> None:
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min = {self.prompt_lookup_min} is more than prompt_lookup_max = {self.prompt_lookup_max}"
            )


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of one server or one embedded engine."""

    model: Annotated[
        str,
        Meta(description="a model's folder (config.json, safetensors, tokenizer.json), a GGUF file, or a name that `pull` knows"),
    ] = "smollm2-135m-instruct"
    served_model_name: Annotated[
        list[str],
        Meta(description="names the model answers to; the first is its id in replies (default: derived from the model)"),
    ] = []
    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="port to listen on; 0 takes a free one")] = 8000
    api_key: Annotated[list[str], Meta(description="keys accepted as `Authorization: Bearer KEY`; none: no check")] = []
    api_keys_file: Annotated[
        str,
        Meta(
            description="TOML file of more keys, a [keys.NAME] table each: key, weight, priority, rpm, tpm, slo-ttft-ms, slo-tpot-ms (docs/api.md)"
        ),
    ] = ""
    device: Annotated[
        DeviceName, Meta(description="where the model runs; auto is npu where driver, CANN and torch-npu are there, else cpu")
    ] = "auto"
    dtype: Annotated[
        DType,
        Meta(
            description="precision of weights, activations and KV cache; auto on cpu is bfloat16 on the compiled kernels, float32 without them, and bfloat16 on npu and cuda (which have float16 too)"
        ),
    ] = "auto"
    quantization: Annotated[
        Quantization,
        Meta(
            description="auto keeps what a GGUF file stores quantised; none expands it to the dtype; int8 quantises 16- and 32-bit matrices at load (8-bit weights, activations quantised as they come; compiled cpu kernels, and npu)"
        ),
    ] = "auto"
    max_model_len: Annotated[int, Meta(ge=1)] | None = msgspec.field(default=None)
    max_num_seqs: Annotated[int, Meta(ge=1, le=4096, description="sequences a TE runs at once")] = 64
    max_num_batched_tokens: Annotated[int, Meta(ge=16, le=1 << 20)] | None = None
    max_num_queued_reqs: Annotated[
        int, Meta(ge=0, description="requests held beyond what the TEs run; one more gets 429 with Retry-After")
    ] = 512
    block_size: Annotated[int, Meta(ge=1, le=1024)] | None = None
    kv_cache_memory_bytes: Annotated[int, Meta(ge=1)] | None = None
    kv_cache_dtype: Annotated[
        KVCacheDType,
        Meta(
            description="precision of cached keys and values; auto is the dtype; int8 takes half of bfloat16's memory (a scale for each token and head; compiled cpu kernels)"
        ),
    ] = "auto"
    kv_dram_bytes: Annotated[
        int,
        Meta(
            ge=0,
            description="bytes of host memory for KV blocks that TEs swap out, one pool for all of them; takes K, M, G suffixes; 0: none",
        ),
    ] = 0
    kv_ssd_dir: Annotated[str, Meta(description="folder for KV blocks in files, found again after a restart (default: none)")] = (
        ""
    )
    kv_ssd_bytes: Annotated[
        int, Meta(ge=1, description="bytes of files in --kv-ssd-dir, the least recently used go first; takes K, M, G suffixes")
    ] = 8 << 30
    tensor_parallel_size: Annotated[
        int, Meta(ge=1, description="ranks, each a process with a device or cores of its own, that share one TE's model")
    ] = 1
    prefill_tensor_parallel_size: Annotated[int, Meta(ge=1)] | None = None
    pin_threads: Annotated[
        bool,
        Meta(
            description="keep each compute thread on a core of its own (compiled cpu kernels; for machines that do nothing else)"
        ),
    ] = False
    te: Annotated[int, Meta(ge=1, le=256, description="number of task executors that a model starts with")] = 1
    min_te: Annotated[int, Meta(ge=0, le=256)] | None = None
    max_te: Annotated[int, Meta(ge=1, le=256)] | None = None
    keep_alive: Annotated[float, Meta(ge=0)] | None = None
    te_share: Annotated[
        int,
        Meta(ge=10, le=100, description="percent of the compute that each TE may use (compiled cpu kernels: of its cores' time)"),
    ] = 100
    memory_budget: Annotated[int, Meta(ge=1)] | None = None
    weights_dram_bytes: Annotated[int, Meta(ge=0)] | None = None
    warm_te: Annotated[int, Meta(ge=0, le=256)] | None = None
    scale_without: Annotated[
        list[FastPath],
        Meta(
            description="fast paths of scaling to leave out, to see what each brings: keeper (a fresh interpreter for each TE), warm (no processes ready ahead), fork (no weights from running TEs), dram (no packed weights kept in memory), lazy-kv (the KV cache committed at the start)"
        ),
    ] = []
    pd: Annotated[
        str,
        Meta(
            description="prefill and decode apart, instead of --te: NpMd is N prefill TEs and M decode TEs, semi is two workers on one KV cache, Nc are N colocated TEs; joined by +, as in 1p1d+2c"
        ),
    ] = ""
    sched: Annotated[
        Literal["cost", "paper"],
        Meta(
            description="how the TE of a request is chosen: cost compares what each would cost everybody, in predicted seconds; paper is the order of the paper's Algorithm 1 (heat map, then balance, then prefix or load)"
        ),
    ] = "cost"
    kv_transfer: Annotated[
        Literal["layer", "request"],
        Meta(
            description="when a prefill TE's KV goes to the decode TE: as each layer of a step is done, or after the whole prompt"
        ),
    ] = "layer"
    slo_ttft_ms: Annotated[float, Meta(gt=0)] | None = None
    slo_tpot_ms: Annotated[float, Meta(gt=0)] | None = None
    seed: Annotated[int, Meta(ge=0, le=2**63 - 1)] | None = None
    async_scheduling: Annotated[
        bool, Meta(description="plan the next step while this one runs (--no-async-scheduling: the plain loop)")
    ] = True
    enable_prefix_caching: Annotated[bool, Meta(description="share KV blocks of equal prompt prefixes")] = True
    speculative_config: Speculation | None = None
    chat_template: Annotated[str, Meta(description="a Jinja file, or the template itself, instead of the model's own")] = ""
    shutdown_timeout: Annotated[float, Meta(ge=0, description="seconds that running requests get to finish after SIGTERM")] = 60.0
    stall_timeout: Annotated[
        float,
        Meta(
            gt=0,
            description="seconds without a finished step after which a busy TE counts as stuck: /health fails, then the TE is replaced",
        ),
    ] = 120.0


Role = Literal["colocated", "prefill", "decode", "semi"]


class Seat(msgspec.Struct, frozen=True):
    """What a TE is brought up as."""

    role: Role
    lender: int = -1  # the TE whose KV pool it computes in: it is the prefill worker of a `semi` pair


SEATS = re.compile(r"(?P<p>\d+)p(?P<d>\d+)d|(?P<semi>\d*)semi|(?P<c>\d+)c")
MOST_SEATS = 256


def parse_pd(text: str) -> list[Seat]:
    """The TEs that `--pd` asks for, in the order of their numbers. Raises `UserError`."""
    seats: list[Seat] = []
    for part in text.lower().split("+"):
        found = SEATS.fullmatch(part.strip())
        if found is None or len(part) > 16:
            raise UserError(f"--pd {text}: {part!r} is not understood; write for example 1p1d, 2p1d+1c or semi", "pd")
        prefill, decode, colocated = (int(found[key] or 0) for key in "pdc")
        pairs = 0 if found["semi"] is None else int(found["semi"] or 1)
        if sum((prefill, decode, colocated, 2 * pairs)) > MOST_SEATS:
            raise UserError(f"--pd {text}: more than {MOST_SEATS} TEs", "pd")
        if found["p"] is not None and not (prefill and decode):
            raise UserError(f"--pd {text}: a prefill TE needs a decode TE and the other way round; use 1p1d", "pd")
        seats += [Seat("prefill")] * prefill + [Seat("decode")] * decode + [Seat("colocated")] * colocated
        for _ in range(pairs):
            seats += [Seat("semi"), Seat("semi", len(seats))]
    if not 1 <= len(seats) <= MOST_SEATS:
        raise UserError(f"--pd {text}: {len(seats)} TEs; it must be 1 to {MOST_SEATS}", "pd")
    return seats


def seats(config: Config) -> list[Seat]:
    """What each TE of this server is, by number."""
    return parse_pd(config.pd) if config.pd else [Seat("colocated")] * config.te


def ranks_for(config: Config, seat: Seat) -> int:
    """How many ranks a TE that starts on this seat has: it keeps them when its role changes."""
    prefill = config.prefill_tensor_parallel_size or config.tensor_parallel_size
    return prefill if seat.role == "prefill" else config.tensor_parallel_size


def ranks(config: Config) -> list[int]:
    """How many ranks each TE has that a model starts with."""
    return [ranks_for(config, seat) for seat in seats(config)]


def most_processes(config: Config) -> int:
    """Processes that a model's TEs may be at once: with --max-te more than it starts with."""
    more = max((config.max_te or 0) - config.te, (config.min_te or 0) - config.te, 0)
    return sum(ranks(config)) + more * max(ranks(config))


def most_pools(config: Config) -> int:
    """KV pools that a model's TEs may have at once: the two workers of a semi pair have one."""
    more = max((config.max_te or 0) - config.te, (config.min_te or 0) - config.te, 0)
    return sum(seat.lender < 0 for seat in seats(config)) + more


def has_tiers(config: Config) -> bool:
    """Whether KV blocks are kept beside the device's too."""
    return bool(config.kv_dram_bytes or config.kv_ssd_dir)


# Fields whose default is resolved later carry no bounds in their Optional wrapper that argparse could show; their help:
AUTO_HELP = {
    "max_num_batched_tokens": "tokens a step computes at most (default: 256 on cpu, 2048 on npu and cuda, or --max-num-seqs where that is more)",
    "max_model_len": "longest prompt plus output, in tokens (default: the model's own limit, or what fits the memory)",
    "block_size": "tokens a KV block holds (default: the device's own, 16 on cpu and cuda, 128 on npu)",
    "kv_cache_memory_bytes": "bytes of KV cache a TE may use; takes K, M, G suffixes (default: a share of free memory)",
    "min_te": "TEs that a model keeps when there is little to do (default: --te, or 0 with --keep-alive)",
    "max_te": "TEs that a model may have: more are brought up while requests wait or promises are missed (default: --te)",
    "keep_alive": "seconds without a request after which a model has its --min-te TEs only; with 0 TEs it sleeps: its weights"
    " stay in memory as --weights-dram-bytes allows, and the next request wakes it (default: never, but when another model needs"
    " the room)",
    "memory_budget": "bytes that the models which are up may take together: weights, KV caches, processes; takes K, M, G suffixes"
    " (default: what the machine has free)",
    "weights_dram_bytes": "bytes of packed weights kept in host memory for models that sleep, or are expected to be asked for"
    " (default: a quarter of the free memory)",
    "warm_te": "processes kept ready to become a TE or a rank of any model (default: follows the demand)",
    "prefill_tensor_parallel_size": "ranks of the prefill TEs of --pd (default: as --tensor-parallel-size)",
    "speculative_config": 'speculation by prompt lookup, as JSON: {"method": "ngram", "num_speculative_tokens": 8,'
    ' "prompt_lookup_min": 2, "prompt_lookup_max": 6} (default: off)',
    "slo_ttft_ms": "promised time to first token, for 90 percent of requests: placing, scaling and early refusal go by it; with"
    " --slo-tpot-ms it moves the shares of a semi pair (default: none, and both workers may use all cores)",
    "slo_tpot_ms": "promised time between two tokens, for 90 percent of them",
    "seed": "seed of everything random (default: from the system)",
}

# Fields of bytes, which take suffixes as text.
SIZES = ("kv_cache_memory_bytes", "kv_dram_bytes", "kv_ssd_bytes", "memory_budget", "weights_dram_bytes")
SIZE_SUFFIX = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


def field_help(name: str) -> str:
    """The one-line meaning of a Config field."""
    if name in AUTO_HELP:
        return AUTO_HELP[name]
    for f in msgspec.inspect.type_info(Config).fields:  # type: ignore[attr-defined]
        if f.name == name:
            extra = getattr(f.type, "extra_json_schema", None) or {}
            return str(extra.get("description", ""))
    raise KeyError(name)


def parse_size(text: str) -> int:
    """Bytes from `4G`, `512M`, `1.5GiB` or a plain number. Raises `UserError`."""
    body = text.strip().lower().removesuffix("ib").removesuffix("b")
    digits = body.rstrip("kmgt")
    try:
        return int(float(digits) * SIZE_SUFFIX[body[len(digits) :]])
    except (ValueError, KeyError):
        raise UserError(f"{text!r} is not a size; write for example 4G or 512M") from None


def parse_speculation(value: Any, origin: str) -> Speculation:
    """`speculative_config` from JSON text (a flag) or a table (TOML, Python). Raises `UserError`."""
    example = '{"method": "ngram", "num_speculative_tokens": 8}'
    where = f"{origin}: speculative-config"
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except msgspec.DecodeError as e:
            raise UserError(
                f"{where}: {value!r} is not JSON ({e}); write for example '{example}'", "speculative_config"
            ) from None
    if isinstance(value, dict) and value.get("method", "ngram") != "ngram":
        raise UserError(f'{where}: method {value["method"]!r} isn\'t there; the only one is "ngram"', "speculative_config")
    try:
        return msgspec.convert(value, Speculation)
    except msgspec.ValidationError as e:
        raise UserError(f"{where}: {e}; write for example '{example}'", "speculative_config") from None


def from_values(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """`values` (text or TOML types) converted to the types of Config's fields.

    Raises `UserError` naming the field, the origin and what would do.
    """
    out = {}
    for name, value in values.items():
        if name not in Config.__struct_fields__:
            raise UserError(f"{origin}: there is no setting {name!r}; `deepserve.py config` lists them all", name)
        if name in ("served_model_name", "api_key", "scale_without") and isinstance(value, str):
            value = [value]
        if name in SIZES and isinstance(value, str):
            value = parse_size(value)
        if name == "speculative_config" and value is not None:
            value = parse_speculation(value, origin)
        try:
            one = msgspec.convert({name: value}, Config, strict=False)
        except msgspec.ValidationError as e:
            reason = str(e).split(" - at `")[0]
            raise UserError(f"{origin}: {name.replace('_', '-')} = {value!r}: {reason}", name) from None
        out[name] = getattr(one, name)
    return out


def read_file(file: Path) -> dict[str, Any]:
    """The settings of a TOML file, by field name. Raises `UserError`."""
    try:
        table = tomllib.loads(file.read_text())
    except OSError as e:
        raise UserError(f"--config {file}: {e.strerror}", "config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"--config {file}: not TOML: {e}", "config") from None
    return {k.replace("-", "_"): v for k, v in table.items()}


def layered(layers: Sequence[tuple[dict[str, Any], str]], flags: dict[str, Any]) -> tuple[Config, dict[str, str]]:
    """The Config of defaults < `layers` (values and where they come from) < flags, and for each field where its value came from."""
    origin = dict.fromkeys(Config.__struct_fields__, "default")
    values: dict[str, Any] = {}
    for table, place in layers:
        values |= from_values(table, place)
        origin |= dict.fromkeys(table, place)
    values |= from_values(flags, "command line")
    if values.get("pd"):
        if "te" in values:
            raise UserError(f"--pd {values['pd']} says how many TEs there are: leave out --te {values['te']}", "te")
        values["te"] = len(parse_pd(values["pd"]))
        origin["te"] = f"--pd {values['pd']}"
    origin |= {k: f"flag --{k.replace('_', '-')}" for k in flags}
    return Config(**values), origin


def resolve(flags: dict[str, Any], file: Path | None = None) -> tuple[Config, dict[str, str]]:
    """The Config of one model: defaults < TOML file < flags, and for each field where its value came from."""
    return layered([] if file is None else [(read_file(file), f"file {file}")], flags)


# Settings of a server, whatever the number of its models.
SERVER_WIDE = (
    "host",
    "port",
    "api_key",
    "api_keys_file",
    "memory_budget",
    "weights_dram_bytes",
    "warm_te",
    "scale_without",
    "shutdown_timeout",
    "stall_timeout",
)


def several(flags: dict[str, Any], models: Sequence[str] = (), file: Path | None = None) -> list[tuple[Config, dict[str, str]]]:
    """The Config of each model of a server, the default model's first, and for each field where its value came from.

    The models are those named on the command line (`models`, or the flag), else the file's: its `model` first, then one for each
    `[models.NAME]` table. Such a table has settings of one model: of the one called NAME, or of the `model` in it, which then
    answers to NAME. Order: defaults < the file's settings < the model's table < flags. Raises `UserError`."""
    flags, place = dict(flags), f"file {file}"
    shared = {} if file is None else read_file(file)
    tables = shared.pop("models", {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise UserError(f"{place}: models: write a table for each, for example [models.smollm2-135m-instruct]", "models")
    flag, first = flags.pop("model", None), shared.pop("model", None)
    if flag and models:
        raise UserError(f"--model {flag} {' '.join(models)}: leave out --model, and name every model", "model")
    if named := [*models] or [flag] * (flag is not None):
        listed, origin = named, "command line"
    else:
        listed, origin = list(dict.fromkeys([*[first] * (first is not None), *tables])), place
    if not listed:
        listed, origin = [Config().model], "default"
    if twice := [name for i, name in enumerate(listed) if name in listed[:i]]:
        raise UserError(f"{twice[0]} is named twice; name each model once", "model")
    for values, where in ((flags, "command line"), (shared, place)):
        if len(listed) > 1 and "served_model_name" in values:
            message = f"{where}: served-model-name can't be the name of all: {', '.join(listed)}"
            raise UserError(f"{message}; give each its own in a [models.NAME] table of --config", "served_model_name")
    made = []
    for name in listed:
        layers = [(shared, place), ({"model": name}, origin)]
        if name in tables:
            layers.append(own_settings(name, tables[name], f"{place} [models.{name}]"))
        made.append(layered(layers, flags))
    return made


def own_settings(name: str, table: dict[str, Any], place: str) -> tuple[dict[str, Any], str]:
    """What a `[models.NAME]` table sets, and where. Raises `UserError` naming a setting that is the server's."""
    values = {k.replace("-", "_"): v for k, v in table.items()}
    for field in SERVER_WIDE:
        if field in values:
            said = field.replace("_", "-")
            raise UserError(f"{place}: {said} is for the whole server; write it above the tables, or as --{said}", field)
    if "model" in values:
        values.setdefault("served_model_name", [name])
    return values, place
