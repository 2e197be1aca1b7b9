"""Compare llama.cpp's tokens with an exported folder's own, on pieces of a text.

    python recover.py export RUN_DIR OUT --format merged
    python convert_hf_to_gguf.py OUT --outfile model.gguf --outtype f16     (llama.cpp's own script)
    pip install xllamacpp && python tests/bench/check_gguf.py model.gguf OUT TEXT

TEXT is cut into pieces of 1,500 characters. Prints how many of them have the same ids, and how many
of the new tokens that occur llama.cpp finds. Where transformers puts a space before a text, as for
Llama-2, llama.cpp is given that space.
"""

import json
import sys
import urllib.request
from pathlib import Path

import xllamacpp
from tokenizers import Tokenizer


def main(gguf: str, folder: str, text_path: str) -> None:
    parameters = xllamacpp.CommonParams()
    parameters.model.path, parameters.n_ctx, parameters.warmup = gguf, 64, False
    server = xllamacpp.Server(parameters)
    tokenizer = Tokenizer.from_file(f"{folder}/tokenizer.json")
    num_words = len(Path(folder, "words.txt").read_text(encoding="utf-8").split())
    first_new_id = max(tokenizer.get_vocab().values()) + 1 - num_words
    text = Path(text_path).read_text(encoding="utf-8")
    first = tokenizer.encode("a", add_special_tokens=False).tokens[0]
    lead = " " if first.startswith("\u2581") else ""
    parts = [text[i : i + 1500] for i in range(0, len(text), 1500)]
    same, found, wanted = 0, set(), set()
    for part in parts:
        question = {"content": lead + part, "add_special": False, "parse_special": True}
        request = urllib.request.Request(
            f"{server.listening_address}/tokenize", json.dumps(question).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        theirs = json.load(urllib.request.urlopen(request))["tokens"]
        ours = tokenizer.encode(part, add_special_tokens=False).ids
        same += theirs == ours
        found |= {i for i in theirs if i >= first_new_id}
        wanted |= {i for i in ours if i >= first_new_id}
    print(f"{same} of {len(parts)} pieces have the same ids", end="; ")
    print(f"{len(found & wanted)} of {len(wanted)} new tokens found")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
