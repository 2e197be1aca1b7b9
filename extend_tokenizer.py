"""Give every word of a lexicon one token of its own, and leave ordinary text as it was.

    python extend_tokenizer.py configs/sample.yaml
    python extend_tokenizer.py configs/qwen14b.yaml token_matching=bare run_dir=runs/bare

The script prints a report and writes RUN_DIR/tokenizer/. It is a folder for
AutoTokenizer.from_pretrained, with the report (report.json) and a table of the new words
(words.tsv).
Measured: 44,018 words onto Qwen2.5's 151,665 tokens take 13 s, of which loading the result through
transformers, to compare the ids, takes 4 s (2 CPU cores, 2026-11-26).
"""

if __name__ == "__main__" and "__file__" in globals():
    from env_shim import end_at_ctrl_c

    end_at_ctrl_c()  # while the other imports last

import dataclasses
import hashlib
import json
import re
import shutil
import signal
import sys
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from os.path import commonprefix
from pathlib import Path
from textwrap import shorten

import regex
from tokenizers import AddedToken, Regex, Tokenizer, pre_tokenizers, processors

if "UserError" not in globals():
    from config import (
        Config, UserError, command_line_parser, load_config, one_line,
        parse_command_line, read_json, replacing, run_command, write_config, write_json, write_text,
    )  # fmt: skip

# ---- Lexicon and corpus --------------------------------------------------------------------------

# A word is letters, each with its combining marks and joiners, and inner apostrophes and hyphens.
# The middle dot of Catalan and the marks of Hebrew abbreviations join letters too, as the Unicode
# standard says (annex 29). `re` would cut a word at a combining vowel, `regex` does not.
LETTERS = r"\p{L}[\p{L}\p{M}\u200c\u200d\u00ad]*"
WORD = regex.compile(rf"{LETTERS}(?:['’·׳״-]{LETTERS})*")
# Faults of a lexicon line that can mean only one thing are repaired, in this order, and reported.
REPAIRS = {
    "byte order mark": lambda line: line.removeprefix("\ufeff"),
    "carriage return": lambda line: line.removesuffix("\r"),
    "comment": lambda line: "" if line.startswith("#") else line,
    "column after a tab": lambda line: line.split("\t")[0] or line,
    "soft hyphen": lambda line: line.replace("\u00ad", ""),
    "outer blanks": str.strip,
    "outer punctuation": lambda line: line.strip(',.;:!?"“”„«»()[]') or line,
    "not NFC": lambda line: unicodedata.normalize("NFC", line),
}


@dataclasses.dataclass(frozen=True)
class Lexicon:
    """This holds the usable words in the file's order, and the faulty lines by number, from 1."""

    words: list[str]
    repaired: dict[str, dict[int, str]]  # kind of fault -> line number -> line
    refused: dict[str, dict[int, str]]
    origin: str  # what the report says about where the words come from


def read_text(path: str | Path, key: str) -> str:
    """Read a UTF-8 file and leave its line ends as they are; `key` is what names it in the config.

    Raises: UserError, one line
    """
    named = f"{key}: {path}"
    try:
        text = Path(path).read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        place = f"byte 0x{error.object[error.start]:02x} at offset {error.start}, line {line}"
        raise UserError(f"{named}: not UTF-8: {place}; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{named}: cannot be read: {error.strerror}") from None
    # Text in UTF-16 without a mark is valid UTF-8, with a zero beside each ASCII letter.
    if "\0" in text[:1000]:
        raise UserError(f"{named}: holds zero bytes, as UTF-16 text does; save it as UTF-8")
    return text


def read_corpus(config: Config) -> list[str]:
    """Read the text of each corpus file, in Unicode's composed form (NFC), as lexicons are.

    A decomposed text looks the same, but "é" is two characters there, and no word with it would
    match. Raises: UserError with a line for each unusable file.
    """
    texts, problems = [], []
    for path in config.corpus:
        try:
            text = read_text(path, "corpus").removeprefix("\ufeff")
            texts.append(unicodedata.normalize("NFC", text))
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
        return "blanks inside; a token is one word, so give each word a line"
    if "," in word or ";" in word:
        return "a comma inside; give one word a line"
    # Zero-width joiners and non-joiners are invisible too, but Persian and Hindi words need them.
    if not word.replace("\u200c", "").replace("\u200d", "").isprintable():
        return "control character"
    return None if any(map(str.isalnum, word)) else "no letter or digit"


def read_lexicon(
    path: str | Path, reserved: re.Pattern | None = None, key: str = "lexicon"
) -> Lexicon:
    """Read one word a line and skip empty lines; `reserved` finds what no word may contain.

    Raises: UserError if the file cannot be read or no line holds a usable word.
    """
    words, repaired, refused = {}, {}, {}
    for number, line in enumerate(read_text(path, key).split("\n"), 1):
        word = line
        for kind, repair in REPAIRS.items():
            before, word = word, repair(word)
            if word != before:
                repaired.setdefault(kind, {})[number] = before
        if word in words:
            repaired.setdefault("duplicate", {})[number] = word
        elif kind := word and refusal(word, reserved):
            refused.setdefault(kind, {})[number] = word
        elif word:
            words[word] = None
    if not words:
        kinds = ", ".join(f"{kind}: {len(lines)}" for kind, lines in refused.items())
        raise UserError(
            f"{key}: {path}: no usable word ({kinds or 'empty file'}); give one word a line"
        )
    return Lexicon(list(words), repaired, refused, str(path))


