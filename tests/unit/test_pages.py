"""What every page of a run has in common: text that cannot hide anything, and settings as flat rows."""

import pytest

from orchestrator.pages import environment, flatten, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("abc\u202edcba", "abc⟨U+202E⟩dcba"),
        ("a\u200bb\ufeff", "a⟨U+200B⟩b⟨U+FEFF⟩"),
        ("one\u2028two\U000e0041", "one⟨U+2028⟩two⟨U+E0041⟩"),
        ("x\u200dy", "x⟨U+200D⟩y"),
        ("می\u200cخواهم 👩\u200d🔬", "می\u200cخواهم 👩\u200d🔬"),  # joiners where their script needs them
        ("plain, naïve, 中文 and שלום", "plain, naïve, 中文 and שלום"),
    ],
)
def test_what_hides_or_reorders_text_is_shown_by_its_code(text, shown):
    assert visible(text) == shown


def test_every_text_of_a_template_is_escaped_and_made_visible():
    page = environment().from_string('<b title="{{ name }}">{{ name }}</b>').render(name='<i>"\u202e')
    assert page == '<b title="&lt;i&gt;&#34;⟨U+202E⟩">&lt;i&gt;&#34;⟨U+202E⟩</b>'


def test_nested_settings_become_dotted_rows():
    assert flatten({"optim": {"lr": 0.1}, "empty": {}, "list": [1]}) == [
        ("optim.lr", "0.1"),
        ("empty", "{}"),
        ("list", "[1]"),
    ]
