"""The manifests of deploy/kubernetes against the published schemas, and against each other."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "deploy/kubernetes"
KUSTOMIZATIONS = ("base", "uninstall")
# The oldest and the newest that a user may have, of those that the library has schemas for.
VERSIONS = ("1.25", "1.31", kubernetes_validate.latest_version())
Document = dict[str, Any]


def documents(folder: Path) -> Iterator[Document]:
    """All objects of a kustomization, as they are in the files."""
    for name in yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"]:
        path = folder / name
        if path.is_dir():
            yield from documents(path)
        else:
            yield from yaml.safe_load_all(path.read_text())


def named(name: str) -> dict[str, Document]:
    """Objects of a kustomization by kind."""
    return {document["kind"]: document for document in documents(FOLDER / name)}


def pod(daemonset: Document) -> Document:
    """The spec of its pods."""
    found: Document = daemonset["spec"]["template"]["spec"]
    return found


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_every_object_fits_its_published_schema(name: str, version: str) -> None:
    """Strictly: an unknown field is an error."""
    for document in documents(FOLDER / name):
        kubernetes_validate.validate(document, version, strict=True)


def test_the_schemas_find_a_mistyped_field() -> None:
    """The check above can fail."""
    document = named("base")["DaemonSet"]
    document["spec"]["template"]["spec"]["hostPid"] = True
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_kustomize_makes_the_same_objects_with_the_image_in_them(name: str) -> None:
    """kubectl's own kustomize; every object but cluster-wide ones is in our namespace."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on PATH")
    done = subprocess.run(["kubectl", "kustomize", FOLDER / name], check=True, capture_output=True, text=True)
    made = list(yaml.safe_load_all(done.stdout))
    assert sorted(each["kind"] for each in made) == sorted(each["kind"] for each in documents(FOLDER / name))
    for document in made:
        if document["kind"] == "DaemonSet":
            for container in (*pod(document)["initContainers"], *pod(document)["containers"]):
                assert container["image"].startswith("registry.example/smr-node:")
        if document["kind"] not in {"Namespace", "RuntimeClass", "ClusterRole", "ClusterRoleBinding"}:
            assert document["metadata"]["namespace"] == "smr-system"


@pytest.mark.parametrize("name", KUSTOMIZATIONS)
def test_pods_are_what_the_entry_point_needs(name: str) -> None:
    """The node's processes, all rights, every node, verbs that node.sh has; the selector finds the pods."""
    daemonset = named(name)["DaemonSet"]
    spec = pod(daemonset)
    assert spec["hostPID"] is True
    assert spec["tolerations"] == [{"operator": "Exists"}]
    assert daemonset["spec"]["selector"]["matchLabels"].items() <= daemonset["spec"]["template"]["metadata"]["labels"].items()
    script = (FOLDER / "node.sh").read_text()
    for container in (*spec["initContainers"], *spec["containers"]):
        assert container["securityContext"] == {"privileged": True}
        (verb,) = container["args"]
        assert re.search(rf"^    (\w+ \| )*{verb}( \| \w+)*\)", script, re.MULTILINE), verb


def test_names_that_refer_to_each_other_do() -> None:
    """Account, role, configuration and handler."""
    base = named("base")
    assert pod(base["DaemonSet"])["serviceAccountName"] == base["ServiceAccount"]["metadata"]["name"]
    (subject,) = base["ClusterRoleBinding"]["subjects"]
    assert subject["name"] == base["ServiceAccount"]["metadata"]["name"]
    assert base["ClusterRoleBinding"]["roleRef"]["name"] == base["ClusterRole"]["metadata"]["name"]
    reference = pod(base["DaemonSet"])["initContainers"][0]["env"][0]["valueFrom"]["configMapKeyRef"]
    assert reference["name"] == base["ConfigMap"]["metadata"]["name"]
    assert reference["key"] in base["ConfigMap"]["data"]
    assert base["RuntimeClass"]["handler"] == "smr"


def test_no_right_is_asked_for_that_could_change_the_cluster() -> None:
    """Events are made, pods are read; nothing else."""
    rules = named("base")["ClusterRole"]["rules"]
    assert {verb for rule in rules for verb in rule["verbs"]} == {"create", "patch", "get"}
    for rule in rules:
        assert rule["resources"] == (["pods"] if "get" in rule["verbs"] else ["events"])
