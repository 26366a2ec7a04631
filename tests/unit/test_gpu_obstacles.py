"""smr.shim.gpu.obstacles over a /proc of files: each obstacle is named with its process and remedy, and nothing else refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from smr.proto.errors import Code, SmrError
from smr.shim.gpu import obstacles, processes
from tests.unit.fakeproc import CUDA_FDS, CUDA_MAPS, FakeProc

OFF = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}
MANAGED = "7f4000000000-7f4004000000 rw-s 7f4000000000 00:06 490 /dev/nvidia-uvm\n"


def own(_pid: int, _other: int, _fd: int) -> bool:
    """kcmp(2): every process opened its devices itself."""
    return False


def look(proc: FakeProc, root: int = 5, driver: str = "580.159.04") -> list[obstacles.Obstacle]:
    """What is in the way in the tree of `root`."""
    return obstacles.look(processes.find(root, proc.path, own), driver=driver, proc=proc.path)


def rank(proc: FakeProc, pid: int, number: int, **words: object) -> None:
    """A process with CUDA and a communicator."""
    name = f"@tmp/nccl-socket-{number}-1f0c{'@' * 40}"
    unix = f"0000000000000000: 00000002 00000000 00000000 0002 01 {9000 + pid} {name}\n"
    fds = {**CUDA_FDS, 40: f"socket:[{9000 + pid}]"}
    proc.add(pid, fds=fds, maps=CUDA_MAPS, unix=unix, **words)  # type: ignore[arg-type]


def test_plain_cuda_process_has_no_obstacle(tmp_path: Path) -> None:
    """CUDA's own devices, its pool of /dev/nvidia-uvm, eventfds and sockets of others are in nobody's way."""
    proc = FakeProc(tmp_path)
    unix = "0000000000000000: 00000002 00000000 00000000 0002 01 4711 @tmp/nccl-socket-1-1f\n"
    proc.add(5, fds={**CUDA_FDS, 20: "anon_inode:[eventfd]", 21: "socket:[12]"}, maps=CUDA_MAPS, unix=unix)
    assert look(proc) == []
    obstacles.check(processes.find(5, tmp_path, own), proc=tmp_path)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("io_uring", "anon_inode:[io_uring]"),
        ("infiniband", "/dev/infiniband/uverbs0"),
        ("gdrcopy", "/dev/gdrdrv"),
        ("gds", "/dev/nvidia-fs3"),
        ("imex", "/dev/nvidia-caps-imex-channels/channel0"),
        ("graphics", "/dev/nvidia-modeset"),
        ("mps", "/tmp/nvidia-mps/control"),
    ],
)
def test_open_file_is_a_certain_sign(tmp_path: Path, name: str, path: str) -> None:
    """Each such descriptor is one obstacle, named with process, command and what was found."""
    proc = FakeProc(tmp_path)
    proc.add(5, children=[20])
    proc.add(20, fds={**CUDA_FDS, 33: path}, maps=CUDA_MAPS, command="vllm serve")
    (found,) = look(proc)
    assert (found.name, found.pid, found.certain) == (name, 20, True)
    assert f"process 20 (vllm serve) {found.what}: found" in found.message
    assert path in found.message


def test_io_uring_of_a_process_without_cuda_counts(tmp_path: Path) -> None:
    """CRIU cannot dump it wherever in the tree it is."""
    proc = FakeProc(tmp_path)
    proc.add(5, children=[20], fds=CUDA_FDS)
    proc.add(20, fds={3: "anon_inode:[io_uring]"}, command="node index.js")
    assert [(one.name, one.pid) for one in look(proc)] == [("io_uring", 20)]


def test_error_names_first_obstacle_and_counts_the_rest(tmp_path: Path) -> None:
    """GPU_UNSUPPORTED; certain ones come first; the hint is the remedy."""
    proc = FakeProc(tmp_path)
    proc.add(5, fds={**CUDA_FDS, 30: "anon_inode:[io_uring]"}, maps=CUDA_MAPS + MANAGED)
    with pytest.raises(SmrError) as error:
        obstacles.check(processes.find(5, tmp_path, own), driver="580.1", proc=tmp_path)
    assert error.value.code is Code.GPU_UNSUPPORTED
    assert error.value.message.startswith("process 5 (python server.py) uses io_uring")
    assert error.value.message.endswith("and 1 more: managed")
    assert "UV_USE_IO_URING=0" in error.value.hint
    assert error.value.context == {"pid": 5, "obstacle": "io_uring", "obstacles": 2}


def test_debugger_on_any_thread(tmp_path: Path) -> None:
    """A tracer of the second thread is found, and its pid is in the remedy."""
    proc = FakeProc(tmp_path)
    proc.add(5, fds=CUDA_FDS, threads=("main", "worker"), tracer=77)
    (found,) = look(proc)
    assert (found.name, found.found) == ("debugger", "TracerPid 77 of thread 6")
    assert "process 77" in found.remedy


def test_managed_memory_is_told_from_the_pool_of_semaphores(tmp_path: Path) -> None:
    """Only a mapping of /dev/nvidia-uvm above the driver's window counts."""
    proc = FakeProc(tmp_path)
    proc.add(5, fds=CUDA_FDS, maps=CUDA_MAPS + MANAGED)
    (found,) = look(proc)
    assert (found.name, found.certain) == ("managed", True)
    assert found.found == "/dev/nvidia-uvm mapped at 7f4000000000, 64 MiB"


