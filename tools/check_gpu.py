"""What the tests cannot see without a GPU: kernels, gradients, mixed precision and several processes, on small models.

    python tools/check_gpu.py
    python -m torch.distributed.run --nproc_per_node 2 tools/check_gpu.py

A line for each check with the largest error; the first one beyond its tolerance ends with 1. ``tools/check_gpu.sh``
runs all of it.
"""

import argparse
import os
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Optional, Sequence
from unittest import mock

import torch
import torch.distributed as dist
from mmengine.logging import MMLogger
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mmseg_msvit.engine.hooks import GateLossHook
from mmseg_msvit.tooling.command_line import InputError, one_line_errors, positive
from mmseg_msvit.vit.attention import attend, attend_reference, has_varlen

HALVES = (torch.bfloat16, torch.float16)


def check(name: str, got: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    """Prints the largest error of any tensor, in parts of that tensor's largest value.

    Raises:
        InputError: it is beyond the tolerance, or not finite.
    """
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(got, wanted)]
    error = max(((a - b).abs().max() / b.abs().max().clamp(min=1e-12)).item() for a, b in pairs)
    if not error <= tolerance:
        raise InputError(f'{name}: wanted an error of at most {tolerance}, got {error:.2g}')
    print(f'ok  {name}: error {error:.1e}, at most {tolerance} wanted', flush=True)


def check_attention(device: torch.device) -> None:
    """Packed attention and its gradients against the definition in float64, images of very unlike lengths."""
    lengths = [17, 64, 64, 1, 130]
    whole = torch.randn(sum(lengths), 3, 2, 64, device=device, dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    weights = (torch.rand(len(whole), device=device) < 0.7).double()
    weights[cu_seqlens[:-1].long()] = 1  # no image without an active token
    for dtype in (torch.float32, *HALVES):
        qkv = whole.to(dtype)
        for weight in (None, weights):
            results = []
            for function, x, more in ((attend, qkv, (0.0, cu_seqlens)), (attend_reference, qkv.double(), ())):
                inputs = [x.clone().requires_grad_()]
                if weight is not None:
                    inputs.append(weight.to(torch.promote_types(x.dtype, torch.float32)).requires_grad_())
                out = function(inputs[0], lengths, *(inputs[1:] or [None]), *more)
                results.append([out, *torch.autograd.grad(out.double().square().sum(), inputs)])
            how = 'by the variable-length kernel' if weight is None and has_varlen(qkv) else 'by one kernel a length'
            kind = 'plain' if weight is None else 'weighted'
            check(f'{kind} attention, {dtype}, {how}', *results, 1e-4 if dtype == torch.float32 else 3e-2)


def segmentor(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A small one in training, with random weights, some coarse regions, and losses that gather over processes."""
    losses = ('GeneralizedBatchShapingLoss', 'PurityLoss')
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            type='EncoderDecoder',
            backbone=dict(
                type='MSViT', img_size=128, embed_dims=128, num_layers=2, num_heads=2, out_indices=1, final_norm=True,
                gate=dict(type='MLPGate', init_coarse=0.5), gate_loss=[dict(type=kind) for kind in losses],
                coarse_embed='resize+detail', train_tokens='active',
            ),
            decode_head=dict(
                type='FCNHead', in_channels=128, channels=16, num_classes=4, num_convs=1, in_index=0, dropout_ratio=0
            ),
            test_cfg=dict(mode='whole'),
        )
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'gate_losses' not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    GateLossHook().before_train(SimpleNamespace(model=model, iter=0))
    return model.to(dtype).train()


def batch(device: torch.device, dtype: torch.dtype = torch.float32, part: slice = slice(None)) -> dict:
    """Four images and their labels, of which the first is uniform, or a part of them."""
    torch.manual_seed(1)
    images = torch.randn(4, 3, 128, 160, dtype=torch.float64).to(device, dtype)[part]
    labels = torch.randint(0, 4, (4, 8, 10)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    labels[0] = 1
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label[None].to(device))) for label in labels[part]]
    return dict(inputs=images, data_samples=samples)


def check_model(device: torch.device) -> None:
    """A model's output on the device against that on the CPU, and under autocast."""
    model = segmentor().eval()
    with torch.no_grad():
        wanted = model(batch(torch.device('cpu'))['inputs'], mode='tensor')
        images = batch(device)['inputs']
        model.to(device)
        for dtype in (None, *HALVES):
            with nullcontext() if dtype is None else torch.autocast(device.type, dtype):
                out = model(images, mode='tensor')
            check(f'output, {dtype or torch.float32}', [out], [wanted], 1e-3 if dtype is None else 0.1)


def check_amp(device: torch.device, steps: int) -> None:
    """Steps of mixed precision, after which the loss must be finite and smaller."""
    if not hasattr(torch.amp, 'GradScaler'):
        raise InputError(f'wanted torch 2.3 or later, got {torch.__version__}')
    data = batch(device)
    for dtype in HALVES:
        model = segmentor().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        losses = []
        for _ in range(steps):
            with torch.autocast(device.type, dtype):
                loss, _ = model.parse_losses(model(**data, mode='loss'))
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        first, last = losses[0], losses[-1]
        if not last < first:
            raise InputError(f'{steps} steps, {dtype}: wanted a smaller loss, got {last:.3f} after {first:.3f}')
        print(f'ok  {steps} steps, {dtype}: loss {first:.3f} to {last:.3f}', flush=True)


def stepped(device: torch.device, rank: Optional[int], world_size: int) -> list:
    """Parameters after a step in float64 on a rank's part of the batch; of rank None on all, in this process alone."""
    model = segmentor(torch.float64).to(device)
    share = 4 // world_size
    part = slice(None) if rank is None else slice(rank * share, (rank + 1) * share)
    ids = [device] if device.type == 'cuda' else None
    wrapped = model if rank is None else MMDistributedDataParallel(model, device_ids=ids)
    with mock.patch('torch.rand_like', lambda like: torch.full_like(like, 0.5)):  # no noise in the gate's decisions
        loss, _ = model.parse_losses(wrapped(**batch(device, torch.float64, part), mode='loss'))
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    return [parameter.detach() for parameter in model.parameters()]


def check_ranks(device: torch.device) -> None:
    """A step of all processes against that of one on their joined batch."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if 4 % world_size:
        raise InputError(f'wanted 2 or 4 processes, got {world_size}')
    together = stepped(device, rank, world_size)
    with mock.patch('torch.distributed.is_initialized', lambda: False):
        alone = stepped(device, None, world_size)
    # The gate's logits are in float32: what is left of their rounding where the sum of their gradients is small.
    check(f'a step of {world_size} processes, rank {rank}', together, alone, 1e-7)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--device', choices=('cuda', 'cpu'), default='cuda')
    parser.add_argument('--steps', type=positive, default=50, help='of mixed precision')
    args = parser.parse_args()
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise InputError('check_gpu.py: wanted a CUDA device, torch finds none')

    MMLogger.get_instance('check_gpu', log_level='WARNING')
    init_default_scope('mmseg')
    torch.manual_seed(0)
    if 'WORLD_SIZE' in os.environ:
        local = int(os.environ['LOCAL_RANK'])
        device = torch.device(args.device, local) if args.device == 'cuda' else torch.device('cpu')
        if device.type == 'cuda':
            torch.cuda.set_device(device)
        dist.init_process_group('nccl' if args.device == 'cuda' else 'gloo')
        check_ranks(device)
        dist.destroy_process_group()
        return
    device = torch.device(args.device)
    check_attention(device)
    check_model(device)
    check_amp(device, args.steps)


if __name__ == '__main__':
    with one_line_errors():
        main()
