from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class PstreeEntry(_message.Message):
    __slots__ = ("pid", "ppid", "threads")
    PID_FIELD_NUMBER: _ClassVar[int]
    PPID_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    pid: int
    ppid: int
    threads: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, pid: _Optional[int] = ..., ppid: _Optional[int] = ..., threads: _Optional[_Iterable[int]] = ...) -> None: ...

class TaskCoreEntry(_message.Message):
    __slots__ = ("task_state", "comm")
    TASK_STATE_FIELD_NUMBER: _ClassVar[int]
    COMM_FIELD_NUMBER: _ClassVar[int]
    task_state: int
    comm: str
    def __init__(self, task_state: _Optional[int] = ..., comm: _Optional[str] = ...) -> None: ...

class RseqEntry(_message.Message):
    __slots__ = ("rseq_abi_pointer", "rseq_abi_size")
    RSEQ_ABI_POINTER_FIELD_NUMBER: _ClassVar[int]
    RSEQ_ABI_SIZE_FIELD_NUMBER: _ClassVar[int]
    rseq_abi_pointer: int
    rseq_abi_size: int
    def __init__(self, rseq_abi_pointer: _Optional[int] = ..., rseq_abi_size: _Optional[int] = ...) -> None: ...

class ThreadCoreEntry(_message.Message):
    __slots__ = ("rseq_entry",)
    RSEQ_ENTRY_FIELD_NUMBER: _ClassVar[int]
    rseq_entry: RseqEntry
    def __init__(self, rseq_entry: _Optional[_Union[RseqEntry, _Mapping]] = ...) -> None: ...

class ThreadInfo(_message.Message):
    __slots__ = ("clear_tid_addr",)
    CLEAR_TID_ADDR_FIELD_NUMBER: _ClassVar[int]
    clear_tid_addr: int
    def __init__(self, clear_tid_addr: _Optional[int] = ...) -> None: ...

class CoreEntry(_message.Message):
    __slots__ = ("thread_info", "tc", "thread_core", "ti_aarch64")
    THREAD_INFO_FIELD_NUMBER: _ClassVar[int]
    TC_FIELD_NUMBER: _ClassVar[int]
    THREAD_CORE_FIELD_NUMBER: _ClassVar[int]
    TI_AARCH64_FIELD_NUMBER: _ClassVar[int]
    thread_info: ThreadInfo
    tc: TaskCoreEntry
    thread_core: ThreadCoreEntry
    ti_aarch64: ThreadInfo
    def __init__(self, thread_info: _Optional[_Union[ThreadInfo, _Mapping]] = ..., tc: _Optional[_Union[TaskCoreEntry, _Mapping]] = ..., thread_core: _Optional[_Union[ThreadCoreEntry, _Mapping]] = ..., ti_aarch64: _Optional[_Union[ThreadInfo, _Mapping]] = ...) -> None: ...

class VmaEntry(_message.Message):
    __slots__ = ("start", "end", "shmid", "prot", "flags", "status", "madv")
    START_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    SHMID_FIELD_NUMBER: _ClassVar[int]
    PROT_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MADV_FIELD_NUMBER: _ClassVar[int]
    start: int
    end: int
    shmid: int
    prot: int
    flags: int
    status: int
    madv: int
    def __init__(self, start: _Optional[int] = ..., end: _Optional[int] = ..., shmid: _Optional[int] = ..., prot: _Optional[int] = ..., flags: _Optional[int] = ..., status: _Optional[int] = ..., madv: _Optional[int] = ...) -> None: ...

class MmEntry(_message.Message):
    __slots__ = ("exe_file_id", "vmas", "thp_disabled")
    EXE_FILE_ID_FIELD_NUMBER: _ClassVar[int]
    VMAS_FIELD_NUMBER: _ClassVar[int]
    THP_DISABLED_FIELD_NUMBER: _ClassVar[int]
    exe_file_id: int
    vmas: _containers.RepeatedCompositeFieldContainer[VmaEntry]
    thp_disabled: bool
    def __init__(self, exe_file_id: _Optional[int] = ..., vmas: _Optional[_Iterable[_Union[VmaEntry, _Mapping]]] = ..., thp_disabled: _Optional[bool] = ...) -> None: ...

class PagemapHead(_message.Message):
    __slots__ = ("pages_id",)
    PAGES_ID_FIELD_NUMBER: _ClassVar[int]
    pages_id: int
    def __init__(self, pages_id: _Optional[int] = ...) -> None: ...

class PagemapEntry(_message.Message):
    __slots__ = ("vaddr", "compat_nr_pages", "in_parent", "flags", "nr_pages")
    VADDR_FIELD_NUMBER: _ClassVar[int]
    COMPAT_NR_PAGES_FIELD_NUMBER: _ClassVar[int]
    IN_PARENT_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    NR_PAGES_FIELD_NUMBER: _ClassVar[int]
    vaddr: int
    compat_nr_pages: int
    in_parent: bool
    flags: int
    nr_pages: int
    def __init__(self, vaddr: _Optional[int] = ..., compat_nr_pages: _Optional[int] = ..., in_parent: _Optional[bool] = ..., flags: _Optional[int] = ..., nr_pages: _Optional[int] = ...) -> None: ...

