"""The pictures of runs and comparisons: what they show, and that a run never fails for one."""
import errno
import os
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from test_train import log_of, run_train

from experiments import pictures
from kronygpt import run_dir


@pytest.fixture
def no_picture():
    """Pictures are drawn here."""


@pytest.fixture
def drawn(tokens, monkeypatch):
    """The figures that are saved."""
    figures, save = [], run_dir.save_figure
    for module in run_dir, pictures:
        monkeypatch.setattr(module, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def test_the_picture_shows_the_log_of_the_whole_run(drawn):
    run_train("--max_iters=10", "--lr_decay_iters=20")
    run_train("--max_iters=20", "--init_from=resume")
    assert Path("out/loss.png").read_bytes().startswith(b"\x89PNG") and len(drawn) == 2
    log = log_of("out")
    assert log[-1]["step"] == 20
    shown = [list(map(tuple, line.get_xydata())) for line in drawn[-1].axes[0].lines]
    assert shown == [[(entry["step"], entry[name]) for entry in log if name in entry]
                     for name in ("loss", "train_loss", "val_loss")]
    assert [len(points) for points in shown] == [20, 3, 3]


def full(figure, target, **options):
    target.write(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["no matplotlib", "a full disk"])
def test_a_picture_that_cannot_be_drawn_is_a_warning_and_the_old_one_stays(what, drawn, monkeypatch):
    run_train("--max_iters=1")
    old = Path("out/loss.png").read_bytes()
    if what == "no matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    else:
        monkeypatch.setattr(Figure, "savefig", full)
    with pytest.warns(UserWarning, match="^no out/loss.png: [^\\n]*$"):
        said = run_train("--init_from=resume", "--max_iters=2")
    assert "done: best validation loss" in said.stdout and log_of("out")[-1]["step"] == 2
    assert Path("out/loss.png").read_bytes() == old


def row(name, parameters, before, *after):
    runs = [dict(after=loss) for loss in after]
    return dict(name=name, parameters=parameters, shapes=parameters, before=before, runs=runs)


def test_losses_added_are_those_over_the_dense_model_which_may_be_trained_as_long(drawn):
    dense = row("dense", 4_000_000, 1.5), row("dense, trained further", 4_000_000, 1.5, 1.25, 1.25)
    rows = [*dense, row("1M ours", 1_000_000, 1.75, 1.5, 1.75), row("2M ours", 2_000_000, 1.5, 1.375),
            row("1M unknown", 1_000_000, 9.0, 9.0)]
    pictures.draw_added(rows, "a.png")
    pictures.draw_parts([dense[0], *rows[2:4]], "b.png")
    before, after = (line for line in drawn[0].axes[0].lines if len(line.get_xdata()))
    assert list(before.get_xdata()) == list(after.get_xdata()) == [25, 50]
    assert list(before.get_ydata()) == [0.5, 0.25] and list(after.get_ydata()) == [0.375, 0.125]
    assert [text.get_text() for text in drawn[1].axes[0].texts] == ["0.250", "0.125", "0.000", "-0.125"]
