"""The smallest [teacher] table of every kind, and what a teacher that is met says of itself."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from potstill.algebra.objective import Tier
from potstill.config_teachers import TeacherConfig
from potstill.types import TeacherIdentity
from potstill.wire import Capabilities

URL = "http://127.0.0.1:1"
SERVER = {"kind": "server", "url": URL, "secret_ref": "env:TEACHER_KEY"}
SERVED_HERE = {"kind": "server", "model": "models/teacher"}
VLLM = {"kind": "vllm", "url": URL, "model": "m"}
COMPLETIONS = {"kind": "completions", "url": URL, "model": "m", "context_length": 64}
WRITER = {"url": URL, "model": "m"}
OPENAI = {"kind": "openai", **WRITER}
SELF = {"kind": "self", "privileged_template": "{prompt} {answer}"}
ADVISED = {"kind": "self", "privileged_template": "{prompt} {advice}", "advisor": WRITER}
LOCAL = {"kind": "local", "models": [{"model": "models/teacher"}]}
MEMBERS = {"maths": {"teacher": SERVER, "domains": ["maths"]}, "rest": {"teacher": VLLM}}
SEVERAL = {"kind": "several", "members": MEMBERS}
NONE = {"kind": "none"}
EVERY = (SERVER, SERVED_HERE, VLLM, COMPLETIONS, OPENAI, SELF, ADVISED, LOCAL, SEVERAL, NONE)

_TEACHER: TypeAdapter[Any] = TypeAdapter(TeacherConfig)


def teacher_of(table: dict[str, Any]) -> Any:
    """Raises pydantic's ValidationError for a table that contradicts itself."""
    return _TEACHER.validate_python(table)


def offering(identity: TeacherIdentity, **changes: Any) -> Capabilities:
    """Enough for any method that a server can serve, but for the changes."""
    usual = {
        "model": identity.name,
        "revision": identity.revision,
        "tokenizer_fingerprint": identity.tokenizer_fingerprint,
        "tier": Tier.IDS,
        "context_length": 4096,
        "vocabulary": 259,
        "max_items": 8,
        "max_tokens": 999,
        "max_top_k": 128,
        "max_body_bytes": 2**20,
        "hidden_size": 0,
        "head_id": "",
    }
    return Capabilities(**(usual | changes))
