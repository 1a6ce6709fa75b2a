"""The run folder: what training writes and generation reads.

RUN/config.json    {"format": "hsrjax-run", "version": 1, "model": {...},
                    "train": {...}}; "model" is ModelConfig.to_dict()
RUN/checkpoints/   an orbax CheckpointManager folder, one sub-folder per step; each
                   holds an item "model" (`model_item`, every variable of the model
                   including ThresholdScale) beside items that only training reads

A released model has model.safetensors (`models.files.release`) in place of checkpoints,
and in its config.json what a hub looks for: model_type and architectures.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from flax import nnx

from models.files import release
from models.files.atomic import write_atomic
from models.network.config import Method, ModelConfig
from models.network.transformer import Transformer, abstract_model, with_attention

FORMAT = "hsrjax-run"
VERSION = 1
CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
MODEL_ITEM = "model"
_FOR_HUBS = {"model_type": "hsrjax", "architectures": ["HsrjaxForCausalLM"]}


class ModelFileError(ValueError):
    """A model's files are missing, damaged or of another program."""


def write_run_config(
    run: str | os.PathLike[str],
    config: ModelConfig,
    *,
    train: dict[str, Any],
    is_release: bool = False,
) -> None:
    """Writes RUN/config.json, making the folder where it is missing.

    Args:
      run: the run folder.
      config: of the model.
      train: whatever training wants to find again; JSON values.
      is_release: whether hubs are to find what they look for.
    """
    Path(run).mkdir(parents=True, exist_ok=True)
    content = {
        "format": FORMAT,
        "version": VERSION,
        **(_FOR_HUBS if is_release else {}),
        "model": config.to_dict(),
        "train": train,
    }
    write_atomic(Path(run) / CONFIG_FILE, json.dumps(content, indent=2) + "\n")


