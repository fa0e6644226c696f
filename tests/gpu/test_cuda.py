"""The model and train.py on CUDA, beside the CPU: `pytest -m gpu`. Skipped where there is no CUDA."""
import copy
import os
import re
import sys

import pytest
import torch
from conftest import StandIn, continuation, random_tokens, refused, succeed
from test_train import RUN, load, losses_of, run_train, same
from test_widths import EMBEDDINGS, narrow_model
from torch.nn.parallel import DistributedDataParallel

from kronygpt import calibration, checkpoint, compress, data
from kronygpt.device import default_dtype
from model import KronyGPT, KronyGPTConfig, mlp_shapes

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before CUDA starts: cuBLAS is deterministic with it
DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")]


@pytest.fixture
def exact():
    """float32 products in float32, and deterministic algorithms."""
    torch.set_float32_matmul_precision("highest")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def gradients(model, x, y):
    model.zero_grad()
    loss = model(x, y)
    loss.backward()
    return loss.item(), {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def odd_model():
    """A vocabulary of an odd number of tokens, as GPT-2 has."""
    torch.manual_seed(0)
    return KronyGPT(KronyGPTConfig(block_size=32, vocab_size=251, n_layer=2, n_head=2, n_embd=64)).eval()


@pytest.fixture(params=["mixed_model", "odd_model", *EMBEDDINGS])
def any_model(request):
    return narrow_model(request.param) if request.param in EMBEDDINGS else request.getfixturevalue(request.param)


def test_logits_and_gradients_are_those_of_the_cpu(any_model, exact):
    vocab_size = any_model.config.vocab_size
    x, y = random_tokens(3, 33)[:, :-1] % vocab_size, random_tokens(3, 33)[:, 1:] % vocab_size
    on_gpu = copy.deepcopy(any_model).to(DEVICE)
    with torch.no_grad():
        torch.testing.assert_close(on_gpu(x.to(DEVICE)).cpu(), any_model(x), rtol=1e-3, atol=1e-3)
        assert on_gpu(x.to(DEVICE), y.to(DEVICE)).item() == pytest.approx(any_model(x, y).item(), rel=1e-4)
    (loss, expected), (gpu_loss, found) = gradients(any_model, x, y), gradients(on_gpu, x.to(DEVICE), y.to(DEVICE))
    assert gpu_loss == pytest.approx(loss, rel=1e-4)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-2, atol=1e-3 * gradient.abs().max().item(), msg=name)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        gpu_loss, found = gradients(on_gpu, x.to(DEVICE), y.to(DEVICE))
    assert gpu_loss == pytest.approx(loss, rel=0.02)
    for name in ("transformer.ln_f.weight", "transformer.h.0.ln_1.weight"):
        assert (found[name] - expected[name]).norm() < 0.1 * expected[name].norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_training_steps_are_those_of_the_cpu(dtype, tokens):
    run_train("--out_dir=cpu", "--device=cpu", "--dtype=float32")
    said = run_train(f"--device={DEVICE}", f"--dtype={dtype}")
    assert list(losses_of("out").values()) == pytest.approx(list(losses_of("cpu").values()), abs=0.05)
    assert " tokens/s | " in said.stdout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_resumed_run_is_the_uninterrupted_one(dtype, tokens, exact):
    options = [f"--device={DEVICE}", f"--dtype={dtype}", "--dropout=0.2"]
    run_train(*options)
    run_train(*options, "--out_dir=parts", "--max_iters=10", "--lr_decay_iters=20")
    torch.manual_seed(99)
    run_train(*options, "--out_dir=parts", "--init_from=resume")
    whole, parts = load("out/ckpt.pt"), load("parts/ckpt.pt")
    for key in ("model", "optimizer", "scaler", "best_val_loss"):
        assert same(whole[key], parts[key]), key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_five_steps_never_wait_for_the_gpu(dtype, tokens, monkeypatch):
    """Nothing between two lines of progress reads a number from the GPU, so that the CPU runs ahead."""
    def batch_starts(n_tokens, context, seed, step, size):
        torch.cuda.set_sync_debug_mode("error" if 2 <= step < 7 else "default")
        return data.batch_starts(n_tokens, context, seed, step, size)

    monkeypatch.setitem(sys.modules, "kronygpt.data", StandIn(data, batch_starts=batch_starts))
    try:
        run_train(f"--device={DEVICE}", f"--dtype={dtype}", "--dropout=0.1", "--max_iters=9", "--log_interval=8",
                  "--eval_interval=8", "--lr_decay_iters=9")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_fit_is_that_of_the_cpu(gpt2_dir, tokens, exact):
    dense, _ = checkpoint.load(gpt2_dir)
    text, shapes, logits = random_tokens(64, 32), mlp_shapes(64, 1, [24, 24]), []
    fisher = calibration.statistics(dense, text).fisher  # for both: labels are drawn from each device's own numbers
    for where in ("cpu", DEVICE):
        new, there = compress.factorize(dense, shapes).to(where), {name: F.to(where) for name, F in fisher.items()}
        calibration.calibrate(copy.deepcopy(dense).to(where), new, text.to(where), there)
        with torch.no_grad():
            logits.append(new.cpu().eval()(text[:4]))
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=0.01 * logits[0].std().item())


