"""Weights of any plain ViT into MSViT: what a state dict for this backbone must look like, and a report of the rest.

:mod:`.reading` gets tensors out of a file, :mod:`.layouts` gives them their names here.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from scipy.interpolate import RectBivariateSpline
from torch import Tensor, nn

from .layouts import fold_layer_scale, rename
from .positions import resample_table

Grid = Tuple[int, int]

PATCH_WEIGHT = 'patch_embed.projection.weight'
# What gates and their losses have on the grid of regions.
REGION_GRIDS = r'(gate|coarser_gates\.\d+)\.pos_embed|gate_losses\.\d+\.prior_\w+'
# Tensors that a backbone may have of its own; the rest is the library's ViT, which a checkpoint must fit.
ADDED = ('gate.', 'coarser_gates.', 'gate_losses.', 'coarse_detail.', 'coarser_details.', 'out_details.')
# A tensor that a source has there and that finds no place changes every feature.
INNER = ('patch_embed.', 'pos_embed', 'register_tokens', 'ln_pre.', 'layers.')
# What a backbone needs besides weights.
NEEDED = ('cls_token', 'pos_embed', 'register_tokens', 'gamma_1', 'gamma_2', 'relative_position_bias_table')

NO_PLACE, MISSING = 'finds no place', 'is missing'
# What is wrong with a tensor -> what to set.
ADVICE = (
    (r'^cls_token \(', 'embed_dims'),
    (rf'^cls_token {MISSING}', 'with_cls_token=False'),
    (rf'^pos_embed {MISSING}', "rope='dinov3' or type='MSBEiT', which have no table of positions"),
    (rf'^pos_embed {NO_PLACE}', "rope=None or type='MSMAE', which have a table of positions"),
    (rf'^register_tokens {MISSING}', 'num_register_tokens=0'),
    (r'^register_tokens', 'num_register_tokens'),
    (r'^patch_embed\.projection\.weight', 'patch_size and in_channels, or resample_patch=True in init_cfg'),
    (r'^patch_embed\.projection\.bias', 'patch_bias=True'),
    (r'^patch_embed\.norm', 'patch_norm'),
    (r'^ln_pre', 'pre_norm'),
    (r'^layers\.\d+\.ln1\.weight', 'num_layers'),
    (rf'^ln1\.weight {MISSING}', 'final_norm=False'),
    (rf'gamma_\d {MISSING}', 'layer_scale_init_value=0'),
    (r'attn\.(in_proj_|out_proj\.)bias', 'qkv_bias=True'),
    (r'attn\.(qkv\.bias|[qv]_bias)', 'qv_bias=True'),
    (r'ffn\.\S+ \(', 'mlp_ratio'),
    (rf'ffn\.\S+ {MISSING}|ffn\.w\S+ {NO_PLACE}', 'ffn_type'),
    (rf'relative_position_bias_table {NO_PLACE}', "type='MSBEiT' or 'MSMAE', which have relative positions"),
    (rf'relative_position_bias_table {MISSING}', "type='MSViT', which has no relative positions"),
    (r'relative_position_bias_table', 'num_heads'),
)


@dataclass
class Report:
    """What became of a checkpoint's tensors; ``str`` of it is the table for the log.

    Attributes:
        layout: where the names come from.
        matched: names taken as they are.
        resized: name -> how it was changed.
        initial: names of the model that the checkpoint does not have: they keep their first values.
        misshapen: names that both have, in two shapes -> these shapes.
        unused: names of the checkpoint that the model does not have.
    """

    layout: str
    matched: List[str] = field(default_factory=list)
    resized: Dict[str, str] = field(default_factory=dict)
    initial: List[str] = field(default_factory=list)
    misshapen: Dict[str, str] = field(default_factory=dict)
    unused: List[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [
            ('matched', self.matched, []),  # everything matched is no news: its count says it
            ('resized', self.resized, _listed(self.resized)),
            ('left at initialisation', self.initial, _grouped(self.initial)),
            ('of another shape', self.misshapen, _listed(self.misshapen)),
            ('not used', self.unused, _grouped(self.unused)),
        ]
        lines = [f'weights in the layout of {self.layout}']
        lines += [f'  {title:<22} {len(names):>4}  {", ".join(shown)}'.rstrip() for title, names, shown in rows]
        return '\n'.join(lines)


def _listed(what: Dict[str, str], most: int = 12) -> List[str]:
    """Names with what there is to say of each."""
    shown = [f'{name} {how}' for name, how in list(what.items())[:most]]
    return shown if len(what) <= most else [*shown, f'and {len(what) - most} more']


def _grouped(names: List[str]) -> List[str]:
    """Counts names below one parent, so that a head's tensors take one word."""
    groups: Dict[str, int] = {}
    for name in names:
        parent = '.'.join(name.split('.')[:2]) if name.count('.') > 1 else name
        groups[parent] = groups.get(parent, 0) + 1
    return [parent if count == 1 else f'{parent}.* ({count})' for parent, count in groups.items()]


