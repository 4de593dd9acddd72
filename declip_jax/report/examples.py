"""What single captions find: images, and rows of the support set."""

import base64
from typing import NamedTuple

import cv2
import jax
import numpy as np

from declip_jax import support_set
from declip_jax.data.eval_images import eval_images
from declip_jax.data.pipeline import Samples, digest
from declip_jax.data.sources import open_data, open_source
from declip_jax.data.text import mask_tokens
from declip_jax.evals.retrieval import top_matches
from declip_jax.trained import Trained

SIDE = 160  # pixels, of an image on the page


class Match(NamedTuple):
    """An image that a caption found."""

    uri: str  # with the image as its data
    caption: str  # of the image
    is_right: bool


class Neighbor(NamedTuple):
    """A row of the support set."""

    caption: str | None  # None if it is still random
    similarity: float  # cosine
    augmented: bool = False  # whether words of the caption are changed
    steps: int = 0  # of training since it was enqueued


def gallery(trained: Trained, images: int, captions: int) -> list[tuple[str, list[Match]]]:
    """Captions of the run's retrieval set, each with the five images it finds best, best first.

    Args:
      trained: without a `config.eval.retrieval.source`, its training data is used.
      images: how many of the set to search, spread evenly over it.
      captions: how many to show, spread evenly over those images'.

    Raises ValueError: the data are not on this machine, or cannot be read.
    """
    settings, encoder = trained.eval.retrieval, trained.encoder
    if trained.setup is None:
        raise ValueError("another program's weights come without a data set.")
    if settings.source:
        source = open_source(settings.source, settings.split)
    else:
        source = open_data(trained.config.data)
    batches = list(eval_images(source, **trained.shared.reading, most=images))
    pixels = np.concatenate([batch["image"] for batch in batches])
    captions_of = [captions for batch in batches for captions in batch["captions"]]
    # Captions made of class names are those of many images: each is shown once, and is right for
    # all of them.
    texts = list(dict.fromkeys(own[-1] for own in captions_of))
    shown = min(captions, len(texts))
    texts = [texts[i * len(texts) // shown] for i in range(shown)]
    queries = encoder.encode_texts([settings.prefix + text for text in texts])
    found = top_matches(queries, encoder.encode_image(pixels), k=5)

    def match(text: str, j: int) -> Match:
        return Match(_uri(pixels[j]), captions_of[j][-1], text in captions_of[j])

    return [(text, [match(text, j) for j in row]) for text, row in zip(texts, found, strict=True)]


def neighbors(trained: Trained, captions: int, k: int) -> list[tuple[str, list[Neighbor]]]:
    """Captions of the samples that training would take next, and what they find in the support set.

    A caption is encoded as the loss does it: with the newest parameters, not their average, and
    with tokens hidden if the method contrasts masked captions. The set keeps features, not texts:
    those follow from a row's age, since sample number n is always the same.

    Args:
      trained: a model.
      captions: how many, rounded up to what the devices share evenly.
      k: rows for each.

    Returns:
      [] for a method without a support set.

    Raises:
      ValueError: the data are not on this machine, or have changed, or the batch size has, and what
        was enqueued cannot be told.
    """
    if trained.setup is None:
        raise ValueError("another program's weights come without a support set.")
    rows = trained.state.model_state.get("support_set")
    if rows is None:
        return []
    config, setup = trained.config, trained.setup
    seen = trained.record["samples"]
    if seen != trained.step * config.batch_size:
        raise ValueError(
            "config.batch_size has changed during the run: which captions the rows come from "
            "cannot be told."
        )
    source = open_data(config.data)
    if trained.record.get("data") != digest(source):
        raise ValueError(f"{source} has changed since: which captions the rows come from is lost.")
    views = setup.method.views
    encoder = trained.encoder.use(trained.state.params, trained.state.model_state)
    image_views = [config.views[name] for name in views.image]
    samples = Samples(source, config.data, config.seed, image_views, views.text, encoder.tokenizer)
    resolution = config.model.image.resolution
    images = np.empty((len(views.image), resolution, resolution, 3), np.uint8)

    texts, tokens = [], []
    count = -(-captions // setup.mesh.size) * setup.mesh.size
    for number in range(seen, seen + count):
        sample = samples.draw(number, images)
        ids = encoder.tokenizer.encode(sample.texts[:1], encoder.context)[0]
        if views.text[0] == "masked":
            ids, _ = mask_tokens(ids, config.data.mask_rate, encoder.tokenizer, sample.rng)
        texts.append(sample.texts[0])
        tokens.append(ids)
    queries, k = encoder.encode_text(np.stack(tokens)), min(k, len(rows["rows"]))
    found = support_set.nearest(rows, queries, k, mesh=setup.mesh, block=config.loss.block)

    def describe(similarity: float, age: int) -> Neighbor:
        if age < 0:
            return Neighbor(None, similarity)
        steps, view, place = origin(age, config.batch_size)
        number = seen - (steps + 1) * config.batch_size + place
        caption = samples.draw(number, images).texts[view]
        return Neighbor(caption, similarity, views.text[view] == "augmented", steps)

    similarities, ages = jax.device_get((found.similarity, found.age))
    return [
        (text, list(map(describe, row.tolist(), age.tolist())))
        for text, row, age in zip(texts, similarities, ages, strict=True)
    ]


def origin(age: int, batch_size: int) -> tuple[int, int, int]:
    """Where a row of the support set came from, by its age: see `methods.declip.enqueue`.

    Returns:
      How many steps after it there have been, its text view (0: the caption, -1: the augmented
      caption), and its pair's place in the batch.
    """
    steps, later = divmod(age, 2 * batch_size)
    view, place = divmod(2 * batch_size - 1 - later, batch_size)
    return steps, view - 1, place


def _uri(image: np.ndarray) -> str:
    """uint8 [R, R, 3] -> a JPEG as a data URI."""
    if len(image) > SIDE:
        image = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    bgr = np.ascontiguousarray(image[..., ::-1])
    encoded = cv2.imencode(".jpg", bgr, [cv2.IMWRITE_JPEG_QUALITY, 85])[1]
    return "data:image/jpeg;base64," + base64.b64encode(encoded).decode()
