"""The rooms of the package stand one upon the other: each imports from those below it alone."""

import ast
from pathlib import Path

import pytest
from conftest import ROOT

PACKAGE = ROOT / 'mmseg_msvit'
# From the ground up. What stands in one row may not import from each other.
FLOORS = [
    {'versions', 'modes', 'macs', 'labels'},
    {'tokens'},
    {'weights'},
    {'gates'},
    {'vit'},
    {'measuring'},
    {'engine'},
    {'loading', 'classification', 'lora'},
    {'tooling'},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imported(path: Path):
    """(package's part, line) of all that a file of the package imports from it, wherever in the file."""
    parts = path.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith('mmseg_msvit') for alias in node.names), (
                f'{path}: relative ones, please'
            )
        elif isinstance(node, ast.ImportFrom) and node.level:
            where = list(parts[: len(parts) - node.level]) + (node.module.split('.') if node.module else [])
            for name in [where[0]] if where else [alias.name for alias in node.names]:
                yield name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert not node.module.startswith('mmseg_msvit'), f'{path}:{node.lineno}: relative ones, please'


FILES = sorted(path for path in PACKAGE.rglob('*.py') if '.mim' not in path.parts)


def test_every_part_has_a_floor():
    found = {path.relative_to(PACKAGE).parts[0].removesuffix('.py') for path in FILES}
    assert found - {'__init__'} == set(FLOOR)
    assert len(FILES) > 40


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
    for name, line in imported(path):
        if room == '__init__' or name == room or name == '__version__':
            continue
        assert FLOOR[name] < FLOOR[room], (
            f'{path.relative_to(ROOT)}:{line}: {room} imports from {name}, which is not below'
        )


def test_an_import_that_points_up_is_seen(tmp_path, monkeypatch):
    (tmp_path / 'tokens').mkdir()
    file = tmp_path / 'tokens/a.py'
    file.write_text('def f():\n    from ..vit.blocks import Block\n    from . import b\n')
    monkeypatch.setattr('test_rooms.PACKAGE', tmp_path)
    assert list(imported(file)) == [('vit', 2), ('tokens', 3)]
