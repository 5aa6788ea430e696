"""Tokenizers: ids against stored ones, incremental decoding against tokenizers' own, GGUF vocabularies, chat templates."""

import functools
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from engine.gguf_vocab import RULES, splitter
from engine.tokenizer import Tokenizer
from engine.types import UserError
from tests.assets import default_model

FIXTURE = Path(__file__).parent / "data" / "smollm2_tokens.jsonl"
CORPUS = [
    "hello there, hello world",
    "the quick brown fox",
    "größe über naïve",
    "日本語のテキスト",
    "1234 + 5678",
    "🎉 party 🎉",
] * 3


@functools.cache
def smollm2() -> Tokenizer:
    return Tokenizer.load(default_model())


def backend_of_bytes() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("<tool é>", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single=["<s>", "$A"], special_tokens=[("<s>", 0)])
    return backend


def backend_of_pieces() -> tokenizers.Tokenizer:
    """SentencePiece-like, as Llama 2's tokenizer.json is."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    state = json.loads(trained.to_str())
    names = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *state["model"]["vocab"]]
    merges = [tuple(m) for m in state["model"]["merges"]]
    vocab = {name: i for i, name in enumerate(names)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = trained.normalizer
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


def model_folder(path: Path, backend: tokenizers.Tokenizer, **config: Any) -> Path:
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    given = {"bos_token": "<s>", "eos_token": {"content": "</s>"}} | config
    (path / "tokenizer_config.json").write_text(json.dumps(given))
    (path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    return path


@pytest.fixture(scope="module", params=[backend_of_bytes, backend_of_pieces], ids=["bytes", "pieces"])
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(model_folder(tmp_path_factory.mktemp("m"), request.param()))


# ---- ids ------------------------------------------------------------------------------------------------------------


def test_stored_ids_of_the_default_model() -> None:
    rows = [json.loads(line) for line in FIXTURE.read_bytes().split(b"\n") if line][1:]
    assert len(rows) == 40
    for row in rows:
        assert smollm2().encode(row["text"], add_special=False) == row["ids"], row["text"]
        assert smollm2().decode(row["ids"], skip_special=False) == row["text"]


def test_facts_of_the_default_model() -> None:
    tokenizer = smollm2()
    assert tokenizer.vocab_size == 49152 and tokenizer.special_ids == frozenset(range(17))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, {0, 2})
    assert (tokenizer.token(2), tokenizer.token_bytes(2)) == ("<|im_end|>", b"<|im_end|>")
    there = tokenizer.encode(" there")[0]
    assert (tokenizer.token(there), tokenizer.token_bytes(there)) == ("Ġthere", b" there")
    assert tokenizer.encode("a") == tokenizer.encode("a", add_special=False)  # this model adds nothing


def test_special_tokens_and_bos(small: Tokenizer) -> None:
    plain = small.encode("hello", add_special=False)
    bos = [small.bos_id] if small.backend.post_processor else []
    assert small.encode("hello</s>", add_special=False)[-1] in small.eos_ids
    assert 7 in small.eos_ids and small.special_ids >= {small.bos_id}
    assert small.encode("hello") == [*bos, *plain]
    assert small.decode(small.encode("<s>hello</s>", add_special=False)) == "hello"


def test_unknown_ids_are_empty_and_not_remembered(small: Tokenizer) -> None:
    for i in (-1, small.vocab_size, 2**40):
        assert (small.token(i), small.token_bytes(i), small.decode([i])) == ("", b"", "")
    assert 2**40 not in small._pieces


def test_half_a_surrogate_pair_is_the_callers_mistake(small: Tokenizer) -> None:
    with pytest.raises(UserError, match="surrogate"):
        small.encode("a\ud800")


def test_encoding_imports_neither_numpy_nor_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from engine.tokenizer import Tokenizer; from scale import pull;"
        f"t = Tokenizer.load({str(default_model())!r}); t.encode('a'); t.render([dict(role='user', content='a')]);"
        "print([m for m in ('numpy', 'torch') if m in sys.modules])"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"


# ---- decoding -------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60), skip=st.booleans())
def test_fed_pieces_are_the_whole_text(small: Tokenizer, text: str, skip: bool) -> None:
    ids = small.encode(text + "</s>日", add_special=False)
    detokenizer = small.detokenizer(skip)
    pieces = [detokenizer.feed(i) for i in ids] + [detokenizer.flush()]
    whole = small.decode(ids, skip)
    assert "".join(pieces) == whole
    assert whole == small.backend.decode(ids, skip_special_tokens=skip)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids_cut_anywhere(small: Tokenizer, data: st.DataObject) -> None:
    """Also ids that make no valid text: what is shown so far never changes afterwards, and the end is `decode`'s."""
    ids = data.draw(st.lists(st.integers(0, small.vocab_size - 1), max_size=30))
    detokenizer = small.detokenizer()
    shown = ""
    for i in ids:
        shown += detokenizer.feed(i)
        assert small.decode(ids).startswith(shown)
    assert shown + detokenizer.flush() == small.decode(ids)


