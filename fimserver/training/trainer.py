"""Train a model: from documents to a model folder.

A step reads a few rows. The model reads each row once with canvases of fresh noise, then the canvases again, as in
decoding: conditioned on its first result, with the confident tokens kept. The next tokens of the clean sequence and
both denoisings are trained together. The learning rate is flat and falls at the end, so that any run can be continued.

    Trainer.prepare(...)  -> load the data, or resume from a checkpoint
    Trainer.run(budget)   -> train until the budget is used, or a signal arrives
    ThreadChoice          -> the number of threads, found by trials: next to other load a second thread can make a
                             step many times slower, so a step with another number is tried now and then

Knows:  the recipe, rows, tensors.  Never: the terminal.
"""

import contextlib
import importlib.util
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fimserver.checkpoints.metadata import ModelMetadata, read_metadata
from fimserver.engine.vocabulary import Vocabulary
from fimserver.errors import FimserverError
from fimserver.training import run_state as files
from fimserver.training.corpus import Document
from fimserver.training.learning_rate import Budget, Schedule, State
from fimserver.training.loss import head_loss
from fimserver.training.measures import HeldOut, measure
from fimserver.training.noise import first_noise, later_noise
from fimserver.training.optimizers import Optimizers, best_dtype
from fimserver.training.packed_forward import PackedModel
from fimserver.training.recipe import Recipe
from fimserver.training.rows import Row, RowMaker, RowMix, RowShape, RowStream

_TRIAL_EVERY = 30  # steps
_SETTLING = 3  # steps that compile


class ThreadChoice:
    """Chooses the number of threads of the next step from the durations of earlier ones."""

    def __init__(self, most: int) -> None:
        self._counts = sorted({1, most})
        self._seconds = dict.fromkeys(self._counts, 0.0)
        self._steps = 0
        self.current = self._counts[-1]

    def begin(self) -> None:
        """Set the threads of a step."""
        self._steps += 1
        place = self._steps % _TRIAL_EVERY
        if self._steps <= _SETTLING or len(self._counts) == 1:
            self.current = self._counts[0]
        elif place < len(self._counts) or not all(self._seconds.values()):
            self.current = self._counts[place % len(self._counts)]
        else:
            self.current = min(self._counts, key=lambda n: self._seconds[n])
        torch.set_num_threads(self.current)

    def end(self, seconds: float) -> None:
        """Record the duration of a step."""
        if self._steps > _SETTLING:
            known = self._seconds[self.current]
            self._seconds[self.current] = seconds if not known else 0.5 * (known + seconds)


_log = logging.getLogger(__name__)
LOG_FILE, SAMPLES_FILE, STOP_FILE = "log.jsonl", "samples.txt", "stop"
_HELD_OUT_SEED, _HELD_OUT_ROWS = 5, 48
_LOG_STEPS, _EVALUATION_STEPS = 10, 100
_CHECKPOINT_SECONDS = 300.0
_LEAST_WEIGHT = 1e-6  # lower bound of a kind's total weight; a kind without weight is not trained
Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Material:
    """Documents to train on, and held-out ones."""

    documents: Sequence[Document]
    held_out: Sequence[Document]


@dataclass(frozen=True, slots=True)
class Machine:
    """Where and how steps are computed; compiled if there is a compiler, unless set."""

    device: str = "cpu"
    dtype: torch.dtype | None = None  # default: bf16 if the hardware multiplies it, else fp32
    compiled: bool | None = None
    threads: int = 0  # at most; 0 means all cores
    workers: int = 1  # processes that make rows


