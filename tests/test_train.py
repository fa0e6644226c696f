"""train.py beside transformers' GPT-2 under torch's AdamW, itself on two processes, and itself resumed."""
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, kron_sum, refused, run_here, succeed, write_dataset  # noqa: F401 (others take it from here)
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

import train
from kronygpt import checkpoint, device
from kronygpt.checkpoint import to_file_names
from kronygpt.configurator import UserError
from kronygpt.data import batch_starts
from kronygpt.run_dir import RunDir

SIZES = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--dim_1=16", "--dim_2=64", "--factors=2,3"]
RUN = ["--dataset=tiny", *SIZES, "--block_size=16", "--batch_size=4", "--gradient_accumulation_steps=2",
       "--learning_rate=1e-2", "--warmup_iters=3", "--max_iters=20", "--eval_interval=10", "--eval_iters=2",
       "--log_interval=1"]
RUN_OF_A_CHECKPOINT = [option for option in RUN if option not in SIZES]  # which has its own sizes


def run_train(*options):
    has_sizes = any(option.startswith("--init_from=") and option != "--init_from=resume" for option in options)
    return succeed("train.py", *(RUN_OF_A_CHECKPOINT if has_sizes else RUN), *options)


def log_of(out_dir):
    return [json.loads(line) for line in Path(out_dir, "log.jsonl").read_text(encoding="utf-8").splitlines()]


def losses_of(out_dir):
    """{step: loss}, and that each step is there once."""
    pairs = [(entry["step"], entry["loss"]) for entry in log_of(out_dir) if "loss" in entry]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def load(path):
    return torch.load(path, weights_only=True)


def test_steps_are_those_of_a_plain_loop_over_transformers(tokens, gpt2_dir):
    succeed("kron_decompose.py", 32, 64, 2, f"--init_from={gpt2_dir}", "--out=start.pt")
    run_train("--init_from=start.pt", "--max_iters=6", "--weight_decay=0.2", "--factor_lr_scale=3", "--grad_clip=0.7",
              "--lr_decay_iters=5", "--min_lr=2e-3")

    dense = GPT2LMHeadModel.from_pretrained(gpt2_dir).eval()  # no dropout
    factors = {name: p.requires_grad_() for name, p in load("start.pt")["model"].items() if p.dim() == 3}
    own = [p for name, p in dense.named_parameters() if not (".mlp." in name and name.endswith(".weight"))]
    optimizer = torch.optim.AdamW([
        dict(params=list(factors.values()), weight_decay=0.2),
        dict(params=[p for p in own if p.dim() == 2], weight_decay=0.2),
        dict(params=[p for p in own if p.dim() == 1], weight_decay=0.0),
    ], betas=(0.9, 0.95))
    rates = [2.5e-3, 5e-3, 7.5e-3, 1e-2, 6e-3, 2e-3]  # warm-up over 3 steps, then half a cosine over 2
    logged_steps = [entry for entry in log_of("out") if "loss" in entry]
    for step, (rate, logged) in enumerate(zip(rates, logged_steps, strict=True)):
        for group, scale in zip(optimizer.param_groups, (3, 1, 1)):
            group["lr"] = scale * rate
        starts = batch_starts(len(tokens), 16, 1337, step, 8)
        x, y = (torch.from_numpy(np.array([tokens[i + shift:i + shift + 16] for i in starts])) for shift in (0, 1))
        weights = {f"{name[:-2]}.weight": kron_sum(A, factors[f"{name[:-2]}_1"])
                   for name, A in factors.items() if name.endswith("_0")}
        logits = torch.func.functional_call(dense, weights, x).logits
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_([*own, *factors.values()], 0.7)
        optimizer.step()
        assert logged["step"] == step + 1 and logged["lr"] == pytest.approx(rate)
        assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def timeless(out_dir):
    """The log without what depends on the machine."""
    return [{key: value for key, value in entry.items() if key not in ("tokens_per_second", "tflops")}
            for entry in log_of(out_dir)]


