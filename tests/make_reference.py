"""Makes tests/data/reference_greedy.json: greedy continuations of the default model by an independent implementation.

    .venv/bin/python -m tests.make_reference

`transformers` runs the weights of the same GGUF file, dequantised to float32 by the `gguf` package and not by us, and
continues 20 prompts of mixed length by 64 tokens, end-of-text ignored. Prompt ids are stored too, so the comparison is
of models and not of tokenizers.
"""

from __future__ import annotations

import json
from pathlib import Path

OUT = Path(__file__).parent / "data" / "reference_greedy.json"
COUNT = 64

STORY = (
    "The lighthouse keeper had not spoken to anyone for eleven days when the boat came round the point. It carried flour,"
    " lamp oil, a sack of letters and a boy of about nine who would not say his name. The keeper set the boy to polishing the"
    " brass, because brass is a thing that answers: you rub it and it shines. By the third evening the boy asked how far the"
    " light could be seen. Twenty-one miles, said the keeper, on a clear night, from the deck of a tall ship. And who looks at"
    " it from there? Somebody who is not sure where he is, said the keeper. "
)
FACTS = (
    "A heat pump moves heat from a cold place to a warm one. It does so by letting a liquid boil at low pressure, squeezing"
    " the vapour so that it grows hot, and letting it condense where the warmth is wanted. For each unit of electricity it can"
    " move three or four units of heat. In cold weather the ratio falls, because the difference that must be bridged is"
    " larger. "
)


def chat(text: str) -> str:
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


PROMPTS = [
    "Hello",
    "The capital of France is",
    "1, 2, 3, 5, 8, 13,",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea,",
    chat("What is the capital of Italy?"),
    chat("Write a haiku about rain on a tin roof."),
    chat("Explain in two sentences why the sky is blue."),
    chat("List three fruits that are red."),
    chat("Translate 'good morning, my friend' into French."),
    chat("A train leaves at 14:05 and arrives at 17:50. How long is the journey?"),
    chat("What does this Python code print?\n\nfor i in range(3):\n    print(i * i)"),
    "In the year 2026 the price of 17 apples was $8.50, so one apple",
    STORY,
    FACTS + "The main advantage of a heat pump is",
    chat("Summarise this text in one sentence.\n\n" + FACTS),
    chat("Continue this story.\n\n" + STORY),
    (STORY + FACTS) * 3,
    chat("Here are notes from two notebooks.\n\n" + (FACTS + STORY) * 4 + "\n\nWhat is the boy asked to polish?"),
    "Zürich, naïve café, 東京, emoji 🙂 and back to plain words: the",
]


def main() -> None:
    import torch

    from engine.tokenizer import Tokenizer
    from scale import pull

    path = pull.resolve("smollm2-135m-instruct")
    tokenizer = Tokenizer.load(path)
    model = load(path)
    vectors = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, add_special=False)
        with torch.inference_mode():
            out = greedy(model, ids, COUNT)
        vectors.append({"prompt": ids, "greedy": out})
        print(len(ids), repr(tokenizer.decode(out))[:100], flush=True)
    lines = ",\n".join(json.dumps(v) for v in vectors)
    OUT.write_text(f"[\n{lines}\n]\n")


def load(path: Path):
    """The GGUF file as a transformers model in float32, without any code of ours."""
    import gguf
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)  # torch's threads wait for each other by spinning: beside any other load two are slower than one
    reader = gguf.GGUFReader(path)

    def field(name: str) -> float:
        return reader.get_field(f"llama.{name}").contents()

    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")
    config = LlamaConfig(
        hidden_size=field("embedding_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=field("feed_forward_length"),
        vocab_size=field("vocab_size"),
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": field("rope.freq_base")},
        tie_word_embeddings=True,
    )
    names = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
    }
    names |= {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    names |= {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    whole = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    state = {}
    for tensor in reader.tensors:
        values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        stem = tensor.name.removesuffix(".weight")
        if stem in whole:
            state[whole[stem] + ".weight"] = values
            continue
        _, layer, part = stem.split(".")
        if part in ("attn_q", "attn_k"):  # llama.cpp keeps rotary pairs side by side, transformers in halves
            count = heads if part == "attn_q" else kv_heads
            values = values.view(count, len(values) // count // 2, 2, -1).transpose(1, 2).reshape(values.shape)
        state[f"model.layers.{layer}.{names[part]}.weight"] = values
    model = LlamaForCausalLM(config).float().eval()
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
    model.tie_weights()
    return model


def greedy(model, ids: list[int], count: int) -> list[int]:
    """Continue `ids` by `count` tokens, the likeliest each time."""
    import torch

    out = model(torch.tensor([ids]), use_cache=True)
    found = [int(out.logits[0, -1].argmax())]
    while len(found) < count:
        out = model(torch.tensor([[found[-1]]]), past_key_values=out.past_key_values, use_cache=True)
        found.append(int(out.logits[0, -1].argmax()))
    return found


if __name__ == "__main__":
    main()
