"""guided_velocity: classifier-free guidance with an optimised scale, and the clean sample it points to."""

from typing import Any

import pytest
import torch
from evaluations import orders
from refusals import Bad, assert_refused, bad_inputs
from samples import DTYPES, NAN, nan_with_payload, normal
from tolerance import assert_as_accurate_as_torch, assert_bit_identical, assert_within_roundings
from torch import Tensor

from kvlock_kernels import guided_velocity

EACH_IMPLEMENTATION = True

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = {"B2-C3-T5-h4-w6": (2, 3, 5, 4, 6), "B1-N1": (1, 1), "B3-scalars": (3,), "B2-N4099-tail": (2, 4099)}


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    cond = normal(*shape, dtype=dtype)
    return {
        "cond": cond,
        "uncond": (0.7 * cond.float() + 0.5 * normal(*shape, seed=1)).to(dtype),
        "guidance_scale": torch.tensor([5.0, 2.5, 1.5])[: shape[0]],
        "x": normal(*shape, seed=2),
        "sigma": torch.tensor([0.9, 0.4, 0.1])[: shape[0]],
    }


def formula(
    cond: Tensor, uncond: Tensor, guidance_scale: Tensor, x: Tensor, sigma: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition, one sample after the other, in `dtype`: velocity, s*, x0."""
    results = []
    arguments = (argument.to(dtype) for argument in (cond, uncond, guidance_scale, x, sigma))
    for c, u, w, z, s in zip(*arguments, strict=True):
        s_star = (c * u).sum() / ((u * u).sum() + 1e-8)
        velocity = (1 - w) * s_star * u + w * c
        results.append((velocity, s_star, z - s * velocity))
    velocities, s_stars, x0s = (torch.stack(column) for column in zip(*results, strict=True))
    return velocities, s_stars, x0s


def in_every_order(args: dict[str, Any], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Velocities, s* and x0 by the definition in `dtype`, with the elements of each sample in several orders."""
    shape = args["cond"].shape
    velocities, s_stars, x0s = [], [], []
    for order in orders(shape[1:].numel()):
        shuffled = {name: args[name].reshape(shape[0], -1)[:, order] for name in ("cond", "uncond", "x")}
        velocity, s_star, x0 = formula(**args | shuffled, dtype=dtype)
        velocities.append(velocity[:, order.argsort()].reshape(shape))
        s_stars.append(s_star)
        x0s.append(x0[:, order.argsort()].reshape(shape))
    return velocities, s_stars, x0s


@each_dtype
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_it_is_as_accurate_as_the_formula_in_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    args = inputs(shape, dtype)
    actual = guided_velocity(**args)
    exact = formula(**args, dtype=torch.float64)
    # All rests on two sums a sample, which may be all but exact by luck; a GPU adds them up in an order of its own.
    in_dtype, in_fp32 = (in_every_order(args, kind) for kind in (dtype, torch.float32))
    assert_as_accurate_as_torch(actual.velocity, in_dtype[0], exact[0])
    assert_as_accurate_as_torch(actual.s_star, in_fp32[1], exact[1])
    assert_as_accurate_as_torch(actual.x0, in_fp32[2], exact[2])


def test_the_optimised_scale_projects_cond_on_uncond_per_sample() -> None:
    uncond = torch.tensor([[1.0, 2.0], [1.0, 0.0]])
    cond = torch.tensor([[3.0, 6.0], [4.0, 7.0]])  # 3 times the first row; 4 times the second plus an orthogonal part
    actual = guided_velocity(cond, uncond, torch.tensor(2.0), cond, torch.tensor(0.0))
    assert actual.s_star.tolist() == [3.0, 4.0]
    assert actual.velocity.tolist() == [[3.0, 6.0], [4.0, 14.0]]


def test_without_the_optimised_scale_it_is_plain_guidance() -> None:
    args = inputs((2, 3, 4))
    actual = guided_velocity(**args, optimized_scale=False)
    w = args["guidance_scale"].reshape(2, 1, 1)
    assert_within_roundings(actual.velocity, args["uncond"] + w * (args["cond"] - args["uncond"]), 4)
    assert actual.s_star.tolist() == [1.0, 1.0]


@each_dtype
def test_a_guidance_of_one_gives_cond_bit_for_bit(dtype: torch.dtype) -> None:
    args = inputs((2, 3, 4), dtype)
    args["cond"][0, 0] = nan_with_payload(dtype, 4)
    args["cond"][0, 1] = -0.0
    args["uncond"][0, 2] = NAN
    args["guidance_scale"] = torch.tensor([1.0, 5.0])
    actual = guided_velocity(**args)
    assert_bit_identical(actual.velocity[0], args["cond"][0])
    assert not torch.equal(actual.velocity[1], args["cond"][1])
    assert_bit_identical(actual.x0[0, 1:], args["x"][0, 1:] - args["sigma"][0] * args["cond"][0, 1:].float())


@each_dtype
def test_a_background_guidance_of_one_gives_cond_outside_the_mask(dtype: torch.dtype) -> None:
    args, mask = inputs((2, 3, 4, 5), dtype), normal(1, 1, 4, 5, seed=9) > 0
    everywhere = guided_velocity(**args)
    actual = guided_velocity(**args, mask=mask, background_guidance=1)
    inside = mask.expand(2, 3, 4, 5)
    assert_bit_identical(actual.velocity[~inside], args["cond"][~inside])
    assert_bit_identical(actual.velocity[inside], everywhere.velocity[inside])
    assert_bit_identical(actual.x0[inside], everywhere.x0[inside])
    assert_bit_identical(actual.s_star, everywhere.s_star)


@pytest.mark.parametrize("shape", [(1, 1, 4, 5), (2, 1, 4, 5), (4, 5)], ids=["shared", "per-sample", "frame"])
@pytest.mark.parametrize("dtype", [torch.bool, *DTYPES], ids=str)
def test_the_mask_selects_between_the_two_scales(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    args, mask = inputs((2, 3, 4, 5)), (normal(*shape, seed=9) * 0.1).to(dtype) * (normal(*shape, seed=9) > 0)
    actual = guided_velocity(**args, mask=mask, background_guidance=2.0).velocity
    inside = guided_velocity(**args).velocity
    outside = guided_velocity(**(args | {"guidance_scale": torch.tensor(2.0)})).velocity
    assert_bit_identical(actual, torch.where(mask != 0, inside, outside))
    assert not torch.equal(actual, inside) and not torch.equal(actual, outside)


@pytest.mark.parametrize("value", [0.0, 1.0], ids=["zeros", "ones"])
def test_a_constant_mask_leaves_one_of_the_two_scales(value: float) -> None:
    args = inputs((2, 3, 4))
    actual = guided_velocity(**args, mask=torch.full((3, 4), value), background_guidance=2.0)
    scale = args["guidance_scale"] if value else torch.tensor(2.0)
    for a, b in zip(actual, guided_velocity(**(args | {"guidance_scale": scale})), strict=True):
        assert_bit_identical(a, b)


@pytest.mark.parametrize(
    "shape",
    [(7, 61), (2, 1, 7, 61), (1, 3, 1, 1), (2, 3, 1, 61), (2, 1, 1, 1), ()],
    ids=["frames", "frames-per-sample", "channels", "rows-per-sample", "samples", "scalar"],
)
def test_a_broadcast_mask_is_that_of_every_element(shape: tuple[int, ...]) -> None:
    args, mask = inputs((2, 3, 7, 61)), normal(*shape, seed=9) > 0
    spelt_out = mask.expand(2, 3, 7, 61).contiguous()
    actual = guided_velocity(**args, mask=mask, background_guidance=2.0)
    for a, b in zip(actual, guided_velocity(**args, mask=spelt_out, background_guidance=2.0), strict=True):
        assert_bit_identical(a, b)


def test_a_mask_without_background_guidance_has_no_effect() -> None:
    args = inputs((2, 3, 4))
    masked, plain = guided_velocity(**args, mask=torch.zeros(4)), guided_velocity(**args)
    for a, b in zip(masked, plain, strict=True):
        assert_bit_identical(a, b)


@each_dtype
def test_without_uncond_the_velocity_is_cond_bit_for_bit(dtype: torch.dtype) -> None:
    args = inputs((2, 3, 4), dtype) | {"uncond": None}
    args["cond"][0, 0] = nan_with_payload(dtype, 4)
    for options in ({}, {"mask": torch.ones(4), "background_guidance": 3.0}):
        actual = guided_velocity(**args, **options)
        assert_bit_identical(actual.velocity, args["cond"])
        assert actual.s_star.tolist() == [1.0, 1.0]
        expected = args["x"] - args["sigma"].reshape(2, 1, 1) * args["cond"].float()
        assert_bit_identical(actual.x0[:, 1:], expected[:, 1:])


def test_a_zero_uncond_leaves_only_the_conditional_part() -> None:
    args = inputs((2, 3, 4))
    args["uncond"] = torch.zeros(2, 3, 4)
    actual = guided_velocity(**args)
    assert actual.s_star.tolist() == [0.0, 0.0]
    assert torch.equal(actual.velocity, args["guidance_scale"].reshape(2, 1, 1) * args["cond"])


def test_eps_guards_the_division() -> None:
    args = inputs((1, 2)) | {"cond": torch.ones(1, 2), "uncond": torch.ones(1, 2)}
    assert guided_velocity(**args, eps=2.0).s_star.tolist() == [0.5]


def test_x0_comes_from_the_velocity_before_it_is_rounded() -> None:
    args = inputs((2, 3, 50), torch.bfloat16)
    actual = guided_velocity(**args)
    _, _, exact = formula(**args, dtype=torch.float64)
    rounded = args["x"] - args["sigma"].reshape(2, 1, 1) * actual.velocity.float()
    assert_as_accurate_as_torch(actual.x0, in_every_order(args, torch.float32)[2], exact)
    assert (rounded - exact).abs().max() > 1e-3


def test_sigma_and_x_scale_are_shared_or_per_sample() -> None:
    args = inputs((2, 3, 4)) | {"uncond": None}
    shared, each = (torch.tensor(0.4), torch.tensor(0.9)), (torch.tensor([0.4, 0.2]), torch.tensor([0.9, 0.3]))
    for sigma, x_scale in (shared, each):
        actual = guided_velocity(**(args | {"sigma": sigma}), x_scale=x_scale).x0
        for b in range(2):
            a, s = x_scale.expand(2)[b], sigma.expand(2)[b]
            assert_within_roundings(actual[b], a * args["x"][b] - s * args["cond"][b], 2)


def test_a_shared_guidance_scale_is_that_of_every_sample() -> None:
    args = inputs((2, 3, 4))
    shared = guided_velocity(**(args | {"guidance_scale": torch.tensor(4.0)}))
    each = guided_velocity(**(args | {"guidance_scale": torch.tensor([4.0, 4.0])}))
    assert_bit_identical(shared.velocity, each.velocity)


@each_dtype
def test_two_calls_give_the_same_bits(dtype: torch.dtype) -> None:
    args = inputs((2, 4099), dtype)
    for a, b in zip(guided_velocity(**args), guided_velocity(**args), strict=True):
        assert_bit_identical(a, b)


def test_each_input_may_have_its_own_dtype() -> None:
    args = inputs((2, 50))
    args["uncond"], args["x"] = args["uncond"].bfloat16(), args["x"].half()
    actual = guided_velocity(**args)
    expected = guided_velocity(**(args | {"uncond": args["uncond"].float(), "x": args["x"].float()}))
    for a, b in zip(actual, expected, strict=True):
        assert_within_roundings(a, b, 4)


def test_samples_are_not_mixed() -> None:
    args = inputs((2, 3, 4))
    both = guided_velocity(**args)
    for b in range(2):
        alone = guided_velocity(**{name: value[b : b + 1] for name, value in args.items()})
        for a, expected in zip(both, alone, strict=True):
            assert_bit_identical(a[b : b + 1], expected)


def test_strided_tensors_give_the_bits_of_contiguous_ones() -> None:
    batch = normal(4, 3, 4, 5)
    cond, uncond = batch[::2], batch.transpose(2, 3).transpose(2, 3)[1::2]
    x = normal(2, 5, 4, 3, seed=2).permute(0, 3, 2, 1)
    assert not cond.is_contiguous() and not x.is_contiguous()
    w, sigma = torch.tensor([5.0, 2.0]), torch.tensor(0.5)
    strided = guided_velocity(cond, uncond, w, x, sigma)
    dense = guided_velocity(cond.contiguous(), uncond.contiguous(), w, x.contiguous(), sigma)
    for a, b in zip(strided, dense, strict=True):
        assert_bit_identical(a, b)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)], ids=["B0", "N0"])
