"""Is a file what the manifest says? By size and hash where they are known, and always by content."""

from __future__ import annotations

from pathlib import Path

from ..errors import WeightsError
from ..formats.detect import detect
from ..formats.schema import MalformedError, read_json
from ..runtime.memory import gigabytes
from .hashing import Progress, sha256
from .manifest import RemoteFile

JSON, TEXT = "json", "text"
_PREDICTS = {"v_prediction": "a v-prediction model (such as Stable Diffusion 2.1)"}


def check_file(
    path: Path,
    expected: RemoteFile,
    *,
    announced: str | None = None,
    progress: Progress = lambda done, total: None,
) -> str:
    """Find a file to be as expected.

    Args:
        path: the file.
        expected: what the manifest says.
        announced: hash that the source announced or that was noted before, asked for where the manifest has none.
        progress: of the hashing.

    Returns:
        What the verdict rests on: "sha256", or "content".

    Raises:
        WeightsError: it is another file or damaged; the message is one sentence.
    """
    size = path.stat().st_size
    if expected.size is not None and size != expected.size:
        raise WeightsError(f"{path} has {size:,} bytes: expected {expected.size:,} for {expected.path}.")
    wanted = expected.sha256 or announced
    if wanted is not None:
        _check_hash(path, wanted, progress)
    check_content(path, expected)
    return "sha256" if wanted is not None else "content"


def check_content(path: Path, expected: RemoteFile) -> None:
    """The part of `check_file` that needs no hash and reads no weights.

    Raises:
        WeightsError: as `check_file`.
    """
    if expected.kind == JSON:
        _check_json(path, expected)
    elif expected.kind == TEXT:
        _check_text(path, expected)
    else:
        _check_weights(path, expected)


def _check_hash(path: Path, wanted: str, progress: Progress) -> None:
    found = sha256(path, progress)
    if found != wanted:
        raise WeightsError(f"{path} has the sha256 {found[:12]}…: expected {wanted[:12]}…; it is damaged or another.")


def _check_weights(path: Path, expected: RemoteFile) -> None:
    found = detect(path)
    if found.kind.value != expected.kind:
        raise WeightsError(f"{path} looks like {found.label}: expected {expected.path} ({expected.kind}).")
    if expected.parameters is not None and found.parameters != expected.parameters:
        raise WeightsError(
            f"{path} looks like {found.label}, with {found.parameters:,} parameters: "
            f"expected {expected.parameters:,} for {expected.path}."
        )


def _check_json(path: Path, expected: RemoteFile) -> None:
    try:
        values = read_json(path)
    except (MalformedError, OSError) as error:
        raise WeightsError(f"{path} is no JSON: expected {expected.path}.") from error
    for name, wanted in expected.values.items():
        found = values.get(name, wanted) if isinstance(values, dict) else None
        if found != wanted:
            said = _PREDICTS.get(str(found), f"{name} {found!r}")
            raise WeightsError(f"{path} belongs to {said}: expected {name} {wanted!r}.")


def _check_text(path: Path, expected: RemoteFile) -> None:
    start = path.read_bytes()[:512].lstrip()
    if not start or start.startswith(b"<"):
        raise WeightsError(
            f"{path} is {'a web page' if start else 'empty'} ({gigabytes(path.stat().st_size)}): "
            f"expected the text file {expected.path}."
        )
