"""Chat templates: Jinja, set up as Hugging Face's are, in a sandbox, since a template is code that came with a model.

Turns a list of messages into the text a model was trained on. Knows neither tokens nor HTTP.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.types import UserError

Message = dict[str, Any]


class Generation(Extension):
    """`{% generation %}` marks what a model said, for training. When serving, its body is just text."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own way to declare it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own `tojson` escapes for HTML, which no model has seen in training."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def make_environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


class ChatTemplate:
    """One model's template, or several by name ("default", "tool_use"). `variables` are its special tokens.

    Raises `UserError` for a template that is no Jinja.
    """

    def __init__(self, sources: dict[str, str], variables: dict[str, str]):
        environment = make_environment()
        self.variables = variables
        try:
            self.templates = {name: environment.from_string(source) for name, source in sources.items()}
            self.takes_parts = {name: loops_over_content(environment.parse(source)) for name, source in sources.items()}
        except jinja2.TemplateError as e:
            why = f"the chat template is not valid Jinja: {e}; give another by --chat-template FILE"
            raise UserError(why, "chat_template") from None

    def render(
        self,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        variables: dict[str, Any],
    ) -> str:
        """The text of a conversation. Raises `UserError` (param "messages") for one the template refuses."""
        if not messages:
            raise UserError("messages: at least one is needed", "messages")
        if continue_final_message and add_generation_prompt:
            raise UserError("continue_final_message goes only with add_generation_prompt: false", "continue_final_message")
        name = "tool_use" if tools and "tool_use" in self.templates else "default"
        if name not in self.templates:
            name = next(iter(self.templates))
        given = [flat_content(i, m, self.takes_parts[name]) for i, m in enumerate(messages)]
        context = self.variables | variables
        context |= {"messages": given, "tools": tools or None, "add_generation_prompt": add_generation_prompt}
        try:
            text = self.templates[name].render(context)
        except jinja2.TemplateError as e:
            raise UserError(f"messages: the model's chat template says: {e}", "messages") from None
        except Exception as e:  # whatever the template's code stumbles over in the caller's messages
            why = f"{type(e).__name__}: {e}"
            raise UserError(f"messages: the model's chat template fails on these: {why}", "messages") from None
        return cut_after_last(text, given[-1]) if continue_final_message else text


def loops_over_content(tree: nodes.Template) -> bool:
    """Whether a template walks a message's content as a list of parts, rather than taking it for a string."""
    for loop in tree.find_all(nodes.For):
        over = loop.iter
        while isinstance(over, nodes.Filter) and over.node is not None:
            over = over.node
        if isinstance(over, nodes.Getattr) and over.attr == "content":
            return True
        if isinstance(over, nodes.Getitem) and isinstance(over.arg, nodes.Const) and over.arg.value == "content":
            return True
        if isinstance(over, nodes.Name) and over.name == "content":
            return True
    return False


def flat_content(index: int, message: Message, takes_parts: bool) -> Message:
    """`message` with a list of text parts joined, where the template expects a string."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    texts = []
    for at, part in enumerate(content):
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if kind not in ("text", "input_text", "output_text") or not isinstance(text, str):
            where = f"messages[{index}].content[{at}]"
            raise UserError(f"{where}: a part of type {kind!r} can't be taken; send text parts", "messages")
        texts.append(text)
    if takes_parts:
        return message | {"content": [{"type": "text", "text": text} for text in texts]}
    return message | {"content": "\n".join(texts)}


def cut_after_last(text: str, message: Message) -> str:
    """`text` up to the end of the last message's content, so that the model goes on with it."""
    content = message.get("content")
    if isinstance(content, list):
        content = content[-1]["text"] if content else None
    if not isinstance(content, str) or content.strip() not in text:
        raise UserError(
            "continue_final_message: the last message's content doesn't appear in the rendered text, so it can't be continued",
            "continue_final_message",
        )
    start = text.rindex(content.strip())
    whole = content.lstrip()  # a template may strip what trails; keep it only if this one doesn't
    return text[: start + len(whole)] if text.startswith(whole, start) else text[: start + len(content.strip())]
