"""The tasks that score a model: each is built from settings and data, and applied to an encoder."""

import inspect
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import logging
from tqdm import tqdm

from declip_jax.data.eval_images import eval_images
from declip_jax.data.input_files import read_class_names
from declip_jax.data.sources import Source, open_source
from declip_jax.evals import sets, suites
from declip_jax.evals.cache import Cache
from declip_jax.evals.knn import knn
from declip_jax.evals.options import Eval
from declip_jax.evals.preprocess import Preprocess
from declip_jax.evals.probe import few_shot, linear_probe
from declip_jax.evals.retrieval import collect, retrieval
from declip_jax.evals.zeroshot import check_prompts, class_embeddings, per_class, zeroshot
from declip_jax.hints import did_you_mean


class Shared(NamedTuple):
    """What all tasks of a run have in common; `shared` makes it of a configuration."""

    reading: dict[str, int]  # resolution, resize and batch_size of `eval_images`
    preprocess: str  # name of the protocol
    data_dir: str  # where known sets are
    templates: tuple[str, ...]  # where neither set nor settings have prompts
    prefix: str  # of captions, where the settings do not say


def shared(section: Eval, seen: Preprocess, protocol: str = "") -> Shared:
    """Of a run's `config.eval`, and what its evaluation does to images; or that of weights, which
    each have another `protocol`, and results say which."""
    return Shared(
        dict(resolution=seen.resolution, resize=seen.short_side, batch_size=section.batch_size),
        protocol or section.preprocess,
        section.data_dir,
        section.zeroshot.templates,
        section.retrieval.prefix,
    )


class Result(NamedTuple):
    """What a task found."""

    metrics: dict[str, float]  # shares are fractions
    classes: list[dict[str, Any]] = []  # of zero-shot classification, see `zeroshot.per_class`


class Task:
    """What the tasks have in common. Building one opens its data, so that mistakes show early.

    Args:
      shared: of the run.
      set: one of `sets.NAMES` (or `sets.RETRIEVAL` for retrieval); its splits, class names, prompts
        and metric are used. "": none, but the source's own.
      source: the data, as for training; "": where `sets.open_set` looks for the set.

    Raises:
      sets.Absent: the set is not on this machine.
      ValueError: settings or data that cannot be used.
    """

    task: str
    metrics: tuple[str, ...] = ("top1", "top5", "mean_per_class")  # of a call, without counts

    def __init__(self, shared: Shared, *, set: str = "", source: str = ""):
        if not set and not source:
            raise ValueError(
                f"{self.task} needs a set, one of {sets.NAMES}, or a source, such as a folder that "
                "python -m declip_jax.prepare wrote."
            )
        self.set, self.title = set or source, set or source
        self.metric = self.metrics[0]  # that papers report of this set
        self.images_of_set = 0  # that its test split has, 0 if this is not known
        self.name = f"{self.set}/{self.task}"  # in the names of metrics
        self._set, self._source, self._shared = set, source, shared
        # All that the scores follow from, besides the model and the data.
        self.settings: dict[str, Any] = {"source": source, "preprocess": shared.preprocess}
        self._opened: dict[Source, list[Any]] = {}  # and the identity of each, which takes time
        self._names: tuple[str, ...] = ()  # of classes, where they matter beside their number
        if set:
            known = sets.get(set)
            self.title, self.metric, self.images_of_set = known.title, known.metric, known.images

    def open(self, split: str) -> Source:
        if self._set:
            source = sets.open_set(self._set, split, self._shared.data_dir, self._source)
        else:
            source = open_source(self._source, split)
        if not len(source):
            raise ValueError(f"{source} is empty: there is nothing to score.")
        self._opened[source] = source.identity()
        return source

    def open_labeled(self, split: str) -> Source:
        """`open`, of what must have classes."""
        source = self.open(split)
        if not source.class_names:
            raise ValueError(
                f"{source} (split {split!r}) has no classes to choose from: prepare it with "
                "python -m declip_jax.prepare imagefolder, name its label in a set, or evaluate "
                "retrieval instead."
            )
        return source

    def identity(self) -> list[Any]:
        """Settings and data, as plain values: what is the same scores the same."""
        data = list(self._opened.values())
        return [self.task, self.set, self.settings, self._names, data]

    def images(self, source: Source):
        """`eval_images`, with progress on a terminal."""
        shown = dict(total=len(source), desc=self.name, unit=" images")
        with tqdm(**shown, leave=False, disable=None) as bar:
            for batch in eval_images(source, **self._shared.reading):
                yield batch
                bar.update(len(batch["image"]))

    def features(self, source: Source, encoder, cache: Cache) -> tuple[np.ndarray, np.ndarray]:
        """float32 [N, D] unit rows and int32 [N] labels of a whole source."""

        def make():
            features, labels = [], []
            for batch in self.images(source):
                features.append(encoder.encode_image(batch["image"]))
                labels.append(batch["label"])
            return {"features": np.concatenate(features), "labels": np.concatenate(labels)}

        content = ["features", self._shared.reading, self._shared.preprocess, self._opened[source]]
        arrays = cache.get(content, make)
        return arrays["features"], arrays["labels"]


