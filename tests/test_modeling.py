"""modeling_kronygpt.py, kron_to_gpt.py --compressed=True, and reading such a directory back."""
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import continuation, kinds_of_shape, kron_sum, load_gpt2, random_tokens, run_here
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kronygpt import checkpoint, compress, export
from kronygpt.export import model_card
from kronygpt.modeling_kronygpt import KronLinear, KronyGPTForCausalLM, KronyGPTModel
from model import Shape
from prune import prune_matrix

IDX = random_tokens(2, 32)
FILES = {"README.md", "config.json", "generation_config.json", "model.safetensors", "modeling_kronygpt.py",
         "tokenizer.json", "tokenizer_config.json"}

WITH_TRANSFORMERS_ALONE = """
import importlib.util, json, sys
import torch
from transformers import AutoModel, AutoModelForCausalLM

assert importlib.util.find_spec("checkpoint") is None and importlib.util.find_spec("modeling_kronygpt") is None
made, idx = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
exec(open(f"{made}/README.md").read().split("```python\\n")[1].split("```")[0])  # the card's own snippet, which asks nothing
with torch.no_grad():
    snippet = model(**tokenizer("some text", return_tensors="pt")).logits.tolist()

def load(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options).eval()

def difference(**options):
    return (load(made, **options)(idx).logits - logits).abs().max().item()

try:
    AutoModelForCausalLM.from_pretrained(made, trust_remote_code=False)
    refused = False
except ValueError as error:
    refused = "trust_remote_code" in str(error)
model, base = load(made), AutoModel.from_pretrained(made, trust_remote_code=True).eval()
model.save_pretrained("again")
model.save_pretrained("shards", max_shard_size="200KB")
copies = load("again"), load("shards")
padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), idx[:, :4]), 1)
greedy = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
with torch.no_grad():
    logits, hidden = model(idx).logits, base(idx).last_hidden_state
    found = dict(
        snippet=snippet, refused=refused, logits=logits.tolist(),
        base=(model.lm_head(hidden) - logits).abs().max().item(),
        attention=[difference(attn_implementation=name) for name in ("sdpa", "eager")],
        half=[difference(dtype=dtype) for dtype in (torch.bfloat16, torch.float16)],
        cached=model.generate(idx[:, :4], **greedy).tolist(),
        uncached=model.generate(idx[:, :4], use_cache=False, **greedy).tolist(),
        padded=model.generate(padded, attention_mask=torch.arange(7).expand(2, 7).ge(3).long(), **greedy)[:, 3:].tolist(),
        tied=all(m.lm_head.weight is m.transformer.wte.weight for m in (model, *copies)),
        same=all(torch.equal(p, copy.state_dict()[name]) for copy in copies for name, p in model.state_dict().items()))
empty = torch.empty
torch.empty = lambda *args, **options: empty(*args, **options).fill_(torch.nan)  # what nobody initialises shows
torch.manual_seed(0)
new = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
torch.empty = empty
new(idx, labels=idx).loss.backward()
found["reached"] = all(p.isfinite().all() and p.grad is not None and bool(p.grad.any()) for p in new.parameters())
print(json.dumps(found))
"""


def export_to(model, *options, name="made"):
    checkpoint.save("made.pt", model)
    return run_here("kron_to_gpt.py", "made.pt", name, "--compressed=True", *options)


@pytest.fixture
def made(mixed_model, workdir):
    """made/, the compressed export of a model with each kind of shape."""
    said = export_to(mixed_model)
    assert said.returncode == 0, said.stderr
    return Path("made").resolve()


def as_lists(shapes):
    return {name: [list(shape) for shape in of_blocks] for name, of_blocks in shapes.items()}


def assert_same(model, other):
    """One KronyGPT that was read from a compressed export, and the one that was exported."""
    assert model.config == replace(other.config, shapes=of_columns(other.config))
    for (_, _, p), (_, _, q) in zip(model.matrices(), other.matrices()):
        torch.testing.assert_close(p.weight, q.weight, rtol=0, atol=5e-6 * q.weight.abs().max().item())
    for name, p in other.state_dict().items():
        assert name.endswith((".A", ".B")) or torch.equal(p, model.state_dict()[name])


def of_columns(config):
    """The shapes of a config in which (1, n, r) is (m, 1, r), as compressed exports have it."""
    return {kind: [Shape(m, 1, r) if (dim_1, dim_2) == (1, n) else Shape(dim_1, dim_2, r) for dim_1, dim_2, r in shapes]
            for kind, shapes in config.shapes.items() for m, n in [config.sizes(0)[kind]]}


