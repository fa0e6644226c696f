"""Models of narrower heads and fewer hidden units, in memory, in files and for transformers, against a plain loop."""
import math

import pytest
import torch
from conftest import continuation, named_matrices, random_tokens, randomize_vectors, run_here
from transformers import GPT2LMHeadModel

from kronygpt import checkpoint, narrow
from kronygpt.budget import plan_widths
from kronygpt.calibration import statistics
from kronygpt.compress import apply
from kronygpt.modeling_kronygpt import KronyGPTForCausalLM
from model import KronyGPT, KronyGPTConfig

HEADS, HEAD_DIM = 4, 16
IDX = random_tokens(2, 20)


@pytest.fixture
def model():
    """Three blocks with widths of their own, the last one's as in GPT-2, and each kind of shape."""
    torch.manual_seed(0)
    model = KronyGPT(KronyGPTConfig(
        block_size=32, vocab_size=256, n_layer=3, n_head=HEADS, n_embd=64, head_qk=[5, 9, 16], head_v=[7, 3, 16],
        n_inner=[100, 64, 256], shapes={
            "attn.c_attn": [(64, 1, 6), (64, 84, 1), (1, 192, 60)], "attn.c_proj": [(28, 64, 1), (12, 1, 5), (8, 8, 2)],
            "mlp.c_fc": [(64, 1, 10), (8, 8, 2), (1, 256, 10)], "mlp.c_proj": [(1, 64, 20), (64, 1, 64), (256, 1, 64)]}))
    randomize_vectors(model)
    with torch.no_grad():  # at 0.02 the logits hardly depend on the blocks
        for *_, matrix in model.matrices():
            matrix.A.mul_(4)
    return model.eval()


@torch.no_grad()
def plain_logits(model, idx):
    x = model.transformer.wte(idx) + model.transformer.wpe.weight[:idx.shape[1]]
    future = torch.ones(idx.shape[1], idx.shape[1]).triu(1).bool()
    for block, qk, v in zip(model.transformer.h, model.config.head_qk, model.config.head_v):
        attn, mlp, outputs = block.attn, block.mlp, []
        q, k, values = (block.ln_1(x) @ attn.c_attn.weight + attn.c_attn.bias).split([HEADS * qk, HEADS * qk, HEADS * v], -1)
        for h in range(HEADS):
            scores = q[..., h * qk:(h + 1) * qk] @ k[..., h * qk:(h + 1) * qk].mT / math.sqrt(HEAD_DIM)
            outputs.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ values[..., h * v:(h + 1) * v])
        x = x + torch.cat(outputs, -1) @ attn.c_proj.weight + attn.c_proj.bias
        hidden = torch.nn.functional.gelu(block.ln_2(x) @ mlp.c_fc.weight + mlp.c_fc.bias, approximate="tanh")
        x = x + hidden @ mlp.c_proj.weight + mlp.c_proj.bias
    return model.transformer.ln_f(x) @ model.transformer.wte.weight.T


def greedy(model, n=12):
    idx = IDX[:, :4]
    for _ in range(n):
        idx = torch.cat((idx, plain_logits(model, idx)[:, -1:].argmax(-1)), 1)
    return idx


@torch.no_grad()
def test_the_model_is_a_plain_loop_over_heads(model):
    expected = plain_logits(model, IDX)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(IDX), expected, rtol=0, atol=1e-5)
    assert torch.equal(continuation(model, IDX[:, :4], 12, temperature=0), greedy(model))
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(IDX), expected, rtol=0, atol=1e-5)


