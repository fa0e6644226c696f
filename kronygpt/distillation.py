"""Distillation: a training loss that compares a student's logits with a teacher's, a chunk of tokens at a time."""
import torch
import torch.nn as nn
from torch.nn import functional as F

from model import IGNORE_INDEX, chunked_mean, product_of_bands, summed_cross_entropy, take_columns


def divergence(logits, teacher_logits, temperature):
    """temperature² KL(teacher ‖ student) of each token (T,), of distributions softened by the temperature."""
    log_student, log_teacher = (F.log_softmax(values.float() / temperature, dim=1) for values in (logits, teacher_logits))
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1)


def distillation_loss(x, parts, targets, teacher_x, teacher_parts, share, temperature, order=None):
    """share temperature² KL(teacher ‖ student) + (1 - share) cross entropy, the mean over the tokens scored, in nats.

    Source: G. Hinton, O. Vinyals and J. Dean, Distilling the knowledge in a neural network, arXiv 1503.02531.

    Args:
        x, parts, targets: the student's, as in linear_cross_entropy.
        teacher_x, teacher_parts: the teacher's, without gradients.
        share: of the divergence, from 0 to 1.
        temperature: divides the logits of both in the divergence.
        order: [vocab_size], the row of the teacher's parts for each of the student's; default: they are the same.
    """
    def chunk_loss(logits, targets, teacher_rows):
        teacher_logits = product_of_bands(teacher_rows.to(logits.dtype), teacher_parts)
        if order is not None:
            teacher_logits = take_columns(teacher_logits, order)
        kl = divergence(logits, teacher_logits, temperature)
        return share * (kl * (targets != IGNORE_INDEX)).sum() + (1 - share) * summed_cross_entropy(logits, targets)

    return chunked_mean(chunk_loss, x, parts, targets, teacher_x)


def feature_loss(states, teacher_states, roots):
    """The mean over blocks and tokens of ½ e R Rᵀ eᵀ for the errors e of residual streams (B, T, C): what they add to the
    loss, to second order, where R [C, C] is a root of the second moments of the loss's gradient behind each block."""
    costs = [((x - y) @ R).square().sum(-1).mean() / 2 for x, y, R in zip(states, teacher_states, roots, strict=True)]
    return sum(costs) / len(costs)


class Distillation(nn.Module):
    """A student whose training loss is the distillation_loss against a teacher, in the place of its own, and perhaps a
    multiple of the feature_loss.

    Args:
        student, teacher: KronyGPTs.
        share, temperature: as in distillation_loss.
        features: weight of the feature_loss.
        roots: [n_layer, C, C] for it, or None where the weight is 0.
    """

    def __init__(self, student, teacher, share, temperature, features=0.0, roots=None):
        super().__init__()
        self.student = student
        self.teacher = teacher.eval().requires_grad_(False)
        self.share, self.temperature, self.features = share, temperature, features
        self.register_buffer("roots", roots, persistent=False)

    def forward(self, idx, targets):
        states, teacher_states = ([], []) if self.features else (None, None)
        own, teachers, targets = self.student.transformer.wte, self.teacher.transformer.wte, targets.flatten()
        with torch.no_grad():
            x = self.teacher.hidden(idx, states=teacher_states).flatten(0, 1)
            teacher_x, teacher_parts, _ = teachers.as_output(x, targets)
        order = None if own.row is None else own.row.argsort()
        if teachers.row is not None:
            order = teachers.row if order is None else teachers.row[order]
        x = self.student.hidden(idx, states=states).flatten(0, 1)
        loss = distillation_loss(*own.as_output(x, targets), teacher_x, teacher_parts, self.share, self.temperature, order)
        return loss + self.features * feature_loss(states, teacher_states, self.roots) if self.features else loss
