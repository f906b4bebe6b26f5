"""Are both sides training the same thing? Loss and every LoRA gradient of one batch, in float32 over NF4.

    python benchmarks/gate.py WORKLOAD_JSON

One process, minilora first and peft second, on an adapter whose B is not zero, so that A has a gradient too. The last
line is JSON. Both sides multiply the same dequantised weights in float32; what is left is the rounding of long sums,
most of it in peft's padded attention: against float64, minilora's gradients are ten times closer than peft's.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from contestants import load_peft
from workload import Workload, pad

from minilora.adapters.attach import iter_lora_weights
from minilora.adapters.peft_files import load_adapter
from minilora.errors import UserError
from minilora.qlora.batch import pack
from minilora.qlora.loss import next_token_nll
from minilora.qlora.prompt import Example
from minilora.system.cli import run_script
from minilora.system.process import tuned_process
from minilora.weights.load import load_model

LOSS_TOLERANCE = 1e-4  # relative
GRADIENT_TOLERANCE = 1e-3  # relative, the norm of a tensor's difference
EXAMPLES = 4


class Float32(Workload):
    """The same workload with float32 activations."""

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of both sides."""
        return torch.float32


@tuned_process()
def minilora_gradients(work: Workload, examples: list[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, and gradients by the path of the layer and the matrix."""
    model = load_model(Path(work.model), work.dtype, device=work.device)
    load_adapter(model, Path(work.adapter))
    batch = pack(examples).to(torch.device(work.device))
    total, count = next_token_nll(model.train()(batch), batch.targets, model.head_weight)
    (total / count).backward()
    gradients = {}
    for path, layer in iter_lora_weights(model):
        for name, matrix in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            assert matrix.grad is not None, f"{path}.{name} got no gradient"
            gradients[f"{path}.{name}"] = matrix.grad
    return (total / count).item(), gradients


def peft_gradients(work: Workload, examples: list[Example]) -> tuple[float, dict[str, torch.Tensor]]:
    """The same from peft."""
    model = load_peft(work, "nf4", prepare=False, gradient_checkpointing=False)
    loss = model(**pad(examples, work.device)).loss
    loss.backward()
    named = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    return loss.item(), named


def main() -> None:
    """Compares, and prints what was found."""
    if len(sys.argv) != 2:
        raise UserError("usage: gate.py WORKLOAD_JSON")
    work = Float32.from_json(sys.argv[1])
    examples = work.examples(1 if work.chat_tokens else EXAMPLES)  # peft's float32 logits of a chat are 2 GB
    our_loss, ours = minilora_gradients(work, examples)
    gc.collect()
    peft_loss, theirs = peft_gradients(work, examples)
    if ours.keys() != theirs.keys():
        raise UserError(f"gate: different tensors are trained: {sorted(ours.keys() ^ theirs.keys())[:5]}")
    errors = {name: float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in ours}
    worst = max(errors, key=lambda name: errors[name])
    loss_error = abs(our_loss - peft_loss) / abs(peft_loss)
    passed = loss_error <= LOSS_TOLERANCE and errors[worst] <= GRADIENT_TOLERANCE
    found = {
        "passed": passed,
        "loss": [our_loss, peft_loss],
        "loss_relative_error": loss_error,
        "gradients": len(errors),
        "largest_gradient_relative_error": errors[worst],
        "largest_at": worst,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    run_script(main)
