"""A configuration's method, and values for its variables, where compiling `init` takes longest."""

import jax
import numpy as np

from declip_jax import methods
from declip_jax.config import Config
from declip_jax.parallel import rules
from declip_jax.parallel.mesh import make_mesh


def method_of(config, mesh=None):
    """The method that a ConfigDict describes, on one device unless a mesh is given."""
    config = Config.read(config)
    return methods.build(
        config.method,
        config.model,
        config.loss,
        batch_size=config.batch_size,
        microbatches=config.microbatches,
        mesh=mesh or make_mesh(1, 1, jax.devices()[:1]),
    )


def draw_variables(method):
    """(params, model_state) of usual sizes, without zeros."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        path, x = rules.path_name(path), rng.normal(size=leaf.shape)
        if "logit_scale" in path:
            x = 2.5 + 0 * x
        elif path.endswith(("pointer", "filled")):
            x = 0 * x
        elif path.endswith(("scale", "var")):
            x = np.exp(0.2 * x)
        elif path.endswith("kernel"):  # so large that examples differ well
            x = 3 * x / np.sqrt(np.prod(leaf.shape[:-1]))
        elif path.startswith(("batch_stats", "running_means")) or path.endswith("bias"):
            x = 0.1 * x
        return np.asarray(x, leaf.dtype)

    tree = jax.eval_shape(method.init, jax.random.key(0))
    return jax.tree_util.tree_map_with_path(draw, tree)
