import inspect

import pytest
import torch
from conftest import build_msvit, force_logits, half_on_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from mmseg_msvit.measuring.inspection import record_tokens
from mmseg_msvit.vit import attention
from mmseg_msvit.vit.attention import attend, attend_reference, drop_path


def pack(lengths, heads=2, d=4, dtype=torch.float64):
    return torch.randn(sum(lengths), 3, heads, d, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize('lengths', [[5], [3, 3, 3], [1, 7, 2], [4, 4, 1, 4]])
@pytest.mark.parametrize('weighted', [False, True])
@pytest.mark.parametrize('chunk', [1, 2**24])
def test_fused_equals_reference_with_gradients(lengths, weighted, chunk, monkeypatch):
    monkeypatch.setattr(attention, 'CHUNK_ELEMENTS', chunk)
    results = []
    for function in (attend, attend_reference):
        torch.manual_seed(1)
        qkv = pack(lengths)
        weight = (torch.rand(len(qkv)) < 0.6).double()
        weight[torch.tensor([0, *lengths[:-1]]).cumsum(0)] = 1  # the cls token
        weight.requires_grad_()
        out = function(qkv, lengths, weight if weighted else None)
        (out * torch.randn(out.shape, dtype=out.dtype)).sum().backward()
        results.append([out, qkv.grad] + ([weight.grad] if weighted else []))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-10)


def test_reference_is_the_published_formula():
    qkv, w = pack([4], heads=1), torch.tensor([1.0, 0.0, 0.5, 1.0], dtype=torch.float64)
    q, k, v = (t.detach() for t in qkv[:, :, 0].unbind(1))
    for i in range(4):
        a = [w[j] * torch.exp(q[i] @ k[j] / 4**0.5) for j in range(4)]
        wanted = sum(a[j] * v[j] for j in range(4)) / sum(a)
        torch.testing.assert_close(attend_reference(qkv, [4], w)[i, 0], wanted)


@pytest.mark.parametrize('function', [attend, attend_reference])
def test_gradcheck(function):
    lengths = [3, 3]
    weight = torch.rand(6, dtype=torch.float64).add(0.2).requires_grad_()
    assert gradcheck(lambda qkv, w: function(qkv, lengths, w), (pack(lengths, d=3), weight))


def test_gradcheck_of_the_reference_at_a_hard_decision():
    weight = torch.tensor([1.0, 0, 1, 0, 1], dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda qkv, w: attend_reference(qkv, [5], w), (pack([5], d=3), weight))


def test_inactive_tokens_are_seen_by_nobody_and_have_a_gradient():
    qkv = pack([5]).detach()
    weight = torch.tensor([1.0, 0, 1, 0, 1], dtype=torch.float64, requires_grad=True)
    keep = weight.bool()
    out = attend(qkv, [5], weight)
    torch.testing.assert_close(out[keep], attend(qkv[keep], [3]))
    out.square().sum().backward()
    assert (weight.grad[~keep] != 0).all()


def test_extreme_scores_stay_finite():
    qkv = pack([6], dtype=torch.float32).detach() * 100
    weight = torch.tensor([1.0, 0, 0, 0, 1, 0], requires_grad=True)
    for function in (attend, attend_reference):
        x = qkv.clone().requires_grad_()
        out = function(x, [6], weight)
        grads = torch.autograd.grad(out.sum(), (x, weight))
        assert out.isfinite().all() and all(g.isfinite().all() for g in grads)


def outscored(gap, dtype):
    """Four tokens in orthogonal directions; the second is inactive and outscores the active ones by the gap."""
    q = torch.eye(4, dtype=torch.float64)[[0, 0, 0, 0]]
    k = torch.eye(4, dtype=torch.float64)
    k[1] = k[0] * (1 + 2 * gap / 8)  # scores are q k / 2
    v = torch.arange(16, dtype=torch.float64).view(4, 4).cos()
    qkv = torch.stack((q * 8, k, v), 1)[:, :, None]  # (4, 3, 1, 4)
    return qkv.to(dtype).requires_grad_(), torch.tensor([1.0, 0, 1, 1], requires_grad=True)


@pytest.mark.parametrize('gap', [1.0, 14.0, 40.0, 120.0])
@pytest.mark.parametrize(
    'dtype', [pytest.param(torch.float16, marks=half_on_cpu), torch.bfloat16, torch.float32, torch.float64]
)
def test_an_inactive_token_that_outscores_the_others_spoils_no_gradient(gap, dtype):
    qkv, weight = outscored(gap, dtype)
    attend(qkv, [4], weight).float().sum().backward()
    reference, seen = outscored(gap, torch.float64)
    attend_reference(reference, [4], seen).sum().backward()
    error = {torch.float16: 2e-2, torch.bfloat16: 6e-2}.get(dtype, 1e-4)
    torch.testing.assert_close(qkv.grad.double(), reference.grad, rtol=error, atol=error)
    torch.testing.assert_close(weight.grad, seen.grad, rtol=5e-2, atol=5e-2)
    assert 0 < weight.grad[1].abs() < 4 * 4 * 2 * attention.MAX_ODDS  # rows * columns * distance of values * odds


