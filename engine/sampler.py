"""How a token is chosen from logits: the rules every device follows, and the noise they share. Imports no torch.

A sampled row goes through these steps, in float32, in this order (the same as vLLM's):

 1. stop ids          -inf for the slot's stop ids while `min_tokens` is not reached (`hold_stop`)
 2. logit_bias        added
 3. repetition        ids of the prompt or the output: a positive logit is divided by it, any other multiplied
 4. frequency         ids of the output: minus frequency * (times it occurs)
 5. presence          ids of the output: minus presence
 6. temperature       below GREEDY_BELOW: the largest logit wins, the lowest id among equals, and nothing below applies;
                      else logits are divided by it
 7. min_p             drops logits below max + ln(min_p)
 8. top_k             drops logits below the k-th largest of what is left; equals of the k-th stay
 9. top_p             with w = exp(logit - max) of what is left, likeliest first: keeps a token while the w before it sum to less
                      than top_p * (sum of w); equals of the last one kept stay
10. choice            an exponential race: the id with the largest w / waiting(seed, position, id), the lowest id among
equals. An id
                      wins with probability w / (sum of w)

The race, and not where one number falls in a running sum: that sum runs past thousands of ids, and a rounding difference of
1e-6 anywhere before one moves its edge. Between devices, batches or chunkings that are not bit-equal, the race's winner
changes a thousand times more seldom, so that a text replayed elsewhere goes on as it was.

So what is left is always {logit >= a threshold}, and the choice depends on the row's logits, its seed and its position: never on
the batch, the order of rows or what was sampled elsewhere. `position` is the one the chosen token will have.

Log-probabilities are of the raw distribution: log-softmax of the logits before step 1.
"""

from __future__ import annotations

import numpy as np

GREEDY_BELOW = 1e-5  # vLLM's bound: a smaller temperature would overflow the division and change nothing

# SplitMix64 (Steele, Lea, Flood 2014): the odd constant nearest 2**64 / golden ratio, and its finaliser's multipliers.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
# MurmurHash3's 32-bit finaliser (Appleby 2011).
MURMUR = (np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35))


def mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser on uint64, modulo 2**64."""
    z = (z ^ (z >> np.uint64(30))) * MULTIPLIERS[0]
    z = (z ^ (z >> np.uint64(27))) * MULTIPLIERS[1]
    return z ^ (z >> np.uint64(31))


def scramble(x: np.ndarray) -> None:
    """MurmurHash3's finaliser on uint32, modulo 2**32, in place."""
    x ^= x >> np.uint32(16)
    x *= MURMUR[0]
    x ^= x >> np.uint32(13)
    x *= MURMUR[1]
    x ^= x >> np.uint32(16)


def keys(seed: np.ndarray, position: np.ndarray) -> np.ndarray:
    """uint64 [n]: `noise`'s key of each (seed, position).

    The seed is mixed by itself first, since seeds of one task follow one another and must not give shifted copies of
    one stream."""
    seeds = np.atleast_1d(np.asarray(seed, np.uint64))
    steps = (np.atleast_1d(np.asarray(position, np.int64)) + 1).astype(np.uint64)
    return mix(mix(seeds) + steps * GOLDEN)


def noise(seed: np.ndarray, position: np.ndarray, vocab: int) -> np.ndarray:
    """uint32 [n, vocab]: for each (uint64 seed, int64 position) a word for every id,

    key  = mix(mix(seed) + (position + 1) * GOLDEN)                      64 bits
    word = scramble(scramble(id + low half of key) ^ high half of key)   32 bits
    """
    key = keys(seed, position)[:, None]
    words = np.arange(vocab, dtype=np.uint32) + key.astype(np.uint32)
    scramble(words)
    words ^= (key >> np.uint64(32)).astype(np.uint32)
    scramble(words)
    return words


def uniform(seed: np.ndarray, position: np.ndarray, vocab: int) -> np.ndarray:
    """u in (0, 1], float32 [n, vocab]: (word + 0.5) * 2**-32, rounded. waiting = -log(1 - u), in float32: small u,
    which decide, are exact."""
    return (noise(seed, position, vocab).astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)
