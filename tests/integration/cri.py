"""A kubelet's side of the CRI: pods on a containerd of our own, over gRPC, with real CNI plugins.

The daemon runs in a network namespace of its own, which is "the node": the pods' bridge and its firewall rules are there, and
vanish with it. What a kubelet makes for a pod is made here too: cgroup parent, log folder, hosts file, termination message,
service-account token, volumes; and taken away with the pod.

    PATH/pods/UID/     logs/ hosts token/ volumes, and termination-log of each container
"""

from __future__ import annotations

import contextlib
import ctypes
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from smr.shim.register import containerd as register
from smr.shim.register import containerd_dump
from smr.shim.register.files import Edit, File, Site
from tests.integration import cri_pb2 as pb
from tests.integration import pauseimage, testimage
from tests.integration.command import Done, eventually, run
from tests.integration.containerd import Containerd
from tests.integration.node import Node
from tests.integration.sandbox import Sandbox

PLUGINS = Path("/usr/lib/cni")
NEEDED = ("bridge", "host-local", "loopback", "portmap")
TOKEN_FOLDER = "/var/run/secrets/kubernetes.io/serviceaccount"
_CLONE_NEWNET = 0x40000000
CREATED, RUNNING, EXITED, UNKNOWN = range(4)
# Where CAP_SYS_RESOURCE is missing nobody may lower an oom_score_adj.
_V2 = """
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause}"
restrict_oom_score_adj = true
stream_server_address = "127.0.0.1"
stream_server_port = "0"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{plugins}"
conf_dir = "{base}/net.d"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"""
_V3 = """
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{pause}"
[plugins."io.containerd.grpc.v1.cri"]
stream_server_address = "127.0.0.1"
stream_server_port = "0"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".cni]
{key} = {value}
conf_dir = "{base}/net.d"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"""
# What a kubelet asks for by default: the pod's network and IPC, pids of the container's own; and the usual paths of /proc.
_NAMESPACES = pb.NamespaceOption(network=0, pid=1, ipc=0)
_MASKED = ("/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/scsi", "/sys/firmware")
_READONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_R = TypeVar("_R", bound=Message)


class CriError(AssertionError):
    """A call that the engine refused. `details` is what it says, which a kubelet would put into an event of the pod."""

    def __init__(self, method: str, error: grpc.RpcError) -> None:
        self.details = str(error.details())
        super().__init__(f"{method}: {error.code().name}: {self.details}")


@dataclass
class Pod:
    """A pod sandbox that runs. `containers` maps names to ids of the newest attempt."""

    id: str
    name: str
    uid: str
    folder: Path
    config: pb.PodSandboxConfig
    handler: str
    address: str = ""
    volumes: Mapping[str, Path] = field(default_factory=dict)
    containers: dict[str, str] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)


