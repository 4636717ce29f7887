"""Versions of torch and OpenMMLab: what is refused at import, and what is written down."""

import re

import pytest
from conftest import ROOT
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.utils import digit_version

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
        (dict(torch='2.5.1+cu121'), r'torch >= 2\.6\.0, got torch 2\.5\.1\+cu121$'),
        (dict(mmengine='0.9.1'), r'mmengine >= 0\.10\.0, < 1\.0\.0, got mmengine 0\.9\.1$'),
        (dict(mmcv='1.7.2'), r'mmcv >= 2\.0\.0rc4, < 2\.2\.0, got mmcv 1\.7\.2$'),
        (dict(onedl_mmsegmentation='2.0.0'), r'mmseg >= 1\.2\.0, < 2\.0\.0, got onedl-mmsegmentation 2\.0\.0$'),
    ],
)
def test_a_version_outside_of_the_claim_is_named(monkeypatch, wrong, message):
    right = dict(torch='2.6.0+cpu', mmengine='0.11.0rc3', mmcv='2.1.0', mmsegmentation='1.2.2')
    pretend(monkeypatch, **right)
    versions.check_versions()
    pretend(monkeypatch, **{**right, **wrong})
    with pytest.raises(ImportError, match=message):
        versions.check_versions()


def test_setup_and_the_sets_of_versions_say_the_same_as_the_guard():
    setup, project = (ROOT / 'setup.py').read_text(), (ROOT / 'pyproject.toml').read_text()
    for name, (distributions, first, end) in versions.WANTED.items():
        if 'onedl' in name:
            continue
        limits = re.search(rf"'{distributions[0]}>=([^,']+)(?:,<([^']+))?'", setup)
        assert digit_version(limits[1]) == digit_version(first), distributions
        assert end is None or digit_version(limits[2]) == digit_version(end), distributions
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
