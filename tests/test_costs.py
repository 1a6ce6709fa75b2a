"""The table of costs: packaged, replaced by a file, noticed when it does not fit."""

import json
import warnings

import jax
import jax.numpy as jnp
import pytest

import hsrjax
from hsrjax._src.planning import costs


def write(file, monkeypatch, **changes):
    """A table of this machine in a file that HSRJAX_COSTS names, with changes."""
    packaged = json.loads(costs.PACKAGED.read_text())["cpu"]
    machine = costs.this_machine()._asdict()
    backend = machine.pop("backend")
    table = packaged | machine | {"origin": "measured"} | changes
    table = {name: x for name, x in table.items() if x is not None}
    file.write_text(json.dumps({backend: table}))
    monkeypatch.setenv("HSRJAX_COSTS", str(file))
    return table


def explain():
    query = jax.ShapeDtypeStruct((1, 1, 2, 8), jnp.float32)
    key = jax.ShapeDtypeStruct((1, 99, 1, 8), jnp.float32)
    return hsrjax.explain(query, key, key, activation=hsrjax.ReLU())


def test_every_backend_has_packaged_costs():
    found = json.loads(costs.PACKAGED.read_text())
    assert set(found) == {"cpu", "gpu", "gpu/triton", "tpu"}
    for backend in found:
        table = costs.parse(found, backend, "costs.json")
        again = json.loads(json.dumps(costs.to_json(table)))
        assert again == {backend: found[backend]}
    origins = [found[name]["origin"] for name in ("cpu", "gpu", "tpu")]
    assert origins == ["measured", "measured", "estimated"]
    assert found["gpu/triton"]["origin"] == "estimated"


def test_the_packaged_table_says_where_it_was_measured_and_does_not_warn(monkeypatch):
    elsewhere = costs.Machine("cpu", "another processor", 64, "1.2.3")
    monkeypatch.setattr(costs, "this_machine", lambda: elsewhere)
    table = costs.current()
    assert table.source == "packaged with hsrjax"
    assert "another processor with 64 threads, jax 1.2.3" in table.differs
    assert table.costs.machine.device in table.differs
    assert table.differs in str(explain())


@pytest.mark.parametrize(
    ("backend", "begins"),
    [("tpu", "estimated for TPU"), ("unheard-of", "measured on NVIDIA")],
)
def test_estimates_and_other_devices_are_called_so(backend, begins, monkeypatch):
    elsewhere = costs.Machine(backend, "an accelerator", 0, jax.__version__)
    monkeypatch.setattr(costs, "this_machine", lambda: elsewhere)
    assert costs.current().differs.startswith(begins)
    assert "an accelerator" in costs.current().differs


def test_a_table_of_this_machine_is_used(monkeypatch, tmp_path):
    before = explain()
    assert before.method == "dense"
    write(
        tmp_path / "mine.json", monkeypatch, dense=[[1.0, 7e6]], gather_row=0.0, probe=0
    )
    after = explain()
    assert after.method != "dense" and after.dense_us > 100 * before.dense_us
    assert after.costs == str(tmp_path / "mine.json") and not after.differs
    assert "measured on this machine" in str(after)


@pytest.mark.parametrize(
    "changes", [{"device": "A 1000"}, {"threads": 99}, {"jax": "0.0.7"}]
)
def test_a_table_of_elsewhere_is_used_with_one_warning(changes, monkeypatch, tmp_path):
    write(tmp_path / "theirs.json", monkeypatch, probe=4321.0, **changes)
    with pytest.warns(UserWarning, match=str(next(iter(changes.values())))) as warned:
        table = costs.current()
    assert len(warned) == 1 and "theirs.json" in str(warned[0].message)
    assert str(costs.this_machine()) in str(warned[0].message)
    assert table.costs.probe == 4321.0
    with warnings.catch_warnings(action="error"):  # warned of already
        assert table.differs in str(explain())


def test_a_table_of_another_backend_is_not_used(monkeypatch, tmp_path):
    table = write(tmp_path / "gpu.json", monkeypatch)
    (tmp_path / "gpu.json").write_text(json.dumps({"gpu": table}))
    with pytest.warns(UserWarning, match="holds costs of gpu, this is cpu"):
        assert costs.current().source == "packaged with hsrjax"


def on(card, monkeypatch):
    machine = costs.Machine("gpu", card, 0, jax.__version__)
    monkeypatch.setattr(costs, "this_machine", lambda: machine)
    return {name: costs.current(name) for name in ("xla", "triton", "another")}


def test_kernels_have_costs_of_their_own(monkeypatch):
    tables = on("NVIDIA H100 80GB HBM3", monkeypatch)
    assert [x.costs.implementation for x in tables.values()] == ["xla", "triton", "xla"]
    assert tables["another"] == tables["xla"]
    assert tables["triton"].costs.by_bytes and not tables["xla"].costs.by_bytes
    assert tables["triton"].differs.startswith("estimated for NVIDIA H100 80GB HBM3")


