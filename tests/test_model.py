"""KronyGPT against torch.kron, transformers' GPT-2 and plain loops."""
import math
import re

import numpy as np
import pytest
import torch
from conftest import (
    continuation,
    gpt2_weights,
    kinds_of_shape,
    kron_sum,
    load_gpt2,
    random_tokens,
    randomize_vectors,
    to_gpt2,
)
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kronygpt import checkpoint
from model import IGNORE_INDEX, KronLinear, KronyGPT, KronyGPTConfig, Shape, mlp_shapes

MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def tiny(**changes):
    torch.manual_seed(0)
    return KronyGPT(KronyGPTConfig(**dict(dict(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32), **changes)))


def of_every_kind(**sizes):
    """Shapes of all four matrices: a Kronecker sum in the first block, low rank in the second."""
    config = KronyGPTConfig(n_layer=2, n_head=2, n_embd=32, **sizes)
    return {name: kinds_of_shape(m, n)[:2] for name, (m, n) in config.sizes(0).items()}


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


@pytest.mark.parametrize("n_inner", [96, 1])
def test_an_mlp_may_have_any_width(n_inner):
    model = tiny(n_inner=n_inner, shapes={"mlp.c_fc": [(16, 1, 2), (32, n_inner, 1)]})
    randomize_vectors(model)
    idx, targets = random_tokens(2, 16, vocab_size=64), random_tokens(2, 16, vocab_size=64).flip(0)
    assert model.config.n_inner == [n_inner] * 2 and model.transformer.h[0].mlp.c_fc.bias.shape == (n_inner,)
    torch.testing.assert_close(model(idx), to_gpt2(model)(idx).logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradients(model, idx, targets), expected_gradients(model, idx, targets), rtol=1e-4, atol=1e-6)