def find_lexicon(
    config: Config, base: Tokenizer, texts: list[str], space: str, fresh: bool
) -> Lexicon:
    """Read the lexicon file, or take rare words of the corpus if the lexicon is from_corpus.

    A run takes its words from the corpus once and keeps them in RUN_DIR/lexicon.txt, where people
    may edit them; a fresh run takes them anew. No word may contain the string of a special token,
    because text with that string would become the word's token and no longer the special one.
    """
    added = base.get_added_tokens_decoder().values()
    reserved = [token.content for token in added if token.special]
    if space == SPACE:
        reserved.append(SPACE)
    pattern = re.compile("|".join(map(re.escape, reserved)) or "(?!)")  # (?!) never matches
    kept = Path(config.run_dir, "lexicon.txt")
    if config.lexicon != "from_corpus":
        return read_lexicon(config.lexicon, pattern)
    if kept.exists() and not fresh:
        return read_lexicon(kept, pattern)
    excluded = set()
    if config.lexicon_exclude:
        excluded.update(read_lexicon(config.lexicon_exclude, key="lexicon_exclude").words)
    counts = Counter(word for text in texts for word in WORD.findall(text))
    words = [
        word for word, count in counts.most_common()
        if count >= config.lexicon_min_count
        and not (config.lexicon_skip_capitalized and word[0].isupper())
        and not UNSPACED.search(word) and not refusal(word, pattern) and word not in excluded
    ]  # fmt: skip
    spelled = zip(words, spell(base, [space + word for word in words], space))
    words = [word for word, ids in spelled if len(ids) >= config.lexicon_min_base_tokens]
    if not words:
        raise UserError(
            f"lexicon from_corpus: no word of the corpus occurs {config.lexicon_min_count} times "
            f"and takes {config.lexicon_min_base_tokens} base tokens; lower lexicon_min_count or "
            "lexicon_min_base_tokens; for scripts without blanks between words give a lexicon file"
        )
    shown = ", ".join(words[:8])
    return Lexicon(words, {}, {}, f"from the corpus: {shown} ...; kept in {kept} for you to edit")


# ---- The base tokenizer --------------------------------------------------------------------------

SPACE = "\u2581"  # SentencePiece's sign for a space
LEAD = "a"  # a letter before every piece of a text but the first
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
    folder = base_folder(config)
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise UserError(f"model_name {config.model_name!r}: {folder} holds no tokenizer")
    files = plain_files(folder)
    return files if "tokenizer.json" in files else files | converted_files(folder, config)


def base_folder(config: Config) -> Path:
    """Return the model's own folder, or that of its tokenizer files in the hub's local cache.

    Raises: UserError if the model is in neither place.
    """
    name, folder = config.model_name, Path(config.model_name).expanduser()
    if folder.is_dir():
        return folder
    if name.count("/") > 1 or name.startswith((".", "/", "~")):
        raise UserError(f"model_name {name!r}: no such folder")
    from huggingface_hub import snapshot_download

    wanted = {"revision": config.model_revision, "allow_patterns": [*PLAIN_FILES, *TOKENIZER_FILES]}
    try:
        return Path(snapshot_download(name, **wanted))
    except (OSError, ValueError) as error:  # the hub's own errors are all subclasses of these
        reason = f"no such folder, and the hub says: {one_line(error)}"
        raise UserError(f"model_name {name!r}: {reason}") from None


def plain_files(folder: Path) -> dict[str, str]:
    """Read those of PLAIN_FILES that the folder has: name -> text."""
    paths = map(folder.joinpath, PLAIN_FILES)
    return {path.name: read_text(path, "model_name") for path in paths if path.is_file()}


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
    files = files or base_files(config)
    try:
        tokenizer = Tokenizer.from_str(files["tokenizer.json"])
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UserError(
            f"model_name {config.model_name!r}: its tokenizer.json is damaged, or newer than the "
            f"installed tokenizers package reads: {one_line(error)}"
        ) from None
    for token in json.loads(files["tokenizer.json"])["added_tokens"]:
        if (found := tokenizer.token_to_id(token["content"])) != token["id"]:
            raise UserError(
                f"model_name {config.model_name!r}: its tokenizer.json gives {token['content']!r}"
                f" the id {token['id']}, but when it is loaded the id is {found}; repair its"
                " added_tokens, whose ids must follow the vocabulary without a gap"
            )
    # Some models ask for a BOS in tokenizer_config.json alone; DeepSeek's is one of them.
    settings = tokenizer_settings(files)
    bos = settings.get("add_bos_token") and settings.get("bos_token")
    bos_id = tokenizer.token_to_id(bos) if bos else None
    if bos_id is not None and bos not in tokenizer.encode("a").tokens:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
    return tokenizer


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


def pieces(text: str) -> list[str]:
    """Cut `text` into pieces of 64 Ki characters or more, at places that no token crosses.

    Such places are between a word and the space before the next one and, in scripts that have no
    blanks, at line ends.
    """
    return regex.findall(r"(?s).{65536}.*?(?:\p{L}(?= \p{L})|\n(?=\p{Lo}))|.+", text)


