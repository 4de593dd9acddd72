"""Hugging Face's tokenizer files, which give the ids that a model was trained with.

A `tokenizer.json` holds rules for raw texts. Ours do what `data.tokenizer.clean` does, so that who
uses a model need not know of the cleaning. A rule replaces what a regular expression matches by a
constant: there is one for every character that others are spellings of.

What such rules cannot do, and where ids therefore differ from those of `data.tokenizer.tokenize`:

- What ftfy guesses: a text decoded with the wrong encoding ("CafÃ©") stays as it is.
- Some character references stay as they are: numeric ones beyond U+00FF, unless to punctuation or
  to a character whose name is replaced; names of arrows and mathematical symbols that HTML 4 lacks.
- With a `<` in the text, where ftfy leaves references to Python, names in capitals that only ftfy
  knows (`&EACUTE;`) are replaced all the same, and so is a letter with an accent by reference.
- Letters that Unicode has had since version 15.1, and sequences of combining marks with one that it
  has had since version 10.
- A string with lone surrogates is an error.
"""

import functools
import html
import html.entities
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ftfy
import ftfy.chardata
import instant_clip_tokenizer

from declip_jax.data.tokenizer import EOT, MAX_CHARACTERS, SOT

_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"

# A byte is spelled as a character that can be seen: itself, or for the others from U+0100 on. In
# this order they are ids 0..255; 256..511 are the same at the end of a word, 512 + n is made by
# merge n.
_VISIBLE = [b for b in range(0x100) if chr(b).isprintable() and chr(b) != " "]
_BYTES = [*_VISIBLE, *(b for b in range(0x100) if b not in _VISIBLE)]
_SPELLING = {
    b: chr(b if i < len(_VISIBLE) else 0x100 + i - len(_VISIBLE)) for i, b in enumerate(_BYTES)
}

# What completes the first and the last character of a token that holds a part of it: as much as
# this vocabulary has tokens that need it.
_BEFORE = (b"", b"\xc2", b"\xe1")
_AFTER = (b"", b"\xbf", b"\xbf\xbf")

_HTML4 = {html.entities.html5[f"{name};"] for name in html.entities.name2codepoint}

# Words, as `instant_clip_tokenizer` and OpenAI's tokeniser have them.
_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def write_tokenizer(folder: Path, context: int) -> None:
    """Writes vocab.json, merges.txt, tokenizer.json and the two files that configure them.

    Args:
      folder: exists.
      context: tokens that the model reads, which texts are cut to when truncation is asked for.
    """
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    pairs = [" ".join(pair) for pair in merges()]
    config = {
        # CLIPTokenizer would, in `transformers` 5, take tokenizer.json's vocabulary but not its
        # rules. This class takes all of it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": "CLIPProcessor",
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # no text gives special ids
        **special,
    }
    write_json(folder / "vocab.json", vocabulary())
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs, ""]), "utf-8")
    write_json(folder / "special_tokens_map.json", special, indent=2)
    write_json(folder / "tokenizer_config.json", config, indent=2)
    write_json(folder / "tokenizer.json", _tokenizer_json(pairs))


@functools.cache
def vocabulary() -> dict[str, int]:
    """Ids by spelling, as OpenAI spells tokens: byte by byte, with `</w>` at the end of a word."""
    tokenizer = instant_clip_tokenizer.Tokenizer()
    ids = {byte: i for i, byte in enumerate(_BYTES)}
    spellings = [_SPELLING[byte] + end for end in ("", _WORD_END) for byte in _BYTES]
    for i in range(len(spellings), SOT):
        token, end = _token_bytes(tokenizer, ids, i)
        spellings.append("".join(_SPELLING[byte] for byte in token) + (_WORD_END if end else ""))
    return {**{spelling: i for i, spelling in enumerate(spellings)}, _START: SOT, _END: EOT}


def _token_bytes(
    tokenizer: instant_clip_tokenizer.Tokenizer, ids: dict[int, int], token: int
) -> tuple[bytes, bool]:
    """A token's bytes, and whether it ends a word."""

    def decode(before: bytes, after: bytes) -> str:
        return tokenizer.decode([*(ids[b] for b in before), token, *(ids[b] for b in after)])

    before, after = b"", b""
    # What is no UTF-8 comes out as U+FFFD; but that is a character, too, and has tokens.
    if "\ufffd" in decode(before, after):
        around = itertools.product(_BEFORE, _AFTER)
        before, after = min(around, key=lambda pair: decode(*pair).count("\ufffd"))
    text = decode(before, after).encode()[len(before) :].removesuffix(after)
    return text.removesuffix(b" "), text.endswith(b" ")


@functools.cache
def merges() -> list[tuple[str, str]]:
    """The pairs that byte-pair encoding joins, the first first."""
    ranks: dict[tuple[str, str], int] = {}
    # Merge n made its token of what the merges before it leave of the token's characters.
    for spelling in list(vocabulary())[2 * len(_BYTES) : SOT]:
        word = spelling.removesuffix(_WORD_END)
        parts = [*word[:-1], word[-1] + spelling[len(word) :]]
        while len(parts) > 2:
            pairs = list(zip(parts, parts[1:], strict=False))
            i = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
            parts[i : i + 2] = ["".join(pairs[i])]
        ranks[parts[0], parts[1]] = len(ranks)
    return list(ranks)


