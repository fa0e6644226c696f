"""KronyGPT: GPT-2 whose MLP weights are sums of Kronecker products.

Each MLP matrix W of GPT-2 is replaced by sum_f A_f ⊗ B_f over r factors; everything else is GPT-2: learned positions,
pre-norm blocks, gelu_new, and one matrix for the embedding and the output. With C = n_embd,

    c_fc    W [C, 4C]:   c_fc_0   [r, dim_1, dim_2]     c_fc_1   [r, C/dim_1, 4C/dim_2]
    c_proj  W [4C, C]:   c_proj_0 [r, dim_2, dim_1]     c_proj_1 [r, 4C/dim_2, C/dim_1]

Dense GPT-2 is the member of this family with dim_1 = C, dim_2 = 4C, r = 1 and B = [[1.]].
"""
import math
import time
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100  # a target with this value is not scored (the default of F.cross_entropy)
COPY = 64  # multiply-adds that take as long as writing one number to memory; 32 to 500 choose alike
WIDE = 16  # columns from which a batch of small products beats one large product on a transposed copy
LOGITS_AT_ONCE = 2**24  # numbers in the logits of one chunk of the loss (64 MiB in float32)
LONG_ENOUGH = 0.02  # seconds of a matrix product that tell how fast the machine is
GPT2_HEAD_DIM = 64  # n_embd / n_head in GPT-2 small, medium, large and xl


class ModelError(ValueError):
    """A model that cannot be built or used as asked; the message is one line for the user."""

    exit_status = 2


def pick_device(name=""):
    """The torch.device of a name, or without one, CUDA where there is it and else the CPU.

    Raises:
        ModelError: no such device here.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ModelError(f"there is no device {name!r} here") from None
    return device


def autocast_to(device, dtype):
    """The autocast context of a device name for "float32" (none) or "bfloat16".

    Raises:
        ModelError: another dtype.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ModelError(f"dtype is float32 or bfloat16, not {dtype}")
    return torch.autocast(pick_device(device).type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


def matmul_flops(device, dtype):
    """Floating point operations per second of a large matrix product on this device: what "mfu" is a share of."""
    largest = 8192 if device.type == "cuda" else 2048
    n = 256
    while True:
        a = torch.ones(n, n, device=device, dtype=getattr(torch, dtype))
        best = math.inf
        for _ in range(5):
            start = time.perf_counter()
            (a @ a)[0, 0].item()  # waits for the device
            best = min(best, time.perf_counter() - start)
        if n == largest or best > LONG_ENOUGH:  # bfloat16 at 2048 takes minutes on some CPUs
            break
        n *= 2
    return 2 * n**3 / best


@dataclass
class KronyGPTConfig:
    """Shapes of a KronyGPT.

    dim_1 and dim_2 are the sides of A in c_fc: dim_1 divides n_embd and dim_2 divides 4 * n_embd. Left out, they make
    the dense GPT-2. `factors` is r, one int for all layers or one per layer; it is kept as one per layer.

    Raises:
        ModelError: sizes that do not fit each other.
    """

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    dim_1: int | None = None
    dim_2: int | None = None
    factors: int | tuple[int, ...] = 1

    def __post_init__(self):
        self.dim_1 = self.n_embd if self.dim_1 is None else self.dim_1
        self.dim_2 = self.n_hidden if self.dim_2 is None else self.dim_2
        if isinstance(self.factors, int):
            self.factors = (self.factors,) * self.n_layer
        self.factors = tuple(self.factors)
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "dim_1", "dim_2"):
            if getattr(self, name) < 1:
                raise ModelError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ModelError(f"n_head={self.n_head} does not divide n_embd={self.n_embd}")
        if self.n_embd % self.dim_1:
            raise ModelError(f"dim_1={self.dim_1} does not divide n_embd={self.n_embd}")
        if self.n_hidden % self.dim_2:
            raise ModelError(f"dim_2={self.dim_2} does not divide 4 * n_embd={self.n_hidden}")
        if len(self.factors) != self.n_layer:
            raise ModelError(f"{len(self.factors)} numbers of factors for {self.n_layer} layers: give one, or one each")
        if min(self.factors) < 1:
            raise ModelError(f"the number of factors must be at least 1, not {min(self.factors)}")
        if not 0 <= self.dropout < 1:
            raise ModelError(f"dropout must be in [0, 1), not {self.dropout}")

    @property
    def n_hidden(self):
        """Width of the MLP's hidden layer."""
        return 4 * self.n_embd

    @property
    def sides(self):
        """Sides (m1, n1, m2, n2) of A [m1, n1] and B [m2, n2] in c_fc; c_proj has them as (n1, m1, n2, m2)."""
        return self.dim_1, self.dim_2, self.n_embd // self.dim_1, self.n_hidden // self.dim_2


