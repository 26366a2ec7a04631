"""Reading what others compressed: gzip, zstd, xz and bzip2 by their first bytes, anything else as it stands.

zstd comes from the standard library (3.14), else the `zstandard` package, else the `zstd` program. A stream that ends too early
or is garbled raises ARCHIVE_INVALID, like every other malformed archive. Imports are late: most archives need none of this.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from smr.images.tar_reader import FileStream, Stream
from smr.proto.errors import Code, SmrError

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2"}


def compression_of(path: Path) -> str:
    """gzip, zstd, xz, bzip2 or "" for a file that is none of them."""
    with path.open("rb") as file:
        head = file.read(6)
    return next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "")


@contextmanager
def decompressed(path: Path) -> Iterator[Stream]:
    """The content of `path`, decompressed. UNSUPPORTED when nothing here can read zstd."""
    kind = compression_of(path)
    with ExitStack() as held:
        file = held.enter_context(path.open("rb"))
        if not kind:
            yield FileStream(file.fileno())
        elif kind == "zstd":
            yield _Checked(_zstd(held, file), path.name)
        else:
            yield _Checked(held.enter_context(_standard(kind, file)), path.name)


class _Checked:
    """Says in our terms that a compressed stream is broken."""

    def __init__(self, stream: Stream, what: str) -> None:
        self._stream = stream
        self._what = what

    def read(self, size: int, /) -> bytes:
        try:
            return self._stream.read(size)
        except (MemoryError, SmrError):
            raise
        except Exception as error:  # each decompressor has its own type for garbled input
            raise _broken(self._what, str(error)) from error


class _Program:
    """The output of a decompressor that runs as a program; its exit status is asked at the end of the output."""

    def __init__(self, command: list[str], file: BinaryIO) -> None:
        self._process = subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def read(self, size: int, /) -> bytes:
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        data = self._process.stdout.read(size)
        if not data and self._process.wait() != 0:
            raise EOFError(self._process.stderr.read(200).decode(errors="replace").strip())
        return data

    def close(self) -> None:
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()
        self._process.kill()
        self._process.wait()


def _standard(kind: str, file: BinaryIO) -> BinaryIO:
    if kind == "gzip":
        import gzip

        return gzip.GzipFile(fileobj=file)  # type: ignore[return-value]  # a BufferedIOBase
    if kind == "xz":
        import lzma

        return lzma.LZMAFile(file)  # type: ignore[return-value]
    import bz2

    return bz2.BZ2File(file)  # type: ignore[return-value]


def _zstd(held: ExitStack, file: BinaryIO) -> Stream:
    try:
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]  # Python 3.14

        return held.enter_context(zstd.ZstdFile(file))  # type: ignore[no-any-return,unused-ignore]
    except ImportError:
        pass
    try:
        import zstandard  # type: ignore[import-not-found,unused-ignore]

        return held.enter_context(zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))  # type: ignore[no-any-return,unused-ignore]
    except ImportError:
        pass
    program = shutil.which("zstd")
    if program is None:
        raise SmrError(
            f"{os.fspath(file.name)} is compressed with zstd, and nothing here reads it",
            hint="install the program 'zstd' (apt install zstd) or the Python package 'zstandard'",
            code=Code.UNSUPPORTED,
        )
    running = _Program([program, "-dc", "--long=31"], file)
    held.callback(running.close)
    return running


def _broken(what: str, why: str) -> SmrError:
    return SmrError(
        f"{what} is truncated or garbled: {why}", hint="fetch or make the archive again", code=Code.ARCHIVE_INVALID, path=what
    )
