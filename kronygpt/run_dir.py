"""The directory of a training run: its checkpoints, its log with a picture, and wandb's copy of the log."""
import json
import os
import re
import warnings
from pathlib import Path

from experiments import pictures
from kronygpt.configurator import UserError
from kronygpt.files import atomic_write, lock, remove_leftovers


class RunDir:
    """The directory of a run: ckpt.pt (the latest), best.pt, older checkpoints, log.jsonl and loss.png. Other files in it
    are left alone."""

    OLDER = re.compile(r"ckpt_(\d{7,})\.pt")

    def __init__(self, path):
        self.path, self.wandb_run = Path(path), None
        self.last, self.best, self.log_path, self.picture = (
            self.path / name for name in ("ckpt.pt", "best.pt", "log.jsonl", "loss.png"))

    def older(self):
        """The older checkpoints, in the order of their steps."""
        found = {int(match[1]): path for path in self.path.iterdir() if (match := self.OLDER.fullmatch(path.name))}
        return [found[step] for step in sorted(found)]

    def check(self, is_resume, overwrite):
        """Raise UserError unless it holds what a resume needs, or nothing that a new run would destroy or be mixed with."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"--out_dir={self.path} is a file")
        if is_resume and not self.last.exists():
            raise UserError(f"nothing to resume: no {self.last}")
        there = [path for path in (*self.path.glob("ckpt*.pt"), self.best, self.log_path, self.picture) if path.exists()]
        if not is_resume and there and not overwrite:
            raise UserError(f"{self.path} holds a run already ({there[0].name}): --init_from=resume continues it, "
                            "--overwrite=True starts over, another --out_dir keeps it")

    def claim(self, is_resume, overwrite):
        """Lock it for this process and clear it of half-written files."""
        self.lock = lock(self.path)
        self.check(is_resume, overwrite)  # again: another run may have ended here since the first time
        names = [re.escape(path.name) for path in (self.last, self.best, self.log_path, self.picture)]
        remove_leftovers(self.path, "|".join([*names, self.OLDER.pattern]), is_locked=True)

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

    def open_log(self, first_step, is_resume):
        """Open log.jsonl for appending, once ckpt.pt is there: without the lines of what will be done again, which are steps
        after first_step and the evaluation behind it. A new run removes what is left of an older one."""
        lines = self.log_path.read_text(errors="replace").splitlines(keepends=True) if self.log_path.exists() else []
        with atomic_write(self.log_path, "w") as file:
            file.writelines(line for line in lines if is_resume and is_done(line, first_step))
        for path in () if is_resume else (*self.older(), self.best, self.picture):
            path.unlink(missing_ok=True)
        self.log_file = self.log_path.open("a", buffering=1, encoding="utf-8")

    def log(self, **entry):
        """Append a line to log.jsonl."""
        self.log_file.write(json.dumps(entry) + "\n")
        if self.wandb_run:
            self.wandb_run.log(entry, step=entry["step"])

    def name_to_keep(self, last_step, keep):
        """The second name of ckpt.pt, whose steps are last_step, when a new one replaces it; None unless it is kept. The
        log is flushed: a resume from the new one does not write its lines again."""
        os.fsync(self.log_file.fileno())
        return self.path / f"ckpt_{last_step:07d}.pt" if keep else None

    def remove_older(self, keep):
        """Remove older checkpoints but the last `keep`; all stay where it is 0."""
        for path in self.older()[:-keep] if keep else ():
            path.unlink()

    def draw(self):
        """Draw the log, which a resume has continued, as loss.png; a warning where that fails, as without matplotlib or on a
        full disk: the run is saved."""
        try:
            if log := read_log(self.log_path):
                pictures.draw_run(log, self.picture, self.path.name)
        except Exception as error:
            warnings.warn(f"no {self.picture}: {type(error).__name__}: {' '.join(str(error).split())}", stacklevel=2)

    def close(self):
        """Draw and release it, after a run that ended well."""
        self.draw()
        if self.wandb_run:
            self.wandb_run.finish()
        self.log_file.close()
        self.lock.release()


def entry_of(line):
    """The entry of a line of log.jsonl, or None where it is none: a killed run may leave half a line."""
    try:
        entry = json.loads(line)
        return entry if isinstance(entry["step"], int) else None
    except (ValueError, KeyError, TypeError):
        return None


def read_log(path):
    """The entries of a log.jsonl."""
    return [entry for line in Path(path).read_text(errors="replace").splitlines() if (entry := entry_of(line))]


def is_done(line, first_step):
    """Whether a line of log.jsonl is of a step up to first_step, and of no evaluation behind it, which a resume repeats."""
    entry = entry_of(line)
    return entry is not None and line.endswith("\n") and entry["step"] <= first_step - ("val_loss" in entry)
