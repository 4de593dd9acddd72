"""The evaluations of a run: which data, which task, which metrics."""

from declip_jax.data.pipeline import eval_images
from declip_jax.data.raw import read_class_names
from declip_jax.data.sources import open_source
from declip_jax.data.tokenizer import tokenize
from declip_jax.evals.retrieval import collect, retrieval
from declip_jax.evals.zeroshot import class_embeddings, zeroshot


class Zeroshot:
    """Zero-shot classification of a source with classes.

    Args:
      settings: source, split and templates.
      resolution, resize, batch_size: of `eval_images`.
      classes: a file of other names for the classes; see `data.raw.read_class_names`.

    Raises (when built, so that a mistake shows at the start of a run):
      ValueError: no such data, data without classes, or names that do not fit them.
    """

    name = "zeroshot"
    metrics = ("top1", "top5", "mean_per_class")

    def __init__(self, settings, *, resolution, resize, batch_size, classes=None):
        self._source = open_source(settings.source, settings.split)
        self._class_names = self._source.class_names
        if classes:
            self._class_names = tuple(read_class_names(classes, self._class_names).values())
        if not self._class_names:
            raise ValueError(
                f"{settings.source!r} split {settings.split!r} has no classes to choose from: "
                "prepare it with `prepare imagefolder`, or evaluate retrieval instead."
            )
        self._templates = tuple(settings.templates)
        self._reading = dict(resolution=resolution, resize=resize, batch_size=batch_size)

    def __call__(self, encoder) -> dict[str, float]:
        classes = class_embeddings(
            encoder.encode_text,
            lambda texts: tokenize(texts, encoder.context),
            self._class_names,
            self._templates,
        )
        return zeroshot(encoder.encode_image, eval_images(self._source, **self._reading), classes)


class Retrieval:
    """Image-text retrieval over a whole split, all captions of each image.

    Raises (when built):
      ValueError: no such data.
    """

    name = "retrieval"
    metrics = tuple(f"{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10))

    def __init__(self, settings, *, resolution, resize, batch_size):
        self._source = open_source(settings.source, settings.split)
        self._prefix = settings.prefix
        self._reading = dict(resolution=resolution, resize=resize, batch_size=batch_size)

    def __call__(self, encoder) -> dict[str, float]:
        return retrieval(
            *collect(
                encoder.encode_image,
                encoder.encode_text,
                lambda texts: tokenize(texts, encoder.context),
                eval_images(self._source, **self._reading),
                prefix=self._prefix,
            )
        )


TASKS = {task.name: task for task in (Zeroshot, Retrieval)}


def build(config) -> list:
    """The tasks that `config.eval` asks for during training (those with a source)."""
    return [
        make(
            config.eval[name],
            resolution=config.model.image.resolution,
            resize=config.eval.resize,
            batch_size=config.eval.batch_size,
        )
        for name, make in TASKS.items()
        if config.eval[name].source
    ]


def run(tasks, encoder) -> dict[str, float]:
    """{"val/zeroshot/top1": …, …} of every task."""
    return {
        f"val/{task.name}/{metric}": value
        for task in tasks
        for metric, value in task(encoder).items()
    }
