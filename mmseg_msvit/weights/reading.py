"""Files with weights: local or behind an address, of torch, safetensors or numpy, wrapped in whatever they are.

Nothing in a file is executed while :func:`read_checkpoint` reads it.
"""

import hashlib
import os
import pickle
import re
from pathlib import Path
from types import ModuleType
from typing import Dict, Iterator, Tuple, Union
from urllib.parse import urlparse

import mmengine
import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.utils import digit_version
from torch import Tensor

from ..versions import BEFORE_TORCH_26
from .layouts import AVERAGED

# What tensors are made of.
TENSORS = re.compile(
    r'collections\.OrderedDict|torch\._utils\._rebuild_(tensor(_v[23])?|parameter)'
    r'|torch\.(Size|bool|(b?float|u?int|complex)\d\w*|\w+Storage)|torch\.storage\.(Typed|Untyped)Storage'
)
# What training loops put beside the weights. Read as empty shells: the weights need none of it.
SHELLED = re.compile(
    r'mmengine\.logging\.history_buffer\.HistoryBuffer|numpy\..*|builtins\.(getattr|set)|collections\..*'
    r'|_codecs\.encode|argparse\.Namespace|pathlib\.\w*Path|torch\.device'
)
# Where checkpoints keep their weights, in the order of preference.
WRAPPERS = (*AVERAGED, 'state_dict', 'model', 'module', 'model_state_dict')


