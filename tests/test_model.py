"""KronyGPT against torch.kron, transformers' GPT-2 and plain loops."""
import math
from itertools import product

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from model import (
    IGNORE_INDEX,
    KronyGPT,
    KronyGPTConfig,
    ModelError,
    Teacher,
    check_is_gpt2,
    kron_linear,
    kron_weight,
)

# Sides m1, n1, m2, n2 of A and B: each equal to 1 in turn and together, then narrow and wide ones.
SIDES = [*product((1, 3), (1, 4), (1, 2), (1, 5)), (2, 2, 2, 2), (8, 32, 1, 1), (1, 1, 8, 32), (4, 32, 2, 1), (16, 2, 2, 16),
         (2, 16, 16, 2), (6, 5, 4, 7), (12, 1, 1, 48), (2, 3, 20, 4), (3, 2, 4, 20), (2, 2, 24, 24)]
ORDERS = (None, "A", "B", "W")  # of contraction; None leaves the choice to kron_linear


def tiny(**changes):
    torch.manual_seed(0)
    return KronyGPT(KronyGPTConfig(**dict(dict(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32), **changes)))


def random_tokens(*shape, vocab_size=256):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


def load_transformers(directory):
    from transformers import GPT2LMHeadModel

    return GPT2LMHeadModel.from_pretrained(directory).eval()


def kron_sum(A, B):
    return sum(torch.kron(a, b) for a, b in zip(A, B))


@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_kron_linear_is_the_product_with_the_sum_of_torch_kron(sides):
    m1, n1, m2, n2 = sides
    generator = torch.Generator().manual_seed(0)
    for r, shape in product((1, 3), ((), (1,), (7,), (2, 1), (3, 50))):
        A, B, x, bias, weight = (torch.randn(*size, generator=generator).requires_grad_() for size in (
            (r, m1, n1), (r, m2, n2), (*shape, m1 * m2), (n1 * n2,), (*shape, n1 * n2)))
        expected = x.double() @ kron_sum(A.double(), B.double()) + bias.double()
        wanted = torch.autograd.grad((expected * weight).sum(), (x, A, B, bias))
        for order in ORDERS:
            y = kron_linear(x, A, B, bias, order)
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
            gradients = torch.autograd.grad((y * weight).sum(), (x, A, B, bias))
            torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(kron_weight(A, B), kron_sum(A, B), rtol=1e-6, atol=1e-6)


