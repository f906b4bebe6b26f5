"""Merges an adapter into its base model: one dense checkpoint that transformers, vLLM or the next training loads.

With --gguf also a file for llama.cpp and Ollama; with --gguf_adapter only the adapter as such a file, not merged.

Ends with a drift table, so that you see what merging costs before you ship it: accuracy on given reviews, and how far
the probabilities of their labels move, of the adapter on its base as it was trained, and of both ways to merge. The
last line is JSON; the table is in OUTPUT_DIR/drift.json too. The merged model is dense and not quantised again.
"""

from minilora.system.cli import (
    add_adapter_options,
    add_overrides,
    add_reading_options,
    begin_script,
    build_parser,
    run_script,
)

if __name__ == "__main__":
    begin_script()  # before the imports that take seconds

import argparse
import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minilora.adapters.merge import (
    ADAPTER_FACT,
    DEQUANTIZED,
    DTYPES,
    FACT,
    ORIGINAL,
    Merge,
    open_merge,
    refuse_full_disk,
    refuse_output,
    refuse_variant,
    write_merged,
)
from minilora.build import choose_device, choose_dtype, note_other_system
from minilora.data.examples import Examples
from minilora.data.records import ReadOptions
from minilora.errors import UserError
from minilora.evaluation.metrics import drift
from minilora.generation.chat import read_generation_config
from minilora.generation.decode import GenerationConfig
from minilora.generation.modelfile import render_modelfile
from minilora.runs.load_run import LoadedRun, load_run
from minilora.system.console import info, progress, warn
from minilora.system.files import WRITING, json_bytes, make_folder, remove, storage_errors, write_file
from minilora.system.locks import lock_output
from minilora.system.manifest import finish_folder
from minilora.system.process import tuned_process
from minilora.system.torchrun import without_ranks
from minilora.weights.bnb_checkpoint import is_quantized
from minilora.weights.gguf import ADAPTER_KINDS, KINDS, check_gguf, gguf_bytes, write_gguf, write_gguf_adapter
from minilora.weights.hf_config import copy_licence, name_end_of_turn
from minilora.weights.load import LoadSettings, load_model
from minilora.weights.safetensors_io import dtype_name

EXAMPLES = """\
examples:
  python scripts/merge.py --model_path outputs/checkpoints/final --output_dir merged
  python scripts/merge.py --model_path outputs/checkpoints/final --output_dir merged --into dequantized \\
      --data reviews.tsv
  python scripts/merge.py --model_path outputs/checkpoints/final --output_dir merged --no_drift --gguf q8_0
  python scripts/merge.py --model_path outputs/checkpoints/final --output_dir adapter --gguf_adapter --gguf f16
  python scripts/merge.py --model_path some/peft/adapter --base Qwen/Qwen2.5-0.5B-Instruct --output_dir merged \\
      --data reviews.tsv model.quantization=none
"""
OTHERWISE = ", or merge with --no_drift, without the drift table"
UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9}


def main() -> None:
    """Reads the command line; one process at a time writes a folder."""
    arguments = parse_arguments()
    output: Path = arguments.output_dir.resolve()
    refuse_output(output)
    make_folder(output.parent, "--output_dir")
    with lock_output(output, "--output_dir"):
        write_merge(arguments, output)


def write_merge(arguments: argparse.Namespace, output: Path) -> None:
    """Merges, measures, renames the finished folder into place."""
    refuse_output(output)  # again: another merge may have ended since
    limit = [] if arguments.max_examples is None else [f"data.max_test_examples={arguments.max_examples}"]
    trained = load_run(arguments.model_path, arguments.base, [*arguments.overrides, *limit], arguments.data is not None)
    if output == trained.model_folder.resolve():
        raise UserError(f"{output}: is the base model's own folder; choose another --output_dir")
    if arguments.gguf is not None or arguments.gguf_adapter is not None:
        check_gguf(trained.model_folder)
        modelfile(trained, "", None)  # which refuses a system turn
    merge, into = open_run(trained, arguments.allow_bin), arguments.into
    if arguments.gguf_adapter is not None:
        write_adapter(arguments, output, trained, merge)
        return
    refuse_variant(merge, into)
    warn_of_loftq(trained, into)
    dtype = merge.base_dtype if arguments.dtype is None else DTYPES[arguments.dtype]
    of_gguf = 0 if arguments.gguf is None else gguf_bytes(merge.shapes, arguments.gguf)
    refuse_full_disk(output, merge.num_bytes(dtype) + of_gguf)
    reading = ReadOptions.given(arguments, trained.columns)
    data, reviews = (None, None) if arguments.no_drift else trained.read_reviews(arguments.data, reading, OTHERWISE)

    results: dict[str, Any] = {"output": str(arguments.output_dir), FACT: into, "dtype": dtype_name(dtype)}
    facts = {FACT: into, "adapter": str(trained.path), "base": str(trained.model_folder), **trained.asked_with}
    with new_folder(output, facts) as temporary:
        with progress(f"merge into {into}", len(merge.shapes), "tensor") as bar:
            write_merged(
                merge, into, dtype, temporary, max_shard_bytes=arguments.max_shard_size, on_progress=bar.update
            )
        if trained.closes_turns:
            name_end_of_turn(temporary, trained.prompt.tokenizer.im_end)
        if arguments.gguf is not None:
            file = f"model-{arguments.gguf}.gguf"
            info(f"write {file}")
            write_gguf(temporary, temporary / file, arguments.gguf, output.name)
            write_file(temporary / "Modelfile", modelfile(trained, f"./{file}", None).encode())
        if reviews is not None:
            written = Written(temporary, into, dtype)
            rows = measure_drift(trained, merge, written, reviews, allow_bin=arguments.allow_bin)
            results["drift"] = {"data": str(data), "num_examples": len(reviews.examples), "models": rows}
            write_file(temporary / "drift.json", json_bytes(results["drift"]))
            print(f"{len(reviews.examples)} reviews of {data}; written: merged {into}")
            print(render_drift(rows, len(reviews.examples)))
    info(f"{dtype_name(dtype)} model, merged into the {into} weights: {arguments.output_dir}")
    note_other_system(trained.prompt, "begin conversations with the merged model by prompt.system")
    print(json.dumps(results, ensure_ascii=False))