def load(directory, **options):
    return KronyGPTForCausalLM.from_pretrained(directory, **options).eval()


@pytest.mark.parametrize("m, n", [(64, 192), (256, 64)])
def test_a_matrix_is_the_sum_of_kronecker_products(m, n):
    for shape in [*kinds_of_shape(m, n)[:-1], (m, n, 2), (8, 8, 5)]:
        matrix = KronLinear(m, n, shape).double()
        for p in matrix.parameters():
            torch.nn.init.normal_(p)
        x, W = torch.randn(3, 5, m, dtype=torch.float64), kron_sum(matrix.A, matrix.B)
        torch.testing.assert_close(matrix(x), x @ W + matrix.bias)
        inputs = matrix.A, matrix.B, matrix.bias
        expected = torch.autograd.grad((x @ W + matrix.bias).square().sum(), inputs)
        torch.testing.assert_close(torch.autograd.grad(matrix(x).square().sum(), inputs), expected)


def test_transformers_alone_computes_the_same(made, mixed_model, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "made").symlink_to(made)  # which the card's snippet names
    command = [sys.executable, "-I", "-c", WITH_TRANSFORMERS_ALONE, "made", json.dumps(IDX.tolist())]
    said = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
                          env=dict(os.environ, HF_HOME=str(elsewhere / "home"), HF_MODULES_CACHE=str(elsewhere / "code")))
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    with torch.no_grad():
        np.testing.assert_allclose(found["logits"], mixed_model(IDX).numpy(), rtol=0, atol=1e-5)
        text = torch.tensor([list(b"some text")])
        np.testing.assert_allclose(found["snippet"], mixed_model(text).numpy(), rtol=0, atol=1e-5)
    assert found["refused"] and found["tied"] and found["same"] and found["reached"]
    assert found["base"] == 0 and max(found["attention"]) < 1e-5
    for difference, dtype in zip(found["half"], (torch.bfloat16, torch.float16)):
        assert 0 < difference < 8 * torch.finfo(dtype).eps * np.abs(found["logits"]).max()
    expected = continuation(mixed_model, IDX[:, :4], 8, temperature=0).tolist()
    assert found["cached"] == found["uncached"] == found["padded"] == expected
    assert {file.name for file in elsewhere.joinpath("again").iterdir()} >= {"modeling_kronygpt.py", "model.safetensors"}


