"""KronyGPT for transformers: GPT-2 whose weight matrices may be sums of Kronecker products.

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)

Each of attn.c_attn, attn.c_proj, mlp.c_fc and mlp.c_proj of a block computes y = x W + bias with W [m, n] = Σ_f A_f ⊗ B_f,
or is GPT-2's own Conv1D where its shape is (m, n, 1). A block may have narrower heads and fewer hidden units than GPT-2's.
Everything else is inherited. This file travels with each exported
model, so it imports torch and transformers alone; it serves transformers 4.57 and 5.
"""
import math
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model
from transformers.pytorch_utils import Conv1D

MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # of a block
COPY = 64  # multiply-adds that take as long as writing one number to memory


class KronyGPTConfig(GPT2Config):
    """GPT-2's config, with two fields more.

    shapes: {"attn.c_attn": [[dim_1, dim_2, r] of each block], ...}. A matrix that is not there is dense.
    widths: {"n_inner": [...], "head_qk": [...], "head_v": [...]}, of each block: hidden units, the width of a head's queries
        and keys, and that of its values. One that is not there is GPT-2's.
    """

    model_type = "kronygpt"

    def __init__(self, shapes=None, widths=None, **kwargs):
        super().__init__(**kwargs)
        self.shapes = shapes or {}
        self.widths = widths or {}


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


class LowRankLinear(KronLinear):
    """y = x W + bias with W [m, n] of rank r < m, each rank stored once: r rows of the left side [m, r] are the identity.
    `order` [m] tells which, and then the places of the others, A [r, m - r, 1]. B is the right side [r, 1, n]."""

    def __init__(self, m, n, rank, std):
        super().__init__(m, n, (m, 1, rank), std)
        self.A = nn.Parameter(torch.empty(rank, m - rank, 1))
        self.register_buffer("order", torch.arange(m, dtype=torch.int32))

    @torch.no_grad()
    def init_weights(self):
        nn.init.normal_(self.A, std=len(self.A)**-0.5)
        nn.init.normal_(self.B, std=self.std)
        nn.init.zeros_(self.bias)

    def forward(self, x):
        r, x = len(self.A), x.index_select(-1, self.order)
        z = x[..., :r] + x[..., r:] @ self.A.squeeze(2).T  # (..., r)
        y = z @ self.B.squeeze(1)
        return y + self.bias.to(y.dtype)


def from_left(L, X):
    """L [p, q] @ X [T, q, s] -> (T, p, s), as one large product on a transposed copy; where s = 1 nothing is copied."""
    T, q, s = X.shape
    return (X.transpose(1, 2).reshape(T * s, q) @ L.T).view(T, s, -1).transpose(1, 2)


def narrow_heads(attention, n_head, qk, v, head_dim):
    """Let GPT-2's attention work with queries and keys of width qk and values of width v. It has one width for all three and
    the cache: the larger one, to which c_attn's output is padded with zeros. Scores stay divided by the root of head_dim."""
    width = max(qk, v)
    attention.head_dim, attention.split_size, attention.scaling = width, n_head * width, width**-0.5
    attention.c_attn.register_forward_hook(partial(pad_heads, n_head, (qk, qk, v), width, (width / head_dim)**0.5))
    attention.c_proj.register_forward_pre_hook(partial(cut_heads, n_head, v))


def pad_heads(n_head, widths, width, scale, c_attn, inputs, output):
    q, k, v = (F.pad(part.unflatten(-1, (n_head, -1)), (0, width - part.shape[-1] // n_head)).flatten(-2)
               for part in output.split([n_head * w for w in widths], dim=-1))
    return torch.cat((q * scale, k, v), dim=-1)


def cut_heads(n_head, v, c_proj, inputs):
    return inputs[0].unflatten(-1, (n_head, -1))[..., :v].flatten(-2),


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
        for i, block in enumerate(self.h):
            C, H, head_dim = config.n_embd, config.n_head, config.n_embd // config.n_head
            usual = dict(n_inner=config.n_inner or 4 * C, head_qk=head_dim, head_v=head_dim)
            hidden, qk, v = (config.widths[name][i] if name in config.widths else width for name, width in usual.items())
            sizes = (C, H * (2 * qk + v)), (H * v, C), (C, hidden), (hidden, C)
            for name, (m, n) in zip(MATRICES, sizes):
                part, matrix = name.split(".")
                shape = tuple(config.shapes[name][i]) if name in config.shapes else (m, n, 1)
                is_residual = matrix == "c_proj"  # which writes to the residual stream, 2 n_layer times in all
                std = config.initializer_range / (math.sqrt(2 * config.n_layer) if is_residual else 1)
                if shape == (m, n, 1):
                    new = Conv1D(n, m)
                elif shape[:2] in ((m, 1), (1, n)) and shape[2] < m:
                    new = LowRankLinear(m, n, shape[2], std)
                else:
                    new = KronLinear(m, n, shape, std)
                setattr(getattr(block, part), matrix, new)
            if (qk, v) != (head_dim, head_dim):
                narrow_heads(block.attn, H, qk, v, head_dim)
        self.post_init()


class KronyGPTForCausalLM(InitFactors, GPT2LMHeadModel):
    config_class = KronyGPTConfig

    def __init__(self, config):
        super().__init__(config)
        self.transformer = KronyGPTModel(config)
        self.post_init()
