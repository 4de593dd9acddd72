"""Encoding host batches of any size with a trained model, over all devices."""

import jax
import numpy as np
from jax.sharding import Mesh

from declip_jax import augment
from declip_jax.evals.preprocess import preprocess
from declip_jax.methods import Method
from declip_jax.methods.base import Encoders
from declip_jax.parallel.mesh import check_batch_size, replicated, shard_batch


class Encoder:
    """Image and text features of a method's model as host arrays.

    The parameters are set by `use`, so that one compiled program serves a whole training run.

    Args:
      method: whose model encodes, or encoders alone.
      config: the run's configuration (`eval.preprocess`, `eval.batch_size`).
      mesh: the batch is divided over its devices.
    """

    def __init__(self, method: Method | Encoders, config, mesh: Mesh):
        check_batch_size("config.eval.batch_size", config.eval.batch_size, mesh)
        self.mesh = mesh
        self._batch_size = config.eval.batch_size
        self.context = config.model.text.context
        seen = preprocess(config)

        def image(params, model_state, batch):
            pixels = batch["image"].astype("float32") / 255
            pixels = augment.normalize(pixels, seen.mean, seen.std)
            return method.encode_image(params, model_state, pixels)

        def text(params, model_state, batch):
            return method.encode_text(params, model_state, batch["tokens"])

        self._image = jax.jit(image, out_shardings=replicated(mesh))
        self._text = jax.jit(text, out_shardings=replicated(mesh))

    def use(self, params, model_state) -> "Encoder":
        self._params, self._model_state = params, model_state
        return self

    def encode_image(self, images: np.ndarray) -> np.ndarray:
        """uint8 [N, H, W, 3] -> float32 [N, D], unit rows."""
        return self._batched(self._image, "image", images)

    def encode_text(self, tokens: np.ndarray) -> np.ndarray:
        """int32 [N, L] -> float32 [N, D], unit rows."""
        return self._batched(self._text, "tokens", tokens)

    def _batched(self, encode, name: str, rows: np.ndarray) -> np.ndarray:
        features = []
        for start in range(0, len(rows), self._batch_size):
            block = rows[start : start + self._batch_size]
            # Always the same shape, so one compiled program; the padding's features are cut off.
            padded = np.zeros((self._batch_size, *rows.shape[1:]), rows.dtype)
            padded[: len(block)] = block
            out = encode(self._params, self._model_state, shard_batch({name: padded}, self.mesh))
            features.append(np.asarray(out)[: len(block)])
        return np.concatenate(features)
