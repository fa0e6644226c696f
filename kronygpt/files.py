"""Output paths, files and directories that are written whole or not at all, and a lock for a directory.

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
        UserError: it is no file that can be replaced, or lies where nothing can be written.
    """
    is_replaceable = not os.path.exists(path) or (os.path.isfile(path) and os.access(path, os.W_OK))
    if os.path.basename(path) in ("", ".", "..") or not is_replaceable:
        raise UserError(f"{path or 'an empty path'} names a directory, a device or a read-only file: name a file to write")
    output_directory(os.path.dirname(os.path.realpath(path)))
    return Path(path)


def output_directory(path):
    """The path of a directory to write in, checked before the work for it begins.

    Raises:
        UserError: it is no directory, or nothing can be written there.
    """
    there = next(there for there in (Path(path), *Path(path).absolute().parents) if there.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{path} cannot be written: {there} is " + ("read-only" if there.is_dir() else "a file"))
    return Path(path)


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
    """(aside, target): a name beside a path, for what replaces the path as a whole when the block ends, and the path itself,
    or where it is a link, what it points to. The folder is made, and cleared before and after."""
    target = Path(os.path.realpath(path))
    aside = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, re.escape(target.name))
    try:
        yield aside, target
        if target.is_dir():
            os.replace(target, aside.with_suffix(".old"))
        os.replace(aside, target)
    except OSError as error:  # a write that fails does not say to which file
        if error.errno:  # else it is no error of the system, but of a network
            error.filename = error.filename or str(path)
        raise
    finally:
        remove_leftovers(target.parent, re.escape(target.name))
    with suppress(OSError):  # of systems that cannot flush the names in a folder
        sync(target.parent)


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
    mode, encoding = mode.replace("w", "x"), None if "b" in mode else "utf-8"
    with made_aside(output_file(path)) as (aside, target), open(aside, mode, encoding=encoding) as file:
        if target.exists():
            shutil.copymode(target, aside)
        yield file
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def atomic_directory(path, is_ours):
    """Make a directory that replaces the old one, as a whole, when the block ends.

    It is written beside it. Then the old one is renamed, the new one gets its name, and the old one is removed. A kill
    between the two renames leaves both, complete, beside the name (.old and .tmp); the next write of this path begins by
    giving the old one its name back. Files for whose names is_ours(name) is false are copied from the old directory.

    Raises:
        UserError: it holds the current directory.
    """
    with made_aside(path) as (aside, target):
        if target in (Path.cwd(), *Path.cwd().parents):
            raise UserError(f"{path} holds the current directory and cannot be replaced: name another one")
        if target.exists():
            shutil.copytree(target, aside, symlinks=True, ignore=lambda folder, names: [
                name for name in names if Path(folder) == target and is_ours(name)])
        else:
            aside.mkdir()
        yield aside
        for file in aside.rglob("*"):
            if file.is_file() and not file.is_symlink():
                if (old := target / file.relative_to(aside)).exists():
                    shutil.copymode(old, file)
                sync(file)


def lock(directory):
    """Claim a directory, which is made, for this process: the result's release(), or the end of the process, frees it.
    Where the file system has no locks (Lustre, some NFS, FUSE), it warns and claims nothing.

    Raises:
        UserError: another process has it.
    """
    from filelock import FileLock, Timeout  # takes a tenth of a second, and most commands lock nothing

    Path(directory).mkdir(parents=True, exist_ok=True)
    held = FileLock(Path(directory, ".lock"), timeout=0, fallback_to_soft=False)
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
