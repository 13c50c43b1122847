"""The engine's client with workers that fail in every way: small scripts in place of the real one."""

import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from fimserver.datatypes import (
    FimContext,
    Generation,
    Hole,
    HoleKind,
    Mode,
    ModelInfo,
    PartialAnswer,
    Sampling,
    from_plain,
    to_plain,
)
from fimserver.engine import client as client_module
from fimserver.engine.client import LEAST_LATENCY_MS, EngineClient, EngineOptions, EngineState, PendingCompletion, Turn
from fimserver.engine.worker import Inbox, LoadSigns, count_physical_cores
from fimserver.errors import CompletionCancelledError, EngineError, FrameError
from fimserver.framing import read_message, write_message

CONTEXT = FimContext("x = ", "\n", "a.py", "python", Hole(HoleKind.REST_OF_LINE, 1, 8))
PREAMBLE = """
    import os, sys, time
    from pathlib import Path
    from fimserver.framing import read_message, write_message
    def send(**message): write_message(sys.stdout.buffer, message)
    def ready(): send(type="ready", info=dict(name="fake", device="cpu", dtype="float32", num_parameters=1,
        max_prompt_tokens=10, canvas_length=4, preferred_mode="diffusion", load_ms=1.0, num_threads=1))
    def generation(request, text): send(type="generation", id=request["id"], generation=dict(text=text,
        mode="diffusion", finish="end", num_tokens=1, denoising_steps=1, forward_passes=2, cached_tokens=0,
        prompt_tokens=3, timings_ms={"total": 1.0}, prompt_text=""))
    def receive():
        message = read_message(sys.stdin.buffer)
        if message and message["type"] == "complete": send(type="started", id=message["id"])
        return message
"""
STARTS = """
starts = Path(__file__).with_suffix(".starts")
starts.write_text((starts.read_text() if starts.exists() else "") + "x")
n = len(starts.read_text())
"""

Worker = Callable[[str], EngineClient]


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Worker]:
    clients = []

    def start(body: str) -> EngineClient:
        path = tmp_path / "worker.py"
        path.write_text(textwrap.dedent(PREAMBLE) + STARTS + textwrap.dedent(body))
        client = EngineClient(EngineOptions(command=(sys.executable, "-P", str(path))))
        clients.append(client)
        client.start()
        return client

    yield start
    for client in clients:
        client.close()


def test_whether_a_request_may_be_sent_is_asked_when_it_is_sent(worker: Worker) -> None:
    """Another engine may have been chosen since it was made, or the agreement withdrawn."""
    client = worker("ready()\nwhile r := receive(): time.sleep(0.2); generation(r, str(r['stays_here']))")
    client.wait_until_ready(10)
    agreed = {""}

    def may_send(options: EngineOptions) -> bool:
        return options.agreed in agreed

    def ask(document: str) -> PendingCompletion:
        return client.complete(CONTEXT, Sampling(), turn=Turn("a", document, may_send=may_send))

    assert ask("1").future.result(10).text == "False"
    waiting = [ask("1"), ask("2")]
    client.restart(replace(client.options, engine="openai", agreed="http://engine.example"))
    assert [each.future.result(20).text for each in waiting] == ["True", "True"]
    agreed.add("http://engine.example")
    first, second = ask("1"), ask("2")
    agreed.discard("http://engine.example")
    assert [each.future.result(20).text for each in (first, second)] == ["False", "True"]


def test_answers(worker: Worker) -> None:
    client = worker("ready()\nwhile r := receive(): generation(r, r['context']['prefix'])")
    assert client.wait_until_ready(10).name == "fake"
    assert client.state is EngineState.READY
    assert client.complete(CONTEXT, Sampling()).future.result(10).text == "x = "


def test_a_large_model_reports_loading_progress(worker: Worker) -> None:
    client = worker("""
        send(type="loading", share=0.25)
        send(type="loading", share=0.5)
        time.sleep(0.2)
        ready()
        while r := receive(): generation(r, "done")
    """)
    seen: list[tuple[EngineState, str]] = []
    client.listen(lambda state, detail: seen.append((state, detail)))
    client.wait_until_ready(10)
    assert (EngineState.LOADING, "loading model tiny, 50%") in seen
    assert seen[-1][0] is EngineState.READY
    assert client.complete(CONTEXT, Sampling()).future.result(10).text == "done"


