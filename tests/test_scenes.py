"""Scenes are the same in every run, show what they say, and keep held-out combinations apart."""

import collections
import itertools
import pickle
import random
import re

import numpy as np
import pytest

from declip_jax.data import scenes
from declip_jax.data.scenes import HELD_OUT, TRAINING, Scene, Scenes, Thing


def _described(split, index):
    return scenes.describe(split, index, random.Random(f"{split} {index}"))


def _drawn(thing, background="white", size=64):
    """The thing alone in the middle, float [size, size, 3]."""
    scene = Scene(((thing, 1, 1),), background)
    return scenes.draw(scene, size, random.Random(0)).astype(float)


def _colored(image):
    """Pixels of objects, in either tone of a texture: backgrounds are gray."""
    return image.max(-1).astype(int) - image.min(-1) > 60


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_same_record_from_every_copy(split):
    first = Scenes(split)
    again = pickle.loads(pickle.dumps(first))
    for index in (0, 7, len(first) - 1):
        a, b = first[index], again[np.int64(index)]
        np.testing.assert_array_equal(a.pop("image"), b.pop("image"))
        assert a == b
    assert not np.array_equal(first[0]["image"], first[1]["image"])


def test_scenes_stay_what_they_were():
    # Runs are compared with earlier ones: a changed scene must be a decision, not an accident.
    thing = Thing("cross", "purple", "dotted", "small")
    assert _described("train", 5) == Scene(((thing, 2, 1),), "grey")
    assert Scenes("train")[5]["captions"] == [
        "a violet plus sign",
        "an image of a purple plus sign",
        "there is a violet plus sign at the bottom",
        "there is a spotted purple plus sign",
        "an image of a small spotted purple plus sign at the bottom, on a grey background",
    ]
    assert Scenes("test")[1]["captions"][0] == (
        "a picture of a big stripy red circle above and right of a big stripy blue disc, "
        "on a grey background"
    )
    # The mean only: another release of OpenCV may round a pixel otherwise.
    mean = Scenes("train")[5]["image"].mean((0, 1))
    np.testing.assert_allclose(mean, [125.5, 121.2, 129.0], atol=0.5)


def test_records():
    for split, size in (("train", 64), ("test", 33), ("zeroshot", 48)):
        record = Scenes(split, size)[3]
        assert record["image"].shape == (size, size, 3) and record["image"].dtype == np.uint8
        assert record["image"].flags.c_contiguous
        assert len(set(record["captions"])) == 5
        assert len(record["synthetic"]) == 1
        assert record["key"] == f"{split}-3"
        assert ("label" in record) == (split == "zeroshot") == bool(Scenes(split).class_names)


def test_held_out_combinations():
    assert len(HELD_OUT) == 128 and len(TRAINING) == 512 and not set(HELD_OUT) & set(TRAINING)
    held = collections.Counter(thing[:2] for thing in HELD_OUT)
    assert len(held) == 80 and set(held.values()) == {1, 2}
    for shape, texture, size in itertools.product(scenes.SHAPES, scenes.TEXTURES, scenes.SIZES):
        of_kind = [t for t in TRAINING if (t.shape, t.texture, t.size) == (shape, texture, size)]
        assert len(of_kind) >= 6
    for split, allowed in (("train", TRAINING), ("test", HELD_OUT), ("zeroshot", HELD_OUT)):
        indices = range(min(len(Scenes(split)), 800))
        shown = [_described(split, index).objects for index in indices]
        assert {thing for objects in shown for thing, _, _ in objects} <= set(allowed)
        assert {len(objects) for objects in shown} == ({1} if split == "zeroshot" else {1, 2, 3})


def test_zeroshot_classes():
    source = Scenes("zeroshot", 16)
    assert len(source.class_names) == len(set(source.class_names)) >= 64
    labels = []
    for index in range(len(source)):
        ((thing, _, _),) = _described("zeroshot", index).objects
        labels.append(source[index]["label"])
        assert source.class_names[labels[-1]] == f"{thing.color} {thing.shape}"
    assert set(collections.Counter(labels).values()) == {10}


