"""Versions of what the package stands on: those that it is for are checked when it is imported."""

from importlib.metadata import PackageNotFoundError, version
from typing import Dict, Sequence

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.utils import digit_version

# What it is called -> its distributions, the first version that will do, and the first that will not.
WANTED = {
    'torch': (('torch',), '2.6.0', None),
    'mmengine': (('mmengine', 'mmengine-lite', 'onedl-mmengine'), '0.10.0', '1.0.0'),
    'mmcv': (('mmcv', 'mmcv-lite'), '2.0.0rc4', '2.2.0'),  # at which mmseg 1.2.2 stops
    'mmcv of onedl': (('onedl-mmcv',), '2.3.0', '2.4.0'),
    'mmseg': (('mmsegmentation', 'onedl-mmsegmentation'), '1.2.0', '2.0.0'),
}


def installed(distributions: Sequence[str]) -> Dict[str, str]:
    """Those of the distributions that are installed -> their versions."""
    found = {}
    for name in distributions:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_versions() -> None:
    """Reads what is installed without importing it: mmseg itself fails on a wrong mmcv, and says less.

    Raises:
        ImportError: a version is not one that the package is for.
    """
    wrong = []
    for name, (distributions, first, end) in WANTED.items():
        for distribution, got in installed(distributions).items():
            public = digit_version(got.split('+')[0])
            if public < digit_version(first) or (end and public >= digit_version(end)):
                wrong.append(f'{name} >= {first}{f", < {end}" if end else ""}, got {distribution} {got}')
    if wrong:
        raise ImportError(f'mmseg_msvit wants {"; ".join(wrong)}')


def know_onedl() -> None:
    """Lets ``_base_ = 'mmseg::...'`` find the configs of onedl-mmsegmentation, whose name mmengine does not know."""
    if list(installed(WANTED['mmseg'][0])) == ['onedl-mmsegmentation']:
        MODULE2PACKAGE['mmseg'] = 'onedl-mmsegmentation'


check_versions()
know_onedl()
