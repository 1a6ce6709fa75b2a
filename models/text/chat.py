"""Chat templates: a conversation as the text that a model was trained on."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

Message = Mapping[str, str]  # role and content
DEFAULT = "default"
"""The template that is used unless another is named."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what trainers learn from; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def render(
    template: str, messages: Sequence[Message], *, special: Mapping[str, str]
) -> str:
    """Writes a conversation and the beginning of the answer, as `transformers` does.

    Templates come with the model's files: they run in a sandbox that reaches no
    attribute, module or file. They are told that there are no tools and no documents.

    Args:
      template: Jinja, as in tokenizer_config.json or a GGUF file.
      messages: each with a role ("system", "user", "assistant") and its content.
      special: bos_token, eos_token and whatever else the template asks for.

    Returns:
      The text, special tokens written out.

    Raises:
      ValueError: the template is damaged, does too much, or refuses the conversation.
    """
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    try:
        return environment.from_string(template).render(
            messages=list(messages),
            add_generation_prompt=True,
            tools=None,
            documents=None,
            **special,
        )
    except _DOES_NOT_RENDER as error:
        reason = str(error).splitlines()[0][:200] if str(error) else repr(error)
        raise ValueError(
            f"the model's chat template does not render ({reason})"
        ) from error
    except RecursionError as error:
        raise ValueError(
            f"the model's chat template does too much ({error})"
        ) from error


_DOES_NOT_RENDER = (jinja2.TemplateError, ArithmeticError, LookupError, TypeError)
_DOES_NOT_RENDER += (ValueError, AttributeError)


def chosen(templates: Mapping[str, str], name: str | None) -> str:
    """A model's template by its name; without one, the default.

    Raises:
      ValueError: there is none of that name; the message lists those there are.
    """
    if not templates:
        raise ValueError(
            "the model has no chat template: it continues texts, without --chat"
        )
    if (name or DEFAULT) not in templates:
        raise ValueError(
            f"the model has no chat template called {name or DEFAULT!r}: name one of "
            f"{', '.join(sorted(templates))}"
        )
    return templates[name or DEFAULT]


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter with the options that `transformers` gives it; nothing is escaped."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