class Zeroshot(Task):
    """Zero-shot classification of a set, or of a source with classes.

    Args:
      split: to score.
      templates: prompts; (): the set's, or else `config.eval.zeroshot.templates`.
      classes: file of other names for the classes; see `data.input_files.read_class_names`.
    """

    task = "zeroshot"

    def __init__(
        self,
        shared: Shared,
        *,
        split: str = "test",
        templates: Sequence[str] | str = (),
        classes: str = "",
        **data: str,
    ):
        super().__init__(shared, **data)
        self._images = self.open_labeled(split)
        names = self._images.class_names
        if classes:
            names = tuple(read_class_names(classes, names).values())
        templates = templates or (sets.get(self._set).templates if self._set else shared.templates)
        self._templates = (templates,) if isinstance(templates, str) else tuple(templates)
        self._names = names
        # OpenAI's names for ImageNet have two missiles and two sunglasses.
        self._may_repeat = bool(self._set) and not classes
        check_prompts(self._names, self._templates, repeated_names=self._may_repeat)
        self.settings |= dict(split=split, templates=self._templates, classes=classes)

    def __call__(self, encoder, cache: Cache) -> Result:
        prompts = self._names, self._templates

        def make():
            may_repeat = self._may_repeat
            found = class_embeddings(encoder.encode_texts, *prompts, repeated_names=may_repeat)
            return {"embeddings": found}

        embeddings = cache.get(["classes", *prompts, encoder.context], make)["embeddings"]
        metrics, confusion = zeroshot(encoder.encode_image, self.images(self._images), embeddings)
        return Result(metrics, per_class(confusion, self._names))


class Retrieval(Task):
    """Image-text retrieval over a whole split.

    Args:
      split: to score.
      prefix: put before every caption; None: `config.eval.retrieval.prefix`.
      captions_per_image: the first so many of each image, 0: all; None: five of a known set, as its
        protocol says, else all.
    """

    task = "retrieval"
    metrics = tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))

    def __init__(
        self,
        shared: Shared,
        *,
        split: str = "test",
        prefix: str | None = None,
        captions_per_image: int | None = None,
        **data: str,
    ):
        super().__init__(shared, **data)
        self._images = self.open(split)
        self._prefix = shared.prefix if prefix is None else prefix
        if captions_per_image is None:
            captions_per_image = 5 if self._set else 0
        self._most = captions_per_image or None
        told = dict(split=split, prefix=self._prefix, captions_per_image=captions_per_image)
        self.settings |= told

    def __call__(self, encoder, cache: Cache) -> Result:
        def batches():
            for batch in self.images(self._images):
                yield batch | {"captions": [texts[: self._most] for texts in batch["captions"]]}

        found = collect(encoder.encode_image, encoder.encode_texts, batches(), self._prefix)
        return Result(retrieval(*found, mesh=encoder.mesh))