def test_an_empty_input_gives_an_empty_output(shape: tuple[int, ...]) -> None:
    for options, s_star in (({}, 0.0), ({"optimized_scale": False}, 1.0)):
        actual = guided_velocity(**inputs(shape), **options)
        assert actual.velocity.shape == actual.x0.shape == shape
        assert actual.s_star.tolist() == [s_star] * shape[0]


@bad_inputs(
    Bad({"cond": None}, "cond", "NoneType None", "a tensor"),
    Bad({"cond": torch.zeros(2, 4).double()}, "cond", "dtype float64", "dtype float32"),
    Bad({"cond": torch.tensor(1.0)}, "cond", "shape []", "[B, ...]"),
    Bad({"uncond": torch.zeros(2, 3)}, "uncond", "shape [2, 3]", "the shape of cond = [2, 4]"),
    Bad({"uncond": torch.zeros(2, 4, device="meta")}, "uncond", "device meta", "device cpu"),
    Bad({"guidance_scale": 5.0}, "guidance_scale", "float 5.0", "a tensor"),
    Bad({"guidance_scale": torch.ones(3)}, "guidance_scale", "shape [3]", "[] or [2]"),
    Bad({"x": torch.zeros(1, 4)}, "x", "shape [1, 4]", "the shape of cond = [2, 4]"),
    Bad({"sigma": torch.ones(2, 1)}, "sigma", "shape [2, 1]", "[] or [2]"),
    Bad({"sigma": torch.tensor(1.0).double()}, "sigma", "dtype float64", "dtype float32"),
    Bad({"mask": torch.ones(3)}, "mask", "shape [3]", "broadcasts to [2, 4]"),
    Bad({"mask": torch.ones(4, dtype=torch.uint8)}, "mask", "dtype uint8", "dtype bool"),
    Bad({"background_guidance": 1.0}, "mask", "None", "because background_guidance acts outside it"),
    Bad({"background_guidance": NAN, "mask": torch.ones(4)}, "background_guidance", "nan", "a finite number or None"),
    Bad({"x_scale": 0.9}, "x_scale", "float 0.9", "a tensor"),
    Bad({"eps": 0.0}, "eps", "0.0", "above 0"),
    Bad({"optimized_scale": None}, "optimized_scale", "None", "True or False"),
    Bad({"optimized_scale": "no"}, "optimized_scale", "'no'", "True or False"),
)
def test_bad_inputs_are_named(bad: Bad) -> None:
    assert_refused(guided_velocity, inputs((2, 4)), bad)
