"""TRL's GKDTrainer, whose loss takes hidden states and heads instead of logits.

A drop-in for `GKDTrainer` with the same loss, in the memory of a chunk of logits. Tested with trl 1.16; needs a
model whose `forward` knows `logits_to_keep`.
"""

import torch
from trl.experimental.gkd import GKDTrainer

from udi_kernels import linear_js_div


def hidden_states(model, inputs):
    """The last hidden states, which predict all tokens but the first; the model makes the logits of one token only."""
    read = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    outputs = model(**read, output_hidden_states=True, logits_to_keep=1)
    return outputs, outputs.hidden_states[-1][:, :-1]


class FusedGKDTrainer(GKDTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs, student = hidden_states(model, inputs)
        self.teacher_model.eval()
        with torch.no_grad():
            _, teacher = hidden_states(self.teacher_model, inputs)
        head, teacher_head = (
            self.accelerator.unwrap_model(m).get_output_embeddings() for m in (model, self.teacher_model)
        )
        loss = linear_js_div(
            student, head.weight, teacher, teacher_head.weight.detach(),
            beta=self.beta, row_weight=inputs["labels"][:, 1:] != -100, normalizer=num_items_in_batch,
        )  # fmt: skip
        return (loss, outputs) if return_outputs else loss
