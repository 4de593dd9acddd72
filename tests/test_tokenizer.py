import gzip
import html
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ftfy
import numpy as np
import pytest

from declip_jax.data import tokenizer
from declip_jax.data.tokenizer import CLIP_TOKENIZER, build

# 3,525 texts of all kinds, and their ids as instant-clip-tokenizer 0.1.1, another implementation of
# OpenAI's, gave them after `clean` for a context of 77; without padding.
RECORDED = Path(__file__).with_name("tokens.json.gz")


@pytest.fixture(scope="module")
def recorded():
    """Texts, and their ids for a context of 77, int32 [N, 77]."""
    record = json.loads(gzip.decompress(RECORDED.read_bytes()))
    ids = np.zeros((len(record["texts"]), 77), np.int32)
    for row, found in zip(ids, record["ids"], strict=True):
        row[: len(found)] = found
    return record["texts"], ids


def _assert_same(ours, theirs, texts):
    wrong = np.flatnonzero((ours != theirs).any(axis=1))
    assert not len(wrong), f"{len(wrong)}, as {[texts[i][:1000] for i in wrong[:5]]}"


def test_ids_are_those_of_another_implementation(recorded):
    texts, ids = recorded
    assert len(texts) > 3000 and (ids[:, -1] == CLIP_TOKENIZER.end).sum() > 100
    _assert_same(CLIP_TOKENIZER.encode(texts, 77), ids, texts)


def _cut(ids, context):
    cut = ids[:, :context].copy()
    cut[(ids == CLIP_TOKENIZER.end).argmax(axis=1) >= context, -1] = CLIP_TOKENIZER.end
    return cut


@pytest.mark.parametrize("context", [3, 16, 76])
def test_a_smaller_context_cuts_them(recorded, context):
    texts, ids = recorded
    _assert_same(CLIP_TOKENIZER.encode(texts, context), _cut(ids, context), texts)


def test_texts_are_encoded_all_at_once(monkeypatch):
    counts = []

    class Counting:
        def encode_batch_fast(self, texts):
            counts.append(len(texts))
            return build().encode_batch_fast(texts)

    monkeypatch.setattr(tokenizer, "_library", lambda context: Counting())
    assert (CLIP_TOKENIZER.encode(["a cat", "a dog"] * 500, 8)[:, 1] == 320).all()
    assert counts == [1000]


def test_threads_with_different_contexts_do_not_meddle(recorded):
    texts, ids = (values[::4] for values in recorded)

    def wrong(context):
        return (CLIP_TOKENIZER.encode(texts, context) != _cut(ids, context)).sum()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(wrong, [77, 5, 40, 9] * 2)) == [0] * 8


@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_other_processes_give_the_same_ids_without_a_word(tmp_path, start):
    program = """
import multiprocessing
import sys
from pathlib import Path
from declip_jax.data.tokenizer import CLIP_TOKENIZER

def threads():
    return len([*Path("/proc/self/task").glob("*")])  # none but on Linux

def ids(texts):
    return CLIP_TOKENIZER.encode(texts, 12).tolist()

if __name__ == "__main__":
    texts = ["A cat", "two dogs &amp; a café", "one " * 99] * 50
    before = threads()
    ours = ids(texts)
    assert threads() == before  # the cores are the decoders'
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        assert pool.map(ids, [texts] * 4, chunksize=1) == [ours] * 4
    print(ours[1])
"""
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    process = subprocess.run(
        [sys.executable, tmp_path / "program.py", start],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert (
        json.loads(process.stdout) == CLIP_TOKENIZER.encode(["two dogs & a café"], 12)[0].tolist()
    )


def test_ids_are_read_back():
    def read(text):
        return build().decode(build().encode(text, add_special_tokens=False).ids)

    text = "a dog , café 🐶 日本 supercalifragilistic"
    assert read(text) == text and read("") == ""
    assert read("a</w>dog!") == "a </ w > dog !"  # words and marks stand apart


def test_known_ids():
    # As published with OpenAI's tokenizer.
    expected = [CLIP_TOKENIZER.start, 320, 2533, 6765, 320, 10297, CLIP_TOKENIZER.end, 0, 0, 0]
    tokens = CLIP_TOKENIZER.encode(["A person riding a motorcycle", "a photo of a cat"], 10)
    assert tokens.dtype == np.int32 and tokens.shape == (2, 10)
    assert tokens[0].tolist() == expected
    assert tokens[1].tolist() == [
        CLIP_TOKENIZER.start,
        320,
        1125,
        539,
        320,
        2368,
        CLIP_TOKENIZER.end,
        0,
        0,
        0,
    ]
    assert (
        CLIP_TOKENIZER.start,
        CLIP_TOKENIZER.end,
        CLIP_TOKENIZER.mask,
        CLIP_TOKENIZER.vocab_size,
    ) == (49406, 49407, 49408, 49409)


def test_too_long_a_text_keeps_its_end_token():
    short, long = (
        CLIP_TOKENIZER.encode(["one two three"], 5),
        CLIP_TOKENIZER.encode(["one two three four five six"], 5),
    )
    np.testing.assert_array_equal(short, long)
    assert long[0, -1] == CLIP_TOKENIZER.end


def test_empty_texts():
    assert (
        CLIP_TOKENIZER.encode(["", "  \n", "\x00"], 4).tolist()
        == [[CLIP_TOKENIZER.start, CLIP_TOKENIZER.end, 0, 0]] * 3
    )
    assert CLIP_TOKENIZER.encode([], 4).shape == (0, 4)


def test_context_without_room_is_refused():
    with pytest.raises(ValueError, match="context=2 must be at least 3"):
        CLIP_TOKENIZER.encode(["a"], 2)


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
    tokens = CLIP_TOKENIZER.encode([f"a cat {marker} on a mat"], 40)[0]
    assert np.flatnonzero(
        np.isin(tokens, (CLIP_TOKENIZER.start, CLIP_TOKENIZER.mask))
    ).tolist() == [0]
    assert np.count_nonzero(tokens == CLIP_TOKENIZER.end) == 1
    assert tokens[np.flatnonzero(tokens)[-1]] == CLIP_TOKENIZER.end


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
            assert CLIP_TOKENIZER.clean(text) == published(text), repr(text)
    assert CLIP_TOKENIZER.clean("The CafÃ© &amp;amp; bar\r\n") == "the café & bar"


def test_unicode_ids_are_in_range():
    texts = ["漢字 and 🎉", "\ud800 lone surrogate", "ʼn ﬁ Å", "\x7f\x1b[31mred", "a" * 5000]
    tokens = CLIP_TOKENIZER.encode(texts, 77)
    assert tokens.min() >= 0 and tokens.max() == CLIP_TOKENIZER.end
    assert ((tokens == CLIP_TOKENIZER.end).sum(axis=1) == 1).all()


def test_of_a_huge_text_only_the_beginning_is_read():
    for word in ("dog ", "é & ", "日本", "\n"):
        text = "a " + word * (10_000_000 // len(word))
        np.testing.assert_array_equal(
            CLIP_TOKENIZER.encode([text], 77), CLIP_TOKENIZER.encode([text[:9000]], 77)
        )