def resample_grid(parameter: Tensor, grid: Grid) -> Tensor:
    """Values on a region grid, (1, D, gh, gw), on another one."""
    if tuple(parameter.shape[2:]) == tuple(grid):
        return parameter
    return F.interpolate(parameter, size=tuple(grid), mode='bilinear', align_corners=False)


def resample_positions(
    source: Tensor, table: Grid, mode: str, regions: Optional[Grid] = None, side: int = 2
) -> Tuple[Tensor, Optional[str]]:
    """A source's position table on the model's grid.

    A table does not say its grid. The region grid of a gate beside it does; else as many cells as the model has are in
    the model's grid, and a square number of them in a square.

    Args:
        source: (1, extra + cells, C), where extra are the positions of cls and distillation tokens, 0 to 2 of them.
        table: (gh, gw) of the model.
        mode: interpolation mode.
        regions: (hc, wc), the region grid of the source's gate, if it has one.
        side: cells along a region's side.

    Returns:
        (1, 1 + gh * gw, C), and what was done, None for nothing. Without a cls position in the source it is zero: the
        source adds none to its cls token.

    Raises:
        ValueError: the source's grid cannot be told.
    """
    table = tuple(table)
    extra, grid = _source_grid(source.shape[1], table, regions, side)
    if grid == table and extra == 1:
        return source, None
    cls = source[:, :1] if extra else torch.zeros_like(source[:, :1])
    cells = torch.cat((cls, source[:, extra:]), 1)
    if grid == table and extra == 0:
        return cells, 'without cls'
    how = f'{grid[0]}x{grid[1]} -> {table[0]}x{table[1]}' + ('' if extra == 1 else f', {extra} extra positions')
    if grid == table:
        return cells, how
    grid = cells[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2).float()  # (1, C, gh, gw)
    return torch.cat((cells[:, :1].float(), resample_table(grid, table, mode).flatten(2).mT), 1), how


def _source_grid(count: int, table: Grid, regions: Optional[Grid], side: int) -> Tuple[int, Grid]:
    """Extra positions and grid of a table of so many positions."""
    for extra in (1, 0, 2):
        grids = _grids_of_regions(count - extra, regions, side) if regions else []
        if table in grids:
            return extra, table
        if len(grids) == 1:
            return extra, grids[0]
    for extra in (1, 0, 2):
        cells = count - extra
        if cells == table[0] * table[1]:
            return extra, table
        if cells > 0 and math.isqrt(cells) ** 2 == cells:
            return extra, (math.isqrt(cells),) * 2
    raise ValueError(
        f'checkpoint: wanted pos_embed of a square grid or of {table}, with at most 2 more tokens, got {count} '
        "positions. Set the backbone's img_size to the one that the checkpoint was trained with: positions are "
        'resampled for images of any other size'
    )


def _grids_of_regions(cells: int, regions: Grid, side: int) -> List[Grid]:
    """All (h, w) with so many cells in such a region grid, whose last row and column may be cut."""
    heights, widths = (range((n - 1) * side + 1, n * side + 1) for n in regions)
    return [(h, w) for h in heights for w in widths if h * w == cells]