def encode_pieces(tokenizer: Tokenizer, parts: list[str]) -> Iterator[tuple[list, list]]:
    """Encode a text of any size by its `pieces`: yield (ids, offsets) for each.

    All ids together are those of the whole text. Some tokenizers put a space before a text, so each
    piece but the first is encoded behind the letter LEAD. Its offsets count from that letter on,
    and the ids of the letter are left out. 100 MB in one piece would take 10 GiB.
    """
    skipped = len(tokenizer.encode(LEAD, add_special_tokens=False).ids)
    for i in range(0, len(parts), 8):
        texts = [LEAD + part if j else part for j, part in enumerate(parts[i : i + 8], i)]
        for j, encoding in enumerate(tokenizer.encode_batch(texts, add_special_tokens=False), i):
            skip = skipped if j else 0
            yield encoding.ids[skip:], encoding.offsets[skip:]


# ---- New words -----------------------------------------------------------------------------------

# Where the token of a word matches in a text.
AFTER_SPACE, WHOLE_WORD, ANYWHERE = "after a space", "as a whole word", "anywhere"
# These scripts put no blanks between words, so a word cannot be told from its neighbours.
UNSPACED = regex.compile(
    r"[\p{Han}\p{Hiragana}\p{Katakana}\u30fc\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}]+"
)
# What a word may not touch on either side if it is to match as a whole word.
LETTER = r"\p{L}\p{M}\p{Nd}\p{Pc}\u200c\u200d"
RUN = regex.compile(f"[{LETTER}]+")


@dataclasses.dataclass(frozen=True)
class Form:
    """This is one form of a word: in such a place the token `content` stands for the word."""

    word: str
    content: str  # the word, or the word with the blank before it
    place: str  # AFTER_SPACE, WHOLE_WORD or ANYWHERE


@dataclasses.dataclass(frozen=True)
class NewWords:
    """This holds the words that get a row, and the tokenizer that knows them.

    Row i is of the token first_new_id + i, which is the form forms[i] of the word words[i]. The
    first num_words rows are of different words, the others of second forms of some of them. The
    base tokenizer spells forms[i].content with the ids spellings[i].
    """

    first_new_id: int  # one more than the base tokenizer's highest id, added tokens included
    num_words: int
    words: list[str]
    forms: list[Form]
    spellings: list[list[int]]
    bos_id: int | None  # what the base puts before a text, if anything
    matching: str  # both, spaced, bare or plain
    lexicon: Lexicon
    rule: str  # which words are known: one_token or exact_string
    known_by_rule: dict[str, int]  # how many lexicon words would be known by each rule
    base: Tokenizer
    tokenizer: Tokenizer
    files: dict[str, str]  # the base's files, as `base_files` gives them
    report: dict | None = None  # `extend` fills this and the next field
    counts: list[int] | None = None  # how often the token of row i occurs in the corpus


def plan_new_words(config: Config, texts: list[str], fresh: bool = False) -> NewWords:
    """Choose the new words and extend the base tokenizer in memory; `texts` is the corpus.

    The second forms come after all first ones, so the ids of the words do not depend on the corpus.
    Raises: UserError for an unusable lexicon or base tokenizer.
    """
    files = base_files(config)
    base = base_tokenizer(config, files)
    space = SPACE if is_sentencepiece(base) else " "
    lexicon = find_lexicon(config, base, texts, space, fresh)
    # SentencePiece-style tokenizers have one way to match the words after a space, and most of
    # their entries without a space are pieces that only continue a word.
    rule, matching = config.known_words, config.token_matching
    if space == SPACE:
        rule, matching = "one_token", "both" if matching == "both" else "spaced"
    known = {
        "one_token": known_words(base, lexicon.words, space),
        "exact_string": {word for word in lexicon.words if is_entry(base, word)},
    }
    words = [word for word in lexicon.words if word not in known[rule]]
    forms = first_forms(base, words, space, matching)
    if rule == "one_token":
        forms = mend_known(base, lexicon.words, known[rule], forms, space, matching)
    if not forms:
        raise UserError(f"{config.lexicon}: the base vocabulary holds every word of the lexicon")
    num_words, size = len(forms), max(base.get_vocab().values()) + 1
    if matching == "both":
        forms += second_forms(base, forms, texts, space)
    tokenizer = extended_tokenizer(base, size, forms, matching)
    with_bos, without = base.encode("a").ids, base.encode("a", add_special_tokens=False).ids
    return NewWords(
        first_new_id=size, num_words=num_words, words=[form.word for form in forms], forms=forms,
        spellings=spell(base, [form.content for form in forms], space),
        bos_id=with_bos[0] if with_bos[:1] != without[:1] else None, matching=matching,
        lexicon=lexicon, rule=rule, base=base, tokenizer=tokenizer, files=files,
        known_by_rule={name: len(words) for name, words in known.items()},
    )  # fmt: skip


def is_entry(base: Tokenizer, content: str) -> bool:
    """Tell whether the base's vocabulary, with its added tokens, holds this very string."""
    return base.token_to_id(content) is not None


