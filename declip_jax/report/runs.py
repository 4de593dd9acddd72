"""What the workdirs of runs hold."""

import itertools
import json
import shlex
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import clu.parameter_overview
from flax.traverse_util import flatten_dict
from plotly.colors import qualitative

from declip_jax.metrics import read_metrics
from declip_jax.results import read_results
from declip_jax.trained import IMPORTED, Imported, Trained, load, load_imported

Curves = dict[str, dict[int, float]]


class Run(NamedTuple):
    """A run and its newest checkpoint, or another program's weights that were evaluated."""

    workdir: Path
    name: str  # the workdir's, or its path where several have the same name
    color: str  # of all that is drawn of it
    # For each name in metrics.jsonl, its value at each step, steps rising; {} of another program's
    # weights.
    curves: Curves
    trained: Trained
    # {"results", "absent"} of all its evaluated steps, see `results`, each result with its "step";
    # of what was scored at several steps, the newest. None without any. Steps after the newest
    # checkpoint's are of a past that this run does not have.
    evaluation: dict[str, Any] | None

    @property
    def data(self) -> str:
        """What it was trained on, "" if that is not known."""
        if self.imported:
            return ""
        data = self.trained.config.data
        return data.source or " + ".join(part.source for part in data.mixture)

    @property
    def imported(self) -> bool:
        return self.trained.setup is None

    def found(self, part: str, task: str) -> list[dict[str, Any]]:
        """The "results" or what is "absent" of a task."""
        return [one for one in (self.evaluation or {}).get(part, ()) if one["task"] == task]

    def last_evaluation(self) -> tuple[int, dict[str, float]]:
        """The step and the metrics of the last evaluation in metrics.jsonl; {} without any."""
        values = {name: c for name, c in self.curves.items() if name.startswith("val/")}
        last = max((step for curve in values.values() for step in curve), default=0)
        return last, {name: curve[last] for name, curve in values.items() if last in curve}

    @property
    def names_sets(self) -> bool:
        """Whether its configuration names what to score."""
        named = self.trained.eval
        return any((named.zeroshot.source, named.retrieval.source, named.suite))

    def command(self) -> str:
        """What is to be typed for scores: of its own sets, or else of those in a folder."""
        parts = ["python", "-m", "declip_jax.evaluate", "--workdir", str(self.workdir)]
        if self.imported:
            given = Imported.of(self.workdir)
            options = dict(given._asdict(), init=given.path, init_format=given.format)
            for name in ("init", "init_format", "image_size", "context", "preprocess"):
                if options[name]:
                    parts += [f"--{name.replace('_', '-')}", str(options[name])]
        if not self.names_sets:
            parts += ["--suite", "all", "--data-dir", "FOLDER"]
        return shlex.join(parts)

    def summary(self) -> dict[str, str]:
        """What the head of the page says of it."""
        image = self.trained.model.image
        parameters = int(clu.parameter_overview.count_parameters(self.trained.state.params))
        model = {
            "method": self.trained.method,
            "image tower": f"{image.describe()}, width {image.width}, {image.resolution} px",
            "parameters": f"{parameters:,}",
        }
        if self.imported:
            weights = Path(Imported.of(self.workdir).path).name
            unknown = dict.fromkeys(("step", "batch", "pairs seen"), "–")
            return model | unknown | {"data": f"unknown: {weights} is another program's"}
        config = self.trained.config
        return model | {
            "step": f"{self.trained.step:,} of {config.total_steps:,}",
            "batch": f"{config.batch_size:,} pairs",
            "pairs seen": f"{self.trained.record['samples']:,}",
            "data": self.data,
        }


def load_runs(workdirs: Sequence[Path]) -> list[Run]:
    """Reads runs and their newest models. Raises ValueError for a workdir that is named twice, or
    has no checkpoints or metrics."""
    paths = [workdir.resolve() for workdir in workdirs]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"{path} is named twice: name each workdir once.")
    names, runs = [path.name for path in paths], []
    for workdir, own, color in zip(workdirs, names, itertools.cycle(qualitative.D3), strict=False):
        runs.append(_load(workdir, own if names.count(own) == 1 else str(workdir), color))
    return runs


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The settings in which runs differ: field, and its value in each run.

    What is not known of another program's weights is no difference.
    """
    flat = [flatten_dict(run.trained.record["config"], sep=".") for run in runs]
    rows = []
    for field in sorted(set().union(*flat)):
        values = [json.dumps(f[field], ensure_ascii=False) if field in f else "–" for f in flat]
        known = [v for v, run in zip(values, runs, strict=True) if v != "–" or not run.imported]
        if len(set(known)) > 1:
            rows.append((field, values))
    return rows


def _load(workdir: Path, name: str, color: str) -> Run:
    if (workdir / IMPORTED).exists():
        try:
            trained, curves = load_imported(Imported.of(workdir)), {}
        except ValueError as error:
            raise ValueError(f"{workdir}: {error}") from error
    else:
        trained, curves = load(workdir), _read_curves(workdir / "metrics.jsonl")
        # The page needs the model alone, and the optimizer's state is twice as large.
        trained = trained._replace(state=trained.state.replace(opt_state=None))
        if not any("/" in name for name in curves):
            raise ValueError(
                f"{workdir} has nothing in metrics.jsonl, which training writes: train on."
            )
    return Run(workdir, name, color, curves, trained, _evaluation(workdir, trained.step))


def _read_curves(path: Path) -> Curves:
    curves = defaultdict(dict)
    for row in read_metrics(path) if path.exists() else ():
        for name, value in row.items():
            curves[name][row["step"]] = value
    return {name: dict(sorted(values.items())) for name, values in curves.items()}


def _evaluation(workdir: Path, newest: int) -> dict[str, Any] | None:
    read = [read_results(path) for path in workdir.glob("evaluations/step_*.json")]
    read = [one for one in read if one["step"] <= newest]
    results, absent = {}, {}
    for one in sorted(read, key=lambda one: one["step"]):
        for result in one["results"]:
            same = json.dumps([result[name] for name in ("task", "set", "settings")])
            results[same] = result | {"step": one["step"]}
        absent |= {(missing["task"], missing["set"]): missing for missing in one["absent"]}
    for result in results.values():
        absent.pop((result["task"], result["set"]), None)
    return dict(results=list(results.values()), absent=list(absent.values())) if read else None