def _tokenizer_json(pairs: list[str]) -> dict[str, Any]:
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        # None: they would be looked for in raw texts. `transformers` adds those of its own
        # configuration, which turns that off.
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": _normalizer()},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": _SPLIT},
                    "behavior": "Removed",
                    "invert": True,
                },
                {**byte_level, "use_regex": False},
            ],
        },
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [_END, EOT],
            "cls": [_START, SOT],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                byte_level,
                {"type": "Replace", "pattern": {"String": _WORD_END}, "content": " "},
                {"type": "Strip", "content": " ", "start": 0, "stop": 1},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": _END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": _WORD_END,
            "fuse_unk": False,
            "vocab": vocabulary(),
            "merges": pairs,
        },
    }


def _normalizer() -> list[dict[str, Any]]:
    """`data.tokenizer.clean` as rules, which are applied one after another.

    In their regular expressions, Oniguruma's, `\\K` leaves out of the match what stands before it,
    and `\\G` is where the last match ended.
    """
    spaces = "".join(chr(c) for c in range(0x110000) if chr(c).isspace())
    controls = "".join(map(chr, ftfy.chardata.CONTROL_CHARS))
    return [
        _replace(rf"\A(?m:.){{{MAX_CHARACTERS}}}\K(?m:.)+", ""),
        _replace(rf"\e\[[\d;]*[a-zA-Z]|[{_escaped(controls)}]", ""),
        *({**_replace("", to), "pattern": {"String": c}} for c, to in _character_fixes().items()),
        *_entity_rules(),
        {"type": "NFC"},
        # Python's lower case knows the sigma that ends a word, the library's does not.
        _replace(
            r"(?!\p{Case_Ignorable})\p{Cased}\p{Case_Ignorable}*\KΣ"
            r"(?!(?>\p{Case_Ignorable}*)\p{Cased})",
            "ς",
        ),
        {"type": "Lowercase"},
        _replace(r"<(?:start|end)_of_text>|<\|(?:start|end)oftext\|>", " "),
        _replace(rf"[{_escaped(spaces)}]+", " "),
        {"type": "Strip", "strip_left": True, "strip_right": True},
    ]


def _character_fixes() -> dict[str, str]:
    """ftfy's replacements of single characters: quotes, ligatures, widths, C1 controls."""
    tables = (ftfy.chardata.LIGATURES, ftfy.chardata.WIDTH_MAP)
    candidates = {chr(c) for table in tables for c in table}
    candidates |= {chr(c) for c in (0x2BC, *range(0x80, 0xA0), *range(0x2018, 0x2020))}
    return {c: _fixed(c) for c in sorted(candidates) if _fixed(c) != c}


def _entity_rules() -> list[dict[str, Any]]:
    """What ftfy and two rounds of `html.unescape` make of character references."""
    # ftfy replaces references that have a semicolon, as often as there are any, and mends what they
    # stand for; but not in a line with a "<" nor after one. Matches follow each other from the
    # text's start.
    fixable = r"\G[^<]*?\K&(?:{})(?![^\n]*<)"
    names = {name[1:]: to for name, to in ftfy.chardata.HTML_ENTITIES.items()} | html.entities.html5
    names = {name: to for name, to in names.items() if _replaced(to)}
    numbers = {*range(0x100), *range(0x2000, 0x2070)}
    numbers |= {ord(to) for to in names.values() if len(to) == 1}
    fixed, closed, open_ = {}, {}, {}
    for name, to in names.items():
        _add(closed if name.endswith(";") else open_, to, name)
        if name.endswith(";") and _fixed(to) != to:
            _add(fixed, _fixed(to), name)
    for number in sorted(numbers):
        to = html.unescape(f"&#{number};")
        decimal, hexadecimal = f"#0*{number}", f"#[xX]0*(?i:{number:x})"
        _add(closed, to, rf"{decimal}(?:;|(?![0-9]))", rf"{hexadecimal}(?:;|(?![0-9a-fA-F]))")
        if _fixed(to) != to:
            _add(fixed, _fixed(to), f"{decimal};", f"{hexadecimal};")
    # Ampersands apart, since they begin the references of the next round.
    amp = "|".join(closed.pop("&"))
    ampersand = _replace(f"&(?:{amp}|{'|'.join(open_.pop('&'))})", "&")
    return [
        _replace(fixable.format(f"(?:{amp})+"), "&"),
        *(_replace(fixable.format("|".join(spellings)), to) for to, spellings in fixed.items()),
        ampersand,
        # Names without a semicolon last: they begin others (`&not`, `&notin;`).
        *(_replace(f"&(?:{'|'.join(spellings)})", to) for to, spellings in closed.items()),
        *(_replace(f"&(?:{'|'.join(spellings)})", to) for to, spellings in open_.items()),
        ampersand,
    ]


def _replaced(to: str) -> bool:
    """Whether references to it are replaced: each rule takes half a microsecond of every text."""
    return _fixed(to) != to or all(
        c in _HTML4 or c < "\u2190" or "\u25a0" <= c < "\u27c0" for c in to
    )


def _add(rules: dict[str, list[str]], to: str, *spellings: str) -> None:
    """Adds spellings of `to`, or of what later rules make of it, that there be fewer rules."""
    to = " " if to.isspace() else to if "Σ" in to else to.lower()
    rules.setdefault(to, []).extend(spellings)


def _fixed(text: str) -> str:
    """What ftfy makes of a text without guessing and without replacing references."""
    return ftfy.fix_text(text, fix_encoding=False, unescape_html=False)


def _replace(pattern: str, to: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": to}


def _escaped(characters: Iterable[str]) -> str:
    """For a set in a regular expression."""
    return "".join(rf"\x{{{ord(c):x}}}" for c in characters)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Writes a value as a file of JSON."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", "utf-8")