def known_words(base: Tokenizer, words: list[str], space: str) -> set[str]:
    """Return the words that the base spells with one token where they stand in a sentence.

    A row for such a word would begin as a copy of that token's and take half of its probability.
    The original runs asked something else, whether the word is an entry of the vocabulary as it is
    written (`known_words: exact_string`); with that rule ids can be compared with theirs.
    """
    in_place = [word if UNSPACED.fullmatch(word) else space + word for word in words]
    spelled = zip(words, in_place, spell(base, in_place, space))
    return {word for word, content, ids in spelled if len(ids) == 1 or is_entry(base, content)}


def mend_known(
    base: Tokenizer, words: list[str], known: set[str], forms: list[Form], space: str, matching: str
) -> list[Form]:
    """Return the forms of the words that need a row after a look at what these forms do.

    A known word that begins with the token of a new word would be cut up by it, so it gets a row. A
    word that must match without a space, but is one token of the base there, gets none and counts
    as known: its token would be the base's own. With a space its token would cut longer words: on
    Qwen2.5, the 222 such words of a lexicon of 44,990 changed 0.9 % of the ordinary words.
    """
    spaced = {form.word for form in forms if form.place == AFTER_SPACE and space == " "}
    if cut := {word for word in known if any(word[:n] in spaced for n in range(1, len(word)))}:
        words = [word for word in words if word in cut or word not in known]
        forms = first_forms(base, words, space, matching)
    contents = [form.content for form in forms if form.place != AFTER_SPACE]
    spelled = zip(contents, spell(base, contents, space))
    single = {content for content, ids in spelled if len(ids) == 1}
    return [form for form in forms if form.content not in single]


def spell(base: Tokenizer, contents: list[str], space: str) -> list[list[int]]:
    """Return the base ids of each form's content, without special tokens.

    The contents of a SentencePiece-style tokenizer are strings of its vocabulary and go straight to
    its model, because the tokenizer would put another space before a text. Others are encoded
    20,000 at a time, because the Encoding of one word takes about 2 kB.
    """
    if space == SPACE:
        return [[token.id for token in base.model.tokenize(content)] for content in contents]
    ids, encode = [], base.encode_batch_fast  # the fast one leaves character offsets out
    for i in range(0, len(contents), 20_000):
        ids += [e.ids for e in encode(contents[i : i + 20_000], add_special_tokens=False)]
    return ids


def first_forms(base: Tokenizer, words: list[str], space: str, matching: str) -> list[Form]:
    """Decide where each new word matches: one form a word, in their order.

    plain:  anywhere, inside longer words too, as in the original runs.
    bare:   as a whole word, without the space before it.
    spaced, both: with the space before it, so that " word" is one token and not two. In byte-level
            tokenizers such a token also matches the beginning of a longer word. So there a word
            that begins a longer alphabetic entry of the base vocabulary, as written or in lower
            case, is left bare.
    Two kinds of words are never bare: those that a byte-level decoder misreads without the space,
    and those that begin with a word that matches after a space and would hide them.
    """
    if matching == "plain":
        return [Form(word, word, ANYWHERE) for word in words]
    wanted_bare = set()
    if space == " ":
        wanted_bare = set(words) if matching == "bare" else entry_beginnings(base)
    forms, spaced = {}, set()
    for word in sorted(words):  # so a word comes after those that it begins with
        hidden = any(word[:n] in spaced for n in range(1, len(word)))
        if UNSPACED.fullmatch(word):
            forms[word] = Form(word, word, ANYWHERE)
        elif word in wanted_bare and not hidden and reads_well(base, word):
            forms[word] = Form(word, word, WHOLE_WORD)
        else:
            forms[word] = Form(word, space + word, AFTER_SPACE)
            spaced.add(word)
    return [forms[word] for word in words]


def entry_beginnings(base: Tokenizer) -> set[str]:
    """Return what a longer word of a byte-level vocabulary begins with, as written or lower case.

    For "Rather" these are "R", "Ra" ... "Rathe", and "r", "ra" ... "rathe".
    """
    # "\u0120" stands for the space before a word. ASCII decodes to itself, and leaving it out saves
    # 0.3 s on Qwen's vocabulary.
    entries = (entry.removeprefix("\u0120") for entry in base.get_vocab())
    entries = (e if e.isascii() else base.decoder.decode([e]) for e in entries)
    words = {form for e in entries if e.isalpha() for form in (e, e.lower())}
    return {word[:n] for word in words for n in range(1, len(word))}


def reads_well(base: Tokenizer, content: str) -> bool:
    """Tell whether a token of this content decodes to it.

    A byte-level decoder takes the "é" of an added token for the byte E9, unless the token has a
    letter that stands for no byte. Blanks are such letters, so " é" and "\\né" read well.
    """
    return base.decoder.decode([content]) == content


