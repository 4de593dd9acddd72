import collections
import gzip

import numpy as np
import pytest

from declip_jax import prepare
from declip_jax.data.options import EDA
from declip_jax.data.text import STOP_WORDS, augment, load_synonyms, mask_tokens
from declip_jax.data.tokenizer import CLIP_TOKENIZER
from declip_jax.prepare.synonyms import read_wordnet

# --- masking ------------------------------------------------------------------------------------


def many_masked(rate, rows=3000, context=40):
    """tokens, masked and labels, each [rows, context], of texts of all lengths with every id."""
    rng = np.random.default_rng(0)
    tokens = np.zeros((rows, context), np.int32)
    for row in tokens:
        length = rng.integers(context - 1)
        row[: length + 2] = [
            CLIP_TOKENIZER.start,
            *rng.integers(CLIP_TOKENIZER.start, size=length),
            CLIP_TOKENIZER.end,
        ]
        row[1 : length + 1 : 7] = 0  # an ordinary id, "!", before the end
    before = tokens.copy()
    pairs = [
        mask_tokens(row, rate, CLIP_TOKENIZER, np.random.default_rng((7, i)))
        for i, row in enumerate(tokens)
    ]
    np.testing.assert_array_equal(tokens, before)
    return (tokens, *map(np.stack, zip(*pairs, strict=True)))


def ordinary(tokens):
    """Where tokens are neither special nor padding."""
    after_start = np.arange(tokens.shape[1]) > 0
    return after_start & (np.cumsum(tokens == CLIP_TOKENIZER.end, axis=1) == 0)


def test_masking_rates():
    tokens, masked, labels = many_masked(0.15)
    chosen = labels >= 0
    assert masked.dtype == labels.dtype == np.int32
    count = chosen.sum()
    assert count > 8000
    assert count / ordinary(tokens).sum() == pytest.approx(0.15, abs=0.005)
    assert (tokens[chosen] == 0).mean() == pytest.approx(1 / 7, abs=0.05)
    hidden, same = masked[chosen] == CLIP_TOKENIZER.mask, masked[chosen] == tokens[chosen]
    assert hidden.mean() == pytest.approx(0.8, abs=0.015)
    assert same.mean() == pytest.approx(0.1, abs=0.015)
    drawn = masked[chosen][~hidden & ~same]
    assert drawn.max() < CLIP_TOKENIZER.start and drawn.min() >= 0
    # Even over all ids: a mean of 24,703 with a standard deviation of 14,262 / sqrt(800).
    assert drawn.mean() == pytest.approx(CLIP_TOKENIZER.start / 2, abs=2000)


def test_only_ordinary_tokens_are_chosen_and_labels_are_the_truth():
    for rate in (0.15, 1.0):
        tokens, masked, labels = many_masked(rate)
        chosen = labels != -1
        assert not (chosen & ~ordinary(tokens)).any()
        np.testing.assert_array_equal(labels[chosen], tokens[chosen])
        np.testing.assert_array_equal(masked[~chosen], tokens[~chosen])
        if rate == 1.0:
            np.testing.assert_array_equal(chosen, ordinary(tokens))


def test_masking_nothing():
    tokens, masked, labels = many_masked(0.0, rows=10)
    np.testing.assert_array_equal(masked, tokens)
    assert (labels == -1).all()
    empty, full = CLIP_TOKENIZER.encode(["", "a " * 50], 8)
    for row in (empty, full):
        masked, labels = mask_tokens(row, 1.0, CLIP_TOKENIZER, np.random.default_rng(0))
        assert masked[0] == CLIP_TOKENIZER.start and np.argmax(
            masked == CLIP_TOKENIZER.end
        ) == np.argmax(row == CLIP_TOKENIZER.end)


def test_masking_is_a_function_of_the_generator():
    (tokens,) = CLIP_TOKENIZER.encode(
        ["a dog and a cat and a mouse and a bird on the old red roof"], 32
    )

    def draw(seed):
        return mask_tokens(tokens, 0.5, CLIP_TOKENIZER, np.random.default_rng(seed))

    np.testing.assert_array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))


