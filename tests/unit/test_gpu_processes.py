"""smr.shim.gpu.processes over a /proc of files, and over real forked processes."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from smr.proto.errors import Code, SmrError
from smr.shim.gpu import processes
from smr.shim.gpu.processes import Descriptor
from tests.unit.fakeproc import CUDA_FDS, CUDA_MAPS, FakeProc


def shared(_pid: int, _other: int, _fd: int) -> bool:
    """kcmp(2) for files that were inherited."""
    return True


def own(_pid: int, _other: int, _fd: int) -> bool:
    """kcmp(2) for files that each process opened itself."""
    return False


def test_tree_without_gpu_uses_none(tmp_path: Path) -> None:
    """A program that only has NVIDIA's libraries mapped, or a file with such a name open, uses no GPU."""
    proc = FakeProc(tmp_path)
    maps = "7f1000000000-7f1000100000 r-xp 00000000 08:01 77 /usr/lib/libcuda.so.1\n"
    proc.add(5, children=[9], fds={3: "/dev/null", 4: "/data/dev/nvidia0"}, maps=maps)
    proc.add(9, fds={0: "pipe:[77]"})
    assert not processes.uses_gpu(5, tmp_path)
    assert processes.find(5, tmp_path).tree == (5, 9)
    assert processes.find(5, tmp_path).cuda == ()


def test_node_without_driver_is_told_by_one_file(tmp_path: Path) -> None:
    """Where the kernel has neither driver no process is looked at."""
    proc = FakeProc(tmp_path, devices="Character devices:\n  1 mem\n 10 misc\n")
    proc.add(5, fds=CUDA_FDS)
    assert not processes.uses_gpu(5, tmp_path)


def test_gpu_is_found_in_a_grandchild_of_a_thread(tmp_path: Path) -> None:
    """Children that any thread started belong to the tree."""
    proc = FakeProc(tmp_path)
    proc.add(5, children=[20], threads=("main", "starter"))
    proc.add(20, children=[30])
    proc.add(30, fds=CUDA_FDS, maps=CUDA_MAPS)
    assert processes.uses_gpu(5, tmp_path)
    found = processes.find(5, tmp_path, own)
    assert found.tree == (5, 20, 30)
    assert found.pids == (30,)
    assert found.minors == (0, 1)


def test_what_a_cuda_process_holds(tmp_path: Path) -> None:
    """Descriptors and mappings of devices are listed, with the GPUs by minor number; other ones are not."""
    proc = FakeProc(tmp_path)
    proc.add(5, fds={**CUDA_FDS, 17: "/dev/nvidia12", 18: "/dev/shm/nvidia0"}, maps=CUDA_MAPS)
    held = processes.holding(5, tmp_path)
    assert held is not None
    assert held.library
    assert held.minors == (0, 1, 12)
    assert held.used == (0,)
    assert [one.number for one in held.descriptors] == [10, 11, 12, 13, 14, 15, 17]
    assert [(one.start, one.path) for one in held.mappings] == [
        (0x200600000, "/dev/nvidia0"),
        (0x200800000, "/dev/nvidiactl"),
        (0x204A00000, "/dev/nvidia-uvm"),
        (0x7F434D2B1000, "/dev/nvidia1"),
        (0x7F434D2D1000, "/dev/nvidia0"),
    ]


def test_forked_child_is_told_from_one_with_cuda_of_its_own(tmp_path: Path) -> None:
    """The same numbers are a fork's only when they are the same open files; a grandchild's origin is the process with CUDA."""
    proc = FakeProc(tmp_path)
    proc.add(5, children=[20, 40], fds=CUDA_FDS, maps=CUDA_MAPS)
    proc.add(20, children=[30], fds={10: "/dev/nvidiactl", 12: "/dev/nvidia0"}, maps=CUDA_MAPS)
    proc.add(30, fds={10: "/dev/nvidiactl"})
    proc.add(40, fds=CUDA_FDS, maps=CUDA_MAPS)
    found = processes.find(5, tmp_path, lambda pid, _other, _fd: pid != 40)
    assert found.pids == (5, 40)
    assert [(one.pid, one.inherited_from) for one in found.forked] == [(20, 5), (30, 5)]


def test_child_that_opened_one_more_device_has_cuda(tmp_path: Path) -> None:
    """A descriptor that the parent has not is the child's own."""
    proc = FakeProc(tmp_path)
    proc.add(5, children=[20], fds=CUDA_FDS, maps=CUDA_MAPS)
    proc.add(20, fds={**CUDA_FDS, 30: "/dev/nvidia2"}, maps=CUDA_MAPS)
    assert processes.find(5, tmp_path, shared).pids == (5, 20)


