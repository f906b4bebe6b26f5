"""The README.md of a final adapter: what it is, how it was made, how well it does, how to use it.

It begins with the metadata block that the hub reads. What is not known is left out there, and a folder of this machine
is nowhere named by its path.

Source: https://huggingface.co/docs/hub/model-cards (the block's keys).
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from minilora.data.examples import format_class_weights
from minilora.data.hub import hub_name
from minilora.reports.render import render

FIGURES = ("accuracy", "precision", "recall", "f1", "loss")
HAN, OTHER_EAST_ASIAN = re.compile("[\u4e00-\u9fff]"), re.compile("[\u3040-\u30ff\uac00-\ud7a3]")


def render_model_card(
    config: dict[str, dict[str, Any]], results: dict[str, Any], labelled: bool, known: Mapping[str, str] | None = None
) -> str:
    """Markdown with Hugging Face's metadata block.

    Args:
        config: the resolved configuration, as `training_args.json` holds it.
        results: content of `metrics.json`.
        labelled: trained on labelled texts; False for conversations, which have no instruction and no label words.
        known: more of the block: the base's `license`, and the texts' `language`.
    """
    model = config["model"]
    return render(
        "model_card.md",
        **{name: config[name] for name in ("lora", "prompt", "train")},
        metadata=yaml.safe_dump(_metadata(config, results, labelled, known or {}), sort_keys=False, allow_unicode=True),
        base=_public(model["name_or_path"]),
        base_path=hub_name(model["name_or_path"]) or "path/to/the/base/model",
        begun_with=_public(model["adapter"]) if model["adapter"] else None,
        quantization=model["quantization"],
        figures=FIGURES,
        before=results["test_before"] or {},
        after=results["test"] or {},
        step=results["step"],
        class_weights=format_class_weights(results.get("class_weights", {})),
        ranks=results["machine"].get("ranks", 1),
        labelled=labelled,
    )


def _metadata(
    config: dict[str, dict[str, Any]], results: dict[str, Any], labelled: bool, known: Mapping[str, str]
) -> dict[str, Any]:
    """The hub's keys. `text-generation` is how the adapter is loaded, also where it answers with label words."""
    base, metrics = hub_name(config["model"]["name_or_path"]), results["test"] or {}
    metadata: dict[str, Any] = {"base_model": base} if base else {}
    metadata |= {**known, "library_name": "peft", "pipeline_tag": "text-generation"}
    if known.get("license") == "other" and base:
        metadata["license_link"] = f"https://huggingface.co/{base}/blob/main/LICENSE"
    metadata["tags"] = ["lora", "qlora", "qwen2.5", *(["text-classification"] if labelled else [])]
    figures = [{"type": name, "value": metrics[name]} for name in FIGURES if name in metrics]
    if figures:
        task = "text-classification" if labelled else "text-generation"
        dataset = {"type": "json", "name": Path(config["data"]["dir"]).name, "split": "test"}
        result = {"task": {"type": task}, "dataset": dataset, "metrics": figures}
        metadata["model-index"] = [{"name": Path(config["train"]["output_dir"]).name, "results": [result]}]
    return metadata


def _public(name_or_path: str) -> str:
    """A name on the hub, or a folder's own name."""
    return hub_name(name_or_path) or Path(name_or_path).name


def language_of(texts: Iterable[str]) -> str | None:
    """Chinese ("zh") where most letters are its characters, else None: other scripts write many languages."""
    text = "".join(texts)
    letters, han = sum(map(str.isalpha, text)), len(HAN.findall(text))
    return "zh" if 2 * han > letters and 50 * len(OTHER_EAST_ASIAN.findall(text)) < letters else None
