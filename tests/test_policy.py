from __future__ import annotations

from sched.admission import LATEST, SOONEST, queue_is_full, retry_after
from sched.policy import Snapshot, least_loaded


def test_least_loaded_counts_sequences_and_queued_prompts():
    assert least_loaded([]) is None
    choice = least_loaded([Snapshot(0, 4, 0), Snapshot(1, 3, 0)])
    assert choice is not None and choice.decode == 1 and "3 sequences" in choice.reason
    choice = least_loaded([Snapshot(0, 4, 0), Snapshot(1, 3, 4096)])
    assert choice is not None and choice.decode == 0
    choice = least_loaded([Snapshot(1, 0, 0), Snapshot(0, 0, 0)])
    assert choice is not None and choice.decode == 0, "equals: the lowest id"


def test_the_queue_has_a_bound_that_counts_every_te():
    assert not queue_is_full(9, 1, te=2, max_num_seqs=4, max_queued=2)
    assert queue_is_full(10, 1, te=2, max_num_seqs=4, max_queued=2)
    assert not queue_is_full(0, 999, te=1, max_num_seqs=1, max_queued=0), "an idle server takes any one request"


def test_retry_after_is_the_predicted_wait_within_bounds():
    assert retry_after(30, 2.0) == 15.0
    assert retry_after(-5, 2.0) == SOONEST and retry_after(10**6, 1.0) == LATEST
    assert retry_after(5, 0.0) == 5.0