def test_what_is_written(made, mixed_model):
    assert {file.name for file in made.iterdir()} == FILES
    with safe_open(made / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"} and "lm_head.weight" not in file.keys()  # noqa: SIM118
    tensors = load_file(made / "model.safetensors")
    n_parameters = sum(p.numel() for name, p in tensors.items() if not name.endswith("order"))
    assert n_parameters == mixed_model.count_parameters()["total"]
    config = json.loads((made / "config.json").read_text())
    assert config["model_type"] == "kronygpt"
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert config["shapes"] == as_lists(mixed_model.config.shapes)


def test_a_function_that_differs_is_found(mixed_model, workdir, monkeypatch):
    def broken(model, whole=export.to_compressed):
        exported = whole(model)
        bias = exported.transformer.h[1].mlp.c_proj.up.bias
        bias.data = bias + 1e-2 * torch.randn_like(bias)  # a copy: the others are the checkpoint's own
        return exported

    monkeypatch.setattr(export, "to_compressed", broken)
    said = export_to(mixed_model)
    assert said.returncode == 1 and "more than --tolerance=1.0e-04; nothing was written" in said.stderr
    assert not Path("made").exists()


@pytest.mark.parametrize("dtype, compressed", [("bfloat16", True), ("float16", False)])
def test_weights_in_half_precision(dtype, compressed, mixed_model, workdir):
    from transformers import GPT2LMHeadModel

    checkpoint.save("made.pt", mixed_model)
    said = run_here("kron_to_gpt.py", "made.pt", "made", f"--dtype={dtype}", f"--compressed={compressed}")
    assert said.returncode == 0, said.stderr
    tensors = load_file("made/model.safetensors")
    assert {p.dtype for name, p in tensors.items() if not name.endswith("order")} == {getattr(torch, dtype)}
    model = (KronyGPTForCausalLM if compressed else GPT2LMHeadModel).from_pretrained("made", dtype="auto").eval()
    assert model.dtype == getattr(torch, dtype) and model(IDX).logits.isfinite().all()
    assert checkpoint.load("made")[0].transformer.wte.weight.dtype == torch.float32


@pytest.mark.parametrize("options, message", [
    (["--dtype=int4"], "--dtype is float32, bfloat16, float16 or int8, not int4"),
    (["--dtype=int8", "--compressed=False"], "--dtype=int8 needs --compressed=True, whose code takes it, also for a model "
                                             "with no factors")])
def test_a_wrong_type_is_one_line(options, message, mixed_model, workdir):
    said = export_to(mixed_model, *options)
    assert said.returncode == 2 and said.stderr == f"error: {message}\n"
    assert not Path("made").exists()


INT8_WITH_TRANSFORMERS_ALONE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

def load(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True, **options).eval()

idx, model = torch.tensor(json.loads(sys.argv[1])), load("made")
model.save_pretrained("again")
again, half = load("again"), load("made", dtype=torch.bfloat16)
with torch.no_grad():
    logits = model(idx).logits
    found = dict(logits=logits.tolist(), same=torch.equal(again(idx).logits, logits),
                 half=(half(idx).logits - logits).abs().max().item(), n=model.num_parameters(),
                 types=[sorted({str(p.dtype) for p in m.state_dict().values()}) for m in (model, again, half)])
print(json.dumps(found))
"""


def test_transformers_alone_computes_in_int8(mixed_model, workdir):
    assert export_to(mixed_model, "--dtype=int8").returncode == 0
    command = [sys.executable, "-I", "-c", INT8_WITH_TRANSFORMERS_ALONE, json.dumps(IDX.tolist())]
    said = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL,
                          env=dict(os.environ, HF_HOME=str(workdir / "home"), HF_MODULES_CACHE=str(workdir / "code")))
    assert said.returncode == 0, said.stderr
    found = json.loads(said.stdout)
    with torch.no_grad():
        np.testing.assert_allclose(found["logits"], checkpoint.load("made")[0](IDX).numpy(), rtol=0, atol=1e-5)
    assert found["same"] and found["n"] == mixed_model.count_parameters()["total"]
    assert 0 < found["half"] < 8 * torch.finfo(torch.bfloat16).eps * np.abs(found["logits"]).max()
    whole, half = ["torch.float32", "torch.int32", "torch.int8"], ["torch.bfloat16", "torch.int32", "torch.int8"]
    assert found["types"] == [whole, whole, half]


@pytest.mark.parametrize("part, change", [
    ("up.weight", lambda p: p.T.contiguous() if len(p) == p.shape[1] else p), ("weight_scale", lambda p: p / 2),
    ("A_scale", lambda p: p.flip(2)), ("order", lambda p: p.flip(0))])
def test_int8_that_is_no_rounding_is_found(part, change, mixed_model, workdir, monkeypatch):
    def broken(parts, whole=export.rounded):
        result = whole(parts)
        return result | {part: change(result[part])} if part in result else result

    with torch.no_grad():  # flat columns would hide an exchange of their scales
        A = mixed_model.transformer.h[0].attn.c_attn.A
        A.mul_(torch.arange(A.shape[2]))
    monkeypatch.setattr(export, "rounded", broken)
    said = export_to(mixed_model, "--dtype=int8")
    assert said.returncode == 1 and "in int8 is off by" in said.stderr and "nothing was written" in said.stderr
    assert not Path("made").exists()


# the directory, read back

def test_a_directory_is_read_back(made, mixed_model):
    for source in made, made / "model.safetensors":
        assert_same(checkpoint.load(source)[0], mixed_model)
    KronyGPTModel.from_pretrained(made).save_pretrained("base")
    load(made).save_pretrained("shards", max_shard_size="200KB")
    assert "h.0.mlp.c_proj.A" in load_file("base/model.safetensors")  # without the prefix of the whole model
    assert len(list(Path("shards").glob("*.safetensors"))) > 1
    for name in "base", "shards":
        assert_same(checkpoint.load(name)[0], mixed_model)


def test_an_older_export_is_read_back(made, mixed_model):
    """Dense matrices [in, out], and low rank as A [r, m - r, 1], B [r, 1, n] and the places of the identity."""
    path = made / "model.safetensors"
    tensors = load_file(path)
    for stem in [name.removesuffix(".up.weight") for name in tensors if name.endswith(".up.weight")]:
        up, down = tensors.pop(f"{stem}.up.weight"), tensors.pop(f"{stem}.down.weight", None)
        old = {"weight": up.T} if down is None else {"A": down.unsqueeze(2), "B": up.T.unsqueeze(1)}
        old["bias"] = tensors.pop(f"{stem}.up.bias")
        tensors |= {f"{stem}.{name}": p.contiguous() for name, p in old.items()}
    assert "transformer.h.0.attn.c_proj.order" in tensors and "transformer.h.1.mlp.c_proj.weight" in tensors
    save_file(tensors, path, {"format": "pt"})
    assert_same(checkpoint.load(made)[0], mixed_model)


def test_it_is_converted_again(made, mixed_model):
    assert run_here("kron_to_gpt.py", made, "dense").returncode == 0
    with torch.no_grad():
        torch.testing.assert_close(load_gpt2("dense")(IDX).logits, mixed_model(IDX), rtol=0, atol=1e-4)
    assert run_here("kron_to_gpt.py", made, "same", "--compressed=True").returncode == 0
    with torch.no_grad():
        torch.testing.assert_close(load("same")(IDX).logits, mixed_model(IDX), rtol=0, atol=1e-5)


# the class as a model of transformers

def test_training_steps_that_recompute_reach_every_factor(mixed_model):
    torch.manual_seed(0)
    model = KronyGPTForCausalLM(export.to_compressed(mixed_model).config).train()
    model.gradient_checkpointing_enable()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before, losses = {name: p.clone() for name, p in model.named_parameters()}, []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(IDX, labels=IDX).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and not any(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert model.lm_head.weight is model.transformer.wte.weight


def test_torch_export_takes_it(small_model):
    model = export.to_compressed(small_model)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=32)}
    program = torch.export.export(model, (), dict(input_ids=IDX, use_cache=False),
                                  dynamic_shapes=dict(input_ids=sizes, use_cache=None))
    for idx in IDX, random_tokens(3, 7):
        with torch.no_grad():
            exported = program.module()(input_ids=idx, use_cache=False).logits
            torch.testing.assert_close(exported, small_model(idx), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantizers_find_the_linear_modules(mixed_model):
    """Two of each low-rank matrix, one of each dense one, and the output."""
    from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

    model = quantize_dynamic(export.to_compressed(mixed_model), {torch.nn.Linear: per_channel_dynamic_qconfig})
    assert sum("quantized.dynamic" in type(module).__module__ for module in model.modules()) == 4 * (2 + 2 + 1) + 1
    with torch.no_grad():
        expected = mixed_model(IDX)
        assert (model(IDX).logits - expected).square().mean() < 0.1**2 * expected.square().mean()


def test_lora_trains_merges_and_is_read_back(made):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(load(made), peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [p for name, p in model.named_parameters() if "lora_" in name]
    assert len(trained) == 2 * 4 * (2 + 2 + 1)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(3):
        loss = model(input_ids=IDX, labels=IDX).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]
    with torch.no_grad():
        expected = model(input_ids=IDX).logits
        model.merge_and_unload().save_pretrained("merged")
        torch.testing.assert_close(checkpoint.load("merged")[0](IDX), expected, rtol=0, atol=1e-4)


# the model card

def test_the_card_tells_how_a_model_was_made(mixed_model, workdir):
    trained = dict(init_from="best.pt", dataset="own", batch_size=3, gradient_accumulation_steps=5, block_size=16,
                   teacher=str(workdir / "private/teacher.pt"), init_options=dict(init_from="gpt2", budget="82M", keep=""))
    checkpoint.save("run.pt", mixed_model, config=trained, iter_num=100)
    Path("scores.json").write_text(json.dumps({"wiki103": {"perplexity": 41.237, "loss": 3.7}}), encoding="utf-8")
    said = run_here("kron_to_gpt.py", "run.pt", "mine", "--compressed=True", "--perplexities=scores.json")
    assert said.returncode == 0, said.stderr
    card = ModelCard.load("mine/README.md")
    assert card.data.to_dict() == dict(base_model="gpt2", library_name="transformers", pipeline_tag="text-generation",
                                       tags=["gpt2", "kronecker", "compression"])
    assert "with 100 steps of training" in card.text and (
        "\n\n    init_from = 'gpt2'\n    budget = '82M'\n\n    init_from = 'best.pt'\n    dataset = 'own'\n" in card.text)
    assert "teacher = 'teacher.pt'\n" in card.text
    assert "| wiki103 | 41.24 |" in card.text and 'from_pretrained("mine", trust_remote_code=True)' in card.text
    dense = sum(p.numel() for p in export.to_dense(mixed_model).parameters())
    assert f"{mixed_model.count_parameters()['total']:,} parameters ({dense:,} with" in card.text
    assert str(workdir) not in card.text


def test_the_card_of_a_compression_names_its_options_and_no_file_of_ours_as_its_base(mixed_model, workdir):
    config = dict(init_from="base", budget="82M", calibrate="openwebtext", tokenizer=None, out="secret.pt")
    (workdir / "models" / "base").mkdir(parents=True)
    card = model_card("a", mixed_model, dict(config=config, iter_num=0), {}, "float32")
    assert "    budget = '82M'\n    calibrate = 'openwebtext'\n" in card and "base_model" not in card


def test_a_card_of_ones_own_stays_and_ours_goes_with_the_code(made):
    assert run_here("kron_to_gpt.py", "made.pt", "made").returncode == 0
    assert {file.name for file in made.iterdir()} == FILES - {"README.md", "modeling_kronygpt.py"}
    (made / "README.md").write_text("mine")
    for compressed in True, False:
        assert run_here("kron_to_gpt.py", "made.pt", "made", f"--compressed={compressed}").returncode == 0
        assert (made / "README.md").read_text() == "mine"
        assert (made / "modeling_kronygpt.py").exists() == compressed


# a model of prune.py --dim=hidden, which needs no code

@pytest.fixture
def pruned(gpt2_dir, workdir):
    """pruned.pt: one in four hidden units kept, of 256."""
    options = "--dim=hidden", "--keep=4", "--offset=1", "--out=pruned.pt"
    assert run_here("prune.py", f"--init_from={gpt2_dir}", *options).returncode == 0
    return checkpoint.load("pruned.pt")[0]


def test_dropped_hidden_units_are_left_out(pruned):
    with torch.no_grad():
        for block in pruned.transformer.h:  # the bias of a unit that is dropped is no zero
            block.mlp.c_fc.bias.add_(torch.randn(256))
    block.mlp.c_fc.B.data = block.mlp.c_fc.B.roll(1, 2)  # another place in the last block
    block.mlp.c_proj.B.data = block.mlp.c_proj.B.roll(1, 1)
    checkpoint.save("pruned.pt", pruned)
    said = run_here("kron_to_gpt.py", "pruned.pt", "narrow")
    assert said.returncode == 0 and "MLPs of 64 hidden units: B drops the others of 256" in said.stdout
    config = json.loads(Path("narrow/config.json").read_text(encoding="utf-8"))
    assert config["n_inner"] == 64 and config["model_type"] == "gpt2" and "auto_map" not in config
    again, _ = checkpoint.load("narrow")
    with torch.no_grad():
        for model in again, load_gpt2("narrow"):
            logits = model(IDX)
            torch.testing.assert_close(getattr(logits, "logits", logits), pruned(IDX), rtol=0, atol=1e-5)
    dense = again.count_parameters()["total"]
    assert again.config.n_inner == [64] * 2
    assert dense == sum(p.numel() for p in load_file("narrow/model.safetensors").values())


@pytest.mark.parametrize("names, index, value", [
    (("c_fc", "c_proj"), 0, 1e-9), (("c_fc", "c_proj"), 1, 0.5), (("c_proj",), 0, 1.0), (("c_proj",), 1, 0.0)])
def test_a_unit_that_adds_something_stays(names, index, value, pruned):
    for name in names:
        getattr(pruned.transformer.h[1].mlp, name).B.data.view(-1)[index] = value
    assert compress.without_dropped_units(pruned) is pruned


def test_other_shapes_are_not_narrowed(mixed_model, small_model, gpt2_dir):
    dense = checkpoint.load(str(gpt2_dir))[0]

    def pruned(**sides):
        return compress.with_factors(dense, {(layer, kind): prune_matrix(matrix.weight.detach(), *sides[kind[4:]])
                                             for layer, kind, matrix in dense.matrices() if kind[4:] in sides})

    embd, fc_alone = pruned(c_fc=(32, 256), c_proj=(256, 32)), pruned(c_fc=(64, 128))
    other_side = pruned(c_fc=(64, 128), c_proj=(256, 32))
    for model in mixed_model, small_model, dense, embd, fc_alone, other_side:
        assert compress.without_dropped_units(model) is model
