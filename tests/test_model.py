"""KronyGPT against torch.kron, transformers' GPT-2 and plain loops."""
import math
import re

import pytest
import torch
from conftest import continuation, gpt2_weights, kinds_of_shape, kron_sum, load_gpt2, random_tokens, to_gpt2
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kronygpt import checkpoint
from model import KronLinear, KronyGPT, KronyGPTConfig, KVCache, mlp_shapes, take_columns


def tiny(**changes):
    torch.manual_seed(0)
    return KronyGPT(KronyGPTConfig(**dict(dict(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32), **changes)))


def of_every_kind():
    """Shapes of all four matrices: a Kronecker sum in the first block, low rank in the second."""
    return {name: kinds_of_shape(m, n)[:2] for name, (m, n) in tiny().config.sizes(0).items()}


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def gradients(model, idx, targets):
    """The loss, and its gradient by each parameter."""
    loss = model(idx, targets)
    return loss, torch.autograd.grad(loss, list(trained(model).values()))


def expected_gradients(model, idx, targets):
    """The same of transformers' GPT-2, by the parameters that the KronyGPT has."""
    logits = functional_call(to_gpt2(model), gpt2_weights(model), (idx,)).logits
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    return loss, torch.autograd.grad(loss, list(trained(model).values()))


@pytest.fixture(params=["small_model", "mixed_model"])
def model(request):
    return request.getfixturevalue(request.param)


# the function

@torch.no_grad()
def test_logits_are_those_of_transformers_gpt2(model):
    idx = random_tokens(3, 32)
    expected = to_gpt2(model)(idx).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(model(idx), expected, rtol=0, atol=1e-5)


def test_gradients_are_those_of_transformers_gpt2(model):
    idx, targets = random_tokens(3, 32), random_tokens(3, 32).flip(0)
    torch.testing.assert_close(gradients(model, idx, targets), expected_gradients(model, idx, targets), rtol=1e-4, atol=1e-6)


def test_recomputing_the_activation_changes_nothing():
    idx, targets = random_tokens(2, 16, vocab_size=64), random_tokens(2, 16, vocab_size=64).flip(0)
    kept, found = [], []
    for recompute in False, True:
        model = tiny(shapes=of_every_kind(), dropout=0.3, recompute=recompute)
        saved = []
        torch.manual_seed(1)  # of dropout
        with torch.autograd.graph.saved_tensors_hooks(lambda p, saved=saved: saved.append(p.numel()) or p, lambda p: p):
            found.append(gradients(model, idx, targets))
        kept.append(sum(saved))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    assert kept[1] <= kept[0] - 2 * idx.numel() * 4 * 32  # an activation in each block


def test_dropout_acts_in_training_only():
    model = tiny(dropout=0.5).train()
    idx = random_tokens(1, 8, vocab_size=64)
    assert not torch.equal(model(idx), model(idx))
    text = continuation(model, idx, 8, temperature=0)
    model.eval()
    assert torch.equal(model(idx), model(idx)) and torch.equal(continuation(model, idx, 8, temperature=0), text)


# inductor's own code takes a C++ compiler and a minute
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_takes_batches_of_any_size_in_one_graph(backend):
    torch.compiler.reset()
    shapes = {kind: [shapes[i % 2]] for i, (kind, shapes) in enumerate(of_every_kind().items())}
    model, graphs = tiny(n_layer=1, shapes=shapes), CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for size in (4, 16), (3, 12), (5, 8):
        idx, targets = random_tokens(*size, vocab_size=64), random_tokens(*size, vocab_size=64).flip(0)
        expected, found = gradients(model, idx, targets), compiled(idx, targets)
        found = found, torch.autograd.grad(found, list(trained(model).values()))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert graphs.frame_count == 2  # the first size has one for itself, the others share the second


# the configuration

