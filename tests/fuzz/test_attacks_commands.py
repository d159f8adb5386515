"""What names, streams, signals and full disks do to the commands: a sentence, the work kept, the right exit code."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from seesr_core.cli.console import printable
from seesr_core.cli.main import main
from seesr_core.errors import ResourceError
from seesr_core.runtime import files
from seesr_core.runtime.files import atomic_write, inside, read_bytes, whole_file, write_text

from ..full_disk import files_of_at_most
from ..tiny_model import write_tiny_model
from .attacks import one_tensor, with_shapes

ROOT = Path(__file__).parents[2]
SLEEPER = """
import sys, time
from seesr_core import __main__ as program
import seesr_core.cli.inspect as command
def wait(path):
    print("ready", flush=True)
    time.sleep(60)
command.files_of = wait
sys.exit(program.main(["inspect", "x"]))
"""


def seesr(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "seesr_core", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, text=True, check=False, timeout=120, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Terminated")]
)
def test_both_signals_unwind_the_program(number: int, code: int, word: str) -> None:
    program = f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{SLEEPER}"
    child = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=-1, stderr=-1, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (code, f"error: {word}; no half file was left.\n")


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "x.safetensors"
    path.write_bytes(one_tensor({"format": "none"}))
    return path


def test_output_that_cannot_be_written(weights: Path) -> None:
    with open("/dev/full", "w") as full:
        done = seesr("inspect", weights, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == "error: The output cannot be written: No space left on device.\n"


@pytest.mark.parametrize("stream", ["1", "2"])
def test_streams_that_are_closed(weights: Path, stream: str) -> None:
    command = f"exec {sys.executable} -m seesr_core inspect {weights} {stream}>&-"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False)


@pytest.mark.parametrize("name", ["n" * 300 + ".png", "n" * 300])
@pytest.mark.parametrize("command", ["upscale", "inspect", "convert", "tags"])
def test_names_that_are_too_long(tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str, name: str) -> None:
    more = [str(tmp_path / "out.png")] if command == "upscale" else []
    assert main([command, str(tmp_path / name), *more]) == 1
    out, err = capfd.readouterr()
    assert (out, err.count("\n"), err[:7]) == ("", 1, "error: ")


def test_a_pipe_is_not_waited_for(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 1
    assert "is a pipe or a device" in capfd.readouterr().err


def test_words_that_are_no_text(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["upscale", "a.png", "b.png", "--prompt", "caf\udce9"]) == 2
    assert "--prompt should be text in UTF-8" in capfd.readouterr().err


def test_metadata_does_not_command_the_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = {"source": "\x1b[2J\x1b]0;owned\x07\x9b31m\u202eevil\nfake: line", "format": "seesr-dape"}
    (tmp_path / "x.safetensors").write_bytes(with_shapes({"label_embed": [1, 1]}, words))
    assert main(["inspect", str(tmp_path / "x.safetensors")]) == 0
    out = capfd.readouterr().out
    assert all(letter.isprintable() or letter == "\n" for letter in out)
    assert "\\u001b[2J" in out
    assert "evil fake: line" in out


def test_what_is_escaped_remains_json() -> None:
    value = ["\x1b\x7f\x9b", "\u202e", "\U000e0001", "\udcff", "größer 中"]
    for encoding in ("utf-8", "ascii", "latin-1"):
        text = printable(json.dumps(value, ensure_ascii=False), encoding)
        assert json.loads(text.encode(encoding).decode(encoding)) == value


def test_a_report_on_a_name_that_is_no_text(tmp_path: Path) -> None:
    """The report is written after the work, which must not be lost by it."""
    model, source, out = write_tiny_model(tmp_path / "model"), tmp_path / "in", tmp_path / "out"
    source.mkdir()
    name = os.fsdecode(b"caf\xe9.png")
    Image.new("RGB", (16, 16), (200, 30, 30)).save(source / name)
    words = ["upscale", str(source), str(out), "--model", str(model), "--device", "cpu", "--steps", "1"]
    assert main([*words, "--json", str(tmp_path / "report.json")]) == 0
    assert os.listdir(out) == [name]
    (entry,) = json.loads((tmp_path / "report.json").read_bytes())["photos"]
    assert (entry["input"], entry["status"]) == (str(source / name), "done")


def test_names_as_long_as_they_may_be_are_written(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 125 + ".txt")
    write_text(path, "a")
    with atomic_write(path) as temporary:
        temporary.write_text("b")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert path.read_text() == "b"


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    for write in (_by_handle, _by_path):
        with files_of_at_most(100), pytest.raises(ResourceError, match=r"Could not write .*a\.txt: File too large"):
            write(tmp_path / "a.txt")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def _by_handle(path: Path) -> None:
    with whole_file(path) as handle:
        handle.write(bytes(1000))


def _by_path(path: Path) -> None:
    with atomic_write(path) as temporary:
        temporary.write_bytes(bytes(1000))


def test_what_dead_processes_left_is_swept_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    pid, host = int(dead.stdout), files._host()
    gone = [f".a~{host}-{pid}-0123abcd.png", f".b~{host}-{os.getpid()}-0123abcd", f".c~00000000-{pid}-0123abcd.txt"]
    kept = [f".d~{host}-{os.getppid()}-0123abcd.png", f".e~00000001-{pid}-0123abcd", ".hidden", "~backup", "a.png"]
    for name in (*gone, *kept):
        (tmp_path / name).touch()
    os.utime(tmp_path / gone[2], (0, 0))
    write_text(tmp_path / "new.txt", "")
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "new.txt"])


@pytest.mark.parametrize("name", ["/etc/passwd", "../../x", "a/../../x", "a\0b", "", "..\\x", "C:\\x", "\\\\host\\x"])
def test_names_that_lead_out_of_a_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="does not name anything inside"):
        inside(tmp_path, name)
    assert inside(tmp_path, "a/b.png") == tmp_path / "a" / "b.png"


def test_files_are_read_within_bounds(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(11))
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        ("a", "more than the 10"),
        ("pipe", "a pipe or a device"),
        (".", "directory"),
        ("b", "No such"),
    ):
        with pytest.raises(OSError, match=message):
            read_bytes(tmp_path / path, 10)
    with pytest.raises(OSError, match="a pipe or a device"):
        read_bytes("/dev/zero", 10)
