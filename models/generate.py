"""Text generation: prefill, then one jitted decode step on a growing cache.

python -m models.generate --model RUN --prompt TEXT [--prompt TEXT ...] [--help]
"""

from __future__ import annotations

import codecs
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import jax
import numpy as np
import tyro

from models.command import parse
from models.config import Method
from models.decoding import Counts, Sampling, Session, check_request
from models.opening import attending, open_model
from models.sampling import check_sampling
from models.tokenizer import Tokenizer
from models.transformer import Transformer, with_config, with_length
from models.vocabulary import PretrainedTokenizer

MAX_LENGTH = 131_072


class Phase(NamedTuple):
    """What prefill or decoding did and took, compilation excluded.

    Attributes:
      tokens: read (prefill) or drawn (decode), over all rows.
      seconds: wall-clock time.
      keys_looked_at: exact scores computed, as a share of the visible keys; None when
        there was no query. In prefill a tile of queries scores the union of what they
        report.
      keys_fired: share of the visible keys with a weight that is not zero; likewise.
    """

    tokens: int
    seconds: float
    keys_looked_at: float | None
    keys_fired: float | None

    @property
    def tokens_per_second(self) -> float | None:
        """None when the phase did nothing."""
        return self.tokens / self.seconds if self.tokens and self.seconds else None


class Generation(NamedTuple):
    """What `generate` returns.

    Attributes:
      tokens: the new tokens of each prompt, without the prompt.
      prefill: reading the prompts and drawing the first token of each.
      decode: drawing the others.
      compile_seconds: 0 when the shapes had been compiled before.
    """

    tokens: list[list[int]]
    prefill: Phase
    decode: Phase
    compile_seconds: float


def generate(
    model: Transformer,
    prompts: Sequence[bytes | Sequence[int]],
    *,
    max_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    attention: Method | None = None,
    max_length: int = MAX_LENGTH,
    stops: frozenset[int] = frozenset(),
    on_token: Callable[[int, int], None] | None = None,
) -> Generation:
    """Continues a batch of prompts.

    Shapes are rounded up to powers of two, and each is compiled once per process,
    model shape and way of sampling.

    Args:
      model: any transformer; `with_attention` selects top-r or epsilon softmax.
      prompts: bytes (each byte is a token) or token sequences; lengths may differ.
      max_tokens: how many tokens to draw for each prompt.
      temperature: 0 takes the most probable token.
      top_k: draw from the k most probable tokens only.
      top_p: draw from the most probable tokens that together hold this probability.
      seed: of the random draws, 0 <= seed < 2**32.
      attention: "dense", "hsr" or "auto"; None keeps the model's own.
      max_length: refuse prompts that would grow beyond this.
      stops: tokens that end a row; they are not returned.
      on_token: called as on_token(row, token) as soon as each token is known.

    Returns:
      Tokens, times and the share of keys looked at.

    Raises:
      ValueError: an argument is out of its range.
      FloatingPointError: the model's logits became NaN or infinite.
    """
    rows = check_request(
        model, prompts, max_tokens=max_tokens, seed=seed, max_length=max_length
    )
    check_sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    if attention is not None:
        config = model.config
        model = with_config(model, dataclasses.replace(config, attention=attention))
    model = with_length(model, max(map(len, rows)) + max_tokens)
    session = Session(
        model,
        rows,
        max_tokens=max_tokens,
        sampling=Sampling(temperature, top_k, top_p),
        seed=seed,
    )
    tokens: list[list[int]] = [[] for _ in rows]
    ended = [False for _ in rows]

    def emit(drawn: jax.Array, counts: list[Counts]) -> None:
        if not all(np.asarray(part.finite) for part in counts):
            raise FloatingPointError(
                f"the model's logits are not finite at token {max(map(len, tokens))}; "
                "load an earlier checkpoint or compute in float32"
            )
        for row, token in enumerate(np.asarray(drawn).tolist()):
            ended[row] = ended[row] or token in stops
            if not ended[row]:
                tokens[row].append(token)
                if on_token is not None:
                    on_token(row, token)

    started = time.perf_counter()
    first = session.prefill()
    emit(*first)
    prefilled = time.perf_counter()
    steps = []
    for _ in range(max_tokens - 1):
        steps.append(session.decode())
        if len(steps) > 1:  # read one step late: the device never waits for the host
            emit(*steps[-2])
        if all(ended):
            break
    if steps:
        emit(*steps[-1])
    finished = time.perf_counter()
    return Generation(
        tokens=tokens,
        prefill=_phase(sum(map(len, rows)), prefilled - started, first[1]),
        decode=_phase(
            len(rows) * len(steps),
            finished - prefilled,
            [part for _, counts in steps for part in counts],
        ),
        compile_seconds=session.compile_seconds,
    )