@pytest.mark.parametrize("changes, message", [
    (dict(shapes={"mlp.c_proj": [(128, 32, 1)] * 2}, n_inner=64), "mlp.c_proj [64, 32] cannot have the shape (128, 32, 1)"),
    (dict(shapes=mlp_shapes(16, 64, (2, -1))), "cannot have the shape (16, 64, -1)"),
    (dict(shapes={"mlp.c_gate": []}), "a block has no matrix mlp.c_gate"),
], ids=str)
def test_config_refuses_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        KronyGPTConfig(**dict(dict(n_layer=2, n_head=2, n_embd=32), **changes))


# the initial weights

def check_standard_deviations(model, rel):
    for _, name, matrix in model.matrices():
        std = 0.02 / math.sqrt(2 * model.config.n_layer) if name.endswith("c_proj") else 0.02
        assert kron_sum(matrix.A, matrix.B).std().item() == pytest.approx(std, rel=rel), name
        assert not matrix.bias.any()


@pytest.mark.parametrize("kind", range(4), ids=["Kronecker", "low rank", "mirror image", "pruned"])
def test_initial_weights_of_all_four_matrices_have_the_size_of_gpt2s(kind):
    matrices = KronyGPTConfig(n_layer=3, n_embd=128, n_head=4).sizes(0)
    shapes = {name: [kinds_of_shape(m, n)[kind]] * 3 for name, (m, n) in matrices.items()}
    check_standard_deviations(tiny(n_layer=3, n_embd=128, n_head=4, shapes=shapes), rel=0.1)


def test_initial_sides_share_their_scale():
    """Their steps under Adam are then alike."""
    linear = KronLinear(256, 256, (16, 16, 4))
    with torch.no_grad():
        linear.init_weights(0.02)
    assert linear.A.std().item() == pytest.approx(math.sqrt(0.02 / 2), rel=0.1)
    assert linear.B.std().item() == pytest.approx(math.sqrt(0.02 / 2), rel=0.1)


def test_initial_weights_of_the_dense_model_are_gpt2s():
    model = tiny(n_layer=3, n_embd=128, n_head=4)
    check_standard_deviations(model, rel=0.02)
    assert all(matrix.B.tolist() == [[[1.0]]] and not matrix.B.requires_grad for _, _, matrix in model.matrices())
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    assert model.transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.transformer.wpe.weight.std().item() == pytest.approx(0.02, rel=0.05)


# the parameters

def test_the_dense_model_has_the_parameters_of_gpt2():
    with torch.device("meta"):
        counts = KronyGPT(KronyGPTConfig()).count_parameters()
    assert counts["total"] == 124_439_808 and counts["factors"] == 0
    assert counts["mlp"] == 12 * (2 * 4 * 768**2 + 5 * 768)


def test_parameters_are_counted_by_kind():
    counts = tiny(shapes=mlp_shapes(16, 64, (1, 2))).count_parameters()  # C = 32, so that B is [2, 2]
    factors = 3 * 2 * (16 * 64 + 2 * 2)
    vectors = 2 * (4 * 32 + 3 * 32 + 32 + 128 + 32) + 2 * 32
    matrices = 64 * 32 + 16 * 32 + 2 * 4 * 32 * 32
    assert counts == dict(total=factors + vectors + matrices, mlp=factors + 2 * (128 + 32), factors=factors,
                          matrices=matrices, vectors=vectors)


@pytest.mark.parametrize("shapes", [{}, {name: [(m, 1, 4)] * 2 for name, (m, n) in tiny().config.sizes(0).items()}],
                         ids=["dense", "low rank"])
def test_flops_of_a_step_are_three_times_those_that_torch_counts_forward(shapes):
    model = tiny(shapes=shapes, block_size=16)
    for context in None, 8:
        T = context or 16
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(random_tokens(8, T, vocab_size=64))
        assert model.flops_per_token(context) * 8 * T == 3 * counter.get_total_flops()


# generation

def greedy_by_transformers(hf_model, idx, n, block_size):
    for _ in range(n):
        logits = hf_model(idx[:, -block_size:]).logits[:, -1]
        top = logits.topk(2).values
        assert (top[:, 0] - top[:, 1]).min() > 1e-4  # or rounding may choose the token
        idx = torch.cat((idx, logits.argmax(-1, keepdim=True)), dim=1)
    return idx


