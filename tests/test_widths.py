"""Models of narrower heads, fewer hidden units and factored embeddings, in memory, in files and for transformers, against a
plain loop."""
import itertools
import math

import pytest
import torch
from conftest import continuation, named_matrices, random_tokens, randomize_vectors, succeed
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

from kronygpt import checkpoint, narrow
from kronygpt.budget import NARROWS, plan_widths
from kronygpt.calibration import statistics
from kronygpt.compress import apply
from kronygpt.distillation import Distillation
from kronygpt.export import rounded, to_int8
from kronygpt.modeling_kronygpt import KronyGPTForCausalLM
from model import IGNORE_INDEX, KronyGPT, KronyGPTConfig, KVCache, StoredLowRank

HEADS, HEAD_DIM = 4, 16
IDX = random_tokens(2, 20)


EMBEDDINGS = {"dense": {}, "low rank": dict(wte=[(256, 40)], wpe=[(32, 9)]),
              "staircase": dict(wte=[(56, 50), (100, 60), (100, 1)], wpe=[(20, 30), (12, 3)])}


def narrow_model(embeddings):
    """Three blocks with widths of their own, those of heads in the first two, the last one's as in GPT-2, each kind of shape
    and of embedding."""
    torch.manual_seed(0)
    model = KronyGPT(KronyGPTConfig(
        block_size=32, vocab_size=256, n_layer=3, n_head=HEADS, n_embd=64, head_qk=[[5, 1, 9, 5], 9, 16],
        head_v=[[7, 12, 1, 8], [3, 1, 5, 3], 16], n_inner=[100, 64, 256], **EMBEDDINGS[embeddings], shapes={
            "attn.c_attn": [(64, 1, 6), (64, 84, 1), (1, 192, 60)], "attn.c_proj": [(28, 64, 1), (12, 1, 5), (8, 8, 2)],
            "mlp.c_fc": [(64, 1, 10), (8, 8, 2), (1, 256, 10)], "mlp.c_proj": [(1, 64, 20), (64, 1, 64), (256, 1, 64)]}))
    randomize_vectors(model)
    with torch.no_grad():  # at 0.02 the logits hardly depend on the blocks
        for *_, matrix in model.matrices():
            matrix.A.mul_(4)
    for embedding in (model.transformer.wte, model.transformer.wpe):
        if embedding.row is not None:
            embedding.row.copy_(torch.randperm(len(embedding.row)))
    return model.eval()


@pytest.fixture(params=EMBEDDINGS)
def model(request):
    return narrow_model(request.param)


def plain_embedding(embedding):
    """E [V, C], row by row."""
    if embedding.is_dense:
        return embedding.weight
    rows, A = [], embedding.A.tolist()
    for k in [k for n, k in embedding.bands for _ in range(n)]:
        rows.append([*A[:k], *[0.0] * (len(embedding.B) - k)])
        A = A[k:]
    assert not A
    order = range(len(rows)) if embedding.row is None else embedding.row.tolist()
    return torch.tensor([rows[i] for i in order]) @ embedding.B


@torch.no_grad()
def plain_logits(model, idx):
    wte, wpe = plain_embedding(model.transformer.wte), plain_embedding(model.transformer.wpe)
    x = wte[idx] + wpe[:idx.shape[1]]
    future = torch.ones(idx.shape[1], idx.shape[1]).triu(1).bool()
    for block, qk, v in zip(model.transformer.h, model.config.head_qk, model.config.head_v):
        attn, mlp, outputs = block.attn, block.mlp, []
        parts = (block.ln_1(x) @ attn.c_attn.weight + attn.c_attn.bias).split([*qk, *qk, *v], -1)
        for h in range(HEADS):
            q, k, values = parts[h], parts[HEADS + h], parts[2 * HEADS + h]
            scores = q @ k.mT / math.sqrt(HEAD_DIM)
            outputs.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ values)
        x = x + torch.cat(outputs, -1) @ attn.c_proj.weight + attn.c_proj.bias
        hidden = torch.nn.functional.gelu(block.ln_2(x) @ mlp.c_fc.weight + mlp.c_fc.bias, approximate="tanh")
        x = x + hidden @ mlp.c_proj.weight + mlp.c_proj.bias
    return model.transformer.ln_f(x) @ wte.T


