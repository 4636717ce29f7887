"""mmseg's BEiT and MAE over tokens of several scales."""

from typing import ClassVar, Dict, Optional, Tuple

from mmseg.models.backbones import MAE, BEiT
from mmseg.registry import MODELS
from torch import Tensor

from ..tokens.positions import Relative
from ..tokens.token_map import TokenMap
from .blocks import Places
from .mixed_scale import MixedScale


@MODELS.register_module()
class MSBEiT(MixedScale, BEiT):
    """BEiT with dynamic mixed-scale tokens.

    Takes every argument of mmseg's :class:`BEiT` and those of :class:`MixedScale`; its state dict has mmseg's keys, and
    those of what is added. Images of another size than ``img_size`` use the same bias for the same offset: tables are
    cut, or continued by their edge, where mmseg's raises. Sizes that are no multiple of a patch are padded, where
    mmseg's cuts them off.
    """

    def to_own_names(self, tensors: Dict[str, Tensor]) -> Dict[str, Tensor]:
        own = {}
        for name, tensor in tensors.items():
            name = name.replace('.attn.attn.in_proj_', '.attn.qkv.').replace('.attn.attn.out_proj.', '.attn.proj.')
            if name.endswith('.attn.qkv.bias') and self.layers[0].attn.q_bias is not None:
                # A key's bias adds the same to all scores of a query, which the softmax takes away again.
                own[name.replace('qkv.bias', 'q_bias')], _, own[name.replace('qkv.bias', 'v_bias')] = tensor.chunk(3)
            else:
                own[name] = tensor
        return own

    def position(self, tokens: TokenMap) -> Optional[Tensor]:
        return None

    def places(self, tokens: TokenMap) -> Places:
        return Places(relative=Relative.of(tokens, self.pos_grid, self.sides))


@MODELS.register_module()
class MSMAE(MixedScale, MAE):
    """mmseg's MAE with dynamic mixed-scale tokens: a table of positions, and BEiT's relative bias.

    Takes every argument of mmseg's :class:`MAE` and those of :class:`MixedScale`, as :class:`MSBEiT` does.
    """

    # Masked autoencoders are trained without both.
    may_lack: ClassVar[Tuple[str, ...]] = ('relative_position_bias_table', 'gamma_1', 'gamma_2')

    places = MSBEiT.places
    to_own_names = MSBEiT.to_own_names