def test_kron_linear_takes_inputs_that_are_not_contiguous():
    x, A, B = torch.randn(12, 6).T, torch.randn(2, 5, 3).mT, torch.randn(2, 2, 4).mT
    for order in ORDERS:
        torch.testing.assert_close(kron_linear(x, A, B, torch.zeros(10), order), x @ kron_sum(A, B), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sides", [(768, 768, 1, 4), (384, 3072, 2, 1), (64, 128, 12, 24)], ids=str)
def test_kron_linear_at_the_size_of_gpt2(sides):
    m1, n1, m2, n2 = sides
    generator = torch.Generator().manual_seed(0)
    A, B, x = (torch.randn(*size, generator=generator) for size in ((2, m1, n1), (2, m2, n2), (9, m1 * m2)))
    A, B = A / A.norm(), B / B.norm()
    for tokens in (x[:1], x):
        torch.testing.assert_close(kron_linear(tokens, A, B, torch.zeros(n1 * n2)), tokens @ kron_sum(A, B),
                                   rtol=1e-5, atol=1e-5)


def test_from_pretrained_has_the_logits_of_transformers(gpt2_dir):
    idx = random_tokens(3, 32)
    with torch.no_grad():
        ours, theirs = KronyGPT.from_pretrained(gpt2_dir).eval()(idx), load_transformers(gpt2_dir)(idx).logits
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_random_gpt2_124m_has_the_logits_of_transformers(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(GPT2Config()).eval()
    theirs.save_pretrained(tmp_path)
    ours = KronyGPT.from_pretrained(tmp_path).eval()
    assert ours.count_parameters()["total"] == sum(p.numel() for p in theirs.parameters()) == 124_439_808
    idx = random_tokens(2, 64, vocab_size=50257)
    with torch.no_grad():
        torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=0, atol=1e-4)


def test_to_transformers_has_the_same_logits(small_model):
    idx = random_tokens(2, 32)
    hf_model = small_model.to_transformers()
    with torch.no_grad():
        torch.testing.assert_close(hf_model(idx).logits, small_model(idx), rtol=0, atol=1e-5)
    mlp = hf_model.transformer.h[1].mlp
    ours = small_model.transformer.h[1].mlp
    torch.testing.assert_close(mlp.c_fc.weight, kron_sum(ours.c_fc_0, ours.c_fc_1))
    torch.testing.assert_close(mlp.c_proj.weight, kron_sum(ours.c_proj_0, ours.c_proj_1))


def test_check_is_gpt2_refuses_what_krony_gpt_does_not_compute():
    from transformers import GPT2Config, LlamaConfig

    check_is_gpt2(GPT2Config(), "good")
    check_is_gpt2(GPT2Config(n_embd=64, n_inner=256), "good")
    with pytest.raises(ModelError, match="a llama model, not a GPT-2"):
        check_is_gpt2(LlamaConfig(), "other")
    for name, value in dict(activation_function="relu", layer_norm_epsilon=1e-6, scale_attn_weights=False, n_inner=100,
                            scale_attn_by_inverse_layer_idx=True, tie_word_embeddings=False).items():
        with pytest.raises(ModelError, match=f"other is a GPT-2 with {name}={value}"):
            check_is_gpt2(GPT2Config(**{name: value}), "other")


def test_config_keeps_one_number_of_factors_per_layer():
    assert KronyGPTConfig(n_layer=3).factors == (1, 1, 1)
    assert KronyGPTConfig(n_layer=3, factors=2).factors == (2, 2, 2)
    assert KronyGPTConfig(n_layer=3, factors=[3, 1, 2]).factors == (3, 1, 2)
    model = tiny(n_layer=3, factors=(3, 1, 2), dim_1=16, dim_2=64)
    shapes = [[tuple(p.shape) for p in (mlp.c_fc_0, mlp.c_fc_1, mlp.c_proj_0, mlp.c_proj_1)]
              for mlp in (block.mlp for block in model.transformer.h)]
    assert shapes == [[(r, 16, 64), (r, 2, 2), (r, 64, 16), (r, 2, 2)] for r in (3, 1, 2)]


@pytest.mark.parametrize("changes, message", [
    (dict(dim_1=5), "dim_1=5 does not divide n_embd=32"),
    (dict(dim_1=64), "dim_1=64 does not divide n_embd=32"),
    (dict(dim_2=48), "dim_2=48 does not divide 4 . n_embd=128"),
    (dict(dim_1=-4), "dim_1 must be at least 1"),
    (dict(dim_2=0), "dim_2 must be at least 1"),
    (dict(n_head=3), "n_head=3 does not divide n_embd=32"),
    (dict(n_layer=0), "n_layer must be at least 1"),
    (dict(factors=(1, 2, 3)), "3 numbers of factors for 2 layers"),
    (dict(factors=0), "the number of factors must be at least 1"),
    (dict(factors=(2, -1)), "the number of factors must be at least 1"),
    (dict(dropout=1.0), "dropout must be in"),
])
def test_config_refuses_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ModelError, match=message):
        KronyGPTConfig(**dict(dict(n_layer=2, n_head=2, n_embd=32), **changes))


@pytest.mark.parametrize("dim_1, dim_2, r", [
    (128, 512, 1), (128, 128, 1), (128, 256, 3), (64, 512, 1), (32, 64, 1), (32, 64, 4), (16, 32, 2), (8, 256, 2), (1, 1, 1),
])
def test_initial_mlp_weights_have_the_size_of_gpt2s(dim_1, dim_2, r):
    model = tiny(n_layer=3, n_embd=128, n_head=4, dim_1=dim_1, dim_2=dim_2, factors=r)
    for block in model.transformer.h:
        for (A, B), std in zip(block.mlp.factor_pairs(), (0.02, 0.02 / math.sqrt(6))):
            assert kron_sum(A, B).std().item() == pytest.approx(std, rel=0.1)


def test_initial_weights_of_the_dense_model_are_gpt2s():
    model = tiny(n_layer=3, n_embd=128, n_head=4)
    for block in model.transformer.h:
        for (A, B), std in zip(block.mlp.factor_pairs(), (0.02, 0.02 / math.sqrt(6))):
            assert B.tolist() == [[[1.0]]]
            assert A.std().item() == pytest.approx(std, rel=0.02)
        assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert block.attn.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(6), rel=0.02)
        assert all(not p.any() for name, p in block.named_parameters() if name.endswith("bias"))
    assert model.transformer.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.transformer.wpe.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not any(B.requires_grad for block in model.transformer.h for _, B in block.mlp.factor_pairs())


def test_an_untrained_model_is_as_good_as_a_guess():
    model = tiny(n_layer=4, n_embd=64, dim_1=32, dim_2=64, factors=3, vocab_size=256)
    idx = random_tokens(8, 17)
    assert model(idx[:, :-1], idx[:, 1:]).item() == pytest.approx(math.log(256), abs=0.1)


