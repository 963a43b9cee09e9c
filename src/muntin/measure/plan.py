"""What is measured and what is not: every target in every engine and precision, less what makes no sense."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from muntin.errors import UserError, nearest
from muntin.measure.runners import ENGINES, refusal
from muntin.measure.targets import Target


@dataclass(frozen=True)
class Combination:
    """A target in an engine and a precision; `name` sets its rows apart from the others."""

    target: Target
    engine: str
    precision: str
    name: str

    @property
    def reference(self) -> bool:
        """Whether it is what the target's other engines are compared with."""
        return (self.engine, self.precision) == ("eager", "float32")


class Skips:
    """Reasons by model, each said once with what it holds for."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], dict[str, None]] = {}

    def add(self, label: str, reason: str, what: str) -> None:
        self._found.setdefault((label, " ".join(reason.split())), {})[what] = None

    def lines(self) -> list[str]:
        return [f"{label} ({', '.join(what)}): {reason}" for (label, reason), what in self._found.items()]


def plan(
    targets: Sequence[Target], engines: list[str] | None, precisions: list[str] | None, device: torch.device,
    skips: Skips,
) -> list[Combination]:  # fmt: skip
    """What is measured, in the order given; what makes no sense goes to `skips`."""
    found = []
    several = len(precisions or ()) > 1
    for target in targets:
        own = [getattr(target.opened, "precision", "float32")] if target.opened else ["float32"]
        for engine in engines or [target.only or "eager"]:
            for precision in precisions or own:
                reason = refusal(target, engine, precision, device)
                if reason is None:
                    apart = [] if engine == "eager" else [ENGINES[engine] if target.kind == "file" else engine]
                    apart += [precision] if several else []
                    name = f"{target.label} ({', '.join(apart)})" if apart else target.label
                    found.append(Combination(target, engine, precision, name))
                else:
                    skips.add(target.label, reason, f"{engine} {precision}" if several else engine)
    return found


def check_base(base: str | None, planned: list[Combination]) -> None:
    """UserError where no row and no model has this name."""
    valid = {it.name: None for it in planned} | {it.target.label: None for it in planned}
    if base is not None and base not in valid:
        raise UserError(f"--base {base!r} is not measured{nearest(base, valid)}; valid are {', '.join(valid)}")
