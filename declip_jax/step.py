"""The training step and what it is built from. It knows no method by name."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from declip_jax import augment, methods, optim
from declip_jax.data.pipeline import TrainBatches, train_batches
from declip_jax.data.sources import Source
from declip_jax.parallel import rules
from declip_jax.parallel.mesh import make_mesh
from declip_jax.state import TrainState


def make_init(method: methods.Method, tx: optax.GradientTransformation, config):
    """Returns init() -> TrainState, a pure function of `config.seed`."""

    def init() -> TrainState:
        init_rng, step_rng = jax.random.split(jax.random.PRNGKey(config.seed))
        params, model_state = method.init(init_rng)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=tx.init(params),
            model_state=model_state,
            ema=jax.tree.map(jnp.copy, params) if config.ema_decay else None,
            rng=step_rng,
        )

    return init


def make_train_step(method: methods.Method, tx, schedule, frozen: Any, config):
    """Returns step(state, batch) -> (state, metrics), to be jitted with the state donated.

    Args:
      method: whose loss is minimized.
      tx: the optimizer.
      schedule: its learning rate, for the metrics.
      frozen: True for each parameter that takes no gradient.
      config: the run's configuration.
    """
    views = [config.views[name] for name in method.views.image]

    def train_step(state: TrainState, batch: dict[str, jax.Array]):
        augment_rng, loss_rng = jax.random.split(jax.random.fold_in(state.rng, state.step))
        images = augment.augment(
            augment_rng, batch["image"], views, config.image_mean, config.image_std
        )

        def loss(params):
            # Frozen parameters are constants: XLA then drops their part of the backward pass.
            params = jax.tree.map(lambda p, f: jax.lax.stop_gradient(p) if f else p, params, frozen)
            return method.loss(params, state.model_state, {**batch, "image": images}, loss_rng)

        (_, aux), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = method.constrain(optax.apply_updates(state.params, updates))
        params = jax.tree.map(lambda p, old, f: old if f else p, params, state.params, frozen)
        ema = state.ema
        if ema is not None:
            ema = optax.incremental_update(params, ema, 1 - config.ema_decay)
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

    Attributes:
      method, mesh, tx, schedule, frozen: see the modules that make them.
      abstract_state: the TrainState's shapes, dtypes and shardings.
    """

    def __init__(self, config, devices=None):
        self.config = config
        self.mesh: Mesh = make_mesh(config.mesh.data, config.mesh.fsdp, devices)
        self.method = methods.build(config, self.mesh)
        params, _ = jax.eval_shape(self.method.init, jax.random.PRNGKey(0))
        self.tx, self.schedule = optim.make_optimizer(config, params)
        self.frozen = optim.frozen_mask(config, params)
        self._init = make_init(self.method, self.tx, config)
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

    def jit_train_step(self):
        step = make_train_step(self.method, self.tx, self.schedule, self.frozen, self.config)
        return jax.jit(step, donate_argnums=0, out_shardings=(self.state_shardings, None))

    def batches(
        self, source: Source, start_sample: int = 0, log: Callable[[str], Any] = print
    ) -> TrainBatches:
        """This process's share of the batches that the method asks for; see `train_batches`."""
        config, views = self.config, self.method.views
        return train_batches(
            source,
            image_views=[config.views[name] for name in views.image],
            text_views=views.text,
            resolution=config.model.image.resolution,
            context=config.model.text.context,
            batch_size=config.batch_size,
            seed=config.seed,
            token_lengths=() if views.padded else config.data.token_lengths,
            mask_rate=config.data.mask_rate,
            eda=config.data.eda,
            synonyms=config.data.synonyms,
            start_sample=start_sample,
            shard=(jax.process_index(), jax.process_count()),
            workers=config.data.workers,
            threads=config.data.threads,
            prefetch=config.data.prefetch,
            max_bad_fraction=config.data.max_bad_fraction,
            bad_window=config.data.bad_window,
            log=log,
        )
