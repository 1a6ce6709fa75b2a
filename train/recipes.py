"""The runs of the recipe study as data: which options each of them changes."""

from __future__ import annotations

import dataclasses


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
    options: dict[str, str | int | float]

    @property
    def words(self) -> list[str]:
        """The options as words of the command line."""
        words = ["--preset", "study"]
        for name, value in self.options.items():
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            else:
                words += [f"--{flag}", str(value)]
        return words


# The kinds, each with as many parameters as the others but for a few scalars per head:
# two views share the query and key sizes of one.
KINDS: dict[str, dict[str, str | int | float]] = {
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


def _kinds() -> list[Run]:
    """Every kind at three learning rates, rows of 1,024 bytes of Python, one seed."""
    return [
        Run(f"{kind}-lr{rate:g}", "kinds", options | {"learning_rate": rate})
        for rate in RATES
        for kind, options in KINDS.items()
    ]


STAGES: dict[str, list[Run]] = {"kinds": _kinds()}