def test_loss_is_the_mean_cross_entropy_of_the_logits(model):
    idx, targets = random_tokens(3, 32), random_tokens(3, 32).flip(0)
    logits = model(idx).detach().double().numpy()
    logits -= logits.max(axis=-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    nats = -np.take_along_axis(log_p, targets.numpy()[..., None], axis=-1)[..., 0]
    assert model(idx, targets).item() == pytest.approx(nats.mean(), abs=1e-5)
    scored = random_tokens(3, 32, vocab_size=2).bool()
    scored[0] = False
    loss = model(idx, targets.masked_fill(~scored, IGNORE_INDEX))
    assert loss.shape == () and loss.item() == pytest.approx(nats[scored.numpy()].mean(), abs=1e-5)


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


def test_a_sequence_longer_than_the_context_is_refused(small_model):
    with pytest.raises(ValueError, match="33 tokens do not fit into the context of 32"):
        small_model(random_tokens(1, 33))


def test_dropout_acts_in_training_only():
    model = tiny(dropout=0.5)
    idx = random_tokens(1, 8, vocab_size=64)
    model.train()
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


def test_bfloat16_autocast_is_close_to_float32(model):
    idx = random_tokens(4, 33)
    loss = model(idx[:, :-1], idx[:, 1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(idx[:, :-1], idx[:, 1:])
    assert rounded.item() == pytest.approx(loss.item(), rel=1e-2) and rounded.item() != loss.item()
    rounded.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


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

def test_a_matrix_without_a_shape_is_dense():
    config = KronyGPTConfig(n_layer=2, n_head=2, n_embd=32, n_inner=96, shapes={"attn.c_proj": [(32, 1, 3), [8, 4, 2]]})
    assert list(config.sizes(0).items()) == [("attn.c_attn", (32, 96)), ("attn.c_proj", (32, 32)), ("mlp.c_fc", (32, 96)),
                                             ("mlp.c_proj", (96, 32))]
    assert config.shapes == {"attn.c_attn": [(32, 96, 1)] * 2, "attn.c_proj": [(32, 1, 3), (8, 4, 2)],
                             "mlp.c_fc": [(32, 96, 1)] * 2, "mlp.c_proj": [(96, 32, 1)] * 2}
    assert all(isinstance(shape, Shape) for shapes in config.shapes.values() for shape in shapes)
    assert KronyGPTConfig(n_layer=2, n_head=2, n_embd=32).n_inner == [128, 128]


def test_mlp_shapes_are_mirrored_and_have_one_number_of_factors_per_block():
    model = tiny(n_layer=3, shapes=mlp_shapes(16, 64, (3, 1, 2)))
    shapes = [[tuple(side.shape) for matrix in (block.mlp.c_fc, block.mlp.c_proj) for side in (matrix.A, matrix.B)]
              for block in model.transformer.h]
    assert shapes == [[(r, 16, 64), (r, 2, 2), (r, 64, 16), (r, 2, 2)] for r in (3, 1, 2)]
    assert all(block.attn.c_attn.is_dense and block.attn.c_proj.is_dense for block in model.transformer.h)


def test_a_config_survives_as_plain_types(mixed_model):
    args = mixed_model.config.as_plain_types()
    assert KronyGPTConfig(**args) == mixed_model.config
    assert all(type(shapes) is list and all(type(shape) is tuple for shape in shapes) for shapes in args["shapes"].values())


@pytest.mark.parametrize("changes, message", [
    (dict(shapes={"mlp.c_fc": [(16, 64, 1), (5, 64, 1)]}), "mlp.c_fc [32, 128] cannot have the shape (5, 64, 1)"),
    (dict(shapes={"attn.c_attn": [(32, 64, 1)] * 2}), "attn.c_attn [32, 96] cannot have the shape (32, 64, 1)"),
    (dict(shapes={"mlp.c_proj": [(128, 32, 1)] * 2}, n_inner=64), "mlp.c_proj [64, 32] cannot have the shape (128, 32, 1)"),
    (dict(shapes=mlp_shapes(16, 64, (2, -1))), "cannot have the shape (16, 64, -1)"),
    (dict(shapes=mlp_shapes(16, 64, (1, 2, 3))), "mlp.c_fc has 3 shapes for 2 blocks"),
    (dict(shapes={"mlp.c_gate": []}), "a block has no matrix mlp.c_gate"),
    (dict(n_head=3), "n_head=3 does not divide n_embd=32"),
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


@pytest.mark.parametrize("dim_1, dim_2, r", [(128, 256, 3), (32, 64, 4), (8, 256, 2), (1, 1, 1)])
def test_initial_mlp_weights_have_the_size_of_gpt2s(dim_1, dim_2, r):
    check_standard_deviations(tiny(n_layer=3, n_embd=128, n_head=4, shapes=mlp_shapes(dim_1, dim_2, [r] * 3)), rel=0.1)


@pytest.mark.parametrize("kind", range(5), ids=["Kronecker", "low rank", "mirror image", "pruned", "dense"])
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


@pytest.mark.parametrize("shape, side", [((1, 1, 1), "A"), ((1, 1, 3), "A"), ((12, 40, 3), "B"), ((12, 40, 1), "B")])
def test_an_initial_side_of_one_element_is_1(shape, side):
    for seed in range(4):
        torch.manual_seed(seed)
        linear = KronLinear(12, 40, shape)
        with torch.no_grad():
            linear.init_weights(0.02)
        assert (getattr(linear, side) == 1).all()


def test_initial_weights_of_the_dense_model_are_gpt2s():
    model = tiny(n_layer=3, n_embd=128, n_head=4)
    check_standard_deviations(model, rel=0.02)
    assert all(matrix.B.tolist() == [[[1.0]]] and not matrix.B.requires_grad for _, _, matrix in model.matrices())
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    assert model.transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.transformer.wpe.weight.std().item() == pytest.approx(0.02, rel=0.05)


# the parameters

def test_embedding_and_output_are_one_parameter(gpt2_dir):
    for model in tiny(), checkpoint.load(str(gpt2_dir))[0]:
        assert model.count_parameters()["total"] == sum(p.numel() for p in model.parameters())
        model.transformer.wte.weight.data.zero_()
        assert not model(random_tokens(1, 8, vocab_size=64)).any()


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


def test_matrices_are_listed_in_the_order_of_application(mixed_model):
    layers, kinds, matrices = zip(*mixed_model.matrices())
    assert layers == tuple(layer for layer in range(5) for _ in MATRICES) and kinds == MATRICES * 5
    for layer, kind, matrix in zip(layers, kinds, matrices):
        assert matrix is mixed_model.get_submodule(f"transformer.h.{layer}.{kind}")


@pytest.mark.parametrize("shapes", [{}, mlp_shapes(32, 128, (2, 1)), mlp_shapes(1, 1, (1, 1)), of_every_kind()],
                         ids=["dense", "one dense block", "numbers", "every kind"])
def test_optimizer_groups_hold_every_trainable_parameter_once(shapes):
    model = tiny(shapes=shapes)
    groups = model.configure_optimizers(1e-3, 0.1, (0.9, 0.95), factor_lr_scale=5.0).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        assert group["param_names"] == [names[id(p)] for p in group["params"]]
        for name in group["param_names"]:
            is_factor = name.endswith((".A", ".B")) and not model.get_submodule(name[:-2]).is_dense
            is_vector = name.endswith("bias") or ".ln_" in name
            assert group["weight_decay"] == (0.0 if is_vector else 0.1), name
            assert group["lr_scale"] == (5.0 if is_factor else 1.0), name
            assert group["lr"] == 1e-3 * group["lr_scale"] and group["betas"] == (0.9, 0.95)


def test_the_factors_alone_can_be_trained():
    shapes = of_every_kind() | {"mlp.c_fc": [(32, 128, 1), (16, 64, 2)]}  # one is dense
    model = tiny(shapes=shapes)
    model.freeze_all_but_factors()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = model.configure_optimizers(1e-2, 0.1, (0.9, 0.95))
    assert all(p.requires_grad for group in optimizer.param_groups for p in group["params"])
    idx = random_tokens(4, 17, vocab_size=64)
    model(idx[:, :-1], idx[:, 1:]).backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    factored = {f"transformer.h.{layer}.{name}" for layer in range(2) for name in MATRICES} - {"transformer.h.0.mlp.c_fc"}
    assert changed == {f"{name}.{side}" for name in factored for side in "AB"}


@pytest.mark.parametrize("shapes", [{}, {name: [(m, 1, 4)] * 2 for name, (m, n) in tiny().config.sizes(0).items()}],
                         ids=["dense", "low rank"])
def test_flops_of_a_step_are_three_times_those_that_torch_counts_forward(shapes):
    model = tiny(shapes=shapes, block_size=16)
    for context in None, 8:
        T = context or 16
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            model(random_tokens(8, T, vocab_size=64))
        assert model.flops_per_token(context) * 8 * T == 3 * counter.get_total_flops()


def test_from_state_dict_takes_the_tensors_and_checks_them(mixed_model):
    args, state_dict = mixed_model.config.as_plain_types(), mixed_model.state_dict()
    again = KronyGPT.from_state_dict(args, state_dict)
    assert all(p.data_ptr() == state_dict[name].data_ptr() for name, p in again.state_dict().items())
    changes = {"transformer.h.2.attn.c_attn.A": torch.ones(3, 3, 3), "transformer.h.9.x": torch.ones(2),
               "transformer.h.4.mlp.c_proj.B": None}
    for name, p in changes.items():
        changed = {key: value for key, value in {**state_dict, name: p}.items() if value is not None}
        found = "missing" if p is None else tuple(p.shape)
        with pytest.raises(ValueError, match=re.escape(f"weight {name} is {found}, where the model has")):
            KronyGPT.from_state_dict(args, changed)


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


def test_generation_samples_the_softmax_of_the_scaled_logits(small_model):
    idx = random_tokens(1, 4).expand(4000, -1)
    logits = to_gpt2(small_model)(idx[:1]).logits[0, -1].detach() / 0.25
    top = logits.topk(5)
    tokens = continuation(small_model, idx, 1, temperature=0.25, top_k=5, seed=0)[:, -1]
    shares = torch.stack([(tokens == token).float().mean() for token in top.indices])
    assert shares.sum() == 1
    torch.testing.assert_close(shares, F.softmax(top.values, dim=0), rtol=0, atol=0.03)


def test_generation_uses_no_dropout():
    model, idx = tiny(dropout=0.9), random_tokens(1, 3, vocab_size=64)
    text = continuation(model.train(), idx, 8, temperature=0)
    assert torch.equal(text, continuation(model.eval(), idx, 8, temperature=0))


def test_a_generator_gives_each_token_when_it_is_asked_for(small_model):
    idx = random_tokens(2, 30)
    tokens = small_model.generate(idx, 5, temperature=0)
    first, second = next(tokens), next(tokens)
    assert first.shape == (2, 1)
    assert torch.equal(torch.cat((idx, first, second), dim=1), continuation(small_model, idx, 2, temperature=0))


def test_a_negative_temperature_is_refused(small_model):
    """It would choose the least likely tokens."""
    with pytest.raises(ValueError, match="temperature is at least 0, not -1"):
        continuation(small_model, random_tokens(1, 4), 1, temperature=-1)


def test_logits_that_are_not_finite_are_refused(small_model):
    with torch.no_grad():
        small_model.transformer.ln_f.bias[0] = math.nan
    with pytest.raises(ValueError, match="logits are not finite"):
        continuation(small_model, random_tokens(1, 4), 1, temperature=0)
