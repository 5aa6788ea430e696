"""What becomes of the figures that `bench.cpu` takes: medians, ratios of one round, shares of the bound, the README's table.

Everything here is pure but for reading and writing the file. A run is one scenario on one server in one round; whatever else
the file holds (cells, ratios, bounds) follows from the runs and is written for its readers only.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import msgspec

T = TypeVar("T")

STREAMS = (1, 4, 16, 64)
DECODE = {s: f"decode-{s}" for s in STREAMS}
INPUT, OUTPUT = 128, 128  # tokens of a decode scenario's requests
PREFILL = 1024
SHARED = (512, 64, 32)  # tokens: prefix of all, of a request's own, output


# ---- the file -------------------------------------------------------------------------------------------------------


class Shape(msgspec.Struct, frozen=True):
    """What a decoder-only model of the Llama family computes."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @property
    def layer_weights(self) -> int:
        """Weights of all layers' matrices."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def head_weights(self) -> int:
        return self.vocab * self.hidden


class Peaks(msgspec.Struct, frozen=True):
    """The best that this machine gave all cores together. Bytes a second, operations a second; 0 where not measured."""

    memory: float
    bfloat16: float
    int8: float = 0.0


class Round(msgspec.Struct, frozen=True):
    """Once through all servers. `load` is the machine's load average before it: about 0 where nothing else runs."""

    session: str
    number: int
    load: float
    peaks: Peaks


class Described(msgspec.Struct, frozen=True, omit_defaults=True):
    """A server as the table names it."""

    title: str
    version: str
    settings: str
    weight_bytes: float = 0.0  # a weight as its file stores it; 0: not ours, no bound is asked for
    arithmetic: Literal["", "bfloat16", "int8"] = ""  # ours: what the bound of its matrices is taken with


class Run(msgspec.Struct, frozen=True, omit_defaults=True):
    session: str  # when this run of the benchmark began
    round: int
    server: str
    scenario: str
    values: dict[str, float] = {}
    error: str = ""


class Report(msgspec.Struct):
    what: str = ""
    date: str = ""
    command: str = ""
    machine: dict[str, Any] = {}
    model: str = ""
    shape: Shape | None = None
    workloads: dict[str, str] = {}
    servers: dict[str, Described] = {}
    rounds: list[Round] = []
    runs: list[Run] = []


def load(path: Path) -> Report:
    """The report in a file, or an empty one. What follows from the runs is not read."""
    if not path.exists():
        return Report()
    return msgspec.convert(json.loads(path.read_bytes()), Report)


