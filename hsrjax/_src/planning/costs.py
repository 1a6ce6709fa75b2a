"""What work costs on this machine, in nanoseconds: the table that the planner reads.

A table for every backend is packaged (`costs.json`), and one more for kernels that have
costs of their own ("gpu/triton"). `python -m benchmarks calibrate --out PATH` measures
them, and the environment variable HSRJAX_COSTS=PATH names the file. What is packaged
for one card serves others, in proportion to the bandwidth of their memories. Costs
decide which of two ways is taken.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import json
import math
import os
import platform as system
import re
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

VARIABLE = "HSRJAX_COSTS"
"""Environment variable that names a table."""

PACKAGED = Path(__file__).with_name("costs.json")
_FALLBACK = "gpu"
"""Whose packaged costs serve a backend that has none of its own."""
_BANDWIDTHS = {
    r"\bH200\b": 4.8,
    r"\bH100\b": 3.35,
    r"\bA100\b.*80GB": 2.04,
    r"\bA100\b": 1.555,
    r"\bL4\b": 0.3,
}
"""Terabytes a second that cards read, by their names: NVIDIA's data sheets."""

_ORIGINS = ("measured", "estimated")
_CURVE = "a list of [amount, ns] > 0 with ascending amounts"

Curve = tuple[tuple[float, float], ...]
"""Points (amount of work, nanoseconds of a whole call), ascending in the amount."""