def test_half_characters_wait() -> None:
    ids = smollm2().encode("🎉", add_special=False)
    assert len(ids) > 1
    detokenizer = smollm2().detokenizer()
    assert [detokenizer.feed(i) for i in ids] == [""] * (len(ids) - 1) + ["🎉"]
    assert detokenizer.feed(ids[0]) == "" and detokenizer.flush() == "\ufffd"


def test_a_continued_text_keeps_its_space(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(model_folder(tmp_path, backend_of_pieces()))
    ids = tokenizer.encode("hello world", add_special=False)
    fresh, going_on = tokenizer.detokenizer(), tokenizer.detokenizer(continues=True)
    assert "".join(map(fresh.feed, ids)) == "hello world"
    assert "".join(map(going_on.feed, ids)) == " hello world"


def test_added_tokens_are_text_as_it_is(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(model_folder(tmp_path, backend_of_bytes()))
    ids = tokenizer.encode("<tool é>", add_special=False)
    assert len(ids) == 1 and tokenizer.decode(ids) == "<tool é>"


@pytest.mark.parametrize(
    "decoder",
    [decoders.WordPiece(), decoders.Metaspace(), decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()]), None],
    ids=["WordPiece", "Metaspace", "Replace, Fuse", "none"],
)
def test_other_decoders_are_refused_by_name(tmp_path: Path, decoder: Any, request: pytest.FixtureRequest) -> None:
    backend = backend_of_bytes()
    backend.decoder = decoder
    with pytest.raises(UserError, match=rf"decoder \({request.node.callspec.id}\)"):
        Tokenizer.load(model_folder(tmp_path, backend))


# ---- GGUF vocabularies ----------------------------------------------------------------------------------------------


def words(rule: str, text: str) -> list[str]:
    return [text[a:b] for _, (a, b) in splitter(RULES[rule]).pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("rule", "want"),
    [
        ("gpt-2", ["Call", " 12345", " times", ",", " IT", "'", "S", " ok", "\n\n ", " end"]),
        ("smollm", ["Call", " ", "1", "2", "3", "4", "5", " times", ",", " IT", "'", "S", " ok", "\n\n ", " end"]),
        ("llama-bpe", ["Call", " ", "123", "45", " times", ",", " IT", "'S", " ok", "\n\n", " ", " end"]),
        ("qwen2", ["Call", " ", "1", "2", "3", "4", "5", " times", ",", " IT", "'S", " ok", "\n\n", " ", " end"]),
        ("tekken", ["Call", " ", "1", "2", "3", "4", "5", " times", ",", " IT", "'S", " ok", "\n\n", " ", " end"]),
        ("gpt-4o", ["Call", " ", "123", "45", " times", ",", " IT'S", " ok", "\n\n", " ", " end"]),
        ("default", ["Call", " ", "123", "45", " times", ",", " IT", "'", "S", " ok", "\n\n ", " end"]),
    ],
)
def test_splitting_rules(rule: str, want: list[str]) -> None:
    assert words(rule, "Call 12345 times, IT'S ok\n\n  end") == want


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_loses_a_character(rule: str) -> None:
    text = "aB1 ²٣½ é日本 don't\u2028\t\r\n\n  x🎉--/ /\\n_"
    assert "".join(words(rule, text)) == text