def test_opened_ipc_handle_is_told_from_an_exported_one(tmp_path: Path) -> None:
    """Whoever maps the events of another process has opened its handles; the pid in the name is the one in the container."""
    proc = FakeProc(tmp_path)
    shm = "205400000-205414000 rw-s 00000000 00:19 9 /dev/shm/cuda.shm.0.480.1\n"
    proc.add(5, children=[1155, 1295])
    proc.add(1155, fds={**CUDA_FDS, 31: "/dev/shm/cuda.shm.0.480.1"}, maps=CUDA_MAPS + shm)
    proc.add(1295, fds=CUDA_FDS, maps=CUDA_MAPS + shm)
    (found,) = look(proc)
    assert (found.name, found.pid, found.certain) == ("ipc", 1295, True)
    assert found.found == "/dev/shm/cuda.shm.0.480.1 of process 1152 (pid in the container)"


def test_job_of_a_new_driver_may_share_memory(tmp_path: Path) -> None:
    """With driver 610 and CUDA_CHECKPOINT_JOB_FILE neither IPC nor NCCL nor an all-reduce refuses; with 580 they do."""
    proc = FakeProc(tmp_path)
    job = {"CUDA_CHECKPOINT_JOB_FILE": "/proc/self/fd/9"}
    shm = "205400000-205414000 rw-s 00000000 00:19 9 /dev/shm/cuda.shm.0.480.1\n"
    proc.add(5, children=[20, 30, 40], command="python -m vllm.entrypoints.openai.api_server")
    rank(proc, 20, 0, environ=job)
    rank(proc, 30, 1, environ=job)
    proc.add(40, fds=CUDA_FDS, maps=CUDA_MAPS + shm, environ=job)
    assert look(proc, driver="610.57.04") == []
    assert sorted(one.name for one in look(proc)) == ["all-reduce", "ipc", "nccl"]


@pytest.mark.parametrize(
    ("command", "refused"),
    [
        ("/usr/bin/python3 /usr/local/bin/vllm serve /m --tensor-parallel-size 2", True),
        ("vllm serve /m -tp 2", True),
        ("python -m sglang.launch_server --tp 2", True),
        ("vllm serve /m -tp 2 --disable-custom-all-reduce", False),
        ("python -m sglang.launch_server --tp 2 --disable-custom-all-reduce", False),
        ("python serve.py", False),
    ],
)
def test_custom_all_reduce_is_told_by_the_command(tmp_path: Path, command: str, refused: bool) -> None:
    """On several GPUs these servers open each other's memory, with NCCL over sockets too, unless told not to."""
    proc = FakeProc(tmp_path)
    proc.add(5, children=[20, 30], command=command)
    rank(proc, 20, 0, environ=OFF)
    rank(proc, 30, 1, environ=OFF)
    assert [one.name for one in look(proc)] == (["all-reduce"] if refused else [])


def test_servers_of_one_gpu_each_have_nothing_in_common(tmp_path: Path) -> None:
    """Processes that are rank 0 of communicators of their own; a front process with NVML open makes no difference."""
    proc = FakeProc(tmp_path)
    proc.add(5, children=[20, 30], command="vllm serve /m -dp 2", fds={7: "/dev/nvidiactl"})
    rank(proc, 20, 0)
    rank(proc, 30, 0)
    assert look(proc) == []


