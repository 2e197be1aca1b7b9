"""Read the settings of a run, say what is wrong with them, and write small files safely.

    config = load_config("configs/sample.yaml", "seed=7", "run_dir=runs/seven")

`Config` is the one list of all settings: its defaults, its checks, --help and the README's table
come from the same lines. The other scripts import this one; it needs only PyYAML.
"""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

GIB = 2**30


class UserError(ValueError):
    """Something is wrong that the user can mend; `problems` holds one line for each thing.

    The scripts print these lines without a traceback and exit with status 1.
    """

    def __init__(self, *problems: str):
        super().__init__("\n".join(problems))
        self.problems = problems


# ---- Settings ------------------------------------------------------------------------------------

# Names that other tools have for our keys. difflib finds the ones that are spelled alike.
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


def setting(default, meaning: str, changes_run: bool = True, **limits):
    """Declare a field of Config.

    meaning:     what --help and the README say about the key
    changes_run: whether another value makes another run. If this is False, a run can be continued
                 with another value of the key
    limits:      choices, low, high (both allowed), above (itself not allowed), required
    before:      one of the limits: the value of a save that was written before the key existed
    """
    metadata = {"meaning": meaning, "changes_run": changes_run, **limits}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
    """This holds all settings of a run; values may be strings, as YAML and the shell give them.

    Raises: UserError naming every missing, mistyped or impossible value at once.
    """

    # fmt: off
    model_name: str = setting("", "hub id or local folder of the base model", required=True)
    model_revision: str | None = setting(None, "branch, tag or commit on the hub")
    trust_remote_code: bool = setting(False, "run the model folder's own code", changes_run=False)
    quantization: str = setting("nf4", "body in 4-bit NF4 with double quantization, or as stored",
        choices=("nf4", "none"))
    compute_dtype: str = setting("auto", "auto: bfloat16 from compute capability 8.0, float16 with"
        " loss scaling below, float32 on a CPU",
        changes_run=False, choices=("auto", "bfloat16", "float16", "float32"))
    device: str = setting("auto", "auto: the GPU if there is one",
        changes_run=False, choices=("auto", "cuda", "cpu"))
    lexicon: str = setting("", "text file, one word a line; or from_corpus: rare words of the"
        " corpus", changes_run=False, required=True)
    lexicon_min_count: int = setting(2, "from_corpus: least times a word occurs",
        changes_run=False, low=1)
    lexicon_min_base_tokens: int = setting(3, "from_corpus: least base tokens that spell a word",
        changes_run=False, low=2)
    lexicon_skip_capitalized: bool = setting(False, "from_corpus: leave out words that begin with a"
        " capital, as names do", changes_run=False)
    lexicon_exclude: str | None = setting(None, "from_corpus: file of words to leave out, one a"
        " line", changes_run=False)
    known_words: str = setting("one_token", "which lexicon words get no row: what the base spells"
        " with one token in a sentence, or entries of its vocabulary",
        before="exact_string", choices=("one_token", "exact_string"))
    corpus: tuple[str, ...] = setting((), "UTF-8 text file, or a list of them",
        changes_run=False, required=True)
    token_matching: str = setting("both", "how new tokens match: with the space before them, and"
        " without where the corpus needs it; with the space alone; as a whole word; anywhere",
        before="spaced", choices=("both", "spaced", "bare", "plain"))
    init: str = setting("subtoken_mean", "new rows start as the mean of the word's sub-token rows,"
        " or as random directions", choices=("subtoken_mean", "spherical"))
    init_radius: float = setting(1.5, "spherical: row norm / (base std * sqrt(hidden))", above=0.0)
    output_rows: str = setting("auto", "auto: shared with the input rows if the model ties its"
        " head, else separate", choices=("auto", "shared", "separate", "frozen"))
    seq_len: int = setting(128, "tokens a sequence", low=2)
    effective_batch_size: int = setting(16, "sequences an optimizer step", low=1)
    micro_batch_size: int | str = setting("auto", "sequences a forward pass; auto: the largest that"
        " fits and divides", changes_run=False, low=1)
    max_steps: int = setting(3000, "optimizer steps", changes_run=False, low=1)
    learning_rate: float = setting(2.0e-3, "peak; warm-up before it, cosine to 0 after", above=0.0)
    warmup_ratio: float = setting(0.05, "share of max_steps that warms up", low=0.0, high=1.0)
    row_coupling: float = setting(4.0, "how far every new row also follows the summed gradient of"
        " all new rows; 0: not at all", low=0.0)
    kin_coupling: float = setting(2.0, "how far every new row also follows the gradients of words"
        " that begin or end like its own; 0: not at all", before=0.0, low=0.0)
    max_grad_norm: float = setting(1.0, "gradient norm of all new rows, clipped to this", above=0.0)
    gradient_checkpointing: str = setting("auto", "recompute layers in backward: auto: as few as"
        " memory allows; true: all; false: none",
        changes_run=False, choices=("auto", "true", "false"))
    compile: str = setting("auto", "auto: on a GPU fuse elementwise work, and replay a step as CUDA"
        " graphs from capability 8.0", changes_run=False, choices=("auto", "false"))
    log_every: int = setting(10, "steps between lines", changes_run=False, low=1)
    eval_every: int = setting(50, "steps between evaluations", changes_run=False, low=1)
    save_every: int = setting(20, "steps between saves (sentries)", changes_run=False, low=1)
    keep_sentries: int = setting(3, "newest saves kept in each folder, beside the one with the"
        " lowest held-out loss", changes_run=False, low=1)
    val_fraction: float = setting(0.1, "share of the corpus held out", above=0.0, high=0.5)
    seed: int = setting(42, "data order, random rows, samples", low=0, high=10**9)
    run_dir: str = setting("", "local run folder", changes_run=False, required=True)
    sentry_dir: str | None = setting(None, "durable folder of this run alone, a mounted Drive;"
        " null: RUN_DIR/sentries", changes_run=False)
    max_gpu_gib: float | None = setting(None, "cap on GPU memory", changes_run=False, above=0.0)
    max_host_gib: float | None = setting(None, "cap on host memory for activations that wait there;"
        " 0: none", changes_run=False, low=0.0)
    prompts: tuple[str, ...] = setting((), "texts continued at each evaluation", changes_run=False)
    tensorboard: bool = setting(False, "write RUN_DIR/tensorboard, if installed", changes_run=False)
    # fmt: on

    def __post_init__(self):
        problems = []
        for field in dataclasses.fields(self):
            try:
                object.__setattr__(self, field.name, converted(field, getattr(self, field.name)))
            except UserError as error:
                problems += error.problems
        micro, effective = self.micro_batch_size, self.effective_batch_size
        if not problems and micro != "auto" and effective % micro:
            problems.append(
                f"'micro_batch_size' is {micro}, which does not divide effective_batch_size"
                f" {effective}; use one of {', '.join(map(str, divisors(effective)))}, or auto"
            )
        if problems:
            raise UserError(*problems)