class Machine(NamedTuple):
    """What costs depend on.

    Attributes:
      backend: "cpu", "gpu" or "tpu".
      device: name of the processor.
      threads: of the CPU backend; 0 elsewhere.
      jax: version.
    """

    backend: str
    device: str
    threads: int
    jax: str

    def __str__(self) -> str:
        threads = f" with {self.threads} threads" if self.threads else ""
        return f"{self.device}{threads}, jax {self.jax}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Nanoseconds, and what they were measured on.

    A multiplication below is one of float32 numbers of a query and a key or of a weight
    and a value; with codes, of int8 numbers.

    Attributes:
      machine: that they hold for.
      origin: "measured" or "estimated".
      implementation: whose costs they are.
      dense: a dense call with two query rows a key head, by numbers in keys and values;
        of kernels by their bytes.
      scan: an hsr call in which no key survives, two rows, by codes in the sketch.
      dense_product: dense, per multiplication with any further query row.
      scan_product: hsr, per multiplication of codes with any further query row.
      build: per key coordinate, of an index that is made for one call.
      probe: a look at a sample of the sketch.
      gather_row: per key fetched with its value.
      gather_number: per number fetched; of kernels per byte.
      gather_product: per multiplication with fetched numbers.
      top_r_dense: per score, for Softmax(top_r) to choose its keys.
      top_r_hsr: the same from bounds.
      epsilon_dense: per score, for Softmax(epsilon).
      epsilon_hsr: the same from bounds.
    """

    machine: Machine
    origin: Literal["measured", "estimated"]
    implementation: str = "xla"
    dense: Curve
    scan: Curve
    dense_product: float
    scan_product: float
    build: float
    probe: float
    gather_row: float
    gather_number: float
    gather_product: float
    top_r_dense: float
    top_r_hsr: float
    epsilon_dense: float
    epsilon_hsr: float

    @property
    def by_bytes(self) -> bool:
        """Whether keys and values cost by their bytes: kernels only read them."""
        return self.implementation != "xla"


class Table(NamedTuple):
    """Costs in use.

    Attributes:
      costs: the numbers.
      source: file that they come from, or "packaged with hsrjax".
      differs: how what they were measured on differs from here, "" if it does not.
    """

    costs: Costs
    source: str
    differs: str


def current(implementation: str = "xla") -> Table:
    """The table for the default device: HSRJAX_COSTS's, or the packaged one.

    Args:
      implementation: that does the work; one without costs of its own has XLA's.

    Raises:
      ValueError: the file is not a table; names file and field.
    """
    machine = this_machine()
    key = machine.backend
    if has_own(implementation):
        key = f"{key}/{implementation}"
    return _load(os.environ.get(VARIABLE, ""), machine, key)


def has_own(implementation: str) -> bool:
    """Whether an implementation has costs of its own on the default device."""
    return f"{this_machine().backend}/{implementation}" in _packaged()


def default_device() -> Any:
    """The jax.Device that arrays go to unless something else is said."""
    device = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(device, str):
        return jax.devices(device)[0]
    return jax.devices()[0] if device is None else device


def platform() -> str:
    """Of the default device: "cpu", "gpu" or "tpu"."""
    return default_device().platform


def this_machine() -> Machine:
    """What runs here."""
    device = default_device()
    if device.platform != "cpu":
        return Machine(device.platform, device.device_kind, 0, jax.__version__)
    return Machine("cpu", _processor(), _threads(), jax.__version__)


def interpolate(curve: Curve, amount: float) -> float:
    """Nanoseconds for an amount of work, log-log between the points.

    Less than the first point costs as much as it, more than the last in proportion.
    """
    last, ns = curve[-1]
    if amount >= last:
        return ns * amount / last
    i = bisect.bisect_right([x for x, _ in curve], amount)
    if i == 0:
        return curve[0][1]
    (x0, y0), (x1, y1) = curve[i - 1 : i + 1]
    return y0 * (y1 / y0) ** (math.log(amount / x0) / math.log(x1 / x0))


def to_json(costs: Costs) -> dict[str, Any]:
    """The contents of a file for HSRJAX_COSTS."""
    found = dataclasses.asdict(costs)
    machine = found.pop("machine")._asdict()
    key, implementation = machine.pop("backend"), found.pop("implementation")
    if implementation != "xla":
        key = f"{key}/{implementation}"
    return {key: machine | found}


def parse(found: Any, key: str, where: str) -> Costs:
    """One table of costs from the contents of a file.

    Args:
      found: JSON values.
      key: which: a backend, or "gpu/triton".
      where: names the file in errors.

    Raises:
      ValueError: names the file and the field.
    """
    if not isinstance(found, dict) or not isinstance(found.get(key), dict):
        raise ValueError(f"{where}: {key} must be an object that holds its costs.")
    entry = dict(found[key])

    def take(name, accepts, expected):
        value = entry.pop(name, None)
        if not accepts(value):
            raise ValueError(
                f"{where}: {key}.{name} must be {expected}, got {value!r}."
            )
        return value

    device, version = (take(x, _is_text, "a string") for x in ("device", "jax"))
    threads = take("threads", lambda x: _is_number(x) and x == int(x), "an integer")
    origin = take("origin", lambda x: x in _ORIGINS, f"one of {_ORIGINS}")
    curves = {x: take(x, _is_curve, _CURVE) for x in ("dense", "scan")}
    curves = {name: tuple(map(tuple, points)) for name, points in curves.items()}
    numbers = [x.name for x in dataclasses.fields(Costs) if x.type == "float"]
    rest = {x: take(x, _is_number, "a number >= 0") for x in numbers}
    if entry:
        raise ValueError(f"{where}: unknown field {key}.{min(entry)}.")
    backend, _, implementation = key.partition("/")
    machine = Machine(backend, device, threads, version)
    return Costs(
        machine=machine,
        origin=origin,
        implementation=implementation or "xla",
        **curves,
        **rest,
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 <= value < math.inf


def _is_curve(value: Any) -> bool:
    if not isinstance(value, list) or not value:
        return False
    if not all(isinstance(p, list) and len(p) == 2 for p in value):
        return False
    if not all(_is_number(x) and x > 0 for point in value for x in point):
        return False
    return all(a[0] < b[0] for a, b in itertools.pairwise(value))


@functools.cache
def _packaged() -> dict[str, Any]:
    return json.loads(PACKAGED.read_text())


@functools.lru_cache
def _load(path: str, machine: Machine, key: str) -> Table:
    """Reads a table once; warns once where it was measured on something else."""
    if not path:
        known = key if key in _packaged() else _FALLBACK
        costs = parse(_packaged(), known, PACKAGED.name)
        differs, scaled = _difference(costs, machine), _scaled(costs, machine)
        if scaled is not costs:
            differs += ", in proportion to what their memories read a second"
        return Table(scaled, "packaged with hsrjax", differs)
    where = f"{VARIABLE}={path}"
    again = "write it with python -m benchmarks calibrate --out PATH"
    try:
        found = json.loads(Path(path).read_text())
    except OSError as error:
        raise ValueError(
            f"{where} cannot be read: {error.strerror}; {again}."
        ) from None
    except ValueError:
        raise ValueError(f"{where} is not JSON; {again}.") from None
    if isinstance(found, dict) and found and key not in found:
        warnings.warn(
            f"{where} holds costs of {', '.join(map(str, found))}, this is "
            f"{key}: the packaged costs are used instead."
        )
        return _load("", machine, key)
    costs = parse(found, key, where)
    differs = _difference(costs, machine)
    if differs:
        warnings.warn(
            f"{where} was {differs}. Results are right all the same, method='auto' may "
            "choose the slower way: run python -m benchmarks calibrate here."
        )
    return Table(costs, path, differs)


def _scaled(costs: Costs, machine: Machine) -> Costs:
    """Costs of one card for another, whose memory is so many times as fast."""
    of, here = (_bandwidth(device) for device in (costs.machine.device, machine.device))
    if costs.machine.device == machine.device or of is None or here is None:
        return costs
    ratio = here / of
    curves = {
        name: tuple((ratio * amount, ns) for amount, ns in getattr(costs, name))
        for name in ("dense", "scan")
    }
    numbers = [x.name for x in dataclasses.fields(Costs) if x.type == "float"]
    rest = {x: getattr(costs, x) / ratio for x in numbers if x != "probe"}
    return dataclasses.replace(costs, origin="estimated", **curves, **rest)


def _bandwidth(device: str) -> float | None:
    """Of a card's memory, where it is known."""
    found = [x for name, x in _BANDWIDTHS.items() if re.search(name, device)]
    return found[0] if found else None


def _difference(costs: Costs, machine: Machine) -> str:
    """Names both machines if they differ."""
    if costs.origin == "estimated":
        return f"estimated for {costs.machine.device}; this is {machine}"
    if costs.machine == machine:
        return ""
    return f"measured on {costs.machine}; this is {machine}"


@functools.cache
def _processor() -> str:
    """The processor's name, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return system.processor() or system.machine()
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return names[0] if names else system.processor() or system.machine()


def _threads() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
