"""What error messages share."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: object, known: Iterable[str], cutoff: float = 0.6) -> str:
    """ " Did you mean 'near'?", of the known word that is nearest to an unknown one; or "".

    A `cutoff` of 0 suggests one however far.
    """
    close = difflib.get_close_matches(str(word), list(known), n=1, cutoff=cutoff)
    return f" Did you mean {close[0]!r}?" if close else ""