def write_adapter(arguments: argparse.Namespace, output: Path, trained: LoadedRun, merge: Merge) -> None:
    """Writes the adapter as a GGUF file, and on request its base as another; nothing is merged."""
    pairs, kind = merge.pairs(), arguments.gguf_adapter
    if arguments.gguf is not None and is_quantized(merge.base):
        raise UserError(
            f"{merge.base}: is in 4 bits, so it cannot be written as GGUF; name the model that it was made from with "
            "--base, or leave out --gguf"
        )
    warn_of_loftq(trained, ORIGINAL)
    of_gguf = 0 if arguments.gguf is None else gguf_bytes(merge.shapes, arguments.gguf)
    refuse_full_disk(output, of_gguf + sum(4 * tensor.numel() for pair in pairs.values() for tensor in pair))
    results = {"output": str(arguments.output_dir), ADAPTER_FACT: kind}
    with new_folder(output, {**results, "adapter": str(trained.path), "base": str(merge.base)}) as temporary:
        file, model = f"adapter-{kind}.gguf", str(merge.base.resolve())
        write_gguf_adapter(pairs, temporary / file, kind, merge.lora_config.alpha)
        if arguments.gguf is not None:
            model = f"./base-{arguments.gguf}.gguf"
            info(f"write {model[2:]}")
            write_gguf(merge.base, temporary / model, arguments.gguf, merge.base.name)
        write_file(temporary / "Modelfile", modelfile(trained, model, f"./{file}").encode())
        copy_licence(merge.base, temporary)
    info(f"{kind} adapter for llama.cpp: {arguments.output_dir}")
    if is_quantized(merge.base):
        warn(
            f"note: FROM in its Modelfile is {model}, in 4 bits of bitsandbytes, which Ollama does not read; put the "
            "name of a model there that it has, or give the unquantised one with --base"
        )
    elif arguments.gguf is None:
        info(f"FROM in its Modelfile is {model}, which Ollama converts; --gguf writes the base as a GGUF file too")
    print(json.dumps(results, ensure_ascii=False))


@contextlib.contextmanager
def new_folder(output: Path, facts: Mapping[str, Any]) -> Iterator[Path]:
    """A temporary folder, which takes the place of `output` at the end and goes where something fails."""
    temporary = output.with_name(WRITING + output.name)
    try:
        with storage_errors(temporary):
            remove(temporary)  # of a merge that was killed
            temporary.mkdir()
        yield temporary
        finish_folder(temporary, output, facts)
    finally:
        with contextlib.suppress(OSError):  # after a failure, which counts; on success it no longer exists
            remove(temporary)


def modelfile(trained: LoadedRun, model: str, adapter: str | None) -> str:
    """`render_modelfile` for the run: label words are chosen as `predict.py` does, without sampling."""
    sampling = GenerationConfig(do_sample=False, repetition_penalty=1)
    if not trained.labelled:
        sampling = read_generation_config(trained.model_folder)
    return render_modelfile(model, trained.prompt.system, sampling, adapter)


