"""What may import what: read from the source, so that a late import counts too."""

import ast
import typing
from pathlib import Path

import pytest

import moejax
from moejax import config as configs
from moejax.model.dispatch import DISPATCHERS
from moejax.model.layers import ACTIVATIONS
from moejax.model.router import ROUTERS
from moejax.train.optimizer import OPTIMIZERS, SCHEDULES

ROOT = Path(moejax.__file__).parent
FILES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
# A package imports from those below it; those of one level do not know one another.
ORDER = ("config", "parallel", "model data", "train serve hf", "plan", "api", "cli")
LEVELS = {name: level for level, names in enumerate(ORDER) for name in names.split()}


def imports(tree: ast.AST) -> list[str]:
    """Every module imported anywhere below a node, as "package.module" or "package.module.name"."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def ours(tree: ast.AST) -> set[str]:
    return {name.split(".")[1] for name in imports(tree) if name.startswith("moejax.")}


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name):
    tree = ast.parse(FILES[name].read_text())
    here = name.split("/")[0].removesuffix(".py")
    if here != "__init__":
        above = {other for other in ours(tree) if other != here and LEVELS[other] >= LEVELS[here]}
        assert not above, f"{name} imports {above}"
    late = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and ours(node)]
    assert not late or name in ("cli.py", "__init__.py"), f"{late[0].name} imports moejax inside"
    roots = {each.split(".")[0] for each in imports(tree)}
    quick = here in ("config", "cli", "data", "__init__")
    assert not quick or not roots & {"jax", "flax", "optax", "orbax"}, f"{name} imports jax"
    assert not [each for each in imports(tree) if "_src" in each.split(".")], "private parts change without notice"
    assert Path(name).name != "utils.py", "a file says what it is for"


@pytest.mark.parametrize("group, field, table", [
    (configs.MoE, "router", ROUTERS), (configs.MoE, "dispatcher", DISPATCHERS),
    (configs.Model, "activation", ACTIVATIONS), (configs.Optimizer, "name", OPTIMIZERS),
    (configs.Optimizer, "schedule", SCHEDULES)])
def test_the_config_offers_what_the_tables_hold(group, field, table):
    assert set(typing.get_args(typing.get_type_hints(group)[field])) == set(table)
