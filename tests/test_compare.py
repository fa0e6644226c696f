"""compare.py: its results, what it keeps, and that a stopped comparison continues."""
import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, succeed

from experiments import compare, peers
from kronygpt import checkpoint, data
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
                               "eval_interval = 2\neval_iters = 1\ndevice = \"cpu\"\n", encoding="utf-8")
    for name, value in dict(base="dense.pt", dataset="walk", train_config="tiny.py", steps=4, seeds="3,1", out_dir="out",
                            starts="whole: kron_decompose.py 16 64 1\nhalf: kron_decompose.py 16 32 1\n"
                                   "fitted: kron_decompose.py 16 32 1 --calibrate=walk --calibration_tokens=640"
                                   " | --learning_rate=1e-3").items():
        monkeypatch.setattr(compare, name, value)
    calls = []

    def call(script, *args):
        calls.append([script, *args])
        succeed(script, *args)

    monkeypatch.setattr(compare, "call", call)
    return calls


def test_every_start_is_trained_with_each_seed_and_scored(calls, capsys):
    compare.main()
    rows = json.loads(Path("out/results.json").read_text(encoding="utf-8"))
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
    assert half["widths"] == dict(head_qk=[[16]] * 2, head_v=[[16]] * 2, n_inner=[64] * 2, wte=[[256, 16]], wpe=[[16, 16]])
    mean, spread = (function([run["after"] for run in half["runs"]]) for function in (statistics.mean, statistics.stdev))
    table, printed = Path("out/table.md").read_text(encoding="utf-8"), capsys.readouterr().out
    assert re.search(rf"^\| half .*\| {mean:.3f} ± {spread:.3f} \| 0.0006 \|", table, re.M)
    assert [row["learning_rate"] for row in rows[2:]] == [6e-4, 1e-3] and re.search(r"^\| fitted .*\| 0.001 \|", table, re.M)
    assert re.search(rf"^half +[\d,]+ .*{mean:.3f} ± {spread:.3f} +0.0006$", printed, re.M)
    assert Path("out/losses.png").read_bytes().startswith(b"\x89PNG")
    places = re.findall(r"^seed (\d), start (\d) of 3: (\w+)$", printed, re.M)
    assert places == [(seed, str(i + 1), name) for seed in "31" for i, name in enumerate(("whole", "half", "fitted"))]


def test_finished_work_is_not_repeated(calls, monkeypatch):
    done = []

    def make_start(folder, command):
        folder.mkdir(parents=True, exist_ok=True)
        folder.joinpath("start.pt").touch()
        done.append(folder.name)
        return dict(parameters=1, shapes=folder.name, before=2.0)

    def train_start(folder, start, options, seed, is_exported):
        done.append((folder.parent.name, seed))
        return dict(after=1.0, learning_rate=1e-3)

    def repeated():
        done.clear()
        compare.main()
        return set(done)

    monkeypatch.setattr(compare, "make_start", make_start)
    monkeypatch.setattr(compare, "train_start", train_start)
    names = ("whole", "half", "fitted")
    assert repeated() == {"out", *names, *((name, seed) for name in names for seed in (3, 1))} and repeated() == set()
    monkeypatch.setattr(compare, "seeds", "3,1,2")
    assert repeated() == {(name, 2) for name in names}
    Path("out/half/seed_1.json").unlink()
    assert repeated() == {("half", 1)}
    kept = json.loads(Path("out/half/start.json").read_text(encoding="utf-8"))
    Path("out/half/start.json").write_text(json.dumps(dict(kept, key=dict(kept["key"], format=1))), encoding="utf-8")
    assert repeated() >= {"half", ("half", 1)}
    monkeypatch.setattr(compare, "starts", compare.starts.replace("16 32 1\n", "16 16 1\n"))
    assert repeated() == {"half", *(("half", seed) for seed in (1, 2, 3))}
    Path("tiny.py").write_text(Path("tiny.py").read_text(encoding="utf-8") + "beta2 = 0.9\n", encoding="utf-8")
    assert len(repeated()) == 9


def test_starts_made_in_the_same_way_are_made_once(calls, monkeypatch):
    monkeypatch.setattr(compare, "seeds", "1")
    monkeypatch.setattr(compare, "starts", "half: kron_decompose.py 16 32 1\n"
                                           "faster: kron_decompose.py 16 32 1 | --learning_rate=1e-2")
    compare.main()
    scripts = [call[0] for call in calls if call[0] != "perplexity.py"]
    assert scripts == ["kron_decompose.py", *["train.py", "kron_to_gpt.py"] * 2]
    assert all("--init_from=out/half/start.pt" in call for call in calls if call[0] == "train.py")
    half, faster = json.loads(Path("out/results.json").read_text(encoding="utf-8"))[1:]
    assert half["before"] == faster["before"] and half["runs"] != faster["runs"]


