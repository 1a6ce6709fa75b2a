"""Compiling for a GPU that need not be there, and reading what came of it.

XLA compiles for a card by its description as far as machine code: `cards/*.textproto`,
which XLA publishes for its own tests. The text that it dumps says what is launched, and
NVIDIA's ptxas tells the registers and spills of the same PTX.
"""

import contextlib
import functools
import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from hsrjax._src.planning import costs
from tests.gpu.cases import CASES, Case, shapes

CARDS = Path(__file__).with_name("cards")
OURS = "hsrjax_"
"""What the names of the library's kernels begin with."""
_CONTROL = ("Sequential", "CommandBuffer", "Conditional", "While")
"""Entries of a sequence that launch nothing themselves."""


class Launch(NamedTuple):
    """A kernel in the order of launches: its threads, and bytes of shared memory."""

    kernel: str
    threads: int
    shared: int


class Registers(NamedTuple):
    """Of a kernel: registers of a thread, and bytes that it spills."""

    number: int
    spilled: int


class Compiled(NamedTuple):
    """What came of a case.

    Attributes:
      launches: of the library's kernels.
      count: launches of the whole program.
      registers: of the library's kernels, by name.
      aliases: arguments that are overwritten by results.
      temporary: bytes beside arguments and results.
    """

    launches: list[Launch]
    count: int
    registers: dict[str, Registers]
    aliases: int
    temporary: int


class Card:
    """A GPU as its description in `cards` says, without one."""

    def __init__(self, name: str):
        self.name = name
        text = (CARDS / f"{name}.textproto").read_text()
        found = topologies.get_topology_desc(
            platform="cuda", target_config=text, topology="1x1x1"
        )
        (self.device,) = found.devices
        self._mesh = topologies.make_mesh(found, (1,), ("x",))
        self.sharding = NamedSharding(self._mesh, PartitionSpec())

    @contextlib.contextmanager
    def taken_for_ours(self) -> Iterator[None]:
        """The library believes that it runs on this card."""
        where = contextlib.nullcontext()
        if jax.__version_info__ >= (0, 11):
            where = jax.sharding.use_abstract_mesh(self._mesh.abstract_mesh)
        with where, mock.patch.object(costs, "default_device", lambda: self.device):
            yield


card_of = functools.cache(Card)


def check(job: tuple[str, str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Lines of the table, and what is wrong, of a case and a card by their names."""
    name, card = job
    (case,) = (case for case in CASES if case.name == name)
    try:
        found = compile_case(case, card_of(card))
    except (jax.errors.JaxRuntimeError, ValueError, NotImplementedError) as error:
        return [], [f"is not compiled: {error}"]
    return rows_of(case, card_of(card), found), faults_of(case, found)


def compile_case(case: Case, card: Card) -> Compiled:
    """Compiles a case as far as machine code."""
    jax.clear_caches()
    with card.taken_for_ours(), tempfile.TemporaryDirectory() as dump:
        arguments = shapes(case, card.sharding)
        donated = (0,) if case.in_place else ()
        lowered = jax.jit(case.run, donate_argnums=donated).lower(*arguments)
        options = {
            "xla_dump_to": dump,
            "xla_dump_hlo_as_text": True,
            "xla_dump_emitter_re": "ptx",
        }
        compiled = lowered.compile(compiler_options=options)
        program, memory = compiled.as_text(), compiled.memory_analysis()
        assert program is not None and memory is not None
        (sequence,) = Path(dump).glob("*.thunk_sequence.txt")
        launches, count = launched(sequence.read_text())
        registers = {}
        for file in Path(dump).glob("*.ptx"):
            if OURS in file.read_text():
                registers |= registers_of(ptxas(file))
    return Compiled(
        launches=launches,
        count=count,
        registers=registers,
        aliases=aliases_of(program),
        temporary=memory.temp_size_in_bytes,
    )


def launched(sequence: str) -> tuple[list[Launch], int]:
    """The library's launches, and how many there are in all, of a dumped sequence."""
    ours, count = [], 0
    for line in sequence.splitlines():
        kind = re.match(r"\s*\d+: k(\w+)", line)
        if kind is None or kind[1] in _CONTROL:
            continue
        count += 1
        found = re.search(
            rf"\b({OURS}\w+).* threads: \[(\d+), (\d+), (\d+)\]"
            r" +shared_memory: (\d+) bytes",
            line,
        )
        if found is not None:
            name, x, y, z, shared = found.groups()
            ours.append(Launch(name, int(x) * int(y) * int(z), int(shared)))
    return ours, count


def registers_of(text: str) -> dict[str, Registers]:
    """What ptxas tells of the library's kernels."""
    found = re.findall(
        rf"entry function '({OURS}\w+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        text,
        re.DOTALL,
    )
    return {
        name: Registers(int(number), int(stores) + int(loads))
        for name, stores, loads, number in found
    }


def aliases_of(program: str) -> int:
    """How many arguments of a compiled program are overwritten by a result."""
    header = program.split("\n", 1)[0]
    return len(re.findall(r"\{[\d, ]*\}: \(\d+, \{\}, (?:may|must)-alias\)", header))


def ptxas(file: Path) -> str:
    """What NVIDIA's assembler says of a file of PTX."""
    spec = importlib.util.find_spec("nvidia.cuda_nvcc")
    assert spec is not None and spec.submodule_search_locations, "pip install ptxas"
    (folder,) = spec.submodule_search_locations
    target = re.search(r"^\.target (\w+)", file.read_text(), re.MULTILINE)
    assert target is not None
    command = [
        f"{folder}/bin/ptxas",
        "-v",
        f"-arch={target[1]}",
        str(file),
        "-o",
        "/dev/null",
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True).stderr


def rows_of(case: Case, card: Card, found: Compiled) -> list[dict[str, Any]]:
    """Lines of the table: one for each of the library's kernels in a case."""
    return [
        {
            "case": case.name,
            "card": card.name,
            "kernel": launch.kernel,
            "registers": found.registers[launch.kernel].number,
            "spilled_bytes": found.registers[launch.kernel].spilled,
            "threads": launch.threads,
            "shared_bytes": launch.shared,
            "launches": found.count,
            "temporary_bytes": found.temporary,
        }
        for launch in found.launches
    ]


def faults_of(case: Case, found: Compiled) -> list[str]:
    """What is not as it has to be, in words."""
    faults = []
    names = [launch.kernel for launch in found.launches]
    for kernel in case.kernels:
        if kernel not in names:
            faults.append(f"{kernel} is not in the program")
    for kernel, registers in found.registers.items():
        if registers.spilled > case.spill:
            faults.append(f"{kernel} spills {registers.spilled} bytes")
    if case.launches is not None and found.count > case.launches:
        faults.append(f"{found.count} launches, more than {case.launches}")
    if case.in_place:
        given = jax.tree.leaves(jax.eval_shape(case.arguments)[0])
        if found.aliases != len(given):
            faults.append(f"{found.aliases} of {len(given)} arrays are overwritten")
        if found.temporary >= max(x.size * x.dtype.itemsize for x in given):
            faults.append(f"{found.temporary} temporary bytes: an array is copied")
    return faults
