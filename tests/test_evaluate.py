"""Perplexity by definition, published models from the command line, chat templates."""

import collections
import csv
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models.decoding.generation import generate
from models.evaluate import main
from models.evaluation import tasks
from models.evaluation.perplexity import Perplexity, perplexity, rows_of
from models.files import mapping
from models.files.families import model_config
from models.files.runs import by_name, model_item
from models.generate import main as generate_main
from models.network.transformer import abstract_model, with_attention
from models.opening import open_model
from models.text.chat import render
from models.text.tokenizer import train_bpe

FIELDS = {
    "model_type": "llama",
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "eos_token_id": 269,
}
TEMPLATE = (
    "{% for m in messages %}<|end|>{{ m.role }}: {{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|end|>{% endif %}"
)
TEXT = "def f(self): return self.g(self)\n" * 40


def publish(folder, **changes):
    """A folder as Hugging Face has them, with random weights and a tokenizer."""
    config = model_config(FIELDS | changes)
    shapes = {
        name: leaf.shape
        for name, leaf in by_name(model_item(abstract_model(config))).items()
        if name != "threshold_scale"
    }
    generator = np.random.default_rng(0)
    tensors = {
        part.name: generator.normal(0, 0.4, part.stored_shape).astype(np.float32)
        for part in mapping.parts(config, mapping.HUGGING_FACE, shapes).values()
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(FIELDS | changes))
    inner = train_bpe(TEXT.encode(), vocab_size=256 + 13).inner
    inner.add_special_tokens(["<|end|>"])
    inner.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return publish(tmp_path_factory.mktemp("deep"), num_hidden_layers=2)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


# --- perplexity ---


def test_perplexity_by_definition(deep, count_compiles):
    opened = open_model(deep)
    model = with_attention(opened.model, "dense")
    rows = rows_of(opened.tokenizer.encode(TEXT.encode()), context=30, limit=3)
    assert rows.shape == (3, 31)
    with count_compiles() as compiled:
        found = perplexity(model, rows, token_bytes=opened.tokenizer.token_bytes)
    assert compiled["_run_block"] == 1  # for two layers and three rows
    graphdef, state = nnx.split(model)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))
    logits = np.asarray(run(state, jnp.asarray(rows[:, :-1])), np.float64)
    chance = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    picked = np.take_along_axis(chance, rows[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.losses, -np.log(picked), rtol=2e-5, atol=1e-6)
    expected = math.exp(-np.log(picked).mean())
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    length = sum(len(opened.tokenizer.decode(row[1:])) for row in rows)
    bits = -np.log2(picked).sum() / length
    assert found.summary()["bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    np.testing.assert_array_equal(found.looked_at, 1)
    np.testing.assert_array_equal(found.error_bound, 0)
    assert found.looked_at.shape == (2, 4)


@pytest.fixture
def measured(deep, text, capsys):
    """What the command finds, by words behind --attention."""

    def results(*more):
        words = ["perplexity", "--model", str(deep), "--text", str(text)]
        words += ["--context", "30", "--rows", "2", "--json", "--attention", *more]
        assert main(words) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])["results"]

    return results


