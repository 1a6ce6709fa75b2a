"""Fused kernels as tests run them.

On an NVIDIA GPU from Ampere on as users do, elsewhere in interpret mode; and lowered
for a GPU that need not be there.
"""

import contextlib
import functools

import jax

import hsrjax
from hsrjax._src.kernels import base as registry
from hsrjax._src.kernels.triton.implementation import Triton
from hsrjax._src.planning import costs

PLAYED = "interpreted"
NAME = PLAYED if Triton().unavailable(costs.platform()) else "triton"


@contextlib.contextmanager
def known():
    """The implementation that `NAME` names can be asked for."""
    before = dict(registry._implementations)
    registry.register(Triton(PLAYED, interpret=True))
    yield
    registry._implementations.clear()
    registry._implementations.update(before)


def decode(cache, query, activation, name=NAME, method="hsr"):
    """Attention to a cache, in one program, which tests of the same sizes share."""
    return _decode(cache, query, activation, name=name, method=method)


@functools.partial(jax.jit, static_argnames=("name", "method"))
def _decode(cache, query, activation, *, name, method):
    return hsrjax.decode_attention(
        query, cache, activation=activation, method=method, implementation=name
    )


def lowered(run, *shapes):
    """The module that a function is lowered to for a GPU."""
    where = contextlib.nullcontext()
    if jax.__version_info__ >= (0, 11):
        card = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", 132, "gpu")
        mesh = jax.sharding.AbstractMesh((), (), abstract_device=card)
        where = jax.sharding.use_abstract_mesh(mesh)
    skip = jax.export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
    export = jax.export.export(jax.jit(run), platforms=["cuda"], disabled_checks=[skip])
    with where:
        return export(*shapes).mlir_module()
