"""What a run would do and what it did, as tables to print: the rule of every layer, and where relevance was lost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RuleRow:
    """One operation that relevance crosses, in the order of the forward pass.

    Attributes:
        name: unique name of the operation in the traced graph.
        operation: what it computes, for example ``conv3d``.
        module: dotted path of the module in whose forward it stands.
        rule: how relevance is shared; ``passes``, ``follows`` and ``to the signal`` are layers without a choice.
        kernel: what computes it, ``reference`` for plain ATen.
        source: file and line in the model's code.
        times: how many times differ in a frozen clip, of what the operation reads and makes; ``every time`` where that is
            not known, and empty where the table is not about frozen clips.
    """

    name: str
    operation: str
    module: str
    rule: str
    kernel: str
    source: str
    times: str = ""


@dataclass(frozen=True)
class RuleTable:
    """Which rule every operation of a model follows; print it.

    Attributes:
        composite: name of the composite.
        rows: one `RuleRow` per operation, from the input to the output.
        notes: what else a user should know, such as a softmax that was stepped over.
    """

    composite: str
    rows: tuple[RuleRow, ...]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        names = ["operation", "module", "rule", "kernel", "times", "source"]
        if not any(row.times for row in self.rows):
            names.remove("times")
        table = aligned([names, *([getattr(row, name) for name in names] for row in self.rows)])
        return "\n".join([f"composite: {self.composite}", *table, *(f"note: {note}" for note in self.notes)])


@dataclass(frozen=True)
class LedgerRow:
    """What relevance did at one operation, one value per example.

    Attributes:
        name: unique name of the operation in the traced graph.
        operation: what it computes.
        module: dotted path of its module.
        rule: how relevance was shared.
        arriving: relevance of its output, summed.
        leaving: relevance it handed to its inputs, summed.
        lost: ``arriving - leaving``.
    """

    name: str
    operation: str
    module: str
    rule: str
    arriving: Tensor
    leaving: Tensor

    @property
    def lost(self) -> Tensor:
        """Relevance that did not leave: absorbed by biases and stabilizers, or dropped at zero denominators."""
        return self.arriving - self.leaving


@dataclass(frozen=True)
class Ledger:
    """Where relevance was lost on its way to the input; print it.

    Attributes:
        rows: one `LedgerRow` per operation that relevance crossed, from the output to the input.
        seed: relevance the walk started with, (N,).
        explained: relevance that reached the input, (N,).
    """

    rows: tuple[LedgerRow, ...]
    seed: Tensor
    explained: Tensor

    def __str__(self) -> str:
        # Summed over the batch: a table has room for one number per cell; the rows hold one per example.
        cells = [
            (
                row.operation,
                row.module,
                row.rule,
                *(f"{float(v.sum()):.6g}" for v in (row.arriving, row.leaving, row.lost)),
            )
            for row in self.rows
        ]
        table = aligned([("operation", "module", "rule", "arriving", "leaving", "lost"), *cells])
        seed, explained = float(self.seed.sum()), float(self.explained.sum())
        return "\n".join([*table, f"seed {seed:.6g}, explained {explained:.6g}, lost {seed - explained:.6g}"])


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of as many cells each as lines of text, each column as wide as its widest cell.

    Example:
        >>> aligned([("a", "b"), ("long", "c")])
        ['a     b', 'long  c']
    """
    if not rows:
        return []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
