"""The training step and what it is built from. It knows no method by name."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from declip_jax import augment, methods, optim
from declip_jax.config import Config
from declip_jax.data.pipeline import TrainBatches, train_batches
from declip_jax.data.sources import Source
from declip_jax.data.tokenizer import CLIP_TOKENIZER
from declip_jax.encode import Encoder
from declip_jax.parallel import rules
from declip_jax.parallel.mesh import check_batch_size, make_mesh
from declip_jax.state import TrainState


def make_init(method: methods.Method, tx: optax.GradientTransformation, seed: int, ema: bool):
    """Returns init() -> TrainState, a pure function of the seed."""

    def init() -> TrainState:
        init_rng, step_rng = jax.random.split(jax.random.PRNGKey(seed))
        params, model_state = method.init(init_rng)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=tx.init(params),
            model_state=model_state,
            ema=jax.tree.map(jnp.copy, params) if ema else None,
            rng=step_rng,
        )

    return init


def make_train_step(
    method: methods.Method,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    frozen: Any,
    augment_batch: Callable[[jax.Array, jax.Array], jax.Array],
    ema_decay: float = 0.0,
):
    """Returns step(state, batch) -> (state, metrics), to be jitted with the state donated.

    Args:
      method: whose loss is minimized.
      tx: the optimizer.
      schedule: its learning rate, for the metrics.
      frozen: True for each parameter that takes no gradient.
      augment_batch: (key, uint8 [B, V, H, W, 3]) -> normalized float [B, V, H, W, 3].
      ema_decay: of the moving average of the parameters, if the state has one.
    """

    def train_step(state: TrainState, batch: dict[str, jax.Array]):
        augment_rng, loss_rng = jax.random.split(jax.random.fold_in(state.rng, state.step))
        batch = {**batch, "image": augment_batch(augment_rng, batch["image"])}

        def loss(params):
            # Frozen parameters are constants: XLA then drops their part of the backward pass.
            params = jax.tree.map(lambda p, f: jax.lax.stop_gradient(p) if f else p, params, frozen)
            return method.loss(params, state.model_state, batch, loss_rng)

        (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = method.constrain(optax.apply_updates(state.params, updates))
        params = jax.tree.map(lambda p, old, f: old if f else p, params, state.params, frozen)
        ema = state.ema
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1 - ema_decay)
        metrics = {
            **aux.metrics,
            "learning_rate": schedule(state.step),
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
        }
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            model_state=aux.model_state,
            ema=ema,
        )
        return state, metrics

    return train_step


class Setup:
    """All that is built from the configuration before anything runs.

    Args:
      config: a `Config`, or the ConfigDict that it is read from.
      devices: of the mesh; default: all.

    Attributes:
      config: the `Config`.
      tokenizer: of captions.
      method, mesh, tx, schedule, frozen: see the modules that make them.
      abstract_state: the TrainState's shapes, dtypes and shardings.

    Raises ValueError: naming the field, its value, and what was expected.
    """

    def __init__(self, config: Any, devices=None):
        self.config = config = Config.read(config)
        self.tokenizer = CLIP_TOKENIZER
        self.mesh: Mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices)
        self.method = methods.build(
            config.method,
            config.model,
            config.loss,
            batch_size=config.batch_size,
            microbatches=config.microbatches,
            mesh=self.mesh,
        )
        names = self.method.views.image
        if unknown := {*names} - {*config.views}:
            raise ValueError(f"config.views lacks {sorted(unknown)}, which the method asks for.")
        self._views = [config.views[name] for name in names]
        params, _ = jax.eval_shape(self.method.init, jax.random.PRNGKey(0))
        self.tx, self.schedule = optim.make_optimizer(config.optim, config.total_steps, params)
        self.frozen = optim.frozen_mask(config.optim.frozen, params)
        self._init = make_init(self.method, self.tx, config.seed, config.ema_decay > 0)
        abstract = jax.eval_shape(self._init)
        self.abstract_state = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            abstract,
            rules.shardings(abstract, self.mesh),
        )

    @property
    def state_shardings(self):
        return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

    def init_state(self) -> TrainState:
        """A new state, born sharded."""
        return jax.jit(self._init, out_shardings=self.state_shardings)()

    def augment_batch(self, key: jax.Array, images: jax.Array) -> jax.Array:
        """uint8 [B, V, H, W, 3] of the pipeline -> float32 of the network; see `augment`."""
        mean, std = self.config.image_mean, self.config.image_std
        return augment.augment(key, images, self._views, mean, std)

    def jit_train_step(self):
        built = self.method, self.tx, self.schedule, self.frozen
        step = make_train_step(*built, self.augment_batch, self.config.ema_decay)
        return jax.jit(step, donate_argnums=0, out_shardings=(self.state_shardings, None))

    def encoder(self) -> Encoder:
        """What evaluates models of the run; `use` gives it one."""
        config = self.config
        seen, context = config.preprocess, config.model.text.context
        sizes = config.eval.batch_size, context, self.mesh
        return Encoder(self.method, seen, *sizes, self.tokenizer)

    def batches(
        self,
        source: Source,
        start_sample: int = 0,
        log: Callable[[str], Any] = print,
        *,
        batch_size: int = 0,
    ) -> TrainBatches:
        """This process's share of the batches that the method asks for; see `train_batches`.

        They have `config.batch_size` pairs, or another number that is asked for.
        """
        config, views = self.config, self.method.views
        return train_batches(
            source,
            config.data,
            image_views=self._views,
            text_views=views.text,
            resolution=config.model.image.resolution,
            context=config.model.text.context,
            batch_size=batch_size or config.batch_size,
            seed=config.seed,
            tokenizer=self.tokenizer,
            padded=views.padded,
            start_sample=start_sample,
            shard=(jax.process_index(), jax.process_count()),
            log=log,
        )


def check_training(setup: Setup) -> None:
    """Raises ValueError, naming the field, for what only evaluation can do with."""
    config, mesh, tokenizer = setup.config, setup.mesh, setup.tokenizer
    check_batch_size("config.batch_size", config.batch_size, mesh)
    check_batch_size("config.eval.batch_size", config.eval.batch_size, mesh)
    part = config.batch_size // config.microbatches
    parts = f"config.batch_size={config.batch_size} in config.microbatches={config.microbatches}"
    if part % mesh.size:
        raise ValueError(
            f"config.microbatches={config.microbatches} does not cut config.batch_size="
            f"{config.batch_size} into parts that can be divided over {mesh.size} devices."
        )
    if part < 2 and "batch_stats" in setup.abstract_state.model_state:
        raise ValueError(
            f"{parts} leaves one example for batch normalization, which needs at least two."
        )
    groups = config.model.image.bn_group_size
    if groups and part % groups:
        raise ValueError(
            f"{parts} gives parts that are not a multiple of config.model.image.bn_group_size="
            f"{groups}."
        )
    limits, largest = config.loss.logit_scale_range, math.log(float(jnp.finfo(jnp.float32).max))
    if limits[1] > largest:
        raise ValueError(
            f"config.loss.logit_scale_range={limits}: the upper limit must be below {largest:.1f}, "
            "above which its exponential is no float32 any more; published recipes have (3.0, 6.0)."
        )
    seen, trained = config.preprocess, (config.image_mean, config.image_std)
    if config.eval.every and (seen.mean, seen.std) != trained:
        raise ValueError(
            f"config.eval.preprocess={config.eval.preprocess!r} normalizes images otherwise than "
            f"config.image_mean={trained[0]} and image_std={trained[1]}, with which the run "
            "trains: choose 'train'."
        )
    text = config.model.text
    if text.vocab_size < tokenizer.vocab_size or text.eot_id != tokenizer.end:
        raise ValueError(
            f"config.model.text.vocab_size={text.vocab_size} and eot_id={text.eot_id} do not fit "
            f"the tokenizer: at least {tokenizer.vocab_size} ids, of which {tokenizer.end} ends a "
            "text."
        )