def test_loading_progress_is_reported_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    now, sent = [0.0], []

    class Box:
        def send(self, kind: str, **values: float) -> None:
            sent.append((kind, values["share"]))

    monkeypatch.setattr("fimserver.engine.worker.time.monotonic", lambda: now[0])
    signs = LoadSigns(Box())  # type: ignore[arg-type]
    for step in range(1, 11):
        now[0] += 0.2
        signs(step, 10)
    assert sent == [("loading", 0.3), ("loading", 0.6), ("loading", 0.9)]


def test_requests_before_ready_are_kept(worker: Worker) -> None:
    client = worker("time.sleep(0.3)\nready()\nwhile r := receive(): generation(r, 'late')")
    pending = [client.complete(CONTEXT, Sampling()) for _ in range(3)]
    assert [p.future.result(10).text for p in pending] == ["late"] * 3


def test_a_request_of_a_dead_worker_is_asked_again(worker: Worker) -> None:
    client = worker("ready()\nr = receive()\nif n == 1: os._exit(9)\ngeneration(r, f'start {n}')\nreceive()")
    assert client.complete(CONTEXT, Sampling()).future.result(10).text == "start 2"


def test_a_request_that_kills_twice_is_ended(worker: Worker) -> None:
    client = worker(
        """
        ready()
        while r := receive():
            if r['sampling']['seed'] == 1: os._exit(9)
            generation(r, f'start {n}')
        """
    )
    client.wait_until_ready(10)
    with pytest.raises(EngineError, match="died twice"):
        client.complete(CONTEXT, Sampling(seed=1)).future.result(10)
    assert client.complete(CONTEXT, Sampling()).future.result(10).text == "start 3"


def test_a_worker_that_keeps_dying_is_dropped(worker: Worker) -> None:
    client = worker("ready()\nreceive()\nos._exit(9)")
    for _ in range(2):
        with pytest.raises(EngineError):
            client.complete(CONTEXT, Sampling()).future.result(10)
        if client.state is EngineState.FAILED:
            break
    assert client.state is EngineState.FAILED
    assert "doctor" in client.detail
    with pytest.raises(EngineError, match="died 3 times"):
        client.complete(CONTEXT, Sampling())


def test_death_while_loading_again_does_not_blame_requests(worker: Worker) -> None:
    client = worker("""
        if n == 2: os._exit(9)
        ready()
        r = receive()
        if n == 1: os._exit(9)
        generation(r, f'start {n}')
        receive()
        """)
    client.wait_until_ready(10)
    assert client.complete(CONTEXT, Sampling()).future.result(10).text == "start 3"


def test_death_while_loading_is_a_failure_with_its_code(worker: Worker) -> None:
    client = worker("os._exit(7)")
    with pytest.raises(EngineError, match="code 7 while loading"):
        client.wait_until_ready(10)


def test_a_worker_that_is_killed_while_it_loads_is_started_once_more(worker: Worker) -> None:
    client = worker("""
        if n == 1: os.kill(os.getpid(), 9)
        ready()
        generation(receive(), f'start {n}')
        receive()
        """)
    client.wait_until_ready(10)
    assert client.complete(CONTEXT, Sampling()).future.result(10).text == "start 2"