class InetSkEntry(_message.Message):
    __slots__ = ("id", "family", "type", "proto", "state", "src_port", "dst_port", "src_addr", "dst_addr")
    ID_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    PROTO_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SRC_PORT_FIELD_NUMBER: _ClassVar[int]
    DST_PORT_FIELD_NUMBER: _ClassVar[int]
    SRC_ADDR_FIELD_NUMBER: _ClassVar[int]
    DST_ADDR_FIELD_NUMBER: _ClassVar[int]
    id: int
    family: int
    type: int
    proto: int
    state: int
    src_port: int
    dst_port: int
    src_addr: _containers.RepeatedScalarFieldContainer[int]
    dst_addr: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, id: _Optional[int] = ..., family: _Optional[int] = ..., type: _Optional[int] = ..., proto: _Optional[int] = ..., state: _Optional[int] = ..., src_port: _Optional[int] = ..., dst_port: _Optional[int] = ..., src_addr: _Optional[_Iterable[int]] = ..., dst_addr: _Optional[_Iterable[int]] = ...) -> None: ...

class RegFileEntry(_message.Message):
    __slots__ = ("id", "flags", "pos", "fown", "name", "mnt_id", "size", "ext", "mode")
    ID_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    POS_FIELD_NUMBER: _ClassVar[int]
    FOWN_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MNT_ID_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    EXT_FIELD_NUMBER: _ClassVar[int]
    MODE_FIELD_NUMBER: _ClassVar[int]
    id: int
    flags: int
    pos: int
    fown: bytes
    name: str
    mnt_id: int
    size: int
    ext: bool
    mode: int
    def __init__(self, id: _Optional[int] = ..., flags: _Optional[int] = ..., pos: _Optional[int] = ..., fown: _Optional[bytes] = ..., name: _Optional[str] = ..., mnt_id: _Optional[int] = ..., size: _Optional[int] = ..., ext: _Optional[bool] = ..., mode: _Optional[int] = ...) -> None: ...

class PipeEntry(_message.Message):
    __slots__ = ("id", "pipe_id", "flags", "fown")
    ID_FIELD_NUMBER: _ClassVar[int]
    PIPE_ID_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    FOWN_FIELD_NUMBER: _ClassVar[int]
    id: int
    pipe_id: int
    flags: int
    fown: bytes
    def __init__(self, id: _Optional[int] = ..., pipe_id: _Optional[int] = ..., flags: _Optional[int] = ..., fown: _Optional[bytes] = ...) -> None: ...

class FileEntry(_message.Message):
    __slots__ = ("type", "id", "reg", "isk", "pipe")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    REG_FIELD_NUMBER: _ClassVar[int]
    ISK_FIELD_NUMBER: _ClassVar[int]
    PIPE_FIELD_NUMBER: _ClassVar[int]
    type: int
    id: int
    reg: RegFileEntry
    isk: InetSkEntry
    pipe: PipeEntry
    def __init__(self, type: _Optional[int] = ..., id: _Optional[int] = ..., reg: _Optional[_Union[RegFileEntry, _Mapping]] = ..., isk: _Optional[_Union[InetSkEntry, _Mapping]] = ..., pipe: _Optional[_Union[PipeEntry, _Mapping]] = ...) -> None: ...

class FdinfoEntry(_message.Message):
    __slots__ = ("id", "flags", "type", "fd")
    ID_FIELD_NUMBER: _ClassVar[int]
    FLAGS_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    FD_FIELD_NUMBER: _ClassVar[int]
    id: int
    flags: int
    type: int
    fd: int
    def __init__(self, id: _Optional[int] = ..., flags: _Optional[int] = ..., type: _Optional[int] = ..., fd: _Optional[int] = ...) -> None: ...

class FsEntry(_message.Message):
    __slots__ = ("cwd_id", "root_id")
    CWD_ID_FIELD_NUMBER: _ClassVar[int]
    ROOT_ID_FIELD_NUMBER: _ClassVar[int]
    cwd_id: int
    root_id: int
    def __init__(self, cwd_id: _Optional[int] = ..., root_id: _Optional[int] = ...) -> None: ...

class TaskKobjIdsEntry(_message.Message):
    __slots__ = ("files_id",)
    FILES_ID_FIELD_NUMBER: _ClassVar[int]
    files_id: int
    def __init__(self, files_id: _Optional[int] = ...) -> None: ...

class RemapFilePathEntry(_message.Message):
    __slots__ = ("orig_id",)
    ORIG_ID_FIELD_NUMBER: _ClassVar[int]
    orig_id: int
    def __init__(self, orig_id: _Optional[int] = ...) -> None: ...

class MntEntry(_message.Message):
    __slots__ = ("mnt_id", "mountpoint", "shared_id", "master_id", "ext_mount", "ext_key")
    MNT_ID_FIELD_NUMBER: _ClassVar[int]
    MOUNTPOINT_FIELD_NUMBER: _ClassVar[int]
    SHARED_ID_FIELD_NUMBER: _ClassVar[int]
    MASTER_ID_FIELD_NUMBER: _ClassVar[int]
    EXT_MOUNT_FIELD_NUMBER: _ClassVar[int]
    EXT_KEY_FIELD_NUMBER: _ClassVar[int]
    mnt_id: int
    mountpoint: str
    shared_id: int
    master_id: int
    ext_mount: bool
    ext_key: str
    def __init__(self, mnt_id: _Optional[int] = ..., mountpoint: _Optional[str] = ..., shared_id: _Optional[int] = ..., master_id: _Optional[int] = ..., ext_mount: _Optional[bool] = ..., ext_key: _Optional[str] = ...) -> None: ...

class InventoryEntry(_message.Message):
    __slots__ = ("tcp_close",)
    TCP_CLOSE_FIELD_NUMBER: _ClassVar[int]
    tcp_close: bool
    def __init__(self, tcp_close: _Optional[bool] = ...) -> None: ...
