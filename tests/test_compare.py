"""compare.py: its results, what it keeps, and that a stopped comparison continues."""
import errno
import json
import os
import re
import statistics
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_here
from matplotlib.figure import Figure

from experiments import bench, compare, pictures
from kronygpt import checkpoint
from kronygpt.configurator import UserError
from model import KronyGPT, KronyGPTConfig


@pytest.fixture
def calls(workdir, monkeypatch):
    """A comparison of small models; the scripts run in this process. Returns the list of calls, [script, argument, ...]."""
    directory = Path("data/walk")
    directory.mkdir(parents=True)
    steps = np.random.default_rng(0).integers(-2, 3, 3000).cumsum() % 256
    for split, part in (("train", steps[:2500]), ("val", steps[2500:])):
        part.astype(np.uint16).tofile(directory / f"{split}.bin")
    directory.joinpath("meta.json").write_text(json.dumps(dict(
        vocab_size=256, tokenizer="bytes", tokens={}, documents={}, source="a test")))
    torch.manual_seed(0)
    checkpoint.save("dense.pt", KronyGPT(KronyGPTConfig(block_size=16, vocab_size=256, n_layer=2, n_head=1, n_embd=16)))
    Path("tiny.py").write_text("batch_size = 2\ngradient_accumulation_steps = 1\nmax_iters = 100\nwarmup_iters = 1\n"
                                 "eval_interval = 2\neval_iters = 1\ndevice = \"cpu\"\n")
    for name, value in dict(base="dense.pt", dataset="walk", train_config="tiny.py", steps=4, seeds="3,1", out_dir="out",
                            starts="whole: kron_decompose.py 16 64 1\nhalf: kron_decompose.py 16 32 1\n"
                                   "fitted: kron_decompose.py 16 32 1 --calibrate=walk --calibration_tokens=640"
                                   " --refine_steps=1 | --learning_rate=1e-3").items():
        monkeypatch.setattr(compare, name, value)
    calls = []

    def call(script, *args):
        calls.append([script, *args])
        done = run_here(script, *args)
        assert done.returncode == 0, done.stderr
        return 1.0

    monkeypatch.setattr(compare, "call", call)
    monkeypatch.setattr("kronygpt.device.matmul_flops", lambda device, dtype: 1e9)  # measuring it takes train.py a second
    return calls


def test_every_start_is_trained_with_each_seed_and_scored(calls):
    compare.main()
    rows = json.loads(Path("out/results.json").read_text())
    assert [row["name"] for row in rows] == ["dense base", "whole", "half", "fitted"]
    assert rows[1]["before"] == pytest.approx(rows[0]["before"], abs=1e-5)
    training = [call for call in calls if call[0] == "train.py"]
    assert len(training) == 6 and all("--max_iters=4" in call for call in training)
    assert [sum(f"--seed={seed}" in call for call in training) for seed in (1, 3)] == [3, 3]
    assert sum("--learning_rate=1e-3" in call for call in training) == 2
    assert sum(call[0] == "kron_to_gpt.py" for call in calls) == 3  # with the first seed
    half = rows[2]
    assert half["shapes"] == {"attn.c_attn": [[16, 48, 1]] * 2, "attn.c_proj": [[16, 16, 1]] * 2,
                              "mlp.c_fc": [[16, 32, 1]] * 2, "mlp.c_proj": [[32, 16, 1]] * 2}
    assert [step for step, _ in half["runs"][0]["curve"]] == [0, 2, 4]
    model, _ = checkpoint.load("out/half/start.pt")
    assert half["mlp_parameters"] == sum(p.numel() for name, p in model.named_parameters() if ".mlp." in name)
    assert {"table.md", "pareto.png", "loss.png"} <= {path.name for path in Path("out").iterdir()}
    line = next(line for line in Path("out/table.md").read_text().splitlines() if line.startswith("| half"))
    losses = [run["after"] for run in half["runs"]]
    assert f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses):.3f}" in line
    table = Path("out/table.md").read_text()
    assert [row["learning_rate"] for row in rows[2:]] == [6e-4, 1e-3] and "| learning rate |" in table
    assert re.search(r"^\| half .*\| 0.0006 \|", table, re.M) and re.search(r"^\| fitted .*\| 0.001 \|", table, re.M)


