"""The gates of a backbone, and what lies between a training forward and their losses."""

import re
import warnings
from typing import ClassVar, Dict, List, Optional, Sequence, Tuple, Union
from weakref import WeakSet

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from ..tokens.selection import Decision
from ..tokens.token_map import TokenMap, region_grid
from .gate import Gate
from .losses import GateLoss


class Gated:
    """The part of a backbone that has its gates, and keeps what they decided until somebody takes the losses of it.

    A training forward leaves its images, tokens and decision here, and :meth:`pop_gate_losses` empties it. While
    ``GateLossHook`` collects, it holds all forwards of a step, else the last one.
    """

    # Each is called with (backbone, tokens) at every forward pass of any backbone in evaluation mode, and its begin()
    # when one is set to that mode. By the class, since an evaluator builds a metric without the model. Held weakly.
    observers: ClassVar[WeakSet] = WeakSet()
    # Of a module that has not run in training yet; after that each has its own.
    _gated: Sequence[Tuple[Tensor, TokenMap, Decision]] = ()
    _collecting = False

    def build_gates(self, gate: Optional[dict], gate_loss: Union[str, dict, List[dict], None]) -> None:
        """Builds a gate for each coarse level of ``self.scales``, and, if they learn, ``self.gate_losses``.

        Wants ``sides``, ``pos_grid``, ``in_channels`` and ``embed_dims`` to be there, too.

        Args:
            gate: config of each gate; None for the paper's.
            gate_loss: config, or list of configs, of the losses of each level; ``'default'`` for the paper's, None for
                none.

        Raises:
            ValueError: a config is not of a gate or of a loss, or two losses have one name.
        """
        gates = []
        shapes = [(scale, region_grid(self.pos_grid, side)) for scale, side in zip(self.scales[1:], self.sides[1:])]
        for level, (scale, grid) in enumerate(shapes, 1):
            shape = dict(in_channels=self.in_channels, region=scale, grid=grid, embed_dims=self.embed_dims)
            gates.append(_build('gate', _gate_of_level(gate or dict(type='MLPGate'), level), Gate, **shape))
        self.gate, self.coarser_gates = gates[0], nn.ModuleList(gates[1:])
        self.gate_losses = nn.ModuleList()
        if self.gate_learns:
            if gate_loss == 'default':
                gate_loss = dict(type='GeneralizedBatchShapingLoss')
            configs = [gate_loss] if isinstance(gate_loss, dict) else gate_loss or []
            for level, (scale, grid) in enumerate(shapes, 1):
                for cfg in configs:
                    self.gate_losses.append(_build('gate_loss', cfg, GateLoss, grid=grid, region=scale, level=level))
        names = [loss.loss_name for loss in self.gate_losses]
        if len(set(names)) < len(names):
            raise ValueError(f'gate_loss: each loss needs a loss_name of its own, got {names}')

    @property
    def gates(self) -> List[Gate]:
        """One for each coarse level, the finest first."""
        return [self.gate, *self.coarser_gates]

    @property
    def gate_learns(self) -> bool:
        """Whether a gate has a trainable parameter."""
        return any(p.requires_grad for gate in self.gates for p in gate.parameters())

    def warn_of_gates_that_stay(self) -> None:
        """Warns of a gate with weights, none of which learns, that was not told to be ``frozen``."""
        for gate in self.gates:
            if not gate.frozen and next(gate.parameters(), None) is not None and not self.gate_learns:
                warnings.warn(
                    f'the {type(gate).__name__} is trained with, but no parameter of it requires a gradient: it keeps '
                    'the values that it has. Was it frozen with the ViT? If it is to stay as it is, set frozen=True in '
                    'its config',
                    stacklevel=3,
                )

    def __getstate__(self) -> dict:
        """For copies and pickles: without what a step has left for its losses, whose graph is this module's alone."""
        return {**self.__dict__, '_gated': (), '_collecting': False}

    def keep_for_losses(self, images: Tensor, tokens: TokenMap, decision: Decision) -> None:
        """Takes a training forward; warns where nobody has taken the last one's losses."""
        if self._gated and not self._collecting:
            if len(self.gate_losses):
                warnings.warn(
                    'nobody took the gate losses of the last training forward, so they train nothing. Is '
                    "custom_hooks=[dict(type='GateLossHook')] missing? (A training loop of one's own calls "
                    'pop_gate_losses.)',
                    stacklevel=3,
                )
            self._gated = ()
        self._gated = (*self._gated, (images, tokens, decision))

    def collect_gate_losses(self) -> None:
        """From now on until :meth:`pop_gate_losses`, every training forward is kept, for a step may have several."""
        self._gated, self._collecting = (), True

    def pop_gate_losses(self, data_samples: Sequence, segmentor: Optional[nn.Module] = None) -> Dict[str, Tensor]:
        """The gate's losses of the last training forward, or of all that were collected, and what to log.

        Args:
            data_samples: what the segmentor got, with the ground truth.
            segmentor: which has this backbone, for losses that ask it.

        Returns:
            ``loss_*`` scalars with gradient, means over the forwards; what :meth:`Decision.statistics` gives; and
            ``tokens`` of an image. Nothing if the gate does not learn.

        Raises:
            ValueError: a loss reads labels, and there were several forwards: whose labels they are is not known.
        """
        gated, self._gated, self._collecting = self._gated, (), False
        found: Dict[str, List[Tensor]] = {}
        for images, tokens, decision in gated:
            for loss in self.gate_losses:
                if loss.reads_labels and len(gated) > 1:
                    raise ValueError(
                        f'{type(loss).__name__} reads data_samples, and the backbone ran {len(gated)} times in this '
                        'step: which images the labels belong to is not known. Use a gate loss without labels'
                    )
                more = dict(segmentor=segmentor) if loss.asks_segmentor else {}
                value = loss.take_step(decision, tokens, data_samples, images, **more)
                found.setdefault(loss.loss_name, []).append(value)
            for name, value in decision.statistics().items():
                found.setdefault(name, []).append(value)
            found.setdefault('tokens', []).append(tokens.active_counts().float().mean())
        return {name: values[0] if len(values) == 1 else torch.stack(values).mean() for name, values in found.items()}


def _gate_of_level(cfg: dict, level: int) -> dict:
    """The config, with the place in a checkpoint where the gate of a coarser level stands."""
    init = cfg.get('init_cfg') if isinstance(cfg, dict) else None
    if level == 1 or not init:
        return cfg
    prefix = init.get('prefix', '') if isinstance(init, dict) else None
    found = re.fullmatch(r'((?:.*\.)?)gate\.?', prefix or '')
    if found is None:
        raise ValueError(
            "gate.init_cfg: wanted a dict with a prefix that ends with 'gate.', beside which those of coarser levels "
            f'stand, got {init}'
        )
    return {**cfg, 'init_cfg': {**init, 'prefix': f'{found[1]}coarser_gates.{level - 2}.'}}


def _build(argument: str, cfg: dict, base: type, **shape) -> nn.Module:
    """Builds a gate or a gate loss, with errors that name the argument."""
    kind = cfg.get('type') if isinstance(cfg, dict) else None
    kind = MODELS.get(kind) if isinstance(kind, str) else kind
    if not (isinstance(kind, type) and issubclass(kind, base)):
        known = sorted(c.__name__ for c in MODELS.module_dict.values() if issubclass(c, base) and c is not base)
        raise ValueError(f'{argument} must be a config whose type is one of {known}, got {cfg}')
    return MODELS.build(dict(**shape, **{**cfg, 'type': kind}))  # the class itself, which any default scope finds
