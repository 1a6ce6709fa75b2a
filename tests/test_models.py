"""The transformer, its config, the run folder and the adapter for flax's attention."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import hsrjax
from models.files import runs
from models.files.atomic import write_atomic
from models.network.config import ModelConfig
from models.network.layers import RMSNorm, unit_norm
from models.network.operands import Operands, as_relu
from models.network.rope import rotate
from models.network.transformer import ThresholdScale, Transformer, with_attention

KINDS = (
    "softmax",
    "relu",
    "relu_length",
    "threshold_relu",
    "differential_relu",
    "entmax",
)

LIKE_OTHERS = ("relu", "threshold_relu")  # each one a part of another kind
BFLOAT16 = {"dtype": "bfloat16"}


def slow(*cases):
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def make_config(kind="threshold_relu", **changes):
    shape = {
        "num_layers": 1,
        "embed_dim": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "value_dim": 12,
        "mlp_dim": 48,
        "vocab_size": 64,
        "attention": "dense",
    }
    return ModelConfig(attention_kind=kind, **(shape | changes))


def make_model(kind="threshold_relu", *, threshold_scale=0.3, **changes):
    """A model whose biases are not all at their initial zeros and ones."""
    model = Transformer(make_config(kind, **changes), rngs=nnx.Rngs(0))
    model.threshold_scale[...] = jnp.float32(threshold_scale)
    for block in model.blocks:
        heads = jnp.arange(model.config.num_heads, dtype=jnp.float32)
        if kind in ("relu", "relu_length"):
            block.attention.bias[...] = 0.1 * heads - 0.1
        if model.config.is_thresholded:
            block.attention.beta[...] = 0.7 + 0.2 * heads
    return model


def make_tokens(batch=2, length=12, *, seed=1):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 64, jnp.int32)


# The time of these tests is that of compiling. Models of one config, on tokens of one
# shape, share a program.


def run(model, tokens):
    """Logits and infos of a whole sequence."""
    return _run(*nnx.split(model), tokens)


@functools.partial(jax.jit, static_argnums=0)
def _run(graphdef, state, tokens):
    return nnx.merge(graphdef, state)(tokens, return_info=True)


def step(model, tokens, caches, lengths=None):
    if lengths is None:
        lengths = jnp.full(tokens.shape[0], tokens.shape[1], jnp.int32)
    return _step(*nnx.split(model), tokens, caches, lengths)


@functools.partial(jax.jit, static_argnums=0)
def _step(graphdef, state, tokens, caches, lengths):
    return nnx.merge(graphdef, state).step(tokens, caches, lengths=lengths)


def attend(model, length=8):
    """Output and info of the first layer's attention, and what it read."""
    return _attend(*nnx.split(model), make_tokens(length=length))


@functools.partial(jax.jit, static_argnums=0)
def _attend(graphdef, state, tokens):
    model = nnx.merge(graphdef, state)
    block = model.blocks[0]
    positions = jnp.arange(1, tokens.shape[1] + 1, dtype=jnp.int32)[None]
    scale = model.threshold_scale[...]
    stream = block.attention_norm(model.embed(tokens))
    return block.attention(stream, positions, scale, return_info=True)


def close(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# --- the model ---


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("threshold_relu", {"num_layers": 2}),
        *((kind, BFLOAT16) for kind in KINDS if kind not in LIKE_OTHERS),
        *slow(*((kind, BFLOAT16) for kind in LIKE_OTHERS)),
    ],
)
def test_shapes_and_dtypes(kind, options):
    model = make_model(kind, **options)
    logits, infos = run(model, make_tokens())
    assert (logits.shape, logits.dtype) == ((2, 12, 64), jnp.float32)
    assert len(infos) == model.config.num_layers
    assert infos[0].count.shape == (2, 12, 4 * model.config.views)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model)))
    assert bool(jnp.isfinite(logits).all())


