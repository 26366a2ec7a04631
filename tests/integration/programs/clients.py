"""Client processes of a server: on the host's side of the bridge, in the image's files, or outside where the client is there."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.integration.command import run
from tests.integration.programs.catalogue import PORT, Program
from tests.integration.programs.image import GUEST


class Client:
    """How clients of a server at `host` are started; `root` has the image's files."""

    def __init__(self, root: Path, program: Program, host: str) -> None:
        inside: list[object] = ["chroot", root, "python3", "/app/client.py"]
        argv = [sys.executable, GUEST / "client.py"] if program.client_here else inside
        self._argv = [str(word) for word in (*argv, program.client, host, PORT)]

    @contextmanager
    def live(self) -> Iterator[LiveClient]:
        """Make state, and keep connections open until the end of the `with`."""
        process = subprocess.Popen([*self._argv, "live"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            yield LiveClient(process)
        finally:
            process.kill()
            process.communicate()

    def check(self, state: object) -> None:
        """A whole session with the restored server; AssertionError with the client's traceback when something is amiss."""
        done = run([*self._argv, "check", json.dumps(state)], check=False, timeout_s=60)
        answer = json.loads(done.stdout) if done.stdout else {}
        assert "check" in answer, f"{answer.get('failed', 'no answer')}\n{done.stderr}"


class LiveClient:
    """Connections that stay. `state` is what the server holds now."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self.state = self._hear("state")

    def go_on(self) -> object:
        """Use them again; AssertionError with the client's traceback when they do not work."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")
        self._process.stdin.flush()
        return self._hear("live")

    def end(self) -> None:
        """Close the connections, as a client that is killed does."""
        self._process.kill()
        self._process.wait()

    def _hear(self, what: str) -> object:
        assert self._process.stdout is not None
        answer = json.loads(self._process.stdout.readline() or b"{}")
        if what not in answer:
            said = self._process.communicate()[1].decode(errors="replace")
            raise AssertionError(f"{answer.get('failed', 'no answer')}\n{said}")
        return answer[what]
