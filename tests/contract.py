"""The contract that every implementation of attention must keep, as one test class.

A subclass says how to `attend`; everything else is the same for all. The oracle is
`hsrjax.reference`, which shares no code with any implementation.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import extend

import hsrjax
from hsrjax import reference
from hsrjax._src.planning import plan as planner


def predicates(jaxpr):
    """What the conds of a program with two sides depend on, but for the platform."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "cond":
            if equation.params.get("branches_platforms") is None:
                yield equation.invars[0].aval
        else:
            for inner in extend.core.jaxprs_in_params(equation.params):
                yield from predicates(inner)


def slow(*cases):
    """Cases of a parametrized test that only `make test-all` runs."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


SHAPE = (2, 37, 37, 4, 2, 16, 16)
# (B, T, S, N, K, H, D), is_causal, activation: sizes that divide nothing, GQA, one key,
# heads of 1 to 256. Every case compiles, so each activation meets a few shapes only;
# tests/test_attention.py draws more.
CASES = [
    (SHAPE, True, "relu"),
    (SHAPE, True, "top_r"),
    ((2, 5, 77, 6, 2, 7, 9), False, "relu3"),
    *slow(
        (SHAPE, True, "softmax"),
        ((1, 1, 1, 1, 1, 1, 1), True, "relu2"),
        ((1, 130, 130, 3, 3, 64, 8), True, "relu2"),
        ((1, 3, 40, 8, 1, 256, 4), False, "relu"),
        ((3, 9, 33, 2, 2, 1, 5), False, "top_r"),
    ),
]
ACTIVATIONS = {
    "relu": hsrjax.ReLU(power=1, bias=0.5),
    "relu2": hsrjax.ReLU(power=2, bias=0.5, normalize="none"),
    "relu3": hsrjax.ReLU(power=3, bias=-0.2, normalize="length"),
    "softmax": hsrjax.Softmax(),
    "top_r": hsrjax.Softmax(top_r=5),
    "entmax": hsrjax.Entmax(),
    "sparsemax": hsrjax.Entmax(2.0),
    "prelu": hsrjax.PReLU(slope=np.float32([0.3, -0.2, 0.0, 1.0]), bias=0.2),
    "celu": hsrjax.CELU(alpha=0.05, bias=0.3, normalize="none"),
}
# Two rows of SHAPE: the first holds four documents, the third of them one token long
# and with the id of the first; the second row is one document.
SEGMENTS = np.zeros((2, 37), np.int32)
SEGMENTS[0, 9:20], SEGMENTS[0, 21:] = 7, -3
# Options about what is visible, is_causal, activation.
VISIBLE = [
    ({"window": 12, "sinks": 2}, True, "top_r"),
    ({"segment_ids": SEGMENTS, "window": 6, "sinks": 3}, True, "relu2"),
    *slow(
        ({"window": 5}, True, "relu"),
        ({"window": 6, "sinks": 3}, True, "relu3"),
        ({"window": 1, "sinks": 100}, True, "softmax"),
        ({"sinks": 4}, False, "top_r"),
        ({"segment_ids": SEGMENTS}, False, "relu3"),
        ({"segment_ids": SEGMENTS}, True, "softmax"),
        ({"segment_ids": SEGMENTS, "sinks": 2}, False, "top_r"),
    ),
]
# The same with gradients, of activations with no threshold that is known before, and of
# those with a closed form over all keys.
BEYOND = [
    ({"window": 6, "sinks": 3}, True, "entmax"),
    ({"segment_ids": SEGMENTS, "window": 6, "sinks": 3}, True, "celu"),
    *slow(
        ({"segment_ids": SEGMENTS}, False, "sparsemax"),
        ({"window": 6, "sinks": 3}, True, "prelu"),
    ),
]


def inputs(shape, *, dtype=jnp.float32, seed=0):
    """Gaussian query, key, value and a cotangent."""
    b, t, s, n, k, h, d = shape
    rng = np.random.default_rng(seed)  # jax.random compiles once for every shape
    shapes = (b, t, n, h), (b, s, k, h), (b, s, k, d), (b, t, n, d)
    return [jnp.asarray(rng.standard_normal(size), dtype) for size in shapes]


def relative_error(got, expected):
    """Largest difference in units of the largest expected entry."""
    got, expected = (np.asarray(x, np.float64) for x in (got, expected))
    return np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30)


def lenient(function):
    """The reference is written for reading: it may promote ranks."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        with jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return wrapped


