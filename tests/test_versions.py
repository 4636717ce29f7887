"""Versions of torch and OpenMMLab: what is refused, what stands in for what older ones lack, what is written down."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.utils import digit_version
from torch import nn

from mmseg_msvit import versions

SETS = sorted((ROOT / 'requirements/versions').glob('*.txt'))


def pretend(monkeypatch, **installed):
    """Makes these distributions, by names with _ for -, the ones that are there."""

    def version(name):
        if name.replace('-', '_') not in installed:
            raise versions.PackageNotFoundError(name)
        return installed[name.replace('-', '_')]

    monkeypatch.setattr(versions, 'version', version)


@pytest.mark.parametrize(
    'wrong, message',
    [
        (dict(torch='2.0.1+cu118'), r'torch >= 2\.1\.0, got torch 2\.0\.1\+cu118$'),
        (dict(mmengine='0.9.1'), r'mmengine >= 0\.10\.0, < 1\.0\.0, got mmengine 0\.9\.1$'),
        (dict(mmcv='1.7.2'), r'mmcv >= 2\.0\.0rc4, < 2\.3\.0, got mmcv 1\.7\.2$'),
        (dict(onedl_mmsegmentation='2.0.0'), r'mmseg >= 1\.2\.0, < 2\.0\.0, got onedl-mmsegmentation 2\.0\.0$'),
    ],
)
def test_a_version_outside_of_the_claim_is_named(monkeypatch, wrong, message):
    right = dict(torch='2.1.0+cpu', mmengine='0.11.0rc3', mmcv='2.2.0', mmsegmentation='1.2.2')
    pretend(monkeypatch, **right)
    versions.check_versions()
    pretend(monkeypatch, **{**right, **wrong})
    with pytest.raises(ImportError, match=message):
        versions.check_versions()


def test_an_mmseg_that_refuses_its_mmcv_is_named_with_the_way_out(monkeypatch, tmp_path):
    (tmp_path / 'mmseg').mkdir()
    file = tmp_path / 'mmseg/__init__.py'
    file.write_text("MMCV_MAX = '2.2.0'\nassert MMCV_MAX > '2.2.0', 'MMCV==2.2.0 is used but incompatible.'\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'mmseg')
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)  # which would be taken for that of the changed file
    with pytest.raises(ImportError, match='mmcv that mmseg takes, got: MMCV==2.2.0 .* mmcv 2.1.0, or ') as error:
        versions.check_mmseg()
    subprocess.run(re.search('sed -i .*', str(error.value))[0], shell=True, check=True)
    versions.check_mmseg()


def test_setup_and_the_sets_of_versions_say_the_same_as_the_guard():
    setup, project = (ROOT / 'setup.py').read_text(), (ROOT / 'pyproject.toml').read_text()
    for name, (distributions, first, end) in versions.WANTED.items():
        if 'onedl' in name:
            continue
        limits = re.search(rf"'{distributions[0]}>=([^,']+)(?:,<([^']+))?'", setup)
        assert digit_version(limits[1]) == digit_version(first), distributions
        wanted = '2.2.0' if name == 'mmcv' else end  # of itself, pip shall take none that mmseg refuses
        assert wanted is None or digit_version(limits[2]) == digit_version(wanted), distributions
    pythons = []
    for file in [ROOT / 'requirements/environment.txt', *SETS]:
        text = file.read_text()
        pythons += re.search(r'^# python: (.+)$', text, re.M)[1].split()
        for distributions, first, end in versions.WANTED.values() if file in SETS else ():
            for pinned in re.findall(rf'^(?:{"|".join(distributions)})==(\S+)$', text, re.M):
                got = digit_version(pinned)
                assert digit_version(first) <= got and (end is None or got < digit_version(end)), (file, pinned)
    lowest = min(pythons, key=digit_version)
    assert f"python_requires='>={lowest}'" in setup and f'target-version = "py{lowest.replace(".", "")}"' in project


def test_mmsegs_configs_are_found_in_onedl(monkeypatch):
    monkeypatch.setitem(MODULE2PACKAGE, 'mmseg', 'mmsegmentation')
    pretend(monkeypatch, mmsegmentation='1.2.2', onedl_mmsegmentation='1.4.2')
    versions.know_onedl()
    assert MODULE2PACKAGE['mmseg'] == 'mmsegmentation'
    pretend(monkeypatch, onedl_mmsegmentation='1.4.2')
    versions.know_onedl()
    assert MODULE2PACKAGE['mmseg'] == 'onedl-mmsegmentation'


def test_without_the_public_hook_a_state_dict_is_still_adapted():
    class Older(nn.Linear):
        @property
        def register_load_state_dict_pre_hook(self):
            raise AttributeError

    seen = []
    for module in (nn.Linear(1, 1), Older(1, 1)):
        versions.before_load_state_dict(module, lambda *args: seen.append(args[:3]))
        state = module.state_dict()
        module.load_state_dict(state)
        assert seen.pop() == (module, state, '') and not seen


def test_nonzero_without_a_kernel_on_the_device(monkeypatch):
    mask = torch.rand(3, 5) > 0.5
    on_device = SimpleNamespace(is_cuda=True, nonzero=mask.nonzero)
    monkeypatch.setattr(versions, 'BEFORE_TORCH_26', True)
    wanted = versions.nonzero_static(on_device, int(mask.sum()))
    assert torch.equal(versions.nonzero_static(mask, int(mask.sum())), wanted)
