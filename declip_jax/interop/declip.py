"""State dicts of the published DeCLIP code: CLIP, SLIP, FILIP, DeCLIP and DeFILIP."""

import numpy as np

from declip_jax.interop.layers import IMAGE, array, batch_norm, linear, text
from declip_jax.interop.tables import LINEAR, SCALAR, Entry, Layout, Transform


def _our_order(vocab_size: int) -> np.ndarray:
    """Their id of each of our ids: last come mask, start, end there, start, end, mask here."""
    *words, mask, start, end = range(vocab_size)
    return np.array([*words, start, end, mask])


_VOCABULARY = Transform(
    "mask, start, end <-> start, end, mask",
    lambda x: x[_our_order(len(x))],
    lambda x: x[np.argsort(_our_order(len(x)))],
)
_WORD_LOGITS = Transform(
    f"{_VOCABULARY.name}, {LINEAR.name}",
    lambda x: _VOCABULARY.forward(x).T,
    lambda x: _VOCABULARY.inverse(x.T),
)


def tokens_from_theirs(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Their token ids as ours, of any shape; int32."""
    return np.argsort(_our_order(vocab_size)).astype(np.int32)[tokens]


def _mlp(ours: str, theirs: str) -> list[Entry]:
    return [
        *linear(f"{ours}/linear{{n}}", f"{theirs}.linear{{n}}"),
        *batch_norm(f"{ours}/bn{{n}}", f"{theirs}.bn{{n}}"),
    ]


_HEADS = [
    *_mlp("simclr", "predictor_sim"),
    *_mlp("projector", "projector"),
    *linear("predictor/linear1", "predictor.linear1"),
    *linear("predictor/linear2", "predictor.layer2"),
    *batch_norm("predictor/bn1", "predictor.bn1"),
    array("mlm_head/kernel", "text_label_predictor.weight", _WORD_LOGITS),
    array("mlm_head/bias", "text_label_predictor.bias", _VOCABULARY),
    *linear("image_mapping", "image_mapping"),
    *linear("text_mapping", "text_mapping"),
]


HEADS = frozenset(entry.ours.split("/")[1] for entry in _HEADS) | {"logit_scale_dense"}
_IGNORED = (
    r".*\.num_batches_tracked",  # torch's counter, used only without a momentum
    r"visual\.fc\.(weight|bias)",  # the ResNet's classifier, which no loss reads
)
_IGNORED_OF = {
    "slip": (r"predictor_sim\.bn3\..*",),  # stands after the head's last layer, unused
    "filip": (r"text_label_predictor\..*",),  # never used
}
METHODS = ("clip", "slip", "filip", "declip", "defilip")


def layout(kind: str, method: str) -> Layout:
    """The table for one of METHODS and an image tower of a kind ("vit" or "resnet")."""
    tower = "text_encoder" if method == "slip" else "encode_text"
    entries = (
        *IMAGE[kind],
        *text(f"{tower}.", _VOCABULARY),
        *linear("text/proj", f"{tower}.text_projection"),
        *_HEADS,
        array("logit_scale", "logit_scale", SCALAR),
        array("logit_scale_dense", "logit_scale_dense"),
    )
    return Layout(entries, (*_IGNORED, *_IGNORED_OF.get(method, ())))
