"""`make gpu-check`: what it reads, what it refuses; every kernel is compiled by it."""

import csv
import re
from pathlib import Path

import jax.numpy as jnp
import pytest

import hsrjax
from tests.gpu import compiled
from tests.gpu.cases import CASES, Case, Sizes
from tests.gpu.compiled import Compiled, Launch, Registers

SEQUENCE = """\
001: kCustomKernel [source       | next=002 (1)] loop_fusion grid: [1, 1, 1] \
threads: [4, 1, 1]  shared_memory: 0 bytes
002: kWhile [prev=001 (1) | sink        ] while
    001: kCustomKernel [source | next=] hsrjax_attend grid: [4, 1, 256] \
threads: [128, 2, 1]  shared_memory: 26112 bytes
    002: kDeviceToDeviceCopy [prev=001 (1) | sink        ]
"""
PTXAS = """\
ptxas info    : Compiling entry function 'fusion' for 'sm_90a'
    0 bytes stack frame, 4 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
ptxas info    : Compiling entry function 'hsrjax_attend' for 'sm_90a'
ptxas info    : Function properties for hsrjax_attend
    8 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 95 registers, used 1 barriers
"""
PROGRAM = """\
HloModule jit_step, input_output_alias={ {0}: (0, {}, may-alias), \
{1, 2}: (12, {}, must-alias) }, entry_computation_layout={(f32[2]{0})->f32[2]{0}}
  %x = {3}: (4, {}, may-alias)
"""


def test_launches_registers_and_aliases_are_read():
    assert compiled.launched(SEQUENCE) == ([Launch("hsrjax_attend", 256, 26112)], 3)
    assert compiled.registers_of(PTXAS) == {"hsrjax_attend": Registers(95, 32)}
    assert compiled.aliases_of(PROGRAM) == 2


def case(**changes) -> Case:
    arguments = lambda: (jnp.zeros((8, 8)), jnp.zeros(3))
    return Case("a case", ("hsrjax_x",), lambda *x: x, arguments)._replace(**changes)


FOUND = Compiled([Launch("hsrjax_x", 128, 0)], 5, {"hsrjax_x": Registers(90, 0)}, 1, 0)


@pytest.mark.parametrize(
    ("found", "wants", "fault"),
    [
        ({}, {"launches": 5, "in_place": True}, None),
        ({"registers": {"hsrjax_x": Registers(90, 8)}}, {}, "spills 8 bytes"),
        ({"launches": []}, {}, "hsrjax_x is not in the program"),
        ({}, {"launches": 4}, "5 launches, more than 4"),
        ({"aliases": 0}, {"in_place": True}, "0 of 1 arrays are overwritten"),
        ({"temporary": 256}, {"in_place": True}, "an array is copied"),
    ],
)
def test_what_is_not_as_it_has_to_be_is_said(found, wants, fault):
    faults = compiled.faults_of(case(**wants), FOUND._replace(**found))
    assert len(faults) == (fault is not None)
    assert fault is None or fault in faults[0]


def test_every_kernel_of_the_library_is_compiled():
    folder = Path(hsrjax.__file__).parent / "_src" / "kernels" / "triton"
    text = "".join(file.read_text() for file in folder.glob("*.py"))
    kernels = set(re.findall(r'name="(hsrjax_\w+)"', text))
    assert kernels and kernels == {name for x in CASES for name in x.kernels}
    names = [x.name for x in CASES]
    assert len(set(names)) == len(names)


def test_the_committed_table_has_every_case():
    file = Path(__file__).parents[1] / "benchmarks/results/compile/results.csv"
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert {row["card"] for row in rows} == {"a100", "h100", "l4"}
    allowed = {x.name: x.spill for x in CASES}
    assert all(int(x["spilled_bytes"]) <= allowed[x["case"]] for x in rows)
    assert {row["case"] for row in rows} == set(allowed)


def test_sizes_are_those_of_a_cache():
    cache, query, _, value = Sizes(new=3, head=16, value=5, keys=64).arrays()
    assert query.shape == (1, 3, 8, 16) and value.shape == (1, 3, 4, 5)
    assert cache.values.rows.shape == (1, 4, 64, 5)