def save(path: Path, report: Report) -> None:
    """Write the report with what follows from it, whole or not at all."""
    content = msgspec.to_builtins(report)
    runs = content.pop("runs")
    content["cells"] = {
        server: {scenario: {m: s._asdict() for m, s in metrics.items()} for scenario, metrics in by_scenario.items()}
        for server, by_scenario in cells(report.runs).items()
    }
    content["ratios"] = [r._asdict() | {"reached": r.reached} for bar in BARS if (r := ratio(report, bar))]
    content["bounds"] = [b._asdict() | {"share": b.share} for b in bounds(report)]
    part = path.with_suffix(".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    part.write_text(rendered(tidy(content | {"runs": runs})) + "\n")
    part.replace(path)


def rendered(value: Any, depth: int = 0) -> str:
    """JSON with a line for each run, cell and ratio: what lies deeper, or is small, is not broken up."""
    if depth == 3 or not isinstance(value, (dict, list)) or len(json.dumps(value)) < 100:
        return json.dumps(value)
    inner = " " * (depth + 1)
    if isinstance(value, dict):
        lines = [f"{inner}{json.dumps(k)}: {rendered(v, depth + 1)}" for k, v in value.items()]
        return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"
    lines = [inner + rendered(v, 3) for v in value]
    return "[\n" + ",\n".join(lines) + "\n" + " " * depth + "]"


def tidy(value: Any) -> Any:
    """Numbers cut to five significant digits: more is noise."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: tidy(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [tidy(v) for v in value]
    return value


def merge(runs: Sequence[Run], new: Run) -> list[Run]:
    """`runs` with `new`: what earlier sessions found of this scenario on this server goes, and where they failed on it."""
    same = [r for r in runs if r.session == new.session or r.server != new.server or not (r.error or r.scenario == new.scenario)]
    return [*same, new]


def rotated(items: Sequence[T], number: int, rounds: int) -> list[T]:
    """The order of round `number`: each round begins elsewhere, evenly spread, so that drift hits everybody."""
    shift = number * len(items) // max(1, rounds)
    return [*items[shift:], *items[:shift]]


# ---- cells and ratios -----------------------------------------------------------------------------------------------


class Spread(NamedTuple):
    median: float
    min: float
    max: float
    n: int


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values), len(values))


def cells(runs: Sequence[Run]) -> dict[str, dict[str, dict[str, Spread]]]:
    """Server -> scenario -> metric -> its spread over the rounds."""
    found: dict[str, dict[str, dict[str, list[float]]]] = {}
    for run in runs:
        for metric, value in run.values.items():
            found.setdefault(run.server, {}).setdefault(run.scenario, {}).setdefault(metric, []).append(value)
    return {
        server: {scenario: {m: spread(v) for m, v in metrics.items()} for scenario, metrics in by_scenario.items()}
        for server, by_scenario in found.items()
    }


class Bar(NamedTuple):
    """A ratio that is asked for: `server` over the best of `against` in the same round; for costs at most, else at least."""

    server: str
    against: tuple[str, ...]
    scenario: str
    metric: str
    bar: float
    label: str = ""  # of the table's row


COSTS = ("ttft_ms", "first_token_s", "peak_mb", "idle_core_percent")
BF16_PEERS = ("llama.cpp-bf16", "llama.cpp-bf16-bs", "vllm-bf16")
LOADS = [*DECODE.values(), "prefill", "shared"]


def bars(server: str, against: tuple[str, ...], label: str, wanted: dict[str, float], metric: str = "") -> list[Bar]:
    return [Bar(server, against, scenario, metric or HEADLINE[scenario], bar, label) for scenario, bar in wanted.items()]


HEADLINE = dict.fromkeys(DECODE.values(), "output_tok_s") | {
    "prefill": "prompt_tok_s",
    "shared": "output_tok_s",
    "start": "first_token_s",
    "memory": "peak_mb",
}


def by_streams(*four: float, **more: float) -> dict[str, float]:
    return dict(zip(DECODE.values(), four, strict=True)) | more


BARS = [
    *bars(
        "deepserve-bf16",
        BF16_PEERS,
        "bf16 / best bf16 peer",
        by_streams(1.25, 1.7, 1.6, 1.7, prefill=1.2, shared=1.9, start=1.0, memory=0.5),
    ),
    *bars("deepserve-bf16", BF16_PEERS, "bf16 / best bf16 peer", dict.fromkeys(LOADS, 1.0), "ttft_ms"),
    *bars("deepserve-q8_0", ("llama.cpp-q8_0",), "Q8_0 / llama.cpp Q8_0", by_streams(1.3, 2.5, 3, 3, prefill=3)),
    *bars("deepserve-q4_1", ("llama.cpp-q4_1",), "Q4_1 / llama.cpp Q4_1", by_streams(1.7, 3, 5, 5, prefill=6)),
    *bars("deepserve-int8", ("deepserve-bf16",), "int8 / our bf16", {"decode-1": 1.5, "decode-64": 1.5}),
    Bar("te-2", ("te-1",), "te", "output_tok_s", 0.70, "two TEs / one TE"),
    Bar("te-2", ("te-pinned",), "te", "output_tok_s", 0.95, "two TEs / two one-thread servers, pinned"),
]


class Ratio(NamedTuple):
    server: str
    against: tuple[str, ...]
    scenario: str
    metric: str
    median: float
    min: float
    max: float
    n: int
    bar: float

    @property
    def reached(self) -> bool:
        return self.median <= self.bar if self.metric in COSTS else self.median >= self.bar


def ratio(report: Report, bar: Bar) -> Ratio | None:
    """The ratio round by round, each against that round's best peer, then its median; None where no round has both.

    A peer with a figure in some round must have one in every round that counts: its absence would flatter.
    """
    values: dict[str, dict[tuple[str, int], float]] = {}
    for run in report.runs:
        if run.scenario == bar.scenario and bar.metric in run.values:
            values.setdefault(run.server, {})[run.session, run.round] = run.values[bar.metric]
    peers = [values[name] for name in bar.against if name in values]
    if not peers or bar.server not in values:
        return None
    best = min if bar.metric in COSTS else max
    ratios = [
        own / best(peer[at] for peer in peers) for at, own in values[bar.server].items() if all(at in peer for peer in peers)
    ]
    if not ratios:
        return None
    return Ratio(bar.server, bar.against, bar.scenario, bar.metric, *spread(ratios), bar.bar)


# ---- bounds ---------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One forward pass."""

    rows: int  # tokens computed
    sampled: int  # of them, with logits
    cached: float  # tokens whose K and V are read from memory
    attended: float  # (row, token) pairs of the attention


def decode_step(streams: int, context: float) -> Step:
    """One token of each stream, `context` tokens of each behind it."""
    return Step(streams, streams, streams * context, streams * context)


def prefill_step(tokens: int) -> Step:
    """One prompt at once."""
    return Step(tokens, 1, tokens, tokens * (tokens + 1) / 2)


def bound_seconds(shape: Shape, step: Step, weight_bytes: float, peaks: Peaks, arithmetic: str = "bfloat16") -> float:
    """The seconds that no implementation with this arithmetic and these weights in memory can beat.

    The larger of two: bytes (every weight once at `weight_bytes`, K and V of the cached tokens in bfloat16) over the memory
    peak, operations (two a weight and row, the head's for sampled rows; four a head dimension, head and attended pair, always
    in bfloat16) over the arithmetic peaks. A cache that keeps weights from step to step can beat it; norms and such are free.
    """
    kv = step.cached * shape.layers * 2 * shape.kv_heads * shape.head_dim * 2
    moving = ((shape.layer_weights + shape.head_weights) * weight_bytes + kv) / peaks.memory
    matrices = 2 * (shape.layer_weights * step.rows + shape.head_weights * step.sampled)
    attention = 4 * shape.layers * shape.heads * shape.head_dim * step.attended
    fast = peaks.int8 if arithmetic == "int8" and peaks.int8 else peaks.bfloat16
    return max(moving, matrices / fast + attention / peaks.bfloat16)


class Bound(NamedTuple):
    server: str
    scenario: str
    ms: float  # measured: TPOT of a decode, TTFT of a prefill
    bound_ms: float

    @property
    def share(self) -> float:
        return self.bound_ms / self.ms


STEPS = {DECODE[s]: decode_step(s, INPUT + OUTPUT / 2) for s in STREAMS} | {"prefill": prefill_step(PREFILL)}


def bounds(report: Report) -> list[Bound]:
    """Each of our servers' steps beside the best that the machine did in any round."""
    if report.shape is None or not report.rounds:
        return []
    all_peaks = [r.peaks for r in report.rounds]
    peaks = Peaks(
        max(p.memory for p in all_peaks), max(p.bfloat16 for p in all_peaks), max(p.int8 for p in all_peaks)
    )  # what the machine can do is the best it did
    table = cells(report.runs)
    found = []
    for name, server in report.servers.items():
        for scenario, step in STEPS.items():
            metric = "ttft_ms" if scenario == "prefill" else "tpot_ms"
            measured = table.get(name, {}).get(scenario, {}).get(metric)
            if server.weight_bytes and measured:
                seconds = bound_seconds(report.shape, step, server.weight_bytes, peaks, server.arithmetic)
                found.append(Bound(name, scenario, measured.median, seconds * 1000))
    return found


# ---- the table ------------------------------------------------------------------------------------------------------

COLUMNS = {
    "decode-1": "1 stream",
    "decode-4": "4",
    "decode-16": "16",
    "decode-64": "64",
    "prefill": "prefill, prompt tok/s",
    "shared": "shared prefix, tok/s",
    "start": "start to first token, s",
    "memory": "peak memory, MB",
}


def number(value: float) -> str:
    """Three digits at least, none behind the point where there are three before it."""
    return f"{value:.0f}" if value >= 99.5 else f"{value:.3g}"


def cell(value: Spread | None) -> str:
    if value is None:
        return ""
    if value.n == 1:
        return number(value.median)
    return f"{number(value.median)} ({number(value.min)}–{number(value.max)})"


def shown(found: Ratio | None) -> str:
    if found is None:
        return ""
    sign = "≤" if found.metric in COSTS else "≥"
    return f"{found.median:.2f}x, {'reached' if found.reached else 'missed'} ({sign} {found.bar:g})"


def markdown(rows: list[list[str]]) -> list[str]:
    head, *body = rows
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body)]