# --- EDA ----------------------------------------------------------------------------------------

SYNONYMS = {"dog": ["hound", "puppy"], "big": ["large"], "in": ["inch"], "well-known": ["famous"]}


def several(caption, operations, count=300, synonyms=SYNONYMS):
    rng, caption = np.random.default_rng(0), CLIP_TOKENIZER.clean(caption)
    return [augment(caption, operations, synonyms, rng) for _ in range(count)]


def test_synonyms_replace_one_word():
    drawn = collections.Counter(several("A big DOG sits in a box", ["synonym"], 1000))
    assert drawn.keys() == {
        "a large dog sits in a box",
        "a big hound sits in a box",
        "a big puppy sits in a box",
    }
    assert drawn["a large dog sits in a box"] == pytest.approx(500, abs=60)
    assert drawn["a big puppy sits in a box"] == pytest.approx(250, abs=50)


def test_synonyms_leave_punctuation():
    assert set(several('(a "dog", here!)', ["synonym"])) == {
        '(a "hound", here!)',
        '(a "puppy", here!)',
    }
    assert set(several("a well-known cat", ["synonym"])) == {"a famous cat"}


def test_stop_words_stay():
    assert "in" in STOP_WORDS
    assert set(several("cats in hats", ["synonym"])) == {"cats in hats"}


def test_swap():
    words = "one two three four five".split()
    texts = several(" ".join(words), ["swap"])
    assert len(set(texts)) == 10  # every pair
    for text in texts:
        assert sorted(text.split()) == sorted(words)
        assert sum(a != b for a, b in zip(text.split(), words, strict=True)) == 2


def test_delete():
    words = [f"w{i}" for i in range(10)]
    texts = [text.split() for text in several(" ".join(words), ["delete"], 1000)]
    assert all(text == [word for word in words if word in text] for text in texts)  # in order
    assert np.mean([len(text) for text in texts]) == pytest.approx(9, abs=0.1)


def test_deleting_leaves_a_word():
    class Unlucky:
        """Draws that delete every word."""

        def random(self, count):
            return np.zeros(count)

        def integers(self, count):
            return count - 1

    assert augment("one two three", ["delete"], {}, Unlucky()) == "three"


def test_operations_are_drawn_evenly():
    caption = "dog one two three four five six seven eight nine"

    def kind(text):
        words = text.split()
        if set(words) - set(caption.split()):
            return "synonym"
        return "swap" if len(words) == 10 and text != caption else "delete"

    kinds = collections.Counter(map(kind, several(caption, EDA, 3000)))
    assert kinds == pytest.approx(dict.fromkeys(EDA, 1000), abs=100)
    assert set(map(kind, several(caption, ["swap"]))) == {"swap"}


@pytest.mark.parametrize("operation", EDA)
def test_short_captions_come_through(operation):
    assert set(several("cat", [operation])) == {"cat"}
    assert set(several(" \n", [operation])) == {""}
    assert all(several("two words", [operation]))
    assert set(several("Caf\u00c3\u00a9", [operation])) == {"café"}  # cleaned as for the tokenizer


# --- synonyms -----------------------------------------------------------------------------------

