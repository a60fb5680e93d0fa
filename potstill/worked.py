"""Written-out solutions for tasks whose generator gives only the answer. Pure text.

reasoning-gym makes the question and judges the answer; the steps between are ours, for supervised preparation alone.
A solution commits itself inside <answer> tags, which is where the verifier looks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def column_addition(entry: Mapping[str, Any]) -> str | None:
    """A sum, column by column from the right, the carry written last; None for anything but a sum.

    >>> print(column_addition({"metadata": {"expression": "378 + 937"}}))
    8+7=15
    7+3+1=11
    3+9+1=13
    <answer>1315</answer>
    """
    written = entry["metadata"]["expression"].split(" + ")
    if not all(term.isdecimal() for term in written):
        return None
    terms = [int(term) for term in written]
    lines, carry = [], 0
    for column in range(len(str(max(terms)))):
        digits = [term // 10**column % 10 for term in terms] + ([carry] if column else [])
        lines.append(f"{'+'.join(map(str, digits))}={sum(digits)}")
        carry = sum(digits) // 10
    return "\n".join([*lines, f"<answer>{sum(terms)}</answer>"])


SOLVERS: dict[str, Callable[[Mapping[str, Any]], str | None]] = {"basic_arithmetic": column_addition}
