"""Synonyms of WordNet, for the augmentation of captions."""

import argparse
import gzip
import json
from collections import defaultdict
from pathlib import Path

from declip_jax.data.input_files import InputError
from declip_jax.files import replacing


def write_synonyms(args: argparse.Namespace) -> None:
    """Writes the file for `config.data.synonyms`; the same input always gives the same bytes."""
    synonyms = read_wordnet(args.wordnet)
    output = Path(args.output)
    with replacing(output) as temporary:
        temporary.write_bytes(gzip.compress(json.dumps(synonyms).encode(), mtime=0))
    print(f"{output}: {len(synonyms):,} words with synonyms")


def read_wordnet(folder: str) -> dict[str, list[str]]:
    """{word: its synonyms}, both sorted, from WordNet's data files; their format is wndb(5WN).

    Words share a set of synonyms in any of their meanings. Only single words in lower case are
    taken: names are capitalized in WordNet, and would make Taiwan a synonym of china. Raises
    InputError if a file is not there or is something else.
    """
    synonyms: dict[str, set[str]] = defaultdict(set)
    for part in ("noun", "verb", "adj", "adv"):
        path = Path(folder) / f"data.{part}"
        try:
            lines = path.read_text("utf-8", errors="replace").splitlines()
        except OSError as error:
            raise InputError(
                f"--wordnet {folder}: {error}; expected WordNet's data.noun, data.verb, data.adj "
                "and data.adv, as in Debian's package wordnet-base"
            ) from None
        for number, line in enumerate(lines, start=1):
            if line.startswith("  "):  # the license
                continue
            try:
                # offset, lexicographer file, type, number of words (hexadecimal), then each word
                # with its sense number, and what does not matter here
                fields = line.split(" ")
                words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            except (IndexError, ValueError):
                raise InputError(
                    f"--wordnet {folder}: line {number} of {path} is not WordNet's: {line[:80]!r}"
                ) from None
            # Adjectives may end in a marker of their place, such as "(p)".
            words = {word.partition("(")[0] for word in words}
            words = {word for word in words if "_" not in word and word.islower()}
            for word in words:
                synonyms[word] |= words - {word}
    return {word: sorted(others) for word, others in sorted(synonyms.items()) if others}
