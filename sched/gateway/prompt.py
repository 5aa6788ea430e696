"""From a request's words to token ids, and whether they fit the model's context. Knows no HTTP and no service.

Long texts are tokenised in a thread, so that a book in one request does not hold up everybody else's tokens.
"""

from __future__ import annotations

import contextlib
from array import array
from typing import Any

import msgspec

from engine.types import SamplingParams, UserError
from sched.contexts import Context
from sched.gateway import schema
from sched.gateway.errors import Problem
from sched.gateway.face import Model
from sched.off_loop import off_loop

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
RESERVED = {"self", "messages", "tools", "add_generation_prompt", "continue_final_message"}  # set by their own fields

# ---- messages -------------------------------------------------------------------------------------------------------


def text_of(content: Any, place: str) -> str:
    """A message's content as the text a template takes. Parts are joined by newlines, as vLLM and llama.cpp do."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Problem(f"{place}: expected a string or an array of parts", place, code="invalid_value")
    texts = []
    for i, part in enumerate(content):
        here = f"{place}[{i}]"
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise Problem(f'{here}: expected an object such as {{"type": "text", "text": "…"}}', here, code="invalid_value")
        if part["type"] not in ("text", "refusal"):  # a refusal is what an assistant once said
            raise Problem(
                f"{here}: parts of type {part['type']!r} are not supported yet, only text", here, code="unsupported_value"
            )
        text = part.get(part["type"])
        if not isinstance(text, str):
            raise Problem(f"{here}.{part['type']}: expected a string", f"{here}.{part['type']}", code="invalid_value")
        texts.append(text)
    return "\n".join(texts)


def tool_calls(calls: Any, place: str) -> list[Any]:
    """Tool calls of the history with their arguments as objects, which is what templates write out.

    Arguments that are no JSON stay text: a call that a model once botched must not end the conversation."""
    if not isinstance(calls, list):
        raise Problem(f"{place}: expected an array", place, code="invalid_value")
    out = []
    for call in calls:
        if isinstance(call, dict) and isinstance(function := call.get("function"), dict):
            arguments = function.get("arguments")
            if isinstance(arguments, str):
                with contextlib.suppress(msgspec.DecodeError, RecursionError):
                    arguments = msgspec.json.decode(arguments or "{}")
            call = {**call, "function": {**function, "arguments": {} if arguments is None else arguments}}
        out.append(call)
    return out


def conversation(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`messages` as templates take them. Fields we don't know stay, for templates that do."""
    out = []
    for i, message in enumerate(messages):
        place = f"messages[{i}]"
        role = message.get("role")
        if role not in ROLES:
            raise Problem(f"{place}.role: expected one of {', '.join(ROLES)}", f"{place}.role", code="invalid_value")
        content = message.get("content")
        if content is None and role not in ("assistant", "tool", "function"):
            raise Problem(f"{place}.content: this field is required", f"{place}.content", code="missing_required_parameter")
        ours = {**message, "content": "" if content is None else text_of(content, f"{place}.content")}
        if role == "developer":
            ours["role"] = "system"  # OpenAI's newer word for it, which the models served here were not trained on
        if ours.get("tool_calls") is None:
            ours.pop("tool_calls", None)
        else:
            ours["tool_calls"] = tool_calls(ours["tool_calls"], f"{place}.tool_calls")
        out.append(ours)
    return out


async def chat_ids(
    model: Model, messages: list[dict[str, Any]], how: schema.Chat | schema.Tokenize, add_special: bool = False
) -> list[int]:
    """The token ids of a conversation. Raises `Problem`."""
    text = await chat_text(model, messages, how)
    return await off_loop(len(text), lambda: model.tokenizer.encode(text, add_special))


async def chat_text(
    model: Model, messages: list[dict[str, Any]], how: schema.Chat | schema.Tokenize | schema.Context, begin: bool = True
) -> str:
    """A conversation as the chat template writes it; `begin`: with the beginning of a reply, unless `how` says otherwise. Raises
    `Problem`."""
    continued = False
    if not isinstance(how, schema.Context):
        if how.add_generation_prompt and how.continue_final_message:
            raise Problem("continue_final_message: not together with add_generation_prompt", "continue_final_message")
        continued = bool(how.continue_final_message)
        begin = how.add_generation_prompt if how.add_generation_prompt is not None else not continued
    extra = how.chat_template_kwargs or {}
    if taken := RESERVED & extra.keys():
        name = min(taken)
        raise Problem(f"chat_template_kwargs.{name}: has a field of its own", f"chat_template_kwargs.{name}")
    turns = conversation(messages)

    def render() -> str:
        return model.tokenizer.render(turns, None, begin, continued, **extra)

    try:
        return await off_loop(sum(len(m["content"]) for m in turns), render)
    except UserError as e:
        raise Problem(str(e), e.param or "messages") from None