def kron_weight(A, B):
    """The dense matrix sum_f A_f ⊗ B_f [m1*m2, n1*n2] of A [r, m1, n1] and B [r, m2, n2]."""
    (r, m1, n1), (_, m2, n2) = A.shape, B.shape
    if r == 1:
        W = A[0, :, None, :, None] * B[0, None, :, None, :]  # (m1, m2, n1, n2)
    else:
        W = (A.flatten(1).T @ B.flatten(1)).view(m1, n1, m2, n2).transpose(1, 2)  # the sum over f is one product
    return W.reshape(m1 * m2, n1 * n2)


def multiply_adds(sides, r):
    """Multiply-adds per token of x (sum of r A ⊗ B), in each order of contraction.

    Args:
        sides: (m1, n1, m2, n2) of A [r, m1, n1] and B [r, m2, n2].

    Returns:
        {"A": A first, "B": B first, "W": W built once and multiplied}; building W is not counted.
    """
    m1, n1, m2, n2 = sides
    return {"A": r * n1 * m2 * (m1 + n2), "B": r * m1 * n2 * (m2 + n1), "W": m1 * m2 * n1 * n2}


def contraction_order(sides, r, tokens):
    """The cheapest order in which to contract x with r A ⊗ B: "A" first, "B" first, or "W" built and multiplied.

    The cost counts multiply-adds and, as COPY of them, each element of an intermediate that is written to memory:

        A:  T r n1 m2 (m1 + n2)  +  COPY T (r n1 m2 + [1 < m2 < WIDE] (m1 m2 + r n1 m2))
        B:  T r m1 n2 (m2 + n1)  +  COPY T (r m1 n2 + [1 < n2 < WIDE] (n1 n2 + r m1 n2))
        W:  (T + r) m1 m2 n1 n2  +  COPY 2 m1 m2 n1 n2

    with T tokens; the brackets are the transposed copies in `multiply_left`. Backward costs twice as much in every order.
    """
    m1, n1, m2, n2 = sides
    macs = multiply_adds(sides, r)
    after_a, after_b, dense = r * n1 * m2, r * m1 * n2, m1 * m2 * n1 * n2
    costs = {
        "A": tokens * (macs["A"] + COPY * (after_a + (1 < m2 < WIDE) * (m1 * m2 + after_a))),
        "B": tokens * (macs["B"] + COPY * (after_b + (1 < n2 < WIDE) * (n1 * n2 + after_b))),
        "W": tokens * macs["W"] + r * dense + COPY * 2 * dense,
    }
    return min(costs, key=costs.get)


class SharedLeftProduct(torch.autograd.Function):
    """L [p, q] @ X [T, q, s] -> [T, p, s] with one L for all T.

    Autograd's own backward of the broadcast product would make a gradient of L for each of the T and add them up.
    """

    @staticmethod
    def forward(L, X):
        return torch.bmm(L.expand(len(X), -1, -1), X)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        L, X = ctx.saved_tensors
        grad_L = grad_X = None
        if ctx.needs_input_grad[0]:
            grad_L = grad.transpose(0, 1).flatten(1) @ X.transpose(0, 1).flatten(1).T
        if ctx.needs_input_grad[1]:
            grad_X = torch.bmm(L.T.expand(len(X), -1, -1), grad)
        return grad_L, grad_X


def multiply_left(L, X):
    """L [p, q] @ X [T, q, s] -> [T, p, s]: batched where the products are wide, else one large one on a transposed copy."""
    T, q, s = X.shape
    if s == 1:
        return (X.reshape(T, q) @ L.T)[:, :, None]
    if s < WIDE:
        return (X.transpose(1, 2).reshape(T * s, q) @ L.T).view(T, s, -1).transpose(1, 2)
    return SharedLeftProduct.apply(L, X)


