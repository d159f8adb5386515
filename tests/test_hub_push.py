"""Exports on the hub, by an object in the place of its API."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from seesr_core.errors import ResourceError, SettingsError
from trainer.engine.hub import check_hub, push, write_card


class Api:
    """Remembers what it is asked for."""

    def __init__(self, error: OSError | None = None) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.error = error

    def __getattr__(self, name: str) -> Any:
        def call(**given: Any) -> None:
            if self.error:
                raise self.error
            self.calls.append((name, given))

        return call


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with an export."""
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"recipe": {"steps": 7, "precision": "bf16"}, "starts": []}), "utf-8")
    lines = ['{"step": 3, "psnr_y": 20.0}', '{"step": 7, "psnr_y": 21.25, "lpips": 0.5}', '{"step": 8, "psn']
    (folder / "validation.jsonl").write_text("\n".join(lines), "utf-8")
    (folder / "seesr-control.safetensors").write_bytes(b"weights")
    return folder


def test_a_file_is_uploaded_with_its_card(run: Path) -> None:
    api, file = Api(), run / "seesr-control.safetensors"
    push(file, run, "me/scans", api)
    assert [name for name, _ in api.calls] == ["create_repo", "upload_file", "upload_file"]
    assert api.calls[0][1] == {"repo_id": "me/scans", "private": True, "exist_ok": True}
    assert api.calls[1][1] == {"repo_id": "me/scans", "path_or_fileobj": str(file), "path_in_repo": file.name}
    card = Path(api.calls[2][1]["path_or_fileobj"]).read_text("utf-8")
    assert api.calls[2][1]["path_in_repo"] == "README.md"
    assert card.startswith("---\nlibrary_name: comfyui-seesr\n")
    assert "\n# scans\n" in card
    assert "| steps | 7 |\n| precision | bf16 |" in card
    assert "| psnr_y | 21.25 |\n| lpips | 0.5 |" in card


def test_a_whole_model_is_uploaded_as_a_folder(run: Path) -> None:
    api = Api()
    push(run / "model", run, "me/student", api)
    assert api.calls[1] == (
        "upload_folder",
        {"repo_id": "me/student", "folder_path": str(run / "model"), "commit_message": "Model"},
    )


def test_a_card_without_a_validation_claims_none(run: Path) -> None:
    (run / "validation.jsonl").unlink()
    assert "validation" not in write_card(run, run / "model", "me/student")


def test_nothing_is_uploaded_unless_asked_for(run: Path) -> None:
    api = Api()
    push(run / "model", run, "", api)
    check_hub("", api)
    assert not api.calls


def test_what_the_hub_refuses_is_told_and_the_result_stays(run: Path) -> None:
    with pytest.raises(ResourceError, match=r"did not take .*model \(no room\)\. It is finished and stays"):
        push(run / "model", run, "me/student", Api(OSError("no room")))
    assert (run / "model").is_dir()


def test_a_name_or_a_login_that_will_not_do_is_refused_at_the_start() -> None:
    check_hub("me/student", Api())
    with pytest.raises(SettingsError, match="is no name of a repository; expected OWNER/NAME"):
        check_hub("not a/name/at all", Api())
    with pytest.raises(SettingsError, match="needs a login with the right to write"):
        check_hub("me/student", Api(OSError("no token")))
