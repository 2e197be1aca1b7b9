"""Give every word of a lexicon one token of its own, and leave ordinary text as it was.

    python extend_tokenizer.py configs/sample.yaml
    python extend_tokenizer.py configs/qwen14b.yaml token_matching=bare run_dir=runs/bare

Writes RUN_DIR/tokenizer/ (for AutoTokenizer.from_pretrained) with report.json in it, and prints the
report. The settings of the whole project (Config) stand here too, because this is the first script
of a run; train.py takes them from here.
"""

import argparse
import bisect
import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import re
import shutil
import sys
import tempfile
import unicodedata
from collections import Counter
from os.path import commonprefix
from pathlib import Path
from textwrap import shorten

import yaml
from tokenizers import AddedToken, Tokenizer

# ---- Settings ------------------------------------------------------------------------------------

# What people type for our keys because another tool calls it so; difflib finds the closer ones.
ALIASES = {
    "lr": "learning_rate", "dtype": "compute_dtype", "load_in_4bit": "quantization",
    "words": "lexicon", "vocab": "lexicon", "text": "corpus", "data": "corpus", "dataset": "corpus",
    "train_file": "corpus", "block_size": "seq_len", "max_length": "seq_len",
    "batch_size": "effective_batch_size", "grad_accum": "effective_batch_size",
    "gradient_accumulation_steps": "effective_batch_size",
    "per_device_train_batch_size": "micro_batch_size", "grad_clip": "max_grad_norm",
    "clip_grad": "max_grad_norm", "logging_steps": "log_every", "eval_steps": "eval_every",
    "save_steps": "save_every", "save_total_limit": "keep_sentries", "output_dir": "run_dir",
    "drive_dir": "sentry_dir",
}  # fmt: skip


class ConfigError(ValueError):
    """What the user can mend, a line for each problem (`problems`); scripts print it and exit 1."""

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


def key(default, meaning: str, **limits):
    """A field of Config: meaning feeds --help and the README; limits: choices, low, above, high."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, **limits})


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of a run. Values may be strings, as YAML and the command line give them.

    Raises: ConfigError naming every missing, mistyped or impossible value at once.
    """

    # fmt: off
    model_name: str = key("", "hub id or local folder of the base model", required=True)
    model_revision: str | None = key(None, "branch, tag or commit on the hub")
    trust_remote_code: bool = key(False, "run code that the model's folder brings along")
    quantization: str = key("nf4", "body in 4-bit NF4 with double quantization, or as stored",
                            choices=("nf4", "none"))
    compute_dtype: str = key("auto", "auto: bfloat16 from compute capability 8.0, float16 with loss"
                             " scaling below, float32 on a CPU",
                             choices=("auto", "bfloat16", "float16", "float32"))
    device: str = key("auto", "auto: the GPU where there is one", choices=("auto", "cuda", "cpu"))
    lexicon: str = key("", "text file, one word a line; or from_corpus: rare words of the corpus",
                       required=True)
    lexicon_min_count: int = key(2, "from_corpus: take words seen at least so many times", low=1)
    lexicon_min_base_tokens: int = key(3, "from_corpus: take words that the base spells in at least"
                                       " so many tokens", low=2)
    corpus: tuple[str, ...] = key((), "UTF-8 text file, or a list of them", required=True)
    token_matching: str = key("spaced", "how a new token matches: with its leading space, as a"
                              " whole word, or anywhere", choices=("spaced", "bare", "plain"))
    init: str = key("subtoken_mean", "new rows start as the mean of the word's sub-token rows, or"
                    " as random directions", choices=("subtoken_mean", "spherical"))
    init_radius: float = key(1.5, "spherical: row norm = init_radius x base std x"
                             " sqrt(hidden_size)", above=0.0)
    output_rows: str = key("auto", "auto: shared with the input rows where the model ties its head,"
                           " else separate", choices=("auto", "shared", "separate", "frozen"))
    seq_len: int = key(128, "tokens a sequence", low=2)
    effective_batch_size: int = key(16, "sequences an optimizer step", low=1)
    micro_batch_size: int | str = key("auto", "sequences a forward pass; auto: the largest that"
                                      " fits and divides", low=1)
    max_steps: int = key(3000, "optimizer steps", low=1)
    learning_rate: float = key(5.0e-4, "peak; a function of the step: warm-up, cosine to 0",
                               above=0.0)
    warmup_ratio: float = key(0.05, "share of max_steps that warms up", low=0.0, high=1.0)
    row_coupling: float = key(4.0, "how far every new row also follows the gradient all of them"
                              " share; 0: not", low=0.0)
    max_grad_norm: float = key(1.0, "gradient norm over all new rows is clipped to this", above=0.0)
    gradient_checkpointing: str = key("auto", "recompute layers in backward: auto: as few as memory"
                                      " allows; true: all; false: none",
                                      choices=("auto", "true", "false"))
    compile: str = key("auto", "auto: on a GPU fuse elementwise work, and replay a step as CUDA"
                       " graphs from capability 8.0", choices=("auto", "false"))
    log_every: int = key(10, "steps between lines", low=1)
    eval_every: int = key(50, "steps between evaluations", low=1)
    save_every: int = key(20, "steps between sentries", low=1)
    snapshot_every: int = key(20, "steps between whole saves on the local disk", low=1)
    keep_sentries: int = key(3, "newest saves that stay in each folder", low=1)
    val_fraction: float = key(0.1, "share of the corpus held out", above=0.0, high=0.5)
    seed: int = key(42, "data order, random rows, samples", low=0, high=10**9)
    run_dir: str = key("", "local run folder", required=True)
    sentry_dir: str | None = key(None, "durable folder of this run alone, a mounted Drive; null:"
                                       " RUN_DIR/sentries")
    max_gpu_gib: float | None = key(None, "cap on what the program may take of the GPU, GiB",
                                    above=0.0)
    prompts: tuple[str, ...] = key((), "texts continued at each evaluation")
    tensorboard: bool = key(False, "write RUN_DIR/tensorboard where the package is installed")
    # fmt: on

    def __post_init__(self):
        problems = []
        for field in dataclasses.fields(self):
            try:
                object.__setattr__(self, field.name, converted(field, getattr(self, field.name)))
            except ConfigError as error:
                problems += error.problems
        micro, effective = self.micro_batch_size, self.effective_batch_size
        if not problems and micro != "auto" and effective % micro:
            use = ", ".join(map(str, divisors(effective)))
            wrong = f"'micro_batch_size' is {micro}, which does not divide effective_batch_size"
            problems.append(f"{wrong} {effective}; use one of {use}, or auto")
        if problems:
            raise ConfigError(*problems)


