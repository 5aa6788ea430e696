"""Text to token ids and back, for one model: wraps `tokenizers`, adds chat templates and incremental decoding.

Lives in the control process, so it imports neither torch nor numpy. Decoding goes by a table from id to bytes: exact for
byte-level BPE and for SentencePiece with byte fallback, and cheap enough for the hot loop. Other kinds are refused at load.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import tokenizers

from engine import gguf_vocab
from engine.chat_template import ChatTemplate
from engine.gguf import GGUF
from engine.hub import is_gguf, read_json, read_optional_json, token_ids
from engine.types import UserError

SPACE = gguf_vocab.SPACE
TOKEN_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """One model's tokenizer. Make one by `Tokenizer.load`."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        origin: str,
        bos_id: int | None,
        eos_ids: Iterable[int],
        templates: dict[str, str],
        variables: dict[str, str],
    ):
        backend.no_truncation()  # settings of the training run that tokenizer.json may carry
        backend.no_padding()
        self.backend = backend
        self.bos_id = bos_id
        self.eos_ids = frozenset(eos_ids)
        added = backend.get_added_tokens_decoder()
        self.vocab_size = size = max(backend.get_vocab_size(), *(i + 1 for i in added), 0)
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._templates = templates
        self._template_variables = variables
        self._template: ChatTemplate | None = None
        to_bytes, self._strips_space = byte_decoder(backend, origin)
        self._pieces = Table(size, lambda i: piece(backend, added, to_bytes, i))
        self._texts = Table(size, lambda i: whole_text(self._pieces[i]))
        self._shown_texts = Table(size, lambda i: "" if i in self.special_ids else self._texts[i])

    @classmethod
    def load(cls, path: str | Path, chat_template: str = "") -> Tokenizer:
        """The tokenizer of a model's folder or GGUF file; `chat_template` (a Jinja file or text) replaces its template.

        Raises `UserError`.
        """
        path = Path(path)
        settings = gguf_settings(path) if is_gguf(path) else folder_settings(path)
        if chat_template:
            settings["templates"] = {"default": template_source(chat_template)}
        tokenizer = cls(settings.pop("backend"), origin=str(path), **settings)
        if chat_template:
            tokenizer.template()  # a mistake in what the user gave shows at once
        return tokenizer

    # ---- encoding ---------------------------------------------------------------------------------------------------
    def encode(self, text: str, add_special: bool = True) -> list[int]:
        """Token ids. Special tokens in `text` are parsed; `add_special` adds BOS and EOS where the model wants them.

        Another thread may call this: the interpreter lock is given up meanwhile (only the batch call does that)."""
        try:
            return self.backend.encode_batch_fast([text], add_special_tokens=add_special)[0].ids
        except TypeError:  # what tokenizers makes of a str that has no UTF-8 form
            raise UserError("the text holds half of a surrogate pair, which is no character") from None

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> str:
        """The chat template's text for a conversation; it holds its own BOS, so encode it with `add_special=False`.

        Raises `UserError`."""
        return self.template().render(messages, tools, add_generation_prompt, continue_final_message, variables)

    def template(self) -> ChatTemplate:
        """Compiled when first asked: completions work without one, and also beside one that is broken."""
        if not self._templates:
            raise UserError("the model has no chat template; start the server with --chat-template FILE", "messages")
        if self._template is None:
            self._template = ChatTemplate(self._templates, self._template_variables)
        return self._template

    # ---- decoding ---------------------------------------------------------------------------------------------------
    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of a whole sequence."""
        pieces, hidden = self._pieces, self.special_ids if skip_special else frozenset()
        text = b"".join([pieces[i] for i in ids if i not in hidden]).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._strips_space else text

    def detokenizer(self, skip_special: bool = True, continues: bool = False) -> Detokenizer:
        """An incremental `decode`. `continues`: the ids go on with a text (a prompt), so a space that they begin with stays."""
        texts = self._shown_texts if skip_special else self._texts
        hidden = self.special_ids if skip_special else frozenset()
        return Detokenizer(texts, self._pieces, hidden, self._strips_space and not continues)

    def token(self, id: int) -> str:
        """The token as the vocabulary spells it; "" for an id it hasn't."""
        try:
            return self.backend.id_to_token(id) or ""
        except OverflowError:
            return ""

    def token_bytes(self, id: int) -> bytes:
        """The bytes a token stands for, perhaps a part of a character; b"" for an id the vocabulary hasn't."""
        return self._pieces[id]


class Table(dict[int, Any]):
    """Values by token id, computed when first asked: most of a large vocabulary is never seen."""

    def __init__(self, size: int, compute: Callable[[int], Any]):
        self.size = size
        self.compute = compute

    def __missing__(self, i: int) -> Any:
        value = self.compute(i)
        if 0 <= i < self.size:  # anybody may ask for any number: only the vocabulary's are kept
            self[i] = value
        return value


