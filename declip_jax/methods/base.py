"""What a method is, and what is assembled of it. The training step knows nothing else of them."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from declip_jax.losses import contrastive, ring
from declip_jax.losses.contrastive import clip_loss, normalize
from declip_jax.losses.options import Loss
from declip_jax.models.features import ImageFeatures, TextFeatures
from declip_jax.models.two_towers import Model, TwoTowers, two_towers

PyTree = Any
Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Views(NamedTuple):
    """What the pipeline must deliver for each pair."""

    image: tuple[str, ...]  # names of `config.views`
    text: tuple[str, ...]  # names of `data.pipeline.TEXT_VIEWS`
    padded: bool = False  # captions keep their padding up to the context: the loss sees it


class Network(TwoTowers):
    """The towers, and in a method's own class its heads: fields that `heads` fills."""

    @classmethod
    def of(cls, model: Model, loss: Loss) -> "Network":
        return two_towers(model, cls, **cls.heads(model, loss))

    @classmethod
    def heads(cls, model: Model, loss: Loss) -> dict[str, Any]:
        """The fields beside the towers; a subclass adds its own to its parents'."""
        del model, loss
        return {}

    def __call__(self, batch: Batch, train: bool) -> dict[str, Any]:
        image = self.encode_image(batch["image"], train)  # [B, V, ...]
        text = self.encode_text(batch["tokens"])  # [B, T, ...]
        return self.features(image, text, batch, train)

    def features(
        self, image: ImageFeatures, text: TextFeatures, batch: Batch, train: bool
    ) -> dict[str, Any]:
        """What the loss terms read: arrays whose first axis is the batch's or counts its parts."""
        del batch, train
        return {
            "image": normalize(image.embedding),  # [B, V, D]
            "text": normalize(text.embedding),  # [B, T, D]
        }


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a loss term reads."""

    features: dict[str, Any]  # of the network, for the whole global batch
    batch: Batch  # with "tokens" [B, T, L]
    state: dict[str, PyTree]  # the method's own, as it was before this step
    scales: dict[str, jax.Array]  # exp of "logit_scale" and of further logit scales
    bias: jax.Array | None  # "logit_bias", where config.model.init_logit_bias asks for one
    model: Model  # sections of the configuration
    loss: Loss
    mesh: Mesh  # that arrays lie over
    info_nce: Callable  # `losses.contrastive`'s, or those of less memory
    positive_rank: Callable
    computed: dict[Any, Any] = dataclasses.field(default_factory=dict)  # see `once`

    def image(self, view: int) -> jax.Array:
        """[B, D] unit rows of an image view."""
        return self.features["image"][:, view]

    def text(self, view: int) -> jax.Array:
        """[B, D] unit rows of a text view."""
        return self.features["text"][:, view]

    def contrast(self, image: jax.Array, text: jax.Array, weights=1.0) -> jax.Array:
        """L(image, text) of docs/methods.md, a scalar; `weights` are of each pair, [B]."""
        return clip_loss(image, text, self.scales["logit_scale"], weights, self.info_nce)


def once(function: Callable) -> Callable:
    """Makes function(x: Inputs, ...) compute a single time what several terms ask for."""

    @functools.wraps(function)
    def computed(x: Inputs, *args):
        if (function, args) not in x.computed:
            x.computed[function, args] = function(x, *args)
        return x.computed[function, args]

    return computed


def rank_of_pairs(x: Inputs) -> jax.Array:
    """How many captions are nearer to an image than its own, [B], of the first views."""
    return x.positive_rank(x.image(0), x.text(0))


class State(NamedTuple):
    """State of a method beside its network's. It is checkpointed and sharded as parameters are."""

    init: Callable[[jax.Array, int, Loss], PyTree]  # of a key, the embedding's width, `loss`
    update: Callable[[PyTree, Inputs], PyTree]  # its next value
    # check(loss, batch size, devices) raises ValueError for settings that could not work
    check: Callable[[Loss, int, int], None] = lambda loss, batch_size, devices: None


