"""What lies between a training forward and its gate losses."""

import warnings
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .selection import Decision
from .tokens import TokenMap


class GateLossSlot:
    """The part of a backbone that keeps what its gates decided until somebody takes the losses of it.

    A training forward leaves its images, tokens and decision here, and :meth:`pop_gate_losses` empties it. While
    ``GateLossHook`` collects, it holds all forwards of a step, else the last one. Expects ``gate_losses`` beside it.
    """

    # Of a module that has not run in training yet; after that each has its own.
    _gated: Sequence[Tuple[Tensor, TokenMap, Decision]] = ()
    _collecting = False

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
                value = loss.take_step() * loss.of_step(decision, tokens, data_samples, images, **more)
                found.setdefault(loss.loss_name, []).append(value)
            for name, value in decision.statistics().items():
                found.setdefault(name, []).append(value)
            found.setdefault('tokens', []).append(tokens.active_counts().float().mean())
        return {name: values[0] if len(values) == 1 else torch.stack(values).mean() for name, values in found.items()}
