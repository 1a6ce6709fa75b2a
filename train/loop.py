"""The training loop: batches, steps, logging, evaluation, checkpoints, resume.

A run is a function of its config and its corpus. It goes on bit for bit after a kill,
because parameters, optimizer, step, keys and the position in the data are saved as one.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from train import data, processes, step, telemetry
from train.config import TrainConfig
from train.files import checkpoints, folder, metrics, tracking

_LONGEST_TELEMETRY = 4096  # tokens: the weights of a whole row are looked at


class DivergedError(ValueError):
    """The loss or the gradient is no longer finite."""


class DeviceError(ValueError):
    """A device failed while it was computing."""


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C; the message says what was saved and how to go on."""


def train(
    config: TrainConfig,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Trains a model and leaves a run folder behind.

    Args:
        config: every option.
        out: the run folder; made when needed.
        resume: continue the run in `out` from its newest checkpoint.
        progress: show a progress bar on stderr.

    Returns:
        out, steps, train_loss, validation_loss (nats per byte), nonzero_fraction (share
        of non-zero scores on held-out text), sparsity (the same by layer and head,
        lists [L][N]), empty_rows, effective_keys and dead_heads (see
        `train.telemetry`; unless telemetry_rows is 0), seconds, tokens_per_second,
        parameters, corpus_sha256.

    Raises:
        ValueError: options, corpus or run folder cannot be used or written
            (`DataError`, `CheckpointError`), the loss is not finite (`DivergedError`),
            or a device failed (`DeviceError`).
        TrainingInterrupted: Ctrl-C, after a checkpoint was written.
    """
    started, out = time.perf_counter(), Path(out)
    tracking.check_tracker(config.track)
    batch_sharding, replicated = processes.shardings(config)
    with processes.leader_first():
        resume = resume or not processes.is_leader()
        corpus, tokens, tokenizer = folder.open_run(config, out, resume=resume)
    rows, held_out = data.split(tokens, row_length=config.row_length)
    with checkpoints.Checkpoints(out, keep=config.keep) as store:
        graphdef, state = step.init_state(config)
        batches = data.Batches(rows, batch=config.batch, seed=config.seed)
        last_loss = math.nan
        if (newest := store.latest()) is not None:
            state, found = store.restore(newest, config=config, template=state)
            batches.set_state(found["data"])
            last_loss = found["loss"]
        with metrics.open_writer(
            out,
            step=newest or 0,
            writes=processes.is_leader(),
            track=config.track,
            options=config.to_dict() | {"model": config.model.to_dict()},
        ) as writer:
            trainer = _Trainer(
                config=config,
                out=out,
                graphdef=graphdef,
                store=store,
                writer=writer,
                batches=batches,
                held_out=data.spread(held_out, limit=config.eval_rows),
                token_bytes=tokenizer.token_bytes,
                tokens_per_byte=tokens.size / corpus.size,
                batch_sharding=batch_sharding,
                train_step=step.make_train_step(
                    graphdef, config, replicated=replicated
                ),
                eval_step=step.make_eval_step(graphdef, replicated=replicated),
                state=processes.place(state, replicated),
                done=newest or 0,
                last_loss=last_loss,
            )
            try:
                results = trainer.run(progress=progress)
            except (OSError, jax.errors.JaxRuntimeError) as error:
                raise _stopped(error, trainer) from error
    return results | {
        "seconds": round(time.perf_counter() - started, 2),
        "corpus_sha256": corpus.sha256,
    }


def _stopped(error: Exception, trainer: _Trainer) -> ValueError:
    """What to say of a disk or a device that failed."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    kind, what = (
        (checkpoints.CheckpointError, "a file could not be written")
        if isinstance(error, OSError)
        else (DeviceError, "the device failed")
    )
    return kind(
        f"{what} after step {trainer.done} ({reason}). {trainer.store.how_to_go_on()}"
    )


