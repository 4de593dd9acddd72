"""Text to token ids: OpenAI's byte-pair encoding, with the cleaning that goes with it."""

import functools
import html
import re
from collections.abc import Sequence

import ftfy
import instant_clip_tokenizer
import numpy as np

SOT = 49406
EOT = 49407
MASK = 49408  # not OpenAI's; `tokenize` never gives it
VOCAB_SIZE = 49409
# Of a text that are read: no context holds more, and cleaning megabytes takes seconds.
MAX_CHARACTERS = 10_000

# Tokenisers give some of these spellings the special ids, wherever they stand in a text. An end
# token inside a caption would move the place its feature is read from.
_MARKERS = re.compile(r"<(?:start|end)_of_text>|<\|(?:start|end)oftext\|>")


def tokenize(texts: Sequence[str], context: int) -> np.ndarray:
    """Token ids, int32 [N, context]: SOT, the text's ids, EOT, then zeros.

    A text that is too long is cut so that EOT comes last; an empty one gives SOT, EOT.

    Raises:
      ValueError: `context` is below 3.
    """
    ids = _tokenizer().tokenize_batch([clean(text) for text in texts], context_length=context)
    return ids.astype(np.int32)


def clean(text: str) -> str:
    """Mends encoding errors and HTML entities, joins white space, lowers case, drops markers."""
    text = text[:MAX_CHARACTERS]
    # The general way costs ten times the tokenising and leaves printable ASCII without entities as
    # it is.
    if not (text.isascii() and text.isprintable() and "&" not in text):
        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(_MARKERS.sub(" ", text.lower()).split())


@functools.cache
def _tokenizer() -> instant_clip_tokenizer.Tokenizer:
    # Once in each process, on first use: it cannot be pickled and takes a moment to build.
    return instant_clip_tokenizer.Tokenizer()