def warn_of_loftq(trained: LoadedRun, into: str) -> None:
    """Warns where a LoftQ adapter meets the original weights."""
    if into == ORIGINAL and trained.config.lora.init_lora_weights == "loftq":
        warn(
            "warning: the run began with LoftQ, so the adapter also corrects the quantisation error, which the "
            f"original weights do not have; --into {DEQUANTIZED} fits better"
        )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__, EXAMPLES)
    add_adapter_options(parser, "adapter: a folder or a name on the hub")
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="folder for the merged model; replaces another merge"
    )
    parser.add_argument(
        "--into",
        choices=(ORIGINAL, DEQUANTIZED),
        default=ORIGINAL,
        help="the base's own weights (the default), or those that training saw, in 4 bits and back",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the written tensors (default: the base's own)")
    parser.add_argument(
        "--max_shard_size", type=read_size, default="2GB", help="of one file, as 500MB or 2GB (default: 2GB)"
    )
    parser.add_argument(
        "--gguf", choices=KINDS, nargs="?", const="f16", help="also write a GGUF file for llama.cpp (default type: f16)"
    )
    parser.add_argument(
        "--gguf_adapter",
        choices=ADAPTER_KINDS,
        nargs="?",
        const=ADAPTER_KINDS[0],
        help="write the adapter alone as a GGUF file for llama.cpp, and with --gguf its base; do not merge "
        f"(default type: {ADAPTER_KINDS[0]})",
    )
    parser.add_argument("--data", type=Path, help="reviews for the drift table (default: the test split of its run)")
    add_reading_options(parser, "--data")
    parser.add_argument("--max_examples", help="score MAX_EXAMPLES of the reviews; same as data.max_test_examples")
    parser.add_argument("--no_drift", action="store_true", help="only merge, without the drift table")
    add_overrides(parser)
    arguments = parser.parse_intermixed_args()
    if arguments.no_drift and (arguments.data is not None or arguments.max_examples is not None):
        parser.error("--no_drift scores no reviews: leave out --no_drift, or --data and --max_examples")
    of_merging = ("data", "max_examples", "dtype")
    given = [f"--{name}" for name in of_merging if getattr(arguments, name) is not None]
    given += ["--into"] if arguments.into != ORIGINAL else []
    if arguments.gguf_adapter is not None and given:
        parser.error(f"--gguf_adapter merges nothing: leave out --gguf_adapter, or {' and '.join(given)}")
    return arguments


def read_size(text: str) -> int:
    """Bytes of "500MB" or "2GB", of a thousand each, as Hugging Face counts them."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(KB|MB|GB)", text, re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a size such as 500MB or 2GB")
    return int(float(match[1]) * UNITS[match[2].upper()])


def open_run(trained: LoadedRun, allow_bin: bool) -> Merge:
    """Base and adapter, with the 4-bit weights that the adapter's run had."""
    config = trained.config
    return open_merge(
        trained.model_folder,
        trained.path,
        LoadSettings(
            compute_dtype=trained.run_dtype,
            quantization=config.model.quantization,
            double_quantization=config.model.double_quantization,
            device=choose_device(config),
        ),
        allow_bin=allow_bin,
    )


@dataclass(frozen=True)
class Written:
    """The merged model in its folder: the variant of its weights and the dtype of its tensors."""

    folder: Path
    into: str
    dtype: torch.dtype


def measure_drift(
    trained: LoadedRun, merge: Merge, written: Written, reviews: Examples, allow_bin: bool
) -> dict[str, dict[str, Any]]:
    """`drift` from the adapter as it was trained to both ways to merge, by name.

    The written model is loaded from its files, as its users load it, so its figures check them.
    """
    device = choose_device(trained.config)
    compute_dtype = choose_dtype(trained.config, device)
    labels = np.array(reviews.labels)
    _, before = trained.score(trained.load(allow_bin), reviews, "score adapter")
    quantization = trained.config.model.quantization
    rows = {f"adapter on {'the base' if quantization == 'none' else quantization}": drift(labels, before, before)}
    for variant in merge.variants:
        if variant == written.into:
            model = load_model(written.folder, compute_dtype, "none", device=device)
        else:
            model = merge.build(variant, written.dtype, compute_dtype, device)
        _, after = trained.score(model, reviews, f"score merged {variant}")
        rows[f"merged {variant}"] = drift(labels, before, after)
        del model  # before the next one is built
    return rows


def render_drift(models: Mapping[str, Mapping[str, Any]], num_reviews: int) -> str:
    """A table with a line for each model; the others are compared with the first one.

    Args:
        models: what `drift` returned, by a name of the model.
        num_reviews: N.
    """
    width = max(map(len, models)) + 2
    lines = [f"{'':{width}}{'accuracy':>18}{'mean change':>13}{'largest':>9}{'flipped':>16}"]
    for index, (name, found) in enumerate(models.items()):
        line = f"{name:{width}}{found['accuracy']:>9.4f} {'({num_correct}/{n})'.format(**found, n=num_reviews):>8}"
        if index:
            flipped = f"{found['flipped']:.2%} ({found['num_flipped']})"
            line += f"{found['mean_change']:>13.4f}{found['largest_change']:>9.4f}{flipped:>16}"
        lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    with tuned_process():
        run_script(without_ranks(main))
