"""linear_kl against torch's own arithmetic in fp64, by hand, and in chunks."""

import math

import pytest
import torch

from grpo.kernels import linear_kl, projection


def plain(hidden, weight, teacher_hidden, teacher_weight, temperature, teacher_temperature):
    log_q = (hidden @ weight.T / temperature).log_softmax(1)
    log_p = (teacher_hidden @ teacher_weight.T / teacher_temperature).log_softmax(1)
    return (log_p.exp() * (log_p - log_q)).sum(1), (log_q.exp() * (log_q - log_p)).sum(1)


def inputs(n=7, d=3, v=11, teacher_d=5, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [(n, d), (v, d), (n, teacher_d), (v, teacher_d)]
    return [torch.randn(shape, dtype=dtype).requires_grad_(place < 2) for place, shape in enumerate(shapes)]


def test_by_hand():
    """q = (1/2, 1/2) and p = (3/4, 1/4): the teacher's logits differ by log 3, at temperature 2 by 2 log 3."""
    student = torch.zeros(1, 1, dtype=torch.float64), torch.ones(2, 1, dtype=torch.float64)
    teacher = torch.ones(1, 1, dtype=torch.float64), torch.tensor([[2 * math.log(3)], [0.0]], dtype=torch.float64)
    forward, reverse = linear_kl(*student, *teacher, teacher_temperature=2.0)
    assert forward.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), abs=1e-12)
    assert reverse.item() == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), abs=1e-12)


@pytest.mark.parametrize("chunk", [1 << 22, 22])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.3, 0.7)])
def test_values_and_gradients(monkeypatch, weights, chunk):
    monkeypatch.setitem(projection.CHUNK_ELEMENTS, "cpu", chunk)
    ours, theirs = inputs(), inputs()
    row_weights = torch.rand(7, dtype=torch.float64)
    results = []
    for tensors, pair in (
        (ours, linear_kl(*ours, temperature=0.7, teacher_temperature=0.9)),
        (theirs, plain(*theirs, 0.7, 0.9)),
    ):
        loss = sum(weight * (row_weights * kl).sum() for weight, kl in zip(weights, pair, strict=True))
        loss.backward()
        results.append((*pair, tensors[0].grad, tensors[1].grad))
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)
    assert theirs[2].grad is None
    assert ours[2].grad is None


def test_gradcheck_and_opcheck():
    tensors = inputs(n=3, v=4)
    assert torch.autograd.gradcheck(lambda h, w: linear_kl(h, w, *tensors[2:], temperature=1.3), tensors[:2])
    single = [x.detach().float().requires_grad_(x.requires_grad) for x in tensors]
    torch.library.opcheck(torch.ops.grpo.linear_kl, (*single, 1.3, 0.9))


def test_the_teacher_itself_is_at_no_distance():
    hidden, weight, *_ = inputs(dtype=torch.float32)
    forward, reverse = linear_kl(hidden, weight, hidden, weight)
    forward.sum().backward()
    assert forward.abs().max() < 1e-6
    assert reverse.abs().max() < 1e-6
    assert hidden.grad.abs().max() < 1e-6


def test_one_gradient_alone_and_half_precision():
    hidden, weight, *teacher = (x.detach().bfloat16() for x in inputs())
    forward, _ = linear_kl(hidden.requires_grad_(), weight, *teacher)
    assert forward.dtype == torch.float32
    forward.sum().backward()
    assert hidden.grad.dtype == torch.bfloat16
    assert weight.grad is None
    exact = plain(*(x.detach().double() for x in (hidden, weight, *teacher)), 1.0, 1.0)[0]
    torch.testing.assert_close(forward.double(), exact, rtol=1e-5, atol=1e-6)


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, teacher_hidden, teacher_weight = inputs()
    with pytest.raises(ValueError, match="expected"):
        linear_kl(hidden, weight, teacher_hidden, teacher_weight[:5])
    with pytest.raises(ValueError, match="temperature"):
        linear_kl(hidden, weight, teacher_hidden, teacher_weight, temperature=0.0)
