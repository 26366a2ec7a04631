"""The annotations by which engines know an OCI image as a checkpoint."""

from __future__ import annotations

from dataclasses import replace

import pytest

from smr.images.checkpoint_annotations import checkpoint_annotations, criu_number, go_architecture
from smr.proto.checkpoint import Source
from tests.store_support import make_config


def test_all_three_families_are_written() -> None:
    """podman, CRI-O and checkpointctl find the name where they look, and the facts they compare."""
    found = checkpoint_annotations(make_config())
    assert found["io.podman.annotations.checkpoint.name"] == "llama"
    assert found["io.podman.annotations.checkpoint.runtime.name"] == "runc"
    assert found["io.podman.annotations.checkpoint.runtime.version"] == "1.1.5"
    assert found["io.podman.annotations.checkpoint.criu.version"] == "40101"
    assert found["io.podman.annotations.checkpoint.host.arch"] == "amd64"
    assert found["io.podman.annotations.checkpoint.host.kernel"] == "6.8.1"
    assert found["io.podman.annotations.checkpoint.cgroups.version"] == "v2"
    assert found["io.kubernetes.cri-o.annotations.checkpoint.name"] == "llama"
    assert found["io.kubernetes.cri-o.annotations.checkpoint.rootfsImageName"] == "docker.io/library/llama:1"
    assert found["org.criu.checkpoint.container.name"] == "llama"
    assert found["org.criu.checkpoint.engine.name"] == "podman"
    assert found["org.criu.checkpoint.cgroup.version"] == "v2"


def test_unknown_facts_are_left_out_and_the_name_never_is() -> None:
    """No key stands with an empty value; a container without a name has its id."""
    source = Source(engine="runc", container_id="c1")
    found = checkpoint_annotations(replace(make_config(), source=source))
    assert all(found.values())
    assert "io.podman.annotations.checkpoint.rawImageName" not in found
    assert [found[key] for key in found if key.endswith(("checkpoint.name", "container.name"))] == ["c1"] * 3


@pytest.mark.parametrize(
    "spec",
    [
        {
            "io.kubernetes.cri.sandbox-name": "pod",
            "io.kubernetes.cri.sandbox-id": "1",
            "io.kubernetes.cri.sandbox-namespace": "ns",
        },
        {"io.kubernetes.pod.name": "pod", "io.kubernetes.cri-o.SandboxID": "1", "io.kubernetes.pod.namespace": "ns"},
    ],
)
def test_pod_is_taken_from_the_spec(spec: dict[str, str]) -> None:
    """containerd's CRI and CRI-O name the pod differently; checkpointctl's keys get either."""
    found = checkpoint_annotations(replace(make_config(), spec={"annotations": spec}))
    assert [found[f"org.criu.checkpoint.pod.{key}"] for key in ("name", "id", "namespace")] == ["pod", "1", "ns"]


@pytest.mark.parametrize(("text", "number"), [("4.1.1", "40101"), ("4.3", "40300"), ("3.17.1-2", "31701"), ("", ""), ("new", "")])
def test_criu_version_as_a_number(text: str, number: str) -> None:
    """podman and CRI-O write CRIU's version as one number."""
    assert criu_number(text) == number


def test_architecture_has_the_name_of_oci() -> None:
    """`uname -m` says x86_64, OCI says amd64; an unknown one is kept."""
    assert [go_architecture(machine) for machine in ("x86_64", "aarch64", "riscv64", "vax")] == [
        "amd64",
        "arm64",
        "riscv64",
        "vax",
    ]
