"""config.dump and spec.dump as podman would have written them, for an image that podman did not make.

Only what `podman container restore --import` needs (libpod.ContainerConfig, 4.3 to 5.8): everything else podman works out itself.
The engine's own bind mounts (/etc/hosts...) leave the spec, because podman then adds those of the new container.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

from smr.images.image import Image, Layer
from smr.proto.checkpoint import Source
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Json, as_list, as_object

_ENGINE_MOUNTS = frozenset({"/etc/hosts", "/etc/resolv.conf", "/etc/hostname", "/run/.containerenv", "/run/secrets", "/dev/shm"})
_OURS = ("smr.", "org.criu.")
_SHM_BYTES = 65536000
_SIGTERM = 15


def spec_dump(spec: Mapping[str, object]) -> Json:
    """The spec without what belonged to the source's engine: its mounts, hooks, namespaces of its own making, our annotations."""
    document = {key: value for key, value in spec.items() if key != "hooks"}
    document["mounts"] = [mount for mount in map(_mount, as_list(spec.get("mounts"), "mounts")) if not _is_engines(mount)]
    annotations = as_object(spec.get("annotations"), "annotations")
    document["annotations"] = {key: value for key, value in annotations.items() if not key.startswith(_OURS)}
    linux = as_object(spec.get("linux"), "linux")
    namespaces = [as_object(entry, "namespaces[]") for entry in as_list(linux.get("namespaces"), "linux.namespaces")]
    linux = linux | {"namespaces": [{"type": entry.get("type")} for entry in namespaces]}
    document["linux"] = {key: value for key, value in linux.items() if key != "cgroupsPath"}
    return document


def config_dump(image: Image, spec: Json, inspect: Layer | None) -> Json:
    """A container's config for `image`. UNSUPPORTED when nothing says what its root was."""
    source = image.config.source
    process = as_object(spec.get("process"), "process")
    known = _inspected(inspect)
    return {
        "id": source.container_id if re.fullmatch(r"[0-9a-f]{64}", source.container_id) else image.digest.removeprefix("sha256:"),
        "name": _name(image),
        "lockID": 0,
        "idMappingsOptions": {"HostUIDMapping": True, "HostGIDMapping": True},
        **_root(source, _image_id(source, known)),
        "shmSize": _SHM_BYTES,
        "staticDir": "",
        "createWorkingDir": True,
        "secretsPath": "",
        "storageOpts": None,
        "privileged": False,
        **_network(image, known),
        "command": list(as_list(process.get("args"), "process.args")),
        "stopSignal": _SIGTERM,
        "stopTimeout": 10,
        "createdTime": image.created,
        "checkpointedTime": image.created,
        "runtime": runtime_name(image),
        "cgroupsMode": "enabled",
        "cgroupParent": "",
        "logPath": "",
        "logTag": "",
        "logSize": 0,
        "logDriver": "k8s-file",
        "postConfigureNetNS": False,
        "sdnotifyMode": "ignore",
        "umask": "0022",
        "healthcheck": None,
        "mountAllDevices": False,
        "stdin": False,
    }


def runtime_name(image: Image) -> str:
    """The runtime that podman is to restore with, which it takes from config.dump and wants to be one it knows."""
    return "crun" if "crun" in image.config.host.runtime else "runc"


def own_config(image: Image, layer: Layer) -> bytes:
    """podman's own config.dump. A container that ran on our runtime asks for the real one, so that any podman takes it."""
    data = layer.path.read_bytes()
    document = as_object(json.loads(data), "config.dump")
    if "smr" not in str(document.get("runtime", "")):
        return data
    return json.dumps(document | {"runtime": runtime_name(image)}, indent=2).encode()


def _root(source: Source, image_id: str) -> Json:
    if source.image and image_id:
        return {"rootfsImageID": image_id, "rootfsImageName": source.image, "RawImageName": source.image}
    if source.rootfs:
        return {"rootfs": source.rootfs}
    raise SmrError(
        "podman needs the source container's image, and the checkpoint does not name one",
        hint="export with --format oci instead",
        code=Code.UNSUPPORTED,
    )


def _inspected(layer: Layer | None) -> Json:
    """What `podman inspect` said of the source; {} where it was no podman's."""
    try:
        return {} if layer is None else as_object(json.loads(layer.path.read_bytes()), "inspect.json")
    except (ValueError, SmrError):
        return {}


def _image_id(source: Source, known: Json) -> str:
    """podman's id of the image: what it said itself, else the image's name, which podman resolves as well."""
    if found := str(known.get("Image") or ""):
        return found.removeprefix("sha256:")
    return source.image_digest.removeprefix("sha256:") if source.engine == "podman" else source.image


def _network(image: Image, known: Json) -> Json:
    """The networks and published ports that the source had; podman's default network for a container that had an address."""
    if not image.config.addresses:
        return {"createNetNS": False}
    networks = as_object(as_object(known.get("NetworkSettings"), "NetworkSettings").get("Networks"), "Networks")
    bindings = as_object(as_object(known.get("HostConfig"), "HostConfig").get("PortBindings"), "PortBindings")
    return {
        "createNetNS": True,
        "networkMode": "bridge",
        "newNetworks": {name: {} for name in networks} or {"podman": {}},
        "newPortMappings": [
            mapping
            for key, hosts in bindings.items()
            for host in as_list(hosts, key)
            for mapping in _ports(key, as_object(host, key))
        ],
    }


def _ports(key: str, host: Json) -> Iterator[Json]:
    """A port mapping of `podman inspect`, "8000/tcp": [{"HostIp": "", "HostPort": "18000"}], as config.dump has it."""
    port, _, protocol = key.partition("/")
    on_host = str(host.get("HostPort") or "0")
    if port.isdigit() and on_host.isdigit():
        numbers = {"container_port": int(port), "host_port": int(on_host), "range": 1}
        yield {"host_ip": str(host.get("HostIp") or ""), "protocol": protocol or "tcp", **numbers}


def _name(image: Image) -> str:
    wanted = image.config.source.container_name or image.name or "restored"
    return re.sub(r"[^a-zA-Z0-9_.-]+", "-", wanted).lstrip("-_.") or "restored"


def _mount(value: object) -> Json:
    return as_object(value, "mounts[]")


def _is_engines(mount: Json) -> bool:
    options = as_list(mount.get("options"), "mounts[].options")
    bind = mount.get("type") == "bind" or "bind" in options or "rbind" in options
    return bind and mount.get("destination") in _ENGINE_MOUNTS