class Definition(NamedTuple):
    """A method: what distinguishes it from the others."""

    views: Callable[[Loss], Views]  # what it asks of the pipeline
    terms: Mapping[str, Callable[[Inputs], jax.Array]]  # `config.loss.weights` has these names
    network: type[Network] = Network  # the towers and its heads
    state: Mapping[str, State] = {}  # its own, by name
    metrics: Callable[[Inputs], Metrics] = lambda x: {}  # to log beside the terms
    rank: Callable[[Inputs], jax.Array] = rank_of_pairs  # [B], that "top1" and "top5" are of


class Aux(NamedTuple):
    """What a loss returns beside its value."""

    # Scalars to log: "loss" and "top1", which the progress line shows, every term of the loss under
    # its name, and whatever else tells how the method does.
    metrics: Metrics
    model_state: PyTree  # the new value of the state that is not parameters


class Method(NamedTuple):
    """A training method as pure functions, assembled of its definition by `build`.

    B is the global batch, V image views, T text views, L tokens, D the embedding width.
    `params` are what the optimizer updates. `model_state` is all other state: BN statistics, a
    support set, running means; it is checkpointed and sharded like the parameters.
    """

    views: Views
    # init(rng) -> (params, model_state)
    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    # loss(params, model_state, batch, rng) -> (scalar, Aux); batch["image"] float [B, V, H, W, 3],
    # batch["tokens"] int32 [B, T, L], with masked captions batch["mlm_labels"] int32 [B, L]
    loss: Callable[[PyTree, PyTree, Batch, jax.Array], tuple[jax.Array, Aux]]
    # constrain(params) -> params: the constraint that holds after every update
    constrain: Callable[[PyTree], PyTree]
    # encode_image(params, model_state, images [B, H, W, 3]) -> [B, D] unit rows, evaluation mode
    encode_image: Callable[[PyTree, PyTree, jax.Array], jax.Array]
    # encode_text(params, model_state, tokens [B, L]) -> [B, D] unit rows
    encode_text: Callable[[PyTree, PyTree, jax.Array], jax.Array]


class Encoders(NamedTuple):
    """The encoders of a model without a training method; see `Method` for the two."""

    encode_image: Callable[[PyTree, PyTree, jax.Array], jax.Array]
    encode_text: Callable[[PyTree, PyTree, jax.Array], jax.Array]


def build(
    definition: Definition,
    model: Model,
    loss: Loss,
    *,
    batch_size: int,
    microbatches: int,
    mesh: Mesh,
) -> Method:
    """Assembles a method.

    The batch size is that of a step, over all devices of the mesh that arrays lie over; for
    `microbatches` see `make_encode`.

    Raises ValueError: a setting that the method cannot take.
    """
    weights, named = sorted(loss.weights), sorted(definition.terms)
    if weights != named:
        raise ValueError(
            f"config.loss.weights has {weights}, but the method's loss terms are {named}: name "
            "each term exactly once (a weight of 0 switches one off)."
        )
    for state in definition.state.values():
        state.check(loss, batch_size, mesh.size)
    network, views = definition.network.of(model, loss), definition.views(loss)
    encode = make_encode(network, microbatches)
    tools = dict(mesh=mesh, info_nce=choose(loss, mesh, "info_nce"))
    tools["positive_rank"] = choose(loss, mesh, "positive_rank")

    def init(rng):
        size, context = model.image.resolution, model.text.context
        batch = {
            "image": jnp.zeros((1, len(views.image), size, size, 3)),
            "tokens": jnp.full((1, len(views.text), context), model.text.eot_id, jnp.int32),
            "mlm_labels": jnp.full((1, context), -1, jnp.int32),
        }
        variables = network.init(rng, batch, train=False)
        own = {
            name: state.init(jax.random.fold_in(rng, number), model.embed_dim, loss)
            for number, (name, state) in enumerate(definition.state.items(), start=1)
        }
        return variables.pop("params"), {**variables, **own}

    def compute_loss(params, model_state, batch, rng):
        features, model_state = encode(params, model_state, batch, rng)
        scales = {
            name: exp_scale(params[name], loss.max_scale if name == "logit_scale" else 0)
            for name in _logit_scales(params)
        }
        bias = params.get("logit_bias")
        x = Inputs(features, batch, model_state, scales, bias, model, loss, **tools)
        terms = {name: term(x) for name, term in definition.terms.items()}
        total = weighted_sum(terms, loss.weights)
        rank = definition.rank(x)
        accuracy = {"top1": (rank < 1).mean(), "top5": (rank < 5).mean()}
        metrics = {"loss": total, **terms, **scales, **definition.metrics(x), **accuracy}
        own = {name: s.update(model_state[name], x) for name, s in definition.state.items()}
        return total, Aux(metrics, {**model_state, **own})

    def constrain(params):
        limited = {n: jnp.clip(params[n], *loss.logit_scale_range) for n in _logit_scales(params)}
        return {**params, **limited}

    return Method(views, init, compute_loss, constrain, *encoders(network))


