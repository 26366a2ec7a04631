"""The record of a container: made whole or not at all, read again under its lock, dropped without a trace."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from smr.proto.errors import Code, SmrError
from smr.shim import procs
from smr.shim import state as module
from smr.shim.state import ContainerState, GoneError, Record, Stage, Status, all_states, begin, drop_half_made, find, state_path

# Above the kernel's limit of pids.
_NOBODY = 1 << 23


def record(container_id: str = "c1", root: str = "", **values: object) -> Record:
    """A record of a container that is being restored."""
    return replace(Record(id=container_id, root=root, bundle="/b", image="llama:warm"), **values)  # type: ignore[arg-type]


def files(folder: Path) -> list[str]:
    """All that lies below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_begin_can_be_found(tmp_path: Path) -> None:
    """By root and id, as the sh part of smr-runtime looks for it; the owner is this process."""
    begin(tmp_path, record(root="/run/containerd/runc/k8s.io"))
    assert files(tmp_path / "containers/run/containerd/runc/k8s.io/c1") == ["lock", "state.json"]
    found = find(tmp_path, "/run/containerd/runc/k8s.io", "c1")
    assert found is not None
    assert (found.record.status, found.record.image) == (Status.RESTORING, "llama:warm")
    assert found.owner_alive()
    assert not found.task_alive()


@pytest.mark.parametrize(("root", "folder"), [("", "default"), ("/run/runc", "run/runc"), ("run/runc", "run/runc")])
def test_path_is_the_rule_of_the_sh_part(tmp_path: Path, root: str, folder: str) -> None:
    """Root without its leading slash, `default` where none is given."""
    assert state_path(tmp_path, root, "c") == tmp_path / "containers" / folder / "c"


def test_unknown_container_is_nobody(tmp_path: Path) -> None:
    """No record, no id: None."""
    assert find(tmp_path, "", "c1") is None
    assert find(tmp_path, "", "") is None
    assert all_states(tmp_path) == []


def test_whole_record_survives(tmp_path: Path) -> None:
    """What is saved is read, every member."""
    state = begin(tmp_path, record())
    state.record = replace(
        state.record,
        status=Status.RESTORED,
        stages=[Stage(name="locate", start_s=0.0, end_s=0.5, cpu_s=0.25)],
        warnings=["w"],
        annotations={"smr.restore": "llama"},
        criu_options=("tcp-close",),
        mounts_before=("/a", "/b"),
        stopped_pids=(7,),
        undo_tmpfs=("/dev/shm",),
        undo_rootfs=True,
        pid=12,
        pid_started=1234.56,
    )
    state.save()
    found = find(tmp_path, "", "c1")
    assert found is not None
    assert found.record == state.record
    assert found.record.stages_s() == {"locate": 0.5}


def test_second_begin_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    """CONTAINER_STATE says where the first one is; the first stays as it was."""
    first = begin(tmp_path, record())
    before = (first.path / "state.json").read_bytes()
    with pytest.raises(SmrError) as caught:
        begin(tmp_path, record(image="other"))
    assert caught.value.code is Code.CONTAINER_STATE
    assert str(first.path) in caught.value.message
    assert (first.path / "state.json").read_bytes() == before
    assert files(tmp_path / "containers") == ["default", "default/c1", "default/c1/lock", "default/c1/state.json"]


def test_state_that_cannot_be_kept_is_said(tmp_path: Path) -> None:
    """A state directory that cannot be made is an error with the path, not a traceback."""
    (tmp_path / "containers").write_text("a file in its place")
    with pytest.raises(SmrError) as caught:
        begin(tmp_path, record())
    assert caught.value.code is Code.PERMISSION
    assert str(tmp_path) in caught.value.message


def test_half_written_record_is_the_old_one(tmp_path: Path) -> None:
    """A kill while saving leaves a temporary file, which nobody reads."""
    state = begin(tmp_path, record())
    (state.path / ".state.json.99.tmp").write_text('{"version": 1, "id"')
    found = find(tmp_path, "", "c1")
    assert found is not None
    assert found.record == state.record


def test_half_made_directory_is_no_container_and_is_dropped(tmp_path: Path) -> None:
    """A kill while making or removing one leaves a folder of another name; it goes when its maker is dead."""
    state = begin(tmp_path, record("whole"))
    for maker in (os.getpid(), _NOBODY):
        half = state.path.with_name(f"c1~{maker}")
        half.mkdir()
        (half / "state.json").write_text((state.path / "state.json").read_text())
    assert [known.record.id for known in all_states(tmp_path)] == ["whole"]
    drop_half_made(tmp_path)
    assert sorted(path.name for path in state.path.parent.iterdir()) == [f"c1~{os.getpid()}", "whole"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '"x"', '{"version": 2, "status": "restored"}', '{"version": 1, "status": "no such"}', "\xff"]
)
def test_record_that_cannot_be_read_is_never_undone(tmp_path: Path, text: str) -> None:
    """It counts as a container that started cold, and says why: nobody kills what nobody understands."""
    state = begin(tmp_path, record())
    (state.path / "state.json").write_bytes(text.encode("latin-1"))
    found = find(tmp_path, "", "c1")
    assert found is not None
    assert (found.record.id, found.record.status) == ("c1", Status.COLD)
    assert "cannot be read" in found.record.reason


