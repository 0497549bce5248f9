"""What one row looks like: `RowSpec`, the structure, dtypes and shapes of x, y and sample_weight.

Every block carries the spec of its rows, so that rows of different shapes meet in a `DataError` with both shapes in it
before a rank starts, and so that a rank without rows can still make batches of the right shape.

One value of a row is either one array, or a structure of arrays: a dict, or a tuple or list. Which of the two a tuple
or list is: **it is several arrays exactly if one of its elements is an array or again a structure; a list or tuple of
plain numbers, or of lists of plain numbers, is one array.** So `[0.5, 1.0]` is one vector, and `[np.zeros(3), 1.0]` is
two inputs. Numpy scalars count as plain numbers. A dict is always a structure; its keys are sorted, as Keras does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from allreduce_spark.errors import DataError

__all__ = ["LeafSpec", "NestSpec", "RowSpec", "common_spec", "describe", "difference", "flatten", "unflatten"]

STRING = "string"


@dataclass(frozen=True)
class LeafSpec:
    """One array of a row.

    Attributes:
        name: Where it is, as Python would write it: "x", "y[1]", "x['image']".
        dtype: Name of the numpy dtype, "bool" to "float64", or "string".
        shape: Shape in one row: () for a scalar.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def values_per_row(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype of the arrays that `Shard.take` returns: object for strings."""
        return np.dtype(object if self.dtype == STRING else self.dtype)

    def zeros(self, rows: int) -> np.ndarray:
        fill: Any = "" if self.dtype == STRING else 0
        return np.full((rows, *self.shape), fill, dtype=self.numpy_dtype)

    def __str__(self) -> str:
        return f"{self.dtype} of shape {self.shape}"


@dataclass(frozen=True)
class NestSpec:
    """A structure of arrays.

    Attributes:
        name: Where it is, like the name of a leaf.
        kind: "dict", "tuple" or "list".
        keys: The sorted keys of a dict; empty for a tuple or list.
        parts: The arrays or structures in it, in the order of `keys`.
    """

    name: str
    kind: str
    keys: tuple[str, ...]
    parts: tuple[Structure, ...]

    def __str__(self) -> str:
        return (
            f"a dict with the keys {list(self.keys)}" if self.kind == "dict" else f"a {self.kind} of {len(self.parts)}"
        )


Structure = LeafSpec | NestSpec


@dataclass(frozen=True)
class RowSpec:
    """The structure of one row: x, y and sample_weight; y and sample_weight are None where the rows have none."""

    x: Structure
    y: Structure | None = None
    sample_weight: Structure | None = None

    @property
    def leaves(self) -> tuple[LeafSpec, ...]:
        """All arrays of a row in the order of their columns: those of x, then y, then sample_weight."""
        return tuple(
            leaf for part in (self.x, self.y, self.sample_weight) if part is not None for leaf in _leaves(part)
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row in memory. A string counts as its offset alone, because its length is not known here."""
        width = {leaf: 8 if leaf.dtype == STRING else leaf.numpy_dtype.itemsize for leaf in self.leaves}
        return sum(leaf.values_per_row * width[leaf] for leaf in self.leaves)

    def pack(self, columns: Sequence[Any]) -> tuple[Any, Any, Any]:
        """Put one value per leaf back into the structure of the user: (x, y or None, sample_weight or None)."""
        source = iter(columns)
        parts = (self.x, self.y, self.sample_weight)
        x, y, sample_weight = (None if part is None else unflatten(part, source) for part in parts)
        return x, y, sample_weight

    def zeros(self, rows: int) -> tuple[Any, Any, Any]:
        """A batch of `rows` dummy rows, as a rank with an empty shard needs it: zeros, False and empty strings."""
        return self.pack([leaf.zeros(rows) for leaf in self.leaves])

    def with_dtypes(self, dtypes: Sequence[str]) -> RowSpec:
        """The same structure with other dtypes, one per leaf."""
        leaves = (replace(leaf, dtype=dtype) for leaf, dtype in zip(self.leaves, dtypes, strict=True))
        parts = (self.x, self.y, self.sample_weight)
        x, y, sample_weight = (None if part is None else _map_leaves(part, lambda _: next(leaves)) for part in parts)
        assert x is not None  # for mypy: only y and sample_weight may be missing
        return RowSpec(x, y, sample_weight)

    def to_json(self) -> str:
        """The spec as JSON text, the inverse of `from_json`."""
        parts = {"x": self.x, "y": self.y, "sample_weight": self.sample_weight}
        return json.dumps({key: None if part is None else _to_tree(part) for key, part in parts.items()})

    @staticmethod
    def from_json(text: str) -> RowSpec:
        """Read what `to_json` wrote.

        Raises:
            DataError: The text is something else.
        """
        try:
            tree = json.loads(text)
            y, sample_weight = (_from_tree(tree[key]) if tree[key] else None for key in ("y", "sample_weight"))
            return RowSpec(_from_tree(tree["x"]), y, sample_weight)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"this is not the JSON text of a RowSpec: {text[:200]!r}") from error


