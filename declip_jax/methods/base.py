"""What a method is, and what the methods share. The training step knows nothing else about them."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from declip_jax import support_set
from declip_jax.losses import contrastive, ring
from declip_jax.losses.contrastive import normalize
from declip_jax.losses.late_interaction import late_interaction
from declip_jax.models.text import real_tokens
from declip_jax.models.two_towers import TwoTowers, two_towers

PyTree = Any
Batch = dict[str, jax.Array]


class Views(NamedTuple):
    """What the pipeline must deliver for each pair.

    Attributes:
      image: names of `config.views`.
      text: names of `data.pipeline.TEXT_VIEWS`.
      padded: captions keep their padding up to the context, because the loss sees it.
    """

    image: tuple[str, ...]
    text: tuple[str, ...]
    padded: bool = False


class Aux(NamedTuple):
    """What a loss returns beside its value.

    Attributes:
      metrics: scalars to log: "loss" and "top1", which the progress line shows, every term of the
        loss under its name, and whatever else tells how the method does.
      model_state: the new value of the state that is not parameters.
    """

    metrics: dict[str, jax.Array]
    model_state: PyTree


class Method(NamedTuple):
    """A training method as pure functions.

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


class Contrast(NamedTuple):
    """How features are compared: `losses.contrastive`'s functions, or those of less memory."""

    info_nce: Callable
    positive_rank: Callable


def contrast(config, mesh: Mesh) -> Contrast:
    """Plain logits below `config.loss.ring_threshold` rows, blocks of them on a ring from there."""
    block, threshold = config.loss.block, config.loss.ring_threshold
    if block < 1:
        raise ValueError(f"config.loss.block={block} must be at least 1.")

    def choose(plain, blockwise):
        def either(x, y, *args, **kwargs):
            if len(x) < threshold:
                return plain(x, y, *args, **kwargs)
            return blockwise(x, y, *args, mesh=mesh, block=block, **kwargs)

        return either

    return Contrast(
        choose(contrastive.info_nce, ring.info_nce),
        choose(contrastive.positive_rank, ring.positive_rank),
    )


def accuracy(rank: jax.Array) -> dict[str, jax.Array]:
    """Share of images whose own caption is nearest, or among the nearest five, by ranks [B]."""
    return {"top1": (rank < 1).mean(), "top5": (rank < 5).mean()}


def check_weights(weights: Mapping[str, float], terms: tuple[str, ...]) -> dict[str, float]:
    """Returns `weights` as a dict if it has exactly one weight for each of the method's `terms`.

    Raises:
      ValueError: a term without a weight, a weight without a term, or weights that mean nothing.
    """
    if set(weights) != set(terms):
        raise ValueError(
            f"config.loss.weights has {sorted(weights)}, but the method's loss terms are "
            f"{sorted(terms)}: name each term exactly once (a weight of 0 switches one off)."
        )
    if not all(0 <= weight < math.inf for weight in weights.values()) or not any(weights.values()):
        raise ValueError(
            f"config.loss.weights={dict(weights)} must be at least 0, and not all of them 0."
        )
    return dict(weights)


