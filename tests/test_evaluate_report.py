"""`python -m trainer.evaluate`: protocols, resuming, processes, odd pictures, and everything that is written."""

from __future__ import annotations

import csv
import json
import logging
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from seesr_core.errors import DataError, SettingsError
from trainer.evaluate.commands import main
from trainer.evaluate.quality import folders, iqa
from trainer.evaluate.quality.builds import Builds
from trainer.evaluate.quality.compute import Case, Processes
from trainer.evaluate.quality.folders import Options, evaluate
from trainer.evaluate.quality.metrics import Facts, Outcome
from trainer.evaluate.quality.own import own_psnr
from trainer.evaluate.quality.paper import SETS, table2, table3
from trainer.evaluate.quality.protocols import centre, under
from trainer.evaluate.quality.state import Known
from trainer.evaluate.quality.summary import worst_first

from .golden import ROOT
from .niqe_files import noise, write_niqe_params
from .tiny_model import photo


@pytest.fixture(autouse=True)
def _no_pyiqa(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(iqa, "load_pyiqa", lambda: (None, "pyiqa is not installed"))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """LR of 8², HR of 32², results that are wrong by 1 to 5 levels."""
    for seed, name in enumerate("abcde"):
        hr = photo(32, 32, seed).point(lambda level: level // 2)
        save(hr, tmp_path / "hr" / f"{name}.png")
        save(hr.resize((8, 8)), tmp_path / "lr" / f"{name}.png")
        save(hr.point(lambda level, error=seed + 1: level + error), tmp_path / "sr" / f"{name}.png")
    return tmp_path


def save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    picture.save(path)


def options(work: Path, **changes: Any) -> Options:
    places = {"sr": work / "sr", "hr": work / "hr", "lr": work / "lr", "json": work / "report.json"}
    given: dict[str, Any] = {**places, **changes}
    return Options(**given)


class Counting:
    """A metric that counts what it is asked."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.facts = Facts(build="counting", colour="RGB")
        self.sizes: list[int] = []
        self.left = stop_after

    def measure(self, pictures: Sequence[Tensor], originals: Sequence[Tensor]) -> list[Outcome]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        self.sizes.append(len(pictures))
        return [Outcome(float(picture.double().mean())) for picture in pictures]

    def measure_set(self, pictures: Path, originals: Path) -> Outcome:
        self.sizes.append(len(list(pictures.iterdir())))
        assert [path.name for path in sorted(originals.iterdir())] == [f"{name}.png" for name in "abcde"]
        return Outcome(12.5)


def use(monkeypatch: pytest.MonkeyPatch, *, pictures: dict[str, Any] | None = None, sets: Any = None) -> None:
    builds = Builds(pictures=pictures or {}, sets={"fid": sets} if sets else {})
    monkeypatch.setattr(folders, "find_builds", lambda *_, **__: builds)


def test_the_same_command_again_measures_nothing(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metric, of_set = Counting(), Counting()
    use(monkeypatch, pictures={"musiq": metric}, sets=of_set)
    first = evaluate(options(work, batch=2))
    assert metric.sizes == [2, 2, 2, 2, 2, 2, 1, 1, 1], "bicubic, SR and HR of two batches of two and one of one"
    assert of_set.sizes == [5, 5]
    assert first["rows"]["SR"]["mean"]["fid"] == 12.5
    assert "fid" not in first["rows"]["HR"]["mean"]
    use(monkeypatch, pictures={"musiq": Counting(0)}, sets=of_set)
    assert evaluate(options(work)) == first
    assert len(of_set.sizes) == 2


def test_what_was_interrupted_goes_on_and_what_changed_is_measured_again(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, pictures={"musiq": Counting(stop_after=4)})
    with pytest.raises(KeyboardInterrupt):
        evaluate(options(work, batch=1))
    state = work / "report.figures-0.jsonl"
    state.write_text(state.read_text("utf-8")[:-9], "utf-8")  # the last line was cut off
    rest = Counting()
    use(monkeypatch, pictures={"musiq": rest})
    whole = evaluate(options(work, batch=1))
    assert len(rest.sizes) == 15 - 3
    save(photo(32, 32, 9), work / "sr" / "c.png")
    again = Counting()
    use(monkeypatch, pictures={"musiq": again})
    changed = evaluate(options(work, batch=1))
    assert len(again.sizes) == 2, "the result, and bicubic in its size"
    assert changed["rows"]["SR"]["mean"] != whole["rows"]["SR"]["mean"]
    other = Counting()
    other.facts = Facts(build="another version", colour="RGB")
    use(monkeypatch, pictures={"musiq": other})
    evaluate(options(work))
    assert sum(other.sizes) == 15


def test_processes_share_the_work(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []
    for rank in (1, 0):
        metric = Counting()
        use(monkeypatch, pictures={"musiq": metric})
        monkeypatch.setattr(Processes, "here", lambda rank=rank: Processes(rank=rank, world=2))
        report = evaluate(options(work, batch=1))
        shares.append(len(metric.sizes))
        assert bool(report) == (rank == 0)
    assert shares == [6, 9]
    assert (work / "report.figures-1.jsonl").exists()
    assert report["rows"]["HR"]["count"] == {"musiq": 5}


@pytest.mark.slow
def test_real_processes_share_the_work(work: Path) -> None:
    flags = ["--sr", str(work / "sr"), "--hr", str(work / "hr"), "--json", str(work / "two.json"), "--batch", "1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "trainer.evaluate"]
    flags += ["--backend", "own", "--device", "cpu"]
    done = subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("| SR |") == 1, "one process reports"
    evaluate(options(work, lr=None, backend="own"))
    reports = [json.loads((work / name).read_text("utf-8")) for name in ("two.json", "report.json")]
    assert reports[0] == reports[1]
    assert all((work / f"two.figures-{rank}.jsonl").exists() for rank in (0, 1))


def test_one_process_needs_no_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (Processes.here().rank, Processes.here().world) == (0, 1)


def test_differences_to_bicubic_are_paired(work: Path) -> None:
    report = evaluate(options(work))
    pictures = {row: report["rows"][row]["pictures"] for row in ("SR", "bicubic")}
    expected = np.mean([pictures["SR"][n]["psnr_y"] - pictures["bicubic"][n]["psnr_y"] for n in "abcde"])
    difference = report["difference"]["psnr_y"]
    assert difference["value"] == pytest.approx(expected)
    assert difference["low"] < expected < difference["high"]


def test_csv_holds_every_figure_and_leaves_gaps_empty(work: Path) -> None:
    save(noise(200, 200), work / "sr" / "a.png")
    save(noise(200, 200, 1), work / "hr" / "a.png")
    params = write_niqe_params(work / "niqe.npz")
    report = evaluate(options(work, csv=work / "all.csv", niqe_params=params))
    with (work / "all.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["picture"], row["row"]) for row in rows[:3]] == [("a", "bicubic"), ("a", "SR"), ("a", "HR")]
    assert float(rows[1]["niqe"]) == report["rows"]["SR"]["pictures"]["a"]["niqe"]
    assert rows[2]["psnr_y"] == rows[4]["niqe"] == ""
    assert len(rows) == 15


def test_the_papers_rows_stand_beside_ours_with_their_gaps(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, side in (("sr", 512), ("hr", 512), ("lr", 128)):
        for path in (work / kind).iterdir():
            path.unlink()
        save(photo(side, side, 3), work / kind / "x.png")
    table = work / "table.md"
    flags = ["--sr", str(work / "sr"), "--hr", str(work / "hr"), "--json", str(work / "r.json"), "--paper", "RealSR"]
    assert main([*flags, "--metrics", "psnr_y", "--markdown", str(table)]) == 0
    lines = table.read_text("utf-8").splitlines()
    assert lines[0].startswith("| 1 picture, protocol A | PSNR-Y ↑ | SSIM-Y ↑ | LPIPS ↓ |")
    assert "| SR | 100.00 | – | – | – | – | – | – | – | – |" in lines
    assert (
        "| SeeSR (paper, Table 2) | – | 0.7216 | 0.3009 | 0.2223 | 125.55 | 5.4081 | 0.6442 | 69.77 | 0.6612 |" in lines
    )
    assert "Table 2, RealSR, 100 pictures, protocol A" in table.read_text("utf-8")
    assert capsys.readouterr().out == table.read_text("utf-8")


def test_the_papers_figures() -> None:
    assert {dataset: len(table2(dataset)) for dataset in SETS} == dict.fromkeys(SETS, 11)
    assert table2("DIV2K-Val")["SeeSR"]["clipiqa"] == 0.6946
    assert "psnr_y" not in table2("RealSR")["SeeSR"]
    assert table2("RealLR200")["LDM"] == {}
    assert sum(len(figures) for dataset in SETS for figures in table2(dataset).values()) == 335
    assert table3()["SeeSR"]["Object Detection (AP)"] == 21.1


def test_protocols_are_never_mixed(work: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert options(work).protocol == "B"
    assert options(work, paper="DRealSR").protocol == "A"
    assert options(work, paper="RealLR200").protocol == "B"
    with pytest.raises(SettingsError, match=r"RealSR was measured by protocol A .* protocol B do not belong beside it"):
        options(work, paper="RealSR", protocol="B")
    with pytest.raises(DataError, match=r"a\.png: the result has 32×32 pixels, protocol A measures .* --protocol B"):
        evaluate(options(work, protocol="A"))
    evaluate(options(work, protocol="B"))
    report = json.loads((work / "report.json").read_text("utf-8"))
    assert report["protocol"]["name"] == "B"
    assert all(facts["crop"].startswith("protocol B: whole images") for facts in report["metrics"].values())


def test_protocol_a_takes_the_same_centre_of_original_and_photo() -> None:
    rows, columns = torch.meshgrid(torch.arange(170), torch.arange(151), indexing="ij")
    lr = torch.stack([rows, columns, rows]).to(torch.uint8)
    hr = lr.repeat_interleave(4, 1).repeat_interleave(4, 2)
    cut = under("A", "lr", lr)
    assert cut.shape == (3, 128, 128)
    assert torch.equal(under("A", "hr", hr), cut.repeat_interleave(4, 1).repeat_interleave(4, 2))
    assert centre(lr, 160) is None
    with pytest.raises(DataError, match=r"LR picture has 151×100 pixels, protocol A needs at least 128"):
        under("A", "lr", lr[:, :100])


def test_identical_black_single_16_bit_and_transparent_pictures(tmp_path: Path) -> None:
    black = Image.new("RGB", (200, 200))
    levels = (np.arange(200 * 200).reshape(200, 200) % 65536).astype(np.uint16)
    seen = noise(200, 200)
    clear = seen.copy()
    clear.putalpha(100)
    for name, sr, hr in (("black", black, black), ("clear", clear, seen), ("same", seen, seen)):
        save(sr, tmp_path / "sr" / f"{name}.png")
        save(hr, tmp_path / "hr" / f"{name}.png")
    save(Image.fromarray(levels), tmp_path / "sr" / "sixteen.png")
    save(Image.fromarray(np.rint(levels / 257).astype(np.uint8)), tmp_path / "hr" / "sixteen.png")
    params = write_niqe_params(tmp_path / "niqe.npz")
    report = evaluate(Options(sr=tmp_path / "sr", hr=tmp_path / "hr", json=tmp_path / "r.json", niqe_params=params))
    pictures = report["rows"]["SR"]["pictures"]
    assert {name: figures["psnr_y"] for name, figures in pictures.items()} == dict.fromkeys(pictures, 100.0)
    assert [figures["ssim_y"] for figures in pictures.values()] == pytest.approx([1.0] * 4)
    assert "niqe" not in pictures["black"], "no texture has no NIQE"
    assert pictures["clear"] == pictures["same"], "transparency is left out"
    assert report["notes"] == {
        "SR: 16 bits a channel were read": ["sixteen"],
        "SR: transparency was left out": ["clear"],
    }


class Tags(HTMLParser):
    """Counts elements and collects addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[str, int] = {}
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] = self.elements.get(tag, 0) + 1
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]


