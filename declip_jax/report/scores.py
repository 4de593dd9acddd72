"""The scores of the runs, as declip_jax.evaluate wrote them, beside those of the papers."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from declip_jax.evals import sets
from declip_jax.report.published import Number, published
from declip_jax.report.runs import Run

TASKS = {
    "zeroshot": "Zero-shot classification",
    "retrieval": "Retrieval",
    "linear_probe": "Linear probe",
    "knn": "k nearest neighbors",
    "few_shot": "Few-shot probe",
}
SEVERAL = ("retrieval", "few_shot")  # tasks with more than one metric a set
_ROWS = {  # of a set that is absent, where this is not the set's own metric
    "retrieval": ("image_to_text_r1", "text_to_image_r1"),
    "few_shot": ("top1_16_shot",),
}
_METRICS = {
    "top1": "top-1",
    "top5": "top-5",
    "mean_per_class": "mean per class",
    **{f"image_to_text_r{k}": f"image → text R@{k}" for k in (1, 5, 10)},
    **{f"text_to_image_r{k}": f"text → image R@{k}" for k in (1, 5, 10)},
}
_GRAYS = ("#8a8a8a", "#b4b4b4", "#5c5c5c", "#d0d0d0")


class Row(NamedTuple):
    """What is compared: a metric on a set, with the settings in which results of it differ."""

    set: str
    metric: str
    variant: str


class Series(NamedTuple):
    """Scores of a run or of a paper, and how they are drawn."""

    label: str
    detail: str
    color: str
    values: dict[Row, float]  # in per cent
    absent: dict[str, str] = {}  # of a run: sets that have not been scored, and why
    sources: dict[str, str] = {}  # of papers: where in them the numbers stand, and their addresses


class Scores(NamedTuple):
    """The scores of one task."""

    task: str
    title: str  # of the task
    rows: dict[Row, str]  # what is compared, each with a label; those no run has come last
    series: list[Series]  # the runs, then the papers


def metric_title(name: str) -> str:
    """What a metric is called on the page."""
    if name.endswith("_shot"):
        return f"{name.split('_')[1]}-shot top-1"
    return _METRICS.get(name, name)


def scores(runs: Sequence[Run]) -> Iterator[Scores]:
    """Of each task that any run has been evaluated on, or should have been."""
    for task, title in TASKS.items():
        results = [run.found("results", task) for run in runs]
        absent = [{a["set"]: a["why"] for a in run.found("absent", task)} for run in runs]
        if not any(results) and not any(absent):
            continue
        variant = variants(list(itertools.chain(*results)))
        rows, series = {}, []
        for run, own, missing in zip(runs, results, absent, strict=True):
            values = {}
            for result in own:
                name = variant(result)
                for metric, value in result["metrics"].items():
                    several = task in SEVERAL and metric.endswith(("_r1", "_shot"))
                    if several or metric == result["metric"]:
                        row = Row(result["set"], metric, name)
                        values[row] = 100 * value
                        rows[row] = f"{result['title']} ({name})" if name else result["title"]
            detail = "not scored"
            if own:
                steps = ", ".join(f"{step:,}" for step in sorted({one["step"] for one in own}))
                detail = "another program's weights" if run.imported else f"step {steps}"
            series.append(Series(run.name, detail, run.color, values, missing))
        known = {row.set for row in rows}
        for name in dict.fromkeys(itertools.chain(*absent)):
            if name not in known:
                found = sets.get(name)
                metrics = _ROWS.get(task, (found.metric,))
                rows |= {Row(name, metric, ""): found.title for metric in metrics}
        yield Scores(task, title, rows, series + _papers(runs, task, rows))


def variants(results: Sequence[dict[str, Any]]) -> Callable[[dict[str, Any]], str]:
    """What tells a result from the others of its set: the settings in which they differ."""

    def text(value: Any) -> str:
        return f"{len(value)} templates" if isinstance(value, list) else str(value) or "none"

    def variant(result: dict[str, Any]) -> str:
        others = [other["settings"] for other in results if other["set"] == result["set"]]
        names = dict.fromkeys(name for settings in others for name in settings)
        differing = [n for n in names if len({json.dumps(o.get(n)) for o in others}) > 1]
        return ", ".join(f"{n} {text(result['settings'].get(n, ''))}" for n in differing)

    return variant


def worst_classes(result: dict[str, Any], most: int) -> list[dict[str, Any]]:
    """Of a zero-shot result, the classes with the lowest accuracy, lowest first."""
    return sorted(result["classes"], key=lambda one: one["accuracy"])[:most]


def _papers(runs: Sequence[Run], task: str, rows: Iterable[Row]) -> list[Series]:
    """What is published of the runs' methods: a series for each model and data."""
    numbers = dict.fromkeys(itertools.chain(*(_comparable(run, task) for run in runs)))
    found: dict[tuple[str, str], Series] = {}
    for number in numbers:
        label = number.method, f"{number.model}, {number.data}"
        for row in rows:
            if (row.set, row.metric) == (number.set, number.metric):
                gray = _GRAYS[len(found) % len(_GRAYS)]
                series = found.setdefault(label, Series(*label, gray, {}, sources={}))
                # Where two papers print the same, the first is shown.
                if row not in series.values:
                    series.values[row] = number.value
                    text = f"{number.authors} {number.year}, {number.title}: {number.table}"
                    series.sources[text] = number.url
    return list(found.values())


def _comparable(run: Run, task: str) -> list[Number]:
    """Numbers of the run's method and kind of image tower; where its data are named, of those."""
    family = run.trained.model.image.family
    numbers = [n for n in published(run.trained.method, task=task) if n.model.startswith(family)]
    source = _letters(run.data)
    return [n for n in numbers if _letters(n.data) in source] or numbers


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()