KEYS = [field.name for field in dataclasses.fields(Config)]


def divisors(number: int) -> list[int]:
    """6 -> [1, 2, 3, 6]"""
    return [n for n in range(1, number + 1) if number % n == 0]


# Type of a field -> what it accepts in words, the pattern of that in lower case, what reads it.
NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"
FIELD_TYPES = {
    str: ("text", "(?s).+", str),
    str | None: ("null or text", "(?s).+", str),
    bool: ("true or false", "true|yes|on|false|no|off", lambda t: t in ("true", "yes", "on")),
    int: ("a whole number", r"[+-]?\d+", int),
    int | str: ("auto or a whole number", r"auto|[+-]?\d+", lambda t: t if t == "auto" else int(t)),
    float: ("a number", NUMBER, float),
    float | None: ("null or a number", NUMBER, float),
    tuple[str, ...]: ("text or a list of texts", None, None),
}


def converted(field: dataclasses.Field, value):
    """`value` (a string from YAML or the command line, or a Python value) in the field's own type.

    YAML's own guesses are not used: it reads 5e-4 as a string, 010 as 8, no as False, 1:30 as 90.
    Raises: ConfigError with what was seen and what is allowed.
    """
    limits, (allowed, pattern, read) = field.metadata, FIELD_TYPES[field.type]
    if "choices" in limits:
        allowed, pattern = ", ".join(limits["choices"]), "|".join(limits["choices"])
    for name, words in (("low", "of at least"), ("above", "above"), ("high", "and at most")):
        if name in limits:
            allowed += f" {words} {limits[name]:g}"
    wrong = ConfigError(f"{field.name!r} is {value!r}; allowed: {allowed}")
    null = value is None or (isinstance(value, str) and value.strip().lower() in ("null", "~", ""))
    if limits.get("required") and (null or value in ([], ())):
        raise ConfigError(f"missing key {field.name!r}: {limits['meaning']}")
    if null and field.default in (None, ()):
        return field.default
    if field.type == tuple[str, ...]:
        items = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(item, (str, Path)) and str(item).strip() for item in items):
            raise wrong
        return tuple(map(str, items))
    as_written = read is str and "choices" not in limits
    if not isinstance(value, (str, int, float, Path)) or (as_written and isinstance(value, bool)):
        raise wrong
    text = str(value) if as_written else str(value).strip().lower()
    if not re.fullmatch(pattern, text):
        raise wrong
    result = read(text)
    if isinstance(result, str):
        return result
    if math.isinf(result):  # as YAML and Python read 1e400
        raise wrong
    too_low = result < limits.get("low", result) or result <= limits.get("above", result - 1)
    if too_low or result > limits.get("high", result):
        raise wrong
    return result


def nearest_key(name: str) -> str:
    """The end of an unknown-key line: the key that was probably meant, or all of them."""
    close = [*difflib.get_close_matches(name.lower(), KEYS, 1), None]
    meant = ALIASES.get(name.lower(), close[0])
    return f"did you mean {meant!r}?" if meant else f"the keys are {', '.join(KEYS)}"