def ratio_rows(report: Report, columns: Sequence[str], metrics: dict[str, str]) -> list[list[str]]:
    """A row of ratios for each label that has a bar on one of these metrics."""
    found: dict[str, dict[str, str]] = {}
    for bar in BARS:
        if metrics.get(bar.scenario) == bar.metric and (text := shown(ratio(report, bar))):
            found.setdefault(bar.label, {})[bar.scenario] = text
    return [[f"**{label}**", *(by.get(c, "") for c in columns)] for label, by in found.items()]


def table(report: Report) -> str:
    """The report as Markdown: speeds with the ratios that are asked for, first-token times, shares of the bound, the rest."""
    found = cells(report.runs)
    titled = {name: server.title for name, server in report.servers.items() if name in found}
    rows = [["output tok/s", *COLUMNS.values()]]
    for name, title in titled.items():
        if found[name].keys() & COLUMNS.keys():
            rows.append([title, *(cell(found[name].get(s, {}).get(HEADLINE[s])) for s in COLUMNS)])
    lines = [*about(report), "", *markdown(rows + ratio_rows(report, list(COLUMNS), HEADLINE))]
    rows = [["median time to first token, ms", *(COLUMNS[s].split(",")[0] for s in LOADS)]]
    for name, title in titled.items():
        if any("ttft_ms" in found[name].get(s, {}) for s in LOADS):
            rows.append([title, *(cell(found[name].get(s, {}).get("ttft_ms")) for s in LOADS)])
    if len(rows) > 1:
        lines += ["", *markdown(rows + ratio_rows(report, LOADS, dict.fromkeys(LOADS, "ttft_ms")))]
    if shares := bounds(report):
        lines += ["", *share_table(shares, report)]
    lines += ["", *rest(report, found)]
    return "\n".join(lines).rstrip() + "\n"


