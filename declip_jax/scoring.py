"""Scores a trained model on a suite, and keeps what it found in the workdir."""

import sys
import time
from pathlib import Path
from typing import Any

from declip_jax.evals import sets, suite
from declip_jax.evals.cache import Cache
from declip_jax.metrics import duration
from declip_jax.results import Results
from declip_jax.trained import Trained


def score(
    trained: Trained,
    workdir: Path,
    entries: list[dict[str, Any]],
    *,
    data_dir: str = "",
    again: bool = False,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Scores what has not been scored yet, and writes it down.

    Args:
      trained: the model.
      workdir: of its run.
      entries: of a suite; one alone raises what else would be a line of what failed.
      data_dir: where known sets are; "": where `config.eval.data_dir` says.
      again: compute everything, also what has been scored or is in the cache.

    Returns:
      The results of these entries, as `Results` keeps them; and a line for each that failed.
    """
    results = Results(workdir, trained.step, trained.digest)
    common = trained.shared._replace(data_dir=data_dir or trained.shared.data_dir)
    tasks, absent, failed = [], [], []
    for entry in entries:  # mistakes show before the long work
        try:
            tasks.append(suite.task_of(entry, common))
        except ValueError as error:
            if len(entries) == 1:
                raise
            if isinstance(error, sets.Absent):
                absent.append(dict(set=entry["set"], task=entry["task"], why=str(error)))
            else:
                where = entry.get("set") or entry.get("source")
                failed.append(f"{entry.get('task')} on {where}: {error}")
    if absent:
        results.set_absent(absent)
        names = ", ".join(dict.fromkeys(one["set"] for one in absent))
        where = f"{results.path} says where each was looked for."
        print(f"Not on this machine: {names}. {where}", file=sys.stderr)
    cache = Cache(None if again else workdir / "evaluations" / "cache", trained.digest)
    found, started = [], time.perf_counter()
    for number, task in enumerate(tasks, 1):
        identity = results.identity(task.identity())
        result, took = None if again else results.find(identity), "scored before"
        if result is None:
            try:
                result = suite.score(task, trained.encoder, cache) | {"id": identity}
            except (ValueError, OSError) as error:
                if len(entries) == 1:
                    raise
                failed.append(f"{task.name}: {error}")
                continue
            results.add(result)
            took = f"{result['seconds']:.1f} s"
        found.append(result)
        if number < len(tasks):
            left = (time.perf_counter() - started) / number * (len(tasks) - number)
            took += f", about {duration(left)} left"
        score = f"{result['metric']} {100 * result['metrics'][result['metric']]:.2f} %"
        print(f"[{number}/{len(tasks)}] {task.name}: {score}, {took}", file=sys.stderr)
    return found, failed
