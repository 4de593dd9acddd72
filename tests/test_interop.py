import jax
import numpy as np
import pytest

from configs import common
from declip_jax import methods
from declip_jax.interop import declip, openai
from declip_jax.parallel.mesh import make_mesh

IMAGES = {
    "vit": dict(kind="vit", resolution=16, patch=8, width=32, layers=3, heads=2),
    "resnet": dict(
        kind="resnet", resolution=32, width=8, layers=(1, 1, 2, 1), heads=4, bn_group_size=0
    ),
}
TERMS = {
    "clip": ("clip",),
    "slip": ("clip", "simclr"),
    "filip": ("clip", "filip"),
    "declip": ("clip", "simsiam", "mlm", "nn_text"),
    "defilip": ("clip", "simsiam", "mlm", "nn_text", "filip"),
    "alip": ("raw", "synthetic"),
}


def variables_of(method, kind="vit"):
    """Every value distinct, batch statistics too."""
    config = common.get_config("tiny").unlock()
    config.method = method
    config.loss.weights = dict.fromkeys(TERMS[method], 1.0)
    config.model.embed_dim = 16
    config.model.image = IMAGES[kind]
    config.model.text.update(vocab_size=20, eot_id=18, context=8, width=24, heads=3)
    config.model.text.proj_bias = method != "alip"
    init = methods.build(config, make_mesh(1, 1, jax.devices()[:1])).init
    params, extra = jax.eval_shape(init, jax.random.key(0))
    like = {"params": params, **{name: extra[name] for name in extra if name == "batch_stats"}}
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), like)


@pytest.fixture(scope="module", params=["vit", "resnet"])
def variables(request):
    return variables_of("clip", request.param)


def assert_same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)
    assert jax.tree.map(lambda x: x.dtype, one) == jax.tree.map(lambda x: x.dtype, other)


@pytest.mark.parametrize("kind", IMAGES)
@pytest.mark.parametrize("method", TERMS)
def test_round_trips_are_exact(method, kind):
    variables = variables_of(method, kind)
    layout = (openai,) if method == "alip" else (declip, method)
    module, arguments = layout[0], layout[1:]
    state_dict = module.dump(variables, *arguments)
    assert sum(x.size for x in state_dict.values()) == sum(
        x.size for x in jax.tree.leaves(variables)
    )
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    loaded = module.load(state_dict, like, *arguments)
    assert_same(loaded, variables)
    assert_same(module.dump(loaded, *arguments), state_dict)
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


def test_names_of_the_heads():
    variables = variables_of("defilip")
    params, state_dict = variables["params"], declip.dump(variables, "defilip")
    for name, ours in {
        "projector.linear3.weight": params["projector"]["linear3"]["kernel"].T,
        "projector.bn3.running_mean": variables["batch_stats"]["projector"]["bn3"]["mean"],
        "predictor.layer2.bias": params["predictor"]["linear2"]["bias"],
        "predictor.bn1.weight": params["predictor"]["bn1"]["scale"],
        "text_mapping.weight": params["text_mapping"]["kernel"].T,
        "logit_scale_dense": params["logit_scale_dense"],
    }.items():
        np.testing.assert_array_equal(state_dict[name], ours)
    # the words' logits lie in the order of the vocabulary
    head, theirs = params["mlm_head"], np.arange(20)
    ours = declip.tokens_from_theirs(theirs, 20)
    weight = state_dict["text_label_predictor.weight"]
    np.testing.assert_array_equal(weight[theirs], head["kernel"].T[ours])
    np.testing.assert_array_equal(state_dict["text_label_predictor.bias"], head["bias"][ours])


def test_slip_has_names_of_its_own():
    variables = variables_of("slip")
    state_dict = declip.dump(variables, "slip")
    simclr = variables["params"]["simclr"]
    np.testing.assert_array_equal(
        state_dict["predictor_sim.linear2.weight"], simclr["linear2"]["kernel"].T
    )
    assert "text_encoder.ln_final.weight" in state_dict
    unused = {
        "predictor_sim.bn3.weight": np.zeros(16),
        "predictor_sim.bn3.running_var": np.ones(16),
    }
    assert_same(declip.load(state_dict | unused, variables, "slip"), variables)
    with pytest.raises(ValueError, match="unexpected: predictor_sim.bn3"):
        declip.load(declip.dump(variables) | unused, variables)


def test_openai_keeps_the_vocabulary_and_the_projections_as_they_are():
    params = variables_of("alip")["params"]
    state_dict = openai.dump({"params": params})
    assert state_dict["logit_scale"].shape == ()
    for name, ours in {
        "token_embedding.weight": params["text"]["token_embedding"]["embedding"],
        "text_projection": params["text"]["proj"]["kernel"],
        "visual.proj": params["image"]["proj"]["kernel"],
        "transformer.resblocks.1.attn.in_proj_weight": params["text"]["blocks"]["attn"]["in_proj"][
            "kernel"
        ][1].T,
    }.items():
        np.testing.assert_array_equal(state_dict[name], ours)


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
