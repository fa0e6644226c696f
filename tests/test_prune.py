"""prune.py beside numpy slices of the dense matrices."""
import numpy as np
import pytest
import torch
from conftest import succeed, write_dataset
from transformers import GPT2LMHeadModel

from kronygpt import checkpoint


def pruned(W, axis, keep, offset, epsilon):
    """W with epsilon times the kept row (column) in the place of each one that is dropped."""
    W = np.moveaxis(W.copy(), axis, 0)
    for i in range(len(W)):
        if i % keep != offset:
            W[i] = epsilon * W[i - i % keep + offset]
    return np.moveaxis(W, 0, axis)


@pytest.mark.parametrize("options, name, dims, keep, offset, epsilon", [
    ([], "prune_32_256", (32, 256), 2, 0, 0.0),
    (["--offset=1"], "prune_32_256_offset1", (32, 256), 2, 1, 0.0),
    (["--keep=4", "--offset=2", "--epsilon=0.01"], "prune_16_256_offset2", (16, 256), 4, 2, 0.01),
    (["--dim=hidden"], "prune_64_128", (64, 128), 2, 0, 0.0),
    (["--dim=hidden", "--keep=8", "--offset=7", "--epsilon=-0.5"], "prune_64_32_offset7", (64, 32), 8, 7, -0.5),
])
def test_one_in_keep_units_is_left(options, name, dims, keep, offset, epsilon, gpt2_dir, workdir):
    succeed("prune.py", f"--init_from={gpt2_dir}", *options)
    found = torch.load(f"checkpoints/{name}.pt", weights_only=True)["model"]
    dense = GPT2LMHeadModel.from_pretrained(gpt2_dir).state_dict()
    hidden = dims[0] == 64
    for layer in range(2):
        for matrix, axis, shape in (("c_fc", int(hidden), dims), ("c_proj", int(not hidden), dims[::-1])):
            A, B = (found[f"transformer.h.{layer}.mlp.{matrix}_{side}"].numpy() for side in (0, 1))
            assert A.shape == (1, *shape)
            W = dense[f"transformer.h.{layer}.mlp.{matrix}.weight"].numpy()
            np.testing.assert_allclose(np.kron(A[0], B[0]), pruned(W, axis, keep, offset, epsilon), rtol=1e-6)
            bias = f"transformer.h.{layer}.mlp.{matrix}"
            assert torch.equal(found[f"{bias}_bias"], dense[f"{bias}.bias"])
    assert torch.equal(found["transformer.wte.weight"], dense["transformer.wte.weight"])


@pytest.mark.parametrize("options, name, kept", [
    ([], "layers_2_0", [0]), (["--offset=1"], "layers_2_1", [1]), (["--keep=3"], "layers_3_0", [0])])
def test_blocks_are_dropped_as_from_transformers_model(options, name, kept, gpt2_dir, workdir):
    succeed("prune.py", f"--init_from={gpt2_dir}", "--dim=layer", *options)
    reference = GPT2LMHeadModel.from_pretrained(gpt2_dir).eval()
    reference.transformer.h = torch.nn.ModuleList(reference.transformer.h[layer] for layer in kept)
    model, _ = checkpoint.load(f"checkpoints/{name}.pt")
    idx = torch.randint(256, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(idx), reference(idx, use_cache=False).logits, rtol=1e-4, atol=1e-4)


def test_kept_hidden_units_alone_are_the_same_function(gpt2_dir, workdir):
    options = f"--init_from={gpt2_dir}", "--dim=hidden", "--keep=4", "--offset=2"
    succeed("prune.py", *options, "--out=kron.pt")
    succeed("prune.py", *options, "--plain=True")
    plain, kron = (checkpoint.load(path)[0].eval() for path in ("checkpoints/plain_64_64_offset2.pt", "kron.pt"))
    assert plain.config.n_inner == [64, 64] and all(matrix.is_dense for *_, matrix in plain.matrices())
    idx = torch.randint(256, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(plain(idx), kron(idx), rtol=0, atol=1e-5)
    write_dataset("tiny", 2000)
    succeed("train.py", "--init_from=checkpoints/plain_64_64_offset2.pt", "--dataset=tiny", "--block_size=16",
            "--max_iters=1", "--eval_iters=1", "--gradient_accumulation_steps=1")
    succeed("kron_to_gpt.py", "out/ckpt.pt", "made")
    assert GPT2LMHeadModel.from_pretrained("made").config.n_inner == 64
