"""A container that starts cold: told where its user looks, kept in a record, and captured where it asks for that."""

from __future__ import annotations

import json
import sys

from smr.proto.annotations import CAPTURE, STATUS, STATUS_CODE, STATUS_REASON, Annotations
from smr.proto.errors import SmrError
from smr.proto.oci import Spec, load_spec
from smr.shim import log, rootless
from smr.shim.config import Config
from smr.shim.events import emit_failure
from smr.shim.files import write_atomic
from smr.shim.oci_args import RuntimeCall
from smr.shim.real_runtime import real_runtime
from smr.shim.state import ContainerState, Record, Status, begin, find


def start_cold(call: RuntimeCall, config: Config, annotations: Annotations, error: SmrError) -> None:
    """Record why a container starts cold where its user looks: its log, its annotations, `smr ps`, our log."""
    message = f"smr: started cold, {annotations.restore} was not restored: {error}"
    log.runtime_message(call.log, call.log_format, "warning", message)
    if call.log is not None:
        print(message, file=sys.stderr, flush=True)  # noqa: T201
    spec = load_spec(call.bundle)
    status = {STATUS: Status.COLD.value, STATUS_CODE: error.code.value, STATUS_REASON: str(error)}
    path = call.bundle / "config.json"
    document = {**spec.document, "annotations": {**spec.annotations, **status}}
    write_atomic(path, json.dumps(document).encode(), mode=path.stat().st_mode & 0o777, durable=False)
    if not rootless.obstacle():  # else there is no state directory to keep a record in
        begin_record(config, _cold_record(call, config, spec, annotations, error))
    emit_failure(config, "started_cold", call.id, spec.annotations, error, annotations.restore)


def begin_capture(call: RuntimeCall, config: Config, spec: Spec, image: str = "", error: SmrError | None = None) -> None:
    """Have a container that asks for it captured once it is ready; `image` is what was not restored, for `error`."""
    if any(key.startswith(CAPTURE) for key in spec.annotations) and not rootless.obstacle():
        from smr.shim import capture

        record = capture.prepare(call, spec, config, image, error)
        if record is not None:
            begin_record(config, record)


def captured_first(spec: Spec, error: SmrError) -> bool:
    """Whether a container that is to fail rather than start cold starts all the same: nobody has captured its image yet."""
    if not any(key.startswith(CAPTURE) for key in spec.annotations):
        return False
    from smr.shim import capture

    return capture.wanted_despite(error, spec.annotations)


def begin_record(config: Config, record: Record) -> ContainerState:
    """Begin, also where a container of this id was killed or went past us, and its record is all that is left."""
    known = find(config.run, record.root, record.id)
    if known is not None:
        from smr.shim.sweep import drop_if_gone

        drop_if_gone(known, [])
    return begin(config.run, record)


def _cold_record(call: RuntimeCall, config: Config, spec: Spec, annotations: Annotations, error: SmrError) -> Record:
    return Record(
        id=call.id,
        root=call.root,
        bundle=str(call.bundle),
        image=annotations.restore,
        runtime=real_runtime(config),
        status=Status.COLD,
        reason=str(error),
        reason_code=error.code.value,
        annotations=dict(spec.annotations),
    )