def encoders(network: TwoTowers) -> Encoders:
    """Encoders of one view, in evaluation mode."""

    def encode(method, params, model_state, inputs):
        variables = {"params": params, **_of_network(model_state)}
        features = network.apply(variables, inputs[:, None], method=method)  # [B, ...], one view
        return normalize(features.embedding[:, 0])

    return Encoders(
        functools.partial(encode, type(network).encode_image),
        functools.partial(encode, type(network).encode_text),
    )


def make_encode(network: Network, microbatches: int) -> Callable:
    """Returns encode(params, model_state, batch, rng) -> (features, model_state), in training mode.

    Features are what the network returns, arrays whose first axis is that of the batch or counts
    parts of it. With microbatches, parts of the batch go through one after the other and again in
    the backward pass, so that only one part's activations live; the loss still sees all features.
    Batch normalization then has the statistics of each part.
    """

    def encode_part(params, stats, batch, rng):
        return network.apply(
            {"params": params, **stats},
            batch,
            train=True,
            mutable=list(stats),
            rngs={"patch_dropout": rng},
        )

    def encode(params, model_state, batch, rng):
        stats = _of_network(model_state)
        if microbatches == 1:
            features, stats = encode_part(params, stats, batch, rng)
            return features, {**model_state, **stats}

        @functools.partial(jax.checkpoint, prevent_cse=False)  # nothing to merge with in a scan
        def body(stats, part):
            features, stats = encode_part(params, stats, *part)
            return stats, features

        # Every m-th example, so that each part lies over all devices as the batch does:
        # [B, ...] -> [B / m, m, ...] -> [m, B / m, ...]
        parts = jax.tree.map(
            lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch
        )
        stats, features = jax.lax.scan(body, stats, (parts, jax.random.split(rng, microbatches)))
        # [m, B / m, ...] -> [B / m, m, ...] -> [B, ...]
        features = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), features)
        return features, {**model_state, **stats}

    return encode


def choose(loss: Loss, mesh: Mesh, name: str) -> Callable:
    """`losses.contrastive`'s function below `ring_threshold` rows, `losses.ring`'s from there."""
    plain = getattr(contrastive, name)
    blockwise = functools.partial(getattr(ring, name), mesh=mesh, block=loss.block)

    def either(x, y, *args, **kwargs):
        return (plain if len(x) < loss.ring_threshold else blockwise)(x, y, *args, **kwargs)

    return either


def weighted_sum(terms: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    """Sum of weight · term over the names.

    A term without weight is a metric only: leaving it out of the sum spares its backward pass.
    """
    return sum((weights[name] * term for name, term in terms.items() if weights[name]), start=0.0)


def exp_scale(logit_scale: jax.Array, cap: float) -> jax.Array:
    """exp(logit_scale), at most `cap` if that is not 0.

    As in the published code the cap changes the value alone: the gradient stays that of exp.
    """
    scale = jnp.exp(logit_scale)
    if not cap:
        return scale
    # The difference is exactly 0. Added to the large scale first, the cap would be rounded away.
    constant = jax.lax.stop_gradient(scale)
    return jnp.minimum(constant, cap) + (scale - constant)


def _logit_scales(params: PyTree) -> list[str]:
    return [name for name in params if name.startswith("logit_scale")]


def _of_network(model_state: PyTree) -> PyTree:
    """The part of `model_state` that is a network's."""
    return {name: model_state[name] for name in model_state if name == "batch_stats"}
