"""A stored file as an HTTP answer: whole or one range of it, streamed, with the digest that its reader checks it by.

The ETag is the file's sha256, and Repr-Digest (RFC 9530) says it once more in the form that HTTP has for it, also
beside a range. The bytes are not hashed here: that would be too late for whoever has read them. A reader compares.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from io import BufferedReader

from fastapi.responses import Response, StreamingResponse
from starlette.datastructures import Headers

from orchestrator.service.manifests import StoredFile
from orchestrator.service.ranges import Part, part

CHUNK = 1 << 18


def download(file: BufferedReader, stored: StoredFile, name: str, asked: Headers) -> Response:
    """200, 206 or 304. Takes the file and closes it. Raises Unsatisfiable (416)."""
    etag = f'"{stored.sha256}"'
    headers = {
        "ETag": etag,
        "Repr-Digest": f"sha-256=:{base64.b64encode(bytes.fromhex(stored.sha256)).decode()}:",
        "Cache-Control": "private, no-cache",
        "Content-Disposition": f'attachment; filename="{_plain(name)}"',
        "X-Content-Type-Options": "nosniff",
    }
    try:
        if _names(asked.get("if-none-match"), etag):
            file.close()
            return Response(status_code=304, headers=headers)
        held = asked.get("if-range")
        wanted = part(asked.get("range") if held is None or held.strip() == etag else None, stored.bytes)
    except BaseException:
        file.close()
        raise
    return StreamingResponse(
        pieces(file, wanted),
        status_code=206 if wanted.partial else 200,
        headers=headers | wanted.headers,
        media_type="application/octet-stream",
    )


def pieces(file: BufferedReader, wanted: Part) -> Iterator[bytes]:
    """The bytes of the part. One that turns out shorter ends the connection: its length was promised."""
    with file:
        file.seek(wanted.start)
        left = wanted.stop - wanted.start
        while left and (piece := file.read(min(CHUNK, left))):
            left -= len(piece)
            yield piece


def _names(tags: str | None, etag: str) -> bool:
    """Whether an If-None-Match names the file: the weak comparison of RFC 9110 8.8.3.2."""
    return tags is not None and any(tag.strip().removeprefix("W/") in {etag, "*"} for tag in tags.split(","))


def _plain(name: str) -> str:
    """The last part of a path in letters that a header may hold and a shell does not mind."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", name.rpartition("/")[2])
