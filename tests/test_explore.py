"""What heads do with a text, by definition; how little room it takes; the command."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import hsrjax
from models.exploration import packing
from models.exploration.page import Shown, make_page
from models.exploration.reading import layers_that_fit, read
from models.exploration.rows import CELLS, MOST_KEYS, heads_of, pictures
from models.explore import main
from models.network.operands import Operands, attention_operands
from tests.made_up import run_of

TEXT = "def f(self, other):\n\treturn self.g(other) + other.h\n" * 3
LENGTH = 48


def operands(activation, *, seed=0, heads=4, kv_heads=2, size=8):
    rng = np.random.default_rng(seed)
    draw = lambda n: jnp.asarray(rng.normal(size=(1, LENGTH, n, size)), jnp.float32)
    return Operands(draw(heads) / size**0.5, draw(kv_heads), draw(kv_heads), activation)


def bias(value):
    steps = np.linspace(0, 1, LENGTH * 4, dtype=np.float32).reshape(1, LENGTH, 4)
    return jnp.asarray(value + steps)


RULES = {
    "relu": hsrjax.ReLU(3, bias(0.3), "none"),
    "empty": hsrjax.ReLU(1, bias(1.6)),
    "entmax": hsrjax.Entmax(),
    "top_r": hsrjax.Softmax(top_r=5),
    "epsilon": hsrjax.Softmax(epsilon=0.3),
    "softmax": hsrjax.Softmax(),
}


def by_definition(given, window=None):
    """Scores f64[N, T, T] and dense weights f64[N, T, T] that sum to one or nothing."""
    key = np.repeat(np.asarray(given.key[0], np.float64), 2, axis=1)
    scores = np.einsum("tnh,snh->nts", np.asarray(given.query[0], np.float64), key)
    at = np.arange(LENGTH)
    seen = (at <= at[:, None]) & (at > at[:, None] - (window or LENGTH))
    scores = np.where(seen, scores, -np.inf)
    rule = given.activation
    if isinstance(rule, hsrjax.ReLU):
        edges = np.asarray(rule.bias)[0].T[..., None]
        weights = np.maximum(scores - edges, 0) ** rule.power
    elif isinstance(rule, hsrjax.Entmax):
        low, high = scores.max(-1, keepdims=True) / 2 - 1, scores.max(-1)[..., None] / 2
        for _ in range(60):
            middle = (low + high) / 2
            above = (np.maximum(scores / 2 - middle, 0) ** 2).sum(-1, keepdims=True) > 1
            low, high = np.where(above, middle, low), np.where(above, high, middle)
        weights = np.maximum(scores / 2 - low, 0) ** 2
    else:
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        if rule.top_r:
            last = np.sort(scores, -1)[..., -rule.top_r, None]
            weights = np.where(scores >= last, weights, 0)
    total = weights.sum(-1, keepdims=True)
    return scores, weights / np.where(total > 0, total, 1)


@pytest.mark.parametrize("name", RULES)
def test_rows_are_those_of_dense_attention(name):
    given = operands(RULES[name])
    scores, weights = by_definition(given)
    for number, head in enumerate(heads_of(given, window=None, method="hsr")):
        for row in range(LENGTH):
            own, ranked = weights[number, row], np.argsort(-scores[number, row])
            kept = head.kept[row]
            assert head.keys[row, :kept].tolist() == ranked[:kept].tolist()
            if name != "epsilon":  # of which only the certificate is known
                assert head.count[row] == np.sum(own > 0)
                share = own[ranked[:kept]]
                np.testing.assert_allclose(head.shares[row, :kept], share, atol=1e-5)
            exact = np.exp(scores[number, row] - scores[number, row].max())
            falling = -np.sort(-exact / exact.sum())
            assert head.soft[row] == 1 + np.sum(np.cumsum(falling) < 0.9)
            np.testing.assert_allclose(
                np.exp(head.scores[row, :kept] - head.mass[row]), falling[:kept], 1e-4
            )
        assert np.all(head.kept == np.clip(head.count, np.minimum(4, rows_()), 64))
        assert np.all(head.count <= head.possible)
        assert np.all(head.possible <= rows_())
        if name == "epsilon":
            certified = 1 - np.where(ranks_(head), head.shares, 0).sum(-1)
            assert np.all(certified < 1e-5) and np.all(head.missed <= 0.3)
            assert head.count.sum() < rows_().sum()


def rows_():
    return np.arange(1, LENGTH + 1)


def ranks_(head):
    return np.arange(head.keys.shape[-1]) < head.count[:, None]


def test_heads_that_share_keys_look_at_them_together():
    given = operands(RULES["relu"])
    cache = hsrjax.init_cache(1, LENGTH, 2, 8)
    sketch = hsrjax.extend(cache, given.key, given.value).index.sketch
    rows = jnp.moveaxis(given.query[0].reshape(LENGTH, 2, 2, 8), 0, 2)  # [K, G, T, H]
    edges = np.asarray(given.activation.bias)[0].T.reshape(2, 2, LENGTH)
    reach = [
        [sketch.intervals(rows[None, :, x])[1][0, kv, :, :LENGTH] for x in (0, 1)]
        for kv in (0, 1)
    ]
    reach = np.asarray(reach) >= edges[..., None]
    reach &= np.tri(LENGTH, dtype=bool)
    for number, head in enumerate(heads_of(given, window=None, method="hsr")):
        kv, group = divmod(number, 2)
        np.testing.assert_array_equal(head.possible, reach[kv, group].sum(-1))
        np.testing.assert_array_equal(head.looked, reach[kv].any(0).sum(-1))


def test_a_window_hides_keys_and_dense_looks_at_all():
    given = operands(RULES["relu"])
    scores, weights = by_definition(given, window=7)
    for number, head in enumerate(heads_of(given, window=7, method="dense")):
        np.testing.assert_array_equal(head.count, np.sum(weights[number] > 0, -1))
        np.testing.assert_array_equal(head.looked, np.minimum(rows_(), 7))
        np.testing.assert_array_equal(head.possible.clip(0, 7), head.possible)
        for row in range(LENGTH):
            kept = head.keys[row, : head.kept[row]]
            assert len(kept) <= 7 and set(kept) <= set(range(row - 6, row + 1))
            np.testing.assert_allclose(
                head.shares[row, : len(kept)], weights[number, row, kept], atol=1e-5
            )
            exact = np.exp(scores[number, row] - scores[number, row].max())
            assert head.soft[row] == 1 + np.sum(
                np.cumsum(-np.sort(-exact / exact.sum())) < 0.9
            )


@pytest.mark.parametrize("name", ["relu", "top_r"])
def test_pictures_add_up_the_weights(name):
    given = operands(RULES[name])
    _, weights = by_definition(given)
    counts = np.sum(weights > 0, axis=-1).T
    found = pictures(given, counts, window=None, stride=1)
    cell = np.arange(LENGTH) * CELLS // LENGTH
    first = np.arange(CELLS) * LENGTH // CELLS
    for head in range(4):
        by_key = np.add.reduceat(weights[head], first, axis=-1)
        by_cell = [by_key[cell == row].mean(axis=0) for row in range(CELLS)]
        np.testing.assert_allclose(found[head], by_cell, atol=1e-5)


# --- packing ---


def test_a_smaller_budget_lists_fewer_keys():
    heads = heads_of(operands(RULES["softmax"]), window=None, method="hsr")
    whole, most = packing.pack_all(heads, budget=10**6)
    assert most == MOST_KEYS
    size = sum(len(x.text) for x in whole)
    packed, cap = packing.pack_all(heads, budget=size // 2)
    assert cap < most and sum(len(x.text) for x in packed) <= size // 2
    assert [x[0] for x in packed[0].columns] == list(packing.LEVELS)


def test_layers_that_fit_are_spread():
    fit = lambda budget: layers_that_fit(
        30, heads=9, tokens=4096, sparse=False, budget=budget
    )
    assert fit(10**9) == list(range(30))
    assert fit(0) == [15]
    some = fit(8 * 10**6)
    assert some[0] == 0 and some[-1] == 29 and 2 < len(some) < 30


# --- the command ---


@pytest.fixture(scope="module")
def files(tmp_path_factory, compile_cache):
    """A model that nobody trained, with a text."""
    folder = tmp_path_factory.mktemp("explore")
    (folder / "text.py").write_text(TEXT)
    run_of(folder / "run", folder / "text.py", num_layers=2)
    return folder


@pytest.fixture
def explore(files, tmp_path, capsys):
    """Runs the command; returns its status, what it said, and the page."""

    def run(*words, text=None):
        given = files / "text.py"
        if text is not None:
            given = tmp_path / "given.txt"
            given.write_text(text)
        out = tmp_path / "deep" / "page.html"
        words = [str(word).replace("OUT", str(tmp_path)) for word in words]
        if "--model" not in words:
            words += ["--model", str(files / "run")]
        if "--out" not in words:
            words += ["--out", str(out)]
        if "--text" not in words:
            words += ["--text", str(given)]
        status = main(words)
        said = capsys.readouterr()
        return status, said, out.read_text() if out.exists() else None

    return run


def about(page):
    return json.loads(re.search('id="about">(.*)</script>', page)[1])


def test_the_page_is_one_file_that_loads_nothing(explore):
    status, said, page = explore("--json", "--tokens", "48")
    assert status == 0
    results = json.loads(said.out.splitlines()[-1])
    assert results["tokens"] == 48 and results["layers"] == [0, 1]
    assert results["bytes"] == len(page.encode()) < 200_000
    assert not re.search(r"https?://|src=|@import|url\(", page)
    assert "default-src 'none'" in page
    told = about(page)
    assert "".join(told["tokens"]) == TEXT[:48]
    assert told["models"][0]["label"] == "ReLU³"
    assert "first 48" in told["notes"][0] and told["notes"][0] in said.err


@pytest.mark.parametrize(
    ("words", "text", "says"),
    [
        (["--model", "nowhere"], None, "nowhere"),
        ([], "", "is empty: give a file"),
        (["--colour", "red"], None, "--colour"),
        (["--tokens", "0"], None, "--tokens must lie between 1 and 16,384"),
        (["--megabytes", "0.1"], None, "use --tokens or --layers"),
        (["--draw", "-1"], None, "--draw must lie between"),
        (["--tail", "1"], None, "leave it out"),
        (["--out", "OUT"], None, "is a folder: name a file"),
        (["--attention", "top_r"], None, "use --attention hsr"),
    ],
)
def test_what_is_refused_is_said_in_a_line(explore, words, text, says):
    status, said, page = explore(*words, text=text)
    assert status == 2 and page is None
    assert says in said.err
    assert len(said.err.strip().splitlines()) == 1


def test_a_character_of_several_tokens_is_that_of_the_last(explore, tmp_path):
    (tmp_path / "odd.txt").write_bytes("aé\x07😀".encode() + b"\xff!" + b"a" * 38)
    status, _, page = explore("--text", tmp_path / "odd.txt")
    assert status == 0
    shown = ["a", "·", "é", "␇", "·", "·", "·", "😀", "\\xff", "!", "a"]
    assert about(page)["tokens"][:11] == shown


def test_it_goes_on_where_it_can(explore, files, tmp_path):
    run_of(tmp_path / "other", files / "text.py", vocab_size=300)
    status, _, page = explore(
        *("--layers", "1", "7", "--tokens", "48", "--beside", tmp_path / "nothing")
    )
    assert status == 0
    told = about(page)
    assert told["models"][0]["detailed"] == [1] and len(told["models"]) == 1
    notes = "\n".join(told["notes"])
    assert "no layer 7: --layers takes 0 to 1" in notes
    assert "No second model" in notes and "nothing" in notes


def test_a_second_model_and_what_the_model_draws(explore, files):
    words = ("--beside", files / "run", "--draw", "5", "--tokens", "48")
    status, _, page = explore(*words)
    assert status == 0
    told = about(page)
    assert len(told["models"]) == 2 and told["drawn"] == 48
    assert len(told["tokens"]) == 53
    assert 'id="head-1-1-1"' in page


def test_a_dead_head_and_text_that_looks_like_markup(files, lenient_promotion):
    model = run_of(files / "dead", files / "text.py")
    model.blocks[0].attention.beta[...] = jnp.array([1.0, 99.0])
    reading = read(model, list(TEXT.encode()[:LENGTH]), layers=[0])
    assert reading.empty[0, 1] == 1 and reading.fired[0, 1] < 1e-3  # the first token
    (given,) = attention_operands(model, jnp.asarray([list(TEXT.encode()[:LENGTH])]))
    visible = LENGTH * (LENGTH + 1) / 2
    assert reading.fired[0, 0] == reading.heads[0, 0].count.sum() / visible
    assert given.query.shape[2] == 2
    shown = Shown(reading, "ReLU", "<model>")
    page = make_page([shown], ["</script>", "&"] * 24, title="<b>").html
    assert page.count("</script>") == page.count("<script")
    assert "<title>&lt;b&gt;</title>" in page
    assert about(page)["tokens"][0] == "</script>"


def test_scores_that_are_not_finite_are_said(files, lenient_promotion):
    model = run_of(files / "nan", files / "text.py")
    model.embed.embedding[...] = jnp.full_like(model.embed.embedding[...], jnp.nan)
    with pytest.raises(FloatingPointError, match="layer 0 are not finite"):
        read(model, list(range(LENGTH)), layers=[])
    jax.clear_caches()
