"""A picture of a run's losses.

Knows:  the log of a run.  Never: the model.
"""

import json
from pathlib import Path

LOSSES_FILE = "losses.png"
_TRAINED = ("next_token", "denoise", "denoise_later")
_SMOOTHING = 0.9


def write_losses(log: Path) -> Path | None:
    """Trained losses (smoothed) and held-out ones over positions, beside the log; ``None`` where nothing is drawn."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415  optional
    except ImportError:
        return None
    entries = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for index, name in enumerate(_TRAINED):
        found = [(entry["positions"] / 1e6, entry[name]) for entry in entries if name in entry]
        if found:
            axes.plot([x for x, _ in found], _smooth([y for _, y in found]), color=f"C{index}", label=name)
        held = [(e["positions"] / 1e6, e[f"held_{name}"]) for e in entries if f"held_{name}" in e]
        if held:
            axes.plot(
                *zip(*held, strict=True), color=f"C{index}", linestyle="--", marker=".", label=f"{name}, held out"
            )
    if not axes.lines:
        return None
    axes.set(xlabel="million positions", ylabel="nats a token")
    axes.legend()
    path = log.with_name(LOSSES_FILE)
    figure.savefig(path, dpi=120)
    return path


def _smooth(values: list[float]) -> list[float]:
    smooth, mean = [], values[0]
    for value in values:
        mean = _SMOOTHING * mean + (1 - _SMOOTHING) * value
        smooth.append(mean)
    return smooth
