"""KronyGPT: GPT-2 whose weight matrices may be sums of Kronecker products.

Each of the four matrices of a block, attn.c_attn, attn.c_proj, mlp.c_fc and mlp.c_proj, computes

    y = x W + b      W [m, n] = Σ_{f<r} A_f ⊗ B_f      A [r, dim_1, dim_2]      B [r, m/dim_1, n/dim_2]

with a shape (dim_1, dim_2, r) of its own. Everything else is GPT-2: learned positions, pre-norm blocks, gelu_new, and one
matrix for the embedding and the output. Dense GPT-2 is the member in which all shapes are (m, n, 1), with B = [[1]].
"""
import math
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kronygpt.configurator import UserError, check_range
from kronygpt.kron import kron_linear, kron_weight, multiply_adds
from kronygpt.loss import linear_cross_entropy

GPT2_STD = 0.02  # standard deviation of GPT-2's initial weights
LOWEST_TEMPERATURE = 1e-6  # above 0; the highest is its inverse: quotients of logits stay finite in float32


class Shape(NamedTuple):
    """A matrix [m, n] as the sum of `factors` products A ⊗ B: A is [dim_1, dim_2], B is [m/dim_1, n/dim_2]."""

    dim_1: int
    dim_2: int
    factors: int


def mlp_shapes(dim_1, dim_2, factors):
    """The shapes of Krony-PT: (dim_1, dim_2) for c_fc and its mirror image for c_proj, with factors[layer] products."""
    return {"mlp.c_fc": [Shape(dim_1, dim_2, r) for r in factors], "mlp.c_proj": [Shape(dim_2, dim_1, r) for r in factors]}


@dataclass
class KronyGPTConfig:
    """Sizes of a KronyGPT.

    `shapes` holds a Shape for each block, {"mlp.c_fc": [Shape, ...], ...}; a matrix that it does not name is dense.

    Raises:
        UserError: sizes that do not fit each other.
    """

    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_inner: int | None = None  # width of the MLP's hidden layer; default: 4 n_embd
    dropout: float = 0.0
    recompute: bool = False  # compute the MLP's activation again in backward: less memory, more time
    shapes: dict[str, list[Shape]] = field(default_factory=dict)

    def __post_init__(self):
        self.n_inner = 4 * self.n_embd if self.n_inner is None else self.n_inner
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "n_inner"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise UserError(f"n_head={self.n_head} does not divide n_embd={self.n_embd}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be in [0, 1), not {self.dropout}")
        if unknown := self.shapes.keys() - self.matrices.keys():
            raise UserError(f"a block has no matrix {min(unknown)}")
        self.shapes = {name: [Shape(*shape) for shape in self.shapes.get(name, [(m, n, 1)] * self.n_layer)]
                       for name, (m, n) in self.matrices.items()}
        for name, (m, n) in self.matrices.items():
            if len(self.shapes[name]) != self.n_layer:
                raise UserError(f"{name} has {len(self.shapes[name])} shapes for {self.n_layer} blocks: "
                                "give one number of factors, or one for each block")
            for dim_1, dim_2, factors in self.shapes[name]:
                if min(dim_1, dim_2, factors) < 1:
                    raise UserError(f"dim_1, dim_2 and factors must be at least 1, not {dim_1}, {dim_2}, {factors}")
                if m % dim_1:
                    raise UserError(f"dim_1={dim_1} does not divide the {m} rows of {name}")
                if n % dim_2:
                    raise UserError(f"dim_2={dim_2} does not divide the {n} columns of {name}")

    @property
    def matrices(self):
        """{name: (m, n)} of the four matrices of a block, in the order in which a block applies them."""
        C, hidden = self.n_embd, self.n_inner
        return {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, hidden), "mlp.c_proj": (hidden, C)}

    def size_and_shape(self, name, layer):  # m, n and Shape of a matrix of a block
        return *self.matrices[name], self.shapes[name][layer]

    def as_plain_types(self):
        """The fields as a dict of plain types, which a checkpoint can hold."""
        return dict(asdict(self), shapes={name: [tuple(s) for s in shapes] for name, shapes in self.shapes.items()})


def check_sampling(options):
    """Raise UserError unless a script's options max_new_tokens, temperature, top_k (0 for all) and seed fit generate()."""
    check_range(options, "max_new_tokens", at_least=1, at_most=10**9)
    check_range(options, "seed temperature top_k", at_least=0)
    check_range(options, "temperature", at_most=1 / LOWEST_TEMPERATURE)
    if 0 < options["temperature"] < LOWEST_TEMPERATURE:
        raise UserError(f"--temperature is 0 or at least {LOWEST_TEMPERATURE}, not {options['temperature']}")