@torch.no_grad()
@pytest.mark.parametrize("batch, n_prompt, n", [(1, 1, 40), (3, 5, 12), (2, 31, 3), (2, 32, 3), (1, 40, 3)])
@pytest.mark.parametrize("source", ["gpt2_dir", "mixed_model"])
def test_greedy_generation_is_the_loop_over_transformers_logits(source, batch, n_prompt, n, request):
    source, idx = request.getfixturevalue(source), random_tokens(batch, n_prompt)
    is_dense = not isinstance(source, KronyGPT)
    model, theirs = (checkpoint.load(str(source))[0], load_gpt2(source)) if is_dense else (source, to_gpt2(source))
    expected = greedy_by_transformers(theirs, idx, n, block_size=32)
    assert torch.equal(continuation(model, idx, n, temperature=0), expected)
    assert torch.equal(continuation(model, idx, n, top_k=1), expected)


@torch.no_grad()
def test_generation_with_the_cache_is_generation_without(mixed_model):
    idx, generator = random_tokens(3, 5), torch.Generator().manual_seed(7)
    found = continuation(mixed_model, idx, 20, seed=7)
    for _ in range(20):
        idx = torch.cat((idx, torch.multinomial(mixed_model(idx)[:, -1].softmax(-1), 1, generator=generator)), dim=1)
    assert torch.equal(found, idx)


def test_columns_are_taken_in_the_dtype_that_they_have():
    x = torch.arange(12.0).view(3, 4).bfloat16()
    with torch.autocast("cpu"):  # which casts what gather() takes to float32
        found = take_columns(x, torch.tensor([2, 0]))
    assert found.dtype == torch.bfloat16 and found.tolist() == [[2, 0], [6, 4], [10, 8]]


@torch.no_grad()
def test_a_step_is_the_same_for_every_token_where_a_tensor_holds_its_place(mixed_model):
    idx, cache, counter = random_tokens(2, 12), KVCache(12), CompileCounterWithBackend("eager")
    step = torch.compile(mixed_model.next_logits, backend=counter, fullgraph=True)
    mixed_model.next_logits(idx[:, :5], cache)
    cache.position = torch.tensor([0])
    for i in range(5, 12):
        cache.position.fill_(i)
        torch.testing.assert_close(step(idx[:, i:i + 1], cache), mixed_model(idx[:, :i + 1])[:, -1])
    assert counter.frame_count == 1


@torch.no_grad()
def test_a_vocabulary_that_is_multiplied_out_ends_in_zeros():
    model = KronyGPT(KronyGPTConfig(block_size=8, vocab_size=251, n_layer=1, n_head=2, n_embd=16))
    idx = random_tokens(1, 8) % 251
    found = model.multiplied_out()(idx)
    torch.testing.assert_close(found[..., :251], model(idx))
    assert found.shape[-1] == 256 and not found[..., 251:].any()


def test_generation_samples_the_softmax_of_the_scaled_logits(small_model):
    idx = random_tokens(1, 4).expand(4000, -1)
    logits = to_gpt2(small_model)(idx[:1]).logits[0, -1].detach() / 0.25
    top = logits.topk(5)
    tokens = continuation(small_model, idx, 1, temperature=0.25, top_k=5, seed=0)[:, -1]
    shares = torch.stack([(tokens == token).float().mean() for token in top.indices])
    assert shares.sum() == 1
    torch.testing.assert_close(shares, F.softmax(top.values, dim=0), rtol=0, atol=0.03)


def test_what_has_no_sensible_answer_is_refused(small_model):
    with pytest.raises(ValueError, match="33 tokens do not fit into the context of 32"):
        small_model(random_tokens(1, 33))
    with pytest.raises(ValueError, match="temperature is at least 0, not -1"):  # which would choose the least likely tokens
        continuation(small_model, random_tokens(1, 4), 1, temperature=-1)
    torch.nn.init.constant_(small_model.transformer.ln_f.bias, math.nan)
    with pytest.raises(ValueError, match="logits are not finite"):
        continuation(small_model, random_tokens(1, 4), 1, temperature=0)
