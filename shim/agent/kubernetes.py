"""Events of pods whose restore failed or fell back to a cold start, so that `kubectl describe pod` says why.

Posted to the API server of the cluster that the agent runs in, as events.k8s.io/v1, with the token of its service account: that
may create events, and get pods where the container runtime does not tell a pod's uid. Without such a token nothing is posted.
It never delays anything: events wait in a queue of bounded length, and one is tried a few times and then dropped. An event's name
follows from what it tells, so one that was posted before the agent was killed is not there twice.

The API: kubernetes.io/docs/reference/kubernetes-api/cluster-resources/event-v1.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Protocol

SECRETS = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_CONTROLLER = "smr.agent/restore"
_REASONS = {
    "started_cold": ("SmrStartedCold", "Container {container} was not restored from {image} and starts cold: {why}"),
    "restore_failed": ("SmrRestoreFailed", "Container {container} cannot be restored from {image}: {why}"),
    "restore_killed": ("SmrRestoreFailed", "The restore of container {container} from {image} was taken back: {why}"),
    "runtime_bypassed": ("SmrBypassed", "Container {container} was not restored from {image}: {why}"),
    "checkpoint_failed": ("SmrCheckpointFailed", "Container {container} was not checkpointed as {image}: {why}"),
}
# What happened while no agent ran is told late, but not when it is history.
_LATE = timedelta(minutes=10)
_NOTE_BYTES = 1024
_WAITING_MOST = 100
_TRIES_S = (1.0, 5.0, 20.0)
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """The API server as a pod sees it. The token is read anew for each request: the kubelet renews it."""

    url: str
    secrets: Path = SECRETS

    def request(self, method: str, path: str, body: Mapping[str, object] | None = None) -> dict[str, object]:
        """One request. Raises OSError: urllib's HTTPError with the status, or that nobody could be reached."""
        token = (self.secrets / "token").read_text().strip()
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {token}", "Accept": "application/json", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", data, headers, method=method)  # noqa: S310  # https, see find
        context = ssl.create_default_context(cafile=str(self.secrets / "ca.crt"))
        # No proxy of the environment: the token is for this server alone.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context))
        with opener.open(request, timeout=_TIMEOUT_S) as answer:
            document = json.loads(answer.read())
        return document if isinstance(document, dict) else {}


def find(environ: Mapping[str, str] = os.environ, secrets: Path | None = None) -> Cluster | None:
    """The cluster that this process runs in; None where it runs in none.

    SMR_SERVICEACCOUNT names the folder of token and ca.crt for an agent that a pod runs in the node's mount namespace.
    """
    secrets = secrets or Path(environ.get("SMR_SERVICEACCOUNT") or SECRETS)
    host, port = environ.get("KUBERNETES_SERVICE_HOST", ""), environ.get("KUBERNETES_SERVICE_PORT", "443")
    if not host or not (secrets / "token").exists():
        return None
    return Cluster(url=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}", secrets=secrets)


class Counter(Protocol):
    """Where results are counted."""

    def __call__(self, result: str) -> object:
        """One more of posted, failed, dropped, denied."""


class Reporter:
    """Posts events in the background, one at a time. `tell` never waits; `close` drops what is left."""

    def __init__(self, cluster: Cluster, node: str, count: Counter, executor: Executor) -> None:
        self._cluster, self._node, self._count, self._executor = cluster, node, count, executor
        self._queue: asyncio.Queue[Mapping[str, object]] = asyncio.Queue(_WAITING_MOST)
        self._task = asyncio.get_running_loop().create_task(self._work())

    def tell(self, event: Mapping[str, object]) -> None:
        """Post what is for a pod's owner to know."""
        if document_of(event, self._node) is None:
            return
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            self._count("dropped")

    async def close(self) -> None:
        """End now."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def _work(self) -> None:
        while True:
            self._count(await self._post(await self._queue.get()))

    async def _post(self, event: Mapping[str, object]) -> str:
        loop = asyncio.get_running_loop()
        for pause_s in (*_TRIES_S, 0.0):
            result = await loop.run_in_executor(self._executor, post, self._cluster, event, self._node)
            if result:
                return result
            await asyncio.sleep(pause_s)
        return "failed"


def post(cluster: Cluster, event: Mapping[str, object], node: str) -> str:
    """Post one event: posted, denied, dropped (the pod has gone), failed; empty when it is worth another try."""
    document = document_of(event, node)
    if document is None:
        return "dropped"
    regarding, metadata = document["regarding"], document["metadata"]
    assert isinstance(regarding, dict)
    assert isinstance(metadata, dict)
    namespace = regarding["namespace"]
    try:
        if not regarding["uid"]:
            regarding["uid"] = _uid(cluster, namespace, regarding["name"])
        cluster.request("POST", f"/apis/events.k8s.io/v1/namespaces/{namespace}/events", document)
    except urllib.error.HTTPError as error:
        return _judged(error)
    except (OSError, ValueError):
        return ""
    return "posted"


def _judged(error: urllib.error.HTTPError) -> str:
    error.close()
    if error.code == 409:  # by the agent before us
        return "posted"
    if error.code in {401, 403}:
        return "denied"
    if error.code == 404:
        return "dropped"
    return "" if error.code == 429 or error.code >= 500 else "failed"


def _uid(cluster: Cluster, namespace: str, name: str) -> str:
    """Of a pod whose runtime does not tell: kubectl describe shows no event without. Empty where we may not get pods."""
    try:
        metadata = cluster.request("GET", f"/api/v1/namespaces/{namespace}/pods/{name}").get("metadata")
    except urllib.error.HTTPError as error:
        if error.code not in {401, 403}:
            raise
        error.close()
        return ""
    return str(metadata.get("uid", "")) if isinstance(metadata, dict) else ""


def document_of(
    event: Mapping[str, object], node: str, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> dict[str, object] | None:
    """The Event to post; None for what is no pod's, no failure, or too long ago."""
    pod, kind = event.get("pod"), str(event.get("event"))
    if kind not in _REASONS or not isinstance(pod, dict) or not (pod.get("namespace") and pod.get("name")):
        return None
    try:
        happened = datetime.fromisoformat(str(event.get("time")))
        if now() - happened > _LATE:
            return None
    except (ValueError, TypeError):
        return None
    reason, text = _REASONS[kind]
    why = f"{event.get('reason', '')} [{event.get('code', '')}]"
    container = pod.get("container") or event.get("container", "")
    note = text.format(container=container, image=event.get("image") or "an image", why=why)
    digest = hashlib.sha256(f"{kind} {event.get('time')} {event.get('container')}".encode()).hexdigest()[:16]
    # With offset UTC and microseconds, which is what the API calls a MicroTime.
    moment = happened.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    regarding = {"apiVersion": "v1", "kind": "Pod", "namespace": pod["namespace"], "name": pod["name"], "uid": pod.get("uid", "")}
    if pod.get("container"):
        regarding["fieldPath"] = f"spec.containers{{{pod['container']}}}"
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"namespace": pod["namespace"], "name": f"{str(pod['name'])[:220]}.{digest}"},
        "eventTime": moment,
        "reportingController": _CONTROLLER,
        "reportingInstance": node[:128],
        "action": "Restore" if kind != "checkpoint_failed" else "Checkpoint",
        "reason": reason,
        "regarding": regarding,
        "note": note.encode()[:_NOTE_BYTES].decode(errors="ignore"),
        "type": "Warning",
    }
