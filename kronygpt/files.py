"""Durable files: atomic writes of files and directories, and directories that belong to one process."""
import ctypes
import errno
import os
import re
import secrets
import shutil
import time
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

from kronygpt.configurator import UserError

try:
    import fcntl
except ImportError:  # Windows, which lets nobody remove a file that is open
    fcntl = None

ASIDE = "tmp"  # the end of a name that a file or directory has until it is complete: .<name>.<random>.tmp
RANDOM_BYTES = 6  # in that name

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # what a file system without locks answers
# what one answers that cannot flush a folder (SMB, FUSE)
NO_FOLDER_SYNC = (errno.EINVAL, errno.EACCES, errno.EPERM, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
REPLACE_TRIES, REPLACE_PAUSE = 50, 0.1  # on Windows, where a file cannot be replaced while another process reads it
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux' renameat2


def check_is_file(path):
    """Raise UserError where a file cannot be written, before work is done for it: a directory, device, pipe or socket."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path} is a directory: name a file to write")
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is no regular file: name another file to write")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise UserError(f"{path} cannot be written: {folder} is a file")


def output_file(path):
    check_is_file(path)
    return Path(path)


def claim(aside):
    """Lock a file or directory that was just made, which tells others that its writer lives.

    Returns:
        A descriptor that holds the lock, or None where there are no locks.

    Raises:
        FileNotFoundError: another process took it for a leftover.
    """
    if fcntl is None:
        return None
    descriptor = os.open(aside, os.O_RDONLY | os.O_NONBLOCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.stat(aside)  # it may have been removed before it was locked
        return descriptor
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, (BlockingIOError, FileNotFoundError)):
            raise FileNotFoundError from None
    return None  # a file system without locks


def target_of(path):
    """The path itself, or where it is a link, what it points to."""
    return Path(os.path.realpath(path) if os.path.islink(path) else path)


def aside_name(path):
    """A new name beside a path."""
    return path.with_name(f".{path.name}.{secrets.token_hex(RANDOM_BYTES)}.{ASIDE}")


@contextmanager
def made_aside(path, make):
    """Make a file or directory beside a path that it is going to replace, and remove it in the end.

    Args:
        path: to be replaced; its folder is made.
        make: function of a new path; it raises FileExistsError where there is something, a link included.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, re.escape(path.name))
    while True:
        aside = aside_name(path)
        try:
            make(aside)
            descriptor = claim(aside)
            break
        except FileExistsError:
            continue
        except FileNotFoundError:  # taken for a leftover, or its folder is gone
            if not path.parent.is_dir():
                raise
    try:
        yield aside
    except OSError as error:  # a write that fails does not say to which file
        error.filename = path if error.filename is None else str(error.filename).replace(aside.name, path.name)
        raise
    finally:
        remove(aside)
        if descriptor is not None:
            os.close(descriptor)
    sync(path.parent)  # the new name is on disk, too


