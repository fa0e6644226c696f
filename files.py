"""Files that are whole or not there, and directories that belong to one process at a time."""
import os
from contextlib import contextmanager
from pathlib import Path

ASIDE = ".tmp"  # the end of a name that a file has until it is complete


class InUseError(Exception):
    """A directory that another process is writing to; the message is one line for the user."""

    exit_status = 1


@contextmanager
def replacing(path, mode="wb"):
    """Open a file for writing that gets its name when the block is done: a reader finds the old file or the new one,
    whole. It is written aside, flushed to disk and renamed; a block that fails leaves the old file as it was.

    with replacing("table.md", "w") as file:
        file.write(table)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ASIDE)
    try:
        with open(aside, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a write that fails does not say to which file
            error.filename = error.filename or str(path)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    os.fsync(folder)  # the new name is on disk, too
    os.close(folder)


def lock(directory):
    """Take a directory, which is made, for this process.

    Returns:
        A file: closing it, or the end of the process in whatever way, releases the directory.

    Raises:
        InUseError: another process has it.
    """
    import fcntl

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ".lock"
    while True:
        file = open(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another one"
            file.close()
            raise InUseError(f"{directory} is in use by process {holder}: wait for its end, or name another") from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # its last holder has removed it in between
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def remove_leftovers(directory):
    """Remove what a process that was killed has left half-written. The caller holds the lock."""
    for path in Path(directory).glob(f"*{ASIDE}"):
        path.unlink()