class _Probe(Task):
    """A task that learns from the features of one split and is scored on another's.

    Args:
      train, validation, test: splits; validation "": a tenth of `train`, see
        `sets.held_out`.
    """

    def __init__(
        self,
        shared: Shared,
        *,
        train: str = "train",
        validation: str | None = None,
        test: str = "test",
        **data: str,
    ):
        super().__init__(shared, **data)
        if validation is None:
            validation = "validation" if self._set else ""
        self._splits = {"train": self.open_labeled(train), "test": self.open(test)}
        if validation:
            self._splits["validation"] = self.open(validation)
        names = dict(train=train, validation=validation, test=test)
        for (one, first), (other, second) in itertools.combinations(self._splits.items(), 2):
            both = f"the splits {names[one]!r} and {names[other]!r} of {self.set!r}"
            if self._opened[first] == self._opened[second]:
                raise ValueError(
                    f"{both} are the same images: what was learned by heart would be asked for."
                )
            if first.class_names != second.class_names:
                raise ValueError(
                    f"{both} have different classes: {len(first.class_names)} and "
                    f"{len(second.class_names)}."
                )
        self.settings |= dict(train=train, validation=validation, split=test)

    def splits(self, encoder, cache: Cache) -> dict[str, Any]:
        """Features and labels of train, validation and test, as the probes take them."""
        arrays = {}
        for name, source in self._splits.items():
            arrays[name], arrays[f"{name}_labels"] = self.features(source, encoder, cache)
        if "validation" not in arrays:
            held_out = sets.held_out(len(arrays["train"]))
            for kind in ("", "_labels"):
                whole = arrays[f"train{kind}"]
                arrays[f"validation{kind}"] = whole[held_out]
                arrays[f"train{kind}"] = np.delete(whole, held_out, axis=0)
        return arrays | {"classes": len(self._splits["train"].class_names)}


class LinearProbe(_Probe):
    """Logistic regression on frozen features."""

    task = "linear_probe"

    def __call__(self, encoder, cache: Cache) -> Result:
        return Result(linear_probe(**self.splits(encoder, cache), mesh=encoder.mesh))


class FewShot(_Probe):
    """Logistic regression on the frozen features of few images a class.

    Args:
      shots: numbers of images.
      seeds: draws of each number, over which is averaged.
    """

    task = "few_shot"

    def __init__(self, shared: Shared, *, shots=(1, 2, 4, 8, 16), seeds: int = 3, **splits):
        counts = [shots] if isinstance(shots, int) else list(shots)
        if not counts or not all(isinstance(n, int) and n > 0 for n in counts):
            raise ValueError(f"shots={shots!r}: expected numbers of images, such as (1, 2, 4).")
        super().__init__(shared, **splits)
        self._drawn = dict(shots=tuple(counts), seeds=seeds)
        self.metrics = tuple(f"top1_{n}_shot" for n in counts)
        self.metric = self.metrics[-1]
        self.settings |= self._drawn

    def __call__(self, encoder, cache: Cache) -> Result:
        return Result(few_shot(**self.splits(encoder, cache), **self._drawn))


class KNN(_Probe):
    """The nearest images of the training split, those for validation too, vote; see `knn.knn`."""

    task = "knn"

    def __init__(self, shared: Shared, *, neighbors: int = 20, temperature: float = 0.07, **splits):
        super().__init__(shared, **splits)
        self._voting = dict(neighbors=neighbors, temperature=temperature)
        self.settings |= self._voting

    def __call__(self, encoder, cache: Cache) -> Result:
        splits = self.splits(encoder, cache)
        for kind in ("", "_labels"):
            validation = splits.pop(f"validation{kind}")
            splits[f"train{kind}"] = np.concatenate([splits[f"train{kind}"], validation])
        return Result(knn(**splits, **self._voting, mesh=encoder.mesh))


TASKS = {task.task: task for task in (Zeroshot, Retrieval, LinearProbe, KNN, FewShot)}


# Settings that had another name once: suites of users and scores on disk have it.
_RENAMED = {"neighbours": "neighbors"}