def test_a_worker_killed_long_after_is_dropped_too(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if deaths are forgotten before the next load has ended."""
    monkeypatch.setattr(client_module, "DEATH_WINDOW_S", 0.0)
    client = worker("time.sleep(0.1)\nos.kill(os.getpid(), 9)")
    with pytest.raises(EngineError, match="code -9 while loading"):
        client.wait_until_ready(10)


def test_a_worker_killed_again_is_dropped_with_a_hint_at_memory(worker: Worker) -> None:
    client = worker("os.kill(os.getpid(), 9)")
    with pytest.raises(EngineError, match="code -9 while loading; it was killed, probably because memory ran out"):
        client.wait_until_ready(10)


def test_a_failed_load_gives_the_reason_and_ends_requests(worker: Worker) -> None:
    client = worker("time.sleep(0.2)\nsend(type='failed', message='tensor x is missing')\nsys.exit(1)")
    pending = client.complete(CONTEXT, Sampling())
    with pytest.raises(EngineError, match="tensor x is missing"):
        pending.future.result(10)
    with pytest.raises(EngineError, match="tensor x is missing"):
        client.wait_until_ready(10)


def test_loading_is_reported(worker: Worker) -> None:
    client = worker("time.sleep(30)")
    with pytest.raises(EngineError, match="still loading"):
        client.wait_until_ready(0.05)


def test_garbage_on_the_pipe_starts_a_new_worker(worker: Worker) -> None:
    client = worker(
        """
        ready()
        r = receive()
        if n == 1:
            os.write(1, b'print of a library\\n')
            time.sleep(30)
        generation(r, f'start {n}')
        receive()
        """
    )
    assert client.complete(CONTEXT, Sampling()).future.result(10).text == "start 2"


def test_a_hung_worker_is_killed(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "HANG_TIMEOUT_S", 2.0)
    client = worker("ready()\nr = receive()\nif n == 1: time.sleep(60)\ngeneration(r, f'start {n}')\nreceive()")
    assert client.complete(CONTEXT, Sampling()).future.result(10).text == "start 2"


def test_cancel_reaches_the_worker(worker: Worker) -> None:
    client = worker("ready()\nr = receive()\nc = receive()\nsend(type=c['type'] + 'led', id=c['id'])\nreceive()")
    client.wait_until_ready(10)
    pending = client.complete(CONTEXT, Sampling())
    pending.cancel()
    with pytest.raises(CompletionCancelledError):
        pending.future.result(10)
    pending.cancel()


def test_cancel_before_sending_ends_at_once(worker: Worker) -> None:
    client = worker("time.sleep(0.3)\nready()\nwhile r := receive(): generation(r, 'x')")
    pending = client.complete(CONTEXT, Sampling())
    pending.cancel()
    with pytest.raises(CompletionCancelledError):
        pending.future.result(0.1)
    assert client.complete(CONTEXT, Sampling()).future.result(10).text == "x"


def test_an_error_of_one_request_leaves_the_worker(worker: Worker) -> None:
    client = worker(
        """
        ready()
        r = receive()
        send(type='error', id=r['id'], message='failed on this')
        r = receive()
        generation(r, 'fine')
        receive()
        """
    )
    with pytest.raises(EngineError, match="failed on this"):
        client.complete(CONTEXT, Sampling()).future.result(10)
    assert client.complete(CONTEXT, Sampling()).future.result(10).text == "fine"


def test_partials_come_before_the_answer(worker: Worker) -> None:
    client = worker(
        """
        ready()
        r = receive()
        canvas = [dict(text='t', accepted=True, entropy=0.5)]
        for i in range(3): send(type='partial', id=r['id'], partial=dict(step=i, text=str(i), canvas=canvas))
        generation(r, 'done')
        receive()
        """
    )
    partials: list[PartialAnswer] = []
    assert client.complete(CONTEXT, Sampling(), on_partial=partials.append).future.result(10).text == "done"
    assert [p.text for p in partials] == ["0", "1", "2"]
    assert partials[0].canvas[0].accepted is True


def test_close_ends_requests_with_the_reason(worker: Worker) -> None:
    client = worker("ready()\ntime.sleep(60)")
    client.wait_until_ready(10)
    pending = client.complete(CONTEXT, Sampling())
    client.close("going home")
    with pytest.raises(EngineError, match="going home"):
        pending.future.result(1)
    with pytest.raises(EngineError, match="going home"):
        client.complete(CONTEXT, Sampling())
    assert client.pid is None


def test_a_command_that_cannot_start() -> None:
    client = EngineClient(EngineOptions(command=("/no/such/python",)))
    client.start()
    with pytest.raises(EngineError, match="cannot be started"):
        client.wait_until_ready(1)


@pytest.mark.slow("starts real workers or waits for time-outs")
def test_real_worker_is_not_confused_by_files_of_the_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An editor starts us inside a project that may have its own torch.py or datatypes.py."""
    for name in ("torch.py", "datatypes.py", "fimserver.py", "json.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong file was imported')")
    monkeypatch.chdir(tmp_path)
    client = EngineClient()
    client.start()
    assert client.wait_until_ready(60).name == "tiny"
    client.close()


@pytest.mark.slow("starts real workers or waits for time-outs")
def test_real_worker_takes_the_newest_first() -> None:
    client = EngineClient()
    client.start()
    client.wait_until_ready(60)
    done: list[str] = []
    long = replace(CONTEXT, hole=Hole(HoleKind.BLOCK, max_lines=8, estimated_tokens=64))
    begun = threading.Event()
    sampling = Sampling(Mode.DIFFUSION, seed=0, max_denoising_steps=48, min_tokens=1, without=("cut",))
    first = client.complete(long, sampling, on_partial=lambda _partial: begun.set())
    assert begun.wait(30)  # it is being computed
    others = [client.complete(CONTEXT, Sampling(Mode.AUTOREGRESSIVE)) for _ in range(3)]
    names = ["first", "second", "third", "fourth"]
    for name, pending in zip(names, [first, *others], strict=True):
        pending.future.add_done_callback(partial(lambda name, _future: done.append(name), name))
    for pending in [first, *others]:
        pending.future.result(30)
    client.close()
    assert done == ["first", "fourth", "third", "second"]


def test_the_others_of_a_dead_worker_are_not_blamed(worker: Worker) -> None:
    client = worker("""
        ready()
        while r := receive():
            if r['sampling']['seed'] == 1: time.sleep(0.3); os._exit(9)
            generation(r, f'start {n}')
        """)
    client.wait_until_ready(10)
    bad = client.complete(CONTEXT, Sampling(seed=1))
    good = [client.complete(CONTEXT, Sampling()) for _ in range(3)]
    with pytest.raises(EngineError, match="died twice"):
        bad.future.result(10)
    assert [p.future.result(10).text for p in good] == ["start 2"] * 3  # before the request that is to blame


def test_restart_keeps_open_requests_and_takes_the_newest_options(worker: Worker) -> None:
    client = worker("""
        import json
        options = json.loads(sys.argv[1])
        time.sleep(0.2)
        ready()
        while r := receive():
            if options['threads'] != 2: time.sleep(60)
            generation(r, f"threads {options['threads']}")
        """)
    client.wait_until_ready(10)
    pending = client.complete(CONTEXT, Sampling())
    for threads in (3, 1, 2):
        client.restart(replace(client.options, threads=threads))
        assert client.state is EngineState.LOADING
    assert pending.future.result(10).text == "threads 2"


def test_a_cancelled_request_is_not_asked_again(worker: Worker) -> None:
    client = worker(
        "ready()\nr = receive()\nif n == 1: time.sleep(0.5); os._exit(9)\ngeneration(r, 'asked again')\nreceive()"
    )
    client.wait_until_ready(10)
    pending = client.complete(CONTEXT, Sampling())
    pending.cancel()
    with pytest.raises(CompletionCancelledError):
        pending.future.result(10)


def test_a_callback_that_raises_loses_no_answer(worker: Worker) -> None:
    client = worker("""
        ready()
        while r := receive():
            send(type='partial', id=r['id'], partial=dict(step=1, text='', canvas=[]))
            generation(r, 'x')
        """)

    def fail(_partial: PartialAnswer) -> None:
        msg = "mine"
        raise RuntimeError(msg)

    assert client.complete(CONTEXT, Sampling(), on_partial=fail).future.result(10).text == "x"
    assert client.complete(CONTEXT, Sampling()).future.result(10).text == "x"


def test_a_malformed_answer_starts_a_new_worker(worker: Worker) -> None:
    client = worker("""
        ready()
        r = receive()
        if n == 1:
            send(type='generation', id=r['id'], generation={})
            time.sleep(60)
        generation(r, f'start {n}')
        receive()
        """)
    assert client.complete(CONTEXT, Sampling()).future.result(10).text == "start 2"


def test_a_stopped_worker_blocks_no_caller(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The messages exceed a pipe's capacity and the worker does not read; the callers continue at once."""
    monkeypatch.setattr(client_module, "HANG_TIMEOUT_S", 1.0)
    client = worker("ready()\nif n == 1: time.sleep(60)\nwhile r := receive(): generation(r, f'start {n}')")
    client.wait_until_ready(10)
    context = replace(CONTEXT, prefix="x" * 20_000)
    begin = time.perf_counter()
    pending = [client.complete(context, Sampling()) for _ in range(30)]
    pending[3].cancel()
    assert time.perf_counter() - begin < 5, "the worker sleeps for 60 s"
    assert pending[0].future.result(10).text == "start 2"


def test_waiting_in_the_queue_is_not_a_hang(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "HANG_TIMEOUT_S", 1.5)
    client = worker("ready()\nwhile r := receive(): time.sleep(0.4); generation(r, f'start {n}')")
    pending = [client.complete(CONTEXT, Sampling()) for _ in range(5)]
    assert [p.future.result(10).text for p in pending] == ["start 1"] * 5


# Frames and values


def test_values_survive_the_wire() -> None:
    info = ModelInfo("m", "cpu", "float32", 5, 384, 32, Mode.DIFFUSION, 1.5, 2)
    partial = PartialAnswer(1, "x")
    for value in (CONTEXT, Sampling(seed=3), info, partial):
        assert from_plain(type(value), to_plain(value)) == value
    generation = Generation("t", Mode.AUTOREGRESSIVE, "end", 1, 0, 2, 3, 4, {"total": 1.0})
    revived = from_plain(Generation, to_plain(generation))
    assert revived.mode is Mode.AUTOREGRESSIVE


@pytest.mark.parametrize(
    "data",
    [
        b"hello\r\n\r\n{}",
        b"Content-Length: x\r\n\r\n{}",
        b"Content-Length: 2\r\n\r\n[]",
        b"Content-Length: 1\r\n\r\n{",
        b"Content-Length: 99999999999\r\n\r\n",
    ],
)
def test_bad_frames_are_errors(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "frame"
    path.write_bytes(data)
    with path.open("rb") as stream, pytest.raises(FrameError):
        read_message(stream)


def test_frames_round_trip_and_end(tmp_path: Path) -> None:
    path = tmp_path / "frames"
    messages: list[dict[str, object]] = [{"a": "\u00e9\U0001f40d\n"}, {"b": [1, None]}]
    with path.open("wb") as stream:
        for message in messages:
            write_message(stream, message)
    with path.open("rb") as stream:
        assert [read_message(stream), read_message(stream), read_message(stream)] == [*messages, None]
    path.write_bytes(path.read_bytes()[:-3])
    with path.open("rb") as stream:
        read_message(stream)
        assert read_message(stream) is None


def test_inbox_cancels_waiting_and_running_requests() -> None:
    inbox = Inbox()
    for i in (1, 2, 3):
        inbox.put({"id": i})
    assert inbox.cancel(1) is True
    assert inbox.take()["id"] == 2
    assert inbox.cancel(2) is False
    assert inbox.is_cancelled(2)
    assert inbox.cancel(1) is False
    assert inbox.take()["id"] == 3
    waiter = threading.Timer(0.05, inbox.put, [{"id": 4}])
    waiter.start()
    assert inbox.take()["id"] == 4


def test_physical_cores() -> None:
    assert count_physical_cores() >= 1


# Idle times


@pytest.mark.slow("starts real workers or waits for time-outs")
def test_an_idle_worker_is_unloaded_and_a_request_starts_it_again(worker: Worker) -> None:
    states: list[EngineState] = []
    client = worker("ready()\nwhile r := receive(): time.sleep(1.5); generation(r, f'start {n}')")
    client.listen(lambda state, _detail: states.append(state))
    client.wait_until_ready(10)
    assert client.unload_if_idle() is None  # 0 is never
    client.options = replace(client.options, idle_unload_minutes=0.5 / 60)
    remaining_s = client.unload_if_idle()
    assert remaining_s is not None
    assert 0 < remaining_s <= 0.5
    pending = client.complete(CONTEXT, Sampling())
    time.sleep(0.6)
    assert client.unload_if_idle() is not None  # it computes
    assert pending.future.result(10).text == "start 1"
    time.sleep(0.6)
    assert client.unload_if_idle() is None
    assert client.is_unloaded
    assert client.state is EngineState.STOPPED
    assert client.pid is None
    assert "0.00833333 idle minutes" in client.detail
    assert client.complete(CONTEXT, Sampling()).future.result(10).text == "start 2"
    assert states[-3:] == [EngineState.STOPPED, EngineState.LOADING, EngineState.READY]


def test_only_an_unloaded_worker_is_started_by_a_touch(worker: Worker) -> None:
    client = worker("ready()\nwhile r := receive(): generation(r, 'x')")
    client.wait_until_ready(10)
    client.options = replace(client.options, idle_unload_minutes=1e-9)
    client.touch()
    assert client.unload_if_idle() is None
    client.touch()
    assert client.wait_until_ready(10).name == "fake"
    client.close()
    client.touch()
    assert client.state is EngineState.STOPPED
    with pytest.raises(EngineError):
        client.complete(CONTEXT, Sampling())


@pytest.mark.slow("starts real workers or waits for time-outs")
def test_context_tokens_reach_the_real_worker() -> None:
    client = EngineClient(EngineOptions(context_tokens=100))
    client.start()
    try:
        assert client.wait_until_ready(60).max_prompt_tokens == 100
        long = replace(CONTEXT, prefix="value = other\n" * 200 + "x = ", suffix="\n" + "y = 2\n" * 200)
        generation = client.complete(long, Sampling(seed=0)).future.result(30)
        assert 50 < generation.prompt_tokens <= 100
    finally:
        client.close()


ONE_AFTER_THE_OTHER = """
ready()
while r := receive():
    if r["context"]["prefix"] == "slow": time.sleep(0.4)
    generation(r, str(r["sampling"]["max_latency_ms"]))
"""


def test_waiting_in_the_queue_reduces_the_time_limit(worker: Worker) -> None:
    client = worker(ONE_AFTER_THE_OTHER)
    client.wait_until_ready(10)
    slow = replace(CONTEXT, prefix="slow")
    asked = [
        client.complete(context, Sampling(max_latency_ms=most), turn=Turn(number))
        for number, (context, most) in enumerate([(slow, 5000), (CONTEXT, 5000), (CONTEXT, 100), (CONTEXT, None)])
    ]
    first, second, third, last = (pending.future.result(10).text for pending in asked)
    assert int(first) > 4000
    assert 3000 < int(second) <= 4600
    assert int(second) <= int(first) - 390
    assert int(third) == LEAST_LATENCY_MS
    assert last == "None"


def test_loading_does_not_reduce_the_time_limit(worker: Worker) -> None:
    client = worker("time.sleep(2)\n" + ONE_AFTER_THE_OTHER)
    pending = client.complete(CONTEXT, Sampling(max_latency_ms=5000))
    assert 4000 < int(pending.future.result(10).text) <= 5000


def test_the_usual_answer_time_is_known_after_some_answers(worker: Worker) -> None:
    client = worker("ready()\nwhile r := receive():\n    time.sleep(0.05)\n    generation(r, 'x')")
    client.wait_until_ready(10)
    for _ in range(3):
        assert client.typical_s() is None
        client.complete(CONTEXT, Sampling()).future.result(10)
    typical = client.typical_s()
    assert typical is not None
    assert 0.05 <= typical < 1
    client.restart(client.options)
    assert client.typical_s() is None, "another model may be faster"


def test_device_memory_is_what_the_worker_reports(worker: Worker) -> None:
    client = worker("""
        import json
        ready()
        while r := receive():
            send(type="generation", id=r["id"], device_bytes=12345, generation=dict(text="", mode="diffusion",
                finish="end", num_tokens=1, denoising_steps=1, forward_passes=2, cached_tokens=0, prompt_tokens=3,
                timings_ms={}, prompt_text=""))
    """)
    client.wait_until_ready(10)
    before = client.device_bytes
    client.complete(CONTEXT, Sampling()).future.result(10)
    held = client.device_bytes
    client.close()
    client.start()
    client.wait_until_ready(10)
    assert (before, held, client.device_bytes) == (None, 12345, None)
