"""What several test files need: deterministic randomness, small models, the folder with real data."""

import os
import socket
from pathlib import Path

import pytest
import torch
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mmseg_msvit import backbone
from mmseg_msvit.attention import attend_reference

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get('MSVIT_SHARED', ROOT.parent / 'shared'))
SMALL = dict(img_size=64, embed_dims=32, num_layers=3, num_heads=2, out_indices=(0, 2), final_norm=True)


@pytest.fixture(autouse=True)
def deterministic():
    torch.manual_seed(0)
    init_default_scope('mmseg')


@pytest.fixture
def root():
    return ROOT


@pytest.fixture
def shared():
    """Call with a relative path: gives it, or skips by name where the folder with real data is not there."""

    def find(name):
        path = SHARED / name
        if not path.exists():
            pytest.skip(f'{name} is not beside the project')
        return path

    return find


def build_msvit(**kwargs):
    """A small MSViT whose every weight, gate included, is random, in eval mode."""
    model = MODELS.build({**SMALL, 'type': 'MSViT', **kwargs})
    model.init_weights()
    randomize(model)
    return model.eval()


def randomize(model, std=0.1):
    """Adds noise to every weight, so that nothing is zero by initialisation."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if 'gate_losses' not in name:
                parameter.add_(torch.randn_like(parameter), alpha=std)


def use_plain_attention(monkeypatch):
    """Makes every block take the reference in place of the fused attention."""

    def plain(qkv, lengths, weight, dropout, cu_seqlens):
        return attend_reference(qkv, lengths, weight, dropout)

    monkeypatch.setattr(backbone, 'attend', plain)


def force_logits(model, logits):
    """Makes a learned gate answer these logits (B, hc, wc), and keeps its parameters in the graph."""
    model.gate.register_forward_hook(lambda module, args, out: logits.to(out.dtype) + out - out.detach())


def sample(labels):
    """A data sample with (H, W) ground truth."""
    return SegDataSample(gt_sem_seg=PixelData(data=labels[None]))


@pytest.fixture
def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]
