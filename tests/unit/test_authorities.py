"""Certificates are checked against the machine's authorities, which are read once a process."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from potstill.authorities import trusted


def test_they_are_read_once_and_nobody_goes_unchecked():
    assert trusted() is trusted()
    assert trusted().verify_mode is ssl.CERT_REQUIRED
    assert trusted().check_hostname


def test_variables_of_the_environment_add_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    nobody = tmp_path / "nobody.pem"
    nobody.write_text("no certificate\n")  # whoever reads it fails
    monkeypatch.setenv("SSL_CERT_FILE", str(nobody))
    trusted.cache_clear()
    assert trusted().verify_mode is ssl.CERT_REQUIRED