reference_attention = lenient(reference.attention)


def by_reference(query, key, value, **options):
    """One program instead of thirty small ones."""
    return jax.jit(functools.partial(reference_attention, **options))(query, key, value)


_expected = {}


def expected_of(case, compute):
    """What the reference says of a case: asked once for all implementations.

    Args:
      case: all that the result depends on; what is equal when printed is the same.
      compute: is called with nothing, the first time.
    """
    case = repr(case)
    if case not in _expected:
        _expected[case] = jax.tree.map(np.asarray, compute())
    return _expected[case]


@lenient
def reference_visibility(queries, keys, **visible):
    """bool[B, T, S] twice, as numpy arrays."""
    return tuple(map(np.asarray, reference.visibility(queries, keys, **visible)))


def small_dense_tiling(activation, *, queries, keys, heads):
    """In place of `planner.dense_tiling`: sizes that divide nothing."""
    del heads
    return min(queries, 5), None if activation.whole_rows else min(keys, 7)


_programs = {}


def program_of(contract, name, options):
    """A method of a contract under jit; tests with equal options share its programs."""
    case = contract, name, repr(options)
    if case not in _programs:
        method = getattr(contract(), name)
        _programs[case] = jax.jit(functools.partial(method, **options))
    return _programs[case]


class AttentionContract:
    """Subclass and define `attend`, or say which method and implementation it is."""

    method = "dense"
    implementation = None
    capacity = None
    differentiable = True
    takes_segments = True
    takes_closed_forms = True
    dense_in_chunks = False

    @pytest.fixture(autouse=True)
    def _cut_scores(self, monkeypatch):
        if self.dense_in_chunks:
            monkeypatch.setattr(planner, "dense_tiling", small_dense_tiling)

    def attend(self, query, key, value, *, activation, **options):
        """Returns (output, info)."""
        return hsrjax.attention(
            query,
            key,
            value,
            activation=activation,
            method=self.method,
            implementation=self.implementation,
            capacity=self.capacity,
            return_info=True,
            **options,
        )

    def compiled(self, *arrays, activation, **options):
        """`attend` under jit: compiling one program is faster than forty small ones."""
        return program_of(type(self), "attend", options)(*arrays, activation=activation)

    def gradients(self, attend, arrays, cotangent, **visible):
        def loss(query, key, value, bias):
            activation = hsrjax.ReLU(power=2, bias=bias)
            out = attend(
                query, key, value, activation=activation, is_causal=True, **visible
            )
            return jnp.vdot(out, cotangent)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*arrays)

    @pytest.mark.parametrize(("shape", "is_causal", "name"), CASES)
    def test_values(self, shape, is_causal, name):
        query, key, value, _ = inputs(shape)
        kwargs = {"activation": ACTIVATIONS[name], "is_causal": is_causal}
        out, _ = self.compiled(query, key, value, **kwargs)
        expected = expected_of(
            ("values", shape, is_causal, name),
            lambda: by_reference(query, key, value, **kwargs),
        )
        assert out.shape == expected.shape and out.dtype == query.dtype
        assert relative_error(out, expected) <= 1e-5

    @pytest.mark.parametrize(("visible", "is_causal", "name"), VISIBLE)
    def test_windows_sinks_and_segments(self, visible, is_causal, name):
        if not self.takes_segments and ("segment_ids" in visible or not is_causal):
            pytest.skip("a cache holds one document a row")
        query, key, value, _ = inputs(SHAPE)
        key = key.at[:, :2].multiply(20.0)  # sinks that score high, and low
        activation = ACTIVATIONS[name]
        kwargs = {"activation": activation, "is_causal": is_causal} | visible
        out, info = self.compiled(query, key, value, **kwargs)
        expected, (seen, sink) = expected_of(
            ("visible", visible, is_causal, name),
            lambda: (
                by_reference(query, key, value, **kwargs),
                reference_visibility(37, 37, is_causal=is_causal, **visible),
            ),
        )
        assert relative_error(out, expected) <= 1e-5
        most = seen.sum(-1)
        if name == "top_r":
            most = np.minimum(5, most - sink.sum(-1)) + sink.sum(-1)
        at_most = np.broadcast_to(most[..., None], info.count.shape)
        if isinstance(activation, hsrjax.Softmax):
            np.testing.assert_array_equal(info.count, at_most)
        assert (info.count <= at_most).all()
        assert (info.candidates >= info.count).all()
        assert (info.candidates <= seen.sum(-1)[..., None]).all()

    def test_count_is_the_number_of_firing_keys(self):
        query, key, value, _ = inputs(SHAPE)
        activation = hsrjax.ReLU(bias=0.5)
        _, info = self.compiled(
            query, key, value, activation=activation, is_causal=True
        )
        scores = np.einsum("btnh,bsnh->btns", query, np.repeat(key, 2, axis=2)) / 4
        firing = (scores > 0.5) & np.tri(37, dtype=bool)[None, :, None]
        np.testing.assert_array_equal(info.count, firing.sum(-1))
        assert (info.candidates >= info.count).all()
        assert (np.asarray(info.error_bound) == 0).all()

    @pytest.mark.parametrize(
        "visible", [{"segment_ids": SEGMENTS, "window": 6, "sinks": 3}, *slow(({},))]
    )
    def test_vjp(self, visible):
        if not self.differentiable:
            pytest.skip("caches are for inference")
        *arrays, cotangent = inputs(SHAPE)
        # Rows of few keys, none far above the bias, divide by next to nothing; then
        # the reference's own gradients have but five digits.
        lower = 2.0 if visible else 0.0
        arrays.append(jnp.array([0.2, 0.4, -0.3, 0.1]) - lower)
        attend = lambda *a, **k: self.attend(*a, **k)[0]
        got = self.gradients(attend, arrays, cotangent, **visible)
        expected = expected_of(
            ("vjp", visible),
            lambda: self.gradients(reference_attention, arrays, cotangent, **visible),
        )
        for one, other in zip(got, expected, strict=True):
            assert relative_error(one, other) <= 1e-5

    @pytest.mark.parametrize(("visible", "is_causal", "name"), BEYOND)
    def test_beyond_the_paper(self, visible, is_causal, name):
        *arrays, cotangent = inputs(SHAPE)
        if not self.takes_segments:
            visible = {k: v for k, v in visible.items() if k != "segment_ids"}
        options = {"is_causal": is_causal or not self.takes_segments} | visible
        if name in ("prelu", "celu") and not self.takes_closed_forms:
            with pytest.raises(TypeError, match="running sums"):
                self.attend(*arrays, activation=ACTIVATIONS[name], **options)
            return

        def both(attend):
            def loss(*arrays):
                out, info = attend(*arrays[:3], activation=arrays[3], **options)
                return jnp.vdot(out, cotangent), (out, info)

            if not self.differentiable:
                return jax.jit(loss)(*arrays, ACTIVATIONS[name])[1], ()
            run = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
            (_, results), grads = jax.jit(run)(*arrays, ACTIVATIONS[name])
            return results, jax.tree.leaves(grads)

        (out, info), grads = both(self.attend)
        reference = lambda *a, **k: (reference_attention(*a, **k), None)
        (expected, _), expected_grads = expected_of(
            ("beyond", options, name, self.differentiable),
            lambda: both(reference),
        )
        for one, other in zip((out, *grads), (expected, *expected_grads), strict=True):
            assert relative_error(one, other) <= 1e-5
        assert (info.count <= info.candidates).all() and (info.error_bound == 0).all()

    @pytest.mark.parametrize("normalize", ["row_sum", *slow(("none",))])
    def test_empty_rows_are_zero_with_zero_gradients(self, normalize):
        query, key, value, cotangent = inputs((1, 6, 6, 2, 1, 8, 8))
        bias = jnp.array([0.0, 1e4])  # nothing fires in the second head
        activation = hsrjax.ReLU(power=1, bias=bias, normalize=normalize)

        def loss(query):
            out, info = self.attend(
                query, key, value, activation=activation, is_causal=False
            )
            return jnp.vdot(out, cotangent), (out, info)

        if not self.differentiable:
            _, (out, info) = jax.jit(loss)(query)
            gradient = jnp.zeros_like(query)
        else:
            gradient, (out, info) = jax.jit(jax.grad(loss, has_aux=True))(query)
        assert (out[:, :, 1] == 0).all() and (info.count[:, :, 1] == 0).all()
        assert (gradient[:, :, 1] == 0).all()
        assert (out[:, :, 0] != 0).any()

    def test_nan_reaches_exactly_the_rows_that_dense_attention_gives_it(self):
        query, key, value, _ = inputs((1, 40, 40, 2, 1, 8, 8))
        key = key.at[0, 25, 0, 3].set(jnp.nan)
        query = query.at[0, 7, 1, 0].set(jnp.nan)
        activation = hsrjax.ReLU(power=2, bias=0.1)
        out, _ = self.compiled(query, key, value, activation=activation, is_causal=True)
        rows = np.isnan(np.asarray(out)).all(-1)[0]
        expected = np.zeros((40, 2), bool)
        expected[25:] = True
        expected[7, 1] = True
        np.testing.assert_array_equal(rows, expected)
        assert not np.isnan(np.asarray(out)[0][~expected]).any()

    @pytest.mark.parametrize("bad", [np.nan, *slow((np.inf,))])
    def test_a_bad_value_spoils_its_coordinate(self, bad):
        query, key, value, _ = inputs((1, 6, 6, 1, 1, 8, 4))
        value = value.at[0, 2, 0, 1].set(bad)
        # Nothing attends to that key, so only the dense product's 0 * inf tells.
        query, key = jnp.abs(query), key.at[0, 2].set(-1.0)
        activation = hsrjax.ReLU(bias=jnp.array([0.3]), normalize="none")
        out, _ = self.compiled(
            query, key, value, activation=activation, is_causal=False
        )
        assert (~np.isfinite(np.asarray(out)[..., 1])).all()
        assert np.isfinite(np.asarray(out)[..., [0, 2, 3]]).all()

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, *slow((jnp.float16,))])
    def test_low_precision_inputs(self, dtype):
        query, key, value, _ = inputs(SHAPE, dtype=dtype)
        kwargs = {"activation": ACTIVATIONS["relu"], "is_causal": True}
        out, _ = self.compiled(query, key, value, **kwargs)
        assert out.dtype == dtype
        expected = expected_of(
            ("low precision", dtype),
            lambda: by_reference(query, key, value, **kwargs),
        )
        assert relative_error(out.astype(jnp.float32), expected) <= 8e-3

    def test_vmap_equals_a_loop(self):
        arrays = [
            jnp.stack(pair)
            for pair in zip(
                *(inputs((1, 7, 7, 2, 1, 8, 8), seed=s)[:3] for s in (1, 2)),
                strict=True,
            )
        ]
        attend = functools.partial(
            self.attend, activation=ACTIVATIONS["relu"], is_causal=True
        )
        together, _ = jax.jit(jax.vmap(attend))(*arrays)
        alone_jitted = jax.jit(attend)
        for row in range(2):
            alone, _ = alone_jitted(*(x[row] for x in arrays))
            assert relative_error(together[row], alone) <= 1e-6

    def test_compiles_once(self, count_traces):
        counted = count_traces(self.attend)
        attend = jax.jit(functools.partial(counted, is_causal=True))
        for seed in range(3):
            arrays = inputs((1, 8, 8, 2, 2, 8, 8), seed=seed)[:3]
            bias = jnp.asarray(0.1 * seed)
            attend(*arrays, activation=hsrjax.ReLU(power=2, bias=bias))
        assert counted.traces == 1

    def test_zero_inputs(self):
        arrays = [jnp.zeros_like(x) for x in inputs((1, 5, 5, 1, 1, 4, 4))[:3]]
        for activation in (hsrjax.ReLU(), hsrjax.Softmax(top_r=2)):
            out, _ = self.compiled(*arrays, activation=activation, is_causal=True)
            assert (out == 0).all()

    def test_epsilon_keeps_its_promises(self):
        query, key, value, _ = inputs((1, 50, 200, 2, 1, 16, 8))

        @jax.jit
        def attend(query, epsilon):
            activation = hsrjax.Softmax(epsilon=epsilon)
            return self.attend(
                query, key, value, activation=activation, is_causal=False
            )

        for spread in (0.1, 3.0, 30.0):
            for epsilon in (0.3, 1e-3):
                out, info = attend(query * spread, jnp.float32(epsilon))
                check_certificate(
                    query * spread, key, value, out, info, epsilon=epsilon
                )