def second_forms(base: Tokenizer, forms: list[Form], texts: list[str], space: str) -> list[Form]:
    """List a second form, without a space, of each word that the corpus has without one before it.

    A word that would be misread without a blank gets a form with the line end before it, and so
    does a word that begins with such a word, which would hide it at a line start. Forms that the
    base spells with one token are left out.
    """
    before = {form.word: set() for form in forms if form.place == AFTER_SPACE}
    find = word_finder(list(before))
    for text in texts:
        for start, end in find(text):
            blanks = text[max(start - 2, 0) : start]
            before[text[start:end]].add("two" if blanks == "  " else blanks[-1:])
    misread = {word for word in before if space == " " and not reads_well(base, word)}
    of_lines, more = {word for word in misread if "\n" in before[word]}, []
    for word, blanks in before.items():
        if "\n" in blanks and any(word[:n] in of_lines for n in range(1, len(word) + 1)):
            more.append(Form(word, "\n" + word, AFTER_SPACE))
        elif word not in misread and blanks - {" "}:
            more.append(Form(word, word, WHOLE_WORD))
    spelled = zip(more, spell(base, [form.content for form in more], space))
    return [form for form, ids in spelled if len(ids) > 1 and not is_entry(base, form.content)]


def word_finder(words: list[str]) -> Callable[[str], Iterator[tuple[int, int]]]:
    """Make a function that finds the places (start, end) of `words` in a text.

    A word counts between characters that are neither letters, marks, digits nor underscores,
    whatever a tokenizer makes of it. Where one word of `words` lies within another, as in
    "sea-change", the longer one is found.
    """
    runs = {word for word in words if RUN.fullmatch(word) and not UNSPACED.fullmatch(word)}
    unspaced = [word for word in words if UNSPACED.fullmatch(word)]
    others = [word for word in words if not RUN.fullmatch(word)]
    compounds = rf"(?<![{LETTER}])(?:{any_of(others)})(?![{LETTER}])|" if others else ""
    pattern, runs = regex.compile(f"{compounds}[{LETTER}]+"), runs.union(others)

    def find(text: str) -> Iterator[tuple[int, int]]:
        yield from (match.span() for match in pattern.finditer(text) if match[0] in runs)
        if unspaced:
            yield from (match.span() for match in regex.finditer(any_of(unspaced), text))

    return find


def extended_tokenizer(
    base: Tokenizer, first_new_id: int, forms: list[Form], matching: str
) -> Tokenizer:
    """Make the base tokenizer anew and let it know the forms, with ids in their order."""
    if is_sentencepiece(base):
        return whole_word_tokenizer(base, first_new_id, forms)
    tokenizer = Tokenizer.from_str(base.to_str())
    if base.get_vocab_size() < first_new_id:  # there are ids without a token
        tokenizer = with_entries(base, first_new_id, forms)
    # In one call: one by one 44,000 words took 35 minutes.
    tokenizer.add_tokens([
        AddedToken(f.content, single_word=f.place == WHOLE_WORD, normalized=matching == "plain")
        for f in forms
    ])  # fmt: skip
    return tokenizer


def with_entries(base: Tokenizer, first_new_id: int, forms: list[Form]) -> Tokenizer:
    """Make the base tokenizer anew, with special tokens and forms in the vocabulary itself.

    Other tokens get new ids at each loading, counted from the number of entries: a special token
    would get the id of a new word, and where ids have holes, a new word would fall into one.
    """
    spec = json.loads(base.to_str())
    spec["model"]["vocab"] |= {token["content"]: token["id"] for token in spec["added_tokens"]}
    spec["model"]["vocab"] |= {form.content: i for i, form in enumerate(forms, first_new_id)}
    return Tokenizer.from_str(json.dumps(spec))


def any_of(words: list[str]) -> str:
    """Make a regex for any of the words, the longest first; it walks a shared beginning once."""
    head, groups = commonprefix(words), {}
    for word in words:
        rest = word[len(head) :]
        groups.setdefault(rest[:1], []).append(rest)
    optional = "?" if groups.pop("", None) else ""
    branches = "|".join(any_of(group) for _, group in sorted(groups.items()))
    return re.escape(head) + (f"(?:{branches}){optional}" if branches else "")