def test_a_whole_model_by_budget_loses_as_much_as_on_the_cpu(gpt2_dir, tokens):
    added = []
    for where in ("cpu", DEVICE):
        said = succeed("kron_decompose.py", "--budget=70%", f"--init_from={gpt2_dir}", "--calibrate=tiny", "--round_ranks=1",
                       "--calibration_tokens=4096", f"--device={where}", f"--out={where}.pt")
        added.append(float(re.search(r"per token, (-?[\d.]+) added", said.stdout)[1]))
        assert said.stderr.count("WARN") == 0
    assert abs(added[1] - added[0]) < 0.02, added


@pytest.mark.parametrize("stored", [False, True])
def test_greedy_generation_is_that_of_the_cpu(any_model, stored, workdir, exact):
    idx = random_tokens(2, 20) % any_model.config.vocab_size  # 12 with a cache, then the window slides
    if stored:
        checkpoint.save("model.pt", any_model)
        any_model, _ = checkpoint.load("model.pt", as_stored=True)
    on_gpu = copy.deepcopy(any_model).to(DEVICE)
    expected = continuation(any_model, idx, 24, temperature=0)
    assert torch.equal(continuation(on_gpu, idx.to(DEVICE), 24, temperature=0).cpu(), expected)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_compiled_model_trains_as_the_eager_one(steps, tokens):
    options = [f"--device={DEVICE}", "--max_iters=10", f"--gradient_accumulation_steps={steps}"]
    run_train(*options)
    run_train(*options, "--compile=True", "--out_dir=compiled")
    assert list(losses_of("compiled").values()) == pytest.approx(list(losses_of("out").values()), abs=0.05)


def test_gradients_of_one_process_over_nccl_are_those_without(mixed_model, tmp_path, exact):
    model = mixed_model.to(DEVICE)
    x, y = random_tokens(3, 33)[:, :-1].to(DEVICE), random_tokens(3, 33)[:, 1:].to(DEVICE)
    _, expected = gradients(model, x, y)
    torch.distributed.init_process_group("nccl" if DEVICE == "cuda" else "gloo", init_method=f"file://{tmp_path}/store",
                                         rank=0, world_size=1)
    try:
        _, found = gradients(DistributedDataParallel(model, broadcast_buffers=False), x, y)
    finally:
        torch.distributed.destroy_process_group()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[f"module.{name}"], gradient, msg=name)


def test_memory_that_is_too_small_is_one_line(tokens):
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.005)
    try:
        line = refused("train.py", *RUN, f"--device={DEVICE}", "--batch_size=65536", "--eval_interval=100")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory: lower --batch_size" in line and "--recompute=True" in line


def test_the_default_dtype_is_one_that_the_gpu_computes_in(tokens):
    dtype = default_dtype(torch.device(DEVICE))
    assert dtype == ("bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float16")
    run_train(f"--device={DEVICE}", "--max_iters=2")
