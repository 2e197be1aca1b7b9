"""Train tiny tokenizers in a moment, and write runs that use them: no network.

    write_run(tmp_path, "llama2", ["riverrun"], "a riverrun\\n")     the Config of such a run

KINDS has byte-level ones (Qwen's and GPT-2's way of cutting) and SentencePiece-style ones
(Llama-2's normalizer or Metaspace, both with byte fallback). Training one takes 4 ms (2 CPU cores,
2026-11-26).
"""

import json
from pathlib import Path

from tokenizers import (
    Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers,
)  # fmt: skip

from config import Config
from extend_tokenizer import NewWords, extend, plan_new_words, read_corpus, save_new_words

TEXT = """The weather over the harbour was grey, and the other boats lay still in the water.
There were three men on the wall; they were waiting for the ferry, and for the rain to stop.
"Whether it comes or not," said the oldest, "we shall have been here, and that is something."
The others did not answer. They watched the water, the weather and the wall, as they always did.
Thereafter the theatre was closed, and therefore there was nothing else to watch in the harbour.
Quorum, Quorum, Quorum, Quorum: so they said.
"""
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level(qwen: bool = True, text: str = TEXT) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if qwen:
        cut = pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated")
        rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, rest])
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=380, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>"])
    return tokenizer


def sentencepiece(metaspace: bool = False) -> Tokenizer:
    """Llama-2's layout: specials, 256 byte tokens, pieces; and a special token after them all."""
    trained = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(r"▁?\p{L}+|▁?\p{N}|▁?[^▁\p{L}\p{N}]+|▁+"), "isolated")
    trained.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(split=False), cut])
    trained.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=160, show_progress=False))
    trained = json.loads(trained.to_str())["model"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [token for token in trained["vocab"] if token != "\n"]
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in trained["merges"]]
    merges = [tuple(pair) for pair in merges if "\n" not in "".join(pair)]
    tokens = [token for token in tokens if "\n" not in token]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(steps)
    if metaspace:
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", "<pad>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


KINDS = {
    "qwen": byte_level, "gpt2": lambda: byte_level(qwen=False),
    "llama2": sentencepiece, "metaspace": lambda: sentencepiece(metaspace=True),
}  # fmt: skip


def write_run(
    folder: Path, kind: str, lexicon: list[str] | bytes, corpus: str | bytes, /,
    settings: dict | None = None, model_config: dict | None = None, **keys,
) -> Config:  # fmt: skip
    """Write a model's tokenizer files, a lexicon and a corpus -> the Config that names them.

    settings: more of tokenizer_config.json; model_config: the whole config.json; keys: of Config
    """
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "tokenizer.json").write_text(KINDS[kind]().to_str(), encoding="utf-8")
    eos = "</s>" if kind in ("llama2", "metaspace") else "<|endoftext|>"
    settings = {"eos_token": eos} | (settings or {})
    (model / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    if model_config:
        (model / "config.json").write_text(json.dumps(model_config), encoding="utf-8")
    if not isinstance(lexicon, bytes):
        lexicon = "".join(f"{word}\n" for word in lexicon).encode()
    (folder / "words.txt").write_bytes(lexicon)
    corpus = corpus if isinstance(corpus, bytes) else corpus.encode()
    (folder / "corpus.txt").write_bytes(corpus)
    paths = {"model_name": str(model), "run_dir": str(folder / "run")}
    paths |= {"lexicon": str(folder / "words.txt"), "corpus": str(folder / "corpus.txt")}
    return Config(**(paths | keys))


def plan(config: Config) -> NewWords:
    return plan_new_words(config, read_corpus(config))


def extended(config: Config) -> NewWords:
    return extend(config, read_corpus(config))


def saved(config: Config) -> NewWords:
    new = extended(config)
    save_new_words(config, new)
    return new


def contents(new: NewWords) -> list[str]:
    return [form.content for form in new.forms]


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)
