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
from models import load
from models.attention import hsr_attention_fn
from models.config import ModelConfig
from models.layers import RMSNorm, unit_norm
from models.rope import rotate
from models.transformer import ThresholdScale, Transformer, with_attention

KINDS = ("softmax", "relu", "threshold_relu")
OTHER_KINDS = ("relu_length", "differential_relu", "entmax")


def make_config(kind="threshold_relu", **changes):
    shape = {
        "num_layers": 2,
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


def run(model, tokens, *, return_info=False):
    graphdef, state = nnx.split(model)
    return _run(graphdef, state, tokens, return_info)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _run(graphdef, state, tokens, return_info):
    return nnx.merge(graphdef, state)(tokens, return_info=return_info)


def step(model, *args, **options):
    graphdef, state = nnx.split(model)
    return _step(graphdef, state, args, options)


@functools.partial(jax.jit, static_argnums=0)
def _step(graphdef, state, args, options):
    return nnx.merge(graphdef, state).step(*args, **options)


def close(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


# --- the model ---


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("threshold_relu", "float32"),
        *((kind, "bfloat16") for kind in (*KINDS, *OTHER_KINDS)),
    ],
)
def test_shapes_and_dtypes(kind, dtype):
    model = make_model(kind, dtype=dtype)
    logits, infos = run(model, make_tokens(), return_info=True)
    assert (logits.shape, logits.dtype) == ((2, 12, 64), jnp.float32)
    assert len(infos) == 2
    assert infos[0].count.shape == (2, 12, 4 * model.config.views)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(nnx.state(model)))
    assert bool(jnp.isfinite(logits).all())


@pytest.mark.parametrize("kind", (*KINDS, *OTHER_KINDS))
def test_position_depends_on_no_later_token(kind):
    model = make_model(kind)
    graphdef, state = nnx.split(model)

    def sensitivity(tokens, position):
        """How much the logits at `position` move with each token's embedding."""

        def probe(noise):
            model = nnx.merge(graphdef, state)
            stream = model.embed(tokens) + noise
            positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
            for block in model.blocks:
                stream, _ = block(stream, positions, model.threshold_scale[...])
            return model.unembed(stream)[:, position].std()

        return jax.grad(probe)(jnp.zeros((*tokens.shape, 32)))

    moved = np.abs(jax.jit(sensitivity)(make_tokens(1), 7)).max(axis=(0, 2))
    assert (moved[8:] == 0).all()
    assert moved[7] > 0
    assert (moved[:7] > 0).any()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *((kind, {}) for kind in (*KINDS, *OTHER_KINDS)),
        ("threshold_relu", {"threshold": "cap", "keep_self": True}),
        ("relu", {"output_norm": True}),
        ("softmax", {"output_norm": True, "qk_norm": True}),
    ],
)
def test_hsr_equals_dense_on_the_same_parameters(kind, options):
    model = make_model(kind, num_layers=1, **options)
    tokens = make_tokens(length=40)
    dense, dense_infos = run(model, tokens, return_info=True)
    hsr, infos = run(with_attention(model, "hsr"), tokens, return_info=True)
    close(hsr, dense)
    for info, expected in zip(infos, dense_infos, strict=True):
        np.testing.assert_array_equal(info.count, expected.count)
    fired = np.asarray(infos[0].count)
    if kind != "softmax":  # the threshold must bite, or nothing is tested
        assert 0 < fired.sum() < 2 * fired.shape[2] * 40 * 41 / 2


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("relu", {}),
        ("threshold_relu", {}),
        ("threshold_relu", {"threshold": "cap", "keep_self": True}),
        ("differential_relu", {}),
        ("entmax", {}),
    ],
)
def test_gradients_of_hsr_equal_dense_and_reach_every_parameter(kind, options):
    model = make_model(kind, num_layers=1, tie_embeddings=False, **options)
    tokens = make_tokens()

    def gradient(model):
        graphdef, params, rest = nnx.split(model, nnx.Param, ...)

        def loss(params):
            logits = nnx.merge(graphdef, params, rest)(tokens[:, :-1])
            chosen = jnp.take_along_axis(
                jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1
            )
            return -chosen.mean()

        return nnx.to_pure_dict(jax.jit(jax.grad(loss))(params))

    dense, hsr = gradient(model), gradient(with_attention(model, "hsr"))
    jax.tree.map(lambda a, b: close(a, b, 1e-5), hsr, dense)
    for path, leaf in jax.tree_util.tree_leaves_with_path(dense):
        assert float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)
    assert "threshold_scale" not in dense


