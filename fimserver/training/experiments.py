"""Change one part of the recipe, at equal compute, and measure the same held-out rows.

``python -m fimserver.training.command`` runs these experiments.

Each variant trains for the same number of floating-point operations, counted from its shape and not by the clock, so
other load on the machine favours none. All start from the same weights, or all from none, read rows of the same seed,
and end with a falling rate. Held-out rows are the same, too, unless a variant changes the rows. The runs are short:
they show what helps soon, at this size.

Knows:  the trainer, recipes.  Never: LSP.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fimserver.errors import FimserverError
from fimserver.training.learning_rate import Budget
from fimserver.training.measures import HeldOut
from fimserver.training.recipe import Recipe
from fimserver.training.run_state import prepare_base
from fimserver.training.trainer import Machine, Material, Trainer

_FORWARD_AND_BACK = 3  # times a forward pass
_BASE: Mapping[str, float] = {
    "clean": 384,
    "max_suffix": 120,
    "max_head": 64,
    "max_snippets": 64,
    "warmup_steps": 5,
}
_FRESH: Mapping[str, float] = {"rows_per_step": 4}  # few rows per step train faster at first


@dataclass(frozen=True, slots=True)
class Experiment:
    """A question, and the changes of each variant; ``fresh`` starts without weights."""

    question: str
    variants: Mapping[str, Mapping[str, float]]
    fresh: bool = False
    measured: Mapping[str, float] | None = None  # changes for the held-out rows, if variants differ in their rows
    longest_middle: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a variant."""

    experiment: str
    variant: str
    steps: int
    positions: int
    seconds: float
    held_out: HeldOut


EXPERIMENTS: dict[str, Experiment] = {
    "noise": Experiment(
        "Which noise: as in decoding, any share of the truth, or both?",
        {
            "any share": {"pure_noise": 0.0, "decoding_noise": 0.0, "left_noise": 0.0},
            "as decoded": {"decoding_noise": 1.0, "left_noise": 0.0},
            "known beginning": {"decoding_noise": 0.0, "left_noise": 1.0},
            "mixed": {"pure_noise": 0.75, "decoding_noise": 0.4, "left_noise": 0.35},
        },
    ),
    "second-pass": Experiment(
        "How many passes are followed by one conditioned on them?",
        {"none": {"second_pass": 0.0}, "half": {"second_pass": 0.5}, "all": {}},
    ),
    "near-tokens": Experiment(
        "Does a canvas token weigh less, the farther it is from the known ones?",
        {
            "alike": {},
            "half": {"far_token": 0.5},
            "a tenth": {"far_token": 0.1},
            "a tenth, far": {"far_token": 0.1, "reach": 8.0},
        },
    ),
    "canvases": Experiment(
        "How many canvases per row?",
        {"2": {"canvases": 2}, "6": {}, "12": {"canvases": 12}},
        measured={},
    ),
    "canvas-length": Experiment(
        "How long is a canvas?",
        {
            "16": {"canvas": 16, "canvases": 12, "clean": 480},
            "32": {"clean": 480},
            "64": {"canvas": 64, "canvases": 3, "clean": 480},
            "128": {"canvas": 128, "canvases": 2, "clean": 480},
        },
        longest_middle=15,
    ),
    "next-token": Experiment(
        "Which weight of next-token prediction, with 1 for denoising?",
        {"0.25": {"next_token": 0.25}, "1": {}, "4": {"next_token": 4.0}},
    ),
    "experts": Experiment(
        "Several experts, split from the one?",
        {"1": {}, "4, one of them": {"experts": 4}, "4, two of them": {"experts": 4, "top_k_experts": 2}},
    ),
    "context": Experiment(
        "How long is a clean sequence? Measured at 768.",
        {
            "384": {},
            "768": {"clean": 768, "max_suffix": 208, "max_head": 96},
            "960": {"clean": 960, "max_suffix": 260, "max_head": 120},
        },
        measured={"clean": 768, "max_suffix": 208, "max_head": 96},
    ),
    "holes": Experiment(
        "Sample holes by characters or by syntax? Measured on the mixture.",
        {
            "characters": {"hole_expression": 0, "hole_statement": 0, "hole_block": 0},
            "mixed": {},
            "syntax": {"hole_rest_of_line": 0, "hole_lines_below": 0, "hole_span": 0},
        },
        measured={},
    ),
    "late-weights": Experiment(
        "A falling rate, averaged late weights, or both?",
        {
            "neither": {"fall": 0.0},
            "falls": {},
            "mean": {"fall": 0.0, "average": 0.95},
            "both": {"average": 0.95},
        },
    ),
    "batch": Experiment(
        "How many rows per step?",
        {"4": {"rows_per_step": 4}, "8": {}, "16": {"rows_per_step": 16}},
    ),
    "rate": Experiment(
        "Muon's rate?",
        {"0.01": {"muon_rate": 0.01, "adam_rate": 0.0015}, "0.02": {}, "0.04": {"muon_rate": 0.04, "adam_rate": 0.006}},
    ),
    "own-words": Experiment(
        "A last phase on the autoregressive answer, so that more draft tokens are accepted?",
        {"truth": {}, "half": {"own_words": 0.5}, "all": {"own_words": 1.0}},
    ),
    "vocabulary": Experiment(
        "From scratch: how many tokens in the vocabulary? Measured in bits per character.",
        {name: {"vocabulary": int(name)} for name in ("2048", "4096", "8192", "16384")},
        fresh=True,
    ),
    "shape": Experiment(
        "From scratch: wide and shallow, or narrow and deep?",
        {
            "256 x 8": {},
            "384 x 4": {"hidden": 384, "dense": 768, "expert": 384, "layers": 4, "heads": 6, "key_value_heads": 2},
            "192 x 12": {"hidden": 192, "dense": 384, "expert": 192, "layers": 12, "heads": 3, "key_value_heads": 1},
            "128 x 8": {"hidden": 128, "dense": 256, "expert": 128, "heads": 2, "key_value_heads": 1},
        },
        fresh=True,
    ),
}


