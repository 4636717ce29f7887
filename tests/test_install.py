"""What a user gets: wheel, sdist, editable install, a light import."""

import re
import runpy
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
        '.git', '.venv', '.venvs', '.mim', 'data', 'work_dirs', 'build', 'dist', '*.egg-info', '.*cache'
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
    modules = {str(p.relative_to(ROOT)) for p in (ROOT / 'mmseg_msvit').rglob('*.py') if '.mim' not in p.parts}
    assert 'mmseg_msvit/tooling/testset.py' in modules and modules <= names
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
        assert not re.search(r'/(root|home|work)/', script.read_text())


# What the script calls, without a Python or a registry: each call is a line in $LOG, one that matches $FAIL fails.
STAND_IN = r"""#!/bin/bash
echo "${0##*/} $*" >>"$LOG"
[[ -n $FAIL && "$*" == *"$FAIL"* ]] && exit 1
here=$(cd "${0%/*}/.." && pwd)
if [[ $1 == -c && $2 == *version_info* ]]; then [[ $2 == *"$VERSION"* ]]; exit; fi
if [[ $1 == -c && $2 == *purelib* ]]; then echo "$here/site"; exit; fi
if [[ $* == *" venv "* || $1 == venv ]]; then
  venv=${!#}
  mkdir -p "$venv/bin" "$venv/site/mmcv" "$venv/site/mmseg"
  cp "$0" "$venv/bin/python"
  cp "$0" "$venv/bin/uv"
fi
exit 0
"""
USED = ['bash', 'basename', 'cat', 'cksum', 'cp', 'dirname', 'grep', 'ls', 'mkdir', 'nproc', 'rm', 'sed', 'tail', 'tee']


@pytest.fixture
def fresh_machine(source, tmp_path):
    """Call with the names of programs that are there: runs setup_env.sh, gives exit status, output and its calls."""
    project, programs, log = tmp_path / 'project', tmp_path / 'programs', tmp_path / 'log'
    programs.mkdir()
    for name in USED:
        (programs / name).symlink_to(shutil.which(name))
    (project / 'tools').mkdir(parents=True)
    for name in ('requirements', 'setup.py', 'tools/setup_env.sh'):
        (shutil.copytree if (source / name).is_dir() else shutil.copy)(source / name, project / name)

    def run(*args, there=(), version='3.12', fail=''):
        log.write_text('')
        for name in there:
            (programs / name).write_text(STAND_IN)
            (programs / name).chmod(0o755)
        env = dict(PATH=str(programs), HOME=str(tmp_path), LOG=str(log), VERSION=version, FAIL=fail)
        command = [shutil.which('bash'), project / 'tools/setup_env.sh', *args]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr, log.read_text()

    run.project = project
    return run


def test_setup_takes_the_python_that_is_there_and_goes_on_where_it_stopped(fresh_machine):
    status, _, calls = fresh_machine(there=['python3.12'], fail='environment.txt')
    assert status == 1 and 'python3.12 -m venv' in calls
    status, output, calls = fresh_machine(fail='--no-build mmcv')
    assert status == 0 and 'going on with' in output and ' venv ' not in calls and 'mmcv-lite==2.1.0' in calls, output
    status, output, calls = fresh_machine()
    assert (status, output) == (0, '') and 'uv' not in calls


def test_ops_that_are_not_compiled_are_there_to_be_imported_and_raise(fresh_machine):
    assert fresh_machine(there=['python3.12'], fail='--no-build mmcv')[0] == 0
    ext = runpy.run_path(str(fresh_machine.project / '.venv/site/mmcv/_ext.py'))['__getattr__']
    with pytest.raises(RuntimeError, match='nms is not compiled in this environment: MMCV_OPS=1 bash tools/setup_env'):
        ext('nms')(1)
    with pytest.raises(AttributeError):
        ext('__path__')


def test_setup_makes_a_set_of_its_own_beside_the_pinned_one(fresh_machine):
    status, output, calls = fresh_machine('torch2.1', there=['python3.10'], version='3.10')
    assert status == 0 and (fresh_machine.project / '.venvs/torch2.1/.complete').exists(), output
    assert 'versions/torch2.1.txt' in calls and not (fresh_machine.project / '.venv').exists()
    status, output, _ = fresh_machine('torch9')
    assert status == 1 and 'wanted a file in requirements/versions, got torch9' in output


def test_setup_without_a_python_says_so(fresh_machine):
    status, output, _ = fresh_machine(there=['python3'], version='3.9')
    assert status == 1 and 'no Python 3.11 3.12 3.13 3.10 found' in output


def test_setup_without_a_python_asks_uv(fresh_machine):
    status, output, calls = fresh_machine(there=['uv'], version='3.11', fail='--no-build mmcv')
    assert status == 0 and 'uv venv --clear --seed --managed-python --python 3.11' in calls, output