def resample_relative(source: Tensor, window: Grid) -> Tensor:
    """A table of relative positions, as BEiT has it, for another window, as mmseg and BEiT themselves do it.

    Offsets near zero keep their bias, and those far off are drawn out: the known ones are laid at the partial sums of a
    geometric series that reaches the new table's end, and a cubic spline goes through them. A series for each axis, so
    that windows need not be square.

    Args:
        source: ((2 n - 1)^2 + 3, heads), of a square window.
        window: (Wh, Ww) that is wanted.

    Returns:
        ((2 Wh - 1) (2 Ww - 1) + 3, heads), the last three, of cls, unchanged.

    Raises:
        ValueError: the source's window is not square.
    """
    side = math.isqrt(max(len(source) - 3, 0))
    if side**2 != len(source) - 3 or side % 2 == 0:
        raise ValueError(
            f'checkpoint: wanted relative positions of a square window or of {tuple(window)}, got a table of '
            f"{len(source)}. Set the backbone's img_size to the one that the checkpoint was trained with: the bias of "
            'an offset holds for images of any other size'
        )
    places = [_geometric_places(side // 2, cells - 1) for cells in window]
    wanted = [range(1 - cells, cells) for cells in window]
    grids = source[:-3].float().T.unflatten(1, (side, side)).numpy()  # (heads, 2 n - 1, 2 n - 1)
    degree = min(3, side - 1)
    splines = (RectBivariateSpline(*places, grid, kx=degree, ky=degree) for grid in grids)
    resampled = [torch.from_numpy(spline(*wanted)).flatten() for spline in splines]
    return torch.cat((torch.stack(resampled, 1).to(source), source[-3:]))


def _geometric_places(count: int, end: int) -> List[float]:
    """-x_n ... 0 ... x_n, where x_i = 1 + q + ... + q^(i - 1) and x_n is about ``end``; q is 1.01 to 1.5."""
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        ratio = (low + high) / 2
        if (1 - ratio**count) / (1 - ratio) > end:
            high = ratio
        else:
            low = ratio
    places = [sum(ratio**k for k in range(i)) for i in range(1, count + 1)]
    return [-x for x in reversed(places)] + [0.0, *places]


def resample_patch(weight: Tensor, size: Grid) -> Tensor:
    """A patch embedding for patches of another size, whose tokens stay as they are when patches are magnified.

    w' = pinv(B^T) w, where B resizes an old patch to a new one (FlexiViT, Beyer et al. 2023).

    Args:
        weight: (C, channels, p, p).
        size: of the new patches.
    """
    old = weight.shape[2:]
    unit = torch.eye(math.prod(old), dtype=torch.float64).view(-1, 1, *old)
    resize = F.interpolate(unit, size=tuple(size), mode='bilinear', antialias=True).flatten(1).T  # (new, old)
    resampled = weight.double().flatten(2) @ torch.linalg.pinv(resize)  # (C, channels, new)
    return resampled.unflatten(2, tuple(size)).to(weight.dtype)


def adapt(backbone: nn.Module, tensors: Dict[str, Tensor], prefix: str = '') -> Dict[str, str]:
    """Brings the state dict of this ViT for another image size, or of a plain one, in place, to this backbone's grids.

    A bias that it lacks is zero, as in mmseg's and CLIP's patch embeddings.

    Args:
        backbone: of any family.
        tensors: by their names here.
        prefix: what comes before these names.

    Returns:
        Name, without prefix -> what was done.

    Raises:
        ValueError: the grid of the positions cannot be told.
    """
    done = {}
    gate = tensors.get(f'{prefix}gate.pos_embed')
    regions = tuple(gate.shape[2:]) if gate is not None and gate.ndim == 4 else None
    # A state dict without the patch embedding is not a ViT's, and says nothing about its biases.
    whole = f'{prefix}{PATCH_WEIGHT}' in tensors
    for name, own in backbone.state_dict().items():
        source, how = tensors.get(prefix + name), None
        if source is None:
            lacks_bias = name.endswith('bias') and f'{prefix}{name[:-4]}weight' in tensors
            if whole and lacks_bias and not name.startswith(ADDED):
                source, how = torch.zeros_like(own), 'is zero: the source has none'
        elif name == 'pos_embed' and source.ndim == 3:
            source, how = resample_positions(
                source, backbone.table, backbone.interpolate_mode, regions, backbone.sides[1]
            )
        elif name.endswith('relative_position_index'):
            source = own  # it follows from the window
        elif source.shape == own.shape:
            continue
        elif name.endswith('relative_position_bias_table'):
            source, how = resample_relative(source, backbone.table), f'{len(source)} -> {len(own)} offsets'
        elif source.ndim == 4 and re.fullmatch(REGION_GRIDS, name):
            how = '{}x{} -> {}x{}'.format(*source.shape[2:], *own.shape[2:])
            source = resample_grid(source.float(), own.shape[2:])
        if source is not None:
            tensors[prefix + name] = source
        if how is not None:
            done[name] = how
    return done


def misshapen(module: nn.Module, tensors: Dict[str, Tensor], prefix: str = '') -> Dict[str, str]:
    """Names, without prefix, of tensors in another shape than the module's -> both shapes."""
    wanted = {name: own.shape for name, own in module.state_dict().items() if isinstance(own, Tensor)}
    return {
        name: f'{tuple(tensors[prefix + name].shape)}, wanted {tuple(shape)}'
        for name, shape in wanted.items()
        if prefix + name in tensors and tensors[prefix + name].shape != shape
    }


def misfits(backbone: nn.Module, tensors: Dict[str, Tensor], prefix: str = '') -> Dict[str, str]:
    """What keeps the tensors of a whole ViT from being this backbone's: name, without prefix -> why."""
    source = [name[len(prefix) :] for name in tensors if name.startswith(prefix)]
    own = [name for name in backbone.state_dict() if not name.startswith(ADDED)]
    wrong = {name: how for name, how in misshapen(backbone, tensors, prefix).items() if not name.startswith(ADDED)}
    wrong.update({name: NO_PLACE for name in source if name.startswith(INNER) and name not in own})
    needed = [name for name in own if name.endswith(('weight', *NEEDED)) and not name.endswith(backbone.may_lack)]
    wrong.update({name: MISSING for name in needed if name not in source})
    return wrong


def refuse(wrong: Dict[str, str], report: object = '') -> None:
    """Raises a ValueError, with what to set, if anything is wrong."""
    if not wrong:
        return
    advice = _advice(wrong)
    advice = f"Set the backbone's {'; '.join(advice)}" if advice else 'No argument of the backbone makes such blocks'
    raise ValueError(
        f'checkpoint: wanted the tensors of this very ViT, got {len(wrong)} that do not fit: '
        f'{"; ".join(_listed(wrong))}. {advice}\n{report}'
    )


def _advice(wrong: Dict[str, str]) -> List[str]:
    """What to set, for all that is wrong."""
    blocks = tuple(name[: -len('ln1.weight')] for name in wrong if re.fullmatch(r'layers\.\d+\.ln1\.weight', name))
    advice = []
    for name, how in wrong.items():
        if name.startswith(blocks) and not name.endswith('.ln1.weight'):
            continue  # of a block that is there too much or missing
        advice += [what for pattern, what in ADVICE if re.search(pattern, f'{name} {how}')][:1]
    return ['embed_dims'] if 'embed_dims' in advice else list(dict.fromkeys(advice))


def fit(
    backbone: nn.Module, tensors: Dict[str, Tensor], resample_patches: bool = False
) -> Tuple[Dict[str, Tensor], Report]:
    """A state dict for the backbone out of the tensors of any known layout.

    Layer scale is folded into the projections before it where the backbone's blocks have none.

    Args:
        backbone: of any family.
        tensors: of a file.
        resample_patches: whether a patch embedding of another patch size is resampled, by :func:`resample_patch`.

    Raises:
        ValueError: one of the ViT's tensors is missing, of another shape, or finds no place; or positions' grid cannot
            be told.
    """
    layout, renamed, others = rename(tensors)
    report = Report(layout, unused=others)
    target = backbone.state_dict()
    folded = 0 if 'layers.0.gamma_1' in target else fold_layer_scale(renamed)
    if folded:
        report.resized[f'{folded} layer scales'] = 'are folded into the projections before them'
    renamed = backbone.to_own_names(renamed)
    if resample_patches and PATCH_WEIGHT in renamed:
        old, new = renamed[PATCH_WEIGHT].shape[2:], target[PATCH_WEIGHT].shape[2:]
        if old != new:
            renamed[PATCH_WEIGHT] = resample_patch(renamed[PATCH_WEIGHT], new)
            report.resized[PATCH_WEIGHT] = '{}x{} -> {}x{} pixels'.format(*old, *new)
    report.resized.update(adapt(backbone, renamed))
    report.misshapen = misshapen(backbone, renamed)
    fitted = {}
    for name, tensor in renamed.items():
        if name not in target:
            report.unused.append(name)
        elif name not in report.misshapen:
            fitted[name] = tensor
            if name not in report.resized:
                report.matched.append(name)
    report.initial = [name for name in target if name not in fitted]
    refuse(misfits(backbone, renamed), report)
    return fitted, report
