"""Entries for the parts that published layouts have in common; see `tables`."""

from declip_jax.interop.tables import CONV, LINEAR, SAME, Entry, Transform


def array(ours: str, theirs: str, transform: Transform = SAME) -> Entry:
    return Entry(f"params/{ours}", (theirs,), transform)


def norm(ours: str, theirs: str) -> list[Entry]:
    return [array(f"{ours}/scale", f"{theirs}.weight"), array(f"{ours}/bias", f"{theirs}.bias")]


def batch_norm(ours: str, theirs: str) -> list[Entry]:
    return [
        *norm(ours, theirs),
        Entry(f"batch_stats/{ours}/mean", (f"{theirs}.running_mean",), SAME),
        Entry(f"batch_stats/{ours}/var", (f"{theirs}.running_var",), SAME),
    ]


def linear(ours: str, theirs: str) -> list[Entry]:
    kernel = array(f"{ours}/kernel", f"{theirs}.weight", LINEAR)
    return [kernel, array(f"{ours}/bias", f"{theirs}.bias")]


def blocks(ours: str, theirs: str) -> list[Entry]:
    return [
        *norm(f"{ours}/ln_1", f"{theirs}.{{i}}.ln_1"),
        array(f"{ours}/attn/in_proj/kernel", f"{theirs}.{{i}}.attn.in_proj_weight", LINEAR),
        array(f"{ours}/attn/in_proj/bias", f"{theirs}.{{i}}.attn.in_proj_bias"),
        *linear(f"{ours}/attn/out_proj", f"{theirs}.{{i}}.attn.out_proj"),
        *norm(f"{ours}/ln_2", f"{theirs}.{{i}}.ln_2"),
        *linear(f"{ours}/mlp/c_fc", f"{theirs}.{{i}}.mlp.c_fc"),
        *linear(f"{ours}/mlp/c_proj", f"{theirs}.{{i}}.mlp.c_proj"),
    ]


def text(prefix: str = "", vocabulary: Transform = SAME) -> list[Entry]:
    """A text tower without its projection; `vocabulary` is what happens to the rows of tokens."""
    return [
        array("text/token_embedding/embedding", f"{prefix}token_embedding.weight", vocabulary),
        array("text/positional_embedding", f"{prefix}positional_embedding"),
        *blocks("text/blocks", f"{prefix}transformer.resblocks"),
        *norm("text/ln_final", f"{prefix}ln_final"),
    ]


_VIT = [
    array("image/patch_embed/kernel", "visual.conv1.weight", CONV),
    array("image/class_embedding", "visual.class_embedding"),
    array("image/positional_embedding", "visual.positional_embedding"),
    *norm("image/ln_pre", "visual.ln_pre"),
    *blocks("image/blocks", "visual.transformer.resblocks"),
    *norm("image/ln_post", "visual.ln_post"),
    array("image/proj/kernel", "visual.proj"),
]

_STAGE, _THEIR_STAGE = "image/layer{stage}_{block}", "visual.layer{stage}.{block}"
_POOL, _THEIR_POOL = "image/attnpool", "visual.attnpool"
_RESNET = [
    array("image/conv{n}/kernel", "visual.conv{n}.weight", CONV),
    *batch_norm("image/bn{n}", "visual.bn{n}"),
    array(f"{_STAGE}/conv{{n}}/kernel", f"{_THEIR_STAGE}.conv{{n}}.weight", CONV),
    *batch_norm(f"{_STAGE}/bn{{n}}", f"{_THEIR_STAGE}.bn{{n}}"),
    array(f"{_STAGE}/downsample_conv/kernel", f"{_THEIR_STAGE}.downsample.0.weight", CONV),
    *batch_norm(f"{_STAGE}/downsample_bn", f"{_THEIR_STAGE}.downsample.1"),
    array(f"{_POOL}/positional_embedding", f"{_THEIR_POOL}.positional_embedding"),
    *(row for x in "qkvc" for row in linear(f"{_POOL}/{x}_proj", f"{_THEIR_POOL}.{x}_proj")),
]

# Entries of an image tower by its kind. Both have a "visual.conv1".
IMAGE = {"vit": _VIT, "resnet": _RESNET}