@pytest.mark.parametrize("kind", KINDS)
def test_position_depends_on_no_later_token(kind):
    model, tokens = make_model(kind), make_tokens()
    logits, _ = run(model, tokens)

    def moved(first, last):
        """Where logits change with the tokens from first to last."""
        place = jnp.arange(12)[None]
        inside = (first <= place) & (place <= last)
        others = jnp.where(inside, (tokens + 7) % 64, tokens)
        return np.asarray(run(model, others)[0] != logits).any(axis=(0, 2))

    assert moved(8, 11).tolist() == [False] * 8 + [True] * 4
    assert not moved(3, 3)[:3].any()
    assert moved(3, 3)[7]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("differential_relu", {"threshold": "cap", "keep_self": True}),
        *slow(
            ("softmax", {}),
            ("softmax", {"output_norm": True, "qk_norm": True}),
            ("relu", {}),
            ("relu", {"output_norm": True, "qk_norm": True}),
            ("relu_length", {}),
            ("threshold_relu", {}),
            ("threshold_relu", {"threshold": "cap", "keep_self": True}),
            ("differential_relu", {}),
            ("entmax", {}),
        ),
    ],
)
def test_hsr_equals_dense_on_the_same_parameters(kind, options):
    """In one layer: what comes out, which keys fire, and every gradient."""
    model, length = make_model(kind, **options), 40
    k1, k2 = jax.random.split(jax.random.key(0))
    stream = jax.random.normal(k1, (2, length, 32))
    target = jax.random.normal(k2, stream.shape)
    positions = jnp.arange(length, dtype=jnp.int32)[None]

    def found(model):
        graphdef, params, rest = nnx.split(model.blocks[0].attention, nnx.Param, ...)

        def loss(params, stream):
            attention = nnx.merge(graphdef, params, rest)
            out, info = attention(stream, positions, jnp.float32(0.3), return_info=True)
            return (out * target).mean(), (out, info.count)

        both = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
        (_, (out, count)), gradients = jax.jit(both)(params, stream)
        return out, count, gradients

    dense, fired, expected = found(model)
    hsr, count, gradients = found(with_attention(model, "hsr"))
    close(hsr, dense)
    np.testing.assert_array_equal(count, fired)
    if kind != "softmax":  # the threshold must bite, or nothing is tested
        assert 0 < int(fired.sum()) < fired.shape[2] * length * (length + 1)
    jax.tree.map(lambda a, b: close(a, b, 1e-5), gradients, expected)
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        assert float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)


def test_gradients_reach_every_parameter():
    options = {"output_norm": True, "qk_norm": True, "tie_embeddings": False}
    model, tokens = make_model("relu", **options), make_tokens()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        logits = nnx.merge(graphdef, params, rest)(tokens[:, :-1])
        scores = jax.nn.log_softmax(logits)
        return -jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1).mean()

    gradients = nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)
    assert "threshold_scale" not in gradients


def relu_above_a_threshold(query, key, value):
    """1.5-entmax by its formula: ReLU^2 of half the scores above tau, in row sums.

    tau from sorted scores: Peters et al. 2019, Algorithm 2.
    """
    length = query.shape[1]
    key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], 2) for x in (key, value))
    scores = jnp.einsum("btnh,bsnh->bnts", query, key, precision="highest")
    visible = jnp.tril(jnp.ones((length, length), bool))[None, None]
    half = jnp.where(visible, scores * query.shape[-1] ** -0.5 / 2, -1e3)
    ranked = jnp.sort(half, axis=-1, descending=True)
    number = jnp.arange(1, length + 1, dtype=jnp.float32)[None, None, None]
    mean = jnp.cumsum(ranked, -1) / number
    spread = jnp.cumsum(ranked**2, -1) / number - mean**2
    tau = mean - jnp.sqrt(jnp.maximum(0.0, 1.0 / number - spread))
    support = (tau <= ranked).sum(-1, keepdims=True, dtype=jnp.float32)
    inside = number <= support
    mean = jnp.where(inside, ranked, 0.0).sum(-1, keepdims=True) / support
    spread = jnp.where(inside, (ranked - mean) ** 2, 0.0).sum(-1, keepdims=True)
    tau = mean - jnp.sqrt((1.0 - spread) / support)
    weights = jax.nn.relu(half - tau) ** 2
    weights = weights / weights.sum(-1, keepdims=True)
    return jnp.einsum("bnts,bsnd->btnd", weights, value, precision="highest")


