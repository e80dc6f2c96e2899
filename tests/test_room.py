"""Memory for what ATen's operations write: like `torch.empty_like` and `torch.add` to whoever uses it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from captum_dtd import native, ops, room

BIG, SMALL = (2, 8, 4, 64, 64), (1, 2, 3, 4, 5)
TYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int32)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [BIG, SMALL])
def test_room_is_laid_out_as_asked(size: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.zeros(size, dtype=dtype).contiguous(memory_format=layout)
    wanted = (size[0], size[1], 7, *size[3:])
    found = room.empty_like(x, wanted)
    assert (found.shape, found.dtype) == (wanted, dtype)
    assert found.is_contiguous(memory_format=layout)


def test_room_belongs_to_one_tensor_at_a_time() -> None:
    x = torch.zeros(BIG)
    rooms = [room.empty_like(x, BIG).fill_(number) for number in range(8)]
    view = rooms[3][1:]
    del rooms[3]
    more = [room.empty_like(x, BIG).fill_(-1) for _ in range(4)]
    assert [int(each.unique()) for each in (*rooms, view)] == [0, 1, 2, 4, 5, 6, 7, 3]
    assert all(int(each.unique()) == -1 for each in more)


@pytest.mark.parametrize("alpha", [1.0, -1.0, 0.5])
@pytest.mark.parametrize("size", [BIG, SMALL, (3, 4)])
@pytest.mark.parametrize("dtype", TYPES[:-1])
def test_sums_are_torchs(dtype: torch.dtype, size: tuple[int, ...], alpha: float) -> None:
    x, other = torch.randn(2, *size).to(dtype)
    if len(size) == 5:
        other = other.to(memory_format=torch.channels_last_3d)
    before = x.clone(), other.clone()
    assert torch.equal(room.add(x, other, alpha), torch.add(x, other, alpha=alpha))
    assert torch.equal(x, before[0]) and torch.equal(other, before[1])


@pytest.mark.parametrize(
    "other",
    [torch.tensor(2.0), torch.ones(8, 1, 1, 1), torch.ones(BIG, dtype=torch.float64), torch.ones(3, *BIG)],
    ids=["number", "broadcasts", "another type", "larger"],
)
def test_sums_of_different_tensors_are_torchs_too(other: Tensor) -> None:
    x = torch.rand(BIG)
    found, right = room.add(x, other), torch.add(x, other)
    assert found.dtype == right.dtype and torch.equal(found, right)


@pytest.mark.usefixtures("cpu_kernels")
@pytest.mark.parametrize(
    ("like", "size", "refused"),
    [
        (torch.zeros(1, 1, 1, 1, 1, dtype=torch.int64), [1, 1, 1, 1024, 1024], "must be float32.*got torch.int64"),
        (torch.zeros(1, 1, 1, 1, 1), [1024, 1024], r"size must have 5 numbers.*\[1024, 1024\]"),
        (torch.zeros(1024), [1, 1, 1, 1024, 1024], "5 dimensions"),
    ],
)
def test_the_operator_refuses_what_has_no_room(like: Tensor, size: list[int], refused: str) -> None:
    with pytest.raises(RuntimeError, match=refused):
        torch.ops.captum_dtd.room(like, size)


@pytest.mark.usefixtures("cpu_kernels")
def test_weights_are_not_changed_by_being_used_again_and_are_seen_to_change() -> None:
    """They are moved to other pages of memory, once they come a second time."""
    x, weight = torch.rand(2, 1024, 1, 1, 1), torch.randn(2048, 1024, 1, 1, 1)
    kept, right = weight.clone(), torch.einsum("nc,oc->no", x.flatten(1).double(), weight.flatten(1).double())

    def explained() -> Tensor:
        with native.unchanging([weight]):
            return ops.conv3d(x, weight, None).flatten(1)

    found = [explained() for _ in range(4)]
    assert torch.equal(weight, kept)
    assert all(torch.equal(each, found[0]) for each in found)
    torch.testing.assert_close(found[0].double(), right, rtol=1e-5, atol=1e-4)
    weight[7, 5] += 1000
    assert explained()[:, 7].allclose(found[0][:, 7] + 1000 * x[:, 5, 0, 0, 0], rtol=1e-5)
    assert torch.equal(explained()[:, 8:], found[0][:, 8:])
