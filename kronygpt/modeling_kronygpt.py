"""KronyGPT for transformers: GPT-2 whose weight matrices may be sums of Kronecker products.

    model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True)

Each of attn.c_attn, attn.c_proj, mlp.c_fc and mlp.c_proj of a block computes y = x W + bias with W [m, n] = Σ_f A_f ⊗ B_f:
dense and low-rank ones as modules of nn.Linear, other shapes as KronLinear. A block may have narrower heads and fewer hidden
units than GPT-2's, and embeddings may be of lower rank. Weights may be int8. Everything else is inherited. This file travels
with each exported model, so it imports torch and transformers alone; it serves transformers 4.57 and 5.
"""
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Model

MATRICES = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # of a block
COPY = 64  # multiply-adds that take as long as writing one number to memory
STD = 0.02  # of an element of a new matrix, as in GPT-2


class KronyGPTConfig(GPT2Config):
    """GPT-2's config, with three fields more.

    shapes: {"attn.c_attn": [[dim_1, dim_2, r] of each block], ...} of the four matrices.
    widths: {"n_inner": [...], "head_qk": [[...], ...], "head_v": [[...], ...], "wte": [[rows, columns], ...], "wpe": ...}:
        of each block the hidden units, and of each of its heads the width of queries and keys, and that of values; of each
        embedding that is not dense the bands of a FactoredEmbedding.
    int8: weights are as hold_int8() has them.
    """

    model_type = "kronygpt"

    def __init__(self, shapes=None, widths=None, int8=False, **kwargs):
        super().__init__(**kwargs)
        self.int8 = int8
        self.shapes = shapes or {}
        self.widths = widths or {}


def new_factors(r, *shapes):
    """The sides of a new matrix, whose elements are sums of r products of theirs."""
    return [nn.Parameter(torch.empty(shape).normal_(std=STD**0.5 / r**0.25)) for shape in shapes]


