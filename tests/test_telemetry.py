"""What is said of every head, against the same by brute force."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.network.config import ModelConfig
from models.network.operands import as_relu, attention_operands
from models.network.transformer import Transformer
from train import report, telemetry
from train.__main__ import main
from train.config import PRESETS
from train.loop import train

KINDS = ("softmax", "relu", "threshold_relu", "differential_relu", "entmax")


def make_model(kind, *, threshold_scale=0.5):
    config = ModelConfig(
        num_layers=2,
        embed_dim=32,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        mlp_dim=48,
        attention_kind=kind,
        attention="dense",
    )
    model = Transformer(config, rngs=nnx.Rngs(0))
    model.threshold_scale[...] = jnp.float32(threshold_scale)
    return model


def brute_force(model, tokens):
    """nonzero_fraction, empty_rows, effective_keys by loops over rows."""
    layers = jax.jit(attention_operands)(model, jnp.asarray(tokens, jnp.int32))
    found = []
    for query, key, _, activation in map(as_relu, layers):
        heads, length = query.shape[2], query.shape[1]
        key = np.repeat(np.asarray(key, np.float64), heads // key.shape[2], axis=2)
        query = np.asarray(query, np.float64)
        for head in range(heads):
            fired, effective, empty = 0, [], 0
            for b, t in np.ndindex(query.shape[:2]):
                scores = key[b, : t + 1, head] @ query[b, t, head]
                if hasattr(activation, "bias"):
                    bias = float(activation.bias[b, t, head])
                    weights = np.maximum(scores - bias, 0) ** activation.power
                else:
                    weights = np.exp(scores - scores.max())
                fired += (weights > 0).sum()
                empty += not weights.any()
                if weights.any():
                    effective.append(weights.sum() ** 2 / (weights**2).sum())
            rows = query.shape[0] * length
            pairs = rows * (length + 1) / 2
            found.append([fired / pairs, empty / rows, np.mean(effective or [0])])
    return np.array(found).reshape(len(layers), -1, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_brute_force(kind):
    model = make_model(kind)
    tokens = np.random.default_rng(0).integers(0, 256, (2, 33))
    found = telemetry.measure(model, tokens)
    expected = brute_force(model, tokens)
    # A score within rounding of its threshold may count on either side.
    np.testing.assert_allclose(found["nonzero_fraction"], expected[..., 0], atol=2e-3)
    np.testing.assert_allclose(found["empty_rows"], expected[..., 1], atol=0.02)
    np.testing.assert_allclose(found["effective_keys"], expected[..., 2], rtol=0.02)
    assert set(found) == set(telemetry.COLUMNS)
    heads = 4 * model.config.views
    assert all(values.shape == (2, heads) for values in found.values())
    if kind == "softmax":
        assert np.isnan(found["survivors"]).all()
        assert (found["nonzero_fraction"] == 1).all()
    else:
        # The step looks at the keys of a whole group, and misses none that fires.
        assert (found["survivors"] > 0).all()
        assert (found["survivors"] <= 1).all()
    if model.config.is_thresholded:
        np.testing.assert_allclose(found["threshold_scale"], 0.5)


def test_survivors_and_slots_are_those_of_decode_steps():
    """At the last position alone: as many keys as `decode_attention` says."""
    model = make_model("threshold_relu")
    tokens = np.random.default_rng(1).integers(0, 256, (1, 40))
    one = telemetry.measure(model, tokens, steps=1)
    caches = model.init_caches(1, 40)
    _, caches, _ = model.step(jnp.asarray(tokens[:, :-1], jnp.int32), caches)
    hsr = dataclasses.replace(model.config, attention="hsr")
    graphdef = nnx.graphdef(Transformer(hsr, rngs=nnx.Rngs(0)))
    stepping = nnx.merge(graphdef, nnx.state(model))
    _, _, infos = stepping.step(jnp.asarray(tokens[:, -1:], jnp.int32), caches)
    looked_at = np.stack([info.candidates[0, 0] for info in infos])
    np.testing.assert_allclose(one["survivors"], looked_at / 40, rtol=1e-5)
    ratio = one["survivors"] / one["capacity_use"]
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-5)


def test_a_head_that_never_fires_is_dead():
    model = make_model("threshold_relu", threshold_scale=9.0)
    tokens = np.random.default_rng(0).integers(0, 256, (1, 300))
    found = telemetry.measure(model, tokens)
    assert telemetry.dead_heads(found["empty_rows"]) == 8
    assert telemetry.dead_heads(np.array([[0.98, 0.0]])) == 0


@pytest.mark.parametrize("kind", ["threshold_relu", "softmax"])
def test_a_run_writes_them_and_the_report_shows_them(
    kind, text, tmp_path, capsys, lenient_promotion
):
    micro = PRESETS["micro"]
    config = dataclasses.replace(
        micro,
        data=str(text),
        steps=4,
        eval_every=2,
        model=dataclasses.replace(micro.model, attention_kind=kind),
    )
    runs = []
    for seed in (0, 1):
        runs.append(tmp_path / f"<b>{kind}-{seed}")
        results = train(
            dataclasses.replace(config, seed=seed), runs[-1], progress=False
        )
        assert results["dead_heads"] == 0
        assert 0 <= results["empty_rows"] < 1 <= results["effective_keys"]
    header, *lines = (runs[0] / "sparsity.csv").read_text().splitlines()
    assert header.split(",")[3:] == list(telemetry.COLUMNS)
    assert len(lines) == 2 * 2
    assert (",," in lines[0]) is (kind == "softmax")
    out = tmp_path / "report.html"
    words = ["report", *map(str, runs), "--out", str(out), "--json"]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(printed) == {run.name for run in runs}
    page = out.read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert "<b>" not in page  # names are text, not markup
    assert len(re.findall(r"data:image/png;base64,\w", page)) == 3
    assert "train.seed" in page
    assert "train.learning_rate" not in page


def test_report_refuses_in_one_sentence(tmp_path, capsys):
    assert main(["report", "--out", str(tmp_path / "r.html")]) == 2
    assert "no run was named" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--out", str(tmp_path / "r.html")]) == 2
    assert "is not a run folder" in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()
    with pytest.raises(ValueError, match="two runs are named"):
        report.collect((_run(tmp_path / "a" / "x"), _run(tmp_path / "b" / "x")))


def _run(folder):
    """The least that counts as a run."""
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(
        "step,loss,validation_loss,validation_nonzero_fraction\n1,2,3,0.5\n"
    )
    (folder / "config.json").write_text('{"model": {}, "train": {}}')
    return folder
