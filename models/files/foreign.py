"""What lies at a path that is no model: what it is, and what to do with it."""

from __future__ import annotations

import re
from pathlib import Path

from models.files.runs import CONFIG_FILE, ModelFileError
from models.files.stored import INDEX, WEIGHTS, read_json

_HUB = re.compile(
    r"(?:https://(?:huggingface\.co|hf\.co)/|hf://)?([\w.-]+/[\w.-]+)/?", re.ASCII
)
_ADAPTER = "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def refuse_foreign(name: str, path: Path) -> None:
    """Refuses what is known to be something else than a model.

    Args:
      name: as the user wrote it.
      path: the same, as a path.

    Raises:
      ModelFileError: it is the name of a model of the hub, an adapter, a folder of GGUF
        files, a cache, and the like; the message says what to do.
    """
    if path.is_dir():
        said = _folder(path)
    elif path.is_file():
        is_weights = path.suffix == ".safetensors"
        said = f"holds weights alone: give its folder, {path.parent}"
        said = said if is_weights else None
    else:
        said = _hub(name, path)
    if said is not None:
        raise ModelFileError(f"{name} {said}")


def _hub(name: str, path: Path) -> str | None:
    found = _HUB.fullmatch(name)
    if found is None or path.parent.is_dir():
        return None
    here = found[1].rpartition("/")[2]
    return (
        "is no file or folder here; if it is a model of the Hugging Face hub, fetch it "
        f"with `hf download {found[1]} --local-dir {here}`, then give --model {here}"
    )


def _folder(path: Path) -> str | None:
    has_weights = (path / WEIGHTS).exists() or (path / INDEX).exists()
    if (path / _ADAPTER).exists() and not has_weights:
        return _adapter(path / _ADAPTER)
    if (path / CONFIG_FILE).exists():
        return None
    if (path / "model_index.json").exists():
        return "is a pipeline of diffusers, not a language model"
    inside = sorted(path.iterdir())
    if files := [x for x in inside if x.suffix == ".gguf"]:
        many = "a GGUF file" if len(files) == 1 else f"{len(files)} GGUF files"
        return f"is a folder with {many}: give the file, --model {files[0]}"
    if snapshots := sorted((path / "snapshots").glob(f"*/{CONFIG_FILE}")):
        return (
            "is a model in the cache of the hub: give its snapshot, --model "
            f"{snapshots[-1].parent}"
        )
    if steps := [x for x in inside if re.fullmatch(r"checkpoint-\d+", x.name)]:
        return f"is a folder of a trainer's checkpoints: give one, --model {steps[-1]}"
    for x in inside:
        if x.suffix in (".safetensors", *_PICKLES):
            return (
                f"holds weights ({x.name}) without their {CONFIG_FILE}: copy it there"
            )
    return None


def _adapter(path: Path) -> str:
    content = read_json(path)
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    of = f" of {base:.80}" if isinstance(base, str) and base else ""
    return (
        f"is a PEFT adapter{of}, not a model: merge it into its base model "
        "(merge_and_unload, then save_pretrained) and give the folder of the result"
    )