def renamed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a task, by the names that they have now."""
    return {_RENAMED.get(name, name): value for name, value in settings.items()}


def task_of(entry: Mapping[str, Any], shared: Shared) -> Task:
    """The task that an entry of a suite describes.

    Raises:
      sets.Absent: its data are not on this machine.
      ValueError: an unknown task, set or setting, or data that cannot be used.
    """
    settings = renamed(entry)
    for old in entry.keys() & _RENAMED.keys():
        logging.warning("%s: %r is now called %r", dict(entry), old, _RENAMED[old])
    name = settings.pop("task", None)
    if name not in TASKS:
        raise ValueError(f"{dict(entry)}: task={name!r} is unknown.{_near(name, TASKS)}")
    make = TASKS[name]
    known = [
        parameter.name
        for cls in make.__mro__[:-1]  # of a task's classes each has some of its settings
        for parameter in inspect.signature(cls).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    for setting in settings:
        if setting not in known:
            raise ValueError(
                f"{dict(entry)}: the task {name!r} has no setting {setting!r}."
                f"{_near(setting, known)}"
            )
    return make(shared, **settings)


def _near(word: Any, known) -> str:
    return f"{did_you_mean(word, known)} Expected one of {list(known)}."


def entries_of(section: Eval) -> list[dict[str, Any]]:
    """The entries of all that `config.eval` asks for: sources that it names one by one, and a
    suite; [] if it asks for nothing."""
    named = {"zeroshot": section.zeroshot, "retrieval": section.retrieval}
    sources = [dict(task=t, source=n.source, split=n.split) for t, n in named.items() if n.source]
    return sources + (suites.load(section.suite) if section.suite else [])


def build(section: Eval, common: Shared) -> tuple[list[Task], list[dict[str, str]]]:
    """The tasks that `config.eval` asks for during training.

    Returns:
      The tasks; and {"set", "task", "why"} of each whose data are absent.
    """
    tasks, absent = [], []
    own = sum(map(bool, (section.zeroshot.source, section.retrieval.source)))
    for number, entry in enumerate(entries_of(section)):
        try:
            task = task_of(entry, common)
        except sets.Absent as error:
            absent.append(dict(set=entry["set"], task=entry["task"], why=str(error)))
        else:
            if number < own:
                task.name = task.task  # there is one of each
            tasks.append(task)
    names = [task.name for task in tasks]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(
            f"config.eval.suite={section.suite!r} has more than one of {sorted(twice)}: during "
            "training each set and task has one place among the metrics."
        )
    # Those of a set stand together, for they share features.
    order = {task.set: place for place, task in reversed(list(enumerate(tasks)))}
    return sorted(tasks, key=lambda task: order[task.set]), absent


def score(task: Task, encoder, cache: Cache) -> dict[str, Any]:
    """What a task finds, as `Results` keeps it, without the id."""
    start = time.perf_counter()
    metrics, classes = task(encoder, cache)
    title, images = task.title, metrics["images"]
    if task.images_of_set not in (0, images):
        title += f" ({images:,} of {task.images_of_set:,} images)"
    return {
        "set": task.set,
        "title": title,
        "task": task.task,
        # Few-shot classification leaves out what classes are too small for.
        "metric": next(m for m in (task.metric, *task.metrics[::-1]) if m in metrics),
        "metrics": metrics,
        "settings": json.loads(json.dumps(task.settings)),
        "classes": classes,
        "seconds": round(time.perf_counter() - start, 3),
    }


Found = list[tuple[Task, dict[str, Any]]]  # what tasks have found, of `score`


def run(
    tasks: Sequence[Task], encoder, stop: Callable[[], bool] = lambda: False
) -> tuple[Found, list[str]]:
    """Scores a model in training, which an evaluation that fails does not end.

    Args:
      tasks: those of a set one after the other.
      encoder: in use of the model.
      stop: asked before each task whether the rest should be left out.

    Returns:
      What each task found; and a line for each that failed.
    """
    results, failed = [], []
    for _, group in itertools.groupby(tasks, key=lambda task: task.set):
        cache = Cache()  # features of one set at a time are in memory
        for task in group:
            if stop():
                return results, failed
            try:
                results.append((task, score(task, encoder, cache)))
            except (ValueError, OSError) as error:
                failed.append(f"{task.name}: {error}")
    return results, failed


def logged(found: Found) -> dict[str, float]:
    """{"val/zeroshot/top1": …, "val/cifar10/linear_probe/top1": …, …} of every task."""
    return {
        f"val/{task.name}/{name}": value
        for task, result in found
        for name, value in result["metrics"].items()
    }
