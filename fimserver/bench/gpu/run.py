"""Run the stages of a GPU's measurement in processes of their own, so that what breaks one leaves the others.

    measure_gpu  check the options, start processes until no stage is left or the time is over
    main         such a process: python -P -m fimserver.bench.gpu.run OPTIONS.json

After a CUDA error a process can do nothing more on a GPU, and keeps its memory until it ends. Then another process
loads the model, captures its passes unless that failed, and continues with the stages that are left. ``gpu.json`` and
``gpu.md`` are written before and after each stage, so they are complete whatever happens. A simulation runs in the
calling process, which holds no GPU.

Knows:  processes, files.  Never: tensors.
"""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cattrs
import torch

from fimserver.bench.gpu.report import FAIL, Report, to_markdown
from fimserver.bench.gpu.stages import ENDED, STAGES, Bench, Checks
from fimserver.bench.gpu.synthetic import SYNTHETIC, read_known, to_planned
from fimserver.checkpoints.gpus import NO_GPU
from fimserver.checkpoints.installed import write_whole
from fimserver.checkpoints.planner import plan_on_gpu
from fimserver.errors import FimserverError

DEFAULT_MINUTES = 15.0
_CHILD = ("-P", "-m", "fimserver.bench.gpu.run")
_NEED_NO_MODEL = {"checks", "kernels", "load", "generate"}
_GENERATE = "generate"


@dataclass(frozen=True, slots=True)
class _Options:
    """What a process needs; ``deadline`` is a time of day in seconds, or 0 for none."""

    name: str
    simulate: bool
    weights: str
    context_tokens: int
    with_generate: bool | None
    deadline: float
    out: str
    stages: tuple[str, ...]
    checks: Checks


def measure_gpu(  # noqa: PLR0913  options of one command
    name: str,
    *,
    simulate: bool = False,
    weights: str = "",
    find_checks: Callable[[], Checks] = tuple,
    stages: tuple[str, ...] = STAGES,
    context_tokens: int = 8192,
    with_generate: bool | None = None,
    out: Path | None = None,
    report: Callable[[str], None] = lambda _stage: None,
    minutes: float = DEFAULT_MINUTES,
    apart: bool | None = None,
) -> Report:
    """Run the stages, and write ``gpu.json`` and ``gpu.md`` into a folder. Raises ``FimserverError``.

    ``with_generate`` runs transformers' own loop; ``None`` runs it after all stages if there is room. ``weights`` names
    an installed model for the layouts, ``find_checks`` returns rows of what ``fimserver doctor`` finds. Stages that
    have not begun after ``minutes`` are skipped. ``apart`` runs them in other processes, by default unless simulated.
    """
    if unknown := set(stages) - {*STAGES}:
        msg = f"unknown stage {min(unknown)!r}; choose from: {', '.join(STAGES)}"
        raise FimserverError(msg)
    if name not in SYNTHETIC:
        msg = f"unknown synthetic model {name!r}; choose from: {', '.join(SYNTHETIC)}"
        raise FimserverError(msg)
    if not simulate and not torch.cuda.is_available():
        msg = "torch sees no CUDA device; install CUDA torch, or try every stage here with --simulate"
        raise FimserverError(msg)
    if not simulate:
        plan_on_gpu(to_planned(name, read_known(name, reduced=False)[0]), NO_GPU, context_tokens)  # checks the context
    deadline = time.time() + 60 * minutes
    if with_generate or (with_generate is None and set(stages) == set(STAGES)):
        stages = (*stages, _GENERATE)
    checks = _try_checks(find_checks) if "checks" in stages else ()
    with TemporaryDirectory() as folder:
        target = str((out or Path(folder)).absolute())
        options = _Options(name, simulate, weights, context_tokens, with_generate, deadline, target, stages, checks)
        if not (not simulate if apart is None else apart):
            return _run_stages(options, None, report)
        return _supervise(options, Path(folder) / "options.json", report)


def _try_checks(find_checks: Callable[[], Checks]) -> Checks:
    try:
        return find_checks()
    except Exception as error:  # noqa: BLE001  a page without these lines is better than none
        return (("fimserver doctor", FAIL, f"{type(error).__name__}: {error}; run: fimserver doctor"),)


