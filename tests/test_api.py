"""The public names are these, and each says what it takes, returns and looks like."""

import doctest
import importlib
import inspect
import pkgutil
import types

import jax
import jax.numpy as jnp
import pytest

import hsrjax

FUNCTIONS = {
    "attention",
    "attention_fn",
    "build",
    "count",
    "decode_attention",
    "delete",
    "explain",
    "extend",
    "init_cache",
    "insert",
    "query",
    "reindex",
}
ACTIVATIONS = {"CELU", "Entmax", "PReLU", "ReLU", "SELU", "Softmax"}
PROTOCOLS = {"Activation"}
RESULTS = {"Explanation", "Index", "Info", "KVCache", "Report"}
MODULES = {"reference", "theory"}


def public_functions(module):
    """The functions a module defines itself, without a leading underscore."""
    return {
        f"{module.__name__}.{name}": value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and inspect.isfunction(value)
        and value.__module__ == module.__name__
    }


def sections(doc):
    """The section headings of a docstring: lines such as `Args:`."""
    lines = inspect.cleandoc(doc or "").splitlines()
    return {
        line[:-1]
        for line in lines
        if line.endswith(":") and line[:-1].isalpha() and not line.startswith(" ")
    }


def test_public_names():
    assert set(hsrjax.__all__) - {"__version__"} == (
        FUNCTIONS | ACTIVATIONS | PROTOCOLS | RESULTS | MODULES
    )
    # Nothing else without an underscore, except the files of the package.
    files = {module.name for module in pkgutil.iter_modules(hsrjax.__path__)}
    names = {name for name in vars(hsrjax) if not name.startswith("_")}
    assert names - set(hsrjax.__all__) - files == set()
    assert all(isinstance(getattr(hsrjax, name), types.ModuleType) for name in MODULES)


@pytest.mark.parametrize("name", sorted(FUNCTIONS | ACTIVATIONS))
def test_docstring_says_what_goes_in_and_out(name):
    thing = getattr(hsrjax, name)
    doc = inspect.getdoc(thing) or ""
    needed = {"Args", "Returns"} if name in FUNCTIONS else {"Args"}
    missing = needed - sections(doc)
    assert not missing, f"hsrjax.{name}: no section {missing}"
    assert ">>>" in doc, f"hsrjax.{name}: no example"
    undocumented = [p for p in inspect.signature(thing).parameters if p not in doc]
    assert not undocumented, f"hsrjax.{name}: {undocumented} not in the docstring"


@pytest.mark.parametrize("name", sorted(RESULTS))
def test_result_types_describe_their_fields(name):
    kind = getattr(hsrjax, name)
    assert kind.__doc__ and not kind.__doc__.startswith(f"{name}("), "no docstring"
    fields = getattr(kind, "_fields", None) or kind.__dataclass_fields__
    text = inspect.getsource(kind)
    missing = [
        field for field in fields if text.count(field) < 2 and field not in kind.__doc__
    ]
    assert not missing, f"hsrjax.{name}: {missing} not described"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_functions_of_public_modules_are_documented(module):
    functions = public_functions(importlib.import_module(f"hsrjax.{module}"))
    assert functions
    for name, function in functions.items():
        missing = {"Args", "Returns"} - sections(inspect.getdoc(function))
        assert not missing, f"{name}: no section {missing}"


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_everything_after_the_arrays_is_keyword_only(name):
    arrays = {"keys", "normals", "offsets", "ids", "index", "query", "key", "value"}
    positional = {
        p.name
        for p in inspect.signature(getattr(hsrjax, name)).parameters.values()
        if p.kind not in (p.KEYWORD_ONLY, p.VAR_KEYWORD)
    }
    if name == "init_cache":  # a shape in place of arrays
        arrays = {"batch", "max_length", "num_kv_heads", "head_dim"}
    assert positional <= arrays | {"cache"}


@pytest.mark.parametrize(
    "module", [file.name for file in pkgutil.walk_packages(hsrjax.__path__, "hsrjax.")]
)
def test_examples_run(module):
    outcome = doctest.testmod(
        importlib.import_module(module),
        optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS,
    )
    assert outcome.failed == 0, "see the captured output"


class Fraction:
    def __repr__(self):
        return "one\n---\ntwo" * 99


def test_the_repr_of_an_index_or_a_cache_is_one_line_of_shapes():
    """Also traced, and where a tree map has put something else into its fields."""
    index = hsrjax.build(jnp.ones((2, 100, 8)), max_keys=128)
    cache = hsrjax.init_cache(2, 100, 4, 64, dtype=jnp.bfloat16, tail=1)
    shown = {
        "index": "Index(keys=float32[2,128,8], sketch=Sketch, cells=Balls, "
        "size=int32[2], max_keys=128)",
        "cache": "KVCache(keys=bfloat16[2,4,128,64], values=bfloat16[2,4,128,64], "
        "max_length=100)",
    }
    assert repr(index) == shown["index"]
    assert repr(cache) == shown["cache"]
    traced = []
    jax.eval_shape(lambda x: traced.append(repr(x)) or x, cache)
    assert traced == [shown["cache"]]
    for stored in (index, cache, hsrjax.reindex(cache).index):
        for leaf in (None, 0, Fraction()):
            odd = jax.tree.map(lambda _, leaf=leaf: leaf, stored)
            assert "\n" not in repr(odd)
            assert len(repr(odd)) < 200
