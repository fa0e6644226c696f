"""prune.py beside numpy slices of the dense matrices."""
import numpy as np
import pytest
import torch
from conftest import succeed
from transformers import GPT2LMHeadModel


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
