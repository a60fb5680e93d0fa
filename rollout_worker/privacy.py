"""Which tokens of a completion write text that it must not teach. Pure.

Private texts are looked for among the bytes that tokens write, so a character may be split over several tokens. One is
found only as it stands: in another case or spelling it is other text. A token writes private text or it does not; there
are no grades.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from potstill.types import FloatArray


def privacy(written: Sequence[bytes], private: Sequence[str]) -> FloatArray:
    """[T] 1 for a token that writes a byte of a private text, wherever and as often as the completion holds it; else 0.

    written  what each token writes (ByteVocabulary.written); a token that writes nothing is not private
    private  texts, none of them empty

    >>> privacy([b"I am", b" Jo", b"hn.", b""], ["John"]).tolist()
    [0.0, 1.0, 1.0, 0.0]
    """
    completion = b"".join(written)
    writer = np.repeat(np.arange(len(written)), [len(token) for token in written])  # [bytes] the token of each
    found = np.zeros(len(written), np.float32)
    for text in map(str.encode, private):
        for match in re.finditer(b"(?=" + re.escape(text) + b")", completion):  # occurrences may overlap
            found[writer[match.start() : match.start() + len(text)]] = 1
    return found
