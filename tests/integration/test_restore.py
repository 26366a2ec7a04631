"""What a restore by annotation promises, on every engine: podman, containerd 1.6 and 2.x."""

from __future__ import annotations

import json

from tests.integration.command import eventually
from tests.integration.conftest import FEATURES, Engine, Warm, make_warm


def restored(engine: Engine, name: str, warm: Warm, **annotations: str) -> None:
    """Start a container from `warm`; it must be a restore, not a cold start."""
    engine.start(name, *warm.features, annotations={"smr.restore": warm.image, "smr.fallback": "fail", **annotations})


def test_state_goes_on(engine: Engine, warm: Warm) -> None:
    """The counter in memory continues in the same process state, though source container and its network are gone."""
    restored(engine, "again", warm)
    assert engine.ask("again", "count") == {"count": warm.count + 1, "boot": warm.boot}
    assert engine.running("again")


def test_a_second_restore_starts_from_the_image_again(engine: Engine, warm: Warm) -> None:
    """A restore does not change the image: each one has the count of the checkpoint."""
    for name in ("first", "second"):
        restored(engine, name, warm)
        assert engine.ask(name, "count")["count"] == warm.count + 1


def test_kernel_objects_survive(engine: Engine, warm: Warm) -> None:
    """Pipes, sockets, shared memory, threads, open and deleted files, zombies and large memory are as they were."""
    restored(engine, "again", warm)
    answers = {feature: engine.ask("again", feature) for feature in FEATURES}
    pids = answers["workers"].pop("pids")
    assert answers == {
        "file": {"offset": 4, "next": "45", "deleted": "gone"},
        "memory": {"crc": 646947347},
        "shm": {"file": 3, "anonymous": 3, "back": 3, "named": 3},
        "threads": {"values": [3, 3, 3, 3]},
        "unix": {"value": 3},
        "workers": {"values": [3, 103]},
        "zombie": {"state": "Z"},
    }
    assert len(set(pids)) == 2


def test_an_inotify_watch_survives(engine: Engine) -> None:
    """An event after the restore reaches the watch that was set before it, on the container's own file system."""
    make_warm(engine, "inotify:1", "inotify")
    engine.start("again", "inotify", annotations={"smr.restore": "inotify:1", "smr.fallback": "fail"})
    answer = engine.ask("again", "inotify")
    assert answer["seen"] == answer["made"]


def test_a_stopped_child_stays_stopped(engine: Engine) -> None:
    """A task that was stopped at the checkpoint is stopped after the restore, and goes on when it is told to."""
    make_warm(engine, "stopped:1", "stopped")
    engine.start("again", "stopped", annotations={"smr.restore": "stopped:1", "smr.fallback": "fail"})
    assert engine.ask("again", "stopped") == {"state": "T"}
    assert engine.ask("again", "resume") == {"said": "on"}


def test_exec_works_and_ends_with_its_code(engine: Engine, warm: Warm) -> None:
    """exec into a restored container: output, input and exit code."""
    restored(engine, "again", warm)
    assert engine.exec("again", "cat", "/etc/marker").stdout == "from the image\n"
    assert engine.exec("again", "sh", "-c", "exit 5", check=False).returncode == 5
    pids = engine.exec("again", "sh", "-c", "ls /proc").stdout.split()
    assert "1" in pids


def test_a_signal_reaches_the_handler(engine: Engine, warm: Warm) -> None:
    """SIGTERM through the engine runs the handler of the restored process, and wait gives its exit code."""
    restored(engine, "again", warm)
    engine.kill("again", "TERM")
    assert engine.wait("again") == 7


def test_kill_and_an_exit_by_itself(engine: Engine, warm: Warm) -> None:
    """SIGKILL gives 137; an exit of the restored process gives its own code."""
    restored(engine, "killed", warm)
    engine.kill("killed", "KILL")
    assert engine.wait("killed") == 137
    restored(engine, "ended", warm)
    engine.exec("ended", "wget", "-q", "-O-", "http://127.0.0.1:8000/exit/42", check=False)
    assert engine.wait("ended") == 42


def test_logs_continue(engine: Engine) -> None:
    """Output after the restore is the new container's log, and goes on where the old one's stopped."""
    engine.start("source", "--log")
    make_warm(engine, "logs:1", "--log", start=False, remove=False)
    engine.remove("source")
    engine.start("again", "--log", annotations={"smr.restore": "logs:1", "smr.fallback": "fail"})
    eventually(lambda: engine.logs("again").count("line ") >= 3, what="three lines")
    lines = [line for line in engine.logs("again").splitlines() if line.startswith("line ")]
    numbers = [int(line.split()[1]) for line in lines]
    assert numbers[0] > 1, "it counts from the checkpoint on, not from its start"
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def test_the_source_runs_on(engine: Engine) -> None:
    """--leave-running is the default: the source serves on, in the same state, beside its restored copy."""
    warm = make_warm(engine, "left:1", "workers", "threads", remove=False)
    assert engine.ask("source", "count") == {"count": warm.count + 1, "boot": warm.boot}
    restored(engine, "again", warm)
    assert engine.ask("again", "count") == {"count": warm.count + 1, "boot": warm.boot}
    assert engine.ask("source", "workers")["values"] == [3, 103]


