"""A form with one file in it, read as it arrives: the file's bytes go on at once, the few short fields are kept.

Refuses a second file, a field that is not known, long or given twice, and a form that ends before its end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from potstill.errors import ServiceError

MOST_FIELD_BYTES = 1024


class Form:
    """Feed it the body of a multipart/form-data request; `sink` gets the bytes of the part `file`."""

    def __init__(self, content_type: str, sink: Callable[[bytes], None], *, fields: Collection[str]) -> None:
        _, options = parse_options_header(content_type)
        self._sink = sink
        self._known = frozenset(fields)
        self._fields: dict[str, bytearray] = {}
        self._filename: str | None = None
        self._header, self._headers = (bytearray(), bytearray()), dict[bytes, bytes]()
        self._into: Callable[[bytes], None] = sink
        self._ended = False
        try:
            self._parser = MultipartParser(
                options.get(b"boundary", b""),
                {
                    "on_part_data": lambda data, start, end: self._into(data[start:end]),
                    "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                    "on_header_end": self._keep_header,
                    "on_headers_finished": self._begin_part,
                    "on_end": self._end,
                },
            )
        except FormParserError:
            raise _malformed() from None
        if b"boundary" not in options:
            raise _malformed()

    def feed(self, chunk: bytes) -> None:
        """Raises ServiceError (400), and what the sink raises."""
        try:
            self._parser.write(chunk)
        except FormParserError:
            raise _malformed() from None

    def finish(self) -> tuple[str, Mapping[str, str]]:
        """The file's name and the fields, when all of the body was fed. Raises ServiceError (400)."""
        if not self._ended:
            raise ServiceError("the form ends before its end", 400, "invalid_form")
        if self._filename is None:
            raise ServiceError("the form has no part `file` with a file name", 400, "invalid_form")
        return self._filename, {name: _text(bytes(value)) for name, value in self._fields.items()}

    def _end(self) -> None:
        self._ended = True

    def _keep_header(self) -> None:
        name, value = self._header
        self._headers[bytes(name).lower()] = bytes(value)
        self._header = (bytearray(), bytearray())

    def _begin_part(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        self._headers = {}
        name = _text(options.get(b"name", b""))
        if name == "file" and b"filename" in options:
            if self._filename is not None:
                raise ServiceError("the form has two files: send one at a time", 400, "invalid_form")
            self._filename, self._into = _text(options[b"filename"]), self._sink
            return
        if name not in self._known or name in self._fields:
            known = ", ".join(sorted({"file", *self._known}))
            raise ServiceError(f"the form may have each of {known} once, and nothing else", 400, "invalid_form")
        kept = self._fields[name] = bytearray()
        self._into = lambda data: _keep(kept, data)


def _keep(kept: bytearray, data: bytes) -> None:
    kept += data
    if len(kept) > MOST_FIELD_BYTES:
        raise ServiceError(f"a field of the form is longer than {MOST_FIELD_BYTES} bytes", 400, "invalid_form")


def _text(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise ServiceError("the form's names and fields must be UTF-8", 400, "invalid_form") from None


def _malformed() -> ServiceError:
    return ServiceError("the body is not multipart/form-data as its Content-Type says", 400, "invalid_form")
