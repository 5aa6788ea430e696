"""`bench.pd` and `bench.pd_soak` apart from the servers they start: what they measure, how they judge."""

from __future__ import annotations

import asyncio
import mmap
import os
from itertools import pairwise
from typing import Any

import pytest

from bench import pd, pd_soak
from bench.serve import Outcome, Work
from sched.gateway.app import build
from sched.service import Submission
from sched.stream import Delta, Stream, Usage
from tests.fake import FakeService
from tests.test_bench_serve import serving


def test_longest_gap() -> None:
    times = [[0.0, 1.0, 1.5, 4.0, 4.1], [0.0, 0.2, 0.4], [7.0], []]
    assert pd.longest_gap(times, 1.2, 1.4) == 0.5, "it reaches in from both sides"
    assert pd.longest_gap(times, 1.6, 1.7) == 2.5
    assert pd.longest_gap(times, 1.0, 1.2) == 0.5, "what ended before is no gap of this arrival"
    assert pd.longest_gap(times, 0.0, 9.0) == 2.5
    assert pd.longest_gap(times, 8.0, 9.0) == 0.0


def outcome(text: str = "a", ttft: float = 0.1, itl: tuple[float, ...] = (0.03, 0.02, 0.02)) -> Outcome:
    return Outcome(0.0, True, "", ttft, list(itl), ttft + sum(itl), 10, 1 + len(itl), True, text)


def seen(gap: float, second: float = 0.02, texts: tuple[str, str] = ("x", "y")) -> pd.Seen:
    lone, arrived = ([outcome(text, itl=(second, 0.02, 0.02))] for text in texts)
    return pd.Seen([gap, 3 * gap, 2 * gap], arrived, lone, [0.01] * 98 + [0.5] * 2)


def test_figures_bars_and_table(capsys: pytest.CaptureFixture[str]) -> None:
    rounds = {"colocated": seen(1.0), "1p1d-layer": seen(0.4, 0.025), "semi": seen(0.6)}
    found = {name: pd.figures(one) for name, one in rounds.items()}
    assert found["colocated"]["gap_ms"] == {"median": 2000.0, "min": 1000.0, "max": 3000.0}
    assert found["semi"]["tpot_ms"]["p50"] == 10.0 and found["semi"]["tpot_ms"]["p99"] > 100
    assert found["1p1d-layer"]["second_token_alone"] == pytest.approx({"second_ms": 25.0, "step_ms": 20.0, "ratio": 1.25})
    bars = list(pd.bars(found))
    assert [(bar.what.split(",")[0], round(bar.ratio, 2), bar.reached) for bar in bars] == [
        ("longest gap", 0.4, True),
        ("longest gap", 0.6, False),
        ("time to second token", 1.25, True),
    ]
    report: dict[str, Any] = {
        "load_average": 2.5,
        "modes": {name: own | {"other_texts": 0} for name, own in found.items()},
        "bars": [bar._asdict() | {"reached": bar.reached} for bar in bars],
        "shares_percent": [{"share": 50, "taken": 50.4, "speed": 48.0}],
    }
    assert pd.show(report) == 1, "semi missed its bar"
    out = capsys.readouterr().out
    assert "| colocated, whole prompts | 2000 |" in out and "semi beside colocated: 0.60x, missed (≤ 0.5)" in out
    assert "busy with other work: load average 2.5" in out and "the same in every mode" in out
    assert "50 % of the threads' time, 48 % of the speed" in out
    report["bars"] = report["bars"][::2]
    assert pd.show(report) == 0
    report["modes"]["semi"]["other_texts"] = 2
    assert pd.show(report) == 1 and "other than the first mode's: {'semi': 2}" in capsys.readouterr().out


def test_texts_are_compared_with_the_first_mode() -> None:
    assert pd.differing({"a": seen(1.0), "b": seen(1.0, texts=("x", "z"))}) == {"a": 0, "b": 1}
    both = pd.Seen()
    both.add(seen(1.0))
    both.add(seen(2.0))
    assert both.gaps == [1.0, 3.0, 2.0, 2.0, 6.0, 4.0] and len(both.lone) == 2 and pd.Seen().gaps == []


class Steady(FakeService):
    """As many tokens as are asked for, at a model's pace."""

    def __init__(self) -> None:
        super().__init__()
        self.card.max_model_len = 8192

    async def play(self, submission: Submission, stream: Stream) -> None:
        many = submission.params.max_tokens
        assert many is not None
        stream.usage = Usage(len(submission.prompts[0]), 0, 0)
        for n in range(1, many + 1):
            await asyncio.sleep(0.002)
            stream.usage.completion_tokens += 1
            stream.feed([Delta(0, "w", [119], None, "length" if n == many else None)])


LOAD = pd.Load(decodes=2, prompt=300, output=6, arrivals=3, every=0.1, lone=2, steady_prompt=20, steady_output=4000)


