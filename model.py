"""KronyGPT: GPT-2 whose weight matrices may be sums of Kronecker products, whose heads and MLPs may be narrower, and whose
embeddings may be of low rank. Everything else is GPT-2: learned positions, pre-norm blocks, gelu_new, and one matrix for the
embedding and the output."""
import math
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class KronLinear(nn.Module):
    """y = x W + bias with W [m, n] = Σ_{f<r} A_f ⊗ B_f, of the shape (dim_1, dim_2, r): each A_f is [dim_1, dim_2], and each
    B_f is [m/dim_1, n/dim_2]. Low rank is (m, 1, r). Dense is (m, n, 1), with B = [[1]], which is no parameter."""

    def __init__(self, m, n, shape):
        super().__init__()
        dim_1, dim_2, r = shape
        self.is_dense = tuple(shape) == (m, n, 1)
        self.A = nn.Parameter(torch.empty(r, dim_1, dim_2))
        if self.is_dense:
            self.register_buffer("B", torch.ones(1, 1, 1))
        else:
            self.B = nn.Parameter(torch.empty(r, m // dim_1, n // dim_2))
        self.bias = nn.Parameter(torch.zeros(n))

    def forward(self, x):
        return self.product(x, self.A, self.B, self.bias)

    def product(self, x, A, B, bias):
        if self.is_dense:
            return torch.addmm(bias, x.flatten(0, -2), A.squeeze(0)).view(*x.shape[:-1], -1)
        return kron_linear(x, A, B, bias)  # x @ sum(torch.kron(A[f], B[f]) for f in range(r)) + bias

    @property
    def weight(self):  # W [m, n]
        return kron_weight(self.A, self.B)

    def count_parameters(self):
        """Numbers in a file, where each rank counts once: of low rank, r rows of a side are the identity."""
        (r, m1, n1), (_, m2, n2) = self.A.shape, self.B.shape
        is_low_rank = not self.is_dense and (n1 == m2 == 1 or m1 == n2 == 1)
        saved = r * r if is_low_rank and r < m1 * m2 and n1 * n2 > 1 else 0
        return sum(p.numel() for p in self.parameters()) - saved

    def init_weights(self, std):
        """Draw normal weights so that an element of W, Σ_f a_f b_f, has the standard deviation std. Both sides get the scale
        sqrt(std / sqrt(r)), so that Adam changes them alike; the smaller one exactly, since the mean square of a few normal
        numbers is far from its expectation. A side of one element is 1."""
        small, large = sorted((self.B, self.A), key=lambda side: side[0].numel())
        std /= math.sqrt(len(self.A))
        scale = math.sqrt(std) if small[0].numel() > 1 else 1.0
        nn.init.normal_(large, std=std / scale)
        if small[0].numel() > 1:
            nn.init.normal_(small)
            small *= scale / small.square().mean(dim=(1, 2), keepdim=True).sqrt()
        else:
            nn.init.ones_(small)


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.dropout, self.scale = layer, config.n_head, config.dropout, config.head_dim**-0.5
        qk, v = config.head_qk[layer], config.head_v[layer]
        self.widths = [config.n_head * equal_width(widths) for widths in (qk, qk, v)]
        self.c_attn = PaddedKronLinear(*config.size_and_shape("attn.c_attn", layer), 1, (qk, qk, v))
        self.c_proj = PaddedKronLinear(*config.size_and_shape("attn.c_proj", layer), 0, (v,))
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None):
        return self.resid_dropout(self.c_proj(self.between(self.c_attn(x), cache)))  # (B, T, C)

    def between(self, qkv, cache=None):
        """From the output of c_attn to the input of c_proj."""
        q, k, v = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, n_head, T, head_qk or head_v)
                   for part in qkv.split(self.widths, dim=-1))
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)
        mask = None if cache is None else cache.mask
        is_causal = cache is None or q.shape[2] > 1  # a single token sees all of the cache; several come when it is empty
        if is_causal and q.shape[-1] != v.shape[-1]:  # fast kernels want one width for all of them
            width = max(q.shape[-1], v.shape[-1])
            q, k, v = (F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
        if is_causal or q.dtype != torch.float32:
            dropout = self.dropout if self.training else 0.0
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, dropout_p=dropout, scale=self.scale)
        else:  # fast kernels of float32 give a head to one core or multiprocessor; a single query of 900 tokens takes long
            scores = q * self.scale @ k.mT
            y = (scores if mask is None else scores + mask).softmax(-1) @ v
        return y[..., :self.widths[2] // self.n_head].transpose(1, 2).flatten(-2)


class MLP(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.c_fc = KronLinear(*config.size_and_shape("mlp.c_fc", layer))
        self.c_proj = KronLinear(*config.size_and_shape("mlp.c_proj", layer))
        self.dropout = nn.Dropout(config.dropout)

    def between(self, x):
        return F.gelu(x, approximate="tanh")

    def project(self, x):
        return self.c_proj(self.between(x))

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, n_inner)
        if self.config.recompute and torch.is_grad_enabled():
            return self.dropout(checkpoint(self.project, x, use_reentrant=False, preserve_rng_state=False))
        return self.dropout(self.project(x))  # (B, T, C)


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config, layer)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class Embedding(nn.Module):
    """Vectors E [V, C] of tokens or positions: dense, or A B of low rank. Bands [(rows, columns), ...] make A a staircase:
    the rows of a band are zero beyond its first columns, so that rare tokens have fewer numbers. A is stored as one vector,
    row after row. Dense is [(V, C)]."""

    def __init__(self, V, C, bands):
        super().__init__()
        self.bands, self.is_dense = bands, bands == [(V, C)]
        self.register_buffer("row", torch.arange(V) if len(bands) > 1 else None)  # of each token in A
        if self.is_dense:
            self.weight = nn.Parameter(torch.empty(V, C))
            return
        self.A = nn.Parameter(torch.empty(sum(n * k for n, k in bands)))
        self.B = nn.Parameter(torch.empty(max(k for _, k in bands), C))
        columns = torch.tensor([k for n, k in bands for _ in range(n)], device="cpu")
        self.register_buffer("columns", columns, persistent=False)  # of each row, and where they begin
        self.register_buffer("starts", columns.cumsum(0) - columns, persistent=False)

    def forward(self, idx):
        if self.is_dense:
            return F.embedding(idx, self.weight)
        row = idx if self.row is None else self.row[idx]
        column = torch.arange(len(self.B), device=idx.device)
        at = (self.starts[row][..., None] + column).clamp(max=len(self.A) - 1)
        A = torch.where(column < self.columns[row][..., None], self.A[at], 0.0)
        return (A @ self.B).to(self.B.dtype)  # which autocast would leave in half precision, and the residual stream with it

    def parts(self):
        """A, or E where it is dense, as [rows, columns] of each band."""
        if self.is_dense:
            return [self.weight]
        return [part.view(n, k) for part, (n, k) in zip(self.A.split([n * k for n, k in self.bands]), self.bands)]

    def as_output(self, x, targets):
        """The arguments of linear_cross_entropy for the tied output, from hidden states x (T, C) and targets (T,)."""
        if self.row is not None:
            targets = torch.where(targets == IGNORE_INDEX, targets, self.row[targets.clamp(min=0)])
        return x if self.is_dense else F.linear(x, self.B), self.parts(), targets

    def logits(self, x):
        """x Eᵀ (..., V) of hidden states x (..., C)."""
        logits = product_of_bands(x if self.is_dense else F.linear(x, self.B), self.parts())
        return logits if self.row is None else take_columns(logits, self.row)

    def dense(self):
        """E [V, C]."""
        if self.is_dense:
            return self.weight
        E = torch.cat([part @ self.B[:part.shape[1]] for part in self.parts()])
        return E if self.row is None else E[self.row]

    def count_parameters(self):
        """Numbers in a file, where the rank of a single band counts once."""
        saved = len(self.B)**2 if not self.is_dense and len(self.bands) == 1 and len(self.B) < self.bands[0][0] else 0
        return sum(p.numel() for p in self.parameters()) - saved

    def init_weights(self, std):
        """Draw normal weights so that an element of E has the standard deviation std."""
        for p in self.parameters():
            nn.init.normal_(p, std=std if self.is_dense else math.sqrt(std / math.sqrt(len(self.B))))


