"""Limits of a key, full queues, promises that can't be kept; and the files that keys are read from."""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

import pytest

from engine.types import UserError
from sched.admission import (
    FIRST_GUESS,
    LATEST,
    SOONEST,
    Bucket,
    Claim,
    Quota,
    Refusal,
    Targets,
    out_of_reach,
    queue_is_full,
    retry_after,
)
from sched.tenants import ANYONE, Tenant, plain, read, together

# ---- the queue ------------------------------------------------------------------------------------------------------


def test_a_full_queue() -> None:
    assert not queue_is_full(0, 10_000, 1, 8, 0), "an idle server takes any one request"
    assert not queue_is_full(11, 1, 1, 8, 4) and queue_is_full(12, 1, 1, 8, 4) and not queue_is_full(12, 1, 2, 8, 4)


def test_retry_after_goes_by_the_rate() -> None:
    assert retry_after(20, 2.0) == 10.0 and retry_after(0, 2.0) == SOONEST and retry_after(10**6, 2.0) == LATEST
    assert SOONEST <= retry_after(20, 0.0) <= LATEST


# ---- a key's limits -------------------------------------------------------------------------------------------------


def test_a_bucket_by_hand() -> None:
    bucket = Bucket(60, 100.0)
    assert bucket.left(100.0) == 60 and bucket.wait(60, 100.0) == 0 and math.isinf(bucket.wait(61, 100.0))
    bucket.take(60, 100.0)
    assert bucket.left(100.0) == 0 and bucket.wait(1, 100.0) == pytest.approx(1.0) and bucket.until_full(100.0) == 60
    assert bucket.left(110.5) == 10 and bucket.left(110.5) == 10 and bucket.left(1000.0) == 60
    bucket.take(90, 1000.0)
    assert bucket.left(1000.0) == 0 and bucket.wait(1, 1000.0) == pytest.approx(31.0), "what is owed comes back first"
    bucket.take(-200, 1000.0)
    assert bucket.left(1000.0) == 60 and bucket.left(999.0) == 60, "never more than there is, nor by going back in time"


