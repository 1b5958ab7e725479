"""Messages to the text that a model was trained on, by the Jinja template beside its tokenizer.

Sits under `tokenizer.py`.  A template is a stranger's program: it runs in Jinja's sandbox and sees plain JSON values,
the special tokens and the functions below, as published templates expect them.
"""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from moejax.config import ConfigError

FILE = "chat_template.jinja"


def find_template(folder: Path, settings: dict[str, Any]) -> tuple[str, str]:
    """(where it stands, text) of the chat template of a tokenizer's folder.  Raises ConfigError without one.

    `settings`, the tokenizer_config.json, may hold one template, or several with names, of which the one named default
    counts.  A chat_template.jinja goes before them.
    """
    path, inside = folder / FILE, folder / "tokenizer_config.json"
    if path.is_file():
        try:
            return str(path), path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError([f"a chat template must be a readable UTF-8 text; {path} is not ({error}); "
                               "repair it"]) from None
    match settings.get("chat_template"):
        case str(text):
            return str(inside), text
        case [*several] if all(isinstance(one, dict) for one in several):
            named = {one.get("name"): one.get("template") for one in several}
            if isinstance(named.get("default"), str):
                return str(inside), named["default"]
            found = f"{inside} has templates named {', '.join(map(str, named)) or 'nothing'}"
        case None:
            found = f"{folder} has no {FILE}, and no chat_template in a tokenizer_config.json"
        case other:
            found = f"{inside} has one of type {type(other).__name__}"
    raise ConfigError([f"a chat needs a template, or one named default; {found}; "
                       f"put the model's own into {path}, or prompt without a chat"])


def render(where: str, template: str, messages: Sequence[dict[str, Any]], add_generation_prompt: bool,
           special: dict[str, str]) -> str:
    """The messages as text, ending where the model is to answer if `add_generation_prompt`.

    `where` the template stands is for messages of errors; `special` are the special tokens by name.
    Raises ConfigError: no jinja2, or the template is wrong, refuses the messages or leaves the sandbox.
    """
    try:
        import jinja2  # an optional extra
    except ImportError:
        raise ConfigError(["a chat template needs the optional package jinja2, which is not installed; "
                           "pip install 'moejax[hf]'"]) from None
    try:
        compiled = environment().from_string(template)
    except jinja2.TemplateError as error:
        raise ConfigError([f"a chat template must be one of Jinja; that of {where} is not ({error}); "
                           "repair it, or prompt without a chat"]) from None
    try:
        return compiled.render(messages=json.loads(json.dumps(messages)),  # nothing with methods of its own
                               tools=None, documents=None, add_generation_prompt=add_generation_prompt, **special)
    except Exception as error:  # whatever a stranger's program may raise
        raise ConfigError([f"a chat template must take the messages; that of {where} does not "
                           f"({type(error).__name__}: {error}); change the messages or the template"]) from None


def environment() -> Any:
    """The sandbox in which templates run, a jinja2.Environment."""
    import jinja2
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
        """Without names that Python itself looks up."""

        def __init__(*args: Any, **kwargs: Any):  # as jinja2's, so that `self` is a name like any other
            jinja2.utils.Namespace.__init__(args[0])
            for name, value in dict(*args[1:], **kwargs).items():
                args[0][name] = value

        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace holds no name that starts with _; got {name!r}")
            super().__setitem__(name, value)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None,
                sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = to_json  # jinja2's own escapes HTML
    made.globals |= {"raise_exception": raise_exception, "namespace": Namespace,
                     "strftime_now": lambda form: datetime.now().strftime(form),
                     "dict": lambda *args, **kwargs: dict(*args, **kwargs)}
    return made
