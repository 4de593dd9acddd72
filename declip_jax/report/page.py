"""The page itself."""

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from declip_jax.metrics import table
from declip_jax.report import examples, figures
from declip_jax.report.runs import Run, differences
from declip_jax.report.scores import metric_title, scores, variants, worst_classes

_WORST = 12  # classes
_NEIGHBORS = 5


def write_page(runs: Sequence[Run], out: Path, *, images: int, captions: int) -> None:
    """Writes an HTML file that needs no other; `images` of each run are searched by `captions`."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # captions and names may hold anything
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    compared = list(scores(runs))
    text = environment.get_template("page.html").render(
        plotly=Markup(get_plotlyjs()),
        runs=runs,
        differences=differences(runs),
        curves=Markup(figures.curves(runs)),
        scores=[
            (one, Markup(figures.bars(one) if any(s.values for s in one.series) else ""))
            for one in compared
        ],
        metric_title=metric_title,
        table=table,
        absent={k: why for one in compared for s in one.series for k, why in s.absent.items()},
        images=images,
        sources={text: url for c in compared for s in c.series for text, url in s.sources.items()},
        confusions=_confusions(runs),
        galleries=[_shown(run, examples.gallery, images, captions) for run in runs],
        neighbors=[_shown(run, examples.neighbors, -(-captions // 2), _NEIGHBORS) for run in runs],
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")


def _confusions(runs: Sequence[Run]):
    """For each set that any run was scored on: a heading, and each run's worst classes."""
    scored = [(run, result) for run in runs for result in run.found("results", "zeroshot")]
    variant, sets = variants([result for _, result in scored]), {}
    for run, result in scored:
        heading = ", ".join(filter(None, (result["title"], variant(result))))
        sets.setdefault(heading, []).append((run, worst_classes(result, _WORST)))
    return sets


def _shown(run: Run, make, *args):
    """The run, what `make` gives, and why it gives nothing: its data may be elsewhere by now."""
    try:
        return run, make(run.trained, *args), ""
    except (ValueError, OSError) as error:
        return run, [], str(error)
