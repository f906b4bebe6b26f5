"""The README.md of a final adapter: what it is, how it was made, how well it does, how to use it."""

from typing import Any

_TEMPLATE = """\
---
base_model: {base}
library_name: peft
language: zh
tags: [lora, qlora, qwen2.5, text-classification]
---
# LoRA adapter for {base}

Trained with minilora: {quantization} base weights, LoRA r {r}, alpha {alpha:g}, dropout {dropout:g} on {targets};
learning rate {learning_rate:g} ({schedule}), {samples} examples a step, {step} steps, seed {seed}.

| | before | after |
|---|---|---|
{rows}

Test set: {num_examples} records; the intervals are 95 % bootstrap intervals. `metrics.json` has all figures and the
SHA-256 of data and base model, `training_args.json` the whole configuration.

## Prompt
The adapter expects exactly this conversation, in ChatML:

    system: {system}
    user: {instruction}<review>
    assistant: {labels}

## Use
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "path/to/this/folder")
```
or `python scripts/evaluate.py --model_path path/to/this/folder --data reviews.tsv`.
"""


def render_model_card(config: dict[str, dict[str, Any]], results: dict[str, Any]) -> str:
    """Markdown with Hugging Face's metadata block.

    Args:
        config: the resolved configuration, as `training_args.json` holds it.
        results: content of `metrics.json`.
    """
    model, lora, prompt, train = (config[name] for name in ("model", "lora", "prompt", "train"))
    before, after = results["test_before"] or {}, results["test"] or {}
    targets = lora["target_modules"]
    names = [name for name in ("accuracy", "precision", "recall", "f1", "loss") if name in after]
    rows = [f"| {name} | {_figure(before, name)} | {_figure(after, name)} |" for name in names]
    return _TEMPLATE.format(
        base=model["name_or_path"],
        quantization=model["quantization"],
        r=lora["r"],
        alpha=lora["alpha"],
        dropout=lora["dropout"],
        targets=targets if isinstance(targets, str) else ", ".join(targets),
        learning_rate=train["learning_rate"],
        schedule=train["lr_scheduler_type"],
        samples=train["per_device_train_batch_size"] * train["gradient_accumulation_steps"],
        step=results["step"],
        seed=train["seed"],
        rows="\n".join(rows) or "| test set | not scored | not scored |",
        num_examples=after.get("num_examples", 0),
        system=prompt["system"],
        instruction=prompt["instruction"].replace("\n", "\n          "),
        labels=" or ".join(prompt["labels"]),
    )


def _figure(metrics: dict[str, Any], name: str) -> str:
    if name not in metrics:
        return "-"
    interval = metrics.get("confidence_intervals_95", {}).get(name)
    return f"{metrics[name]:.4f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