def test_command_writes_a_line_for_every_head(measured, tmp_path):
    (few,) = measured("top_r", "--r", "2", "--out", str(tmp_path / "out"))
    (dense,) = measured("dense")
    assert few["perplexity"] != pytest.approx(dense["perplexity"], rel=1e-3)
    # The 2 best of i keys, on average over i = 1 ... 30.
    assert few["keys_fired"] == pytest.approx((1 + 2 * 29) / (30 * 31 / 2), rel=1e-5)
    assert few["missed_mass_bound"] > 0 == dense["missed_mass_bound"]
    with (tmp_path / "out" / "heads.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 2 * 4
    assert {line["attention"] for line in lines} == {"top_r 2"}
    assert len((tmp_path / "out/perplexity.csv").read_text().splitlines()) == 2


def test_every_r_is_measured_in_turn(measured, monkeypatch):
    seen, nothing = [], Perplexity(np.ones((2, 30)), 60, *np.zeros((4, 2, 4)))

    def stub(model, rows, **options):
        seen.append((model.config.top_r, model.config.tail))
        return nothing

    monkeypatch.setattr("models.evaluate.perplexity", stub)
    found = measured("top_r", "--r", "2", "64", "--tail", "8")
    assert [x["attention"] for x in found] == ["top_r 2 tail 8", "top_r 64 tail 8"]
    assert seen == [(2, 8), (64, 8)]


@pytest.mark.slow
def test_what_is_left_out_acts_through_its_sketch(measured):
    (dense,) = measured("dense")
    few, all_keys = measured("top_r", "--r", "2", "64")
    (tail,) = measured("top_r", "--r", "2", "--tail", "1")
    assert all_keys["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-5)
    assert all_keys["missed_mass_bound"] == 0
    off = [abs(x["perplexity"] - dense["perplexity"]) for x in (few, tail)]
    assert 0 < off[1] < 0.05 * off[0]


def test_losses_that_are_not_finite_are_one_line(published, text, monkeypatch, capsys):
    def fail(*args, **options):
        raise FloatingPointError("not finite")

    monkeypatch.setattr("models.evaluate.perplexity", fail)
    words = ["perplexity", "--model", str(published), "--text", str(text)]
    assert main([*words, "--context", "30"]) == 1
    err = capsys.readouterr().err
    assert "error: evaluation failed: not finite" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no task was named"),
        (["nonsense"], "no task is called nonsense: choose from perplexity, needle"),
        (["perplexity"], "missing"),
        (["perplexity", "--model", "none", "--text", "none"], "none cannot be read"),
        (["perplexity", "--contxt", "3"], "contxt"),
    ],
)
def test_wrong_words_are_refused(words, message, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_texts_that_are_too_short_are_refused(published, text, tmp_path, capsys):
    words = ["perplexity", "--model", str(published), "--text"]
    (tmp_path / "empty").write_bytes(b"")
    assert main([*words, str(tmp_path / "empty")]) == 2
    assert "the text has 0 tokens and a row needs 2,049" in capsys.readouterr().err
    assert main([*words, str(text), "--context", "0"]) == 2
    assert "context must be 1 or more" in capsys.readouterr().err
    assert main([*words, str(text), "--context", "5", "--rows", "0"]) == 2
    assert "rows must be 1 or more" in capsys.readouterr().err
    assert main(["--help"]) == 0


# --- tasks ---


def words_of(text):
    return len(text.split())


@pytest.mark.parametrize("kind", tasks.KINDS)
def test_a_task_fills_the_length_and_can_be_solved(kind):
    short, long = (
        tasks.make(kind, length=size, depth=0.5, seed=3, count=words_of)
        for size in (250, 900)
    )
    for task, size in ((short, 250), (long, 900)):
        whole = f"{task.text}\n{task.question}\n{task.beginning}"
        assert size - 8 <= words_of(whole) <= size
        assert task.score(" ".join(task.answers)) == 1
        assert task.score("I do not know") == 0
        for answer in task.answers:
            assert answer in task.text
    again = tasks.make(kind, length=250, depth=0.5, seed=3, count=words_of)
    assert again == short
    other = tasks.make(kind, length=250, depth=0.5, seed=4, count=words_of)
    assert other.answers != short.answers


def test_a_needle_is_at_its_depth():
    def place(depth):
        task = tasks.make("needle", length=600, depth=depth, seed=0, count=words_of)
        return task.text.index(task.answers[0]) / len(task.text)

    assert place(0.0) < 0.05
    assert 0.45 < place(0.5) < 0.55
    assert place(1.0) > 0.95


def test_variables_follow_from_each_other():
    task = tasks.make("variables", length=500, depth=0.0, seed=0, count=words_of)
    values = dict(re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", task.text))
    name, chain = task.answers[-1], []
    while name in values:
        chain.append(name)
        name = values[name]
    assert name in task.question
    assert set(chain) == set(task.answers)
    assert task.score(task.answers[0]) == 1 / 5


def test_common_words_are_the_most_common():
    task = tasks.make("words", length=600, depth=0.0, seed=0, count=words_of)
    counted = collections.Counter(re.findall(r"[a-z]+", task.text))
    assert {word for word, _ in counted.most_common(5)} == set(task.answers)


def test_tasks_that_cannot_be_are_refused():
    for options, message in (
        ({"kind": "riddle"}, "no task is called riddle"),
        ({"depth": 1.5}, "depth must lie between 0 and 1"),
        ({"length": 9}, "9 tokens are too few"),
    ):
        given = {"kind": "needle", "length": 300, "depth": 0.0} | options
        with pytest.raises(ValueError, match=message):
            tasks.make(**given, seed=0, count=words_of)


def test_questions_are_asked_and_drawn(published, tmp_path, capsys):
    words = ["--model", str(published), "--contexts", "480", "--depths", "0", "1"]
    words += ["--samples", "1", "--max-tokens", "3", "--out", str(tmp_path), "--json"]
    assert main(["needle", *words, "--chat"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [line["depth"] for line in found] == [0, 1]
    assert all(440 < line["prompt_tokens"] <= 477 for line in found)
    assert all(line["score"] == 0 for line in found)  # the weights are random
    assert (tmp_path / "needle-auto.png").read_bytes()[:4] == b"\x89PNG"
    assert len((tmp_path / "needle.csv").read_text().splitlines()) >= 3


def test_bad_plans_are_refused(published, tmp_path, capsys):
    words = ["needle", "--model", str(published)]
    (tmp_path / "empty").write_text(" ")
    for more, message in (
        (["--samples", "0"], "samples must be 1 or more"),
        (["--contexts", "50"], "too few for a task"),
        (["--depths", "2", "--contexts", "480"], "depth must lie between"),
        (["--text", str(tmp_path / "none")], "cannot be read"),
        (["--text", str(tmp_path / "empty")], "is empty"),
    ):
        assert main([*words, *more]) == 2
        assert message in capsys.readouterr().err


# --- published models in generate ---


def test_a_published_model_continues_and_answers(published, capsys):
    words = ["--model", str(published), "--prompt", "def", "--max-tokens", "4"]
    assert generate_main([*words, "--json", "--ignore-stops"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("def")
    assert "decode: 3 tokens" in printed
    assert "keys looked at" in printed
    plain = json.loads(printed.splitlines()[-1])
    assert plain["attention_kind"] == "softmax"
    assert len(plain["tokens"][0]) == 4
    chat = ["--chat", "--system", "be short", "--json", "--ignore-stops"]
    assert generate_main([*words, *chat]) == 0
    answered = json.loads(capsys.readouterr().out.splitlines()[-1])
    tokenizer = open_model(published).tokenizer
    said = [("system", "be short"), ("user", "def")]
    said = [{"role": role, "content": content} for role, content in said]
    length = len(tokenizer.encode_chat(said))
    assert answered["prompt_tokens"] == [length]


def test_a_stop_ends_its_row_alone(published):
    model, tokenizer = open_model(published)
    prompts = [tokenizer.encode(x).tolist() for x in (b"def", b"self.g", b"return")]
    whole = generate(model, prompts, max_tokens=6).tokens
    stops = frozenset({whole[0][2]})
    seen = []
    cut = generate(
        model,
        prompts,
        max_tokens=6,
        stops=stops,
        on_token=lambda row, token: seen.append((row, token)),
    ).tokens
    for row, tokens in enumerate(whole):
        ends = [place for place, token in enumerate(tokens) if token in stops]
        expected = tokens[: ends[0]] if ends else tokens
        assert cut[row] == expected
        assert [token for x, token in seen if x == row] == expected
    assert cut[0] == whole[0][: whole[0].index(whole[0][2])]
    every = frozenset(token for row in whole for token in row[:1])
    result = generate(model, prompts, max_tokens=20, stops=every)
    assert result.tokens == [[], [], []]
    assert result.decode.tokens <= 3


def test_a_folder_without_a_tokenizer_is_refused(published, tmp_path, capsys):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((published / name).read_bytes())
    assert generate_main(["--model", str(tmp_path), "--prompt", "x"]) == 2
    assert "holds no tokenizer.json" in capsys.readouterr().err


# --- chat templates ---


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for", "does not render"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "does not render"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "does not render"),
        ("{{ cycler.__init__.__globals__.os.system('x') }}", "does not render"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{{ messages[9].content.x }}", "does not render"),
        ("{{ 1 // 0 }}", "does not render"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "does too much"),
        ("{% include '/etc/passwd' %}", "does not render"),
    ],
)
def test_templates_are_kept_in_a_sandbox(template, words):
    messages = [{"role": "user", "content": "hello"}]
    with pytest.raises(ValueError, match=words):
        render(template, messages, special={})


def test_a_template_writes_the_conversation():
    template = (
        "{{ bos_token }}{%- for m in messages -%}\n"
        "    {% if loop.first %}[{% endif %}{{ m['role'] }}={{ m.content | trim }}\n"
        "{% endfor %}{% if add_generation_prompt %}]{% endif %}{{ {'a': 1} | tojson }}"
    )
    messages = [{"role": "user", "content": " hi "}]
    got = render(template, messages, special={"bos_token": "<s>"})
    assert got == '<s>[user=hi\n]{"a": 1}'
