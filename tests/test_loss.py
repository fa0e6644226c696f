"""The losses of model.py and distillation.py against torch's losses of whole logits, and against the formula."""
import pytest
import torch
from conftest import random_tokens
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

import model as model_module
from kronygpt.distillation import Distillation, distillation_loss
from model import IGNORE_INDEX, KronyGPT, KronyGPTConfig, linear_cross_entropy, mlp_shapes

T, C, VOCAB_SIZE = 32, 8, 64


@pytest.fixture
def in_chunks(monkeypatch):
    """The losses take three tokens at once."""
    monkeypatch.setattr(model_module, "chunk_rows", lambda parts, dtype: 3)


@pytest.fixture
def problem():
    """Hidden states, an output matrix and targets, of which a fifth is ignored: a whole chunk, and single ones."""
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(*size, generator=generator).requires_grad_() for size in ((T, C), (VOCAB_SIZE, C)))
    targets = random_tokens(T, vocab_size=VOCAB_SIZE)
    targets[5:11] = targets[20] = IGNORE_INDEX
    return x, W, targets


@pytest.fixture
def teacher():
    """Hidden states, narrower than the student's, and their output matrix."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(T, 5, generator=generator), torch.randn(VOCAB_SIZE, 5, generator=generator)


def distillation_by_formula(x, W, targets, teacher_x, teacher_W, share, temperature):
    kept = targets != IGNORE_INDEX
    logits, soft = (x @ W.T)[kept], ((teacher_x @ teacher_W.T)[kept] / temperature).softmax(1)
    kl = (soft * (soft.log() - (logits / temperature).softmax(1).log())).sum(1).mean()
    nats = -logits.softmax(1).log()[torch.arange(len(logits)), targets[kept]].mean()
    return share * temperature**2 * kl + (1 - share) * nats


def gradients(value, *inputs):
    return torch.autograd.grad(value / 4, inputs)  # a scale that is not 1, as in gradient accumulation


def largest_tensor(function):
    """The largest number of float32s that torch allocates at once, also inside its own operations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    return max(event.self_cpu_memory_usage for event in profiled.events()) // 4


@pytest.mark.parametrize("logits_at_once", [1, 64, 200, 1000, 10**9])
def test_loss_and_gradients_do_not_depend_on_the_chunks(logits_at_once, problem, monkeypatch):
    monkeypatch.setattr(model_module, "chunk_rows", lambda parts, dtype: max(1, logits_at_once // VOCAB_SIZE))
    monkeypatch.setattr(model_module, "SLICE", logits_at_once)
    x, W, targets = problem
    expected = F.cross_entropy(x @ W.T, targets)
    found = linear_cross_entropy(x, [W], targets)
    evaluated = torch.no_grad()(linear_cross_entropy)(x, [W], targets)
    torch.testing.assert_close((found, evaluated), (expected, expected), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients(found, x, W), gradients(expected, x, W), rtol=1e-4, atol=1e-7)


def test_gradients_of_frozen_inputs_are_not_needed(problem, in_chunks):
    x, W, targets = problem
    for frozen_x, frozen_W in ((x.detach(), W), (x, W.detach())):
        trained = W if frozen_W is W else x
        expected = gradients(F.cross_entropy(frozen_x @ frozen_W.T, targets), trained)
        found = gradients(linear_cross_entropy(frozen_x, [frozen_W], targets), trained)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert not linear_cross_entropy(x.detach(), [W.detach()], targets).requires_grad


def test_a_batch_with_nothing_to_score_has_loss_0_and_no_gradient(problem, teacher, in_chunks):
    x, W, targets = problem
    ignored = torch.full_like(targets, IGNORE_INDEX)
    for value in (linear_cross_entropy(x, [W], ignored),
                  distillation_loss(x, [W], ignored, teacher[0], teacher[1:], 0.5, 2.0)):
        assert value.item() == 0
        assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(value, x, W))


def test_training_under_autocast_is_close_to_float32(problem, teacher, in_chunks):
    x, W, targets = problem
    losses = [lambda: linear_cross_entropy(x, [W], targets),
              lambda: distillation_loss(x, [W], targets, teacher[0], teacher[1:], 0.5, 2.0)]
    for compute in losses:
        expected = compute()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = compute()
            with torch.no_grad():
                evaluated = compute()
        assert found.dtype == evaluated.dtype == torch.float32
        assert found.item() == pytest.approx(expected.item(), rel=1e-2) and found.item() != expected.item()
        torch.testing.assert_close(evaluated, found, rtol=1e-6, atol=0)
        for rounded, exact in zip(gradients(found, x, W), gradients(expected, x, W)):
            assert rounded.dtype == torch.float32
            assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_the_sum_over_chunks_under_autocast_is_not_rounded(monkeypatch):
    """37 chunks, as of 12,288 tokens at GPT-2's vocabulary: a sum in bfloat16 is 5 % off."""
    n_tokens, vocab_size = 37 * 16, 256
    monkeypatch.setattr(model_module, "chunk_rows", lambda parts, dtype: 16)
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(*size, generator=generator).requires_grad_() for size in ((n_tokens, C), (vocab_size, C)))
    targets = random_tokens(n_tokens)
    expected = F.cross_entropy(x @ W.T, targets)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_cross_entropy(x, [W], targets)
    assert found.item() == pytest.approx(expected.item(), rel=2e-3)
    for rounded, exact in zip(gradients(found, x, W), gradients(expected, x, W)):
        assert (rounded - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distillation_is_divergence_and_cross_entropy(share, temperature, problem, teacher, in_chunks):
    x, W, targets = problem
    expected = distillation_by_formula(x, W, targets, *teacher, share, temperature)
    found = distillation_loss(x, [W], targets, teacher[0], teacher[1:], share, temperature)
    assert found.shape == ()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(found, x, W), gradients(expected, x, W), rtol=1e-4, atol=1e-6)


