"""The `smr.` annotations of a container, parsed and checked.

Every key that is understood stands in `KEYS`; an unknown key is an error with a suggestion, because a mistyped
`smr.resotre` that starts a cold container without a word is worse than a container that does not start.
Standard library only: this runs before every annotated start.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import StrEnum
from typing import TypeVar

from smr.proto import pod as pods
from smr.proto.criu_options import OPTIONS, check_option
from smr.proto.errors import Code, SmrError
from smr.proto.mount_list import MOUNT_PREFIX, MOUNTS, parse_mounts
from smr.proto.pod import CONTAINER, NAMED_PREFIX, Pod

_E = TypeVar("_E", bound=StrEnum)

PREFIX = "smr."
RESTORE = "smr.restore"
FALLBACK = "smr.fallback"
TCP = "smr.tcp"
ADDRESSES = "smr.addresses"
PAGES = "smr.pages"
ROOTFS = "smr.rootfs"
COMMAND = "smr.command"
GPU_MAP = "smr.gpu.map"
QUIESCE = "smr.quiesce"
RESUME = "smr.resume"
HOOK_TIMEOUT = "smr.hook.timeout"
CAPTURE = "smr.capture"
CAPTURE_READY = "smr.capture.ready"
CAPTURE_AFTER = "smr.capture.after"
CAPTURE_TIMEOUT = "smr.capture.timeout"
CRIU_PREFIX = "smr.criu."

# Written by us into the annotations of a container that started cold or was restored; never read back as a request.
STATUS = "smr.status"
STATUS_CODE = "smr.status.code"
STATUS_REASON = "smr.status.reason"
OWN_STATUS = frozenset({STATUS, STATUS_CODE, STATUS_REASON})

KEYS: Mapping[str, str] = {
    RESTORE: "image to restore: NAME[:TAG] or sha256:DIGEST",
    FALLBACK: "cold (start cold when the restore is not possible) or fail",
    TCP: "what becomes of connections to others: close (they end), established (they survive; needs the same IP), auto",
    ADDRESSES: "which address or interface takes the place of which, where that cannot be told: OLD=NEW[,OLD=NEW...]",
    PAGES: "how pages reach memory: auto, fill (before it runs), lazy (while it runs) or criu (CRIU's own way)",
    ROOTFS: "check (source image must be the checkpoint's) or force",
    COMMAND: "check (command must be the checkpoint's) or force",
    MOUNTS: "sources of mounts: DEST=SOURCE[,DEST=SOURCE...]",
    GPU_MAP: "which GPU takes the place of which: auto, identity, order, or OLD=NEW[,OLD=NEW...] by UUID or index",
    QUIESCE: "what a checkpoint does before it pauses the container: a preset, an HTTP call, a command or a signal",
    RESUME: "what undoes it, after the checkpoint and after each restore",
    HOOK_TIMEOUT: "seconds that each of these hooks may take",
    CONTAINER: "which container of a pod the keys mean that name none",
    CAPTURE: "name of the image that the node makes of this container once it is ready, where there is none yet",
    CAPTURE_READY: "how a container shows that it is ready: http://:PORT/PATH, tcp::PORT or exec:COMMAND",
    CAPTURE_AFTER: "seconds from its start, or from when it is ready, to its capture",
    CAPTURE_TIMEOUT: "seconds after which a container that is not ready is not captured any more",
}
# Keys that a container may have without asking for a restore: they speak of its own checkpoint.
CAPTURE_KEYS = frozenset({CAPTURE, CAPTURE_READY, CAPTURE_AFTER, CAPTURE_TIMEOUT})
CHECKPOINT_KEYS = frozenset({QUIESCE, RESUME, HOOK_TIMEOUT, CONTAINER}) | CAPTURE_KEYS

# Options of CRIU that cannot hand the host to a container: no paths, no scripts, no plugins.
CRIU_OPTIONS: frozenset[str] = frozenset(OPTIONS)

_REFERENCE = re.compile(r"[a-z0-9]+(?:[._/-]+[a-z0-9]+)*(?::[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?")
# No address: those have dots or colons and nothing but digits, or are link-local with their interface behind them.
_INTERFACE = re.compile(r"(?![\d.]*$)[A-Za-z0-9_.@-]{1,15}")
_GPU = "[A-Za-z0-9-]+"
_GPU_MAP = re.compile(rf"auto|identity|order|\s*{_GPU}\s*=\s*{_GPU}\s*(,\s*{_GPU}\s*=\s*{_GPU}\s*)*")
_DIGEST = re.compile(r"(?:[a-z0-9]+(?:[._/-]+[a-z0-9]+)*@)?sha256:[0-9a-f]{6,64}")


class Fallback(StrEnum):
    """What happens when locate, preflight or restore fails."""

    COLD = "cold"
    FAIL = "fail"


class Tcp(StrEnum):
    """What becomes of TCP connections whose other end is not in the container.

    AUTO: `ESTABLISHED` where the image has them and the container has their address, else `CLOSE`.
    """

    CLOSE = "close"
    ESTABLISHED = "established"
    AUTO = "auto"


class Pages(StrEnum):
    """How pages reach memory: before the container runs by SMR (FILL) or by CRIU, or while it runs (LAZY). `AUTO` chooses."""

    AUTO = "auto"
    FILL = "fill"
    LAZY = "lazy"
    CRIU = "criu"


class Check(StrEnum):
    """Whether a difference between container and checkpoint is an error."""

    CHECK = "check"
    FORCE = "force"


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotations:
    """What one container asks of SMR. `mounts` maps a destination in the container to a source on the host.

    `addresses` maps addresses, and names of interfaces, of the checkpoint to the new container's.
    `gpu_map`, `quiesce` and `resume` are as written, for smr.shim.gpu.remap and smr.shim.quiesce. `hook_timeout_s` 0: theirs.
    `pod` is None outside of one; `bare`, `conflict` and `others` as in smr.proto.pod.
    """

    restore: str
    fallback: Fallback = Fallback.COLD
    tcp: Tcp = Tcp.CLOSE
    addresses: Mapping[str, str] = field(default_factory=dict)
    pages: Pages = Pages.AUTO
    rootfs: Check = Check.CHECK
    command: Check = Check.CHECK
    gpu_map: str = "auto"
    quiesce: str = ""
    resume: str = ""
    hook_timeout_s: float = 0.0
    pod: Pod | None = None
    bare: bool = False
    conflict: str = ""
    others: tuple[str, ...] = ()
    mounts: Mapping[str, str] = field(default_factory=dict)
    criu: Mapping[str, str] = field(default_factory=dict)


def check_reference(reference: str) -> str:
    """Return `reference` when it is NAME[:TAG] (lower case, as OCI has it) or a sha256 digest, else raise ANNOTATION_INVALID."""
    # "sha256:" begins a digest, also one that is too short to be any.
    if _DIGEST.fullmatch(reference) or (_REFERENCE.fullmatch(reference) and not reference.startswith("sha256:")):
        return reference
    raise SmrError(
        f"'{reference}' is not an image reference: needed NAME[:TAG] in lower case or sha256:DIGEST",
        hint="'smr images ls' lists the images of this node",
        code=Code.ANNOTATION_INVALID,
        reference=reference,
    )


def wanted(annotations: Mapping[str, str]) -> bool:
    """Whether any annotation addresses SMR. A pod sandbox carries its pod's annotations and is never ours."""
    return not pods.is_sandbox(annotations) and any(key.startswith(PREFIX) and key not in OWN_STATUS for key in annotations)


