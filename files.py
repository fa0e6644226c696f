"""Durable files: atomic writes, directories that belong to one process, and the directory of a training run."""
import errno
import json
import os
import shutil
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

from configurator import UserError

ASIDE = ".tmp"  # the end of a name that a file has until it is complete

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # what a file system without locks answers
# what one answers that cannot flush a folder (SMB, FUSE)
NO_FOLDER_SYNC = (errno.EINVAL, errno.EACCES, errno.EPERM, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
REPLACE_TRIES, REPLACE_PAUSE = 50, 0.1  # on Windows, where a file cannot be replaced while another process reads it


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
        replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):  # a write that fails does not say to which file
            error.filename = error.filename or str(path)
        raise
    sync_folder(path.parent)  # the new name is on disk, too


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


def sync_folder(folder):
    """Flush a folder's names to disk, on systems that can."""
    if os.name == "nt":  # Windows cannot open a folder
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
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


def remove_leftovers(directory):
    """Remove what a process that was killed has left half-written. The caller holds the lock."""
    for path in Path(directory).glob(f"*{ASIDE}"):
        path.unlink()


class RunDir:
    """The directory of a training run: ckpt.pt (the latest), best.pt, older checkpoints and log.jsonl; and wandb's copy of
    the log."""

    def __init__(self, path):
        self.path, self.wandb_run = Path(path), None
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

    def start_wandb(self, options, run_id):
        """Start a wandb run, or continue one, unless the option wandb_mode is "off".

        Args:
            options: {option: value} of train.py; the id of the wandb run is added as wandb_run_id.
            run_id: of the run to continue, or None.

        Raises:
            UserError: wandb does not start.
        """
        if run_id:
            options["wandb_run_id"] = run_id  # kept where wandb is off this time
        if options["wandb_mode"] == "off":
            return
        try:
            import wandb

            self.wandb_run = wandb.init(
                project=options["wandb_project"], name=options["wandb_run_name"] or self.path.name, config=options,
                mode=os.environ.get("WANDB_MODE") or options["wandb_mode"], id=run_id, resume="allow", allow_val_change=True)
        except Exception as error:  # no package, login or network, a bad name
            raise UserError(f"wandb does not start ({type(error).__name__}: {error}): `wandb login` logs in, "
                            "--wandb_mode=offline needs no login, off none of it", status=1) from None
        options["wandb_run_id"] = self.wandb_run.id

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
        if self.wandb_run:
            self.wandb_run.log(entry, step=entry["step"])

    def before_save(self, last_step, keep):
        """Flush the log, whose lines a resume does not write again, and keep the checkpoint that is about to be replaced.

        Args:
            last_step: of ckpt.pt, which stays as ckpt_{last_step}.pt.
            keep: number of older checkpoints that stay.
        """
        os.fsync(self.log_file.fileno())
        older = self.path / f"ckpt_{last_step:07d}.pt"
        if keep and self.last.exists() and not older.exists():
            link_or_copy(self.last, older)
        for path in sorted(self.path.glob("ckpt_*.pt"))[:-keep or None] if keep else ():
            path.unlink()

    def close(self):
        """Release it, after a run that ended well."""
        if self.wandb_run:
            self.wandb_run.finish()
        self.log_file.close()
        self.lock.release()


def step_of(line):
    """The step of a line of log.jsonl, or None: a killed run may leave half a line."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if line.endswith("\n") and isinstance(step, int) else None
