"""The routes that generate nothing: models, tokenize, detokenize, health, metrics, version, jobs, task executors."""

from __future__ import annotations

from typing import Any

import orjson
from aiohttp import web

from sched.gateway import errors, prompt, schema
from sched.gateway.face import Card
from sched.gateway.keys import SERVICE, VERSION
from sched.gateway.openai import served
from sched.off_loop import off_loop


def reply(value: Any, status: int = 200) -> web.Response:
    return web.Response(status=status, body=orjson.dumps(value), content_type="application/json")


# ---- models ---------------------------------------------------------------------------------------------------------


def card(model: Card) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "deepserve",
        "root": model.root,
        "parent": None,
        "max_model_len": model.max_model_len,
        "state": model.state,
        "te": model.te,
    }


async def models(request: web.Request) -> web.Response:
    return reply({"object": "list", "data": [card(m) for m in request.app[SERVICE].models()]})


async def model(request: web.Request) -> web.Response:
    return reply(card(listed(request, request.match_info["id"])))


def listed(request: web.Request, name: str) -> Card:
    """The card of the model called `name`, "" being the default one. Raises `Problem`."""
    for one in request.app[SERVICE].models():
        if name in ("", one.id):
            return one
    raise errors.Problem(f"The model `{name}` does not exist", "model", status=404, code="model_not_found")


# ---- tokens ---------------------------------------------------------------------------------------------------------


async def tokenize(request: web.Request) -> web.Response:
    asked = schema.decode(schema.TOKENIZE, await request.read())
    if (asked.prompt is None) == (asked.messages is None):
        raise errors.Problem("send either prompt or messages", "prompt", code="missing_required_parameter")
    model = await served(request.app[SERVICE], asked.model, wake=False)
    tokenizer = model.tokenizer
    if asked.messages is not None:
        ids = await prompt.chat_ids(model, asked.messages, asked, add_special=bool(asked.add_special_tokens))
    else:
        text, special = asked.prompt or "", asked.add_special_tokens is not False
        ids = await off_loop(len(text), lambda: tokenizer.encode(text, special))
    strings = [tokenizer.token(id) for id in ids] if asked.return_token_strs else None
    return reply({"count": len(ids), "max_model_len": model.max_model_len, "tokens": list(ids), "token_strs": strings})


async def detokenize(request: web.Request) -> web.Response:
    asked = schema.decode(schema.DETOKENIZE, await request.read())
    model = await served(request.app[SERVICE], asked.model, wake=False)
    prompt.check_ids(asked.tokens, model.tokenizer.vocab_size, "tokens")
    text = await off_loop(len(asked.tokens), lambda: model.tokenizer.decode(asked.tokens, skip_special=False))
    return reply({"prompt": text})


# ---- the server itself ----------------------------------------------------------------------------------------------


async def health(request: web.Request) -> web.Response:
    state = request.app[SERVICE].health()
    return reply(state, 200 if state["status"] == "ok" else 503)


async def metrics(request: web.Request) -> web.Response:
    text = request.app[SERVICE].metrics()
    return web.Response(body=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


async def version(request: web.Request) -> web.Response:
    return reply({"version": request.app[VERSION]})


async def job(request: web.Request) -> web.Response:
    id = request.match_info["id"]
    found = request.app[SERVICE].job(id)
    if found is None:
        message = f"No request {id!r} is known; finished ones are forgotten after a while"
        raise errors.Problem(message, "id", status=404, code="job_not_found")
    return reply(found)


async def executors(request: web.Request) -> web.Response:
    return reply({"object": "list", "data": await request.app[SERVICE].executors()})


async def give_role(request: web.Request) -> web.Response:
    asked = schema.decode(schema.GIVE_ROLE, await request.read())
    te = request.match_info["id"]
    number = int(te) if te.isascii() and te.isdigit() and len(te) < 10 else -1  # no TE has that
    return reply(request.app[SERVICE].give_role(number, asked.role))
