"""A model that does not use the machine's GPU: the editor shows why, and completions are still offered."""

import sys
from contextlib import closing
from pathlib import Path

import pytest
import torch
from support.lsp_client import LspClient

WORKER = """
import os, pathlib, sys
from fimserver.engine import worker
from fimserver.engine.kernels import driver
driver.DEVICE_FILES = (pathlib.Path({smi!r}),)
os.environ["PATH"] = {folder!r} + os.pathsep + os.environ["PATH"]
sys.exit(worker.main())
"""
SERVER = """
import sys
from fimserver.engine.client import EngineOptions
from fimserver.lsp.features import create_server
server = create_server(None)
server.engine.options = EngineOptions(command=(sys.executable, "-P", {worker!r}))
server.start_io()
"""


@pytest.mark.slow("loads a model in a server")
@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell")
def test_an_editor_is_shown_why_the_model_runs_on_the_cpu(tmp_path: Path) -> None:
    if torch.version.cuda:
        pytest.skip("needs a build of torch for CPUs")
    smi, worker, server = (tmp_path / name for name in ("nvidia-smi", "worker.py", "server.py"))
    smi.write_text("#!/bin/sh\necho 'GPU-1, NVIDIA GeForce RTX 5090, 32607, 32000, 580.82, 12.0'\n")
    smi.chmod(0o755)
    worker.write_text(WORKER.format(smi=str(smi), folder=str(tmp_path)))
    server.write_text(SERVER.format(worker=str(worker)))
    home = {"FIMSERVER_HOME": str(tmp_path / "home")}
    with closing(LspClient(command=[sys.executable, "-P", str(server)], env=home)) as client:
        client.initialize()
        message = client.wait_for_notification("window/showMessage", lambda params: "GPU" in params["message"])
        assert message["type"] == 2
        assert message["message"].startswith("fimserver: the model runs on the CPU: torch ")
        assert "pip install --force-reinstall" in message["message"]
        status = client.wait_for_notification("didChangeStatus", lambda params: "GPU" in params["message"])
        assert (status["kind"], status["busy"]) == ("Normal", False)
        assert status["message"].startswith("tiny on cpu; the model runs on the CPU: ")
        assert "the model runs on the CPU" in client.request("fimserver/status", {})["engine"]["detail"]
        client.open("file:///a.py", "def add(first, second):\n    return first + \n")
        assert client.complete("file:///a.py", 1, 19)
