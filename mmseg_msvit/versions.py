"""Versions of what the package stands on: those that it is for, and what stands in for what older ones lack."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Callable, ContextManager, Dict, Sequence

import torch
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.utils import digit_version
from torch import Tensor, nn

# What it is called -> its distributions, the first version that will do, and the first that will not.
WANTED = {
    'torch': (('torch',), '2.1.0', None),
    'mmengine': (('mmengine', 'mmengine-lite', 'onedl-mmengine'), '0.10.0', '1.0.0'),
    'mmcv': (('mmcv', 'mmcv-lite'), '2.0.0rc4', '2.3.0'),
    'mmcv of onedl': (('onedl-mmcv',), '2.3.0', '2.4.0'),
    'mmseg': (('mmsegmentation', 'onedl-mmsegmentation'), '1.2.0', '2.0.0'),
}
BEFORE_TORCH_26 = digit_version(torch.__version__) < digit_version('2.6.0')


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


def check_mmseg() -> None:
    """mmseg 1.2.2 stops at mmcv 2.2.0, with which it works; its message asks for what is there.

    Raises:
        ImportError: nobody has raised its limit.
    """
    try:
        import mmseg  # noqa: F401
    except AssertionError as error:
        file = find_spec('mmseg').origin
        raise ImportError(
            f"mmseg_msvit wants an mmcv that mmseg takes, got: {error} Install mmcv 2.1.0, or raise mmseg's limit, as "
            f'is usual for mmcv 2.2: sed -i "s/^MMCV_MAX = .*/MMCV_MAX = \'2.3.0\'/" {file}'
        ) from None


def know_onedl() -> None:
    """Lets ``_base_ = 'mmseg::...'`` find the configs of onedl-mmsegmentation, whose name mmengine does not know."""
    if list(installed(WANTED['mmseg'][0])) == ['onedl-mmsegmentation']:
        MODULE2PACKAGE['mmseg'] = 'onedl-mmsegmentation'


def before_load_state_dict(module: nn.Module, hook: Callable) -> None:
    """``register_load_state_dict_pre_hook``, which older torches call otherwise. The hook gets the module first."""
    if hasattr(module, 'register_load_state_dict_pre_hook'):
        module.register_load_state_dict_pre_hook(hook)
    else:
        module._register_load_state_dict_pre_hook(hook, with_module=True)


def nonzero_static(mask: Tensor, size: int) -> Tensor:
    """``torch.nonzero_static`` without its waiting for the device, for which torch before 2.6 has no CUDA kernel.

    Args:
        mask: (B, T) bool, true in so many places as size says.
        size: N.

    Returns:
        (N, 2) int64.
    """
    return mask.nonzero() if mask.is_cuda and BEFORE_TORCH_26 else torch.nonzero_static(mask, size=size)


def unfused_attention() -> ContextManager:
    """In which ``scaled_dot_product_attention`` is plain products. ``torch.nn.attention`` is younger than torch 2.1."""
    if hasattr(torch.nn, 'attention'):
        return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    return torch.backends.cuda.sdp_kernel(enable_flash=False, enable_mem_efficient=False)


check_versions()
check_mmseg()
know_onedl()
