"""API keys and whose they are: what a key's requests are promised, what they may take, and how they are weighed against others'.

A key from `--api-key` has the defaults of `Tenant`; one from `--api-keys-file` has what its table says:

    [keys.alice]
    key = "sk-alice"     # sent as `Authorization: Bearer sk-alice`
    weight = 2           # twice the share of a key of weight 1 where both want more than there is
    priority = 0         # a lower number goes first, as in requests
    rpm = 600            # requests a minute
    tpm = 100000         # tokens a minute, of prompts and outputs
    slo-ttft-ms = 500    # promised time to first token, instead of the server's
    slo-tpot-ms = 50     # promised time between two tokens
"""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from engine.types import UserError


class Tenant(msgspec.Struct, frozen=True, kw_only=True):
    """Who a request is from, as scheduling knows them: no secret in it."""

    name: str = ""  # of the key's table; "" is everybody where there are no keys
    weight: float = 1.0
    priority: int = 0
    rpm: int | None = None  # None: no bound
    tpm: int | None = None
    slo_ttft_ms: float | None = None  # None: the server's promise
    slo_tpot_ms: float | None = None


ANYONE = Tenant()


class Key(msgspec.Struct, frozen=True):
    """A key that the server accepts."""

    secret: bytes
    tenant: Tenant

    @property
    def salt(self) -> bytes:
        """What separates its prefix cache from other keys'."""
        return hashlib.sha256(self.secret).digest()[:16]


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A `[keys.NAME]` table."""

    key: Annotated[str, Meta(min_length=1, max_length=512)]
    weight: Annotated[float, Meta(gt=0, le=1000)] = 1.0
    priority: Annotated[int, Meta(ge=-100, le=100)] = 0
    rpm: Annotated[int, Meta(ge=1)] | None = None
    tpm: Annotated[int, Meta(ge=1)] | None = None
    slo_ttft_ms: Annotated[float, Meta(gt=0)] | None = None
    slo_tpot_ms: Annotated[float, Meta(gt=0)] | None = None


EXAMPLE = 'write for example [keys.alice] and below it key = "sk-alice"'


def read(file: Path) -> list[Key]:
    """The keys of `--api-keys-file`. Raises `UserError`; no message holds a key."""
    where = f"--api-keys-file {file}"
    try:
        table = tomllib.loads(file.read_text())
    except OSError as e:
        raise UserError(f"{where}: {e.strerror}", "api_keys_file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"{where}: not TOML: {e}", "api_keys_file") from None
    tables = table.pop("keys", None)
    if table:
        raise UserError(f"{where}: {next(iter(table))!r} is no table of keys; {EXAMPLE}", "api_keys_file")
    if not isinstance(tables, dict) or not tables:
        raise UserError(f"{where}: there is no key in it; {EXAMPLE}", "api_keys_file")
    return [from_table(name, one, where) for name, one in tables.items()]


def from_table(name: str, values: object, where: str) -> Key:
    if isinstance(values, dict):
        values = {k.replace("-", "_"): v for k, v in values.items()}
    try:
        table = msgspec.convert(values, Table)
    except msgspec.ValidationError as e:
        reason, _, place = str(e).partition(" - at `$.")
        field = place.rstrip("`").replace("_", "-")
        raise UserError(f"{where} [keys.{name}]{field and f' {field}'}: {reason}; {EXAMPLE}", "api_keys_file") from None
    secret = table.key.strip().encode()
    if not secret:
        raise UserError(f"{where} [keys.{name}] key: it is blank; {EXAMPLE}", "api_keys_file")
    settings = {field: getattr(table, field) for field in Table.__struct_fields__ if field != "key"}
    return Key(secret, Tenant(name=name, **settings))


def plain(secrets: Iterable[str]) -> list[Key]:
    """The keys of `--api-key`, each somebody of their own."""
    return [Key(secret.encode(), Tenant(name=f"api-key-{i}")) for i, secret in enumerate(dict.fromkeys(secrets), 1)]


def together(*several: Iterable[Key]) -> list[Key]:
    """All keys of a server. Raises `UserError` where one key or one name stands for two."""
    every = [key for keys in several for key in keys]
    by_secret: dict[bytes, str] = {}
    names: set[str] = set()
    for key in every:
        name = key.tenant.name
        if name in names:
            raise UserError(f"--api-keys-file [keys.{name}]: a key of --api-key has that name; choose another", "api_keys_file")
        if (other := by_secret.setdefault(key.secret, name)) != name:
            raise UserError(f"--api-keys-file [keys.{name}]: it has the key of {other}; give each its own", "api_keys_file")
        names.add(name)
    return every