def test_page_is_one_file_with_the_worst_first(work: Path) -> None:
    (work / "sr" / "b.png").rename(work / "sr" / "<b>&.png")
    (work / "hr" / "b.png").rename(work / "hr" / "<b>&.png")
    (work / "lr" / "b.png").rename(work / "lr" / "<b>&.png")
    page = work / "page.html"
    evaluate(options(work, html=page, html_pictures=4))
    text = page.read_text("utf-8")
    tags = Tags()
    tags.feed(text)
    assert (tags.elements["figure"], tags.elements["img"], tags.elements["select"]) == (4, 16, 8)
    assert all(address.startswith("data:image/webp;base64,") for address in tags.addresses)
    assert re.findall(r"<b>(.*?)</b>", text) == ["e", "d", "c", "&lt;b&gt;&amp;"]
    assert "4 of 5 pictures, worst by PSNR-Y first" in text
    assert "@@" not in text
    assert "trainer.evaluate " in text, "settings are on the page"


def test_page_without_originals_and_cut_to_the_centre(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer.evaluate.quality import page

    monkeypatch.setattr(page, "SIDE", 16)
    loaded = Case(name="a", sr=work / "sr" / "a.png", lr=work / "lr" / "a.png").load("B")
    versions = page._versions(loaded)
    assert {title: picture.size for title, picture in versions.items()} == {
        "LR": (4, 4),
        "bicubic": (16, 16),
        "SR": (16, 16),
    }
    assert np.array_equal(np.asarray(versions["SR"]), np.asarray(Image.open(work / "sr" / "a.png"))[8:24, 8:24])


def test_worst_first_by_any_metric() -> None:
    pictures = {"x": {"niqe": 3.0, "musiq": 9.0}, "y": {}, "z": {"niqe": 5.0, "musiq": 7.0}, "w": {"niqe": 4.0}}
    report = {"rows": {"SR": {"pictures": pictures}}}
    assert worst_first(report) == ("niqe", ["z", "w", "x", "y"])
    assert worst_first(report, "musiq") == ("musiq", ["z", "x", "y", "w"])
    assert worst_first({"rows": {"SR": {"pictures": {"b": {}, "a": {}}}}}) == ("", ["a", "b"])


def test_unknown_outcomes_are_no_figures(work: Path) -> None:
    known = Known(work / "state" / "report [1].json")
    known.put("k", Outcome(None, "why"))
    known.put("l", Outcome(0.0))
    known.close()
    read = Known(work / "state" / "report [1].json", rank=3)
    assert (read.get("k"), read.get("l"), read.get("m")) == (Outcome(None, "why"), Outcome(0.0), None)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--metrics", "psnr"], "Unknown metrics psnr"),
        (["--metrics", "psnr_y", "ssim_y"], "psnr_y, ssim_y compare with originals: give their folder by --hr."),
        (["--worst-by", "fid"], "--worst-by fid is not among"),
        (["--batch", "0"], "at least 1"),
        (["--device", "quantum"], "no device 'quantum'"),
    ],
)
def test_refusals_are_one_sentence(
    work: Path, caplog: pytest.LogCaptureFixture, flags: list[str], message: str
) -> None:
    with caplog.at_level(logging.ERROR):
        assert main(["--sr", str(work / "sr"), "--json", str(work / "r.json"), *flags]) == 1
    assert message in caplog.records[-1].getMessage()
    assert "\n" not in caplog.records[-1].getMessage()


def test_own_builds_name_their_settings() -> None:
    facts = own_psnr().facts
    assert "BT.601" in facts.colour
    assert (facts.resize, facts.weights) == ("none", "none")
