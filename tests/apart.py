"""Environments of their own, for packages that would change the versions of others in ours.

<environment>/apart/PACKAGE/bin/python      made on first use, a few seconds each; kept until `make clean`
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def python_with(package: str) -> str:
    """A Python that has `package` and potstill's base, and nothing else of ours."""
    folder = Path(sys.prefix) / "apart" / package
    python, made_from = folder / "bin" / "python", folder / "made_from"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    if not made_from.exists() or made_from.read_text() != wanted:
        uv = str(Path(sys.executable).with_name("uv"))
        call(uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder))
        call(uv, "pip", "install", "--quiet", "--python", str(python), "--editable", str(ROOT), package)
        made_from.write_text(wanted)
    return str(python)


def answer_of(python: str, script: str, *arguments: str, **environment: str) -> Any:
    """The JSON that a script prints last."""
    done = call(python, "-c", script, *arguments, **environment)
    return json.loads(done.splitlines()[-1])


def call(*command: str, **environment: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