def kron_linear(x, A, B, bias, order=None):
    """x (sum_f A_f ⊗ B_f) + bias, without the Kronecker products where that is cheaper.

        y[t, j1, j2] = sum over f, i1, i2 of x[t, i1, i2] A[f, i1, j1] B[f, i2, j2]

    Args:
        x: (..., m1*m2).
        A: [r, m1, n1].
        B: [r, m2, n2].
        bias: [n1*n2].
        order: "A", "B" or "W", to force an order; contraction_order chooses if left out.

    Returns:
        (..., n1*n2)
    """
    if torch.is_autocast_enabled(x.device.type):  # for what autocast does not know: broadcast and batched products
        x, A, B = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, A, B))
    (r, m1, n1), (_, m2, n2) = A.shape, B.shape
    rows = x.reshape(-1, m1 * m2)
    T = len(rows)
    order = order or contraction_order((m1, n1, m2, n2), r, T)
    if order == "W":
        y = rows @ kron_weight(A, B)
    elif order == "A":
        z = multiply_left(A.permute(2, 0, 1).reshape(n1 * r, m1), rows.reshape(T, m1, m2))  # (T, n1*r, m2)
        z = z.reshape(T * n1, r * m2)
        y = z * B[0] if r * m2 == 1 else z @ B.reshape(r * m2, n2)  # (T*n1, n2)
    else:
        z = rows.reshape(T * m1, m2) @ B.transpose(0, 1).reshape(m2, r * n2)  # (T*m1, r*n2)
        y = multiply_left(A.permute(2, 1, 0).reshape(n1, m1 * r), z.view(T, m1 * r, n2))  # (T, n1, n2)
    return y.reshape(*x.shape[:-1], n1 * n2) + bias


class Teacher(NamedTuple):
    """What a model learns from beside the next token, in distillation: share of the loss (1 - share is left to the cross
    entropy) times temperature² KL(teacher ‖ student) of the softened distributions (Hinton, Vinyals and Dean, arXiv
    1503.02531)."""

    x: torch.Tensor  # (B, T, C'), the teacher's final hidden states
    W: torch.Tensor  # (vocab_size, C'), its output matrix
    share: float
    temperature: float


