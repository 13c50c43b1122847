"""Every experiment can be started, and its variants cost what their description states."""

import pytest

from fimserver.training.experiments import EXPERIMENTS, count_operations, recipe_of
from fimserver.training.recipe import Recipe


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_variant_is_a_recipe(name: str) -> None:
    experiment = EXPERIMENTS[name]
    recipes = [recipe_of(experiment, changes) for changes in experiment.variants.values()]
    assert len(recipes) == len(set(recipes)) > 1
    if experiment.measured is not None:
        recipe_of(experiment, experiment.measured)


def test_operations_grow_with_the_computation() -> None:
    base = count_operations(Recipe())
    for more in ("canvases", "layers", "hidden", "clean", "vocabulary"):
        assert count_operations(Recipe().with_values({more: 2 * getattr(Recipe(), more)})) > 1.1 * base
    assert count_operations(Recipe(second_pass=0.0)) < base
    # Of a sequence alone: twice the weights for each position forward, twice that back, and attention.
    alone = Recipe(canvases=1, canvas=1, second_pass=0.0, clean=1000, hidden=64, layers=1, heads=1, key_value_heads=1)
    weights = 2 * 64 * 64 * 2 + 3 * 64 * (512 + 256) + 8192 * 64
    attention = 2 * 64 * (1000 * 1000 / 2 + 501)
    assert count_operations(alone) == pytest.approx(6 * (1001 * weights + attention))
