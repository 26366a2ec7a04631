"""Metrics for Prometheus: what was counted (smr.shim.agent.totals), and what is looked up when somebody scrapes.

docs/agent.md has the table, which a test holds against `METRICS`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from smr.images.image import Image
from smr.images.pin import pins
from smr.images.prefetch import cached_share
from smr.images.store import Store
from smr.shim.agent.totals import BUCKETS, Histogram, Totals
from smr.shim.config import Config
from smr.shim.inspect import summaries
from smr.shim.state import Status


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """One metric: its kind (counter, histogram, gauge), labels and what it says. Counters get the suffix _total."""

    kind: str
    labels: tuple[str, ...]
    help: str


METRICS: Mapping[str, Description] = {
    "smr_restores": Description(
        kind="counter",
        labels=("result", "code"),
        help="Containers that asked for a restore: restored, cold, failed, killed, bypassed; code: the error code of the reason.",
    ),
    "smr_restore_seconds": Description(kind="histogram", labels=(), help="SMR's own time of a restore."),
    "smr_restore_stage_seconds": Description(kind="histogram", labels=("stage",), help="Time of a stage of a restore."),
    "smr_restore_bytes": Description(
        kind="counter",
        labels=("source",),
        help="Memory that restores were given, by where it came from: cache, disk, lazy (brought while the container runs).",
    ),
    "smr_checkpoints": Description(kind="counter", labels=("result", "code"), help="Checkpoints: ok, failed."),
    "smr_checkpoint_pause_seconds": Description(kind="histogram", labels=(), help="How long a checkpoint paused its container."),
    "smr_checkpoint_stage_seconds": Description(kind="histogram", labels=("stage",), help="Time of a stage of a checkpoint."),
    "smr_kubernetes_events": Description(
        kind="counter", labels=("result",), help="Events of pods: posted, failed, dropped, denied."
    ),
    "smr_events_lost": Description(kind="counter", labels=(), help="Times that the journal turned before the agent had read it."),
    "smr_containers": Description(
        kind="gauge", labels=("status",), help="Containers that asked for a restore and are not deleted."
    ),
    "smr_images": Description(kind="gauge", labels=(), help="Images in the store."),
    "smr_images_broken": Description(kind="gauge", labels=(), help="Images of the store that cannot be read."),
    "smr_image_bytes": Description(kind="gauge", labels=("image",), help="Size of an image in the store."),
    "smr_image_cached_ratio": Description(kind="gauge", labels=("image",), help="Share of an image that is in memory."),
    "smr_image_pinned": Description(kind="gauge", labels=("image",), help="1 for an image that is pinned."),
    "smr_store_free_bytes": Description(kind="gauge", labels=(), help="Free space where the store is."),
    "smr_agent_info": Description(kind="gauge", labels=("version",), help="The agent's version."),
}
# Names in the totals -> names here.
_COUNTERS = {
    "restores": "smr_restores",
    "restore_bytes": "smr_restore_bytes",
    "checkpoints": "smr_checkpoints",
    "kubernetes_events": "smr_kubernetes_events",
    "events_lost": "smr_events_lost",
}
_HISTOGRAMS = {
    "restore": "smr_restore_seconds",
    "restore_stage": "smr_restore_stage_seconds",
    "checkpoint_pause": "smr_checkpoint_pause_seconds",
    "checkpoint_stage": "smr_checkpoint_stage_seconds",
}


def version() -> str:
    """The version of this package."""
    try:
        return installed_version("smr-restore")
    except PackageNotFoundError:
        return "unknown"


class Metrics(Collector):
    """The metrics of one agent. `render` may take a moment: it looks at every image."""

    def __init__(self, config: Config, totals: Totals) -> None:
        self._config, self._totals = config, totals
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(self, accept: str) -> tuple[bytes, str]:
        """The text in the form that a client accepts, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def describe(self) -> Iterable[Metric]:
        """None, so that the registry does not collect to find out."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Everything, as it is now."""
        yield from self._counters()
        yield from self._histograms()
        for look in (self._containers, self._images, self._store, self._agent):
            yield from _unless_broken(look)

    def _counters(self) -> Iterator[Metric]:
        counters = dict(self._totals.counters)  # another thread counts
        for ours, name in _COUNTERS.items():
            metric = CounterMetricFamily(name, METRICS[name].help, labels=METRICS[name].labels)
            for (counter, labels), value in counters.items():
                if counter == ours:
                    metric.add_metric(labels, value)
            yield metric

    def _histograms(self) -> Iterator[Metric]:
        histograms = dict(self._totals.histograms)
        for ours, name in _HISTOGRAMS.items():
            metric = HistogramMetricFamily(name, METRICS[name].help, labels=METRICS[name].labels)
            for (histogram, labels), found in histograms.items():
                if histogram == ours:
                    metric.add_metric(labels, list(_cumulative(found)), sum_value=found.sum)
            yield metric

    def _containers(self) -> Iterator[Metric]:
        counts = Counter({status.value: 0 for status in Status} | {"exited": 0, "broken": 0})
        counts.update(summary.status for summary in summaries(self._config))
        yield _gauge("smr_containers", {(status,): count for status, count in counts.items()})

    def _images(self) -> Iterator[Metric]:
        store = Store(self._config.store)
        images: dict[str, Image] = {image.reference: image for image in store.images()}
        pinned = {pin.digest for pin in pins(self._config.run)}
        yield _gauge("smr_images", {(): len(images)})
        yield _gauge("smr_images_broken", {(): len(store.broken())})
        yield _gauge("smr_image_bytes", {(name,): image.size_bytes for name, image in images.items()})
        yield _gauge("smr_image_cached_ratio", {(name,): cached_share(image) for name, image in images.items()})
        yield _gauge("smr_image_pinned", {(name,): image.digest in pinned for name, image in images.items()})

    def _store(self) -> Iterator[Metric]:
        import shutil

        folder = next(parent for parent in (self._config.store, *self._config.store.parents) if parent.exists())
        yield _gauge("smr_store_free_bytes", {(): shutil.disk_usage(folder).free})

    def _agent(self) -> Iterator[Metric]:
        yield _gauge("smr_agent_info", {(version(),): 1})


def _unless_broken(look: Callable[[], Iterator[Metric]]) -> list[Metric]:
    """What cannot be looked up (a store that cannot be read) leaves the rest of the metrics."""
    from smr.proto.errors import SmrError

    try:
        return list(look())
    except (SmrError, OSError):
        return []


def _gauge(name: str, values: Mapping[tuple[str, ...], float]) -> Metric:
    metric = GaugeMetricFamily(name, METRICS[name].help, labels=METRICS[name].labels)
    for labels, value in values.items():
        metric.add_metric(labels, value)
    return metric


def _cumulative(histogram: Histogram) -> Iterator[tuple[str, float]]:
    seen = 0
    for bound, count in zip((*map(str, BUCKETS), "+Inf"), histogram.counts, strict=True):
        seen += count
        yield bound, seen
