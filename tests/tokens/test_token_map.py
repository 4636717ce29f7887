from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmseg_msvit.tokens.candidates import uniform_tokens
from mmseg_msvit.tokens.selection import TokenSelector
from mmseg_msvit.tokens.token_map import over_cells

grids = st.tuples(st.integers(1, 7), st.integers(1, 7))


class OneLevel(TokenSelector):
    """Takes logits in the place of gates."""

    def forward(self, logits, grid):
        return super().forward([lambda regions, left: logits], grid)


def selector(mode='active', threshold=0.5):
    return OneLevel((1, 2), mode, 1.0, threshold, prefix=1)


@settings(max_examples=40, deadline=None)
@given(grids, st.sampled_from([(1, 2), (1, 3), (1, 2, 4)]), st.integers(0, 2), st.integers(0, 2), st.integers(1, 3))
def test_uniform_tokens_are_what_the_selector_makes_of_gates_that_all_agree(grid, sides, level, prefix, images):
    level = min(level, len(sides) - 1)
    logits = [lambda regions, left, n=n: torch.full((images, *regions), 1.0 if n == level else -1.0) for n in (1, 2)]
    wanted, _ = TokenSelector(sides, prefix=prefix).eval()(logits[: len(sides) - 1], grid)
    found = uniform_tokens(sides, level, prefix, images, grid, torch.device('cpu'))
    for field in fields(wanted):
        torch.testing.assert_close(getattr(found, field.name), getattr(wanted, field.name), msg=field.name)


def test_token_count_follows_the_share_of_coarse_regions():
    logits = torch.full((1, 4, 4), -1.0)
    logits.view(-1)[:8] = 1  # p = 1/2 of Nc = 16 regions: Nc * (4 - 3p) = 40, and cls
    assert selector().eval()(logits, (8, 8))[0].lengths == [41]


@pytest.mark.parametrize('mode', ['trimmed', 'all'])
def test_training_keeps_more_than_the_active_tokens_with_weight_zero(mode):
    logits = torch.randn(3, 3, 3, requires_grad=True)
    select = selector(mode=mode).train()
    tokens, _ = select(logits, (5, 6))
    counts = tokens.active_counts()
    kept = int(counts.max()) if mode == 'trimmed' else 1 + 9 + 30
    assert tokens.masked and tokens.lengths == [kept] * 3
    values = torch.stack(tokens.weight.split(tokens.lengths))
    assert values.sum(1).tolist() == counts.tolist() and set(values.unique().tolist()) <= {0.0, 1.0}


def test_trimming_keeps_every_active_token_and_then_the_largest_soft_values():
    logits = torch.randn(4, 3, 3, requires_grad=True)
    torch.manual_seed(3)
    tokens, _ = selector(mode='trimmed').train()(logits, (6, 6))
    torch.manual_seed(3)
    everything, _ = selector(mode='all').train()(logits, (6, 6))
    for b in range(4):
        kept, all_of_them = names(tokens, b), names(everything, b)
        active = everything.weight.split(everything.lengths)[b] > 0.5
        assert {name for name, a in zip(all_of_them, active) if a} <= set(kept) <= set(all_of_them)


def names(tokens, image):
    """Level and centre of each token of an image."""
    parts = (part.split(tokens.lengths)[image].tolist() for part in (tokens.level, tokens.center))
    return [(level, *center) for level, center in zip(*parts)]


def test_active_tokens_carry_the_gradient_of_their_own_soft_value():
    logits = torch.randn(2, 2, 2, requires_grad=True)
    tokens, decision = selector().train()(logits, (4, 4))
    assert not tokens.masked and (tokens.weight == 1).all()
    tokens.to_grid(torch.ones(sum(tokens.lengths), 1)).sum().backward()
    # d soft / d logit has the sign of the decision: m for coarse, 1 - m for fine
    assert torch.equal(logits.grad > 0, decision.coarse[0])


def test_without_a_gradient_for_the_gate_only_active_tokens_are_kept():
    tokens, _ = selector(mode='all').train()(torch.randn(2, 2, 2), (4, 4))
    assert not tokens.masked and tokens.weight is None


def test_threshold_moves_the_decision_at_test_time():
    logits = torch.tensor([[[0.3, -0.3]]])
    assert selector(threshold=0.5).eval()(logits, (2, 4))[1].coarse[0].tolist() == [[[True, False]]]
    assert not selector(threshold=0.6).eval()(logits, (2, 4))[1].coarse[0].any()
    assert selector(threshold=0.4).eval()(logits, (2, 4))[1].coarse[0].all()


def test_over_cells_cuts_off_what_lies_beyond_the_grid():
    regions = torch.arange(6).view(1, 2, 3)
    wanted = [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]
    assert over_cells(regions, (3, 5), 2)[0].tolist() == wanted


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_non_finite_logits_stop_with_the_iteration(bad):
    from mmengine.logging import MessageHub

    logits = torch.zeros(1, 2, 2)
    logits[0, 0, 1] = bad
    with pytest.raises(FloatingPointError, match='gate logits must be finite, got .* of 4 values'):
        selector()(logits, (4, 4))
    hub = MessageHub.get_instance('test_tokens')
    hub.update_info('iter', 41)
    try:
        with pytest.raises(FloatingPointError, match='at iteration 42'):
            selector()(logits, (4, 4))
    finally:
        MessageHub._instance_dict.pop('test_tokens')


@pytest.mark.parametrize(
    'kwargs, message',
    [
        (dict(mode='some'), "train_tokens must be one of .*'some'"),
        (dict(threshold=1.5), r'threshold must be in \[0, 1\], got 1.5'),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        selector(**kwargs)
