"""Commands that are killed at random moments and given again, for tests: a fresh interpreter imports once and forks.

    python -m tests.fuzz.kills SCENARIO FOLDER KILLS SEED

Prints a line a kill and one for the last run, which nothing disturbs; fails if that run's results are others than those
of an undisturbed one, or if anything temporary is left.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from seesr_core.__main__ import main as seesr
from seesr_core.install.download import Download
from seesr_core.install.manifest import Asset, Layout, RemoteFile, Source
from seesr_core.install.places import Target
from seesr_core.runtime.files import _TEMPORARY
from seesr_core.runtime.signals import exit_code, terminable
from trainer.engine import command
from trainer.engine.loop import train
from trainer.evaluate.quality import folders
from trainer.segsr import scenes
from trainer.segsr.command import main as segsr
from trainer.segsr.scenes import write_scenes

from ..hub_server import Hub, serve
from ..ranks import TOY, ToyTask
from ..tiny_model import photo, write_tiny_model
from ..weights_files import write_seesr

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
_CAUGHT = SIGNALS[:2]
_VOLATILE = ("run.json", "log.jsonl", ".owner.json", ".lock")


class Scenario(ABC):
    """Something that is done in a folder, again and again until it is done; `prepare` makes what it works on."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:  # noqa: B027 # a scenario without inputs needs none
        """Make the inputs."""

    @abstractmethod
    def act(self, out: Path) -> int:
        """Do the work into `out`; returns the exit code."""

    def surroundings(self) -> Any:
        """What must be there meanwhile."""
        return nullcontext()

    def results(self, out: Path) -> dict[str, str]:
        """What must be the same, by name."""
        paths = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name not in _VOLATILE]
        return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


class Upscale(Scenario):
    """A folder of photos."""

    def prepare(self) -> None:
        write_tiny_model(self.root / "model")
        (self.root / "in").mkdir()
        for number in range(4):
            photo(40, 32, seed=number).save(self.root / "in" / f"{number}.png")

    def act(self, out: Path) -> int:
        words = ["upscale", self.root / "in", out, "--model", self.root / "model", "--device", "cpu", "--steps", 3]
        return seesr([str(word) for word in words])


class Convert(Scenario):
    """The published folders to one file."""

    def prepare(self) -> None:
        write_seesr(self.root / "seesr")

    def act(self, out: Path) -> int:
        return seesr(["convert", str(self.root / "seesr"), "--out", str(out), "--unchecked"])


class Fetch(Scenario):
    """Files from a hub."""

    @contextmanager
    def surroundings(self) -> Iterator[None]:
        """A hub on a loopback port."""
        with serve(Hub()) as hub:
            for number in range(5):
                hub.add(f"first/weights/{number}.txt", random.Random(number).randbytes(300_000))
            os.environ["HF_ENDPOINT"] = hub.url
            yield

    def act(self, out: Path) -> int:
        files = tuple(
            RemoteFile(path=f"{n}.txt", kind="text", sources=(Source(repo="first/weights"),)) for n in range(5)
        )
        asset = Asset(
            name="thing",
            title="",
            licence="",
            unverified="",
            needs=(),
            layouts={"folder": Layout(place="", files=files)},
        )
        work = Download(target=Target.folder(out))
        items = work.items([asset])
        work.run(items)
        return 0

    def results(self, out: Path) -> dict[str, str]:
        return {name: digest for name, digest in super().results(out).items() if not name.startswith(".")}


class Train(Scenario):
    """The loop of every stage."""

    def act(self, out: Path) -> int:
        config = replace(TOY, steps=40, save_every=1, keep_best=False)
        return command.run(lambda: train(ToyTask(config), config, out))

    def results(self, out: Path) -> dict[str, str]:
        tensors = load_file(out / "checkpoint.safetensors")
        return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


class TrainSegSR(Train):
    """SegSR around the embedded small model, labels and prepared batches of drawn scenes included."""

    def prepare(self) -> None:
        write_scenes(scenes.Options(out=self.root / "scenes", count=4, size=64, seed=3))

    def act(self, out: Path) -> int:
        words = ["--recipe", "debug", "--data", self.root / "scenes", "--masks", self.root / "scenes" / "labels"]
        more = ["--pool", 2, "--loop.steps", 6, "--loop.save-every", 1, "--loop.sample-every", 0]
        return segsr([str(word) for word in (*words, *more, "--out", out)])

    def results(self, out: Path) -> dict[str, str]:
        file = out / "segsr.safetensors"
        return {**super().results(out), file.name: hashlib.sha256(file.read_bytes()).hexdigest()}


class Evaluate(Scenario):
    """Figures of a folder of results."""

    def prepare(self) -> None:
        for folder, shift in (("sr", 0), ("hr", 50)):
            (self.root / folder).mkdir()
            for number in range(30):
                photo(64, 64, seed=number + shift).save(self.root / folder / f"{number}.png")

    def act(self, out: Path) -> int:
        options = folders.Options(
            sr=self.root / "sr",
            hr=self.root / "hr",
            json=out / "report.json",
            csv=out / "pictures.csv",
            markdown=out / "report.md",
            html=out / "page.html",
            metrics=("psnr_y", "ssim_y"),
            backend="own",
        )
        return command.run(lambda: folders.evaluate(options))

    def results(self, out: Path) -> dict[str, str]:
        return {name: digest for name, digest in super().results(out).items() if "figures-" not in name}


SCENARIOS: dict[str, Callable[[Path], Scenario]] = {
    "upscale": Upscale,
    "convert": Convert,
    "download": Fetch,
    "train": Train,
    "segsr": TrainSegSR,
    "evaluate": Evaluate,
}


def _child(scenario: Scenario, out: Path) -> int:
    """Do the work in a process of its own; returns that process.

    Outside the work signals wait: they are the command's to answer, not this process's before it and after.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _CAUGHT)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            with terminable() as asked:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _CAUGHT)
                code = scenario.act(out)
                signal.pthread_sigmask(signal.SIG_BLOCK, _CAUGHT)
                code = code and (asked.code or code)  # as the program itself ends, whose own guard finds this one
        except KeyboardInterrupt as error:
            code = exit_code(error)
        finally:
            os._exit(code)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _CAUGHT)
    return child


def _ended(child: int) -> int:
    """The exit code as a shell has it."""
    status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status) % 256 if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


def leftovers(folder: Path) -> list[str]:
    """Temporary files, whoever made them."""
    names = (path.name for path in folder.rglob("*"))
    return [name for name in names if _TEMPORARY.fullmatch(name) or name.startswith(".tmp") or name.endswith(".part")]


def run(scenario: Scenario, kills: int, seed: int) -> dict[str, Any]:
    """Kill it `kills` times, then let it end; returns what happened."""
    draw, codes = random.Random(seed), []
    scenario.prepare()
    with scenario.surroundings():
        start = time.monotonic()
        assert _ended(_child(scenario, scenario.root / "reference")) == 0
        length = time.monotonic() - start
        out = scenario.root / "out"
        for number in range(kills):
            child = _child(scenario, out)
            time.sleep(draw.uniform(0, length))
            os.kill(child, SIGNALS[number % len(SIGNALS)])
            codes.append(_ended(child))
        last = _ended(_child(scenario, out))
    same = scenario.results(out) == scenario.results(scenario.root / "reference")
    return {"codes": codes, "last": last, "same": same, "left": leftovers(out), "seconds": round(length, 2)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, folder, count, seed_text = sys.argv[1:]
    sys.stdout.write(json.dumps(run(SCENARIOS[name](Path(folder)), int(count), int(seed_text))) + "\n")