NAMES = {word: name for name, word in scenes.SYNONYMS.items()}
PLACES = {name: divmod(i, 3) for i, name in enumerate(sum(scenes.PLACES, ()))}


def _any_of(words):
    return "|".join(sorted(words, key=len, reverse=True))


PHRASE = re.compile(
    rf"\ban? (?:(?P<size>{_any_of(scenes.SIZES)}) )?"
    rf"(?:(?P<texture>{_any_of(scenes.TEXTURES)}) )?(?P<color>{_any_of(scenes.COLORS)}) "
    rf"(?P<shape>{_any_of(scenes.SHAPES)})\b(?: (?P<place>{_any_of(PLACES)}))?"
)


def _read(caption, scene):
    """Asserts that every word of the caption is true of the scene; returns the phrases."""
    plain = re.sub(rf"\b(?:{_any_of(NAMES)})\b", lambda match: NAMES[match[0]], caption)
    if match := re.search(r", on a (\w+) background$", plain):
        assert match[1] == scene.background
        plain = plain[: match.start()]
    if match := re.match(r"(two|three) (?:(\w+) )?(\w+): ", plain):
        number, color, noun = match.groups()
        assert {"two": 2, "three": 3}[number] == len(scene.objects)
        assert not color or {thing.color for thing, _, _ in scene.objects} == {color}
        shapes = {
            f"{t.shape}es" if t.shape == "cross" else f"{t.shape}s" for t, _, _ in scene.objects
        }
        assert noun == "shapes" or shapes == {noun}
    else:
        match = re.match("there is |a picture of |an image of |", plain)
    plain = plain[match.end() :]

    phrases = list(PHRASE.finditer(plain))
    objects = []
    for phrase in phrases:
        said = phrase.groupdict()
        place = said.pop("place")
        (found,) = [
            (thing, row, column)
            for thing, row, column in scene.objects
            if all(value in (None, getattr(thing, field)) for field, value in said.items())
        ]
        objects.append(found)
        assert not place or PLACES[place] == found[1:]
    assert sorted(objects) == sorted(scene.objects)

    gaps = PHRASE.sub("#", plain)
    if gaps not in ("#", "# and #", "#, # and #"):
        match = re.fullmatch("# (above|below)?(?: and )?(left of|right of)? #(, and #)?", gaps)
        assert match, caption
        (_, row, column), (_, other_row, other_column) = objects[:2]
        assert match[1] == {-1: "above", 0: None, 1: "below"}[np.sign(row - other_row)]
        assert match[2] == {-1: "left of", 0: None, 1: "right of"}[np.sign(column - other_column)]
    return phrases


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_captions_are_true(split):
    source = Scenes(split, 16)
    for index in range(min(len(source), 500)):
        scene = _described(split, index)
        for caption in source[index]["captions"]:
            for phrase in _read(caption, scene):
                assert split == "train" or phrase["size"] and phrase["texture"], caption
            for article, letter in re.findall(r"\b(an?) (\w)", caption):
                assert (article == "an") == (letter in "aeiou"), caption


@pytest.mark.parametrize("split", scenes.SPLITS)
def test_synthetic_captions_name_colors_and_shapes_alone(split):
    source = Scenes(split, 16)
    for index in range(100):
        (caption,) = source[index]["synthetic"]
        for phrase in _read(caption, _described(split, index)):
            assert not (phrase["size"] or phrase["texture"] or phrase["place"])
        assert not re.search(_any_of(NAMES), caption)


def test_captions_of_training_use_every_word():
    source = Scenes("train", 16)
    captions = " ".join(caption for index in range(1000) for caption in source[index]["captions"])
    vocabulary = [*scenes.SHAPES, *scenes.COLORS, *scenes.TEXTURES, *scenes.SIZES, *PLACES]
    vocabulary += [*scenes.BACKGROUNDS, *scenes.SYNONYMS, *NAMES, "above"]
    missing = [word for word in vocabulary if not re.search(rf"\b{word}\b", captions)]
    assert not missing