@pytest.mark.parametrize("method", ["dense", *slow(("hsr",))])
def test_entmax_is_relu_above_a_threshold(method):
    """Models were trained with this formula; weights are taken from one-hot values."""
    keys = jax.random.split(jax.random.key(0), 3)
    query = 4 * jax.random.normal(keys[0], (2, 24, 4, 8))
    key = jax.random.normal(keys[1], (2, 24, 2, 8))
    value = jnp.broadcast_to(jnp.eye(24)[None, :, None], (2, 24, 2, 24))
    target = jax.random.normal(keys[2], (2, 24, 4, 24))
    positions = jnp.arange(24, dtype=jnp.int32)[None]
    attention = make_model("entmax").blocks[0].attention
    activation, scale = attention.rule(positions, jnp.float32(1.0))

    def library(*arrays):
        options = {"activation": activation, "scale": scale, "method": method}
        return hsrjax.attention(*arrays, is_causal=True, **options)

    def found(attend):
        def loss(*arrays):
            out = attend(*arrays)
            return (out * target).sum(), out

        both = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)
        (_, weights), gradients = jax.jit(both)(query, key, value)
        return weights, gradients

    weights, gradients = found(library)
    expected, expected_gradients = found(relu_above_a_threshold)
    close(weights, expected, 2e-6)
    assert 0.05 < float((weights > 0).mean()) < 0.4
    jax.tree.map(close, gradients, expected_gradients)
    same = as_relu(Operands(query * scale, key, value, activation))
    options = {"activation": same.activation, "scale": 1.0, "method": "dense"}
    close(hsrjax.attention(*same[:3], is_causal=True, **options), weights)


@pytest.mark.parametrize(
    ("kind", "attention", "pieces"),
    [
        *((kind, "dense", 3 * [4]) for kind in KINDS if kind != "relu"),
        ("threshold_relu", "hsr", 3 * [4]),
        *slow(
            ("relu", "dense", 3 * [4]),
            ("differential_relu", "hsr", 3 * [4]),
            ("threshold_relu", "hsr", [7, *5 * [1]]),
            ("entmax", "hsr", [7, *5 * [1]]),
        ),
    ],
)
def test_cached_steps_equal_the_whole_sequence(kind, attention, pieces):
    model, tokens = make_model(kind, attention=attention), make_tokens()
    caches, parts, start = model.init_caches(2, 16), [], 0
    for size in pieces:
        new = tokens[:, start : start + size]
        logits, caches, infos = step(model, new, caches)
        parts.append(logits)
        start += size
    whole, whole_infos = run(with_attention(model, "dense"), tokens)
    close(jnp.concatenate(parts, axis=1), whole)
    last = whole_infos[0].count[:, 12 - pieces[-1] :]
    np.testing.assert_array_equal(infos[0].count, last)


def test_ragged_rows_equal_single_rows():
    model, tokens = make_model(), make_tokens()
    caches, read = model.init_caches(2, 16), np.zeros(2, int)
    whole, _ = run(model, tokens)
    for lengths in ([4, 1], [0, 4], [3, 1]):
        places = np.minimum(read[:, None] + np.arange(4), 11)
        new = np.take_along_axis(np.asarray(tokens), places, axis=1)
        new = np.where(np.arange(4) < np.array(lengths)[:, None], new, 63)
        logits, caches, _ = step(model, jnp.asarray(new), caches, jnp.array(lengths))
        for row, length in enumerate(lengths):
            expected = whole[row, read[row] : read[row] + length]
            close(logits[row, :length], expected)
        read += lengths
        np.testing.assert_array_equal(caches[0].length, read)


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        ("threshold_relu", "dense"),
        ("entmax", "dense"),
        *slow(("threshold_relu", "hsr"), ("entmax", "hsr")),
    ],
)
def test_a_reindexed_cache_gives_the_same(kind, attention):
    """Its slots are not positions, by which windows and thresholds go."""
    model, tokens = make_model(kind, attention=attention, window=6), make_tokens()
    caches = model.init_caches(2, 16)
    for start in (0, 4):
        _, caches, _ = step(model, tokens[:, start : start + 4], caches)
    reordered = tuple(map(hsrjax.reindex, caches))
    ids = np.asarray(reordered[0].index.ids)
    assert (ids[..., :8] != np.arange(8)).any()
    expected, _, infos = step(model, tokens[:, 8:], caches)
    logits, _, found = step(model, tokens[:, 8:], reordered)
    close(logits, expected)
    np.testing.assert_array_equal(found[0].count, infos[0].count)


