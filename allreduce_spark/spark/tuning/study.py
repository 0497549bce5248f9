"""Which settings to try next, and which trial to give up: optuna's samplers and pruners. The only file that imports optuna."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal

from allreduce_spark.errors import ConfigError, MissingDependencyError

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.trial import Trial

__all__ = ["Direction", "State", "Study"]

Direction = Literal["minimize", "maximize"]
State = Literal["complete", "pruned", "stopped", "failed"]

# Successive halving looks at trials after 1/9 and 1/3 of their epochs, and lets one in three go on. It could look earlier, but
# then to begin a trial costs more than is saved.
REDUCTION_FACTOR, RUNGS = 3, 2


class Study:
    """What has been tried so far. Samplers are not made for threads: all of a study belongs to the thread that makes it.

    Args:
        space: Name -> what values it may take. A list is a choice among its elements; a tuple `(low, high)` is a range, of
            integers if both ends are, and `(low, high, "log")` one whose orders of magnitude are equally likely; both ends
            are part of a range. Anything else is a distribution of `optuna.distributions`.
        direction: Whether a small or a large value is good.
        sampler: "tpe", "random", or a sampler of `optuna.samplers`.
        pruner: "asha" (successive halving without waiting), None to let all trials go on to their end, or a pruner of
            `optuna.pruners`.
        epochs: How long a trial is, where it is known: from it "asha" reckons when to look for the first time.
        seed: Of "tpe" and "random".

    Raises:
        ConfigError: The space, the sampler or the pruner is none.
        MissingDependencyError: optuna is not installed.
    """

    def __init__(
        self,
        space: Mapping[str, Any],
        *,
        direction: Direction,
        sampler: str | BaseSampler,
        pruner: str | BasePruner | None,
        epochs: int | None,
        seed: int,
    ) -> None:
        try:
            import optuna
        except ModuleNotFoundError as error:
            raise MissingDependencyError(
                "a search needs optuna, which is not installed: pip install allreduce-spark[search]"
            ) from error
        if not isinstance(space, Mapping) or not space:
            raise ConfigError(f"the space must be a dict from names to what values they may take, got {space!r}.")
        self._choices = {name: list(values) for name, values in space.items() if _needs_numbers(values)}
        numbered = {name: list(range(len(values))) for name, values in self._choices.items()}
        self._space = {name: _distribution(name, values) for name, values in {**space, **numbered}.items()}
        with _quiet(optuna):
            self._study = optuna.create_study(
                direction=direction, sampler=_sampler(sampler, seed), pruner=_pruner(pruner, epochs)
            )
        self._running: dict[int, Trial] = {}
        self.exhausted = False
        # What a GridSampler calls when nothing is left; optuna's own `stop` works in optuna's own loop only.
        self._study.stop = self._be_exhausted  # type: ignore[method-assign]

    def ask(self) -> tuple[int, dict[str, Any]]:
        """(number, params) of a new trial; numbers count from 0."""
        trial = self._study.ask(self._space)
        self._running[trial.number] = trial
        return trial.number, {
            name: self._choices[name][value] if name in self._choices else value for name, value in trial.params.items()
        }

    def is_hopeless(self, number: int, epochs: int, value: float) -> bool:
        """Take note that trial `number` has come to `value` after so many epochs; return whether to give it up."""
        trial = self._running[number]
        trial.report(value, epochs)
        return trial.should_prune()

    def tell(self, number: int, state: State, value: float | None) -> None:
        """How a trial ended; `value` counts for a complete one only."""
        from optuna.trial import TrialState

        trial = self._running.pop(number)
        if state == "complete":
            self._study.tell(trial, value)
        else:
            self._study.tell(trial, state=TrialState.PRUNED if state == "pruned" else TrialState.FAIL)

    def _be_exhausted(self) -> None:
        self.exhausted = True


def _distribution(name: str, values: Any) -> BaseDistribution:
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

    if not isinstance(name, str):
        raise ConfigError(f"the space has the key {name!r}; keys are names.")
    if isinstance(values, BaseDistribution):
        return values
    try:
        if isinstance(values, list) and values:
            return CategoricalDistribution(values)
        if isinstance(values, tuple) and len(values) in (2, 3) and set(values[2:]) <= {"log"}:
            low, high = values[:2]
            if all(isinstance(end, Integral) and not isinstance(end, bool) for end in (low, high)):
                return IntDistribution(int(low), int(high), log=len(values) == 3)
            if all(isinstance(end, Real) and not isinstance(end, bool) for end in (low, high)):
                return FloatDistribution(float(low), float(high), log=len(values) == 3)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the space has {name!r}: {values!r}, which optuna refuses: {error}") from error
    raise ConfigError(
        f"the space has {name!r}: {values!r}; expected a list of choices, a range (low, high) or (low, high, 'log'), or a "
        "distribution of optuna.distributions."
    )


def _needs_numbers(values: Any) -> bool:
    """Whether these are choices of which optuna can only be told the numbers: tuples of layer sizes, say, or functions."""
    simple = (bool, int, float, str, type(None))
    return isinstance(values, list) and not all(isinstance(value, simple) for value in values)


def _sampler(sampler: str | BaseSampler, seed: int) -> BaseSampler:
    from optuna import samplers

    if sampler == "tpe":
        # Trials that still run count as bad ones, so that those beside them try something else.
        return samplers.TPESampler(seed=seed, constant_liar=True)
    if sampler == "random":
        return samplers.RandomSampler(seed=seed)
    if isinstance(sampler, samplers.BaseSampler):
        return sampler
    raise ConfigError(f"sampler must be 'tpe', 'random' or a sampler of optuna.samplers, got {sampler!r}.")


def _pruner(pruner: str | BasePruner | None, epochs: int | None) -> BasePruner:
    from optuna import pruners

    if pruner is None:
        return pruners.NopPruner()
    if pruner == "asha":
        first_rung = max(1, (epochs or 1) // REDUCTION_FACTOR**RUNGS)
        return pruners.SuccessiveHalvingPruner(min_resource=first_rung, reduction_factor=REDUCTION_FACTOR)
    if isinstance(pruner, pruners.BasePruner):
        return pruner
    raise ConfigError(f"pruner must be 'asha', None or a pruner of optuna.pruners, got {pruner!r}.")


@contextlib.contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Without the line that a study was created, and the warnings that an argument may change some day."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(verbosity)