@torch.no_grad()
@pytest.mark.parametrize("kind", ["attn.c_attn", "attn.c_proj"])
def test_heads_of_several_widths_take_any_shape(kind):
    torch.manual_seed(0)
    model = KronyGPT(KronyGPTConfig(block_size=32, vocab_size=256, n_layer=1, n_head=HEADS, n_embd=64, shapes={
        kind: [(8, 2, 2)]}, head_qk=[[8, 16, 16, 1]], head_v=[[16, 3, 16, 5]])).eval()
    randomize_vectors(model)
    torch.testing.assert_close(model(IDX), plain_logits(model, IDX))


@torch.no_grad()
def test_steps_are_those_of_the_plain_model_as_stored_and_multiplied_out(model, workdir):
    checkpoint.save("model.pt", model)
    stored, expected = checkpoint.load("model.pt", as_stored=True)[0].eval(), plain_logits(model, IDX)
    out, cache, static = stored.multiplied_out(), KVCache(20), KVCache(20)
    for of_both in (cache, static):
        torch.testing.assert_close(stored.next_logits(IDX[:, :10], of_both), expected[:, 9])
    for i in range(10, 20):
        static.position = torch.tensor([i])
        for m, its in ((stored, cache), (out, static)):
            torch.testing.assert_close(m.next_logits(IDX[:, i:i + 1], its), expected[:, i], rtol=1e-4, atol=1e-4)
    assert all(matrix.is_dense for *_, matrix in out.matrices())


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


@pytest.mark.parametrize("in_autocast", [False, True])
def test_loss_and_gradients_are_those_of_whole_logits(model, in_autocast, monkeypatch):
    monkeypatch.setattr("model.chunk_rows", lambda parts, dtype: 7)
    monkeypatch.setattr("model.SLICE", 7 * 40)
    targets = random_tokens(2, 21)[:, 1:].contiguous()
    targets[0, :5] = IGNORE_INDEX
    with torch.autocast("cpu", torch.bfloat16, enabled=in_autocast):
        whole = torch.nn.functional.cross_entropy(model(IDX).flatten(0, 1).float(), targets.flatten())
        found = model(IDX, targets)
        evaluated = torch.no_grad()(model)(IDX, targets)
    for loss in (found, evaluated):
        torch.testing.assert_close(loss, whole, rtol=1e-2 if in_autocast else 1e-6, atol=1e-6)
    expected = torch.autograd.grad(whole, list(model.parameters()))
    found = torch.autograd.grad(found, list(model.parameters()))
    for p, q in zip(found, expected):
        assert p.dtype == torch.float32 and (p - q).norm() <= (0.05 if in_autocast else 1e-4) * q.norm() + 1e-6


def test_distillation_compares_tokens_not_rows(model):
    """Student and teacher in different orders of rows."""
    torch.manual_seed(1)
    teacher = KronyGPT(KronyGPTConfig(block_size=32, vocab_size=256, n_layer=1, n_head=2, n_embd=16,
                                      wte=[(200, 9), (56, 4)]))
    teacher.transformer.wte.row.copy_(torch.randperm(256))
    for student, other in (model, teacher), (teacher, model):
        log_p, log_q = (m(IDX).flatten(0, 1).log_softmax(-1) for m in (student, other))
        kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        torch.testing.assert_close(Distillation(student, other, 1.0, 1.0)(IDX, IDX), kl, rtol=1e-4, atol=1e-6)


def test_buffers_lie_where_the_weights_are(model):
    on_meta = {name: t.to("meta") for name, t in model.state_dict().items()}
    moved = KronyGPT.from_state_dict(model.config.as_plain_types(), on_meta)
    assert {t.device.type for t in (*moved.parameters(), *moved.buffers())} == {"meta"}