def test_a_file_holds_each_rank_once(model, tmp_path):
    checkpoint.save(tmp_path / "a.pt", model)
    content = torch.load(tmp_path / "a.pt", weights_only=True)["model"]
    numbers = sum(p.numel() for name, p in content.items() if not name.endswith(("_pivots", "lm_head.weight")))
    low_rank = [(matrix.weight.shape, len(matrix.A)) for *_, matrix in model.matrices()
                if 1 in (matrix.A.shape[1], matrix.A.shape[2]) and len(matrix.A) < len(matrix.weight)]
    assert len(low_rank) == 7
    whole = sum(p.numel() for p in model.parameters())
    assert numbers == model.count_parameters()["total"] == whole - sum(r * r for _, r in low_rank)
    again, _ = checkpoint.load(str(tmp_path / "a.pt"))
    assert again.config == model.config
    for (name, p), (_, q) in zip(named_matrices(model), named_matrices(again)):
        assert (p.weight - q.weight).norm() <= 1e-6 * p.weight.norm(), name


@torch.no_grad()
@pytest.mark.parametrize("compressed", [True, False])
def test_exports_compute_the_same(model, compressed, workdir):
    """Of the dense one, transformers' own GPT-2."""
    checkpoint.save("a.pt", model)
    said = run_here("kron_to_gpt.py", "a.pt", "made", f"--compressed={compressed}")
    assert said.returncode == 0, said.stderr
    exported = (KronyGPTForCausalLM if compressed else GPT2LMHeadModel).from_pretrained("made").eval()
    for attention in "eager", "sdpa":
        exported.set_attn_implementation(attention)
        torch.testing.assert_close(exported(IDX).logits, plain_logits(model, IDX), rtol=0, atol=2e-5)
    found = exported.generate(IDX[:, :4], do_sample=False, max_new_tokens=12, pad_token_id=0, return_dict_in_generate=True)
    assert torch.equal(found.sequences, greedy(model))
    assert found.past_key_values.layers[0].keys.shape[-1] == (7 if compressed else HEAD_DIM)
    again, _ = checkpoint.load("made")
    torch.testing.assert_close(again(IDX), model(IDX), rtol=0, atol=1e-5)
    assert not compressed or again.config.head_qk == model.config.head_qk


@pytest.fixture
def dense():
    torch.manual_seed(0)
    model = KronyGPT(KronyGPTConfig(block_size=16, vocab_size=64, n_layer=2, n_head=2, n_embd=32))
    for p in model.parameters():
        p.data.mul_(6)  # otherwise the blocks hardly matter
    randomize_vectors(model)
    return model.eval()


@torch.no_grad()
def test_narrowing_at_full_width_is_the_identity(dense):
    tokens = random_tokens(20, 16, vocab_size=64)
    with torch.enable_grad():
        found = statistics(dense, tokens)
    blocks = [narrow.Block(dense, layer, found) for layer in range(2)]
    for block in blocks:
        block.attention(True), block.mlp(True)
    new, _ = narrow.narrowed(dense, blocks, dict(head_qk=[16] * 2, head_v=[16] * 2, n_inner=[128] * 2))
    torch.testing.assert_close(new(tokens), dense(tokens), rtol=0, atol=1e-5)
    for basis in blocks[0].bases.qk, blocks[0].bases.vo:  # all columns of a basis and its dual are the identity, too
        torch.testing.assert_close(basis[0] @ basis[1].mT, torch.eye(16).double().expand(2, -1, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("narrows", [("heads", "hidden"), ("heads",), ("hidden",), ()])
def test_a_plan_of_widths_fits_its_budget(dense, narrows):
    tokens = random_tokens(40, 16, vocab_size=64)
    found, total = statistics(dense, tokens), dense.count_parameters()["total"]
    limits = [int(share * total) for share in (0.6, 0.8)]
    losses = []
    for limit, plan in zip(limits, plan_widths(dense, limits, found, narrows)):
        new, _ = apply(dense, plan, tokens)
        assert 0.98 * limit < new.count_parameters()["total"] <= limit
        assert (set(new.config.head_qk + new.config.head_v) == {16}) == ("heads" not in narrows)
        assert "hidden" in narrows or set(new.config.n_inner) == {128}
        losses.append(plan.loss)
        free, = plan_widths(dense, [limit], found)
        assert free.loss <= plan.loss * 1.01  # what is free costs no more
    assert losses[0] > losses[1] > 0
