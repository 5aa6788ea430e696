"""Makes tests/data/reference_greedy.json: greedy continuations of the default model by an independent implementation.

    .venv/bin/python -m tests.make_reference

`transformers` loads the same GGUF file (dequantised to float32 by the `gguf` package, not by us) and continues 20 prompts of mixed length
by 64 tokens, end-of-text ignored. Prompt ids are stored too, so the comparison is of models and not of tokenizers.
"""

from __future__ import annotations

import json
from pathlib import Path

OUT = Path(__file__).parent / "data" / "reference_greedy.json"
COUNT = 64

STORY = (
    "The lighthouse keeper had not spoken to anyone for eleven days when the boat came round the point. It carried flour, lamp oil, a"
    " sack of letters and a boy of about nine who would not say his name. The keeper set the boy to polishing the brass, because brass"
    " is a thing that answers: you rub it and it shines. By the third evening the boy asked how far the light could be seen. Twenty-one"
    " miles, said the keeper, on a clear night, from the deck of a tall ship. And who looks at it from there? Somebody who is not sure"
    " where he is, said the keeper. "
)
FACTS = (
    "A heat pump moves heat from a cold place to a warm one. It does so by letting a liquid boil at low pressure, squeezing the vapour so"
    " that it grows hot, and letting it condense where the warmth is wanted. For each unit of electricity it can move three or four units"
    " of heat. In cold weather the ratio falls, because the difference that must be bridged is larger. "
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
    from transformers import AutoModelForCausalLM

    from engine.tokenizer import Tokenizer
    from scale import pull

    path = pull.resolve("smollm2-135m-instruct")
    tokenizer = Tokenizer.load(path)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    vectors = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, add_special=False)
        with torch.inference_mode():
            out = greedy(model, ids, COUNT)
        vectors.append({"prompt": ids, "greedy": out})
        print(len(ids), repr(tokenizer.decode(out))[:100], flush=True)
    lines = ",\n".join(json.dumps(v) for v in vectors)
    OUT.write_text(f"[\n{lines}\n]\n")


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