@torch.no_grad()
def test_a_file_holds_each_rank_once(model, tmp_path):
    checkpoint.save(tmp_path / "a.pt", model)
    content = torch.load(tmp_path / "a.pt", weights_only=True)["model"]
    numbers = sum(p.numel() for name, p in content.items() if not name.endswith(("pivots", "row", "lm_head.weight")))
    low_rank = [(matrix.weight.shape, len(matrix.A)) for *_, matrix in model.matrices()
                if 1 in (matrix.A.shape[1], matrix.A.shape[2]) and len(matrix.A) < len(matrix.weight)]
    assert len(low_rank) == 7
    low_rank += [((), len(E.B)) for E in (model.transformer.wte, model.transformer.wpe)
                 if len(E.bands) == 1 and not E.is_dense]
    whole = sum(p.numel() for p in model.parameters())
    assert numbers == model.count_parameters()["total"] == whole - sum(r * r for _, r in low_rank)
    again, _ = checkpoint.load(str(tmp_path / "a.pt"))
    stored, _ = checkpoint.load(str(tmp_path / "a.pt"), as_stored=True)
    for other in again, stored:
        assert other.config == model.config and other.count_parameters() == model.count_parameters()
        for name in "wte", "wpe":
            E, same = (m.transformer.get_submodule(name).dense() for m in (model, other))
            assert (E - same).norm() <= 1e-6 * E.norm()
        for (name, p), (_, q) in zip(named_matrices(model), named_matrices(other)):
            assert (p.weight - q.weight).norm() <= 1e-6 * p.weight.norm(), name
        torch.testing.assert_close(other.eval()(IDX), plain_logits(model, IDX), rtol=0, atol=2e-5)
    assert sum(isinstance(matrix, StoredLowRank) for *_, matrix in stored.matrices()) == 7
    ranks = sum(r * r for shape, r in low_rank if shape)
    assert stored.flops_per_token() <= model.flops_per_token() - 6 * ranks
    checkpoint.save(tmp_path / "b.pt", stored)
    copied = torch.load(tmp_path / "b.pt", weights_only=True)["model"]
    assert all(torch.equal(p, copied[name]) for name, p in content.items() if "attn" in name or "mlp" in name)


@torch.no_grad()
@pytest.mark.parametrize("compressed", [True, False])
def test_exports_compute_the_same(model, compressed, workdir):
    """Of the dense one, transformers' own GPT-2."""
    checkpoint.save("a.pt", model)
    succeed("kron_to_gpt.py", "a.pt", "made", f"--compressed={compressed}")
    exported = (KronyGPTForCausalLM if compressed else GPT2LMHeadModel).from_pretrained("made").eval()
    for attention in "eager", "sdpa":
        exported.set_attn_implementation(attention)
        torch.testing.assert_close(exported(IDX).logits, plain_logits(model, IDX), rtol=0, atol=2e-5)
    found = exported.generate(IDX[:, :4], do_sample=False, max_new_tokens=12, pad_token_id=0, return_dict_in_generate=True)
    assert torch.equal(found.sequences, greedy(model))
    assert found.past_key_values.layers[0].keys.shape[-1] == 16  # 12, or a multiple of 8
    again, _ = checkpoint.load("made")
    torch.testing.assert_close(again(IDX), model(IDX), rtol=0, atol=1e-5)
    if compressed:
        for name in "head_qk", "head_v", "wte", "wpe":
            assert getattr(again.config, name) == getattr(model.config, name)
        assert sum(p.numel() for p in exported.parameters()) == model.count_parameters()["total"]


