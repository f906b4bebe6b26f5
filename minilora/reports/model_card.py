"""The README.md of a final adapter: what it is, how it was made, how well it does, how to use it."""

from typing import Any

from minilora.data.examples import format_class_weights
from minilora.reports.render import render


def render_model_card(config: dict[str, dict[str, Any]], results: dict[str, Any], labelled: bool) -> str:
    """Markdown with Hugging Face's metadata block.

    Args:
        config: the resolved configuration, as `training_args.json` holds it.
        results: content of `metrics.json`.
        labelled: trained on labelled texts; False for conversations, which have no instruction and no label words.
    """
    return render(
        "model_card.md",
        **{name: config[name] for name in ("model", "lora", "prompt", "train")},
        before=results["test_before"] or {},
        after=results["test"] or {},
        step=results["step"],
        class_weights=format_class_weights(results.get("class_weights", {})),
        ranks=results["machine"].get("ranks", 1),
        labelled=labelled,
    )