def whole_word_tokenizer(base: Tokenizer, first_new_id: int, forms: list[Form]) -> Tokenizer:
    """Put the forms into the vocabulary of a SentencePiece-style tokenizer.

    The pre-tokenizer cuts out every form where it matches. With `ignore_merges` such a cut becomes
    one token, because the vocabulary holds it. The text between the cuts is spelled by the base's
    merges as before.
    """
    tokenizer = with_entries(base, first_new_id, forms)
    tokenizer.model.ignore_merges = True
    # Two spaces before a word are one entry of the base and must stay together; the word after them
    # matches without a space.
    places = {
        AFTER_SPACE: rf"(?<!{SPACE}){SPACE}(?:%s)(?![{LETTER}])",
        WHOLE_WORD: rf"(?:(?<![{LETTER}{SPACE}])|(?<={SPACE}{SPACE}))(?:%s)(?![{LETTER}])",
        ANYWHERE: "(?:%s)",
    }
    words = {place: [form.word for form in forms if form.place == place] for place in places}
    patterns = [pattern % any_of(words[place]) for place, pattern in places.items() if words[place]]
    # The last alternative cuts "<0x41>" in a text, which would otherwise become that byte's entry.
    pattern = "|".join([*patterns, r"(?<=<)0(?=x[0-9A-F]{2}>)"])
    steps = [base.pre_tokenizer, pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([step for step in steps if step])
    return tokenizer


def new_words_hash(words: list[str], first_new_id: int) -> str:
    """Hash the rows' words and ids (SHA-256): if hashes are equal, the rows mean the same."""
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
        raise UserError(
            f"{config.lexicon}: none of its {new.num_words} new words matches in the corpus"
            f" ({new.matching} matching); check that the two belong together"
        )
    report = make_report(config, new, figures)
    return dataclasses.replace(new, report=report, counts=counts)


def make_report(config: Config, new: NewWords, corpus: dict) -> dict:
    """Say in plain JSON values what the extension does; `corpus` as `corpus_figures` gives it."""
    model, num_words = json.loads(new.files.get("config.json", "{}")), new.num_words
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
        "lexicon": new.lexicon.origin,
        "lexicon_words": len(new.lexicon.words),
        "known": len(new.lexicon.words) - num_words,
        "known_by_rule": new.known_by_rule,
        "known_words": new.rule,
        "new_tokens": num_words,
        "table_rows": table_rows,
        "padding_rows": padding,
        "new_ids_in_padding": None if padding is None else min(padding, num_words),
        "total": new.first_new_id + num_words,
        "expansion_percent": round(100 * num_words / new.first_new_id, 2),
        "second_forms": len(new.words) - num_words,
        "new_words_sha256": new_words_hash(new.words, new.first_new_id),
        **word_figures(new),
        "corpus": corpus,
        "repaired_lines": new.lexicon.repaired,
        "refused_lines": new.lexicon.refused,
        "load_with": "PreTrainedTokenizerFast" if foreign else "AutoTokenizer",
        "started_in": str(Path.cwd()),  # the folder that a run's relative paths begin in
    }


def word_figures(new: NewWords) -> dict:
    """Count tokens per new word in a sentence and list words that decode wrongly.

    Raises: UserError if a word can never match, because another one hides it or the tokenizer's
    normalizer makes another word of it.
    """
    words = new.words[: new.num_words]

    def ids(tokenizer: Tokenizer) -> list[list[int]]:
        sentences = [" ".join(["a", *words[i : i + 1000]]) for i in range(0, len(words), 1000)]
        return [e.ids for e in tokenizer.encode_batch_fast(sentences, add_special_tokens=False)]

    before, after = ids(new.base), ids(new.tokenizer)
    reached, decode = set().union(*after), new.tokenizer.decode
    hidden = [word for i, word in enumerate(words, new.first_new_id) if i not in reached]
    if hidden:
        raise UserError(
            f"lexicon: {len(hidden)} new words can never match, because others hide them or the"
            f" tokenizer rewrites their letters: {', '.join(hidden[:5])}; take them out"
        )
    ids_of_rows = enumerate(new.words, new.first_new_id)
    return {
        "tokens_per_new_word_before": round((sum(map(len, before)) - len(before)) / len(words), 3),
        "tokens_per_new_word_after": round((sum(map(len, after)) - len(after)) / len(words), 3),
        "words_decoding_wrongly": [word for i, word in ids_of_rows if decode([i]).strip() != word],
    }


def line_ranges(numbers: Iterable[int]) -> str:
    """Write line numbers as ranges, [1, 2, 3, 7] as "1-3, 7"; a fault may be in every line."""
    numbers = set(numbers)
    firsts = sorted(numbers - {number + 1 for number in numbers})
    lasts = sorted(numbers - {number - 1 for number in numbers})
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in zip(firsts, lasts))


def compare_piece(new: NewWords, text: str, before: tuple, after: tuple, places: set) -> tuple:
    """Compare how the base and the extended tokenizer cut a text.

    before, after: (ids, offsets) by the base and by the extended tokenizer
    places:        (start, end) of the new words in the text
    Returns: the ordinary words; those of them whose ids changed; the places that are no one token
    """
    marks, hits = bytearray(len(text)), set()
    for _, (start, end) in set(zip(*before)) ^ set(zip(*after)):
        marks[start:end] = b"\1" * (end - start)
    for token, (_, end) in zip(*after):
        if token >= new.first_new_id:  # its content may begin with a blank
            hits.add((end - len(new.words[token - new.first_new_id]), end))
    for start, end in places:
        marks[start:end] = b"\2" * (end - start)
    spans = [match.span() for match in RUN.finditer(text)]
    ordinary = [(text[a:b], 1 in marks[a:b]) for a, b in spans if 2 not in marks[a:b]]
    altered = Counter(word for word, changed in ordinary if changed)
    # What the base spells with one token anyhow needs no form of ours.
    missed = places - hits - set(after[1])
    return Counter(word for word, _ in ordinary), altered, missed


def why_missed(new: NewWords, text: str, start: int) -> str:
    """Say why the new word that begins at `start` is not one token there."""
    if text[max(start - 1, 0) : start] == " " and text[start - 2 : start] != "  ":
        return "another new word's token takes part of them"
    if new.matching != "both":
        return f"no space before them, which {new.matching} matching does not see"
    return "no space before them, and decoders would misread their letters without one"


