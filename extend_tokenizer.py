"""Give every word of a lexicon one token of its own, and leave ordinary text as it was.

    python extend_tokenizer.py configs/sample.yaml
    python extend_tokenizer.py configs/qwen14b.yaml token_matching=bare run_dir=runs/bare

The script prints a report and writes RUN_DIR/tokenizer/. It is a folder for
AutoTokenizer.from_pretrained, with the report (report.json) and a table of the new words
(words.tsv).
Measured: 44,223 words onto Qwen2.5's 151,665 tokens take 3 s (2 CPU cores, 2026-11-25).
"""

import bisect
import dataclasses
import hashlib
import json
import re
import tempfile
import unicodedata
from collections import Counter
from os.path import commonprefix
from pathlib import Path
from textwrap import shorten

from tokenizers import AddedToken, Tokenizer

if "UserError" not in globals():
    from config import (
        Config, UserError, command_line_parser, load_config, one_line, read_json, replacing,
        run_command, write_config, write_json, write_text,
    )  # fmt: skip

# ---- Lexicon and corpus --------------------------------------------------------------------------

# A word is letters with inner apostrophes and hyphens. A combining accent (U+0300 to U+036F)
# belongs to the letter before it.
WORD = re.compile(r"(?:[^\W\d_][\u0300-\u036f]*)+(?:['’-](?:[^\W\d_][\u0300-\u036f]*)+)*")
# Faults of a lexicon line that can mean only one thing are repaired, in this order, and reported.
REPAIRS = {
    "byte order mark": lambda line: line.removeprefix("\ufeff"),
    "carriage return": lambda line: line.removesuffix("\r"),
    "outer blanks": str.strip,
    "not NFC": lambda line: unicodedata.normalize("NFC", line),
}


@dataclasses.dataclass(frozen=True)
class Lexicon:
    """This holds the usable words in the file's order, and the numbers of faulty lines, from 1."""

    words: list[str]
    repaired: dict[str, list[int]]  # kind of fault -> line numbers
    refused: dict[str, list[int]]


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file and leave its line ends as they are. Raises: UserError, one line."""
    try:
        return Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        place = f"byte 0x{error.object[error.start]:02x} at offset {error.start}, line {line}"
        raise UserError(f"{path}: not UTF-8: {place}; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None


def read_corpus(config: Config) -> list[str]:
    """Read the text of each corpus file. Raises: UserError with a line for each unusable file."""
    texts, problems = [], []
    for path in config.corpus:
        try:
            texts.append(read_text(path).removeprefix("\ufeff"))
            if not texts[-1].strip():
                problems.append(f"{path}: the corpus file is empty; give a text")
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return texts


def refusal(word: str, reserved: re.Pattern | None) -> str | None:
    """Say why a row for `word` would do damage or could never be used; None if it is usable."""
    if reserved and reserved.search(word):
        return "special token"
    if word.split() != [word]:
        return "inner blanks"
    # Zero-width joiners and non-joiners are invisible too, but Persian and Hindi words need them.
    if not word.replace("\u200c", "").replace("\u200d", "").isprintable():
        return "control character"
    return None if any(map(str.isalnum, word)) else "no letter or digit"


def read_lexicon(path: str | Path, reserved: re.Pattern | None = None) -> Lexicon:
    """Read one word a line and skip empty lines; `reserved` finds what no word may contain.

    Raises: UserError if the file cannot be read or no line holds a usable word.
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
        raise UserError(f"{path}: no usable word ({kinds or 'empty file'}); give one word a line")
    return Lexicon(list(words), repaired, refused)