def remove(path):
    """Remove a file, or a directory and all that is in it, where there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            path.unlink()


def remove_leftovers(folder, names, is_locked=False):
    """Remove what processes that were killed have left half-written in a folder.

    Args:
        folder: it exists.
        names: pattern of the names of the files and directories that they were to replace.
        is_locked: the caller holds the lock of the folder, so that nobody else writes there. Otherwise, what is locked by
            its writer stays, and so does all where there are no locks.
    """
    aside_names = re.compile(rf"\.(?:{names})\.[0-9a-f]{{{2 * RANDOM_BYTES}}}\.{ASIDE}")
    for aside in folder.iterdir():
        if not aside_names.fullmatch(aside.name):
            continue
        try:
            descriptor = claim(aside)
        except FileNotFoundError:  # its writer lives, or has just removed it
            descriptor = None
        if is_locked or descriptor is not None:
            remove(aside)
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def atomic_write(path, mode="wb", keep_as=None):
    """Open a file for writing that replaces the old one, as a whole, when the block ends.

    It is written beside it, flushed to disk and renamed; a block that fails leaves the old file as it was. The target of
    a link is replaced, not the link.

    with atomic_write("table.md", "w") as file:
        file.write(table)

    Args:
        path: of the file; its folder is made.
        mode: "wb", or "w" for UTF-8 text.
        keep_as: path of a second name for the old file. Where it cannot be had, a warning says so.

    Raises:
        UserError: there is a directory, a device or a pipe.
    """
    check_is_file(path)
    path = target_of(path)
    with made_aside(path, lambda aside: open(aside, "xb").close()) as aside:
        with open(aside, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep_as and path.exists() and not keep_as.exists():
            try:
                link_or_copy(path, keep_as)
            except OSError as error:  # the new file is worth more than the old one
                warnings.warn(f"{path} is not kept as {keep_as}: {error.strerror}", stacklevel=3)
        replace(aside, path)


@contextmanager
def atomic_directory(path, is_ours):
    """Make a directory that replaces the old one, as a whole, when the block ends.

    with atomic_directory("models/mine", lambda name: name.endswith(".json")) as aside:
        model.save_pretrained(aside)

    Args:
        path: of the directory; its folder is made.
        is_ours: function of a name in it, whether we write such files. The others are copied from the old directory.
    """
    path = target_of(path)
    with made_aside(path, os.mkdir) as aside:
        yield aside
        for old in path.iterdir() if path.exists() else ():
            if not is_ours(old.name):
                if old.is_dir() and not old.is_symlink():
                    shutil.copytree(old, aside / old.name, symlinks=True)
                else:
                    shutil.copy2(old, aside / old.name, follow_symlinks=False)
        for file in aside.rglob("*"):
            if file.is_file() and not file.is_symlink():
                sync(file)
        exchange(aside, path)  # aside is now the old one, or gone


def exchange(aside, path):
    """Give a directory the name of another, or of none: in one step where the system can (Linux), otherwise in two."""
    if not path.exists():
        return os.replace(aside, path)
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    if renameat2 and not renameat2(AT_FDCWD, os.fsencode(aside), AT_FDCWD, os.fsencode(path), RENAME_EXCHANGE):
        return
    old = aside_name(path)
    os.replace(path, old)
    os.replace(aside, path)
    remove(old)


def replace(source, target):
    """Rename a file over another one; on Windows wait, for some seconds, for its readers."""
    for attempt in range(REPLACE_TRIES if os.name == "nt" else 1):
        if attempt:
            time.sleep(REPLACE_PAUSE)
        try:
            return os.replace(source, target)
        except PermissionError as error:
            denied = error
    raise denied


def sync(path):
    """Flush a file, or a folder's names, to disk, on systems that can."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise


def link_or_copy(source, target):
    """Give a file a second name, or where the file system has no hard links, a complete copy on disk."""
    try:
        os.link(source, target)
    except (OSError, AttributeError):  # whatever the reason, a copy serves: if it fails, it says why
        with open(source, "rb") as original, atomic_write(target) as file:
            shutil.copyfileobj(original, file)


def lock(directory):
    """Claim a directory, which is made, for this process.

    Where the file system has no locks (Lustre, some NFS, FUSE), it warns and claims nothing.

    Returns:
        A lock: its release(), or the end of the process, frees the directory.

    Raises:
        UserError: another process has it.
    """
    from filelock import FileLock, Timeout

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ".lock"

    def write_holder(descriptor):
        os.ftruncate(descriptor, 0)
        os.write(descriptor, str(os.getpid()).encode())

    held = FileLock(path, timeout=0, fallback_to_soft=False, on_acquired=write_holder)
    try:
        held.acquire()
    except Timeout:
        try:
            holder = path.read_text().strip() or "another one"
        except OSError:  # Windows locks the text as well
            holder = "another one"
        raise UserError(f"{directory} is in use by process {holder}: wait for its end, or name another directory",
                        status=1) from None
    except (OSError, NotImplementedError) as error:
        if not isinstance(error, NotImplementedError) and error.errno not in NO_LOCKS:
            raise
        warnings.warn(f"no locks in {directory} ({error}): make sure that no other process writes there", stacklevel=2)
    return held
