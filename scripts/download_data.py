"""Downloads ChnSentiCorp from the hub (or a mirror: HF_ENDPOINT) as train, validation and test files."""

from minilora.system.cli import begin_script, build_parser, run_script

if __name__ == "__main__":
    begin_script()  # before the imports that take seconds

from pathlib import Path

from minilora.data.hub import fetch_dataset

EXAMPLES = """\
examples:
  python scripts/download_data.py
  HF_ENDPOINT=https://hf-mirror.com python scripts/download_data.py
  python scripts/download_data.py --repo somebody/their-reviews --output_dir data/theirs
"""


def main() -> None:
    """Reads the command line and downloads."""
    parser = build_parser(__doc__, EXAMPLES)
    parser.add_argument("--output_dir", type=Path, default=Path("data/chn_senti_corp"), help="folder for the files")
    parser.add_argument("--repo", help="data set on the hub (default: lansinuote/ChnSentiCorp, then seamew's)")
    parser.add_argument("--revision", help="branch, tag or commit")
    arguments = parser.parse_args()
    for path in fetch_dataset(arguments.output_dir, arguments.repo, arguments.revision):
        print(f"{path}  {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    run_script(main)
