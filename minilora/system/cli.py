"""How a script begins and ends: its arguments, an error message instead of a traceback, its exit status.

    0     done
    2     UserError: what is wrong and what to do; or a full disk, no memory, or a path that cannot be used
    129   SIGHUP: the terminal was closed
    130   SIGINT: Ctrl-C
    141   the reader of the output closed it, as `head` does
    143   SIGTERM

A signal ends a script at once, from its first imports on (`begin_script`). In a training run it waits while weights
change or files are written, a second or so: see signals.py.
"""

import argparse
import errno
import io
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from minilora.errors import UserError
from minilora.system.console import set_quiet
from minilora.system.signals import SIGNALS, Interrupted, SafePoints, stop_now

# What a disk, a path or rights may be the cause of; any other OSError is a bug.
DISK_ERRORS = {
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EIO", "EROFS", "EFBIG", "ENAMETOOLONG", "ELOOP", "EACCES", "EPERM", "EMFILE")
    if hasattr(errno, name)
}
SCRIPTS = Path(__file__).parents[2] / "scripts"  # of the clone; an installed wheel has none
QUICKSTART = SCRIPTS / "configs" / "quickstart.yaml"
COMMANDS = {name: name for name in ("train", "evaluate", "predict", "chat", "merge", "quantize", "plan", "sweep")}
COMMANDS |= {"preprocess": "preprocess_data", "download": "download_data", "inspect": "inspect_batch"}


def begin_script() -> None:
    """A script's first line, before it imports PyTorch, which takes seconds.

    A signal ends the program with its status, without unwinding: what a library makes of an exception while it is
    imported is unknown, and nothing has to be saved before `run_script`.
    """
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop_now)


def build_parser(description: str | None, examples: str) -> argparse.ArgumentParser:
    """A script's argument parser, with what all of them have: examples, --quiet, both spellings of an option."""
    parser = _Parser(description=description, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.register("type", Path, _expanded)
    parser.add_argument("-q", "--quiet", action="store_true", help="print results, warnings and errors only")
    return parser


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """--config, and the keys that differ from the file."""
    parser.add_argument("--config", type=Path, default=QUICKSTART, help="YAML file (default: the quickstart)")
    add_overrides(parser)


def add_adapter_options(parser: argparse.ArgumentParser, model_path: str) -> None:
    """The adapter and its base; `model_path` is the help for --model_path."""
    parser.add_argument("--model_path", type=Path, required=True, help=model_path)
    parser.add_argument("--base", help="base model, if it is not the one that the adapter names")
    parser.add_argument("--allow_bin", action="store_true", help="read an adapter_model.bin, a pickle, if you trust it")


def add_reading_options(parser: argparse.ArgumentParser, file: str, has_labels: bool = True) -> None:
    """How to read the data files that the option `file` names; without labels for a script that reads texts only."""
    parser.add_argument("--text_column", help=f"of {file} (default: text, text_a, review, sentence or content)")
    if has_labels:
        parser.add_argument("--label_column", help=f"of {file} (default: label, labels, sentiment or target)")
        parser.add_argument(
            "--map_labels",
            action="append",
            metavar="LABEL=WORD,...",
            help="what the file's labels mean, as negative=负面,positive=正面; may be given several times",
        )
    parser.add_argument(
        "--encoding", default="utf-8", help=f"of {file} as text: utf-8, gb18030 (gbk, gb2312), big5, utf-16"
    )


def add_overrides(parser: argparse.ArgumentParser, example: str = "section.key=value") -> None:
    """Configuration keys, as positional arguments."""
    parser.add_argument("overrides", nargs="*", metavar=example, help="configuration keys, as train.py --help lists")


def _expanded(path: str) -> Path:
    """With the home folder for ~, as the keys have it: of --output_dir=~/mine bash makes no other path."""
    return Path(os.path.expanduser(path))  # noqa: PTH111  Path's own raises where there is no home


class _Parser(argparse.ArgumentParser):
    """Options are declared with underscores, --model_path; --model-path is the same, and --lora.r 4 is lora.r=4."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        words = list(sys.argv[1:] if args is None else args)
        end = words.index("--") if "--" in words else len(words)
        found, rest = super().parse_known_args([*_iter_normalized(words[:end]), *words[end:]], namespace)
        set_quiet(found.quiet)
        return found, rest


def _iter_normalized(words: Iterable[str]) -> Iterator[str]:
    """--max-shard-size=2-GB -> --max_shard_size=2-GB; --lora.r=4 and --lora.r 4 -> lora.r=4"""
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = f"--{name[2:].replace('-', '_')}"
            if "." in name:
                name, equals, value = name[2:], "=", value if equals else next(rest, "")
        yield f"{name}{equals}{value}"


def run_script(main: Callable[[], None]) -> None:
    """Runs a script's `main` and exits with the status that the module's docstring lists.

    Characters that the output's encoding lacks are escaped: a label that cannot be shown must not lose a result.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):  # standard error escapes by itself
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with SafePoints(everywhere=True):
            main()
            sys.stdout.flush()  # here, not when the interpreter ends, where a closed pipe can no longer be caught
    except UserError as error:
        _exit(2, f"error: {error}")
    except Interrupted as error:
        _exit(128 + error.signum, str(error))
    except BrokenPipeError:
        _discard(sys.stdout)
        raise SystemExit(141) from None
    except (MemoryError, RuntimeError) as error:
        from minilora.system.memory import is_out_of_memory  # here: it imports PyTorch

        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        _exit(
            2,
            f"error: memory ran out ({reason}); lower train.per_device_eval_batch_size or data.max_length, or take "
            "model.quantization=nf4 or a smaller model",
        )
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        _discard(sys.stdout)
        where = error.filename or "the output"
        _exit(2, f"error: {where}: cannot be read or written ({error.strerror}); check path, room and rights")


def _exit(status: int, message: str) -> NoReturn:
    """Prints and exits; an output that cannot be written does not change the status."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"{message}\n")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:
            _discard(stream)
    raise SystemExit(status) from None


def _discard(stream: TextIO) -> None:
    """Sends what is still in a stream's buffer nowhere: the interpreter's own flush would fail too, with status 120."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def run_command() -> None:
    """`minilora train ...` is `python scripts/train.py ...`, in a clone that is installed with `pip install -e .`."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    path = SCRIPTS / f"{COMMANDS.get(command)}.py"
    if command not in COMMANDS:
        _exit(2, f"usage: minilora {{{','.join(COMMANDS)}}} ...\nerror: got {command!r}")
    if not path.is_file():
        _exit(2, f"error: {path}: does not exist; run minilora from a clone, installed with pip install -e .")
    sys.argv[:2] = [str(path)]
    runpy.run_path(str(path), run_name="__main__")
