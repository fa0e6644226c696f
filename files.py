"""Durable files: atomic writes, directories that belong to one process, and the directory of a training run."""
import errno
import json
import os
import warnings
from contextlib import contextmanager
from pathlib import Path

from configurator import UserError

ASIDE = ".tmp"  # the end of a name that a file has until it is complete

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP)  # what a file system without locks answers


@contextmanager
def atomic_write(path, mode="wb"):
    """Open a file for writing that replaces the old one, as a whole, when the block ends.

    It is written beside it, flushed to disk and renamed; a block that fails leaves the old file as it was.

    with atomic_write("table.md", "w") as file:
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
    if os.name != "nt":  # Windows cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)  # the new name is on disk, too
        os.close(folder)


def lock(directory):
    """Claim a directory, which is made, for this process.

    Where the file system has no locks (Lustre, some NFS), it warns and claims nothing.

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


def remove_leftovers(directory):
    """Remove what a process that was killed has left half-written. The caller holds the lock."""
    for path in Path(directory).glob(f"*{ASIDE}"):
        path.unlink()


class RunDir:
    """The directory of a training run: ckpt.pt (the latest), best.pt, older checkpoints and log.jsonl."""

    def __init__(self, path):
        self.path = Path(path)
        self.last, self.best = self.path / "ckpt.pt", self.path / "best.pt"

    def check(self, is_resume, overwrite):
        """Raise UserError unless it holds what a resume needs, or nothing that a new run would destroy."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out_dir={self.path} is a file")
        if is_resume and not self.last.exists():
            raise UserError(f"nothing to resume: no {self.last}")
        if not is_resume and self.last.exists() and not overwrite:
            raise UserError(f"{self.path} holds a run already: --init_from=resume continues it, --overwrite=True starts "
                            "over, another --out_dir keeps it")

    def claim(self, is_resume, overwrite):
        """Lock it for this process and clear it of half-written files, and for a new run, of the old one."""
        self.lock = lock(self.path)
        self.check(is_resume, overwrite)  # again: another run may have ended here since the first time
        remove_leftovers(self.path)
        if not is_resume:
            for path in (*self.path.glob("ckpt*.pt"), *self.path.glob("best.pt")):
                path.unlink()

    def open_log(self, first_step):
        """Open log.jsonl for appending, without the lines of steps after first_step, which will be done again."""
        path = self.path / "log.jsonl"
        lines = path.read_text(errors="replace").splitlines(keepends=True) if first_step and path.exists() else []
        with atomic_write(path, "w") as file:
            file.writelines(line for line in lines if (step := step_of(line)) is not None and step <= first_step)
        self.log_file = path.open("a", buffering=1)

    def log(self, **entry):
        """Append a line to log.jsonl."""
        self.log_file.write(json.dumps(entry) + "\n")

    def before_save(self, last_step, keep):
        """Flush the log, whose lines a resume does not write again, and keep the checkpoint that is about to be replaced.

        Args:
            last_step: of ckpt.pt, which stays as ckpt_{last_step}.pt.
            keep: number of older checkpoints that stay.
        """
        os.fsync(self.log_file.fileno())
        older = self.path / f"ckpt_{last_step:07d}.pt"
        if keep and self.last.exists() and not older.exists():
            os.link(self.last, older)
        for path in sorted(self.path.glob("ckpt_*.pt"))[:-keep or None] if keep else ():
            path.unlink()

    def close(self):
        self.log_file.close()
        self.lock.release()


def step_of(line):
    """The step of a line of log.jsonl, or None: a killed run may leave half a line."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if line.endswith("\n") and isinstance(step, int) else None
