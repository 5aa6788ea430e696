"""/v1/completions and /v1/chat/completions: decode, check, tokenise, submit, answer. Leaving a handler for whatever cause leaves
the service's context, and with it the request ends everywhere."""

from __future__ import annotations

import logging
import time
import uuid

import msgspec
from aiohttp import web

from engine.types import SamplingParams
from sched.contexts import Context
from sched.gateway import errors, prompt, schema, shapes
from sched.gateway.face import Model, Service
from sched.gateway.keys import CALLER_ID, FINGERPRINT, HEART, REQUEST_ID, SERVICE, TENANT
from sched.gateway.limits import placement, submitted
from sched.gateway.sse import EventStream
from sched.stream import Expired, Stream, Submission

log = logging.getLogger(__name__)


def begun_with(request: web.Request, asked: schema.Generation, model: Model) -> Context | None:
    """The explicit context that a request begins with. Raises `Problem`, `UnknownContext`."""
    if asked.context_id is None:
        return None
    context = request.app[SERVICE].contexts.get(asked.context_id, request[TENANT])
    if context.model != model.id:
        raise errors.Problem(f"context_id: this context is of model {context.model}, not {model.id}", "context_id")
    return context


async def served(service: Service, name: str | None, wake: bool = True) -> Model:
    """The model asked for; a caller who names none gets the default one, as with vLLM. `wake`: it is to run something."""
    return await service.model(name or "", wake)


def new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex


def begin(request: web.Request, prefix: str) -> str:
    """The id of a new response, which is also the request's id where the caller gave none."""
    id = new_id(prefix)
    if not request[CALLER_ID]:
        request[REQUEST_ID] = id
    return id


async def chat(request: web.Request) -> web.StreamResponse:
    id = begin(request, "chatcmpl-")
    asked = schema.decode(schema.CHAT, await request.read())
    model = await served(request.app[SERVICE], asked.model)
    params = schema.sampling(asked, model.tokenizer.vocab_size)
    context = begun_with(request, asked, model)
    if context is None:
        ids = await prompt.chat_ids(model, asked.messages, asked)
    else:
        ids = await prompt.chat_ids_after(model, context, asked)
    submission = submit_form(request, id, "chat", asked, model, params, [ids], context)
    head = shapes.Head(id, int(time.time()), model.id, request.app[FINGERPRINT])
    return await answer(request, submission, shapes.Chat(head, model.tokenizer, params.logprobs, wants_usage(asked)), asked)


async def completion(request: web.Request) -> web.StreamResponse:
    id = begin(request, "cmpl-")
    asked = schema.decode(schema.COMPLETION, await request.read())
    model = await served(request.app[SERVICE], asked.model)
    params = schema.sampling(asked, model.tokenizer.vocab_size)
    context = begun_with(request, asked, model)
    if context is None:
        rows = await prompt.prompt_ids(model, asked)
    else:
        rows = await prompt.prompt_ids_after(model, context, asked)
    submission = submit_form(request, id, "completion", asked, model, params, rows, context)
    if params.max_tokens is None:  # not asked for: OpenAI's default, or less where the context ends sooner
        room = model.max_model_len - max(map(len, rows))
        params.max_tokens = min(max(schema.COMPLETION_TOKENS, params.min_tokens), room)
    echo = None
    if asked.echo:
        texts = [asked.prompt] if isinstance(asked.prompt, str) else [p for p in asked.prompt if isinstance(p, str)]
        texts = texts or [model.tokenizer.decode(row, skip_special=False) for row in rows]
        echo = shapes.Echo(list(rows), texts, params.n, {})
    head = shapes.Head(id, int(time.time()), model.id, request.app[FINGERPRINT])
    shape = shapes.Completion(head, model.tokenizer, params.logprobs, wants_usage(asked), echo)
    return await answer(request, submission, shape, asked)


def wants_usage(asked: schema.Generation) -> bool:
    return asked.stream_options is not None and bool(asked.stream_options.include_usage)


def submit_form(
    request: web.Request,
    id: str,
    kind: str,
    asked: schema.Generation,
    model: Model,
    params: SamplingParams,
    rows: list[list[int]],
    context: Context | None,
) -> Submission:
    """The submission, once the prompts fit."""
    field = "messages" if kind == "chat" else "prompt"
    return Submission(
        id=id,
        model=model.id,
        prompts=prompt.fit(model, rows, params, field, schema.limit_field(asked)),
        params=params,
        trace_id=request[CALLER_ID],
        kind=kind,
        salt=request[TENANT],
        priority=asked.priority or 0,
        retain=schema.retention(asked),
        context=context.id if context is not None else "",
        context_tokens=len(context.ids) if context is not None else 0,
    )


def so_far(shape: shapes.Chat | shapes.Completion, gathering: shapes.Gathering, stream: Stream) -> bytes | None:
    """The reply as it is now. None where there is nothing of it, or where it begins with its prompt: that isn't scored yet."""
    if not stream.generated or (isinstance(shape, shapes.Completion) and shape.echo is not None):
        return None
    return shape.whole(gathering, msgspec.structs.replace(stream.usage, completion_tokens=stream.generated))


async def answer(
    request: web.Request, submission: Submission, shape: shapes.Chat | shapes.Completion, asked: schema.Generation
) -> web.StreamResponse:
    """Submit and reply, in one piece or event by event."""
    choices = len(submission.prompts) * submission.params.n
    async with submitted(request, submission) as stream:
        if isinstance(shape, shapes.Completion) and shape.echo is not None:
            shape.echo.logprobs = stream.prompt_logprobs
        if not asked.stream:
            gathering = shapes.Gathering(choices)
            try:
                await stream.run(gathering.add)
            except Expired as e:
                raise errors.late(e, so_far(shape, gathering, stream)) from None
            body = shape.whole(gathering, stream.usage)
            return web.Response(body=body, content_type="application/json", headers=placement(request, submission))
        events = EventStream(request, request.app[HEART], shape, placement(request, submission))
        try:
            await events.open()
            await stream.run(events.put, events.note)
            events.send(shape.tail(stream.usage))
        except Exception as e:  # too late for a status: the error is the stream's last event
            found = errors.problem(e, request)
            if found is None:
                log.exception("request=%s failed while streaming", submission.id)
                found = errors.Problem("internal error", status=500)
            events.send(b"data: %b\n\n" % found.body())
        finally:
            events.stop()
    # The request has ended everywhere; what is left is a client that may take its time to read.
    return await events.close()
