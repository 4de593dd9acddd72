"""Synonyms of WordNet, for the augmentation of captions."""

import argparse
import gzip
import json
from pathlib import Path

from declip_jax.data.text import read_wordnet
from declip_jax.prepare.files import publish, temporary_name


def write_synonyms(args: argparse.Namespace) -> None:
    """Writes the file for `config.data.synonyms`; the same input always gives the same bytes."""
    synonyms = read_wordnet(args.wordnet)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(output)
    temporary.write_bytes(gzip.compress(json.dumps(synonyms).encode(), mtime=0))
    publish(temporary, output)
    print(f"{output}: {len(synonyms):,} words with synonyms")
