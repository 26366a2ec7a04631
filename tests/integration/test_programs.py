"""Real servers with live clients, restored with the same addresses and with new ones, over IPv4 and IPv6: docs/programs.md.

Here each server runs once, on some engine; `dev/programs` runs them all everywhere and writes the table.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tests.integration.conftest import Machine
from tests.integration.programs import image
from tests.integration.programs.catalogue import CATALOGUE
from tests.integration.programs.matrix import FAMILIES, MODES, OK, Cell, Run
from tests.integration.programs.places import PLUGINS, Place, containerd_place, podman_place

ENGINES = ("podman", "containerd_1", "containerd_2")
_CHOSEN = [
    ("http2", "podman", "IPv6", ("new",)),
    ("grpc", "containerd_2", "IPv4", ("new",)),
    ("websocket", "containerd_1", "IPv6", ("same", "kept")),
    ("redis", "podman", "IPv4", ("same", "new")),
    ("nginx", "containerd_2", "IPv6", ("new",)),
    ("multiprocessing", "containerd_1", "IPv4", ("new",)),
    ("uvicorn", "podman", "IPv6", ("same", "kept")),
    ("node", "containerd_2", "IPv4", ("same",)),
    ("jvm", "podman", "IPv4", ("new",)),
    ("postgres", "podman", "IPv6", ("new",)),
]
_TABLE = os.environ.get("SMR_PROGRAMS_TABLE", "")
_MODES = tuple(os.environ.get("SMR_PROGRAMS_MODES", " ".join(MODES)).split())
_ALL = [(program, engine, family, _MODES) for engine in ENGINES for program in CATALOGUE for family in FAMILIES]


@pytest.fixture(scope="session")
def root(machine: Machine) -> Path:
    """The image's files, where clients run."""
    try:
        return image.client_root(machine.engines, machine.box.base / "clients")
    except LookupError as error:
        pytest.skip(str(error))


class Table:
    """The file that SMR_PROGRAMS_TABLE names, if it does: all cells that were run, written after each test."""

    def __init__(self, path: str) -> None:
        self._path = Path(path) if path else None
        self._cells: list[dict[str, object]] = []

    def append(self, cells: list[Cell]) -> None:
        """A restore's cell has its program's title in the file."""
        self._cells += [asdict(cell) | {"program": CATALOGUE[cell.program].title} for cell in cells]
        if self._path:
            self._path.write_text(json.dumps(self._cells))


@pytest.fixture(scope="session")
def table() -> Table:
    """Where cells are recorded."""
    return Table(_TABLE)


@pytest.fixture(scope="session")
def place(request: pytest.FixtureRequest, root: Path, machine: Machine) -> Iterator[Place]:
    """An engine with the servers' image and a network of both families."""
    name = request.param
    if name != "podman" and not (PLUGINS / "bridge").exists():
        pytest.skip(f"no CNI plugins in {PLUGINS}: apt-get install containernetworking-plugins")
    engine = request.getfixturevalue("bridge" if name == "podman" else name)
    archive = image.archive(machine.engines)
    engine(*(("load", "-q", "-i", archive) if name == "podman" else ("images", "import", archive)))
    with podman_place(engine) if name == "podman" else containerd_place(engine) as made:
        yield made


@pytest.mark.parametrize(
    ("name", "place", "family", "modes"), _ALL if _TABLE else _CHOSEN, indirect=["place"], scope="session", ids=str
)
def test_a_server_and_its_clients(
    name: str, place: Place, family: str, modes: tuple[str, ...], root: Path, table: Table, tmp_path: Path
) -> None:
    """A checkpoint leaves the server's clients alone; the restored server has its state, serves a whole session of new clients
    whatever its addresses are now, and ends when it is asked to. Clients whose connections are kept go on where they were."""
    program = CATALOGUE[name]
    if (missing := program.missing()) is not None:
        pytest.skip(f"{missing} is not on this machine")
    binds = (f"{image.classes(program.java, tmp_path / 'classes')}:/classes:ro",) if program.java else ()
    run = Run(place, name, program, family, root, binds)
    if run.mapped and place.engine.name != "podman":
        pytest.skip("a server that is not root needs CAP_SYS_RESOURCE here: ctr gives no user namespace a network of CNI's")
    cells = run.cells(modes)
    table.append(cells)
    assert "\n".join(cell.result for cell in cells if cell.result != OK) == ""
    assert {cell.address for cell in cells} == set(modes)


@pytest.mark.skipif(bool(_TABLE), reason="no cell of the table")
@pytest.mark.parametrize("place", ["containerd_2"], indirect=True, scope="session")
def test_io_uring_is_refused_with_the_remedy(place: Place, root: Path) -> None:
    """A Node.js that uses io_uring cannot be checkpointed: the message names the variable that helps, and clients go on."""
    program = replace(CATALOGUE["node"], environment=("UV_USE_IO_URING=1",))
    if (missing := program.missing()) is not None:
        pytest.skip(f"{missing} is not on this machine")
    run = Run(place, "node", program, "IPv4", root)
    with run.source() as (host, client), client.live() as live:
        pid = place.engine.pid("source")
        if not any("io_uring" in os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()):
            pytest.skip(f"Node.js has no io_uring here, at {host}")
        done = place.engine.checkpoint("source", "refused:1", check=False)
        assert done.returncode != 0
        assert "UV_USE_IO_URING=0" in done.stderr, done.stderr
        print(done.stderr)
        live.go_on()
    assert "refused" not in place.engine.node.smr("images", "ls").stdout