@torch.no_grad()
def test_an_export_in_int8(model, workdir):
    checkpoint.save("a.pt", model)
    succeed("kron_to_gpt.py", "a.pt", "made", "--compressed=True", "--dtype=int8")
    tensors = load_file("made/model.safetensors")
    for name, p in tensors.items():
        is_vector = name.endswith(("_scale", "bias")) or ".ln_" in name
        indices = (".order", ".row", ".start", ".columns", "places")
        assert p.dtype == (torch.float32 if is_vector else torch.int32 if name.endswith(indices) else torch.int8), name

    again, _ = checkpoint.load("made")
    pairs = [(p.is_dense, p.weight, q.weight.T) for (*_, p), (*_, q) in zip(model.matrices(), again.matrices())]
    pairs = [(is_dense, p.T, q) for is_dense, p, q in pairs]  # a row for each output
    for name in "wte", "wpe":
        p, q = (m.transformer.get_submodule(name) for m in (model, again))
        pairs.append((p.is_dense, p.dense(), q.dense()))
    for is_dense, p, q in pairs:
        step = p.abs().amax(1, keepdim=True) / 127
        if is_dense:
            torch.testing.assert_close(q, (p / step).round() * step)
        assert 0.001 < (p - q).norm() / p.norm() < 0.05

    exported, half = (KronyGPTForCausalLM.from_pretrained("made", dtype=d).eval() for d in (torch.float32, torch.bfloat16))
    expected = plain_logits(again, IDX)
    torch.testing.assert_close(exported(IDX).logits, expected, rtol=0, atol=2e-5)
    assert half(IDX).logits.dtype == torch.bfloat16 and (half(IDX).logits - expected).norm() < 0.1 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):  # which leaves the residual stream in float32
        assert exported.transformer.wte(IDX).dtype == exported.transformer.wpe(IDX % 32).dtype == torch.float32
    found = exported.generate(IDX[:, :4], do_sample=False, max_new_tokens=12, pad_token_id=0)
    assert torch.equal(found, greedy(again))


@torch.no_grad()
def test_what_int8_adds_to_one_factor_the_other_makes_up_for():
    """Column after column, against the least squares of the columns that are still free."""
    torch.manual_seed(0)
    W, factor = torch.randn(5, 4), torch.randn(4, 9)
    found, scale = to_int8(W, factor @ factor.T)
    assert found.dtype == torch.int8
    torch.testing.assert_close(scale[:, 0], torch.linalg.vector_norm(W, math.inf, dim=1) / 127)
    for row, s, expected in zip(found, scale, W @ factor):
        free, kept = factor, expected
        for number in row:
            best = torch.linalg.lstsq(free.T, kept[:, None]).solution[0]
            assert number == (best / s).round().clamp(-127, 127)
            kept, free = kept - number * s * free[0], free[1:]
    plain, _ = to_int8(W)
    assert ((found * scale - W) @ factor).norm() < 0.9 * ((plain * scale - W) @ factor).norm()


