from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SkOptsEntry(_message.Message):
    __slots__ = ("so_bound_dev",)
    SO_BOUND_DEV_FIELD_NUMBER: _ClassVar[int]
    so_bound_dev: str
    def __init__(self, so_bound_dev: _Optional[str] = ...) -> None: ...

class InetSkEntry(_message.Message):
    __slots__ = ("id", "family", "type", "proto", "state", "src_port", "dst_port", "src_addr", "dst_addr", "opts", "ifname")
    ID_FIELD_NUMBER: _ClassVar[int]
    FAMILY_FIELD_NUMBER: _ClassVar[int]
    TYPE_FIELD_NUMBER: _ClassVar[int]
    PROTO_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    SRC_PORT_FIELD_NUMBER: _ClassVar[int]
    DST_PORT_FIELD_NUMBER: _ClassVar[int]
    SRC_ADDR_FIELD_NUMBER: _ClassVar[int]
    DST_ADDR_FIELD_NUMBER: _ClassVar[int]
    OPTS_FIELD_NUMBER: _ClassVar[int]
    IFNAME_FIELD_NUMBER: _ClassVar[int]
    id: int
    family: int
    type: int
    proto: int
    state: int
    src_port: int
    dst_port: int
    src_addr: _containers.RepeatedScalarFieldContainer[int]
    dst_addr: _containers.RepeatedScalarFieldContainer[int]
    opts: SkOptsEntry
    ifname: str
    def __init__(self, id: _Optional[int] = ..., family: _Optional[int] = ..., type: _Optional[int] = ..., proto: _Optional[int] = ..., state: _Optional[int] = ..., src_port: _Optional[int] = ..., dst_port: _Optional[int] = ..., src_addr: _Optional[_Iterable[int]] = ..., dst_addr: _Optional[_Iterable[int]] = ..., opts: _Optional[_Union[SkOptsEntry, _Mapping]] = ..., ifname: _Optional[str] = ...) -> None: ...

class PacketMclist(_message.Message):
    __slots__ = ("index",)
    INDEX_FIELD_NUMBER: _ClassVar[int]
    index: int
    def __init__(self, index: _Optional[int] = ...) -> None: ...

class PacketSockEntry(_message.Message):
    __slots__ = ("id", "ifindex", "mclist")
    ID_FIELD_NUMBER: _ClassVar[int]
    IFINDEX_FIELD_NUMBER: _ClassVar[int]
    MCLIST_FIELD_NUMBER: _ClassVar[int]
    id: int
    ifindex: int
    mclist: _containers.RepeatedCompositeFieldContainer[PacketMclist]
    def __init__(self, id: _Optional[int] = ..., ifindex: _Optional[int] = ..., mclist: _Optional[_Iterable[_Union[PacketMclist, _Mapping]]] = ...) -> None: ...

class FileEntry(_message.Message):
    __slots__ = ("type", "id", "isk", "psk")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    ISK_FIELD_NUMBER: _ClassVar[int]
    PSK_FIELD_NUMBER: _ClassVar[int]
    type: int
    id: int
    isk: InetSkEntry
    psk: PacketSockEntry
    def __init__(self, type: _Optional[int] = ..., id: _Optional[int] = ..., isk: _Optional[_Union[InetSkEntry, _Mapping]] = ..., psk: _Optional[_Union[PacketSockEntry, _Mapping]] = ...) -> None: ...
