"""Chat templates: a conversation as the text that a model was trained on."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.sandbox

Message = Mapping[str, str]  # role and content


def render(
    template: str, messages: Sequence[Message], *, special: Mapping[str, str]
) -> str:
    """Writes a conversation and the beginning of the answer.

    Templates come with the model's files: they run in a sandbox that reaches no
    attribute, module or file.

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
        extensions=["jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    try:
        return environment.from_string(template).render(
            messages=list(messages), add_generation_prompt=True, **special
        )
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError) as error:
        reason = str(error).splitlines()[0][:200] if str(error) else repr(error)
        raise ValueError(
            f"the model's chat template does not render ({reason})"
        ) from error
    except (OverflowError, RecursionError) as error:
        raise ValueError(
            f"the model's chat template does too much ({error})"
        ) from error


def _refuse(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
