"""Sampling on the cpu device, against the rules of `engine/sampler.py` written out plainly in numpy, a row at a time."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from engine.devices import SamplingRows
from engine.devices import torch_sampler as module
from engine.devices.torch_sampler import Sampler, logprobs, logprobs_where_asked
from engine.sampler import noise, uniform
from tests.harness import rows, setup

VOCAB = 1000


def draw(logits: np.ndarray, **columns: object) -> list[int]:
    """Ids for [R, vocab] logits, no slot having a setup."""
    sampler = Sampler(logits.shape[1], max(64, len(logits)))
    return sampler.sample(torch.from_numpy(logits), rows(len(logits), **columns)).tolist()


def some_logits(count: int, seed: int = 0, vocab: int = VOCAB) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((count, vocab)) * 3).astype(np.float32)


def kept(x: np.ndarray, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """The mask of what min_p, top_k and top_p leave of one row of logits already divided by the temperature."""
    left = np.ones(len(x), bool)
    if min_p > 0:
        left &= x >= x.max() + np.float32(np.log(np.float32(min_p)))
    if top_k > 0:
        left &= x >= np.sort(np.where(left, x, -np.inf))[::-1][min(top_k, len(x)) - 1]
    if top_p < 1:
        order = np.argsort(-x, kind="stable")
        w = np.where(left, np.exp(x - x.max()), 0).astype(np.float64)[order]
        inside = np.cumsum(w) - w < np.float64(np.float32(top_p)) * w.sum()
        left &= x >= x[order][inside & left[order]].min()
    return left


def choose(logits: np.ndarray, r: SamplingRows, i: int) -> int:
    """What row `i` must choose, from logits after penalties."""
    if r.temperature[i] == 0:
        return int(logits.argmax())
    x = logits / r.temperature[i]
    w = np.where(kept(x, r.top_k[i], r.top_p[i], r.min_p[i]), np.exp(x - x.max()), 0).astype(np.float64)
    u = uniform(r.seed[i], r.position[i], len(w))[0].astype(np.float64)
    return int((w / -np.log1p(-u)).argmax())


# ---- the noise ------------------------------------------------------------------------------------------------------


def noise_by_hand(seed: int, position: int, token: int) -> int:
    """The documented function in plain integers, as C would compute it."""
    wide, narrow = 2**64 - 1, 2**32 - 1

    def mix(z: int) -> int:
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & wide
        z = (z ^ z >> 27) * 0x94D049BB133111EB & wide
        return z ^ z >> 31

    def scramble(x: int) -> int:
        x = (x ^ x >> 16) * 0x85EBCA6B & narrow
        x = (x ^ x >> 13) * 0xC2B2AE35 & narrow
        return x ^ x >> 16

    key = mix(mix(seed) + (position + 1) * 0x9E3779B97F4A7C15 & wide)
    return scramble(scramble(token + key & narrow) ^ key >> 32)


def test_noise_is_the_documented_function_of_seed_position_and_id():
    seeds = [0, 1, 2, 12345, 2**63, 2**64 - 1]
    for position in (0, 1, 777, 2**31):
        want = [[noise_by_hand(s, position, token) for token in range(40)] for s in seeds]
        assert noise(np.array(seeds, np.uint64), np.full(6, position), 40).tolist() == want
    # Stored: other devices and later versions must continue the same text.
    words = noise(np.repeat(np.arange(8, dtype=np.uint64), 8), np.tile(np.arange(8), 8), 1000)
    assert hashlib.sha256(words.astype("<u4").tobytes()).hexdigest()[:16] == "dca67ded0625ffdc"


def test_noise_is_even_along_positions_seeds_and_ids():
    many = 20_000
    along = (
        uniform(np.full(many, 7, np.uint64), np.arange(many), 3)[:, 2],
        uniform(np.arange(many, dtype=np.uint64), np.full(many, 3), 3)[:, 1],
        uniform(np.array([9], np.uint64), np.array([4]), many)[0],
    )
    for u in along:
        assert u.min() > 0 and u.max() <= 1
        counts = np.bincount(np.minimum(u * 50, 49).astype(int), minlength=50)
        assert chi_square(counts, np.full(50, many / 50)) < 95  # 49 degrees of freedom: exceeded once in 10 000
        assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03


def chi_square(found: np.ndarray, expected: np.ndarray) -> float:
    return float(((found - expected) ** 2 / expected).sum())


# ---- each parameter -------------------------------------------------------------------------------------------------

COLUMNS = {
    "greedy": {},
    "temperature": {"temperature": [0.2, 0.7, 1.0, 1.9, 50.0, 1.0]},
    "top_k": {"temperature": 1.0, "top_k": [1, 2, 10, 999, 1000, 0]},
    "top_p": {"temperature": 1.0, "top_p": [1e-6, 0.1, 0.5, 0.9, 0.999, 1.0]},
    "min_p": {"temperature": 1.0, "min_p": [0.0, 1e-4, 0.01, 0.1, 0.5, 1.0]},
    "all": {
        "temperature": [0.0, 0.5, 1.0, 1.5, 1.0, 3.0],
        "top_k": [5, 20, 0, 300, 50, 0],
        "top_p": [0.5, 0.9, 0.8, 1.0, 0.99, 0.6],
        "min_p": [0.1, 0.0, 0.05, 0.02, 0.0, 0.001],
    },
}


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("candidates", [16, 2000], ids=["few_candidates", "many_candidates"])
def test_choices_follow_the_rules(name, candidates, monkeypatch):
    """Many draws of each kind of row; with few candidates the nucleus of most rows goes on beyond them."""
    monkeypatch.setattr(module, "CANDIDATES", candidates)
    for position in range(25):
        logits = some_logits(6, position)
        r = rows(6, **COLUMNS[name], seed=np.arange(6) + 100, position=position)
        ids = Sampler(VOCAB, 6).sample(torch.from_numpy(logits), r).tolist()
        assert ids == [choose(logits[i], r, i) for i in range(6)]


def test_equals_of_the_last_kept_stay_and_greedy_takes_the_lowest_id():
    tied = np.array([[0.0, 2.0, 1.0, 1.0, 1.0, 2.0, -5.0, -5.0]] * 4000, np.float32)
    assert draw(tied[:3]) == [1, 1, 1]
    position = np.arange(4000)
    assert set(draw(tied, temperature=1.0, top_k=3, position=position)) == {1, 2, 3, 4, 5}
    assert set(draw(tied, temperature=1.0, top_k=1, position=position)) == {1, 5}
    assert set(draw(tied, temperature=1.0, top_p=0.7, position=position)) == {1, 2, 3, 4, 5}
    assert set(draw(tied, temperature=1.0, min_p=0.9, position=position)) == {1, 5}
    # A large vocabulary of equals has no nucleus smaller than itself.
    flat = np.zeros((300, 3000), np.float32)
    assert len(set(draw(flat, temperature=1.0, top_p=0.5, position=np.arange(300)))) > 250


def test_a_temperature_near_zero_is_greedy():
    logits = some_logits(3)
    assert draw(logits, temperature=[0.0, 1e-6, 1e-4]) == logits.argmax(1).tolist()


def test_the_frequencies_are_the_softmax():
    logits = np.array([2.0, 1.0, 0.5, 0.0, -1.0, -2.0, 1.5, 0.7] * 10, np.float32)
    many = 20_000
    for temperature, top_k in ((1.0, 0), (0.5, 0), (1.3, 30)):
        x = logits / np.float32(temperature)
        p = np.where(kept(x, top_k, 1.0, 0.0), np.exp(x), 0)
        p = p / p.sum()
        ids = []
        for at in range(0, many, 1000):
            ids += draw(
                np.tile(logits, (1000, 1)), temperature=temperature, top_k=top_k, seed=42, position=np.arange(at, at + 1000)
            )
        found = np.bincount(ids, minlength=len(p))
        assert not found[p == 0].any()
        assert chi_square(found[p > 0], p[p > 0] * many) < 2 * (p > 0).sum()


def test_the_batch_does_not_matter():
    """Every row alone, in another order and among others chooses the same."""
    logits = some_logits(40, 5)
    rng = np.random.default_rng(6)
    columns = {
        "temperature": rng.choice([0.0, 0.7, 1.2], 40),
        "top_k": rng.choice([0, 3, 40], 40),
        "top_p": rng.choice([1.0, 0.8], 40),
        "min_p": rng.choice([0.0, 0.05], 40),
        "seed": rng.integers(0, 2**63, 40),
        "position": rng.integers(0, 1000, 40),
    }
    whole = draw(logits, **columns)
    assert [draw(logits[[i]], **{k: v[[i]] for k, v in columns.items()})[0] for i in range(40)] == whole
    order = rng.permutation(40)
    assert draw(logits[order], **{k: v[order] for k, v in columns.items()}) == [whole[i] for i in order]
    other_seed = draw(logits, **{**columns, "seed": columns["seed"] + 1})
    assert other_seed != whole


def test_rows_of_nan_choose_something_and_spoil_no_other_row():
    logits = some_logits(3)
    logits[1] = np.nan
    good = draw(logits[[0, 2]], temperature=1.0, top_p=0.9, seed=[1, 3])
    ids = draw(logits, temperature=1.0, top_p=0.9, seed=[1, 2, 3])
    assert [ids[0], ids[2]] == good and 0 <= ids[1] < VOCAB
    assert 0 <= draw(logits)[1] < VOCAB


# ---- what slots remember --------------------------------------------------------------------------------------------


def test_penalties_bias_and_held_stop_ids():
    rng = np.random.default_rng(8)
    vocab, count = 50, 6
    prompts = [rng.integers(0, vocab, 12) for _ in range(count)]
    texts = [list(rng.integers(0, vocab, n)) for n in (0, 3, 0, 9, 4, 0)]
    bias = [{}, {3: 5.0, 4: -100.0}, {7: 100.0}, {}, {1: 2.0, 49: 1.5, 2: -1.0}, {}]
    stops = [[], [5], [7, 8], [], [0], []]
    columns = {
        "slot": [4, 0, 2, 5, 1, 3],
        "repetition": [1.5, 1.0, 1.0, 0.8, 1.2, 1.0],
        "frequency": [0.0, 0.4, 0.0, 1.1, -0.5, 0.0],
        "presence": [0.3, 0.9, 0.0, 0.0, -1.0, 0.0],
        "has_setup": [True, True, True, True, True, False],
        "hold_stop": [False, True, True, False, False, False],
        "temperature": [0.0, 1.0, 0.0, 0.8, 0.0, 0.0],
        "top_k": [0, 0, 0, 7, 0, 0],
    }
    sampler = Sampler(vocab, count)
    for i in range(5):
        counts = i != 2
        sampler.set_up(
            setup(
                columns["slot"][i],
                prompt=prompts[i],
                generated=texts[i],
                bias=bias[i],
                stop_ids=[*stops[i], vocab + 3],
                counts=counts,
            )
        )
    for step in range(30):
        logits = some_logits(count, step, vocab) / 2
        r = rows(count, **columns, seed=5, position=step)
        expected = []
        for i in range(count):
            x = logits[i].copy()
            if r.hold_stop[i]:
                x[stops[i]] = -np.inf
            for token, value in bias[i].items():
                x[token] += np.float32(value)
            output = np.bincount(np.array(texts[i], int), minlength=vocab)
            seen = (output > 0) | np.isin(np.arange(vocab), prompts[i])
            x = np.where(seen, np.where(x > 0, x / r.repetition[i], x * r.repetition[i]), x)
            x = x - r.frequency[i] * output - r.presence[i] * (output > 0)
            expected.append(choose(x.astype(np.float32), r, i))
        before = logits.copy()
        found = sampler.sample(torch.from_numpy(logits), r).tolist()
        assert found == expected
        assert (logits == before).all(), "the raw logits were changed; log-probabilities are of the raw ones"
        assert sampler.last[columns["slot"]].tolist() == found
        for text, token in zip(texts, found, strict=True):
            text.append(token)


def test_a_slot_forgets_its_last_owner():
    sampler = Sampler(10, 2)
    logits = torch.tensor([[0.0] * 9 + [1.0]])
    sampler.set_up(setup(1, prompt=[9], bias={9: -50.0}, counts=True))
    penalised = rows(1, slot=1, has_setup=True, presence=2.0)
    assert sampler.sample(logits, penalised).tolist() == [0]
    assert sampler.sample(logits, rows(1, slot=1)).tolist() == [9], "a row without a setup met the bias of the one before"
    sampler.set_up(setup(1, counts=True))
    assert sampler.sample(logits, penalised).tolist() == [9]
    assert sampler.sample(logits, penalised).tolist() == [0], "the 9 just sampled counts"


def test_feed_takes_the_last_id_of_a_slot():
    sampler = Sampler(10, 3)
    sampler.sample(torch.eye(10)[[4, 7]], rows(2, slot=[2, 0]))
    ids, feed = torch.tensor([1, 2, 3, 4], dtype=torch.int32), torch.tensor([-1, 2, 0, -1], dtype=torch.int32)
    assert sampler.resolve(ids, feed).tolist() == [1, 4, 7, 4]


# ---- log-probabilities ----------------------------------------------------------------------------------------------


def test_logprobs_and_ranks():
    logits = some_logits(4, 3, 77)
    logits[0, [5, 9]] = logits[0].max() + 1  # two likeliest: rank 1 both, listed by id
    chosen = np.array([9, 3, int(logits[2].argmin()), int(logits[3].argmax())])
    out = logprobs(torch.from_numpy(logits), torch.from_numpy(chosen), 5)
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum(1, keepdims=True))
    np.testing.assert_allclose(out.chosen, expected[np.arange(4), chosen], atol=1e-5)
    assert out.rank.tolist() == [1, int((logits[1] > logits[1, 3]).sum()) + 1, 77, 1]
    order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    assert out.top_ids.tolist() == order.tolist() and out.top_ids[0, :2].tolist() == [5, 9]
    np.testing.assert_allclose(out.top, np.take_along_axis(expected, order, 1), atol=1e-5)


def test_logprobs_only_where_asked():
    logits = torch.from_numpy(some_logits(3, 3, 20))
    ids = torch.tensor([1, 2, 3])
    assert logprobs_where_asked(logits, ids, np.array([-1, -1, -1], np.int32)) is None
    out = logprobs_where_asked(logits, ids, np.array([0, -1, 3], np.int32))
    every = logprobs(logits, ids, 3)
    assert out is not None and out.top.shape == (3, 3) and out.rank[1] == 0
    assert out.chosen[[0, 2]].tolist() == every.chosen[[0, 2]].tolist() and out.top_ids[2].tolist() == every.top_ids[2].tolist()
    only_chosen = logprobs_where_asked(logits, ids, np.array([0, -1, 0], np.int32))
    assert only_chosen is not None and only_chosen.top.shape == (3, 0)