def test_embedding_and_output_are_one_parameter(gpt2_dir):
    for model in tiny(), KronyGPT.from_pretrained(gpt2_dir):
        assert model.lm_head.weight is model.transformer.wte.weight
        assert model.count_parameters()["total"] == sum({id(p): p.numel() for p in model.parameters()}.values())
        model.lm_head.weight.data.zero_()
        assert not model.transformer.wte.weight.any()


def test_parameters_are_counted_by_kind():
    counts = tiny(dim_1=16, dim_2=64, factors=(1, 2)).count_parameters()  # C = 32, so that B is [2, 2]
    factors = 3 * 2 * (16 * 64 + 2 * 2)
    vectors = 2 * (4 * 32 + 3 * 32 + 32 + 128 + 32) + 2 * 32
    matrices = 64 * 32 + 16 * 32 + 2 * 4 * 32 * 32
    assert counts == dict(total=factors + vectors + matrices, mlp=factors + 2 * (128 + 32), factors=factors,
                          matrices=matrices, vectors=vectors)


def test_loss_is_the_mean_cross_entropy_of_the_logits(small_model):
    idx, targets = random_tokens(3, 32), random_tokens(3, 32).flip(0)
    logits = small_model(idx).detach().double().numpy()
    logits -= logits.max(axis=-1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    nats = -np.take_along_axis(log_p, targets.numpy()[..., None], axis=-1)[..., 0]
    assert small_model(idx, targets).item() == pytest.approx(nats.mean(), abs=1e-5)
    scored = random_tokens(3, 32, vocab_size=2).bool()
    scored[0] = False
    loss = small_model(idx, targets.masked_fill(~scored, IGNORE_INDEX))
    assert loss.shape == () and loss.item() == pytest.approx(nats[scored.numpy()].mean(), abs=1e-5)


def test_gradients_of_the_loss_are_those_of_transformers(gpt2_dir):
    ours, theirs = KronyGPT.from_pretrained(gpt2_dir).eval(), load_transformers(gpt2_dir)
    idx = random_tokens(3, 33)
    (0.5 * ours(idx[:, :-1], idx[:, 1:])).backward()
    (0.5 * F.cross_entropy(theirs(idx[:, :-1]).logits.flatten(0, 1), idx[:, 1:].flatten())).backward()
    for block, their_block in zip(ours.transformer.h, theirs.transformer.h):
        for p, q in ((block.mlp.c_fc_0.grad[0], their_block.mlp.c_fc.weight.grad),
                     (block.mlp.c_proj_0.grad[0], their_block.mlp.c_proj.weight.grad),
                     (block.mlp.c_fc_bias.grad, their_block.mlp.c_fc.bias.grad),
                     (block.attn.c_attn.weight.grad.T, their_block.attn.c_attn.weight.grad)):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    for name in "wte", "wpe":
        p, q = (model.transformer.get_submodule(name).weight.grad for model in (ours, theirs))
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_the_loss_in_chunks_has_the_gradients_of_cross_entropy(monkeypatch):
    monkeypatch.setattr("model.LOGITS_AT_ONCE", 200)  # three tokens of 64 logits
    model = tiny(dim_1=16, dim_2=64)
    idx, targets = random_tokens(2, 16, vocab_size=64), random_tokens(2, 16, vocab_size=64).flip(0)
    targets[0, 3:9] = IGNORE_INDEX
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = model(idx, targets)
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss / 4, parameters), torch.autograd.grad(expected / 4, parameters),
                               rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share, temperature", [(0.5, 1.0), (0.3, 2.5), (1.0, 2.0), (0.0, 1.0)])
def test_distillation_is_cross_entropy_and_divergence(share, temperature, monkeypatch):
    monkeypatch.setattr("model.LOGITS_AT_ONCE", 200)  # three tokens of 64 logits
    model = tiny(dim_1=16, dim_2=64)
    idx, targets = random_tokens(2, 16, vocab_size=64), random_tokens(2, 16, vocab_size=64).flip(0)
    targets[0, 3:9] = IGNORE_INDEX
    x, W = torch.randn(2, 16, 5), torch.randn(64, 5)
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = model(idx, targets, Teacher(x, W, share, temperature))
    logits, kept = model(idx).flatten(0, 1), targets.flatten() != IGNORE_INDEX
    soft = F.kl_div(F.log_softmax(logits[kept] / temperature, 1), F.softmax((x @ W.T).flatten(0, 1)[kept] / temperature, 1),
                    reduction="batchmean")
    expected = (1 - share) * F.cross_entropy(logits[kept], targets.flatten()[kept]) + share * temperature**2 * soft
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(loss / 4, parameters), torch.autograd.grad(expected / 4, parameters),
                               rtol=1e-4, atol=1e-6)


def test_a_sequence_longer_than_the_context_is_refused(small_model):
    with pytest.raises(ModelError, match="33 tokens do not fit into the context of 32"):
        small_model(random_tokens(1, 33))


