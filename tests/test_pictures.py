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
    monkeypatch.setattr(run_dir, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path)))
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
    return dict(name=name, parameters=parameters, shapes=parameters, before=before,
                runs=[dict(after=loss, curve=[(0, before)]) for loss in after])


def test_losses_against_parameters_have_a_line_for_each_method(drawn):
    rows = [row("dense", 3_000_000, 1.1), row("1.7M ours", 2_000_000, 1.5, 1.2, 1.4), row("0.9M ours", 1_000_000, 1.75, 1.6),
            row("2.2M Van Loan", 2_000_000, 2.0, 1.9)]
    pictures.draw_pareto(rows, "a.png", "pydocs")
    for axes, ours, van_loan in zip(drawn[0].axes, ([1.75, 1.5], [1.6, 1.3]), (2.0, 1.9)):
        lines = [line for line in axes.lines if len(line.get_xdata()) and line.get_marker() in pictures.MARKERS[:2]]
        assert [list(line.get_xdata()) for line in lines] == [[1, 2], [2]]
        assert list(lines[0].get_ydata()) == pytest.approx(ours) and lines[1].get_ydata()[0] == van_loan
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["dense", "ours", "Van Loan"]


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
