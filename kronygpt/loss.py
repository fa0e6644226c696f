"""Losses whose logits are never whole in memory: mean cross entropy, and distillation.

Both take final hidden states x (T, C) and the output matrix W [vocab_size, C], a chunk of tokens at a time, so that memory
does not grow with tokens × vocabulary. Under torch.compile the logits are whole, and the compiler fuses what follows.

(F.linear_cross_entropy of torch 2.13 sums the loss in the dtype of its inputs: in bfloat16, 10.0 in place of 10.5 for 12,288
tokens in 37 chunks.)
"""
import torch
import torch.nn as nn
from torch.nn import functional as F

IGNORE_INDEX = -100  # a target with this value is not scored (the default of F.cross_entropy)
LOGITS_AT_ONCE = 2**23  # numbers in the logits of one chunk: 32 MiB in float32, which malloc still reuses


class ChunkedLinearLoss(torch.autograd.Function):
    """The sum over chunks of tokens of chunk_loss(x Wᵀ, *per_token).

    Forward computes the gradients as well, while it has the logits of a chunk: autograd that of the loss with respect to
    the logits, and two products those of x and W. It can be differentiated once.
    """

    @staticmethod
    def forward(ctx, chunk_loss, dtype, x, W, *per_token):
        W_cast, total = W.to(dtype), x.new_zeros((), dtype=torch.float32)
        grad_x, grad_W = (torch.zeros_like(t) if needed else None for t, needed in zip((x, W), ctx.needs_input_grad[2:]))
        for begin in range(0, len(x), step := rows_at_once(W)):
            rows = x[begin:begin + step].to(dtype)
            logits = (rows @ W_cast.T).requires_grad_()  # (step, vocab_size)
            with torch.enable_grad():
                loss = chunk_loss(logits, *(t[begin:begin + step] for t in per_token))
            grad, = torch.autograd.grad(loss, logits)
            total += loss.detach()
            if grad_x is not None:
                grad_x[begin:begin + step] = grad @ W_cast
            if grad_W is not None and dtype == W.dtype:
                grad_W.addmm_(grad.T, rows)
            elif grad_W is not None:
                grad_W += grad.T @ rows
        ctx.save_for_backward(grad_x, grad_W)
        ctx.n_inputs = 4 + len(per_token)
        return total

    @staticmethod
    def backward(ctx, grad):
        scaled = (None if g is None else g.mul_(grad) for g in ctx.saved_tensors)  # in place: they are as large as W
        return None, None, *scaled, *[None] * (ctx.n_inputs - 4)


def rows_at_once(W):
    """Tokens in a chunk."""
    return max(1, LOGITS_AT_ONCE // len(W))


def mean_loss(chunk_loss, x, W, targets, *per_token):
    """The sum of chunk_loss(logits, targets, *per_token) over chunks, divided by the number of tokens scored.

    Under autocast the products are in its dtype; the loss is float32.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    per_token = (targets, *per_token)
    with torch.autocast(device, enabled=False):
        if torch.compiler.is_compiling():
            total = chunk_loss(x.to(dtype) @ W.to(dtype).T, *per_token)
        elif torch.is_grad_enabled():
            total = ChunkedLinearLoss.apply(chunk_loss, dtype, x, W, *per_token)
        else:
            W = W.to(dtype)
            chunks = zip(*(t.split(rows_at_once(W)) for t in (x, *per_token)))
            total = sum(chunk_loss(rows.to(dtype) @ W.T, *rest) for rows, *rest in chunks)
    return total / (targets != IGNORE_INDEX).sum().clamp(min=1)


def summed_cross_entropy(logits, targets):
    return F.cross_entropy(logits.float(), targets, reduction="sum", ignore_index=IGNORE_INDEX)


def linear_cross_entropy(x, W, targets):
    """Mean cross entropy in nats of the logits x Wᵀ, a float32 scalar; 0 where nothing is scored.

    Args:
        x: (T, C).
        W: [vocab_size, C].
        targets: (T,), IGNORE_INDEX where not scored.
    """
    # F.cross_entropy(x @ W.T, targets)
    return mean_loss(summed_cross_entropy, x, W, targets)


def divergence(logits, teacher_logits, temperature):
    """temperature² KL(teacher ‖ student) of each token (T,), of distributions softened by the temperature."""
    log_student, log_teacher = (F.log_softmax(values.float() / temperature, dim=1) for values in (logits, teacher_logits))
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)


def distillation_loss(x, W, targets, teacher_x, teacher_W, share, temperature):
    """share temperature² KL(teacher ‖ student) + (1 - share) cross entropy, the mean over the tokens scored, in nats.

    Source: G. Hinton, O. Vinyals and J. Dean, Distilling the knowledge in a neural network, arXiv 1503.02531.

    Args:
        x, W, targets: the student's, as in linear_cross_entropy.
        teacher_x, teacher_W: (T, C') and [vocab_size, C'], the teacher's, without gradients.
        share: of the divergence, from 0 to 1.
        temperature: divides the logits of both in the divergence.
    """
    def chunk_loss(logits, targets, teacher_rows):
        kl = divergence(logits, teacher_rows @ teacher_W.to(teacher_rows.dtype).T, temperature)
        return share * (kl * (targets != IGNORE_INDEX)).sum() + (1 - share) * summed_cross_entropy(logits, targets)

    return mean_loss(chunk_loss, x, W, targets, teacher_x)


class Distillation(nn.Module):
    """A student whose training loss is the distillation_loss against a teacher, in the place of its own.

    Args:
        student, teacher: models with hidden(idx) -> (B, T, C) and lm_head.weight [vocab_size, C].
        share, temperature: as in distillation_loss.
    """

    def __init__(self, student, teacher, share, temperature):
        super().__init__()
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)
        self.share, self.temperature = share, temperature

    def forward(self, idx, targets):
        with torch.no_grad():
            teacher_x = self.teacher.hidden(idx)
        return distillation_loss(self.student.hidden(idx).flatten(0, 1), self.student.lm_head.weight, targets.flatten(),
                                 teacher_x.flatten(0, 1), self.teacher.lm_head.weight, self.share, self.temperature)
