"""One comparison of a computed quantity with its golden value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A computed quantity beside its golden value, reduced to the figures of one line."""

    group: str
    case: str
    quantity: str
    max_abs: float
    rel_l2: float
    tolerance: str
    ok: bool

    @classmethod
    def of(
        cls,
        group: str,
        case: str,
        quantity: str,
        actual: Tensor,
        expected: Tensor,
        tolerance: float,
        *,
        metric: str = "max_abs",
    ) -> Comparison:
        """Compare tensors of one shape; `metric` ("max_abs" or "mean_abs") is what has to stay within `tolerance`."""
        if actual.shape != expected.shape:
            mismatch = f"shape {tuple(actual.shape)} for {tuple(expected.shape)}"
            return cls.wrong(group, case, quantity, mismatch)
        difference = (actual.double() - expected.double()).abs()
        max_abs = difference.max().item() if difference.numel() else 0.0
        value = {"max_abs": max_abs, "mean_abs": difference.mean().item()}[metric]
        norm = expected.double().norm().clamp_min(1e-30)
        rel = (difference.norm() / norm).item()
        name = f"{tolerance:g}" if metric == "max_abs" else f"{metric}<={tolerance:g}"
        return cls(
            group=group,
            case=case,
            quantity=quantity,
            max_abs=max_abs,
            rel_l2=rel,
            tolerance=name,
            ok=value <= tolerance,
        )

    @classmethod
    def u8(
        cls, group: str, case: str, quantity: str, actual: Tensor, expected: Tensor, *, share: float = 0.01
    ) -> Comparison:
        """Compare uint8 images: at most one level apart, on less than `share` of the values."""
        if actual.shape != expected.shape:
            return cls.wrong(group, case, quantity, f"shape {tuple(actual.shape)} for {tuple(expected.shape)}")
        difference = (actual.int() - expected.int()).abs().double()
        differing = (difference > 0).double().mean().item()
        rel = (difference.norm() / expected.double().norm().clamp_min(1e-30)).item()
        limit = f"+-1_on<{share:g}" if share > 0 else "exact"
        ok = bool(difference.max() <= 1 and differing < share) if share > 0 else differing == 0.0
        return cls(
            group=group,
            case=case,
            quantity=quantity,
            max_abs=difference.max().item(),
            rel_l2=rel,
            tolerance=limit,
            ok=ok,
        )

    @classmethod
    def equal(cls, group: str, case: str, quantity: str, actual: object, expected: object) -> Comparison:
        """Compare anything that must be the same (sizes, timesteps, key lists, tag strings)."""
        same = actual == expected
        error = 0.0 if same else float("inf")
        return cls(group=group, case=case, quantity=quantity, max_abs=error, rel_l2=error, tolerance="equal", ok=same)

    @classmethod
    def wrong(cls, group: str, case: str, quantity: str, reason: str) -> Comparison:
        """A quantity that could not be compared at all; counts as outside the tolerance."""
        inf = float("inf")
        return cls(
            group=group,
            case=case,
            quantity=quantity,
            max_abs=inf,
            rel_l2=inf,
            tolerance=reason.replace(" ", "_"),
            ok=False,
        )

    def line(self) -> str:
        """`group case quantity max_abs rel_l2 tolerance ok`."""
        verdict = "ok" if self.ok else "FAIL"
        return (
            f"{self.group} {self.case} {self.quantity} {self.max_abs:.3e} {self.rel_l2:.3e} {self.tolerance} {verdict}"
        )
