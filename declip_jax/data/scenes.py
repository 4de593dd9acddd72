"""The built-in data set: drawn scenes of one to three objects with captions, nothing to download.

A scene is a function of (split, index) alone: an index gives the same image and captions in every
run and process, so an endless training set needs no disk. An object has a shape, a colour, a
texture and a size; a fifth of these 640 combinations is held out from training.

    train      one to three objects of the training combinations; captions leave some details out
    test       for retrieval: one to three objects of the held-out combinations; captions name
               every attribute, and where things are
    zeroshot   one object of the held-out combinations, labelled with its colour and shape: 80
               classes such as "red star", ten images each

Training shows every class in at least six of its eight textures and sizes: evaluation asks for new
combinations of known words, never for new words.

Captions speak of colours, left and right: flips and strong colour jitter or crops make them untrue.
"""

import functools
import itertools
import math
import random
from typing import NamedTuple

import cv2
import numpy as np

SHAPES = (
    *("circle", "square", "triangle", "star", "heart"),
    *("ring", "crescent", "cross", "arrow", "diamond"),
)
COLOURS = {
    "red": (215, 30, 35),
    "orange": (250, 130, 10),
    "yellow": (245, 215, 25),
    "green": (35, 160, 65),
    "cyan": (40, 205, 215),
    "blue": (45, 85, 235),
    "purple": (145, 60, 205),
    "pink": (250, 130, 195),
}
TEXTURES = ("solid", "striped", "dotted", "checked")
SIZES = ("small", "large")
BACKGROUNDS = ("white", "grey", "black")
PLACES = (  # row by row in a 3 x 3 grid
    *("at the top left", "at the top", "at the top right"),
    *("on the left", "in the middle", "on the right"),
    *("at the bottom left", "at the bottom", "at the bottom right"),
)
# Captions use either word.
SYNONYMS = {
    **{"circle": "disc", "ring": "hoop", "crescent": "moon", "cross": "plus sign"},
    **{"diamond": "rhombus", "cyan": "turquoise", "purple": "violet", "solid": "plain"},
    **{"striped": "stripy", "dotted": "spotted", "checked": "chequered"},
    **{"small": "little", "large": "big", "below": "under", "in the middle": "in the centre"},
    **{"at the top left": "in the upper left corner", "at the top": "near the top edge"},
    **{"at the top right": "in the upper right corner", "on the left": "on the left side"},
    **{"at the bottom left": "in the lower left corner", "at the bottom": "near the bottom edge"},
    **{"at the bottom right": "in the lower right corner", "on the right": "on the right side"},
}
CLASS_NAMES = tuple(f"{colour} {shape}" for shape in SHAPES for colour in COLOURS)
SPLITS = {"train": 10_000_000, "test": 1_000, "zeroshot": 10 * len(CLASS_NAMES)}
CAPTIONS = 5  # an image

_RADIUS = (0.13, 0.21)  # by size, of the image side
_CENTRE = ((0.2, 0.5, 0.8), (0.27, 0.5, 0.73))  # by size, then by row or column


class Thing(NamedTuple):
    """An object: indices into SHAPES, COLOURS, TEXTURES and SIZES."""

    shape: int
    colour: int
    texture: int
    size: int


class Scene(NamedTuple):
    """What a scene shows: objects, their (row, column) places, an index into BACKGROUNDS."""

    things: tuple[Thing, ...]
    places: tuple[tuple[int, int], ...]
    background: int


def held_out(thing: Thing) -> bool:
    """Whether training never shows this combination: one or two of the eight of each class."""
    return (thing.shape + thing.colour + 2 * thing.texture + 3 * thing.size) % 5 == 0


_THINGS = [Thing(*i) for i in itertools.product(range(10), range(8), range(4), range(2))]
_TRAINING = [thing for thing in _THINGS if not held_out(thing)]
_HELD_OUT = [thing for thing in _THINGS if held_out(thing)]


def describe(split: str, index: int, rng: random.Random) -> Scene:
    """Chooses what a scene shows."""
    pool, count, things = _TRAINING, rng.choice((1, 2, 3)), []
    if split == "test":
        # Combinations and counts take turns. As three does not divide 128, a combination is alone
        # in a scene only once in 384, so that its caption fits no other.
        pool, count, things = _HELD_OUT, 1 + index % 3, [_HELD_OUT[index % len(_HELD_OUT)]]
    elif split == "zeroshot":
        turn, label = divmod(index, len(CLASS_NAMES))
        pool = [t for t in _HELD_OUT if t.shape * len(COLOURS) + t.colour == label]
        count, things = 1, [pool[turn % len(pool)]]
    while len(things) < count:
        thing = rng.choice(pool)
        if all(thing[:2] != other[:2] for other in things):  # tell each by colour and shape
            things.append(thing)
    places = rng.choice(_layouts(tuple(thing.size for thing in things)))
    return Scene(tuple(things), places, rng.randrange(len(BACKGROUNDS)))


