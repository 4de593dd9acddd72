"""Text to token ids: OpenAI's byte-pair encoding, with the cleaning that goes with it.

The merges in clip_merges.txt.gz are the first 48,894 of `bpe_simple_vocab_16e6` from
https://github.com/openai/CLIP (MIT License, Copyright (c) 2021 OpenAI; see clip_merges.LICENSE).
Hugging Face's `tokenizers` applies them.
"""

import dataclasses
import functools
import gzip
import html
import os
import re
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import ftfy
import numpy as np
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, processors

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"  # ends the spelling of a token that ends a word
# Of a text that are read: no context holds more, and cleaning megabytes takes seconds.
MAX_CHARACTERS = 10_000

# Tokenizers give some of these spellings the special ids, wherever they stand in a text. An end
# token inside a caption would move the place its feature is read from.
_MARKERS = re.compile(r"<(?:start|end)_of_text>|<\|(?:start|end)oftext\|>")

# Words, as OpenAI's tokenizer has them; white space is left out.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

# Decoding threads keep the cores busy already. Without threads of its own the library also has
# nothing to warn of in processes that are forked later. It looks when it encodes.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Texts to ids and back; a value that goes to worker processes as four numbers."""

    start: int  # ids around every text
    end: int
    mask: int  # hides another id; OpenAI's has none, and `encode` never gives it
    vocab_size: int

    def encode(self, texts: Sequence[str], context: int) -> np.ndarray:
        """Token ids, int32 [N, context]: the start, the text's ids, the end, then zeros.

        A text that is too long is cut so that the end comes last; an empty one has no ids between.
        A context below 3 is a ValueError.
        """
        if context < 3:
            raise ValueError(f"context={context} must be at least 3: the start, a token, the end.")
        # All at once, and without Python's lock.
        encodings = _library(context).encode_batch_fast([self.clean(text) for text in texts])
        found = [encoding.ids for encoding in encodings]
        lengths = np.array([len(ids) for ids in found], int)
        # Padding here is cheaper than to pass zeros through lists.
        tokens = np.zeros((len(texts), context), np.int32)
        tokens[np.arange(context) < lengths[:, None]] = list(chain.from_iterable(found))
        return tokens

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids between start and end, "[mask]" for `mask`; words and marks stand apart."""
        library = _library(context=3)  # of any
        spellings = [
            f"[mask]{WORD_END}" if i == self.mask else library.id_to_token(int(i)) for i in ids
        ]
        # All together, not one by one: a letter can take several.
        return library.decoder.decode(spellings).strip()

    @staticmethod
    def clean(text: str) -> str:
        """Mends encodings and HTML entities, lowers case, drops markers, joins white space."""
        text = text[:MAX_CHARACTERS]
        # The general way costs three times the tokenizing and leaves printable ASCII without
        # entities as it is.
        if not (text.isascii() and text.isprintable() and "&" not in text):
            text = html.unescape(html.unescape(ftfy.fix_text(text)))
        return " ".join(_MARKERS.sub(" ", text.lower()).split())


CLIP_TOKENIZER = Tokenizer(start=49406, end=49407, mask=49408, vocab_size=49409)


@functools.cache
def merges() -> list[tuple[str, str]]:
    """The pairs of spellings that byte-pair encoding joins, the first first."""
    text = gzip.decompress(Path(__file__).with_name("clip_merges.txt.gz").read_bytes()).decode()
    return [tuple(line.split(" ")) for line in text.splitlines()[1:]]


@functools.cache
def vocabulary() -> dict[str, int]:
    """Ids by spelling. A byte is spelled as a character that can be seen, and a word's end as </w>.

    A byte's character is itself if that can be seen, else one from U+0100 on.
    """
    visible = [c for c in map(chr, range(0x100)) if c.isprintable() and c != " "]
    alphabet = visible + [chr(0x100 + i) for i in range(0x100 - len(visible))]
    ends = [c + WORD_END for c in alphabet]
    spellings = [*alphabet, *ends, *map("".join, merges()), START, END]
    return {spelling: i for i, spelling in enumerate(spellings)}


def build() -> tokenizers.Tokenizer:
    """The library's tokenizer of clean texts, which the caller may change.

    It adds START and END, and cuts and pads nothing; its decoder puts spaces between words.
    """
    tokenizer = tokenizers.Tokenizer(_model())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.RobertaProcessing(
        *((text, vocabulary()[text]) for text in (END, START)),
        trim_offsets=False,
        add_prefix_space=False,
    )
    # `decoders.Strip` would take off the last space, too, but panics at a text without a token.
    ends = [decoders.Replace(Regex(WORD_END + r"\z"), ""), decoders.Replace(WORD_END, " ")]
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), *ends])
    return tokenizer


@functools.cache
def _model() -> models.BPE:
    # Once in each process, on first use: it takes a tenth of a second. Tokenizers share it.
    return models.BPE(vocabulary(), merges(), end_of_word_suffix=WORD_END, unk_token=END)


@functools.cache
def _library(context: int) -> tokenizers.Tokenizer:
    # One for each context: setting it anew would change what other threads are using.
    tokenizer = build()
    tokenizer.enable_truncation(context)
    return tokenizer
