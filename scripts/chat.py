"""Chats with a trained adapter or a base model: in a terminal, or with --prompt for one answer.

If standard input is not a terminal, each of its lines is a turn of the conversation.
"""

from minilora.system.cli import add_adapter_options, add_overrides, begin_script, build_parser, run_script

if __name__ == "__main__":
    begin_script()  # before the imports that take seconds

import argparse
import contextlib
import signal
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import fields, replace

import torch

from minilora.adapters.attach import adapter_disabled
from minilora.build import note_other_system
from minilora.config import MAX_SEED
from minilora.data.lines import iter_lines
from minilora.errors import UserError
from minilora.generation.chat import Conversation, read_generation_config
from minilora.generation.decode import GenerationConfig, use_gemv
from minilora.qlora.model import Qwen2ForCausalLM
from minilora.runs.load_run import LoadedRun, load_run_or_base
from minilora.system.console import info, uses_colour, warn
from minilora.system.process import tuned_process
from minilora.system.schema import coerce
from minilora.system.signals import Interrupted, Interruptible
from minilora.system.torchrun import without_ranks

EXAMPLES = """\
examples:
  python scripts/chat.py --model_path outputs/checkpoints/final
  python scripts/chat.py --model_path Qwen/Qwen2.5-0.5B-Instruct --greedy --prompt "用一句话介绍杭州"
  git diff | python scripts/chat.py --model_path Qwen/Qwen2.5-Coder-0.5B-Instruct --system "Review this." --prompt -
  python scripts/chat.py --model_path some/peft/adapter --base Qwen/Qwen2.5-0.5B-Instruct model.quantization=none

Sampling: these options, else the model's generation_config.json, else temperature 0.7, top-p 0.8, top-k 20, repetition
penalty 1.05, 1024 tokens at most. 4-bit projections without a GEMV on 4-bit weights keep a dequantised copy:
model.cache_dequantized=false saves its 2 bytes per parameter and is slower.
"""
COMMANDS = """\
/reset         clears the conversation
/system TEXT   sets the system turn and clears the conversation
/base          switches the adapter off or on; the conversation continues
/help          shows these lines
/exit          exits, as Ctrl-D does; Ctrl-C ends an answer, twice in a row the program
A line that begins with a space is sent as it is."""
KEYS_READ = ("model.", "prompt.system")
CACHED = "model.cache_dequantized=true"  # the default here; the command line's own comes later and wins
BOLD, DIM, RESET = "\033[1m", "\033[2m", "\033[0m"


def main() -> None:
    """Reads the command line, loads the model, talks."""
    arguments = parse_arguments()
    prompt = arguments.prompt
    if prompt == "-":
        prompt = "\n".join(iter_lines(sys.stdin.buffer, "standard input"))
    if prompt is not None and not prompt.strip():
        raise UserError("--prompt: is empty; give a text, or leave out --prompt to talk in turns")
    overrides = [CACHED, *arguments.overrides]
    trained = load_run_or_base(arguments.model_path, arguments.base, overrides, KEYS_READ)
    settings = choose_settings(arguments, read_generation_config(trained.model_folder))
    model = trained.load(arguments.allow_bin)
    use_gemv(model)
    generator = torch.Generator(model.head_weight.device)
    generator.manual_seed(generator.seed() if arguments.seed is None else arguments.seed)
    if arguments.system is None:
        note_other_system(trained.prompt)
    system = trained.prompt.system if arguments.system is None else arguments.system
    conversation = Conversation(model, trained.prompt.tokenizer, system, settings, generator=generator)
    if prompt is not None:
        show_answer(conversation, prompt)
        return
    is_typed = sys.stdin.isatty()
    if is_typed:
        info(f"{describe(trained, settings)}; /help lists the commands")
    lines = iter_typed() if is_typed else iter_lines(sys.stdin.buffer, "standard input")
    Talk(conversation, model, trained.path is not None, is_typed).take_all(lines)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = build_parser(__doc__, EXAMPLES)
    add_adapter_options(parser, "adapter, or a base model as it is: a folder or a name on the hub")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and end; - for all of standard input")
    parser.add_argument("--system", metavar="TEXT", help="system turn (default: prompt.system of the adapter's run)")
    parser.add_argument("--greedy", action="store_true", help="always the most probable token")
    parser.add_argument("--temperature", type=float, metavar="T", help="above 1 more varied, below less; 0 is --greedy")
    parser.add_argument("--top_p", type=float, metavar="P", help="draw from the most probable that together reach P")
    parser.add_argument("--top_k", type=int, metavar="K", help="draw from the K most probable; 0 for all")
    parser.add_argument("--repetition_penalty", type=float, metavar="R", help="penalty of earlier tokens; 1 for none")
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help="tokens of an answer at most")
    parser.add_argument("--seed", type=int, help="the same seed, questions and machine give the same answers")
    add_overrides(parser, "model.key=value")
    arguments = parser.parse_intermixed_args()
    if arguments.greedy and not {arguments.temperature, arguments.top_p, arguments.top_k} <= {None}:
        parser.error("--greedy does not sample: leave out --greedy, or --temperature, --top_p and --top_k")
    if arguments.seed is not None and not 0 <= arguments.seed <= MAX_SEED:
        parser.error(f"--seed: expected 0 to {MAX_SEED}")
    return arguments


