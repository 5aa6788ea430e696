"""Keys of KV blocks: a chain of hashes over the prompt's blocks, shared by RTC and by whoever predicts its hits.

A cryptographic hash (BLAKE2b, 16 bytes) and not a fast one: a collision would show one tenant's text to another. The chain starts
from a salt of tenant and adapter, so equal prompts of different tenants never meet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

KEY_BYTES = 16


def root_key(salt: bytes) -> bytes:
    """The key before a prompt's first block."""
    return hashlib.blake2b(salt, digest_size=KEY_BYTES, person=b"deepserve-kv").digest()


def block_keys(parent: bytes, ids: memoryview | bytes, block_size: int) -> Iterator[bytes]:
    """Keys of the full blocks in `ids` (int32 bytes) that follow the block with key `parent`."""
    step = block_size * 4
    for start in range(0, len(ids) - step + 1, step):
        parent = hashlib.blake2b(ids[start : start + step], digest_size=KEY_BYTES, key=parent).digest()
        yield parent
