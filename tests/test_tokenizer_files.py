import html
import html.entities
import json
import unicodedata
from random import Random

import ftfy
import numpy as np
import pytest
from tokenizers import Tokenizer

from declip_jax.data.tokenizer import CLIP_TOKENIZER, END, START, build, merges, vocabulary
from declip_jax.interop.tokenizer_files import write_tokenizer

CONTEXT = 77
MARKERS = [
    START,
    END,
    "<start_of_text>",
    "<end_of_text>",
    "<END_OF_TEXT>",
    "<end_of_<end_of_text>text>",
]

WORDS = (
    "a an the photo of dogs two riding motorcycle Street sign RED t-shirt don't it's I'LL we've "
    "they'd you're I'm can't 'tis rock'n'roll O'Brien's 7 42 1990s 3.5mm 50% 1,000,000 x² ½ ⅷ Ⅷ №5 "
    "a.m. U.S.A. e-mail http://a.co/b?c=1&d=2 AT&T R&D #tag @user snake_case photorealistic"
).split()
LETTERS = (
    "café cafe\u0301 CAFÉ naïve Ångström A\u030angstro\u0308m über Straße STRASSE ẞ İstanbul IĞDIR "
    "ŒUVRE đ Ǆ ǆ ŉ ĳ ﬁne oﬃce ﬆ ſ Łódź crème ΟΔΟΣ Σίσυφος ΣΑΣ ΑΣᶲ ᶲΣ Α'Σ' Σ. Ὀδυσσεύς Москва ЁЖ "
    "й и\u0306 السَّلام كتاب שָׁלוֹם ספר नमस्ते क्षत्रिय தமிழ் বাংলা ไทย ქართული Հայ አማርኛ 繁體 漢字 "
    "日本語 かな が か\u3099 ｶﾞｷﾞﾊﾟ 한국어 \u1112\u1161\u11ab ＡＢｃ１２！ ＂ｑ＇ ￥ ￡ \u212b \u2126 "
    "ﾡ K ՙա ªº ʰ ⓐ 𝔸 𝒜 𐐀 ١٢ ४५ 五"
).split()
SYMBOLS = (
    "👍🏽 👨\u200d👩\u200d👧 \U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
    " 🇫🇷 ❤\ufe0f ❤ 🎉🎉 😂!! ✓ ★ → € £5 © ® ™ ° µ ¿ ¡ « » ‹ › † • … – — ― − × ÷ ‰ ′ ″ “hi” ‘hi’ "
    "„hi‟ ‚hi‛ it’s ʼn `a` ´ ¨ ... !!! ?! -- ''' 's' !'s \"\" () [] {} /\\ ~ ^_^ $$ %% && & &; &# "
    "&#; &#x; &x; &nosuch; &#xZZ; * + = | a|b ≠ =\u0338 \u0301"
).split()
ODD = [
    *(chr(c) for c in range(0x20)),
    *(chr(c) for c in range(0x110000) if chr(c).isspace()),
    *"\x7f\xad\u180e\u200b\u200c\u200d\u200e\u202a\u2060\u206a\u206f\ufeff\ufff9\ufffc\ufffd",
    "\r\n",
    "\n",
    "\x1b[31mred\x1b[0m",
    "\x1b[1;32m",
    "\x1b",
]
MARKUP = [*MARKERS, "<", "<b>", "</p>", "<br/>", "a<b", "<3\u0338"]
# The characters that this Python's Unicode has, but for combining ones that have come since its
# version 3.2: the library orders those that have come since version 9 in another way.
ASSIGNED = [
    c
    for c in map(chr, range(0x110000))
    if unicodedata.category(c) not in ("Cn", "Co", "Cs", "Cc")
    and unicodedata.combining(c) == unicodedata.ucd_3_2_0.combining(c)
]
NUMBERS = [*range(0x100), *range(0x2000, 0x2070)]
NUMBERS += [ord(html.unescape(f"&{name};")) for name in html.entities.name2codepoint]
NAMES = [
    *(name + ";" for name in html.entities.name2codepoint),
    *(name for name in html.entities.html5 if not name.endswith(";")),
    "apos;",
    "NewLine;",
    "check;",
    "acy;",
    "zcaron;",
    "fflig;",
]
CAPITALS = ["&EACUTE;", "&NTILDE;", "&SZLIG;", "&RSQUO;", "&LAQUO;"]  # that only ftfy knows


def _reference(random):
    number = random.choice(NUMBERS)
    text = random.choice(
        [
            f"&{random.choice(NAMES)}",
            f"&#{number};",
            f"&#x{number:x};",
            f"&#X{number:04X};",
            f"&#{number:05} ",
            f"&#x{number:X} ",
        ]
    )
    for _ in range(random.choice([0, 0, 0, 1, 2, 3])):
        text = text.replace("&", random.choice(["&amp;", "&amp", "&AMP;", "&#38;", "&#x26;"]))
    return text


def _word(random):
    text = random.choice(WORDS)
    return random.choice([text, text, text.upper(), text.title()])


