"""LoRA of mmpretrain's around a backbone whose gate learns, too. Needs mmpretrain: import it by ``custom_imports``."""

from mmpretrain.models import LoRAModel
from mmpretrain.models.peft.lora import LoRALinear
from mmseg.registry import MODELS
from torch import nn

from .weights.checkpoint import ADDED, GATES


@MODELS.register_module()
class MSLoRAModel(LoRAModel):
    """mmpretrain's :class:`LoRAModel`, whose gate, and what else is not the pretrained ViT's, is trained and saved.

    A checkpoint has LoRA's weights and these; the ViT's own come by ``init_cfg`` of ``module``. LoRAModel itself
    freezes the gate with all the rest. Takes its arguments; ``module`` is an MSViT, MSBEiT or MSMAE.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for name, parameter in self.module.named_parameters():
            of_gate = name.startswith(GATES) and any(gate.frozen for gate in self.module.gates)
            if name.startswith(ADDED) and not of_gate:
                parameter.requires_grad_(True)

    def state_dict(self, *, destination=None, prefix='', keep_vars=False):
        # LoRAModel throws out all that is not LoRA's, also what others have put there: it gets a dict of its own.
        found = super().state_dict(prefix=prefix, keep_vars=keep_vars)
        own = self.module.state_dict(keep_vars=keep_vars)
        found.update({f'{prefix}module.{name}': own[name] for name in own if name.startswith(ADDED)})
        if destination is None:
            return found
        destination.update(found)
        return destination


def merge_lora(model: nn.Module) -> nn.Module:
    """A segmentor whose backbone is a ViT in a :class:`LoRAModel`, in place, to one with that ViT, LoRA's part added.

    Raises:
        ValueError: the backbone is no LoRAModel.
    """
    if not isinstance(model.backbone, LoRAModel):
        raise ValueError(f'model: wanted a backbone in a LoRAModel, got {type(model.backbone).__name__}')
    vit = model.backbone.module
    for name, layer in list(vit.named_modules()):
        if isinstance(layer, LoRALinear):
            parent, _, own = name.rpartition('.')
            linear = layer.original_layer
            linear.weight.data += layer.scaling * (layer.lora_up.weight @ layer.lora_down.weight).data
            setattr(vit.get_submodule(parent), own, linear)
    model.backbone = vit.requires_grad_(True)
    return model
