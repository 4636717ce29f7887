"""Weights of a whole model, whose ViT may have another library's names, into a segmentor."""

from typing import Dict, Optional, Tuple

from mmengine.logging import print_log
from mmengine.runner.checkpoint import load_state_dict
from mmseg.models.backbones import BEiT, VisionTransformer
from torch import Tensor, nn

from .checkpoint import ADDED, GATES, MISSING, Report, adapt, fit, listed, misfits, misshapen, refuse, refuse_not_finite
from .layouts import vits_among
from .reading import read_checkpoint, unwrap

MMSEG_BLOCK = 'layers.0.attn.attn.in_proj_weight'
OF_GATES = tuple(f'backbone.{name}' for name in GATES)
WITHOUT_GATE = "The weights of a dense model want gate=dict(type='FixedGate')"
OTHER_NAMES = "An MSViT with gate=dict(type='FixedGate') takes a ViT that another library has named"


def translate(backbone: nn.Module, tensors: Dict[str, Tensor], prefix: str) -> Optional[Report]:
    """Gives a ViT that another library has named, in place, the names and grids that it has here.

    Args:
        backbone: an MSViT of any family.
        tensors: of a whole model.
        prefix: of the backbone in it; below it the ViT may be in a wrapper.

    Returns:
        What was made of it; None where a ViT has its names here, or where there is none.

    Raises:
        ValueError: the ViT is not of the backbone's architecture, or there are several.
    """
    below = {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    below = {name: tensor for name, tensor in below.items() if not name.startswith(ADDED)}
    if MMSEG_BLOCK in below or not vits_among(below):
        return None
    own = dict(below)
    adapt(backbone, own)
    if not misfits(backbone, own):  # a BEiT, whose names may be mmpretrain's, too
        return None
    fitted, report = fit(backbone, below, trained=True)
    for name in below:
        del tensors[prefix + name]
    tensors.update({prefix + name: tensor for name, tensor in fitted.items()})
    return report


def with_own_vit(
    model: nn.Module, backbone: nn.Module, tensors: Dict[str, Tensor]
) -> Tuple[Dict[str, Tensor], Optional[Report]]:
    """A model's state dict out of a whole one's or a ViT's alone, of any layout. The log says what was resampled.

    Args:
        model: that has the backbone in it.
        backbone: an MSViT of any family.
        tensors: of the whole model, or of a ViT.

    Returns:
        The tensors, and what was made of a ViT that another library has named.

    Raises:
        ValueError: the ViT is not of the backbone's architecture.
    """
    (name,) = (name for name, module in model.named_modules() if module is backbone)
    if backbone.has_replaced_layers:
        added = tuple(f'{name}.{each}' for each in ADDED)
        own = (key for key in model.state_dict() if key.startswith(f'{name}.') and not key.startswith(added))
        lacks = sorted(set(own) - tensors.keys())
        if not lacks:  # what the model itself saves of its ViT, which may be a part of it
            return dict(tensors), None
        raise ValueError(
            'checkpoint: wanted what this very model saves, since layers of its ViT were replaced, as by LoRA; got one '
            f'without {", ".join(lacks[:4])}. The weights of the ViT as it was before come by '
            "module=dict(init_cfg=dict(type='Pretrained', checkpoint=..., prefix='backbone.'))"
        )
    own = dict(tensors)
    report = translate(backbone, own, f'{name}.')
    if report is not None:
        return own, report
    done = adapt(backbone, own, f'{name}.')
    wrong = misfits(backbone, own, f'{name}.')
    if not wrong or f'{name}.{MMSEG_BLOCK}' in own:
        refuse(wrong)
        for tensor, how in done.items():
            print_log(f'{name}.{tensor} {how}', logger='current')
        return own, None
    fitted, report = fit(backbone, tensors, trained=True)  # a ViT by itself, or in a model that calls it otherwise
    own = {key: tensors[key] for key in model.state_dict() if key in tensors and not key.startswith(f'{name}.')}
    report.unused = [key for key in report.unused if key not in own]
    return {**own, **{f'{name}.{key}': tensor for key, tensor in fitted.items()}}, report


def load_segmentor(model: nn.Module, path: str) -> None:
    """Loads a segmentor's weights: as mmengine does, but runs nothing in the file, and wants ViT, gates and head whole.

    Args:
        model: with a backbone of any class; where that is an MSViT, the file's ViT may be of any layout.
        path: a training checkpoint or bare weights, a file or an address.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read; a tensor of ViT, gates or head is missing, of another shape, or not finite.
    """
    weights = unwrap(read_checkpoint(path))
    refuse_not_finite(weights)
    needed = [f'decode_head.{name}' for name in model.decode_head.state_dict()]
    parameters = [f'backbone.{name}' for name, _ in model.backbone.named_parameters()]
    if hasattr(type(model.backbone), 'may_lack'):  # an MSViT
        weights, report = with_own_vit(model, model.backbone, weights)
        if report is not None:
            print_log(f'{path}: {report}', logger='current')
        needed += [name for name in parameters if name.startswith(OF_GATES)]
    else:
        needed += [name for name in parameters if name in model.state_dict()]  # of a LoRA what it has learned
    wrong = misshapen(model, weights)
    wrong = {name: how for name, how in wrong.items() if not name.startswith('backbone.gate_losses.')}  # they see to it
    wrong.update({name: MISSING for name in needed if name not in weights})
    if wrong:
        lacks = [name for name, how in wrong.items() if how == MISSING and name.startswith('backbone.')]
        advice = ''
        if lacks and all(name.startswith(OF_GATES) for name in lacks):
            advice = f'. {WITHOUT_GATE}'
        elif lacks and isinstance(model.backbone, (VisionTransformer, BEiT)):
            advice = f'. {OTHER_NAMES}'
        raise ValueError(
            f'checkpoint: wanted the weights of this very model, got {"; ".join(listed(wrong, 4))}{advice}'
        )
    load_state_dict(model, weights)