def about(report: Report) -> list[str]:
    machine = report.machine
    rounds = len({(r.session, r.number) for r in report.rounds})
    busy = max((r.load for r in report.rounds), default=0.0)
    sentence = (
        f"{report.date}, {machine.get('cores', '?')} cores of {machine.get('cpu', '?')} ({machine.get('flags', '')}),"
        f" {report.model}; {rounds} round{'s' * (rounds != 1)}, median (least to most)."
    )
    # Up to one is what the benchmark itself leaves behind; more means that others had the cores.
    return [sentence + (f" The machine was busy with other work: load average up to {busy:.1f}." if busy > 1 else "")]


def share_table(shares: list[Bound], report: Report) -> list[str]:
    by = {(b.server, b.scenario): b for b in shares}
    rows = [["step, ms: measured / bound (share)", *(COLUMNS[s].split(",")[0] for s in STEPS)]]
    for name in dict.fromkeys(b.server for b in shares):
        texts = [f"{number(b.ms)} / {number(b.bound_ms)} ({b.share:.0%})" if (b := by.get((name, s))) else "" for s in STEPS]
        rows.append([report.servers[name].title, *texts])
    return markdown(rows)


def rest(report: Report, found: dict[str, dict[str, dict[str, Spread]]]) -> list[str]:
    """Lines on TEs, idle servers, peaks and failures."""
    lines = []
    if report.rounds:
        p = [r.peaks for r in report.rounds]
        whole = f", {max(x.int8 for x in p) / 1e9:.0f} GOP/s int8" if max(x.int8 for x in p) else ""
        peaks = f"{max(x.memory for x in p) / 1e9:.1f} GB/s from memory, {max(x.bfloat16 for x in p) / 1e9:.0f} GFLOP/s bfloat16"
        lines.append(f"- Machine's peaks in this run: {peaks}{whole}.")
    for name, server in report.servers.items():
        got = found.get(name, {})
        if te := got.get("te", {}).get("output_tok_s"):
            lines.append(f"- {server.title}: {cell(te)} tok/s at 16 streams.")
        said = []
        if (idle := got.get("idle", {}).get("idle_core_percent")) is not None:
            said.append(f"{cell(idle)} % of a core")
        if (memory := got.get("idle_memory", {})).keys() >= {"private_mb", "shared_mb"}:
            said.append(f"{cell(memory['private_mb'])} MB private, {cell(memory['shared_mb'])} MB shared with the model loaded")
        if said:
            lines.append(f"- {server.title}, idle: {', '.join(said)}.")
    for bar in BARS:
        if bar.scenario == "te" and (text := shown(ratio(report, bar))):
            lines.append(f"- {bar.label}: {text}.")
    last = max((run.session for run in report.runs), default="")
    earlier: dict[str, list[str]] = {}
    for run in report.runs:
        if run.session != last and run.scenario not in earlier.setdefault(run.server, []):
            earlier[run.server].append(run.scenario)
    for server, scenarios in earlier.items():
        lines.append(f"- Of an earlier run: {report.servers[server].title}, {', '.join(scenarios)}.")
    for run in report.runs:
        if run.error:
            lines.append(f"- Failed: {report.servers[run.server].title}, {run.scenario}, round {run.round}: {run.error}")
    return lines
