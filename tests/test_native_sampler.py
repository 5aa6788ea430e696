"""The compiled sampler against torch's, which is tested against the rules themselves in test_sampling.py."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from engine.devices import SamplingRows, SlotSetup
from engine.devices.native_sampler import NativeSampler, Sampling
from engine.devices.torch_sampler import Sampler, logprobs_where_asked
from engine.native import cpu
from tests.harness import rows

VOCAB, COUNT = 5003, 24


@pytest.fixture(params=cpu.available())
def team(request):
    made = cpu.Team(2, isa=request.param)
    yield made
    made.close()


def sample(team: cpu.Team, sampler: NativeSampler, logits: np.ndarray, asked: SamplingRows):
    """One native call; the logits stay as they are."""
    struct = Sampling()
    answer = sampler.ask(struct, asked)
    before = logits.copy()
    op = cpu.Op(kind=cpu.SAMPLE, sampled=1, x=logits.ctypes.data, w=ctypes.addressof(struct), n=logits.shape[1])
    team.run((cpu.Op * 1)(op), cpu.Step(sampled=len(logits)))
    assert np.array_equal(logits, before)
    return answer


def columns(rng: np.random.Generator) -> SamplingRows:
    """Rows of every kind, at random."""
    return rows(
        COUNT,
        seed=rng.integers(0, 2**63, COUNT),
        position=rng.integers(0, 10**6, COUNT),
        temperature=rng.choice([0.0, 0.3, 1.0, 1.7], COUNT),
        top_k=rng.choice([0, 0, 1, 7, 300, VOCAB, 10**6], COUNT),
        top_p=rng.choice([1.0, 0.1, 0.7, 0.99], COUNT),
        min_p=rng.choice([0.0, 0.0, 0.02, 0.5], COUNT),
        presence=rng.choice([0.0, 0.0, 1.5], COUNT),
        frequency=rng.choice([0.0, 0.0, -0.7], COUNT),
        repetition=rng.choice([1.0, 1.0, 1.3], COUNT),
        hold_stop=rng.random(COUNT) < 0.5,
        has_setup=rng.random(COUNT) < 0.5,
        logprobs=rng.choice([-1, 0, 3, 20], COUNT),
    )


def setup(slot: int, rng: np.random.Generator) -> SlotSetup:
    some = rng.integers(0, VOCAB, 9).astype(np.int32)
    bias = rng.normal(size=4).astype(np.float32)
    return SlotSetup(slot, some, some[3:7], some[:4], bias, np.append(some[5:7], VOCAB + 5).astype(np.int32), bool(slot % 2))


def test_ids_and_logprobs_are_those_of_the_reference(team):
    rng = np.random.default_rng(0)
    reference, native = Sampler(VOCAB, COUNT), NativeSampler(VOCAB, COUNT)
    different = 0
    for _ in range(25):
        for slot in range(COUNT):
            made = setup(slot, rng)
            reference.set_up(made)
            native.set_up(made)
        asked = columns(rng)
        for _ in range(2):  # the second counts what the first produced
            logits = (rng.standard_normal((COUNT, VOCAB)) * 4).astype(np.float32)
            want = reference.sample(torch.from_numpy(logits), asked)
            answer = sample(team, native, logits, asked)
            assert np.array_equal(native.last[asked.slot], answer.ids)
            same = answer.ids == want.numpy()
            different += int((~same).sum())
            expected = logprobs_where_asked(
                torch.from_numpy(logits), torch.from_numpy(answer.ids.astype(np.int64)), asked.logprobs
            )
            if expected is None:
                assert answer.logprobs is None
                continue
            assert answer.logprobs is not None
            assert np.allclose(answer.logprobs.chosen, expected.chosen, atol=2e-5)
            assert np.array_equal(answer.logprobs.rank, expected.rank)
            for row, top in enumerate(asked.logprobs):
                if top > 0:
                    assert np.array_equal(answer.logprobs.top_ids[row, :top], expected.top_ids[row, :top])
                    assert np.allclose(answer.logprobs.top[row, :top], expected.top[row, :top], atol=2e-5)
            for row in np.flatnonzero(~same):  # keep both histories the same
                reference.last[int(asked.slot[row])] = int(answer.ids[row])
    assert different <= 2, "only where two ids are as good as equal may the winner differ"


def test_an_id_does_not_depend_on_its_company(team):
    rng = np.random.default_rng(5)
    logits = (rng.standard_normal((COUNT, VOCAB)) * 4).astype(np.float32)
    asked = columns(rng)
    asked.has_setup[:] = False
    together = sample(team, NativeSampler(VOCAB, COUNT), logits, asked).ids
    for i in range(COUNT):
        one = SamplingRows(**{name: getattr(asked, name)[i : i + 1] for name in SamplingRows.__slots__})
        assert sample(team, NativeSampler(VOCAB, COUNT), logits[i : i + 1].copy(), one).ids[0] == together[i]