def fill(key, value, *, room=0, chunk=None, reindexed=None):
    """A cache that holds key and value, appended in chunks.

    It is put in spatial order when it holds `reindexed` tokens.
    """
    b, s, kv_heads, h = key.shape
    cache = hsrjax.init_cache(
        b, s + room, kv_heads, h, value_dim=value.shape[-1], dtype=key.dtype
    )
    if reindexed:
        part = slice(0, reindexed)
        cache = hsrjax.extend(cache, key[:, part], value[:, part])
        cache = hsrjax.reindex(cache)
    for start in range(reindexed or 0, s, chunk or s):
        part = slice(start, start + (chunk or s))
        cache = hsrjax.extend(cache, key[:, part], value[:, part])
    return cache


class CacheContract(AttentionContract):
    """The same through `decode_attention`, over a cache that was filled in pieces."""

    differentiable = False
    takes_segments = False
    takes_closed_forms = False
    chunk = None
    appended = None

    def prepare(self, cache):
        """What is done to a cache before it is asked."""
        return cache

    def filled(self, key, value):
        reindexed = None
        if self.appended is not None:
            reindexed = max(1, key.shape[1] - self.appended)
        return self.prepare(
            fill(key, value, room=3, chunk=self.chunk, reindexed=reindexed)
        )

    def ask(self, query, cache, *, activation, tokens, is_causal, **visible):
        positions = jnp.arange(query.shape[1], dtype=jnp.int32)
        if not is_causal:
            positions = jnp.full_like(positions, tokens - 1)
        return hsrjax.decode_attention(
            query,
            cache,
            activation=activation,
            method=self.method,
            implementation=self.implementation,
            positions=jnp.broadcast_to(positions, query.shape[:2]),
            **visible,
        )

    def attend(self, query, key, value, **options):
        return self.ask(query, self.filled(key, value), tokens=key.shape[1], **options)

    def compiled(self, query, key, value, *, activation, **options):
        """A cache is filled by one program for all tests of a shape."""
        cache = program_of(type(self), "filled", {})(key, value)
        options |= {"tokens": key.shape[1]}
        return program_of(type(self), "ask", options)(
            query, cache, activation=activation
        )


def check_certificate(query, key, value, out, info, *, epsilon=None, visible=None):
    """Compares error bound and missed mass with exact softmax in float64."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    group = query.shape[2] // key.shape[2]
    key, value = (np.repeat(x, group, axis=2) for x in (key, value))
    scores = np.einsum("btnh,bsnh->btns", query, key) / np.sqrt(query.shape[-1])
    if visible is not None:
        scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    exact = np.einsum("btns,bsnd->btnd", weights, value)
    error = np.abs(np.asarray(out, np.float64) - exact).max(-1)
    assert (error <= np.asarray(info.error_bound)).all()
    if epsilon is not None:
        assert (np.asarray(info.missed_mass) <= epsilon * (1 + 1e-6)).all()
        # The kept keys are the best `count`, up to ties.
        best = -np.sort(-weights, axis=-1)
        rank = np.arange(weights.shape[-1])
        kept = np.where(rank < np.asarray(info.count)[..., None], best, 0.0).sum(-1)
        assert (1 - kept <= epsilon).all()
    return error