def test_threshold_grows_with_the_visible_length():
    attention = make_model().blocks[0].attention
    positions = jnp.array([[0, 1, 99]], jnp.int32)
    activation, scale = attention.rule(positions, jnp.float32(0.5))
    beta = np.array([0.7, 0.9, 1.1, 1.3])
    expected = 0.5 * beta * np.sqrt(2 * np.log([[1], [2], [100]]) / 8)
    close(activation.bias[0], expected)
    assert (activation.normalize, scale) == ("none", 1.0)


def test_a_position_that_keeps_itself_is_never_empty():
    """At a threshold above 1 nothing fires between unit vectors."""
    for keep_self in (False, True):
        out, info = attend(make_model(threshold_scale=9.0, keep_self=keep_self))
        assert int(info.count.sum()) == 0
        assert bool((jnp.abs(out).max(axis=-1) > 0).all()) is keep_self


def test_a_differential_view_is_subtracted():
    """Two views that are the same, of which all is subtracted, leave nothing."""
    model = make_model("differential_relu")
    attention = model.blocks[0].attention
    for kernel in (attention.query.kernel, attention.key.kernel):
        first = kernel[...][:, : kernel.shape[1] // 2]
        kernel[...] = jnp.concatenate([first, first], axis=1)

    def largest(share):
        attention.subtracted[...] = jnp.full(4, share)
        return float(jnp.abs(attend(model)[0]).max())

    assert largest(1.0) < 1e-4 < 0.01 < largest(0.5)


def test_threshold_scale_makes_attention_sparser():
    def fired(scale):
        infos = run(make_model(threshold_scale=scale), make_tokens())[1]
        return int(infos[0].count.sum())

    assert fired(0.0) > 2 * fired(0.5) > 0


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["dense", "hsr"])
def test_top_r_keeps_so_many_keys(attention):
    model = with_attention(make_model("softmax"), attention, top_r=3)
    assert int(run(model, make_tokens())[1][0].count.max()) == 3


def test_with_attention_shares_parameters_and_leaves_the_model_alone():
    model = make_model("softmax")
    other = with_attention(model, "hsr", top_r=3)
    assert (model.config.attention, model.config.top_r) == ("dense", None)
    assert (other.config.attention, other.config.top_r) == ("hsr", 3)
    assert other.embed.embedding[...] is model.embed.embedding[...]
    with pytest.raises(ValueError, match=r"softmax.*attention='hsr'"):
        with_attention(make_model("relu"), "hsr", epsilon=0.1)


def test_tied_and_free_heads():
    tied, free = make_model(), make_model(tie_embeddings=False)
    assert not hasattr(tied, "head")
    assert free.head.kernel.shape == (32, 64)


@pytest.mark.parametrize("tokens", [jnp.zeros(4, jnp.int32), jnp.zeros((1, 4))])
def test_wrong_tokens_are_refused(tokens):
    with pytest.raises(ValueError, match=r"tokens must be integers of shape \[B, T\]"):
        make_model()(tokens)


def test_wrong_number_of_caches_is_refused():
    model = make_model(num_layers=2)
    with pytest.raises(ValueError, match="one cache for each of the 2 layers, got 1"):
        model.step(make_tokens(), model.init_caches(2, 16)[:1])


# --- layers ---


