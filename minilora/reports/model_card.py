"""The README.md of a final adapter: what it is, how it was made, how well it does, how to use it."""

from typing import Any

_TEMPLATE = """\
---
base_model: {base}
library_name: peft
{metadata}
---
# LoRA adapter for {base}

LoadedRun with minilora: {quantization} base weights, LoRA r {r}, alpha {alpha:g}, dropout {dropout:g} on {targets};
learning rate {learning_rate:g} ({schedule}), {samples} examples a step, {step} steps, seed {seed}.

| | before | after |
|---|---|---|
{rows}

{test_set}`metrics.json` has all figures and the SHA-256 of data and base model,
`training_args.json` the whole configuration.

## Prompt
{prompt}

## Use
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "path/to/this/folder")
```
"""
_CLASSIFICATION_PROMPT = """\
The adapter expects exactly this conversation, in ChatML:

    system: {system}
    user: {instruction}<review>
    assistant: {labels}"""
_CHAT_PROMPT = """\
The adapter was trained on conversations, in ChatML. Those without a system turn began with

    system: {system}"""
_EVALUATION = "or `python scripts/evaluate.py --model_path path/to/this/folder --data reviews.tsv`.\n"


def render_model_card(config: dict[str, dict[str, Any]], results: dict[str, Any], labelled: bool) -> str:
    """Markdown with Hugging Face's metadata block.

    Args:
        config: the resolved configuration, as `training_args.json` holds it.
        results: content of `metrics.json`.
        labelled: it learnt to label texts; False for conversations, which have no instruction and no label words.
    """
    model, lora, prompt, train = (config[name] for name in ("model", "lora", "prompt", "train"))
    before, after = results["test_before"] or {}, results["test"] or {}
    targets = lora["target_modules"]
    names = [name for name in ("accuracy", "precision", "recall", "f1", "loss") if name in after]
    rows = [f"| {name} | {_figure(before, name)} | {_figure(after, name)} |" for name in names]
    intervals = "; the intervals are 95 % bootstrap intervals" if labelled else ""
    card = _TEMPLATE.format(
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
        metadata="language: zh\ntags: [lora, qlora, qwen2.5, text-classification]"
        if labelled
        else "tags: [lora, qlora, qwen2.5]",
        test_set=f"Test set: {after['num_examples']} records{intervals}. " if after else "",
        prompt=(_CLASSIFICATION_PROMPT if labelled else _CHAT_PROMPT).format(
            system=prompt["system"],
            instruction=prompt["instruction"].replace("\n", "\n          "),
            labels=" or ".join(prompt["labels"]),
        ),
    )
    return card + (_EVALUATION if labelled else "")


def _figure(metrics: dict[str, Any], name: str) -> str:
    if name not in metrics:
        return "-"
    interval = metrics.get("confidence_intervals_95", {}).get(name)
    return f"{metrics[name]:.4f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")
