"""What holds for every input, on thousands of odd ones: sizes, batches, gates, scales, families, outputs, types."""

from copy import deepcopy
from functools import cache
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from conftest import randomize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mmseg.models.backbones import VisionTransformer
from mmseg.registry import MODELS

from mmseg_msvit.tokens.selection import TokenSelector
from mmseg_msvit.tokens.token_map import PackedTokens, region_grid, shrunk_grid

TABLE = (4, 6)  # cells
SMALL = dict(embed_dims=16, num_layers=2, num_heads=2, final_norm=True)
FAMILIES = {
    'vit': dict(type='MSViT'),
    'vit without cls': dict(type='MSViT', with_cls_token=False),
    'pre-norm vit': dict(type='MSViT', pre_norm=True, norm_cfg=dict(type='LN', eps=1e-6)),
    'dinov2': dict(type='MSViT', patch_size=14, layer_scale_init_value=0.1, num_register_tokens=4, ffn_type='swiglu'),
    'dinov3': dict(type='MSViT', layer_scale_init_value=0.1, num_register_tokens=2, rope='dinov3', qkv_bias='qv'),
    'beit': dict(type='MSBEiT'),
    'mae': dict(type='MSMAE'),
}
GATES = {
    'fine': dict(type='FixedGate', coarse=False),
    'coarse': dict(type='FixedGate', coarse=True),
    'mlp': dict(type='MLPGate', init_coarse=0.5),
    'context': dict(type='ContextGate', init_coarse=0.5),
    'glance': dict(type='GlanceGate', blocks=1, init_coarse=0.5),
    'variance': dict(type='VarianceGate'),
    'entropy': dict(type='EntropyGate', coarse_ratio=None),
    'frequency': dict(type='FrequencyGate'),
    'gradient': dict(type='GradientGate', coarse_ratio=None, at=0.5),
    'reconstruction': dict(type='ReconstructionGate'),
}
SIDES = [(1, 2), (1, 3), (1, 2, 4), (1, 2, 6), (1, 2, 4, 8)]
TOLERANCE = {torch.float32: dict(rtol=1e-4, atol=1e-4), torch.float64: dict(rtol=1e-9, atol=1e-9)}