def read_run_config(run: str | os.PathLike[str]) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads RUN/config.json, trusting nothing in it.

    Args:
      run: the run folder.

    Returns:
      The model's config and the dictionary that training stored.

    Raises:
      ModelFileError: the file is missing, unreadable, foreign or impossible.
    """
    path = Path(run) / CONFIG_FILE
    if not Path(run).is_dir():
        state = "is not a folder" if Path(run).exists() else "does not exist"
        raise ModelFileError(
            f"{run} {state}; give the folder that `python -m train --out` wrote."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelFileError(
            f"{run} holds no {CONFIG_FILE}, so it is not a run folder; give the folder "
            "that `python -m train --out` wrote."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelFileError(
            f"{path} cannot be read as JSON ({_first_line(error)}); restore the file "
            "or train again into a new folder."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelFileError(
            f'{path} is not of a run: it lacks "format": "{FORMAT}"; give the '
            "folder that `python -m train --out` wrote."
        )
    if content.get("version") != VERSION:
        raise ModelFileError(
            f"{path} has version {content.get('version')!r} and this program reads "
            f"{VERSION}; use the hsrjax release that wrote the run."
        )
    train = content.get("train", {})
    try:
        config = ModelConfig.from_dict(content.get("model"))
    except ValueError as error:
        raise ModelFileError(
            f"{path} does not describe a model ({error}); restore the file or train "
            "again into a new folder."
        ) from error
    if not isinstance(train, dict):
        raise ModelFileError(
            f'{path}: "train" must be an object, got {type(train).__name__}; restore '
            "the file or train again into a new folder."
        )
    return config, train


def model_item(model: Transformer) -> dict[str, Any]:
    """The checkpoint item "model": every variable, as a nested dictionary of arrays."""
    return nnx.to_pure_dict(nnx.state(model))


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a nested dictionary by names like "blocks.0.mlp.up.kernel"."""
    return {
        ".".join(str(getattr(key, "key", key)) for key in path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def restore_model(config: ModelConfig, item: dict[str, Any]) -> Transformer:
    """Builds a model around arrays that `model_item` returned.

    Args:
      config: the shapes the arrays must have.
      item: nested dictionary of arrays.

    Returns:
      The model; its arrays are those of `item`.

    Raises:
      ValueError: a variable is missing, unknown or of another shape or dtype.
    """
    graphdef, state = nnx.split(abstract_model(config))
    try:
        _check_same(item, nnx.to_pure_dict(state))
    except ValueError as error:
        raise ValueError(
            f"restore_model: item does not fit the config: {error}; use the config it "
            "was saved with."
        ) from error
    nnx.replace_by_pure_dict(state, item)
    return nnx.merge(graphdef, state)


def checkpoint_steps(run: str | os.PathLike[str]) -> list[int]:
    """The steps of the finished checkpoints of a run, ascending."""
    folder = Path(run) / CHECKPOINTS
    if not folder.is_dir():
        return []
    # A checkpoint being written has a longer name; orbax renames it when it is whole.
    names = (path.name for path in folder.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def save_run(
    run: str | os.PathLike[str],
    model: Transformer,
    *,
    step: int = 0,
    train: dict[str, Any] | None = None,
) -> None:
    """Writes a run folder with one checkpoint that holds the model alone.

    Training writes its own checkpoints, with the optimizer beside the model.

    Args:
      run: the run folder; made where it is missing.
      model: to be saved.
      step: the checkpoint's number.
      train: stored in config.json.
    """
    write_run_config(run, model.config, train=train or {})
    folder = (Path(run) / CHECKPOINTS).resolve()
    items = ocp.args.Composite(model=ocp.args.StandardSave(model_item(model)))
    with ocp.CheckpointManager(folder) as manager:
        manager.save(step, args=items, force=True)


def load_run(
    run: str | os.PathLike[str],
    *,
    step: int | None = None,
    attention: Method | None = None,
) -> Transformer:
    """Loads a model from a run folder or a released one.

    Args:
      run: the folder that `python -m train --out` or `python -m train export` wrote.
      step: which checkpoint; None is the newest. A released model has none.
      attention: "dense", "hsr" or "auto"; None keeps what the run was trained with.

    Returns:
      The model, every value checked finite.

    Raises:
      ModelFileError: files are missing, damaged or foreign; the message names them.
    """
    config, _ = read_run_config(run)
    released = Path(run) / release.WEIGHTS
    if step is None and released.exists():
        model = _read_released(released, config)
        _check_finite(model, released, "restore the file from a copy")
        return model if attention is None else with_attention(model, attention)
    steps = checkpoint_steps(run)
    if not steps or (step is not None and step not in steps):
        wanted = "no finished checkpoint" if step is None else f"no checkpoint {step}"
        raise ModelFileError(
            f"{Path(run) / CHECKPOINTS} holds {wanted} (it has {steps}); train until "
            "the first checkpoint is written or choose another run."
        )
    path = Path(run) / CHECKPOINTS / str(steps[-1] if step is None else step)
    model = restore_model(config, _read_item(path / MODEL_ITEM, config))
    remedy = f"load an earlier checkpoint (the run has {steps})"
    _check_finite(model, path / MODEL_ITEM, remedy)
    return model if attention is None else with_attention(model, attention)


def save_release(
    folder: str | os.PathLike[str],
    model: Transformer,
    *,
    train: dict[str, Any] | None = None,
    dtype: Literal["float32", "float16"] = "float32",
) -> None:
    """Writes a model as config.json and model.safetensors.

    Args:
      folder: made where it is missing.
      model: to be saved.
      train: stored in config.json.
      dtype: of the stored values; the model computes in its own.

    Raises:
      ValueError: a value is not finite in that dtype.
    """
    write_run_config(folder, model.config, train=train or {}, is_release=True)
    release.write_weights(Path(folder), by_name(model_item(model)), dtype=dtype)


def _read_released(path: Path, config: ModelConfig) -> Transformer:
    item = model_item(abstract_model(config))
    try:
        found = release.read_weights(path, by_name(item))
    except ValueError as error:
        raise ModelFileError(
            f"{path} cannot be loaded as the model of {CONFIG_FILE} ({error}); restore "
            "the file from a copy."
        ) from error
    # Both list the leaves in the same order.
    leaves = [jnp.asarray(found[name]) for name in by_name(item)]
    return restore_model(config, jax.tree.unflatten(jax.tree.structure(item), leaves))


def _check_finite(model: Transformer, path: Path, remedy: str) -> None:
    for name, leaf in by_name(model_item(model)).items():
        if not np.isfinite(leaf).all():
            raise ModelFileError(
                f"{path} holds values that are not finite in {name}; {remedy}."
            )


def _read_item(path: Path, config: ModelConfig) -> dict[str, Any]:
    """Reads a model item; every check comes first, so that orbax finds no fault.

    Orbax reads all arrays at once, and what a fault leaves behind in its threads is
    reported on stderr later, beside the one sentence that users are to see.
    """
    # On one device, wherever and on however many devices it was saved.
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        model_item(abstract_model(config)),
    )
    folder = epath.Path(path.resolve())
    handler = ocp.StandardCheckpointHandler()
    try:
        if not path.is_dir():
            raise ValueError("it does not exist")
        _read_every_byte(path.resolve())
        _check_same(handler.metadata(folder).tree, shapes)
        return handler.restore(folder, args=ocp.args.StandardRestore(shapes))
    except Exception as error:  # orbax and tensorstore raise almost any type here
        raise ModelFileError(
            f"{path} cannot be loaded as the model of {CONFIG_FILE} "
            f"({_first_line(error)}); it is damaged or of another model: load another "
            "checkpoint or train again."
        ) from error
    finally:
        handler.close()


def _read_every_byte(path: Path) -> None:
    """Raises ValueError where the key-value store of the arrays has a hole."""
    if (path / "manifest.ocdbt").exists():
        base = {"driver": "file", "path": f"{path}/"}
        store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
        for key in store.list().result():
            store.read(key).result()


def _check_same(item: Any, shapes: dict[str, Any]) -> None:
    got, expected = by_name(item), by_name(shapes)
    if got.keys() != expected.keys():
        raise ValueError(
            f"missing variables {sorted(expected.keys() - got.keys())}, unknown "
            f"variables {sorted(got.keys() - expected.keys())}"
        )
    for name, want in expected.items():
        leaf = got[name]
        if tuple(leaf.shape) != want.shape or leaf.dtype != want.dtype:
            raise ValueError(
                f"{name} must be {want.dtype}{list(want.shape)}, got "
                f"{leaf.dtype}{list(leaf.shape)}"
            )


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]
