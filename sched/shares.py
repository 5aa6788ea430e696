"""How semi-PD divides a device between its two workers: the SLO-aware controller of the semi-PD paper (section 3.4 there), pure.

A pair of shares (x, y), in percent of the device, belongs to the prefill and to the decode worker. Their sum may exceed 100: then
the two compete, and each has its part of the sum. At the end of a window the latencies seen are set against what is promised.
Where exactly one of the two fails, its share is raised, by steps, as far as the latency model wants:

    TTFT = a1 / (x - lambda) + b1     prefills queue (M/M/1); lambda is the share that arrivals alone take up
    TPOT = a2 / y + b2                decode steps don't queue

Where both fail nothing can be given to one without taking it from the other, where both hold nothing need be: both times the
shares stay. (The paper's listing would act when both fail; its prose says this.) The model is fitted anew over the last windows
each time. Shares are whole percents, times are seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import msgspec

LEAST = 10  # percent: below, a worker hardly gets through one step in a window, and the fit has nothing to go by
WHOLE = 100
QUEUE_STEPS = 64  # values of lambda that the fit tries
BETTER = 0.999  # a lambda is taken for a larger one only where that leaves less than this of the error: two shares fit many


class Shares(msgspec.Struct, frozen=True):
    """Of the prefill and of the decode worker, each `LEAST` to 100 percent."""

    prefill: int
    decode: int

    @property
    def effective(self) -> tuple[float, float]:
        """What each has when both are busy."""
        over = max(WHOLE, self.prefill + self.decode)
        return WHOLE * self.prefill / over, WHOLE * self.decode / over


class Promise(msgspec.Struct, frozen=True):
    """The SLOs: seconds that `percentile` percent of requests (TTFT) and of tokens (TPOT) may take at most."""

    ttft: float
    tpot: float
    percentile: float = 90.0


class Rules(msgspec.Struct, frozen=True):
    """How fast the controller may go."""

    step: int = 10  # percent
    most_steps: int = 3  # in one window
    windows: int = 8  # the model is fitted over; the load of older ones is another load
    window: int = 64  # steps of the two workers together: enough gaps between tokens for a percentile of them


RULES = Rules()


class Window(msgspec.Struct, frozen=True):
    """What one window showed, at the promise's percentile. None: nothing was seen of it."""

    shares: Shares
    ttft: float | None
    tpot: float | None


class State(msgspec.Struct, frozen=True):
    shares: Shares
    windows: tuple[Window, ...] = ()  # the newest last


class Decision(msgspec.Struct, frozen=True):
    state: State  # with the shares from now on
    changed: bool
    reason: str


class Latency(msgspec.Struct, frozen=True):
    """Seconds as a function of an effective share: a / (share - queue) + b. No parameter is negative, and `queue` is less
    than every share it was fitted to."""

    a: float
    b: float
    queue: float = 0.0

    def at(self, share: float) -> float:
        return self.a / (share - self.queue) + self.b if share > self.queue else math.inf


# ---- what a window showed -------------------------------------------------------------------------------------------


def observe(shares: Shares, promise: Promise, ttft: Sequence[float], waiting: Sequence[float], tpot: Sequence[float]) -> Window:
    """A window from what was measured in it: seconds to each first token, seconds that each request without one has waited, and
    seconds between tokens. Who waits longer than promised counts with that: were it left out, a prefill worker that gets nothing
    done would look as if nobody asked."""
    late = [age for age in waiting if age > promise.ttft]
    return Window(shares, percentile([*ttft, *late], promise.percentile), percentile(tpot, promise.percentile))


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that `percent` percent of `values` don't exceed; None where there are none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] if ordered else None


# ---- the latency model ----------------------------------------------------------------------------------------------


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """(a, b, squared error) of a * u + b nearest to the points (u, time), a and b not negative; u > 0. Where all u are the same,
    all of the time is put down to `a`: what can't be told apart is what more of the device is hoped to help."""
    count = len(points)
    mean_u, mean_t = sum(u for u, _ in points) / count, sum(t for _, t in points) / count
    spread = sum((u - mean_u) ** 2 for u, _ in points)
    through_zero = sum(u * t for u, t in points) / sum(u * u for u, _ in points)
    slope = sum((u - mean_u) * (t - mean_t) for u, t in points) / spread if spread > 1e-12 * mean_u**2 else through_zero
    lines = [(slope, mean_t - slope * mean_u), (through_zero, 0.0), (0.0, mean_t)]
    fits = [
        (sum((a * u + b - t) ** 2 for u, t in points), n) for n, (a, b) in enumerate(lines) if a >= 0 and b >= -1e-12 * mean_t
    ]
    error, n = min(fits)
    return lines[n][0], max(0.0, lines[n][1]), error


def fit_tpot(points: Sequence[tuple[float, float]]) -> Latency:
    """The decode model nearest to points (effective share, seconds), of which there is at least one."""
    a, b, _ = fit_line([(1 / share, t) for share, t in points])
    return Latency(a, b)