def read_checkpoint(path: Union[str, Path]) -> dict:
    """Reads a file or address without executing anything in it.

    Args:
        path: ``.safetensors``, ``.npz``, or a torch checkpoint; local, ``http(s)://``, or one of mmengine's schemes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or wants more than tensors.
    """
    path = os.fspath(path)
    if path.startswith(('http://', 'https://')):
        # Hubs give every model's file the same name: only the whole address tells them apart.
        name = f'{hashlib.sha256(path.encode()).hexdigest()[:16]}-{Path(urlparse(path).path).name}'
        file = Path(torch.hub.get_dir()) / 'checkpoints' / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(path, str(file))  # which moves a whole file there, or none
        try:
            return read_checkpoint(str(file))
        except _WantsMore:
            raise
        except ValueError as error:  # a page in the file's place, or a connection that broke off: not to be kept
            file.unlink()
            raise ValueError(f'{error}. It came from {path}, and is removed') from error
    if '://' in path:
        return CheckpointLoader.load_checkpoint(path, map_location='cpu')
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f'checkpoint: wanted a file, got {path}, which is not there')
    try:
        if file.suffix == '.safetensors':
            from safetensors.torch import load_file

            return load_file(file)
        if file.suffix == '.npz':
            with np.load(file, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        found = _read_torch(file)
        if not isinstance(found, dict):
            raise TypeError(f'it holds a {type(found).__name__} in place of named tensors')
        return found
    except (_WantsMore, ImportError):
        raise
    except Exception as error:  # each format has errors of its own
        raise ValueError(f'checkpoint: wanted a whole checkpoint, got {path}, which cannot be read: {error}') from error


class _WantsMore(ValueError):
    """A pickle that would run code."""


class _Shell:
    """Stands for an object that is not needed."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


class _TensorsAndShells(pickle.Unpickler):
    """Makes tensors, shells, and nothing else."""

    def find_class(self, module: str, name: str) -> object:
        wanted = f'{module}.{name}'.replace('__builtin__', 'builtins')  # as Python 2 said, and so the old protocols
        if TENSORS.fullmatch(wanted):
            return super().find_class(module, name)
        if SHELLED.fullmatch(wanted):
            return _Shell
        raise _WantsMore(wanted)


def _read_torch(file: Path) -> dict:
    """By torch's own loader of tensors; where that refuses, by one whose list of what is allowed is of no version."""
    try:
        return torch.load(file, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:
        return _read_tensors_and_shells(file)


def _read_tensors_and_shells(file: Path) -> dict:
    pickle_module = ModuleType('tensors_and_shells')
    pickle_module.Unpickler = _TensorsAndShells
    pickle_module.load = lambda file, **how: _TensorsAndShells(file, **how).load()
    try:
        return torch.load(file, map_location='cpu', weights_only=False, pickle_module=pickle_module)
    except _WantsMore as error:
        raise _WantsMore(
            f'checkpoint: wanted tensors, got {file}, whose pickle asks for {error} and could run code. If you trust '
            'it, read it by torch.load(..., weights_only=False) and save its state dict alone'
        ) from None


@CheckpointLoader.register_scheme(
    [r'https?://[^?]*\.(npz|safetensors)(\?|$)', r'(?!.*://).*\.(npz|safetensors)$'], force=True
)
def load_from_arrays(filename: str, map_location=None) -> dict:
    """Lets mmengine's ``load_from`` name what it cannot read itself; its prefixes of addresses are patterns."""
    return read_checkpoint(filename)


def find_weights(checkpoint: dict) -> dict:
    """The state dict of a checkpoint, out of whatever it is wrapped in."""
    for name in WRAPPERS:
        if isinstance(checkpoint.get(name), dict):
            weights = find_weights(checkpoint[name])
            if any(isinstance(value, Tensor) for value in weights.values()):
                return weights
    return checkpoint


def unwrap(checkpoint: dict) -> Dict[str, Tensor]:
    """The tensors of a checkpoint, named as if no parallel wrapper's ``module.`` had been round the model."""
    weights = find_weights(checkpoint)
    return {re.sub(r'^module\.', '', name): value for name, value in weights.items() if isinstance(value, Tensor)}


def tensors_below(checkpoint: dict, prefix: str) -> Dict[str, Tensor]:
    """The tensors whose names begin with a prefix, without it; keys of what they are wrapped in may be part of it.

    Raises:
        ValueError: there are none.
    """
    prefix = f'{prefix.rstrip(".")}.' if prefix else ''
    everything = dict(_flat(checkpoint))
    for tensors in (unwrap(checkpoint), everything):
        below = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        if below:
            return below
    raise ValueError(
        f'checkpoint: wanted tensors below prefix {prefix!r}, got {len(everything)} that begin with '
        f'{sorted({".".join(name.split(".")[:2]) for name in everything})[:8]}'
    )


def _flat(checkpoint: dict, prefix: str = '') -> Iterator[Tuple[str, Tensor]]:
    for name, value in checkpoint.items():
        if isinstance(value, dict):
            yield from _flat(value, f'{prefix}{name}.')
        elif isinstance(value, Tensor):
            yield f'{prefix}{name}', value


def allow_training_checkpoints() -> None:
    """Lets ``torch.load`` read, with ``weights_only=True``, the log that mmengine keeps beside the weights.

    That is torch's default since 2.6, and mmengine 0.10 chooses no other when it tests or resumes. The log is made of
    numbers: what is allowed here runs nothing that a file brings along. numpy 1 and 2 give their functions different
    addresses.
    """
    rebuild = [value.__reduce__()[0] for value in (np.zeros(1), np.float64(0))]
    rebuild = [(f, f'numpy.{core}.multiarray.{f.__name__}') for f in rebuild for core in ('core', '_core')]
    dtypes = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    torch.serialization.add_safe_globals(
        [HistoryBuffer, np.ndarray, np.dtype, *dtypes, *rebuild, (_statistic, 'builtins.getattr')]
    )


def _statistic(owner: type, name: str):
    """``getattr`` for the methods that a HistoryBuffer names, and for nothing else."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise pickle.UnpicklingError(f'checkpoint: wanted a statistic of HistoryBuffer, got {name} of {owner}')
    return getattr(owner, name)


if digit_version(mmengine.__version__) < digit_version('0.11.0rc0') and not BEFORE_TORCH_26:
    allow_training_checkpoints()
