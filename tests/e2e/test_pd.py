"""Prefill and decode apart: every way of splitting them must give the text of one TE, bit for bit on the compiled kernels."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepserve import AsyncLLM, SamplingParams, UserError
from engine import capacity
from tests import tiny

SMALL: dict[str, Any] = {"max_model_len": 512, "kv_cache_memory_bytes": 16 << 20, "max_num_batched_tokens": 64}
COMMON = "There was a miller who had three sons, his mill, a donkey and a cat. " * 4
PROMPTS = ["abc", COMMON + "The sons", COMMON + "ground and the donkey", "x" * 17, COMMON[:200], "to be " * 40]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.make(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=1024)


async def one(llm: AsyncLLM, prompt: str, **params: Any) -> list[tuple[list[int], str | None]]:
    kind = SamplingParams(**{"max_tokens": 24, "ignore_eos": True, **params})
    *_, last = [output async for output in llm.generate(prompt, kind)]
    assert last.finished
    return [(o.token_ids, o.finish_reason) for o in last.outputs]


async def texts(llm: AsyncLLM) -> list[Any]:
    """What a model says to a mix of requests: greedy, sampled, several samples, one token, penalties, stop ids; twice."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 0.9, "seed": 3},
        {"temperature": 1.0, "seed": 5, "n": 3},
        {"max_tokens": 1, "temperature": 0.0},
        {"temperature": 0.8, "seed": 9, "repetition_penalty": 1.3, "logit_bias": {7: 3.0}},
        {"temperature": 1.0, "seed": 11, "stop_token_ids": list(range(60, 110))},
    ]
    cold = await asyncio.gather(*(one(llm, prompt, **kind) for prompt in PROMPTS for kind in kinds))
    warm = await asyncio.gather(*(one(llm, prompt, **kind) for prompt in PROMPTS for kind in kinds))
    assert warm == cold, "a prefix hit changed a text"
    return cold


def drained(llm: AsyncLLM) -> bool:
    return all(te["load"]["blocks_used"] == te["load"]["running"] == te["load"]["waiting"] == 0 for te in llm.cluster.describe())


def counted(llm: AsyncLLM, stem: str) -> float:
    return llm.families.registry.get_sample_value(f"deepserve:{stem}_total", {"model_name": llm.names[0]}) or 0.0


async def until(found: Callable[[], Any]) -> None:
    for _ in range(5000):
        if found():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("waited 10 s in vain")


async def let_go(llm: AsyncLLM) -> None:
    """Wait until every TE has said that it holds nothing."""
    await until(lambda: drained(llm))
    je = llm.deployments[0].listener
    assert not (je.live or je.passages.table or je.moves)


async def under(model: Path, **settings: Any) -> list[Any]:
    async with AsyncLLM(model, **{**SMALL, **settings}) as llm:
        found = await texts(llm)
        await let_go(llm)
        computed = {te["role"]: te["load"]["prompt_tokens"] for te in llm.cluster.describe() if te["lender"] is None}
        if settings in ({"pd": "1p1d"}, {"pd": "semi"}):
            # Of requests with several samples, the others' last blocks.
            assert computed.get("decode", computed.get("semi", 0)) < 0.2 * 2 * 6 * sum(map(len, PROMPTS))
        return found


@pytest.fixture(scope="module")
def expected(model) -> list[Any]:
    return asyncio.run(under(model))


@pytest.mark.parametrize(
    "settings",
    [
        {"pd": "1p1d"},
        {"pd": "1p1d", "kv_transfer": "request"},
        {"pd": "1p1d", "async_scheduling": False},
        {"pd": "2p1d+1c"},
        {"pd": "1p2d", "max_num_seqs": 3},
        {"pd": "semi"},
        {"pd": "semi", "async_scheduling": False, "max_num_seqs": 2},
        {"pd": "1p1d", "kv_cache_memory_bytes": 1 << 20},
        {"pd": "semi", "kv_cache_memory_bytes": 1 << 20},
    ],
    ids=lambda s: "-".join(str(v) for v in s.values()),
)
def test_the_same_text_however_prefill_and_decode_are_split(model, expected, settings):
    if not capacity.has_compiled_kernels():
        pytest.skip("equal bit for bit only on the compiled kernels; the next test has the reference operators")
    assert asyncio.run(under(model, **settings)) == expected


@pytest.mark.parametrize("pd", ["1p1d", "semi"])
@pytest.mark.parametrize("kind", [{"dtype": "float32"}, {"kv_cache_dtype": "int8"}], ids=["float32", "int8"])
def test_other_forms_of_keys_and_values(model, pd, kind):
    if "kv_cache_dtype" in kind and not capacity.has_compiled_kernels():
        pytest.skip("the compiled kernels' option")

    async def greedy(**settings: Any) -> list[Any]:
        async with AsyncLLM(model, **SMALL, **kind, **settings) as llm:
            found = await asyncio.gather(*(one(llm, prompt, temperature=0.0) for prompt in PROMPTS))
            await let_go(llm)
            return found

    assert asyncio.run(greedy(pd=pd)) == asyncio.run(greedy())


