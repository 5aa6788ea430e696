"""Compares our token ids with another implementation's: `python -m bench.tokenizer_oracle FILE [MODEL]`.

FILE is JSON lines {"text", "ids"}, the ids made with special tokens parsed and none added. Lines without a text are skipped.
"""

import argparse
import json
import sys
from pathlib import Path

from engine.tokenizer import Tokenizer
from scale import pull


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSON lines {text, ids}")
    parser.add_argument("model", nargs="?", default="smollm2-135m-instruct", help="folder, GGUF file or pulled name")
    args = parser.parse_args()
    tokenizer = Tokenizer.load(pull.resolve(args.model))
    same = wrong = 0
    for line in args.file.read_bytes().split(b"\n"):  # str.splitlines would cut texts at U+2028 too
        row = json.loads(line or b"{}")
        if "text" not in row:
            continue
        ours = tokenizer.encode(row["text"], add_special=False)
        if ours == row["ids"]:
            same += 1
            continue
        wrong += 1
        at = next((i for i, (a, b) in enumerate(zip(ours, row["ids"], strict=False)) if a != b), 0)
        print(f"differs at token {at}: {row['text'][:60]!r}: ours {ours[at : at + 5]}, theirs {row['ids'][at : at + 5]}")
    print(f"{same} of {same + wrong} texts have the same ids")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