def fit_ttft(points: Sequence[tuple[float, float]]) -> Latency:
    """The prefill model nearest to points (effective share, seconds), of which there is at least one. Of several that are as
    near, the one with the shortest queue."""
    least = min(share for share, _ in points)
    best, best_error = Latency(0.0, 0.0), math.inf
    for n in range(QUEUE_STEPS):
        queue = least * n / QUEUE_STEPS
        a, b, error = fit_line([(1 / (share - queue), t) for share, t in points])
        if error < BETTER * best_error:
            best, best_error = Latency(a, b, queue), error
    return best


# ---- the algorithm --------------------------------------------------------------------------------------------------


def adjust(state: State, window: Window, promise: Promise, rules: Rules = RULES) -> Decision:
    """What the shares are from now on, `window` having just ended."""
    windows = (*state.windows, window)[-rules.windows :]
    now = state.shares

    def hold(reason: str) -> Decision:
        return Decision(State(now, windows), False, f"hold {show(now)}: {reason}")

    ttft_fails = window.ttft is not None and window.ttft > promise.ttft
    tpot_fails = window.tpot is not None and window.tpot > promise.tpot
    if window.ttft is None and window.tpot is None:
        return hold("nothing was seen in the window")
    if ttft_fails and tpot_fails:
        return hold(f"both fail, TTFT {seconds(window.ttft, promise.ttft)} and TPOT {seconds(window.tpot, promise.tpot)}")
    if not ttft_fails and not tpot_fails:
        return hold("both hold")
    if ttft_fails:
        seen = [(w.shares.effective[0], w.ttft) for w in windows if w.ttft is not None]
        shares, steps, expected = climb(now, fit_ttft(seen), 0, promise.ttft, rules)
        why = f"TTFT {seconds(window.ttft, promise.ttft)}"
    else:
        seen = [(w.shares.effective[1], w.tpot) for w in windows if w.tpot is not None]
        shares, steps, expected = climb(now, fit_tpot(seen), 1, promise.tpot, rules)
        why = f"TPOT {seconds(window.tpot, promise.tpot)}"
    if not steps:
        return hold(f"{why}, and the other share is at its least")
    return Decision(State(shares, windows), True, f"{show(now)} to {show(shares)}: {why}; {expected:.3g} s expected")


def climb(shares: Shares, model: Latency, which: int, promised: float, rules: Rules) -> tuple[Shares, int, float]:
    """Raise the share of worker `which` (0: prefill) until the model expects what was promised: (shares, steps, seconds that it
    expects). The first step needs no model: what was seen outranks what is expected."""
    steps = 0
    while steps < rules.most_steps and (steps == 0 or model.at(shares.effective[which]) > promised):
        raised = step_up(shares, which, rules.step)
        if raised == shares:
            break
        shares, steps = raised, steps + 1
    return shares, steps, model.at(shares.effective[which])


def step_up(shares: Shares, which: int, step: int) -> Shares:
    """One step more for worker `which`; where its share would pass 100, one less for the other, down to `LEAST`."""
    pair = [shares.prefill, shares.decode]
    if pair[which] + step <= WHOLE:
        pair[which] += step
    else:
        pair[1 - which] = max(LEAST, pair[1 - which] - step)
    return Shares(*pair)


def show(shares: Shares) -> str:
    return f"({shares.prefill}, {shares.decode})"


def seconds(seen: float | None, promised: float) -> str:
    return f"{seen:.3g} s instead of {promised:.3g} s"


# ---- one pair of workers ----------------------------------------------------------------------------------------------


class Controller:
    """The shares of one pair of workers: gathers what a window shows and adjusts them at its end."""

    def __init__(self, promise: Promise, shares: Shares, rules: Rules = RULES):
        self.promise = promise
        self.rules = rules
        self.state = State(shares)
        self.begin()

    def begin(self) -> None:
        self.ttft: list[float] = []
        self.tpot: list[float] = []
        self.steps = 0

    @property
    def shares(self) -> Shares:
        return self.state.shares

    def first_token(self, seconds: float) -> None:
        """A request has its first token, so long after it came."""
        self.ttft.append(seconds)

    def tokens(self, gaps: Iterable[float]) -> None:
        """Sequences have a token more, so long after the one before."""
        self.tpot.extend(gaps)

    def step(self, waiting: Callable[[], Sequence[float]]) -> Decision | None:
        """One of the workers has finished a step. At the end of a window, what is decided; `waiting` is asked then: how long each
        request without a first token has waited."""
        self.steps += 1
        if self.steps < self.rules.window:
            return None
        window = observe(self.shares, self.promise, self.ttft, waiting(), self.tpot)
        decision = adjust(self.state, window, self.promise, self.rules)
        self.state = decision.state
        self.begin()
        return decision
