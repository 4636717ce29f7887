"""What a user gets: wheel, sdist, editable install, a light import."""

import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from conftest import ROOT

BUILD = 'import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])'


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A copy of what git tracks and does not ignore, so that a build leaves nothing in the project."""

    out = tmp_path_factory.mktemp('source') / 'project'
    ignore = shutil.ignore_patterns(
        '.git', '.venv', '.mim', 'data', 'work_dirs', 'build', 'dist', '*.egg-info', '.*cache'
    )
    shutil.copytree(ROOT, out, ignore=ignore)
    return out


def build(kind, source, out):
    subprocess.run(
        [sys.executable, '-c', BUILD, f'build_{kind}', str(out)], cwd=source, check=True, capture_output=True
    )
    (made,) = out.iterdir()
    return made


def configs():
    return {str(p.relative_to(ROOT)) for p in (ROOT / 'configs').rglob('*.py')}


def test_wheel_has_package_and_mim_files_and_no_tests(source, tmp_path):
    names = set(zipfile.ZipFile(build('wheel', source, tmp_path)).namelist())
    modules = {f'mmseg_msvit/{p.name}' for p in (ROOT / 'mmseg_msvit').glob('*.py')}
    assert modules <= names
    assert {f'mmseg_msvit/.mim/{name}' for name in configs() | {'model-index.yml', 'tools/show_tokens.py'}} <= names
    tops = {name.split('/')[0] for name in names}
    assert all(top.startswith('mmseg_msvit') for top in tops), tops


def test_sdist_makes_the_same_wheel(source, tmp_path):
    (tmp_path / 'sdist').mkdir()
    archive = build('sdist', source, tmp_path / 'sdist')
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / 'unpacked', filter='data')
    (unpacked,) = (tmp_path / 'unpacked').iterdir()
    wheels = []
    for folder in (source, unpacked):
        out = tmp_path / f'wheel-{folder.name}'
        out.mkdir()
        wheels.append(set(zipfile.ZipFile(build('wheel', folder, out)).namelist()))
    assert wheels[0] == wheels[1]


def test_editable_install_links_the_mim_files():
    for name in ('configs', 'tools', 'model-index.yml'):
        assert (ROOT / 'mmseg_msvit/.mim' / name).resolve() == ROOT / name


def test_import_registers_and_pulls_in_nothing_optional():
    code = """
import sys
import mmseg.models  # which may pull in what it likes
before = set(sys.modules)
import mmseg_msvit
from mmseg.registry import HOOKS, MODELS
names = 'MSViT MLPGate FixedGate RandomGate VarianceGate GeneralizedBatchShapingLoss BatchShapingLoss ' \\
        'TokenBudgetLoss PurityLoss'
assert all(MODELS.get(name) for name in names.split()) and HOOKS.get('GateLossHook') and HOOKS.get('ViTWeightsHook')
optional = {'mmpretrain', 'timm', 'matplotlib.pyplot', 'tensorboard', 'flash_attn', 'safetensors'}
print(sorted(optional & (set(sys.modules) - before)))
"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == '[]'


def test_scripts_are_valid_and_name_no_place_of_one_machine():
    for script in [*ROOT.glob('tools/*.sh'), ROOT / '.ci/run']:
        subprocess.run(['bash', '-n', script], check=True)
        text = script.read_text()
        assert '/root/' not in text and '/home/' not in text and '/work/' not in text
