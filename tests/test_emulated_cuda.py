"""The emulated CUDA device raises and waits where CUDA does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.emulated_cuda import EmulatedTensor, emulated_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real device is here")


@pytest.fixture
def gpu():
    with emulated_cuda() as gpu:
        yield gpu


def test_factories_and_transfers(gpu):
    ones = torch.ones(2, 3, device="cuda")
    assert isinstance(ones, EmulatedTensor)
    assert ones.is_cuda
    assert str(ones.device) == "cuda:0"
    for tensor in (ones.new_zeros(2), torch.empty_like(ones), torch.arange(3, device=gpu.device),
                   torch.rand(2, device=gpu.device), torch.zeros(2).cuda()):  # fmt: skip
        assert tensor.is_cuda
    back = ones.cpu()
    assert type(back) is torch.Tensor
    assert torch.equal(back, torch.ones(2, 3))
    assert torch.zeros_like(ones, device="cpu").device.type == "cpu"
    assert ones.to("cuda") is ones
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        ones.numpy()


@pytest.mark.parametrize(
    "mixed",
    [
        lambda gpu, cpu, index: gpu + cpu,
        lambda gpu, cpu, index: torch.cat([gpu, cpu]),
        lambda gpu, cpu, index: gpu.index_select(0, index),
        lambda gpu, cpu, index: cpu[index.to("cuda")],
        lambda gpu, cpu, index: gpu.__setitem__(index, cpu),
        lambda gpu, cpu, index: cpu.mul_(gpu),
        lambda gpu, cpu, index: torch.stack([gpu.sum(), cpu.sum()]),
        lambda gpu, cpu, index: gpu.exponential_(generator=torch.Generator()),
    ],
)
def test_mixed_devices_raise(gpu, mixed):
    here, there, index = torch.ones(3), torch.ones(3, device="cuda"), torch.tensor([2, 0, 1])
    with pytest.raises(RuntimeError, match="Expected"):
        mixed(there, here, index)


def test_what_cuda_allows(gpu):
    there, index = torch.arange(4.0, device="cuda"), torch.tensor([2, 0])
    assert (there * torch.tensor(2.0)).sum().item() == 12
    assert there[index].tolist() == [2, 0]
    assert there[torch.tensor([True, False, True, False])].tolist() == [0, 2]
    there[index] = 7.0
    here = torch.zeros(4)
    here[:] = there
    assert here.tolist() == [7, 1, 7, 3]
    assert gpu.uploads.total() == 3  # the CPU's indices


@pytest.mark.parametrize(
    ("waiting", "count"),
    [
        (lambda t: t.sum().item(), 1),
        (lambda t: float(t[0]), 1),
        (lambda t: bool(t.any()), 1),
        (lambda t: t.tolist(), 1),
        (lambda t: t.cpu(), 1),
        (lambda t: t[t > 1], 1),
        (lambda t: t.nonzero(), 1),
        (lambda t: t.unique(), 1),
        (lambda t: torch.equal(t, t), 1),
        (lambda t: t.to(torch.float64).masked_fill(t > 1, 0.0).cumsum(0).argmax(), 0),
        (lambda t: t.to("cpu", non_blocking=True), 0),
        (lambda t: t.repeat_interleave(torch.ones(4, dtype=torch.long, device="cuda")), 1),
    ],
)
def test_waits_are_counted(gpu, waiting, count):
    waiting(torch.arange(4.0, device="cuda"))
    assert gpu.syncs.total() == count
    assert gpu.uploads.total() == 0


def test_uploads_are_counted(gpu):
    torch.tensor([1, 2], device="cuda")
    torch.ones(2).to("cuda")
    torch.ones(2).to("cuda", non_blocking=True)
    torch.zeros(2, device="cuda").copy_(torch.ones(2))
    assert (gpu.uploads.total(), gpu.async_uploads.total()) == (3, 1)


def test_a_copy_to_pinned_memory_arrives_when_the_host_has_waited(gpu):
    here = torch.ones(2, device="cuda").to("cpu", non_blocking=True)
    assert here.isnan().all()
    event = torch.cuda.Event()
    event.record()
    late = torch.ones(2, dtype=torch.long, device="cuda").to("cpu", non_blocking=True)
    event.synchronize()
    assert here.tolist() == [1, 1]
    assert (late < 0).all()
    torch.cuda.synchronize()
    assert late.tolist() == [1, 1]


def test_training_is_the_cpus(gpu):
    def train(device):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
        before = list(model.parameters())
        model.to(device)
        assert all(p is q for p, q in zip(model.parameters(), before, strict=True))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        for _ in range(3):
            model(torch.ones(2, 3, device=device)).square().sum().backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
        return model

    expected, actual = train("cpu"), train("cuda")
    assert gpu.syncs.total() == 0
    twin = copy.deepcopy(actual)
    for p, q, r in zip(expected.parameters(), actual.parameters(), twin.parameters(), strict=True):
        assert isinstance(r, nn.Parameter)
        assert torch.equal(p, q.cpu())
        assert torch.equal(p, r.cpu())
        r.data = r.data.to(torch.bfloat16)
        assert r.inner.dtype == torch.bfloat16


def test_indexing_by_a_mask_waits_in_the_backward_pass_too(gpu):
    weights = torch.ones(3, device="cuda", requires_grad=True)
    mask = torch.tensor([True, False, True]).to("cuda")
    weights[mask].sum().backward()
    assert weights.grad.tolist() == [1, 0, 1]
    masks = [source for source in gpu.syncs.elements() if "by a mask" in source]
    assert len(masks) == 2


def test_afterwards_there_is_no_device():
    with emulated_cuda():
        assert torch.cuda.is_available()
    assert not torch.cuda.is_available()
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