@dataclasses.dataclass(frozen=True)
class Options:
    """Continues prompts with a trained model and reports speed and sparsity.

    Prints the text as it is drawn, tokens per second without compilation, the share
    of the visible keys whose exact score was computed, and the share that fired.
    """

    model: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """Folder of `python -m train`, folder of Hugging Face, or .gguf file."""
    prompt: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="TEXT"),
        tyro.conf.UseAppendAction,
    ]
    """Text to continue; give it several times for a batch."""
    chat: bool = False
    """Take each prompt for a message to the model, and let it answer."""
    system: str = ""
    """With --chat: what the model is told before the message."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the computation; None is the run's own, or float32."""
    max_tokens: int = 128
    """Tokens to draw for each prompt."""
    temperature: float = 0.0
    """0 takes the most probable token, 1 samples from the model as it is."""
    top_k: int | None = None
    """Draw from the k most probable tokens only."""
    top_p: float | None = None
    """Draw from the most probable tokens that together hold this probability."""
    seed: int = 0
    """Seed of the random draws."""
    ignore_stops: bool = False
    """Go on where the model ends its text."""
    attention: Literal["dense", "hsr", "auto", "top_r", "epsilon"] = "auto"
    """The first three give the same text; top_r and epsilon approximate softmax."""
    r: int = 64
    """With --attention top_r: keys kept per query."""
    epsilon: float = 1e-3
    """With --attention epsilon: largest share of the softmax mass left out."""
    tail: int | None = None
    """With either: what is left out acts through sketches, its values as means of so
    many consecutive keys (1 to 32; 1 is the most exact)."""
    max_length: int = MAX_LENGTH
    """Refuse prompts that would grow beyond this many tokens."""
    json: bool = False
    """Print the results as one JSON object on the last line."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: the command line; None takes the process's own.

    Returns:
      Exit status: 0 done, 1 failed while running, 2 refused, 130 interrupted.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = parse(Options, words, prog="python -m models.generate")
    except ValueError as error:
        return _fail(str(error), 2)
    try:
        return _run(options)
    except KeyboardInterrupt:
        return _fail("interrupted; no more tokens are drawn", 130)
    except BrokenPipeError:  # the reader has left: say nothing, also not at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ArithmeticError, MemoryError, OSError, RuntimeError) as error:
        reason = str(error).strip() or type(error).__name__
        return _fail(f"generation failed: {reason.splitlines()[0]}", 1)


def _run(options: Options) -> int:
    texts = [text.encode("utf-8", "surrogateescape") for text in options.prompt]
    if not texts:
        return _fail("no prompt was given; give at least one with --prompt TEXT", 2)
    try:
        opened = open_model(options.model, dtype=options.dtype)
        tokenizer = opened.tokenizer
        model = attending(
            opened.model,
            options.attention,
            r=options.r,
            epsilon=options.epsilon,
            tail=options.tail,
        )
        prompts = [_tokens(text, tokenizer, options) for text in texts]
        check_request(
            model,
            prompts,
            max_tokens=options.max_tokens,
            seed=options.seed,
            max_length=options.max_length,
        )
        check_sampling(
            temperature=options.temperature, top_k=options.top_k, top_p=options.top_p
        )
    except ValueError as error:
        return _fail(str(error), 2)
    printer = _Printer([b""] * len(texts) if options.chat else texts, tokenizer)
    result = generate(
        model,
        prompts,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        max_length=options.max_length,
        stops=frozenset() if options.ignore_stops else tokenizer.stops,
        on_token=printer,
    )
    printer.finish()
    _report(options, model, tokenizer, prompts, result)
    return 0


def _tokens(text: bytes, tokenizer: Tokenizer, options: Options) -> list[int]:
    """A prompt as tokens, or the conversation that it begins."""
    if not options.chat:
        return tokenizer.encode(text).tolist()
    if not isinstance(tokenizer, PretrainedTokenizer):
        raise ValueError(
            f"{options.model} was not trained to chat: leave out --chat to let it "
            "continue a text"
        )
    said = [("system", options.system)] if options.system else []
    said.append(("user", text.decode("utf-8", "replace")))
    return tokenizer.encode_chat([{"role": x, "content": y} for x, y in said]).tolist()


class _Printer:
    """Streams one prompt's text to the terminal; keeps a batch for the end."""

    def __init__(self, prompts: list[bytes], tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        decoder = codecs.getincrementaldecoder("utf-8")
        self._decoders = [decoder(errors="replace") for _ in prompts]
        self._texts = ["" for _ in prompts]
        for row, prompt in enumerate(prompts):
            self._add(row, prompt)

    def __call__(self, row: int, token: int) -> None:
        self._add(row, self._tokenizer.decode([token]))

    def finish(self) -> None:
        """Ends the stream, or prints the batch."""
        for row in range(len(self._texts)):
            self._add(row, b"", final=True)
        if len(self._texts) == 1:
            print(flush=True)
            return
        for row, text in enumerate(self._texts):
            print(f"--- prompt {row}\n{text}", flush=True)

    def _add(self, row: int, data: bytes, *, final: bool = False) -> None:
        text = self._decoders[row].decode(data, final).translate(_HARMLESS)
        if len(self._texts) == 1:
            print(text, end="", flush=True)
        self._texts[row] += text


# A model may draw any byte; control codes other than tab and newline could make the
# terminal do things.
_HARMLESS = {
    code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"
}


def _report(
    options: Options,
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    result: Generation,
) -> None:
    for name, phase in (("prefill", result.prefill), ("decode", result.decode)):
        if phase.tokens:
            print(
                f"{name}: {phase.tokens} tokens in {phase.seconds:.3f} s, "
                f"{phase.tokens_per_second or 0:.1f} tokens/s; keys looked at "
                f"{phase.keys_looked_at:.2%}, fired {phase.keys_fired:.2%}"
            )
    print(f"compile: {result.compile_seconds:.2f} s; attention {options.attention}")
    if options.json:
        content: dict[str, Any] = {
            "tokens": result.tokens,
            "text": [
                tokenizer.decode(row).decode("utf-8", "replace")
                for row in result.tokens
            ],
            "prompt_tokens": [len(prompt) for prompt in prompts],
            "tokens_per_second": result.decode.tokens_per_second,
            "keys_looked_at": result.decode.keys_looked_at,
            "keys_fired": result.decode.keys_fired,
            "decode_seconds": result.decode.seconds,
            "prefill_seconds": result.prefill.seconds,
            "prefill_tokens_per_second": result.prefill.tokens_per_second,
            "prefill_keys_looked_at": result.prefill.keys_looked_at,
            "prefill_keys_fired": result.prefill.keys_fired,
            "compile_seconds": result.compile_seconds,
            "attention": options.attention,
            "attention_kind": model.config.attention_kind,
            "model": options.model,
            "seed": options.seed,
        }
        print(json.dumps(content), flush=True)


def _phase(tokens: int, seconds: float, counts: list[Counts]) -> Phase:
    visible, looked_at, fired = (
        float(np.sum([np.asarray(part[field], np.float64) for part in counts]))
        for field in range(3)
    )
    if not visible:
        return Phase(tokens, seconds, None, None)
    return Phase(tokens, seconds, looked_at / visible, fired / visible)


def _fail(message: str, status: int) -> int:
    print(f"error: {message}", file=sys.stderr, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
