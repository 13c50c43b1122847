"""Schedule a run: its end, and a learning rate that is flat, then falls over the last part.

Knows:  steps, seconds.  Never: the model.
"""

from dataclasses import dataclass

from fimserver.training.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Budget:
    """Either hours of wall time from now on, or the total number of steps."""

    hours: float | None = None
    steps: int | None = None


@dataclass(slots=True)
class State:
    """Progress of a run; ``warm_steps`` counts from the last warm-up."""

    step: int = 0
    rows: int = 0
    positions: int = 0
    seconds: float = 0.0
    warm_steps: int = 0


class Schedule:
    """Progress through a budget, and the share of the full rate at each step."""

    def __init__(self, budget: Budget, state: State, recipe: Recipe) -> None:
        self._recipe = recipe
        self._in_steps = budget.steps is not None
        self._begin = 0.0 if self._in_steps else state.seconds
        self._limit = float(budget.steps) if budget.steps is not None else 3600.0 * (budget.hours or 0.0)

    def progress(self, state: State) -> float:
        """Return the spent share of the budget, 1 at its end."""
        return min(1.0, self._used(state) / self._limit) if self._limit > 0 else 1.0

    def end_soon(self, state: State) -> None:
        """Begin the fall of the rate now, unless it has begun."""
        if self._recipe.fall < 1:
            self._limit = min(self._limit, self._used(state) / (1 - self._recipe.fall))

    def rate(self, state: State) -> float:
        """Return the share of the recipe's rates for the next step."""
        recipe, progress = self._recipe, self.progress(state)
        warm = min(1.0, (state.warm_steps + 1) / max(1, recipe.warmup_steps))
        if progress < 1 - recipe.fall:
            return warm
        return warm * max(recipe.last_rate, (1 - progress) / recipe.fall)

    def _used(self, state: State) -> float:
        return state.step if self._in_steps else state.seconds - self._begin
