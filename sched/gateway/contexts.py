"""/v1/contexts: store a prompt's KV under an id, and manage what is stored."""

from __future__ import annotations

from array import array
from typing import Any

from aiohttp import web

from engine.types import SamplingParams
from sched.contexts import DEFAULT_TTL, Context
from sched.gateway import errors, prompt, schema
from sched.gateway.admin import reply
from sched.gateway.keys import CALLER_ID, SERVICE, TENANT
from sched.gateway.limits import submitted
from sched.gateway.openai import new_id, served
from sched.off_loop import off_loop
from sched.stream import Delta, Submission


def shown(context: Context) -> dict[str, Any]:
    return {
        "id": context.id,
        "object": "context",
        "model": context.model,
        "tokens": len(context.ids),
        "ttl": context.ttl,
        "created_at": int(context.created),
        "expires_at": int(context.expires),
    }


async def create(request: web.Request) -> web.Response:
    """Compute the prompt, and answer once its KV is there."""
    asked = schema.decode(schema.CONTEXT, await request.read())
    if (asked.prompt is None) == (asked.messages is None):
        raise errors.Problem("send either prompt or messages", "prompt", code="missing_required_parameter")
    service, tenant = request.app[SERVICE], request[TENANT]
    model = await served(service, asked.model)
    service.contexts.check_room(tenant)
    tokenizer = model.tokenizer
    if asked.messages is not None:
        field, text = "messages", await prompt.chat_text(model, asked.messages, asked, begin=False)
        ids = await off_loop(len(text), lambda: tokenizer.encode(text, add_special=False))
    elif isinstance(asked.prompt, str):
        field, text = "prompt", asked.prompt
        ids = await off_loop(len(text), lambda: tokenizer.encode(text, asked.add_special_tokens is not False))
    else:
        field, text, ids = "prompt", "", asked.prompt or []
        prompt.check_ids(ids, tokenizer.vocab_size, "prompt")
    ttl = DEFAULT_TTL if asked.ttl is None else asked.ttl
    params = SamplingParams(max_tokens=1, temperature=0.0)  # the one token is computed with the prompt, and dropped
    rows = prompt.fit(model, [ids], params, field, "prompt")
    id = new_id("ctx-")
    submission = Submission(
        id=id,
        model=model.id,
        prompts=rows,
        params=params,
        trace_id=request[CALLER_ID],
        kind="context",
        salt=tenant,
        retain=ttl,
        context=id,
        preserve=True,
    )
    try:
        async with submitted(request, submission) as stream:
            await stream.run(ignore)
    except BaseException:
        service.contexts.gone(id)  # TEs may know of it
        raise
    made = service.contexts.add(id, tenant, model.id, array("i", ids), text, asked.messages, ttl)
    return reply(shown(made), 201)


def ignore(deltas: list[Delta]) -> None:
    """A context has no output."""


async def every(request: web.Request) -> web.Response:
    found = request.app[SERVICE].contexts.of(request[TENANT])
    return reply({"object": "list", "data": [shown(context) for context in found]})


async def one(request: web.Request) -> web.Response:
    return reply(shown(request.app[SERVICE].contexts.get(request.match_info["id"], request[TENANT])))


async def delete(request: web.Request) -> web.Response:
    gone = request.app[SERVICE].contexts.delete(request.match_info["id"], request[TENANT])
    return reply({"id": gone.id, "object": "context", "deleted": True})
