"""State dicts of the published DeCLIP code: its towers and logit scale, shared by its methods."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from declip_jax.interop import tables
from declip_jax.interop.tables import CONV, LINEAR, SAME, SCALAR, Entry, Layout, Transform


def _our_order(vocab_size: int) -> np.ndarray:
    """Their id of each of our ids: last come mask, start, end there, start, end, mask here."""
    mask, start, end = vocab_size - 3, vocab_size - 2, vocab_size - 1
    return np.array([*range(mask), start, end, mask])


_VOCABULARY = Transform(
    lambda x: x[_our_order(len(x))], lambda x: x[np.argsort(_our_order(len(x)))]
)


def tokens_from_theirs(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """Their token ids as ours, of any shape; int32."""
    return np.argsort(_our_order(vocab_size)).astype(np.int32)[tokens]


def _norm(ours: str, theirs: str) -> list[Entry]:
    return [
        Entry(f"params/{ours}/scale", f"{theirs}.weight", SAME),
        Entry(f"params/{ours}/bias", f"{theirs}.bias", SAME),
    ]


def _batch_norm(ours: str, theirs: str) -> list[Entry]:
    return [
        *_norm(ours, theirs),
        Entry(f"batch_stats/{ours}/mean", f"{theirs}.running_mean", SAME),
        Entry(f"batch_stats/{ours}/var", f"{theirs}.running_var", SAME),
    ]


def _linear(ours: str, theirs: str) -> list[Entry]:
    return [
        Entry(f"params/{ours}/kernel", f"{theirs}.weight", LINEAR),
        Entry(f"params/{ours}/bias", f"{theirs}.bias", SAME),
    ]


def _blocks(ours: str, theirs: str) -> list[Entry]:
    return [
        *_norm(f"{ours}/ln_1", f"{theirs}.{{i}}.ln_1"),
        Entry(f"params/{ours}/attn/in_proj/kernel", f"{theirs}.{{i}}.attn.in_proj_weight", LINEAR),
        Entry(f"params/{ours}/attn/in_proj/bias", f"{theirs}.{{i}}.attn.in_proj_bias", SAME),
        *_linear(f"{ours}/attn/out_proj", f"{theirs}.{{i}}.attn.out_proj"),
        *_norm(f"{ours}/ln_2", f"{theirs}.{{i}}.ln_2"),
        *_linear(f"{ours}/mlp/c_fc", f"{theirs}.{{i}}.mlp.c_fc"),
        *_linear(f"{ours}/mlp/c_proj", f"{theirs}.{{i}}.mlp.c_proj"),
    ]


_VIT = [
    Entry("params/image/patch_embed/kernel", "visual.conv1.weight", CONV),
    Entry("params/image/class_embedding", "visual.class_embedding", SAME),
    Entry("params/image/positional_embedding", "visual.positional_embedding", SAME),
    *_norm("image/ln_pre", "visual.ln_pre"),
    *_blocks("image/blocks", "visual.transformer.resblocks"),
    *_norm("image/ln_post", "visual.ln_post"),
    Entry("params/image/proj/kernel", "visual.proj", SAME),
]

_STAGE, _THEIR_STAGE = "image/layer{stage}_{block}", "visual.layer{stage}.{block}"
_RESNET = [
    Entry("params/image/conv{n}/kernel", "visual.conv{n}.weight", CONV),
    *_batch_norm("image/bn{n}", "visual.bn{n}"),
    Entry(f"params/{_STAGE}/conv{{n}}/kernel", f"{_THEIR_STAGE}.conv{{n}}.weight", CONV),
    *_batch_norm(f"{_STAGE}/bn{{n}}", f"{_THEIR_STAGE}.bn{{n}}"),
    Entry(f"params/{_STAGE}/downsample_conv/kernel", f"{_THEIR_STAGE}.downsample.0.weight", CONV),
    *_batch_norm(f"{_STAGE}/downsample_bn", f"{_THEIR_STAGE}.downsample.1"),
    Entry(
        "params/image/attnpool/positional_embedding", "visual.attnpool.positional_embedding", SAME
    ),
    *_linear("image/attnpool/q_proj", "visual.attnpool.q_proj"),
    *_linear("image/attnpool/k_proj", "visual.attnpool.k_proj"),
    *_linear("image/attnpool/v_proj", "visual.attnpool.v_proj"),
    *_linear("image/attnpool/c_proj", "visual.attnpool.c_proj"),
]

_TEXT = [
    Entry(
        "params/text/token_embedding/embedding", "encode_text.token_embedding.weight", _VOCABULARY
    ),
    Entry("params/text/positional_embedding", "encode_text.positional_embedding", SAME),
    *_blocks("text/blocks", "encode_text.transformer.resblocks"),
    *_norm("text/ln_final", "encode_text.ln_final"),
    *_linear("text/proj", "encode_text.text_projection"),
]

LAYOUT = Layout(
    entries=(*_VIT, *_RESNET, *_TEXT, Entry("params/logit_scale", "logit_scale", SCALAR)),
    ignored=(
        r".*\.num_batches_tracked",  # torch's counter, used only without a momentum
        r"visual\.fc\.(weight|bias)",  # the ResNet's classifier, which no loss reads
    ),
)


def load(state_dict: Mapping[str, np.ndarray], like: Any) -> Any:
    """A published state dict as variables like `like`; see `tables.load`."""
    return tables.load(LAYOUT, state_dict, like)


def dump(variables: Any) -> dict[str, np.ndarray]:
    """Variables under the published names; see `tables.dump`."""
    return tables.dump(LAYOUT, variables)
