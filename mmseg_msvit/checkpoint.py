"""Weights of any plain ViT into MSViT: what a state dict for this backbone must look like, and a report of the rest.

:mod:`.reading` gets tensors out of a file, :mod:`.layouts` gives them their names here.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Dict, List, Optional, Tuple

import torch
import torch.nn.functional as F
from mmseg.models.backbones import VisionTransformer
from torch import Tensor, nn

from .layouts import fold_layer_scale, rename

Grid = Tuple[int, int]

PATCH_WEIGHT = 'patch_embed.projection.weight'
# mmseg's ViT and CLIP's have none, which is a bias of zero.
PATCH_BIAS = 'patch_embed.projection.bias'
# The share of the backbone's own tensors that a checkpoint must have.
ENOUGH = 0.9
# Tensors that a backbone may have of its own; the rest is mmseg's ViT, which a checkpoint must fit.
ADDED = ('gate.', 'coarser_gates.', 'gate_losses.', 'coarse_detail.', 'coarser_details.', 'out_details.')
# Where attention, FFN and what comes before them are: a tensor there that finds no place changes every feature.
INNER = ('patch_embed.', 'ln_pre.', 'layers.')


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
    return VisionTransformer.resize_pos_embed(cells.float(), table, grid, mode), how


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


def adapt(backbone: nn.Module, tensors: Dict[str, Tensor], prefix: str = '') -> Dict[str, str]:
    """Brings the state dict of an MSViT or a plain ViT, in place, to this backbone's grids and patch embedding.

    Args:
        backbone: an MSViT.
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
    positions = tensors.get(f'{prefix}pos_embed')
    if positions is not None and positions.ndim == 3:
        positions, how = resample_positions(
            positions, backbone.table, backbone.interpolate_mode, regions, backbone.sides[1]
        )
        tensors[f'{prefix}pos_embed'] = positions
        if how is not None:
            done['pos_embed'] = how
    for name, own in backbone.named_parameters():
        source = tensors.get(prefix + name)
        if (
            source is None
            or source.ndim != 4
            or not re.fullmatch(r'(gate|coarser_gates\.\d+)\.pos_embed|gate_losses\.\d+\.prior_\w+', name)
        ):
            continue
        if source.shape[2:] != own.shape[2:]:
            tensors[prefix + name] = resample_grid(source.float(), own.shape[2:])
            done[name] = '{}x{} -> {}x{}'.format(*source.shape[2:], *own.shape[2:])
    bias = backbone.patch_embed.projection.bias
    # A state dict without the patch embedding is not a ViT's, and says nothing about its bias.
    if bias is not None and f'{prefix}{PATCH_WEIGHT}' in tensors and f'{prefix}{PATCH_BIAS}' not in tensors:
        tensors[f'{prefix}{PATCH_BIAS}'] = torch.zeros_like(bias)
        done[PATCH_BIAS] = 'is zero: the source has none'
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
    """What keeps the tensors of a whole ViT from being this backbone's: name, without prefix -> why.

    Those that only the backbone has, such as a final norm or biases, may keep their first values.
    """
    source = [name[len(prefix) :] for name in tensors if name.startswith(prefix)]
    own = [name for name in backbone.state_dict() if not name.startswith(ADDED)]
    wrong = {name: how for name, how in misshapen(backbone, tensors, prefix).items() if not name.startswith(ADDED)}
    wrong.update({name: 'finds no place' for name in source if name.startswith(INNER) and name not in own})
    needed = [name for name in own if name == 'pos_embed' or name.startswith(INNER) and name.endswith('weight')]
    wrong.update({name: 'is missing' for name in needed if name not in source})
    return wrong


def refuse(wrong: Dict[str, str], report: object = '') -> None:
    """Raises a ValueError if anything is wrong."""
    if wrong:
        raise ValueError(f'checkpoint: wanted the tensors of this very ViT, got {_complaint(wrong)}\n{report}')


def _complaint(wrong: Dict[str, str]) -> str:
    return (
        f'{len(wrong)} that do not fit: {"; ".join(_listed(wrong))}. Set patch_size, in_channels, embed_dims, '
        'num_layers, mlp_ratio, qkv_bias, patch_bias, patch_norm and pre_norm of the backbone to what the checkpoint '
        'was trained with; what none of these makes (relative positions, norms of q and k, gated FFNs) needs another '
        'type of backbone'
    )


def fit(backbone: nn.Module, tensors: Dict[str, Tensor]) -> Tuple[Dict[str, Tensor], Report]:
    """A state dict for the backbone out of the tensors of any known layout.

    Layer scale is folded into the projections before it where the backbone's blocks have none.

    Raises:
        ValueError: less than 90 % of the backbone's own tensors, those of gate and gate losses aside, are there; or one
            of its patch embedding and blocks finds no place or is of another shape; or positions' grid cannot be told.
    """
    layout, renamed, others = rename(tensors)
    report = Report(layout, unused=others)
    target = backbone.state_dict()
    folded = 0 if any('.gamma1.' in name for name in target) else fold_layer_scale(renamed)
    if folded:
        report.resized[f'{folded} layer scales'] = 'are folded into attn.out_proj and ffn.layers.1'
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
    wrong = misfits(backbone, renamed)
    own = [name for name in target if not name.startswith(ADDED)]
    share = sum(name in fitted for name in own) / len(own)
    if share < ENOUGH:
        more = f' and {_complaint(wrong)}' if wrong else ''
        raise ValueError(
            f'checkpoint: wanted at least {ENOUGH:.0%} of the backbone, got {share:.0%} of its tensors{more}\n{report}'
        )
    refuse(wrong, report)
    return fitted, report