@pytest.mark.parametrize(
    ("kind", "attention"),
    [
        *((kind, "dense") for kind in (*KINDS, *OTHER_KINDS)),
        ("threshold_relu", "hsr"),
        ("differential_relu", "hsr"),
    ],
)
def test_cached_steps_equal_the_whole_sequence(kind, attention):
    model = make_model(kind, attention=attention, num_layers=1)
    tokens = make_tokens()
    caches = model.init_caches(2, 16)
    prefilled, caches, _ = step(model, tokens[:, :7], caches)
    parts, infos = [prefilled], []
    for position in range(7, 12):
        token = tokens[:, position : position + 1]
        logits, caches, info = step(model, token, caches)
        parts.append(logits)
        infos.append(info)
    whole, whole_infos = run(model, tokens, return_info=True)
    close(jnp.concatenate(parts, axis=1), whole)
    np.testing.assert_array_equal(infos[-1][0].count[:, 0], whole_infos[0].count[:, 11])


def test_ragged_rows_equal_single_rows():
    model = make_model(num_layers=1)
    tokens, lengths = make_tokens(3, 9), jnp.array([9, 4, 1], jnp.int32)
    padded = jnp.where(jnp.arange(9)[None] < lengths[:, None], tokens, 63)
    logits, caches, _ = step(model, padded, model.init_caches(3, 16), lengths=lengths)
    following = make_tokens(3, 1, seed=5)
    after, caches, _ = step(model, following, caches)
    np.testing.assert_array_equal(caches[0].length, lengths + 1)
    for row, length in enumerate(lengths.tolist()):
        one = jnp.concatenate([tokens[row, :length], following[row]])
        expected = run(model, jnp.pad(one, (0, 9 - length))[None])[0]
        close(logits[row, :length], expected[:length])
        close(after[row, 0], expected[length])


def test_threshold_grows_with_the_visible_length():
    model = make_model(threshold_scale=1.0)
    positions = jnp.array([[0, 1, 99]], jnp.int32)
    heads = jnp.zeros((1, 3, 4, 8))
    activation, scale = model.blocks[0].attention.rule(
        heads, heads, positions, jnp.float32(0.5), key_positions=positions
    )
    beta = np.array([0.7, 0.9, 1.1, 1.3])
    expected = 0.5 * beta * np.sqrt(2 * np.log([[1], [2], [100]]) / 8)
    close(activation.bias[0], expected)
    assert (activation.normalize, scale) == ("none", 1.0)


def test_a_position_that_keeps_itself_is_never_empty():
    """At a threshold above 1 nothing fires between unit vectors."""
    tokens = make_tokens(length=8)
    for keep_self in (False, True):
        model = make_model(threshold_scale=9.0, num_layers=1, keep_self=keep_self)
        attention = model.blocks[0].attention
        stream = model.blocks[0].attention_norm(model.embed(tokens))
        positions = jnp.arange(1, 9, dtype=jnp.int32)[None]
        out, info = attention(
            stream, positions, model.threshold_scale[...], return_info=True
        )
        assert int(info.count.sum()) == 0
        assert bool((jnp.abs(out).max(axis=-1) > 0).all()) is keep_self


def test_a_differential_view_is_subtracted():
    """Two views that are the same, of which all is subtracted, leave nothing."""
    model = make_model("differential_relu", num_layers=1)
    attention, tokens = model.blocks[0].attention, make_tokens()
    for kernel in (attention.query.kernel, attention.key.kernel):
        first = kernel[...][:, : kernel.shape[1] // 2]
        kernel[...] = jnp.concatenate([first, first], axis=1)
    stream = model.blocks[0].attention_norm(model.embed(tokens))
    positions = jnp.arange(12, dtype=jnp.int32)[None]

    def largest(share):
        attention.subtracted[...] = jnp.full(4, share)
        return float(jnp.abs(attention(stream, positions, jnp.float32(0.3))[0]).max())

    assert largest(1.0) < 1e-4 < 0.01 < largest(0.5)


def test_threshold_scale_makes_attention_sparser():
    def fired(scale):
        model = make_model(threshold_scale=scale)
        infos = run(model, make_tokens(length=40), return_info=True)[1]
        return int(infos[0].count.sum())

    assert fired(0.0) > 2 * fired(0.5) > 0


def test_with_attention_shares_parameters_and_leaves_the_model_alone():
    model = make_model("softmax")
    other = with_attention(model, "hsr", top_r=3)
    assert (model.config.attention, model.config.top_r) == ("dense", None)
    assert (other.config.attention, other.config.top_r) == ("hsr", 3)
    assert other.embed.embedding[...] is model.embed.embedding[...]
    infos = run(other, make_tokens(), return_info=True)[1]
    assert int(infos[0].count.max()) == 3
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
    model = make_model()
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


def test_saved_run_loads_equal(tmp_path):
    model = make_model(threshold_scale=0.7)
    load.save_run(tmp_path / "run", model, step=3, train={"note": "x"})
    load.save_run(tmp_path / "run", make_model(threshold_scale=0.9), step=12)
    assert load.checkpoint_steps(tmp_path / "run") == [3, 12]
    newest = load.load_run(tmp_path / "run", attention="hsr")
    assert newest.config == dataclasses.replace(model.config, attention="hsr")
    assert float(newest.threshold_scale[...]) == pytest.approx(0.9)
    older = load.load_run(tmp_path / "run", step=3)
    assert isinstance(older.threshold_scale, ThresholdScale)
    assert older.config == model.config
    jax.tree.map(
        np.testing.assert_array_equal, load.model_item(older), load.model_item(model)
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
    shutil.rmtree(run / "checkpoints" / "0" / "model")


def truncate_arrays(run):
    for folder in (run / "checkpoints" / "0" / "model").rglob("d"):
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
        (remove_model, "checkpoints/0/model cannot be loaded"),
        (truncate_arrays, "checkpoints/0/model cannot be loaded"),
    ],
)
def test_damaged_runs_are_refused_in_one_sentence(tmp_path, damage, message):
    run = tmp_path / "run"
    load.save_run(run, make_model(num_layers=1))
    load.load_run(run)
    damage(run)
    with pytest.raises(load.ModelFileError, match=message) as caught:
        load.load_run(run)
    assert str(run) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_values_that_are_not_finite_are_refused(tmp_path):
    model = make_model(num_layers=1)
    model.final_norm.scale[...] = jnp.full(32, jnp.nan)
    load.save_run(tmp_path / "run", model)
    with pytest.raises(load.ModelFileError, match=r"not finite in .*final_norm"):
        load.load_run(tmp_path / "run")


