from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PrefetchRequest(_message.Message):
    __slots__ = ("image",)
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    image: str
    def __init__(self, image: _Optional[str] = ...) -> None: ...

class PrefetchResponse(_message.Message):
    __slots__ = ("digest", "total_bytes", "cached_bytes", "read_bytes", "left_bytes")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    TOTAL_BYTES_FIELD_NUMBER: _ClassVar[int]
    CACHED_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    LEFT_BYTES_FIELD_NUMBER: _ClassVar[int]
    digest: str
    total_bytes: int
    cached_bytes: int
    read_bytes: int
    left_bytes: int
    def __init__(self, digest: _Optional[str] = ..., total_bytes: _Optional[int] = ..., cached_bytes: _Optional[int] = ..., read_bytes: _Optional[int] = ..., left_bytes: _Optional[int] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("image",)
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    image: str
    def __init__(self, image: _Optional[str] = ...) -> None: ...

class PinResponse(_message.Message):
    __slots__ = ("digest", "bytes", "pid")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    digest: str
    bytes: int
    pid: int
    def __init__(self, digest: _Optional[str] = ..., bytes: _Optional[int] = ..., pid: _Optional[int] = ...) -> None: ...

class UnpinRequest(_message.Message):
    __slots__ = ("image",)
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    image: str
    def __init__(self, image: _Optional[str] = ...) -> None: ...

class UnpinResponse(_message.Message):
    __slots__ = ("digest", "unpinned", "bytes")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    UNPINNED_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    digest: str
    unpinned: bool
    bytes: int
    def __init__(self, digest: _Optional[str] = ..., unpinned: _Optional[bool] = ..., bytes: _Optional[int] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListResponse(_message.Message):
    __slots__ = ("images",)
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[Image]
    def __init__(self, images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("reference", "tags", "digest", "created", "size_bytes", "cached_share", "pinned", "memory_bytes", "source_image", "error")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    CACHED_SHARE_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    SOURCE_IMAGE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    reference: str
    tags: _containers.RepeatedScalarFieldContainer[str]
    digest: str
    created: str
    size_bytes: int
    cached_share: float
    pinned: bool
    memory_bytes: int
    source_image: str
    error: Error
    def __init__(self, reference: _Optional[str] = ..., tags: _Optional[_Iterable[str]] = ..., digest: _Optional[str] = ..., created: _Optional[str] = ..., size_bytes: _Optional[int] = ..., cached_share: _Optional[float] = ..., pinned: _Optional[bool] = ..., memory_bytes: _Optional[int] = ..., source_image: _Optional[str] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class CheckpointRequest(_message.Message):
    __slots__ = ("container", "image", "engine", "root", "stop", "tcp", "compress", "quiesce", "resume", "hook_timeout_s")
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    TCP_FIELD_NUMBER: _ClassVar[int]
    COMPRESS_FIELD_NUMBER: _ClassVar[int]
    QUIESCE_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    HOOK_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    container: str
    image: str
    engine: str
    root: str
    stop: bool
    tcp: str
    compress: bool
    quiesce: str
    resume: str
    hook_timeout_s: float
    def __init__(self, container: _Optional[str] = ..., image: _Optional[str] = ..., engine: _Optional[str] = ..., root: _Optional[str] = ..., stop: _Optional[bool] = ..., tcp: _Optional[str] = ..., compress: _Optional[bool] = ..., quiesce: _Optional[str] = ..., resume: _Optional[str] = ..., hook_timeout_s: _Optional[float] = ...) -> None: ...

class CheckpointProgress(_message.Message):
    __slots__ = ("stage", "result")
    STAGE_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    stage: str
    result: CheckpointResult
    def __init__(self, stage: _Optional[str] = ..., result: _Optional[_Union[CheckpointResult, _Mapping]] = ...) -> None: ...

class CheckpointResult(_message.Message):
    __slots__ = ("image", "digest", "size_bytes", "engine", "container", "pause_s", "stages_s", "warnings")
    class StagesSEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    ENGINE_FIELD_NUMBER: _ClassVar[int]
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    PAUSE_S_FIELD_NUMBER: _ClassVar[int]
    STAGES_S_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    image: str
    digest: str
    size_bytes: int
    engine: str
    container: str
    pause_s: float
    stages_s: _containers.ScalarMap[str, float]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, image: _Optional[str] = ..., digest: _Optional[str] = ..., size_bytes: _Optional[int] = ..., engine: _Optional[str] = ..., container: _Optional[str] = ..., pause_s: _Optional[float] = ..., stages_s: _Optional[_Mapping[str, float]] = ..., warnings: _Optional[_Iterable[str]] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ("container",)
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    container: str
    def __init__(self, container: _Optional[str] = ...) -> None: ...

class StatusResponse(_message.Message):
    __slots__ = ("version", "pid", "started", "store", "run", "healthy", "health_reason", "containers")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    STORE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    HEALTHY_FIELD_NUMBER: _ClassVar[int]
    HEALTH_REASON_FIELD_NUMBER: _ClassVar[int]
    CONTAINERS_FIELD_NUMBER: _ClassVar[int]
    version: str
    pid: int
    started: str
    store: str
    run: str
    healthy: bool
    health_reason: str
    containers: _containers.RepeatedCompositeFieldContainer[Container]
    def __init__(self, version: _Optional[str] = ..., pid: _Optional[int] = ..., started: _Optional[str] = ..., store: _Optional[str] = ..., run: _Optional[str] = ..., healthy: _Optional[bool] = ..., health_reason: _Optional[str] = ..., containers: _Optional[_Iterable[_Union[Container, _Mapping]]] = ...) -> None: ...

class Container(_message.Message):
    __slots__ = ("id", "status", "image", "digest", "reason", "reason_code", "started", "total_s", "pid", "stages", "warnings", "pages_strategy", "pages_source", "memory_bytes", "read_bytes", "pod")
    ID_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REASON_CODE_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    WARNINGS_FIELD_NUMBER: _ClassVar[int]
    PAGES_STRATEGY_FIELD_NUMBER: _ClassVar[int]
    PAGES_SOURCE_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    POD_FIELD_NUMBER: _ClassVar[int]
    id: str
    status: str
    image: str
    digest: str
    reason: str
    reason_code: str
    started: str
    total_s: float
    pid: int
    stages: _containers.RepeatedCompositeFieldContainer[Stage]
    warnings: _containers.RepeatedScalarFieldContainer[str]
    pages_strategy: str
    pages_source: str
    memory_bytes: int
    read_bytes: int
    pod: Pod
    def __init__(self, id: _Optional[str] = ..., status: _Optional[str] = ..., image: _Optional[str] = ..., digest: _Optional[str] = ..., reason: _Optional[str] = ..., reason_code: _Optional[str] = ..., started: _Optional[str] = ..., total_s: _Optional[float] = ..., pid: _Optional[int] = ..., stages: _Optional[_Iterable[_Union[Stage, _Mapping]]] = ..., warnings: _Optional[_Iterable[str]] = ..., pages_strategy: _Optional[str] = ..., pages_source: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., read_bytes: _Optional[int] = ..., pod: _Optional[_Union[Pod, _Mapping]] = ...) -> None: ...

class Stage(_message.Message):
    __slots__ = ("name", "start_s", "end_s")
    NAME_FIELD_NUMBER: _ClassVar[int]
    START_S_FIELD_NUMBER: _ClassVar[int]
    END_S_FIELD_NUMBER: _ClassVar[int]
    name: str
    start_s: float
    end_s: float
    def __init__(self, name: _Optional[str] = ..., start_s: _Optional[float] = ..., end_s: _Optional[float] = ...) -> None: ...

class Pod(_message.Message):
    __slots__ = ("namespace", "name", "uid", "container")
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    UID_FIELD_NUMBER: _ClassVar[int]
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    namespace: str
    name: str
    uid: str
    container: str
    def __init__(self, namespace: _Optional[str] = ..., name: _Optional[str] = ..., uid: _Optional[str] = ..., container: _Optional[str] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("replay",)
    REPLAY_FIELD_NUMBER: _ClassVar[int]
    replay: bool
    def __init__(self, replay: _Optional[bool] = ...) -> None: ...

class Event(_message.Message):
    __slots__ = ("time", "kind", "container", "image", "digest", "reason", "reason_code", "total_s", "stages_s", "pod")
    class StagesSEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    TIME_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    CONTAINER_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REASON_CODE_FIELD_NUMBER: _ClassVar[int]
    TOTAL_S_FIELD_NUMBER: _ClassVar[int]
    STAGES_S_FIELD_NUMBER: _ClassVar[int]
    POD_FIELD_NUMBER: _ClassVar[int]
    time: str
    kind: str
    container: str
    image: str
    digest: str
    reason: str
    reason_code: str
    total_s: float
    stages_s: _containers.ScalarMap[str, float]
    pod: Pod
    def __init__(self, time: _Optional[str] = ..., kind: _Optional[str] = ..., container: _Optional[str] = ..., image: _Optional[str] = ..., digest: _Optional[str] = ..., reason: _Optional[str] = ..., reason_code: _Optional[str] = ..., total_s: _Optional[float] = ..., stages_s: _Optional[_Mapping[str, float]] = ..., pod: _Optional[_Union[Pod, _Mapping]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "hint")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HINT_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    hint: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., hint: _Optional[str] = ...) -> None: ...