class Detokenizer:
    """Turns ids into text as they come; the pieces joined are what `decode` gives for all ids at once."""

    __slots__ = ("_decoder", "_hidden", "_pieces", "_slow", "_strips", "_texts")

    def __init__(self, texts: dict[int, str | None], pieces: dict[int, bytes], hidden: frozenset[int], strips: bool):
        self._texts = texts  # None for a token that is no whole text by itself
        self._pieces = pieces
        self._hidden = hidden
        self._strips = strips  # the next text's first space is to go
        self._slow = strips  # whether the next token's text depends on what was before
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, id: int) -> str:
        """The text that this token completes: "" while a character's bytes are incomplete."""
        if not self._slow:
            text = self._texts[id]
            if text is not None:
                return text
        text = self._decoder.decode(b"" if id in self._hidden else self._pieces[id])
        if self._strips and text:
            text = text.removeprefix(" ")
            self._strips = False
        self._slow = self._strips or bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._decoder.decode(b"", True)


# ---- ids to bytes -----------------------------------------------------------------------------------------------------


def byte_letters() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, the other bytes for the letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


BYTE_OF_LETTER = byte_letters()


def byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([BYTE_OF_LETTER[letter] for letter in token])
    except KeyError:
        return token.encode()


def sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and (byte := re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)):
        return bytes([int(byte[1], 16)])
    return token.replace(SPACE, " ").encode()


def byte_decoder(backend: tokenizers.Tokenizer, origin: str) -> tuple[Callable[[str], bytes], bool]:
    """(token -> bytes, whether a text's first space is dropped) for the tokenizer's decoder. Raises `UserError`."""
    state = json.loads(backend.decoder.__getstate__()) if backend.decoder else {"type": "none"}
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return byte_level_bytes, False
    replace = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    if kinds[:3] == ["Replace", "ByteFallback", "Fuse"] and steps[0] == replace:
        if not steps[3:]:
            return sentencepiece_bytes, False
        if steps[3:] == [{"type": "Strip", "content": " ", "start": 1, "stop": 0}]:
            return sentencepiece_bytes, True
    named = ", ".join(kinds)
    raise UserError(f"{origin}: the tokenizer's decoder ({named}) is not supported; byte-level and SentencePiece are", "model")


def piece(backend: tokenizers.Tokenizer, added: dict[int, Any], to_bytes: Callable[[str], bytes], i: int) -> bytes:
    if i in added and to_bytes is byte_level_bytes:
        return added[i].content.encode()  # added tokens are text as it is, not letters that stand for bytes
    try:
        token = backend.id_to_token(i)
    except OverflowError:  # negative
        token = None
    return to_bytes(token) if token is not None else b""


def whole_text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


# ---- a model's own settings -------------------------------------------------------------------------------------------


def template_source(given: str) -> str:
    """--chat-template's value: the template itself, or a file that holds it."""
    if "{" in given or "\n" in given:
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) else "not UTF-8"
        raise UserError(f"--chat-template {given}: {why}; give a Jinja file, or the template itself", "chat_template") from None


def gguf_settings(path: Path) -> dict[str, Any]:
    gguf = GGUF(path)
    meta, key = gguf.metadata, "tokenizer.chat_template"
    backend = gguf_vocab.build(gguf)
    tokens = meta["tokenizer.ggml.tokens"]
    named = {name: text for name, text in meta.items() if name == key or name.startswith(f"{key}.")}
    templates = {name[len(key) + 1 :] or "default": text for name, text in named.items()}
    names = (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"), ("pad_token", "padding"))
    ids = {role: gguf_vocab.setting(gguf, f"{theirs}_token_id") for role, theirs in names}
    return {
        "backend": backend,
        "bos_id": ids["bos_token"],
        "eos_ids": gguf_vocab.eos_ids(gguf),
        "templates": templates,
        "variables": {role: tokens[i] for role, i in ids.items() if i is not None and i < len(tokens)},
    }


def folder_settings(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer.json"
    if not file.exists():
        hint = "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one"
        raise UserError(f"{folder}: has no tokenizer.json; {hint}", "model")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:  # tokenizers raises plain Exceptions
        raise UserError(f"{file}: {e}", "model") from None
    settings = read_optional_json(folder / "tokenizer_config.json")
    roles = {role: text for role in TOKEN_ROLES if (text := token_text(settings.get(role)))}
    configs = [read_optional_json(folder / name) for name in ("config.json", "generation_config.json")]
    eos = {i for config in configs for i in token_ids(config.get("eos_token_id"))}
    if "eos_token" in roles and (own := backend.token_to_id(roles["eos_token"])) is not None:
        eos.add(own)
    bos = backend.token_to_id(roles["bos_token"]) if "bos_token" in roles else configs[0].get("bos_token_id")
    templates = folder_templates(folder, settings)
    return {"backend": backend, "bos_id": bos, "eos_ids": eos, "templates": templates, "variables": roles}


def token_text(value: Any) -> str | None:
    """A special token in tokenizer_config.json: a string, or an object with its content."""
    return value.get("content") if isinstance(value, dict) else value


def folder_templates(folder: Path, settings: dict[str, Any]) -> dict[str, str]:
    """Chat templates by name: a file of its own goes before what tokenizer_config.json holds."""
    templates = settings.get("chat_template") or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    elif isinstance(templates, list):
        templates = {t["name"]: t["template"] for t in templates}
    if (folder / "chat_template.json").exists():
        templates = {"default": read_json(folder / "chat_template.json").get("chat_template", "")}
    for file in [folder / "chat_template.jinja", *sorted((folder / "additional_chat_templates").glob("*.jinja"))]:
        if file.exists():
            name = "default" if file.parent == folder else file.stem
            templates = templates | {name: file.read_text(encoding="utf-8")}
    return templates
