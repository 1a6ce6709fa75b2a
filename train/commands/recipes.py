"""The runs of the recipe study as data: which options each of them changes."""

from __future__ import annotations

import dataclasses

Options = dict[str, str | int | float]


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        name: of its folder.
        stage: which question it belongs to.
        options: of `python -m train`, by name, beside those of the preset.
    """

    name: str
    stage: str
    options: Options

    @property
    def words(self) -> list[str]:
        """The options as words of the command line."""
        words = []
        for name, value in ({"preset": "study"} | self.options).items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", str(value)]
        return words


# The kinds, each with as many parameters as the others but for a few scalars per head:
# two views share the query and key sizes of one.
KINDS: dict[str, Options] = {
    "softmax": {"attention_kind": "softmax"},
    "relu_p1": {"attention_kind": "relu", "relu_power": 1},
    "relu_length_p1": {"attention_kind": "relu_length", "relu_power": 1},
    "threshold_p1": {"attention_kind": "threshold_relu", "relu_power": 1},
    "threshold_p2": {"attention_kind": "threshold_relu", "relu_power": 2},
    "threshold_p3": {"attention_kind": "threshold_relu", "relu_power": 3},
    "threshold_p4": {"attention_kind": "threshold_relu", "relu_power": 4},
    "differential_p2": {
        "attention_kind": "differential_relu",
        "head_dim": 16,
        "value_dim": 32,
    },
    "differential_p3": {
        "attention_kind": "differential_relu",
        "relu_power": 3,
        "head_dim": 16,
        "value_dim": 32,
    },
    "entmax": {"attention_kind": "entmax"},
}
RATES = (3e-3, 1.5e-3, 6e-3)
# Where each kind was best of the three, in `kinds`.
SOFTMAX: Options = KINDS["softmax"] | {"learning_rate": 3e-3}
# The kinds were compared with thresholds that rise linearly to 0.7: that leaves 95.5 to
# 97.2 % zeros on rows of 1,024 and 98.3 % on rows of 4,096, depending on the seed.
_TO_07: Options = {"threshold_schedule": "linear", "threshold_end": 0.7}
LOOSE: Options = KINDS["threshold_p3"] | {"learning_rate": 3e-3} | _TO_07
# What the knobs, head sizes and corpora were tried on.
LINEAR: Options = LOOSE | {"threshold_end": 0.85}
RECIPE: Options = LINEAR | {"threshold_schedule": "loss", "threshold_end": 1.0}
# Thresholded kinds have both norms: what softmax makes of them.
SOFTMAX_NORMS: Options = SOFTMAX | {"qk_norm": "True", "output_norm": "True"}
LONG: Options = {"row_length": 4096, "batch": 1, "eval_rows": 16}
SEEDS = (0, 1, 2)


def _kinds() -> list[Run]:
    """Every kind at three learning rates, rows of 1,024 bytes of Python, one seed."""
    return [
        Run(f"{kind}-lr{rate:g}", "kinds", options | {"learning_rate": rate} | _TO_07)
        for rate in RATES
        for kind, options in KINDS.items()
    ]


def _seeds(
    stage: str, kinds: dict[str, Options], **more: str | int | float
) -> list[Run]:
    """Three seeds of several kinds."""
    return [
        Run(f"{stage}-{name}-seed{seed}", stage, options | more | {"seed": seed})
        for seed in SEEDS
        for name, options in kinds.items()
    ]


def _knobs() -> list[Run]:
    """Linear thresholds to 0.85 with one thing changed, rows of 1,024."""
    changes: dict[str, Options] = {
        "tight_from_start": {"threshold_fraction": 0.0},
        "schedule_loss": {"threshold_schedule": "loss"},
        "end_0.5": {"threshold_end": 0.5},
        "end_1": {"threshold_end": 1.0},
        "keep_self": {"keep_self": True},
        "no_output_norm": {"output_norm": "False"},
        "sparsity_weight": {"sparsity_weight": 0.03},
    }
    return [Run(f"knob-{name}", "knobs", LINEAR | x) for name, x in changes.items()]


def _head_sizes() -> list[Run]:
    """Query and key heads of 8 to 64 with value heads of 64, softmax beside them."""
    runs = []
    for size in (8, 16, 32, 64):
        heads: Options = {"head_dim": size, "value_dim": 64}
        runs.append(Run(f"heads-{size}", "heads", LINEAR | heads))
        if size <= 16:
            cap = LINEAR | heads | {"threshold": "cap"}
            runs.append(Run(f"heads-{size}-cap", "heads", cap))
    for size in (16, 64):
        heads = {"head_dim": size, "value_dim": 64}
        runs.append(Run(f"heads-{size}-softmax", "heads", SOFTMAX | heads))
    return runs


def _corpora() -> list[Run]:
    """English bytes, and Python as 2,048 byte pairs."""
    english: Options = {"data": "english"}
    pairs: Options = {"tokenizer": "bpe", "vocab_size": 2048, "row_length": 512}
    pairs |= {"batch": 8, "eval_rows": 64}
    return [
        Run(f"{corpus}-{kind}", "corpora", options | more)
        for corpus, more in {"english": english, "bpe": pairs}.items()
        for kind, options in {"softmax": SOFTMAX, "linear": LINEAR}.items()
    ]


STAGES: dict[str, list[Run]] = {
    "kinds": _kinds(),
    # Seed 0 of loose and of softmax is in `kinds` as well.
    "seeds": _seeds(
        "seeds",
        {
            "recipe": RECIPE,
            "linear": LINEAR,
            "loose": LOOSE,
            "softmax": SOFTMAX,
            "softmax_norms": SOFTMAX_NORMS,
        },
    ),
    "long": _seeds(
        "long",
        {"recipe": RECIPE, "linear": LINEAR, "loose": LOOSE, "softmax": SOFTMAX},
        **LONG,
    ),
    "knobs": _knobs(),
    "heads": _head_sizes(),
    "corpora": _corpora(),
}