def parse(annotations: Mapping[str, str]) -> Annotations | None:
    """Parse the `smr.` keys of a spec's annotations; None when there are none.

    Also None when they only say how the container is to be checkpointed (CHECKPOINT_KEYS, CRIU's options of a dump), and when
    those of a pod address others of its containers.
    Raises SmrError ANNOTATION_UNKNOWN or ANNOTATION_INVALID, whatever `smr.fallback` says.
    """
    if not wanted(annotations):
        return None
    ours = {key: value for key, value in annotations.items() if key.startswith(PREFIX) and key not in OWN_STATUS}
    for key in ours:
        _check_key(key)
    timeout_s = seconds(ours, HOOK_TIMEOUT)
    pod = pods.pod_of(annotations)
    addressed = pods.addressed(annotations, pod)
    asks = RESTORE in ours or any(key.startswith(NAMED_PREFIX) for key in ours)
    if not asks and all(key in CHECKPOINT_KEYS or _of_dump(key, value) for key, value in ours.items()):
        return None
    if not asks:
        present = ", ".join(sorted(ours))
        raise SmrError(
            f"annotation {present} without {RESTORE}: nothing names the image to restore",
            hint=f"add --annotation {RESTORE}=IMAGE, or remove the other",
            code=Code.ANNOTATION_INVALID,
        )
    if addressed.restore is None:
        return None
    return Annotations(
        restore=check_reference(addressed.restore),
        fallback=_enum(Fallback, ours, FALLBACK, Fallback.COLD),
        tcp=_enum(Tcp, ours, TCP, Tcp.CLOSE),
        addresses=_addresses(ours.get(ADDRESSES, "")),
        pages=_enum(Pages, ours, PAGES, Pages.AUTO),
        rootfs=_enum(Check, ours, ROOTFS, Check.CHECK),
        command=_enum(Check, ours, COMMAND, Check.CHECK),
        gpu_map=_gpu_map(ours.get(GPU_MAP, "auto")),
        quiesce=ours.get(QUIESCE, ""),
        resume=ours.get(RESUME, ""),
        hook_timeout_s=timeout_s,
        mounts=parse_mounts(ours),
        pod=pod,
        bare=addressed.bare,
        conflict=addressed.conflict,
        others=addressed.others,
        criu={key.removeprefix(CRIU_PREFIX): _criu(key, value) for key, value in ours.items() if key.startswith(CRIU_PREFIX)},
    )


