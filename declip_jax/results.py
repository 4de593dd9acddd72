"""The scores of a checkpoint, in files that other programs read: one JSON, and the same as CSV."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from declip_jax.digests import digest
from declip_jax.evals.suite import Found, renamed
from declip_jax.files import write_text


class Results:
    """What has been scored of one checkpoint; written after each task, so that nothing is lost.

    `WORKDIR/evaluations/step_N.json` holds {"workdir", "step", "checkpoint", "results", "absent"},
    step_N.csv a line a metric. "checkpoint" is a digest: results of another one with the same
    number are moved aside.
    """

    def __init__(self, workdir: Path, step: int, checkpoint: str):
        self.path = workdir / "evaluations" / f"step_{step}.json"
        self._all: dict[str, Any] = dict(workdir=str(workdir), step=step, checkpoint=checkpoint)
        self._all |= {"results": [], "absent": []}
        if self.path.exists():
            before = read_results(self.path)
            if before["checkpoint"] == checkpoint:
                self._all |= {name: before[name] for name in ("results", "absent")}
            else:
                aside = f"other_step_{step}_{before['checkpoint'][:8]}.json"
                os.replace(self.path, self.path.with_name(aside))

    def identity(self, task: list[Any]) -> str:
        """The id of the result of a task, of its `identity()`, for this checkpoint."""
        return digest([self._all["checkpoint"], task])

    def find(self, identity: str) -> dict[str, Any] | None:
        """The result that has this id."""
        return next((r for r in self._all["results"] if r["id"] == identity), None)

    def add(self, result: dict[str, Any]) -> None:
        """Keeps a result in place of an earlier one of the same set, task and settings."""
        same = ("set", "task", "settings")
        kept = [r for r in self._all["results"] if any(r[k] != result[k] for k in same)]
        self._all["results"] = [*kept, result]
        self._write()

    def set_absent(self, absent: list[dict[str, str]]) -> None:
        """Notes what could not be scored: {"set", "task", "why"} each."""
        # What another suite missed is still missing, unless it has come since.
        named = {(a["set"], a["task"]) for a in absent}
        named |= {(r["set"], r["task"]) for r in self._all["results"]}
        before = [a for a in self._all["absent"] if (a["set"], a["task"]) not in named]
        self._all["absent"] = before + absent
        self._write()

    def _write(self) -> None:
        write_text(self.path, json.dumps(self._all, indent=1, ensure_ascii=False) + "\n")
        table = io.StringIO()
        rows = csv.writer(table)
        rows.writerow(("set", "task", "metric", "value", "settings"))
        for result in self._all["results"]:
            settings = json.dumps(result["settings"], ensure_ascii=False)  # tell results apart
            for metric, value in result["metrics"].items():
                rows.writerow((result["set"], result["task"], metric, value, settings))
        write_text(self.path.with_suffix(".csv"), table.getvalue())


def read_results(path: Path) -> dict[str, Any]:
    """What `Results` wrote. Raises ValueError for another kind of file."""
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
        read["results"] = [r | {"settings": renamed(r["settings"])} for r in read["results"]]
        return {name: read[name] for name in ("workdir", "step", "checkpoint", "results", "absent")}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is not what python -m declip_jax.evaluate writes ({error!r}): move it away."
        ) from error


def keep(workdir: Path, step: int, checkpoint: str, found: Found, absent: list[dict]) -> None:
    """Writes down what was found during training, so that nothing is scored twice.

    Args:
      workdir, step, checkpoint: as for `Results`.
      found: of `suite.run`: of an evaluation that was interrupted, the tasks that were finished.
      absent: of `suite.build`.

    Raises:
      ValueError: the file there is of another kind.
      OSError: it cannot be written.
    """
    results = Results(workdir, step, checkpoint)
    if absent:
        results.set_absent(absent)
    for task, result in found:
        results.add(result | {"id": results.identity(task.identity())})
