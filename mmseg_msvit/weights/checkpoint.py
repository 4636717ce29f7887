"""Weights of any plain ViT into MSViT: what a state dict for this backbone must look like, and a report of the rest.

:mod:`.reading` gets tensors out of a file, :mod:`.layouts` gives them their names here, :mod:`.resampling` other grids.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Dict, List, Tuple

import torch
from torch import Tensor, nn

from ..tokens.positions import resample_table
from . import resampling
from .layouts import fold_layer_scale, rename
from .resampling import grids_of_regions, resample_positions, resample_relative

PATCH_WEIGHT = 'patch_embed.projection.weight'
# What gates and their losses have on the grid of regions.
REGION_GRIDS = r'(gate|coarser_gates\.\d+)\.pos_embed|gate_losses\.\d+\.prior_\w+'
GATES = ('gate.', 'coarser_gates.')
# What gates have on pixels: linear layers on a region's, flat, and convolutions.
GATE_PIXELS = r'(gate|coarser_gates\.\d+)\.(embed|patch)\.weight'
# Tensors that a backbone may have of its own; the rest is the library's ViT, which a checkpoint must fit.
ADDED = (*GATES, 'gate_losses.', 'coarse_detail.', 'coarser_details.', 'out_details.')
# Starts of names: a tensor there that the source has and the backbone has not would change every feature.
INNER = ('patch_embed.', 'pos_embed', 'register_tokens', 'rope.', 'ln_pre.', 'layers.')
# A norm without a bias may be an RMSNorm.
NORM_BIAS = r'(^|\.)(ln\d|ln_pre|norm)\.bias$'
# Ends of the names that a source must have, besides every weight and the biases of norms.
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
    (
        r'^patch_embed\.projection\.weight \(\d+, (\d+), .* \(\d+, (?!\1,)',
        'in_channels, or repeat_channels=True in init_cfg (for another patch_size resample_patch=True)',
    ),
    (r'^patch_embed\.projection\.weight', 'patch_size, or resample_patch=True in init_cfg'),
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
            ('resized', self.resized, listed(self.resized)),
            ('left at initialisation', self.initial, _grouped(self.initial)),
            ('of another shape', self.misshapen, listed(self.misshapen)),
            ('not used', self.unused, _grouped(self.unused)),
        ]
        lines = [f'weights in the layout of {self.layout}']
        lines += [f'  {title:<22} {len(names):>4}  {", ".join(shown)}'.rstrip() for title, names, shown in rows]
        return '\n'.join(lines)


def listed(what: Dict[str, str], most: int = 12) -> List[str]:
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


def adapt(backbone: nn.Module, tensors: Dict[str, Tensor], prefix: str = '', square: bool = False) -> Dict[str, str]:
    """Fits a state dict of this ViT, or of a plain one, of whatever image size, to this backbone's grids, in place.

    A bias that it lacks is zero, as in mmseg's and CLIP's patch embeddings; but a norm without one may be an RMSNorm.

    Args:
        backbone: of any family.
        tensors: by their names here.
        prefix: what comes before these names.
        square: whether they are of a library whose ViTs are pretrained on squares.

    Returns:
        Name, without prefix -> what was done.

    Raises:
        ValueError: the grid of the positions cannot be told.
    """
    done = {}
    gate = tensors.get(f'{prefix}gate.pos_embed')
    grids = grids_of_regions(gate.shape[2:], backbone.sides[1]) if gate is not None and gate.ndim == 4 else ()
    # A state dict without the patch embedding is not a ViT's, and says nothing about its biases.
    whole = f'{prefix}{PATCH_WEIGHT}' in tensors
    for name, own in backbone.state_dict().items():
        source, how = tensors.get(prefix + name), None
        if source is None:
            lacks_bias = name.endswith('bias') and f'{prefix}{name[:-4]}weight' in tensors
            if whole and lacks_bias and not name.startswith(ADDED) and not re.search(NORM_BIAS, name):
                source, how = torch.zeros_like(own), 'is zero: the source has none'
        elif name == 'pos_embed' and source.ndim == 3:
            source, how = resample_positions(source, backbone.pos_grid, backbone.interpolate_mode, grids, square)
        elif name.endswith('relative_position_index'):
            source = own  # it follows from the window
        elif source.shape == own.shape:
            continue
        elif name.endswith('relative_position_bias_table'):
            source, how = resample_relative(source, backbone.pos_grid), f'{len(source)} -> {len(own)} offsets'
        elif source.ndim == 4 and re.fullmatch(REGION_GRIDS, name):
            how = '{}x{} -> {}x{}'.format(*source.shape[2:], *own.shape[2:])
            source = resample_table(source.float(), own.shape[2:], 'bilinear')
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
    may_lack = backbone.may_lack if backbone.with_cls_token else (*backbone.may_lack, 'cls_token')
    needed = [name for name in own if name.endswith(('weight', *NEEDED)) or re.search(NORM_BIAS, name)]
    needed = [name for name in needed if not name.endswith(may_lack)]
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
        f'{"; ".join(listed(wrong))}. {advice}\n{report}'
    )


def refuse_not_finite(tensors: Dict[str, Tensor], prefix: str = '') -> None:
    """Raises a ValueError if a weight below the prefix is NaN or infinite: a model would answer with one class only."""
    broken = [
        name
        for name, tensor in tensors.items()
        if name.startswith(prefix) and isinstance(tensor, Tensor) and not tensor.isfinite().all()
    ]
    if broken:
        names = ', '.join(_grouped(broken))
        raise ValueError(f'checkpoint: wanted finite weights, got NaN or infinite ones in {names}')


def _advice(wrong: Dict[str, str]) -> List[str]:
    """What to set, for all that is wrong."""
    blocks = tuple(name[: -len('ln1.weight')] for name in wrong if re.fullmatch(r'layers\.\d+\.ln1\.weight', name))
    advice = []
    for name, how in wrong.items():
        if name.startswith(blocks) and not name.endswith('.ln1.weight'):
            continue  # of a block that is there too much or missing
        advice += [what for pattern, what in ADVICE if re.search(pattern, f'{name} {how}')][:1]
    return ['embed_dims'] if 'embed_dims' in advice else list(dict.fromkeys(advice))


def _gate_of(name: str) -> str:
    """The name of the gate, with a dot, that a tensor is of."""
    return re.match(r'gate\.|coarser_gates\.\d+\.', name)[0]


def _fit_pixels(
    tensors: Dict[str, Tensor],
    name: str,
    own: Tensor,
    channels: Tuple[int, int],
    resample_patch: bool,
    repeat_channels: bool,
) -> str:
    """Brings what lies on pixels, in place, to other patches and channels, where this is asked; says what was done."""
    before, after = channels
    flat = tensors[name].ndim == 2  # (C', channels * R * R)
    sides = [math.isqrt(weight.shape[1] // n) for weight, n in ((tensors[name], before), (own, after))]
    weight = tensors[name].unflatten(1, (before, sides[0], sides[0])) if flat else tensors[name]
    new, done = (2 * sides[1:] if flat else own.shape[2:]), []
    if resample_patch and weight.shape[2:] != torch.Size(new):
        done.append('{}x{} -> {}x{} pixels'.format(*weight.shape[2:], *new))
        weight = resampling.resample_patch(weight, new)
    if repeat_channels and before != after:
        done.append(f'{before} -> {after} channels')
        weight = resampling.repeat_channels(weight, after)
    tensors[name] = weight.flatten(1) if flat else weight
    return ', '.join(done)


def fit(
    backbone: nn.Module,
    tensors: Dict[str, Tensor],
    resample_patch: bool = False,
    trained: bool = False,
    repeat_channels: bool = False,
) -> Tuple[Dict[str, Tensor], Report]:
    """A state dict for the backbone out of the tensors of any known layout.

    Layer scale is folded into the projections before it where the backbone's blocks have none.

    Args:
        backbone: of any family.
        tensors: of a file.
        resample_patch: whether a patch embedding of another patch size is resampled, by the function of that name, and
            likewise what a gate has on pixels.
        trained: whether they are this very model's, whose positions are on its grid even where another library has
            named them; pretrained ones are on squares.
        repeat_channels: whether one for other channels is adapted, likewise.

    Raises:
        ValueError: one of the ViT's tensors is missing, of another shape, or finds no place; a gate's tensor is of
            another shape; or positions' grid cannot be told.
    """
    layout, renamed, others = rename(tensors)
    report = Report(layout, unused=others)
    target = backbone.state_dict()
    folded = 0 if 'layers.0.gamma_1' in target else fold_layer_scale(renamed)
    if folded:
        report.resized[f'{folded} layer scales'] = 'are folded into the projections before them'
    renamed = backbone.to_own_names(renamed)
    if PATCH_WEIGHT in renamed:
        channels = renamed[PATCH_WEIGHT].shape[1], target[PATCH_WEIGHT].shape[1]
        for name in [name for name in renamed if name == PATCH_WEIGHT or re.fullmatch(GATE_PIXELS, name)]:
            if name in target:
                how = _fit_pixels(renamed, name, target[name], channels, resample_patch, repeat_channels)
                report.resized.update({name: how} if how else {})
    report.resized.update(adapt(backbone, renamed, square=not trained and layout != 'mmseg'))
    report.misshapen = misshapen(backbone, renamed)
    unfit = {_gate_of(name) for name in report.misshapen if name.startswith(GATES)}
    if unfit and backbone.gate.init_cfg is None:  # else it gets its weights there
        gates = {name: how for name, how in report.misshapen.items() if name.startswith(GATES)}
        raise ValueError(
            f'checkpoint: wanted the gate of this very backbone, got {"; ".join(listed(gates, 4))}. Leave scales, '
            'patch_size and in_channels as they were, or set resample_patch=True or repeat_channels=True in init_cfg, '
            'or give the gate weights of its own by gate=dict(init_cfg=...); for a new gate delete the tensors below '
            f'{", ".join(sorted(unfit))} from the file'
        )
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