def same(a, b):
    """Whether two checkpoints hold the same numbers, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_checkpoints_load_and_hold_what_they_say(tokens):
    run_train()
    validation = {entry["step"]: entry["val_loss"] for entry in log_of("out") if "val_loss" in entry}
    assert list(validation) == [0, 10, 20]
    for name in ("ckpt.pt", "best.pt"):
        content = load(f"out/{name}")
        assert content["best_val_loss"] == min(validation.values())
        model, _ = checkpoint.load(f"out/{name}")
        assert model.config.shapes["mlp.c_fc"] == [(16, 64, 2), (16, 64, 3)] and model.config.n_head == 2
    assert load("out/ckpt.pt")["iter_num"] == 20
    assert validation[load("out/best.pt")["iter_num"]] == min(validation.values())


def test_factors_only_leaves_the_rest_bit_for_bit(tokens, gpt2_dir):
    succeed("kron_decompose.py", 32, 64, 2, f"--init_from={gpt2_dir}", "--out=start.pt")
    run_train("--init_from=start.pt", "--factors_only", "--max_iters=5")
    before, after = load("start.pt")["model"], load("out/ckpt.pt")["model"]
    for name, p in before.items():
        assert torch.equal(p, after[name]) == (p.dim() != 3), name


@pytest.fixture
def signal_at(monkeypatch):
    """Let this process send itself a signal, once, when a function of the run has been called so many times."""
    def send(number, owner, name, calls):
        function, counts = getattr(owner, name), iter(range(1, 10**6))

        def counting(*args, **kwargs):
            if next(counts) == calls:
                os.kill(os.getpid(), number)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    return send


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_signal_saves_and_the_run_goes_on_from_there(name, tokens, signal_at):
    number = getattr(signal, name)
    signal_at(number, RunDir, "log", 4)  # of step 3, behind the evaluation of step 0
    said = run_here("train.py", *RUN)
    assert said.returncode == 128 + number, said.stderr
    assert f"stopped by {name} after step 3; --init_from=resume continues\n" in said.stdout
    assert load("out/ckpt.pt")["iter_num"] == 3 and list(losses_of("out")) == [1, 2, 3]
    run_train("--init_from=resume", "--max_iters=5")
    assert list(losses_of("out")) == [1, 2, 3, 4, 5]


def test_a_signal_that_nohup_ignores_stays_ignored(tokens, signal_at):
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal_at(signal.SIGHUP, RunDir, "log", 4)
    assert "done: " in run_train("--max_iters=5").stdout


def test_a_signal_ends_an_evaluation_of_minutes(tokens, signal_at):
    signal_at(signal.SIGTERM, device.Processes, "stop_signal", 4)  # amid the evaluation of step 0
    said = run_here("train.py", *RUN, "--eval_iters=1000000")
    assert said.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM after step 0" in said.stdout
    run_train("--init_from=resume", "--max_iters=2")
    assert [entry["step"] for entry in log_of("out") if "val_loss" in entry] == [0, 2]


@pytest.mark.parametrize("patience", [4, 5, 7, 16])
def test_a_run_stopped_anywhere_ends_as_the_uninterrupted_one(patience, tokens, monkeypatch):
    """Each start stops when it has looked for a signal so many times: after steps, and within evaluations."""
    options = ["--max_iters=11", "--eval_interval=3", "--lr_decay_iters=11", "--dropout=0.1", "--keep=2", "--eval_iters=1"]
    run_train(*options, "--out_dir=whole")
    n_starts, stopped = 0, True
    while stopped:
        looks = iter([0] * patience)
        monkeypatch.setattr(device.Processes, "stop_signal", lambda self, looks=looks: 0 if next(looks, None) == 0 else 15)
        said = run_here("train.py", *RUN, *options, *["--init_from=resume"] * bool(n_starts))
        stopped, n_starts = "stopped by SIGTERM" in said.stdout, n_starts + 1
        assert said.returncode == (143 if stopped else 0) and n_starts < 30, said.stderr
        if stopped:
            with open("out/log.jsonl", "a", encoding="utf-8") as log:  # a run killed behind its checkpoint has logged more
                log.write('{"step": 99, "loss": 1.0}\n{"step": 99, "lo')
            torch.manual_seed(n_starts)  # a new process would not go on with this one's random numbers either
    assert n_starts > 1 and timeless("out") == timeless("whole")
    for name in ("ckpt.pt", "best.pt"):
        one, other = load(f"out/{name}"), load(f"whole/{name}")
        for key in ("model", "iter_num", "best_val_loss"):
            assert same(one[key], other[key]), (name, key)
    assert same(load("out/ckpt.pt")["optimizer"]["state"], load("whole/ckpt.pt")["optimizer"]["state"])
    assert sorted(os.listdir("out")) == sorted(os.listdir("whole"))


def test_a_loaded_model_decides_its_sizes(tokens, small_model):
    made = dict(budget="1M")
    checkpoint.save("start.pt", small_model, config=made)  # 2 blocks of 64 in 1 head; (32, 64) with 1 and 2 factors
    run_train("--init_from=start.pt", "--max_iters=1")
    assert load("out/ckpt.pt")["config"]["init_options"] == made
    succeed("train.py", *RUN_OF_A_CHECKPOINT, "--init_from=resume", "--max_iters=2")
    config = load("out/ckpt.pt")["config"]
    assert config["init_from"] == "start.pt" and config["init_options"] == made
    run_train("--out_dir=scratch", "--max_iters=1")
    run_train("--out_dir=scratch", "--max_iters=2", "--init_from=resume")  # with the same sizes, which RUN has
    options = [*RUN_OF_A_CHECKPOINT, "--out_dir=scratch"]
    for start in "start.pt", "resume":
        for wrong in ("--n_layer=12", "--n_head=1", "--dim_1=32", "--factors=1"):
            line = refused("train.py", *options, f"--init_from={start}", "--overwrite", wrong)
            assert line == f"error: {wrong}: the model of --init_from={start} decides its sizes; omit it\n"
    succeed("train.py", *options, "--max_iters=3", "--init_from=resume")
    run_train("--out_dir=scratch", "--max_iters=4", "--init_from=resume")
    assert load("scratch/ckpt.pt")["config"]["factors"] == "2,3" and load("scratch/ckpt.pt")["iter_num"] == 4


def test_a_resume_without_best_pt_finds_a_new_one(tokens):
    """As after a copy of ckpt.pt alone: what is said to be in best.pt is there."""
    run_train("--max_iters=10", "--lr_decay_iters=20", "--out_dir=first")
    Path("out").mkdir()
    shutil.copy("first/ckpt.pt", "out/ckpt.pt")
    said = run_train("--init_from=resume", "--learning_rate=30", "--max_iters=11")  # which makes it worse
    best = load("out/best.pt")["best_val_loss"]
    assert said.stdout.splitlines()[-1] == f"done: best validation loss {best:.4f}, in out/best.pt"


@pytest.mark.parametrize("interval", ["--eval_interval=100", "--eval_interval=1"])
def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoint(interval, tokens):
    run_train("--max_iters=4")
    before = load("out/ckpt.pt")
    assert "not finite" in refused("train.py", *RUN, "--init_from=resume", "--learning_rate=1e30", "--grad_clip=0",
                                   "--decay_lr=False", interval)
    assert load("out/ckpt.pt")["iter_num"] == 4 and same(load("out/ckpt.pt")["model"], before["model"])


def test_learning_rate_warms_up_and_decays_to_its_lowest(monkeypatch):
    for name, value in dict(learning_rate=1.0, warmup_iters=10, max_iters=110, lr_decay_iters=None, min_lr=0.2).items():
        monkeypatch.setattr(train, name, value)
    steps = [0, 9, 10, 35, 60, 110, 500]
    expected = [1 / 11, 10 / 11, 1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.2, 0.2]
    assert [train.learning_rate_at(step) for step in steps] == pytest.approx(expected)
    monkeypatch.setattr(train, "min_lr", None)
    assert train.learning_rate_at(500) == pytest.approx(0.1)
    monkeypatch.setattr(train, "lr_decay_iters", 60)
    assert [train.learning_rate_at(step) for step in (35, 60, 110)] == pytest.approx([0.55, 0.1, 0.1])
    monkeypatch.setattr(train, "decay", "linear")
    assert [train.learning_rate_at(step) for step in (10, 35, 60, 110)] == pytest.approx([1.0, 0.5, 0.0, 0.0])
    monkeypatch.setattr(train, "min_lr", 0.2)
    assert [train.learning_rate_at(step) for step in (35, 60)] == pytest.approx([0.6, 0.2])
    monkeypatch.setattr(train, "decay_lr", False)
    assert [train.learning_rate_at(step) for step in (0, 10, 110)] == pytest.approx([1 / 11, 1.0, 1.0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_trains_like_float32(dtype, tokens):
    run_train("--out_dir=full")
    run_train("--out_dir=half", f"--dtype={dtype}")
    full, half = losses_of("full"), losses_of("half")
    assert full != half
    assert list(half.values()) == pytest.approx(list(full.values()), abs=0.05)
    norms = [[entry["grad_norm"] for entry in log_of(run) if "loss" in entry] for run in ("full", "half")]
    assert norms[1] == pytest.approx(norms[0], rel=0.1), "clipped before the gradients were unscaled"


def overflow_above(scale, monkeypatch):
    """Let gradients overflow where the scaler multiplies the loss by more than a number."""
    unscale = torch.amp.GradScaler.unscale_

    def unscale_(scaler, optimizer):
        if scaler.is_enabled() and scaler.get_scale() > scale:
            optimizer.param_groups[0]["params"][0].grad.view(-1)[0] = math.inf
        return unscale(scaler, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", unscale_)


def test_a_step_whose_gradients_overflow_is_skipped_and_the_run_resumes_bit_for_bit(tokens, monkeypatch):
    overflow_above(2**12, monkeypatch)  # the scale begins at 2**16
    options = ["--dtype=float16", "--dropout=0.2", "--log_interval=1"]
    run_train(*options)
    norms = [entry["grad_norm"] for entry in log_of("out") if "loss" in entry]
    assert norms[:4] == [None] * 4 and None not in norms[4:]
    whole = load("out/ckpt.pt")
    assert whole["scaler"]["scale"] == 2**12 and whole["scaler"]["_growth_tracker"] == 16
    assert {float(state["step"]) for state in whole["optimizer"]["state"].values()} == {16}
    for first in (2, 10):  # amid the skipped steps, and after them
        parts = f"--out_dir=parts{first}"
        run_train(*options, parts, f"--max_iters={first}", "--lr_decay_iters=20")
        if first == 2:
            start = load("parts2/ckpt.pt")
            assert start["scaler"]["scale"] == 2**14 and start["best_val_loss"] == log_of("parts2")[0]["val_loss"]
        run_train(*options, parts, "--init_from=resume")
        resumed = load(f"parts{first}/ckpt.pt")
        for key in ("model", "optimizer", "scaler"):
            assert same(whole[key], resumed[key]), key


def test_gradients_that_overflow_at_every_scale_end_the_run(tokens, monkeypatch):
    overflow_above(0, monkeypatch)
    line = refused("train.py", *RUN, "--dtype=float16", "--max_iters=60", "--eval_interval=100")
    assert f"is not finite after step {train.MOST_SKIPPED + 1} " in line and "--dtype=float32" in line


def test_a_float16_run_resumes_from_a_float32_one(tokens):
    run_train("--max_iters=2")
    run_train("--max_iters=4", "--init_from=resume", "--dtype=float16")
    assert load("out/ckpt.pt")["scaler"]["_growth_tracker"] == 2
    run_train("--init_from=resume", "--max_iters=5")  # which needs none


def test_a_resume_takes_the_moments_from_the_file_and_the_options_from_the_command_line(tokens):
    run_train("--max_iters=3", "--lr_decay_iters=20")
    before = load("out/ckpt.pt")["optimizer"]
    said = run_train("--init_from=resume", "--max_iters=4", "--lr_decay_iters=20", "--weight_decay=0.9", "--beta1=0.5",
                     "--factor_lr_scale=7")
    assert "resumed with --weight_decay=0.9, where it was 0.1\n" in said.stdout and said.stdout.count("resumed with") == 4
    content = load("out/ckpt.pt")
    groups, moments, rate = content["optimizer"]["param_groups"], content["optimizer"]["state"], log_of("out")[-2]["lr"]
    assert [group["weight_decay"] for group in groups] == [0.9, 0.9, 0.0]
    assert [group["betas"] for group in groups] == [(0.5, 0.95)] * 3
    assert [group["lr"] for group in groups] == [7 * rate, rate, rate]
    assert {int(state["step"]) for state in moments.values()} == {4}
    # a second moment that decays from the file's by beta2 cannot be smaller
    assert all((moments[i]["exp_avg_sq"] >= 0.9499 * state["exp_avg_sq"]).all() for i, state in before["state"].items())


def test_wandb_keeps_an_offline_run(tokens, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    run_train("--wandb_mode=offline", "--max_iters=2")
    assert len(list(Path("wandb").glob("offline-run-*/*.wandb"))) == 1


def test_half_of_what_torchrun_sets_is_one_line(tokens, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "RANK expected, but not set" in refused("train.py", *RUN) and not Path("out").exists()


def test_accumulation_must_be_shared_out_evenly():
    with pytest.raises(UserError, match="steps=40 cannot be divided evenly among 3 processes"):
        train.check_options(3)


def test_distillation_goes_on_where_it_stopped_and_pulls_towards_the_teacher(tokens):
    run_train("--out_dir=teacher", "--max_iters=60", "--eval_interval=60")
    taught = ["--teacher=teacher/best.pt", "--distill=0.9", "--temperature=2", "--features=0.5", "--seed=3"]
    run_train("--out_dir=whole", *taught)
    run_train("--out_dir=parts", *taught, "--max_iters=10", "--lr_decay_iters=20")
    run_train("--out_dir=parts", *taught, "--init_from=resume", "--lr_decay_iters=20")
    run_train("--out_dir=alone", "--seed=3")
    whole, parts, alone, teacher = (checkpoint.load(f"{name}/ckpt.pt")[0] for name in ("whole", "parts", "alone", "teacher"))
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), parts.parameters()))
    x = torch.from_numpy(tokens[:160]).view(10, 16)
    with torch.no_grad():
        taught, untaught, target = (torch.log_softmax(model(x), -1) for model in (whole, alone, teacher))
    assert (target.exp() * (target - taught)).sum() < (target.exp() * (target - untaught)).sum()


def test_a_teacher_of_other_tokens_is_refused(tokens, small_model):
    small_model.config.tokenizer = dict(name="of another kind", path=None)
    checkpoint.save("teacher.pt", small_model)
    line = refused("train.py", *RUN, "--teacher=teacher.pt")
    assert "of another kind tokens, and the model one of 256, of bytes tokens" in line


@pytest.fixture
def mixed_start(tokens, mixed_model):
    """A checkpoint in which all four matrices are factored, in shapes that differ from block to block."""
    checkpoint.save("mixed.pt", mixed_model)
    return ["--init_from=mixed.pt", "--block_size=16", "--max_iters=12", "--eval_interval=6", "--learning_rate=1e-3"]


def test_attention_and_mlps_in_shapes_of_their_own_train_and_resume(mixed_start):
    run_train(*mixed_start, "--dropout=0.2")
    run_train(*mixed_start, "--dropout=0.2", "--out_dir=parts", "--max_iters=6", "--lr_decay_iters=12")
    run_train(*mixed_start, "--dropout=0.2", "--out_dir=parts", "--init_from=resume", "--lr_decay_iters=12")
    for key in ("model", "optimizer", "best_val_loss"):
        assert same(load("out/ckpt.pt")[key], load("parts/ckpt.pt")[key]), key
    start, end = load("mixed.pt"), load("out/ckpt.pt")  # beside an optimizer's state, both sides of low rank are whole
    before, after = to_file_names(checkpoint.load("mixed.pt")[0].state_dict()), end["model"]
    assert before.keys() == after.keys() and start["model_args"]["shapes"] == end["model_args"]["shapes"]
    assert all(not torch.equal(p, after[name]) for name, p in before.items() if p.numel() > 1)  # everything is trained


@pytest.mark.parametrize("case", ["factored MLPs", "all matrices, taught"])
def test_two_processes_give_the_losses_of_one(case, mixed_start):
    """The accumulation is shared among them, and the evaluation, whose 5 batches they cannot share evenly."""
    options = [*RUN, "--max_iters=30", "--eval_iters=5", "--batch_size=1"]
    if case == "all matrices, taught":
        run_train(*mixed_start, "--max_iters=60", "--eval_interval=60", "--out_dir=teacher")
        options = [*RUN_OF_A_CHECKPOINT, *mixed_start, "--teacher=teacher/best.pt"]
    succeed("train.py", *options, "--out_dir=one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    said = subprocess.run([*command, *options, "--out_dir=two"], capture_output=True, text=True, timeout=200,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert said.returncode == 0, said.stderr
    one, two = losses_of("one"), losses_of("two")
    assert list(one) == list(two) and list(two.values()) == pytest.approx(list(one.values()), abs=1e-4)
    evaluations = [[entry["val_loss"] for entry in log_of(run) if "val_loss" in entry] for run in ("one", "two")]
    assert evaluations[1] == pytest.approx(evaluations[0], abs=1e-4)
    for ours, theirs in zip(load("one/ckpt.pt")["model"].values(), load("two/ckpt.pt")["model"].values()):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
