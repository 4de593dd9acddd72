"""Numbers of the papers, to put beside one's own: published.json has the tables.

Values are per cent, as they are printed. Those of ALIP are its Tables 1 to 3, which also have the
other methods at ViT-B/32 after YFCC15M; those of DeCLIP and the CLIP benchmark are the tables of
their repository.
"""

import functools
import json
from pathlib import Path
from typing import NamedTuple


class Number(NamedTuple):
    """A number of a table."""

    paper: str  # "declip", "clip_benchmark" or "alip"
    table: str  # where it is, such as "Table 3"
    method: str  # as `config.method`, or "uniclip", "hiclip" or "hideclip"
    model: str  # "ViT-B/32" or "RN50"
    data: str  # that it was trained on, such as "YFCC15M"
    task: str  # "zeroshot", "retrieval" or "linear_probe"
    set: str  # of `evals.sets`
    metric: str  # "top1", "mean_per_class", or one of retrieval, such as "image_to_text_r1"
    value: float  # per cent
    title: str  # of the paper, as what follows
    authors: str
    year: int
    url: str


@functools.cache
def _numbers() -> tuple[Number, ...]:
    path = Path(__file__).with_name("published.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    return tuple(Number(**one, **content["papers"][one["paper"]]) for one in content["numbers"])


def published(method: str, model: str | None = None, task: str | None = None) -> list[Number]:
    """What is published of a method, in the order of the tables; [] if nothing is. A model or task
    of None stands for any."""
    of_method = [number for number in _numbers() if number.method == method]
    return [n for n in of_method if model in (None, n.model) and task in (None, n.task)]