def test_nccl_among_processes_is_refused_with_the_setting_that_lacks(tmp_path: Path) -> None:
    """Two ranks with default transports, or with only one of them off, are one obstacle for the tree."""
    proc = FakeProc(tmp_path)
    proc.add(5, children=[20, 30])
    rank(proc, 20, 0, environ=OFF)
    rank(proc, 30, 1, environ={"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "0"})
    (found,) = look(proc)
    assert (found.name, found.pid) == ("nccl", 30)
    assert found.found == "a communicator (ranks [1]), and NCCL_SHM_DISABLE not set"
    assert "NCCL_SHM_DISABLE=1" in found.remedy
    assert "quiesce" in found.remedy


def test_nccl_over_sockets_is_no_obstacle(tmp_path: Path) -> None:
    """Both transports off, in the environment of one rank and in the other's /etc/nccl.conf."""
    proc = FakeProc(tmp_path)
    proc.add(5, children=[20, 30])
    rank(proc, 20, 0, environ=OFF)
    rank(proc, 30, 1)
    (tmp_path / "30/root/etc").mkdir()
    (tmp_path / "30/root/etc/nccl.conf").write_text("# ours\nNCCL_P2P_DISABLE=1\nNCCL_SHM_DISABLE = 1\n")
    assert look(proc) == []


def test_nccl_inside_one_process_is_no_obstacle(tmp_path: Path) -> None:
    """A communicator of one rank, or of several in one process, shares nothing with others."""
    proc = FakeProc(tmp_path)
    rank(proc, 5, 0, threads=("main", "pt_nccl_watchdg"))
    assert look(proc) == []


def test_nccl_rank_alone_reaches_out_of_the_container(tmp_path: Path) -> None:
    """Rank 1 without rank 0 has its peer elsewhere."""
    proc = FakeProc(tmp_path)
    rank(proc, 5, 1)
    assert [one.name for one in look(proc)] == ["nccl"]


def test_nccl_is_told_by_threads_where_there_is_no_socket(tmp_path: Path) -> None:
    """PyTorch's watchdogs in two processes are a sign of a process group."""
    proc = FakeProc(tmp_path)
    proc.add(5, children=[20, 30])
    for pid in (20, 30):
        proc.add(pid, fds=CUDA_FDS, maps=CUDA_MAPS, threads=("main", "pt_nccl_watchdg"))
    assert [one.name for one in look(proc)] == ["nccl"]


def test_mps_daemon_in_the_container_is_a_sign(tmp_path: Path) -> None:
    """CUDA connects to a live control daemon by itself; an empty folder with no socket is none."""
    proc = FakeProc(tmp_path)
    unix = "0000000000000000: 00000003 00000000 00000000 0001 03 77 /tmp/nvidia-mps/control\n"
    proc.add(5, fds=CUDA_FDS, unix=unix)
    assert look(proc) == []
    (tmp_path / "5/root/tmp/nvidia-mps").mkdir(parents=True)
    (tmp_path / "5/root/tmp/nvidia-mps/control").touch()
    assert [one.name for one in look(proc)] == ["mps"]


def test_devices_without_cuda_are_an_obstacle_once_the_driver_said_so(tmp_path: Path) -> None:
    """A process that left NVML open cannot be dumped."""
    proc = FakeProc(tmp_path)
    proc.add(5, children=[20], fds={7: "/dev/nvidiactl"}, command="vllm api")
    proc.add(20, fds=CUDA_FDS)
    found = processes.settle(processes.find(5, tmp_path, own), {5: None, 20: 0}, proc=tmp_path)
    (obstacle,) = obstacles.look(found, proc=tmp_path)
    assert (obstacle.name, obstacle.pid) == ("nvml", 5)
    assert "nvmlShutdown" in obstacle.remedy


def test_what_is_left_after_the_checkpoint_is_named(tmp_path: Path) -> None:
    """A process that the driver has checkpointed must hold no device."""
    proc = FakeProc(tmp_path)
    proc.add(5)
    proc.add(6, fds={12: "/dev/nvidia0"})
    obstacles.released([5], tmp_path)
    with pytest.raises(SmrError, match=r"process 6 .* still holds /dev/nvidia0") as error:
        obstacles.released([5, 6], tmp_path)
    assert error.value.code is Code.GPU_UNSUPPORTED
