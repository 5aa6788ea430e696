"""What a caller may take, and what a request asks of time: its key's account, the headers of both, and the submission between.

X-Request-Timeout   seconds, from the arrival of the request's headers; then it ends everywhere and is answered 504
X-SLO-TTFT-MS, X-SLO-TPOT-MS   what this request wants, instead of what its key or the server promises (llm-d's names)
X-SLO-Action        `reject`: answer 429 at once where the targets or the deadline can't be met; `serve` (default): try
X-Explain           `placement`: the reply's header X-Placement says which TEs were chosen for it, and why
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Callable

import msgspec
from aiohttp import web
from multidict import CIMultiDictProxy

from sched.admission import Bucket, Quota, Refusal
from sched.gateway.errors import Problem
from sched.gateway.keys import SERVICE
from sched.stream import Expired, Overloaded, Stream, Submission, Unavailable
from sched.tenants import ANYONE, Key, Tenant

LONGEST = 86400.0  # seconds of a request: nobody waits for more than a day
TIMEOUT, TTFT, TPOT, ACTION = "X-Request-Timeout", "X-SLO-TTFT-MS", "X-SLO-TPOT-MS", "X-SLO-Action"
MOST_REASONS = 8  # of a request's prompts: headers are to stay short; GET /v1/jobs/{id} has all of them
EXPLAIN, PLACEMENT = "X-Explain", "X-Placement"


class Account:
    """One key's, or everybody's where there are no keys."""

    def __init__(self, key: Key | None, clock: Callable[[], float]):
        self.salt = b"" if key is None else key.salt
        self.tenant: Tenant = ANYONE if key is None else key.tenant
        self.clock = clock
        self.quota = Quota(self.tenant.rpm, self.tenant.tpm, clock())

    def headers(self) -> dict[str, str]:
        """OpenAI's, of those limits that the key has."""
        now, found = self.clock(), {}
        for name, bucket in (("requests", self.quota.requests), ("tokens", self.quota.tokens)):
            if bucket is not None:
                found[f"x-ratelimit-limit-{name}"] = f"{bucket.size:g}"
                found[f"x-ratelimit-remaining-{name}"] = str(bucket.left(now))
                found[f"x-ratelimit-reset-{name}"] = reset(bucket, now)
        return found


def reset(bucket: Bucket, now: float) -> str:
    """When everything is there again, as OpenAI writes it: 1m30s, 2.5s, 20ms."""
    seconds = bucket.until_full(now)
    if seconds < 1:
        return f"{math.ceil(seconds * 1e3)}ms"
    minutes, rest = divmod(math.ceil(seconds * 10) / 10, 60)
    return f"{minutes:.0f}m{rest:g}s" if minutes else f"{rest:.1f}s"


class Terms(msgspec.Struct, frozen=True):
    """What the headers of a request say."""

    timeout: float | None = None  # seconds
    began: float = 0.0  # CLOCK_MONOTONIC seconds
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    reject: bool = False
    explain: bool = False

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return math.inf if self.timeout is None else self.began + self.timeout - time.monotonic()


def terms(headers: CIMultiDictProxy[str]) -> Terms:
    """Raises `Problem` naming the header."""
    action = headers.get(ACTION, "serve").strip().lower()
    if action not in ("serve", "reject"):
        raise Problem(f"{ACTION}: {action[:50]!r} is not understood; send reject, or leave it out", ACTION)
    explain = headers.get(EXPLAIN)
    if explain is not None and explain.strip().lower() != "placement":
        raise Problem(f"{EXPLAIN}: {explain[:50]!r} is not understood; send placement, or leave it out", EXPLAIN)
    return Terms(
        explain=explain is not None,
        timeout=number(headers, TIMEOUT, "seconds", LONGEST),
        began=time.monotonic(),
        ttft_ms=number(headers, TTFT, "milliseconds", LONGEST * 1e3),
        tpot_ms=number(headers, TPOT, "milliseconds", LONGEST * 1e3),
        reject=action == "reject",
    )


def number(headers: CIMultiDictProxy[str], name: str, unit: str, most: float) -> float | None:
    given = headers.get(name)
    if given is None:
        return None
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not 0 < value <= most:
        raise Problem(f"{name}: {given[:50]!r} must be a number of {unit} above 0, up to {most:g}; send for example 30", name)
    return value


ACCOUNT = web.RequestKey("account", Account)
TERMS = web.RequestKey("terms", Terms)
LIMIT = web.RequestKey("limit", asyncio.Timeout)  # ends the handler at the deadline, until there is a stream that does


def placement(request: web.Request, submission: Submission) -> dict[str, str]:
    """The header that says where a submission's tasks were put, and why, if its caller asked."""
    if not request[TERMS].explain:
        return {}
    job = request.app[SERVICE].job(submission.id) or {"jobs": []}
    reasons = [task["reason"] for one in job["jobs"] for task in one["tasks"][:1]]  # both tasks of a pair have the same one
    said = [reason or "held: no TE takes it yet" for reason in reasons[:MOST_REASONS]]
    return {PLACEMENT: " | ".join(said) + (f" | and {more} more" if (more := len(reasons) - MOST_REASONS) > 0 else "")}


def expired(terms: Terms, tokens: int = 0) -> Expired:
    so_far = f"{tokens} tokens of the answer were there" if tokens else "there was no token of an answer yet"
    return Expired(f"{TIMEOUT}: {terms.timeout:g} s have passed, and {so_far}; allow more, or ask for fewer tokens")


@contextlib.asynccontextmanager
async def submitted(request: web.Request, submission: Submission) -> AsyncIterator[Stream]:
    """The submission's stream, within its key's limits and its deadline, which the stream ends with `Expired`.

    Raises `Problem`, `Overloaded`, and what the service does."""
    service, account, asked = request.app[SERVICE], request[ACCOUNT], request[TERMS]
    submission.tenant = account.tenant
    submission.slo_ttft_ms = asked.ttft_ms or account.tenant.slo_ttft_ms
    submission.slo_tpot_ms = asked.tpot_ms or account.tenant.slo_tpot_ms
    submission.reject_late = asked.reject
    submission.deadline = asked.began + asked.timeout if asked.timeout is not None else 0.0
    quota, clock = account.quota, account.clock
    choices = len(submission.prompts) * submission.params.n
    claim = quota.claim(sum(map(len, submission.prompts)), submission.params.max_tokens, choices, clock())
    if isinstance(claim, Refusal):
        service.refused(submission.model, claim.cause)
        if math.isinf(claim.retry_after):
            raise Problem(claim.message, status=413, code="tokens_exceed_limit")
        raise Overloaded(claim.message, claim.retry_after, claim.cause)
    stream: Stream | None = None
    try:
        async with service.submit(submission) as stream:
            request[LIMIT].reschedule(None)  # from here on the stream ends, and no handler is interrupted while it writes
            with ends_in_time(stream, asked):
                yield stream
    finally:
        if stream is None or (isinstance(stream.error, Unavailable) and not stream.generated):  # it never ran
            quota.undo(claim, clock())
        else:
            quota.settle(claim, stream.generated, choices, clock())


@contextlib.contextmanager
def ends_in_time(stream: Stream, terms: Terms):  # type: ignore[no-untyped-def]  # a generator
    """Fail the stream at its deadline."""
    if terms.timeout is None:
        yield
        return

    def fail() -> None:
        if stream.open:
            stream.fail(expired(terms, stream.generated))

    timer = asyncio.get_running_loop().call_later(max(0.0, terms.left), fail)
    try:
        yield
    finally:
        timer.cancel()