def test_finished_work_is_not_repeated(calls, monkeypatch):
    compare.main()
    calls.clear()
    compare.main()
    assert not calls
    monkeypatch.setattr(compare, "seeds", "3,1,2")
    compare.main()
    assert {call[0] for call in calls} == {"train.py", "perplexity.py"} and all("seed_2" in str(call) for call in calls)
    calls.clear()
    Path("out/half/seed_1.json").write_text("damaged")
    compare.main()
    assert [call[0] for call in calls] == ["train.py", "perplexity.py"]
    calls.clear()
    kept = json.loads(Path("out/half/start.json").read_text())
    Path("out/half/start.json").write_text(json.dumps(dict(kept, key=dict(kept["key"], format=1))))
    compare.main()
    assert [call[0] for call in calls][:2] == ["kron_decompose.py", "perplexity.py"]
    calls.clear()
    monkeypatch.setattr(compare, "starts", compare.starts.replace("16 32 1\n", "16 16 1\n"))
    compare.main()
    assert [call[0] for call in calls].count("kron_decompose.py") == 1
    assert [call[0] for call in calls].count("train.py") == 3


def test_the_gap_is_between_the_first_start_of_the_same_shapes_and_the_dense_model_trained_as_long():
    def row(name, mlp, shape, before, *after):
        return dict(name=name, parameters=mlp + 10, mlp_parameters=mlp, shapes={"mlp.c_fc": [shape]}, before=before,
                    tokens_per_second=1, seconds=1, runs=[dict(after=loss, seconds=1, curve=[]) for loss in after])

    rows = [dict(row("base", 100, [4, 16, 1], 1.0), runs=[]), row("dense", 100, [4, 16, 1], 1.0, 0.8, 1.0),
            row("dense, distilled", 100, [4, 16, 1], 1.0, 0.9),
            row("plain", 50, [4, 8, 1], 5.0, 1.9), row("fitted", 50, [4, 8, 1], 2.0, 1.1),
            row("other", 50, [2, 8, 1], 3.0, 1.5)]
    assert [compare.gap_recovered(rows, r) for r in rows[1:]] == ["", "", "", "75% → 80%", ""]
    rows[1]["runs"][:] = rows[3]["runs"]  # no gap is left after training
    assert compare.gap_recovered(rows, rows[4]) == "75%"
    del rows[1:3]
    assert compare.gap_recovered(rows, rows[2]) == "75%"
    rows[1]["before"] = 1.0  # nor before
    assert compare.gap_recovered(rows, rows[2]) == ""


def test_each_start_tries_learning_rates_until_the_loss_rises(calls, monkeypatch):
    losses, trained = {0.001: 3.0, 0.01: 2.0, 0.1: 2.5}, []

    def train_start(folder, start, options, seed, is_exported):
        trained.append((start.parent.name, seed, float(options[-1].partition("=")[2])))
        return dict(after=losses[trained[-1][2]] + seed / 100, learning_rate=trained[-1][2], seconds=1.0, curve=[(0, 5.0)])

    monkeypatch.setattr(compare, "train_start", train_start)
    monkeypatch.setattr(compare, "learning_rates", "1e-3,1e-2,1e-1,1")
    compare.main()
    names = ("whole", "half", "fitted")  # the last of which has a rate of its own
    assert trained == [*[(name, 3, rate) for name in names for rate in losses], *[(name, 1, 0.01) for name in names]]
    table = Path("out/table.md").read_text()
    assert "of 0.001, 0.01, 0.1, the last before the loss rises, or the last of all." in table
    for row in json.loads(Path("out/results.json").read_text())[1:]:
        assert [run["after"] for run in row["runs"]] == [losses[0.01] + seed / 100 for seed in (3, 1)]
        assert row["learning_rate"] == 0.01 and row["losses_by_rate"]["0.01"] == row["runs"][0]["after"]
    assert "| learning rate |" not in table  # it is the same for all
    trained.clear()
    calls.clear()
    compare.main()
    assert not calls and not trained