def test_rotation_keeps_norms_and_scores_depend_on_the_distance():
    query, key = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(i, j):
        turned_q = rotate(query, jnp.array([[i]], jnp.int32), theta=100.0)
        turned_k = rotate(key, jnp.array([[j]], jnp.int32), theta=100.0)
        return float((turned_q * turned_k).sum())

    assert score(9, 4) == pytest.approx(score(5, 0), abs=1e-5)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)
    turned = rotate(query, jnp.array([[3]], jnp.int32), theta=100.0)
    close(jnp.linalg.norm(turned), jnp.linalg.norm(query))


def test_rotation_by_hand():
    heads = jnp.array([[[[1.0, 2.0, 3.0, 4.0]]]])
    turned = rotate(heads, jnp.array([[5]], jnp.int32), theta=100.0)[0, 0, 0]
    for j, angle in enumerate([5.0, 0.5]):
        pair = complex(heads[0, 0, 0, j], heads[0, 0, 0, j + 2]) * np.exp(1j * angle)
        close(turned[j], pair.real)
        close(turned[j + 2], pair.imag)


def test_unit_norm_is_safe_at_zero():
    rows = jnp.array([[3.0, 4.0], [0.0, 0.0]])
    close(unit_norm(rows), [[0.6, 0.8], [0.0, 0.0]])
    assert bool(jnp.isfinite(jax.grad(lambda x: unit_norm(x).sum())(rows)).all())


def test_rms_norm_equals_flax():
    ours = RMSNorm(32, make_config(), rngs=nnx.Rngs(0))
    theirs = nnx.RMSNorm(32, epsilon=1e-6, rngs=nnx.Rngs(0))
    ours.scale[...] = theirs.scale[...] = jnp.linspace(0.5, 2.0, 32)
    rows = jax.random.normal(jax.random.key(0), (2, 3, 32))
    with jax.numpy_rank_promotion("allow"):
        close(ours(rows), theirs(rows))


# --- the config ---


