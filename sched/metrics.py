"""Prometheus metrics: vLLM's stems under `deepserve:`, so that its dashboards port by search and replace.

A server has one registry (`Families`), and each of its models counts there under its own name (`Metrics`). Counters and
histograms are fed as things happen; gauges are read from the TE table and the deployments when somebody scrapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from itertools import accumulate
from typing import Literal, Protocol, get_args

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from engine.config import Role
from scale.ladder import Climb
from sched.cluster import TE

ModelState = Literal["off", "loading", "ready", "asleep", "failed"]


class Deployed(Protocol):
    """A model of the server, as its gauges read it."""

    @property
    def id(self) -> str: ...
    @property
    def state(self) -> ModelState: ...
    @property
    def wanted(self) -> Mapping[Role, int]:
        """How many TEs of each role it should have."""
        ...

    @property
    def held(self) -> int:
        """Tasks that wait for a TE."""
        ...

    @property
    def decisions(self) -> Mapping[tuple[Role, str], int]:
        """How often the autoscaler wanted more ("up") or fewer ("down") TEs of a role."""
        ...


class Table(Protocol):
    """What gauges read of the cluster manager."""

    @property
    def table(self) -> Mapping[int, TE]: ...
    @property
    def restarts(self) -> int: ...
    @property
    def keeper_starts(self) -> int: ...
    @property
    def packed(self) -> Mapping[str, int]:
        """Packed weights in memory, whether TEs use them or not: bytes by model."""
        ...

    @property
    def pool_size(self) -> int:
        """Processes that are kept ready to become TEs."""
        ...


# vLLM's bucket bounds, in seconds.
FIRST_TOKEN = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
)
TOKEN = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
WHOLE = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
    1920.0,
    7680.0,
)
LENGTH = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
SCALE = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Families:
    """All metrics of one server, whatever the number of its models."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.success = self.counter("request_success", "Requests that ended well, by finish reason", "finished_reason")
        self.refusals = self.counter("request_refused", "Requests refused or failed, by cause", "cause")
        self.cancelled = self.counter("request_cancelled", "Requests whose client left")
        self.prompt_tokens = self.counter("prompt_tokens", "Prompt tokens taken in")
        self.tokens = TokenCollector()
        self.registry.register(self.tokens)
        self.replays = self.counter("task_replays", "Tasks started again after their TE died")
        self.moved = self.counter("task_moves", "Running tasks moved to another TE with their KV")
        self.first_token = self.histogram("time_to_first_token_seconds", "Arrival to first token", FIRST_TOKEN)
        self.per_token = self.histogram(
            "request_time_per_output_token_seconds", "A request's mean time per token after the first", TOKEN
        )
        self.whole = self.histogram("e2e_request_latency_seconds", "Arrival to last token", WHOLE)
        self.queued = self.histogram("request_queue_time_seconds", "Arrival to the first prefill chunk", FIRST_TOKEN)
        self.request_prompt = self.histogram("request_prompt_tokens", "Prompt tokens of a request", LENGTH)
        self.request_generation = self.histogram("request_generation_tokens", "Generated tokens of a request", LENGTH)
        ways = ("step", "how", "path")
        self.scale_step = self.histogram(
            "scale_step_seconds", "Scaling ladder: seconds by step, and how process and weights came", SCALE, *ways
        )
        self.weight_loads = self.counter("weight_loads", "TEs that got their weights, by the way they came", "path")

    def counter(self, stem: str, text: str, *labels: str) -> Counter:
        return Counter(f"deepserve:{stem}", text, ("model_name", *labels), registry=self.registry)

    def histogram(self, stem: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
        return Histogram(f"deepserve:{stem}", text, ("model_name", *labels), registry=self.registry, buckets=tuple(buckets))

    def watch(self, cluster: Table, deployments: Iterable[Deployed]) -> None:
        """Read gauges from these at every scrape."""
        self.registry.register(TableCollector(cluster, deployments))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Metrics:
    """What one model counts in."""

    def __init__(self, families: Families, model: str):
        self.families = families
        self.model = model
        self.success = families.success
        self.refusals = families.refusals
        self.cancelled = families.cancelled.labels(model)
        self.prompt_tokens = families.prompt_tokens.labels(model)
        self.tokens = families.tokens.of(model)
        self.replays = families.replays.labels(model)
        self.moved = families.moved.labels(model)
        self.first_token = families.first_token.labels(model)
        self.per_token = families.per_token.labels(model)
        self.whole = families.whole.labels(model)
        self.queued = families.queued.labels(model)
        self.request_prompt = families.request_prompt.labels(model)
        self.request_generation = families.request_generation.labels(model)

    def climbed(self, climb: Climb) -> None:
        """A TE is up."""
        for step, seconds in climb.steps.items():
            self.families.scale_step.labels(self.model, step, climb.how, climb.path or "").observe(seconds)
        if climb.path is not None:
            self.families.weight_loads.labels(self.model, climb.path).inc()


class TokenTally:
    """What every token counts in: plain numbers, made into metrics when somebody scrapes. The client library's own take a lock
    and walk all buckets for each value."""

    def __init__(self) -> None:
        self.generated = 0
        self.gaps = [0] * (len(TOKEN) + 1)  # seconds between two tokens of a sequence: how many up to each bound, and beyond
        self.gaps_sum = 0.0

    def observe(self, gap: float, count: int) -> None:
        """`count` tokens came `gap` seconds after the one before: a step's tokens have mostly one gap in common."""
        self.gaps[bisect_left(TOKEN, gap)] += count
        self.gaps_sum += gap * count


class TokenCollector:
    """The tallies of all models."""

    def __init__(self) -> None:
        self.tallies: dict[str, TokenTally] = {}

    def of(self, model: str) -> TokenTally:
        return self.tallies.setdefault(model, TokenTally())

    def collect(self) -> Iterable[Metric]:
        label, names = ("model_name",), [*map(str, TOKEN), "+Inf"]
        generated = CounterMetricFamily("deepserve:generation_tokens", "Tokens generated", labels=label)
        gaps = HistogramMetricFamily("deepserve:inter_token_latency_seconds", "Between two tokens of a sequence", labels=label)
        for model, tally in self.tallies.items():
            generated.add_metric((model,), tally.generated)
            gaps.add_metric((model,), list(zip(names, accumulate(tally.gaps), strict=True)), tally.gaps_sum)
        yield generated
        yield gaps


# Of the slower KV tiers: counter, meaning, field of a TE's Load.
TIERS = (
    ("prefix_cache_hits_dram", "Of the hits, prompt tokens loaded from the DRAM tier", "dram_hits"),
    ("prefix_cache_hits_ssd", "Of the hits, prompt tokens loaded from the SSD tier", "ssd_hits"),
    ("kv_populates", "Prompts of which KV blocks were loaded", "populates"),
    ("kv_blocks_loaded", "Load or recompute: KV blocks of slower tiers that were loaded", "blocks_loaded"),
    ("kv_blocks_recomputed", "... that were there, but quicker to compute", "blocks_recomputed"),
    ("kv_blocks_swapped", "KV blocks copied to a slower tier, or found there", "blocks_swapped"),
    ("kv_blocks_lost", "KV blocks evicted before a slower tier was offered them", "blocks_lost"),
    ("kv_blocks_torn", "KV blocks of slower tiers that were refused: torn, foreign or overwritten", "blocks_torn"),
    ("kv_files_unwritten", "Files of KV blocks that the disk did not take", "files_unwritten"),
    ("kv_dram_evictions", "KV blocks that left the box's DRAM tier", "dram_evictions"),
    ("kv_ssd_evictions", "KV blocks that left the box's SSD tier", "ssd_evictions"),
)


def tier_load(field: str, te: TE) -> float:
    return float(getattr(te.load, field))


# vLLM's names for what is left of a model that doesn't run.
SLEEP_STATES: dict[str, tuple[ModelState, ...]] = {
    "awake": ("loading", "ready"),
    "weights_offloaded": ("asleep",),
    "discard_all": ("off", "failed"),
}

Gauge = type[GaugeMetricFamily] | type[CounterMetricFamily]


class TableCollector:
    """Gauges and counters that the TEs themselves report, and the state of each model."""

    def __init__(self, cluster: Table, deployments: Iterable[Deployed]):
        self.cluster = cluster
        self.deployments = deployments

    def collect(self) -> Iterable[Metric | HistogramMetricFamily]:
        yield from self.of_tes()
        yield from self.of_models()
        gauge, count, cluster = GaugeMetricFamily, CounterMetricFamily, self.cluster
        yield gauge("deepserve:weights_dram_bytes", "Bytes of packed weights in memory", sum(cluster.packed.values()))
        yield gauge("deepserve:warm_processes", "Processes kept ready to become TEs", cluster.pool_size)
        yield count("deepserve:te_restarts", "TEs brought up again after a death", cluster.restarts)
        yield count("deepserve:keeper_starts", "Keeper processes started", cluster.keeper_starts)

    def of_models(self) -> Iterable[Metric]:
        def family(stem: str, text: str, *labels: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"deepserve:{stem}", text, labels=("model_name", *labels))

        held = family("num_requests_held", "Tasks waiting for a TE")
        state = family("model_state", "1 for the state that the model is in", "state")
        sleep = family("engine_sleep_state", "1 for what is left of a model that sleeps", "sleep_state")
        wanted = family("te_wanted", "TEs that the model should have", "role")
        decisions = CounterMetricFamily(
            "deepserve:scale_decisions", "Changes of the wanted number of TEs", labels=("model_name", "role", "direction")
        )
        for model in self.deployments:
            held.add_metric((model.id,), model.held)
            for name in get_args(ModelState):
                state.add_metric((model.id, name), model.state == name)
            for name, states in SLEEP_STATES.items():
                sleep.add_metric((model.id, name), model.state in states)
            for role, number in model.wanted.items():
                wanted.add_metric((model.id, role), number)
            for (role, direction), number in model.decisions.items():
                decisions.add_metric((model.id, role, direction), number)
        return held, state, sleep, wanted, decisions

    def of_tes(self) -> Iterable[Metric]:
        tes = list(self.cluster.table.values())

        def family(kind: Gauge, stem: str, text: str, read: Callable[[TE], float]) -> Metric:
            made = kind(f"deepserve:{stem}", text, labels=("model_name", "worker", "role"))
            for te in tes:
                made.add_metric((te.model, str(te.id), te.role), read(te))
            return made

        gauge, count = GaugeMetricFamily, CounterMetricFamily
        yield family(gauge, "num_requests_running", "Sequences in the running batch", lambda te: te.load.running)
        yield family(gauge, "num_requests_waiting", "Sequences waiting in a TE", lambda te: te.load.waiting)
        yield family(
            gauge, "kv_cache_usage_perc", "Used share of KV blocks", lambda te: te.load.blocks_used / max(1, te.load.blocks_total)
        )
        yield family(gauge, "te_share", "Percent of the compute a TE may use", lambda te: te.share)
        yield family(gauge, "te_ready", "1 where the TE takes tasks", lambda te: te.state == "ready")
        yield family(count, "num_preemptions", "Sequences that lost their blocks", lambda te: te.load.preemptions)
        yield family(
            count, "prefix_cache_queries", "Prompt tokens looked up in the prefix cache", lambda te: te.load.prefix_queries
        )
        yield family(count, "prefix_cache_hits", "Prompt tokens found in the prefix cache", lambda te: te.load.prefix_hits)
        yield family(count, "iterations", "Steps", lambda te: te.load.steps)
        yield family(count, "spec_decode_num_drafts", "Speculation: drafts verified", lambda te: te.load.drafts)
        yield family(count, "spec_decode_num_draft_tokens", "Speculation: tokens drafted", lambda te: te.load.draft_tokens)
        yield family(
            count,
            "spec_decode_num_accepted_tokens",
            "Speculation: drafted tokens that were accepted",
            lambda te: te.load.accepted_tokens,
        )
        for stem, text, field in TIERS:
            yield family(count, stem, text, partial(tier_load, field))
        yield family(gauge, "kv_tiers_gone", "1 where the TE lost the DRAM and SSD tiers", lambda te: te.load.tiers_gone)
        yield family(gauge, "kv_dram_bytes", "Bytes of the box's DRAM tier in use", lambda te: te.load.dram_bytes)
        yield family(gauge, "kv_ssd_bytes", "Bytes of the box's SSD tier in use", lambda te: te.load.ssd_bytes)
