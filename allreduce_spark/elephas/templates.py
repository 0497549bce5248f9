"""Functions with templates of hyperas, such as `Dropout({{uniform(0, 1)}})`, read into a search space and a plain function.

Two pairs of braces around a call are Python: a set in a set. It could never be run, so that no other code looks like it. Such a
function is read as a syntax tree; each template becomes a look-up in the setting that is tried, and each `something.fit(...)`
a call that can be told what fitting means.
"""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

import numpy as np

from allreduce_spark.errors import ConfigError

__all__ = ["Template", "read_template"]

SETTING, FIT = "__setting__", "__fit__"
OF_FIT = {"nb_epoch": "epochs", "epochs": "epochs", "batch_size": "batch_size"}  # argument of fit -> word of a search


def _steps(low: float, high: float, q: float) -> list[float]:
    return [float(value) for value in np.arange(low, high + q / 2, q)]


# Distributions of hyperas -> the space of `allreduce_spark.spark.tuning.search`.
DISTRIBUTIONS: dict[str, Callable[..., Any]] = {
    "choice": list,
    "uniform": lambda low, high: (float(low), float(high)),
    "loguniform": lambda low, high: (math.exp(low), math.exp(high), "log"),
    "quniform": _steps,
    "randint": lambda upper: (0, upper - 1),
}


@dataclass(frozen=True)
class Template:
    """A function with templates.

    Attributes:
        name: Of the function.
        space: Name -> what values a template may take, as `search` reads it.
        code: The function without templates.
        scope: The names that it can see.
    """

    name: str
    space: dict[str, Any]
    code: CodeType
    scope: Mapping[str, Any]

    def run(self, setting: Mapping[str, Any], fit: Callable[..., Any], values: Sequence[Any]) -> Any:
        """Call the function.

        Args:
            setting: Name -> value, for each name of the space.
            fit: What `something.fit(...)` does in it; called as `fit(something, ...)`.
            values: The positional arguments.
        """
        scope = {**self.scope, SETTING: setting, FIT: fit}
        exec(self.code, scope)  # noqa: S102 - the user's own function
        return scope[self.name](*values)

    def first_setting(self) -> dict[str, Any]:
        """One setting of the space."""
        return {name: values[0] for name, values in self.space.items()}


def read_template(function: Callable[..., Any]) -> Template:
    """Read a function.

    Raises:
        ConfigError: Its source is not to be had, or it has no templates, or one that is not understood.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError) as error:
        raise ConfigError(
            f"the source of {function!r} cannot be read: {error}. Define it with `def`, in a file."
        ) from error
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef):
        raise ConfigError(f"{function!r} is not defined with `def`, so its templates cannot be read.")
    definition.decorator_list = []
    scope = {**function.__globals__, **inspect.getclosurevars(function).nonlocals}
    reader = _Reader(scope)
    tree = ast.fix_missing_locations(reader.visit(tree))
    if not reader.space:
        raise ConfigError(
            f"{definition.name}() has no templates such as {{{{uniform(0, 1)}}}}: there is nothing to search."
        )
    return Template(definition.name, reader.space, compile(tree, inspect.getfile(function), "exec"), scope)


class _Reader(ast.NodeTransformer):
    def __init__(self, scope: Mapping[str, Any]) -> None:
        self._scope = {**scope, **DISTRIBUTIONS}
        self._hint = ""
        self.space: dict[str, Any] = {}

    def visit_Call(self, node: ast.Call) -> ast.AST:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        fits = name == "fit" and isinstance(node.func, ast.Attribute)
        node.func = self.visit(node.func)
        node.args = [self._named(name, argument) for argument in node.args]
        for keyword in node.keywords:
            word = OF_FIT.get(str(keyword.arg), keyword.arg) if fits else f"{name}_{keyword.arg}"
            keyword.value = self._named(str(word), keyword.value)
        if fits:
            assert isinstance(node.func, ast.Attribute)
            node.args.insert(0, node.func.value)
            node.func = ast.Name(FIT, ast.Load())
        return node

    def visit_Set(self, node: ast.Set) -> ast.AST:
        inner = node.elts[0]
        if len(node.elts) > 1 or not isinstance(inner, ast.Set) or len(inner.elts) > 1:
            return self.generic_visit(node)
        call = inner.elts[0]
        distribution = getattr(getattr(call, "func", None), "id", None)
        if distribution not in DISTRIBUTIONS:
            raise ConfigError(
                f"the template {{{{{ast.unparse(call)}}}}} is not understood: there are {sorted(DISTRIBUTIONS)}."
            )
        base = name = self._hint or str(distribution)
        while name in self.space:
            name = f"{base}_{sum(other.startswith(base) for other in self.space)}"
        expression = ast.fix_missing_locations(ast.Expression(call))
        self.space[name] = eval(compile(expression, "<template>", "eval"), self._scope)
        return ast.Subscript(ast.Name(SETTING, ast.Load()), ast.Constant(name), ast.Load())

    def _named(self, hint: str, node: ast.expr) -> Any:
        before, self._hint = self._hint, hint
        try:
            return self.visit(node)
        finally:
            self._hint = before