def test_config_survives_json():
    config = make_config("softmax", epsilon=0.01)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 3}, "num_heads must be a multiple of num_kv_heads, got 3 and 2"),
        ({"head_dim": 7}, "head_dim must be even .* got 7; use 8"),
        ({"num_layers": 0}, "num_layers must be an integer from 1 to .* got 0"),
        ({"num_layers": True}, "num_layers must be an integer .* got True"),
        ({"num_layers": 2.0}, "num_layers must be an integer .* got 2.0"),
        ({"embed_dim": 10**12}, "embed_dim must be an integer from 1 to"),
        ({"capacity": 0}, "capacity must be an integer from 1"),
        ({"attention": "sparse"}, "attention must be one of dense, hsr, auto"),
        ({"attention_kind": []}, "attention_kind must be one of"),
        ({"dtype": "float64"}, "dtype must be one of float32, bfloat16, float16"),
        ({"rope_theta": float("nan")}, "rope_theta must be a finite number above 0"),
        ({"norm_eps": "small"}, "norm_eps must be a number"),
        ({"tie_embeddings": 1}, "tie_embeddings must be True or False, got 1"),
        ({"top_r": 4}, "top_r and epsilon approximate softmax"),
        ({"qk_norm": False}, "thresholds are those of unit vectors"),
        ({"attention_kind": "softmax", "epsilon": 1.0}, "epsilon must lie between"),
        (
            {"attention_kind": "softmax", "epsilon": 0.1, "top_r": 4},
            "top_r and epsilon exclude each other",
        ),
        ({"attention_kind": "softmax", "tail": 8}, "tail must be 1, 2, 4, 8, 16 or 32"),
        ({"attention_kind": "softmax", "top_r": 4, "tail": 3}, "got tail=3"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    fields = make_config().to_dict() | changes
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(fields)


def test_from_dict_names_missing_and_unknown_fields():
    fields = make_config().to_dict()
    del fields["mlp_dim"]
    with pytest.raises(ValueError, match=r"missing fields \['mlp_dim'\].*\['width'\]"):
        ModelConfig.from_dict(fields | {"width": 3})
    with pytest.raises(ValueError, match="expected a dictionary of fields, got list"):
        ModelConfig.from_dict([1, 2])


# --- the run folder ---


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "run"
    runs.save_run(folder, make_model(), step=4)
    runs.load_run(folder)
    return folder


def test_saved_run_loads_equal(tmp_path):
    model = make_model(threshold_scale=0.7)
    runs.save_run(tmp_path / "run", model, step=3, train={"note": "x"})
    runs.save_run(tmp_path / "run", make_model(threshold_scale=0.9), step=12)
    assert runs.checkpoint_steps(tmp_path / "run") == [3, 12]
    newest = runs.load_run(tmp_path / "run", attention="hsr")
    assert newest.config == dataclasses.replace(model.config, attention="hsr")
    assert float(newest.threshold_scale[...]) == pytest.approx(0.9)
    older = runs.load_run(tmp_path / "run", step=3)
    assert isinstance(older.threshold_scale, ThresholdScale)
    assert older.config == model.config
    jax.tree.map(
        np.testing.assert_array_equal, runs.model_item(older), runs.model_item(model)
    )


def remove_config(run):
    (run / "config.json").unlink()


def truncate_config(run):
    text = (run / "config.json").read_text()
    (run / "config.json").write_text(text[: len(text) // 2])


def binary_config(run):
    (run / "config.json").write_bytes(bytes(range(256)))


def foreign_config(run):
    (run / "config.json").write_text('{"model_type": "llama"}')


def edit_config(**changes):
    def damage(run):
        content = json.loads((run / "config.json").read_text())
        content["model"] |= changes.pop("model", {})
        (run / "config.json").write_text(json.dumps(content | changes))

    return damage


def remove_checkpoints(run):
    shutil.rmtree(run / "checkpoints")


def remove_model(run):
    shutil.rmtree(run / "checkpoints" / "4" / "model")


def truncate_arrays(run):
    for folder in (run / "checkpoints" / "4" / "model").rglob("d"):
        for file in folder.iterdir():
            file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist; give the folder"),
        (remove_config, "holds no config.json"),
        (truncate_config, "cannot be read as JSON"),
        (binary_config, "cannot be read as JSON"),
        (foreign_config, 'lacks "format": "hsrjax-run"'),
        (edit_config(version=99), "has version 99 and this program reads 1"),
        (edit_config(model={"head_dim": 3}), "does not describe a model .*head_dim"),
        (edit_config(model={"mlp_dim": 52}), r"mlp.down.kernel must be .*\[52, 32\]"),
        (edit_config(model={"num_layers": 3}), r"missing variables \['blocks.1.att"),
        (edit_config(train=[]), '"train" must be an object'),
        (remove_checkpoints, "no finished checkpoint"),
        (remove_model, "checkpoints/4/model cannot be loaded"),
        (truncate_arrays, "checkpoints/4/model cannot be loaded"),
    ],
)
def test_damaged_runs_are_refused_in_one_sentence(saved, tmp_path, damage, message):
    run = shutil.copytree(saved, tmp_path / "run")
    damage(run)
    with pytest.raises(runs.ModelFileError, match=message) as caught:
        runs.load_run(run)
    assert str(run) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_that_are_not_finite_are_refused(tmp_path):
    model = make_model()
    model.final_norm.scale[...] = jnp.full(32, jnp.nan)
    runs.save_run(tmp_path / "run", model)
    with pytest.raises(runs.ModelFileError, match=r"not finite in .*final_norm"):
        runs.load_run(tmp_path / "run")


def test_missing_step_names_those_there_are(saved):
    with pytest.raises(runs.ModelFileError, match=r"no checkpoint 5 \(it has \[4\]\)"):
        runs.load_run(saved, step=5)


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "config.json"
    write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_restore_model_names_what_differs():
    item = runs.model_item(make_model(num_layers=2))
    other = make_config()
    with pytest.raises(ValueError, match=r"unknown variables \['blocks.1"):
        runs.restore_model(other, item)
    with pytest.raises(ValueError, match="use the config it was saved with"):
        runs.restore_model(make_config(mlp_dim=52), item)
