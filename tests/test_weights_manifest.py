"""The list of published files: what is known of them, and where they come from."""

from __future__ import annotations

import pytest

from seesr_core.errors import SettingsError
from seesr_core.install.manifest import choose, load_manifest


def test_what_is_known_of_the_published_files() -> None:
    assets = load_manifest()
    assert list(assets) == ["base", "turbo", "seesr", "dape", "ram", "tags"]
    for layout in assets["ram"].layouts.values():
        (ram,) = layout.files
        assert ram.size == 5_625_634_877
        assert ram.sha256 == "15c729c793af28b9d107c69f85836a1356d76ea830d4714699fb62e55fcc08ed"
        assert ram.sources[0].repo == "xinyu1205/recognize_anything_model"
    (comfy,) = assets["base"].layouts["comfy"].files
    assert comfy.path == "512-base-ema.safetensors"


def test_every_file_has_a_source_and_is_verified_somehow() -> None:
    for item in load_manifest().values():
        assert set(item.layouts) == {"folder", "comfy"}
        for file in (file for layout in item.layouts.values() for file in layout.files):
            assert file.sources
            assert file.sha256 or item.unverified
            assert file.kind


def test_assets_bring_what_they_need() -> None:
    assets = load_manifest()
    assert [item.name for item in choose(assets, ["dape"])] == ["dape", "tags"]
    assert [item.name for item in choose(assets, ["all"])] == list(assets)
    with pytest.raises(SettingsError, match="There is no asset 'sdxl'"):
        choose(assets, ["sdxl"])