def greedy_by_transformers(hf_model, idx, n, block_size):
    for _ in range(n):
        logits = hf_model(idx[:, -block_size:]).logits[:, -1]
        top = logits.topk(2).values
        assert (top[:, 0] - top[:, 1]).min() > 1e-4  # or rounding may choose the token
        idx = torch.cat((idx, logits.argmax(-1, keepdim=True)), dim=1)
    return idx


@torch.no_grad()
@pytest.mark.parametrize("batch, n_prompt, n", [(1, 1, 40), (3, 5, 12), (2, 31, 3), (2, 32, 3), (1, 40, 3)])
def test_greedy_generation_is_the_loop_over_transformers_logits(gpt2_dir, batch, n_prompt, n):
    model, idx = KronyGPT.from_pretrained(gpt2_dir), random_tokens(batch, n_prompt)
    expected = greedy_by_transformers(load_transformers(gpt2_dir), idx, n, block_size=32)
    assert torch.equal(model.generate(idx, n, temperature=0), expected)
    assert torch.equal(model.generate(idx, n, top_k=1), expected)


def test_generation_with_a_seed_repeats_itself(small_model):
    idx = random_tokens(2, 4)
    first = small_model.generate(idx, 40, seed=1)
    torch.manual_seed(5)
    assert torch.equal(first, small_model.generate(idx, 40, seed=1))
    assert not torch.equal(first, small_model.generate(idx, 40, seed=2))
    assert torch.equal(first[:, :4], idx)


def test_generation_samples_the_softmax_of_the_scaled_logits(small_model):
    idx = random_tokens(1, 4).expand(4000, -1)
    logits = small_model.to_transformers()(idx[:1]).logits[0, -1].detach() / 0.25
    top = logits.topk(5)
    tokens = small_model.generate(idx, 1, temperature=0.25, top_k=5, seed=0)[:, -1]
    shares = torch.stack([(tokens == token).float().mean() for token in top.indices])
    assert shares.sum() == 1
    torch.testing.assert_close(shares, F.softmax(top.values, dim=0), rtol=0, atol=0.03)


def test_generation_leaves_the_mode_as_it_was_and_uses_no_dropout():
    model = tiny(dropout=0.9)
    idx = random_tokens(1, 3, vocab_size=64)
    model.train()
    text = model.generate(idx, 8, temperature=0)
    assert model.training
    assert torch.equal(text, model.eval().generate(idx, 8, temperature=0)) and not model.training


def test_dropout_acts_in_training_only():
    model = tiny(dropout=0.5)
    idx = random_tokens(1, 8, vocab_size=64)
    model.train()
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


@pytest.mark.parametrize("shape", [{}, dict(dim_1=16, dim_2=64), dict(dim_1=32, dim_2=128, factors=2),
                                   dict(dim_1=1, dim_2=1), dict(dim_1=16, dim_2=64, factors=(1, 3))], ids=str)
def test_optimizer_groups_hold_every_trainable_parameter_once(shape):
    model = tiny(**shape)
    groups = model.configure_optimizers(1e-3, 0.1, (0.9, 0.95), factor_lr_scale=5.0).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        for name in (names[id(p)] for p in group["params"]):
            is_factor = name.endswith(("_0", "_1"))
            is_vector = name.endswith("bias") or ".ln_" in name
            assert group["weight_decay"] == (0.0 if is_vector else 0.1), name
            assert group["lr_scale"] == (5.0 if is_factor else 1.0), name
            assert group["lr"] == 1e-3 * group["lr_scale"] and group["betas"] == (0.9, 0.95)


def test_the_factors_alone_can_be_trained():
    model = tiny(dim_1=16, dim_2=64, factors=2)
    model.freeze_all_but_factors()
    before = {name: p.clone() for name, p in model.named_parameters()}
    optimizer = model.configure_optimizers(1e-2, 0.1, (0.9, 0.95))
    assert all(p.requires_grad for group in optimizer.param_groups for p in group["params"])
    idx = random_tokens(4, 17, vocab_size=64)
    model(idx[:, :-1], idx[:, 1:]).backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    sides = ("c_fc_0", "c_fc_1", "c_proj_0", "c_proj_1")
    assert changed == {f"transformer.h.{layer}.mlp.{side}" for layer in range(2) for side in sides}


def test_bfloat16_autocast_is_close_to_float32(small_model):
    idx = random_tokens(4, 33)
    loss = small_model(idx[:, :-1], idx[:, 1:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = small_model(idx[:, :-1], idx[:, 1:])
    assert rounded.item() == pytest.approx(loss.item(), rel=1e-2) and rounded.item() != loss.item()
    rounded.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small_model.parameters() if p.requires_grad)
