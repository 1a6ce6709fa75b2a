"""`python -m benchmarks COMMAND`: measures, prints ratios, writes results."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

from benchmarks.header import PROG, carry_through
from models.command import did_you_mean

COMMANDS = {
    "decode": "one step over a long KV cache",
    "prefill": "causal attention over a whole sequence, with its memory",
    "train": "the same with its gradients",
    "query": "half-space reporting against range search libraries",
    "generate": "a trained model's tokens per second, end to end",
    "grid": "auto against the better of dense and hsr, everywhere",
    "accelerator": "all that is asked of a GPU or TPU, in as many minutes as there are",
    "calibrate": "what work costs here: the table that auto chooses by",
    "paper-table1": "the paper's Table 1, counted",
    "paper-lemma61": "Lemma 6.1's bound on the keys that fire, printed and repaired",
    "paper-theorem43": "Theorem 4.3 and Lemma 6.5 on real and random attention",
    "paper-figure3": "Figure 3: perplexity with the top r keys of every query",
    "paper-softmax": "top r and epsilon on a model, every head: keys, errors, bounds",
    "paper-speed": "time of top r and epsilon on a layer of a model",
    "paper-time": "running time by n and d beside the exponents of the theorems",
    "paper-claims": "every claim of the paper and what came of it, from the above",
}


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Args:
      arguments: instead of those of the process.

    Returns:
      Exit status: 0 done, 1 a result is wrong, 2 refused, 130 Ctrl-C.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_usage(), file=sys.stdout if words else sys.stderr)
        return 0 if words else 2
    if words[0] not in COMMANDS:
        print(
            f"error: unknown command {words[0]}: {did_you_mean(words[0], COMMANDS)}"
            f"choose from {', '.join(COMMANDS)} "
            f"(see {PROG} --help)",
            file=sys.stderr,
        )
        return 2
    return carry_through(module_of(words[0]), words)


def module_of(command: str) -> ModuleType:
    """NAME is the module commands.NAME, paper-NAME is paper.NAME."""
    folder, _, name = command.rpartition("-")
    return importlib.import_module(f"benchmarks.{folder or 'commands'}.{name}")


def _usage() -> str:
    lines = [f"usage: {PROG} COMMAND [--help] [--quick] [--json] [--out DIR] ...", ""]
    lines += [f"  {name:<15} {about}" for name, about in COMMANDS.items()]
    lines += ["", "For example:", "", f"  {PROG} decode --keys 8192 --peers none"]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