@torch.no_grad()
def test_factors_in_int8_are_nearer_together_than_each_by_itself():
    torch.manual_seed(0)
    names = "down.weight", "up.weight"
    parts = dict(zip(names, (torch.randn(20, 60), torch.randn(30, 20))))

    def product(down, up):
        return torch.cat((torch.eye(20), down.T)) @ up.T

    result, exact = rounded(parts), product(*parts.values())
    down, up = (result[name] * result[f"{name}_scale"] for name in names)
    alone, scale = to_int8(parts["up.weight"], torch.eye(20) + down @ down.T)
    assert (product(down, up) - exact).norm() < 0.95 * (product(down, alone * scale) - exact).norm()


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
    E = dense.transformer.wte.weight.double()
    stairs = narrow.Staircase(E, found.frequencies, found.hidden, 4)
    usual = dict(head_qk=[[16] * 2] * 2, head_v=[[16] * 2] * 2, n_inner=[128] * 2)
    new, _ = narrow.narrowed(dense, blocks, usual, {"wte": stairs}, {"wte": [(64, 32)]})
    torch.testing.assert_close(new(tokens), dense(tokens), rtol=0, atol=1e-5)
    new, _ = narrow.narrowed(dense, blocks, usual, {"wte": stairs}, {"wte": [(16, 32)] * 4})
    assert (new.transformer.wte.dense() - E).norm() <= 1e-6 * E.norm()
    for basis in blocks[0].bases.qk, blocks[0].bases.vo:  # all columns of a basis and its dual are the identity, too
        torch.testing.assert_close(basis[0] @ basis[1].mT, torch.eye(16).double().expand(2, -1, -1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("narrows, step", [
    (("heads", "hidden"), 1), (("heads",), 1), (("hidden",), 1), (("embedding",), 1), ((), 1), (NARROWS, 2)])
def test_a_plan_of_widths_fits_its_budget(dense, narrows, step):
    tokens = random_tokens(40, 16, vocab_size=64)
    found, total = statistics(dense, tokens), dense.count_parameters()["total"]
    limits = [int(share * total) for share in (0.6, 0.8)]
    losses = []
    for limit, plan in zip(limits, plan_widths(dense, limits, found, narrows, step=step)):
        new, _ = apply(dense, plan, tokens)
        assert 0.97 * limit < new.count_parameters()["total"] <= limit
        widths = {width for widths in new.config.head_qk + new.config.head_v for width in widths}
        assert (widths == {16}) == ("heads" not in narrows)
        assert "embedding" in narrows or (new.config.wte, new.config.wpe) == ([(64, 32)], [(16, 32)])
        assert "hidden" in narrows or set(new.config.n_inner) == {128}
        ranks = [shape.factors for shapes in new.config.shapes.values() for shape in shapes if shape.dim_2 == 1]
        assert ranks and not any(rank % step for rank in ranks)
        losses.append(plan.loss)
        free, = plan_widths(dense, [limit], found)
        assert free.loss <= plan.loss * 1.01  # what is free costs no more
    assert losses[0] > losses[1] > 0


@pytest.mark.parametrize("share", [0.5, 0.7, 0.9])
def test_a_plan_loses_little_more_than_the_best_of_all(share):
    """Beside every combination of all widths, ranks and bands of a tiny model."""
    torch.manual_seed(0)
    model = KronyGPT(KronyGPTConfig(block_size=8, vocab_size=16, n_layer=1, n_head=2, n_embd=8, n_inner=12))
    for p in model.parameters():
        p.data.mul_(6)
    randomize_vectors(model.eval())
    tokens = random_tokens(40, 8, vocab_size=16)
    found, total = statistics(model, tokens), model.count_parameters()["total"]
    limit = int(share * total)
    plan, = plan_widths(model, [limit], found)

    parts, block = [], narrow.Block(model, 0, found)
    for options in block.attention(True), block.mlp(True):
        parts.append([])
        for option in options:
            matrices = []
            for table in option.tables.values():
                m, n, _ = table.option(len(table.sizes) - 1)
                assert table.sizes.tolist() == [*(r * (m + n - r) for r in range(1, len(table.sizes))), m * n]
                matrices.append(list(zip(table.sizes.tolist(), table.losses.tolist())))
            parts[-1] += [(option.size + a + b, option.loss + x + y) for (a, x), (b, y) in itertools.product(*matrices)]
    E, P = model.transformer.wte.weight.double(), model.transformer.wpe.weight.double()
    for stairs in (narrow.Staircase(E, (found.frequencies + found.probabilities) / 2,
                                    found.embedding_fisher + found.uncertainty * found.hidden, 16),
                   narrow.Staircase(P, torch.full((8,), 1 / 8).double(), found.embedding_fisher)):
        parts.append([(size, 2 * loss) for _, size, loss in stairs.options()])
    sums = [(0, 0.0)]
    for part in parts:
        sums = [(size + a, loss + b) for size, loss in sums for a, b in part]
        best, least = [], math.inf
        for size, loss in sorted(sums):  # those that no smaller sum beats
            if loss < least:
                best.append((size, loss))
                least = loss
        sums = best
    outside = 6 * 8  # the norms
    best = min(loss for size, loss in sums if size + outside <= limit)
    assert best * (1 - 1e-9) <= plan.loss <= 1.3 * best