# ---- plain prompts --------------------------------------------------------------------------------------------------


def check_ids(ids: list[int], vocab_size: int, field: str) -> None:
    bad = next((i for i in ids if not 0 <= i < vocab_size), None) if ids else None
    if bad is not None:
        raise Problem(f"{field}: token id {bad} is not in this model's vocabulary of {vocab_size}", field, code="invalid_value")


async def prompt_ids(model: Model, asked: schema.Completion) -> list[list[int]]:
    """The token ids of each prompt of a completion. Raises `Problem`."""
    prompt, tokenizer = asked.prompt, model.tokenizer
    special = asked.add_special_tokens is not False
    if isinstance(prompt, str):
        prompt = [prompt]
    kinds = {type(p) for p in prompt}
    if len(kinds) > 1:
        raise Problem("prompt: strings and token ids can't be mixed in one array", "prompt", code="invalid_value")
    if kinds == {str}:
        texts: list[Any] = prompt
        return await off_loop(sum(map(len, texts)), lambda: [tokenizer.encode(t, special) for t in texts])
    rows: list[Any] = [prompt] if kinds == {int} else prompt
    for i, row in enumerate(rows):
        check_ids(row, tokenizer.vocab_size, "prompt" if len(rows) == 1 else f"prompt[{i}]")
    return rows


# ---- limits ---------------------------------------------------------------------------------------------------------


def fit(model: Model, prompts: list[list[int]], params: SamplingParams, field: str, limit_field: str) -> list[array[int]]:
    """The prompts, packed, once it is sure that the longest of them and its output fit the context. Raises `Problem`."""
    if not all(prompts):
        raise Problem(f"{field}: an empty prompt can't be continued", field, code="invalid_value")
    longest, context = max(map(len, prompts)), model.max_model_len
    asked = params.max_tokens
    if longest + (0 if asked == 0 else 1) > context:
        raise Problem(
            f"This model's maximum context length is {context} tokens, but the prompt has {longest} tokens. Please shorten it.",
            field,
            code="context_length_exceeded",
        )
    for name, tokens in ((limit_field, asked), ("min_tokens", params.min_tokens)):
        if tokens is not None and longest + tokens > context:
            message = (
                f"This model's maximum context length is {context} tokens, but {longest + tokens} were requested"
                f" ({longest} in the prompt, {tokens} by {name}). Ask for at most {context - longest}."
            )
            raise Problem(message, name, code="context_length_exceeded")
    return [array("i", ids) for ids in prompts]


# ---- going on from an explicit context ----------------------------------------------------------------------------------


async def chat_ids_after(model: Model, context: Context, asked: schema.Chat) -> list[int]:
    """The token ids of a conversation that goes on from a context's messages. Raises `Problem`."""
    if context.messages is None:
        message = "context_id: this context was made from a prompt, and only /v1/completions can go on from it"
        raise Problem(message, "context_id")
    text = await chat_text(model, [*context.messages, *asked.messages], asked)
    if not text.startswith(context.text):
        message = "context_id: with these messages the chat template writes the context's own ones differently; send all messages"
        raise Problem(message, "context_id")
    rest = text[len(context.text) :]
    return [*context.ids, *await off_loop(len(rest), lambda: model.tokenizer.encode(rest, add_special=False))]


async def prompt_ids_after(model: Model, context: Context, asked: schema.Completion) -> list[list[int]]:
    """The token ids of each prompt of a completion that goes on from a context. Raises `Problem`."""
    if asked.echo:
        raise Problem("echo: not together with context_id, whose text is not part of the prompt", "echo")
    asked.add_special_tokens = False  # the text is in the middle of another
    return [[*context.ids, *row] for row in await prompt_ids(model, asked)]