def weighted_sum(terms: Mapping[str, jax.Array], weights: Mapping[str, float]) -> jax.Array:
    """Sum of weight · term over the names, which `check_weights` has matched.

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


def logit_scale_limits(limits) -> tuple[float, float]:
    """Returns `config.loss.logit_scale_range` as (low, high); raises ValueError if it is not."""
    if len(limits) != 2 or not limits[0] <= limits[1]:
        raise ValueError(
            f"config.loss.logit_scale_range={tuple(limits)} must be (low, high), low <= high."
        )
    return tuple(limits)


def clamp_logit_scale(params: PyTree, limits: tuple[float, float]) -> PyTree:
    """Keeps logit_scale and, where there is one, logit_scale_dense within `limits`.

    The limits are of the parameters, which are logarithms.
    """
    scales = [name for name in ("logit_scale", "logit_scale_dense") if name in params]
    return {**params, **{name: jnp.clip(params[name], *limits) for name in scales}}


def late_interaction_of(config, mesh: Mesh) -> Callable:
    """Returns interact(patches [B, P, E], words [B, L, E], tokens [B, L]); see the loss."""
    options, eot_id = config.loss.late_interaction, config.model.text.eot_id
    if options.tokens < 0:
        raise ValueError(
            f"config.loss.late_interaction.tokens={options.tokens} must be at least 0 (0: all)."
        )

    def interact(patches, words, tokens):
        mask = real_tokens(tokens, eot_id) if options.mask_padding else None
        return late_interaction(
            patches,
            words,
            tokens=options.tokens,
            text_mask=mask,
            mesh=mesh,
            block=config.loss.block,
        )

    return interact


class SupportSet:
    """The support set of a run: what `support_set` computes, with the config's settings.

    Raises:
      ValueError: settings that could not work.
    """

    def __init__(self, config, mesh: Mesh):
        options = config.loss.support_set
        enqueued = 2 * config.batch_size
        support_set.check(options.size, mesh.size, enqueued, options.neighbors, options.young_steps)
        self._mesh, self._block = mesh, config.loss.block
        self._size, self._width = options.size, config.model.embed_dim
        self._neighbors, self._young = options.neighbors, options.young_steps * enqueued

    def init(self, rng: jax.Array) -> support_set.State:
        return support_set.init(rng, self._size, self._width)

    def look_up(self, state, text: jax.Array, augmented: jax.Array):
        """The neighbors of captions [B, D] and augmented captions [B, D] in the set as it is.

        Returns:
          [B, k, D] twice, and metrics.
        """
        queries = jnp.stack([text, augmented], axis=1).reshape(-1, self._width)  # -> [2B, D]
        found = support_set.nearest(
            state, queries, self._neighbors, mesh=self._mesh, block=self._block
        )
        # [2B, k, D] -> [B, 2, k, D]
        rows = found.rows.reshape(len(text), 2, *found.rows.shape[1:])
        return rows[:, 0], rows[:, 1], support_set.metrics(found, state, young_rows=self._young)

    def enqueue(self, state, text: jax.Array, augmented: jax.Array) -> support_set.State:
        """The augmented captions enter first, then the captions."""
        return support_set.enqueue(state, jnp.concatenate([augmented, text]), mesh=self._mesh)

    @staticmethod
    def origin(age: int, batch_size: int) -> tuple[int, int, int]:
        """Where a row of this age came from.

        Returns:
          How many steps after it there have been, its text view (0: the caption, -1: the augmented
          caption), and its pair's place in the batch.
        """
        steps, later = divmod(age, 2 * batch_size)
        view, place = divmod(2 * batch_size - 1 - later, batch_size)
        return steps, view - 1, place


def unit_tokens(tokens: jax.Array) -> jax.Array:
    """Tokens [..., E] scaled to unit length in float32, in their own dtype."""
    return normalize(tokens.astype(jnp.float32)).astype(tokens.dtype)


def masked_views(config) -> tuple[str, ...]:
    """Text views of a method with masked captions: the first is contrasted, the last is masked.

    The published methods contrast the masked caption itself.
    """
    return ("masked",) if config.loss.contrast_masked else ("caption", "masked")


def _batch_stats(model_state: PyTree) -> PyTree:
    """The part of `model_state` that is a network's."""
    return {name: model_state[name] for name in model_state if name == "batch_stats"}


def make_encode(network: TwoTowers, microbatches: int) -> Callable[[PyTree, PyTree, Batch], tuple]:
    """Returns encode(params, model_state, batch) -> (features, model_state), in training mode.

    Features are what the network returns, arrays whose first axis is that of the batch or counts
    parts of it. With microbatches, parts of the batch go through one after the other and again in
    the backward pass, so that only one part's activations live; the loss still sees all features.
    Batch normalization then has the statistics of each part.
    """

    def encode_part(params, stats, batch):
        features, stats = network.apply(
            {"params": params, **stats}, batch, train=True, mutable=list(stats)
        )
        return features, stats

    def encode(params, model_state, batch):
        stats = _batch_stats(model_state)
        if microbatches == 1:
            features, stats = encode_part(params, stats, batch)
            return features, {**model_state, **stats}

        @functools.partial(jax.checkpoint, prevent_cse=False)  # nothing to merge with in a scan
        def body(stats, part):
            features, stats = encode_part(params, stats, part)
            return stats, features

        # Every m-th example, so that each part lies over all devices as the batch does:
        # [B, ...] -> [B / m, m, ...] -> [m, B / m, ...]
        parts = jax.tree.map(
            lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch
        )
        stats, features = jax.lax.scan(body, stats, parts)
        # [m, B / m, ...] -> [B / m, m, ...] -> [B, ...]
        features = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), features)
        return features, {**model_state, **stats}

    return encode


def network_functions(network: TwoTowers, config, views: Views) -> dict[str, Callable]:
    """The `init`, `encode_image` and `encode_text` of a method's network."""

    def init(rng):
        size, context = config.model.image.resolution, config.model.text.context
        batch = {
            "image": jnp.zeros((1, len(views.image), size, size, 3)),
            "tokens": jnp.full((1, len(views.text), context), config.model.text.eot_id, jnp.int32),
            "mlm_labels": jnp.full((1, context), -1, jnp.int32),
        }
        variables = network.init(rng, batch, train=False)
        return variables.pop("params"), variables

    def encode_image(params, model_state, images):
        variables = {"params": params, **_batch_stats(model_state)}
        features = network.apply(variables, images[:, None], method=TwoTowers.encode_image)
        return normalize(features.embedding[:, 0])

    def encode_text(params, model_state, tokens):
        variables = {"params": params, **_batch_stats(model_state)}
        features = network.apply(variables, tokens[:, None], method=TwoTowers.encode_text)
        return normalize(features.embedding[:, 0])

    return {"init": init, "encode_image": encode_image, "encode_text": encode_text}


def encoders(config) -> Encoders:
    """Those of the towers that `config.model` describes."""
    functions = network_functions(two_towers(config.model), config, Views((), ()))
    return Encoders(functions["encode_image"], functions["encode_text"])
