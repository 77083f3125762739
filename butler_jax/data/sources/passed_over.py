"""Lines and records that cannot be read: counted, and named by file and number."""

from __future__ import annotations

from dataclasses import dataclass, field

EXAMPLES = 3


@dataclass
class PassedOver:
    """Lines and records that were passed over.

    Attributes:
        strict: Whether the first one is an error instead.
        count: How many there are.
        examples: What is said of the first ones.
        remedy: What to do with the first one that has a remedy.
    """

    strict: bool = False
    count: int = 0
    examples: list[str] = field(default_factory=list)
    remedy: str = ""

    def add(self, said: str, remedy: str = "") -> None:
        """Count one.

        Args:
            said: File, number, and what is wrong, without a full stop.
            remedy: What to do, as a sentence.

        Raises:
            ValueError: `strict` is set.
        """
        if self.strict:
            raise ValueError(f"{said}. {remedy}".strip())
        self.count += 1
        self.remedy = self.remedy or remedy
        if len(self.examples) < EXAMPLES:
            self.examples.append(said)

    def summary(self) -> str:
        """How many there are, and the first ones, in one line."""
        what = "line or record" if self.count == 1 else "lines or records"
        more = "; ..." if self.count > len(self.examples) else ""
        return f"{self.count:,} {what} that cannot be read ({'; '.join(self.examples)}{more}). {self.remedy}".strip()
