"""Which servers there are: how each is started in a container, who its client is, how it ends.

A server gets its own address of the container where it can be told one, so that a restore has to move its sockets; the others
listen on all. The JVM, Node.js and PostgreSQL are large: their containers have this machine's /usr, read-only, in place of the
image's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PORT = 8000
_JAVA_SETTINGS = Path("/etc/java-17-openjdk")
_POSTGRES = Path("/usr/lib/postgresql/15/bin")


@dataclass(frozen=True, kw_only=True)
class Program:
    """`command` is given the address to listen on. `needs`: programs of this machine, bound into the container with all of /usr.

    `java`: a source that is compiled to /classes. `reload`: a signal that makes it replace its workers. `volume`: its files are
    on a volume at /data, so it is stopped by the checkpoint and each restore has the volume as it was then. `client_here`: its
    client runs on this machine's Python, outside of the image. `user`: who it becomes, other than root.
    """

    title: str
    command: Callable[[str], list[str]]
    client: str
    listens: str = "its own address"
    exits: tuple[int, ...] = (0,)
    needs: tuple[Path, ...] = ()
    binds: tuple[str, ...] = ()
    environment: tuple[str, ...] = ()
    java: str = ""
    volume: bool = False
    client_here: bool = False
    user: int = 0
    reload: str = ""
    note: str = ""

    def missing(self) -> Path | None:
        """A program of this machine that it needs and that is not here."""
        return next((path for path in self.needs if not path.exists()), None)


def _python(script: str) -> Callable[[str], list[str]]:
    return lambda address: ["python3", f"/app/{script}", address, str(PORT)]


def _shell(script: str) -> Callable[[str], list[str]]:
    return lambda address: ["sh", "-c", script.replace("ADDRESS", address)]


def _which(name: str) -> Path:
    return Path(shutil.which(name) or f"/usr/bin/{name}").resolve()


_REDIS = f"mkdir -p /data && cd /data && exec redis-server --bind ADDRESS --port {PORT} --protected-mode no"
_NGINX = "mkdir -p /data/www /var/log/nginx /var/lib/nginx && exec /usr/sbin/nginx -c /app/nginx.conf"
_UVICORN = ["python3", "-m", "uvicorn", "--app-dir", "/app", "--loop", "uvloop", "--http", "h11", "--log-level", "warning"]
# A client that is idle while a slow machine makes a checkpoint is not to be dropped.
_UVICORN += ["--timeout-keep-alive", "600"]

_AS_APP = "setpriv --reuid=1000 --regid=1000 --clear-groups"
_POSTGRESQL = f"""if [ ! -e /data/db/PG_VERSION ]; then
  {_AS_APP} {_POSTGRES}/initdb -D /data/db -U postgres -A trust -E UTF8 --locale=C -N >/dev/null || exit 1
  echo host all all all trust >>/data/db/pg_hba.conf
fi
exec {_AS_APP} {_POSTGRES}/postgres -D /data/db -p {PORT} -c listen_addresses='*' -c unix_socket_directories=/tmp \\
  -c client_connection_check_interval=1s"""

CATALOGUE: dict[str, Program] = {
    "http2": Program(title="HTTP/2 (h2, asyncio)", command=_python("http2_server.py"), client="http2"),
    "grpc": Program(title="gRPC (grpcio)", command=_python("grpc_server.py"), client="grpc"),
    "websocket": Program(title="WebSocket (websockets)", command=_python("websocket_server.py"), client="websocket"),
    "redis": Program(title="Redis", command=_shell(_REDIS), client="redis"),
    "nginx": Program(
        title="nginx, two workers",
        command=_shell(_NGINX),
        client="nginx",
        listens="all, a socket for each family",
        reload="HUP",
    ),
    "multiprocessing": Program(title="Python multiprocessing", command=_python("mp_server.py"), client="http"),
    "uvicorn": Program(
        title="uvicorn on uvloop",
        command=lambda address: [*_UVICORN, "--host", address, "--port", str(PORT), "asgi_app:app"],
        client="http",
        note="libuv 1.44 has no io_uring; newer ones use it unless UV_USE_IO_URING=0",
    ),
    "node": Program(
        title="Node.js",
        command=lambda address: [str(_which("node")), "/app/node_server.js", "::", str(PORT)],
        client="http",
        listens="all, one socket for both families",
        needs=(_which("node"),),
        environment=("UV_USE_IO_URING=0",),
        note="UV_USE_IO_URING=0",
    ),
    "jvm": Program(
        title="JVM",
        command=lambda address: [str(_which("java")), "-Xmx128m", "-cp", "/classes", "JvmServer", "::", str(PORT)],
        client="http",
        listens="all, one socket for both families",
        exits=(143,),
        needs=(_which("java"), _which("javac"), _JAVA_SETTINGS),
        binds=(str(_JAVA_SETTINGS),),
        java="JvmServer.java",
    ),
    "postgres": Program(
        title="PostgreSQL, its data on a volume",
        command=_shell(_POSTGRESQL),
        client="postgres",
        listens="all, a socket for each family",
        needs=(_POSTGRES / "postgres", _POSTGRES / "psql"),
        volume=True,
        client_here=True,
        user=1000,
        note="the checkpoint is made with --stop, and the volume is as it was then",
    ),
}
