"""One source of the matrix: a server with live clients, its checkpoint, and a restore for each way of addressing.

A source is started with an IPv4 and an IPv6 address, and its clients come by one of them. After the checkpoint it still serves
those same clients. Then it is gone, and each restore has a container with the same addresses or with new ones. Or the clients
are moved with it: the source ends with its checkpoint, and they go on with the container that has its addresses.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.integration.command import eventually, run
from tests.integration.programs.catalogue import PORT, Program
from tests.integration.programs.clients import Client, LiveClient
from tests.integration.programs.places import FIRST_ID, Place

FAMILIES = ("IPv4", "IPv6")
SAME, NEW, KEPT = "same", "new", "kept"
MODES = (SAME, NEW, KEPT)
OK = "ok"
_SOURCE, _NEW = 10, 20


@dataclass(kw_only=True)
class Cell:
    """One restore. `stages` are seconds by name, in the order of their starts; `restore_s` is the end of the last.

    `share_s` is what SMR itself does until the container is created: all stages but `create` (the runtime and CRIU) and `fill`
    (memory); `share_cpu_s` is the processor time in them, which other work on the machine does not lengthen.
    """

    program: str
    engine: str
    family: str
    address: str
    result: str = "not run"
    restore_s: float = 0.0
    share_s: float = 0.0
    share_cpu_s: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)


class Volume:
    """A directory for /data of the host's `user`, and a copy of it as it was at the checkpoint."""

    def __init__(self, folder: Path, user: int) -> None:
        self.path, self._kept, self._user = folder / "data", folder / "data-kept", user

    def empty(self) -> None:
        """A new one."""
        self.drop()
        self.path.mkdir()
        os.chown(self.path, self._user, self._user)

    def keep(self) -> None:
        """Nothing runs on it now: this is what restores begin with."""
        self.path.rename(self._kept)

    def as_it_was(self) -> None:
        """What it was when it was kept."""
        shutil.rmtree(self.path, ignore_errors=True)
        run(["cp", "-a", self._kept, self.path])

    def drop(self) -> None:
        """Both are gone."""
        for folder in (self.path, self._kept):
            shutil.rmtree(folder, ignore_errors=True)