def test_starts_with_one_command_share_what_it_makes(calls, monkeypatch):
    monkeypatch.setattr(compare, "seeds", "3")
    monkeypatch.setattr(compare, "starts", "half: kron_decompose.py 16 32 1\n"
                                           "distilled: kron_decompose.py 16 32 1 | --teacher=dense.pt")
    compare.main()
    scripts = [call[0] for call in calls if call[0] != "perplexity.py"]
    assert scripts == ["kron_decompose.py", *["train.py", "kron_to_gpt.py"] * 2]
    assert all("--init_from=out/half/start.pt" in call for call in calls if call[0] == "train.py")
    half, distilled = json.loads(Path("out/results.json").read_text())[1:]
    assert half["before"] == distilled["before"] and half["runs"] != distilled["runs"]


def test_a_training_that_was_stopped_is_no_result(calls, monkeypatch):
    call = compare.call

    def stop_early(script, *args):
        seconds = call(script, *args)
        if script == "train.py":
            content = torch.load("out/whole/seed_3/ckpt.pt", weights_only=True)
            torch.save(dict(content, iter_num=2), "out/whole/seed_3/ckpt.pt")
        return seconds

    monkeypatch.setattr(compare, "call", stop_early)
    with pytest.raises(UserError, match="stopped after 2 of 4 steps") as error:
        compare.main()
    assert error.value.status == 1 and not Path("out/whole/seed_3.json").exists()


def write_half(figure, target, **kwargs):
    """Figure.savefig on a disk that is full."""
    with open(target, "wb") if isinstance(target, (str, Path)) else nullcontext(target) as file:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("draw, name", [
    (lambda: pictures.save(Figure(), Path("out/loss.png")), "loss.png"),
    (lambda: bench.draw({"ours": {"file": 2.0}}, ["file"]), "ratios.png")])
def test_a_full_disk_spares_the_old_picture(draw, name, workdir, monkeypatch):
    monkeypatch.setattr(bench, "out_dir", "out")
    Path("out").mkdir()
    Path("out", name).write_text("old")
    with monkeypatch.context() as full:
        full.setattr(Figure, "savefig", write_half)
        with pytest.raises(OSError, match="No space left"):
            draw()
    assert Path("out", name).read_text() == "old" and os.listdir("out") == [name]
    draw()
    assert Path("out", name).read_bytes().startswith(b"\x89PNG")


def test_a_loss_that_is_not_finite_is_no_result(calls, monkeypatch):
    call = compare.call

    def diverge(script, *args):
        seconds = call(script, *args)
        if script == "train.py":
            with open("out/whole/seed_3/log.jsonl", "a") as file:
                file.write('{"step": 4, "val_loss": NaN}\n')
        return seconds

    monkeypatch.setattr(compare, "call", diverge)
    with pytest.raises(UserError, match=r"a validation loss in out/whole/seed_3/log\.jsonl is not finite") as error:
        compare.main()
    assert error.value.status == 1 and not Path("out/whole/seed_3.json").exists()


@pytest.fixture
def existing(calls, monkeypatch):
    """A run of three steps in runs/mine, beside one start."""
    monkeypatch.setattr(compare, "starts", "half: kron_decompose.py 16 32 1\nmine, longer: runs/mine")
    said = run_here("train.py", "tiny.py", "--init_from=dense.pt", "--dataset=walk", "--out_dir=runs/mine", "--max_iters=3")
    assert said.returncode == 0, said.stderr
    return Path("runs/mine")


