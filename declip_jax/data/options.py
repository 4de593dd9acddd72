"""`config.data`: what a run trains on, and how it is read."""

from typing import Any

from declip_jax.section import Section, at_least, between, option, read_value

EDA = ("synonym", "swap", "delete")  # operations of `text.augment`


def _names(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, str):  # one may stand without a tuple around it
        return (value,) if value else ()
    return read_value(value, tuple[str, ...], where, "a name, or a tuple of names")


class Columns(Section):
    """What a source calls its fields; where nothing is named, it looks for the usual names.

    A webdataset calls a text `txt` if it is the file `KEY.txt` of a sample and `json.caption` if it
    is the field "caption" of `KEY.json`; TFDS calls nested features `captions/text`.
    """

    image: str = ""
    captions: tuple[str, ...] = option((), read=_names)
    synthetic: tuple[str, ...] = option((), read=_names)
    key: str = ""
    label: str = ""


class Share(Section):
    """A source of a mixture; what is None is as for all of them."""

    source: str
    split: str | None = None
    weight: float | None = None  # of the samples, in any unit; None: as many as it has records
    columns: dict[str, Any] | None = None  # some of those of `Columns`


def _mixture(value: Any, where: str) -> tuple[Share, ...]:
    if not isinstance(value, list | tuple) or any(isinstance(entry, str) for entry in value):
        raise ValueError(
            f"{where}={value!r}: expected dict(source=…) for each source; a mixture of one has a "
            "comma after it."
        )
    return tuple(Share.read(entry, f"{where}[{number}]") for number, entry in enumerate(value))


def _lengths(given: tuple[int, ...]) -> str:
    ascending = list(given) == sorted(set(given))
    if ascending and all(length >= 4 and length % 2 == 0 for length in given):
        return ""
    return (
        "must be even numbers of at least 4, each larger than the one before, or () to keep all "
        "batches as long as the context"
    )


def _operations(given: tuple[str, ...]) -> str:
    return "" if given and set(given) <= set(EDA) else f"must name one or more of {', '.join(EDA)}"


class Data(Section):
    """What configs/common.py tells of `config.data`, field by field."""

    source: str
    split: str
    columns: Columns
    mixture: tuple[Share, ...] = option(read=_mixture)
    index_cache: str
    max_bad_fraction: float = between(0, 1)
    bad_window: int = at_least(1)
    workers: int = at_least(0)
    threads: int = at_least(0)
    prefetch: int = at_least(2)
    token_lengths: tuple[int, ...] = option(rule=_lengths)
    mask_rate: float = between(0, 1)
    eda: tuple[str, ...] = option(rule=_operations)
    synonyms: str

    def check(self, where: str) -> None:
        if self.source and self.mixture:
            raise ValueError(
                f"{where}.source={self.source!r} and {where}.mixture are both set: clear one."
            )
        weights = [share.weight for share in self.mixture]
        if None in weights and weights.count(None) < len(weights):
            raise ValueError(
                f"{where}.mixture has the weights {weights}: give every source a number as its "
                "'weight', or none, and each then has as many as it has records."
            )
        for number, share in enumerate(self.mixture):
            self.columns_of(share, f"{where}.mixture[{number}].columns")

    def columns_of(self, share: Share, where: str = "config.data.mixture") -> Columns:
        """Those that a source of the mixture names, and for the rest those of all."""
        return Columns.read(self.columns.as_dict() | dict(share.columns or {}), where)