def test_captions_of_training_tell_from_colors_and_shapes_alone_to_everything():
    source = Scenes("train", 16)
    for index in range(100):
        scene = _described("train", index)
        first, second, *_, last = (_read(text, scene) for text in source[index]["captions"])
        for phrase in first + second:
            assert not (phrase["size"] or phrase["texture"] or phrase["place"])
        for phrase in last:
            assert phrase["size"] and phrase["texture"]
            assert phrase["place"] or len(last) > 1  # two are told by how they lie to each other


def test_retrieval_captions_are_unique():
    source = Scenes("test", 16)
    captions = [caption for index in range(len(source)) for caption in source[index]["captions"]]
    assert len(set(captions)) == len(captions) == 5 * 256


@pytest.mark.parametrize("size", [32, 64])
def test_colors_and_sizes_are_those_named(size):
    palette = np.array(list(scenes.COLORS.values()), float)
    areas = {}
    for thing in TRAINING + HELD_OUT:
        image = _drawn(thing, size=size)
        colored = _colored(image)
        # The purest pixels: others are mixed with the background or of a texture's darker tone.
        pixels = image[colored]
        spread = pixels.max(-1) - pixels.min(-1)
        color = np.median(pixels[spread >= np.quantile(spread, 0.7)], 0)
        nearest = np.abs(palette - color).sum(-1).argmin()
        assert list(scenes.COLORS)[nearest] == thing.color, (thing, color)
        areas[thing] = colored.sum()
    for thing, area in areas.items():
        if thing.size == "small":
            assert areas[thing._replace(size="large")] > 2 * area, thing


def test_objects_are_where_they_should_be():
    source = Scenes("train")
    for index in range(300):
        scene, colored = _described("train", index), _colored(source[index]["image"])
        assert len({(row, column) for _, row, column in scene.objects}) == len(scene.objects)
        if len(scene.objects) == 1:
            ((_, row, column),) = scene.objects
            # The middle is narrow: large objects lie close to it, and crescents bulge to one side.
            centroid = np.argwhere(colored).mean(0) / 63
            assert tuple(np.digitize(centroid, (0.4, 0.6))) == (row, column), scene


def test_shapes_and_textures_look_different():
    kinds = itertools.product(scenes.SHAPES, scenes.TEXTURES)
    drawn = {kind: _drawn(Thing(kind[0], "red", kind[1], "large")) for kind in kinds}
    for a, b in itertools.combinations(drawn, 2):
        # By brightness, not outline: a texture is a darker tone of the object's color.
        differ = np.abs(drawn[a] - drawn[b]).max(-1) > 50
        either = _colored(drawn[a]) | _colored(drawn[b])
        assert (differ & either).sum() > 0.15 * either.sum(), (a, b)


def test_edges_are_smooth():
    image = _drawn(Thing("circle", "blue", "solid", "large"))
    red = image[..., 0]  # white background: about 225; blue: about 45
    between = (red > 80) & (red < 190)
    # A circle of radius 17 has an edge of 107 pixels.
    assert 40 < between.sum() < 110


def test_part_of_a_split():
    whole, part = Scenes("train"), Scenes("train[:1000]")
    assert len(part) == 1000
    assert part[999]["captions"] == whole[999]["captions"]
    with pytest.raises(IndexError, match="1000"):
        part[1000]


def test_wrong_arguments_are_named():
    for split in ("validation", "train[:0]", "test[:257]", "train[1:]", ""):
        with pytest.raises(ValueError, match=f"{re.escape(repr(split))}.*train, test, zeroshot"):
            Scenes(split)
    with pytest.raises(ValueError, match="16 pixels.*not 8"):
        Scenes("train", 8)
    for index in (-1, 256):
        with pytest.raises(IndexError, match=f"{index}.*'test'"):
            Scenes("test")[index]