KEYS = [field.name for field in dataclasses.fields(Config)]


def divisors(number: int) -> list[int]:
    """List what divides a whole number: 6 -> [1, 2, 3, 6]."""
    return [n for n in range(1, number + 1) if number % n == 0]


# Type of a field -> what it accepts, in words; the pattern of the lower-case text; what reads it.
WHOLE = r"[+-]?\d{1,18}"  # int() raises an error of its own beyond 4,300 digits
NUMBER = r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"
FIELD_TYPES = {
    str: ("text", "(?s).+", str),
    str | None: ("null or text", "(?s).+", str),
    bool: ("true or false", "true|yes|on|false|no|off", lambda t: t in ("true", "yes", "on")),
    int: ("a whole number", WHOLE, int),
    int | str: ("auto or a whole number", rf"auto|{WHOLE}", lambda t: t if t == "auto" else int(t)),
    float: ("a number", NUMBER, float),
    float | None: ("null or a number", NUMBER, float),
    tuple[str, ...]: ("text or a list of texts", None, None),
}


def converted(field: dataclasses.Field, value):
    """Return `value`, a string or a Python value, in the field's own type.

    This function alone decides what a text means. PyYAML (6.0.3) would read 5e-4 as a string,
    010 as 8, no as False and 1:30 as 90.
    Raises: UserError with what was seen and what is allowed.
    """
    limits, (allowed, pattern, read) = field.metadata, FIELD_TYPES[field.type]
    if "choices" in limits:
        allowed, pattern = ", ".join(limits["choices"]), "|".join(limits["choices"])
    for name, words in (("low", "of at least"), ("above", "above"), ("high", "and at most")):
        if name in limits:
            allowed += f" {words} {limits[name]:g}"
    wrong = UserError(f"{field.name!r} is {value!r}; allowed: {allowed}")
    null = value is None or (isinstance(value, str) and value.strip().lower() in ("null", "~", ""))
    if limits.get("required") and (null or value in ([], ())):
        raise UserError(f"missing key {field.name!r}: {limits['meaning']}")
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
    if math.isinf(result):  # float("1e400") is infinity
        raise wrong
    too_low = result < limits.get("low", result) or result <= limits.get("above", -math.inf)
    if too_low or result > limits.get("high", result):
        raise wrong
    return result


def nearest_key(name: str) -> str:
    """Name the key that was probably meant by an unknown one, or else all keys."""
    close = [*difflib.get_close_matches(name.lower(), KEYS, 1), None]
    meant = ALIASES.get(name.lower(), close[0])
    return f"did you mean {meant!r}?" if meant else f"the keys are {', '.join(KEYS)}"


def yaml_pairs(path: str | Path) -> list[tuple]:
    """Read a flat YAML file as (key, value) pairs; every scalar stays a string."""
    try:
        root = yaml.compose(Path(path).read_text(encoding="utf-8"), yaml.BaseLoader)
        if isinstance(root, yaml.MappingNode):
            # Pairs, because a dict would keep the last of two equal keys without a word.
            return yaml.BaseLoader("").construct_pairs(root, deep=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the path of a YAML config") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a readable YAML file: {one_line(error)}") from None
    raise UserError(f"{path}: not a flat list of 'key: value' lines")