def _characters(random):
    start = random.randrange(len(ASSIGNED) - 50)
    return "".join(random.choices(ASSIGNED[start : start + 50], k=random.randrange(1, 8)))


def _text(random):
    others = [
        lambda random: random.choice(LETTERS),
        lambda random: random.choice(SYMBOLS),
        lambda random: random.choice(ODD),
        _reference,
        _characters,
        random.choice(
            [lambda random: random.choice(MARKUP), lambda random: random.choice(CAPITALS)]
        ),
    ]
    # Mostly words, and up to two kinds of other things.
    kinds = [_word, _word, *random.sample(others, random.randrange(3))]
    pieces = []
    for _ in range(random.randrange(25)):
        pieces += [random.choice(kinds)(random), random.choice([" ", " ", " ", "", ", ", "\n"])]
    return "".join(pieces)


@pytest.fixture(scope="module")
def texts():
    """10,000 texts of all kinds but those that ftfy guesses at."""
    random = Random(0)
    texts = ["", " ", "\x00", "a", "Σ", "dog " * 9000, " " * 9999 + "dog cat"]
    while len(texts) < 10_000:
        text = _text(random)
        if ftfy.fix_text(text) == ftfy.fix_text(text, fix_encoding=False):
            texts.append(text)
    return texts


def _ids_by_merging(word, ranks):
    """Byte-pair encoding as papers tell it: the first merge that applies, wherever it does."""
    visible = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    spelling = visible + [b for b in range(256) if b not in visible]
    spelling = {
        b: chr(b) if b in visible else chr(0x100 + i - len(visible)) for i, b in enumerate(spelling)
    }
    parts = [spelling[b] for b in word.encode()]
    parts[-1] += "</w>"
    while pairs := ranks.keys() & set(zip(parts, parts[1:], strict=False)):
        first = min(pairs, key=ranks.__getitem__)
        joined = []
        for part in parts:
            if joined and (joined[-1], part) == first:
                joined[-1] += part
            else:
                joined.append(part)
        parts = joined
    return [vocabulary()[part] for part in parts]


def test_vocabulary():
    ids = vocabulary()
    assert sorted(ids.values()) == list(range(49408))
    known = {"!": 0, "!</w>": 256, "in": 512, "a</w>": 320, "person</w>": 2533, "jekyll</w>": 49405}
    known |= {
        "motorcycle</w>": 10297,
        "Ã©</w>": 4166,
        "ï¿½</w>": 39802,
        START: CLIP_TOKENIZER.start,
        END: CLIP_TOKENIZER.end,
    }
    assert {token: ids.get(token) for token in known} == known


def test_merges():
    assert len(merges()) == 48894
    assert merges()[:2] == [("i", "n"), ("t", "h")] and merges()[-1] == ("jeky", "ll</w>")
    assert ["".join(pair) for pair in merges()] == list(vocabulary())[512 : CLIP_TOKENIZER.start]


def test_merging_gives_the_ids(texts):
    def one_word(word):
        kinds = {unicodedata.category(c)[0] for c in word}
        return kinds == {"L"} or kinds <= set("PSM") and "'" not in word

    words = {
        word for text in texts for word in CLIP_TOKENIZER.clean(text).split() if one_word(word)
    }
    words = sorted(word for word in words if CLIP_TOKENIZER.clean(word) == word)
    words = Random(0).sample(words, 500) + ["\ufffd", "🎉🎉", "漢字", "é"]
    ranks = {pair: rank for rank, pair in enumerate(merges())}
    for word, ids in zip(words, CLIP_TOKENIZER.encode(words, 300), strict=True):
        merged = [CLIP_TOKENIZER.start, *_ids_by_merging(word, ranks), CLIP_TOKENIZER.end]
        assert merged == ids[: ids.argmax() + 1].tolist(), word


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, CONTEXT)
    image = {
        "image_processor_type": "CLIPImageProcessor",
        **{f"do_{what}": True for what in ("resize", "center_crop", "rescale", "normalize")},
        "size": {"shortest_edge": 224},
        "crop_size": {"height": 224, "width": 224},
        "resample": 3,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "config.json").write_text(json.dumps({"model_type": "clip"}))
    return folder


def test_files(folder):
    vocab, tokenizer, config, special = (
        json.loads((folder / f"{name}.json").read_text("utf-8"))
        for name in ("vocab", "tokenizer", "tokenizer_config", "special_tokens_map")
    )
    lines = (folder / "merges.txt").read_text("utf-8").split("\n")
    assert lines[0] == "#version: 0.2" and lines[-1] == ""
    assert [tuple(line.split(" ")) for line in lines[1:-1]] == merges()
    assert vocab == tokenizer["model"]["vocab"] == vocabulary()
    assert [tuple(pair) for pair in tokenizer["model"]["merges"]] == merges()
    assert config["model_max_length"] == CONTEXT
    assert config["pad_token"] == special["pad_token"] == END
    assert config["bos_token"] == special["bos_token"] == START


