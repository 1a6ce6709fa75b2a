"""`python -m benchmarks COMMAND`: measures, prints ratios, writes results.

A command is a module here with a dataclass `Command`, made of `common.Basics`, and a
function `run(command) -> common.Results`; naming it below is all that it takes. One
that writes something else than a folder of results has a function `finish` as well.
"""

from __future__ import annotations

import importlib
import json
import sys
from types import ModuleType

from benchmarks.allocator import keep_freed_memory
from benchmarks.common import Basics, Results, sentence
from models.command import parse

COMMANDS = {
    "decode": "one step over a long KV cache",
    "prefill": "causal attention over a whole sequence, with its memory",
    "train": "the same with its gradients",
    "query": "half-space reporting against range search libraries",
    "generate": "a trained model's tokens per second, end to end",
    "grid": "auto against the better of dense and hsr, everywhere",
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
MODULES = {
    "train": "training",
    "generate": "generation",
    "paper-time": "paper.running_time",
}
"""Where a command's module has another name; paper-NAME is paper.NAME."""
PROG = "python -m benchmarks"


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
    try:
        module = _module(words[0])
        keep_freed_memory()
        command = parse(module.Command, words[1:], prog=f"{PROG} {words[0]}")
        results = module.run(command)
        return getattr(module, "finish", _finish)(words, command, results)
    except (ValueError, OSError) as error:
        print(f"error: {sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped: nothing was written", file=sys.stderr)
        return 130


def _module(name: str) -> ModuleType:
    if name not in COMMANDS:
        raise ValueError(
            f"unknown command {name}: choose from {', '.join(COMMANDS)} (see {PROG} "
            "--help)"
        )
    module = MODULES.get(name, name.replace("paper-", "paper."))
    return importlib.import_module(f"benchmarks.{module}")


def _finish(arguments: list[str], command: Basics, results: Results) -> int:
    """Writes and prints; 1 if a result was wrong."""
    # Needs matplotlib's canvas, which --help need not wait for.
    from benchmarks import report

    folder = command.folder / arguments[0].replace("paper-", "paper/")
    report.write(folder, results, words=arguments, quick=command.quick)
    print(f"results: {folder}")
    for words in results.wrong:
        print(f"error: wrong result: {words}", file=sys.stderr)
    if command.json:
        found = {"rows": results.rows, "summary": results.summary}
        found |= {"wrong": results.wrong, "folder": str(folder)}
        print(json.dumps(report.clean(found)))
    return 1 if results.wrong else 0


def _usage() -> str:
    lines = [f"usage: {PROG} COMMAND [--help] [--quick] [--json] [--out DIR] ...", ""]
    lines += [f"  {name:<15} {about}" for name, about in COMMANDS.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