def test_a_weights_gradient_is_exact_until_its_token_has_a_hundred_times_the_others_attention():
    for gap in (0.0, 3.0):
        qkv, weight = outscored(gap, torch.float64)
        attend_reference(qkv, [4], weight).sum().backward()
        q, k, v = qkv.detach()[:, :, 0].unbind(1)
        with torch.no_grad():
            step = 1e-6
            outs = []
            for w in (0.0, step):
                e = torch.tensor([1.0, w, 1, 1], dtype=torch.float64) * (q @ k.T / 2).exp()
                outs.append((e / e.sum(-1, keepdim=True) @ v).sum())
        assert weight.grad[1].item() == pytest.approx(((outs[1] - outs[0]) / step).item(), rel=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6))
def test_images_do_not_see_each_other(lengths):
    qkv = pack(lengths).detach()
    alone = torch.cat([attend(part, [len(part)]) for part in qkv.split(lengths)])
    torch.testing.assert_close(attend(qkv, lengths), alone)


def test_dropout_of_weighted_attention_is_random_and_unbiased():
    qkv, weight = pack([8], dtype=torch.float32).detach(), torch.ones(8)
    plain = attend(qkv, [8], weight)
    mean = torch.stack([attend(qkv, [8], weight, dropout=0.2) for _ in range(2000)]).mean(0)
    assert not torch.equal(attend(qkv, [8], weight, dropout=0.2), plain)
    torch.testing.assert_close(mean, plain, rtol=0.1, atol=0.05)


def test_drop_path_tosses_one_coin_an_image():
    image = torch.arange(200).repeat_interleave(3)
    out = drop_path(torch.ones(600, 4), image, 200, 0.25).view(200, 12)
    assert (out == out[:, :1]).all()
    assert set(out[:, 0].tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert 100 < (out[:, 0] > 0).sum() < 190


def test_variable_length_kernel_is_called_with_the_packs_rows(monkeypatch):
    """Without a GPU: what the kernel gets, played by a stand-in that does what its documentation says."""
    calls = []

    def stand_in(q, k, v, cu_q, cu_k, max_q, max_k):
        calls.append((cu_q.tolist(), max_q))
        parts = torch.stack((q, k, v), 1).tensor_split(cu_q[1:-1].long())
        return torch.cat([attend_reference(part, [len(part)]) for part in parts])

    monkeypatch.setattr(attention, 'varlen_attn', stand_in)
    monkeypatch.setattr(attention, 'has_varlen', lambda qkv: True)
    lengths = [2, 5, 1]
    qkv = pack(lengths)
    out = attend(qkv, lengths, cu_seqlens=torch.tensor([0, 2, 7, 8], dtype=torch.int32))
    assert calls == [([0, 2, 7, 8], 5)]
    torch.testing.assert_close(out, attend_reference(qkv, lengths))


@pytest.mark.parametrize('scales', [(16, 32), (16, 32, 64)])
def test_a_model_calls_the_variable_length_kernel_with_its_own_rows(scales, monkeypatch):
    """A batch of unlike images: in evaluation and on active tokens, not where inactive ones have to be weighed."""
    calls = []

    def stand_in(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
        calls.append((cu_seq_q.tolist(), cu_seq_k.tolist(), cu_seq_q.dtype, max_q, max_k, query.shape[0]))
        assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
        parts = torch.stack((query, key, value), 1).tensor_split(cu_seq_q[1:-1].long())
        return torch.cat([attend_reference(part, [len(part)]) for part in parts])

    if attention.varlen_attn is not None:
        names = [name for name in inspect.signature(attention.varlen_attn).parameters]
        assert names[:7] == [name for name in inspect.signature(stand_in).parameters]
    model = build_msvit(scales=scales, num_register_tokens=2, gate=dict(type='MLPGate', init_coarse=0.5))
    logits = torch.full((4, 2, 3), 9.0)
    logits[1:3], logits[3, 0] = -9, -9  # all coarse, twice all fine, mixed
    force_logits(model, logits)
    for gate in model.gates[1:]:
        gate.register_forward_hook(lambda module, args, out: 9 * logits[:, :1, :2].sign() + out - out.detach())
    images = torch.randn(4, 3, 64, 96)
    for mode in ('active', 'eval', 'trimmed'):
        model.train(mode != 'eval')
        model.select.train_tokens = mode if mode != 'eval' else 'active'
        grads = []
        for has in (False, True):
            monkeypatch.setattr(attention, 'has_varlen', lambda qkv, has=has: has)
            monkeypatch.setattr(attention, 'varlen_attn', stand_in)
            model.zero_grad()
            torch.manual_seed(0)
            with record_tokens(model) as seen:
                outputs = model(images)
            sum(out.square().mean() for out in outputs).backward()
            model._gated = ()
            grads.append([*outputs, *(p.grad for p in model.layers.parameters())])
        torch.testing.assert_close(*grads)
        tokens = seen[0][0]
        if mode == 'trimmed':
            assert not calls
            continue
        assert len(set(tokens.lengths)) > 2 and sum(tokens.lengths) == len(tokens.level)
        begins = [sum(tokens.lengths[:i]) for i in range(5)]
        longest = max(tokens.lengths)
        assert calls == [(begins, begins, torch.int32, longest, longest, begins[-1])] * len(model.layers)
        calls.clear()
