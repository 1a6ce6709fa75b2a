"""Text generation: prefill, then one jitted decode step on a growing cache."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from models.decoding.sampling import check_sampling
from models.decoding.session import Counts, Sampling, Session, check_request
from models.network.config import Method
from models.network.transformer import Transformer, with_config, with_length

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
    min_p: float | None = None,
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
      min_p: draw from those with at least this share of the largest probability.
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
    sampling = Sampling(temperature, top_k, top_p, min_p)
    check_sampling(**sampling._asdict())
    if attention is not None:
        config = model.config
        model = with_config(model, dataclasses.replace(config, attention=attention))
    model = with_length(model, max(map(len, rows)) + max_tokens)
    session = Session(
        model,
        rows,
        max_tokens=max_tokens,
        sampling=sampling,
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
    left = 0 if all(ended) else max_tokens - 1
    if left:
        session.ready()
    resumed = time.perf_counter()
    steps = []
    for _ in range(left):
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
            finished - resumed,
            [part for _, counts in steps for part in counts],
        ),
        compile_seconds=session.compile_seconds,
    )


def _phase(tokens: int, seconds: float, counts: list[Counts]) -> Phase:
    visible, looked_at, fired = (
        float(np.sum([np.asarray(part[field], np.float64) for part in counts]))
        for field in range(3)
    )
    if not visible:
        return Phase(tokens, seconds, None, None)
    return Phase(tokens, seconds, looked_at / visible, fired / visible)
