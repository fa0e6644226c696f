"""What an output path is, files and directories that are written whole or not at all, and a lock for a directory.

One process at a time may write a path. Scripts that share a directory lock it.
"""
import os
import re
import secrets
import shutil
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

from kronygpt.configurator import UserError

# the name of what is not yet complete (tmp), or of a directory that is being replaced (old), beside the one it belongs to
ASIDE = re.compile(r"\.(.+)\.[0-9a-f]{12}\.(tmp|old)")


def output_file(path):
    """The path of a file to write, checked before the work for it begins.

    Raises:
        UserError: it names a directory, a device or a pipe, or lies where nothing can be written.
    """
    if os.path.basename(path) in ("", ".", "..") or (os.path.exists(path) and not os.path.isfile(path)):
        raise UserError(f"{path or 'an empty path'} names a directory or a device: name a file to write")
    check_access(path, Path(path))
    check_access(path, target_of(path).parent)
    return Path(path)


def output_directory(path, is_replaced=False):
    """The path of a directory to write, or with is_replaced, to replace as a whole, checked before the work for it begins.

    Raises:
        UserError: it is no directory, or lies where nothing can be written, or cannot be replaced.
    """
    path = Path(path)
    check_access(path, path / "a file")
    if is_replaced:
        if path.resolve() in (Path.cwd(), *Path.cwd().parents):
            raise UserError(f"{path} holds the current directory and cannot be replaced: name another one")
        check_access(path, path.resolve().parent)
    return path


def check_access(path, place):
    """Raise UserError where a path cannot be written because of a place, or the nearest one above it that exists."""
    there = next(there for there in (place, *place.absolute().parents) if there.exists())
    if there != place and not there.is_dir():
        raise UserError(f"{path} cannot be written: {there} is a file")
    if not os.access(there, os.W_OK):
        raise UserError(f"{path} cannot be written: no permission to write {there}", status=1)


def target_of(path):
    """The path itself, or where it is a link, what it points to."""
    return Path(os.path.realpath(path) if os.path.islink(path) else path)


def remove_leftovers(folder, names):
    """Clear what writers of names, a regular expression, have left in a folder, in which nobody else writes now: what is
    half-written is removed, and a directory that was renamed away for a new one that is not there gets its name back."""
    for aside in list(folder.iterdir()):
        match = ASIDE.fullmatch(aside.name)
        if match and re.fullmatch(names, match[1]):
            target = aside.with_name(match[1])
            if match[2] == "old" and not target.exists():
                os.replace(aside, target)
            elif aside.is_dir() and not aside.is_symlink():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.unlink(missing_ok=True)


@contextmanager
def made_aside(path):
    """A name beside a path, for what is going to replace it. The folder is made, and cleared before and after."""
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, re.escape(path.name))
    try:
        yield path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    except OSError as error:  # a write that fails does not say to which file
        error.filename = error.filename or str(path)
        raise
    finally:
        remove_leftovers(path.parent, re.escape(path.name))
    with suppress(OSError):  # of systems that cannot flush the names in a folder
        sync(path.parent)


def sync(path):
    """Flush a file, or the names in a folder, to disk."""
    if os.name == "nt":  # Windows opens no folder, and flushes no file that is open for reading
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path, mode="wb"):
    """Open a file, as "wb" or as "w" for UTF-8 text, that replaces the old one, as a whole, when the block ends.

    It is written beside it, flushed to disk and renamed; the folder is made. A block that fails leaves the old file as it
    was. The new file has the old one's mode. A link stays, and its target is replaced.

    Raises:
        UserError: see output_file.
    """
    path = target_of(output_file(path))
    with made_aside(path) as aside:
        with open(aside, mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8") as file:
            if path.exists():
                shutil.copymode(path, aside)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)


@contextmanager
def atomic_directory(path, is_ours):
    """Make a directory that replaces the old one, as a whole, when the block ends.

    It is written beside it. Then the old one is renamed, the new one gets its name, and the old one is removed. A kill
    between the two renames leaves both, complete, beside the name (.old and .tmp); the next write of this path begins by
    giving the old one its name back. Files for whose names is_ours(name) is false are copied from the old directory.

    Raises:
        UserError: see output_directory.
    """
    path = target_of(output_directory(path, is_replaced=True))

    def is_left_out(folder, names):
        return [name for name in names if os.fspath(folder) == os.fspath(path) and is_ours(name)]

    with made_aside(path) as aside:
        if path.exists():
            shutil.copytree(path, aside, symlinks=True, ignore=is_left_out)
        else:
            aside.mkdir()
        yield aside
        for file in aside.rglob("*"):
            if file.is_file() and not file.is_symlink():
                if (old := path / file.relative_to(aside)).exists():
                    shutil.copymode(old, file)
                sync(file)
        if path.exists():
            os.replace(path, aside.with_suffix(".old"))
        os.replace(aside, path)


def lock(directory):
    """Claim a directory, which is made, for this process: the result's release(), or the end of the process, frees it.
    Where the file system has no locks (Lustre, some NFS, FUSE), it warns and claims nothing.

    Raises:
        UserError: another process has it.
    """
    from filelock import FileLock, Timeout  # takes a tenth of a second, and most commands lock nothing

    directory = output_directory(directory)
    directory.mkdir(parents=True, exist_ok=True)
    held = FileLock(directory / ".lock", timeout=0, fallback_to_soft=False)
    try:
        held.acquire()
    except Timeout:
        raise UserError(f"{directory} is in use by another process: wait for its end, or name another directory",
                        status=1) from None
    except PermissionError:
        raise
    except (OSError, NotImplementedError) as error:
        warnings.warn(f"no locks in {directory} ({error}): make sure that no other process writes there", stacklevel=2)
    return held
