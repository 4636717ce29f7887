"""What a newcomer adds in one new file, without an edit of the package: each class here could be that file."""

import pytest
import torch
from conftest import SMALL, build_msvit, randomize
from mmseg.registry import MODELS
from torch.nn import functional as F

from mmseg_msvit import MSViT
from mmseg_msvit.gates.gate import Gate
from mmseg_msvit.gates.losses import GateLoss
from mmseg_msvit.tokens.embedding import pad_to_regions, patchify
from mmseg_msvit.tooling.baselines import all_fine
from mmseg_msvit.vit.mixed_scale import MixedScale


@pytest.fixture(autouse=True)
def unregistered():
    """What a test has registered is forgotten after it."""
    before = dict(MODELS.module_dict)
    yield
    MODELS.module_dict.clear()
    MODELS.module_dict.update(before)


class SuperpixelViT(MSViT):
    """A tokeniser without a gate: each token is a superpixel, here of fixed blocks of 2 x 3 cells."""

    def tokenize(self, images):
        images, grid = pad_to_regions(images, self.patch_size, self.sides[-1])
        fine, into, n = self.superpixels(images, grid)
        return images, fine.merge(into, [n] * len(images)), None

    def embed(self, images, tokens):
        fine, into, _ = self.superpixels(images, tokens.grid)
        return fine.pool(super().embed(images, fine), into, len(tokens.level))

    def superpixels(self, images, grid):
        """The fine tokens, the row that each of them goes to, and the rows of an image."""
        y, x = (torch.arange(n) // side for n, side in zip(grid, (2, 3)))
        label = (y[:, None] * (x[-1] + 1) + x).flatten() + self.select.prefix  # (h * w,)
        one = torch.cat((torch.arange(self.select.prefix), label))
        n = int(one[-1]) + 1
        into = torch.cat([one + image * n for image in range(len(images))])
        return all_fine(self, len(images), grid, images.device), into, n


def test_a_tokeniser_of_superpixels():
    MODELS.register_module(module=SuperpixelViT)
    model = MODELS.build(dict(type='SuperpixelViT', **SMALL)).eval()
    randomize(model)
    images = torch.randn(2, 3, 70, 90, requires_grad=True)
    outputs = model(images)
    assert [out.shape for out in outputs] == [(2, 32, 5, 6)] * 2
    for out in outputs:  # a superpixel's cells are equal, and no others
        assert torch.equal(out[:, :, 0, 0], out[:, :, 1, 2]) and not torch.allclose(out[:, :, 0, 0], out[:, :, 0, 3])
        assert torch.equal(out[:, :, 4, 3], out[:, :, 4, 5])  # the last row's are cut
    outputs[-1].square().sum().backward()
    assert (images.grad != 0).all()
    with torch.no_grad():  # the definition: means of the fine embeddings
        padded, tokens, _ = model.tokenize(images)
        fine, _, _ = model.superpixels(padded, tokens.grid)
        fine = fine.to_grid(MixedScale.embed(model, padded, fine))
        mean = F.avg_pool2d(fine, (2, 3), ceil_mode=True)
        torch.testing.assert_close(tokens.to_grid(model.embed(padded, tokens))[:, :, ::2, ::3], mean)
    alone = model(images[1:])[-1]
    torch.testing.assert_close(alone[0], outputs[-1][1], rtol=1e-4, atol=1e-5)


class MergingViT(MSViT):
    """A reducer between blocks: after block 0 the r most similar pairs of neighbouring rows become their mean."""

    r = 4

    def between(self, i, x, tokens):
        if i != 0:
            return x, tokens
        into, lengths = [], []
        for part, level in zip(x.split(tokens.lengths), tokens.level.split(tokens.lengths)):
            alike = F.cosine_similarity(part[:-1], part[1:]).masked_fill((level < 0)[:-1], -2)
            alike[1::2] = -2  # pairs that do not overlap
            joined = torch.zeros(len(part), dtype=torch.long)
            joined[alike.topk(self.r).indices + 1] = 1
            into.append(torch.arange(len(part)) - joined.cumsum(0) + sum(lengths))
            lengths.append(len(part) - self.r)
        into = torch.cat(into)
        return tokens.pool(x, into, sum(lengths)), tokens.merge(into, lengths)


@pytest.mark.parametrize('gate', [dict(type='FixedGate', coarse=False), dict(type='VarianceGate')])
def test_a_reducer_between_blocks(gate):
    MODELS.register_module(module=MergingViT)
    model = MODELS.build(dict(type='MergingViT', gate=gate, with_cls_token=False, out_detail='none', **SMALL)).eval()
    randomize(model)
    rows = []
    for layer in model.layers:
        layer.register_forward_hook(lambda module, args, out: rows.append((len(out), args[1])))
    images = torch.randn(2, 3, 64, 64)
    before, after = model(images)
    assert before.shape == after.shape == (2, 32, 4, 4)
    assert rows[1][0] == rows[2][0] == rows[0][0] - 2 * model.r
    assert rows[1][1].size.sum() == 2 * 16  # nothing of the images is lost
    cells = after.flatten(2).mT[0].unique(dim=0)
    assert len(cells) == rows[1][1].lengths[0]
    model.train()(images)[-1].sum().backward()
    torch.testing.assert_close(model.eval()(images[1:])[-1][0], after[1], rtol=1e-4, atol=1e-5)


class BrightnessGate(Gate):
    """A gate: dark regions are coarse."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bias = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images, grid, left=None):
        return (self.bias - patchify(images, self.region).mean(-1)).float()

    def macs(self, grid):
        return 0


class CostLoss(GateLoss):
    """A loss that sees tokens: the share of the dense ViT's rows that an image has, straight-through."""

    default_name = 'loss_cost'

    def of_step(self, decision, tokens, data_samples, images):
        return tokens.weight.sum() / (len(tokens.lengths) * tokens.dense_length)


def test_a_gate_and_a_loss_that_sees_tokens():
    for part in (BrightnessGate, CostLoss):
        MODELS.register_module(module=part)
    for scales in ((16, 32), (16, 32, 64)):
        model = build_msvit(gate=dict(type='BrightnessGate'), gate_loss=dict(type='CostLoss'), scales=scales).train()
        model(torch.randn(2, 3, 64, 64))
        found = model.pop_gate_losses([])
        tokens = found['tokens']
        torch.testing.assert_close(found['loss_cost'], tokens / 17)
        found['loss_cost'].backward()
        assert all(gate.bias.grad < 0 for gate in model.gates)  # more coarse is fewer tokens