class Shape(NamedTuple):
    """A matrix [m, n] as the sum of `factors` products A ⊗ B: A is [dim_1, dim_2], B is [m/dim_1, n/dim_2]."""

    dim_1: int
    dim_2: int
    factors: int


KINDS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")  # matrices of a block, as it applies them


def mlp_shapes(dim_1, dim_2, factors):
    """The shapes of Krony-PT: (dim_1, dim_2) for c_fc and its mirror image for c_proj, with factors[layer] products."""
    return {"mlp.c_fc": [Shape(dim_1, dim_2, r) for r in factors], "mlp.c_proj": [Shape(dim_2, dim_1, r) for r in factors]}


@dataclass
class KronyGPTConfig:
    """Sizes of a KronyGPT; ValueError where they do not fit each other. A width is given as one number, or one for each
    block, and kept as a list; the widths of heads may also be one for each head of each block, and are kept so."""

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_inner: int | list[int] | None = None  # hidden units of an MLP; default: 4 n_embd
    head_qk: int | list | None = None  # width of a head's queries and keys; default: head_dim
    head_v: int | list | None = None  # width of a head's values; default: head_dim
    head_dim: int | None = None  # scores are divided by its root: the width of a head before narrowing; default: C / n_head
    dropout: float = 0.0
    recompute: bool = False  # compute the MLP's activation again in backward: less memory, more time
    shapes: dict[str, list[Shape]] = field(default_factory=dict)  # {"mlp.c_fc": [Shape of each block]}; default: dense
    wte: list[tuple[int, int]] | None = None  # bands of an Embedding of the tokens; default: dense
    wpe: list[tuple[int, int]] | None = None  # of the positions
    tokenizer: dict | None = None  # record of the model's tokenizer, as in tokenizer.py; default: vocab_size tells it

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(f"n_head={self.n_head} does not divide n_embd={self.n_embd}")
        self.head_dim = self.head_dim or self.n_embd // self.n_head
        for name, usual in dict(n_inner=4 * self.n_embd, head_qk=self.head_dim, head_v=self.head_dim).items():
            widths = usual if getattr(self, name) is None else getattr(self, name)
            widths = [widths] * self.n_layer if isinstance(widths, int) else list(widths)
            if name != "n_inner":
                widths = [[width] * self.n_head if isinstance(width, int) else list(width) for width in widths]
            setattr(self, name, widths)
        self.wte = [tuple(band) for band in self.wte or [(self.vocab_size, self.n_embd)]]
        self.wpe = [tuple(band) for band in self.wpe or [(self.block_size, self.n_embd)]]
        if unknown := self.shapes.keys() - set(KINDS):
            raise ValueError(f"a block has no matrix {min(unknown)}")
        for kind in KINDS:
            sizes = [self.sizes(layer)[kind] for layer in range(self.n_layer)]
            shapes = [Shape(*shape) for shape in self.shapes.get(kind, [(*size, 1) for size in sizes])]
            if len(shapes) != self.n_layer:
                raise ValueError(f"{kind} has {len(shapes)} shapes for {self.n_layer} blocks: "
                                 "give one number of factors, or one for each block")
            for shape, (m, n) in zip(shapes, sizes):
                if min(shape) < 1 or m % shape.dim_1 or n % shape.dim_2:
                    raise ValueError(f"{kind} [{m}, {n}] cannot have the shape {tuple(shape)}: dim_1 divides its rows and "
                                     "dim_2 its columns")
            self.shapes = {**self.shapes, kind: shapes}

    def sizes(self, layer):
        """{kind: (m, n)} of the four matrices of a block."""
        C, hidden, qk, v = self.n_embd, self.n_inner[layer], sum(self.head_qk[layer]), sum(self.head_v[layer])
        return dict(zip(KINDS, ((C, 2 * qk + v), (v, C), (C, hidden), (hidden, C))))

    def size_and_shape(self, kind, layer):  # m, n and Shape of a matrix of a block
        return *self.sizes(layer)[kind], self.shapes[kind][layer]

    def as_plain_types(self):
        """The fields as a dict of plain types, which a checkpoint can hold."""
        return dict(asdict(self), shapes={kind: [tuple(s) for s in shapes] for kind, shapes in self.shapes.items()})


