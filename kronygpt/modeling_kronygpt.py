"""KronyGPT for transformers: GPT-2 whose weight matrices may be sums of Kronecker products.

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)

Each of attn.c_attn, attn.c_proj, mlp.c_fc and mlp.c_proj of a block computes y = x W + bias with W [m, n] = Σ_f A_f ⊗ B_f,
or is GPT-2's own Conv1D where its shape is (m, n, 1). Everything else is inherited. This file travels with each exported
model, so it imports torch and transformers alone; it serves transformers 4.57 and 5.
"""
import math

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # of a block
COPY = 64  # multiply-adds that take as long as writing one number to memory


class KronyGPTConfig(GPT2Config):
    """GPT-2's config, and `shapes`: {"attn.c_attn": [[dim_1, dim_2, r] of each block], ...}; a matrix without is dense."""

    model_type = "kronygpt"

    def __init__(self, shapes=None, **kwargs):
        super().__init__(**kwargs)
        self.shapes = shapes or {}


class KronLinear(nn.Module):
    """y = x (Σ_f A_f ⊗ B_f) + bias, for x (..., m) and A [r, m1, n1], B [r, m2, n2], with m = m1 m2 and n = n1 n2.

    Args:
        m, n: size of the matrix.
        shape: (m1, n1, r).
        std: standard deviation of an element of the matrix of a new model.

    Raises:
        ValueError: m1 or n1 does not divide m or n.
    """

    def __init__(self, m, n, shape, std):
        super().__init__()
        m1, n1, r = shape
        if min(shape) < 1 or m % m1 or n % n1:
            raise ValueError(f"the shape {tuple(shape)} does not divide a matrix of {m} x {n}")
        self.std = std
        self.A = nn.Parameter(torch.empty(r, m1, n1))
        self.B = nn.Parameter(torch.empty(r, m // m1, n // n1))
        self.bias = nn.Parameter(torch.empty(n))

    @torch.no_grad()
    def init_weights(self):
        """Draw both sides at the scale sqrt(std / sqrt(r)); a side of one element is 1.

        torch.nn.init leaves loaded tensors alone, while transformers loads a model. A few normal numbers are far from their
        expected scale, so the smaller side is brought to it, unless it was loaded.
        """
        small, large = sorted((self.A, self.B), key=lambda side: side[0].numel())
        std = self.std / math.sqrt(len(self.A))
        scale = math.sqrt(std) if small[0].numel() > 1 else 1.0
        nn.init.normal_(large, std=std / scale)
        nn.init.zeros_(self.bias)
        if scale == 1.0:
            nn.init.ones_(small)
            return
        nn.init.normal_(small, std=scale)
        if not getattr(small, "_is_hf_initialized", False):
            small.mul_(scale / small.square().mean(dim=(1, 2), keepdim=True).sqrt())

    def forward(self, x):
        # x @ sum(torch.kron(A[f], B[f]) for f in range(r)) + bias
        A, B = self.A, self.B
        (r, m1, n1), (_, m2, n2) = A.shape, B.shape
        rows = x.reshape(-1, m1 * m2)  # (T, m1 m2)
        T = 1 if torch.compiler.is_compiling() else rows.shape[0]  # exported graphs take any number of tokens
        after_A, after_B = r * n1 * m2, r * m1 * n2
        cost_A = T * (after_A * (m1 + n2) + COPY * (after_A + (m2 > 1) * (m1 * m2 + after_A)))  # A is contracted first
        cost_B = T * (after_B * (m2 + n1) + COPY * (after_B + (n2 > 1) * (n1 * n2 + after_B)))  # B is
        cost_W = (T + r + 2 * COPY) * m1 * m2 * n1 * n2  # the dense matrix is built and multiplied
        if cost_W < cost_A and cost_W < cost_B:
            W = A.flatten(1).T @ B.flatten(1)  # (m1 n1, m2 n2); the sum over f is one product
            y = rows @ W.view(m1, n1, m2, n2).transpose(1, 2).reshape(m1 * m2, n1 * n2)
        elif cost_A <= cost_B:
            z = from_left(A.permute(2, 0, 1).reshape(n1 * r, m1), rows.reshape(-1, m1, m2))  # (T, n1 r, m2)
            y = z.reshape(-1, r * m2) @ B.reshape(r * m2, n2)  # (T n1, n2)
        else:
            z = rows.reshape(-1, m2) @ B.transpose(0, 1).reshape(m2, r * n2)  # (T m1, r n2)
            y = from_left(A.permute(2, 1, 0).reshape(n1, m1 * r), z.view(-1, m1 * r, n2))  # (T, n1, n2)
        return y.reshape(*x.shape[:-1], n1 * n2) + self.bias.to(y.dtype)


def from_left(L, X):
    """L [p, q] @ X [T, q, s] -> (T, p, s), as one large product on a transposed copy; where s = 1 nothing is copied."""
    T, q, s = X.shape
    return (X.transpose(1, 2).reshape(T * s, q) @ L.T).view(T, s, -1).transpose(1, 2)


class InitFactors:
    """Initialise factored matrices. transformers asks each sub-model for its own modules, so both classes have this."""

    def _init_weights(self, module):
        if isinstance(module, KronLinear):
            module.init_weights()
        elif not isinstance(getattr(module, "c_proj", None), KronLinear):  # GPT-2's looks for the weight of a c_proj
            super()._init_weights(module)


class KronyGPTModel(InitFactors, GPT2Model):
    config_class = KronyGPTConfig

    def __init__(self, config):
        super().__init__(config)
        for name, shapes in config.shapes.items():
            if name not in MATRICES or len(shapes) != len(self.h):
                raise ValueError(f"shapes has {len(shapes)} shapes of {name} for {len(self.h)} blocks")
            part, matrix = name.split(".")
            for block, shape in zip(self.h, shapes):
                parent = getattr(block, part)
                m, n = getattr(parent, matrix).weight.shape
                if tuple(shape) != (m, n, 1):
                    is_residual = matrix == "c_proj"  # which writes to the residual stream, 2 n_layer times in all
                    std = config.initializer_range / (math.sqrt(2 * config.n_layer) if is_residual else 1)
                    setattr(parent, matrix, KronLinear(m, n, shape, std))
        self.post_init()


class KronyGPTForCausalLM(InitFactors, GPT2LMHeadModel):
    config_class = KronyGPTConfig

    def __init__(self, config):
        super().__init__(config)
        self.transformer = KronyGPTModel(config)
        self.post_init()
