"""How much a stored tagger's answers differ from the original's, on photos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..dape import DAPE, Vocabulary, tagger_input
from ..pictures.reading import read_photo
from ..pictures.sizes import to_tensor


@dataclass(kw_only=True, slots=True)
class TagChange:
    """Differences over all photos."""

    photos: int = 0
    """Number of photos that were looked at."""
    kept: int = 0
    """Number of tags that both taggers give."""
    lost: list[str] = field(default_factory=list)
    """Tags that the original tagger alone gives."""
    gained: list[str] = field(default_factory=list)
    """Tags that the stored tagger alone gives."""
    largest_score: float = 0.0
    """Largest change of any tag's score (0 to 1), whether it is given or not."""
    soft_prompt: float = 0.0
    """Largest relative distance of a photo's soft prompt: norm of the difference over the norm."""

    def __str__(self) -> str:
        changes = [f"{sign}{name}" for sign, names in (("-", self.lost), ("+", self.gained)) for name in names]
        named = f" ({', '.join(changes[:8])})" if changes else ""
        return (
            f"on {self.photos} photo{'s' if self.photos > 1 else ''}: {self.kept} tags kept, {len(self.lost)} lost, "
            f"{len(self.gained)} gained{named}; scores change by at most {self.largest_score:.3f}, "
            f"the soft prompt by {self.soft_prompt:.2%}"
        )


@torch.no_grad()
def tag_change(original: DAPE, stored: DAPE, vocabulary: Vocabulary, photos: Sequence[Path]) -> TagChange:
    """Run both on every photo.

    Raises:
        ImageError: a photo cannot be read.
    """
    change = TagChange()
    for photo in photos:
        image = tagger_input(to_tensor(read_photo(photo, frame=None).rgb), original.config.image_size)
        before, after = original(image), stored(image)
        names = [{tag.name for tag in vocabulary.select(out.logits_BN)[0]} for out in (before, after)]
        change.photos += 1
        change.kept += len(names[0] & names[1])
        change.lost += sorted(names[0] - names[1])
        change.gained += sorted(names[1] - names[0])
        scores = (after.logits_BN.sigmoid() - before.logits_BN.sigmoid()).abs().max()
        distance = (after.tokens_BLD - before.tokens_BLD).norm() / before.tokens_BLD.norm()
        change.largest_score = max(change.largest_score, float(scores))
        change.soft_prompt = max(change.soft_prompt, float(distance))
    return change
