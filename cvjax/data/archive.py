"""Unpacking an archive once, whatever happens while it is done."""

import contextlib
import fcntl
import json
import lzma
import os
import pathlib
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator

from cvjax.errors import InputError

MARKER = ".unpacked"  # in the folder of an archive that was unpacked to its end


def unpack_once(
    archive: str | os.PathLike, folder: str | os.PathLike | None = None
) -> pathlib.Path:
    """Returns the folder with the contents of a tar archive, unpacked if that was not done yet.

    The archive is unpacked into a new sibling of the folder, which gets a marker and only then its
    name: a folder that is there is whole, also after a kill. Processes that come at the same time
    wait for the one that unpacks. Once the folder is there the archive may be deleted.

    Args:
        archive: a tar file, also compressed (gz, bz2, xz).
        folder: where its contents shall be; None is beside the archive, by its name without .tar.

    Raises:
        InputError: no such archive, or one that is damaged or cut off, or has members that would
            be written outside of the folder or are neither files, folders nor links inside it; the
            folder cannot be written, is there but was not unpacked here, or from another archive.
    """
    archive = pathlib.Path(archive).expanduser()
    folder = pathlib.Path(folder).expanduser() if folder else _beside(archive)
    if _is_done(archive, folder):
        return folder
    if not archive.is_file():
        raise InputError(f"the archive {archive} does not exist")
    with _lock(folder):
        if not _is_done(archive, folder):  # Another process may have done it meanwhile.
            _unpack(archive, folder)
    return folder


def _beside(archive: pathlib.Path) -> pathlib.Path:
    stem = re.sub(r"(?<=.)\.(tar(\.\w+)?|tgz|tbz2|txz)$", "", archive.name)
    return archive.with_name(stem if stem != archive.name else f"{stem}-unpacked")


def _is_done(archive: pathlib.Path, folder: pathlib.Path) -> bool:
    if not folder.exists():
        return False
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        raise InputError(
            f"{folder} is there but was not unpacked from {archive.name}: give it as the path, or "
            "move it away"
        ) from None
    if archive.is_file() and marker.get("bytes") != archive.stat().st_size:
        raise InputError(
            f"{folder} was unpacked from another archive ({marker.get('archive')}, "
            f"{marker.get('bytes')} bytes) than {archive}: move it away"
        )
    return True


@contextlib.contextmanager
def _lock(folder: pathlib.Path) -> Iterator[None]:
    """Held by one process at a time; given back when that process ends, however it does."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.with_name(f".{folder.name}.lock"), "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise InputError(f"cannot unpack into {folder}: {error.strerror or error}") from error


def _unpack(archive: pathlib.Path, folder: pathlib.Path) -> None:
    new = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(new, ignore_errors=True)  # What a process left that was killed.
    try:
        new.mkdir()
        with tarfile.open(archive) as file:
            # "data" refuses what would lie outside of the folder, devices, and links out of it.
            file.extractall(new, filter="data")
            # tarfile takes a file that is cut off between two members for a whole one.
            file.fileobj.seek(file.offset)
            if file.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise EOFError("it is cut off")
            while file.fileobj.read(2**20):  # to the end, where a compressed file has its checksum
                pass
        marker = {"archive": archive.name, "bytes": archive.stat().st_size}
        (new / MARKER).write_text(json.dumps(marker) + "\n")
        os.rename(new, folder)
    except tarfile.FilterError as error:
        raise InputError(f"{archive} is refused: {error}") from error
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's; without a number it is of gzip or bzip2, about their data
        said = str(error).splitlines() or ["it is damaged"]
        raise InputError(f"{archive} cannot be unpacked: {said[0].rstrip(':')}") from error
    finally:
        shutil.rmtree(new, ignore_errors=True)
