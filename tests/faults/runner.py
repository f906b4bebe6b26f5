"""Runs scripts/train.py in forked children of one process that has imported everything: 0.3 s a run in place of 4.

A child is a process like any other: it is killed by SIGKILL, answers signals, and its exit status is what a shell sees.
Several of them are the ranks of one run, with the environment that torchrun would give them.
Started as a program it reads a JSON line for each run and answers with its process id, then with its status.

A fault is one of these, counted over the file operations (`os` functions) on paths below the run's output folder:

    {"kill": k}              SIGKILL before operation k; a write is done by half first
    {"fail": k, "errno": e}  operation k raises OSError; with "for_good" all later writing ones too
    {"signal": k, "signum": n}  operation k is preceded by a signal, with "twice" by two
    {"log": path}            every operation with what it writes, as JSON lines

Or {"no_memory": s}: optimizer step s raises MemoryError.
"""

import base64
import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parents[2] / "scripts"
OPERATIONS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "ftruncate")


class Runs:
    """The test's side: starts runs, waits for them."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def _ask(self, **question: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(
        self,
        keys: list[str],
        output: Path,
        fault: dict[str, Any] | None = None,
        environment: dict[str, str] | None = None,
        printed: Path | None = None,
    ) -> int:
        """Begins a run in `output` and returns its process id; it prints to `{printed}.out` and `.err`.

        `printed` is `output` where nothing else is said.
        """
        return int(
            self._ask(
                keys=[*keys, f"train.output_dir={output}"],
                output=str(output),
                fault=fault or {},
                environment=environment or {},
                printed=str(printed or output),
            )
        )

    def start_ranks(
        self, count: int, keys: list[str], output: Path, faults: dict[int, dict[str, Any]] | None = None
    ) -> list[int]:
        """Begins a run of several ranks and returns their process ids; rank 1 prints to `{output}.1.out` and so on."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            self.start(
                keys,
                output,
                (faults or {}).get(rank),
                {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                Path(f"{output}.{rank}") if rank else None,
            )
            for rank in range(count)
        ]

    def wait(self, pid: int) -> int:
        """Exit status, -9 for a killed one, as subprocess has it."""
        return int(self._ask(wait=pid))

    def run(self, keys: list[str], output: Path, fault: dict[str, Any] | None = None) -> int:
        """`start` and `wait`."""
        return self.wait(self.start(keys, output, fault))

    def close(self) -> None:
        """Ends the server."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class Disk:
    """Replaces `os` functions by ones that count, log, fail or kill, for paths below `root`."""

    def __init__(self, root: str, fault: dict[str, Any]):
        self.root = os.path.abspath(root)
        self.fault = fault
        self.count = 0
        self.descriptors: dict[int, str] = {}
        self.log = open(fault["log"], "w", encoding="utf-8") if "log" in fault else None  # noqa: SIM115
        self.real: dict[str, Callable[..., Any]] = {name: getattr(os, name) for name in OPERATIONS}
        for name in OPERATIONS:
            setattr(os, name, self._wrapped(name))

    def _wrapped(self, name: str) -> Callable[..., Any]:
        def operation(*arguments: Any, **keywords: Any) -> Any:
            path = self._path(name, arguments, keywords)
            if path is None or not path.startswith(self.root):
                return self.real[name](*arguments, **keywords)
            is_reading = name == "open" and not arguments[1] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if not is_reading:
                self._strike(name, path, arguments)
            result = self.real[name](*arguments, **keywords)
            if name == "open":
                self.descriptors[result] = path
            return result

        return operation

    def _path(self, name: str, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> str | None:
        if name in ("write", "fsync", "ftruncate"):
            path = self.descriptors.get(arguments[0])
            if path is None:
                return None
            with contextlib.suppress(OSError):  # a number that was given to another file since
                if os.readlink(f"/proc/self/fd/{arguments[0]}").removesuffix(" (deleted)") != path:
                    return None
            return path
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else None
        directory = keywords.get("dir_fd")
        if path is not None and directory is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), path)
        return None if path is None else os.path.abspath(path)

    def _strike(self, name: str, path: str, arguments: tuple[Any, ...]) -> None:
        self.count += 1
        number = self.count
        if self.log is not None:
            entry: dict[str, Any] = {"number": number, "name": name, "path": os.path.relpath(path, self.root)}
            if name == "write":
                entry["content"] = base64.b64encode(bytes(arguments[1])).decode()
            if name in ("rename", "replace"):
                entry["to"] = os.path.relpath(os.path.abspath(os.fsdecode(arguments[1])), self.root)
            if name == "open":
                entry["flags"] = arguments[1]
            self.log.write(json.dumps(entry) + "\n")
            self.log.flush()
        if number == self.fault.get("kill"):
            if name == "write":
                self.real["write"](arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        at = self.fault.get("fail", 0)
        is_writing = name in ("open", "write", "fsync", "mkdir", "rename", "replace")
        if at and is_writing and (number == at or (number > at and self.fault.get("for_good"))):
            if name == "write" and number == at and len(arguments[1]) > 1:
                self.real["write"](arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])  # what still fitted
            raise OSError(self.fault["errno"], os.strerror(self.fault["errno"]), path)
        if number == self.fault.get("signal"):
            os.kill(os.getpid(), self.fault["signum"])
            if self.fault.get("twice"):
                os.kill(os.getpid(), self.fault["signum"])


def _exhaust_memory(at: int) -> None:
    from minilora.qlora.lora import DropoutSeed

    plain = DropoutSeed.set

    def set_or_raise(self: DropoutSeed, seed: int, step: int, micro_batch: int) -> None:
        if step == at:
            raise MemoryError
        plain(self, seed, step, micro_batch)

    DropoutSeed.set = set_or_raise  # type: ignore[method-assign]


def _child(order: dict[str, Any], main: Callable[[], None]) -> None:
    """One run, in a forked process, to its exit."""
    for descriptor, ending in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(order["printed"] + ending, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdout, sys.stderr = open(1, "w", encoding="utf-8"), open(2, "w", encoding="utf-8")  # noqa: SIM115
    os.environ.update(order["environment"])
    if order["fault"]:
        Disk(order["output"], order["fault"])
    if "no_memory" in order["fault"]:
        _exhaust_memory(order["fault"]["no_memory"])
    sys.argv = ["train.py", *order["keys"]]
    status = 1
    try:
        main()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # a traceback is what these tests look for
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _serve() -> None:
    import torch

    torch.set_num_threads(1)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: F401
    from tqdm import tqdm  # noqa: F401

    spec = importlib.util.spec_from_file_location("train_script", SCRIPTS / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from minilora.system.cli import run_script
    from minilora.system.torchrun import with_ranks

    assert threading.active_count() == 1
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            _, status = os.waitpid(order["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _child(order, lambda: run_script(with_ranks(module.main)))
        print(pid, flush=True)


if __name__ == "__main__":
    _serve()
