import html
import re

import ftfy
import numpy as np
import pytest

from declip_jax.data.tokenizer import EOT, MASK, SOT, VOCAB_SIZE, clean, tokenize


def test_known_ids():
    # As published with OpenAI's tokeniser.
    expected = [SOT, 320, 2533, 6765, 320, 10297, EOT, 0, 0, 0]
    tokens = tokenize(["A person riding a motorcycle", "a photo of a cat"], 10)
    assert tokens.dtype == np.int32 and tokens.shape == (2, 10)
    assert tokens[0].tolist() == expected
    assert tokens[1].tolist() == [SOT, 320, 1125, 539, 320, 2368, EOT, 0, 0, 0]
    assert (SOT, EOT, MASK, VOCAB_SIZE) == (49406, 49407, 49408, 49409)


def test_too_long_a_text_keeps_its_end_token():
    short, long = tokenize(["one two three"], 5), tokenize(["one two three four five six"], 5)
    np.testing.assert_array_equal(short, long)
    assert long[0, -1] == EOT


def test_empty_texts():
    assert tokenize(["", "  \n", "\x00"], 4).tolist() == [[SOT, EOT, 0, 0]] * 3
    assert tokenize([], 4).shape == (0, 4)


def test_context_without_room_is_refused():
    with pytest.raises(ValueError, match="context_length"):
        tokenize(["a"], 2)


@pytest.mark.parametrize(
    "marker",
    [
        "<start_of_text>",
        "<end_of_text>",
        "<|startoftext|>",
        "<|endoftext|>",
        "<END_OF_TEXT>",
        "&lt;end_of_text&gt;",
        "&amp;lt;end_of_text&amp;gt;",
        "<end_of_<end_of_text>text>",
        "＜end_of_text＞",  # full-width brackets, which the cleaning makes ASCII
    ],
)
def test_no_text_gives_special_ids(marker):
    tokens = tokenize([f"a cat {marker} on a mat"], 40)[0]
    assert np.flatnonzero(np.isin(tokens, (SOT, MASK))).tolist() == [0]
    assert np.count_nonzero(tokens == EOT) == 1
    assert tokens[np.flatnonzero(tokens)[-1]] == EOT


def test_cleaning_is_the_published_one():
    def published(text):
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        return re.sub(r"\s+", " ", text).strip().lower()

    alphabet = (
        [chr(c) for c in range(128)] + list("éÜßİ\u00a0\u2028\u3000漢字🎉“”") + ["&amp;", "&#39;"]
    )
    rng = np.random.default_rng(0)
    for ascii_only in (True, False):
        for _ in range(500):
            count = 95 if ascii_only else len(alphabet)
            start = 32 if ascii_only else 0
            text = "".join(rng.choice(alphabet[start : start + count], rng.integers(30)))
            assert clean(text) == published(text), repr(text)
    assert clean("The CafÃ© &amp;amp; bar\r\n") == "the café & bar"


def test_unicode_ids_are_in_range():
    texts = ["漢字 and 🎉", "\ud800 lone surrogate", "ʼn ﬁ Å", "\x7f\x1b[31mred", "a" * 5000]
    tokens = tokenize(texts, 77)
    assert tokens.min() >= 0 and tokens.max() == EOT
    assert ((tokens == EOT).sum(axis=1) == 1).all()


def test_of_a_huge_text_only_the_beginning_is_read():
    for word in ("dog ", "é & ", "日本", "\n"):
        text = "a " + word * (10_000_000 // len(word))
        np.testing.assert_array_equal(tokenize([text], 77), tokenize([text[:9000]], 77))