def choose_settings(arguments: argparse.Namespace, settings: GenerationConfig) -> GenerationConfig:
    """The model's own settings, overridden by the command line; UserError if a value is out of range."""
    given = {}
    for item in fields(GenerationConfig):
        value = getattr(arguments, item.name, None)
        if value is not None:
            try:
                given[item.name] = coerce(value, item)
            except ValueError as error:
                raise UserError(f"--{item.name}: is {value}, expected {error}; choose another") from None
    draws = not arguments.greedy and (
        settings.do_sample or not given.keys().isdisjoint(("temperature", "top_p", "top_k"))
    )
    return replace(settings, do_sample=draws, **given)


def describe(trained: LoadedRun, settings: GenerationConfig) -> str:
    """Model, adapter and sampling in a line."""
    base = trained.config.model.name_or_path
    name = base if trained.path is None else f"{trained.path} on {base}"
    if not settings.do_sample or settings.temperature == 0:
        how = "greedy"
    else:
        how = f"temperature {settings.temperature:g}, top-p {settings.top_p:g}, top-k {settings.top_k}"
    return f"{name}: {how}, repetition penalty {settings.repetition_penalty:g}"


def iter_typed() -> Iterator[str]:
    """Turns as they are typed or pasted, until Ctrl-D or a second Ctrl-C in a row.

    The first one only clears the line: it may have been meant for an answer that had just ended.
    """
    with contextlib.suppress(ImportError):  # Windows has none, and its own editing
        import readline

        # Pasted text stays one turn, with its lines; Python switches that off.
        readline.parse_and_bind("set enable-bracketed-paste on")
    shows_prompt = sys.stdout.isatty()
    # A terminal's editor does not count the columns between \001 and \002.
    prompt = f"\001{BOLD}\002>\001{RESET}\002 " if uses_colour() else "> "
    is_warned = False
    while True:
        line = None
        with Interruptible() as interruption:
            try:
                line = input(prompt if shows_prompt else "")
                line.encode()
            except EOFError:
                break
            except UnicodeError:
                line = None
                warn("error: the input is not UTF-8; set the terminal to UTF-8, or type something else")
        if interruption.came:
            if is_warned:
                raise Interrupted(signal.SIGINT)
            warn("\n(another Ctrl-C exits, as Ctrl-D does)")
        is_warned = interruption.came
        if line is not None and not interruption.came:
            yield line
    if shows_prompt:
        print()


class Talk:
    """Takes lines as turns or commands, and prints the answers."""

    def __init__(self, conversation: Conversation, model: Qwen2ForCausalLM, has_adapter: bool, is_typed: bool):
        """Nothing is answered yet.

        Args:
            conversation: takes the turns.
            model: the one that answers.
            has_adapter: whether /base has an adapter to switch.
            is_typed: a user is at a terminal, who can correct an input, end an answer and reads notes.
        """
        self._conversation = conversation
        self._model = model
        self._has_adapter = has_adapter
        self._is_typed = is_typed
        self._adapter_off: contextlib.ExitStack | None = None

    def take_all(self, lines: Iterator[str]) -> None:
        """Takes all lines, or those before /exit.

        Raises:
            UserError: a turn cannot be answered, and no user is at a terminal.
        """
        for line in lines:
            if line.rstrip() == "/exit":
                return
            try:
                if line.startswith("/"):
                    self._obey(*line.strip().partition(" ")[::2])
                elif line.strip():
                    self._answer(line.strip())
            except UserError as error:
                if not self._is_typed:
                    raise
                warn(f"error: {error}")

    def _answer(self, text: str) -> None:
        if not self._is_typed:
            show_answer(self._conversation, text)
            return
        started = time.perf_counter()
        with Interruptible() as interruption:
            show_answer(self._conversation, text, interruption.check)
        seconds, count = time.perf_counter() - started, self._conversation.num_tokens
        self._note(f"{'stopped; ' if interruption.came else ''}{count} tokens, {count / seconds:.1f} a second")

    def _obey(self, command: str, text: str) -> None:
        if command == "/reset" and not text:
            self._conversation.reset()
            self._note("the conversation is cleared")
        elif command == "/system" and text.strip():
            self._conversation.system = text.strip()
            self._conversation.reset()
            self._note("the system turn is set, the conversation is cleared")
        elif command == "/base" and not text:
            self._switch()
        elif command == "/help" and not text:
            print(COMMANDS)
        else:
            raise UserError(
                f"{command}: is not a command, or not with this text; /help lists them; begin with a space to send it"
            )

    def _switch(self) -> None:
        if not self._has_adapter:
            raise UserError("/base: no adapter is loaded, the base model answers already; load one with --model_path")
        if self._adapter_off is None:
            self._adapter_off = contextlib.ExitStack()
            self._adapter_off.enter_context(adapter_disabled(self._model))
        else:
            self._adapter_off.close()
            self._adapter_off = None
        self._conversation.recompute()
        self._note("the adapter is on" if self._adapter_off is None else "the adapter is off: the base model answers")

    def _note(self, text: str) -> None:
        if self._is_typed:
            info(f"{DIM}({text}){RESET}" if uses_colour() else f"({text})")


def show_answer(conversation: Conversation, text: str, check: Callable[[], object] = bool) -> None:
    """Prints the answer to `text` as it is generated, and calls `check` for each piece."""
    has_begun = False
    try:
        for piece in conversation.answer(text):
            has_begun = True
            sys.stdout.write(harmless(piece) if sys.stdout.isatty() else piece)
            sys.stdout.flush()
            check()
    except BaseException:
        if has_begun:
            print()
        raise
    print(flush=True)
    if conversation.cut_off is not None:
        warn(f"note: {conversation.cut_off}")


def harmless(text: str) -> str:
    """The text without control characters, which could control the terminal; newlines and tabs stay."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


if __name__ == "__main__":
    with tuned_process():
        run_script(without_ranks(main))
