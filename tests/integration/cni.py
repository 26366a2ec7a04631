"""A network of the real CNI plugins: a bridge, addresses of both families by host-local, published ports by portmap.

`Network` is for tests. As a program it is an OCI hook that connects a container the way nerdctl's does: by the namespace of the
pid in the state that it gets. Standard library only, and no module of ours: the hook runs with an empty environment.

    cni.py add|del FOLDER [NETNS] [ID]     FOLDER/conf.json: the plugins; FOLDER/calls: what was asked
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

PLUGINS = Path("/usr/lib/cni")


class Network:
    """One network with a bridge of its own. `third` and `bridge` keep it apart from those of other sessions."""

    def __init__(self, folder: Path, number: int = 0, *, ipv6: bool = True, ports: dict[int, int] | None = None) -> None:
        self.folder = folder
        self.third = (os.getpid() + 77 * number) % 250
        self.bridge = f"smrc{os.getpid() % 100000}x{number}"
        ranges = [[{"subnet": f"10.215.{self.third}.0/24"}]]
        routes = [{"dst": "0.0.0.0/0"}]
        if ipv6:
            ranges.append([{"subnet": f"fd5a:{os.getpid() % 10000}:{number}::/64"}])
            routes.append({"dst": "::/0"})
        ipam = {"type": "host-local", "dataDir": str(folder / "ipam"), "ranges": ranges, "routes": routes}
        plugins: list[dict[str, object]] = [
            {"type": "bridge", "bridge": self.bridge, "isGateway": True, "hairpinMode": True, "ipam": ipam}
        ]
        if ports:
            mappings = [{"hostPort": host, "containerPort": inside, "protocol": "tcp"} for host, inside in ports.items()]
            plugins.append({"type": "portmap", "snat": True, "runtimeConfig": {"portMappings": mappings}})
        folder.mkdir(parents=True, exist_ok=True)
        conf = {"cniVersion": "0.4.0", "name": self.bridge, "plugins": plugins}
        (folder / "conf.json").write_text(json.dumps(conf))

    def hooks(self, *, broken: str = "", slow: str = "") -> dict[str, list[dict[str, object]]]:
        """`hooks` of a spec; `broken` is a stage that fails after it has done its work, `slow` seconds that "add" waits first."""

        def hook(verb: str, stage: str) -> dict[str, object]:
            args = [sys.executable, str(Path(__file__)), verb, str(self.folder)]
            environment = [
                "PATH=/usr/sbin:/usr/bin:/sbin:/bin",
                *(["CNI_BROKEN=1"] if stage == broken else []),
                f"CNI_SLOW={slow}",
            ]
            return {"path": sys.executable, "args": args, "env": environment, "timeout": 30}

        return {"createRuntime": [hook("add", "createRuntime")], "poststop": [hook("del", "poststop")]}

    def calls(self) -> list[str]:
        """What plugins were asked: "add ID" and "del ID"."""
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []

    def leases(self) -> list[str]:
        """Addresses that are in use."""
        folder = self.folder / "ipam" / self.bridge
        return (
            sorted(file.name for file in folder.iterdir() if file.name[0].isdigit() or ":" in file.name)
            if folder.exists()
            else []
        )

    def close(self) -> None:
        """Take the bridge away."""
        subprocess.run(["ip", "link", "del", self.bridge], check=False, capture_output=True)


def call(verb: str, folder: Path, container: str, netns: str) -> None:
    """Run the plugins of the network in order, or backwards."""
    with (folder / "calls").open("a") as file:
        file.write(f"{verb} {container}\n")
    if verb == "add":
        time.sleep(float(os.environ.get("CNI_SLOW") or 0))
    conf = json.loads((folder / "conf.json").read_text())
    kept = folder / f"result-{container}.json"
    result = json.loads(kept.read_text()) if kept.exists() else None
    plugins = conf["plugins"] if verb == "add" else conf["plugins"][::-1]
    for plugin in plugins:
        given = {**plugin, "cniVersion": conf["cniVersion"], "name": conf["name"]}
        if result is not None:
            given["prevResult"] = result
        environment = {
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "CNI_COMMAND": verb.upper(),
            "CNI_CONTAINERID": container,
            "CNI_NETNS": netns,
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(PLUGINS),
        }
        done = subprocess.run(
            [PLUGINS / plugin["type"]], input=json.dumps(given), env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise SystemExit(f"{plugin['type']} {verb}: {done.stdout} {done.stderr}")
        if verb == "add":
            result = json.loads(done.stdout)
    if verb == "add":
        kept.write_text(json.dumps(result))
    else:
        kept.unlink(missing_ok=True)


def _main(verb: str, folder: str, netns: str = "", container: str = "") -> None:
    if not netns:
        state = json.load(sys.stdin)
        container = state["id"]
        assert Path(state["bundle"], "config.json").exists()
        netns = f"/proc/{state['pid']}/ns/net" if state.get("pid") else ""
    call(verb, Path(folder), container, netns)
    if os.environ.get("CNI_BROKEN"):
        raise SystemExit("broken by the test")


if __name__ == "__main__":
    _main(*sys.argv[1:])