def test_a_run_that_exists_is_scored_beside_the_starts_and_stays_as_it_is(existing, calls):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in existing.iterdir()}
    compare.main()
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in existing.iterdir()} == before
    row = next(row for row in json.loads(Path("out/results.json").read_text()) if row["name"] == "mine, longer")
    log = [json.loads(line) for line in Path(existing, "log.jsonl").read_text().splitlines()]
    curve = [[entry["step"], entry["val_loss"]] for entry in log if "val_loss" in entry]
    assert [step for step, _ in curve] == [0, 2, 3]
    assert row["before"] == curve[0][1] and [run["curve"] for run in row["runs"]] == [curve]
    assert row["parameters"] == checkpoint.load("dense.pt")[0].count_parameters()["total"]
    said = run_here("perplexity.py", "runs/mine/best.pt", "walk", "--json_out=score.json")
    assert said.returncode == 0 and row["runs"][0]["after"] == json.loads(Path("score.json").read_text())["walk"]["loss"]
    line = next(line for line in Path("out/table.md").read_text().splitlines() if line.startswith("| mine, longer"))
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[3:5] == [f"{curve[0][1]:.3f}", f"{row['runs'][0]['after']:.3f}"] and cells[6:9] == [""] * 3 and cells[9]
    calls.clear()
    compare.main()
    assert not calls
    checkpoint.save(existing / "best.pt", checkpoint.load("dense.pt")[0])  # it has been trained on
    compare.main()
    assert [call[:2] for call in calls] == [["perplexity.py", "runs/mine/best.pt"]]


def test_a_run_that_was_not_scored_at_its_start_has_no_loss_before(existing, monkeypatch):
    log = existing / "log.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[1:]) + '{"step": 4, "los')  # and it goes on
    (existing / "best.pt").unlink()
    monkeypatch.setattr(compare, "learning_rates", "1e-3,1e-2")
    compare.main()
    row = next(row for row in json.loads(Path("out/results.json").read_text()) if row["name"] == "mine, longer")
    assert row["before"] is None and [step for step, _ in row["runs"][0]["curve"]] == [2, 3]
    assert re.search(r"^\| mine, longer \| [\d,]+ \| 100.0% \|  \| \d", Path("out/table.md").read_text(), re.M)


@pytest.mark.parametrize("starts, said", [
    ("mine: runs", "runs holds no run of train.py"), ("mine: runs/none", "the directory of a run, not 'mine: runs/none'"),
    ("mine: runs/mine | --seed=2", "the directory of a run, not"), ("mine: runs/mine more", "the directory of a run, not"),
    ("mine: out/here", "results would be written into out/here"), ("here: out", "results would be written into out")])
def test_what_is_no_run_or_would_be_changed_is_an_error(starts, said, existing, monkeypatch):
    for copy in Path("out/mine"), Path("out"):
        copy.mkdir(parents=True, exist_ok=True)
        for name in ("ckpt.pt", "log.jsonl"):
            Path(copy, name).write_bytes(Path(existing, name).read_bytes())
    Path("out/here").symlink_to("mine")
    monkeypatch.setattr(compare, "starts", starts)
    with pytest.raises(UserError, match=re.escape(said)):
        compare.parse_starts()


@pytest.mark.parametrize("starts, said", [
    ("a: prune.py '", "No closing quotation in \"a: prune.py '\""),
    ("a.b: prune.py\na-b: prune.py --offset=1", "another start has the name 'a-b'"), ("\n", "names no start")])
def test_bad_starts_are_errors(starts, said, monkeypatch):
    monkeypatch.setattr(compare, "starts", starts)
    with pytest.raises(UserError, match=re.escape(said)):
        compare.parse_starts()


def test_a_failed_script_is_a_one_line_error(workdir, capfd):
    with pytest.raises(UserError, match=re.escape("sample.py failed; see above")) as error:
        compare.call("sample.py", "--seeds=1")
    assert error.value.status == 1
    assert "error: unknown option --seeds: did you mean --seed?" in capfd.readouterr().err


def test_a_comparison_that_fails_writes_no_results(calls, monkeypatch):
    def fail(script, *args):
        raise UserError(f"{script} failed; see above", status=1)

    monkeypatch.setattr(compare, "call", fail)
    with pytest.raises(UserError, match=re.escape("perplexity.py failed; see above")):
        compare.main()
    assert not Path("out/results.json").exists() and not Path("out/base.json").exists()
