"""An agent of a test's node, and its clients."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from tests.integration.command import Done, eventually, run

_CLIENT = Path(__file__).with_name("agent_client.py")


class Agent:
    """One agent: started, killed and started again by the test. `env` is its node's."""

    def __init__(self, run_dir: Path, env: Mapping[str, str], program: Sequence[object]) -> None:
        self.socket, self.web, self.run_dir = run_dir / "agent.sock", run_dir / "agent-web.sock", run_dir
        self.env, self.program = dict(env), [str(word) for word in program]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *flags: str) -> None:
        """Start it, and wait until it says that it is ready, as systemd would."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        address = self.run_dir / "notify"
        address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.bind(str(address))
            notify.settimeout(30)
            env = {**self.env, "NOTIFY_SOCKET": str(address)}
            self.process = subprocess.Popen([*self.program, f"--listen=unix:{self.web}", *flags], env=env)
            assert notify.recv(100) == b"READY=1"
        address.unlink()

    @property
    def pid(self) -> int:
        """Its process."""
        assert self.process is not None
        return self.process.pid

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send it a signal; its exit status, negative for the signal that killed it."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(20)

    def argv(self, call: str, **members: object) -> list[str]:
        """The command of a client."""
        return [sys.executable, str(_CLIENT), str(self.socket), call, *(f"{k}={json.dumps(v)}" for k, v in members.items())]

    def call(self, call: str, **members: object) -> list[dict[str, object]]:
        """All replies of a call."""
        done = run(self.argv(call, **members), env=self.env)
        return [json.loads(line) for line in done.stdout.splitlines()]

    def one(self, call: str, **members: object) -> dict[str, object]:
        """The only reply of a call."""
        (reply,) = self.call(call, **members)
        return reply

    @contextlib.contextmanager
    def calling(self, call: str, **members: object) -> Iterator[subprocess.Popen[str]]:
        """A call under way; its replies are lines of stdout. The client is killed in the end."""
        with subprocess.Popen(self.argv(call, **members), env=self.env, stdout=subprocess.PIPE, text=True) as client:
            try:
                yield client
            finally:
                client.kill()

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a page."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(60)
            connection.connect(str(self.web))
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: agent\r\n\r\n".encode())
            answer = b"".join(iter(lambda: connection.recv(1 << 16), b""))
        head, _, body = answer.decode().partition("\r\n\r\n")
        return int(head.split()[1]), body

    def metrics(self) -> dict[tuple[str, ...], float]:
        """Every sample: its name, then "label=value" in order."""
        status, body = self.get("/metrics")
        assert status == 200
        return {
            (sample.name, *(f"{name}={value}" for name, value in sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(body)
            for sample in family.samples
        }

    def counts(self, *sample: str, value: float) -> None:
        """Wait until a sample has a value."""
        eventually(lambda: self.metrics().get(sample) == value, what=f"{sample} = {value}")

    def resident_bytes(self) -> int:
        """Memory in use."""
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return int(next(line.split()[1] for line in text.splitlines() if line.startswith("Rss:"))) << 10

    def switches(self) -> int:
        """How often any of its threads has slept so far: a thread that looks by the clock sleeps again each time."""
        found = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(OSError):
                lines = (task / "status").read_text().splitlines()
                found += sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
        return found

    def workers(self) -> list[int]:
        """Processes that do an agent's work, of this node."""
        mark = f"SMR_RUN={self.run_dir}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and b"smr.shim.agent.work" in (entry / "cmdline").read_bytes():
                    found += [int(entry.name)] if mark in (entry / "environ").read_bytes() else []
        return found


@contextlib.contextmanager
def ended(agent: Agent) -> Iterator[Agent]:
    """The agent ends with the test."""
    try:
        yield agent
    finally:
        if agent.process is not None and agent.process.poll() is None:
            os.kill(agent.process.pid, signal.SIGKILL)
            agent.process.wait()


__all__ = ["Agent", "Done", "ended"]