def load_config(path: str | Path, *overrides: str) -> Config:
    """The settings in a flat YAML file, with `key=value` overrides put over them.

    Raises: ConfigError listing every unknown, repeated, missing or mistyped key at once.
    """
    try:
        # BaseLoader leaves every scalar a string; `converted` alone decides what it means.
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.BaseLoader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a YAML config") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not a readable YAML file: {one_line(error)}") from None
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: not a flat list of 'key: value' lines")
    values, problems = {}, []
    for name, value in yaml.BaseLoader("").construct_pairs(root, deep=True):
        if name not in KEYS:
            problems.append(f"unknown key {name!r}, {nearest_key(str(name))}")
        elif name in values:
            problems.append(f"key {name!r} stands there twice; keep one")
        else:
            values[name] = value
    for override in overrides:
        name, equals, value = override.partition("=")
        if not equals:
            problems.append(f"command line: {override!r} is no override; write key=value")
        elif name not in KEYS:
            problems.append(f"command line: unknown key {name!r}, {nearest_key(name)}")
        if name in KEYS:
            values[name] = value
            if value.startswith("["):
                with contextlib.suppress(yaml.YAMLError):  # then it is a text
                    values[name] = yaml.load(value, yaml.BaseLoader)
    try:
        config = Config(**values)
    except ConfigError as error:
        problems += error.problems
    if problems:
        raise ConfigError(*(f"{path}: {problem}" for problem in problems))
    return config


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def write_text(path: Path, text: str) -> None:
    """Replace a text file at once, so that a kill leaves the old or the new one."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def write_config(config: Config) -> None:
    """RUN_DIR/config.yaml: every key as resolved; load_config reads it back to the same Config."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_text(Path(config.run_dir, "config.yaml"), text)


def config_table() -> list[tuple[str, str, str]]:
    """(key, default, meaning) of every setting: --help and the README's table are made of it."""
    rows = []
    for field in dataclasses.fields(Config):
        limits, default = field.metadata, field.default
        default = default if isinstance(default, str) else json.dumps(default)
        default = "-" if limits.get("required") else default
        choices = f" ({' | '.join(limits['choices'])})" if "choices" in limits else ""
        rows.append((field.name, default, limits["meaning"] + choices))
    return rows


