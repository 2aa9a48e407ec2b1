import pytest
import torch
from hypothesis import given
from torch import Tensor

import reference
from reference.cases import (
    TuckerCase,
    gaussian,
    laws,
    on_every_device,
    relative_error,
    rounding,
    stack_laws,
    tucker_cases,
)
from tdlrt.linalg import (
    TuckerTensor,
    add_product,
    fold,
    mode_product,
    multi_mode_product,
    unfold,
)


def numbered(case: TuckerCase, batch: tuple[int, ...]) -> Tensor:
    """Different tensors of one shape along batch dimensions."""
    return gaussian((*batch, *case.shape), case.seed, case.dtype)


@on_every_device
@laws
@given(case=tucker_cases())
def test_unfold_equals_its_twin_and_fold_inverts_it(device: str, case: TuckerCase) -> None:
    tensor = case.tensor(0, device)
    for mode in range(case.order):
        matrix = unfold(tensor, mode)
        assert torch.equal(matrix.cpu(), reference.unfold(tensor.cpu(), mode))
        assert torch.equal(fold(matrix, mode, case.shape), tensor)


@on_every_device
@laws
@given(case=tucker_cases())
def test_mode_product_equals_its_twin(device: str, case: TuckerCase) -> None:
    tensor = case.tensor(0, device)
    strided = tensor.transpose(0, -1).contiguous().transpose(0, -1)
    for mode, size in enumerate(case.shape):
        matrix = gaussian((size + 1, size), case.seed, case.dtype, device)
        expected = reference.mode_product(tensor.double().cpu(), matrix.double().cpu(), mode)
        for same in (tensor, strided):
            product = mode_product(same, matrix, mode)
            assert relative_error(product, expected) <= rounding(case.dtype)


@on_every_device
@laws
@given(case=tucker_cases())
def test_multi_mode_product_equals_its_twin(device: str, case: TuckerCase) -> None:
    core, factors = case.core(device), case.factors(device)
    weight = multi_mode_product(core, factors)
    expected = reference.tucker_to_dense(core.double().cpu(), [u.double().cpu() for u in factors])
    assert relative_error(weight, expected) <= rounding(case.dtype)
    back = multi_mode_product(weight, factors, transpose=True)
    assert relative_error(back, core) <= rounding(case.dtype)


@pytest.mark.parametrize("batch", [(3,), (2, 2)])
@stack_laws
@given(case=tucker_cases())
def test_batches_are_taken_member_by_member(batch: tuple[int, ...], case: TuckerCase) -> None:
    tensors = numbered(case, batch)
    strided = tensors.transpose(0, -1).contiguous().transpose(0, -1)
    members = tensors.flatten(0, len(batch) - 1)
    matrices = [gaussian((*batch, n + 1, n), case.seed + n, case.dtype) for n in case.shape]
    single = [matrix.flatten(0, len(batch) - 1) for matrix in matrices]
    for mode in range(case.order):
        unfolded = unfold(tensors, mode, len(batch))
        assert torch.equal(fold(unfolded, mode, case.shape), tensors)
        for found, member in zip(unfolded.flatten(0, len(batch) - 1), members, strict=True):
            assert torch.equal(found, unfold(member, mode))
        for same in (tensors, strided):
            product = mode_product(same, matrices[mode], mode).flatten(0, len(batch) - 1)
            expected = [mode_product(*of, mode) for of in zip(members, single[mode], strict=True)]
            assert relative_error(product, torch.stack(expected)) <= rounding(case.dtype)
    whole = multi_mode_product(tensors, matrices).flatten(0, len(batch) - 1)
    for number, found in enumerate(whole):
        expected = multi_mode_product(members[number], [matrix[number] for matrix in single])
        assert relative_error(found, expected) <= rounding(case.dtype)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_add_product_is_a_sum(batch: tuple[int, ...]) -> None:
    addend, left, right = (gaussian((*batch, *of), 0) for of in ((4, 3), (4, 2), (2, 3)))
    before = addend.clone()
    assert relative_error(add_product(addend, left, right), addend + left @ right) <= 1e-15
    found = add_product(addend, left, right, beta=1.5, alpha=-0.5)
    assert relative_error(found, 1.5 * addend - 0.5 * left @ right) <= 1e-15
    assert torch.equal(addend, before)


def test_multi_mode_product_leaves_out_skipped_and_absent_modes() -> None:
    tensor, matrix = gaussian((2, 3, 4), 0), gaussian((5, 3), 1)
    others = [gaussian((5, 2), 2), matrix, None]
    expected = reference.mode_product(tensor, matrix, 1)
    assert relative_error(multi_mode_product(tensor, others, skip=0), expected) <= 1e-14


@laws
@given(case=tucker_cases())
def test_a_tucker_tensor_has_the_norm_of_its_core(case: TuckerCase) -> None:
    tucker = TuckerTensor(case.core(), tuple(case.factors()))
    weight = tucker.to_tensor()
    assert weight.shape == case.shape
    assert tucker.ranks == case.ranks
    assert relative_error(weight.norm(), tucker.core.norm()) <= rounding(case.dtype)