# Lines of WordNet 3.0, without most of what follows the words.
WORDNET = {
    "noun": """\
  1 This software and database is being provided to you, the LICENSEE, by
  2 Princeton University under the following license.  By obtaining, using
02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 023 @ 02083346 n 0000 | a member of
02710044 06 n 04 andiron 0 firedog 0 dog 1 dog-iron 0 001 @ 04359589 n 0000 | metal supports
02747177 06 n 0a ashcan 0 trash_can 0 garbage_can 0 wastebin 0 ash_bin 0 ash-bin 0 ashbin 0 \
dustbin 0 trash_barrel 0 trash_bin 0 001 @ 02839910 n 0000 | a bin that holds rubbish
03018493 06 n 02 chinaware 0 china 1 002 @ 03133538 n 0000 ~ 04584944 n 0000 | dishware
08730550 15 n 04 Taiwan 0 China 1 Nationalist_China 0 Republic_of_China 0 006 @i 09316454 n 0000
""",
    "verb": """\
02001876 38 v 09 chase 0 chase_after 0 trail 0 tail 0 tag 0 give_chase 0 dog 0 go_after 1 track 0 \
017 @ 02000886 v 0000 + 05826914 n 0902 02 + 08 00 + 09 00 | go after with the intent to catch
""",
    "adj": "00014358 00 s 02 abounding 0 galore(ip) 0 001 & 00013887 a 0000 | in abundance\n",
    "adv": "00003093 02 r 02 hardly 2 scarcely 2 001 \\ 00016756 a 0201 | almost not\n",
}
SETS = [
    {"chase", "dog", "tag", "tail", "track", "trail"},
    {"andiron", "dog", "dog-iron", "firedog"},
    {"ash-bin", "ashbin", "ashcan", "dustbin", "wastebin"},
    {"china", "chinaware"},
    {"abounding", "galore"},
    {"hardly", "scarcely"},
]


@pytest.fixture
def wordnet(tmp_path):
    for part, lines in WORDNET.items():
        (tmp_path / f"data.{part}").write_text(lines)
    return tmp_path


def test_wordnet(wordnet):
    words = sorted(set().union(*SETS))
    expected = {
        word: sorted(set().union(*(others for others in SETS if word in others)) - {word})
        for word in words
    }
    synonyms = read_wordnet(str(wordnet))
    assert synonyms == expected and list(synonyms) == words
    assert synonyms["galore"] == ["abounding"]
    assert synonyms["dog"][:3] == ["andiron", "chase", "dog-iron"]


def test_prepare_writes_what_training_loads(wordnet, tmp_path, capsys):
    paths = [tmp_path / "new/synonyms.json.gz", tmp_path / "again.json.gz"]
    for path in paths:
        assert prepare.main(["synonyms", "--wordnet", str(wordnet), "--output", str(path)]) == 0
        assert f"{path}: 20 words" in capsys.readouterr().out
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert load_synonyms(str(paths[0])) == read_wordnet(str(wordnet))
    assert load_synonyms(str(paths[0])) is load_synonyms(str(paths[0]))  # read once
    assert not list(tmp_path.rglob("*tmp"))


def test_wordnet_that_cannot_be_read(wordnet, tmp_path, capsys):
    def refused(message):
        output = tmp_path / "synonyms.json.gz"
        command = ["synonyms", "--wordnet", str(wordnet), "--output", str(output)]
        assert prepare.main(command) == 2
        assert message in capsys.readouterr().err
        assert not output.exists()

    (wordnet / "data.adv").write_text("00001740 02 r\n")
    refused(f"line 1 of {wordnet}/data.adv is not WordNet's: '00001740 02 r'")
    (wordnet / "data.verb").write_text("  1 license\nnot a line of WordNet\n")
    refused(f"line 2 of {wordnet}/data.verb")
    (wordnet / "data.noun").unlink()
    refused(f"No such file or directory: '{wordnet}/data.noun'")


@pytest.mark.parametrize(
    "data",
    [b"{}", gzip.compress(b"{}")[:-4], *map(gzip.compress, [b"[1]", b"no", b'{"a": []}'])],
    ids=["not gzip", "cut off", "list", "not JSON", "no synonyms"],  # gzip writes the time
)
def test_a_file_that_holds_no_synonyms(tmp_path, data):
    (tmp_path / "synonyms.json.gz").write_bytes(data)
    with pytest.raises(ValueError, match="config.data.synonyms='.*synonyms.json.gz'"):
        load_synonyms(str(tmp_path / "synonyms.json.gz"))
