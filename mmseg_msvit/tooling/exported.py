"""Files of :mod:`.export` in the place of a segmentor's passes, in ONNX Runtime on the CPU."""

from pathlib import Path
from typing import Callable

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from .command_line import InputError


def through_file(path: Path, threads: int) -> Callable[[Tensor, float], Tensor]:
    """A function of a batch (B, C, H, W) and a threshold, which runs them through a file: (B, K, H, W) logits.

    Args:
        path: of a file with an input of ``threshold`` and an output of ``logits``.
        threads: of ONNX Runtime.

    Raises:
        InputError: there is no such file, or it is another one.
    """
    if not path.is_file():
        raise InputError(f'MODEL.onnx: wanted a file, got {path}, which is not there')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    names = [value.name for value in (*session.get_inputs(), *session.get_outputs())]
    if names != ['image', 'threshold', 'logits', 'tokens_used']:
        raise InputError(
            f'MODEL.onnx: wanted image and threshold in, logits and tokens_used out, got {names} in {path}'
        )

    def run(inputs: Tensor, threshold: float) -> Tensor:
        given = dict(image=inputs.numpy(), threshold=np.array(threshold, np.float32))
        return torch.from_numpy(session.run(['logits'], given)[0])

    return run
