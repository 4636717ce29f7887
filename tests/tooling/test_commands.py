"""The commands of README and docs: each is one that its tool takes, and what needs no download runs as it stands."""

import argparse
import re
import shlex

import pytest
from conftest import ROOT

PAGES = [ROOT / name for name in ('README.md', 'CONTRIBUTING.md', 'configs/msvit/README.md')]
PAGES += sorted((ROOT / 'docs').glob('*.md'))
BLOCKS = [block for page in PAGES for block in re.findall(r'```bash\n(.*?)```', page.read_text(), re.DOTALL)]
LINES = [line for block in BLOCKS for line in block.replace('\\\n', ' ').splitlines()]
WORDS = [shlex.split(line, comments=True) for line in LINES]
OF_TOOLS = sorted({tuple(words[1:]) for words in WORDS if words[:1] == ['python'] and words[1].startswith('tools/')})
# A server, and what takes minutes: they have tests of their own.
ELSEWHERE = ('lab/arena.py', 'demo.py', 'fit_gate.py', 'compress.py')


class Taken(Exception):
    """A tool has understood its arguments."""


@pytest.mark.parametrize('words', OF_TOOLS, ids=' '.join)
def test_a_tool_takes_its_command(words, tool, monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def stop(self, *args):
        parse_args(self, *args)
        raise Taken

    monkeypatch.setattr(argparse.ArgumentParser, 'parse_args', stop)
    with pytest.raises(Taken):
        tool(words[0].removeprefix('tools/'), *words[1:])


def test_scripts_and_configs_that_commands_name_are_there():
    named = {word for words in WORDS for word in words if re.fullmatch(r'(tools|configs|tests)/[\w/.-]+', word)}
    assert len(named) > 15 and not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.slow
def test_what_a_reader_does_with_a_trained_model(toy, scenes, tool, tmp_path, monkeypatch):
    pytest.importorskip('onnxscript')
    mine = dict(zip(('CONFIG', 'CHECKPOINT', 'IMAGES'), (*toy, scenes / 'images/val')))
    monkeypatch.chdir(tmp_path)
    ran = []
    for words in sorted(OF_TOOLS, key=lambda words: 'export' not in words[0]):  # files are exported before they run
        given = [re.sub(r'(?<!\$)\b(CONFIG|CHECKPOINT|IMAGES)\b', lambda m: str(mine[m[0]]), word) for word in words]
        name = words[0].removeprefix('tools/')
        if given != list(words) and name not in ELSEWHERE:
            assert tool(name, *given[1:]) is None, words
            ran.append(name)
    ours = ('analyze_gate', 'compare_onnx', 'export_onnx', 'get_flops', 'run_onnx', 'show_tokens', 'tradeoff')
    assert sorted(set(ran)) == [f'{name}.py' for name in ours]
    made = {path.name for path in tmp_path.iterdir()}
    assert {'gate.html', 'gate.json', 'model.onnx', 'pictures', 'tradeoff'} <= made