def find_lexicon(
    config: Config, base: Tokenizer, texts: list[str], prefix: str, fresh: bool
) -> Lexicon:
    """Read the lexicon file, or take rare words of the corpus if the lexicon is from_corpus.

    A run takes its words from the corpus once and keeps them in RUN_DIR/lexicon.txt, where people
    may edit them; a fresh run takes them anew. No word may contain the string of a special token,
    because text with that string would become the word's token and no longer the special one.
    """
    added = base.get_added_tokens_decoder().values()
    reserved = [token.content for token in added if token.special] + [SPACE] * (prefix == SPACE)
    pattern = re.compile("|".join(map(re.escape, reserved)) or "(?!)")  # (?!) never matches
    kept = Path(config.run_dir, "lexicon.txt")
    if config.lexicon != "from_corpus":
        return read_lexicon(config.lexicon, pattern)
    if kept.exists() and not fresh:
        return read_lexicon(kept, pattern)
    counts = Counter(unicodedata.normalize("NFC", w) for text in texts for w in WORD.findall(text))
    words = [word for word, count in counts.most_common() if count >= config.lexicon_min_count]
    words = [word for word in words if not pattern.search(word)]
    spelled = zip(words, spell(base, [prefix + word for word in words]))
    words = [word for word, ids in spelled if len(ids) >= config.lexicon_min_base_tokens]
    if not words:
        raise UserError(
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
    """Return name -> text of the model's tokenizer files, from its folder or the hub; no weights.

    If there is no tokenizer.json, transformers makes one; importing transformers takes 3 s.
    Raises: UserError if the model or its tokenizer is not to be found.
    """
    name, folder = config.model_name, Path(config.model_name).expanduser()
    if not folder.is_dir():
        if name.count("/") > 1 or name.startswith((".", "/", "~")):
            raise UserError(f"model_name {name!r}: no such folder")
        folder = hub_folder(name, config.model_revision)
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise UserError(f"model_name {name!r}: {folder} holds no tokenizer")
    files = plain_files(folder)
    return files if "tokenizer.json" in files else files | converted_files(folder, config)


def plain_files(folder: Path) -> dict[str, str]:
    """Read those of PLAIN_FILES that the folder has: name -> text."""
    paths = map(folder.joinpath, PLAIN_FILES)
    return {path.name: read_text(path) for path in paths if path.is_file()}


def hub_folder(name: str, revision: str | None) -> Path:
    """Bring the tokenizer files of a hub model into the hub's local cache. Raises: UserError."""
    from huggingface_hub import snapshot_download

    patterns = [*PLAIN_FILES, *TOKENIZER_FILES]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:  # the hub's own errors are all subclasses of these
        reason = f"no such folder, and the hub says: {one_line(error)}"
        raise UserError(f"model_name {name!r}: {reason}") from None


def converted_files(folder: Path, config: Config) -> dict[str, str]:
    """Convert a slow tokenizer to a tokenizer.json and its companions. Raises: UserError."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as aside:
        try:
            remote = {"trust_remote_code": config.trust_remote_code}
            tokenizer = AutoTokenizer.from_pretrained(folder, **remote)
            tokenizer.save_pretrained(aside)
            made = {"tokenizer.json": tokenizer.backend_tokenizer.to_str()}
        except (OSError, ValueError, ImportError, TypeError, AttributeError) as error:
            reason = f"cannot be converted: {type(error).__name__}: {one_line(error)}"
            raise UserError(f"model_name {config.model_name!r}: its tokenizer {reason}") from None
        return plain_files(Path(aside)) | made


def base_tokenizer(config: Config, files: dict[str, str] | None = None) -> Tokenizer:
    """Make the model's own tokenizer from its files, without importing transformers."""
    text = (files or base_files(config))["tokenizer.json"]
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(
            f"model_name {config.model_name!r}: its tokenizer.json is damaged, or newer than the "
            f"installed tokenizers package reads: {one_line(error)}"
        ) from None


def parts_as_json(*parts) -> str:
    """Return a tokenizer's parts as tokenizer.json has them; a part may be None."""
    return "".join(part.__getstate__().decode() for part in parts if part)


def is_sentencepiece(tokenizer: Tokenizer) -> bool:
    """Tell SentencePiece-style from byte-level BPE by what the tokenizer does, not by its name.

    Raises: UserError for the types whose vocabularies cannot take whole words exactly.
    """
    model = type(tokenizer.model).__name__
    steps = parts_as_json(tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder)
    if model == "BPE" and ("ByteLevel" in steps or SPACE in steps):
        return "ByteLevel" not in steps
    raise UserError(
        f"the model's tokenizer is of type {model}; words can be added to byte-level BPE (Qwen, "
        "Llama 3, SmolLM2, GPT-2) and SentencePiece-style BPE (Llama-2, TinyLlama, Mistral v0.1)"
    )


def spell(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text, without special tokens.

    Texts that begin with SPACE are strings of a SentencePiece vocabulary and go straight to its
    model. Others are encoded 20,000 at a time, because the Encoding of one word takes about 2 kB.
    """
    if texts and texts[0].startswith(SPACE):
        return [[token.id for token in tokenizer.model.tokenize(text)] for text in texts]
    ids, encode = [], tokenizer.encode_batch_fast  # the fast one leaves character offsets out
    for i in range(0, len(texts), 20_000):
        ids += [e.ids for e in encode(texts[i : i + 20_000], add_special_tokens=False)]
    return ids


# ---- New words -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NewWords:
    """This holds the words that get a row, and the tokenizer that knows them.

    The word words[i] has the id first_new_id + i. Its token matches contents[i] in a text, which is
    the word with or without a space before it. The base tokenizer spells contents[i] with the ids
    spellings[i].
    """

    first_new_id: int  # how many ids the base tokenizer has, added tokens included
    words: list[str]
    contents: list[str]
    spellings: list[list[int]]
    bos_id: int | None  # what the base puts before a text, if anything
    matching: str  # spaced, bare or plain; whole_word on SentencePiece-style tokenizers
    lexicon: Lexicon
    base: Tokenizer
    tokenizer: Tokenizer
    files: dict[str, str]  # the base's files, as `base_files` gives them
    report: dict | None = None  # `extend` fills this and the next field
    counts: list[int] | None = None  # how often the token of words[i] occurs in the corpus


def plan_new_words(config: Config, texts: list[str], fresh: bool = False) -> NewWords:
    """Choose the new words and extend the base tokenizer in memory; `texts` is the corpus.

    A known word gets no row. In a byte-level tokenizer a word is known if the vocabulary holds its
    exact string; the original runs asked the same, so ids stay comparable with theirs. In a
    SentencePiece-style one a word is known if the vocabulary holds it with its space, because most
    entries without a space are pieces that only continue a word.
    Raises: UserError for an unusable lexicon or base tokenizer.
    """
    files = base_files(config)
    base = base_tokenizer(config, files)
    prefix = SPACE if is_sentencepiece(base) else ""
    lexicon = find_lexicon(config, base, texts, prefix or " ", fresh)
    vocab = base.get_vocab()
    words = [word for word in lexicon.words if prefix + word not in vocab]
    if not words:
        raise UserError(f"{config.lexicon}: the base vocabulary holds every word of the lexicon")
    size, matching = len(vocab), "whole_word" if prefix else config.token_matching
    if prefix:
        contents = [prefix + word for word in words]
        tokenizer = whole_word_tokenizer(files["tokenizer.json"], words, size)
    else:
        added = as_added_tokens(base, vocab, words, matching)
        contents = [token.content for token in added]
        tokenizer = Tokenizer.from_str(files["tokenizer.json"])
        tokenizer.add_tokens(added)  # in one call: one by one 44,000 words took 35 minutes
    new_ids = list(map(tokenizer.token_to_id, contents))
    if max(vocab.values()) >= size or new_ids != list(range(size, size + len(words))):
        raise UserError(f"model_name {config.model_name!r}: the ids of its tokenizer have holes")
    with_bos, without = base.encode("a").ids, base.encode("a", add_special_tokens=False).ids
    bos_id = with_bos[0] if with_bos[:1] != without[:1] else None
    return NewWords(
        first_new_id=size, words=words, contents=contents, spellings=spell(base, contents),
        bos_id=bos_id, matching=matching, lexicon=lexicon, base=base, tokenizer=tokenizer,
        files=files,
    )  # fmt: skip


def as_added_tokens(base: Tokenizer, vocab: dict, words: list[str], matching: str) -> list:
    """Decide how each new word of a byte-level tokenizer matches: its AddedToken.

    plain:  anywhere, inside longer words too, as in the original runs.
    bare:   as a whole word, without the space before it.
    spaced: with the space before it, so that " word" is one token and not two. Such a token also
            matches the beginning of a longer word. So a word that begins a longer alphabetic entry
            of the base's `vocab`, as written or in lower case, stays bare.
    Byte-level decoders misread some bare words: they take the "é" of a token for the byte E9. Such
    words match with their space, in bare too.
    """
    if matching == "plain":
        return [AddedToken(word, normalized=True) for word in words]
    decode = base.decoder.decode
    # "\u0120" stands for the space before a word. ASCII decodes to itself, and leaving it out saves
    # 0.3 s on Qwen's vocabulary.
    entries = (entry.removeprefix("\u0120") for entry in vocab)
    entries = (entry if entry.isascii() else decode([entry]) for entry in entries)
    longer = sorted({form for e in entries if e.isalpha() for form in (e, e.lower())})

    def as_added_token(word: str) -> AddedToken:
        i = bisect.bisect_right(longer, word)
        bare = matching == "bare" or (i < len(longer) and longer[i].startswith(word))
        if bare and decode([word]) == word:
            return AddedToken(word, single_word=True, normalized=False)
        return AddedToken(" " + word, normalized=False)

    return list(map(as_added_token, words))


def any_of(words: list[str]) -> str:
    """Make a regex for any of the words, the longest first; it walks a shared beginning once."""
    head, groups = commonprefix(words), {}
    for word in words:
        rest = word[len(head) :]
        groups.setdefault(rest[:1], []).append(rest)
    optional = "?" if groups.pop("", None) else ""
    branches = "|".join(any_of(group) for _, group in sorted(groups.items()))
    return re.escape(head) + (f"(?:{branches}){optional}" if branches else "")


def whole_word_tokenizer(tokenizer_json: str, words: list[str], first_new_id: int) -> Tokenizer:
    """Put the new words into the vocabulary of a SentencePiece-style tokenizer.

    The pre-tokenizer cuts out every word together with the space before it. With `ignore_merges`
    such a cut becomes one token if the vocabulary holds it. All others are spelled by the base's
    merges as before. The pattern would cut compounds (`rise-and-shine`) at their hyphens, so it
    lists those of the lexicon by name.
    """
    spec = json.loads(tokenizer_json)
    # Special tokens must be in the model's vocabulary too. Loading would otherwise give them ids
    # after its end, which are those of the last new words.
    spec["model"]["vocab"] |= {token["content"]: token["id"] for token in spec["added_tokens"]}
    spec["model"]["vocab"] |= {SPACE + word: first_new_id + i for i, word in enumerate(words)}
    spec["model"]["ignore_merges"] = True
    letter = r"[\p{L}\p{M}\p{Nd}]"
    # Two spaces before a word are one entry of the base and must stay together. The last
    # alternative cuts "<0x41>" in a text, which would otherwise become the entry of that byte.
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
    """Hash the new words and their ids (SHA-256): if hashes are equal, rows mean the same."""
    return hashlib.sha256("\n".join([str(first_new_id), *words]).encode()).hexdigest()


# ---- Report --------------------------------------------------------------------------------------


def extend(config: Config, texts: list[str], fresh: bool = False) -> NewWords:
    """Plan the new words and look at what they do to the corpus `texts`; nothing is written.

    fresh: whether words from_corpus are taken anew, and not from RUN_DIR/lexicon.txt
    Raises: UserError, also if no new word occurs in the corpus, because no row would be trained.
    """
    new = plan_new_words(config, texts, fresh)
    counts, figures = corpus_figures(new, config.corpus, texts)
    if not figures["new_tokens"]:
        none = (
            f"none of its {len(counts)} new words matches in the corpus ({new.matching} matching)"
        )
        raise UserError(f"{config.lexicon}: {none}; check that the two belong together")
    report = make_report(config, new, figures)
    return dataclasses.replace(new, report=report, counts=counts)


def make_report(config: Config, new: NewWords, corpus: dict) -> dict:
    """Say in plain JSON values what the extension does; `corpus` as `corpus_figures` gives it."""
    known_by_exact_string = sum(new.base.token_to_id(w) is not None for w in new.lexicon.words)
    model, num_new = json.loads(new.files.get("config.json", "{}")), len(new.words)
    table_rows = model.get("vocab_size", model.get("text_config", {}).get("vocab_size"))
    padding = None if table_rows is None else max(0, table_rows - new.first_new_id)
    # Beside the config.json of a qwen model AutoTokenizer does not take the pattern from
    # tokenizer.json but Qwen's own (transformers 5.23.0). PreTrainedTokenizerFast takes the file's.
    qwen = (model.get("model_type") or "").startswith("qwen")
    foreign = qwen and r"|\\p{N}| ?[^\\s\\p{L}" not in parts_as_json(new.base.pre_tokenizer)
    return {
        "model_name": config.model_name,
        "model_revision": config.model_revision,
        "matching": new.matching,
        "base_size": new.first_new_id,
        "lexicon_words": len(new.lexicon.words),
        "known": len(new.lexicon.words) - num_new,
        "new_tokens": num_new,
        "table_rows": table_rows,
        "padding_rows": padding,
        "new_ids_in_padding": None if padding is None else min(padding, num_new),
        "total": new.first_new_id + num_new,
        "expansion_percent": round(100 * num_new / new.first_new_id, 2),
        "devlog_known": known_by_exact_string,
        "new_words_sha256": new_words_hash(new.words, new.first_new_id),
        **word_figures(new),
        "corpus": corpus,
        "repaired_lines": {kind: line_ranges(n) for kind, n in new.lexicon.repaired.items()},
        "refused_lines": {kind: line_ranges(n) for kind, n in new.lexicon.refused.items()},
        "load_with": "PreTrainedTokenizerFast" if foreign else "AutoTokenizer",
    }


def word_figures(new: NewWords) -> dict:
    """Count tokens per new word in a sentence; list words that never match or decode wrongly."""
    spelled = [ids for ids, w, c in zip(new.spellings, new.words, new.contents) if w != c]
    bare = [" " + word for word, content in zip(new.words, new.contents) if word == content]
    before = sum(map(len, spelled + spell(new.base, bare)))
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
    """Write line numbers as ranges, [1, 2, 3, 7] as "1-3, 7"; a fault may be in every line."""
    firsts = sorted(set(numbers) - {number + 1 for number in numbers})
    lasts = sorted(set(numbers) - {number - 1 for number in numbers})
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(firsts, lasts))


def pieces(text: str) -> list[str]:
    """Cut `text` into pieces of 64 Ki characters or more, at line ends that no token crosses."""
    return re.findall(r".{65536}.*?\n(?=\S)|.+", text, re.DOTALL)


def corpus_figures(new: NewWords, paths: tuple[str, ...], texts: list[str]) -> tuple:
    """Count in the corpus: (how often each new word occurs, the report's figures).

    An ordinary word is a run of letters, digits and underscores that is no new word. Its ids are
    looked at in mid-sentence, and it counts as often as the corpus has it.
    """
    tokens_before, seen, ordinary, first_bad_line = 0, Counter(), Counter(), None
    for path, text in zip(paths, texts):
        line = 1
        for piece in pieces(text):
            tokens_before += len(spell(new.base, [piece])[0])
            ids = spell(new.tokenizer, [piece])[0]
            seen.update(ids)
            ordinary.update(re.findall(r"\w+", piece))
            first_bad_line = first_bad_line or bad_line(new, piece, ids, path, line)
            line += piece.count("\n")
    counts = [seen[i] for i, _ in enumerate(new.words, new.first_new_id)]
    for word in new.words:
        ordinary.pop(word, None)
    sentences = [f"a {word} a" for word in ordinary]
    ids = zip(ordinary, spell(new.base, sentences), spell(new.tokenizer, sentences))
    changed = Counter({word: ordinary[word] for word, before, after in ids if before != after})
    return counts, {
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens_before": tokens_before,
        "tokens_after": seen.total(),
        "new_tokens": sum(counts),
        "new_words_seen_once": counts.count(1),
        "new_words_never_seen": counts.count(0),
        "ordinary_words": ordinary.total(),
        "ordinary_words_changed": changed.total(),
        "ordinary_words_changed_examples": [word for word, _ in changed.most_common(5)],
        "exact_round_trip": first_bad_line is None,
        "first_bad_line": first_bad_line,
    }


def bad_line(new: NewWords, piece: str, ids: list[int], path: str, line: int) -> str | None:
    """Describe the first line of `piece` that decoding `ids` does not give back, if there is one.

    `line` is the number of the piece's first line in the file.
    """
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
    """Write the report for people: the table of the original runs' log, then remarks."""
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
    lines = [f"| {name:33} | {value:>9} |" for name, value in shown.items()] + word_remarks(report)
    corpus = report["corpus"]
    changed, ordinary = corpus["ordinary_words_changed"], corpus["ordinary_words"]
    examples = ", ".join(corpus["ordinary_words_changed_examples"]) or "none"
    lines += [
        f"corpus: {corpus['bytes']:,} bytes, {corpus['tokens_before']:,} tokens before, "
        f"{corpus['tokens_after']:,} after, "
        f"{corpus['new_tokens'] / corpus['tokens_after']:.2%} new; new words seen once "
        f"{corpus['new_words_seen_once']:,}, never {corpus['new_words_never_seen']:,}",
        f"ordinary words whose ids changed: {changed:,} of {ordinary:,} "
        f"({changed / max(1, ordinary):.2%}): {examples}",
        f"round trip of the corpus: {corpus['first_bad_line'] or 'exact'}",
    ]
    if report["load_with"] != "AutoTokenizer":
        lines.append(
            "beside the model's config.json transformers 5 builds another tokenizer: load the"
            f" folder with {report['load_with']}.from_pretrained"
        )
    return "\n".join(lines)


def word_remarks(report: dict) -> list[str]:
    """List what is to be said about the model's table, the matching and the lexicon."""
    lines, rows, matching = [], report["table_rows"], report["matching"]
    if rows is None:
        lines.append("unknown: the model's folder has no config.json with a vocab_size")
    elif rows < report["base_size"]:
        lines.append(f"the model's table has only {rows} rows")
    lines.append(
        f"{matching} matching: {report['tokens_per_new_word_after']} tokens per new word in a"
        f" sentence, {report['tokens_per_new_word_before']} before"
    )
    if matching == "whole_word":
        lines.append(
            "SentencePiece-style tokenizer: token_matching does not apply; known = held as a whole"
            f" word; by exact string {report['devlog_known']:,} would be known"
        )
    if matching == "plain":
        lines.append("plain cuts up ordinary words, spaced and bare do not")
    if words := report["words_never_matching"]:
        lines.append(f"{len(words)} new words can never match: {', '.join(words[:5])}")
    if words := report["words_decoding_wrongly"]:
        lines.append(f"{len(words)} new words decode wrongly: {', '.join(words[:5])}")
    for what in ("repaired", "refused"):
        for kind, numbers in report[f"{what}_lines"].items():
            numbers = shorten(numbers, 80, placeholder=" ... (see report.json)")
            lines.append(f"lexicon lines {what}, {kind}: {numbers}")
    return lines


# ---- Saving --------------------------------------------------------------------------------------

# tokenizer_config.json keeps these settings of the base. The others name classes, or are written by
# one version of transformers and not read by another. tokenizer.json says how text is encoded.
KEPT_SETTINGS = (
    "bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token",
    "additional_special_tokens", "chat_template", "model_max_length", "padding_side",
    "truncation_side",
)  # fmt: skip


def tokenizer_settings(files: dict[str, str]) -> dict:
    """Make a tokenizer_config.json that transformers 4.57 and 5 can both read."""
    kept = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        settings = json.loads(files.get(name, "{}"))
        kept |= {key: settings[key] for key in KEPT_SETTINGS if settings.get(key) is not None}
    kept = {key: v["content"] if isinstance(v, dict) else v for key, v in kept.items()}
    return kept | {
        "clean_up_tokenization_spaces": False,  # the clean-up drops spaces when decoding
        "tokenizer_class": "PreTrainedTokenizerFast",  # takes tokenizer.json as it is
        # Without this key transformers 4.57 adds token_type_ids, which generate(**inputs) refuses.
        "model_input_names": ["input_ids", "attention_mask"],
    }


def words_table(new: NewWords) -> str:
    """Write words.tsv: a line a new word, with the base ids that its row can start from."""
    lines = ["id\tword\tmatches\tbase_ids\tcount"]
    rows = zip(new.words, new.contents, new.spellings, new.counts)
    for i, (word, content, ids, count) in enumerate(rows, new.first_new_id):
        matches, base_ids = content.replace(SPACE, " "), " ".join(map(str, ids))
        lines.append(f"{i}\t{word}\t{matches}\t{base_ids}\t{count}")
    return "\n".join(lines) + "\n"


def save_new_words(config: Config, new: NewWords) -> None:
    """Write RUN_DIR/tokenizer/; the same settings and files give the same bytes.

    For a lexicon from_corpus RUN_DIR/lexicon.txt is written too, if it is not there.
    Raises: UserError if RUN_DIR cannot be written.
    """
    run_dir, template = Path(config.run_dir), "chat_template.jinja"
    lexicon = run_dir / "lexicon.txt"
    try:
        with replacing(run_dir / "tokenizer") as folder:
            folder.mkdir(parents=True)
            write_text(folder / "tokenizer.json", new.tokenizer.to_str())
            write_json(folder / "tokenizer_config.json", tokenizer_settings(new.files))
            if template in new.files:
                write_text(folder / template, new.files[template])
            write_json(folder / "report.json", new.report)
            write_text(folder / "words.tsv", words_table(new))
        if config.lexicon == "from_corpus" and not lexicon.exists():
            write_text(lexicon, "".join(f"{word}\n" for word in new.lexicon.words))
    except OSError as error:
        raise UserError(f"run_dir {config.run_dir!r}: cannot be written: {error}") from None


def main(config_path: str, *overrides: str) -> NewWords:
    """Extend the tokenizer that the config names, and print the report.

    Raises: UserError if RUN_DIR holds saves of a run with another tokenizer.
    """
    config = load_config(config_path, *overrides)
    new, run_dir = extend(config, read_corpus(config)), Path(config.run_dir)
    started = [*run_dir.glob("snapshots/step_*"), *run_dir.glob("sentries/step_*")]
    try:
        before = read_json(run_dir / "tokenizer" / "report.json")
    except (OSError, ValueError):  # a missing or damaged report is made again
        before = new.report
    if started and any(before[n] != new.report[n] for n in ("new_words_sha256", "matching")):
        raise UserError(f"run_dir: {run_dir} holds saves with another tokenizer; give another")
    save_new_words(config, new)
    if not started:
        write_config(config)
    print(f"{config.model_name} -> {run_dir / 'tokenizer'}")
    print(format_report(new.report))
    return new


if __name__ == "__main__" and "__file__" in globals():
    arguments = command_line_parser("  python extend_tokenizer.py configs/sample.yaml").parse_args()
    raise SystemExit(run_command(main, arguments.config, *arguments.overrides))