def vocabulary_file(path: Path, tokens: list[str], **settings: Any) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(tokens)
    for key, value in settings.items():
        getattr(writer, f"add_{key}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level_file(path: Path, **settings: Any) -> Path:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, "he", "<bos>", "<eos>", "<|im_end|>", "<tool>", "[PAD]"]
    types = [1] * (len(letters) + 1) + [3, 3, 3, 4, 5]
    given = {
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "gpt-2",
        "token_types": types,
        "token_merges": ["h e"],
        "bos_token_id": 257,
        "eos_token_id": 258,
    }
    return vocabulary_file(path, tokens, **given | settings)


def test_byte_level_gguf(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(byte_level_file(tmp_path / "m.gguf"))
    assert tokenizer.eos_ids == {258, 259} and tokenizer.special_ids == {257, 258, 259}
    ids = tokenizer.encode("he<|im_end|><tool>")
    assert ids == [256, 259, 260] and tokenizer.decode(ids) == "he<tool>"


@pytest.mark.parametrize(
    ("settings", "before", "after"),
    [
        ({}, [], []),
        ({"add_bos_token": True}, [257], []),
        ({"add_bos_token": True, "add_eos_token": True}, [257], [258]),
        ({"tokenizer_pre": "llama-bpe"}, [257], []),  # a rule whose models want BOS
        ({"tokenizer_pre": "llama-bpe", "add_bos_token": False}, [], []),
    ],
)
def test_gguf_says_what_is_added(tmp_path: Path, settings: dict[str, Any], before: list[int], after: list[int]) -> None:
    tokenizer = Tokenizer.load(byte_level_file(tmp_path / "m.gguf", **settings))
    assert tokenizer.encode("he") == [*before, 256, *after]
    assert tokenizer.encode("he", add_special=False) == [256]


def test_gguf_vocabularies_that_cannot_be_read_say_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"splitting rule 'own' \(tokenizer.ggml.pre\) is not known; these are: .*smollm"):
        Tokenizer.load(byte_level_file(tmp_path / "a.gguf", tokenizer_pre="own"))
    with pytest.raises(UserError, match="kind 'bert' is not supported; these are: gpt2, llama"):
        Tokenizer.load(byte_level_file(tmp_path / "b.gguf", tokenizer_model="bert"))
    with pytest.raises(UserError, match="inconsistent"):
        Tokenizer.load(byte_level_file(tmp_path / "c.gguf", token_merges=["no such"]))
    with pytest.raises(UserError, match="bos_token_id names no token"):
        Tokenizer.load(byte_level_file(tmp_path / "d.gguf", add_bos_token=True, bos_token_id=9999))
    with pytest.raises(UserError, match="needs a score for each token"):
        Tokenizer.load(vocabulary_file(tmp_path / "e.gguf", ["<unk>", "a"], tokenizer_model="llama"))


PIECES = [" ", "a", "b", "c", "é", "ab", "bc", "abc", " a", " ab", "aa", "ca", "  ", "caa"]
SCORES = [-9.0, -9.5, -9.6, -9.7, -9.8, -1.0, -0.5, -2.0, -3.0, -1.5, -2.5, -0.7, -4.0, -5.0]


def sentencepiece_oracle(text: str, ids: dict[str, int]) -> list[int]:
    """SentencePiece's BPE in plain words: join the best-scoring neighbours, leftmost first, until none can be joined."""
    parts = list(" " + text) if text else []
    score = dict(zip(PIECES, SCORES, strict=True))
    while True:
        joins = [(-score[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in score]
        if not joins:
            break
        _, i = min(joins)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    known = [[ids[p]] if p in ids else [ids[f"<0x{b:02X}>"] for b in p.encode()] for p in parts]
    return [i for group in known for i in group]


@functools.cache
def sentencepiece(path: Path) -> tuple[Tokenizer, dict[str, int]]:
    data = [f"<0x{b:02X}>" for b in range(256)]
    names = ["<unk>", "<s>", "</s>", *data, *(p.replace(" ", "▁") for p in PIECES)]
    types, scores = [2, 3, 3, *[6] * 256, *[1] * len(PIECES)], [0.0] * 259 + SCORES
    given = {"tokenizer_model": "llama", "token_types": types, "token_scores": scores, "bos_token_id": 1, "eos_token_id": 2}
    file = vocabulary_file(path / "spm.gguf", names, **given)
    return Tokenizer.load(file), {name.replace("▁", " "): i for i, name in enumerate(names)}


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("aaabbbccc é日\n"), max_size=24))
def test_sentencepiece_gguf(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    tokenizer, ids = sentencepiece(tmp_path_factory.getbasetemp())
    ours = tokenizer.encode(text, add_special=False)
    assert ours == sentencepiece_oracle(text, ids)
    assert tokenizer.encode(text) == [1, *ours]  # BOS, as these models want unless the file says otherwise
    assert tokenizer.decode(ours) == text


# ---- chat templates -------------------------------------------------------------------------------------------------

USER = {"role": "user", "content": "Hi there"}


def with_template(tmp_path: Path, template: str) -> Tokenizer:
    return Tokenizer.load(model_folder(tmp_path / "m", backend_of_bytes()), template)


def test_the_default_models_template() -> None:
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    turn = "<|im_start|>user\nHi there<|im_end|>\n"
    assert smollm2().render([USER]) == f"{system}{turn}<|im_start|>assistant\n"
    assert smollm2().render([USER], add_generation_prompt=False) == system + turn
    begun = {"role": "assistant", "content": "Sure, "}
    text = smollm2().render([USER, begun], add_generation_prompt=False, continue_final_message=True)
    assert text == f"{system}{turn}<|im_start|>assistant\nSure, "


def test_template_surroundings_are_hugging_faces(tmp_path: Path) -> None:
    template = (
        "{{ bos_token }}{%- for m in messages %}\n    {% if loop.index > 1 %}{% break %}{% endif %}\n"
        "[{{ m.content | tojson }}]{% generation %}x{% endgeneration %}\n{%- endfor %}"
        "{{ strftime_now('%Y') | length }}{{ eos_token }}{{ thinking }}{{ tools is none }}"
    )
    tokenizer = with_template(tmp_path, template)
    messages = [{"role": "user", "content": "<é>'&\""}, USER]
    assert tokenizer.render(messages, thinking="!") == '<s>["<é>\'&\\""]x4</s>!True'


def test_parts_are_joined_only_for_templates_that_want_text(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    message = {"role": "user", "content": parts}
    assert with_template(tmp_path, "{{ messages[0].content }}").render([message]) == "a\nb"
    walks = "{% for p in messages[0]['content'] %}<{{ p.text }}>{% endfor %}"
    assert with_template(tmp_path, walks).render([message]) == "<a><b>"
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}
    with pytest.raises(UserError, match=r"messages\[1\]\.content\[0\]: a part of type 'image_url'") as e:
        smollm2().render([USER, picture])
    assert e.value.param == "messages"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[7].content.x }}", "no element 7|has no attribute"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_template_errors_are_about_messages(tmp_path: Path, template: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as e:
        with_template(tmp_path, template).render([USER])
    assert e.value.param == "messages"


