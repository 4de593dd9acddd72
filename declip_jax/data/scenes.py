"""The built-in data set: drawn scenes of one to three objects with captions, nothing to download.

A scene is a function of (split, index) alone: an index gives the same image and captions in every
run and process, so an endless training set needs no disk. An object has a shape, a color, a
texture and a size; a fifth of these 640 combinations is held out from training.

    train      one to three objects, most often one, of the training combinations; of an image's
               captions the first two name colors and shapes alone, the last tells everything
    test       for retrieval: one to three objects of the held-out combinations; captions name
               every attribute, and where things are
    zeroshot   one object of the held-out combinations, labeled with its color and shape: 80
               classes such as "red star", ten images each

Training shows every class in at least six of its eight textures and sizes: evaluation asks for new
combinations of known words, never for new words.

Captions speak of colors, left and right: flips and strong color jitter or crops make them untrue.
The synthetic caption is what a cautious model would write: all colors and shapes, nothing else.
"""

import functools
import itertools
import math
import random
import re
from typing import NamedTuple

import cv2
import numpy as np

from declip_jax.data.sources.base import Source

SHAPES = "circle square triangle star heart ring crescent cross arrow diamond".split()
COLORS = {
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
SIZES = {"small": 0.17, "large": 0.27}  # radius, of the image side
BACKGROUNDS = {"white": 225, "grey": 135, "black": 30}  # brightness
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
SYNONYMS = {
    "circle": "disc",
    "ring": "hoop",
    "crescent": "moon",
    "cross": "plus sign",
    "diamond": "rhombus",
    "cyan": "turquoise",
    "purple": "violet",
    "solid": "plain",
    "striped": "stripy",
    "dotted": "spotted",
    "checked": "chequered",
    "small": "little",
    "large": "big",
    "in the middle": "in the centre",
    "at the top left": "in the upper left corner",
    "at the top right": "in the upper right corner",
    "at the bottom left": "in the lower left corner",
    "at the bottom right": "in the lower right corner",
    "below": "under",
    "left of": "to the left of",
    "right of": "to the right of",
}
CLASS_NAMES = tuple(f"{color} {shape}" for shape in SHAPES for color in COLORS)
SPLITS = {"train": 10_000_000, "test": 256, "zeroshot": 10 * len(CLASS_NAMES)}

# Where the middle of an object lies, by its row or column in PLACES: large ones lie further in, so
# that the edge cuts off little of them.
_CENTERS = {"small": (0.2, 0.5, 0.8), "large": (0.29, 0.5, 0.71)}


class Thing(NamedTuple):
    """An object, by names from SHAPES, COLORS, TEXTURES and SIZES."""

    shape: str
    color: str
    texture: str
    size: str


class Scene(NamedTuple):
    """What a scene shows: (object, row, column in PLACES) of each, a name from BACKGROUNDS."""

    objects: tuple[tuple[Thing, int, int], ...]
    background: str


TRAINING: list[Thing] = []
HELD_OUT: list[Thing] = []
for (_s, _shape), (_c, _color), (_t, _texture), (_z, _size) in itertools.product(
    *map(enumerate, (SHAPES, COLORS, TEXTURES, SIZES))
):
    # Takes one or two of the eight combinations of each class, of all textures and sizes alike.
    _pool = HELD_OUT if (_s + _c + 2 * _t + 3 * _z) % 5 == 0 else TRAINING
    _pool.append(Thing(_shape, _color, _texture, _size))


def describe(split: str, index: int, rng: random.Random) -> Scene:
    """Chooses what a scene shows."""
    pool, count, things = TRAINING, rng.choice((1, 1, 1, 2, 2, 3)), []
    if split == "test":
        # The 128 combinations and the three counts take turns, so that no combination is alone in
        # two of the scenes: a caption would be true of both.
        pool, count, things = HELD_OUT, 1 + index % 3, [HELD_OUT[index % len(HELD_OUT)]]
    elif split == "zeroshot":
        turn, label = divmod(index, len(CLASS_NAMES))
        pool = [thing for thing in HELD_OUT if _class_name(thing) == CLASS_NAMES[label]]
        count, things = 1, [pool[turn % len(pool)]]
    while len(things) < count:
        thing = rng.choice(pool)
        told_apart = all(thing[:2] != other[:2] for other in things)  # by shape and color
        # There is no layout of three large ones.
        if told_apart and _layouts(tuple(other.size for other in (*things, thing))):
            things.append(thing)
    places = rng.choice(_layouts(tuple(thing.size for thing in things)))
    objects = tuple((thing, *place) for thing, place in zip(things, places, strict=True))
    return Scene(objects, rng.choice(tuple(BACKGROUNDS)))


@functools.cache
def _layouts(sizes: tuple[str, ...]) -> list[tuple[tuple[int, int], ...]]:
    """Every choice of a (row, column) for each object that keeps objects of these sizes apart.

    Corners may touch: about one pair in forty overlaps a little.
    """

    def apart(a, b):
        centers = [[_CENTERS[size][i] for i in place] for size, place in (a, b)]
        return math.dist(*centers) > 0.9 * (SIZES[a[0]] + SIZES[b[0]])

    cells = list(itertools.product(range(3), range(3)))
    return [
        places
        for places in itertools.permutations(cells, len(sizes))
        if all(apart(*two) for two in itertools.combinations(zip(sizes, places, strict=True), 2))
    ]


def caption(scene: Scene, detail: float, rng: random.Random) -> str:
    """A true caption; it tells each size, texture and the places with probability `detail`."""

    def word(name):
        return rng.choice((name, SYNONYMS.get(name, name)))

    objects = rng.sample(scene.objects, len(scene.objects))
    phrases, placed = [], []
    for thing, row, column in objects:
        words = [word(thing.size)] if rng.random() < detail else []
        words += [word(thing.texture)] if rng.random() < detail else []
        words += [word(thing.color), word(thing.shape)]
        phrases.append(_with_article(" ".join(words)))
        placed.append(f"{phrases[-1]} {word(PLACES[row][column])}")

    if rng.random() >= detail:
        body = _listed(phrases)
    elif len(objects) == 1 or rng.random() < 0.5:
        body = _listed(placed)
    else:
        (_, row, column), (_, other_row, other_column) = objects[:2]
        relation = []
        if row != other_row:
            relation.append(word("above" if row < other_row else "below"))
        if column != other_column:
            relation.append(word("left of" if column < other_column else "right of"))
        body = f"{phrases[0]} {' and '.join(relation)} {phrases[1]}"
        body += "".join(f", and {third}" for third in placed[2:])

    opening = rng.choice(("", "there is ", "a picture of ", "an image of "))
    if len(objects) > 1 and rng.random() < 0.25:
        shapes, colors = ({thing[i] for thing, _, _ in objects} for i in (0, 1))
        noun = shapes.pop() if len(shapes) == 1 else "shape"
        noun = f"{colors.pop()} {noun}" if len(colors) == 1 else noun
        opening = f"{('two', 'three')[len(objects) - 2]} {noun}{'es' if noun[-1] == 's' else 's'}: "
    if rng.random() < 0.3:
        body += f", on a {scene.background} background"
    return opening + body


def _with_article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _listed(phrases: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def _class_name(thing: Thing) -> str:
    return f"{thing.color} {thing.shape}"


def _polygons(*polygons) -> np.ndarray:
    """float32 [P, N, 2]: polygons with fewer than N corners repeat their last one."""
    most = max(map(len, polygons))
    return np.array([[*p, *[p[-1]] * (most - len(p))] for p in polygons], np.float32)


def _arc(corners, radius=1.0, start=-90.0, stop=270.0, x=0.0, y=0.0) -> list:
    """Corners on a circle about (x, y); degrees from the right by way of the bottom."""
    angles = np.radians(np.linspace(start, stop, corners, endpoint=False))
    return [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]


def _box(x, y, w, h) -> list:
    """Corners of the box that reaches `w` and `h` from (x, y)."""
    return [(x - w, y - h), (x + w, y - h), (x + w, y + h), (x - w, y + h)]


_HEART = [
    (16 * math.sin(t) ** 3, 2 - 13 * math.cos(t) + 5 * math.cos(2 * t) + 2 * math.cos(3 * t))
    for t in np.linspace(0, math.tau, 32)
]
# Outlines within a radius of 1.2, y downwards. Filling is even-odd, which leaves the ring its hole.
_OUTLINES = {
    "circle": _polygons(_arc(32)),
    "square": _polygons(_box(0, 0, 0.78, 0.78)),
    "triangle": _polygons(_arc(3, 1.1)),
    "star": _polygons(sum(zip(_arc(5, 1.1), _arc(5, 0.46, -54, 306), strict=True), ())),
    "heart": _polygons([(x / 16.5, y / 15) for x, y in _HEART]),
    "ring": _polygons(_arc(32, 1.05), _arc(32, 0.5)),
    "crescent": _polygons(_arc(32, 1.05, 50, 310, x=0.15) + _arc(24, 0.835, 285.6, 74.4, x=0.6)),
    "cross": _polygons(_box(0, 0, 0.34, 1), _box(-0.67, 0, 0.33, 0.34), _box(0.67, 0, 0.33, 0.34)),
    "arrow": _polygons(
        [(-1.05, -0.3), (0, -0.3), (0, -0.85), (1.05, 0), (0, 0.85), (0, 0.3), (-1.05, 0.3)]
    ),
    "diamond": _polygons([(0, -1.1), (0.68, 0), (0, 1.1), (-0.68, 0)]),
}
_GRID = list(itertools.product(range(-2, 3), repeat=2))
_PATTERNS = {
    "striped": _polygons(*(_box(0, 0.62 * i, 1.2, 0.155) for i in range(-2, 3))),
    "dotted": _polygons(*(_arc(8, 0.19, x=0.58 * i, y=0.58 * j) for i, j in _GRID)),
    "checked": _polygons(*(_box(0.44 * i, 0.44 * j, 0.22, 0.22) for i, j in _GRID if (i + j) % 2)),
}


def draw(scene: Scene, size: int, rng: random.Random) -> np.ndarray:
    """uint8 [size, size, 3]; places, angles, sizes and colors vary a little."""
    # In planes, [3, size, size]: NumPy broadcasts over a last axis of three four times slower.
    image = np.empty((3, size, size), np.float32)
    gray = [BACKGROUNDS[scene.background] + rng.uniform(-20, 20) for _ in range(4)]
    for plane in image:  # a gradient between the tones of the four corners
        corners = np.array([v + rng.uniform(-6, 6) for v in gray], np.float32).reshape(2, 2)
        cv2.resize(corners, (size, size), dst=plane, interpolation=cv2.INTER_LINEAR)

    for thing, row, column in scene.objects:
        x, y = (size * (_CENTERS[thing.size][i] + rng.uniform(-0.02, 0.02)) for i in (column, row))
        radius = size * SIZES[thing.size] * rng.uniform(0.95, 1.05)
        light = rng.uniform(0.88, 1.0)
        color = [light * v + rng.uniform(-10, 10) for v in COLORS[thing.color]]
        color = np.array(color, np.float32).reshape(3, 1, 1)
        # All happens in a square window around the object.
        side = min(size, math.ceil(2.4 * radius) + 2)
        left, top = (min(max(round(v - side / 2), 0), size - side) for v in (x, y))
        window = image[:, top : top + side, left : left + side]
        center = (x - left, y - top)
        outline = _fill(_OUTLINES[thing.shape], center, radius, rng.uniform(-15, 15), side)
        window += _coverage(outline, side) * (color - window)
        if thing.texture in _PATTERNS:
            pattern = _fill(_PATTERNS[thing.texture], center, radius, rng.uniform(0, 180), side)
            # Tone on tone: the outline stays the strongest edge.
            window += _coverage(cv2.bitwise_and(pattern, outline), side) * (-0.45 * color)

    noise = np.frombuffer(rng.randbytes(size * size), np.uint8).reshape(size, size)
    image += noise * np.float32(12 / 255) - 6
    return cv2.merge(image.clip(0, 255).astype(np.uint8))


def _fill(polygons: np.ndarray, center, radius: float, degrees: float, side: int) -> np.ndarray:
    """Mask uint8 [4 side, 4 side] of polygons turned, scaled and moved to `center`, in pixels."""
    sin, cos = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    turn = np.array(((cos, sin), (-sin, cos)), np.float32) * radius * 4
    corners = polygons @ turn + (np.array(center, np.float32) * 4 - 0.5)
    mask = np.zeros((4 * side, 4 * side), np.uint8)
    # cv2 takes corners as integers; shift=4 makes them sixteenths.
    return cv2.fillPoly(mask, (corners * 16).astype(np.int32), 255, shift=4)


def _coverage(mask: np.ndarray, side: int) -> np.ndarray:
    """The share of each pixel that a mask of 4 x 4 samples a pixel covers: float32 [side, side]."""
    return cv2.resize(mask, (side, side), interpolation=cv2.INTER_AREA) * np.float32(1 / 255)


class Scenes(Source):
    """Random access to the records of one split, images of `size` x `size` pixels.

    Of a split "train[:1000]" is the first 1,000, as in TFDS.

    Raises ValueError for an unknown split or a size below 16, IndexError outside the split.
    """

    def __init__(self, split: str, size: int = 64):
        name, count = re.fullmatch(r"(.*?)(?:\[:(\d+)\])?", split).groups()
        self._length = int(count) if count else SPLITS.get(name, 0)
        if name not in SPLITS or not 1 <= self._length <= SPLITS[name]:
            raise ValueError(
                f"scenes have no split {split!r}; choose one of {', '.join(SPLITS)}, or the first "
                "of one, such as 'train[:1000]'"
            )
        if size < 16:
            raise ValueError(
                f"scenes need a size of at least 16 pixels to be told apart, not {size}"
            )
        self.split, self.size, self.name = name, size, f"scenes {name!r}"
        self.class_names = CLASS_NAMES if name == "zeroshot" else ()

    def __len__(self) -> int:
        return self._length

    def layout(self) -> list:
        return [self.split, len(self)]

    def __getitem__(self, index: int) -> dict:
        self._check(index)
        # Made in half the time of a NumPy generator, and its draws of single numbers are fast.
        rng = random.Random(f"{self.split} {index}")
        scene = describe(self.split, index, rng)
        # Terse captions teach colors and shapes, detailed ones the rest.
        details = (0.0, 0.0, 0.3, 0.6, 1.0) if self.split == "train" else (1.0,) * 5
        captions: list[str] = []
        for detail in details:
            text = caption(scene, detail, rng)
            while text in captions:
                text = caption(scene, detail, rng)
            captions.append(text)
        record = {
            "image": draw(scene, self.size, rng),
            "captions": captions,
            "synthetic": [_listed([_with_article(_class_name(o)) for o, _, _ in scene.objects])],
            "key": f"{self.split}-{index}",
        }
        if self.class_names:
            record["label"] = self.class_names.index(_class_name(scene.objects[0][0]))
        return record
