"""Muon's update of one matrix, against exact linear algebra and the published formulas."""

import pytest
import torch

from bov_megatron.optim import muon
from bov_megatron.parallel.parameter import fuse, unfuse

SHAPES = [(64, 64), (96, 32), (32, 96), (4, 12)]


def polar_express(matrix):
    return muon.polar_express(matrix[None])[0]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_polar_express_finds_the_orthogonal_factor(shape):
    # Conditioned such that five iterations suffice: singular values between 0.05 and 1.
    rank = min(shape)
    u, _ = torch.linalg.qr(random(shape[0], rank))
    v, _ = torch.linalg.qr(random(shape[1], rank, seed=1))
    matrix = u @ torch.diag(torch.linspace(0.05, 1, rank)) @ v.T * 3e-4
    found = polar_express(matrix)
    assert found.dtype == torch.bfloat16
    values = torch.linalg.svdvals(found.float())
    assert values.min() > 0.7 and values.max() < 1.3
    exact = u @ v.T
    cosine = torch.nn.functional.cosine_similarity(found.float().flatten(), exact.flatten(), dim=0)
    assert cosine > 0.99


def test_polar_express_leaves_zero_alone():
    assert torch.equal(polar_express(torch.zeros(8, 4)), torch.zeros(8, 4, dtype=torch.bfloat16))


def test_fused_matrices_orthogonalised_together_are_another_optimizer():
    pieces = [random(32, 64), random(16, 64, seed=1) * 0.01, random(16, 64, seed=2)]
    fused = fuse(pieces, (8, 4, 4))
    apart = fuse([polar_express(piece) for piece in pieces], (8, 4, 4)).float()
    together = polar_express(fused).float()
    assert (apart - together).norm() / apart.norm() > 0.3


def test_stacked_matrices_are_updated_as_each_one_alone():
    shapes = [(96, 32), (64, 64), (96, 32), (32, 96), (96, 32)]
    directions = [random(*shape, seed=i).bfloat16() for i, shape in enumerate(shapes)]
    moments = [torch.rand(max(shape), generator=torch.Generator().manual_seed(9)) for shape in shapes]
    alone = []
    for direction, moment in zip(directions, [moment.clone() for moment in moments], strict=True):
        (update,) = muon.updates([direction], [moment], steps=5, beta2=0.9)
        alone.append((update, moment))
    together = zip(muon.updates(directions, moments, steps=5, beta2=0.9), moments, strict=True)
    for found, expected in zip(together, alone, strict=True):
        torch.testing.assert_close(
            found, expected, rtol=2e-2, atol=2e-2
        )  # products of a batch may sum in another order
    assert muon.same_shape_batches(shapes) == [[0, 2, 4], [1], [3]]
    assert muon.same_shape_batches(shapes, limit=2 * 96 * 32) == [[0, 2], [4], [1], [3]]
    assert muon.same_shape_batches(shapes, limit=1) == [[0], [2], [4], [1], [3]]


def one_by_one(direction, steps, second_moment, beta2, dtype):
    """The same with each operation written out, on one matrix, as published."""
    x = direction.to(dtype)
    x = x / (x.norm() * 1.01 + 1e-6)
    for a, b, c in muon.POLAR_EXPRESS_COEFFICIENTS[:steps]:
        if x.size(0) > x.size(1):
            gram = x.mT @ x
            x = a * x + x @ (b * gram + c * (gram @ gram))
        else:
            gram = x @ x.mT
            x = a * x + (b * gram + c * (gram @ gram)) @ x
    x, along = x.float(), 1 if x.size(0) >= x.size(1) else 0
    mean_square = x.square().mean(along)
    second_moment = second_moment.lerp(mean_square, 1 - beta2)
    scaled = x * second_moment.clamp_min(1e-10).rsqrt().unsqueeze(along)
    return scaled * (x.norm() / scaled.norm()), second_moment


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96)])
def test_update_is_the_published_one_but_for_bf16_rounding(shape):
    direction, moment = random(*shape).bfloat16(), torch.full((max(shape),), 0.01)
    exact, exact_moment = one_by_one(direction, 5, moment, 0.9, torch.float32)
    rounded, _ = one_by_one(direction, 5, moment, 0.9, torch.bfloat16)
    (found,) = muon.updates([direction], [moment], steps=5, beta2=0.9)
    assert (found - exact).norm() < 1.1 * (rounded - exact).norm() < 0.1 * exact.norm()
    assert (moment - exact_moment).norm() < 2e-2 * exact_moment.norm()


def test_split_takes_query_groups_apart():
    """Rows as Megatron's linear_qkv has them: for each group its queries, its key, its value."""
    groups, split = 3, (4, 2, 2)
    labels = torch.tensor([[g * 10 + part] for g in range(groups) for part, n in enumerate(split) for _ in range(n)])
    pieces = unfuse(labels, split)
    assert [piece.flatten().tolist() for piece in pieces] == [
        [0] * 4 + [10] * 4 + [20] * 4,
        [1] * 2 + [11] * 2 + [21] * 2,
        [2] * 2 + [12] * 2 + [22] * 2,
    ]
    assert torch.equal(fuse(pieces, split), labels)


@pytest.mark.parametrize("shape", SHAPES)
def test_variance_normalisation_keeps_the_norm_and_evens_out(shape):
    rows, columns = shape
    along = 1 if rows >= columns else 0
    uneven = random(*shape) * torch.logspace(-1, 1, shape[1 - along]).unsqueeze(along)
    second_moment = torch.zeros(muon.second_moment_size(rows, columns))
    (found,) = muon.normalize_variance(uneven[None].clone(), second_moment[None], beta2=0.9)
    torch.testing.assert_close(second_moment, 0.1 * uneven.square().mean(along))
    torch.testing.assert_close(found.norm(), uneven.norm())
    norms = found.norm(dim=along)
    torch.testing.assert_close(norms, norms.mean().expand_as(norms))


def test_cautious_decay_only_helps_the_update():
    weight = torch.tensor([1.0, 1.0, -1.0, -1.0, 1.0])
    update = torch.tensor([0.5, -0.5, 0.5, -0.5, 0.0])
    muon.cautious_update_(weight, update, torch.tensor(0.1), torch.tensor(2.0))
    torch.testing.assert_close(weight, torch.tensor([0.75, 1.05, -1.05, -0.75, 0.8]))


def test_nesterov_looks_ahead():
    gradient, buffer = torch.tensor([1.0]), torch.tensor([2.0])
    (direction,) = muon.nesterov([gradient], [buffer], momentum=0.9)
    torch.testing.assert_close(buffer, torch.tensor([1.9]))
    torch.testing.assert_close(direction, torch.tensor([0.1 * 1.0 + 0.9 * 1.9]))
    assert gradient == 1


def test_tall_matrices_take_longer_steps():
    assert muon.shape_factor(3072, 768) == 2
    assert muon.shape_factor(768, 3072) == muon.shape_factor(768, 768) == 1
