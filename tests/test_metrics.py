"""What a scrape reads: many models in one registry, each family once, and the TEs under their own model's name."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

from engine.types import Load
from scale.ladder import STEPS, Climb
from sched.metrics import Families, Metrics
from tests.fake import FakeCluster, FakeDeployment


def test_models_share_the_families():
    families = Families()
    a, b = Metrics(families, "a"), Metrics(families, "b")
    a.success.labels("a", "stop").inc(3)
    b.tokens.observe(0.01, 2)
    b.tokens.generated += 2
    a.first_token.observe(0.3)
    lines = families.text().decode().splitlines()
    headers = [line for line in lines if line.startswith("# TYPE")]
    assert len(headers) == len(set(headers))
    value = families.registry.get_sample_value
    assert value("deepserve:request_success_total", {"model_name": "a", "finished_reason": "stop"}) == 3
    assert [value("deepserve:generation_tokens_total", {"model_name": m}) for m in "ab"] == [0, 2]
    assert [value("deepserve:time_to_first_token_seconds_count", {"model_name": m}) for m in "ab"] == [1, 0]
    assert Metrics(families, "b").tokens is b.tokens


def test_a_climb_is_counted_by_its_ways():
    families = Families()
    metrics = Metrics(families, "a")
    for path, seconds in (("disk", 2.0), ("fork", 0.02), ("fork", 0.03)):
        metrics.climbed(Climb(0, 0.0, dict.fromkeys(STEPS, seconds), "a", how="warm", path=path))
    value = families.registry.get_sample_value
    named = {"model_name": "a", "step": "te_load", "how": "warm", "path": "fork"}
    assert value("deepserve:scale_step_seconds_count", named) == 2
    assert value("deepserve:scale_step_seconds_bucket", named | {"le": "0.01"}) == 0
    assert value("deepserve:scale_step_seconds_bucket", named | {"le": "0.05"}) == 2
    assert value("deepserve:weight_loads_total", {"model_name": "a", "path": "disk"}) == 1
    assert value("deepserve:weight_loads_total", {"model_name": "a", "path": "fork"}) == 2


def test_gauges_of_tes_and_models():
    families, cluster = Families(), FakeCluster()
    cluster.table = {
        number: SimpleNamespace(
            id=number, model=model, role=role, state="ready", share=100, load=Load(running=number, blocks_used=1, blocks_total=4)
        )
        for number, model, role in ((0, "a", "prefill"), (1, "a", "decode"), (2, "b", "colocated"))
    }
    cluster.packed = {"a:bf16": 100, "b:int8": 20}
    cluster.pool_size, cluster.restarts = 3, 2
    a = FakeDeployment("a", "ready", {"prefill": 1, "decode": 2}, 0, Counter({("decode", "up"): 4}))
    b = FakeDeployment("b", "asleep", {}, 5, Counter())
    families.watch(cluster, [a, b])
    families.text()
    value = families.registry.get_sample_value
    running = [("a", "0", "prefill"), ("a", "1", "decode"), ("b", "2", "colocated")]
    names = ("model_name", "worker", "role")
    assert [value("deepserve:num_requests_running", dict(zip(names, r, strict=True))) for r in running] == [0, 1, 2]
    assert value("deepserve:te_wanted", {"model_name": "a", "role": "decode"}) == 2
    assert value("deepserve:scale_decisions_total", {"model_name": "a", "role": "decode", "direction": "up"}) == 4
    assert [value("deepserve:num_requests_held", {"model_name": m}) for m in "ab"] == [0, 5]
    states = ("off", "loading", "ready", "asleep", "failed")
    assert [value("deepserve:model_state", {"model_name": "b", "state": s}) for s in states] == [0, 0, 0, 1, 0]
    assert value("deepserve:engine_sleep_state", {"model_name": "b", "sleep_state": "weights_offloaded"}) == 1
    assert value("deepserve:engine_sleep_state", {"model_name": "a", "sleep_state": "awake"}) == 1
    assert value("deepserve:weights_dram_bytes") == 120 and value("deepserve:warm_processes") == 3
    assert value("deepserve:te_restarts_total") == 2 and value("deepserve:keeper_starts_total") == 1