def rows_of(*losses_after, dense=True):
    """Rows of a comparison: the base, perhaps the dense model trained as long, and starts of half of its parameters."""
    def row(name, parameters, before, after):
        return dict(name=name, parameters=parameters, shapes=parameters, before=before, learning_rate=1e-3,
                    runs=[dict(after=after)])

    rows = [dict(row("base", 100, 1.0, None)), row("dense", 100, 1.0, 0.75)]
    return rows[:1 + dense] + [row(f"start {i}", 50, 3.0, after) for i, after in enumerate(losses_after)]


def test_the_conclusion_is_about_the_best_smaller_model_and_the_dense_one_trained_as_long():
    assert compare.conclusion(rows_of(1.5, 1.0)) == (
        'The best smaller model, "start 1", has 50% of the parameters of the dense model and ends at 1.000, 0.250 nats '
        "above the dense model trained as long.")
    assert compare.conclusion(rows_of(0.5, dense=False)).endswith("ends at 0.500, 0.500 nats below the dense model.")
    assert compare.conclusion(rows_of()) == "No start is smaller than the dense model."


def test_what_a_start_brings_along_changes_nothing_outside_out_dir(calls, monkeypatch):
    """Not even by a config file behind the bar."""
    Path("mine.py").write_text("out_dir = \"mine\"\nseed = 8\nlearning_rate = 2e-3\n", encoding="utf-8")
    Path("mine").mkdir()
    monkeypatch.setattr(compare, "starts", "half: kron_decompose.py 16 32 1 | mine.py")
    compare.main()
    assert not list(Path("mine").iterdir())
    assert json.loads(Path("out/results.json").read_text(encoding="utf-8"))[1]["learning_rate"] == 2e-3


@pytest.mark.parametrize("starts", ["kron_decompose.py 16 32 1", "a.b: prune.py\na-b: prune.py --offset=1"])
def test_a_start_has_a_name_of_its_own(starts, monkeypatch):
    monkeypatch.setattr(compare, "starts", starts)
    with pytest.raises(UserError, match="a start is `name: command` with a name of its own"):
        compare.parse_starts()


def test_a_failed_script_is_a_one_line_error(monkeypatch, capfd, tmp_path):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=re.escape("sample.py failed; see above")) as error:
        compare.call("sample.py", "--seeds=1")
    assert error.value.status == 1
    assert "error: unknown option --seeds: did you mean --seed?" in capfd.readouterr().err
    compare.call("experiments/predict.py", "--help", cwd=tmp_path)


@pytest.mark.parametrize("m, n", [(12, 20), (20, 12)])
@pytest.mark.parametrize("r", [1, 5, 11])
def test_svd_llm_has_the_least_error_on_its_inputs(m, n, r):
    """No product X W_r of rank r is nearer to X W than the truncated SVD of X W itself."""
    rng = np.random.default_rng(0)
    X, W = rng.normal(1, 1, (100, m)) @ rng.normal(size=(m, m)), rng.normal(size=(m, n))
    A, B = peers.best_on_inputs(torch.tensor(W), torch.tensor(X.T @ X / len(X)), r)
    assert A.shape == (r, m, 1) and B.shape == (r, 1, n)
    sigma = np.linalg.svd(X @ W, compute_uv=False)
    assert np.linalg.norm(X @ (W - (A[:, :, 0].T @ B[:, 0]).numpy())) == pytest.approx(np.sqrt((sigma[r:]**2).sum()))


def test_svd_llm_takes_each_matrix_by_itself(calls):
    """With the inputs of the dense model, at even ranks; biases stay."""
    compare.call("experiments/peers.py", "svd_llm", "7.5K", "--init_from=dense.pt", "--calibrate=walk",
                 "--calibration_tokens=640", "--out=new.pt")
    old, new = (checkpoint.load(path)[0].eval() for path in ("dense.pt", "new.pt"))
    assert 0.97 * 7_500 < new.count_parameters()["total"] <= 7_500
    inputs = {}
    for *_, matrix in old.matrices():
        matrix.register_forward_hook(lambda matrix, x, y: inputs.update({matrix: x[0].flatten(0, -2)}))
    with torch.no_grad():
        old(data.calibration_text("walk", 640, old.config, "cpu"))
    for (_, kind, matrix), (_, _, other) in zip(old.matrices(), new.matrices()):
        assert torch.equal(matrix.bias, other.bias)
        Y, Z = (inputs[matrix] @ m.weight.detach() for m in (matrix, other))
        rest = torch.linalg.svdvals(Y)[len(other.A):].square().sum()
        torch.testing.assert_close((Y - Z).square().sum(), rest, rtol=1e-3, atol=1e-6, msg=kind)