def test_stop_ends_the_source(engine: Engine) -> None:
    """--stop ends the container once the image is there."""
    engine.start("source", "--exit", "9")
    boot = engine.ready("source")["boot"]
    engine.checkpoint("source", "ended:1", "--stop")
    eventually(lambda: not engine.running("source"), what="source has ended")
    engine.remove("source")
    engine.start("again", "--exit", "9", annotations={"smr.restore": "ended:1", "smr.fallback": "fail"})
    assert engine.ask("again", "count") == {"count": 1, "boot": boot}


def test_generations(engine: Engine, warm: Warm) -> None:
    """A restored container can be checkpointed and restored again, twice over."""
    image, count = warm.image, warm.count
    for generation in ("g1", "g2"):
        engine.start(generation, *warm.features, annotations={"smr.restore": image, "smr.fallback": "fail"})
        count += 1
        assert engine.ask(generation, "count") == {"count": count, "boot": warm.boot}
        image = f"{generation}:1"
        engine.checkpoint(generation, image)
        engine.remove(generation)
    engine.start("last", *warm.features, annotations={"smr.restore": image, "smr.fallback": "fail"})
    assert engine.ask("last", "count") == {"count": count + 1, "boot": warm.boot}
    assert engine.ask("last", "workers")["values"] == [3, 103]


def test_files_of_the_container_come_along(engine: Engine) -> None:
    """Files made, changed and deleted in the writable layer before the checkpoint are so after the restore."""
    engine.start("source")
    engine.ready("source")
    script = """
        echo new >/data/made; echo changed >/etc/marker; rm /etc/hosts.keep 2>/dev/null
        mkdir -p /data/dir/sub; echo deep >/data/dir/sub/file; rm -r /app/../var/tmp; mkdir /var/tmp
        dd if=/dev/zero of=/data/big bs=1M count=3 2>/dev/null; chmod 640 /data/made; sync
    """
    engine.exec("source", "sh", "-c", script)
    engine.checkpoint("source", "files:1")
    engine.remove("source")
    engine.start("again", annotations={"smr.restore": "files:1", "smr.fallback": "fail"})
    look = "cat /data/made /etc/marker /data/dir/sub/file; stat -c %a,%s /data/made /data/big; ls /var/tmp"
    assert engine.exec("again", "sh", "-c", look).stdout.split() == ["new", "changed", "deep", "640,4", "644,3145728"]


def test_an_image_by_digest(engine: Engine, warm: Warm) -> None:
    """An image can be named by the digest of its manifest, which says exactly what is restored."""
    images = json.loads(engine.node.smr("images", "ls", "--json").stdout)
    listed = images["images"] if isinstance(images, dict) else images
    digest = next(image["digest"] for image in listed if f"{image['name']}:{image['tag']}" == warm.image)
    engine.start("again", *warm.features, annotations={"smr.restore": digest, "smr.fallback": "fail"})
    assert engine.ask("again", "count")["count"] == warm.count + 1


def test_ps_and_inspect_tell_of_the_restore(engine: Engine, warm: Warm) -> None:
    """`smr ps` lists the container as restored; `smr inspect` has the image and every stage's time; SMR's log has one line."""
    restored(engine, "told", warm)
    record = eventually(lambda: engine.node.only_record("restored"), what="the record, which start does not wait for")
    assert record["image"] == warm.image
    listed = json.loads(engine.node.smr("ps", "--json").stdout)
    assert [row["status"] for row in (listed["containers"] if isinstance(listed, dict) else listed)] == ["restored"]
    shown = json.loads(engine.node.smr("inspect", str(record["id"]), "--json").stdout)
    assert shown["image"] == warm.image
    assert {"locate", "preflight", "create", "start"} <= set(shown["stages_s"])
    eventually(lambda: f'"{record["id"]}"' in engine.node.log_text(), what="the log line, which start does not wait for")
    lines = [line for line in engine.node.log_text().splitlines() if f'"{record["id"]}"' in line]  # no other is called "told"
    assert [json.loads(line)["event"] for line in lines] == ["restored"]


def test_hostname_is_the_new_containers(engine: Engine, warm: Warm) -> None:
    """CRIU puts the old hostname back; SMR gives the new container its own."""
    restored(engine, "again", warm)
    inside = engine.ask("again", "hostname")["hostname"]
    assert engine.exec("again", "hostname").stdout.strip() == inside
    spec_name = engine.hostname("again")
    if spec_name:
        assert inside == spec_name