class Run:
    """A server at a place, whose clients come by one family; `root` is where clients run, `binds` what its containers mount."""

    def __init__(self, place: Place, name: str, program: Program, family: str, root: Path, binds: tuple[str, ...] = ()) -> None:
        self.place, self.name, self.program, self.family, self.root = place, name, program, family, root
        self.image = f"{name}-{family.lower()}:1"
        self.mapped = program.user != 0 and not may_raise_limits()
        shared = [f"{path}:{path}:ro" for path in ("/usr", *program.binds)] if program.needs else []
        self.volume = Volume(place.engine.path, program.user + self.mapped * FIRST_ID) if program.volume else None
        self.binds = [*shared, *binds, *([f"{self.volume.path}:/data"] if self.volume else [])]

    def cells(self, modes: tuple[str, ...]) -> list[Cell]:
        """A source and its restores, one cell for each mode. A cell that fails says why, and the next one is tried."""
        cells = [Cell(program=self.name, engine=self.place.engine.name, family=self.family, address=mode) for mode in modes]
        closed, kept = [cell for cell in cells if cell.address != KEPT], [cell for cell in cells if cell.address == KEPT]
        if closed:
            with self._tidy(closed):
                state = self._checkpointed()
                for cell in closed:
                    with _told(cell, self.place):
                        self._restored(cell, state)
                    self.place.remove("again")
        for cell in kept:
            with self._tidy([cell]):
                self._moved(cell)
        return cells

    @contextmanager
    def _tidy(self, cells: list[Cell]) -> Iterator[None]:
        """What goes wrong goes wrong for all `cells`; containers, volume and image are gone afterwards."""
        try:
            yield
        except AssertionError as error:
            for cell in cells:
                cell.result = str(error)
        finally:
            self.place.remove("again")
            if self.volume:
                self.volume.drop()
            self.place.engine.node.smr("images", "rm", self.image, check=False)

    @contextmanager
    def source(self) -> Iterator[tuple[str, Client]]:
        """The server as it is started from its image, while it runs: its address, and who its clients are."""
        addresses = self.place.subnets.pair(_SOURCE)
        host = self._host(addresses)
        if self.volume:
            self.volume.empty()
        try:
            self._start("source", addresses)
            eventually(lambda: _listens(host), what=f"something listens at {host}")
            yield host, Client(self.root, self.program, host)
        except AssertionError as error:
            raise AssertionError(_why(error, self.place, "source")) from error
        finally:
            self.place.remove("source")

    def _checkpointed(self) -> object:
        with self.source() as (_, client), client.live() as live:
            if self.volume:
                self.place.engine.checkpoint("source", self.image, "--stop")
                self.volume.keep()
            else:
                self.place.engine.checkpoint("source", self.image)
                live.go_on()
        return live.state

    def _moved(self, cell: Cell) -> None:
        """The live clients' connections survive: the source ends with the checkpoint, and they go on with the restored server."""
        with self.source() as (_, client), client.live() as live:
            self.place.engine.checkpoint("source", self.image, "--tcp", "established", "--stop")
            if self.volume:
                self.volume.keep()
            self.place.remove("source")
            with _told(cell, self.place):
                self._restored(cell, live.state, live)

    def _restored(self, cell: Cell, state: object, live: LiveClient | None = None) -> None:
        addresses = self.place.subnets.pair(_NEW if cell.address == NEW else _SOURCE)
        if self.volume:
            self.volume.as_it_was()
        asked = {"smr.restore": self.image, "smr.fallback": "fail", **({"smr.tcp": "established"} if live else {})}
        self._start("again", addresses, asked)
        self._measure(cell)
        if live:
            live.go_on()
            live.end()
        client = Client(self.root, self.program, self._host(addresses))
        client.check(state)
        if self.program.reload:
            self.place.engine.kill("again", self.program.reload)
            client.check(state)
        self._ends()

    def _host(self, addresses: tuple[str, str]) -> str:
        """The one of these addresses that clients use."""
        return addresses[FAMILIES.index(self.family)]

    def _start(self, name: str, addresses: tuple[str, str], annotations: Mapping[str, str] | None = None) -> None:
        # The restored container's command is the source's, with the source's address: it must not differ.
        command = self.program.command(self._host(self.place.subnets.pair(_SOURCE)))
        more = {"binds": self.binds, "environment": self.program.environment, "mapped": self.mapped}
        self.place.start(name, command, addresses, annotations=annotations, **more)

    def _measure(self, cell: Cell) -> None:
        record = eventually(lambda: self.place.engine.node.only_record("restored"), what="the record")
        stages = sorted(record["stages"], key=lambda stage: stage["start_s"])
        cell.stages = {stage["name"]: round(stage["end_s"] - stage["start_s"], 4) for stage in stages}
        cell.restore_s = round(max(stage["end_s"] for stage in stages), 3)
        own = [stage for stage in stages if stage["name"] not in ("create", "fill", "start", "resume")]
        cell.share_s = round(sum(stage["end_s"] - stage["start_s"] for stage in own), 4)
        cell.share_cpu_s = round(sum(stage["cpu_s"] for stage in own), 4)

    def _ends(self) -> None:
        self.place.engine.kill("again", "TERM")
        eventually(lambda: not self.place.engine.running("again"), what="it ends after SIGTERM")
        code = self.place.engine.wait("again")
        assert code in self.program.exits, f"exit code {code} after SIGTERM, needed {self.program.exits}"


@contextmanager
def _told(cell: Cell, place: Place) -> Iterator[None]:
    try:
        yield
        cell.result = OK
    except AssertionError as error:
        cell.result = _why(error, place, "again")


def _why(error: AssertionError, place: Place, name: str) -> str:
    try:
        said = place.engine.logs(name)
    except AssertionError:
        said = ""
    return f"{name}: {error}\nits output:\n{said[-1500:]}"


def _listens(host: str) -> bool:
    socket.create_connection((host, PORT), timeout=1).close()
    return True


def may_raise_limits() -> bool:
    """Whether CRIU can dump a process of another user than root outside of a user namespace: CAP_SYS_RESOURCE."""
    cap_sys_resource = 24
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff")]
    return bool(int(line.split()[1], 16) >> cap_sys_resource & 1)