def difference(first: RowSpec, second: RowSpec, names: tuple[str, str] = ("the first", "the second")) -> str | None:
    """Say in one sentence where two specs differ first, or None where they are equal.

    >>> one = RowSpec(LeafSpec("x", "float32", (3,)), LeafSpec("y", "int64", ()))
    >>> two = RowSpec(LeafSpec("x", "float32", (4,)), LeafSpec("y", "int64", ()))
    >>> difference(one, two, ("partition 0", "partition 7"))
    'x is float32 of shape (3,) in partition 0, but float32 of shape (4,) in partition 7'
    """
    for name in ("x", "y", "sample_weight"):
        sentence = _difference(name, getattr(first, name), getattr(second, name), names)
        if sentence:
            return sentence
    return None


def common_spec(first: RowSpec, second: RowSpec, names: tuple[str, str] = ("the first", "the second")) -> RowSpec:
    """The spec that holds the rows of both: they must be equal, but for int64 in the one where the other has float64.

    Python numbers are the reason: a partition whose values happen to be whole, such as `[1, 2]`, is int64, and its
    neighbour with `[0.5, 2]` is float64. No other dtypes are mixed: the result may not depend on the order of arrival.

    Raises:
        DataError: They differ in anything else.
    """
    pairs = list(zip(first.leaves, second.leaves, strict=False))
    mixable = all(one.dtype == other.dtype or {one.dtype, other.dtype} == {"int64", "float64"} for one, other in pairs)
    if mixable and len(first.leaves) == len(second.leaves):
        # whatever differs is int64 in the one and float64 in the other
        dtypes = [one.dtype if one.dtype == other.dtype else "float64" for one, other in pairs]
        if first.with_dtypes(dtypes) == second.with_dtypes(dtypes):
            return first.with_dtypes(dtypes)
    raise DataError(
        f"the rows do not have the same form everywhere: {difference(first, second, names)}. "
        "All rows of a fit need the same structure, shapes and dtypes; mend the map function that makes them."
    )


def describe(value: Any, name: str, leaf_of: Callable[[Any, str], LeafSpec]) -> Structure:
    """The structure of a user's value.

    Args:
        value: One array, or a dict, tuple or list of arrays; see the module's docstring.
        name: What to call it in messages.
        leaf_of: Gives the `LeafSpec` of one array, from its value and name; raises `DataError` if it cannot.

    Raises:
        DataError: A structure is empty, or has a key that is not a string.
    """
    if not is_structure(value):
        return leaf_of(value, name)
    if len(value) == 0:
        raise DataError(f"{name} is an empty {type(value).__name__}: it needs at least one array")
    if isinstance(value, dict):
        strange = next((key for key in value if not isinstance(key, str)), None)
        if strange is not None:
            raise DataError(
                f"{name} has the key {strange!r}: the keys must be strings, the names of the model's inputs"
            )
        keys = tuple(sorted(value))
        parts = tuple(describe(value[key], f"{name}[{key!r}]", leaf_of) for key in keys)
        return NestSpec(name, "dict", keys, parts)
    parts = tuple(describe(item, f"{name}[{index}]", leaf_of) for index, item in enumerate(value))
    return NestSpec(name, "list" if isinstance(value, list) else "tuple", (), parts)


