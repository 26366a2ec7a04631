"""The one error type, its codes, and the exit status each code gives.

A message says what failed, on which object, what was found and what was needed; the hint is the next command to type.
Codes are part of the interface: `docs/errors.md` lists them, `--json` prints them, metrics count by them. Never reuse one.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class Code(StrEnum):
    """Stable identifiers of failures; the value is what users and metrics see."""

    USAGE = "usage"
    INTERNAL = "internal"
    CONFIG_INVALID = "config_invalid"
    ANNOTATION_UNKNOWN = "annotation_unknown"
    ANNOTATION_INVALID = "annotation_invalid"
    SPEC_INVALID = "spec_invalid"
    IMAGE_NOT_FOUND = "image_not_found"
    IMAGE_EXISTS = "image_exists"
    IMAGE_IN_USE = "image_in_use"
    IMAGE_CORRUPT = "image_corrupt"
    IMAGE_VERSION = "image_version"
    IMAGE_NAMESPACE = "image_namespace"
    ARCHIVE_UNSAFE = "archive_unsafe"
    ARCHIVE_INVALID = "archive_invalid"
    ARCH_MISMATCH = "arch_mismatch"
    CPU_MISMATCH = "cpu_mismatch"
    SOURCE_MISMATCH = "source_mismatch"
    COMMAND_MISMATCH = "command_mismatch"
    MOUNT_MISMATCH = "mount_mismatch"
    NAMESPACE_MISMATCH = "namespace_mismatch"
    TERMINAL_MISMATCH = "terminal_mismatch"
    CRIU_MISSING = "criu_missing"
    CRIU_TOO_OLD = "criu_too_old"
    CRIU_FAILED = "criu_failed"
    RUNTIME_MISSING = "runtime_missing"
    RUNTIME_FAILED = "runtime_failed"
    ENGINE_MISSING = "engine_missing"
    AGENT_MISSING = "agent_missing"
    ENGINE_FAILED = "engine_failed"
    CONTAINER_NOT_FOUND = "container_not_found"
    CONTAINER_STATE = "container_state"
    CHECKPOINT_FAILED = "checkpoint_failed"
    RESTORE_FAILED = "restore_failed"
    RESTORE_GAVE_UP = "restore_gave_up"
    ROOTFS_FAILED = "rootfs_failed"
    NETWORK_FAILED = "network_failed"
    DISK_FULL = "disk_full"
    MEMORY_LIMIT = "memory_limit"
    PERMISSION = "permission"
    TIMEOUT = "timeout"
    UNSUPPORTED = "unsupported"
    GPU_MISSING = "gpu_missing"
    GPU_DRIVER = "gpu_driver"
    GPU_MISMATCH = "gpu_mismatch"
    GPU_MEMORY = "gpu_memory"
    GPU_BUSY = "gpu_busy"
    GPU_UNSUPPORTED = "gpu_unsupported"
    GPU_FAILED = "gpu_failed"
    HOOK_FAILED = "hook_failed"


_NOT_FOUND = {Code.IMAGE_NOT_FOUND, Code.CONTAINER_NOT_FOUND}
_INCOMPATIBLE = {
    Code.IMAGE_VERSION,
    Code.IMAGE_NAMESPACE,
    Code.ARCH_MISMATCH,
    Code.CPU_MISMATCH,
    Code.SOURCE_MISMATCH,
    Code.COMMAND_MISMATCH,
    Code.MOUNT_MISMATCH,
    Code.NAMESPACE_MISMATCH,
    Code.TERMINAL_MISMATCH,
    Code.UNSUPPORTED,
    Code.GPU_MISSING,
    Code.GPU_DRIVER,
    Code.GPU_MISMATCH,
    Code.GPU_UNSUPPORTED,
}
_CORRUPT = {Code.IMAGE_CORRUPT, Code.ARCHIVE_UNSAFE, Code.ARCHIVE_INVALID}
_CONFLICT = {Code.IMAGE_EXISTS, Code.IMAGE_IN_USE, Code.CONTAINER_STATE}
_MISSING = {Code.CRIU_MISSING, Code.CRIU_TOO_OLD, Code.RUNTIME_MISSING, Code.ENGINE_MISSING, Code.AGENT_MISSING}
_BAD_INPUT = {
    Code.USAGE,
    Code.CONFIG_INVALID,
    Code.ANNOTATION_UNKNOWN,
    Code.ANNOTATION_INVALID,
    Code.SPEC_INVALID,
}


def exit_status(code: Code) -> int:
    """Exit status of the `smr` command for `code`; the table in `docs/cli.md` is held against this by a test."""
    groups = ((_BAD_INPUT, 2), (_NOT_FOUND, 3), (_INCOMPATIBLE, 4), (_CORRUPT, 5), (_CONFLICT, 6), (_MISSING, 7))
    return next((status for codes, status in groups if code in codes), 1)


class SmrError(Exception):
    """A failure that a user can understand and act on.

    `context` names the objects concerned (container, image, path...); values are printed as they are.
    """

    def __init__(self, message: str, *, hint: str = "", code: Code = Code.INTERNAL, **context: object) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code
        self.context: Mapping[str, object] = context

    def __str__(self) -> str:
        """One line: message, then the hint in brackets, as engines print it."""
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def as_json(self) -> dict[str, object]:
        """The error as `--json` prints it."""
        context = {key: value if isinstance(value, int | float | bool) else str(value) for key, value in self.context.items()}
        return {"code": self.code.value, "message": self.message, "hint": self.hint, "context": context}