class KronLinear(nn.Module):
    """y = x W + bias with W [m, n] = Σ_f A_f ⊗ B_f."""

    def __init__(self, m, n, shape):
        super().__init__()
        dim_1, dim_2, r = shape
        self.is_dense = shape == (m, n, 1)
        self.A = nn.Parameter(torch.empty(r, dim_1, dim_2))
        if self.is_dense:  # A ⊗ [[b]] is b A: a second name for A's scale, and no parameter, so that dense is GPT-2
            self.register_buffer("B", torch.ones(1, 1, 1))
        else:
            self.B = nn.Parameter(torch.empty(r, m // dim_1, n // dim_2))
        self.bias = nn.Parameter(torch.zeros(n))

    @property
    def weight(self):  # W [m, n]
        return kron_weight(self.A, self.B)

    def init_weights(self, std):
        """Draw normal weights so that an element of W has the standard deviation std.

        It is Σ_f a_f b_f, of variance r var(a) var(b): both sides get the scale sqrt(std / sqrt(r)), so that their steps
        under Adam are alike. The smaller side is brought to that scale exactly, since the mean square of a few normal
        numbers is far from its expectation; a side of one element is 1.
        """
        if self.is_dense:
            nn.init.normal_(self.A, std=std)
            return
        small, large = sorted((self.A, self.B), key=lambda side: side[0].numel())
        std /= math.sqrt(len(self.A))
        scale = math.sqrt(std) if small[0].numel() > 1 else 1.0
        nn.init.normal_(large, std=std / scale)
        nn.init.normal_(small) if small[0].numel() > 1 else nn.init.ones_(small)
        small.mul_(scale / small.square().mean(dim=(1, 2), keepdim=True).sqrt())

    def forward(self, x):
        if self.is_dense:
            return torch.addmm(self.bias, x.flatten(0, -2), self.A[0]).view(*x.shape[:-1], -1)
        return kron_linear(x, self.A, self.B, self.bias)


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
        self.c_attn = KronLinear(*config.size_and_shape("attn.c_attn", layer))
        self.c_proj = KronLinear(*config.size_and_shape("attn.c_proj", layer))
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


class MLP(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.config = config
        self.c_fc = KronLinear(*config.size_and_shape("mlp.c_fc", layer))
        self.c_proj = KronLinear(*config.size_and_shape("mlp.c_proj", layer))
        self.dropout = nn.Dropout(config.dropout)

    def project(self, x):
        return self.c_proj(F.gelu(x, approximate="tanh"))

    def forward(self, x):
        x = self.c_fc(x)  # (B, T, n_inner)
        if self.config.recompute and torch.is_grad_enabled():
            x = checkpoint(self.project, x, use_reentrant=False, preserve_rng_state=False)  # (B, T, C)
        else:
            x = self.project(x)
        return self.dropout(x)


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


class KronyGPT(nn.Module):
    """GPT-2 with factored matrices.

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
        """GPT-2's initialisation: a standard deviation of 0.02, and 0.02 / sqrt(2 n_layer) where a block writes to the
        residual stream."""
        for module in (self.transformer.wte, self.transformer.wpe):
            nn.init.normal_(module.weight, std=GPT2_STD)
        residual_std = GPT2_STD / math.sqrt(2 * self.config.n_layer)
        for name, matrix in self.matrices():
            matrix.init_weights(residual_std if name.endswith("c_proj") else GPT2_STD)

    def matrices(self):
        """[(name, KronLinear)] of all blocks, in the order in which they are applied."""
        return [(f"transformer.h.{layer}.{name}", block.get_submodule(name))
                for layer, block in enumerate(self.transformer.h) for name in self.config.matrices]

    def hidden(self, idx, cache=None):
        """The final hidden state (B, T, C), after the last layer norm, of tokens idx (B, T).

        With a KVCache, idx continues the tokens that it has seen: any number of them at first, then one at a time.

        Raises:
            UserError: more than block_size tokens.
        """
        start = 0 if cache is None else cache.seen
        end = start + idx.shape[1]
        if end > self.config.block_size:
            raise UserError(f"{end} tokens do not fit into the context of {self.config.block_size}")
        position = torch.arange(start, end, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(position))  # (B, T, C)
        for block in self.transformer.h:
            x = block(x, cache)
        if cache is not None:
            cache.seen = end
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None):
        """Logits (B, T, vocab_size) of idx (B, T), or with targets (B, T) the mean cross entropy over those that are
        not IGNORE_INDEX."""
        x = self.hidden(idx)
        if targets is None:
            return self.lm_head(x)
        return linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, seed=None):
        """Continue token sequences.

        Args:
            idx: (B, T) tokens to continue; the model sees the last block_size of them.
            max_new_tokens: number of tokens to add.
            temperature: divides the logits; 0 takes the most likely token.
            top_k: sample among this many most likely tokens only.
            seed: of the sampling; default: torch's global generator.

        Returns:
            (B, T + max_new_tokens)

        Raises:
            UserError: logits are not finite.
        """
        was_training = self.training
        self.eval()
        new = list(self.stream(idx, max_new_tokens, temperature, top_k, seed))
        self.train(was_training)
        return torch.cat((idx, *new), dim=1)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, seed=None):
        """Yield the new tokens (B, 1) of generate(), as they come; of a model in eval mode."""
        block_size = self.config.block_size
        generator = None if seed is None else torch.Generator(device=idx.device).manual_seed(seed)
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
            if not logits.isfinite().all():
                raise UserError("the model's logits are not finite", status=1)
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
        """{kind: {name: parameter}}: "factors" (A and B of the matrices that are factored), other "matrices", and
        "vectors" (biases and layer norms)."""
        factors = {id(p) for _, matrix in self.matrices() if not matrix.is_dense for p in (matrix.A, matrix.B)}
        kinds = {"factors": {}, "matrices": {}, "vectors": {}}
        for name, p in self.named_parameters():  # tied parameters come once
            kinds["factors" if id(p) in factors else "vectors" if p.dim() == 1 else "matrices"][name] = p
        return kinds

    def count_parameters(self):
        """{"total", "mlp", "factors", "matrices", "vectors"}: numbers of parameters."""
        counts = {kind: sum(p.numel() for p in group.values()) for kind, group in self.parameters_by_kind().items()}
        mlp = sum(p.numel() for block in self.transformer.h for p in block.mlp.parameters())
        return {"total": sum(counts.values()), "mlp": mlp, **counts}

    def flops_per_token(self):
        """Floating point operations per token of a training step on full blocks, forward and backward.

        Two per multiply-add, and backward costs twice forward; attention is counted as in PaLM (arXiv 2204.02311,
        appendix B). A factored matrix counts its cheapest contraction, not the dense product.
        """
        config = self.config
        matrices = sum(min(multiply_adds(matrix.A.shape, matrix.B.shape).values()) for _, matrix in self.matrices())
        attention = 2 * config.n_layer * config.n_embd * config.block_size
        return 6 * (matrices + self.lm_head.weight.numel() + attention)

    def freeze_all_but_factors(self):
        """Leave only the Kronecker factors trainable."""
        for kind, group in self.parameters_by_kind().items():
            for p in group.values():
                p.requires_grad &= kind == "factors"

    def configure_optimizers(self, learning_rate, weight_decay, betas, factor_lr_scale=1.0):
        """AdamW over three groups: Kronecker factors and other matrices (with weight decay), vectors (without).

        Each group carries `lr_scale`, by which a schedule multiplies its learning rate: factor_lr_scale for the
        factors, 1 for the others.
        """
        groups = []
        for kind, group in self.parameters_by_kind().items():
            scale = factor_lr_scale if kind == "factors" else 1.0
            groups.append(dict(params=[(name, p) for name, p in group.items() if p.requires_grad], name=kind,
                               lr=learning_rate * scale, lr_scale=scale,
                               weight_decay=0.0 if kind == "vectors" else weight_decay))
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, fused=True)

    @classmethod
    def from_state_dict(cls, model_args, state_dict):
        """A model of the sizes in model_args (the fields of KronyGPTConfig) that takes over the tensors of state_dict
        without a copy.

        Raises:
            UserError: names or shapes that do not fit model_args.
        """
        with torch.device("meta"):
            model = cls(KronyGPTConfig(**model_args))
        expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        found = {name: tuple(p.shape) for name, p in state_dict.items()}
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                raise UserError(f"weight {name} is {found.get(name, 'missing')}, where the model has "
                                f"{expected.get(name, 'none')}")
        model.load_state_dict(state_dict, assign=True)
        model.lm_head.weight = model.transformer.wte.weight
        return model
