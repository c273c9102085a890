import numpy as np
import pytest
import torch

from moe_worker.train.optimizer import Muon, learning_rate_factor


def parameters(shape, count):
    generator = torch.Generator().manual_seed(1)
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(count)]
    for parameter in made:
        parameter.grad = torch.randn(shape, generator=generator)
    return made


@pytest.mark.parametrize("shape", [(16, 40), (40, 16)])
def test_the_update_is_the_gradient_with_its_singular_values_near_one(shape):
    (parameter,) = parameters(shape, 1)
    before, gradient = parameter.detach().clone(), parameter.grad.double().numpy()
    Muon([parameter], learning_rate=1.0).step()
    update = (before - parameter.detach()).double().numpy() / (0.2 * 40**0.5)
    left, _, right = np.linalg.svd(gradient, full_matrices=False)
    assert np.all(np.abs(np.linalg.svd(update, compute_uv=False) - 1) < 0.4)
    assert np.trace(left.T @ update @ right.T) / 16 > 0.8  # along the gradient's own directions


def test_experts_and_parameters_of_one_shape_are_updated_each_on_its_own():
    stacked = parameters((3, 16, 40), 2)
    alone = [torch.nn.Parameter(matrix.detach().clone()) for expert in stacked for matrix in expert]
    for matrix, gradient in zip(alone, (g for expert in stacked for g in expert.grad), strict=True):
        matrix.grad = gradient.clone()
    Muon(stacked, learning_rate=0.1, weight_decay=0.1).step()
    for matrix in alone:
        Muon([matrix], learning_rate=0.1, weight_decay=0.1).step()
    assert torch.allclose(torch.cat(stacked), torch.stack(alone), atol=2e-3)


def test_momentum_carries_a_gradient_over_steps_without_one():
    (parameter,) = parameters((8, 8), 1)
    optimizer = Muon([parameter], learning_rate=0.1)
    optimizer.step()
    before = parameter.detach().clone()
    parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert not torch.equal(before, parameter)


def test_the_learning_rate_warms_up_stays_and_decays_to_nearly_zero():
    factors = [learning_rate_factor(step, 100, warmup=10, decay_share=0.5) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9:51] == [1.0] * 42
    assert factors[99] == pytest.approx(0.02)
    assert sorted(factors[50:], reverse=True) == factors[50:]
