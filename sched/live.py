"""What the JE follows while it lives: a request, its tasks, and each task's samples with what has been sent of them."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.types import Handover, Sample, SamplingParams, Start, pack_ids, sequence_id
from sched.cluster import TE
from sched.fairness import Flow
from sched.job import Request, Task
from sched.policy import Choice
from sched.predict import Clues, Predicted
from sched.stream import Stream, Submission
from sched.text import Text


@dataclass(slots=True, eq=False)
class LiveSample:
    """One sample of a live task: what has been sent of it."""

    choice: int
    seed: int
    text: Text
    ids: array[int]
    first: float = 0.0  # CLOCK_MONOTONIC seconds of its first token
    last: float = 0.0  # ... and of its newest
    over: bool = False


@dataclass(slots=True, eq=False)
class LiveTask:
    task: Task
    request: LiveRequest
    prompt: bytes
    prompt_index: int
    prompt_tokens: int
    params: SamplingParams
    max_tokens: int
    stop_ids: list[int]
    samples: list[LiveSample]
    open_samples: int
    wire: int  # its number in messages; a new one where a TE may still speak of the last attempt
    te: TE | None = None  # where it runs; of a pair the decode TE
    prefill: TE | None = None  # of a pair, until the prompt's KV is handed over
    prefill_task: Task | None = None
    keys: Sequence[bytes] = ()  # of the prompt's full KV blocks, where they could be of use
    clues: Clues | None = None  # to the answer's length; None: before there was a TE
    answer: Predicted | None = None  # ... what was predicted from them, where there was a choice to make
    choice: Choice | None = None  # of the newest dispatch
    rank: int = 0  # what the TE is told to share out its steps by: lower goes first
    deaths: int = 0  # attempts in a row that ended without a new token
    produced: int = 0  # tokens at the end of the newest attempt that ended so
    begun: bool = False  # its first token has come
    charged: TE | None = None  # dispatched and without a token since: its prompt counts in that TE's `prompt_tokens`
    charge: int = 0  # ... with so many tokens

    def index(self, sample: LiveSample) -> int:
        """The sample's index within the task."""
        return sample.choice - self.prompt_index * self.params.n

    def sequence(self, sample: LiveSample) -> int:
        """What its sequence is called in messages."""
        return sequence_id(self.wire, self.index(sample))

    def open_indices(self) -> list[int]:
        return [i for i, sample in enumerate(self.samples) if not sample.over]

    def start(self, indices: list[int], at: float, *, expect: bool = False, handover: Handover | None = None) -> Start:
        """What a TE is told of these samples, at CLOCK_MONOTONIC seconds `at`."""
        submission = self.request.submission
        return Start(
            task=self.wire,
            prompt=self.prompt,
            samples=[Sample(i, pack_ids(self.samples[i].ids), self.samples[i].seed) for i in indices],
            params=self.params,
            max_tokens=self.max_tokens,
            stop_ids=self.stop_ids,
            salt=submission.salt,
            priority=self.rank,
            expect=expect,
            handover=handover,
            at=at,
            retain=submission.retain,
            context=submission.context,
            preserve=submission.preserve,
        )


@dataclass(slots=True, eq=False)
class LiveRequest:
    record: Request
    submission: Submission
    stream: Stream
    arrived: float  # CLOCK_MONOTONIC seconds
    flow: Flow[LiveTask]  # its key's
    tasks: list[LiveTask] = field(default_factory=list)
    open_samples: int = 0
