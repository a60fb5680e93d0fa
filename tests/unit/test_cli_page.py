"""The pages about commands and client say what there is."""

from __future__ import annotations

import re
from pathlib import Path

from potstill import cli_page
from potstill.client.surface import Surface, Tale, Verb

ROOT = Path(__file__).parents[2]


def test_the_page_of_commands_is_the_one_that_the_commands_make():
    assert (ROOT / "docs" / "cli.md").read_text() == cli_page.page(), "make docs"


def test_every_command_and_option_of_the_page_says_what_it_is_for():
    described = re.split(r"^#{2,3} ", cli_page.page(), flags=re.MULTILINE)[1:]
    assert len(described) > 50
    for command in described:
        title, _, words = command.partition("\n")
        assert words.strip(), title
    options = re.findall(r"^\* `[^`]+` (.*)$", cli_page.page(), flags=re.MULTILINE)
    assert "None" not in options
    assert all(option.endswith(".") for option in options), [option for option in options if not option.endswith(".")]


def test_the_clients_page_names_every_method():
    methods = {name for name, value in vars(Surface).items() if isinstance(value, Verb | Tale)}
    table = (ROOT / "docs" / "client.md").read_text().partition("| methods | |")[2].partition("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == methods
