"""What the columns of a table must be, and which arrays are made of them: decided on the driver, followed in the tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ArrayForm", "TableForm"]


@dataclass(frozen=True)
class ArrayForm:
    """One array of a row, and the columns it is made of.

    Attributes:
        key: Its name where x or y is a dict of several arrays.
        columns: Where its values come from. The values of several columns follow one another in one vector.
        shape: The shape in one row, None for a size that may be any; None takes what the first row has. A row whose
            number of values is right gets this shape, whether it came flat or nested.
        dtype: Name of the numpy dtype that wider ones are converted to, float64 to float32 for example; Keras does so anyway,
            later. None keeps that of the columns.
        limits: The least and the greatest value; None for no limit.
        whole: Whether the values must be whole numbers.
        one_hot: If not 0, each value becomes a vector of so many zeros with a one at its place.
        owner: What needs all this, in words for messages: "the model's input 'left'".
    """

    key: str
    columns: tuple[str, ...]
    shape: tuple[int | None, ...] | None = None
    dtype: str | None = None
    limits: tuple[float, float] | None = None
    whole: bool = False
    one_hot: int = 0
    owner: str = "the model"

    @property
    def fixed_shape(self) -> tuple[int, ...] | None:
        """The shape, where none of its sizes may be any."""
        sizes = tuple(size for size in self.shape or () if size is not None)
        return sizes if self.shape is not None and len(sizes) == len(self.shape) else None


@dataclass(frozen=True)
class TableForm:
    """What the rows of a table are made into.

    Attributes:
        x: The arrays of x: one is x itself, several are a dict by their keys.
        y: Likewise; empty where there are no labels.
        weight: The sample weights, or None.
        invalid: What to do with a row that has a null or a NaN: "error" refuses it, "skip" leaves it out, and "keep" takes
            NaN for a number like any other and refuses nulls.
    """

    x: tuple[ArrayForm, ...]
    y: tuple[ArrayForm, ...] = ()
    weight: ArrayForm | None = None
    invalid: str = "keep"

    @classmethod
    def of_columns(
        cls, features: Sequence[str], label: Sequence[str] | None = None, weight: str | None = None
    ) -> TableForm:
        """One array per column, whatever is in it, with the name of the column."""
        x, y = (tuple(ArrayForm(name, (name,)) for name in names or ()) for names in (features, label))
        return cls(x, y, ArrayForm(weight, (weight,)) if weight else None)

    @property
    def arrays(self) -> tuple[ArrayForm, ...]:
        """All of them, in the order of the leaves of a `RowSpec`: x, y, weight, each by its keys."""
        parts = (sorted(part, key=lambda form: form.key) for part in (self.x, self.y))
        return (*(form for part in parts for form in part), *([self.weight] if self.weight else ()))

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of all columns that are needed, each once."""
        ordered = (*self.x, *self.y, *([self.weight] if self.weight else ()))
        return tuple(dict.fromkeys(name for form in ordered for name in form.columns))
