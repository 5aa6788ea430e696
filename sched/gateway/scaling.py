"""How many TEs there are, and of which models: scale, sleep, wake, drain. vLLM's names for some of it stand beside ours.

Each answers when what was asked for is done. A caller who leaves before gets no answer; nothing is undone.
"""

from __future__ import annotations

from aiohttp import web

from sched.gateway import errors, schema
from sched.gateway.admin import listed, reply
from sched.gateway.keys import SERVICE

LEVELS = ("1", "2")  # of sleep


async def state(request: web.Request) -> web.Response:
    return reply(request.app[SERVICE].scale_state())


async def scale(request: web.Request) -> web.Response:
    asked = schema.decode(schema.SCALE, await request.read())
    return reply(await request.app[SERVICE].scale(asked.model or "", asked.te, asked.role))


async def sleep(request: web.Request) -> web.Response:
    asked = schema.decode(schema.SLEEP, await request.read() or b"{}")
    return reply(await request.app[SERVICE].sleep(asked.model or "", asked.level))


async def wake(request: web.Request) -> web.Response:
    asked = schema.decode(schema.WAKE, await request.read() or b"{}")
    return reply(await request.app[SERVICE].wake(asked.model or ""))


async def drain(request: web.Request) -> web.Response:
    asked = schema.decode(schema.DRAIN, await request.read())
    return reply(await request.app[SERVICE].drain(asked.te))


# ---- vLLM's names ---------------------------------------------------------------------------------------------------


def query(request: web.Request, **fields: str) -> dict[str, str]:
    """The query's values; `fields` are the possible ones with their defaults. Raises `Problem` naming any other."""
    for name, value in request.query.items():
        if name not in fields:
            known = ", ".join(fields)
            raise errors.Problem(f"there is no query parameter {name} here, only {known}", name, code="unknown_parameter")
        fields[name] = value
    return fields


async def vllm_sleep(request: web.Request) -> web.Response:
    asked = query(request, level="1", model="")
    if asked["level"] not in LEVELS:
        message = f"level: 1 keeps the packed weights in memory, 2 drops them too; there is no level {asked['level']}"
        raise errors.Problem(message, "level", code="invalid_value")
    return reply(await request.app[SERVICE].sleep(asked["model"], int(asked["level"])))


async def vllm_wake_up(request: web.Request) -> web.Response:
    return reply(await request.app[SERVICE].wake(query(request, model="")["model"]))


async def vllm_is_sleeping(request: web.Request) -> web.Response:
    model = listed(request, query(request, model="")["model"])
    return reply({"is_sleeping": model.state in ("asleep", "off")})