@functools.cache
def _layouts(sizes: tuple[int, ...]) -> list[tuple[tuple[int, int], ...]]:
    """Every choice of a (row, column) for each object that keeps objects of these sizes apart."""

    def apart(a, b):
        (size_a, place_a), (size_b, place_b) = a, b
        centre_a = [_CENTRE[size_a][i] for i in place_a]
        centre_b = [_CENTRE[size_b][i] for i in place_b]
        return math.dist(centre_a, centre_b) > _RADIUS[size_a] + _RADIUS[size_b] + 0.03

    return [
        places
        for places in itertools.permutations(itertools.product(range(3), repeat=2), len(sizes))
        if all(apart(*two) for two in itertools.combinations(zip(sizes, places, strict=True), 2))
    ]


def caption(scene: Scene, detail: float, rng: random.Random) -> str:
    """A true caption; it tells each size, texture and the places with probability `detail`."""

    def word(name):
        return rng.choice((name, SYNONYMS.get(name, name)))

    phrases, placed = [], []
    order = rng.sample(range(len(scene.things)), len(scene.things))
    for thing, (row, column) in ((scene.things[i], scene.places[i]) for i in order):
        words = [SIZES[thing.size]] if rng.random() < detail else []
        words += [TEXTURES[thing.texture]] if rng.random() < detail else []
        words += [_COLOUR_NAMES[thing.colour], SHAPES[thing.shape]]
        text = " ".join(map(word, words))
        phrases.append(f"an {text}" if text[0] in "aeiou" else f"a {text}")
        placed.append(f"{phrases[-1]} {word(PLACES[3 * row + column])}")

    if rng.random() >= detail:
        body = _listed(phrases)
    elif len(phrases) == 1 or rng.random() < 0.5:
        body = _listed(placed)
    else:
        (row, column), (other_row, other_column) = (scene.places[i] for i in order[:2])
        relation = []
        if row != other_row:
            relation.append(word("above" if row < other_row else "below"))
        if column != other_column:
            side = "left of" if column < other_column else "right of"
            relation.append(rng.choice((side, f"to the {side}")))
        body = f"{phrases[0]} {' and '.join(relation)} {phrases[1]}"
        body += "".join(f", and {other}" for other in placed[2:])

    opening = rng.choice(("", "there is ", "a picture of ", "an image of "))
    if len(phrases) > 1 and rng.random() < 0.25:
        shapes, colours = ({thing[i] for thing in scene.things} for i in (0, 1))
        noun = SHAPES[shapes.pop()] if len(shapes) == 1 else "shape"
        noun = f"{_COLOUR_NAMES[colours.pop()]} {noun}" if len(colours) == 1 else noun
        plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
        opening = f"{('two', 'three')[len(phrases) - 2]} {plural}: "
    if rng.random() < 0.3:
        body += f", on a {BACKGROUNDS[scene.background]} background"
    return opening + body


def _listed(phrases: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def _polygons(*polygons) -> np.ndarray:
    """float32 [P, N, 2]: polygons with fewer than N corners repeat their last one."""
    most = max(map(len, polygons))
    return np.array([[*p, *[p[-1]] * (most - len(p))] for p in polygons], np.float32)


def _arc(corners, radius=1.0, start=-90.0, stop=270.0, x=0.0, y=0.0) -> list:
    """Corners on a circle about (x, y); degrees from the right by way of the bottom."""
    angles = np.radians(np.linspace(start, stop, corners, endpoint=False))
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


def _box(x, y, width, height) -> list:
    """Corners of a box about (x, y), of half this width and height."""
    return [(x - width, y - height), (x + width, y - height)] + [
        (x + width, y + height),
        (x - width, y + height),
    ]


# Outlines within a radius of 1.1, y downwards. Filling is even-odd, which leaves the ring its hole.
_OUTLINES = (
    _polygons(_arc(32)),
    _polygons(_box(0, 0, 0.78, 0.78)),
    _polygons(_arc(3, 1.1)),
    _polygons(sum(zip(_arc(5, 1.1), _arc(5, 0.46, -54, 306), strict=True), ())),
    _polygons(
        [
            (0.97 * math.sin(t) ** 3, 0.13 - 0.87 * math.cos(t) + math.cos(2 * t) / 3)
            for t, _ in _arc(32)
        ]
    ),
    _polygons(_arc(32, 1.05), _arc(32, 0.5)),
    _polygons(_arc(32, 1.05, 50, 310, x=0.15) + _arc(24, 0.835, 285.6, 74.4, x=0.6)),
    _polygons(_box(0, 0, 0.34, 1), _box(-0.67, 0, 0.33, 0.34), _box(0.67, 0, 0.33, 0.34)),
    _polygons([(-1.05, -0.3), (0, -0.3), (0, -0.85), (1.05, 0), (0, 0.85), (0, 0.3), (-1.05, 0.3)]),
    _polygons([(0, -1.1), (0.68, 0), (0, 1.1), (-0.68, 0)]),
)