def test_unknown_members_of_the_same_version_are_ignored(tmp_path: Path) -> None:
    """A record that a later SMR of the same version wrote."""
    state = begin(tmp_path, record())
    file = state.path / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "later": 1}))
    found = find(tmp_path, "", "c1")
    assert found is not None
    assert found.record == state.record


def test_remove_leaves_no_folder(tmp_path: Path) -> None:
    """The record, CRIU's directory and the runtime root's folders go; a neighbour keeps his."""
    store = tmp_path / "store"
    first = begin(tmp_path / "run", record("c1", "/run/runc", store=str(store)))
    second = begin(tmp_path / "run", record("c2", "/run/runc", store=str(store)))
    for state in (first, second):
        state.criu_dir.mkdir(parents=True)
        (state.criu_dir / "core-1.img").touch()
        (state.path / "work").mkdir()
    first.remove()
    assert files(store / "restores") == [second.criu_dir.name, f"{second.criu_dir.name}/core-1.img"]
    assert second.path.exists()
    second.remove()
    assert files(tmp_path / "run") == ["containers"]
    assert files(store) == ["restores"]


def test_restore_directories_of_two_containers_differ(tmp_path: Path) -> None:
    """The same id under two roots, or two state directories with one store."""
    states = [begin(tmp_path / run, record("c1", root)) for run in ("a", "b") for root in ("", "/r")]
    assert len({state.criu_dir for state in states}) == 4


def test_lock_reads_the_record_again(tmp_path: Path) -> None:
    """Whoever waited sees what the one before him did."""
    state = begin(tmp_path, record())
    other = find(tmp_path, "", "c1")
    assert other is not None
    other.record.status = Status.CREATED
    other.save()
    with state.locked():
        assert state.record.status is Status.CREATED


def test_lock_of_a_dropped_record_is_gone(tmp_path: Path) -> None:
    """Dropped before the lock is asked for."""
    state = begin(tmp_path, record())
    state.remove()
    with pytest.raises(GoneError) as caught, state.locked():
        pass
    assert caught.value.code is Code.CONTAINER_NOT_FOUND


def test_who_waited_for_a_lock_that_went_is_told(tmp_path: Path) -> None:
    """Dropped, and even made anew under the same id, while somebody waited for the lock."""
    state, outcome = begin(tmp_path, record()), []
    waiting = threading.Event()

    def wait() -> None:
        other = ContainerState(state.path, state.record)
        original = other._flock
        other._flock = lambda fd, wait: (waiting.set(), original(fd, wait))[1]  # type: ignore[method-assign]
        try:
            with other.locked():
                outcome.append("locked")
        except GoneError:
            outcome.append("gone")

    with state.locked():
        thread = threading.Thread(target=wait)
        thread.start()
        assert waiting.wait(10)
        state.remove()
        begin(tmp_path, record())
    thread.join(10)
    assert outcome == ["gone"]


def test_lock_that_is_held_can_be_left_alone(tmp_path: Path) -> None:
    """Without waiting: CONTAINER_STATE."""
    state = begin(tmp_path, record())
    with state.locked():
        other = find(tmp_path, "", "c1")
        assert other is not None
        with pytest.raises(SmrError) as caught, other.locked(wait=False):
            pass
    assert caught.value.code is Code.CONTAINER_STATE
    with other.locked(wait=False):
        assert other.record.id == "c1"


def test_begin_beside_a_removal_of_the_last_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder of the root may go between two steps of a begin: it is made again."""
    original, tries = Path.rename, []

    def rename(path: Path, target: Path) -> Path:
        if not tries:
            tries.append(1)
            module.drop_tree(path.parent)
        return original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    state = begin(tmp_path, record())
    assert tries == [1]
    assert state.path.is_dir()


def test_a_pid_alone_is_no_process(tmp_path: Path) -> None:
    """A number that is used again is not the owner, nor the container's first process."""
    state = begin(tmp_path, record())
    state.record.pid = os.getpid()
    state.record.pid_started = procs.started(os.getpid())
    assert state.task_alive()
    state.record.pid_started -= 1
    state.record.owner_started -= 1
    assert not state.task_alive()
    assert not state.owner_alive()


def test_oldest_first(tmp_path: Path) -> None:
    """`smr ps` lists in the order of starts."""
    for name, started in (("b", "2"), ("a", "1"), ("c", "3")):
        state = begin(tmp_path, record(name))
        state.record.started = started
        state.save()
    assert [state.record.id for state in all_states(tmp_path)] == ["a", "b", "c"]


def test_stages_count_from_the_start(tmp_path: Path) -> None:
    """A stage is recorded also when it fails."""
    state = begin(tmp_path, record())
    with pytest.raises(ValueError, match="boom"), state.stage("rootfs"):
        raise ValueError("boom")
    (stage,) = state.record.stages
    assert stage.name == "rootfs"
    assert 0 <= stage.start_s <= stage.end_s


def test_created_until_start_drops_the_marker(tmp_path: Path) -> None:
    """The sh part of start drops it at once; the record follows in the background."""
    state = begin(tmp_path, record())
    state.created_marker.touch()
    assert not state.waits_for_start()
    state.record.status = Status.CREATED
    assert state.waits_for_start()
    state.created_marker.unlink()
    assert not state.waits_for_start()
