"""State dicts of the published DeCLIP code: CLIP, SLIP, FILIP, DeCLIP and DeFILIP."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from declip_jax.interop import tables
from declip_jax.interop.parts import RESNET, VIT, batch_norm, blocks, linear, norm
from declip_jax.interop.tables import SAME, SCALAR, Entry, Layout, Transform


def _our_order(vocab_size: int) -> np.ndarray:
    """Their id of each of our ids: last come mask, start, end there, start, end, mask here."""
    mask, start, end = vocab_size - 3, vocab_size - 2, vocab_size - 1
    return np.array([*range(mask), start, end, mask])


_VOCABULARY = Transform(
    lambda x: x[_our_order(len(x))], lambda x: x[np.argsort(_our_order(len(x)))]
)
_WORD_LOGITS = Transform(  # [vocabulary, width] <-> [width, vocabulary]
    lambda x: _VOCABULARY.forward(x).T, lambda x: _VOCABULARY.inverse(x.T)
)


def tokens_from_theirs(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Their token ids as ours, of any shape; int32."""
    return np.argsort(_our_order(vocab_size)).astype(np.int32)[tokens]


def _text(theirs: str) -> list[Entry]:
    return [
        Entry(
            "params/text/token_embedding/embedding", f"{theirs}.token_embedding.weight", _VOCABULARY
        ),
        Entry("params/text/positional_embedding", f"{theirs}.positional_embedding", SAME),
        *blocks("text/blocks", f"{theirs}.transformer.resblocks"),
        *norm("text/ln_final", f"{theirs}.ln_final"),
        *linear("text/proj", f"{theirs}.text_projection"),
    ]


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
    Entry("params/mlm_head/kernel", "text_label_predictor.weight", _WORD_LOGITS),
    Entry("params/mlm_head/bias", "text_label_predictor.bias", _VOCABULARY),
    *linear("image_mapping", "image_mapping"),
    *linear("text_mapping", "text_mapping"),
]


def _layout(text: str, *ignored: str) -> Layout:
    return Layout(
        entries=(
            *VIT,
            *RESNET,
            *_text(text),
            *_HEADS,
            Entry("params/logit_scale", "logit_scale", SCALAR),
            Entry("params/logit_scale_dense", "logit_scale_dense", SAME),
        ),
        ignored=(
            r".*\.num_batches_tracked",  # torch's counter, used only without a momentum
            r"visual\.fc\.(weight|bias)",  # the ResNet's classifier, which no loss reads
            *ignored,
        ),
    )


_LAYOUT = _layout("encode_text")
LAYOUTS = {
    "clip": _LAYOUT,
    # The text tower has another name, and an unused layer stands after the head's last one.
    "slip": _layout("text_encoder", r"predictor_sim\.bn3\..*"),
    "filip": _layout("encode_text", r"text_label_predictor\..*"),  # never used
    "declip": _LAYOUT,
    "defilip": _LAYOUT,
}


def load(state_dict: Mapping[str, np.ndarray], like: Any, method: str = "clip") -> Any:
    """A published state dict of `method` as variables like `like`; see `tables.load`."""
    return tables.load(LAYOUTS[method], state_dict, like)


def dump(variables: Any, method: str = "clip") -> dict[str, np.ndarray]:
    """Variables under the names published for `method`; see `tables.dump`."""
    return tables.dump(LAYOUTS[method], variables)
