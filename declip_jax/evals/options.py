"""The section `config.eval`."""

from declip_jax.section import Section, at_least, one_of


class Zeroshot(Section):
    source: str
    split: str
    templates: tuple[str, ...]


class Retrieval(Section):
    source: str
    split: str
    prefix: str


class Eval(Section):
    """What a run is scored on, and how it sees images; configs/common.py tells of each field."""

    every: int = at_least(0)
    batch_size: int = at_least(1)
    preprocess: str = one_of("declip", "openai", "train")
    suite: str
    data_dir: str
    zeroshot: Zeroshot
    retrieval: Retrieval