def test_child_with_mappings_alone_is_forked(tmp_path: Path) -> None:
    """A child that closed all descriptors keeps the mappings."""
    proc = FakeProc(tmp_path)
    proc.add(5, children=[20], fds=CUDA_FDS, maps=CUDA_MAPS)
    proc.add(20, maps=CUDA_MAPS)
    assert [one.pid for one in processes.find(5, tmp_path, own).forked] == [20]


def test_siblings_of_a_parent_that_is_gone(tmp_path: Path) -> None:
    """Of two processes that share open files without an ancestor that does, the later one counts as forked."""
    proc = FakeProc(tmp_path)
    proc.add(5, children=[20, 30])
    proc.add(20, fds=CUDA_FDS)
    proc.add(30, fds=CUDA_FDS)
    found = processes.find(5, tmp_path, shared)
    assert found.pids == (20,)
    assert [(one.pid, one.inherited_from) for one in found.forked] == [(30, 20)]


def test_driver_has_the_last_word(tmp_path: Path) -> None:
    """A state makes CUDA of a forked process; none makes one of `others` of what opened devices itself."""
    proc = FakeProc(tmp_path)
    proc.add(5, children=[20, 40], fds=CUDA_FDS)
    proc.add(20, fds=CUDA_FDS)
    proc.add(40, fds={**CUDA_FDS, 33: "/dev/nvidia2"})
    found = processes.settle(processes.find(5, tmp_path, shared), {5: 0, 20: 0, 40: None}, proc=tmp_path)
    assert found.pids == (5, 20)
    assert [one.pid for one in found.others] == [40]
    assert found.forked == ()


def test_restore_thread_of_another_process_is_no_cuda(tmp_path: Path) -> None:
    """A forked process whose memory names its parent's thread has no CUDA, whatever state the driver gives."""
    proc = FakeProc(tmp_path)
    proc.add(5, children=[20], fds=CUDA_FDS, threads=("main", "cuda"))
    proc.add(20, fds=CUDA_FDS)
    found = processes.find(5, tmp_path, shared)
    settled = processes.settle(found, {5: 0, 20: 0}, {5: 6, 20: 6}, tmp_path)
    assert settled.pids == (5,)
    assert [one.pid for one in settled.forked] == [20]


def test_amd_gpu_is_refused_with_the_process(tmp_path: Path) -> None:
    """An open /dev/kfd counts as a GPU, and finding it is the error UNSUPPORTED."""
    proc = FakeProc(tmp_path, devices="Character devices:\n509 kfd\n")
    proc.add(5, children=[20])
    proc.add(20, fds={3: "/dev/kfd", 4: "/dev/dri/renderD128"})
    assert processes.uses_gpu(5, tmp_path)
    with pytest.raises(SmrError, match="process 20 uses an AMD GPU") as error:
        processes.find(5, tmp_path)
    assert error.value.code is Code.UNSUPPORTED


def test_processes_that_end_meanwhile_are_left_out(tmp_path: Path) -> None:
    """A child that is listed and has no folder any more is no error."""
    proc = FakeProc(tmp_path)
    proc.add(5, children=[20], fds=CUDA_FDS)
    assert processes.find(5, tmp_path, own).pids == (5,)


def test_kcmp_tells_a_fork_from_an_equal_open() -> None:
    """The kernel's answer for a real child: the descriptor it was forked with is the same file, one it opened itself is not."""
    first = os.open("/dev/zero", os.O_RDONLY)
    second = os.open("/dev/zero", os.O_RDONLY)
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(second)
        os.dup2(os.open("/dev/zero", os.O_RDONLY), second)
        os.write(told, b".")
        signal.pause()
    try:
        os.read(ready, 1)
        assert processes._same_file(child, os.getpid(), first)
        assert not processes._same_file(child, os.getpid(), second)
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        for fd in (first, second, ready, told):
            os.close(fd)


def test_own_descriptors_are_read_from_the_real_proc() -> None:
    """/proc/PID/fd of this process names an open device by its number."""
    fd = os.open("/dev/zero", os.O_RDONLY)
    try:
        assert Descriptor(number=fd, path="/dev/zero") in processes.descriptors(os.getpid())
    finally:
        os.close(fd)
