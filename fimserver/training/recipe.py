"""Define a training run in one table: shape, rows, noise, loss weights, optimizers.

A field's comment says what was found about it; ``docs/explanation/experiments.md`` has the numbers. ``fimserver train
--set NAME=VALUE`` changes one.

Knows:  names and numbers.  Never: tensors.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fimserver.errors import FimserverError
from fimserver.training.hole_sampling import HOLE_KINDS

_AT_LEAST_ONE = (
    *("vocabulary", "hidden", "layers", "heads", "key_value_heads", "head_dim", "dense", "experts", "top_k_experts"),
    *("expert", "full_attention_every", "canvas", "canvases", "rows_per_step", "rows_at_once"),
)
# Fields that existing weights decide; experts can be split.
SHAPE = ("vocabulary", "hidden", "layers", "heads", "key_value_heads", "head_dim", "dense", "expert")
_SHARES = (
    "snippets",
    "pure_noise",
    "second_pass",
    "decoding_noise",
    "left_noise",
    "coldest",
    "own_words",
    "fall",
    "last_rate",
    "average",
    "pad",
)
_LEAST_PREFIX = 32  # tokens, including the prompt's markers


@dataclass(frozen=True, slots=True)
class Recipe:
    """Settings of a run; the defaults train the shipped model. Lengths are in tokens, shares from 0 to 1."""

    # Shape, of a model trained from scratch
    vocabulary: int = 8192
    hidden: int = 256
    layers: int = 8
    heads: int = 4
    key_value_heads: int = 2
    head_dim: int = 64
    dense: int = 512
    experts: int = 1
    top_k_experts: int = 1
    expert: int = 256
    full_attention_every: int = 4

    # Rows
    canvas: int = 32
    canvases: int = 6  # per row; half of them at its middle
    clean: int = 768  # prompt, middle and end; later positions are never trained
    max_suffix: int = 208
    max_head: int = 96
    max_file: int = 24
    max_snippets: int = 128
    snippets: float = 0.3  # share of rows with pieces of other files of their folder
    rows_per_step: int = 8
    rows_at_once: int = 2  # per pass; its activations fit into a CPU's cache
    hole_rest_of_line: float = 0.40
    hole_lines_below: float = 0.10
    hole_span: float = 0.10
    hole_expression: float = 0.15
    hole_statement: float = 0.15
    hole_block: float = 0.10

    # Noise
    # share of first-pass canvases of noise only, as decoding begins; the others keep any share of the truth
    pure_noise: float = 1.0
    second_pass: float = 1.0  # share of passes followed by one that is conditioned on them, as in decoding
    decoding_noise: float = 0.15  # share of second-pass canvases that keep what decoding would
    left_noise: float = 0.8  # share that keeps the truth up to some position; the others keep any share of the truth
    coldest: float = 0.4  # lowest temperature of a condition, drawn up to 1: decoding's falls from 0.8 to 0.4
    least_bound: float = 0.1  # lowest entropy bound of decoding that is drawn, in nats
    largest_bound: float = 8.0

    # Losses
    next_token: float = 1.0  # weight, with 1 for denoising
    kept_token: float = 0.25  # weight of a canvas token that is already right
    pad: float = 0.1  # share of pads after an end that are trained
    far_token: float = 1.0  # weight of a canvas token far after the known ones, with 1 directly after them
    reach: float = 4.0  # tokens over which the weight falls from 1 towards ``far_token``, to 1/e of the difference
    own_words: float = 0.0  # share of canvases whose target is the model's own autoregressive answer, not the truth

    # Optimizers
    muon_rate: float = 0.02
    adam_rate: float = 0.003
    muon_decay: float = 0.01
    warmup_steps: int = 60
    fall: float = 0.2  # last share of a run, over which the rate falls
    last_rate: float = 0.03
    average: float = 0.0  # decay of a running mean of the weights; 0 disables it
    seed: int = 0

    @property
    def max_prompt(self) -> int:
        """Return the tokens of a prompt: the clean sequence without a full canvas."""
        return self.clean - self.canvas

    @property
    def holes(self) -> dict[str, float]:
        """Return the weight of each kind of hole."""
        return {kind: getattr(self, f"hole_{kind}") for kind in HOLE_KINDS}

    @property
    def positions_per_row(self) -> int:
        """Return the trained positions of a row: its clean tokens and its canvases', counting each pass."""
        return self.clean + round(self.canvases * self.canvas * (1 + self.second_pass))

    def with_pairs(self, pairs: Sequence[str]) -> "Recipe":
        """Return a copy with ``NAME=VALUE`` pairs. Raises ``FimserverError`` that names the pair."""
        values: dict[str, Any] = {}
        for pair in pairs:
            name, equals, text = pair.partition("=")
            try:
                values[name] = json.loads(text) if equals else None
            except ValueError:
                values[name] = None
        return self.with_values(values)

    def with_values(self, values: Mapping[str, Any]) -> "Recipe":
        """Return a checked copy with other values. Raises ``FimserverError`` that names the field."""
        types = {f.name: f.type for f in dataclasses.fields(self)}
        for name, value in values.items():
            if name not in types:
                msg = f"unknown recipe field {name!r}; choose from: {', '.join(types)}"
                raise FimserverError(msg)
            wanted = (int,) if types[name] is int else (int, float)
            if not isinstance(value, wanted) or isinstance(value, bool) or not 0 <= value < math.inf:
                kind = "a whole number" if types[name] is int else "a number"
                msg = f"{name} of a recipe has to be {kind} of at least 0, for instance {name}={getattr(self, name)}"
                raise FimserverError(msg)
        recipe = dataclasses.replace(self, **values)
        if (fault := recipe._find_fault()) is not None:  # noqa: SLF001  its own
            raise FimserverError(fault)
        return recipe

    def _find_fault(self) -> str | None:
        """Return why no run is possible with this recipe, and the remedy."""
        for name in _AT_LEAST_ONE:
            if not getattr(self, name):
                return f"{name} of a recipe has to be at least 1, for instance {name}={getattr(Recipe(), name)}"
        for name in _SHARES:
            if getattr(self, name) > 1:
                return f"{name} of a recipe is a share, at most 1, for instance {name}={getattr(Recipe(), name)}"
        for name, greatest in (
            ("least_bound", self.least_bound),
            ("coldest", self.coldest),
            ("reach", self.reach),
            ("hole_rest_of_line", max(self.holes.values())),
        ):
            if not greatest:
                return f"{name} of a recipe has to be above 0, for instance {name}={getattr(Recipe(), name)}"
        return self._find_mismatch()

    def _find_mismatch(self) -> str | None:
        """Return the contradiction between fields."""
        if self.decoding_noise + self.left_noise > 1:
            return "decoding_noise and left_noise are shares of one whole; their sum has to be at most 1"
        if self.heads % self.key_value_heads or self.top_k_experts > self.experts:
            return "heads has to be a multiple of key_value_heads, and top_k_experts at most experts"
        if self.rows_per_step % self.rows_at_once:
            return f"rows_per_step ({self.rows_per_step}) has to be a multiple of rows_at_once ({self.rows_at_once})"
        others = self.max_suffix + self.max_head + self.max_file + self.max_snippets
        if others + _LEAST_PREFIX > self.max_prompt:
            return (
                f"clean ({self.clean}) less canvas ({self.canvas}) leaves less than {_LEAST_PREFIX} tokens of prefix"
                f" next to max_suffix, max_head, max_file and max_snippets ({others}); raise clean or lower these"
            )
        return None
