"""What is wrong with annotations: the first of it stops whoever opens them, and `muntin data check` lists all."""

from dataclasses import dataclass, field

from muntin.errors import UserError


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the file, the image or annotation in it ("" for the file itself), and what is wrong."""

    file: str
    item: str
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.item}: {self.what}" if self.item else f"{self.file}: {self.what}"


@dataclass
class Problems:
    """Where readers report what they leave out.

    data: as `--data` names it; stop: the first problem is a `UserError`, which says how to see them all. Notes are
    worth knowing and harmless.
    """

    data: str
    stop: bool = True
    found: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, file: object, item: str, what: str) -> None:
        """Report what is wrong with an image or an annotation, which the reader then leaves out."""
        problem = Problem(str(file), item, what)
        if self.stop:
            raise UserError(
                f"{problem}; mend it (all problems: muntin data check {self.data}), or leave such ones out with: "
                "--set on_bad_image=skip"
            )
        self.found.append(problem)

    def note(self, text: str) -> None:
        """Report what is odd but fine."""
        self.notes.append(text)