@dataclasses.dataclass
class _Trainer:
    """What the loop holds on to. `state` is the state after `done` steps."""

    config: TrainConfig
    out: Path
    graphdef: Any
    store: checkpoints.Checkpoints
    writer: metrics.Writer
    batches: data.Batches
    held_out: np.ndarray
    token_bytes: np.ndarray
    tokens_per_byte: float
    batch_sharding: Any
    train_step: Any
    eval_step: Any
    state: step.TrainState
    done: int
    last_loss: float
    # Seconds and tokens of training alone: no compiling, evaluating or saving.
    seconds: float = 0.0
    tokens: int = 0
    resumed_at: float | None = None
    evaluated: dict[str, Any] = dataclasses.field(default_factory=dict)

    def run(self, *, progress: bool) -> dict[str, Any]:
        """Trains up to the last step; returns most of the results of `train`."""
        config = self.config
        with (
            _InterruptFlag() as interrupt,
            tqdm(
                total=config.steps,
                initial=self.done,
                disable=not (progress and processes.is_leader()),
                file=sys.stderr,
                unit="step",
                mininterval=0.2 if sys.stderr.isatty() else 15,
                dynamic_ncols=True,
            ) as bar,
        ):
            pending = None
            while self.done < config.steps:
                batch = processes.place(next(self.batches), self.batch_sharding)
                self.state, measured = self.train_step(self.state, batch)
                self.done += 1
                # One step late: the device already works on the next step.
                if pending is not None:
                    self._log(pending, bar)
                pending = (self.done, measured)
                stopping = self._stops(interrupt)
                if self._pauses() or stopping or self.seconds == 0:
                    self._pause(pending, bar, stopping=stopping)
                    pending = None
                if stopping:
                    raise TrainingInterrupted(self._how_to_resume())
            if not self.evaluated:
                self.evaluated = self._evaluate()
                self._look_at_heads()
        return {
            "out": str(self.out),
            "steps": self.done,
            "train_loss": self.last_loss,
            **self.evaluated,
            "tokens_per_second": round(self._speed()),
            "parameters": sum(x.size for x in jax.tree.leaves(self.state.params)),
        }

    def _stops(self, interrupt: _InterruptFlag) -> bool:
        """Whether to stop after the present step: processes agree where they pause."""
        if jax.process_count() > 1 and not self._pauses():
            return False
        return processes.any_of(interrupt.requested)

    def _pauses(self) -> bool:
        """Whether the loop evaluates or saves after the present step."""
        config, done = self.config, self.done
        return (
            done == config.steps
            or done % config.eval_every == 0
            or done % config.checkpoint_every == 0
        )

    def _pause(self, pending: Any, bar: Any, *, stopping: bool) -> None:
        """Waits for the device, then evaluates and saves where they are due."""
        config, last = self.config, self.done == self.config.steps
        row = self._read(pending, bar)
        self.resumed_at = None
        if last or self.done % config.eval_every == 0:
            self.evaluated = self._evaluate()
            row["validation_loss"] = self.evaluated["validation_loss"]
            row["validation_nonzero_fraction"] = self.evaluated["nonzero_fraction"]
            self.writer.write_heads(self.done, self._look_at_heads())
        if "validation_loss" in row or self._is_logged(self.done):
            self.writer.write(row)
        if last or stopping or self.done % config.checkpoint_every == 0:
            self.store.save(
                self.state, data=self.batches.get_state(), loss=self.last_loss
            )
        self.resumed_at = time.perf_counter()

    def _log(self, pending: Any, bar: Any) -> None:
        """Reads the metrics of a step and writes them where that is due."""
        row = self._read(pending, bar)
        if self._is_logged(row["step"]):
            self.writer.write(row)

    def _is_logged(self, done: int) -> bool:
        """Whether this step gets a line of metrics.csv."""
        return done % self.config.log_every == 0 or done == self.config.steps

    def _read(self, pending: Any, bar: Any) -> dict[str, Any]:
        """Waits for the metrics of a step, checks them, moves the progress bar."""
        done, measured = pending
        values = {
            name: float(value)
            for name, value in jax.device_get(measured).items()
            if name != "sparsity"
        }
        values["loss"] *= self.tokens_per_byte
        now = time.perf_counter()
        if self.resumed_at is not None:
            self.seconds += now - self.resumed_at
            self.tokens += self.config.batch * self.config.row_length
            self.resumed_at = now
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise DivergedError(self._what_diverged(done, values))
        self.last_loss = values["loss"]
        bar.set_postfix_str(
            f"loss {values['loss']:.3f}, {self._speed():,.0f} tokens/s, "
            f"non-zero {100 * values['nonzero_fraction']:.1f} %",
            refresh=False,
        )
        bar.update(done - bar.n)
        return {"step": done, **values, "tokens_per_second": self._speed()}

    def _speed(self) -> float:
        """Tokens per second of training, 0 before the second step."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def _evaluate(self) -> dict[str, Any]:
        """Loss and sparsity on the held-out rows."""
        losses, fired, batch = [], [], self.config.batch
        for start in range(0, len(self.held_out), batch):
            rows = self.held_out[start : start + batch]
            # The last batch is filled up so that one compiled shape serves all.
            padded = np.resize(rows, (batch, rows.shape[1]))
            loss, share = self.eval_step(
                self.state.params,
                self.state.rest,
                processes.place(padded, self.batch_sharding),
            )
            losses.append(np.asarray(loss, np.float64)[: len(rows)])
            fired.append(np.asarray(share, np.float64)[: len(rows)])
        sparsity = np.concatenate(fired).mean(axis=0)  # [L, N]
        predicted = self.held_out[:, 1:]
        per_byte = predicted.size / self.token_bytes[predicted].sum()
        return {
            "validation_loss": float(np.concatenate(losses).mean() * per_byte),
            "nonzero_fraction": float(sparsity.mean()),
            "sparsity": sparsity.tolist(),
        }

    def _look_at_heads(self) -> dict[str, np.ndarray]:
        """What each head does on a few held-out rows, and its sparsity on all."""
        sparsity = {"nonzero_fraction": np.asarray(self.evaluated["sparsity"])}
        if not self.config.telemetry_rows or not processes.is_leader():
            return sparsity
        rows = data.spread(self.held_out, limit=self.config.telemetry_rows)
        params, rest = jax.device_get((self.state.params, self.state.rest))
        model = nnx.merge(self.graphdef, params, rest)
        found = telemetry.measure(model, rows[:, :-1][:, :_LONGEST_TELEMETRY])
        self.evaluated |= {
            "empty_rows": float(found["empty_rows"].mean()),
            "effective_keys": float(found["effective_keys"].mean()),
            "dead_heads": telemetry.dead_heads(found["empty_rows"]),
        }
        return found | sparsity

    def _how_to_resume(self) -> str:
        """Message after Ctrl-C."""
        return (
            f"stopped after step {self.done} of {self.config.steps}, saved in "
            f"{self.store.path(self.done)}; continue with: python -m train --resume "
            f"--out {self.out}"
        )

    def _what_diverged(self, done: int, values: dict[str, float]) -> str:
        """Message about a loss or gradient that is not finite."""
        newest = self.store.latest()
        saved = (
            "no checkpoint had been written"
            if newest is None
            else f"the last good checkpoint is {self.store.path(newest)}"
        )
        return (
            f"training diverged at step {done}: loss {values['loss']}, gradient norm "
            f"{values['grad_norm']}; {saved}; start a new run with a smaller "
            "--learning-rate or --clip-norm"
        )


class _InterruptFlag:
    """Turns the first Ctrl-C into a request, so that no step is cut in half.

    A second Ctrl-C stops at once; the checkpoints on disk stay whole.
    """

    requested = False

    def __enter__(self) -> _InterruptFlag:
        self._previous = None
        # Signals reach the main thread alone, and only it may handle them.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt("stopped at once")
        self.requested = True
        print("\nsaving; Ctrl-C once more stops at once", file=sys.stderr)