class KronyGPT(nn.Module):
    """GPT-2 with factored matrices."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=Embedding(config.vocab_size, config.n_embd, config.wte),  # and the output: the two are tied
            wpe=Embedding(config.block_size, config.n_embd, config.wpe),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd),
        ))
        if self.transformer.ln_f.weight.device.type != "meta":  # a meta model waits for the weights of a checkpoint
            self.init_weights()

    @torch.no_grad()
    def init_weights(self, std=0.02):
        """GPT-2's initialization; std / sqrt(2 n_layer) where a block writes to the residual stream."""
        self.transformer.wte.init_weights(std)
        self.transformer.wpe.init_weights(std)
        for _, kind, matrix in self.matrices():
            matrix.init_weights(std / math.sqrt(2 * self.config.n_layer) if kind.endswith("c_proj") else std)

    def matrices(self):
        """Yield (layer, kind, KronLinear) of all blocks, in the order in which they are applied: (0, "attn.c_attn", ...)."""
        for layer, block in enumerate(self.transformer.h):
            for kind in KINDS:
                yield layer, kind, block.get_submodule(kind)

    def members(self):
        """The embeddings and the matrices: all that may be dense or factored."""
        return [self.transformer.wte, self.transformer.wpe, *(matrix for *_, matrix in self.matrices())]

    def weights(self):
        """Yield the members, expanded."""
        for member in self.members():
            yield member.dense() if isinstance(member, Embedding) else member.weight

    def hidden(self, idx, cache=None, states=None):
        """The final hidden state (B, T, C), after the last layer norm, of tokens idx (B, T). `states`, a list, gets the
        residual stream (B, T, C) behind each block.

        With a KVCache, idx continues the tokens that it has seen: any number at first, then one at a time.
        """
        start = 0 if cache is None else cache.seen
        end = start + idx.shape[1]
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit into the context of {self.config.block_size}")
        if cache is None or cache.position is None:
            positions = torch.arange(start, end, device=idx.device)
        else:
            positions = cache.position
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)
        x = self.transformer.drop(x)  # (B, T, C)
        if cache is not None and cache.position is not None:
            is_hidden = torch.arange(cache.length, device=idx.device) > positions[:, None]
            cache.mask = torch.where(is_hidden, -math.inf, 0.0).to(x.dtype)
        for block in self.transformer.h:
            x = block(x, cache)
            if states is not None:
                states.append(x)
        if cache is not None and cache.position is None:
            cache.seen = end
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """Logits (B, T, vocab_size) of idx (B, T); with targets (B, T), the mean cross entropy in nats, a scalar, over those
        that are not IGNORE_INDEX."""
        x = self.hidden(idx)
        if targets is None:
            return self.transformer.wte.logits(x)
        return linear_cross_entropy(*self.transformer.wte.as_output(x.flatten(0, 1), targets.flatten()))

    def next_logits(self, idx, cache=None):
        """Logits (B, vocab_size) of the token behind idx (B, T), as in hidden()."""
        return self.transformer.wte.logits(self.hidden(idx, cache)[:, -1])

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, seed=None):
        """Yield the tokens (B, 1) that continue idx (B, T), as they come. The model sees the last block_size tokens, and is
        in eval mode from then on. ValueError where logits are not finite.

        Args:
            temperature: divides the logits; 0 takes the most likely token.
            top_k: sample among this many most likely tokens only.
            seed: seed for sampling; default: torch's global generator.
        """
        if temperature < 0:
            raise ValueError(f"the temperature is at least 0, not {temperature}")
        self.eval()
        block_size = self.config.block_size
        generator = None if seed is None else torch.Generator(device=idx.device).manual_seed(seed)
        cache = KVCache(min(idx.shape[1] + max_new_tokens, block_size))
        step = self.next_logits
        for _ in range(max_new_tokens):
            if idx.shape[1] > block_size:  # the window slides, every token has a new position, nothing can be kept
                logits = self.next_logits(idx[:, -block_size:]).float()  # (B, vocab_size)
            else:
                if idx.is_cuda and cache.seen and cache.position is None and not torch.is_autocast_enabled("cuda"):
                    step = GraphedStep(self, idx[:, -1:], cache)
                logits = step(idx[:, cache.seen:], cache).float()
            if not logits.sum().isfinite():  # isfinite() of all takes 1.5 ms
                raise ValueError("the model's logits are not finite")
            if top_k is not None:
                kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
                logits = logits.masked_fill(logits < kth, -math.inf)
            if temperature == 0:
                token = logits.argmax(dim=-1, keepdim=True)
            else:
                token = torch.multinomial(F.softmax(logits / temperature, dim=-1), 1, generator=generator)
            yield token
            idx = torch.cat((idx, token), dim=1)

    def parameters_by_kind(self):
        """{kind: {name: parameter}}: "factors" (A and B of matrices and embeddings that are factored), other "matrices", and
        "vectors" (biases and layer norms)."""
        factors = {id(p) for member in self.members() if not member.is_dense for p in (member.A, member.B)}
        kinds = {"factors": {}, "matrices": {}, "vectors": {}}
        for name, p in self.named_parameters():
            kinds["factors" if id(p) in factors else "vectors" if p.dim() == 1 else "matrices"][name] = p
        return kinds

    def count_parameters(self):
        """{"total", "mlp", "factors", "matrices", "vectors"}: numbers in a file, where each rank counts once."""
        counts = {kind: sum(p.numel() for p in group.values()) for kind, group in self.parameters_by_kind().items()}
        for member in self.members():
            counts["factors"] -= sum(p.numel() for p in member.parameters()) - member.count_parameters()
        mlp = sum(matrix.count_parameters() for _, kind, matrix in self.matrices() if kind.startswith("mlp."))
        return {"total": sum(counts.values()), "mlp": mlp, **counts}

    def flops_per_token(self, context=None):
        """Floating point operations per token of a training step on windows of `context` tokens (default: block_size): two
        per multiply-add, where backward costs twice forward, attention counts as in PaLM (arXiv 2204.02311, appendix B), and
        a factored matrix counts its cheapest contraction."""
        matrices = sum(min(multiply_adds(matrix.A.shape, matrix.B.shape).values()) for _, _, matrix in self.matrices())
        attention = sum(sum(block.attn.widths[1:]) for block in self.transformer.h) * (context or self.config.block_size)
        return 6 * (matrices + sum(p.numel() for p in self.transformer.wte.parameters()) + attention)

    def freeze_all_but_factors(self):
        """Leave only the Kronecker factors trainable."""
        for kind, group in self.parameters_by_kind().items():
            for p in group.values():
                p.requires_grad &= kind == "factors"

    def configure_optimizers(self, learning_rate, weight_decay, betas, factor_lr_scale=1.0):
        """AdamW over three groups: factors and other matrices (with weight decay), vectors (without). A schedule multiplies
        the learning rate of a group by its `lr_scale`: factor_lr_scale for the factors, else 1."""
        groups = []
        for kind, group in self.parameters_by_kind().items():
            if params := [(name, p) for name, p in group.items() if p.requires_grad]:
                scale = factor_lr_scale if kind == "factors" else 1.0
                groups.append(dict(params=params, name=kind, lr=learning_rate * scale, lr_scale=scale,
                                   weight_decay=0.0 if kind == "vectors" else weight_decay))
        return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)

    @torch.no_grad()
    def multiplied_out(self):
        """A KronyGPT of the same function with dense matrices and equally wide heads, in eval mode. Behind the vocabulary it
        may have a few tokens more, whose logits are 0. What is dense here is shared with it."""
        state_dict = {name: p for name, p in self.state_dict().items() if not any(kind in name for kind in KINDS)}
        for layer, kind, matrix in self.matrices():
            name, bias = f"transformer.h.{layer}.{kind}", matrix.bias
            W = matrix.A[0] if matrix.is_dense else matrix.weight
            if kind.startswith("attn."):
                W, bias = matrix.with_zeros(matrix.with_zeros(W, 0, 0), 1, 1), matrix.with_zeros(bias, 1)
            state_dict |= {f"{name}.A": W[None], f"{name}.B": W.new_ones(1, 1, 1), f"{name}.bias": bias}
        sizes = dict(vars(self.config), shapes={}, head_qk=[equal_width(widths) for widths in self.config.head_qk],
                     head_v=[equal_width(widths) for widths in self.config.head_v])
        if self.transformer.wte.is_dense and (missing := -self.config.vocab_size % ALIGNED):
            name = "transformer.wte.weight"
            state_dict[name] = F.pad(state_dict[name], (0, 0, 0, missing))
            sizes |= dict(vocab_size=self.config.vocab_size + missing, wte=None)
        return KronyGPT.from_state_dict(sizes, state_dict).eval()

    @classmethod
    def from_state_dict(cls, model_args, state_dict):
        """A model of the sizes in model_args (fields of KronyGPTConfig) that takes over the tensors of state_dict uncopied.

        Raises:
            ValueError: names or shapes that do not fit model_args.
        """
        with torch.device("meta"):
            model = cls(KronyGPTConfig(**model_args))
        for name in state_dict:
            if name.endswith(".order"):
                matrix = model.get_submodule(name.removesuffix(".order"))
                matrix.__class__ = StoredLowRank
                matrix.omit_identity()
        expected, found = ({name: tuple(p.shape) for name, p in d.items()} for d in (model.state_dict(), state_dict))
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise ValueError(f"weight {name} is {found.get(name, 'missing')}, where the model has "
                                 f"{expected.get(name, 'none')}")
        model.load_state_dict(state_dict, assign=True)
        return model.to(model.transformer.ln_f.weight.device)  # with the buffers that no file holds


