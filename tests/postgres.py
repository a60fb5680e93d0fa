"""A PostgreSQL server of the tests' own: the real one of Debian's packages, in a temporary folder, on loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psycopg

from tests.ports import free_port

HOW = "PostgreSQL is not installed: apt-get install postgresql (Debian, Ubuntu), brew install postgresql (macOS)"
UNPRIVILEGED = "postgres"  # the server refuses to run as root; Debian's package makes this user


@dataclass(frozen=True, slots=True, kw_only=True)
class Postgres:
    port: int
    pid: int

    def database(self, name: str) -> str:
        """A new, empty database; SQLAlchemy's URL of it."""
        with psycopg.connect(self._dsn("postgres"), autocommit=True) as db:
            db.execute(f'CREATE DATABASE "{name}"')  # type: ignore[call-overload]
        return f"postgresql+psycopg://potstill@127.0.0.1:{self.port}/{name}"

    def cut(self, name: str) -> None:
        """End every connection to a database, as a restart of the server would; they have ended when it returns."""
        with psycopg.connect(self._dsn("postgres"), autocommit=True) as db:
            db.execute("SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = %s", (name,))

    def _dsn(self, name: str) -> str:
        return f"host=127.0.0.1 port={self.port} user=potstill dbname={name}"


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A running server, for as long as the block."""
    programs = _programs()
    folder = Path(tempfile.mkdtemp(prefix="potstill-pg-", dir="/tmp"))
    as_user = {"user": UNPRIVILEGED} if os.geteuid() == 0 else {}
    if as_user:
        shutil.chown(folder, UNPRIVILEGED)
    made = [str(programs / "initdb"), "-D", str(folder / "data"), "-U", "potstill", "-A", "trust", "--no-sync"]
    subprocess.run(made, check=True, stdout=subprocess.DEVNULL, cwd=folder, **as_user)
    port = free_port()
    settings = {"listen_addresses": "127.0.0.1", "port": str(port), "unix_socket_directories": str(folder)}
    command = [str(programs / "postgres"), "-D", str(folder / "data")]
    command += [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, **as_user)
    try:
        running = Postgres(port=port, pid=server.pid)
        _await(running)
        yield running
    finally:
        server.send_signal(2)  # fast shutdown
        server.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def _await(server: Postgres) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(server._dsn("postgres")).close()
            return
        except psycopg.OperationalError:
            assert time.monotonic() < deadline, "PostgreSQL did not come up"
            time.sleep(0.1)


def _programs() -> Path:
    """Where initdb is: Debian keeps it off the PATH."""
    found = shutil.which("initdb")
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if found is None and not places:
        raise AssertionError(HOW)
    return Path(found).parent if found is not None else places[-1]
