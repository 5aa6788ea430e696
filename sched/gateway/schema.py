"""What a request may hold, and how a wrong one is refused. Knows no routes, no model and no service.

Types are checked by msgspec while it decodes; ranges are SamplingParams' own (engine/types.py), so that they exist once.
A null stands for a field left out, everywhere.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from engine.config import MOST_SEATS
from engine.types import MAX_LOGPROBS, SamplingParams
from sched.contexts import LONGEST_TTL
from sched.gateway.errors import Problem

MOST_STOPS = 16  # OpenAI takes 4; each costs a search in every delta
MOST_PROMPTS = 2048  # of one /v1/completions call, OpenAI's own bound
COMPLETION_TOKENS = 16  # OpenAI's default `max_tokens` of /v1/completions

# ---- documented fields that we don't do yet -------------------------------------------------------------------------
# Field -> the values that can't change the answer; null is always one. ANY: the field never changes it. Every other value
# is refused by name, never ignored.

ANY = ("any value",)
HARMLESS: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "function_call": ("none", "auto"),  # there are no functions to call
    "functions": ([],),
    "metadata": ANY,
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": ANY,
    "prediction": (),
    "prompt_cache_key": ANY,
    "prompt_cache_options": ANY,
    "prompt_cache_retention": ANY,
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "safety_identifier": ANY,
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),  # there are no tools to choose
    "tools": ([],),
    "user": ANY,
    "verbosity": (),
    "web_search_options": (),
}

if TYPE_CHECKING:

    class Documented(msgspec.Struct, kw_only=True):
        pass
else:
    Documented = msgspec.defstruct("Documented", [(name, Any, None) for name in HARMLESS], kw_only=True)


# ---- requests -------------------------------------------------------------------------------------------------------


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # padding against traffic analysis; we send none, so nothing changes


class Generation(Documented, kw_only=True, forbid_unknown_fields=True):
    """What both generating endpoints take."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stop: str | list[str] | None = None
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] | None = None
    cache_ttl: Annotated[float, Meta(gt=0, le=86400)] | None = None  # seconds
    session_id: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    context_id: Annotated[str, Meta(min_length=1, max_length=256)] | None = None
    # the rest is SamplingParams' by the same name
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None


class Chat(Generation, kw_only=True, forbid_unknown_fields=True):
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    # How messages become a prompt, here and in Tokenize. By default a reply is begun unless the final message is continued.
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None


class Completion(Generation, kw_only=True, forbid_unknown_fields=True):
    prompt: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    echo: bool | None = None
    best_of: int | None = None
    add_special_tokens: bool | None = None


