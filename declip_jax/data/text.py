"""What is drawn for a caption: tokens to mask and predict, and easy data augmentation (EDA)."""

import functools
import gzip
import json
import string
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from declip_jax.data.tokenizer import Tokenizer

DELETED = 0.1  # of the words, by "delete"

# Words of grammar. WordNet takes many for something else ("in": inch, "may": whitethorn).
STOP_WORDS = frozenset(
    "a about above across after against all along also am among an and another any are around as "
    "at be because been before behind being below beneath beside between both but by can could did "
    "do does down during each either every few for from had has have he her here hers him his how "
    "i if in inside into is it its just many may me might more most must my near neither next no "
    "nor not of off on onto or other our out outside over own shall she should since so some such "
    "than that the their them then there these they this those through to too toward towards under "
    "until up upon us very was we were what when where which while who whom whose why will with "
    "within without would you your".split()
)


def mask_tokens(
    tokens: np.ndarray, rate: float, tokenizer: Tokenizer, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Hides tokens of a caption for masked language modeling (Devlin et al., arXiv:1810.04805).

    Each of `tokens`, int32 [L], between start and end is chosen with probability `rate`. Of the
    chosen ones 80 % become the mask, 10 % a random ordinary id, one below `start`, and 10 % stay.

    Returns:
      The masked tokens, int32 [L], and the labels, int32 [L]: the true id where a token was chosen,
      -1 elsewhere.
    """
    count = int((tokens == tokenizer.end).argmax()) - 1  # between start and end
    chosen = 1 + np.flatnonzero(rng.random(count) < rate)
    labels = np.full_like(tokens, -1)
    labels[chosen] = tokens[chosen]
    fate = rng.random(len(chosen))
    ordinary = rng.integers(tokenizer.start, size=len(chosen))
    replacement = np.where(fate < 0.8, tokenizer.mask, ordinary)
    masked = tokens.copy()
    masked[chosen] = np.where(fate < 0.9, replacement, tokens[chosen])
    return masked, labels


def augment(
    caption: str,
    operations: Sequence[str],
    synonyms: Mapping[str, Sequence[str]],
    rng: np.random.Generator,
) -> str:
    """One operation of EDA, drawn evenly (Wei and Zou, https://arxiv.org/abs/1901.11196).

    "synonym" replaces one word that is not a stop word by one of its synonyms; "swap" exchanges two
    words; "delete" drops each word with probability DELETED, but never all. A caption without a
    word to replace, or of a single word, may come through as it is. It is a clean text, see
    `Tokenizer.clean`.
    """
    words = caption.split()
    operation = operations[rng.integers(len(operations))]
    if operation == "synonym":
        bare = [word.strip(string.punctuation) for word in words]
        places = [i for i, word in enumerate(bare) if word in synonyms and word not in STOP_WORDS]
        if places:
            place = places[rng.integers(len(places))]
            choices = synonyms[bare[place]]
            synonym = choices[rng.integers(len(choices))]
            words[place] = words[place].replace(bare[place], synonym)  # punctuation stays
    elif len(words) > 1 and operation == "swap":
        i = rng.integers(len(words))
        j = (i + 1 + rng.integers(len(words) - 1)) % len(words)
        words[i], words[j] = words[j], words[i]
    elif len(words) > 1 and operation == "delete":
        kept = rng.random(len(words)) >= DELETED
        if not kept.any():
            kept[rng.integers(len(words))] = True
        words = [word for word, keep in zip(words, kept, strict=True) if keep]
    return " ".join(words)


@functools.cache
def load_synonyms(path: str) -> dict[str, list[str]]:
    """{word: its synonyms}, read once in each process; ValueError unless `prepare` wrote them."""
    try:
        with gzip.open(path) as file:
            synonyms = json.load(file)
        if not isinstance(synonyms, dict) or not all(
            isinstance(words, list) and words and all(isinstance(word, str) for word in words)
            for words in synonyms.values()
        ):
            raise ValueError("not an object of lists of words")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(
            f"config.data.synonyms={path!r} cannot be read ({error}), and 'synonym' in "
            "config.data.eda needs it. Write it with python -m declip_jax.prepare synonyms "
            "--wordnet DIR --output FILE, or do without: --config.data.eda=\"('swap','delete')\"."
        ) from error
    return synonyms
