"""Request -> Job -> Task: the paper's three nouns, their states as tables, and every state's time. Pure.

A Request is one external call. It starts one or more Jobs; a chat starts exactly one serving Job. A Job runs as Tasks,
each on one TE: one `unified` task on a colocated TE, a `prefill` and a `decode` task on a disaggregated pair. An
illegal move raises `IllegalMove`; a terminal state is entered once and never left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import msgspec

RequestState = Literal["received", "queued", "running", "done", "failed", "cancelled", "refused"]
JobState = Literal["created", "running", "done", "failed", "cancelled"]
TaskState = Literal["queued", "dispatched", "prefill", "decode", "done", "failed", "cancelled"]
JobKind = Literal["serving", "preprocess", "train", "evaluate", "batch"]
TaskKind = Literal["unified", "prefill", "decode", "train", "evaluate"]

# (state, event) -> state. What is not here is illegal.
REQUEST: dict[tuple[str, str], RequestState] = {
    ("received", "admit"): "queued",
    ("received", "refuse"): "refused",
    ("received", "cancel"): "cancelled",
    ("queued", "run"): "running",
    ("queued", "fail"): "failed",
    ("queued", "cancel"): "cancelled",
    ("running", "finish"): "done",
    ("running", "fail"): "failed",
    ("running", "cancel"): "cancelled",
}
JOB: dict[tuple[str, str], JobState] = {
    ("created", "run"): "running",
    ("created", "fail"): "failed",
    ("created", "cancel"): "cancelled",
    ("running", "finish"): "done",
    ("running", "fail"): "failed",
    ("running", "cancel"): "cancelled",
}
TASK: dict[tuple[str, str], TaskState] = {
    ("queued", "dispatch"): "dispatched",
    ("queued", "fail"): "failed",
    ("queued", "cancel"): "cancelled",
    ("dispatched", "first_token"): "decode",  # unified and decode tasks: the first token tells that prefill is over
    ("dispatched", "begin"): "prefill",
    ("dispatched", "finish"): "done",
    ("dispatched", "lost"): "queued",  # its TE died: replayed elsewhere
    ("dispatched", "fail"): "failed",
    ("dispatched", "cancel"): "cancelled",
    ("prefill", "first_token"): "decode",
    ("prefill", "finish"): "done",  # a prefill task hands over
    ("prefill", "lost"): "queued",
    ("prefill", "fail"): "failed",
    ("prefill", "cancel"): "cancelled",
    ("decode", "finish"): "done",
    ("decode", "lost"): "queued",
    ("decode", "fail"): "failed",
    ("decode", "cancel"): "cancelled",
}
TABLES: dict[str, Mapping[tuple[str, str], str]] = {"request": REQUEST, "job": JOB, "task": TASK}
TERMINAL = frozenset({"done", "failed", "cancelled", "refused"})


class IllegalMove(RuntimeError):
    """A bug: an event that the table does not allow in this state."""


class Life(msgspec.Struct):
    """A state and when each state was entered (Unix seconds, in order)."""

    table: Literal["request", "job", "task"]
    state: str
    times: list[tuple[str, float]]

    def move(self, event: str, now: float) -> str:
        """Follow the table; the new state. Raises `IllegalMove`."""
        following = TABLES[self.table].get((self.state, event))
        if following is None:
            raise IllegalMove(f"a {self.table} that is {self.state} can't {event}")
        self.state = following
        self.times.append((following, now))
        return following

    @property
    def over(self) -> bool:
        return self.state in TERMINAL


def born(table: Literal["request", "job", "task"], now: float) -> Life:
    """The life of a new request, job or task."""
    state = {"request": "received", "job": "created", "task": "queued"}[table]
    return Life(table, state, [(state, now)])


class Task(msgspec.Struct, kw_only=True):
    """What one TE runs."""

    id: int
    kind: TaskKind
    life: Life
    te: int = -1  # where it runs, or last ran
    attempts: int = 0  # dispatches; more than one after a TE's death
    reason: str = ""  # the policy's, for the choice of TE
    cached_tokens: int = 0


class Job(msgspec.Struct, kw_only=True):
    id: str
    kind: JobKind
    life: Life
    tasks: list[Task] = []


class Request(msgspec.Struct, kw_only=True):
    id: str
    trace_id: str
    model: str
    kind: str  # chat, completion, embedded
    life: Life
    jobs: list[Job] = []
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""
    first_token: float = 0.0  # Unix seconds; 0: none yet

    def tasks(self) -> Iterator[Task]:
        for job in self.jobs:
            yield from job.tasks

    def end(self, event: Literal["finish", "fail", "cancel"], now: float) -> None:
        """Bring the request and what is left of its jobs and tasks to the same end."""
        for job in self.jobs:
            for task in job.tasks:
                if not task.life.over:
                    task.life.move("cancel" if event == "finish" else event, now)
            if not job.life.over:
                job.life.move(event, now)
        self.life.move(event, now)


def describe(request: Request) -> dict[str, Any]:
    """A request as `GET /v1/jobs/{id}` shows it."""

    def life(x: Life) -> dict[str, Any]:
        return {"state": x.state, "times": [{"state": s, "at": round(t, 6)} for s, t in x.times]}

    return {
        "id": request.id,
        "object": "request",
        "request_id": request.trace_id,
        "model": request.model,
        "kind": request.kind,
        **life(request.life),
        "first_token_at": round(request.first_token, 6) or None,
        "usage": {"prompt_tokens": request.prompt_tokens, "completion_tokens": request.completion_tokens},
        "error": request.error or None,
        "jobs": [
            {
                "id": job.id,
                "object": "job",
                "kind": job.kind,
                **life(job.life),
                "tasks": [
                    {
                        "id": task.id,
                        "object": "task",
                        "kind": task.kind,
                        **life(task.life),
                        "te": task.te if task.te >= 0 else None,
                        "attempts": task.attempts,
                        "reason": task.reason or None,
                        "cached_tokens": task.cached_tokens,
                    }
                    for task in job.tasks
                ],
            }
            for job in request.jobs
        ],
    }