class Cri(Containerd):
    """containerd with its CRI plugin, as `install.sh` registers SMR: runtimes `runc` and `smr`, the latter the default."""

    def __init__(self, path: Path, node: Node, box: Sandbox, *, folder: Path | None, version: str) -> None:
        super().__init__(path, node, box, folder=folder, version=version)
        self.box, self.namespace = box, "k8s.io"
        self.env["CONTAINERD_NAMESPACE"] = self.namespace
        self.netns = f"{box.token}-{version[0]}"
        self.pods: list[Pod] = []
        self._serial = itertools.count(1)
        self._major = int(version[0])
        self._configure()
        self._channel: grpc.Channel | None = None
        self._daemon: subprocess.Popen[bytes] | None = None

    def _configure(self) -> None:
        (self.path / "net.d").mkdir()
        third = (os.getpid() * 2 + self._major) % 250
        network = {
            "cniVersion": "0.4.0",
            "name": self.netns,
            "plugins": [
                {
                    "type": "bridge",
                    "bridge": "cni0",
                    "isGateway": True,
                    "ipMasq": False,
                    "hairpinMode": True,
                    "ipam": {
                        "type": "host-local",
                        "dataDir": str(self.path / "addresses"),
                        "ranges": [[{"subnet": f"10.214.{third}.0/24"}]],
                        "routes": [{"dst": "0.0.0.0/0"}],
                    },
                },
                {"type": "portmap", "capabilities": {"portMappings": True}},
            ],
        }
        (self.path / "net.d/10-smrt.conflist").write_text(json.dumps(network))
        file = self.path / "config.toml"
        text = re.sub(r"disabled_plugins = .*", "disabled_plugins = []", file.read_text())
        version = containerd_dump.version(Path(self.program))
        key, value = ("bin_dir", f'"{PLUGINS}"') if version < (2, 1) else ("bin_dirs", f'["{PLUGINS}"]')
        form = _V2 if self._major == 1 else _V3
        values = {"pause": pauseimage.NAME, "plugins": PLUGINS, "base": self.path, "key": key, "value": value}
        file.write_text(text + form.format_map(values))
        # The scripts as they are installed: containerd hands them its own environment.
        (self.path / "smr").mkdir()
        (self.path / "smr/bin").symlink_to(self.node.path / "libexec")
        site = Site(prefix=self.path / "smr", criu=self.node.criu, runtime=self.node.runtime, default_runtime=True)
        by_path = register.uses_runtime_path(version)
        for change in register.plan(site, config=file, major=self._major, by_path=by_path):
            assert isinstance(change, File | Edit), change
            assert change.path == file, change
            file.write_text(change.text)

    def _knows(self, image: str) -> bool:
        request = pb.ImageStatusRequest(image=pb.ImageSpec(image=image))
        return bool(self.call("ImageStatus", request, pb.ImageStatusResponse).image.id)

    def load(self, engines: Path) -> None:
        """Import the test image and the pause image, and wait until the CRI knows them and the network."""
        super().load(engines)
        self("images", "import", pauseimage.archive(engines, self.path / "pause.tar"))
        for name in (testimage.NAME, pauseimage.NAME):
            eventually(partial(self._knows, name), what=f"the CRI knows {name}")
        eventually(self.network_ready, what="the CRI is ready")

    def network_ready(self) -> bool:
        """Whether the engine says that it and its network are ready."""
        conditions = self.call("Status", pb.Empty(), pb.StatusResponse).status.conditions
        return {condition.type for condition in conditions if condition.status} >= {"RuntimeReady", "NetworkReady"}

    @contextlib.contextmanager
    def serving(self) -> Iterator[Cri]:
        """Make the node's network namespace and run the daemon in it."""
        run(["ip", "netns", "add", self.netns])
        self.on_node("ip", "link", "set", "lo", "up")
        try:
            self.start_daemon()
            yield self
        finally:
            self.stop_daemon()
            run(["ip", "netns", "del", self.netns], check=False)

    def start_daemon(self) -> None:
        """Start containerd and wait until it serves."""
        with self.log.open("ab") as log:
            argv = ["nsenter", f"--net=/run/netns/{self.netns}", self.program, "--config", str(self.path / "config.toml")]
            self._daemon = subprocess.Popen(argv, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        eventually(self._serves, what="containerd serves")
        if self._daemon.poll() is not None:
            raise OSError(f"containerd ended: {self.log.read_text()[-2000:]}")
        self._channel = grpc.insecure_channel(f"unix://{self.state}/containerd.sock")
        eventually(lambda: self.call("Status", pb.Empty(), pb.StatusResponse) is not None, what="the CRI answers")

    @property
    def daemon_pid(self) -> int:
        """The daemon that serves now; a test may have started it anew."""
        return self._daemon.pid if self._daemon is not None else 0

    def _serves(self) -> bool:
        assert self._daemon is not None
        return self._daemon.poll() is not None or self("version", check=False, timeout_s=10).returncode == 0

    def stop_daemon(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End containerd; pods go on."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        if self._daemon is not None:
            self._daemon.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._daemon.wait(10)
            self._daemon.kill()
            self._daemon.wait()

    def on_node(self, *words: str, check: bool = True) -> Done:
        """A command in the node's network, where a kubelet's probes come from."""
        return run(["nsenter", f"--net=/run/netns/{self.netns}", *words], check=check)

    def call(self, method: str, request: Message, answer: type[_R], *, timeout_s: float = 90) -> _R:
        """One call of the CRI. Raises CriError."""
        assert self._channel is not None
        service = "ImageService" if method == "ImageStatus" else "RuntimeService"
        invoke: Callable[..., _R] = self._channel.unary_unary(
            f"/runtime.v1.{service}/{method}",
            request_serializer=type(request).SerializeToString,
            response_deserializer=answer.FromString,
        )
        try:
            return invoke(request, timeout=timeout_s)
        except grpc.RpcError as error:
            raise CriError(method, error) from None

    def run_pod(
        self,
        name: str,
        annotations: Mapping[str, str] | None = None,
        *,
        handler: str = "smr",
        namespace: str = "default",
        volumes: Sequence[str] = (),
    ) -> Pod:
        """RunPodSandbox, as a kubelet does it."""
        uid = f"{self.netns}-{next(self._serial)}"
        folder = self.path / "pods" / uid
        for part in ("logs", "token", *volumes):
            (folder / part).mkdir(parents=True)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n# hosts of {name}\n")
        run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder / "token"])
        (folder / "token/token").write_text(f"token of {uid}\n")
        config = pb.PodSandboxConfig(
            metadata=pb.PodSandboxMetadata(name=name, uid=uid, namespace=namespace),
            hostname=name,
            log_directory=str(folder / "logs"),
            dns_config=pb.DNSConfig(servers=["10.96.0.10"], searches=[f"{namespace}.svc.cluster.local"]),
            labels={"io.kubernetes.pod.name": name, "io.kubernetes.pod.namespace": namespace, "io.kubernetes.pod.uid": uid},
            annotations=dict(annotations or {}),
            linux=pb.LinuxPodSandboxConfig(
                cgroup_parent=f"/{self.box.token}/pod-{uid}",
                security_context=pb.LinuxSandboxSecurityContext(namespace_options=_NAMESPACES),
            ),
        )
        pod = Pod("", name, uid, folder, config, handler, volumes={part: folder / part for part in volumes})
        self.pods.append(pod)
        request = pb.RunPodSandboxRequest(config=config, runtime_handler=handler)
        pod.id = self.call("RunPodSandbox", request, pb.RunPodSandboxResponse).pod_sandbox_id
        pod.address = self.address(pod)
        return pod

    def create_container(
        self,
        pod: Pod,
        name: str,
        *workload: str,
        command: Sequence[str] = ("python3", "/app/workload.py"),
        annotations: Mapping[str, str] | None = None,
        memory_bytes: int = 0,
        mounts: Sequence[tuple[str, str]] = (),
        image: str = testimage.NAME,
    ) -> str:
        """CreateContainer with the mounts that a kubelet adds; returns the id."""
        attempt = pod.attempts.get(name, -1) + 1
        message = pod.folder / f"{name}-{attempt}-termination-log"
        message.touch()
        bound = [("/etc/hosts", "hosts"), ("/dev/termination-log", message.name), *mounts]
        config = pb.ContainerConfig(
            metadata=pb.ContainerMetadata(name=name, attempt=attempt),
            image=pb.ImageSpec(image=image),
            command=list(command),
            args=list(workload),
            envs=[pb.KeyValue(key="POD_NAME", value=pod.name)],
            mounts=[
                *(pb.Mount(container_path=there, host_path=str(pod.folder / here)) for there, here in bound),
                pb.Mount(container_path=TOKEN_FOLDER, host_path=str(pod.folder / "token"), readonly=True),
            ],
            labels={"io.kubernetes.container.name": name, "io.kubernetes.pod.uid": pod.uid},
            annotations={"io.kubernetes.container.restartCount": str(attempt), **(annotations or {})},
            log_path=f"{name}-{attempt}.log",
            linux=pb.LinuxContainerConfig(
                resources=pb.LinuxContainerResources(cpu_shares=256, memory_limit_in_bytes=memory_bytes, oom_score_adj=900),
                security_context=pb.LinuxContainerSecurityContext(
                    namespace_options=_NAMESPACES, masked_paths=_MASKED, readonly_paths=_READONLY
                ),
            ),
        )
        request = pb.CreateContainerRequest(pod_sandbox_id=pod.id, config=config, sandbox_config=pod.config)
        pod.containers[name] = self.call("CreateContainer", request, pb.CreateContainerResponse).container_id
        pod.attempts[name] = attempt
        return pod.containers[name]

    def start_container(self, pod: Pod, name: str) -> None:
        """StartContainer."""
        self.call("StartContainer", pb.ContainerRequest(container_id=pod.containers[name]), pb.Empty)

    def run_container(self, pod: Pod, name: str, *workload: str, **options: object) -> str:
        """Create and start; the id."""
        found = self.create_container(pod, name, *workload, **options)  # type: ignore[arg-type]
        self.start_container(pod, name)
        return found

    def exec_sync(self, pod: Pod, name: str, *words: str, check: bool = True) -> Done:
        """ExecSync."""
        request = pb.ExecSyncRequest(container_id=pod.containers[name], cmd=words, timeout=30)
        done = self.call("ExecSync", request, pb.ExecSyncResponse)
        assert done.exit_code == 0 or not check, f"{words}: {done.exit_code}: {done.stderr!r}"
        return subprocess.CompletedProcess(list(words), done.exit_code, done.stdout.decode(), done.stderr.decode())

    def query(self, pod: Pod, name: str, path: str = "look", port: int = 8000) -> dict[str, object]:
        """A request to the workload, by an exec in its container."""
        answer: dict[str, object] = json.loads(
            self.exec_sync(pod, name, "wget", "-q", "-O-", f"http://127.0.0.1:{port}/{path}").stdout
        )
        return answer

    def probe(self, pod: Pod, path: str = "look", port: int = 8000) -> dict[str, object]:
        """A request from the node to the pod's address, as a kubelet's probe."""
        return fetch(Path(f"/run/netns/{self.netns}"), pod.address, port, path)

    def forward(self, pod: Pod, path: str = "look", port: int = 8000) -> dict[str, object]:
        """A request to the loopback of the pod's network, as a port-forward makes it."""
        namespace = eventually(lambda: self._namespace(pod), what="the pod has a network")
        return fetch(namespace, "127.0.0.1", port, path)

    def _namespace(self, pod: Pod) -> Path:
        bundle = self.state / "io.containerd.runtime.v2.task" / self.namespace / pod.id
        return Path(f"/proc/{(bundle / 'init.pid').read_text()}/ns/net")

    def answers(self, pod: Pod, port: int = 8000) -> dict[str, object]:
        """Wait until the workload answers a probe."""
        return eventually(lambda: self.probe(pod, port=port), what=f"{pod.name} answers")

    def address(self, pod: Pod) -> str:
        """The pod's IP address."""
        request = pb.PodSandboxRequest(pod_sandbox_id=pod.id)
        return self.call("PodSandboxStatus", request, pb.PodSandboxStatusResponse).status.network.ip

    def status(self, pod: Pod, name: str) -> pb.ContainerStatus:
        """ContainerStatus."""
        request = pb.ContainerRequest(container_id=pod.containers[name])
        return self.call("ContainerStatus", request, pb.ContainerStatusResponse).status

    def memory_limit(self, pod: Pod, name: str) -> int:
        """The limit of the container's cgroup, in bytes."""
        folders = [top / f"pod-{pod.uid}" / pod.containers[name] for top in self.box.tops()]
        files = [folder / file for folder in folders for file in ("memory.max", "memory.limit_in_bytes")]
        return int(next(file for file in files if file.exists()).read_text())

    def stop_container(self, pod: Pod, name: str, grace_s: int = 5) -> pb.ContainerStatus:
        """StopContainer: SIGTERM, and SIGKILL when the grace is over; the status afterwards."""
        self.call("StopContainer", pb.StopContainerRequest(container_id=pod.containers[name], timeout=grace_s), pb.Empty)
        return self.status(pod, name)

    def remove_container(self, pod: Pod, name: str) -> None:
        """RemoveContainer."""
        self.call("RemoveContainer", pb.ContainerRequest(container_id=pod.containers.pop(name)), pb.Empty)

    def pod_log(self, pod: Pod, name: str) -> str:
        """What the container's newest attempt has written, as `kubectl logs` shows it."""
        file = pod.folder / "logs" / f"{name}-{pod.attempts[name]}.log"
        lines = file.read_text().splitlines() if file.exists() else []
        return "".join(f"{line.split(' ', 3)[3]}\n" for line in lines)

    def remove_pod(self, pod: Pod) -> None:
        """StopPodSandbox, RemovePodSandbox, and the kubelet's own cleaning."""
        if pod.id:
            request = pb.PodSandboxRequest(pod_sandbox_id=pod.id)
            for name in list(pod.containers):
                self.stop_container(pod, name, 0)
                self.remove_container(pod, name)
            self.call("StopPodSandbox", request, pb.Empty)
            self.call("RemovePodSandbox", request, pb.Empty)
        run(["umount", pod.folder / "token"], check=False)
        shutil.rmtree(pod.folder, ignore_errors=True)
        for top in self.box.tops():
            with contextlib.suppress(OSError):
                (top / f"pod-{pod.uid}").rmdir()
        self.pods.remove(pod)

    def remove_all(self) -> None:
        """Remove every pod."""
        for pod in list(self.pods):
            self.remove_pod(pod)

    def checkpoint_pod(self, pod: Pod, name: str, image: str, *words: str, check: bool = True) -> Done:
        """`smr checkpoint` of a container of a pod."""
        return self.checkpoint(pod.containers[name], image, *words, check=check)


def fetch(namespace: Path, address: str, port: int, path: str) -> dict[str, object]:
    """GET of a JSON document from within a network namespace. OSError when nobody answers."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_fetch, namespace, address, port, path).result()


def _fetch(namespace: Path, address: str, port: int, path: str) -> dict[str, object]:
    """Network namespaces are a thread's own: this one ends after it."""
    libc = ctypes.CDLL(None, use_errno=True)
    with namespace.open() as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns {namespace}")
    connection = http.client.HTTPConnection(address, port, timeout=5)
    with contextlib.closing(connection):
        connection.request("GET", f"/{path}")
        found: dict[str, object] = json.loads(connection.getresponse().read())
    return found