def divergence(logits, teacher_logits, temperature):
    """temperature² KL(teacher ‖ student) of each token (T, 1), and its gradient by logits (T, vocab_size)."""
    log_student, log_teacher = (F.log_softmax(values / temperature, dim=1) for values in (logits, teacher_logits))
    teacher = log_teacher.exp()
    kl = (teacher * log_teacher.sub_(log_student)).sum(1, keepdim=True)
    return temperature**2 * kl, log_student.exp_().sub_(teacher).mul_(temperature)


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of x W^T against targets, a chunk of tokens at a time, so that memory does not grow with
    tokens × vocabulary. Forward computes the gradients as well, while it has the logits of a chunk. With a Teacher, the
    divergence from it is part of the loss."""

    @staticmethod
    def forward(ctx, x, W, targets, dtype, with_grad, teacher):
        n = (targets != IGNORE_INDEX).sum().clamp(min=1)
        with_grad_x, with_grad_W = (with_grad and needed for needed in ctx.needs_input_grad[:2])
        W_cast, teacher_W = W.to(dtype), teacher.W.to(dtype) if teacher else None
        grad_x = torch.empty_like(x) if with_grad_x else None
        grad_W = None
        total = x.new_zeros((), dtype=torch.float32)
        chunk = min(len(x), max(1, LOGITS_AT_ONCE // len(W)))
        share = teacher.share if teacher else 0.0
        buffer = x.new_empty(chunk, len(W), dtype=dtype)  # one for all chunks: fresh memory costs as much as the product
        for start in range(0, len(x), chunk):
            rows, wanted = x[start:start + chunk].to(dtype), targets[start:start + chunk, None]
            kept = wanted != IGNORE_INDEX
            wanted = wanted.clamp(min=0)
            logits = torch.mm(rows, W_cast.T, out=buffer[:len(rows)]).float()  # (chunk, vocab_size)
            if teacher:
                teacher_logits = teacher.x[start:start + chunk].to(dtype) @ teacher_W.T
                kl, kl_grad = divergence(logits, teacher_logits.float(), teacher.temperature)
                total += share * (kl * kept).sum()
            highest = logits.amax(dim=1, keepdim=True)
            logit = logits.gather(1, wanted) - highest
            powers = logits.sub_(highest).exp_()
            normalizer = powers.sum(dim=1, keepdim=True)
            total += (1 - share) * ((normalizer.log() - logit) * kept).sum()
            if not (with_grad_x or with_grad_W):
                continue
            weight = kept / n  # the gradient is softmax - onehot, over the number of tokens
            grad = powers.mul_(weight / normalizer).scatter_add_(1, wanted, -weight)
            if teacher:
                grad = grad.mul_(1 - share).add_(kl_grad.mul_(share * weight))
            grad = grad.to(dtype)
            if with_grad_x:
                grad_x[start:start + chunk] = grad @ W_cast
            if with_grad_W:
                if grad_W is None:
                    grad_W = (grad.T @ rows).to(W.dtype)
                elif dtype == W.dtype:
                    grad_W.addmm_(grad.T, rows)
                else:
                    grad_W += grad.T @ rows
        ctx.save_for_backward(grad_x, grad_W)
        return total / n

    @staticmethod
    def backward(ctx, grad):
        scaled = (None if g is None else g.mul_(grad) for g in ctx.saved_tensors)  # in place: they are as large as W
        return *scaled, None, None, None, None


def linear_cross_entropy(x, W, targets, teacher=None):
    """Mean cross entropy in nats, a float32 scalar, of logits x W^T that are never whole in memory.

    Under autocast the products are in its type and everything else is in float32. It can be differentiated once.
    (F.linear_cross_entropy of torch 2.13 ignores autocast, and gives nan gradients where all targets are ignored.)

    Args:
        x: (T, C).
        W: (vocab_size, C).
        targets: (T,), IGNORE_INDEX where not scored; if none is, the loss is 0.
        teacher: a Teacher for distillation, with x (T, C'); its logits are never whole in memory either.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    with torch.autocast(device, enabled=False):
        return ChunkedCrossEntropy.apply(x, W, targets, dtype, torch.is_grad_enabled(), teacher)


class KronyMLP(nn.Module):
    """GPT-2's MLP, with c_fc and c_proj as sums of r Kronecker products."""

    def __init__(self, config, r):
        super().__init__()
        m1, n1, m2, n2 = config.sides
        self.c_fc_0 = nn.Parameter(torch.empty(r, m1, n1))
        self.c_proj_0 = nn.Parameter(torch.empty(r, n1, m1))
        self.c_fc_1 = nn.Parameter(torch.empty(r, m2, n2))
        self.c_proj_1 = nn.Parameter(torch.empty(r, n2, m2))
        if r * m2 * n2 == 1:
            # A ⊗ [[b]] is A times b: a second name for the scale of A. It is no parameter, so that the dense member of
            # the family has GPT-2's parameters and trains as GPT-2 does.
            for name in ("c_fc_1", "c_proj_1"):
                delattr(self, name)
                self.register_buffer(name, torch.ones(1, 1, 1))
        self.c_fc_bias = nn.Parameter(torch.zeros(config.n_hidden))
        self.c_proj_bias = nn.Parameter(torch.zeros(config.n_embd))
        self.dropout = nn.Dropout(config.dropout)

    def factor_pairs(self):
        return (self.c_fc_0, self.c_fc_1), (self.c_proj_0, self.c_proj_1)

    def project(self, x):
        x = F.gelu(x, approximate="tanh")
        return kron_linear(x, self.c_proj_0, self.c_proj_1, self.c_proj_bias)

    def forward(self, x):
        x = kron_linear(x, self.c_fc_0, self.c_fc_1, self.c_fc_bias)  # (B, T, 4C)
        if torch.is_grad_enabled():
            # the widest tensor but one is made again in backward: a fifth of a step's memory for little time
            x = checkpoint(self.project, x, use_reentrant=False, preserve_rng_state=False)  # (B, T, C)
        else:
            x = self.project(x)
        return self.dropout(x)


class KVCache:
    """Keys and values of the tokens seen so far, in every layer."""

    def __init__(self, n_layer, length):
        self.layers = [None] * n_layer  # of (2, B, n_head, length, C/n_head)
        self.length = length
        self.seen = 0

    def extend(self, layer, k, v):
        """Append k and v (B, n_head, T, C/n_head) of the newest tokens; returns those of all tokens."""
        if self.layers[layer] is None:
            self.layers[layer] = k.new_empty(2, *k.shape[:2], self.length, k.shape[3])
        store = self.layers[layer]
        end = self.seen + k.shape[2]
        store[0, :, :, self.seen:end], store[1, :, :, self.seen:end] = k, v
        return store[:, :, :, :end].unbind()


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer = layer
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout

    def forward(self, x, cache=None):
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, n_head, T, C/n_head)
                   for part in self.c_attn(x).chunk(3, dim=-1))
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        is_causal = q.shape[2] > 1  # a single token sees all of the cache; several come only when it is empty
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, dropout_p=dropout)
        y = y.transpose(1, 2).flatten(-2)  # (B, T, C)
        return self.resid_dropout(self.c_proj(y))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = KronyMLP(config, config.factors[layer])

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class KronyGPT(nn.Module):
    """GPT-2 with Kronecker-factored MLPs.

    model(idx) gives logits (B, T, vocab_size); model(idx, targets) gives the mean cross entropy in nats, a scalar.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied
        if self.lm_head.weight.device.type != "meta":  # a meta model waits for the weights of a checkpoint
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's initialisation, with Kronecker sums of the same size as the matrices that they stand for.

        GPT-2 draws weights with a standard deviation of 0.02, and 0.02 / sqrt(2 n_layer) where a block writes to the
        residual stream. An element of the sum is sum_f a_f b_f, of variance r var(a) var(b): both sides get the scale
        sqrt(std / sqrt(r)), so that their steps under Adam are alike. The smaller side is brought to that scale
        exactly, since the mean square of a few normal numbers is far from its expectation. A side of one element is
        1, which leaves A to be drawn as GPT-2 draws W where the model is dense.
        """
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=residual_std if name.endswith("attn.c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)
        for block in self.transformer.h:
            for (A, B), std in zip(block.mlp.factor_pairs(), (0.02, residual_std)):
                small, large = sorted((A, B), key=lambda side: side[0].numel())
                std /= math.sqrt(len(A))
                scale = math.sqrt(std) if small[0].numel() > 1 else 1.0
                nn.init.normal_(large, std=std / scale)
                nn.init.normal_(small)
                small.mul_(scale / small.square().mean(dim=(1, 2), keepdim=True).sqrt())
                if small[0].numel() == 1:
                    small.fill_(1.0)

    def hidden(self, idx, cache=None):
        """The final hidden state (B, T, C), after the last layer norm, of tokens idx (B, T).

        With a KVCache, idx continues the tokens that it has seen: any number of them at first, then one at a time.

        Raises:
            ModelError: more than block_size tokens.
        """
        start = 0 if cache is None else cache.seen
        end = start + idx.shape[1]
        if end > self.config.block_size:
            raise ModelError(f"{end} tokens do not fit into the context of {self.config.block_size}")
        position = torch.arange(start, end, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(position))  # (B, T, C)
        for block in self.transformer.h:
            x = block(x, cache)
        if cache is not None:
            cache.seen = end
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None, teacher=None):
        """Logits (B, T, vocab_size) of idx (B, T), or with targets (B, T) the mean cross entropy over those that are
        not IGNORE_INDEX, mixed with the divergence from a Teacher."""
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x)
        if teacher is not None:
            teacher = teacher._replace(x=teacher.x.flatten(0, 1))
        return linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), teacher)

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, seed=None):
        """Continue token sequences.

        Args:
            idx: (B, T) tokens to continue; the model sees the last block_size of them.
            max_new_tokens: how many to add.
            temperature: divides the logits; 0 takes the most likely token.
            top_k: sample among this many most likely tokens only.
            seed: of the sampling; without it, torch's global generator is used.

        Returns:
            (B, T + max_new_tokens)
        """
        block_size = self.config.block_size
        generator = None if seed is None else torch.Generator(device=idx.device).manual_seed(seed)
        was_training = self.training
        self.eval()
        cache = None
        for _ in range(max_new_tokens):
            if idx.shape[1] > block_size:  # the window slides, so every token has a new position: nothing can be kept
                x = self.hidden(idx[:, -block_size:])
            elif cache is None:
                cache = KVCache(self.config.n_layer, min(idx.shape[1] + max_new_tokens, block_size))
                x = self.hidden(idx, cache)
            else:
                x = self.hidden(idx[:, -1:], cache)
            logits = self.lm_head(x[:, -1]).float()  # (B, vocab_size)
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            if temperature == 0:
                token = logits.argmax(dim=-1, keepdim=True)
            else:
                token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)
            idx = torch.cat((idx, token), dim=1)
        self.train(was_training)
        return idx

    def parameters_by_kind(self):
        """{kind: [parameters]}: "factors" of the MLPs, other "matrices", and "vectors" (biases and layer norms)."""
        kinds = {"factors": [], "matrices": [], "vectors": []}
        for p in self.parameters():  # tied parameters come once
            kinds["vectors" if p.dim() == 1 else "matrices" if p.dim() == 2 else "factors"].append(p)
        return kinds

    def count_parameters(self):
        """{"total", "mlp" (factors and biases), "factors", "matrices", "vectors"}: numbers of parameters."""
        counts = {kind: sum(p.numel() for p in group) for kind, group in self.parameters_by_kind().items()}
        mlp = sum(p.numel() for block in self.transformer.h for p in block.mlp.parameters())
        return {"total": sum(counts.values()), "mlp": mlp, **counts}

    def flops_per_token(self):
        """Floating point operations per token of a training step on full blocks, forward and backward.

        Two per multiply-add, and backward costs twice forward; attention is counted as in PaLM (arXiv 2204.02311,
        appendix B). The MLPs count what their cheapest contraction does, not what a dense matrix would.
        """
        config = self.config
        m1, n1, m2, n2 = config.sides
        mlps = sum(min(multiply_adds(sides, r).values()) for r in config.factors
                   for sides in ((m1, n1, m2, n2), (n1, m1, n2, m2)))
        linear = sum(p.numel() for p in self.parameters_by_kind()["matrices"]) - self.transformer.wpe.weight.numel()
        attention = 2 * config.n_layer * config.n_embd * config.block_size
        return 6 * (mlps + linear + attention)

    def freeze_all_but_factors(self):
        """Leave the Kronecker factors alone trainable."""
        for kind, group in self.parameters_by_kind().items():
            for p in group:
                p.requires_grad &= kind == "factors"

    def configure_optimizers(self, learning_rate, weight_decay, betas, factor_lr_scale=1.0):
        """AdamW over three groups: Kronecker factors and other matrices (with weight decay), vectors (without).

        Each group carries `lr_scale`, by which a schedule multiplies its learning rate: factor_lr_scale for the
        factors, 1 for the others.
        """
        groups = []
        for kind, group in self.parameters_by_kind().items():
            scale = factor_lr_scale if kind == "factors" else 1.0
            groups.append(dict(params=[p for p in group if p.requires_grad], name=kind, lr=learning_rate * scale,
                               lr_scale=scale, weight_decay=0.0 if kind == "vectors" else weight_decay))
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, fused=True)

    @torch.no_grad()
    def refactored(self, dim_1, dim_2, factors, approximate):
        """A KronyGPT with other factors in its MLPs, and the same tensors elsewhere.

        Args:
            dim_1, dim_2, factors: the new shape, as in KronyGPTConfig.
            approximate: function (W [m, n], dim_1, dim_2, n_factors) -> A [n_factors, dim_1, dim_2], B; it is called
                with each c_fc, and with each c_proj and its dims exchanged.

        Raises:
            ModelError: dims that do not divide, or more factors than the matrices can use.
        """
        config = KronyGPTConfig(**dict(self.model_args(), dim_1=dim_1, dim_2=dim_2, factors=factors))
        m1, n1, m2, n2 = config.sides
        most = min(m1 * n1, m2 * n2)
        if max(config.factors) > most:
            raise ModelError(f"{max(config.factors)} factors of ({dim_1}, {dim_2}): a sum of {most} reaches every matrix")
        state_dict = self.state_dict()
        for layer, (block, r) in enumerate(zip(self.transformer.h, config.factors)):
            for name, pair, dims in zip(("c_fc", "c_proj"), block.mlp.factor_pairs(), ((m1, n1), (n1, m1))):
                A, B = approximate(kron_weight(*pair), *dims, r)
                state_dict[f"transformer.h.{layer}.mlp.{name}_0"] = A
                state_dict[f"transformer.h.{layer}.mlp.{name}_1"] = B
        return self.from_state_dict(asdict(config), state_dict)

    @classmethod
    def from_state_dict(cls, model_args, state_dict):
        """A model of the shapes in model_args (the fields of KronyGPTConfig) that takes over the tensors of
        state_dict without a copy.

        Raises:
            ModelError: names or shapes that do not fit model_args.
        """
        with torch.device("meta"):
            model = cls(KronyGPTConfig(**model_args))
        expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        found = {name: tuple(p.shape) for name, p in state_dict.items()}
        for name in expected.keys() | found.keys():
            if expected.get(name) != found.get(name):
                raise ModelError(f"weight {name} is {found.get(name, 'missing')}, where the model has "
                                 f"{expected.get(name, 'none')}")
        model.load_state_dict(state_dict, assign=True)
        model.lm_head.weight = model.transformer.wte.weight
        return model

    @classmethod
    def from_pretrained(cls, source):
        """The dense KronyGPT of a Hugging Face GPT-2: a hub name (gpt2, gpt2-medium, gpt2-large, gpt2-xl, or any
        other of this architecture) or a local directory.

        Raises:
            ModelError: the model is not a GPT-2 that this class can be equal to.
            OSError: it could not be read or downloaded.
        """
        from transformers import AutoConfig, GPT2LMHeadModel

        hf_config = AutoConfig.from_pretrained(source)
        check_is_gpt2(hf_config, source)
        hf_model, report = GPT2LMHeadModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
        if report["missing_keys"]:
            raise ModelError(f"{source} lacks the weights {', '.join(sorted(report['missing_keys'])[:3])}, ...")
        args = dict(block_size=hf_config.n_positions, vocab_size=hf_config.vocab_size, n_layer=hf_config.n_layer,
                    n_head=hf_config.n_head, n_embd=hf_config.n_embd)
        return cls.from_state_dict(args, dict(gpt2_to_krony(hf_model.state_dict())))

    def to_transformers(self):
        """The transformers GPT2LMHeadModel that computes the same function, with each Kronecker sum written out."""
        from transformers import GPT2Config, GPT2LMHeadModel

        config = self.config
        hf_config = GPT2Config(vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd,
                               n_layer=config.n_layer, n_head=config.n_head, resid_pdrop=config.dropout,
                               embd_pdrop=config.dropout, attn_pdrop=config.dropout)
        hf_model = GPT2LMHeadModel(hf_config)
        hf_model.load_state_dict(dict(krony_to_gpt2(self.state_dict())))
        return hf_model.eval()

    def model_args(self):
        """The fields of the config as plain types, as a checkpoint keeps them."""
        return asdict(self.config)


