"""An archive being written: compressed on its way, and at its place only when whole.

A writer of tar wants a descriptor that it can send files to; a compressor sits behind a pipe, as a program or a thread.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkstemp

from smr.images.files import fsync_directory, writing
from smr.images.tar import TarWriter
from smr.proto.errors import Code, SmrError

_CHUNK_BYTES = 1 << 20
_GZIP_LEVEL = 1


@contextmanager
def output_tar(out: Path, compression: str) -> Iterator[TarWriter]:
    """A tar that appears at `out`, mode 0600, when the block ends well; `compression` is "", gzip or zstd.

    DISK_FULL, UNSUPPORTED.
    """
    with writing(out):
        fd, name = mkstemp(dir=out.parent, prefix=f".{out.name}.")
        try:
            with _compressor(fd, compression) as inner, TarWriter(inner) as writer:
                yield writer
            os.fsync(fd)
            Path(name).replace(out)
            fsync_directory(out.parent)
        except BaseException:
            with suppress(FileNotFoundError):
                Path(name).unlink()
            raise
        finally:
            os.close(fd)


def compression_for(out: Path) -> str:
    """What the name of an archive asks for: .tar plain, .zst zstd, all else gzip."""
    return {".tar": "", ".zst": "zstd", ".zstd": "zstd"}.get(out.suffix, "gzip")


@contextmanager
def _compressor(fd: int, compression: str) -> Iterator[int]:
    if not compression:
        yield fd
    elif compression == "zstd" or shutil.which("pigz"):
        with _program(fd, _zstd() if compression == "zstd" else ["pigz", "-c", f"-{_GZIP_LEVEL}"]) as inner:
            yield inner
    else:
        with _gzip_thread(fd) as inner:
            yield inner


def _zstd() -> list[str]:
    program = shutil.which("zstd")
    if program is None:
        raise SmrError(
            "writing zstd needs the program 'zstd'",
            hint="apt install zstd, or name the file .tar or .tar.gz",
            code=Code.UNSUPPORTED,
        )
    return [program, "-c", "-T0", "-3"]


@contextmanager
def _program(fd: int, command: list[str]) -> Iterator[int]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=fd, stderr=subprocess.PIPE)
    assert process.stdin is not None
    assert process.stderr is not None
    try:
        yield process.stdin.fileno()
        process.stdin.close()
        why = process.stderr.read(500).decode(errors="replace").strip()
        if process.wait() != 0:
            raise SmrError(f"{command[0]} failed: {why}", code=Code.DISK_FULL if "space" in why else Code.INTERNAL)
    except BaseException:
        process.kill()
        raise
    finally:
        process.stdin.close()
        process.stderr.close()
        process.wait()


@contextmanager
def _gzip_thread(fd: int) -> Iterator[int]:
    """zlib works without the GIL, so a thread does what a program would."""
    read_end, write_end = os.pipe()
    failed: list[OSError] = []
    thread = threading.Thread(target=_gzip, args=(read_end, fd, failed))
    thread.start()
    try:
        yield write_end
    except BrokenPipeError:
        pass  # the thread says why
    finally:
        os.close(write_end)
        thread.join()
        os.close(read_end)
    if failed:
        raise failed[0]


def _gzip(read_end: int, fd: int, failed: list[OSError]) -> None:
    import gzip

    try:
        with os.fdopen(fd, "wb", closefd=False) as raw, gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=_GZIP_LEVEL) as file:
            while data := os.read(read_end, _CHUNK_BYTES):
                file.write(data)
    except OSError as error:
        failed.append(error)
        while os.read(read_end, _CHUNK_BYTES):  # let the writer come to its end
            pass
