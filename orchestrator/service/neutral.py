"""Text of processes made harmless for a terminal and a page, byte for byte in its place. Pure.

What would move a cursor, change a colour, forge a line or turn the direction of text becomes a "?" for each of its
bytes; so does what is no UTF-8. A lone carriage return, with which progress bars paint over themselves, begins a line.
The length stays, so that an offset into the file is an offset into the text.
"""

from __future__ import annotations

import codecs
import re

MARGIN = 4  # bytes on either side of a piece that decide what becomes of its first and last ones

_CONTROLS = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"  # C0 but tab and line feed, and C1, whose U+009B is an escape of its own
    "\u2028\u2029\u202a-\u202e\u2066-\u2069"  # line separators, and what turns the direction of text
    "\U000e0000-\U000e007f]"  # tags: text that nobody sees
)


def neutral(text: bytes) -> bytes:
    """As many bytes as `text` has.

    >>> neutral(b"\\x1b[31mred\\xff\\rnext\\r\\n")
    b'?[31mred?\\nnext \\n'
    """
    decoded = text.decode("utf-8", _HANDLER).replace("\r\n", " \n").replace("\r", "\n")
    return _CONTROLS.sub(lambda found: "?" * len(found.group().encode()), decoded).encode()


def unfinished(text: bytes) -> int:
    """How many bytes at the end begin a character that the rest of has not been written yet.

    >>> unfinished("é".encode()[:1]), unfinished("é".encode()), unfinished(b"e")
    (1, 0, 0)
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(text[-3:])
    return len(decoder.getstate()[0])


def _question_marks(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError), "registered for decoding only"
    return "?" * (error.end - error.start), error.end


_HANDLER = "potstill.question_marks"
codecs.register_error(_HANDLER, _question_marks)
