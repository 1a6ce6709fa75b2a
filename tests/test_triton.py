"""The fused kernels: the shared contract in interpret mode, and what is theirs alone."""

import pytest

from hsrjax._src.kernels import base as registry
from hsrjax._src.kernels.triton.implementation import Triton
from tests.contract import AttentionContract, CacheContract


@pytest.fixture(autouse=True, scope="module")
def interpreted():
    before = dict(registry._implementations)
    registry.register(Triton("interpreted", interpret=True))
    yield
    registry._implementations.clear()
    registry._implementations.update(before)


class TestReported(AttentionContract):
    method, implementation = "hsr", "interpreted"


class TestAuto(AttentionContract):
    method, implementation = "auto", "interpreted"


class TestDense(AttentionContract):
    method, implementation = "dense", "interpreted"


class TestCache(CacheContract):
    method, implementation = "hsr", "interpreted"


class TestDenseCache(CacheContract):
    method, implementation = "dense", "interpreted"
