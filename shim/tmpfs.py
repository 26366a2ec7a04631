"""Contents of tmpfs mounts that engines make on the host and bind into a container: for CRIU they lie outside.

    /dev/shm                          podman's own, a pod's (podman, CRI), an emptyDir of Kubernetes with medium Memory
    a volume that is a tmpfs          `podman volume create -o type=tmpfs`, an emptyDir elsewhere: a mount of type tmpfs in some
                                      engine's folder `volumes`, given to the container writable

Whatever else is bound from a tmpfs is not the container's: Kubernetes' secrets and tokens, which are read-only, or folders of the
host's. A tmpfs that the runtime mounts inside the container is in CRIU's images.

At a restore they go into what the new container has at the same destination. It is empty, as engines make it; or it is left from
the container's last life, or shared with others of its pod: then the checkpoint's files take the place of those of the same name
in /dev/shm and an emptyDir, by a journal (smr.images.layer), and everything else stays. A volume that has contents keeps them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from smr.images.image import Image
from smr.proto.annotations import Annotations
from smr.proto.checkpoint import MOUNT_ANNOTATION, LayerType
from smr.proto.errors import Code, SmrError
from smr.proto.mount_list import clean
from smr.proto.oci import Mount, Spec, parse_spec
from smr.shim import mountinfo, userns
from smr.shim.files import remove_tree
from smr.shim.mounts import asked_mounts
from smr.shim.state import ContainerState

if TYPE_CHECKING:
    from smr.images.tar_reader import Owners

_SHM = "/dev/shm"
_PACKED = "tmpfs."
_EMPTY_DIR = "kubernetes.io~empty-dir"
_LEFT = "{} has contents already: those of the checkpoint are not in it"


def external(spec: Spec) -> dict[str, Path]:
    """Destination to the host's side, of each tmpfs that is saved with the container."""
    tmpfs = _tmpfs_mounts()
    found = {}
    for mount in spec.mounts:
        source, destination = Path(mount.source), clean(mount.destination)
        if mount.is_bind and (_is_shm(destination, source) or _is_volume(mount, source, tmpfs)) and source.is_dir():
            found[destination] = source
    return found


def _is_shm(destination: str, source: Path) -> bool:
    return destination == _SHM and source != Path(_SHM)  # the host's own is nobody's to save


def _is_volume(mount: Mount, source: Path, tmpfs: frozenset[str]) -> bool:
    return str(source) in tmpfs and "volumes" in source.parts and not {"ro", "rro"} & set(mount.options)


def _tmpfs_mounts() -> frozenset[str]:
    return frozenset(entry.point for entry in mountinfo.entries() if entry.type == "tmpfs")


def capture(spec: Spec, folder: Path) -> None:
    """Pack the contents of each into a file in `folder`, which is named after the destination."""
    from smr.images.layer import pack_tree

    for destination, source in external(spec).items():
        pack_tree(source, folder / f"{_PACKED}{destination.replace('%', '%25').replace('/', '%2F')}")


def captured(folder: Path) -> Mapping[str, Path]:
    """Destination to the file that `capture` has made of it."""
    files = sorted(folder.glob(f"{_PACKED}*"))
    return {file.name.removeprefix(_PACKED).replace("%2F", "/").replace("%25", "%"): file for file in files}


def fill(state: ContainerState, image: Image, spec: Spec, annotations: Annotations) -> None:
    """Put the contents back into what the new container has there. Raises MOUNT_MISMATCH where it has no directory."""
    layers = image.layers_of(LayerType.TMPFS)
    given = {clean(mount.destination): Path(mount.source) for mount in asked_mounts(spec, annotations) if mount.is_bind}
    for layer in layers:
        destination = layer.annotations.get(MOUNT_ANNOTATION, "")
        source = given.get(clean(destination)) if destination else None
        if source is None or not source.is_dir():
            raise SmrError(
                f"the checkpoint has contents for {destination or 'a mount without a name'}: needed a directory there",
                hint=f"give the container its own {destination}",
                code=Code.MOUNT_MISMATCH,
            )
        _fill(state, layer.path, destination, source, userns.shifts(parse_spec(image.config.spec), spec))


def _fill(state: ContainerState, tar: Path, destination: str, source: Path, owners: Owners | None) -> None:
    from smr.images.layer import apply_layer, unpack_tree

    if state.record.id in source.parts:
        remove_tree(source, keep_root=True)  # podman keeps it when it starts a container again
    memory = destination == _SHM or str(source) in _tmpfs_mounts()
    if memory and not any(source.iterdir()):
        state.record.undo_tmpfs += (str(source),)
        state.save()
        unpack_tree(tar, source, owners=owners)
    elif (destination == _SHM and source != Path(_SHM)) or _EMPTY_DIR in source.parts:
        state.record.undo_merged += (str(source),)
        state.save()
        journal = state.merged_dir(len(state.record.undo_merged) - 1)
        journal.mkdir(mode=0o700, parents=True)
        apply_layer(tar, source, journal, owners=owners)
    else:
        state.record.warnings.append(_LEFT.format(destination))