def test_where_templates_come_from(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "m", backend_of_bytes())
    with pytest.raises(UserError, match="--chat-template"):
        Tokenizer.load(folder).render([USER])
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    model_folder(folder, backend_of_bytes(), chat_template=named)
    assert Tokenizer.load(folder).render([USER]) == "plain"
    assert Tokenizer.load(folder).render([USER], tools=[{"type": "function"}]) == "tools"
    (folder / "chat_template.jinja").write_text("from its own file")
    assert Tokenizer.load(folder).render([USER]) == "from its own file"
    assert Tokenizer.load(folder, "{{ 'given' }}").render([USER]) == "given"
    (tmp_path / "t.jinja").write_text("a file")
    assert Tokenizer.load(folder, str(tmp_path / "t.jinja")).render([USER]) == "a file"
    with pytest.raises(UserError, match="No such file"):
        Tokenizer.load(folder, str(tmp_path / "nowhere.jinja"))
    with pytest.raises(UserError, match="not valid Jinja"):
        Tokenizer.load(folder, "{% if %}")


def test_a_broken_template_of_the_model_stops_only_chat(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(model_folder(tmp_path, backend_of_bytes(), chat_template="{% if %}"))
    assert tokenizer.encode("hello")
    with pytest.raises(UserError, match="--chat-template"):
        tokenizer.render([USER])


def test_impossible_conversations() -> None:
    with pytest.raises(UserError, match="at least one"):
        smollm2().render([])
    with pytest.raises(UserError, match="add_generation_prompt"):
        smollm2().render([USER], continue_final_message=True)


def test_folders_without_a_usable_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        Tokenizer.load(tmp_path / "nowhere")
