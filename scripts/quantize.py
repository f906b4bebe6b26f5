"""Writes a base model in 4 bits as a checkpoint that loads in a second here and opens in transformers."""

from minilora.system.cli import begin_script, build_parser, run_script

if __name__ == "__main__":
    begin_script()  # before the imports that take seconds

import argparse
from pathlib import Path

from minilora.build import DTYPES, build_model, choose_device
from minilora.config import load_config
from minilora.data.hub import fetch_model
from minilora.errors import UserError
from minilora.qlora.nf4 import LEVELS
from minilora.system.files import make_folder
from minilora.system.locks import lock_output
from minilora.system.process import tuned_process
from minilora.system.torchrun import without_ranks
from minilora.weights.bnb_checkpoint import is_quantized, write_quantized

EXAMPLES = """\
examples:
  python scripts/quantize.py --model_path Qwen/Qwen2.5-7B-Instruct --output_dir models/qwen2.5-7b-nf4
  python scripts/train.py --config my.yaml model.name_or_path=models/qwen2.5-7b-nf4
"""


def main() -> None:
    """Reads the command line; one process at a time writes a folder."""
    parser = build_parser(__doc__, EXAMPLES)
    parser.add_argument("--model_path", required=True, help="base model: a local folder or a name on the hub")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write, new or empty")
    parser.add_argument("--quant_type", choices=sorted(LEVELS), default="nf4", help="default: nf4")
    parser.add_argument(
        "--no_double_quantization",
        action="store_true",
        help="scales in 32 bits: 4.5 bits per weight instead of 4.13",
    )
    parser.add_argument(
        "--compute_dtype",
        choices=sorted(DTYPES),
        default="bfloat16",
        help="of all tensors that are not in 4 bits; weights are rounded to it first (default: bfloat16)",
    )
    parser.add_argument("--device", default="auto", help="that quantises: auto, cpu, cuda (default: auto)")
    arguments = parser.parse_args()

    output = arguments.output_dir.resolve()
    make_folder(output.parent, "--output_dir")
    with lock_output(output, "--output_dir"):
        quantize(arguments, output)


def quantize(arguments: argparse.Namespace, output: Path) -> None:
    """Loads the base model in 4 bits and writes it to the new folder `output`."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output}: exists already; choose a new folder for --output_dir, or remove it")
    keys = {
        "model.name_or_path": arguments.model_path,
        "model.quantization": arguments.quant_type,
        "model.double_quantization": str(not arguments.no_double_quantization).lower(),
        "model.device": arguments.device,
    }
    config = load_config(None, [f"{key}={value}" for key, value in keys.items()])
    device = choose_device(config)
    source = fetch_model(arguments.model_path, arguments.revision)
    if is_quantized(source):
        raise UserError(
            f"{source}: is in 4 bits already, and quantising twice only loses precision; train from it as it is, or "
            "give the original checkpoint"
        )
    model = build_model(config, source, device, DTYPES[arguments.compute_dtype])
    facts = {
        "made_from": arguments.model_path,
        "revision": arguments.revision,
        "quant_type": arguments.quant_type,
        "double_quantization": not arguments.no_double_quantization,
        "compute_dtype": arguments.compute_dtype,
    }
    write_quantized(model, source, output, facts)
    sizes = [sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (source, output)]
    print(f"{output}: {sizes[1] / 1e6:,.1f} MB of weights, from {sizes[0] / 1e6:,.1f} MB; read back by SHA-256")


if __name__ == "__main__":
    with tuned_process():
        run_script(without_ranks(main))
