"""The methods: named points of the algebra, each pinned to its paper by a test. A method is a table, not a trainer.

`potstill methods` prints PRESETS. A new method is an entry in one of this folder's files, and its golden test.
"""

from __future__ import annotations

from collections.abc import Mapping

from potstill.methods.classic import CLASSIC
from potstill.methods.crosstokenizer import CROSS_TOKENIZER
from potstill.methods.method import Method
from potstill.methods.multiple import MULTIPLE
from potstill.methods.offline import OFFLINE
from potstill.methods.onpolicy import ON_POLICY
from potstill.methods.rewarded import REWARDED
from potstill.methods.selfdistilled import SELF_DISTILLED

PRESETS: Mapping[str, Method] = {
    **ON_POLICY,
    **CLASSIC,
    **SELF_DISTILLED,
    **REWARDED,
    **MULTIPLE,
    **CROSS_TOKENIZER,
    **OFFLINE,
}

__all__ = ["PRESETS", "Method"]
