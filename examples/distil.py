"""A transformers.Trainer that distils a causal language model from a teacher: divergence plus cross-entropy.

Tested with transformers 5.24; needs a model whose `forward` knows `logits_to_keep`.
"""

import torch
from transformers import Trainer

from udi_kernels import LinearJSDiv


class DistillationTrainer(Trainer):
    def __init__(self, *args, teacher, loss=None, **options):
        super().__init__(*args, **options)
        self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True).eval()
        self.loss = loss or LinearJSDiv(beta=0.5, hard_weight=1.0)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")[:, 1:]  # hidden states predict the next token
        options = dict(output_hidden_states=True, logits_to_keep=1)
        outputs = model(**inputs, **options)
        with torch.no_grad():
            teacher = self.teacher(**inputs, **options).hidden_states[-1]
        head, teacher_head = (self.accelerator.unwrap_model(m).get_output_embeddings() for m in (model, self.teacher))
        if num_items_in_batch is not None:  # DDP averages gradients
            num_items_in_batch = num_items_in_batch / self.accelerator.num_processes
        loss = self.loss(
            outputs.hidden_states[-1][:, :-1], head.weight, teacher[:, :-1], teacher_head.weight.detach(),
            row_weight=labels != -100, labels=labels, normalizer=num_items_in_batch,
        )  # fmt: skip
        return (loss, outputs) if return_outputs else loss