def test_it_is_the_trained_tokenizer_behind_rules_for_raw_texts(folder, texts):
    exported = Tokenizer.from_file(str(folder / "tokenizer.json"))
    one, other = json.loads(exported.to_str()), json.loads(build().to_str())
    assert one.pop("normalizer") and other.pop("normalizer") is None
    assert one == other
    assert exported.decode([]) == "" and exported.decode([320, 2368]) == "a cat"
    exported.enable_truncation(CONTEXT)
    exported.enable_padding(length=CONTEXT, pad_id=0)
    texts = texts[::4]  # all of them in the hands of Transformers, below
    ids = np.array([encoding.ids for encoding in exported.encode_batch_fast(texts)])
    _assert_same(ids, CLIP_TOKENIZER.encode(texts, CONTEXT), texts)


def _ids(tokenizer, texts):
    """Its ids, with zeros for padding, as `encode` has it."""
    batch = tokenizer(
        text=texts,
        padding="max_length",
        truncation=True,
        max_length=CONTEXT,
        return_tensors="np",
    )
    assert set(batch) == {"input_ids", "attention_mask"}
    return np.where(batch["attention_mask"], batch["input_ids"], 0)


def _assert_same(theirs, ours, texts):
    wrong = np.flatnonzero((theirs != ours).any(1))
    assert not len(wrong), f"{len(wrong)}, as {[texts[i][:1000] for i in wrong[:5]]}"


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def test_a_processor_gives_the_ids(transformers, folder, texts):
    processor = transformers.CLIPProcessor.from_pretrained(folder)
    _assert_same(_ids(processor, texts), CLIP_TOKENIZER.encode(texts, CONTEXT), texts)


def test_an_auto_tokenizer_gives_the_ids(transformers, folder, texts):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    _assert_same(_ids(tokenizer, texts[:500]), CLIP_TOKENIZER.encode(texts[:500], CONTEXT), texts)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (
        CLIP_TOKENIZER.start,
        CLIP_TOKENIZER.end,
        CLIP_TOKENIZER.end,
    )
    assert tokenizer.model_max_length == CONTEXT and len(tokenizer) == len(vocabulary())
    ids = tokenizer("A dog’s life", truncation=True)["input_ids"]
    assert ids[0] == CLIP_TOKENIZER.start and ids[-1] == CLIP_TOKENIZER.end
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a dog 's life"
    assert (
        tokenizer.decode([CLIP_TOKENIZER.start, CLIP_TOKENIZER.end], skip_special_tokens=True) == ""
    )


@pytest.mark.parametrize("name", ["CLIPTokenizer", "CLIPTokenizerFast"])
def test_clips_own_tokenizers_give_the_ids_of_clean_texts(transformers, folder, texts, name):
    tokenizer = getattr(transformers, name).from_pretrained(folder)
    cleaned = [CLIP_TOKENIZER.clean(text) for text in texts[:500]]
    cleaned = [text for text in cleaned if CLIP_TOKENIZER.clean(text) == text]
    assert len(cleaned) > 450
    _assert_same(_ids(tokenizer, cleaned), CLIP_TOKENIZER.encode(cleaned, CONTEXT), cleaned)


def test_what_ftfy_guesses_is_the_same_once_clean(transformers, folder):
    guessed = ["CafÃ© Ã\xa0 la carte", "â€œhiâ€\x9d", "ÐŸÑ€Ð¸Ð²ÐµÑ‚ &amp; Ñ‚Ñ‹", "ä¸\xadæ–‡"]
    cleaned = [CLIP_TOKENIZER.clean(text) for text in guessed]
    assert cleaned == ["café à la carte", '"hi"', "привет & ты", "中文"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    _assert_same(_ids(tokenizer, cleaned), CLIP_TOKENIZER.encode(guessed, CONTEXT), guessed)


@pytest.mark.parametrize("marker", [*MARKERS, "&lt;end_of_text&gt;", "＜|endoftext|＞"])
def test_no_text_gives_special_ids(transformers, folder, marker):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(f"a cat {marker} on a mat")["input_ids"]
    assert ids == [i for i in CLIP_TOKENIZER.encode([f"a cat {marker} on a mat"], CONTEXT)[0] if i]
    assert (ids.count(CLIP_TOKENIZER.start), ids.count(CLIP_TOKENIZER.end)) == (1, 1)


def test_open_clip_has_these_merges_and_ids(texts):
    tokenizer = pytest.importorskip("open_clip.tokenizer").SimpleTokenizer(context_length=CONTEXT)
    assert list(tokenizer.bpe_ranks) == merges()
    # Of markers it makes special ids, and it reads a text to its end.
    texts = [t for t in texts if "of_text" not in t.lower() and len(t) <= 10_000]
    texts = [t for t in texts if "oftext" not in t.lower()][:1000]
    _assert_same(tokenizer(texts).numpy(), CLIP_TOKENIZER.encode(texts, CONTEXT), texts)