class Tokenize(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)] | None = None
    add_special_tokens: bool | None = None  # default: for a prompt yes, for messages no (the template writes them)
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Context(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    prompt: str | Annotated[list[int], Meta(min_length=1)] | None = None
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)] | None = None
    ttl: Annotated[float, Meta(gt=0, le=LONGEST_TTL)] | None = None  # seconds
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class Detokenize(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    tokens: list[int]


class GiveRole(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    role: Literal["colocated", "prefill", "decode"]


class Scale(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    te: Annotated[int, Meta(ge=0, le=MOST_SEATS)]
    role: Literal["colocated", "prefill", "decode"] | None = None


class Sleep(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None
    level: Literal[1, 2] = 1


class Wake(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    model: str | None = None


class Drain(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    te: Annotated[int, Meta(ge=0)]


CHAT = msgspec.json.Decoder(Chat)
COMPLETION = msgspec.json.Decoder(Completion)
TOKENIZE = msgspec.json.Decoder(Tokenize)
CONTEXT = msgspec.json.Decoder(Context)
DETOKENIZE = msgspec.json.Decoder(Detokenize)
GIVE_ROLE = msgspec.json.Decoder(GiveRole)
SCALE = msgspec.json.Decoder(Scale)
SLEEP = msgspec.json.Decoder(Sleep)
WAKE = msgspec.json.Decoder(Wake)
DRAIN = msgspec.json.Decoder(Drain)

T = TypeVar("T")

PLACE = re.compile(r"^(.*) - at (`key` in )?`\$\.?(.*)`$", re.DOTALL)
FIELD = re.compile(r"^Object (contains unknown|missing required) field `(.*)`$", re.DOTALL)
NAMED = re.compile(r"^(\w+)[=:]")


def invalid(error: msgspec.ValidationError) -> Problem:
    """The refusal for what msgspec found, with the field's path as `param`."""
    reason, place = str(error), ""
    if found := PLACE.match(reason):
        reason, place = found.group(1), found.group(3).removesuffix("[...]")
        reason = f"of its keys: {reason}" if found.group(2) else reason
    if found := FIELD.match(reason):
        name = f"{place}.{found.group(2)}" if place else found.group(2)
        if found.group(1) == "missing required":
            return Problem(f"{name}: this field is required", name, code="missing_required_parameter")
        return Problem(f"there is no field {name} here", name, code="unknown_parameter")
    if place:
        return Problem(f"{place}: {reason[:1].lower()}{reason[1:]}", place, code="invalid_value")
    found = NAMED.match(reason)  # our own checks name the field first
    return Problem(reason, found.group(1) if found else None)


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T:
    """The request in `body`. Raises `Problem`."""
    try:
        asked = decoder.decode(body)
    except msgspec.ValidationError as e:
        raise invalid(e) from None
    except msgspec.DecodeError as e:
        raise Problem(f"the body is not valid JSON: {e}") from None
    except UnicodeDecodeError as e:
        raise Problem(f"the body is not valid UTF-8: {e.reason}") from None
    except RecursionError:
        raise Problem("the body is nested too deeply") from None
    if isinstance(asked, Generation):
        check_documented(asked)
        check_together(asked)
    return asked


def check_documented(asked: Generation) -> None:
    """Refuse values of HARMLESS fields that would change the answer."""
    for name, fine in HARMLESS.items():
        value = getattr(asked, name)
        if value is None or fine is ANY or value in fine:
            continue
        instead = " or ".join(msgspec.json.encode(v).decode() for v in fine)
        message = f"{name}: this value is not supported yet; leave it out" + (f" or send {instead}" if instead else "")
        raise Problem(message, name, code="unsupported_value")


def check_together(asked: Generation) -> None:
    """Refuse fields that make no sense beside each other."""
    if asked.stream_options is not None and not asked.stream:
        raise Problem("stream_options: only with stream: true", "stream_options")
    if asked.max_completion_tokens is not None and asked.max_tokens not in (None, asked.max_completion_tokens):
        raise Problem(
            f"max_completion_tokens: {asked.max_completion_tokens} contradicts max_tokens: {asked.max_tokens}; send one of them",
            "max_completion_tokens",
        )
    limit = asked.max_completion_tokens if asked.max_completion_tokens is not None else asked.max_tokens
    if limit is not None and limit < 1 and not (limit == 0 and isinstance(asked, Completion) and asked.echo):
        raise Problem(f"{limit_field(asked)}: must be at least 1", limit_field(asked), code="invalid_value")
    if isinstance(asked.stop, list) and len(asked.stop) > MOST_STOPS:
        raise Problem(f"stop: at most {MOST_STOPS} strings, not {len(asked.stop)}", "stop")
    match asked:
        case Chat() if asked.top_logprobs is not None and not asked.logprobs:
            raise Problem("top_logprobs: only with logprobs: true", "top_logprobs")
        case Completion() if asked.best_of not in (None, asked.n or 1):
            raise Problem(f"best_of: {asked.best_of} is not supported yet; leave it out or make it equal to n", "best_of")
        case Completion() if len(asked.prompt) > MOST_PROMPTS and isinstance(asked.prompt, list):
            if not isinstance(asked.prompt[0], int):
                raise Problem(f"prompt: at most {MOST_PROMPTS} prompts a call, not {len(asked.prompt)}", "prompt")


def limit_field(asked: Generation) -> str:
    """The name under which the caller bounds the output."""
    return "max_tokens" if asked.max_completion_tokens is None else "max_completion_tokens"


# What a session's blocks are kept for with priority after each turn: how long a person may take to answer.
SESSION_SECONDS = 300.0


def retention(asked: Generation) -> float:
    """Seconds for which the request's KV blocks are to be kept with priority."""
    return max(asked.cache_ttl or 0.0, SESSION_SECONDS if asked.session_id is not None else 0.0)


# ---- sampling -------------------------------------------------------------------------------------------------------

SHARED = tuple(name for name in SamplingParams.__struct_fields__ if name in Generation.__struct_fields__ and name != "max_tokens")


def sampling(asked: Chat | Completion, vocab_size: int) -> SamplingParams:
    """The request's SamplingParams, `max_tokens` as asked (None: not asked). Raises `Problem` naming the field."""
    values = {name: value for name in SHARED if (value := getattr(asked, name)) is not None}
    if isinstance(asked.stop, str):
        values["stop"] = [asked.stop]
    if asked.top_k is not None and asked.top_k > vocab_size:
        values["top_k"] = vocab_size  # the same choice, and it fits the wire
    values["max_tokens"] = asked.max_tokens if asked.max_completion_tokens is None else asked.max_completion_tokens
    if isinstance(asked, Chat):
        values["logprobs"] = (asked.top_logprobs or 0) if asked.logprobs else None
    else:
        values["logprobs"] = asked.logprobs
        values["prompt_logprobs"] = asked.logprobs if asked.echo else None
    for name in ("stop_token_ids", "logit_bias"):
        for token in getattr(asked, name) or ():
            if not 0 <= token < vocab_size:
                raise Problem(f"{name}: token id {token} is not in this model's vocabulary of {vocab_size}", name)
    try:
        return msgspec.convert(values, SamplingParams)
    except msgspec.ValidationError as e:
        raise invalid(e) from None
