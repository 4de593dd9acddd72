"""What sources whose fields `Columns` names have in common: finding them, and checking values."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from declip_jax.data import records
from declip_jax.data.input_files import MAX_CAPTION, check_image_size
from declip_jax.data.options import Columns
from declip_jax.data.records import BadRecord


def choose(
    columns: Columns,
    present: Mapping[str, Any],
    where: str,
    field: str,
    usual: Sequence[str],
    fits: Callable[[Any], bool],
    expected: str,
) -> tuple[str, ...]:
    """The columns that `columns` names for a field.

    Where it names none, the first of the usual ones, for an image else the only one that fits.

    Args:
      present: {column: its type}; messages show str(type).
      where: what has these columns, for messages.
      usual: names to look for; columns that do not fit are passed over.
      fits: whether a column of such a type can be read as this field.
      expected: the types that fit, in words.

    Raises ValueError: a named column is missing or does not fit, or there is no image or caption.
    """
    named = getattr(columns, field)
    named = tuple(filter(None, [named] if isinstance(named, str) else named))
    problem = ""
    for name in named:
        if name not in present:
            problem = f"has no {name!r}"
        elif not fits(present[name]):
            problem = f"has {name!r} as {present[name]}"
    fitting = tuple(name for name, kind in present.items() if fits(kind))
    chosen = named or tuple(name for name in usual if name in fitting)[:1]
    if field == "image" and len(fitting) == 1:
        chosen = chosen or fitting
    if field in ("image", "captions") and not chosen:
        problem = f"has none of the usual ones ({', '.join(usual)}) that can be read"
    if problem:
        raise ValueError(
            f"config.data.columns.{field}: {where} {problem}; name {expected}. It has: "
            + ", ".join(f"{name}: {kind}" for name, kind in present.items())
        )
    return chosen


def checked_record(
    image: Any, captions: Iterable[Any], key: Any, synthetic: Iterable[Any] | None = None
) -> records.Record:
    """A record of what is stored as bytes, or as buffers, which are copied; texts are in UTF-8.

    Blank captions are left out. `image` is None where there is none, `synthetic` if the source has
    none at all. Raises BadRecord if an image or all captions are missing, too large, or not UTF-8.
    """
    if image is None or not len(image):
        raise BadRecord("no image", "it is empty")
    check_image_size(len(image))
    record = {
        "image": bytes(image),
        "captions": _texts(captions, "no caption"),
        "key": _texts([key], "no key")[0],
    }
    if synthetic is not None:
        record["synthetic"] = _texts(synthetic, "no synthetic caption")
    return record


def class_caption(name: str) -> str:
    """The caption of an image of which only the class is known."""
    return f"a photo of a {name.replace('_', ' ')}."


def _texts(stored: Iterable[Any], missing: str) -> list[str]:
    stored = list(stored)
    size = sum(map(len, stored))
    if size > MAX_CAPTION:
        raise BadRecord("caption too long", f"{size:,} bytes, at most {MAX_CAPTION:,}")
    try:
        texts = [text for text in (str(text, "utf-8") for text in stored) if text.strip()]
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8", str(error)) from None
    if not texts:
        raise BadRecord(missing, "it is empty")
    return texts
