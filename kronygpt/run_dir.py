"""The directory of a training run: its checkpoints, its log with a picture, and wandb's copy of the log."""
import json
import math
import os
import re
import shutil
import warnings
from contextlib import suppress
from pathlib import Path

from kronygpt import checkpoint
from kronygpt.configurator import UserError
from kronygpt.files import atomic_write, lock, remove_leftovers

DPI = 120
TICKS = 8  # of an axis of losses, about


class RunDir:
    """The directory of a run: ckpt.pt (the latest), best.pt, checkpoints that are kept, log.jsonl and loss.png. Other files
    in it are left alone."""

    KEPT = re.compile(r"ckpt_(\d{7,})\.pt")

    def __init__(self, path):
        self.path, self.wandb_run, self.log_file = Path(path), None, None
        self.last, self.best, self.log_path, self.picture = (
            self.path / name for name in ("ckpt.pt", "best.pt", "log.jsonl", "loss.png"))

    def kept(self):
        """The checkpoints that are kept, {step: path} in the order of their steps."""
        found = {int(match[1]): path for path in self.path.iterdir() if (match := self.KEPT.fullmatch(path.name))}
        return dict(sorted(found.items()))

    def check(self, is_resume, overwrite):
        """Raise UserError unless it holds what a resume needs, or nothing that a new run would destroy or be mixed with."""
        if is_resume and not self.last.exists():
            raise UserError(f"nothing to resume: no {self.last}")
        there = [path for path in (*self.path.glob("ckpt*.pt"), self.best, self.log_path, self.picture) if path.exists()]
        if not is_resume and there and not overwrite:
            raise UserError(f"{self.path} holds a run already ({there[0].name}): --init_from=resume continues it, "
                            "--overwrite=True starts over, another --out_dir keeps it")

    def claim(self, overwrite, rest):
        """Lock it for this process and clear it of half-written files. `rest` is what its ckpt.pt holds besides the model
        for a resume, else {}.

        Raises:
            UserError: another process has it, or as in check.
        """
        self.lock = lock(self.path)
        self.check(bool(rest), overwrite)  # again: another run may have ended here since the first time
        names = [re.escape(path.name) for path in (self.last, self.best, self.log_path, self.picture)]
        remove_leftovers(self.path, "|".join([*names, self.KEPT.pattern]))
        if rest:
            self.open_log(rest["iter_num"])
        self.best_val_loss = rest["best_val_loss"] if rest and self.best.exists() else math.inf

    def start_wandb(self, options, run_id):
        """Start a wandb run, or continue the one of run_id, unless the option wandb_mode is "off". The options of train.py
        get its id as wandb_run_id."""
        options["wandb_run_id"] = run_id  # kept where wandb is off this time
        if options["wandb_mode"] != "off":
            import wandb

            self.wandb_run = wandb.init(
                project=options["wandb_project"], name=options["wandb_run_name"] or self.path.name, config=options,
                mode=os.environ.get("WANDB_MODE") or options["wandb_mode"], id=run_id, resume="allow", allow_val_change=True)
            options["wandb_run_id"] = self.wandb_run.id

    def open_log(self, step):
        """Open log.jsonl for appending, once ckpt.pt is there, which has done `step` steps. What is newer goes: lines of the
        log, an evaluation of this very step included, which is repeated, and checkpoints that another run left."""
        entries = read_log(self.log_path) if self.log_path.exists() else []
        with atomic_write(self.log_path, "w") as file:
            file.writelines(json.dumps(e) + "\n" for e in entries if e["step"] <= step - ("val_loss" in e))
        newer = [path for kept_step, path in self.kept().items() if kept_step > step]
        for path in newer if step else (*self.kept().values(), self.best, self.picture):
            path.unlink(missing_ok=True)
        self.log_file = self.log_path.open("a", buffering=1, encoding="utf-8")

    def log(self, **entry):
        """Append a line to log.jsonl."""
        self.log_file.write(json.dumps(entry) + "\n")
        if self.wandb_run:
            self.wandb_run.log(entry, step=entry["step"])

    def save(self, step, model, losses, options, **states):
        """Write ckpt.pt; after an evaluation also best.pt, if the validation loss is the lowest, and a line of the log. The
        first ckpt.pt of a new run removes what is left of an older run.

        Args:
            step: number of steps done.
            losses: {"train_loss", "val_loss"}, or {} without an evaluation.
            options: {option: value} of train.py.
            states: the optimizer and the scaler, as in checkpoint.save.
        """
        if self.log_file:
            os.fsync(self.log_file.fileno())  # a resume from the new checkpoint does not write these lines again
        is_best = bool(losses) and losses["val_loss"] <= self.best_val_loss  # equal where a resume repeats the evaluation
        if is_best:
            self.best_val_loss = losses["val_loss"]
        content = dict(iter_num=step, best_val_loss=self.best_val_loss, config=options)
        checkpoint.save(self.last, model, **content, **states)
        if not self.log_file:
            self.open_log(step)
        if is_best:
            checkpoint.save(self.best, model, **content)
        if losses and options["keep"] > 0 and step % options["eval_interval"] == 0:  # as where a run was stopped in between
            self.keep_last(step, options["keep"])
        if losses:
            self.log(step=step, **losses)

    def keep_last(self, step, n):
        """Copy ckpt.pt as that of a step, of which the last n stay."""
        with self.last.open("rb") as last, atomic_write(self.path / f"ckpt_{step:07d}.pt") as file:
            shutil.copyfileobj(last, file)
        for old in list(self.kept().values())[:-n]:
            old.unlink()

    def close(self):
        """Release it after a run that ended well, and draw its log as loss.png; a warning where that fails."""
        try:
            draw_run(read_log(self.log_path), self.picture, self.path.name)
        except Exception as error:
            warnings.warn(f"no {self.picture}: {type(error).__name__}: {' '.join(str(error).split())}", stacklevel=2)
        if self.wandb_run:
            self.wandb_run.finish()
        self.log_file.close()
        self.lock.release()


def read_log(path):
    """The entries of a log.jsonl. A killed run may leave half a line, which is none."""
    entries = []
    for line in Path(path).read_text("utf-8", "replace").splitlines():
        with suppress(ValueError):
            entries.append(json.loads(line))
    return entries


# ----------------------------------------------------------------------------------------------------------------------
# Pictures; matplotlib is imported when one is drawn

def new_figure(*size):
    """A figure of a width and a height in inches, which needs no display and no backend."""
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def save_figure(figure, path):
    """Write a figure as a PNG, with the same bytes each time."""
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=DPI, metadata={"Software": None})


def use_log_scale(axes):
    """A logarithmic axis of losses, with evenly spaced plain numbers as ticks: powers of ten are too far apart."""
    from matplotlib.ticker import MaxNLocator

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(TICKS, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()


def draw_run(log, path, title):
    """Draw the losses of a run, the entries of its log.jsonl, against its steps."""
    figure = new_figure(8, 5)
    axes = figure.subplots()
    for name, label, style in (("loss", "training, batch of the step", dict(color="C0", alpha=0.4, linewidth=1)),
                               ("train_loss", "training", dict(color="C0", marker="o", markersize=4)),
                               ("val_loss", "validation", dict(color="C1", marker="o", markersize=4))):
        points = [(entry["step"], entry[name]) for entry in log if name in entry]
        axes.plot([step for step, _ in points], [loss for _, loss in points], label=label, **style)
    axes.set(xlabel="steps", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    use_log_scale(axes)
    save_figure(figure, path)
