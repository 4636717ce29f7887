"""docs/reference.md says what the code says."""

import re
import runpy

import pytest
from conftest import ROOT

import mmseg_msvit

pytest.importorskip('docstring_parser')
PAGE = (ROOT / 'docs/reference.md').read_text()


def test_page_is_what_the_tool_writes_now():
    wanted = runpy.run_path(str(ROOT / 'tools/make_reference.py'))['reference']()
    assert wanted == PAGE, 'run `python tools/make_reference.py`'


def test_all_that_is_registered_is_there_and_every_option_has_a_meaning():
    titles = re.findall(r'^### (\w+)$', PAGE, re.MULTILINE)
    classes = {name for name in mmseg_msvit.__all__ if isinstance(getattr(mmseg_msvit, name), type)}
    assert classes <= set(titles) and len(titles) == len(set(titles))
    rows = re.findall(r'^\| `(\w+)` \| (.*?) \| (.*) \|$', PAGE, re.MULTILINE)
    assert len(rows) > 40 and not [name for name, _, meaning in rows if not meaning]


def test_links_lead_to_titles():
    titles = {title.lower() for title in re.findall(r'^### (\w+)$', PAGE, re.MULTILINE)}
    assert {link for link in re.findall(r'\]\(#(\w+)\)', PAGE)} <= titles