def flatten(structure: Structure, value: Any) -> Iterator[Any]:
    """The arrays of one value, in the order of the leaves of `structure`.

    Raises:
        DataError: The value has another structure.
    """
    if isinstance(structure, LeafSpec):
        if isinstance(value, dict):
            raise DataError(f"{structure.name} is a dict, but {structure} in the first row")
        yield value
        return
    expected = {"dict": dict, "tuple": tuple, "list": list}[structure.kind]
    if not isinstance(value, expected):
        raise DataError(f"{structure.name} is of type {type(value).__name__}, but {structure} in the first row")
    if len(value) != len(structure.parts) or (structure.keys and not value.keys() >= set(structure.keys)):
        found = f"a dict with the keys {list(value)}" if structure.keys else f"a {structure.kind} of {len(value)}"
        raise DataError(f"{structure.name} is {found}, but {structure} in the first row")
    items = (value[key] for key in structure.keys) if structure.keys else iter(value)
    for part, item in zip(structure.parts, items, strict=True):
        yield from flatten(part, item)


def unflatten(structure: Structure, arrays: Iterator[Any]) -> Any:
    """Take as many arrays from the iterator as `structure` has leaves, and put them into its form."""
    if isinstance(structure, LeafSpec):
        return next(arrays)
    items = [unflatten(part, arrays) for part in structure.parts]
    if structure.kind == "dict":
        return dict(zip(structure.keys, items, strict=True))
    return tuple(items) if structure.kind == "tuple" else items


def is_structure(value: Any) -> bool:
    """Whether a value is several arrays rather than one; the rule is in the module's docstring."""
    if isinstance(value, dict):
        return True
    return isinstance(value, (tuple, list)) and any(is_array(item) or is_structure(item) for item in value)


def is_array(value: Any) -> bool:
    """Whether a value is an array of its own: of numpy, pandas or a tensor, or a Spark vector, which has `toArray`."""
    if isinstance(value, (np.generic, str, bytes, int, float, tuple, list)):
        return False
    return isinstance(value, np.ndarray) or hasattr(value, "__array__") or hasattr(value, "toArray")


def _leaves(structure: Structure) -> Iterator[LeafSpec]:
    if isinstance(structure, LeafSpec):
        yield structure
    else:
        for part in structure.parts:
            yield from _leaves(part)


def _map_leaves(structure: Structure, change: Callable[[LeafSpec], LeafSpec]) -> Structure:
    if isinstance(structure, LeafSpec):
        return change(structure)
    return replace(structure, parts=tuple(_map_leaves(part, change) for part in structure.parts))


def _difference(name: str, first: Structure | None, second: Structure | None, names: tuple[str, str]) -> str | None:
    if first == second:
        return None
    if isinstance(first, NestSpec) and isinstance(second, NestSpec) and str(first) == str(second):
        pairs = zip(first.parts, second.parts, strict=True)
        return next(filter(None, (_difference(one.name, one, other, names) for one, other in pairs)), None)
    one, other = ("missing" if part is None else str(part) for part in (first, second))
    return f"{name} is {one} in {names[0]}, but {other} in {names[1]}"


def _to_tree(part: Structure) -> dict[str, Any]:
    if isinstance(part, LeafSpec):
        return {"name": part.name, "dtype": part.dtype, "shape": list(part.shape)}
    parts = [_to_tree(item) for item in part.parts]
    return {"name": part.name, "kind": part.kind, "keys": list(part.keys), "parts": parts}


def _from_tree(tree: dict[str, Any]) -> Structure:
    if "dtype" in tree:
        return LeafSpec(tree["name"], tree["dtype"], tuple(tree["shape"]))
    parts = tuple(_from_tree(item) for item in tree["parts"])
    return NestSpec(tree["name"], tree["kind"], tuple(tree["keys"]), parts)
