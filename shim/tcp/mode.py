"""What becomes of the outer TCP connections of a checkpoint in a new container, judged before anything of it is touched.

Images of other makers, and those made before SMR saved connections itself, have none of `CheckpointConfig.connections`: theirs
are CRIU's, all or none of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from smr.images.image import Image
from smr.proto.annotations import Annotations, Fallback, Tcp
from smr.proto.checkpoint import CheckpointConfig
from smr.proto.errors import Code, SmrError
from smr.proto.oci import Spec
from smr.shim import network
from smr.shim.state import ContainerState

if TYPE_CHECKING:
    from smr.images.connections import Connection


def choose(config: CheckpointConfig, spec: Spec, asked: Tcp) -> Tcp:
    """CLOSE or ESTABLISHED. Raises UNSUPPORTED where the image lacks them, NETWORK_FAILED where the address differs."""
    if asked is Tcp.CLOSE:
        return asked
    if config.tcp == Tcp.CLOSE:
        if asked is Tcp.AUTO:
            return Tcp.CLOSE
        raise SmrError(
            "smr.tcp=established, but the checkpoint was made without established connections",
            hint="checkpoint with --tcp established, or set smr.tcp=auto",
            code=Code.UNSUPPORTED,
        )
    here = _addresses(spec)
    needed = config.connections.addresses if config.connections is not None else config.addresses
    missing = [address for address in needed if here is not None and not _has(here, address)]
    if not missing:
        return Tcp.ESTABLISHED
    if asked is Tcp.AUTO:
        return Tcp.CLOSE
    raise SmrError(
        f"smr.tcp=established, but connections of the checkpoint end at {missing[0]}, which this container does not have"
        f" (it has {', '.join(here or ()) or 'none'})",
        hint=f"give it that address (podman run --ip {missing[0]}), or set smr.tcp=auto or close",
        code=Code.NETWORK_FAILED,
    )


@contextlib.contextmanager
def held(image: Image, spec: Spec, annotations: Annotations, state: ContainerState, run: Path) -> Iterator[Callable[[int], None]]:
    """What gives the stopped tree of a pid its connections; until then their places are kept, where that is possible.

    `annotations.tcp` is what `choose` has chosen. Nothing is imported for an image without connections. Raises NETWORK_FAILED
    where one is in use here already.
    """
    facts = image.config.connections
    if facts is None or not facts.inner + facts.outer:
        yield lambda _: None
        return
    from smr.images.connections import read_connections
    from smr.shim.tcp import revive

    found, chosen = read_connections(image), annotations.tcp
    with revive.stand_in(found, chosen, spec) as places:

        def act(pid: int) -> None:
            outcome = revive.revive(found, pid, chosen, lambda: _moves(image.config, pid, annotations), places)
            _unlock(found, run)  # also those that are not wanted: their other ends are to learn of that
            state.record.tcp = outcome.as_dict()
            state.record.warnings += outcome.warnings

        try:
            yield act
        except BaseException:
            # What fails may be tried again, but a container that starts cold knows nothing of them.
            if annotations.fallback is Fallback.COLD:
                _unlock(found, run)
            raise


def _unlock(found: Sequence[Connection], run: Path) -> None:
    saved = [one for one in found if one.stream is not None and not one.inner]
    if saved:
        from smr.shim.tcp import lock

        lock.unlock(saved, run)


def _moves(config: CheckpointConfig, pid: int, annotations: Annotations) -> Mapping[str, str]:
    from smr.shim import addresses, interfaces

    new = interfaces.of_namespace(Path(f"/proc/{pid}/ns/net"))
    return addresses.plan(config, new, annotations.addresses).move.addresses


def _addresses(spec: Spec) -> tuple[str, ...] | None:
    """Addresses of the new container; None where its network namespace is yet to be made."""
    if "network" not in spec.namespaces:
        return network.addresses("self")
    path = spec.namespaces["network"]
    return network.addresses_of_namespace(Path(path)) if path else None


def _has(here: tuple[str, ...], address: str) -> bool:
    from ipaddress import ip_address

    parsed = ip_address(address)
    mapped = getattr(parsed, "ipv4_mapped", None)
    return parsed.is_loopback or str(mapped or parsed) in here
