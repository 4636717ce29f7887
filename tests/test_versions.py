"""Versions of torch and OpenMMLab: what is refused, what stands in for what older ones lack, what is written down."""

import re
from argparse import Namespace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.utils import digit_version
from torch import nn

from mmseg_msvit import reading, versions
from mmseg_msvit.flops import operator_macs

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
        (dict(mmcv='1.7.2'), r'mmcv >= 2\.0\.0rc4, < 2\.4\.0, got mmcv 1\.7\.2$'),
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


def test_setup_and_the_sets_of_versions_say_the_same_as_the_guard():
    setup, project = (ROOT / 'setup.py').read_text(), (ROOT / 'pyproject.toml').read_text()
    for distributions, first, end in versions.WANTED.values():
        limits = re.search(rf"'{distributions[0]}>=([^,']+)(?:,<([^']+))?'", setup)
        assert digit_version(limits[1]) == digit_version(first), distributions
        assert end is None or digit_version(limits[2]) == digit_version(end), distributions
    pythons = []
    for file in [ROOT / 'requirements/environment.txt', *SETS]:
        text = file.read_text()
        pythons += re.search(r'^# python: (.+)$', text, re.M)[1].split()
        for distributions, first, end in versions.WANTED.values() if file in SETS else ():
            (pinned,) = re.findall(rf'^(?:{"|".join(distributions)})==(\S+)$', text, re.M)
            got = digit_version(pinned)
            assert digit_version(first) <= got and (end is None or got < digit_version(end)), (file, distributions)
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


def test_macs_are_the_same_without_the_newer_switches(monkeypatch):
    layer, x = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(1, 5, 8)
    wanted = 5 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 5 * 5 * 8
    assert operator_macs(layer, x) == wanted
    monkeypatch.delattr(torch.nn, 'attention', raising=False)
    monkeypatch.delattr(torch.backends, 'mha', raising=False)
    assert operator_macs(layer, x) == wanted


class Reaching:
    def __reduce__(self):
        return eval, ('1',)


def test_training_checkpoints_are_read_without_a_list_of_what_they_ask_for(tmp_path):
    weights = {'a': torch.ones(2), 'half': torch.ones(1, dtype=torch.bfloat16), 'p': nn.Parameter(torch.zeros(3))}
    torch.save({'state_dict': weights, 'args': Namespace(lr=np.float64(1))}, tmp_path / 'a.pth')
    read = reading._read_by_names(tmp_path / 'a.pth')
    assert all(torch.equal(read['state_dict'][name], tensor) for name, tensor in weights.items())
    assert not isinstance(read['args'], Namespace)
    torch.save({'state_dict': weights, 'more': Reaching()}, tmp_path / 'b.pth')
    with pytest.raises(ValueError, match='whose pickle asks for (builtins|__builtin__).eval and could run code'):
        reading._read_by_names(tmp_path / 'b.pth')
