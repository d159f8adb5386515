"""Exports on the model hub: the files of a finished run, and a card that says how they came about."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seesr_core.errors import ResourceError, SettingsError
from seesr_core.formats.schema import MalformedError, read, read_json
from seesr_core.runtime.files import write_text

from .journal import last_line
from .processes import is_main_process

log = logging.getLogger(__name__)

CARD = "README.md"
_NAME = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)
_SHOWN = ("steps", "batch_size", "learning_rate", "optimizer", "precision", "crop", "seed", "photos")
"""Facts of a run that a card has."""


def check_hub(repository: str, api: Any = None) -> None:
    """Refuse a repository that could not be written to once the run is over; an empty name asks for none.

    Raises:
        SettingsError: the name is none, or nobody is logged in.
    """
    if not repository or not is_main_process():
        return
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    if not _NAME.fullmatch(repository):
        raise SettingsError(f"--push-to-hub {repository!r} is no name of a repository; expected OWNER/NAME.")
    try:
        (api or _api()).whoami()
    except (LocalTokenNotFoundError, HfHubHTTPError, OSError) as error:
        raise SettingsError(
            f"--push-to-hub needs a login with the right to write (`hf auth login`, or HF_TOKEN): {error}"
        ) from error


def push(result: Path, run: Path, repository: str, api: Any = None) -> None:
    """Upload a run's result and its card; an empty name uploads nothing.

    Args:
        result: the exported file, or the folder of a whole model.
        run: the run's folder, whose `run.json` and last validation the card tells.
        repository: OWNER/NAME; made if it is not there, and private then.
        api: a `huggingface_hub.HfApi`; a fresh one if None.

    Raises:
        ResourceError: the hub refused; the result is where it was.
    """
    if not repository or not is_main_process():
        return
    from huggingface_hub.errors import HfHubHTTPError

    card = run / CARD
    write_text(card, write_card(run, result, repository))
    hub = api or _api()
    try:
        hub.create_repo(repo_id=repository, private=True, exist_ok=True)
        if result.is_dir():
            hub.upload_folder(repo_id=repository, folder_path=str(result), commit_message="Model")
        else:
            hub.upload_file(repo_id=repository, path_or_fileobj=str(result), path_in_repo=result.name)
        hub.upload_file(repo_id=repository, path_or_fileobj=str(card), path_in_repo=CARD)
    except (HfHubHTTPError, OSError) as error:
        raise ResourceError(
            f"The hub did not take {result} ({error}). It is finished and stays there; the same command tries again."
        ) from error
    log.info("uploaded %s to %s", result.name, repository)


def write_card(run: Path, result: Path, repository: str) -> str:
    """The card of a result, Markdown with the hub's header."""
    facts = _facts(run)
    rows = [f"| {name} | {facts[name]} |" for name in _SHOWN if name in facts]
    figures = [
        f"| {name} | {value:.4g} |" for name, value in last_line(run / "validation.jsonl").items() if name != "step"
    ]
    header = ["---", "library_name: comfyui-seesr", "pipeline_tag: image-to-image", "tags:", "- super-resolution"]
    judged = ["", "## Last validation", "| figure | value |", "|---|---:|", *figures] if figures else []
    lines = [
        *header,
        "- seesr",
        "---",
        f"# {repository.partition('/')[2] or repository}",
        "",
        f"`{result.name}`: super-resolution by [SeeSR](https://arxiv.org/abs/2311.16518). Its settings of sampling are "
        "in the file; the nodes and `seesr upscale` use them.",
        "",
        "## Training",
        "| setting | value |",
        "|---|---|",
        *rows,
        *judged,
        "",
        "The licence is that of the base model, the tagger and the photos; state it here.",
    ]
    return "\n".join(lines) + "\n"


def _facts(run: Path) -> Mapping[str, Any]:
    try:
        found: Mapping[str, Any] = read(dict[str, Any], read_json(run / "run.json"))
    except (OSError, MalformedError):
        return {}
    recipe: Mapping[str, Any] = found.get("recipe", {})
    return recipe


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi()
