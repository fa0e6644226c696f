"""Distillation: a training loss that compares a student's logits with a teacher's, a chunk of tokens at a time."""
import torch
import torch.nn as nn
from torch.nn import functional as F

from model import IGNORE_INDEX, chunked_mean, summed_cross_entropy


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

    return chunked_mean(chunk_loss, x, W, targets, teacher_x)


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
