"""What the towers' sections have in common, and positions of patches."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import numpy as np

from declip_jax.section import Section, at_least


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes of a model's parameters by path, which tell the towers' sizes."""

    def of(self, path: str, rank: int) -> tuple[int, ...]:
        if len(self.get(path, ())) != rank or 0 in self[path]:
            raise ValueError(f"the array that is {path} here is missing or has another shape")
        return self[path]

    def side(self, path: str, first: int = 1) -> int:
        """Patches on a side of the image, by positions [first + side * side, width]."""
        cells = self.of(path, 2)[0] - first
        if cells < 1 or math.isqrt(cells) ** 2 != cells:
            raise ValueError(f"{path} has {cells} positions of patches, expected a square")
        return math.isqrt(cells)


class Tower(Section):
    """The section of a tower; a subclass stands at the head of the module that computes it.

    Each builds its module, `build(embed_dim, activation, compute)`, and finds itself in parameters,
    `recognize(Shapes)`; the number of heads is no shape, so it is one for each 64 channels there.
    `demands(where)` is what several fields have to do with each other: (holds, field, expected).
    Fields with a value are options, which a configuration need not name.
    """

    @property
    def token_width(self) -> int:
        """Channels of the tokens, patches or cells among its features."""
        return self.width

    @classmethod
    def options(cls) -> dict[str, Any]:
        fields = dataclasses.fields(cls)
        return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}

    def check(self, where: str) -> None:
        for holds, field, expected in self.demands(where):
            if not holds:
                raise ValueError(f"{where}.{field}={getattr(self, field)!r} must be {expected}.")


class ImageTower(Tower):
    """An image tower, whose module gives `ImageFeatures`. Each has besides a `Tower`'s methods

    first_layer: name of the layer that reads pixels.
    family: how such models' names begin in papers.
    step: pixels from a patch, or a cell of the last map, to the next.
    describe(): kind and depth in a few words.
    resize(params, resolution): its parameters, the positions interpolated.
    """

    # Fields that change how a tower is trained, not what it is.
    OF_TRAINING: ClassVar[tuple[str, ...]] = ("bn_group_size", "patch_dropout")
    bn_group_size: ClassVar[int] = 0  # of towers without batch statistics

    resolution: int = at_least(1)

    @property
    def side(self) -> int:
        """Patches, or cells of the last map, on a side of the image."""
        return self.resolution // self.step

    def resize_positions(self, params: Mapping[str, Any], resolution: int) -> dict[str, Any]:
        """`params` with "positional_embedding" [first + side², w] for another resolution.

        Interpolated as images are, cubic and anti-aliased, which is open_clip's way. The first are
        not in the plane, and stay.
        """
        positions, old, new = params["positional_embedding"], self.side, resolution // self.step
        first, grid = np.split(positions, [len(positions) - old**2])
        grid = grid.reshape(old, old, -1)  # [old * old, w] -> [old, old, w]
        grid = jax.image.resize(grid, (new, new, grid.shape[-1]), "cubic")
        grid = np.asarray(grid).reshape(new * new, -1)  # [new, new, w] -> [new * new, w]
        return {**params, "positional_embedding": np.concatenate([first, grid])}

    def check_size(self, images: jax.Array) -> None:
        """Raises ValueError unless images [B, H, W, 3] are of the tower's resolution."""
        height, width = images.shape[1:3]
        if (height, width) != (self.resolution, self.resolution):
            raise ValueError(
                f"images are {height}x{width} pixels, but config.model.image.resolution="
                f"{self.resolution}: resize the images or change the resolution"
            )