def check_is_gpt2(hf_config, source):
    """Raise ModelError unless a transformers config describes the function that KronyGPT computes."""
    if hf_config.model_type != "gpt2":
        raise ModelError(f"{source} is a {hf_config.model_type} model, not a GPT-2")
    wanted = dict(activation_function="gelu_new", layer_norm_epsilon=1e-5, scale_attn_weights=True,
                  scale_attn_by_inverse_layer_idx=False, add_cross_attention=False, tie_word_embeddings=True)
    for name, value in wanted.items():
        if getattr(hf_config, name) != value:
            raise ModelError(f"{source} is a GPT-2 with {name}={getattr(hf_config, name)}, where {value} is needed")
    if hf_config.n_inner not in (None, 4 * hf_config.n_embd):
        raise ModelError(f"{source} is a GPT-2 with n_inner={hf_config.n_inner}, where 4 * n_embd is needed")


def gpt2_to_krony(state_dict):
    """(name, tensor) of a dense KronyGPT from those of transformers' GPT-2, whose Conv1D weights are [in, out]."""
    for name, p in state_dict.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask, which older files hold
        if name.endswith((".attn.c_attn.weight", ".attn.c_proj.weight")):
            yield name, p.t().contiguous()
        elif ".mlp." in name and name.endswith(".weight"):
            stem = name.removesuffix(".weight")
            yield stem.replace("c_fc", "c_fc_0").replace("c_proj", "c_proj_0"), p[None]
            yield stem.replace("c_fc", "c_fc_1").replace("c_proj", "c_proj_1"), p.new_ones(1, 1, 1)
        elif ".mlp." in name:
            yield name.replace(".bias", "_bias"), p
        else:
            yield name, p


def krony_to_gpt2(state_dict):
    """(name, tensor) of transformers' GPT-2 from those of a KronyGPT, whose Kronecker sums are written out."""
    for name, p in state_dict.items():
        if name.endswith((".attn.c_attn.weight", ".attn.c_proj.weight")):
            yield name, p.t().contiguous()
        elif ".mlp." in name and name.endswith("_0"):
            yield name.removesuffix("_0") + ".weight", kron_weight(p, state_dict[name.removesuffix("_0") + "_1"])
        elif ".mlp." in name and name.endswith("_bias"):
            yield name.replace("_bias", ".bias"), p
        elif not (".mlp." in name and name.endswith("_1")):
            yield name, p
