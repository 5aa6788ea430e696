"""Explicit contexts: prompts that a caller has stored, to begin later requests with. Pure but for the clock it is given.

A context is its token ids, here. Its KV blocks lie in the tiers and are soft: lost, they are computed again. Each belongs to the
API key that made it, and for every other key it doesn't exist.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable
from typing import Any

import msgspec

from engine.types import UserError

DEFAULT_TTL = 3600.0  # seconds
LONGEST_TTL = 7 * 86400.0
# Of one API key. A context of 2000 tokens takes 8 kB here, but each is something to keep with priority in every tier.
MOST_CONTEXTS = 1024


class UnknownContext(UserError):
    """There is none of that id, any more or for this key."""


class Context(msgspec.Struct, kw_only=True):
    id: str
    tenant: bytes  # the salt of the API key that it belongs to
    model: str
    ids: array[int]
    text: str  # what `ids` are the tokens of; "" where they were given as ids
    messages: list[dict[str, Any]] | None  # where it was made from a conversation
    ttl: float  # seconds
    created: float  # Unix seconds
    expires: float


class Contexts:
    """Every context of a server. `gone(id)` is told of each that is deleted or has expired."""

    def __init__(self, gone: Callable[[str], None], clock: Callable[[], float] = time.time):
        self.gone = gone
        self.clock = clock
        self.table: dict[str, Context] = {}

    def check_room(self, tenant: bytes) -> None:
        """Raises `UserError` where this key has as many as it may have."""
        if len(self.of(tenant)) >= MOST_CONTEXTS:
            raise UserError(f"there are {MOST_CONTEXTS} contexts of this key; delete some, or give them a shorter ttl", "ttl")

    def add(
        self,
        id: str,
        tenant: bytes,
        model: str,
        ids: array[int],
        text: str,
        messages: list[dict[str, Any]] | None,
        ttl: float,
    ) -> Context:
        now = self.clock()
        made = Context(
            id=id,
            tenant=tenant,
            model=model,
            ids=ids,
            text=text,
            messages=messages,
            ttl=ttl,
            created=now,
            expires=now + ttl,
        )
        self.table[id] = made
        return made

    def of(self, tenant: bytes) -> list[Context]:
        """A key's contexts, oldest first."""
        self.expire()
        return [context for context in self.table.values() if context.tenant == tenant]

    def get(self, id: str, tenant: bytes) -> Context:
        """Raises `UnknownContext`."""
        self.expire()
        found = self.table.get(id)
        if found is None or found.tenant != tenant:
            raise UnknownContext(f"there is no context {id!r}; contexts end with their ttl", "context_id")
        return found

    def delete(self, id: str, tenant: bytes) -> Context:
        """Raises `UnknownContext`."""
        found = self.get(id, tenant)
        del self.table[id]
        self.gone(id)
        return found

    def expire(self) -> None:
        """Forget those whose time is over. Called by whoever looks, since until then nobody can tell."""
        now = self.clock()
        for id in [id for id, context in self.table.items() if context.expires <= now]:
            del self.table[id]
            self.gone(id)