def corpus_figures(new: NewWords, paths: tuple[str, ...], texts: list[str]) -> tuple:
    """Count in the corpus: (how often the token of each row occurs, the report's figures)."""
    tokens_before, found, first_bad_line, missed = 0, 0, None, {}
    seen, ordinary, changed = Counter(), Counter(), Counter()
    find = word_finder(new.words[: new.num_words])
    for path, text in zip(paths, texts):
        line, parts = 1, pieces(text)
        encoded = zip(encode_pieces(new.base, parts), encode_pieces(new.tokenizer, parts))
        for number, (piece, (before, after)) in enumerate(zip(parts, encoded)):
            lead = LEAD if number else ""
            shown, places = lead + piece, set(find(lead + piece))
            words, altered, in_pieces = compare_piece(new, shown, before, after, places)
            tokens_before, found = tokens_before + len(before[0]), found + len(places)
            for total, more in ((seen, after[0]), (ordinary, words), (changed, altered)):
                total.update(more)
            for a, b in in_pieces:
                missed.setdefault(why_missed(new, shown, a), Counter())[shown[a:b]] += 1
            first_bad_line = first_bad_line or bad_line(new, lead, piece, before, after, path, line)
            line += piece.count("\n")
    counts = [seen[i] for i, _ in enumerate(new.words, new.first_new_id)]
    of_words = add_up_forms(new, counts)
    return counts, {
        "bytes": sum(len(text.encode()) for text in texts),
        "tokens_before": tokens_before,
        "tokens_after": seen.total(),
        "new_tokens": sum(counts),
        "new_words_seen_once": sum(count == 1 for count in of_words.values()),
        "new_words_never_seen": sum(count == 0 for count in of_words.values()),
        "occurrences": found,
        "occurrences_as_one_token": found - sum(words.total() for words in missed.values()),
        "occurrences_in_pieces": {
            reason: {"count": words.total(), "examples": [word for word, _ in words.most_common(5)]}
            for reason, words in missed.items()
        },
        "ordinary_words": ordinary.total(),
        "ordinary_words_changed": changed.total(),
        "ordinary_words_changed_examples": [word for word, _ in changed.most_common(5)],
        "exact_round_trip": first_bad_line is None,
        "first_bad_line": first_bad_line,
    }


def add_up_forms(new: NewWords, counts: list[int]) -> Counter:
    """Count how often each word occurs, whatever its form; counts: of the rows."""
    of_words = Counter(dict(zip(new.words[: new.num_words], counts)))
    of_words.update(dict(zip(new.words[new.num_words :], counts[new.num_words :])))
    return of_words


def bad_line(
    new: NewWords, lead: str, piece: str, before: tuple, after: tuple, path: str, line: int
) -> str | None:
    """Describe the first line of `piece` that the new tokenizer does not give back, if any.

    lead: what was before the piece when it was encoded
    before, after: (ids, offsets) of the piece, by the base tokenizer and by the new one
    path, line: the file of the piece, and the number of the piece's first line
    """

    def decode(tokenizer: Tokenizer, ids: list[int]) -> str:
        ids = tokenizer.encode(lead, add_special_tokens=False).ids + ids
        return tokenizer.decode(ids, skip_special_tokens=False)[len(lead) :]

    decoded = decode(new.tokenizer, after[0])
    if decoded == piece:
        return None
    same = len(commonprefix([decoded, piece]))
    start, number = piece.rfind("\n", 0, same) + 1, line + piece.count("\n", 0, same)
    wanted, got = (text[start:].split("\n")[0][:200] for text in (piece, decoded))
    exact = decode(new.base, before[0]) == piece
    whose = "" if exact else "; the base tokenizer is not exact either"
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
    shown["second forms, without a space"] = f"{report['second_forms']:,}"
    shown["size with them"] = f"{report['total'] + report['second_forms']:,}"
    lines = [f"| {name:33} | {value:>9} |" for name, value in shown.items()]
    lines += word_remarks(report) + corpus_remarks(report["corpus"])
    if report["load_with"] != "AutoTokenizer":
        lines.append(
            "beside the model's config.json transformers 5 builds another tokenizer: load the"
            f" folder with {report['load_with']}.from_pretrained"
        )
    return "\n".join(lines)


def corpus_remarks(corpus: dict) -> list[str]:
    """List what is to be said about the corpus: what the new words reach and what they change."""
    changed, ordinary = corpus["ordinary_words_changed"], corpus["ordinary_words"]
    examples = ", ".join(corpus["ordinary_words_changed_examples"]) or "none"
    share, occurrences = corpus["new_tokens"] / corpus["tokens_after"], corpus["occurrences"]
    lines = [
        f"corpus: {corpus['bytes']:,} bytes, {corpus['tokens_before']:,} tokens before, "
        f"{corpus['tokens_after']:,} after, {share:.2%} new; new words seen once "
        f"{corpus['new_words_seen_once']:,}, never {corpus['new_words_never_seen']:,} (words.tsv)",
        f"occurrences of new words: {occurrences:,}, of which one token "
        f"{corpus['occurrences_as_one_token']:,} "
        f"({corpus['occurrences_as_one_token'] / max(1, occurrences):.2%})",
    ]
    for reason, words in corpus["occurrences_in_pieces"].items():
        lines.append(f"  in pieces {words['count']:,}, {reason}: {', '.join(words['examples'])}")
    if share < 0.01 or occurrences < 300:
        lines.append(
            f"warning: the lexicon hardly occurs in the corpus ({share:.2%} of the tokens, "
            f"{occurrences:,} times); its rows will not learn much"
        )
    return lines + [
        f"ordinary words whose ids changed: {changed:,} of {ordinary:,} "
        f"({changed / max(1, ordinary):.2%}): {examples}",
        f"round trip of the corpus: {corpus['first_bad_line'] or 'exact'}",
    ]


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
    known = report["known_by_rule"]
    lines += [
        f"lexicon: {report['lexicon']}",
        f"the base spells {known['one_token']:,} of its words with one token in a sentence;"
        f" {known['exact_string']:,} are entries of the base vocabulary as they stand",
    ]
    if rest := report["known"] - known[report["known_words"]]:
        lines.append(
            f"{rest} more are known, because they begin longer words of the base vocabulary and are"
            " one token of it without a space"
        )
    if matching == "plain":
        lines.append("plain cuts up ordinary words, spaced and bare do not")
    if words := report["words_decoding_wrongly"]:
        lines.append(f"{len(words)} new words decode wrongly: {', '.join(words[:5])}")
    for what in ("repaired", "refused"):
        for kind, faulty in report[f"{what}_lines"].items():
            numbers = shorten(line_ranges(faulty), 80, placeholder=" ...")
            words = shorten(", ".join(map(repr, faulty.values())), 80, placeholder=" ...")
            lines.append(f"lexicon lines {what}, {kind}: {numbers}: {words}")
    return lines