def command_line_parser(example: str) -> argparse.ArgumentParser:
    """`SCRIPT CONFIG [key=value ...]`; --help shows a real example, then every key."""
    rows = [f"  {name:24} {default:15} {meaning}" for name, default, meaning in config_table()]
    parser = argparse.ArgumentParser(
        usage="%(prog)s CONFIG [key=value ...] [options]",
        description=f"example:\n{example}",
        epilog="\n".join(["keys of CONFIG, with defaults ('-': must be given):", *rows]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file")
    what = "put over the YAML's keys"
    parser.add_argument("overrides", metavar="key=value", nargs="*", help=what)
    return parser


def run_command(command, *arguments, **options) -> int:
    """Call a script's main function: 0; or 1, one line a problem on stderr and no traceback."""
    try:
        command(*arguments, **options)
    except ValueError as error:
        if not hasattr(error, "problems"):  # ConfigError, SentryError and OverlayError carry them
            raise
        print("\n".join(error.problems), file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before training, or a second one in it: at once
        print("stopped by SIGINT", file=sys.stderr)
        return 1
    return 0


# ---- Lexicon and corpus --------------------------------------------------------------------------

# Letters with inner apostrophes and hyphens; a combining accent belongs to the letter before it.
WORD = re.compile(r"(?:[^\W\d_][\u0300-\u036f]*)+(?:['’-](?:[^\W\d_][\u0300-\u036f]*)+)*")
# What has one meaning is repaired, in this order, and counted.
REPAIRS = {
    "byte order mark": lambda line: line.removeprefix("\ufeff"),
    "carriage return": lambda line: line.removesuffix("\r"),
    "outer blanks": str.strip,
    "not NFC": lambda line: unicodedata.normalize("NFC", line),
}


@dataclasses.dataclass(frozen=True)
class Lexicon:
    """Usable words in file order; numbers (from 1) of the lines with something wrong, by kind."""

    words: list[str]
    repaired: dict[str, list[int]]
    refused: dict[str, list[int]]


def read_text(path: str | Path) -> str:
    """A UTF-8 file, line ends as they stand. Raises: ConfigError, one line."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        place = f"byte 0x{error.object[error.start]:02x} at offset {error.start}, line {line}"
        raise ConfigError(f"{path}: not UTF-8: {place}; save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def read_corpus(config: Config) -> list[str]:
    """The text of each corpus file. Raises: ConfigError with a line for each unusable file."""
    texts, problems = [], []
    for path in config.corpus:
        try:
            texts.append(read_text(path).removeprefix("\ufeff"))
            if not texts[-1].strip():
                problems.append(f"{path}: the corpus file is empty; give a text")
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(*problems)
    return texts


def refusal(word: str, reserved: re.Pattern | None = None) -> str | None:
    """Why a row for `word` would do damage or could never be used; None: it is usable."""
    if reserved and reserved.search(word):
        return "special token"
    if re.search(r"\s", word):
        return "inner blanks"
    # Zero-width (non-)joiners are invisible too, but Persian and Hindi spell words with them.
    if not word.replace("\u200c", "").replace("\u200d", "").isprintable():
        return "control character"
    return None if any(map(str.isalnum, word)) else "no letter or digit"


def read_lexicon(path: str | Path, reserved: re.Pattern | None = None) -> Lexicon:
    """One word a line; empty lines are skipped. `reserved` finds what no word may contain.

    Raises: ConfigError where the file cannot be read or no line holds a usable word.
    """
    words, repaired, refused = {}, {}, {}
    for number, word in enumerate(read_text(path).split("\n"), 1):
        for kind, repair in REPAIRS.items():
            before, word = word, repair(word)
            if word != before:
                repaired.setdefault(kind, []).append(number)
        if word in words:
            repaired.setdefault("duplicate", []).append(number)
        elif kind := word and refusal(word, reserved):
            refused.setdefault(kind, []).append(number)
        elif word:
            words[word] = None
    if not words:
        kinds = ", ".join(f"{kind}: {len(lines)}" for kind, lines in refused.items())
        raise ConfigError(f"{path}: no usable word ({kinds or 'empty file'}); give one word a line")
    return Lexicon(list(words), repaired, refused)


def find_lexicon(config: Config, base: Tokenizer, texts: list[str], start: str) -> Lexicon:
    """The lexicon file; for from_corpus RUN_DIR/lexicon.txt or, before that exists, corpus words.

    from_corpus takes runs of letters with inner apostrophes and hyphens as they are written, the
    most frequent first. Words that contain a special token's string are refused: a row for one
    would hide the special token.
    """
    added = base.get_added_tokens_decoder().values()
    reserved = [token.content for token in added if token.special] + [SPACE] * (start == SPACE)
    pattern = re.compile("|".join(map(re.escape, reserved)) or "(?!)")  # (?!) never matches
    if config.lexicon != "from_corpus":
        return read_lexicon(config.lexicon, pattern)
    if Path(config.run_dir, "lexicon.txt").exists():
        return read_lexicon(Path(config.run_dir, "lexicon.txt"), pattern)
    counts = Counter(unicodedata.normalize("NFC", w) for text in texts for w in WORD.findall(text))
    words = [word for word, count in counts.most_common() if count >= config.lexicon_min_count]
    words = [word for word in words if not pattern.search(word)]
    spelled = zip(words, spell(base, [start + word for word in words]))
    words = [word for word, ids in spelled if len(ids) >= config.lexicon_min_base_tokens]
    if not words:
        raise ConfigError(
            f"lexicon from_corpus: no word of the corpus occurs {config.lexicon_min_count} times "
            f"and takes {config.lexicon_min_base_tokens} base tokens; lower lexicon_min_count or "
            "lexicon_min_base_tokens"
        )
    return Lexicon(words, {}, {})


# ---- The base tokenizer --------------------------------------------------------------------------

SPACE = "\u2581"  # SentencePiece's sign for a space
PLAIN_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
    "config.json",
)  # fmt: skip
# A folder with none of these has no tokenizer.
TOKENIZER_FILES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*", "tokenization_*.py")


def base_files(config: Config) -> dict[str, str]:
    """Name -> text of the model's tokenizer files, from its folder or the hub; no weights.

    Where there is no tokenizer.json, transformers (3 s to import) makes one of a slow tokenizer.
    Raises: ConfigError where the model or its tokenizer is not to be found.
    """
    name, folder = config.model_name, Path(config.model_name).expanduser()
    if not folder.is_dir():
        if name.count("/") > 1 or name.startswith((".", "/", "~")):
            raise ConfigError(f"model_name {name!r}: no such folder")
        folder = hub_folder(name, config.model_revision)
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise ConfigError(f"model_name {name!r}: {folder} holds no tokenizer")
    files = plain_files(folder)
    return files if "tokenizer.json" in files else files | converted_files(folder, config)


def plain_files(folder: Path) -> dict[str, str]:
    paths = map(folder.joinpath, PLAIN_FILES)
    return {path.name: read_text(path) for path in paths if path.is_file()}


def hub_folder(name: str, revision: str | None) -> Path:
    """The tokenizer files of a hub model, in the hub's local cache. Raises: ConfigError."""
    from huggingface_hub import snapshot_download

    patterns = [*PLAIN_FILES, *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # all of the hub's own are of these
        problem = f"no such folder, and the hub says: {one_line(error)}"
        raise ConfigError(f"model_name {name!r}: {problem}") from None


def converted_files(folder: Path, config: Config) -> dict[str, str]:
    """tokenizer.json and its companions of a slow tokenizer's files. Raises: ConfigError."""
    from transformers import AutoTokenizer

    remote = config.trust_remote_code
    with tempfile.TemporaryDirectory() as aside:
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=remote)
            tokenizer.save_pretrained(aside)
            made = {"tokenizer.json": tokenizer.backend_tokenizer.to_str()}
        except (OSError, ValueError, ImportError, TypeError, AttributeError) as error:
            problem = "its tokenizer cannot be converted: "
            problem += f"{type(error).__name__}: {one_line(error)}"
            raise ConfigError(f"model_name {config.model_name!r}: {problem}") from None
        return plain_files(Path(aside)) | made


def base_tokenizer(config: Config, files: dict[str, str] | None = None) -> Tokenizer:
    """The model's own tokenizer, without importing transformers where it has a tokenizer.json."""
    text = (files or base_files(config))["tokenizer.json"]
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        problem = "its tokenizer.json is damaged, or newer than the installed tokenizers package "
        problem += f"reads: {one_line(error)}"
        raise ConfigError(f"model_name {config.model_name!r}: {problem}") from None


def parts_as_json(*parts) -> str:
    """Those of a tokenizer's parts that it has, as they stand in tokenizer.json."""
    return "".join(part.__getstate__().decode() for part in parts if part)


def is_sentencepiece(tokenizer: Tokenizer) -> bool:
    """SentencePiece-style, or byte-level: by what the tokenizer does, not by its name.

    Raises: ConfigError for the types whose vocabularies cannot take whole words exactly.
    """
    model = type(tokenizer.model).__name__
    steps = parts_as_json(tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder)
    if model == "BPE" and ("ByteLevel" in steps or SPACE in steps):
        return "ByteLevel" not in steps
    raise ConfigError(
        f"the model's tokenizer is of type {model}; words can be added to byte-level BPE (Qwen, "
        "Llama 3, SmolLM2, GPT-2) and SentencePiece-style BPE (Llama-2, TinyLlama, Mistral v0.1)"
    )


def spell(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The ids of each text; 20,000 at a time, because an Encoding of a word takes about 2 kB.

    Texts that begin with SPACE are vocabulary strings and go straight to the model.
    """
    if texts and texts[0].startswith(SPACE):
        return [[token.id for token in tokenizer.model.tokenize(text)] for text in texts]
    ids, encode = [], tokenizer.encode_batch_fast  # no character offsets
    for i in range(0, len(texts), 20_000):
        ids += [e.ids for e in encode(texts[i : i + 20_000], add_special_tokens=False)]
    return ids


# ---- New words -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NewWords:
    """The words that get a row, and the tokenizer that knows them.

    words[i] has the id first_new_id + i, matches contents[i] in a text, and is spelled spellings[i]
    by the base: with its leading space, or without where it matches without.
    """

    first_new_id: int  # number of the base tokenizer's ids, added tokens included
    known: int  # lexicon words that the base vocabulary holds; they get no row
    devlog_known: int  # lexicon words whose exact string is in the base vocabulary
    words: list[str]
    contents: list[str]
    spellings: list[list[int]]
    bos_id: int | None  # what the base's own encoding puts before a text
    matching: str  # spaced, bare, plain; whole_word on SentencePiece-style tokenizers
    lexicon: Lexicon
    base: Tokenizer
    tokenizer: Tokenizer
    files: dict[str, str]  # the base's, as `base_files` gives them
    report: dict | None = None  # `extend` fills it


def plan_new_words(config: Config) -> NewWords:
    """Choose the new words and extend the base tokenizer in memory; writes nothing.

    A byte-level tokenizer knows a word whose exact string is in its vocabulary, as in the original
    runs, so that ids stay comparable. A SentencePiece-style one knows what it holds as a whole
    word: most exact strings there are pieces that only continue a word.
    Raises: ConfigError for a missing or unusable corpus, lexicon or base tokenizer.
    """
    texts, files = read_corpus(config), base_files(config)
    base = base_tokenizer(config, files)
    start = SPACE if is_sentencepiece(base) else ""
    lexicon, vocab = find_lexicon(config, base, texts, start or " "), base.get_vocab()
    words = [word for word in lexicon.words if start + word not in vocab]
    if not words:
        raise ConfigError(f"{config.lexicon}: the base vocabulary holds every word of the lexicon")
    size, matching = len(vocab), "whole_word" if start else config.token_matching
    if start:
        contents = [start + word for word in words]
        tokenizer = whole_word_tokenizer(files["tokenizer.json"], words, size)
    else:
        forms = added_forms(base, vocab, words, matching)
        contents = [form.content for form in forms]
        tokenizer = Tokenizer.from_str(files["tokenizer.json"])
        tokenizer.add_tokens(forms)  # one call: one by one is quadratic, 35 minutes for 44,000
    new_ids = list(map(tokenizer.token_to_id, contents))
    if max(vocab.values()) >= size or new_ids != list(range(size, size + len(words))):
        raise ConfigError(f"model_name {config.model_name!r}: the ids of its tokenizer have holes")
    known, devlog_known = len(lexicon.words) - len(words), sum(w in vocab for w in lexicon.words)
    with_bos, without = base.encode("a").ids, base.encode("a", add_special_tokens=False).ids
    bos_id = with_bos[0] if with_bos[:1] != without[:1] else None
    return NewWords(
        size, known, devlog_known, words, contents, spell(base, contents), bos_id, matching,
        lexicon, base, tokenizer, files,
    )  # fmt: skip


def added_forms(base: Tokenizer, vocab: dict, words: list[str], matching: str) -> list[AddedToken]:
    """How each new word of a byte-level tokenizer matches; `vocab` is the base's.

    plain: anywhere, inside longer words too, as the original runs did. bare: as a whole word.
    spaced: with the space before it, so that " word" is one token and not two. That also matches
    the beginning of longer words; so words that begin a longer alphabetic entry of the base
    vocabulary, in any case, stay bare. Byte-level decoders take the "é" of a bare token for the
    byte E9: such words always match with their space, except in plain.
    """
    if matching == "plain":
        return [AddedToken(word, normalized=True) for word in words]
    decode = base.decoder.decode
    # "\u0120" is the space before a word; decoding only what is not ASCII saves 0.3 s on Qwen.
    entries = (entry.removeprefix("\u0120") for entry in vocab)
    entries = (entry if entry.isascii() else decode([entry]) for entry in entries)
    longer = sorted({form for e in entries if e.isalpha() for form in (e, e.lower())})

    def form(word: str) -> AddedToken:
        i = bisect.bisect_right(longer, word)
        bare = matching == "bare" or (i < len(longer) and longer[i].startswith(word))
        if bare and decode([word]) == word:
            return AddedToken(word, single_word=True, normalized=False)
        return AddedToken(" " + word, normalized=False)

    return list(map(form, words))


def any_of(words: list[str]) -> str:
    """A regex for any of the words, the longest first, that walks a shared beginning once."""
    head, groups = commonprefix(words), {}
    for word in words:
        rest = word[len(head) :]
        groups.setdefault(rest[:1], []).append(rest)
    optional = "?" if groups.pop("", None) else ""
    branches = "|".join(any_of(group) for _, group in sorted(groups.items()))
    return re.escape(head) + (f"(?:{branches}){optional}" if branches else "")


def whole_word_tokenizer(tokenizer_json: str, words: list[str], first_new_id: int) -> Tokenizer:
    """New words as vocabulary entries of a SentencePiece-style tokenizer.

    Every word with its space becomes a piece of its own; `ignore_merges` gives a piece that is in
    the vocabulary its id, and all others are spelled as before. Compounds (`rise-and-shine`) are in
    the pattern by name. Special tokens must be in the model's vocabulary too: loading would move
    them to the end, onto the last new words.
    """
    spec = json.loads(tokenizer_json)
    spec["model"]["vocab"] |= {token["content"]: token["id"] for token in spec["added_tokens"]}
    spec["model"]["vocab"] |= {SPACE + word: first_new_id + i for i, word in enumerate(words)}
    spec["model"]["ignore_merges"] = True
    letter = r"[\p{L}\p{M}\p{Nd}]"
    # Two spaces before a word are one entry of the base: left alone. The last alternative keeps the
    # text "<0x41>" from being taken for the entry of that byte.
    pattern = rf"(?<!{SPACE}){SPACE}{letter}+|(?<=<)0(?=x[0-9A-F]{{2}}>)"
    compounds = [word for word in words if not all(c.isalpha() or c.isdecimal() for c in word)]
    if compounds:
        pattern = rf"(?<!{SPACE}){SPACE}(?:{any_of(compounds)})(?!{letter})|{pattern}"
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    split["invert"] = False
    steps = [step for step in (spec["pre_tokenizer"], split) if step]
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    return Tokenizer.from_str(json.dumps(spec, ensure_ascii=False))


def new_words_hash(words: list[str], first_new_id: int) -> str:
    """sha256 of the new words and their ids: the same hash, the same meaning of every row."""
    return hashlib.sha256("\n".join([str(first_new_id), *words]).encode()).hexdigest()


# ---- Report --------------------------------------------------------------------------------------


def make_report(config: Config, new: NewWords) -> dict:
    """What the extension does to ids, to the corpus and to ordinary words; plain JSON values.

    Raises: ConfigError where no new word occurs in the corpus: there would be nothing to train.
    """
    num_new, corpus = len(new.words), corpus_figures(new, config.corpus, read_corpus(config))
    if not corpus["new_tokens"]:
        none = f"none of its {num_new} new words matches in the corpus ({new.matching} matching)"
        raise ConfigError(f"{config.lexicon}: {none}; check that the two belong together")
    model = json.loads(new.files.get("config.json", "{}"))
    table_rows = model.get("vocab_size", model.get("text_config", {}).get("vocab_size"))
    padding = None if table_rows is None else max(0, table_rows - new.first_new_id)
    # Beside a qwen model's config.json transformers 5 builds the tokenizer anew with Qwen's own
    # pattern, whatever tokenizer.json says (5.23.0); PreTrainedTokenizerFast takes it as it is.
    qwen = (model.get("model_type") or "").startswith("qwen")
    foreign = qwen and r"|\\p{N}| ?[^\\s\\p{L}" not in parts_as_json(new.base.pre_tokenizer)
    return {
        "model_name": config.model_name,
        "model_revision": config.model_revision,
        "matching": new.matching,
        "base_size": new.first_new_id,
        "lexicon_words": len(new.lexicon.words),
        "known": new.known,
        "new_tokens": num_new,
        "table_rows": table_rows,
        "padding_rows": padding,
        "new_ids_in_padding": None if padding is None else min(padding, num_new),
        "total": new.first_new_id + num_new,
        "expansion_percent": round(100 * num_new / new.first_new_id, 2),
        "devlog_known": new.devlog_known,
        "new_words_sha256": new_words_hash(new.words, new.first_new_id),
        **word_figures(new),
        "corpus": corpus,
        "repaired_lines": {kind: line_ranges(n) for kind, n in new.lexicon.repaired.items()},
        "refused_lines": {kind: line_ranges(n) for kind, n in new.lexicon.refused.items()},
        "load_with": "PreTrainedTokenizerFast" if foreign else "AutoTokenizer",
    }


def word_figures(new: NewWords) -> dict:
    """Tokens per new word in a sentence, and the new words that never match or decode wrongly."""
    without_space = [w for w, content in zip(new.words, new.contents) if w == content]
    spelled = [ids for ids, w, c in zip(new.spellings, new.words, new.contents) if w != c]
    before = sum(map(len, spelled + spell(new.base, [" " + word for word in without_space])))
    sentences = [" ".join(["a", *new.words[i : i + 1000]]) for i in range(0, len(new.words), 1000)]
    after = spell(new.tokenizer, sentences)
    reached, decode = set().union(*after), new.tokenizer.decode
    ids = list(enumerate(new.words, new.first_new_id))
    return {
        "tokens_per_new_word_before": round(before / len(ids), 3),
        "tokens_per_new_word_after": round((sum(map(len, after)) - len(after)) / len(ids), 3),
        "words_never_matching": [word for i, word in ids if i not in reached],
        "words_decoding_wrongly": [word for i, word in ids if decode([i]).strip() != word],
    }


def line_ranges(numbers: list[int]) -> str:
    """[1, 2, 3, 7] as "1-3, 7": a fault of the whole file stays one short text."""
    firsts = sorted(set(numbers) - {number + 1 for number in numbers})
    lasts = sorted(set(numbers) - {number - 1 for number in numbers})
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(firsts, lasts))


def pieces(text: str) -> list[str]:
    """`text` cut into 64 Ki characters or more, at line ends that no token reaches over."""
    return re.findall(r".{65536}.*?\n(?=\S)|.+", text, re.DOTALL)


def corpus_figures(new: NewWords, paths: tuple[str, ...], texts: list[str]) -> dict:
    """Tokens before and after, new words seen, the round trip, ordinary words whose ids changed.

    An ordinary word is a run of letters, digits and underscores that is no new word; it is looked
    at as it stands in mid-sentence, and counts as often as the corpus has it.
    """
    tokens_before, seen, ordinary, first_bad_line = 0, Counter(), Counter(), None
    for path, text in zip(paths, texts):
        line = 1
        for piece in pieces(text):
            tokens_before += len(spell(new.base, [piece])[0])
            ids = spell(new.tokenizer, [piece])[0]
            seen.update(ids)
            ordinary.update(re.findall(r"\w+", piece))
            if not first_bad_line:
                first_bad_line = bad_line(new, piece, ids, path, line)
            line += piece.count("\n")
    new_seen = {i: count for i, count in seen.items() if i >= new.first_new_id}
    for word in new.words:
        ordinary.pop(word, None)
    sentences = [f"a {word} a" for word in ordinary]
    ids = zip(ordinary, spell(new.base, sentences), spell(new.tokenizer, sentences))
    changed = Counter({word: ordinary[word] for word, before, after in ids if before != after})
    return {
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens_before": tokens_before,
        "tokens_after": seen.total(),
        "new_tokens": sum(new_seen.values()),
        "new_words_seen_once": sum(count == 1 for count in new_seen.values()),
        "new_words_never_seen": len(new.words) - len(new_seen),
        "ordinary_words": ordinary.total(),
        "ordinary_words_changed": changed.total(),
        "ordinary_words_changed_examples": [word for word, _ in changed.most_common(5)],
        "exact_round_trip": first_bad_line is None,
        "first_bad_line": first_bad_line,
    }


def bad_line(new: NewWords, piece: str, ids: list[int], path: str, line: int) -> str | None:
    """The first line of `piece` that decoding `ids` does not give back; None where all is exact."""
    decoded = new.tokenizer.decode(ids, skip_special_tokens=False)
    if decoded == piece:
        return None
    same = len(commonprefix([decoded, piece]))
    start, number = piece.rfind("\n", 0, same) + 1, line + piece.count("\n", 0, same)
    wanted, got = (text[start:].split("\n")[0][:200] for text in (piece, decoded))
    by_base = new.base.decode(spell(new.base, [piece])[0], skip_special_tokens=False)
    whose = "" if by_base == piece else "; the base tokenizer is not exact either"
    return f"{path}, line {number}: {wanted!r} comes back as {got!r}{whose}"


def format_report(report: dict) -> str:
    """The report as people read it: the table of the original runs' log, and what else to know."""
    table = {
        "base vocabulary": report["base_size"],
        "words in lexicon": report["lexicon_words"],
        "already known": report["known"],
        "new tokens": report["new_tokens"],
        "padding rows of the model's table": report["padding_rows"],
        "new ids that fall there": report["new_ids_in_padding"],
        "final size": report["total"],
    }
    shown = {name: "unknown" if n is None else f"{n:,}" for name, n in table.items()}
    shown["expansion"] = f"{report['expansion_percent']} %"
    lines = [f"| {name:33} | {value:>9} |" for name, value in shown.items()]
    return "\n".join(lines + [text for told, text in remarks(report) if told])


def remarks(report: dict) -> list[tuple[object, str]]:
    """(whether it is to be told, line) below the table."""
    corpus, rows = report["corpus"], report["table_rows"]
    changed, ordinary = corpus["ordinary_words_changed"], corpus["ordinary_words"]
    examples = ", ".join(corpus["ordinary_words_changed_examples"]) or "none"
    never, wrong = report["words_never_matching"], report["words_decoding_wrongly"]
    faults = [
        f"lexicon lines {what}, {kind}: {shorten(lines, 80, placeholder=' ... (see report.json)')}"
        for what in ("repaired", "refused") for kind, lines in report[f"{what}_lines"].items()
    ]  # fmt: skip
    return [
        (rows is None, "unknown: the model's folder has no config.json with a vocab_size"),
        (rows and rows < report["base_size"], f"the model's table has only {rows} rows"),
        (True, f"{report['matching']} matching: {report['tokens_per_new_word_after']} tokens per "
               f"new word in a sentence, {report['tokens_per_new_word_before']} before"),
        (report["matching"] == "whole_word",
         "SentencePiece-style tokenizer: token_matching does not apply; known = held as a whole "
         f"word; by exact string {report['devlog_known']:,} would be known"),
        (report["matching"] == "plain", "plain cuts up ordinary words, spaced and bare do not"),
        (never, f"{len(never)} new words can never match: {', '.join(never[:5])}"),
        (wrong, f"{len(wrong)} new words decode wrongly: {', '.join(wrong[:5])}"),
        *((True, fault) for fault in faults),
        (True, f"corpus: {corpus['bytes']:,} bytes, {corpus['tokens_before']:,} tokens before, "
               f"{corpus['tokens_after']:,} after, "
               f"{corpus['new_tokens'] / corpus['tokens_after']:.2%} new; new words seen once "
               f"{corpus['new_words_seen_once']:,}, never {corpus['new_words_never_seen']:,}"),
        (True, f"ordinary words whose ids changed: {changed:,} of {ordinary:,} "
               f"({changed / max(1, ordinary):.2%}): {examples}"),
        (True, f"round trip of the corpus: {corpus['first_bad_line'] or 'exact'}"),
        (report["load_with"] != "AutoTokenizer",
         "beside the model's config.json transformers 5 builds another tokenizer: load the folder "
         f"with {report['load_with']}.from_pretrained"),
    ]  # fmt: skip


# ---- Saving --------------------------------------------------------------------------------------

# What tokenizer_config.json keeps of the base. The rest names classes and adds settings that one
# transformers version writes and another cannot read; tokenizer.json carries all that encodes.
KEPT_SETTINGS = (
    "bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token",
    "additional_special_tokens", "chat_template", "model_max_length", "padding_side",
    "truncation_side",
)  # fmt: skip


def tokenizer_settings(files: dict[str, str]) -> dict:
    """tokenizer_config.json for the saved folder, readable by transformers 4.57 and 5."""
    kept = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = json.loads(files.get(name, "{}"))
        kept |= {key: settings[key] for key in KEPT_SETTINGS if settings.get(key) is not None}
    kept = {key: v["content"] if isinstance(v, dict) else v for key, v in kept.items()}
    # PreTrainedTokenizerFast takes tokenizer.json as it is; no clean-up, or decoding is not exact.
    fixed = {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    # Without this transformers 4.57 adds token_type_ids, which generate(**inputs) refuses.
    fixed["model_input_names"] = ["input_ids", "attention_mask"]
    return kept | fixed


def save_tokenizer(folder: Path, new: NewWords) -> None:
    """Write `folder` aside, then rename: after a kill it is whole or, until the next call, gone."""
    aside, old = folder.with_name("tokenizer.new"), folder.with_name("tokenizer.old")
    for path in (aside, old):
        shutil.rmtree(path, ignore_errors=True)
    aside.mkdir(parents=True)
    texts = {name: new.files[name] for name in ["chat_template.jinja"] if name in new.files}
    texts["tokenizer.json"] = new.tokenizer.to_str()
    values = {"tokenizer_config.json": tokenizer_settings(new.files), "report.json": new.report}
    for name, value in values.items():
        texts[name] = json.dumps(value, ensure_ascii=False, indent=1) + "\n"
    for name, text in texts.items():
        (aside / name).write_bytes(text.encode())
    if folder.exists():
        folder.rename(old)
    aside.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def extend(config: Config, save: bool = True) -> NewWords:
    """Plan, report, and write RUN_DIR/tokenizer/; the same settings and files give the same bytes.

    Raises: ConfigError, before anything is written or where RUN_DIR cannot be written.
    """
    new = plan_new_words(config)
    new = dataclasses.replace(new, report=make_report(config, new))
    if save:
        save_new_words(config, new)
    return new


def save_new_words(config: Config, new: NewWords) -> None:
    """RUN_DIR/tokenizer/, and RUN_DIR/lexicon.txt of a lexicon from_corpus once; later calls read
    what is there. Raises: ConfigError where RUN_DIR cannot be written."""
    lexicon = Path(config.run_dir, "lexicon.txt")
    try:
        save_tokenizer(lexicon.with_name("tokenizer"), new)
        if config.lexicon == "from_corpus" and not lexicon.exists():
            write_text(lexicon, "".join(f"{word}\n" for word in new.lexicon.words))
    except OSError as error:
        raise ConfigError(f"run_dir {config.run_dir!r}: cannot be written: {error}") from None


def main(config_path: str, *overrides: str) -> NewWords:
    """Extend the tokenizer that the config names, and print the report.

    Raises: ConfigError where RUN_DIR holds saves of a run with another tokenizer.
    """
    config = load_config(config_path, *overrides)
    new, run_dir = extend(config, save=False), Path(config.run_dir)
    started = [*run_dir.glob("snapshots/step_*"), *run_dir.glob("sentries/step_*")]
    try:
        before = json.loads((run_dir / "tokenizer" / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # missing or damaged, so made again
        before = new.report
    if started and any(before[n] != new.report[n] for n in ("new_words_sha256", "matching")):
        raise ConfigError(f"run_dir: {run_dir} holds saves with another tokenizer; give another")
    save_new_words(config, new)
    if not started:
        write_config(config)
    print(f"{config.model_name} -> {Path(config.run_dir, 'tokenizer')}")
    print(format_report(new.report))
    return new


if __name__ == "__main__" and "__file__" in globals():
    arguments = command_line_parser("  python extend_tokenizer.py configs/sample.yaml").parse_args()
    raise SystemExit(run_command(main, arguments.config, *arguments.overrides))
