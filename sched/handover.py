"""Sequences between two TEs: who may write into whose blocks, and what must be said to whom so that both sides let go.

The one rule: blocks that a TE has reserved are its own again only after the TE that writes there has said that it is through
(`HandedOver`, `Closed`) or has died. And blocks that were sent are given up only when the receiver has said that it goes on
(`Adopted`), or the sequence has ended.

    reserved --(Start or Move to the writer)--> writing --HandedOver--> adopting --Adopted--> over
                                                   |                        |
                                                   +--Closed, death---------+--> over
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from engine.types import Abort, Adopt, Adopted, Closed, HandedOver, Release, ToWorker, split_sequence_id
from sched.cluster import TE

T = TypeVar("T")


def say(te: TE, message: ToWorker) -> None:
    """Tell a TE, if it still hears."""
    if te.state == "ready":
        te.link.send(message)


@dataclass(slots=True, eq=False)
class Passage(Generic[T]):
    """One sequence's way from `writer` to `reader`."""

    seq: int
    writer: TE
    reader: TE
    entry: T | None  # whose sequence it is; None: nobody wants it any more
    moving: bool = False  # it ran on the writer before; else that computes its prompt
    adopting: bool = False


class Passages(Generic[T]):
    """All of them, by sequence."""

    def __init__(self) -> None:
        self.table: dict[int, Passage[T]] = {}

    def open(self, passage: Passage[T]) -> None:
        self.table[passage.seq] = passage

    def speaker(self, seq: int) -> TE | None:
        """The TE whose tokens of a sequence count, where that may not be the one that its task is on."""
        passage = self.table.get(seq)
        return passage.writer if passage is not None and not passage.adopting else None

    def handed_over(self, message: HandedOver, ids: bytes) -> Passage[T] | None:
        """`ids`: all that was generated. The passage, where the reader goes on."""
        passage = self.table.get(message.seq)
        if passage is None:
            return None
        if message.tokens >= 0 and passage.entry is not None:
            passage.adopting = True
            say(passage.reader, Adopt(message.seq, ids))
            return passage
        del self.table[message.seq]
        say(passage.reader, Abort(*split_sequence_id(message.seq)))
        if message.tokens >= 0:
            say(passage.writer, Release(message.seq))
        return None

    def closed(self, message: Closed) -> Passage[T] | None:
        """The passage that ended so."""
        passage = self.table.pop(message.seq, None)
        if passage is not None:
            say(passage.reader, Abort(*split_sequence_id(message.seq)))
        return passage

    def adopted(self, message: Adopted) -> None:
        passage = self.table.pop(message.seq, None)
        if passage is not None:
            say(passage.writer, Release(message.seq))

    def cancel(self, seq: int) -> bool:
        """Nobody wants a sequence any more. False: it isn't between two TEs; else both will hear."""
        passage = self.table.get(seq)
        if passage is None:
            return False
        passage.entry = None
        # Whoever has it now. Its answer (the writer's `Closed` or `HandedOver`, the reader's `Adopted`) ends it for the other.
        say(passage.reader if passage.adopting else passage.writer, Abort(*split_sequence_id(seq)))
        return True

    def lost(self, te: TE) -> None:
        """A TE has died: passages from and to it are over. Who wanted the sequence starts it again."""
        for passage in [p for p in self.table.values() if te is p.writer or te is p.reader]:
            del self.table[passage.seq]
            if te is passage.reader:
                forget = Release(passage.seq) if passage.adopting else Abort(*split_sequence_id(passage.seq))
                say(passage.writer, forget)
            elif not passage.adopting:
                say(passage.reader, Abort(*split_sequence_id(passage.seq)))
