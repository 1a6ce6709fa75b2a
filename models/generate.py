"""Continues prompts with any model.

python -m models.generate --model RUN --prompt TEXT [--prompt TEXT ...] [--help]
"""

from __future__ import annotations

import codecs
import dataclasses
import io
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from models.command import carry_out
from models.compilation import keep_programs
from models.decoding.generation import MAX_LENGTH, Generation, generate
from models.decoding.sampling import check_sampling
from models.decoding.session import Sampling, check_request
from models.network.transformer import Transformer
from models.opening import ModelOptions, attending, open_model
from models.text.tokenizer import PretrainedTokenizer, Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """Continues prompts with a trained model and reports speed and sparsity.

    Prints the text as it is drawn, tokens per second without compilation, the share
    of the visible keys whose exact score was computed, and the share that fired.
    Compiled programs are kept in ~/.cache/hsrjax for the next start; HSRJAX_CACHE names
    another folder, or is "off".

    For example:

        python -m models.generate --model runs/mine --prompt "def main(" --attention hsr
        python -m models.generate --model SmolLM2.gguf --chat --prompt "Who are you?"
    """

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
    template: str | None = None
    """With --chat: name of the chat template, where the model has several."""
    r: int = 64
    """With --attention top_r: keys kept per query."""
    epsilon: float = 1e-3
    """With --attention epsilon: largest share of the softmax mass left out."""
    max_tokens: int = 128
    """Tokens to draw for each prompt."""
    temperature: float = 0.0
    """0 takes the most probable token, 1 samples from the model as it is."""
    top_k: int | None = None
    """Draw from the k most probable tokens only."""
    top_p: float | None = None
    """Draw from the most probable tokens that together hold this probability."""
    min_p: float | None = None
    """Draw from the tokens with at least this share of the largest probability."""
    seed: int = 0
    """Seed of the random draws."""
    ignore_stops: bool = False
    """Go on where the model ends its text."""
    max_length: int = MAX_LENGTH
    """Refuse prompts that would grow beyond this many tokens."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      arguments: the command line; None takes the process's own.

    Returns:
      Exit status: 0 done, 1 failed while running, 2 refused, 130 interrupted.
    """
    keep_programs()
    return carry_out(
        Options,
        arguments,
        _run,
        prog="python -m models.generate",
        stopped="interrupted; no more tokens are drawn",
        doing="generation",
    )


def _run(options: Options) -> None:
    texts = [text.encode("utf-8", "surrogateescape") for text in options.prompt]
    if not texts:
        raise ValueError("no prompt was given; give at least one with --prompt TEXT")
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
    # Before the printer, which begins with the prompt.
    request = {
        "max_tokens": options.max_tokens,
        "seed": options.seed,
        "max_length": options.max_length,
    }
    sampling = {name: getattr(options, name) for name in Sampling._fields}
    check_request(model, prompts, **request)
    check_sampling(**sampling)
    printer = _Printer([b""] * len(texts) if options.chat else texts, tokenizer)
    result = generate(
        model,
        prompts,
        **request,
        **sampling,
        stops=frozenset() if options.ignore_stops else tokenizer.stops,
        on_token=printer,
    )
    printer.finish()
    _report(options, model, tokenizer, prompts, result)


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
    messages = [{"role": role, "content": content} for role, content in said]
    return tokenizer.encode_chat(messages, template=options.template).tolist()


class _Printer:
    """Streams one prompt's text to the terminal; keeps a batch for the end."""

    def __init__(self, prompts: list[bytes], tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        decoder = codecs.getincrementaldecoder("utf-8")
        # A line may end in two codes that come in two tokens.
        self._decoders = [
            io.IncrementalNewlineDecoder(decoder(errors="replace"), translate=True)
            for _ in prompts
        ]
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
    options.print_json(
        {
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
    )


if __name__ == "__main__":
    sys.exit(main())
