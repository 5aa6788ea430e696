"""The step loop of a TE with nothing to do. What it does with sequences is told in test_batch.py, test_handover.py and others."""

from __future__ import annotations

from engine.core import IDLE_BEAT, IDLE_ENOUGH, PIECE_BYTES, Core
from tests.fake_device import Engine, FakeKV, ListInbox

PIECE, BLOCKS = 8, 1280  # blocks


class CountedKV(FakeKV):
    nbytes = PIECE_BYTES // PIECE * BLOCKS

    def __init__(self) -> None:
        self.commits: list[int] = []

    def commit(self, blocks: int) -> None:
        self.commits.append(blocks)


class SilentInbox(ListInbox):
    """Nothing comes before the sixth look."""

    def __init__(self) -> None:
        self.patience: list[float | None] = []

    def wait(self, timeout: float | None) -> bool:
        self.patience.append(timeout)
        return len(self.patience) == 6


def test_an_idle_te_has_memory_for_a_share_of_its_cache_more_than_it_uses():
    engine, kv, inbox = Engine(blocks=BLOCKS), CountedKV(), SilentInbox()
    engine.executor.kv = kv  # type: ignore[assignment]
    core = Core(engine.batch, engine.executor, inbox, engine.told.append)
    core.receive(idle=True)
    assert kv.commits == [PIECE, 2 * PIECE, BLOCKS // 64]
    assert inbox.patience == [IDLE_ENOUGH, 0.0, 0.0, 0.0, IDLE_BEAT, IDLE_BEAT], "not at once, and not again"

    core.receive(idle=False)
    assert len(inbox.patience) == 6, "who has work doesn't wait"