class KronLinear(nn.Module):
    """y = x (Σ_f A_f ⊗ B_f) + bias, for x (..., m) and A [r, m1, n1], B [r, m2, n2], with m = m1 m2 and n = n1 n2. The shape
    is (m1, n1, r)."""

    def __init__(self, m, n, shape):
        super().__init__()
        m1, n1, r = shape
        self.A, self.B = new_factors(r, (r, m1, n1), (r, m // m1, n // n1))
        self.bias = nn.Parameter(torch.zeros(n))

    def forward(self, x):
        # x @ sum(torch.kron(A[f], B[f]) for f in range(r)) + bias
        A, B = whole(self, "A"), whole(self, "B")
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


class LowRankLinear(nn.Module):
    """y = up(x[first r of order] + down(x[rest of order])): W [m, n] of rank r, where r rows of the left side [m, r] are the
    identity and not stored. `order` [m] has their places first. A dense W is `up` alone. Both are nn.Linear, which
    quantizers, LoRA and compilers look for."""

    def __init__(self, m, n, rank):
        super().__init__()
        self.rank = rank
        self.up = nn.Linear(rank, n)
        if rank < m:
            self.down = nn.Linear(m - rank, rank, bias=False)
            self.register_buffer("order", torch.arange(m, dtype=torch.int32))

    def forward(self, x):
        if not hasattr(self, "down"):
            return self.up(x)
        x = take_columns(x, self.order)
        return self.up(x[..., :self.rank] + self.down(x[..., self.rank:]))


class FactoredEmbedding(nn.Module):
    """Vectors E = A B of tokens or positions, with B [r, C]. Bands [(rows, columns), ...] give A [V, r] rows that are zero
    beyond their first columns. Where there is one band only, the first r rows of A are the identity and not stored. A is one
    vector, row after row; `row`, `start` and `columns` [V] tell where each token's numbers are."""

    def __init__(self, V, C, bands):
        super().__init__()
        rank = max(k for _, k in bands)
        self.n_units = rank if len(bands) == 1 else 0
        self.bands = [(V - rank, rank)] if self.n_units else bands
        self.A, self.B = new_factors(rank, (sum(n * k for n, k in self.bands),), (rank, C))
        columns = torch.tensor([0] * self.n_units + [k for n, k in self.bands for _ in range(n)], dtype=torch.int32)
        for name, values in dict(row=torch.arange(V), start=columns.cumsum(0) - columns, columns=columns).items():
            self.register_buffer(name, values.int())

    def forward(self, idx):
        column = torch.arange(len(self.B), device=idx.device)
        at = (self.start[idx][..., None] + column).clamp(max=len(self.A) - 1)
        rows = torch.where(column < self.columns[idx][..., None], self.A[at], 0)  # which stays int8
        if hasattr(self, "A_scale"):
            rows = rows * self.A_scale[idx]
        if self.n_units:
            rows = rows + (self.row[idx][..., None] == column)
        return (rows @ whole(self, "B")).to(rows.dtype)  # which autocast would leave in half precision

    def logits(self, x):
        """x Eᵀ."""
        z = F.linear(x, whole(self, "B"))
        parts = [part.view(n, k) for part, (n, k) in zip(self.A.split([n * k for n, k in self.bands]), self.bands)]
        logits = [z[..., :self.n_units]] + [z[..., :part.shape[1]] @ part.to(z.dtype).T for part in parts]
        logits = take_columns(torch.cat(logits, -1), self.row)
        return logits * self.A_scale.T.to(z.dtype) if hasattr(self, "A_scale") else logits


class TiedOutput(nn.Module):
    """The output layer of an embedding, which holds the weights."""

    def __init__(self, embedding):
        super().__init__()
        self.tied = (embedding,)  # a tuple, so that its parameters are not counted twice

    def forward(self, x):
        embedding = self.tied[0]  # which stays on its device where a model is split or copied
        return embedding.logits(x.to(next(embedding.parameters()).device)).to(x.device)


class Int8Linear(nn.Linear):
    def forward(self, x):
        return F.linear(x, whole(self, "weight"), self.bias)


class Int8Embedding(nn.Embedding):
    def forward(self, idx):
        return F.embedding(idx, self.weight) * F.embedding(idx, self.weight_scale)

    def logits(self, x):
        return F.linear(x, whole(self, "weight"))


def hold_int8(module):
    """Let a module hold weights in int8, with scales in `<name>_scale`: one for each output column of a matrix or a factor,
    and each token of an embedding."""
    module.__class__ = {nn.Linear: Int8Linear, nn.Embedding: Int8Embedding}.get(type(module), type(module))
    for name, p in [*module.named_parameters(recurse=False)]:
        if p.dim() > 1 or isinstance(module, FactoredEmbedding):  # no bias or layer norm
            rows = len(module.row) if p.dim() == 1 else len(p)
            setattr(module, name, nn.Parameter(p.new_zeros(p.shape, dtype=torch.int8), requires_grad=False))
            module.register_buffer(f"{name}_scale", p.new_ones(rows, 1, *p.shape[2:]))


def whole(module, name):
    """A weight of a module, times its scale where it is int8."""
    weight, scale = getattr(module, name), getattr(module, f"{name}_scale", None)
    return weight if scale is None else weight * scale


def take_columns(x, columns):
    """x[..., columns], by the fastest of several ways on a CPU."""
    if torch.is_autocast_enabled(x.device.type):  # which would make it float32
        with torch.autocast(x.device.type, enabled=False):
            return take_columns(x, columns)
    return x.gather(-1, columns.to(x.device, torch.long).expand(*x.shape[:-1], -1))


def from_left(L, X):
    """L [p, q] @ X [T, q, s] -> (T, p, s), as one large product on a transposed copy; where s = 1 nothing is copied."""
    T, q, s = X.shape
    return (X.transpose(1, 2).reshape(T * s, q) @ L.T).view(T, s, -1).transpose(1, 2)


def narrow_heads(attention, qk, v, head_dim):
    """Let GPT-2's attention work with heads of some widths of queries and keys, and of values. It has one width for all of
    them and the cache, to which zeros pad the output of c_attn. Scores stay divided by the root of head_dim."""
    width = equal_width(qk, v)
    attention.head_dim, attention.split_size, attention.scaling = width, len(qk) * width, width**-0.5
    for name, places in head_places(qk, v).items():
        attention.register_buffer(name, places)
    attention.c_attn.register_forward_hook(partial(pad_heads, attention, (width / head_dim)**0.5))
    attention.c_proj.register_forward_pre_hook(partial(cut_heads, attention))


def equal_width(qk, v):
    """The width that all heads get: a multiple of 8, which fast kernels want."""
    return -(-max(*qk, *v) // 8) * 8


def head_places(qk, v):
    """Where the columns of heads of equal width are among those of heads of some widths, with a zero at the end, and where
    the values of heads of some widths are among those of equal width."""
    width, zero, places, v_places, n = equal_width(qk, v), sum((*qk, *qk, *v)), [], [], 0
    for widths in qk, qk, v:
        for w in widths:
            places += [*range(n, n + w), *[zero] * (width - w)]
            n += w
    for head, w in enumerate(v):
        v_places += range(head * width, head * width + w)
    return dict(places=torch.tensor(places, dtype=torch.int32), v_places=torch.tensor(v_places, dtype=torch.int32))


def pad_heads(attention, scale, c_attn, inputs, output):
    q, k_and_v = take_columns(F.pad(output, (0, 1)), attention.places).tensor_split([attention.split_size], -1)
    return torch.cat((q * scale, k_and_v), dim=-1)


def cut_heads(attention, c_proj, inputs):
    return take_columns(inputs[0], attention.v_places),


class InitRest:
    """transformers initializes each module, and GPT-2's rule looks for a weight in c_proj. Factors are drawn where they are
    made, and only a file has weights in int8."""

    def _init_weights(self, module):
        if not (self.config.int8 or hasattr(module, "c_proj")):
            super()._init_weights(module)


class KronyGPTModel(InitRest, GPT2Model):
    config_class = KronyGPTConfig

    def __init__(self, config):
        super().__init__(config)
        C, head_dim = config.n_embd, config.n_embd // config.n_head
        for i, block in enumerate(self.h):
            hidden, qk, v = (config.widths[name][i] for name in ("n_inner", "head_qk", "head_v"))
            sizes = (C, 2 * sum(qk) + sum(v)), (sum(v), C), (C, hidden), (hidden, C)
            for name, (m, n) in zip(MATRICES, sizes):
                part, matrix = name.split(".")
                m1, n1, r = config.shapes[name][i]
                if (m1, n1, r) == (m, n, 1):
                    new = LowRankLinear(m, n, m)
                elif (m1, n1) in ((m, 1), (1, n)) and r < m:
                    new = LowRankLinear(m, n, r)
                else:
                    new = KronLinear(m, n, (m1, n1, r))
                setattr(getattr(block, part), matrix, new)
            if {*qk, *v} != {head_dim}:
                narrow_heads(block.attn, qk, v, head_dim)
        for name, rows in dict(wte=config.vocab_size, wpe=config.n_positions).items():
            if name in config.widths:
                setattr(self, name, FactoredEmbedding(rows, C, config.widths[name]))
        for module in self.modules() if config.int8 else ():
            hold_int8(module)
        self.post_init()


class KronyGPTForCausalLM(InitRest, GPT2LMHeadModel):
    config_class = KronyGPTConfig

    def __init__(self, config):
        super().__init__(config)
        self.transformer = KronyGPTModel(config)
        if "wte" in config.widths or config.int8:
            config.tie_word_embeddings = False  # by transformers, which knows one tensor for both
            self.lm_head = TiedOutput(self.transformer.wte)
        self.post_init()
