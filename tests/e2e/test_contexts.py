"""Tiers and explicit contexts over HTTP: what one API key stored is nobody else's, in any tier."""

from __future__ import annotations

import os
import re
import signal
from typing import Any

import pytest

from tests import tiny
from tests.e2e.test_tiers import BLOCK, SHAPE, STORIES
from tests.server import Server, wait_until

FLAGS = ("--max-model-len", "512", "--kv-cache-memory-bytes", str(64 * BLOCK), "--max-num-seqs", "4")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    model = tiny.make(tmp_path_factory.mktemp("models") / "tiny", **SHAPE)
    folder = tmp_path_factory.mktemp("kv")
    flags = (*FLAGS, "--kv-dram-bytes", str(88 * BLOCK), "--kv-ssd-dir", folder, "--api-key", "one", "two")
    with Server(model, *flags) as running:
        yield running.ready()


def details(server: Server, key: str, prompt: str, **more: Any) -> tuple[str, dict[str, int]]:
    body = {"prompt": prompt, "max_tokens": 6, "temperature": 0, "ignore_eos": True, **more}
    status, reply = server.post("/v1/completions", body, key)
    assert status == 200, reply
    found = reply["usage"]["prompt_tokens_details"]
    assert found["cached_tokens"] == sum(v for k, v in found.items() if k != "cached_tokens")
    return reply["choices"][0]["text"], found


def metric(server: Server, name: str) -> float:
    return sum(float(value) for value in re.findall(rf"^deepserve:{name}\{{.*\}} (\S+)$", server.get("/metrics")[1], re.M))


def test_no_key_finds_or_learns_of_what_another_stored(server):
    """In every tier: the device's, DRAM, SSD. Not by a match, not by usage, not by what a context's id answers."""
    texts = [details(server, "one", story)[0] for story in STORIES]
    assert details(server, "one", STORIES[-1])[1]["cached_tokens_device"] > 0
    where = dict.fromkeys(("device", "dram", "ssd"), 0)
    for number in [7, 6, 5, 4, 3, 2, 1, 0, 1, 2, 3, 4, 5, 6, 7, 6]:  # the next is among the oldest, or among the newest
        again, found = details(server, "one", STORIES[number])
        assert again == texts[number]
        for tier in where:
            where[tier] += found[f"cached_tokens_{tier}"]
    assert where["dram"] and where["ssd"], where
    hits = [metric(server, name) for name in ("prefix_cache_hits_total", "kv_populates_total", "kv_blocks_recomputed_total")]
    for story, text in zip(STORIES, texts, strict=True):
        again, found = details(server, "two", story)
        assert again == text and not any(found.values())
    after = [metric(server, name) for name in ("prefix_cache_hits_total", "kv_populates_total", "kv_blocks_recomputed_total")]
    assert after == hits, "nothing of the other key's was matched, loaded or even weighed"
    assert details(server, "two", STORIES[-1])[1]["cached_tokens_device"] > 0


def test_a_context_by_its_id_from_any_tier_and_for_its_key_alone(server):
    document = "All there is to know of mills. " * 9
    status, made = server.post("/v1/contexts", {"prompt": document, "ttl": 600}, "one")
    assert status == 201 and made["tokens"] == len(document)
    whole, _ = details(server, "one", document + " And so")
    text, found = details(server, "one", " And so", context_id=made["id"])
    assert text == whole and found["cached_tokens_device"] >= len(document) // 16 * 16
    for story in STORIES * 2:
        details(server, "one", story, max_tokens=1)
    text, found = details(server, "one", " And so", context_id=made["id"])
    assert text == whole and found["cached_tokens"] > 0
    assert server.post("/v1/completions", {"prompt": " And so", "context_id": made["id"]}, "two")[0] == 404
    assert server.get("/v1/contexts", "two")[1]["data"] == []
    (te,) = server.tes("one")
    os.kill(te["pid"], signal.SIGKILL)
    text, _ = details(server, "one", " And so", context_id=made["id"])
    assert text == whole, "lost and computed again, or found in a slower tier"
    wait_until("the TE is back", lambda: server.get("/health")[0] == 200)
