"""A model that nobody trained, in a run folder as training leaves it."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.files.runs import save_run
from models.network.config import ModelConfig
from models.network.transformer import Transformer
from train.data import load_corpus


def run_of(folder, text, **shape):
    """Saves a model with its text in a folder, which is made; returns the model.

    Numpy draws the parameters: compiling their initializers would take seconds.
    """
    sizes = {"num_layers": 1, "embed_dim": 32, "num_heads": 2, "num_kv_heads": 1}
    config = ModelConfig(**(sizes | {"head_dim": 8, "mlp_dim": 32} | shape))
    rng = np.random.default_rng(0)

    def draw(leaf):
        drawn = np.ones(leaf.shape)  # scales
        if drawn.ndim > 1:
            drawn = rng.normal(0, len(drawn) ** -0.5, drawn.shape)
        return jnp.asarray(drawn, leaf.dtype)

    empty = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    state = jax.tree.map(draw, nnx.state(empty))
    model = nnx.merge(nnx.graphdef(empty), state)
    model.threshold_scale[...] = jnp.float32(0.5)
    known = {"sha256": load_corpus(text).sha256}
    options = {"data": str(text), "row_length": 32, "corpus": known}
    save_run(folder, model, train=options)
    return model
