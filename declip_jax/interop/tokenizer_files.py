"""Hugging Face's tokenizer files, which give the ids that a model was trained with.

A `tokenizer.json` holds the tokenizer that the model was trained with and, before it, rules for raw
texts. These do what `data.tokenizer`'s `clean` does, so that who uses a model need not know of the
cleaning. A rule replaces what a regular expression matches by a constant: there is one for every
character that others are spellings of.

What such rules cannot do, and where ids therefore differ from those that it encodes:

- What ftfy guesses: a text decoded with the wrong encoding ("CafÃ©") stays as it is.
- Some character references stay as they are: numeric ones beyond U+00FF, unless to punctuation or
  to a character whose name is replaced; names of arrows and mathematical symbols that HTML 4 lacks.
- With a `<` in the text, where ftfy leaves references to Python, names in capitals that only ftfy
  knows (`&EACUTE;`) are replaced all the same, and so is a letter with an accent by reference.
- Capitals that Unicode has had for so short a time that either this Python or the library does not
  know their lower case, and sequences of combining marks with one that it has had since version 10.
- A string with lone surrogates is an error.
"""

import html
import html.entities
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ftfy
import ftfy.chardata
from tokenizers import Regex
from tokenizers.normalizers import NFC, Lowercase, Normalizer, Replace, Sequence, Strip

from declip_jax.data.tokenizer import END, MAX_CHARACTERS, START, build, merges, vocabulary

_HTML4 = {html.entities.html5[f"{name};"] for name in html.entities.name2codepoint}


def write_tokenizer(folder: Path, context: int) -> None:
    """Writes vocab.json, merges.txt, tokenizer.json and the two files that configure them.

    Texts are cut to `context` tokens, which the model reads, when truncation is asked for.
    """
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    # It has no added tokens: they would be looked for in raw texts. `transformers` adds those that
    # the configuration names, which turns that off.
    tokenizer = build()
    tokenizer.normalizer = Sequence(_rules())
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
    lines = ["#version: 0.2", *map(" ".join, merges()), ""]
    (folder / "merges.txt").write_text("\n".join(lines), "utf-8")
    write_json(folder / "special_tokens_map.json", special, indent=2)
    write_json(folder / "tokenizer_config.json", config, indent=2)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


def _rules() -> list[Normalizer]:
    """`data.tokenizer`'s `clean` as rules, which are applied one after another.

    In their regular expressions, Oniguruma's, `\\K` leaves out of the match what stands before it,
    and `\\G` is where the last match ended.
    """
    spaces = filter(str.isspace, map(chr, range(0x110000)))
    controls = map(chr, ftfy.chardata.CONTROL_CHARS)
    return [
        _replace(rf"\A(?m:.){{{MAX_CHARACTERS}}}\K(?m:.)+", ""),
        _replace(rf"\e\[[\d;]*[a-zA-Z]|[{_escaped(controls)}]", ""),
        *(Replace(c, to) for c, to in _character_fixes().items()),
        *_entity_rules(),
        NFC(),
        # Python's lower case knows the sigma that ends a word, the library's does not.
        _replace(
            r"(?!\p{Case_Ignorable})\p{Cased}\p{Case_Ignorable}*\KΣ"
            r"(?!(?>\p{Case_Ignorable}*)\p{Cased})",
            "ς",
        ),
        Lowercase(),
        _replace(r"<(?:start|end)_of_text>|<\|(?:start|end)oftext\|>", " "),
        _replace(rf"[{_escaped(spaces)}]+", " "),
        Strip(),
    ]


def _character_fixes() -> dict[str, str]:
    """ftfy's replacements of single characters: quotes, ligatures, widths, C1 controls."""
    tables = (ftfy.chardata.LIGATURES, ftfy.chardata.WIDTH_MAP)
    candidates = {chr(c) for table in tables for c in table}
    candidates |= {chr(c) for c in (0x2BC, *range(0x80, 0xA0), *range(0x2018, 0x2020))}
    return {c: _fixed(c) for c in sorted(candidates) if _fixed(c) != c}


def _entity_rules() -> list[Normalizer]:
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
    # Names without a semicolon last: they begin others (`&not`, `&notin;`).
    rest = (*closed.items(), *open_.items())
    return [
        _replace(fixable.format(f"(?:{amp})+"), "&"),
        *(_replace(fixable.format("|".join(spellings)), to) for to, spellings in fixed.items()),
        ampersand,
        *(_replace(f"&(?:{'|'.join(spellings)})", to) for to, spellings in rest),
        ampersand,
    ]


def _replaced(to: str) -> bool:
    """Whether references to it are replaced: each rule takes half a microsecond of every text."""
    known = (c in _HTML4 or c < "\u2190" or "\u25a0" <= c < "\u27c0" for c in to)
    return _fixed(to) != to or all(known)


def _add(rules: dict[str, list[str]], to: str, *spellings: str) -> None:
    """Adds spellings of `to`, or of what later rules make of it, that there be fewer rules."""
    to = " " if to.isspace() else to if "Σ" in to else to.lower()
    rules.setdefault(to, []).extend(spellings)


def _fixed(text: str) -> str:
    """What ftfy makes of a text without guessing and without replacing references."""
    return ftfy.fix_text(text, fix_encoding=False, unescape_html=False)


def _replace(pattern: str, to: str) -> Normalizer:
    return Replace(Regex(pattern), to)


def _escaped(characters: Iterable[str]) -> str:
    """For a set in a regular expression."""
    return "".join(rf"\x{{{ord(c):x}}}" for c in characters)


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Writes a value as a file of JSON."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", "utf-8")
