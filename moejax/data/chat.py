"""Messages to the text that a model was trained on, by the Jinja template beside its tokenizer.

Sits under `tokenizer.py`.  A template is a stranger's program: it runs in Jinja's sandbox and sees plain JSON values,
the special tokens and the functions below, as published templates expect them.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from moejax.config import ConfigError

FILE = "chat_template.jinja"


def render(folder: Path, settings: dict[str, Any], messages: Sequence[dict[str, Any]], add_generation_prompt: bool,
           special: dict[str, str]) -> str:
    """The messages as text, ending where the model is to answer if `add_generation_prompt`.

    The template is the chat_template.jinja of a tokenizer's `folder`, else that of `settings`, its
    tokenizer_config.json, or of several there the one named default.  `special` are the special tokens by name.
    Raises ConfigError: no template, no jinja2, or the template is wrong, refuses the messages or leaves the sandbox.
    """
    path, found = folder / FILE, settings.get("chat_template")
    if isinstance(found, list):
        found = next((one.get("template") for one in found if isinstance(one, dict) and one.get("name") == "default"),
                     found)
    if not path.is_file() and not isinstance(found, str):
        raise ConfigError([f"a chat needs a template, or one named default; {folder} has no {FILE}, and in "
                           f"tokenizer_config.json the chat_template {found!r:.80}; put the model's own into {path}, "
                           "or prompt without a chat"])
    try:
        made = environment()
    except ImportError:
        raise ConfigError(["a chat template needs the optional package jinja2, which is not installed; "
                           "pip install 'moejax[hf]'"]) from None
    try:
        template = made.from_string(path.read_text("utf-8") if path.is_file() else found)
        return template.render(messages=json.loads(json.dumps(messages)),  # nothing with methods of its own
                               tools=None, documents=None, add_generation_prompt=add_generation_prompt, **special)
    except Exception as error:  # whatever a stranger's program may raise
        where = path if path.is_file() else folder / "tokenizer_config.json"
        raise ConfigError([f"a chat template must be one of Jinja that takes the messages; that of {where} "
                           f"fails ({type(error).__name__}: {error}); change the messages, or repair it"]) from None


def environment() -> Any:
    """The sandbox in which templates run, a jinja2.Environment."""
    import jinja2  # an optional extra
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %}: what the assistant said, which is for training on it; it stays."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    class Namespace(jinja2.utils.Namespace):
        """What a template puts into it is nothing that Python itself looks up, such as __html__."""

        def __getattribute__(self, name: str) -> Any:
            if name.startswith("__"):
                return object.__getattribute__(self, name)
            return super().__getattribute__(name)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja2's own escapes HTML
    made.globals |= {"raise_exception": raise_exception, "namespace": Namespace,
                     "strftime_now": lambda form: datetime.now().strftime(form),
                     "dict": lambda *args, **kwargs: dict(*args, **kwargs)}
    return made
