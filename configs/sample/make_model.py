"""Make the sample's model again: a tokenizer and a tiny Qwen2 that has read the King James Bible.

The text (public domain, 4.4 MB, a verse a line, its reference in front) is in Debian's packages:

    apt-get install bible-kjv bible-kjv-text
    bible -f gen1:1-rev22:21 > verses.txt

    python configs/sample/make_model.py verses.txt configs/sample/model
    python configs/sample/make_model.py --measure configs/sample/corpus.txt configs/sample/model

The references are cut off; the verses of a chapter are joined, five to a paragraph, a blank line
between paragraphs and `<|endoftext|>` after the chapter. Every 20th chapter is held out.
The same versions, machine and thread count give the same files: the seed is fixed, the order too.
--measure prints the bits per byte of any UTF-8 text in blocks of 128 tokens; the first token of a
block is not predicted and not counted. configs/sample/model/README.md has the figures.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors, trainers
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

EOS = "<|endoftext|>"
NUM_TOKENS = 2000  # the last one is EOS
SEQ_LEN, BATCH_SIZE, MAX_STEPS, WARMUP_STEPS = 128, 32, 1500, 100
LEARNING_RATE, WEIGHT_DECAY = 4e-3, 0.1
HELD_OUT_EVERY = 20
# Qwen2's own pattern and chain: transformers 5 rebuilds them from model_type, others would be lost
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": NUM_TOKENS - 1,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 384,
    "max_position_embeddings": 512,
    "model_type": "qwen2",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": NUM_TOKENS - 1,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",  # the name that transformers 4 and 5 both read
    "use_cache": True,
    "vocab_size": 2048,  # 48 rows of padding past the tokenizer, as Qwen2.5's tables have
}


def read_chapters(verses_path: Path) -> list[str]:
    """The text of each chapter, five verses to a paragraph, without references.

    Raises: SystemExit naming the line that has no reference
    """
    chapters: dict[str, list[str]] = {}
    for number, line in enumerate(verses_path.read_text(encoding="utf-8").splitlines(), 1):
        reference, _, verse = line.partition(" ")
        chapter, colon, _ = reference.rpartition(":")
        if not colon or not verse:
            raise SystemExit(
                f"{verses_path}:{number}: no reference such as 'Ge1:1' before the verse; make the "
                "file with: bible -f gen1:1-rev22:21"
            )
        chapters.setdefault(chapter, []).append(verse.strip())
    return [
        "\n\n".join(" ".join(verses[i : i + 5]) for i in range(0, len(verses), 5)) + "\n\n"
        for verses in chapters.values()
    ]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE of NUM_TOKENS entries, Qwen2's chain; EOS is an added token, the last id."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_TOKENS - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # the text is ASCII, users' are not
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(EOS, special=True, normalized=False)])
    assert tokenizer.token_to_id(EOS) == CONFIG["eos_token_id"], "text too small for NUM_TOKENS"
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write tokenizer.json and a tokenizer_config.json that transformers 4.57 and 5 read alike."""
    tokenizer.save(str(out / "tokenizer.json"))
    settings = {
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_input_names": ["input_ids", "attention_mask"],  # no token_type_ids on 4.57
        "model_max_length": CONFIG["max_position_embeddings"],
        "pad_token": EOS,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(out / "tokenizer_config.json", settings)


def write_json(path: Path, settings: dict) -> None:
    """Write settings, two spaces deep, with a newline at the end."""
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def make_blocks(texts: list[str], tokenizer: Tokenizer, end: str) -> torch.Tensor:
    """Encode texts, each followed by end -> (blocks, SEQ_LEN) int64; the rest is dropped."""
    ids = [i for text in texts for i in tokenizer.encode(text + end).ids]
    num_blocks = len(ids) // SEQ_LEN
    return torch.tensor(ids[: num_blocks * SEQ_LEN]).view(num_blocks, SEQ_LEN)


def get_batches(blocks: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield (BATCH_SIZE, SEQ_LEN) for ever; each epoch shifts the windows and shuffles them."""
    generator = torch.Generator().manual_seed(1)
    stream = blocks.view(-1)
    while True:
        shift = int(torch.randint(SEQ_LEN, (1,), generator=generator))
        num_windows = (len(stream) - shift) // SEQ_LEN
        windows = stream[shift : shift + num_windows * SEQ_LEN].view(num_windows, SEQ_LEN)
        order = torch.randperm(num_windows, generator=generator)
        for i in range(0, num_windows - BATCH_SIZE + 1, BATCH_SIZE):
            yield windows[order[i : i + BATCH_SIZE]]


def get_learning_rate(step: int) -> float:
    """Linear warm-up over WARMUP_STEPS, then cosine to zero at MAX_STEPS."""
    if step < WARMUP_STEPS:
        return LEARNING_RATE * (step + 1) / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / (MAX_STEPS - WARMUP_STEPS)
    return LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def measure(model: Qwen2ForCausalLM, blocks: torch.Tensor, tokenizer: Tokenizer) -> float:
    """Bits per byte over the predicted tokens of blocks (all but the first of each block)."""
    model.eval()
    nats = 0.0
    for batch in blocks.split(BATCH_SIZE):
        nats += model(input_ids=batch, labels=batch).loss.item() * batch[:, 1:].numel()
    # in a byte-level vocabulary each character stands for one byte; EOS is no byte of the text
    lengths = [len(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())]
    lengths[CONFIG["eos_token_id"]] = 0
    num_bytes = int(torch.tensor(lengths)[blocks[:, 1:]].sum())
    model.train()
    return nats / math.log(2) / num_bytes


def train_model(
    train_blocks: torch.Tensor, val_blocks: torch.Tensor, tokenizer: Tokenizer
) -> Qwen2ForCausalLM:
    """Train a fresh model in fp32 and return it; prints a line each 100 steps."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**{**CONFIG, "torch_dtype": "float32"}))
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or ".layers." not in n]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    batches, start, losses = get_batches(train_blocks), time.perf_counter(), []
    for step in range(MAX_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = get_learning_rate(step)
        batch = next(batches)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 99:
            line = f"step {step + 1} loss {sum(losses[-100:]) / 100:.3f} nats"
            if step % 500 == 499 or step + 1 == MAX_STEPS:
                line += f" val {measure(model, val_blocks, tokenizer):.3f} bits/byte"
            print(line, f"{time.perf_counter() - start:.0f} s", flush=True)
    return model


def make(verses_path: Path, out: Path) -> None:
    """Read the verses, train tokenizer and model, write both to out, print what was held out."""
    chapters = read_chapters(verses_path)
    val_texts = chapters[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    train_texts = [c for i, c in enumerate(chapters, 1) if i % HELD_OUT_EVERY]
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(train_texts)
    save_tokenizer(tokenizer, out)
    train_blocks = make_blocks(train_texts, tokenizer, EOS)
    val_blocks = make_blocks(val_texts, tokenizer, EOS)
    print(
        f"{train_blocks.numel():,} tokens to train on, {val_blocks.numel():,} held out", flush=True
    )
    model = train_model(train_blocks, val_blocks, tokenizer).to(torch.bfloat16)
    save_file(model.state_dict(), out / "model.safetensors", metadata={"format": "pt"})
    write_json(out / "config.json", CONFIG)
    print(f"held out, as saved: {measure(model.float(), val_blocks, tokenizer):.3f} bits/byte")


def main(text_path: Path, model_dir: Path, only_measure: bool) -> None:
    """Make the model from text_path, or measure model_dir on it."""
    torch.set_num_threads(2)
    if not only_measure:
        return make(text_path, model_dir)
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    blocks = make_blocks([text_path.read_text(encoding="utf-8")], tokenizer, "")
    print(f"{blocks.numel():,} tokens, {measure(model, blocks, tokenizer):.3f} bits/byte")


if __name__ == "__main__" and "__file__" in globals():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="the verses; with --measure any UTF-8 text")
    parser.add_argument("model_dir", type=Path, help="folder of the model")
    parser.add_argument("--measure", action="store_true", help="do not train: print bits per byte")
    args = parser.parse_args()
    main(args.text, args.model_dir, args.measure)
