"""loss.png of a run: what it shows, and that a run never fails for it."""
import errno
import json
import os
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from test_train import log_of, run_train, write_dataset

from experiments import pictures
from kronygpt import device
from kronygpt.run_dir import read_log


@pytest.fixture
def no_picture():
    """Pictures are drawn here."""


@pytest.fixture
def tokens(workdir):
    return write_dataset("tiny", 5000)


@pytest.fixture
def drawn(tokens, monkeypatch):
    """The figures that are saved."""
    figures, save = [], pictures.save
    monkeypatch.setattr(pictures, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
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


def test_a_run_that_is_stopped_draws_what_it_did(drawn, monkeypatch):
    looks = iter(range(7))
    monkeypatch.setattr(device.Processes, "must_stop", lambda self: next(looks, None) is None)
    assert "stopped by" in run_train("--eval_interval=100").stdout
    assert [len(line.get_xdata()) for line in drawn[0].axes[0].lines] == [len(log_of("out")) - 1, 1, 1]


def test_a_new_run_that_is_stopped_at_once_leaves_no_picture_of_the_old_one(drawn, monkeypatch):
    run_train("--max_iters=1")
    monkeypatch.setattr(device.Processes, "must_stop", lambda self: True)
    run_train("--overwrite=True")
    assert not log_of("out") and not Path("out/loss.png").exists() and len(drawn) == 1


def full(figure, target, **options):
    target.write(b"half")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["no matplotlib", "a full disk", "a log of other things"])
def test_a_picture_that_cannot_be_drawn_is_a_warning(what, tokens, monkeypatch):
    run_train("--max_iters=1")
    old = Path("out/loss.png").read_bytes()
    if what == "no matplotlib":
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    elif what == "a full disk":
        monkeypatch.setattr(Figure, "savefig", full)
    else:
        with open("out/log.jsonl", "a") as log:
            log.write('{"step": 1, "loss": {}}\n')
    with pytest.warns(UserWarning, match="^no out/loss.png: [^\\n]*$"):
        said = run_train("--init_from=resume", "--max_iters=2")
    assert "done: best validation loss" in said.stdout and log_of("out")[-1]["step"] == 2
    assert sorted(os.listdir("out")) == [".lock", "best.pt", "ckpt.pt", "log.jsonl", "loss.png"]
    assert Path("out/loss.png").read_bytes() == old



def test_a_log_is_read_up_to_the_line_that_a_kill_left(workdir):
    entries = [dict(step=1, loss=2.0), dict(step=2, loss=None, val_loss=1.5)]
    Path("log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries)
                                 + '[]\n{"loss": 3}\n{"step": "x"}\n{"step": 3, "los')
    assert read_log("log.jsonl") == entries


def test_losses_against_parameters_have_a_line_for_each_method(workdir, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: figures.append(figure))

    def row(name, parameters, before, *after):
        return dict(name=name, parameters=parameters, mlp_parameters=parameters, before=before,
                    runs=[dict(after=loss, curve=[(0, before)]) for loss in after])

    rows = [row("1.7M ours", 2_000_000, 1.5, 1.2, 1.4), row("0.9M ours", 1_000_000, 1.75, 1.6, 1.6),
            row("2.2M Van Loan", 2_000_000, None, 1.9)]
    pictures.draw_pareto(row("dense", 3_000_000, 1.1), rows, "a.png", "pydocs")
    left, right = figures[0].axes
    for axes, ours, van_loan in ((left, [1.75, 1.5], None), (right, [1.6, 1.3], 1.9)):
        _, line, other = (line for line in axes.lines if len(line.get_xdata()) and line.get_marker() != "_")
        assert list(line.get_xdata()) == [1, 2] and list(line.get_ydata()) == pytest.approx(ours)
        assert list(other.get_xdata()) == [2] and (other.get_ydata()[0] == van_loan or axes is left)
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["dense", "ours", "Van Loan"]
