"""How weights come into a backbone: its own first ones, a pretrained ViT's, or a checkpoint's."""

from typing import ClassVar, Dict, Tuple

from mmengine.logging import print_log
from torch import Tensor, nn

from ..versions import before_load_state_dict
from .checkpoint import ADDED, adapt, fit, misshapen, refuse, refuse_not_finite
from .reading import read_checkpoint, tensors_below
from .whole_models import translate


class TakesWeights:
    """The part of a backbone that takes weights: its own first ones, a pretrained ViT's of any layout, or a checkpoint.

    Wants the backbone's ``gates``, ``details``, ``out_details`` and ``register_tokens``.
    """

    # Ends of the names of what a checkpoint may lack, to keep its first values.
    may_lack: ClassVar[Tuple[str, ...]] = ()

    def adapt_what_is_loaded(self) -> None:
        """From now on ``load_state_dict`` brings what is of another image size, or without patch bias, to this model.

        In a whole model's state dict the ViT may have another library's names.

        ``load_state_dict`` then raises a ValueError where a tensor of the ViT has another shape, with which mmengine
        alone would go on with a random one, or is not finite.
        """
        before_load_state_dict(self, TakesWeights._adapt_loaded)
        self._built_with = frozenset(self.layers.state_dict())

    @property
    def has_replaced_layers(self) -> bool:
        """Whether somebody has put others in the place of its blocks' layers, as LoRA does."""
        return not self._built_with <= self.layers.state_dict().keys()

    def to_own_names(self, tensors: Dict[str, Tensor]) -> Dict[str, Tensor]:
        """A ViT's tensors by the names that they have in mmseg's ViT, to the same by this backbone's names."""
        return tensors

    def init_weights(self) -> None:
        """As the library's ViT; gates, and what else is not the library's, keep their own first values.

        A checkpoint that ``init_cfg`` or ``pretrained`` names may be of any layout that :mod:`.layouts` knows, and
        of several models one, by ``init_cfg``'s ``prefix``; the log says what was made of it. With
        ``resample_patch=True`` in ``init_cfg`` it may be of another patch size, with ``repeat_channels=True`` for
        images of other channels.

        Raises:
            ValueError: the checkpoint cannot be read, or is not of this architecture; or ``init_cfg`` is a list in
                which a checkpoint is not alone.
        """
        if self.has_replaced_layers:
            return  # whoever replaced them has had it initialised before
        if isinstance(self.init_cfg, (list, tuple)) and any(c['type'].startswith('Pretrained') for c in self.init_cfg):
            if len(self.init_cfg) > 1:
                raise ValueError(f'init_cfg: wanted a checkpoint and nothing beside it, got {self.init_cfg}')
            (self.init_cfg,) = self.init_cfg
        if isinstance(self.init_cfg, dict) and self.init_cfg['type'].startswith('Pretrained'):
            path, prefix = self.init_cfg['checkpoint'], self.init_cfg.get('prefix', '')
            tensors = tensors_below(read_checkpoint(path), prefix)
            asked = {name: self.init_cfg.get(name, False) for name in ('resample_patch', 'repeat_channels')}
            tensors, report = fit(self, tensors, **asked)
            self.load_state_dict(tensors, strict=False)
            print_log(f'{path}: {report}', logger='current')
            if self.gate.init_cfg is not None:  # a gate of its own takes precedence
                for gate in self.gates:
                    gate.init_weights()
        else:
            super().init_weights()
            for gate in self.gates:
                gate.init_weights()
            for detail in [*self.details, *self.out_details]:
                detail.reset_parameters()
            if self.register_tokens is not None:
                nn.init.normal_(self.register_tokens, std=1e-6)

    def _adapt_loaded(self, state_dict: dict, prefix: str, *args) -> None:
        refuse_not_finite(state_dict, prefix)
        report = translate(self, state_dict, prefix) if prefix else None
        if report is not None:
            print_log(f'{prefix}: {report}', logger='current')
        for name, how in adapt(self, state_dict, prefix).items():
            print_log(f'{prefix}{name} {how}', logger='current')
        shapes = misshapen(self, state_dict, prefix)
        refuse({name: how for name, how in shapes.items() if not name.startswith(ADDED)})