def _run_stages(options: _Options, before: Report | None, report: Callable[[str], None]) -> Report:
    """Run the stages in this process, and write the results as they come."""
    bench = Bench(
        options.name,
        simulate=options.simulate,
        context_tokens=options.context_tokens,
        with_generate=options.with_generate,
        weights=options.weights,
        checks=options.checks,
        deadline=options.deadline,
        save=lambda found: _write(found, Path(options.out)),
        before=before,
    )
    return bench.run(options.stages, report)


def _supervise(options: _Options, path: Path, report: Callable[[str], None]) -> Report:
    """Start processes until no stage is left; a process that does not begin any of those left is the last one."""
    found: Report | None = None
    left = options.stages
    with suppress(OSError):
        (Path(options.out) / "gpu.json").unlink()  # of an earlier run
    while left:
        again = _list_again(found, left)
        chosen = replace(options, stages=(*again, *left))
        path.write_text(json.dumps({"options": dataclasses.asdict(chosen), "before": _to_dict(found)}), "utf-8")
        error = _run_child(path, options.deadline, report)
        latest = _read(Path(options.out))
        if latest is None and found is None:
            msg = f"the measuring process ended before its first stage ({error}); try --stages checks,kernels"
            raise FimserverError(msg)
        begun = set(latest.stages) - set(found.stages if found else ()) if latest else set()
        found = latest or found
        assert found is not None
        is_over = time.time() >= options.deadline
        if is_over and found.failures.get(found.stages[-1]) == ENDED:
            found = found.with_end(found.stages[-1], skipped="it was stopped at the time limit")
        remaining = tuple(stage for stage in left if stage not in begun)
        if is_over or len(remaining) == len(left):
            for stage in remaining:
                why = "the time limit was reached before" if is_over else f"a new process could not continue ({error})"
                found = found.with_end(stage, skipped=why)
            remaining = ()
        left = remaining
        _write(found, Path(options.out))
    assert found is not None
    return found


def _list_again(found: Report | None, left: tuple[str, ...]) -> tuple[str, ...]:
    """Return the stages of an earlier process that those left need again: a loaded model, and captured passes."""
    if found is None or set(left) <= _NEED_NO_MODEL:
        return ()
    return tuple(
        stage
        for stage in ("load", "graphs")
        if stage in found.stages and (stage == "load" or stage not in found.failures)
    )


def _run_child(path: Path, deadline: float, report: Callable[[str], None]) -> str:
    """Run a process until it ends or the time is over, and report its stages; return how it ended."""
    command = [sys.executable, *_CHILD, str(path)]
    with subprocess.Popen(  # noqa: S603  our own command
        command, stdout=subprocess.PIPE, encoding="utf-8", errors="replace", start_new_session=True
    ) as process:
        timer = threading.Timer(max(0, deadline - time.time()), _kill, (process,))
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.strip() in {*STAGES, _GENERATE}:
                    report(line.strip())
            return f"exit code {process.wait()}"
        finally:
            timer.cancel()
            _kill(process)


def _kill(process: "subprocess.Popen[str]") -> None:
    """End a process, and on POSIX what it has started."""
    with suppress(OSError):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def _to_dict(found: Report | None) -> dict[str, Any] | None:
    return None if found is None else dataclasses.asdict(found)


def _read(folder: Path) -> Report | None:
    with suppress(OSError, ValueError):
        return cattrs.structure(json.loads((folder / "gpu.json").read_text(encoding="utf-8")), Report)
    return None


def _write(found: Report, folder: Path) -> None:
    """Write both files, each at once, so that a process that ends leaves whole ones."""
    write_whole(folder / "gpu.json", json.dumps(dataclasses.asdict(found), indent=2) + "\n")
    write_whole(folder / "gpu.md", "\n".join(to_markdown(found)) + "\n")


def main() -> None:
    """Run the stages that a file of options names."""
    given = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    before = None if given["before"] is None else cattrs.structure(given["before"], Report)
    _run_stages(cattrs.structure(given["options"], _Options), before, lambda stage: print(stage, flush=True))  # noqa: T201


if __name__ == "__main__":
    main()
