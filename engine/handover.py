"""Sequences on their way from this TE to blocks that another one has reserved.

DistFlow carries them in the order given here, on its own thread: while a prompt is computed each layer of a step as soon as it is
done (by layer), or everything at the end (by request). Whoever hands over hears once, in the step loop, that nothing more of a
sequence will be written there. Between two workers that share a pool (semi-PD) nothing is carried.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from engine.devices import Pending
from engine.distflow import Completion, DistFlow, check_exchange, spans_between
from engine.sequence import Plan, Sequence
from engine.types import Peer

# Layers that are carried together: a transfer costs some 75 us, whatever it carries, of the cores that compute the next layers.
# What is not hidden behind them is the copy of the last few layers of a prompt's last step.
LAYERS_AT_ONCE = 4

Done = Callable[[str | None], None]  # told what went wrong


class Outbound:
    """`follow` gives what a transfer is to call at its end, on any thread, so that the step loop calls the `Done` soon.

    On all ranks of a TE but the master `flow` is None: the master carries what every rank has computed, the others only wait."""

    def __init__(self, flow: DistFlow | None, here: Peer, follow: Callable[[Done], Callable[[Completion], None]]):
        self.flow = flow
        self.here = here
        self.follow = follow

    def link(self, peer: Peer) -> None:
        """Raises `UserError` where a peer can't be reached or its blocks mean something else."""
        if self.flow is not None:
            check_exchange(self.here.layout, peer.layout)
            self.flow.link_cluster([peer])

    def unlink(self, te: int) -> None:
        if self.flow is not None:
            self.flow.unlink(te)

    def end(self) -> None:
        """End every transfer, and the links."""
        if self.flow is not None:
            self.flow.close()

    def launched(self, plan: Plan, pending: Pending) -> None:
        """A step runs: have what it computes for other TEs follow it layer by layer."""
        size = self.here.block_size
        going: dict[int, tuple[list[int], list[int], list[Sequence]]] = {}  # by receiving TE: blocks here, blocks there, whose
        for work in plan:
            seq = work.seq
            if seq.moving or seq.handover is None or seq.handover.how != "layer":
                continue
            first, begin = seq.handover.cached // size, work.start // size
            if not seq.pushed:
                seq.pushed = seq.sent = True
                self.carry(seq, first, begin, partial(landed, [seq]))  # found in the prefix tree
            target = np.frombuffer(seq.handover.blocks, np.int32)
            last = -(-(work.start + work.count) // size)
            begin = max(first, begin)
            here, there, whose = going.setdefault(seq.handover.to, ([], [], []))
            here += seq.blocks[begin:last]
            there += target[begin:last].tolist()
            whose.append(seq)
        layers = self.here.layout.layers
        for first in range(0, layers, LAYERS_AT_ONCE) if going else ():
            some = range(first, min(first + LAYERS_AT_ONCE, layers))
            for to, (here, there, whose) in going.items():
                gate = partial(pending.wait_layer, some[-1])
                self.transfer(to, here, there, layers=some, after=gate, on_done=partial(landed, whose))

    def finish(self, seq: Sequence, done: Done) -> None:
        """The sequence is computed. `done` is called in the step loop, with what went wrong, once the receiver has all of it."""
        assert seq.handover is not None
        seq.pushed = seq.sent = True
        told = self.follow(done)

        def ended(completion: Completion) -> None:
            completion.error = completion.error or seq.torn or None
            told(completion)

        if seq.handover.how == "layer" and not seq.moving:
            begin = end = 0  # on its way already: what is carried now comes behind it
        else:
            begin, end = seq.handover.cached // self.here.block_size, -(-(seq.known - 1) // self.here.block_size)
        self.carry(seq, begin, end, ended)

    def close(self, seq: Sequence, done: Callable[[], None]) -> None:
        """The sequence has ended before it was handed over. `done` is called once nothing more of it will be written."""
        if not seq.sent:
            done()
        else:
            self.carry(seq, 0, 0, self.follow(lambda _: done()))

    def carry(self, seq: Sequence, begin: int, end: int, on_done: Callable[[Completion], None] | None = None) -> None:
        """Copy blocks `begin` to `end` of a sequence, all layers."""
        assert seq.handover is not None
        target = np.frombuffer(seq.handover.blocks, np.int32)[begin:end].tolist()
        self.transfer(seq.handover.to, seq.blocks[begin:end], target, on_done=on_done)

    def transfer(
        self,
        to: int,
        here: list[int],
        there: list[int],
        layers: range | None = None,
        after: Callable[[], None] | None = None,
        on_done: Callable[[Completion], None] | None = None,
    ) -> None:
        if self.flow is None:
            return
        try:
            peer = self.flow.peer(to)
        except KeyError:
            Completion(on_done).end(f"TE {to} is not linked")
            return
        source, target = spans_between(self.here, peer, here, there, layers=layers)
        self.flow.transfer(source, target, after=after, on_done=on_done)


def landed(seqs: list[Sequence], completion: Completion) -> None:
    """On DistFlow's thread: a part of these sequences was carried, or not. What comes last of each tells."""
    if completion.error is not None:
        for seq in seqs:
            seq.torn = completion.error
