"""A GGUF file's vocabulary as a `tokenizers` tokenizer.

Two kinds: byte-level BPE ("gpt2": tokens and merges, and the name of a rule that splits text into words first) and
SentencePiece BPE ("llama": tokens and scores). The rules by name are facts of the models, as llama.cpp reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Split

from engine.gguf import GGUF
from engine.types import UserError

SPACE = "\u2581"  # SentencePiece's visible space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type


# ---- rules that split text into words ---------------------------------------------------------------------------------

CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*"
PATH_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{N}"
HAN_KANA = "[一-龥\u3040-ゟ゠-ヿ]+"
DEEPSEEK3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True)
class Rule:
    """Patterns applied one after another, each to the pieces the last one left."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a word that is a token itself is taken before any merge
    bos: bool = False  # text begins with BOS unless the file says otherwise


LLAMA3 = Rule((f"{CONTRACTION}|{WORD}|\\p{{N}}{{1,3}}|{SYMBOLS}|{SPACES}",), whole_words=True, bos=True)
QWEN2 = Rule((f"{CONTRACTION}|{WORD}|\\p{{N}}|{SYMBOLS}|{SPACES}",))
TEKKEN = Rule((f"{CASED[0]}|{CASED[1]}|\\p{{N}}|{PATH_SYMBOLS}|{SPACES}",), whole_words=True, bos=True)
GPT4O = Rule((f"{CASED[0]}{CONTRACTION}?|{CASED[1]}{CONTRACTION}?|\\p{{N}}{{1,3}}|{PATH_SYMBOLS}|{SPACES}",))
GLM4 = Rule((f"{CONTRACTION}|{WORD}|\\p{{N}}{{1,3}}|{SYMBOLS}|{SPACES}",))
DIGITS_GPT2 = Rule((DIGIT, GPT2))
RULES = {
    "default": Rule((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": Rule((GPT2,)),
    "smollm": DIGITS_GPT2,
    "starcoder": DIGITS_GPT2,
    "refact": DIGITS_GPT2,
    "command-r": DIGITS_GPT2,
    "codeshell": DIGITS_GPT2,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "llama-bpe": LLAMA3,
    "falcon3": LLAMA3,
    "pixtral": LLAMA3,
    "dbrx": GLM4,
    "smaug-bpe": GLM4,
    "glm4": GLM4,
    "chatglm-bpe": GLM4,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
    "stablelm2": QWEN2,
    "megrez": QWEN2,
    "tekken": TEKKEN,
    "gpt-4o": GPT4O,
    "llama4": GPT4O,
    "deepseek-v3": Rule((r"\p{N}{1,3}", HAN_KANA, DEEPSEEK3)),
}


def splitter(rule: Rule) -> PreTokenizer:
    *first, last = rule.patterns
    steps: list[PreTokenizer] = [Split(Regex(pattern), "isolated") for pattern in first]
    if last != GPT2:
        steps.append(Split(Regex(last), "isolated"))
    # ByteLevel turns bytes into letters, so it comes last; it has GPT-2's pattern built in, faster than a Split by it.
    return pre_tokenizers.Sequence([*steps, ByteLevel(add_prefix_space=False, use_regex=last == GPT2)])


# ---- building ---------------------------------------------------------------------------------------------------------


def build(gguf: GGUF) -> Tokenizer:
    """The file's tokenizer. Raises `UserError` for one of a kind that can't be built."""
    kind = gguf.metadata.get("tokenizer.ggml.model")
    makers = {"gpt2": byte_level, "llama": sentencepiece}
    if kind not in makers:
        raise UserError(f"{gguf.path}: vocabulary of kind {kind!r} is not supported; these are: {', '.join(makers)}", "model")
    if not isinstance(gguf.metadata.get("tokenizer.ggml.tokens"), list):
        raise UserError(f"{gguf.path}: has no tokenizer.ggml.tokens: the file is incomplete", "model")
    try:
        return makers[kind](gguf)
    except UserError:
        raise
    except Exception as e:  # tokenizers raises plain Exceptions
        raise UserError(f"{gguf.path}: its vocabulary is inconsistent: {e}", "model") from None


def setting(gguf: GGUF, name: str, default: Any = None) -> Any:
    return gguf.metadata.get(f"tokenizer.ggml.{name}", default)


def byte_level(gguf: GGUF) -> Tokenizer:
    name = setting(gguf, "pre", "default")
    if name not in RULES:
        known = ", ".join(RULES)
        raise UserError(f"{gguf.path}: splitting rule {name!r} (tokenizer.ggml.pre) is not known; these are: {known}", "model")
    rule = RULES[name]
    vocab = {token: i for i, token in enumerate(setting(gguf, "tokens"))}
    merges = [tuple(merge.split(" ", 1)) for merge in setting(gguf, "merges", [])]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=rule.whole_words))
    tokenizer.pre_tokenizer = splitter(rule)
    tokenizer.decoder = decoders.ByteLevel()
    add_specials(tokenizer, gguf, bos=rule.bos)
    return tokenizer


