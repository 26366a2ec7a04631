"""The whole truth about an image: every blob read again and held against its size and digest."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

from smr.images.blobs import Progress, check_size, corrupt, digest_file, mark
from smr.images.image import Image
from smr.images.manifest import Descriptor
from smr.proto.errors import Code, SmrError

__all__ = ["Problem", "Progress", "Verification", "verify"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A blob that is not what the image says, and how."""

    what: str
    digest: str
    error: SmrError


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was read, and what was wrong with it."""

    reference: str
    blobs: int
    size_bytes: int
    problems: tuple[Problem, ...]

    @property
    def ok(self) -> bool:
        """Whether the image is whole."""
        return not self.problems

    def check(self) -> None:
        """Raise the one problem, or IMAGE_CORRUPT over all of them."""
        if len(self.problems) == 1:
            raise self.problems[0].error
        if self.problems:
            names = ", ".join(f"{problem.what} {problem.digest[:19]}" for problem in self.problems)
            raise SmrError(
                f"image {self.reference} is damaged in {len(self.problems)} of {self.blobs} blobs: {names}",
                hint=f"remove it with 'smr images rm {self.reference}' and make or import it again",
                code=Code.IMAGE_CORRUPT,
                image=self.reference,
            )


def verify(image: Image, progress: Progress | None = None) -> Verification:
    """Check every blob of `image`, several at a time."""
    contents = {descriptor.digest: (what, descriptor) for what, descriptor in image.contents()}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        checks = [pool.submit(_problem, image, what, descriptor, progress) for what, descriptor in contents.values()]
        try:
            problems = [problem for check in checks if (problem := check.result())]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    problems = problems or _config_problem(image)
    return Verification(reference=image.reference, blobs=len(contents), size_bytes=image.size_bytes, problems=tuple(problems))


def _problem(image: Image, what: str, descriptor: Descriptor, progress: Progress | None) -> Problem | None:
    path = image.blob(descriptor.digest)
    try:
        check_size(path, descriptor.size_bytes, what)
        if (found := digest_file(path, progress)) != descriptor.digest:
            raise corrupt(path, what, found, descriptor.digest)
        with suppress(OSError):  # a store that cannot be written
            mark(path, descriptor.digest)
    except SmrError as error:
        return Problem(what=what, digest=descriptor.digest, error=error)
    except OSError as error:
        failure = corrupt(path, what, error.strerror, "a readable file")
        return Problem(what=what, digest=descriptor.digest, error=failure)
    return None


def _config_problem(image: Image) -> list[Problem]:
    """All bytes are as they were committed; but are they a config that this SMR can read?"""
    try:
        _ = image.config
    except SmrError as error:
        return [Problem(what="config", digest=image.manifest.config.digest, error=error)]
    return []
