"""What evaluation does to an image before the model sees it."""

from typing import NamedTuple

Channels = tuple[float, float, float]

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Preprocess(NamedTuple):
    """Resize the short side, crop the square of the center, normalize."""

    short_side: int  # pixels
    resolution: int  # after the crop
    mean: Channels  # of pixels in 0 … 1
    std: Channels


def preprocess(name: str, resolution: int, mean: Channels, std: Channels) -> Preprocess:
    """What `config.eval.preprocess` names, at the model's resolution.

    "declip": the crop is 224 of a short side of 256 pixels (or in that proportion), ImageNet's mean
    and standard deviation. "openai", also open_clip's and ALIP's: the short side is the crop's,
    CLIP's mean and standard deviation. "train": so too, but with those the run trains with, which
    are given.
    """
    if name == "declip":
        return Preprocess(round(resolution * 256 / 224), resolution, *IMAGENET)
    return Preprocess(resolution, resolution, *(CLIP if name == "openai" else (mean, std)))