def cases(number):
    """The same ones in every run."""
    return settings(
        max_examples=number, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


# Pixels along an image's side: one in eight is up to 700, the others are small.
pixels = st.integers(0, 7).flatmap(lambda kind: st.integers(1, 700 if kind == 0 else 80))
sizes = st.tuples(pixels, pixels)
batches = st.integers(1, 4)
seeds = st.integers(0, 9999)


def random(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@cache
def build(family, gate='fine', levels=2, dtype=torch.float32, **options):
    """A tiny backbone with random weights, made once."""
    if dtype != torch.float32:
        return deepcopy(build(family, gate, levels, **options)).to(dtype)
    options = {**SMALL, **FAMILIES[family], **options}
    patch = options.get('patch_size', 16)
    torch.manual_seed(0)
    model = MODELS.build(
        dict(
            img_size=[cells * patch for cells in TABLE],
            gate=GATES[gate],
            scales=[patch * 2**level for level in range(levels)],
            **options,
        )
    )
    model.init_weights()
    randomize(model)
    return model.eval()


def cells_of(model, size):
    return tuple(-(-side // model.patch_size) for side in size)


def level_map(coarse, sides, grid):
    """(B, h, w), the level of each cell, and (B,) the tokens: the definition in plain numpy, with no map of rows."""
    levels = np.zeros((len(coarse[0]), *grid), int)
    counts = np.zeros(len(levels), int)
    for level, (side, regions) in enumerate(zip(sides[1:], coarse), 1):
        regions = regions.numpy()
        inside = np.kron(regions, np.ones((1, side, side), int))[:, : grid[0], : grid[1]]
        assert not (levels * inside).any()  # no cell has two
        levels += level * inside
        counts += regions.sum((1, 2))
    return levels, counts + (levels == 0).sum((1, 2))


@cases(900)
@given(
    sizes, st.sampled_from([14, 16]), st.sampled_from(SIDES), batches, st.integers(0, 5), st.floats(0, 1),
    st.none() | st.floats(1, 400), seeds,
)  # fmt: skip
def test_tokens_are_those_of_the_regions_and_cover_each_cell_once(
    size, patch, sides, images, prefix, threshold, budget, seed
):
    grid = region_grid(size, patch)
    logits = [3 * random(images, *region_grid(grid, side), seed=seed, dtype=torch.float32) for side in sides[1:]]
    select = TokenSelector(sides, threshold=threshold, prefix=prefix, token_budget=budget).eval()

    def tokens_of(rows):
        return select([lambda g, left, a=a: a[rows] for a in logits], grid)

    tokens, decision = tokens_of(slice(None))
    levels, counts = level_map(decision.coarse, sides, grid)
    assert tokens.lengths == tokens.active_counts().tolist() == (counts + prefix).tolist()
    least = np.prod(region_grid(grid, sides[-1])) + prefix
    assert least <= min(tokens.lengths) and max(tokens.lengths) <= tokens.dense_length
    assert budget is None or np.mean(tokens.lengths) <= max(budget, least)
    assert (tokens.levels().numpy() == levels).all()
    rows, covered = tokens.cover.unique(return_counts=True)  # each row covers as many cells as it says, in its image
    assert torch.equal(covered.float(), tokens.size[rows]) and torch.equal(rows, tokens.size.nonzero().flatten())
    assert (tokens.image[tokens.cover[0]] == torch.arange(images)[:, None, None]).all()
    y, x = torch.meshgrid(*(torch.arange(n) + 0.5 for n in grid), indexing='ij')
    cells = torch.stack((y, x)).expand(images, -1, -1, -1)
    torch.testing.assert_close(tokens.from_grid(cells), tokens.center)
    torch.testing.assert_close(vars(tokens.with_prefix(3).with_prefix(prefix)), vars(tokens))
    if budget is None:  # else the images of a batch share it
        alone, _ = tokens_of(slice(images - 1, images))
        begin = int(tokens.cu_seqlens[-2])
        assert torch.equal(alone.level, tokens.level[begin:]) and torch.equal(alone.center, tokens.center[begin:])
        assert torch.equal(alone.cover, tokens.cover[:, -1:] - begin)


@cases(300)
@given(sizes, st.sampled_from(SIDES), batches, st.sampled_from(['all', 'trimmed']), st.integers(0, 2), seeds)
def test_in_training_inactive_tokens_weigh_nothing_in_any_cell(size, sides, images, mode, prefix, seed):
    grid = region_grid(size, 16)
    logits = [
        3 * random(images, *region_grid(grid, side), seed=seed, dtype=torch.float32).requires_grad_()
        for side in sides[1:]
    ]
    torch.manual_seed(seed)
    select = TokenSelector(sides, mode, prefix=prefix).train()
    tokens, decision = select([lambda g, left, a=a: a for a in logits], grid)
    levels, counts = level_map(decision.coarse, sides, grid)
    assert tokens.active_counts().tolist() == (counts + prefix).tolist()
    one_hot = F.one_hot(tokens.level.clamp(min=0), len(sides)).float()
    assert (tokens.to_grid(one_hot).argmax(1).numpy() == levels).all()
    sums = tokens.to_grid(torch.ones(len(tokens.level), 1))
    assert torch.equal(sums, torch.ones(images, 1, *grid))  # weights of a cell are one 1 and zeros
    longest = max(tokens.lengths)
    assert longest == (max(tokens.active_counts()) if mode == 'trimmed' else len(tokens.level) // images)


@torch.no_grad()
@cases(500)
@given(st.sampled_from(list(FAMILIES)), sizes, batches, st.integers(2, 3), st.booleans(), seeds)
def test_a_token_is_the_projected_mean_of_its_pixels(family, size, images, levels, detail, seed):
    """In float64, by the convolution that the library itself would run."""
    embed = 'resize+detail' if detail else 'resize'
    model = build(family, 'variance', levels, torch.float64, coarse_embed=embed)
    pixels = random(images, 3, *size, seed=seed)
    padded, tokens, _ = model.tokenize(pixels)
    x = model.embed(padded, tokens)
    grid = tokens.grid
    assert grid == cells_of(model, size)
    conv, norm = model.patch_embed.projection, model.pre_ln if model.pre_norm else torch.nn.Identity()
    whole = F.pad(pixels, (0, padded.shape[3] - size[1], 0, padded.shape[2] - size[0]))
    cells = conv(whole)
    cells[:, :, grid[0] :], cells[..., grid[1] :] = 0, 0  # those beyond the grid count nothing
    table = None
    if family not in ('beit', 'dinov3'):
        table = model.pos_embed[:, 1:].unflatten(1, TABLE).permute(0, 3, 1, 2)
        table = table if grid == TABLE else F.interpolate(table, grid, mode='bicubic')
    for level, side in enumerate(model.sides):
        wanted = conv(F.avg_pool2d(whole, side))  # (B, C, h, w of the level)
        if detail and level:
            wanted = wanted + model.details[level - 1](cells)
        if table is not None:
            wanted = wanted[..., : -(-grid[0] // side), : -(-grid[1] // side)] + F.avg_pool2d(
                table, side, ceil_mode=True, count_include_pad=False
            )
        rows = (tokens.level == level).nonzero().flatten()
        y, z = (tokens.center[rows] // side).long().unbind(1)
        wanted = norm(wanted[tokens.image[rows], :, y, z])
        torch.testing.assert_close(x[rows], wanted, rtol=1e-9, atol=1e-9)
    assert torch.equal(x[tokens.prefix_rows()], x[tokens.prefix_rows()[:1]].expand(images, -1, -1))


KINDS = [(family, gate, 2 + i % 2) for i, (family, gate) in enumerate(product(FAMILIES, GATES))]


@torch.no_grad()
@cases(300)
@given(
    st.sampled_from(KINDS), sizes, batches, st.sampled_from([(1,), (0, 1)]), st.sampled_from(['grid', 'tokens', 'cls']),
    st.sampled_from([torch.float32, torch.float32, torch.float64, torch.bfloat16]), st.sampled_from([1.0, 0.6]), seeds,
)  # fmt: skip
def test_outputs_of_whole_backbones(kind, size, images, indices, wanted, dtype, scale, seed):
    family, gate, levels = kind
    model = build(family, gate, levels, dtype)
    cls = wanted == 'cls' and model.with_cls_token
    model.out_indices, model.input_scale, model.output_cls_token = indices, scale, cls
    model.out_types = ['tokens' if wanted == 'tokens' else 'grid'] * len(indices)
    pixels = random(images, 3, *size, seed=seed, dtype=dtype)
    _, tokens, _ = model.tokenize(pixels)
    grid = shrunk_grid(cells_of(model, size), scale)
    assert tokens.grid == grid and tokens.dense_length == np.prod(cells_of(model, size)) + tokens.prefix
    if gate in ('fine', 'coarse'):
        assert set(tokens.level.tolist()) - {-1} == {0 if gate == 'fine' else levels - 1}
    together, alone = model(pixels), model(pixels[-1:])
    assert len(together) == len(alone) == len(indices)
    for output, last in zip(together, alone):
        if wanted == 'tokens':
            assert isinstance(output, PackedTokens) and output.x.shape == (sum(tokens.lengths), 16)
            output, last = (packed.tokens.to_grid(packed.x) for packed in (output, last))
        if cls:
            assert output[1].shape == (images, 16)
        for part, own in zip(*((output, last) if cls else ([output], [last])), strict=True):
            assert part.dtype == dtype and part.isfinite().all()
            assert part.shape in ((images, 16, *grid), (images, 16))
            if dtype != torch.bfloat16:  # whose products depend on how many there are
                torch.testing.assert_close(part[-1:], own, **TOLERANCE[dtype])


@cache
def twins(dtype, **options):
    """mmseg's ViT, and ours with its weights and all tokens fine."""
    options = {**SMALL, **options}
    torch.manual_seed(0)
    dense = VisionTransformer(img_size=[16 * cells for cells in TABLE], patch_bias=True, **options).to(dtype)
    dense.init_weights()
    randomize(dense)
    dense.eval()
    gate = GATES['fine']
    ours = MODELS.build(dict(type='MSViT', img_size=[16 * cells for cells in TABLE], gate=gate, **options)).to(dtype)
    ours.load_state_dict(dense.state_dict())
    return ours.eval(), dense


@torch.no_grad()
@cases(150)
@given(
    sizes.filter(lambda size: np.prod(region_grid(size, 16)) != np.prod(TABLE)),  # there mmseg's does not resample
    batches, st.sampled_from([(1,), (0, 1)]), st.sampled_from(['bicubic', 'bilinear']),
    st.sampled_from(['', 'with_cls_token', 'output_cls_token', 'pre_norm', 'out_origin']),
    st.sampled_from([torch.float32, torch.float64]), seeds,
)  # fmt: skip
def test_all_fine_is_mmsegs_vit(size, images, indices, mode, option, dtype, seed):
    options = {option: option != 'with_cls_token'} if option else {}
    ours, dense = twins(dtype, out_indices=indices, interpolate_mode=mode, **options)
    pixels = random(images, 3, *size, seed=seed, dtype=dtype)
    torch.testing.assert_close(ours(pixels), dense(pixels), **TOLERANCE[dtype])


@cases(150)
@given(
    st.sampled_from(list(FAMILIES)), st.sampled_from(['mlp', 'context', 'glance']),
    st.tuples(*[st.integers(1, 70)] * 2),
    batches, st.integers(2, 3), st.sampled_from(['all', 'trimmed', 'active']), st.sampled_from([0.0, -8.0, 8.0]), seeds,
)  # fmt: skip
def test_a_training_step_on_any_images_is_finite(family, gate, size, images, levels, mode, logit, seed):
    model = build(family, gate, levels, train_tokens=mode)
    pixels = random(images, 3, *size, seed=seed, dtype=torch.float32)
    handles = [g.register_forward_hook(lambda module, args, out: out + logit) for g in model.gates]
    torch.manual_seed(seed)
    try:
        model.train()
        outputs = model(pixels)
        losses = model.pop_gate_losses([])
    finally:
        model.eval()
        for handle in handles:
            handle.remove()
    assert [out.shape[2:] for out in outputs] == [cells_of(model, size)] * len(outputs)
    total = sum(out.square().mean() for out in outputs) + sum(v for k, v in losses.items() if k.startswith('loss'))
    names, parameters = zip(*((name, p) for name, p in model.named_parameters() if p.requires_grad))
    for name, gradient in zip(names, torch.autograd.grad(total, parameters)):  # each has one
        assert gradient.isfinite().all(), name