class Trainer:
    """One run in one folder."""

    def __init__(  # noqa: PLR0913, PLR0917  a run's parts
        self,
        folder: Path,
        recipe: Recipe,
        material: Material,
        machine: Machine,
        model: Any,
        metadata: ModelMetadata,
        source: Path,
    ) -> None:
        for documents, what in ((material.documents, "to train on"), (material.held_out, "held out")):
            if not documents:
                msg = f"the corpus has no documents {what}; run: fimserver corpus"
                raise FimserverError(msg)
        self.folder, self.recipe, self.metadata = folder, recipe, metadata
        self.state = State()
        self._material, self._machine, self._source = material, machine, source
        self._device = torch.device(machine.device)
        compiled = can_compile(self._device) if machine.compiled is None else machine.compiled
        dtype = machine.dtype or best_dtype(self._device)
        self.packed = PackedModel(model.to(self._device).train(), dtype, compiled=compiled)
        model.requires_grad_(requires_grad=False)
        self._parameters = dict(self.packed.decoder.named_parameters())
        self.packed.decoder.requires_grad_(requires_grad=True)
        self._optimizers = Optimizers(self._parameters, recipe)
        self._averages = {n: p.detach().clone() for n, p in self._parameters.items()} if recipe.average else {}
        self._vocabulary = Vocabulary.load(source / "tokenizer.json", range(metadata.num_special_tokens))
        if (size := self._vocabulary.size) != recipe.vocabulary:
            msg = f"the tokenizer of {source} has {size} tokens, not the recipe's; set vocabulary={size}"
            raise FimserverError(msg)
        self._held_out: list[Row] = []
        self._text_tokens = (metadata.num_special_tokens, self.packed.embedding.shape[0])
        self._threads = ThreadChoice(machine.threads or num_cores())

    @classmethod
    def prepare(  # noqa: PLR0913, PLR0917  a run's parts
        cls,
        folder: Path,
        recipe: Recipe,
        material: Material,
        machine: Machine,
        source: str | None = None,
        base: str = "tiny",
    ) -> "Trainer":
        """Resume a run from its folder's checkpoint, or start one from ``source``'s weights or from scratch.

        A model from scratch has the tokenizer of ``base``. Raises ``FimserverError``.
        """
        known = files.read_checkpoint(folder)
        model, recipe, source_folder = files.prepare_model(folder, recipe, source, base)
        metadata = files.metadata_of(recipe, read_metadata(source_folder), folder.resolve().name)
        trainer = cls(folder, recipe, material, machine, model, metadata, source_folder)
        folder.mkdir(parents=True, exist_ok=True)
        if known is not None:
            trainer._load_state(known)
        return trainer

    def run(
        self,
        budget: Budget,
        *,
        on_step: Callable[[float, Mapping[str, Any]], None] = lambda _progress, _entry: None,
        interrupted: Callable[[State], bool] = lambda _state: False,
    ) -> HeldOut:
        """Train until the budget is spent; a file ``stop`` in the folder starts the fall of the rate and then ends it.

        Returns the measures of held-out rows at the end.
        """
        schedule, batches = Schedule(budget, self.state, self.recipe), self._batches()
        begin, saved = time.monotonic() - self.state.seconds, time.monotonic()
        stop = self.folder / STOP_FILE
        stop.unlink(missing_ok=True)
        while (progress := schedule.progress(self.state)) < 1 and not interrupted(self.state):
            if stop.exists():
                stop.unlink()
                schedule.end_soon(self.state)
            rate = schedule.rate(self.state)
            entry = {"rate": round(rate, 4), **self.step(batches, rate)}
            self.state.seconds = time.monotonic() - begin
            entry = {**asdict(self.state), **entry, "threads": self._threads.current}
            evaluates = self.state.step % _EVALUATION_STEPS == 0
            if evaluates:
                entry |= asdict(self.evaluate(samples=True))
            if evaluates or self.state.step % _LOG_STEPS == 0:
                self._log(entry)
            on_step(progress, entry)
            if time.monotonic() - saved > _CHECKPOINT_SECONDS:
                self.save()
                saved = time.monotonic()
        if schedule.progress(self.state) >= 1:
            self.state.warm_steps = 0  # a continued run warms up again
        self.save()
        held_out = self.evaluate(samples=True)
        self._log({**asdict(self.state), **asdict(held_out)})
        return held_out

    def step(self, batches: Iterator[Batch], rate: float) -> dict[str, float]:
        """Take one optimizer step; return the losses of its rows."""
        begin = time.monotonic()
        self._threads.begin()
        passes = self.recipe.rows_per_step // self.recipe.rows_at_once
        sums: dict[str, float] = {}
        for _ in range(passes):
            loss, parts = self._losses(next(batches))
            if not math.isfinite(loss.item()):
                msg = f"the loss is {loss.item()} at step {self.state.step}; lower muon_rate and adam_rate"
                raise FimserverError(msg)
            torch.autograd.backward(loss / passes)
            self.state.rows += self.recipe.rows_at_once
            self.state.positions += self.recipe.rows_at_once * self.recipe.positions_per_row
            for name, value in parts.items():
                sums[name] = sums.get(name, 0.0) + value / passes
        self._optimizers.step(rate)
        for name, mean in self._averages.items():
            mean.lerp_(self._parameters[name].detach(), 1 - self.recipe.average)
        self.state.step += 1
        self.state.warm_steps += 1
        self._threads.end(time.monotonic() - begin)
        return {name: round(value, 4) for name, value in sums.items()}

    def _losses(self, batch: Batch) -> tuple[Tensor, dict[str, float]]:
        """Return the weighted loss of a few rows, and its parts."""
        recipe, packed = self.recipe, self.packed
        clean, truth, starts = (t.to(self._device) for t in batch)
        draws = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.state.rows)
        continues = float(torch.rand((), generator=draws)) < recipe.second_pass
        noisy = first_noise(truth, recipe, self._text_tokens, draws)
        read = packed.read(clean, noisy, starts)
        assert read.clean is not None
        truth = self._own_words(read.clean, truth, starts, draws)
        aims = {
            "next_token": self._aim_at_next(read.clean, clean),
            "denoise": self._aim_at_truth(read.canvases, noisy, truth, draws, 0.5 if continues else 1.0),
        }
        if continues:
            temperature = 1 - (1 - recipe.coldest) * float(torch.rand((), generator=draws))
            self_conditioning, best, entropy = packed.predict(read.canvases.detach().flatten(0, 1), temperature)
            found = (best.view(truth.shape), entropy.view(truth.shape))
            drawn = later_noise(truth, *found, recipe, self._text_tokens, draws)
            self_conditioning = packed.condition(self_conditioning.view(read.canvases.shape), drawn)
            later = packed.read(None, drawn.canvases, starts, self_conditioning, read.known)
            aims["denoise_later"] = self._aim_at_truth(later.canvases, drawn.canvases, truth, draws, 0.5)
        loss, losses = head_loss(
            torch.cat([aim.hidden for aim in aims.values()]).to(packed.dtype),
            packed.embedding,
            torch.cat([aim.targets for aim in aims.values()]),
            torch.cat([aim.share * aim.weights for aim in aims.values()]),
            packed.logit_gradients,
        )
        parts, begin = {}, 0
        for name, aim in aims.items():
            parts[name] = (losses[begin : begin + len(aim.weights)] * aim.weights).sum().item()
            begin += len(aim.weights)
        return loss, parts

    def _own_words(self, hidden: Tensor, truth: Tensor, starts: Tensor, draws: torch.Generator) -> Tensor:
        """Return the canvases' targets: the truth, for some the autoregressive answer at their position."""
        if not self.recipe.own_words:
            return truth
        batch, canvases, canvas = truth.shape
        at = starts[:, :, None] - 1 + torch.arange(canvas, device=starts.device)
        inside = at < hidden.shape[1]
        rows = hidden.gather(
            1, at.clamp(max=hidden.shape[1] - 1).flatten(1)[:, :, None].expand(-1, -1, hidden.shape[2])
        )
        own = self.packed.likeliest(rows.detach().flatten(0, 1)).view(truth.shape)
        chosen = torch.rand(batch, canvases, 1, generator=draws).to(truth.device) < self.recipe.own_words
        return torch.where(chosen & inside & (truth != self.metadata.special_tokens["pad"]), own, truth)

    def _aim_at_next(self, hidden: Tensor, clean: Tensor) -> "_Aim":
        special = self.metadata.special_tokens
        following = torch.cat((clean[:, 1:], torch.full_like(clean[:, :1], special["pad"])), 1)
        real = ((following != special["pad"]) & (clean != special["eos"])).float()
        return _Aim(hidden, following, real, self.recipe.next_token)

    def _aim_at_truth(
        self, hidden: Tensor, noisy: Tensor, truth: Tensor, draws: torch.Generator, share: float
    ) -> "_Aim":
        is_pad = truth == self.metadata.special_tokens["pad"]
        trained = (torch.rand(truth.shape, generator=draws) < self.recipe.pad).to(truth.device) | ~is_pad
        weights = weigh_canvases(noisy == truth, self.recipe) * trained  # tokens without weight cost no logits
        return _Aim(hidden, truth, weights, share)

    @torch.no_grad()
    def evaluate(self, *, samples: bool = False) -> HeldOut:
        """Measure held-out rows, the same rows and noise each time; write samples to the run's folder."""
        if not self._held_out:
            self.measure_on(self.recipe)
        self._swap_averages()
        result, texts = measure(self.packed, self._held_out, self.metadata, self._vocabulary, self._text_tokens)
        self._swap_averages()
        if samples:
            with (self.folder / SAMPLES_FILE).open("a", encoding="utf-8") as file:
                file.write(f"step {self.state.step}\n" + "".join(f"  {text}\n" for text in texts))
        return result

    def measure_on(self, recipe: Recipe, *, longest_middle: int = 0) -> None:
        """Make held-out rows with another recipe from now on, regardless of the training rows."""
        maker = self._maker(self._material.held_out, _HELD_OUT_SEED, recipe, longest_middle)
        self._held_out = [maker.make(i) for i in range(_HELD_OUT_ROWS)]

    def _swap_averages(self) -> None:
        """Exchange the weights with their running mean, if there is one: the mean is measured and served."""
        for name, mean in self._averages.items():
            own = self._parameters[name].data
            self._parameters[name].data, self._averages[name] = mean, own

    def save(self) -> None:
        """Write the checkpoint and the model folder."""
        values = {
            "model": {n: p.detach() for n, p in self._parameters.items()},
            "optimizers": self._optimizers.state_dict(),
            "averages": self._averages,
            "state": asdict(self.state),
        }
        self.export()
        files.save_checkpoint(self.folder, values, self.recipe)

    def _load_state(self, known: Mapping[str, Any]) -> None:
        try:
            self.packed.decoder.load_state_dict(known["model"], strict=False)
            self._optimizers.load_state_dict(known["optimizers"])
        except (RuntimeError, KeyError, ValueError) as error:
            detail = str(error).rsplit("\n", 1)[-1].strip()  # torch lists every tensor
            msg = f"{self.folder} holds a run of another shape ({detail}); train in another folder"
            raise FimserverError(msg) from error
        for name, mean in self._averages.items():
            mean.copy_(known["averages"].get(name, self._parameters[name].detach()))
        self.state = State(**known["state"])
        cut_log(self.folder / LOG_FILE, self.state.step)

    def export(self) -> Path:
        """Write the model folder, with the averaged weights if there are any."""
        self._swap_averages()
        folder = files.export_model(self.packed.model, self.metadata, self._source, self.folder / files.MODEL_FOLDER)
        self._swap_averages()
        return folder

    def _maker(self, documents: Sequence[Document], seed: int, recipe: Recipe, longest_middle: int = 0) -> RowMaker:
        shape = RowShape(recipe.clean, recipe.canvases, recipe.canvas, longest_middle)
        metadata = files.metadata_of(recipe, self.metadata, self.metadata.name)
        return RowMaker(documents, self._vocabulary, metadata, shape, RowMix(recipe.holes, recipe.snippets), seed)

    def _batches(self) -> Iterator[Batch]:
        maker = self._maker(self._material.documents, self.recipe.seed, self.recipe)
        stream = RowStream(maker, self.recipe.rows_at_once, self.state.rows)
        return iter(DataLoader(stream, batch_size=self.recipe.rows_at_once, num_workers=self._machine.workers))

    def _log(self, entry: Mapping[str, Any]) -> None:
        with (self.folder / LOG_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def weigh_canvases(known: Tensor, recipe: Recipe) -> Tensor:
    """Return the loss weight of each canvas token (B, K, C), by its distance from the last known one before it."""
    at = torch.arange(known.shape[-1], device=known.device)
    last_known = torch.where(known, at, -1).cummax(-1).values
    nearness = torch.exp(-(at - last_known - 1) / recipe.reach)
    return torch.where(known, recipe.kept_token, recipe.far_token + (1 - recipe.far_token) * nearness)


def cut_log(path: Path, step: int) -> None:
    """Drop log lines after a checkpoint's step, and an incomplete line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    path.write_text("".join(kept), encoding="utf-8")


class _Aim:
    """Rows of one kind: hidden states (N, H), target tokens, weights that sum to 1, the kind's share of the loss."""

    def __init__(self, hidden: Tensor, targets: Tensor, weights: Tensor, share: float) -> None:
        self.hidden, self.targets, self.share = hidden.flatten(0, -2), targets.flatten(), share
        self.weights = (weights / weights.sum().clamp(min=_LEAST_WEIGHT)).flatten()


def num_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def can_compile(device: torch.device) -> bool:
    """Return whether torch can compile: a working C++ compiler, and triton for a GPU."""
    if shutil.which("g++") is None or (device.type == "cuda" and importlib.util.find_spec("triton") is None):
        return False
    try:
        torch.compile(lambda t: t.sin().cos())(torch.ones(64, device=device))
    except Exception as error:  # noqa: BLE001  a compiler fails in its own ways
        _log.warning("training is not compiled and therefore slower: %s", str(error).partition("\n")[0])
        return False
    return True