@pytest.mark.parametrize(
    ("card", "ratio"),
    [
        ("NVIDIA H200", 4.8 / 3.35),
        ("NVIDIA A100-SXM4-40GB", 1.555 / 3.35),
        ("NVIDIA A100-SXM4-80GB", 2.04 / 3.35),
        ("NVIDIA L4", 0.3 / 3.35),
        ("NVIDIA L40S", 1.0),  # whose memory is not known here
    ],
)
def test_costs_of_one_card_serve_others_by_their_memory(card, ratio, monkeypatch):
    """Work that reads memory takes so much longer, a launch does not."""
    measured = on("NVIDIA H100 80GB HBM3", monkeypatch)["triton"].costs
    table = on(card, monkeypatch)["triton"]
    here = table.costs
    assert costs.interpolate(here.dense, 1.0) == costs.interpolate(measured.dense, 1.0)
    amount = 1e12
    expected = costs.interpolate(measured.dense, amount) / ratio
    assert costs.interpolate(here.dense, amount) == pytest.approx(expected)
    assert here.gather_number == pytest.approx(measured.gather_number / ratio)
    assert f"this is {card}" in table.differs
    assert ("in proportion" in table.differs) == (ratio != 1)


def test_a_table_of_another_card_is_used_with_a_warning_that_names_both(
    monkeypatch, tmp_path
):
    tables = on("NVIDIA A100-SXM4-40GB", monkeypatch)
    theirs = {}
    for name in ("xla", "triton"):
        found = costs.to_json(tables[name].costs)
        (entry,) = found.values()
        entry |= {"device": "NVIDIA L4", "origin": "measured", "probe": 4321.0}
        theirs |= found
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps(theirs))
    monkeypatch.setenv("HSRJAX_COSTS", str(file))
    for name in ("xla", "triton"):
        with pytest.warns(UserWarning, match=r"NVIDIA L4.*this is NVIDIA A100") as told:
            assert costs.current(name).costs.probe == 4321.0
        assert len(told) == 1
    del theirs["gpu/triton"]
    file = tmp_path / "xla.json"
    file.write_text(json.dumps(theirs))
    monkeypatch.setenv("HSRJAX_COSTS", str(file))
    with pytest.warns(UserWarning, match="holds costs of gpu, this is gpu/triton"):
        assert costs.current("triton").source == "packaged with hsrjax"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probe": None}, r"cpu\.probe must be a number >= 0, got None"),
        ({"probe": -1}, r"cpu\.probe must be a number >= 0, got -1"),
        ({"probe": "fast"}, r"cpu\.probe must be a number >= 0, got 'fast'"),
        ({"build": float("nan")}, r"cpu\.build must be a number >= 0, got nan"),
        ({"dense": []}, r"cpu\.dense must be a list of \[amount, ns\]"),
        ({"scan": [[2, 1], [1, 2]]}, r"cpu\.scan must be .* ascending"),
        ({"scan": [[0, 1]]}, r"cpu\.scan must be"),
        ({"device": 3}, r"cpu\.device must be a string"),
        ({"threads": 1.5}, r"cpu\.threads must be an integer"),
        ({"origin": "guessed"}, r"cpu\.origin must be one of"),
        ({"prob": 1}, r"unknown field cpu\.prob"),
    ],
)
def test_mistakes_name_file_and_field(changes, message, monkeypatch, tmp_path):
    write(tmp_path / "bad.json", monkeypatch, **changes)
    with pytest.raises(ValueError, match=rf"bad\.json: .*{message}"):
        explain()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "cpu must be an object"),
        ("{}", "cpu must be an object"),
        ('{"cpu": 3}', "cpu must be an object"),
        (None, "cannot be read: No such file"),
    ],
)
def test_other_files_are_named(text, message, monkeypatch, tmp_path):
    file = tmp_path / "other.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv("HSRJAX_COSTS", str(file))
    with pytest.raises(ValueError, match=rf"HSRJAX_COSTS=.*other\.json.*{message}"):
        explain()


def test_what_is_asked_for_needs_no_table(monkeypatch):
    monkeypatch.setenv("HSRJAX_COSTS", "nowhere.json")
    x = jnp.ones((1, 2, 1, 8))
    for name in ("dense", "hsr"):
        hsrjax.attention(x, x, x, activation=hsrjax.ReLU(), method=name)


def test_curves_are_straight_between_their_points():
    curve = ((10.0, 5.0), (1000.0, 500.0), (4000.0, 4000.0))
    at = {1: 5, 10: 5, 100: 50, 1000: 500, 2000: 500 * 8**0.5, 4000: 4000, 8000: 8000}
    for amount, ns in at.items():
        assert costs.interpolate(curve, amount) == pytest.approx(ns)


def test_the_default_device_can_be_another():
    with jax.default_device(jax.devices()[3]):
        assert costs.default_device() == jax.devices()[3]
    with jax.default_device("cpu"):
        assert costs.default_device().platform == "cpu"
    assert costs.default_device() == jax.devices()[0]