def find_experiment(name: str) -> Experiment:
    """Return the experiment of a name. Raises ``FimserverError`` for an unknown name."""
    if name not in EXPERIMENTS:
        msg = f"unknown experiment {name!r}; choose from: {', '.join(EXPERIMENTS)}"
        raise FimserverError(msg)
    return EXPERIMENTS[name]


def recipe_of(experiment: Experiment, changes: Mapping[str, float]) -> Recipe:
    """Return the recipe of a variant. Raises ``FimserverError``."""
    return Recipe().with_values({**_BASE, **(_FRESH if experiment.fresh else {}), **changes})


def count_operations(recipe: Recipe) -> float:
    """Return the floating-point operations of one row, forward and backward: weight matmuls and attention."""
    attention = 2 * recipe.hidden * recipe.head_dim * (recipe.heads + recipe.key_value_heads)
    feed_forward = 3 * recipe.hidden * (recipe.dense + recipe.expert * recipe.top_k_experts)
    weights = recipe.layers * (attention + feed_forward)
    head = recipe.vocabulary * recipe.hidden
    rows = recipe.canvases * recipe.canvas
    later = recipe.second_pass * rows
    positions = recipe.clean + rows + later
    keys = recipe.clean * recipe.clean / 2 + (rows + later) * (recipe.clean / 2 + recipe.canvas)
    attending = 2 * recipe.layers * recipe.heads * recipe.head_dim * keys
    return 2 * _FORWARD_AND_BACK * ((weights + head) * positions + attending) + 2 * 2 * head * later


def run_experiment(  # noqa: PLR0913  one run's parts
    name: str,
    material: Material,
    *,
    operations: float,
    source: str,
    machine: Machine,
    report: Callable[[Outcome], None] = lambda _outcome: None,
) -> list[Outcome]:
    """Run every variant of an experiment with ``operations`` each. Raises ``FimserverError``."""
    experiment = find_experiment(name)
    outcomes = []
    for label, changes in experiment.variants.items():
        recipe = recipe_of(experiment, changes)
        steps = max(2, round(operations / (count_operations(recipe) * recipe.rows_per_step)))
        with tempfile.TemporaryDirectory() as folder:
            begin = None if experiment.fresh else source
            base = source
            if "vocabulary" in changes:
                base = str(prepare_base(Path(folder) / "base", source, material.documents, recipe.vocabulary))
            trainer = Trainer.prepare(Path(folder) / "run", recipe, material, machine, begin, base=base)
            measured = recipe if experiment.measured is None else recipe_of(experiment, experiment.measured)
            trainer.measure_on(measured, longest_middle=experiment.longest_middle)
            held_out = trainer.run(Budget(steps=steps))
        state = trainer.state
        outcomes.append(Outcome(name, label, state.step, state.positions, round(state.seconds, 1), held_out))
        report(outcomes[-1])
    return outcomes


def to_table(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the lines of a Markdown table."""
    columns = (*HeldOut.__slots__,)
    lines = [f"| variant | steps | positions | {' | '.join(columns)} |", "|" + "---|" * (3 + len(columns))]
    for outcome in outcomes:
        values: dict[str, Any] = asdict(outcome.held_out)
        cells = " | ".join(f"{values[c]:.3f}" for c in columns)
        lines.append(f"| {outcome.variant} | {outcome.steps} | {outcome.positions:,} | {cells} |")
    return lines
