"""Entries for the parts that published layouts have in common; see `tables`."""

from declip_jax.interop.tables import CONV, LINEAR, SAME, Entry


def norm(ours: str, theirs: str) -> list[Entry]:
    return [
        Entry(f"params/{ours}/scale", f"{theirs}.weight", SAME),
        Entry(f"params/{ours}/bias", f"{theirs}.bias", SAME),
    ]


def batch_norm(ours: str, theirs: str) -> list[Entry]:
    return [
        *norm(ours, theirs),
        Entry(f"batch_stats/{ours}/mean", f"{theirs}.running_mean", SAME),
        Entry(f"batch_stats/{ours}/var", f"{theirs}.running_var", SAME),
    ]


def linear(ours: str, theirs: str) -> list[Entry]:
    return [
        Entry(f"params/{ours}/kernel", f"{theirs}.weight", LINEAR),
        Entry(f"params/{ours}/bias", f"{theirs}.bias", SAME),
    ]


def blocks(ours: str, theirs: str) -> list[Entry]:
    return [
        *norm(f"{ours}/ln_1", f"{theirs}.{{i}}.ln_1"),
        Entry(f"params/{ours}/attn/in_proj/kernel", f"{theirs}.{{i}}.attn.in_proj_weight", LINEAR),
        Entry(f"params/{ours}/attn/in_proj/bias", f"{theirs}.{{i}}.attn.in_proj_bias", SAME),
        *linear(f"{ours}/attn/out_proj", f"{theirs}.{{i}}.attn.out_proj"),
        *norm(f"{ours}/ln_2", f"{theirs}.{{i}}.ln_2"),
        *linear(f"{ours}/mlp/c_fc", f"{theirs}.{{i}}.mlp.c_fc"),
        *linear(f"{ours}/mlp/c_proj", f"{theirs}.{{i}}.mlp.c_proj"),
    ]


_VIT = [
    Entry("params/image/patch_embed/kernel", "visual.conv1.weight", CONV),
    Entry("params/image/class_embedding", "visual.class_embedding", SAME),
    Entry("params/image/positional_embedding", "visual.positional_embedding", SAME),
    *norm("image/ln_pre", "visual.ln_pre"),
    *blocks("image/blocks", "visual.transformer.resblocks"),
    *norm("image/ln_post", "visual.ln_post"),
    Entry("params/image/proj/kernel", "visual.proj", SAME),
]

_STAGE, _THEIR_STAGE = "image/layer{stage}_{block}", "visual.layer{stage}.{block}"
_RESNET = [
    Entry("params/image/conv{n}/kernel", "visual.conv{n}.weight", CONV),
    *batch_norm("image/bn{n}", "visual.bn{n}"),
    Entry(f"params/{_STAGE}/conv{{n}}/kernel", f"{_THEIR_STAGE}.conv{{n}}.weight", CONV),
    *batch_norm(f"{_STAGE}/bn{{n}}", f"{_THEIR_STAGE}.bn{{n}}"),
    Entry(f"params/{_STAGE}/downsample_conv/kernel", f"{_THEIR_STAGE}.downsample.0.weight", CONV),
    *batch_norm(f"{_STAGE}/downsample_bn", f"{_THEIR_STAGE}.downsample.1"),
    Entry(
        "params/image/attnpool/positional_embedding", "visual.attnpool.positional_embedding", SAME
    ),
    *linear("image/attnpool/q_proj", "visual.attnpool.q_proj"),
    *linear("image/attnpool/k_proj", "visual.attnpool.k_proj"),
    *linear("image/attnpool/v_proj", "visual.attnpool.v_proj"),
    *linear("image/attnpool/c_proj", "visual.attnpool.c_proj"),
]

# Entries of an image tower by its kind. Both have a "visual.conv1".
IMAGE = {"vit": _VIT, "resnet": _RESNET}