# ---- Saving --------------------------------------------------------------------------------------

# tokenizer_config.json keeps these settings of the base. The others name classes, or are written by
# one version of transformers and not read by another. tokenizer.json says how text is encoded.
KEPT_SETTINGS = (
    "bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token",
    "additional_special_tokens", "add_bos_token", "chat_template", "model_max_length",
    "padding_side", "truncation_side",
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


def shown_content(content: str) -> str:
    """Write what a token matches so that it stays on its line: a line end as \\n."""
    return content.replace(SPACE, " ").replace("\n", "\\n")


def words_table(new: NewWords) -> str:
    """Write words.tsv: a line a new word, with the base ids that its row can start from."""
    lines = ["id\tword\tmatches\tbase_ids\tcount"]
    rows = zip(new.forms, new.spellings, new.counts)
    for i, (form, ids, count) in enumerate(rows, new.first_new_id):
        base_ids = " ".join(map(str, ids))
        lines.append(f"{i}\t{form.word}\t{shown_content(form.content)}\t{base_ids}\t{count}")
    return "\n".join(lines) + "\n"


def save_for_llama_cpp(config: Config, new: NewWords, folder: Path) -> dict:
    """Write what llama.cpp's converter reads of a SentencePiece-style tokenizer that has scores.

    The scores are in the base's tokenizer.model; without one, llama.cpp finds few of the new words.
    The new words are in added_tokens.json. Transformers reads neither, because it finds a
    tokenizer.json, and the base's added tokens in tokenizer_config.json.
    Returns what tokenizer_config.json needs beside. add_prefix_space is for llama.cpp alone: if
    true, it puts a space after each new word too.
    """
    if not is_sentencepiece(new.base):
        return {}
    scores = base_folder(config) / "tokenizer.model"
    if not scores.is_file():
        return {}
    shutil.copyfile(scores, folder / scores.name)
    texts = [form.content.replace(SPACE, " ") for form in new.forms]
    ids = {text: i for i, text in enumerate(texts, new.first_new_id)}
    write_json(folder / "added_tokens.json", ids)
    added = json.loads(new.files["tokenizer.json"])["added_tokens"]
    added = {str(token.pop("id")): token for token in added}
    return {"added_tokens_decoder": added, "add_prefix_space": False}


def check_saved(config: Config, folder: Path, new: NewWords) -> None:
    """Load the tokenizer that was written, alone and through transformers, and compare the new ids.

    Raises: UserError if either gives the new tokens other ids, as for a tokenizer.json whose own
    added tokens do not get the ids that stand in it.
    """
    from transformers import AutoTokenizer

    loaded = (
        Tokenizer.from_file(str(folder / "tokenizer.json")),
        AutoTokenizer.from_pretrained(folder).backend_tokenizer,
    )
    sentence = " ".join(["a", *new.words[:1000]])
    for tokenizer in loaded:
        ids = [tokenizer.token_to_id(form.content) for form in new.forms]
        same = ids == [*range(new.first_new_id, new.first_new_id + len(ids))]
        if not same or tokenizer.encode(sentence).ids != new.tokenizer.encode(sentence).ids:
            raise UserError(
                f"model_name {config.model_name!r}: its tokenizer.json gives some tokens ids that"
                " change when it is loaded again, so new words would get others' ids; repair its"
                " added_tokens or take another model"
            )


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
            settings = tokenizer_settings(new.files) | save_for_llama_cpp(config, new, folder)
            write_json(folder / "tokenizer_config.json", settings)
            if template in new.files:
                write_text(folder / template, new.files[template])
            write_json(folder / "report.json", new.report)
            write_text(folder / "words.tsv", words_table(new))
            check_saved(config, folder, new)
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
    parser = command_line_parser("  python extend_tokenizer.py configs/sample.yaml")
    arguments = parse_command_line(parser, sys.argv[1:])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    raise SystemExit(run_command(main, arguments.config, *arguments.overrides))