def test_missing_step_names_those_there_are(tmp_path):
    load.save_run(tmp_path / "run", make_model(num_layers=1), step=4)
    with pytest.raises(load.ModelFileError, match=r"no checkpoint 5 \(it has \[4\]\)"):
        load.load_run(tmp_path / "run", step=5)


def test_atomic_write_keeps_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "config.json"
    load.write_atomic(path, "old")
    with pytest.raises(UnicodeEncodeError):
        load.write_atomic(path, "new \ud800")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_restore_model_names_what_differs():
    model = make_model()
    item = load.model_item(model)
    other = make_config(num_layers=1)
    with pytest.raises(ValueError, match=r"unknown variables \['blocks.1"):
        load.restore_model(other, item)
    with pytest.raises(ValueError, match="use the config it was saved with"):
        load.restore_model(make_config(mlp_dim=52), item)


# --- the adapter for flax's own attention ---


def flax_layer(**options):
    options = {"decode": False, "rngs": nnx.Rngs(0)} | options
    return nnx.MultiHeadAttention(4, 32, num_kv_heads=2, **options)


@pytest.mark.parametrize("lead", [(), (2, 3)])
def test_adapter_equals_flax_softmax(lead, lenient_promotion):
    attention_fn = hsr_attention_fn(activation=hsrjax.Softmax())
    inputs = jax.random.normal(jax.random.key(0), (*lead, 9, 32))
    ours, theirs = flax_layer(attention_fn=attention_fn), flax_layer()

    @functools.partial(jax.jit, static_argnames="is_causal")
    def both(inputs, is_causal):
        return ours(inputs, is_causal=is_causal), theirs(inputs, is_causal=is_causal)

    for is_causal in (False, True):
        close(*both(inputs, is_causal=is_causal))


def test_adapter_passes_its_options_on(monkeypatch):
    options = {
        "activation": hsrjax.ReLU(power=2, bias=0.1),
        "method": "hsr",
        "scale": 0.2,
        "capacity": 4,
    }
    seen = {}
    attention = hsrjax.attention
    monkeypatch.setattr(
        hsrjax,
        "attention",
        lambda *args, **given: seen.update(given) or attention(*args, **given),
    )
    rows = jnp.ones((1, 9, 4, 8))
    attention_fn = hsr_attention_fn(**options)
    jax.eval_shape(lambda x: attention_fn(x, x, x, is_causal=True), rows)
    assert seen == options | {"is_causal": True}


def test_adapter_keeps_the_layers_dtype(lenient_promotion):
    layer = flax_layer(
        attention_fn=hsr_attention_fn(activation=hsrjax.ReLU(power=2)),
        dtype=jnp.bfloat16,
    )
    assert layer(jnp.ones((1, 4, 32))).dtype == jnp.bfloat16


def test_adapter_refuses_what_it_cannot_honour(lenient_promotion):
    attention_fn = hsr_attention_fn(activation=hsrjax.Softmax())
    layer, inputs = flax_layer(attention_fn=attention_fn), jnp.ones((1, 9, 32))
    with pytest.raises(ValueError, match=r"mask must be None.*is_causal=True"):
        layer(inputs, mask=nnx.make_causal_mask(jnp.ones((1, 9))))
    with pytest.raises(ValueError, match="sow_weights=False"):
        layer(inputs, sow_weights=True)
    with pytest.raises(ValueError, match="bias must be None"):
        attention_fn(*[jnp.ones((1, 9, 4, 8))] * 3, bias=jnp.ones((1, 4, 9, 9)))
    dropping = flax_layer(
        attention_fn=attention_fn, dropout_rate=0.5, deterministic=False
    )
    with pytest.raises(ValueError, match="dropout_rate=0"):
        dropping(inputs)
    dropping(inputs, deterministic=True)
