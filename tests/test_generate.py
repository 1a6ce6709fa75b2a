"""Generation and its command; sampling has a file of its own."""

import itertools
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import generate as command
from models.decoding.generation import generate
from models.decoding.session import Counts, Sampling, Session, bucket
from models.files import runs
from models.generate import main
from models.network.config import ModelConfig
from models.network.transformer import Block, Transformer, with_attention
from models.text.tokenizer import ByteTokenizer

# The time of these tests is that of compiling. Two rows, the longer of 33 to 40 tokens,
# and up to 24 new ones share the programs of one shape.
PROMPTS = [b"def attention(query, key, mask=None):", b"x"]


def make_model(kind="threshold_relu", **changes):
    shape = {
        "num_layers": 1,
        "embed_dim": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "mlp_dim": 48,
        "attention": "dense",
        "tie_embeddings": False,  # a tied model starts by repeating the last token
    }
    config = ModelConfig(attention_kind=kind, **(shape | changes))
    model = Transformer(config, rngs=nnx.Rngs(0))
    model.threshold_scale[...] = jnp.float32(0.3)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def run(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate") / "run"
    runs.save_run(folder, model)
    return str(folder)


# --- generation ---


def test_tokens_and_counts_are_those_of_the_whole_sequence(model):
    """Greedy tokens; padding is not counted; another request of that shape is ready."""
    result = generate(model, PROMPTS, max_tokens=6)
    whole = jax.jit(lambda tokens: model(tokens, return_info=True))
    fired, visible = np.zeros(2), np.zeros(2)  # in prefill and in decode
    for prompt, tokens in zip(PROMPTS, result.tokens, strict=True):
        text = list(prompt) + tokens
        padded = jnp.asarray([text + [0] * (48 - len(text))], jnp.int32)
        logits, (info,) = whole(padded)
        best = np.asarray(logits.argmax(-1))[0]
        assert best[len(prompt) - 1 : len(text) - 1].tolist() == tokens
        edges = [0, len(prompt), len(text) - 1]
        for phase, (start, end) in enumerate(itertools.pairwise(edges)):
            fired[phase] += np.asarray(info.count)[0, start:end].mean(axis=1).sum()
            visible[phase] += np.arange(start + 1, end + 1).sum()
    shares = [result.prefill.keys_fired, result.decode.keys_fired]
    assert shares == pytest.approx((fired / visible).tolist())
    assert 0 < shares[1] < 0.9
    assert len(set(result.tokens[0])) > 1
    assert generate(model, PROMPTS, max_tokens=20).compile_seconds == 0


def test_hsr_draws_the_tokens_of_dense(model):
    dense = generate(model, PROMPTS, max_tokens=24)
    hsr = generate(model, PROMPTS, max_tokens=24, attention="hsr")
    assert hsr.tokens == dense.tokens
    assert dense.decode.keys_looked_at == pytest.approx(1.0)
    assert hsr.decode.keys_fired == pytest.approx(dense.decode.keys_fired)
    assert 0 < hsr.decode.keys_fired <= hsr.decode.keys_looked_at


def test_prompt_read_in_pieces_gives_the_same(model, monkeypatch):
    whole = generate(model, PROMPTS, max_tokens=24)
    monkeypatch.setattr("models.decoding.session._LONGEST_PIECE", 32)
    pieces = generate(model, PROMPTS, max_tokens=24)
    assert pieces.tokens == whole.tokens
    assert pieces.prefill.keys_fired == pytest.approx(whole.prefill.keys_fired)


@pytest.mark.slow
def test_one_compile_per_shape_bucket(monkeypatch):
    model, traced = make_model("relu", norm_eps=2e-6, num_layers=3), []
    step = Block.step

    def counted(self, stream, cache, *place, **options):
        traced.append((stream.shape, cache.max_length))
        return step(self, stream, cache, *place, **options)

    monkeypatch.setattr(Block, "step", counted)
    first = generate(model, [b"abc"], max_tokens=20)
    again = generate(model, [b"another prompt"], max_tokens=17)
    # Equal layers share a program.
    assert traced == [((1, 32, 32), 32), ((1, 1, 32), 32)]
    assert first.compile_seconds > 0 == again.compile_seconds


def test_callback_sees_every_token_in_order(model):
    seen = []
    result = generate(
        model, PROMPTS, max_tokens=3, on_token=lambda *pair: seen.append(pair)
    )
    assert seen == [(row, result.tokens[row][i]) for i in range(3) for row in range(2)]


@pytest.mark.slow
def test_counts_by_hand():
    """Dense looks at all keys, top_r fires at r: padding must not be counted."""
    limited = with_attention(make_model("softmax"), "dense", top_r=4)
    result = generate(limited, PROMPTS, max_tokens=2)
    assert result.prefill.keys_looked_at == result.decode.keys_looked_at == 1.0
    assert (result.prefill.tokens, result.decode.tokens) == (38, 2)
    # decode queries see 38 and 2 keys and keep 4 and 2 of them
    assert result.decode.keys_fired == pytest.approx(6 / 40)
    kept = sum(min(4, i) for i in range(1, 38)) + 1
    assert result.prefill.keys_fired == pytest.approx(kept / (37 * 38 / 2 + 1))


def test_without_jit_the_steps_are_programs_still(model):
    expected = generate(model, PROMPTS, max_tokens=3).tokens
    with jax.disable_jit():
        assert generate(model, PROMPTS, max_tokens=3).tokens == expected


def test_single_token_needs_no_decode(model):
    result = generate(model, PROMPTS, max_tokens=1)
    assert [len(tokens) for tokens in result.tokens] == [1, 1]
    assert result.decode.keys_looked_at is None
    assert result.decode.tokens_per_second is None


def test_buckets_are_powers_of_two():
    sizes = [bucket(n, at_least=32) for n in (1, 32, 33, 64, 65, 1000)]
    assert sizes == [32, 32, 64, 64, 128, 1024]
    assert bucket(5000, at_least=32, at_most=1024) == 1024


def test_logits_that_are_not_finite_stop_generation(model, monkeypatch):
    nan = Counts(*[jnp.zeros(())] * 3, finite=jnp.array(False))
    drawn = jnp.zeros(2, jnp.int32)
    monkeypatch.setattr(Session, "prefill", lambda self: (drawn, [nan]))
    with pytest.raises(FloatingPointError, match="not finite at token 0"):
        generate(model, PROMPTS, max_tokens=2)


def test_spoiled_parameters_are_noticed():
    model = make_model()
    model.final_norm.scale[...] = jnp.full(32, jnp.nan)
    with pytest.raises(FloatingPointError, match="not finite at token 0"):
        generate(model, PROMPTS, max_tokens=2)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one prompt"),
        (b"abc", {}, r"use \[prompt\]"),
        ([b"ok", b""], {}, "prompt 1 is empty"),
        ([[3, 256]], {}, "prompt 0 holds token 256, outside .* vocabulary of 256"),
        ([[-1]], {}, "holds token -1"),
        ([b"abc"], {"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ([b"abc"], {"max_length": 10}, "3 tokens .* 128, together above max_length=10"),
        ([b"abc"], {"seed": -1}, "seed must be from 0"),
        ([b"abc"], {"temperature": -0.1}, "temperature must be .* got -0.1"),
        ([b"abc"], {"temperature": float("nan")}, "temperature must be"),
        ([b"abc"], {"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
        ([b"abc"], {"top_k": 0}, "top_k must be at least 1, got 0"),
        ([b"abc"], {"min_p": 1.5}, "min_p must be above 0 and at most 1, got 1.5"),
        ([b"abc"], {"attention": "fast"}, "attention must be one of dense, hsr, auto"),
    ],
)
def test_impossible_requests_are_refused(model, prompts, options, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, **options)


# --- the command ---


def run_command(repo_root, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "models.generate", *arguments],
        cwd=repo_root,
        env=os.environ | {"PYTHONPATH": str(repo_root)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def test_command_as_users_run_it(run, repo_root):
    prompts = ["--prompt", "ab", "--prompt", "é", "--max-tokens", "5"]
    done = run_command(repo_root, "--model", run, *prompts, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    result = json.loads(done.stdout.splitlines()[-1])
    assert [len(row) for row in result["tokens"]] == [5, 5]
    assert result["text"][0] == bytes(result["tokens"][0]).decode("utf-8", "replace")
    assert result["prompt_tokens"] == [2, 2]
    assert result["tokens_per_second"] > 0
    assert result["prefill_seconds"] > 0
    assert 0 < result["keys_fired"] <= result["keys_looked_at"] <= 1
    assert (result["attention"], result["model"]) == ("auto", run)
    assert "--- prompt 1\né" in done.stdout


def test_damaged_checkpoint_is_one_line_on_stderr(model, tmp_path, repo_root):
    """Also nothing that threads of orbax print when the process ends."""
    runs.save_run(tmp_path / "run", model)
    for folder in (tmp_path / "run" / "checkpoints").rglob("d"):
        for file in folder.iterdir():
            file.write_bytes(file.read_bytes()[:50])
    done = run_command(repo_root, "--model", str(tmp_path / "run"), "--prompt", "x")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "load another checkpoint or train again" in done.stderr


def test_a_byte_model_does_not_chat(run, capsys):
    assert main(["--model", run, "--prompt", "x", "--chat"]) == 2
    assert "was not trained to chat" in capsys.readouterr().err


def test_control_codes_do_not_reach_the_terminal(capsys):
    printer = command._Printer([b"a"], ByteTokenizer())
    for byte in b"\x1b[2J\tb\n\xc3":
        printer(0, byte)
    printer(0, 0xA9)
    printer.finish()
    assert capsys.readouterr().out == "a\ufffd[2J\tb\né\n"


def test_line_ends_of_two_codes_print_as_one(capsys):
    """Also where they come in two tokens."""
    printer = command._Printer([b"a\r\nb\r"], ByteTokenizer())
    for byte in b"\nc\r\n\rd\r":
        printer(0, byte)
    printer.finish()
    assert capsys.readouterr().out == "a\nb\nc\n\nd\n\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no prompt was given"),
        (["--prompt", ""], "prompt 0 is empty"),
        (["--prompt", "x", "--max-tokens", "-3"], "max_tokens must be at least 1"),
        (["--prompt", "x", "--top-p", "1.5"], "top_p must be above 0"),
        (["--prompt", "x", "--max-length", "9"], "together above max_length=9"),
        (["--prompt", "x", "--attention", "top_r"], "use --attention hsr"),
        (["--prompt", "x", "--attention", "epsilon"], "approximates softmax"),
        (["--prompt", "x", "--model", "nowhere"], "nowhere does not exist"),
        (["--prompt", "x", "--model", "org/name"], "hf download org/name --local-dir"),
        (["--prompt", "x", "--min-p", "2"], "min_p must be above 0"),
    ],
)
def test_command_refuses_in_one_sentence(run, capsys, arguments, message):
    assert main(["--model", run, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attention", "top_r", "--r", "0"], "top_r must be an integer from 1"),
        (["--attention", "epsilon", "--epsilon", "2"], "epsilon must lie between"),
        (["--attention", "hsr", "--tail", "8"], "use --attention top_r or epsilon"),
        (["--attention", "top_r", "--tail", "5"], "got tail=5"),
    ],
)
def test_command_checks_the_softmax_options(tmp_path, capsys, options, message):
    runs.save_run(tmp_path / "run", make_model("softmax"))
    arguments = ["--model", str(tmp_path / "run"), "--prompt", "x", *options]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (RuntimeError("device is out of memory\ndetails"), 1, "out of memory"),
        (FloatingPointError("not finite"), 1, "generation failed: not finite"),
    ],
)
def test_command_ends_without_traceback(
    run, capsys, monkeypatch, error, status, message
):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(command, "generate", fail)
    assert main(["--model", run, "--prompt", "x"]) == status
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err
    assert "details" not in err


def test_a_fork_goes_on_from_the_same_place(model):
    """By another implementation, without touching the session it came from."""
    session = Session(
        with_attention(model, "hsr"),
        [list(prompt) for prompt in PROMPTS],
        max_tokens=24,
        sampling=Sampling(),
        seed=0,
    )
    first, _ = session.prefill()
    fork = session.fork(with_attention(model, "dense"))
    drawn = np.stack([session.decode()[0] for _ in range(4)], axis=1)
    np.testing.assert_array_equal(
        np.stack([fork.decode()[0] for _ in range(4)], axis=1), drawn
    )
    expected = generate(model, PROMPTS, max_tokens=5).tokens
    assert np.column_stack([first, drawn]).tolist() == expected