def tiny(n_embd=32, **changes):
    torch.manual_seed(n_embd)
    return KronyGPT(KronyGPTConfig(**dict(dict(block_size=16, vocab_size=VOCAB_SIZE, n_layer=1, n_head=2, n_embd=n_embd),
                                          **changes)))


def test_features_are_compared_behind_each_block_in_the_metric():
    student, teacher_model = tiny(16, n_layer=3), tiny(16, n_layer=3, n_head=4)
    with torch.no_grad():
        teacher_model.transformer.wte.weight.mul_(3)
    idx, roots, states = random_tokens(2, 16, vocab_size=VOCAB_SIZE), torch.randn(3, 16, 9), ([], [])
    for model, found in zip((student, teacher_model), states):
        for block in model.transformer.h:
            block.register_forward_hook(lambda block, inputs, output, found=found: found.append(output.detach().double()))
    with torch.no_grad():
        plain, both = (Distillation(student, teacher_model, 0.5, 1.0, weight, roots)(idx, idx) for weight in (0.0, 4.0))
    expected = 0.0
    for R, x, y in zip(roots.double(), states[0], states[1]):
        F_l = R @ R.T
        expected += sum(e @ F_l @ e / 2 for e in (x - y).view(-1, 16)) / (3 * 32)
    assert (both - plain).item() == pytest.approx(4 * expected.item(), rel=1e-4)
    with pytest.raises(ValueError, match="shorter"):
        Distillation(student, tiny(16), 0.5, 1.0, 1.0, roots)(idx, idx)


def test_a_student_learns_from_a_teacher_of_another_width(in_chunks):
    student, teacher_model = tiny(32, shapes=mlp_shapes(16, 64, [2])), tiny(48, dropout=0.5)
    distillation = Distillation(student, teacher_model, 0.3, 2.0)
    idx, targets = random_tokens(2, 16, vocab_size=VOCAB_SIZE), random_tokens(2, 16, vocab_size=VOCAB_SIZE).flip(0)
    targets[0, 3:9] = IGNORE_INDEX
    trained = [p for p in distillation.parameters() if p.requires_grad]
    assert {id(p) for p in trained} == {id(p) for p in student.parameters()}
    one_hot = torch.eye(VOCAB_SIZE)  # an output matrix that makes hidden states of logits
    expected = distillation_by_formula(student(idx).flatten(0, 1), one_hot, targets.flatten(),
                                       teacher_model(idx).flatten(0, 1), one_hot, 0.3, 2.0)
    found = distillation(idx, targets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(found, *trained), gradients(expected, *trained), rtol=1e-4, atol=1e-6)


def test_logits_are_never_whole_in_memory(monkeypatch):
    n_tokens, vocab_size = 64, 512
    monkeypatch.setattr(model_module, "chunk_rows", lambda parts, dtype: 4)
    monkeypatch.setattr(model_module, "SLICE", 4 * vocab_size)
    x, W = torch.randn(n_tokens, C, requires_grad=True), torch.randn(vocab_size, C, requires_grad=True)
    targets, teacher = random_tokens(n_tokens), (torch.randn(n_tokens, 5), torch.randn(vocab_size, 5))
    assert largest_tensor(lambda: F.cross_entropy(x @ W.T, targets).backward()) == n_tokens * vocab_size
    assert largest_tensor(lambda: linear_cross_entropy(x, [W], targets).backward()) <= W.numel()
    distill = lambda: distillation_loss(x, [W], targets, teacher[0], teacher[1:], 0.5, 2.0)  # noqa: E731
    assert largest_tensor(lambda: distill().backward()) <= W.numel()
    with torch.no_grad():
        assert largest_tensor(lambda: linear_cross_entropy(x, [W], targets)) <= 4 * vocab_size


# inductor's own code takes a C++ compiler and ten seconds
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_compiled_loss_is_the_eager_one(backend, problem, in_chunks):
    x, W, targets = problem
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend=backend)
    for _ in range(2):  # the second step finds it compiled
        expected, found = F.cross_entropy(x @ W.T, targets), compiled(x, [W], targets)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradients(found, x, W), gradients(expected, x, W), rtol=1e-4, atol=1e-7)
