import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from declip_jax.interop import declip
from declip_jax.models.two_towers import two_towers

TEXT = dict(vocab_size=20, eot_id=18, context=8, width=24, layers=2, heads=3, proj_bias=True)
IMAGES = {
    "vit": dict(kind="vit", resolution=16, patch=8, width=32, layers=3, heads=2),
    "resnet": dict(
        kind="resnet", resolution=32, width=8, layers=(1, 1, 2, 1), heads=4, bn_group_size=0
    ),
}


@pytest.fixture(scope="module", params=["vit", "resnet"])
def variables(request):
    """Every value distinct, batch statistics too."""
    image = IMAGES[request.param]
    model = two_towers(
        ConfigDict(
            dict(
                embed_dim=16,
                activation="quick_gelu",
                dtype="float32",
                scan=True,
                remat="none",
                image=image,
                text=TEXT,
            )
        )
    )
    like = jax.eval_shape(
        model.init,
        jax.random.key(0),
        jnp.zeros((1, image["resolution"], image["resolution"], 3)),
        jnp.zeros((1, 8), jnp.int32),
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), like)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.map(lambda x: x.dtype, one) == jax.tree.map(lambda x: x.dtype, other)


def test_round_trips_are_exact(variables):
    state_dict = declip.dump(variables)
    assert sum(x.size for x in state_dict.values()) == sum(
        x.size for x in jax.tree.leaves(variables)
    )
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    loaded = declip.load(state_dict, like)
    assert_same(loaded, variables)
    assert_same(declip.dump(loaded), state_dict)
    assert all(x.flags.c_contiguous for x in state_dict.values())


def test_names_and_layouts(variables):
    state_dict = declip.dump(variables)
    image, text = variables["params"]["image"], variables["params"]["text"]
    assert state_dict["logit_scale"].shape == (1,)
    np.testing.assert_array_equal(
        state_dict["encode_text.transformer.resblocks.1.mlp.c_fc.weight"],
        text["blocks"]["mlp"]["c_fc"]["kernel"][1].T,
    )
    if "patch_embed" in image:
        np.testing.assert_array_equal(
            state_dict["visual.conv1.weight"][5, 2], image["patch_embed"]["kernel"][:, :, 2, 5]
        )
    else:
        np.testing.assert_array_equal(
            state_dict["visual.layer3.0.downsample.1.running_var"],
            variables["batch_stats"]["image"]["layer3_0"]["downsample_bn"]["var"],
        )


def test_vocabulary_and_token_ids_move_together(variables):
    # theirs: mask 17, start 18, end 19; ours: start 17, end 18, mask 19
    tokens = np.array([[18, 3, 17, 19, 0]])
    ours = declip.tokens_from_theirs(tokens, 20)
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(ours, [[17, 3, 19, 18, 0]])
    table = variables["params"]["text"]["token_embedding"]["embedding"]
    theirs = declip.dump(variables)["encode_text.token_embedding.weight"]
    np.testing.assert_array_equal(table[ours], theirs[tokens])


def test_names_without_a_counterpart_are_ignored(variables):
    state_dict = declip.dump(variables)
    extended = state_dict | {
        "visual.bn1.num_batches_tracked": np.array(3),
        "visual.fc.weight": np.zeros((16, 2048), np.float32),
        "visual.fc.bias": np.zeros(16, np.float32),
    }
    assert_same(declip.load(extended, variables), variables)


def test_everything_that_does_not_fit_is_listed_at_once(variables):
    state_dict = declip.dump(variables)
    del state_dict["encode_text.transformer.resblocks.1.ln_2.bias"]
    del state_dict["encode_text.ln_final.bias"]
    state_dict["projector.linear1.weight"] = np.zeros((2, 2), np.float32)
    state_dict["encode_text.text_projection.weight"] = np.zeros((24, 16), np.float32)
    state_dict["logit_scale"] = np.zeros((), np.float32)
    with pytest.raises(ValueError) as error:
        declip.load(state_dict, variables)
    for part in (
        "missing: ",
        "encode_text.transformer.resblocks.1.ln_2.bias",
        "encode_text.ln_final.bias",
        "unexpected: projector.linear1.weight\n",
        "encode_text.text_projection.weight has shape (24, 16), expected (16, 24)",
        "logit_scale has shape (), expected (1,)",
    ):
        assert part in str(error.value)


def test_variables_without_a_name_are_refused(variables):
    params = variables["params"] | {"head": {"kernel": np.zeros(3)}}
    with pytest.raises(ValueError, match="no name for: params/head/kernel"):
        declip.dump({"params": params})


def test_half_precision_files_load_as_the_model_holds_them(variables):
    half = {name: value.astype(np.float16) for name, value in declip.dump(variables).items()}
    loaded = declip.load(half, variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {np.dtype("float32")}
    assert_same(loaded, jax.tree.map(lambda x: x.astype(np.float16).astype(x.dtype), variables))