def sentencepiece(gguf: GGUF) -> Tokenizer:
    tokens = setting(gguf, "tokens")
    unknown = tokens[setting(gguf, "unknown_token_id", 0)]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = merges_from_scores(gguf)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    prefix = setting(gguf, "add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    add_specials(tokenizer, gguf, bos=True)
    return tokenizer


def merges_from_scores(gguf: GGUF) -> list[tuple[str, str]]:
    """SentencePiece joins the neighbours whose joint piece scores highest: every split of a piece into two pieces is a merge."""
    tokens, scores = setting(gguf, "tokens"), setting(gguf, "scores")
    if scores is None or len(scores) != len(tokens):
        raise UserError(f"{gguf.path}: needs a score for each token (tokenizer.ggml.scores)", "model")
    types = setting(gguf, "token_type", [NORMAL] * len(tokens))
    # User-defined pieces match as a whole and are never joined from parts; llama.cpp joins them too, which comes to the same.
    joined = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
    merges = []
    for token, i in joined.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in joined and right in joined:
                merges.append((-scores[i], i, cut, left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]


def add_specials(tokenizer: Tokenizer, gguf: GGUF, bos: bool) -> None:
    """Declare control and user-defined tokens, and put BOS and EOS where the file asks for them. `bos`: unless it says."""
    tokens, types = setting(gguf, "tokens"), setting(gguf, "token_type", [])
    named = {setting(gguf, f"{role}_token_id") for role in ("bos", "eos", "eot", "eom")}
    control, text = [], []
    for i, kind in enumerate(types):
        if kind in (CONTROL, UNKNOWN) or (kind == USER_DEFINED and i in named):
            control.append(AddedToken(tokens[i], normalized=False, special=True))
        elif kind == USER_DEFINED:
            text.append(AddedToken(tokens[i], normalized=False, special=False))
    tokenizer.add_special_tokens(control)
    tokenizer.add_tokens(text)
    before = special_token(gguf, "bos", tokens) if setting(gguf, "add_bos_token", bos) else None
    after = special_token(gguf, "eos", tokens) if setting(gguf, "add_eos_token", False) else None
    if before or after:
        template = [pair[0] for pair in (before, ("$A", 0), after) if pair]
        specials = [pair for pair in (before, after) if pair]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)


def special_token(gguf: GGUF, role: str, tokens: list[str]) -> tuple[str, int]:
    i = setting(gguf, f"{role}_token_id")
    if i is None or not 0 <= i < len(tokens):
        why = f"texts are to get {role.upper()}, but tokenizer.ggml.{role}_token_id names no token"
        raise UserError(f"{gguf.path}: {why}", "model")
    return tokens[i], i


# ---- what ends a turn -------------------------------------------------------------------------------------------------

# A GGUF file names one EOS, where the original's generation_config.json often lists several: the end of a turn and the end
# of a document. These texts, declared as control tokens, mean nothing else; llama.cpp stops at them too.
END_TOKENS = frozenset(
    ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<|endoftext|>", "<|end_of_text|>", "<end_of_turn>", "</s>")
)


def eos_ids(gguf: GGUF) -> frozenset[int]:
    """Ids that end an answer."""
    ids = {i for role in ("eos", "eot", "eom") if (i := setting(gguf, f"{role}_token_id")) is not None}
    tokens, types = setting(gguf, "tokens"), setting(gguf, "token_type", [])
    return frozenset(ids | {i for i, kind in enumerate(types) if kind == CONTROL and tokens[i] in END_TOKENS})