def load_config(source: str | Path | Config, *overrides: str) -> Config:
    """Read the settings in a flat YAML file, or of a Config, and put `key=value` over them.

    Raises: UserError listing every unknown, repeated, missing or mistyped key at once.
    """
    values, problems, overridden = {}, [], set()
    is_config = isinstance(source, Config)
    for name, value in vars(source).items() if is_config else yaml_pairs(source):
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
        elif name in overridden:
            problems.append(f"command line: {name!r} is given twice; keep one")
        if name in KEYS:
            overridden.add(name)
            values[name] = value
            if value.startswith("["):
                with contextlib.suppress(yaml.YAMLError):  # what is no YAML list is a text
                    values[name] = yaml.load(value, yaml.BaseLoader)
    try:
        config = Config(**values)
    except UserError as error:
        problems += error.problems
    if problems:
        where = "Config" if is_config else source
        raise UserError(*(f"{where}: {problem}" for problem in problems))
    return config


def write_config(config: Config) -> None:
    """Write every key, as resolved, to RUN_DIR/config.yaml; load_config gives the same Config."""
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()}
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_text(Path(config.run_dir, "config.yaml"), text)


# ---- Command line --------------------------------------------------------------------------------


def config_table() -> list[tuple[str, str, str]]:
    """List (key, default, meaning) of every setting, for --help and for the README's table."""
    rows = []
    for field in dataclasses.fields(Config):
        limits, default = field.metadata, field.default
        default = default if isinstance(default, str) else json.dumps(default)
        default = "-" if limits.get("required") else default
        choices = f" ({' | '.join(limits['choices'])})" if "choices" in limits else ""
        rows.append((field.name, default, limits["meaning"] + choices))
    return rows


def command_line_parser(example: str) -> argparse.ArgumentParser:
    """Make the parser of `SCRIPT CONFIG [key=value ...]`; --help shows an example and every key."""
    rows = [f"  {name:24} {default:15} {meaning}" for name, default, meaning in config_table()]
    parser = argparse.ArgumentParser(
        usage="%(prog)s CONFIG [key=value ...] [options]",
        description=f"example:\n{example}",
        epilog="\n".join(["keys of CONFIG, with defaults ('-': must be given):", *rows]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="override the YAML")
    return parser


def parse_command_line(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse the arguments after the script's name; without a CONFIG the error says what to do."""
    arguments = parser.parse_intermixed_args(argv)
    if arguments.config is None:
        parser.error(f"give a CONFIG, a YAML file with the settings. {parser.description}")
    return arguments


def run_command(command, *arguments, **options) -> int:
    """Call a script's main function and return the exit status: 0, or 1 after a UserError.

    A UserError is printed to stderr, one line a problem, without a traceback.
    """
    try:
        command(*arguments, **options)
    except UserError as error:
        print(str(error), file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # in training this is the second Ctrl-C, after StopRequest
        print("stopped by SIGINT", file=sys.stderr)
        return 1
    except BrokenPipeError:  # who reads the output has ended, as `| head` does
        # Python writes once more when it ends, and would complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def one_line(error: Exception) -> str:
    """Return the text of an error as one line of at most 500 characters."""
    return " ".join(str(error).split())[:500]


# ---- Files ---------------------------------------------------------------------------------------


def sync(path: Path) -> None:
    """Have the operating system put a file, or a folder's list of names, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder and say so. There it must be enough that
        # the files in the folder are synced.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def clear_leavings(path: Path) -> tuple[Path, Path]:
    """Remove what `replacing` left beside `path`, and put the old folder back if `path` is gone.

    Returns the two names that `replacing` uses: .NAME.part and .NAME.old.
    """
    part, old = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        old.rename(path)
    for left in (part, old):
        if left.is_dir() and not left.is_symlink():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)
    return part, old


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Replace a file or folder as a whole by what the caller writes at the path this yields.

    At the end the new file or folder is put on the disk and takes the name `path`. After a kill or
    a power failure `path` is the old one or the new one, and never a part of either. There is one
    exception: a folder cannot be renamed over another, so the old folder is first renamed to
    .NAME.old, and a kill just then leaves no `path`. The next call puts that old folder back.
    An exception while writing leaves `path` as it was.
    """
    path = Path(path)
    part, old = clear_leavings(path)
    try:
        yield part
        # Contents before names: after a power failure a renamed file could be empty otherwise.
        for inner in (*part.rglob("*"), part):
            sync(inner)
        if part.is_dir() and path.exists():
            path.rename(old)
        part.replace(path)
        sync(path.parent)
    finally:
        clear_leavings(path)


def write_text(path: str | Path, text: str) -> None:
    """Replace a UTF-8 file as a whole: after a kill it is the old one or the new one."""
    with replacing(path) as part:
        part.write_bytes(text.encode())  # text mode would change line ends on Windows


def write_json(path: str | Path, value) -> None:
    """Replace a JSON file as a whole."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path):
    """Read a UTF-8 file of JSON."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


if __name__ == "__main__" and "__file__" in globals():
    print(__doc__)
