"""What every test gets: 8 virtual CPU devices, strict promotion, compile counters.

The tests run stricter than users do. Code that mixes dtypes or ranks by accident
raises here, and every warning is an error (pyproject.toml).
"""

import importlib.metadata
import os

# Read by jax when it makes its first backend, so set before anything imports jax.
# Most of the time goes into compiling programs that run once on a few numbers:
# these make it several times faster. What is marked exact is run as users compile it,
# where XLA fuses multiplications and additions, by HSRJAX_TEST_OPTIMIZED=1 pytest -m
# exact. (A jaxlib that does not know a flag ends with its name.)
_FLAGS = "--xla_force_host_platform_device_count=8"
if not os.environ.get("HSRJAX_TEST_OPTIMIZED"):
    _FLAGS += (
        " --xla_backend_optimization_level=0"
        " --xla_cpu_parallel_codegen_split_count=1"
        " --xla_llvm_disable_expensive_passes=true"
    )
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        _FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # JAX_PLATFORMS=cuda,cpu tests a GPU
os.environ.setdefault("MPLBACKEND", "Agg")

os.environ["HSRJAX_CACHE"] = "off"  # what the user's commands compiled is no test's

# The packaged costs, whatever the shell says: another table may be one of elsewhere.
for name in ("HSRJAX_COSTS", "HSRJAX_MEMORY"):
    os.environ.pop(name, None)

import collections
import contextlib
import dataclasses
import functools
import gc
import json
import pathlib
import shutil
import signal

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Tracing makes hundreds of thousands of objects, and Python looks through them and all
# modules again and again for garbage: a fifteenth of the whole time.
gc.freeze()
gc.set_threshold(50_000, 20, 50)

# A run of the tests never fails by luck: the examples are the same each time.
# HYPOTHESIS_PROFILE=explore draws new ones, and more.
hypothesis.settings.register_profile(
    "default",
    deadline=None,
    derandomize=True,
    max_examples=25,
    database=None,
    suppress_health_check=[
        hypothesis.HealthCheck.too_slow,  # the first example compiles
        hypothesis.HealthCheck.data_too_large,
    ],
)
hypothesis.settings.register_profile(
    "explore",
    hypothesis.settings.get_profile("default"),
    derandomize=False,
    max_examples=300,
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


# What each test costs, in CPU-seconds of its process and of those it started: unlike
# seconds on the clock they do not depend on what else the machine does.
_cpu_seconds: dict[str, float] = {}


def _cpu_now() -> float:
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "setup":
        item.cpu_start = getattr(item.session, "cpu_last", 0.0)
    item.session.cpu_last = _cpu_now()
    if call.when == "teardown":
        spent = item.session.cpu_last - item.cpu_start
        report.user_properties.append(("cpu_seconds", spent))
    return report


def pytest_runtest_logreport(report):
    for name, value in report.user_properties:
        if name == "cpu_seconds" and report.when == "teardown":
            _cpu_seconds[report.nodeid] = value


def pytest_terminal_summary(terminalreporter):
    total = sum(_cpu_seconds.values())
    terminalreporter.section(f"{total / 60:.1f} CPU-minutes; the costliest tests")
    ranked = sorted(_cpu_seconds.items(), key=lambda item: -item[1])
    for name, seconds in ranked[: int(os.environ.get("CPU_DURATIONS", "10"))]:
        terminalreporter.write_line(f"{seconds:6.1f} CPU-s {name}")


@pytest.fixture(scope="module", autouse=True)
def drop_programs():
    """Forgets what a module compiled.

    Every program takes some memory maps, and Linux ends a process that wants more
    than 65,530: the whole suite does.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="session")
def repo_root() -> pathlib.Path:
    """The checkout: what pyproject.toml, models/ and train/ lie in."""
    return pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def fused_kernels():
    """Where there is no card, JAX plays the kernels by a name of their own."""
    from tests.kernels import known

    with known():
        yield


@pytest.fixture(scope="module")
def compile_cache(tmp_path_factory):
    """Keeps what XLA compiled: most runs of a module share one train step.

    Promotion is jax's usual one, because optax mixes dtypes.
    """
    folder = str(tmp_path_factory.mktemp("xla"))
    names = {
        "jax_compilation_cache_dir": folder,
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_numpy_dtype_promotion": "standard",
        "jax_numpy_rank_promotion": "allow",
    }
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    yield {name.upper(): str(value) for name, value in names.items()}
    for name, value in before.items():
        jax.config.update(name, value)
    jax.experimental.compilation_cache.compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A corpus of 50 KB."""
    file = tmp_path_factory.mktemp("corpus") / "text.py"
    shutil.copy(dataclasses.__file__, file)
    return file


@pytest.fixture
def ctrl_c_before_batch(monkeypatch):
    """Presses Ctrl-C, once, when a training loop asks for the n-th batch.

    >>> ctrl_c_before_batch(17)
    >>> with pytest.raises(TrainingInterrupted):
    ...     train(config, out)
    """
    from train import data

    def arrange(number):
        drawn = data.Batches.__next__

        def press(self):
            if self.get_state()["next_index"] == number:
                signal.raise_signal(signal.SIGINT)
                monkeypatch.setattr(data.Batches, "__next__", drawn)
            return drawn(self)

        monkeypatch.setattr(data.Batches, "__next__", press)

    return arrange


@pytest.fixture
def lenient_promotion():
    """jax's usual promotion, for tests that run flax or optax code."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def made_up_costs(monkeypatch, tmp_path):
    """Costs by which dense wins from half of the keys on, at any size; a dictionary.

    Scoring a key costs half of what gathering it does, everything else nothing.
    """
    from hsrjax._src.planning import costs

    curves = {"dense": [[1.0, 1.0], [1e15, 1e15]], "scan": [[1.0, 1e-6]]}
    products = {"dense_product": 0.5, "gather_product": 1.0}
    fields = dataclasses.fields(costs.Costs)
    numbers = {x.name: 0.0 for x in fields if x.type == "float"}
    machine = costs.this_machine()._asdict()
    backend = machine.pop("backend")
    table = {**machine, "origin": "measured", **numbers, **products, **curves}
    file = tmp_path / "costs.json"
    file.write_text(json.dumps({backend: table}))
    monkeypatch.setenv("HSRJAX_COSTS", str(file))
    return table


@pytest.fixture
def count_traces():
    """Wraps a function so that it counts its traces: put it inside `jax.jit`.

    >>> counted = count_traces(lambda x: x + 1)
    >>> f = jax.jit(counted)
    >>> f(1.0), f(2.0)
    >>> assert counted.traces == 1
    """

    def wrap(function):
        @functools.wraps(function)
        def counted(*args, **kwargs):
            counted.traces += 1
            return function(*args, **kwargs)

        counted.traces = 0
        return counted

    return wrap


@pytest.fixture
def count_compiles():
    """A context that counts XLA compilations by the jitted function's name.

    For functions that are jitted already, where `count_traces` cannot reach:

    >>> with count_compiles() as compiles:
    ...     step(x)
    ...     step(y)
    >>> assert compiles["step"] == 1
    """

    @contextlib.contextmanager
    def counting():
        compiles = collections.Counter()

        def listen(event, duration, **info):
            del duration
            if event == "/jax/core/compile/backend_compile_duration":
                name = info.get("fun_name", "")
                compiles[name.removeprefix("jit(").removesuffix(")")] += 1

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield compiles
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    return counting
