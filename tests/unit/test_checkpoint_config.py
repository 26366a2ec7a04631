"""The config blob of a checkpoint image: what is written is read, what is newer or broken is refused."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smr.proto.checkpoint import (
    FORMAT_VERSION,
    CheckpointConfig,
    Connections,
    CudaTask,
    Gpu,
    GpuState,
    HeldFile,
    Hooks,
    Host,
    Interface,
    Source,
    Stdio,
    Task,
    parse_config,
)
from smr.proto.errors import Code, SmrError

CONFIG = CheckpointConfig(
    created="2025-03-01T10:00:00.000+00:00",
    host=Host(
        architecture="x86_64",
        kernel="6.8.1",
        criu="4.1.1",
        runtime="runc version 1.1.5",
        cpu_model="A CPU",
        cpu_flags=("avx", "sse4_2"),
        cgroup="v2",
    ),
    source=Source(
        engine="podman", container_id="f" * 64, container_name="llama", image="llama:1", image_digest="sha256:0", rootfs="/r"
    ),
    spec={"process": {"args": ["serve", "é"]}},
    external_mounts=("/data",),
    tasks=(Task(pid=1, ppid=0, command="serve", threads=4), Task(pid=7, ppid=1, command="worker", stopped=True)),
    addresses=("10.88.0.2", "fd00::2"),
    bound_addresses=("10.88.0.2", "fe80::1%eth0"),
    bound_devices=("eth0",),
    peers=("10.88.0.1:53",),
    ipv6=True,
    interfaces=(Interface(name="eth0", index=2, addresses=("10.88.0.2/16", "fd00::2/64", "fe80::1/64")),),
    tcp="established",
    connections=Connections(inner=2, outer=3, saved=1, addresses=("10.88.0.5",)),
    criu_options=("file-locks",),
    criu_dump={"ghost-limit": "1G", "file-locks": ""},
    criu_why={"file-locks": "1 lock of files"},
    clocks_s={"monotonic": 100.5, "boottime": 200.25},
    memory_bytes=1 << 34,
    pause_s=0.25,
    stages_s={"dump": 0.2},
    gpu=GpuState(
        driver="580.159.04",
        cuda=13000,
        gpus=(Gpu(uuid="GPU-1f79de5c", name="NVIDIA H200", memory_bytes=150 << 30, minor=0, compute_capability="9.0"),),
        tasks=(CudaTask(pid=7, vram_bytes={"GPU-1f79de5c": 8 << 30}, areas=((1 << 40, 1 << 41),)),),
    ),
    hooks=Hooks(quiesce="vllm", resume="vllm", timeout_s=30.0),
    stdio=(Stdio(fd=1, kind="pipe", file=7),),
    held_files=(HeldFile(mount="/data", path="log", mode=0o100644, size_bytes=7, writable=True, holder="serve (pid 1)", file=7),),
)


def failure(blob: bytes) -> SmrError:
    """The error that reading gives."""
    with pytest.raises(SmrError) as caught:
        parse_config(blob)
    return caught.value


def changed(**values: object) -> bytes:
    """The config with members replaced; None removes one."""
    document = {**json.loads(CONFIG.to_json()), **values}
    return json.dumps({key: value for key, value in document.items() if value is not None}).encode()


def test_what_is_written_is_read() -> None:
    """Every member survives, tuples included."""
    assert parse_config(CONFIG.to_json()) == CONFIG
    assert all(getattr(CONFIG, f.name) != f.default for f in fields(CheckpointConfig) if f.name != "version")


def test_json_is_canonical() -> None:
    """The same config is the same blob, so the same digest: sorted keys, no white space."""
    blob = CONFIG.to_json()
    assert blob == json.dumps(json.loads(blob), sort_keys=True, separators=(",", ":")).encode()
    assert replace(CONFIG).to_json() == blob


def test_unknown_fields_of_the_same_version_are_ignored() -> None:
    """An image of a later SMR of the same format can be read."""
    document = json.loads(CONFIG.to_json())
    document["later"] = 1
    document["host"]["later"] = [1]
    document["tasks"][0]["later"] = {}
    assert parse_config(json.dumps(document).encode()) == CONFIG


def test_missing_optional_fields_are_defaults() -> None:
    """An image of an earlier SMR of the same format can be read."""
    assert parse_config(changed(addresses=None, tcp=None, tasks=None)) == replace(CONFIG, addresses=(), tcp="close", tasks=())


def test_newer_version_says_both() -> None:
    """What the image has, what is read here, and what to do."""
    error = failure(changed(version=FORMAT_VERSION + 1, host="of another form"))
    assert error.code is Code.IMAGE_VERSION
    assert f"version {FORMAT_VERSION + 1}" in error.message
    assert f"up to {FORMAT_VERSION}" in error.message
    assert "newer SMR" in error.hint


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"version":1}',
        changed(host=None),
        changed(host=[]),
        changed(host={"architecture": "x86_64"}),
        changed(source="podman"),
        changed(tasks={}),
        changed(tasks=[1]),
        changed(tasks=[{"pid": 1}]),
        changed(addresses="10.0.0.1"),
        changed(created=None),
        changed(spec=None),
    ],
)
def test_garbage_is_a_corrupt_image(blob: bytes) -> None:
    """Never a KeyError or TypeError."""
    assert failure(blob).code is Code.IMAGE_CORRUPT


@given(st.binary(max_size=200))
def test_any_bytes_are_a_clear_error(blob: bytes) -> None:
    """Bytes that are no config give IMAGE_CORRUPT or IMAGE_VERSION."""
    assert failure(blob).code in {Code.IMAGE_CORRUPT, Code.IMAGE_VERSION}


@given(st.integers(0, len(CONFIG.to_json()) - 1))
def test_truncated_config_is_corrupt(size: int) -> None:
    """A config that was cut anywhere is never taken for a whole one."""
    assert failure(CONFIG.to_json()[:size]).code is Code.IMAGE_CORRUPT