def test_a_round_against_a_server() -> None:
    service = Steady()

    async def go(url: str) -> pd.Seen:
        prompts = await pd.with_client(url, service.card.id, LOAD)
        return await pd.measure(url, service.card.id, *prompts, LOAD)

    with serving(lambda: build(service)) as url:
        found = asyncio.run(go(url))
    assert len(found.gaps) == len(found.arrived) == 3 and len(found.lone) == 1
    assert all(gap > 0 for gap in found.gaps) and found.itl and all(o.output_tokens == 6 for o in found.arrived)
    # Six tokens of 300, and two streams that were left.
    asked = [s.params.max_tokens for s in service.submissions]
    assert sorted(asked) == [6] * 5 + [4000] * 2 and not service.live
    starts = [o.start for o in found.arrived]
    assert all(b - a >= 0.09 for a, b in pairwise(starts)), "they come at their times"
    prompts = [s.prompts[0] for s in service.submissions]
    assert len({tuple(p[:17]) for p in prompts}) == len(prompts), "no two begin alike"


def test_a_stream_that_ends_is_no_load() -> None:
    service = Steady()
    works = [Work("w " * 20, 5)]
    with serving(lambda: build(service)) as url, pytest.raises(ExceptionGroup) as caught:
        asyncio.run(pd.measure(url, service.card.id, [Work("long", 2)] * 4, works, LOAD))
    assert caught.group_contains(RuntimeError, match="a steady stream ended after")


def test_shares_of_a_team() -> None:
    rows = pd.measure_shares(0.02)
    assert [row["share"] for row in rows] == [100, 90, 75, 60, 50, 30, 10]
    assert rows[0]["speed"] == pytest.approx(100) and all(row["taken"] > 0 for row in rows)


# ---- the soak -------------------------------------------------------------------------------------------------------


class Played:
    """Enough of a server for `pd_soak.play`: it has no processes, and one TE that knows its role."""

    marker = "DEEPSERVE_TEST=nobody"

    def __init__(self, url: str, status: int = 400):
        self.url, self.status = url, status

    def tes(self) -> list[dict[str, Any]]:
        return [{"id": 7}]

    def post(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        assert (path, body) == ("/v1/admin/te/7/role", {"role": "decode"})
        return self.status, "said"


def test_play_judges_texts() -> None:
    service = FakeService("0123456789" * 30)
    service.card.id, service.card.max_model_len = "m", 1024
    wanted = [pd_soak.Kind("a", 20, 0.0, 0), pd_soak.Kind("b", 30, 1.0, 1), pd_soak.Kind("c", 290, 0.0, 2)]

    def run(texts: list[str], asked: list[pd_soak.Asked], status: int = 400) -> pd_soak.Outcome:
        with serving(lambda: build(service)) as url:
            plan = pd_soak.Plan(asked, [pd_soak.Kill(0.0, 0.5)], [pd_soak.Change(0.0, 0.5, "decode")])
            return asyncio.run(pd_soak.play(Played(url, status), plan, wanted, texts))  # type: ignore[arg-type]

    with serving(lambda: build(service)) as url:
        texts = asyncio.run(pd_soak.references(url, wanted))
    assert [len(t) for t in texts] == [20, 30, 290]
    asked = [pd_soak.Asked(i, 0.01 * i, None) for i in range(3)]
    assert run(texts, asked) == pd_soak.Outcome(3, 0, 0, [])
    assert run(texts, [], status=500).wrong == ["TE 7 to decode: 500 said"]
    (wrong,) = run([texts[0], texts[1][:-1] + "X", texts[2]], asked).wrong
    assert wrong.startswith("kind 1: ")
    service.hold_after = 10
    left = [pd_soak.Asked(2, 0.0, 0.1)]
    assert run(texts, left) == pd_soak.Outcome(0, 1, 0, [])
    service.hold_after, service.fail_after = None, 5
    assert "died three times" in run(texts, asked[:1]).wrong[0]


def test_plans_come_from_their_seeds() -> None:
    plans = [pd_soak.make_plan(seed) for seed in range(200)]
    assert plans == [pd_soak.make_plan(seed) for seed in range(200)]
    assert {len(plan.kills) for plan in plans} == {0, 1, 2} and {len(plan.changes) for plan in plans} == {0, 1, 3, 6}
    assert all(0 <= kill.which < 1 for plan in plans for kill in plan.kills)
    left = [asked.left is not None for plan in plans for asked in plan.asked]
    assert 0.15 < sum(left) / len(left) < 0.35
    assert len(pd_soak.kinds()) == pd_soak.KINDS and pd_soak.kinds() == pd_soak.kinds()
    assert max(len(kind.prompt) + kind.tokens for kind in pd_soak.kinds()) < 1024


def test_shared_memories_are_seen_open_and_mapped() -> None:

    before = pd_soak.shared_memories({os.getpid()})
    fd = os.memfd_create("pd-soak-test")
    inode = os.fstat(fd).st_ino
    os.ftruncate(fd, 4096)
    assert pd_soak.shared_memories({os.getpid()}).keys() - before.keys() == {inode}
    memory = mmap.mmap(fd, 4096)
    os.close(fd)
    found = pd_soak.shared_memories({os.getpid()})
    assert "pd-soak-test" in found[inode] and pd_soak.by_name({1: "a", 2: "b", 3: "a"}) == {"a": 2, "b": 1}
    memory.close()
    assert inode not in pd_soak.shared_memories({os.getpid()})
