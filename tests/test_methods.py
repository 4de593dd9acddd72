"""What the methods make of a batch. Their values are those of the golden files."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from configs import common
from declip_jax import methods, support_set
from declip_jax.losses import contrastive
from declip_jax.methods import base
from declip_jax.models.batchnorm import BatchNorm
from declip_jax.parallel import rules
from declip_jax.parallel.mesh import make_mesh
from declip_jax.train import Setup

TERMS = {
    "clip": {"clip": 1.0},
    "slip": {"clip": 1.0, "simclr": 0.5},
    "filip": {"clip": 0.5, "filip": 1.0},
    # SimSiam, which alone goes through batch normalisation, is only looked at
    "declip": {"clip": 0.4, "simsiam": 0.0, "mlm": 0.2, "nn_text": 0.3},
    "defilip": {"clip": 0.4, "simsiam": 0.2, "mlm": 0.2, "nn_text": 0.2, "filip": 0.3},
    "alip": {"raw": 1.0, "synthetic": 0.5},
}
every_method = pytest.mark.parametrize("name", TERMS)
BATCH, CONTEXT, EOT, MASK = 8, 32, 62, 63

# Half the time to compile.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def config_of(name, **changes):
    config = common.get_config("tiny").unlock()
    config.method = name
    config.batch_size = BATCH
    config.model.image.layers = config.model.text.layers = 1
    config.model.text.update(vocab_size=64, eot_id=EOT)
    config.loss.weights = TERMS[name]
    config.loss.max_scale = 10.0
    config.loss.late_interaction.mask_padding = name == "filip"
    config.update_from_flattened_dict(changes)
    return config.lock()


def mesh_of(devices):
    return make_mesh(devices, 1, jax.devices()[:devices])


def build(name, **changes):
    return methods.build(config_of(name, **changes), mesh_of(1))


def drawn(path, leaf):
    """Values of a usual size, none of them zero."""
    rng = np.random.default_rng(abs(hash(name := rules.path_name(path))) % 2**32)