@pytest.mark.parametrize("seed", range(5))
def test_a_bucket_lets_no_more_through_than_it_says(seed: int) -> None:
    rng = Random(seed)
    size, now, taken, lent = rng.choice([3, 60, 10_000]), 0.0, 0.0, 0.0
    bucket = Bucket(size, now)
    for _ in range(2000):
        now += rng.expovariate(1 / rng.choice([0.01, 1.0, 30.0]))
        units = rng.randint(1, max(1, size // 3))
        wait = bucket.wait(units, now)
        assert wait >= 0 and bucket.left(now) >= 0
        if wait == 0:
            assert bucket.left(now) >= units
            bucket.take(units, now)
            taken += units
        elif rng.random() < 0.3:  # who waits as long as told gets it
            now += wait
            assert bucket.wait(units, now) == 0
        if rng.random() < 0.1:
            late = rng.randint(0, max(1, size // 10))
            bucket.take(late, now)
            taken += late
            lent += late
        assert taken <= size + now * size / 60 + lent + 1e-3 and bucket.level <= size


def test_a_key_without_limits_takes_anything() -> None:
    quota = Quota(None, None, 0.0)
    assert all(isinstance(quota.claim(10**6, None, 4, 0.0), Claim) for _ in range(100))


def test_requests_a_minute() -> None:
    quota = Quota(2, None, 0.0)
    assert isinstance(quota.claim(5, 1, 1, 0.0), Claim) and isinstance(quota.claim(5, 1, 1, 0.0), Claim)
    refused = quota.claim(5, 1, 1, 0.0)
    assert isinstance(refused, Refusal) and refused.cause == "rpm" and refused.retry_after == pytest.approx(30.0)
    assert "2 requests a minute" in refused.message
    assert isinstance(quota.claim(5, 1, 1, 30.0), Claim)


def test_tokens_a_minute_are_taken_ahead_and_settled() -> None:
    quota = Quota(None, 1000, 0.0)
    assert quota.tokens is not None
    claim = quota.claim(200, 300, 2, 0.0)
    assert claim == Claim(200, 2 * int(FIRST_GUESS)) and quota.tokens.left(0.0) == 800 - 2 * FIRST_GUESS
    quota.settle(claim, 100, 2, 0.0)
    assert quota.tokens.left(0.0) == 700 and quota.usual < FIRST_GUESS
    refused = quota.claim(600, 300, 1, 0.0)
    assert isinstance(refused, Refusal) and refused.cause == "tpm" and 0 < refused.retry_after < 60
    assert quota.tokens.left(0.0) == 700, "what is refused takes nothing"
    assert isinstance(quota.claim(600, 300, 1, refused.retry_after), Claim)


def test_what_never_fits_is_not_told_to_wait() -> None:
    quota = Quota(None, 1000, 0.0)
    refused = quota.claim(1001, 1, 1, 0.0)
    assert isinstance(refused, Refusal) and refused.cause == "tpm_never" and math.isinf(refused.retry_after)
    assert isinstance(quota.claim(999, 4096, 1, 0.0), Claim), "a long answer may be owed"


def test_what_was_not_served_is_given_back() -> None:
    quota = Quota(1, 1000, 0.0)
    claim = quota.claim(100, 100, 1, 0.0)
    assert isinstance(claim, Claim) and claim.tokens == 200
    quota.undo(claim, 0.0)
    assert quota.claim(100, 100, 1, 0.0) == claim


@pytest.mark.parametrize("seed", range(5))
def test_no_negative_quota(seed: int) -> None:
    """Random requests, answers longer and shorter than thought: what is left is never less than none nor more than the limit,
    and in the long run no more goes through than the limit and what was under way."""
    rng = Random(seed)
    rpm, tpm = rng.choice([5, 100]), rng.choice([500, 20_000])
    quota, now, live, served, requests = Quota(rpm, tpm, 0.0), 0.0, [], 0, 0
    assert quota.requests is not None and quota.tokens is not None
    beyond = 0  # of what was claimed
    for _ in range(3000):
        now += rng.expovariate(2.0)
        found = quota.claim(rng.randint(1, tpm // 5), rng.choice([None, 50, 1000]), rng.choice([1, 1, 2]), now)
        if isinstance(found, Claim):
            live.append(found)
            requests += 1
        elif rng.random() < 0.2:
            assert found.retry_after > 0
        while live and rng.random() < 0.6:
            claim = live.pop(rng.randrange(len(live)))
            if rng.random() < 0.1:
                quota.undo(claim, now)
                requests -= 1
                continue
            output = rng.randint(0, 600)
            quota.settle(claim, output, 1, now)
            served += claim.prompt + output
            beyond += max(0, output - claim.output)
        assert 0 <= quota.requests.left(now) <= rpm and 0 <= quota.tokens.left(now) <= tpm
        assert served <= tpm + now * tpm / 60 + 600 * 5000 / 60 + beyond
        assert requests <= rpm + now * rpm / 60 + 1


# ---- promises -------------------------------------------------------------------------------------------------------


def test_promises_that_can_be_kept() -> None:
    assert out_of_reach(Targets(), 1e9, 1e9) is None
    assert out_of_reach(Targets(500, 50, 1000), 500, 50) is None


def test_promises_that_cannot() -> None:
    late = out_of_reach(Targets(ttft_ms=500), 3500, 10)
    assert late is not None and late.cause == "ttft" and late.retry_after == 3.0 and "3500 ms" in late.message
    slow = out_of_reach(Targets(tpot_ms=50), 100, 100, running=40, finished_per_second=2.0)
    assert slow is not None and slow.cause == "tpot" and slow.retry_after == 10.0, "half of them must have ended"
    dead = out_of_reach(Targets(ttft_ms=500, left_ms=2000), 2500, 10)
    assert dead is not None and dead.cause == "deadline"
    assert out_of_reach(Targets(left_ms=-5.0), 0.0, 0.0) is not None, "it has passed already"


@pytest.mark.parametrize("seed", range(3))
def test_more_load_is_never_better(seed: int) -> None:
    rng = Random(seed)

    def target(most: float) -> float | None:
        return rng.choice([None, rng.uniform(1, most)])

    for _ in range(3000):
        outstanding, new, te, seqs, queued = (rng.randint(0, 20) for _ in range(5))
        assert queue_is_full(outstanding, new, te, seqs, queued) <= queue_is_full(
            outstanding + rng.randint(0, 3), new + rng.randint(0, 3), te, seqs, queued
        )
        rate = rng.choice([0.0, rng.uniform(0.01, 10)])
        assert retry_after(outstanding, rate) <= retry_after(outstanding + 5, rate)
        targets = Targets(target(5000), target(500), target(5000))
        ttft, tpot, running = rng.uniform(1, 9000), rng.uniform(1, 900), rng.randint(0, 64)
        now, later = (out_of_reach(targets, ttft * more, tpot * more, running, rate) for more in (1.0, 1.0 + rng.random()))
        if now is not None:
            assert later is not None
            if later.cause == now.cause:
                assert SOONEST <= now.retry_after <= later.retry_after <= LATEST


# ---- keys -----------------------------------------------------------------------------------------------------------


def written(folder: Path, text: str) -> Path:
    file = folder / "keys.toml"
    file.write_text(text)
    return file


def test_a_file_of_keys(tmp_path: Path) -> None:
    text = """
    [keys.alice]
    key = "sk-alice"
    weight = 2
    priority = -1
    rpm = 60
    tpm = 9000
    slo-ttft-ms = 500
    slo_tpot_ms = 50.5
    [keys."b o b"]
    key = " sk-böb "
    """
    alice, bob = read(written(tmp_path, text))
    assert alice.secret == b"sk-alice" and bob.secret == "sk-böb".encode() and alice.salt != bob.salt
    assert alice.tenant == Tenant(name="alice", weight=2.0, priority=-1, rpm=60, tpm=9000, slo_ttft_ms=500.0, slo_tpot_ms=50.5)
    assert bob.tenant == Tenant(name="b o b")
    every = together(plain(["one", "two", "one"]), [alice, bob])
    assert [key.tenant.name for key in every] == ["api-key-1", "api-key-2", "alice", "b o b"] and ANYONE.name == ""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("keys = [", "not TOML"),
        ("", "there is no key in it"),
        ("rpm = 4", "'rpm' is no table of keys"),
        ("[keys]", "there is no key in it"),
        ("[keys.a]\nrpm = 5", "missing required field `key`"),
        ("[keys.a]\nkey = ''", "[keys.a] key: "),
        ("[keys.a]\nkey = '  '", "[keys.a] key: it is blank"),
        ("[keys.a]\nkey = 'secret'\nrpm = 0", "[keys.a] rpm: "),
        ("[keys.a]\nkey = 'secret'\nweight = 0", "[keys.a] weight: "),
        ("[keys.a]\nkey = 'secret'\nslo-ttft-ms = -1", "[keys.a] slo-ttft-ms: "),
        ("[keys.a]\nkey = 'secret'\nrpn = 1", "unknown field `rpn`"),
        ("keys.a = 'secret'", "[keys.a]: Expected `object`"),
    ],
)
def test_a_wrong_file_is_refused_by_name(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        read(written(tmp_path, text))
    message = str(caught.value)
    assert says in message and "--api-keys-file" in message and "secret" not in message
    assert caught.value.param == "api_keys_file"


def test_keys_that_clash(tmp_path: Path) -> None:
    keys = read(written(tmp_path, "[keys.a]\nkey = 'secret'\n[keys.api-key-1]\nkey = 'other'"))
    with pytest.raises(UserError, match=r"\[keys.a\]: it has the key of api-key-1"):
        together(plain(["secret"]), keys[:1])
    with pytest.raises(UserError, match=r"\[keys.api-key-1\]: a key of --api-key has that name"):
        together(plain(["more"]), keys)
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "none.toml")
