"""What a job executor keeps count of, counted again from the tasks that live and from what its TEs are."""

from __future__ import annotations

from collections import Counter

from sched.job_executor import JobExecutor
from sched.view import ALONE, COLUMNS, LOST, ROLES


def check(je: JobExecutor) -> None:
    """Every count that is kept along the way is what it would be if it were made now."""
    check_tasks(je)
    check_view(je)
    check_turns(je)


def check_tasks(je: JobExecutor) -> None:
    for entry in je.live.values():
        for te in (entry.te, entry.prefill, entry.charged):
            assert te is None or je.tes.get(te.id) is te, f"task {entry.wire} is on TE {te.id}, which isn't there"
        assert (entry.te is None) == (entry in je.held)
        assert entry.open_samples == sum(not sample.over for sample in entry.samples)
    assert len(je.held) == sum(entry.te is None for entry in je.live.values())
    live = je.live.values()
    for te in je.tes.values():
        assert te.sequences == sum(e.open_samples for e in live if e.te is te)
        assert te.prompt_tokens == sum(e.charge for e in live if e.charged is te)
        assert te.expecting == sum(e.te is te and e.prefill is not None for e in live)
        assert te.computing == sum(e.prefill is te for e in live)


def check_view(je: JobExecutor) -> None:
    """Columns against TEs. `takes` is spelt out here as `Placing.takes` should have it."""
    placing, config = je.placing, je.config
    placing.look()
    view, size = placing.view, config.block_size
    assert size is not None and view.slots.keys() == je.tes.keys()
    for te in je.tes.values():
        between = {"prefill": te.expecting, "decode": te.computing}.get(te.role, 0)
        full = placing.ahead is not None and te.sequences >= config.max_num_seqs + placing.ahead
        own = te.lender < 0
        lender = ALONE if own else view.slots.get(te.lender, LOST)
        want = {
            "te": te.id,
            "role": ROLES.index(te.role),
            "mixes": te.role in ("colocated", "semi"),
            "lender": lender,
            "takes": te.state == "ready" and not te.draining and not between and not full,
            "sequences": te.sequences,
            "queued_tokens": te.prompt_tokens,
            "running": te.load.running,
            "kv_used": te.load.blocks_used * size if own else 0,
            "kv_total": te.load.blocks_total * size if own and te.load.blocks_total else float("inf"),
            "seats": config.max_num_seqs,
        }
        slot = view.slots[te.id]
        found = {name: getattr(view, name)[slot].item() for name in want}
        assert found == want, f"TE {te.id}"
    taken = set(view.slots.values())
    assert len(taken) == len(view.slots)
    for slot in set(range(len(view.te))) - taken:
        found = {name: getattr(view, name)[slot].item() for name in COLUMNS}
        assert found == {name: empty for name, (_, empty) in COLUMNS.items()}, "a free slot"
    assert placing.paces.heard.keys() <= je.tes.keys() and set(placing.homes.values()) <= je.tes.keys()


def check_turns(je: JobExecutor) -> None:
    """What keys have."""
    live, turns = je.live.values(), je.held
    sequences, unread, outstanding = Counter(), Counter(), Counter()
    for e in live:
        if e.te is not None:
            sequences[e.te.id, e.request.flow.tenant.name] += e.open_samples
        if e.charged is not None:
            unread[e.charged.id, e.request.flow.tenant.name] += e.charge
    for request in {e.request for e in live}:
        outstanding[request.flow.tenant.name] += request.open_samples
    for kept, made in ((turns.sequences, sequences), (turns.unread, unread), (turns.outstanding, outstanding)):
        assert dict(kept) == {who: count for who, count in made.items() if count}
    assert je.outstanding == sum(outstanding.values())
    line = turns.line
    assert {name: flow for name, flow in line.flows.items() if flow.places} == line.waiting
    assert set(line) == {task for flow in line.flows.values() for task in flow.places}