def _check_key(key: str) -> None:
    if key in KEYS or key.startswith(MOUNT_PREFIX):
        return
    if key.startswith(NAMED_PREFIX):
        pods.check_name(key)
        return
    if key.startswith(CRIU_PREFIX):
        return
    close = get_close_matches(key, KEYS, n=1)
    hint = f"did you mean {close[0]}?" if close else "known: " + ", ".join(KEYS)
    raise SmrError(f"unknown annotation {key}", hint=hint, code=Code.ANNOTATION_UNKNOWN, annotation=key)


def _of_dump(key: str, value: str) -> bool:
    """Whether this is an option of CRIU's that counts at a checkpoint of this very container."""
    name = key.removeprefix(CRIU_PREFIX)
    return key.startswith(CRIU_PREFIX) and _criu(key, value) == value and OPTIONS[name].dump


def _criu(key: str, value: str) -> str:
    check_option(key.removeprefix(CRIU_PREFIX), value, key)
    return value


def _enum(kind: type[_E], ours: Mapping[str, str], key: str, default: _E) -> _E:
    value = ours.get(key, default.value)
    try:
        return kind(value)
    except ValueError:
        allowed = "|".join(member.value for member in kind)
        raise SmrError(
            f"annotation {key}={value}: not a valid value",
            hint=f"use {key}={allowed}",
            code=Code.ANNOTATION_INVALID,
            annotation=key,
        ) from None


def _addresses(value: str) -> Mapping[str, str]:
    """Addresses as `ipaddress` writes them, names of interfaces as they are; what is on both sides must be of one kind."""
    found: dict[str, str] = {}
    for pair in value.split(",") if value else ():
        old, _, new = (word.strip() for word in pair.partition("="))
        kinds = {_kind_of_place(old), _kind_of_place(new)}
        if len(kinds) != 1 or "" in kinds or _plain(old) in found:
            raise SmrError(
                f"annotation {ADDRESSES}={value!r}: '{pair.strip()}' is not a pair of addresses of one family, or of interfaces",
                hint=f"use {ADDRESSES}=OLD=NEW[,OLD=NEW...], such as 10.88.0.3=10.88.0.7,eth0=net1; each OLD once",
                code=Code.ANNOTATION_INVALID,
                annotation=ADDRESSES,
            )
        found[_plain(old)] = _plain(new)
    return found


def _kind_of_place(text: str) -> str:
    """ "4", "6", "interface", or empty for none of them."""
    from ipaddress import ip_address

    try:
        return str(ip_address(text).version)
    except ValueError:
        return "interface" if _INTERFACE.fullmatch(text) else ""


def _plain(text: str) -> str:
    from ipaddress import ip_address

    return text if _kind_of_place(text) == "interface" else str(ip_address(text))


def _gpu_map(value: str) -> str:
    """As written: which GPUs there are is the restore's to find out."""
    if _GPU_MAP.fullmatch(value):
        return value
    raise SmrError(
        f"annotation {GPU_MAP}={value!r}: not a map of GPUs",
        hint=f"use {GPU_MAP}=auto|identity|order, or OLD=NEW[,OLD=NEW...] by UUID or index",
        code=Code.ANNOTATION_INVALID,
        annotation=GPU_MAP,
    )


def seconds(ours: Mapping[str, str], key: str) -> float:
    """A number of seconds; 0 where there is none. Raises ANNOTATION_INVALID."""
    value = ours.get(key, "0")
    if re.fullmatch(r"\d{1,5}(\.\d{1,3})?", value):
        return float(value)
    raise SmrError(
        f"annotation {key}={value!r}: not a number of seconds",
        hint=f"use {key}=30",
        code=Code.ANNOTATION_INVALID,
        annotation=key,
    )
