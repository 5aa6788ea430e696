"""Where a task runs: pure functions of (task, TE snapshots) that give a reason with the choice."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from engine.config import Role


class Snapshot(msgspec.Struct, frozen=True):
    """What the scheduler knows of a TE that takes tasks."""

    te: int
    sequences: int  # given to it and not ended
    prompt_tokens: int  # of these, prompt tokens of sequences without a first token
    role: Role = "colocated"
    lender: int = -1  # of the prefill worker of a semi pair: the decode worker
    cached: int = 0  # tokens of the task's own prompt whose KV it is known to have


class Choice(msgspec.Struct, frozen=True):
    """`prefill` computes the prompt, `decode` the rest: one TE, or two."""

    prefill: int
    decode: int
    reason: str


# A queued prompt token weighs as much as this part of a running sequence: one sequence costs a token a step for its
# whole life, and some hundred prompt tokens take about as long as the steps between two arrivals.
TOKENS_A_SEQUENCE = 256


def burden(te: Snapshot) -> float:
    """What a TE has to do, in sequences, less what it need not do for this task."""
    return te.sequences + (te.prompt_tokens - te.cached) / TOKENS_A_SEQUENCE


def least_loaded(snapshots: Sequence[Snapshot], together: bool = False) -> Choice | None:
    """The TE, or the pair of a prefill and a decode TE, with the least to do; among equals a pair, since prompts that come later
    don't disturb what runs there, and then the lowest numbers. None where nothing can take the task.

    `together`: one TE must do all of it, where it is more or less a prompt only."""

    def best(*roles: Role, lenders: bool = False) -> Snapshot | None:
        fitting = [s for s in snapshots if s.role in roles and (s.lender < 0 or lenders)]
        return min(fitting, key=lambda s: (burden(s), s.te), default=None)

    choices: list[tuple[float, int, Choice]] = []
    if together:
        if one := best("colocated", "prefill", "semi"):
            return Choice(one.te, one.te, f"the least loaded that computes prompts: {said(one)}")
        return None
    if (prefill := best("prefill")) and (decode := best("decode")):
        reason = f"least loaded pair: {said(prefill)}, {said(decode)}"
        choices.append((burden(prefill) + burden(decode), 0, Choice(prefill.te, decode.te, reason)))
    by_number = {s.te: s for s in snapshots}
    for worker in snapshots:
        if worker.lender >= 0 and (owner := by_number.get(worker.lender)):
            reason = f"least loaded semi pair: {said(worker)}, {said(owner)}"
            choices.append((burden(worker) + burden(owner), 1, Choice(worker.te, owner.te, reason)))
    if one := best("colocated"):
        reason = f"least loaded of {sum(s.role == 'colocated' for s in snapshots)}: {said(one)}"
        choices.append((burden(one), 2, Choice(one.te, one.te, reason)))
    return min(choices, key=lambda c: c[:2])[2] if choices else None


def said(te: Snapshot) -> str:
    has = f", {te.cached} tokens of this one cached" if te.cached else ""
    return f"TE {te.te} with {te.sequences} sequences, {te.prompt_tokens} prompt tokens{has}"


def takes_over(snapshots: Sequence[Snapshot], leaving: int) -> Choice | None:
    """Who goes on with a sequence that leaves a TE."""
    fitting = [s for s in snapshots if s.te != leaving and s.role in ("decode", "colocated")]
    best = min(fitting, key=lambda s: (burden(s), s.te), default=None)
    return None if best is None else Choice(leaving, best.te, f"moved from TE {leaving} to the least loaded: {said(best)}")
