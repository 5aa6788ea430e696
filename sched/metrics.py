"""Prometheus metrics: vLLM's stems under `deepserve:`, so that its dashboards port by search and replace.

Counters and histograms are fed as things happen; gauges are read from the TE table when somebody scrapes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable
from functools import partial
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from sched.cluster import TE, Cluster

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


class Metrics:
    """All metrics of one model's server."""

    def __init__(self, model: str):
        self.model = model
        self.registry = CollectorRegistry()
        label = ("model_name",)

        def counter(stem: str, text: str, *more: str) -> Counter:
            return Counter(f"deepserve:{stem}", text, (*label, *more), registry=self.registry)

        def histogram(stem: str, text: str, buckets: Iterable[float]) -> Histogram:
            made = Histogram(f"deepserve:{stem}", text, label, registry=self.registry, buckets=tuple(buckets))
            return made.labels(model)

        self.success = counter("request_success", "Requests that ended well, by finish reason", "finished_reason")
        self.refusals = counter("request_refused", "Requests refused or failed, by cause", "cause")
        self.cancelled = counter("request_cancelled", "Requests whose client left").labels(model)
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens taken in").labels(model)
        self.tokens = TokenTally(model)
        self.registry.register(self.tokens)
        self.replays = counter("task_replays", "Tasks started again after their TE died").labels(model)
        self.moved = counter("task_moves", "Running tasks moved to another TE with their KV").labels(model)
        self.first_token = histogram("time_to_first_token_seconds", "Arrival to first token", FIRST_TOKEN)
        self.per_token = histogram(
            "request_time_per_output_token_seconds", "A request's mean time per token after the first", TOKEN
        )
        self.whole = histogram("e2e_request_latency_seconds", "Arrival to last token", WHOLE)
        self.queued = histogram("request_queue_time_seconds", "Arrival to the first prefill chunk", FIRST_TOKEN)
        self.request_prompt = histogram("request_prompt_tokens", "Prompt tokens of a request", LENGTH)
        self.request_generation = histogram("request_generation_tokens", "Generated tokens of a request", LENGTH)
        scale = Histogram(
            "deepserve:scale_step_seconds",
            "Scaling ladder: seconds by step",
            (*label, "step"),
            registry=self.registry,
            buckets=SCALE,
        )
        self.scale_step: Callable[[str], Histogram] = lambda step: scale.labels(model, step)

    def watch(self, cluster: Cluster, held: Callable[[], int]) -> None:
        """Read gauges from this cluster at every scrape; `held` counts tasks that wait for a TE."""
        self.registry.register(TableCollector(self.model, cluster, held))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class TokenTally:
    """What every token counts in: plain numbers, made into metrics when somebody scrapes. The client library's own take a lock
    and walk all buckets for each value."""

    def __init__(self, model: str):
        self.model = model
        self.generated = 0
        self.gaps = [0] * (len(TOKEN) + 1)  # seconds between two tokens of a sequence: how many up to each bound, and beyond
        self.gaps_sum = 0.0

    def observe(self, gap: float, count: int) -> None:
        """`count` tokens came `gap` seconds after the one before: a step's tokens have mostly one gap in common."""
        self.gaps[bisect_left(TOKEN, gap)] += count
        self.gaps_sum += gap * count

    def collect(self) -> Iterable[Metric]:
        label, values = ("model_name",), (self.model,)
        generated = CounterMetricFamily("deepserve:generation_tokens", "Tokens generated", labels=label)
        generated.add_metric(values, self.generated)
        yield generated
        gaps = HistogramMetricFamily("deepserve:inter_token_latency_seconds", "Between two tokens of a sequence", labels=label)
        names = [*map(str, TOKEN), "+Inf"]
        gaps.add_metric(values, list(zip(names, accumulate(self.gaps), strict=True)), self.gaps_sum)
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


class TableCollector:
    """Gauges and counters that the TEs themselves report."""

    def __init__(self, model: str, cluster: Cluster, held: Callable[[], int]):
        self.model = model
        self.cluster = cluster
        self.held = held

    def collect(self) -> Iterable[Metric | HistogramMetricFamily]:
        tes = list(self.cluster.table.values())
        names = ("model_name", "worker", "role")

        def family(
            kind: type[GaugeMetricFamily] | type[CounterMetricFamily], stem: str, text: str, read: Callable[..., float]
        ) -> Metric:
            made = kind(f"deepserve:{stem}", text, labels=names)
            for te in tes:
                made.add_metric((self.model, str(te.id), te.role), read(te))
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
        plain = (
            (gauge, "num_requests_held", "Tasks waiting for a TE", float(self.held())),
            (count, "te_restarts", "TEs brought up again after a death", float(self.cluster.restarts)),
            (count, "keeper_starts", "Keeper processes started", float(self.cluster.keeper_starts)),
        )
        for kind, stem, text, value in plain:
            made = kind(f"deepserve:{stem}", text, labels=("model_name",))
            made.add_metric((self.model,), value)
            yield made
