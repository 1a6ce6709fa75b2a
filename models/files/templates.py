"""Chat templates in files: one or several by name, in a folder or a GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.files.stored import inside, read_text
from models.text.chat import DEFAULT

FILE = "chat_template.jinja"
MORE = "additional_chat_templates"
_GGUF = "tokenizer.chat_template"


def folder_templates(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates of a Hugging Face folder by name.

    Files of their own come before what tokenizer_config.json says, as in transformers.

    Args:
      folder: may hold chat_template.jinja and additional_chat_templates/NAME.jinja.
      settings: the content of tokenizer_config.json.

    Returns:
      Templates by name; a single one is called "default".

    Raises:
      ValueError: a file cannot be read, or `chat_template` is no template.
    """
    found = {}
    if (folder / FILE).exists():
        found[DEFAULT] = read_text(inside(folder, FILE))
    for path in sorted((folder / MORE).glob("*.jinja")):
        found[path.stem] = read_text(inside(folder / MORE, path.name))
    return found or _listed(settings.get("chat_template"))


def gguf_templates(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Those of a GGUF file, which names further ones by the ends of its fields."""
    found = {}
    for name, template in metadata.items():
        if isinstance(template, str) and name.startswith(_GGUF):
            found[name.removeprefix(_GGUF).removeprefix(".") or DEFAULT] = template
    return found


def _listed(content: Any) -> dict[str, str]:
    """One template, or several as a list of names and templates."""
    if content is None:
        return {}
    if isinstance(content, str):
        return {DEFAULT: content}
    if isinstance(content, list) and all(isinstance(x, dict) for x in content):
        pairs = [(x.get("name"), x.get("template")) for x in content]
        if all(isinstance(x, str) for pair in pairs for x in pair):
            return dict(pairs)
    raise ValueError(
        "chat_template must be a text or a list of objects with name and template, "
        f"got {content!r:.80}"
    )