def test_prompt_log_probabilities_come_from_one_te(model):
    async def scored(**settings: Any) -> Any:
        async with AsyncLLM(model, **SMALL, **settings) as llm:
            params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True, prompt_logprobs=2, logprobs=1)
            *_, last = [output async for output in llm.generate(COMMON, params)]
            await let_go(llm)
            return last.prompt_logprobs, last.outputs[0].token_ids, last.outputs[0].logprobs

    alone = asyncio.run(scored())
    assert asyncio.run(scored(pd="1p1d")) == asyncio.run(scored(pd="semi")) == alone


def test_a_job_has_two_tasks_on_a_pair(model):
    async def run() -> dict[str, Any]:
        async with AsyncLLM(model, **SMALL, pd="1p1d") as llm:
            params = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)
            async for _ in llm.generate("abc", params, request_id="mine"):
                pass
            found = llm.job("mine")
            assert found is not None
            return found

    (job,) = asyncio.run(run())["jobs"]
    assert {(t["kind"], t["te"], t["state"]) for t in job["tasks"]} == {("prefill", 0, "done"), ("decode", 1, "done")}
    assert job["state"] == "done" and all("pair" in t["reason"] for t in job["tasks"])


def test_roles_change_under_load_and_running_texts_move(model):
    async def run() -> None:
        async with AsyncLLM(model, **{**SMALL, "max_model_len": 1024, "max_num_seqs": 6}, te=2) as llm:
            long = {"max_tokens": 1000, "temperature": 0.7}  # must be running yet when they are told to move
            wanted = [await one(llm, f"text {i}", seed=i, **long) for i in range(6)]
            async with asyncio.TaskGroup() as group:
                running = [group.create_task(one(llm, f"text {i}", seed=i, **long)) for i in range(6)]
                # Who has no token yet doesn't move.
                live = llm.deployments[0].listener.live
                await until(lambda: sum(len(e.samples[0].ids) > 0 for e in live.values()) == 6)
                busy = max(llm.cluster.table, key=lambda number: llm.cluster.table[number].sequences)
                answer = llm.give_role(busy, "prefill")
                with pytest.raises(UserError, match="no task could run"):
                    llm.give_role(1 - busy, "prefill")
                await until(lambda: not llm.cluster.describe()[busy]["load"]["running"])
                llm.give_role(1 - busy, "decode")
                more = [group.create_task(one(llm, f"text {i}", seed=i, **long)) for i in range(6)]
            assert [t.result() for t in running] == wanted == [t.result() for t in more]
            assert answer["moving"] >= 1 and counted(llm, "task_moves") >= 1
            roles = [te["role"] for te in llm.cluster.describe()]
            assert (roles[busy], roles[1 - busy]) == ("prefill", "decode")
            await let_go(llm)
            for number, role, why in ((busy, "decode", "no task could run"), (7, "decode", "no TE 7"), (0, "semi", "semi pair")):
                with pytest.raises(UserError, match=why):
                    llm.give_role(number, role)  # type: ignore[arg-type]

    asyncio.run(run())


def test_the_shares_of_a_semi_pair_follow_the_promises(model):
    """A TTFT that can't be kept and a TPOT that always is: the prefill worker's share is at its most, so the other's sinks."""

    async def run() -> None:
        async with AsyncLLM(model, **SMALL, pd="semi", slo_ttft_ms=0.001, slo_tpot_ms=60000.0) as llm:
            wanted = await one(llm, "text", temperature=0.0, max_tokens=200)
            for i in range(200):
                texts = await asyncio.gather(one(llm, "text", temperature=0.0, max_tokens=200), one(llm, f"{i}" + COMMON))
                assert texts[0] == wanted
                shares = {te["id"]: te["share"] for te in llm.cluster.describe()}
                if shares[0] < 100:
                    break
            assert shares == {0: shares[0], 1: 100} and shares[0] < 100

    asyncio.run(run())


def test_the_lender_of_a_semi_pair_dies_while_the_other_worker_starts(model):
    """A prefill worker that had mapped the pool of the dead one would write where nobody reads."""

    async def run() -> None:
        async with AsyncLLM(model, **SMALL, pd="semi") as llm:
            wanted = await one(llm, COMMON, temperature=0.0)

            def state(te: int, *states: str) -> bool:
                return llm.cluster.describe()[te]["state"] in states

            os.kill(llm.cluster.describe()[0]["pid"], signal.SIGKILL)
            await until(lambda: not state(1, "ready"))
            for _ in range(2):
                await until(lambda: state(0, "ready") and state(1, "loading", "ready"))
                os.kill(llm.cluster.describe()[0]["pid"], signal.SIGKILL)
                await until(lambda: not state(0, "ready"))
            assert await one(llm, COMMON, temperature=0.0) == wanted and llm.health()["error"] is None
            await let_go(llm)

    asyncio.run(run())


@pytest.mark.parametrize(
    "settings, why",
    [
        ({"pd": "1p1d", "te": 2}, "leave out --te 2"),
        ({"pd": "1p"}, "1p1d"),
        ({"pd": "0p1d"}, "needs a decode TE"),
        ({"pd": "0c"}, "0 TEs"),
        ({"pd": "300c"}, "more than 256"),
        ({"pd": "semi", "slo_ttft_ms": 5.0}, "--slo-tpot-ms"),
        ({"pd": "1p1d", "slo_ttft_ms": 5.0, "slo_tpot_ms": 5.0}, "semi"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other(model, settings, why):
    async def run() -> None:
        async with AsyncLLM(model, **SMALL, **settings):
            pass

    with pytest.raises(UserError, match=why):
        asyncio.run(run())