KERNEL = 2**21  # numbers that a GPU reads while it starts a kernel
LENGTH_STEP = 64  # of caches: fast kernels want aligned masks, and cuDNN plans anew for every length


class KVCache:
    """Keys and values of the tokens seen so far, in every block, for at most `length` tokens. With `position`, a tensor [1],
    single tokens follow, whose place is read from it; `mask` [1, length] is added to their scores, and `seen` is the
    caller's to count. Such a step is the same for every token."""

    def __init__(self, length):
        self.length = -(-length // LENGTH_STEP) * LENGTH_STEP
        self.stores, self.seen, self.position, self.mask = {}, 0, None, None

    def extend(self, layer, *new):
        """Append keys and values (B, n_head, T, width) of the newest tokens; returns those of all tokens."""
        if layer not in self.stores:
            self.stores[layer] = [t.new_zeros(*t.shape[:2], self.length, t.shape[3]) for t in new]
        if self.position is not None:
            return [store.index_copy_(2, self.position, t) for store, t in zip(self.stores[layer], new)]
        end = self.seen + new[0].shape[2]
        for store, t in zip(self.stores[layer], new):
            store[:, :, self.seen:end] = t
        return [store[:, :, :end] for store in self.stores[layer]]


class GraphedStep:
    """KronyGPT.next_logits of single tokens as one CUDA graph, which launches all kernels at once: one by one they take
    longer to launch than to run. Small products are multiplied out, since a GPU reads a dense matrix of GPT-2 in the time
    in which it starts one more kernel."""

    def __init__(self, model, token, cache):
        matrices, vocab_size = [matrix for *_, matrix in model.matrices()], model.config.vocab_size
        saved = sum(math.prod(size) for layer in range(model.config.n_layer) for size in model.config.sizes(layer).values())
        saved -= sum(matrix.A.numel() + matrix.B.numel() for matrix in matrices)
        self.model = model.multiplied_out() if saved < KERNEL * len(matrices) else model  # the graph reads its memory
        self.token, self.graph, cache.position = token.clone(), torch.cuda.CUDAGraph(), token.new_tensor([cache.seen])
        with torch.cuda.device(token.device):
            others = torch.cuda.Stream()
            others.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(others):  # libraries start outside of the graph
                self.model.next_logits(self.token, cache)
            torch.cuda.current_stream().wait_stream(others)
            with torch.cuda.graph(self.graph, stream=others, capture_error_mode="thread_local"):  # others may use the GPU
                self.logits = self.model.next_logits(self.token, cache)[:, :vocab_size]

    def __call__(self, token, cache):
        self.token.copy_(token)
        cache.position.fill_(cache.seen)
        cache.seen += 1
        self.graph.replay()
        return self.logits


# ----------------------------------------------------------------------------------------------------------------------
# The contraction: x (Σ_f A_f ⊗ B_f) without the Kronecker products, for A [r, m1, n1] and B [r, m2, n2]

ALIGNED = 8  # widths are a multiple of it where zeros are added or matrices are cut: the units of a GPU want so
COPY = 64  # multiply-adds that take as long as writing one number to memory, on a CPU; 32 to 500 choose alike
GPU_COPY = 2500  # on a GPU: (768, 768, 1) then takes "W", and an eager step on an H200 54 ms, not 66


def kron_weight(A, B):
    """The dense matrix Σ_f A_f ⊗ B_f [m1 m2, n1 n2] of A [r, m1, n1] and B [r, m2, n2]."""
    # sum(torch.kron(A[f], B[f]) for f in range(r))
    (r, m1, n1), (_, m2, n2) = A.shape, B.shape
    if r == 1:
        W = A.squeeze(0)[:, None, :, None] * B.squeeze(0)[None, :, None, :]  # (m1, m2, n1, n2)
    else:
        W = (A.flatten(1).T @ B.flatten(1)).view(m1, n1, m2, n2).transpose(1, 2)  # the sum over f is one product
    return W.reshape(m1 * m2, n1 * n2)


def multiply_adds(A_shape, B_shape):
    """Multiply-adds per token of x (Σ_f A_f ⊗ B_f) in each order of contraction: {"A": A first, "B": B first, "W": W built
    once and multiplied}; building W is not counted."""
    (r, m1, n1), (_, m2, n2) = A_shape, B_shape
    return {"A": r * n1 * m2 * (m1 + n2), "B": r * m1 * n2 * (m2 + n1), "W": m1 * m2 * n1 * n2}


def contraction_order(A_shape, B_shape, tokens, copy=COPY):
    """The cheapest order in which to contract x with A and B: "A" first, "B" first, or "W" built and multiplied.

    The cost counts multiply-adds and, as `copy` of them, each number of an intermediate that is written to memory, the
    transposed copies in `from_left` included; one of W counts as 2 COPY. Backward costs twice as much in every order.
    """
    (r, m1, n1), (_, m2, n2) = A_shape, B_shape
    by_A, by_B, by_W = multiply_adds(A_shape, B_shape).values()
    after_A, after_B = r * n1 * m2, r * m1 * n2  # numbers of the intermediate
    cost_A = tokens * (by_A + copy * (after_A + (m2 > 1) * (m1 * m2 + after_A)))
    cost_B = tokens * (by_B + copy * (after_B + (n2 > 1) * (n1 * n2 + after_B)))
    cost_W = (tokens + r + 2 * COPY) * by_W
    if cost_A <= cost_B:  # two comparisons, which torch.compile follows where `tokens` is a symbol
        return "A" if cost_A <= cost_W else "W"
    return "B" if cost_B <= cost_W else "W"


def from_left(L, X):
    """L [p, q] @ X [T, q, s] -> (T, p, s), as one large product on a transposed copy; where s = 1 nothing is copied."""
    T, q, s = X.shape  # reshaped here: without gradients, torch's matmul would make T small products of three dimensions
    return (X.transpose(1, 2).reshape(T * s, q) @ L.T).view(T, s, len(L)).transpose(1, 2)


def kron_linear(x, A, B, bias, order=None):
    """x (Σ_f A_f ⊗ B_f) + bias, without the Kronecker products where that is cheaper.

    Args:
        x: (..., m1 m2).
        A, B, bias: [r, m1, n1], [r, m2, n2], [n1 n2].
        order: "A", "B" or "W", to force an order of contraction; default: contraction_order chooses.

    Returns:
        (..., n1 n2)
    """
    # x @ sum(torch.kron(A[f], B[f]) for f in range(r)) + bias
    if torch.is_autocast_enabled(x.device.type):  # for addcmul, which autocast leaves in float32
        x, A, B, bias = (t.to(torch.get_autocast_dtype(x.device.type)) for t in (x, A, B, bias))
    (r, m1, n1), (_, m2, n2) = A.shape, B.shape
    rows = x.reshape(-1, m1 * m2)  # (T, m1 m2)
    order = order or contraction_order(A.shape, B.shape, rows.shape[0], GPU_COPY if x.is_cuda else COPY)
    if order == "W":
        y = torch.addmm(bias, rows, kron_weight(A, B))
    elif order == "A":
        z = from_left(A.permute(2, 0, 1).reshape(n1 * r, m1), rows.reshape(-1, m1, m2)).reshape(-1, r * m2)  # (T n1, r m2)
        if n1 == 1:  # low rank, and blocks of one column
            y = torch.addmm(bias, z, B.reshape(r * m2, n2))
        elif r * m2 == 1:  # a multiple of B for each number in z
            y = torch.addcmul(bias.view(n1, n2), z.view(-1, n1, 1), B.view(1, n2))
        else:
            y = (z @ B.reshape(r * m2, n2)).view(-1, n1 * n2) + bias
    else:
        z = rows.reshape(-1, m2) @ B.transpose(0, 1).reshape(m2, r * n2)  # (T m1, r n2)
        L = A.permute(2, 1, 0).reshape(n1, m1 * r)
        if n2 == 1:
            y = torch.addmm(bias, z.view(-1, m1 * r), L.T)
        else:
            y = from_left(L, z.view(-1, m1 * r, n2)).reshape(-1, n1 * n2) + bias
    return y.reshape(*x.shape[:-1], n1 * n2)


def take_columns(x, columns):
    """x[..., columns], by the fastest of several ways on a CPU."""
    if torch.is_autocast_enabled(x.device.type):  # which would make it float32
        with torch.autocast(x.device.type, enabled=False):
            return take_columns(x, columns)
    return x.gather(-1, columns.expand(*x.shape[:-1], -1))


def equal_width(widths):
    """The width that heads of these widths have among zeros: theirs, or a multiple of ALIGNED."""
    return widths[0] if len({*widths}) == 1 else -(-max(widths) // ALIGNED) * ALIGNED


class PaddedKronLinear(KronLinear):
    """A KronLinear whose W stands among zeros, which make heads equally wide: between its rows (dim 0) or its columns (dim
    1), so x or y is wider than W. `parts` are the widths of the heads for queries, keys and so on."""

    dim = None  # no zeros

    def __init__(self, m, n, shape, dim, parts):
        super().__init__(m, n, shape)
        places, self.size = [], 0
        for widths in parts:
            for width in widths:
                places += range(self.size, self.size + width)
                self.size += equal_width(widths)
        if self.size > len(places):
            self.dim = dim
            self.register_buffer("places", torch.tensor(places, device="cpu"), persistent=False)  # even of a meta model

    def forward(self, x):
        sides, at = (self.A, self.B), 1 + (self.dim or 0)
        rank = self.A.shape[1] if self.is_dense else len(self.A)
        few = x.numel() <= x.shape[-1] * rank and not torch.compiler.is_compiling()  # zeros go into what is smaller
        if self.dim is None or few or len(self.places) not in (side.shape[at] for side in sides):
            return self.with_zeros(super().forward(self.without_zeros(x, 0)), 1)
        sides = (self.with_zeros(side, self.dim, at) if side.shape[at] == len(self.places) else side for side in sides)
        return self.product(x, *sides, self.with_zeros(self.bias, 1))

    def with_zeros(self, t, dim, at=-1):
        """A tensor, which has the rows (dim 0) or columns (dim 1) of W along its dimension `at`, with the zeros."""
        if self.dim != dim:
            return t
        shape = [*t.shape]
        shape[at] = self.size
        return t.new_zeros(shape).index_copy_(at, self.places, t)

    def without_zeros(self, t, dim):
        """An input x (dim 0) or an output y (dim 1) without the columns of the zeros."""
        return take_columns(t, self.places) if self.dim == dim else t


class StoredLowRank(PaddedKronLinear):
    """A KronLinear of low rank as a file has it: r rows of the side with the columns are an identity, and that side has only
    the others. `order` [m] has the numbers of these r rows, then those of the others. A token takes r (m + n - r)
    multiply-adds (PIFA, arXiv 2501.19090) in place of r (m + n), unless forward() puts the identity back, which is faster at
    low ranks. This is not for training."""

    def omit_identity(self):
        """Make room for such tensors in what was a KronLinear."""
        side = "A" if self.A.shape[2] == 1 else "B"
        columns = getattr(self, side).detach()  # [r, m, 1]
        self.register_buffer("order", torch.empty(columns.shape[1], dtype=torch.long, device=columns.device))
        setattr(self, side, nn.Parameter(columns[:, len(columns):]))

    def sides(self):  # the side with the columns of W, [r, m - r], and that with its rows, [r, n]
        A, B = self.A, self.B
        return (A.flatten(1), B.flatten(1)) if A.shape[2] == 1 else (B.flatten(1), A.flatten(1))

    def column(self):  # the side with the columns of W, [m, r], with its identity
        T, _ = self.sides()
        return torch.cat((torch.eye(len(T), dtype=T.dtype, device=T.device), T.T))[self.order.argsort()]

    @property
    def weight(self):
        return self.column() @ self.sides()[1]

    def count_parameters(self):
        return sum(p.numel() for p in self.parameters())

    def forward(self, x):
        (T, row), rows, m = self.sides(), x.flatten(0, -2), len(self.order)
        r, tokens = len(T), len(rows)
        if COPY * m * r + tokens * r * r < COPY * tokens * m:
            z = rows @ self.with_zeros(self.column(), 0, 0)
        else:
            order = self.places[self.order] if self.dim == 0 else self.order
            pivots, others = take_columns(rows, order).tensor_split([r], -1)
            z = torch.addmm(pivots, others, T.T)
        return self.with_zeros(torch.addmm(self.bias, z, row), 1).view(*x.shape[:-1], -1)


# ----------------------------------------------------------------------------------------------------------------------
# The loss: logits are computed for a chunk of tokens at a time, so that memory does not grow with tokens × vocabulary. Under
# torch.compile they are whole, and the compiler fuses what follows. (F.linear_cross_entropy of torch 2.13 sums the loss in
# the dtype of its inputs: in bfloat16, 10.0 in place of 10.5 for 12,288 tokens in 37 chunks.)

IGNORE_INDEX = -100  # a target with this value is not scored (the default of F.cross_entropy)
SLICE = 2**21  # logits at once without gradients, on a CPU


def product_of_bands(z, parts):
    """z (..., r) times the transpose of a staircase, given by its parts [rows, columns]: (..., rows of all parts)."""
    products = [z[..., :W.shape[1]] @ W.to(z.dtype).T for W in parts]
    return torch.cat(products, -1) if len(products) > 1 else products[0]


def chunk_rows(parts, dtype):
    """Tokens in a chunk of logits. In float32, on a CPU, it has 2^23 numbers: 32 MiB, which malloc reuses. In half precision
    each chunk adds its gradient of W to a float32 sum, and on a GPU it launches kernels: there, few chunks are faster."""
    numbers = 2**27 if parts[0].device.type == "cuda" else 2**23 if dtype == torch.float32 else 2**26
    return max(1, numbers // sum(map(len, parts)))


class ChunkedLinearLoss(torch.autograd.Function):
    """The sum over chunks of tokens of chunk_loss(product_of_bands(x, parts), *per_token), which can be differentiated once.

    Forward computes the gradients as well, while it has the logits of a chunk: autograd that of the loss with respect to
    the logits, and two products for each part those of x and the part.
    """

    @staticmethod
    def forward(ctx, chunk_loss, dtype, n_parts, x, *tensors):
        parts, per_token = tensors[:n_parts], tensors[n_parts:]
        cast, n_columns = [W.to(dtype) for W in parts], sum(map(len, parts))
        if x.is_cuda and n_columns % ALIGNED:  # zero columns: with 50,257, the three products take six times as long
            cast[-1] = F.pad(cast[-1], (0, 0, 0, -n_columns % ALIGNED))
        total, grad_x = x.new_zeros((), dtype=torch.float32), torch.zeros_like(x)
        grads = [torch.zeros_like(W) if needed else None for W, needed in zip(parts, ctx.needs_input_grad[4:])]
        for begin in range(0, len(x), step := chunk_rows(parts, dtype)):
            rows = x[begin:begin + step].to(dtype)
            padded = product_of_bands(rows, cast)
            logits = padded[:, :n_columns].requires_grad_()  # (step, vocab_size)
            with torch.enable_grad():
                loss = chunk_loss(logits, *(t[begin:begin + step] for t in per_token))
            grad, = torch.autograd.grad(loss, logits)
            if grad.shape != padded.shape:
                padded[:, :n_columns] = grad
                grad = padded
            total += loss.detach()
            for W, grad_W, g in zip(cast, grads, grad.split([len(W) for W in cast], 1)):
                columns = W.shape[1]
                grad_x[begin:begin + step, :columns] += g @ W
                if grad_W is None:
                    continue
                g = g[:, :len(grad_W)].T
                if dtype == grad_W.dtype:
                    grad_W.addmm_(g, rows[:, :columns])
                else:
                    grad_W += g @ rows[:, :columns]
        ctx.save_for_backward(grad_x, *grads)
        ctx.n_per_token = len(per_token)
        return total

    @staticmethod
    def backward(ctx, grad):
        scaled = (None if g is None else g.mul_(grad) for g in ctx.saved_tensors)  # in place: they are as large as W
        return None, None, None, *scaled, *[None] * ctx.n_per_token


def product_dtype(x):
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def chunked_mean(chunk_loss, x, parts, targets, *per_token):
    """The sum of chunk_loss(logits, targets, *per_token) over chunks, divided by the number of tokens scored.

    Under autocast the products are in its dtype; the loss is float32.
    """
    dtype, per_token = product_dtype(x), (targets, *per_token)
    with torch.autocast(x.device.type, enabled=False):
        if torch.compiler.is_compiling():
            total = chunk_loss(product_of_bands(x.to(dtype), parts), *per_token)
        else:
            total = ChunkedLinearLoss.apply(chunk_loss, dtype, len(parts), x, *parts, *per_token)
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def summed_cross_entropy(logits, targets):
    return F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORE_INDEX)


def streamed_cross_entropy(x, parts, targets):
    """linear_cross_entropy without gradients: logits of all tokens for a slice of the vocabulary at a time, which stays in
    the cache of a CPU, and the logarithm of their sum of exponentials so far (arXiv 1805.02867)."""
    dtype, step = product_dtype(x), max(1, (2**27 if x.is_cuda else SLICE) // max(1, len(x)) // ALIGNED) * ALIGNED
    total = x.new_full((len(x),), -math.inf, dtype=torch.float32)
    chosen, begin = torch.zeros_like(total), 0
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(dtype)
        for W in (W for part in parts for W in part.split(min(step, max(1, len(part) - len(part) % ALIGNED)))):
            logits, at = product_of_bands(x, [W]).float(), targets - begin
            picked = logits.gather(1, at.clamp(0, len(W) - 1)[:, None])[:, 0]
            chosen = torch.where((at >= 0) & (at < len(W)), picked, chosen)
            largest = logits.amax(1)
            total = torch.logaddexp(total, largest + logits.sub_(largest[:, None]).exp_().sum(1).log())
            begin += len(W)
    is_scored = targets != IGNORE_INDEX
    return torch.where(is_scored, total - chosen, 0.0).sum() / is_scored.sum().clamp(min=1)


def linear_cross_entropy(x, parts, targets):
    """Mean cross entropy in nats of the logits x Wᵀ, for x (T, r), the parts of a staircase W, [W] where it is one matrix,
    and targets (T,) that are IGNORE_INDEX where not scored: a float32 scalar, 0 where nothing is scored."""
    # F.cross_entropy(x @ W.T, targets)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return chunked_mean(summed_cross_entropy, x, parts, targets)
    return streamed_cross_entropy(x, parts, targets)
