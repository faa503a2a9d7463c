"""What must hold exactly while SaRA trains: the same gradients, the same AdamW, the rest untouched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from sara_nets import batches, copied, loss, masks, network
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffplug.training import SaRA, SaRAAdamW

pytestmark = pytest.mark.law


def _dense_gradients(model: nn.Module, inputs: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    for x in inputs:
        loss(model, x).backward()
    return {name: value.grad.clone() for name, value in model.named_parameters()}  # type: ignore[union-attr]


def _sparse(found: dict[str, Tensor], entry: Any) -> Tensor:
    return found[entry.name].reshape(-1)[entry.index.long()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("parts", [1, 3])
def test_gradients_are_the_dense_ones_to_the_bit(
    dtype: torch.dtype, layout: torch.memory_format, parts: int
) -> None:
    model = network(dtype).to(memory_format=layout)
    inputs = batches(parts, dtype)
    dense = _dense_gradients(copy.deepcopy(model), inputs)
    tuner = SaRA(model, density=0.1, include_1d=True)
    for x in inputs:
        loss(model, x).backward()
    wide = torch.promote_types(dtype, torch.float32)
    assert len(tuner.entries) >= 5
    for entry in tuner.entries:
        assert torch.equal(entry.vector.grad, _sparse(dense, entry).to(wide)), entry.key
        assert entry.weight.grad is None


def test_tied_twice_called_and_unused_weights() -> None:
    torch.manual_seed(0)
    one, unused = nn.Linear(16, 16), nn.Linear(16, 16)
    model = nn.ModuleDict({"a": one, "b": one, "unused": unused})
    x = torch.randn(8, 16)
    one(one(x)).square().mean().backward()
    dense = one.weight.grad.clone()  # type: ignore[union-attr]
    one.zero_grad()
    tuner = SaRA({"net": model}, density=0.2)
    assert [entry.name for entry in tuner.entries] == ["a.weight", "unused.weight"]
    one(one(x)).square().mean().backward()
    assert torch.equal(tuner.entries[0].vector.grad, dense.reshape(-1)[tuner.entries[0].index.long()])
    assert tuner.entries[1].vector.grad is None
    before = unused.weight.detach().clone()
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2)
    tuner.attach(optimizer)
    optimizer.step()
    assert torch.equal(unused.weight, before)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_equals_plain(reentrant: bool) -> None:
    model, x = network(torch.float32), batches(1, torch.float32)[0].requires_grad_()
    tuner = SaRA(model, density=0.1)
    loss(model, x).backward()
    plain = [entry.vector.grad.clone() for entry in tuner.entries]
    for entry in tuner.entries:
        entry.vector.grad = None
    y = x
    for layer in model:
        y = checkpoint(layer, y, use_reentrant=reentrant)
    (y - 1).square().mean().backward()
    assert all(torch.equal(e.vector.grad, g) for e, g in zip(tuner.entries, plain, strict=True))


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_adamw_on_vectors_is_dense_adamw_with_a_masked_write(decay: float) -> None:
    model, dense, inputs = network(), network(), batches(8)
    tuner = SaRA(model, density=0.1)
    chosen = masks(model, tuner.entries)
    start = copied(dense)
    one = torch.optim.AdamW(tuner.parameters(), lr=1e-2, weight_decay=decay)
    tuner.attach(one)
    other = torch.optim.AdamW(dense.parameters(), lr=1e-2, weight_decay=decay)
    for x in inputs:
        loss(model, x).backward()
        one.step()
        one.zero_grad()
        loss(dense, x).backward()
        other.step()
        other.zero_grad()
        with torch.no_grad():
            for name, value in dense.named_parameters():
                value.copy_(torch.where(chosen[name], value, start[name]))
        now = dict(dense.named_parameters())
        worst = max(float((v - now[n]).abs().max()) for n, v in model.named_parameters())
        assert worst <= 5e-15  # the differences are rounded once on the way to the weights


def test_all_entries_are_ordinary_fine_tuning() -> None:
    model, dense, inputs = network(), network(), batches(6)
    optimizer = SaRAAdamW(model, lr=1e-2, density=1.0, include_1d=True)
    other = torch.optim.AdamW(dense.parameters(), lr=1e-2, weight_decay=0.0)
    for x in inputs:
        for net, opt in ((model, optimizer), (dense, other)):
            loss(net, x).backward()
            opt.step()
            opt.zero_grad()
    now = dict(dense.named_parameters())
    assert max(float((v - now[n]).abs().max()) for n, v in model.named_parameters()) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_what_is_not_chosen_keeps_its_bits(dtype: torch.dtype) -> None:
    model = network(torch.float32).to(dtype)
    start = copied(model)
    optimizer = SaRAAdamW(
        model, lr=1e-2, density=0.1, weight_decay=0.5, rank=None if dtype == torch.float16 else 1e-2
    )
    chosen = masks(model, optimizer.tuner.entries)
    for x in batches(4, dtype):
        loss(model, x).float().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = 0
    for name, value in model.named_parameters():
        differs = value.detach() != start[name]
        assert not bool((differs & ~chosen[name]).any())
        moved += int(differs.sum())
    assert moved > 0.9 * optimizer.tuner.count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_building_changes_nothing(dtype: torch.dtype) -> None:
    model, x = network(torch.float32).to(dtype), batches(1, dtype)[0]
    before, start = loss(model, x), copied(model)
    tuner = SaRA(model, density=0.3)
    assert torch.equal(loss(model, x), before)
    tuner.write()  # also when the same values are written
    assert all(torch.equal(v, start[n]) for n, v in model.named_parameters())


def test_masters_learn_where_bfloat16_weights_cannot() -> None:
    model = nn.Linear(64, 64, bias=False).bfloat16()
    start, tuner = model.weight.detach().clone(), None
    tuner = SaRA(model, density=0.5)
    optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-5, weight_decay=0)
    tuner.attach(optimizer)
    for _ in range(100):
        model(torch.ones(2, 64, dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert int((model.weight != start).sum()) > 0.9 * tuner.count


def test_other_optimisers_and_gradient_scaling() -> None:
    model, dense, inputs = network(torch.float32), network(torch.float32), batches(3, torch.float32)
    tuner = SaRA(model, density=1.0, include_1d=True)
    one = torch.optim.SGD(tuner.parameters(), lr=1e-2, momentum=0.9)
    tuner.attach(one)
    other = torch.optim.SGD(dense.parameters(), lr=1e-2, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i, x in enumerate(inputs):
        start = copied(model)
        value = loss(model, x) * (float("inf") if i == 1 else 1.0)
        scaler.scale(value).backward()
        scaler.unscale_(one)
        scaler.step(one)
        scaler.update()
        one.zero_grad()
        if i == 1:  # an overflow: nothing moves
            assert all(torch.equal(v, start[n]) for n, v in model.named_parameters())
            continue
        loss(dense, x).backward()
        other.step()
        other.zero_grad()
    now = dict(dense.named_parameters())
    assert max(float((v - now[n]).abs().max().detach()) for n, v in model.named_parameters()) < 1e-6


def test_clipping_is_by_the_norm_of_what_is_trained() -> None:
    model, x = network(), batches(1)[0]
    tuner = SaRA(model, density=0.05)
    loss(model, x).backward()
    norm = torch.cat([e.vector.grad for e in tuner.entries]).norm()
    told = torch.nn.utils.clip_grad_norm_(tuner.parameters(), float(norm) / 2)
    after = torch.cat([e.vector.grad for e in tuner.entries]).norm()
    assert float(told) == pytest.approx(float(norm)) and float(after) == pytest.approx(
        float(norm) / 2, rel=1e-5
    )


def test_the_choice_does_not_drift_and_the_state_is_small() -> None:
    model = network(torch.float32)
    optimizer = SaRAAdamW(model, lr=5e-2, density=0.1)
    index = [entry.index.clone() for entry in optimizer.tuner.entries]
    for x in batches(5, torch.float32):
        loss(model, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(e.index, i) for e, i in zip(optimizer.tuner.entries, index, strict=True))
    moments = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if v.ndim)
    assert moments == 8 * optimizer.tuner.count


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_without_attach_the_next_forward_is_up_to_date(options: dict[str, bool]) -> None:
    model, other, inputs = network(torch.float32), network(torch.float32), batches(3, torch.float32)
    losses = []
    for net, attached in ((model, True), (other, False)):
        tuner = SaRA(net, density=0.2)
        optimizer = torch.optim.AdamW(tuner.parameters(), lr=1e-2, **options)  # type: ignore[arg-type]
        if attached:
            tuner.attach(optimizer)
        told = []
        for x in inputs:
            value = loss(net, x)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            told.append(value.detach())
        losses.append(torch.stack(told))
    assert torch.equal(*losses)
    assert losses[0].unique().numel() == 3


def test_detach_and_original() -> None:
    model, x = network(torch.float32), batches(1, torch.float32)[0]
    flags = [p.requires_grad for p in model.parameters()]
    before = loss(model, x).detach()
    optimizer = SaRAAdamW(model, lr=1e-2, density=0.2)
    loss(model, x).backward()
    optimizer.step()
    tuned = loss(model, x).detach()
    assert not torch.equal(tuned, before)
    with optimizer.tuner.original():
        assert torch.equal(loss(model, x), before)
    assert torch.equal(loss(model, x), tuned)
    optimizer.tuner.detach()
    assert [p.requires_grad for p in model.parameters()] == flags and torch.equal(loss(model, x), tuned)
    loss(model, x).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_one_weight_gradient_is_alive_at_a_time() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(32, 32, bias=False) for _ in range(12)))
    alive: list[int] = []

    def most(net: nn.Module) -> int:
        alive.clear()
        hooks = [
            p.register_post_accumulate_grad_hook(
                lambda _: alive.append(sum(q.grad is not None for q in net.parameters()))
            )
            for p in net.parameters()
        ]
        net(torch.randn(2, 32)).square().mean().backward()
        for hook in hooks:
            hook.remove()
        return max(alive)

    assert most(copy.deepcopy(model)) == 12  # all of them, when training is dense
    SaRA(model, density=0.1)
    assert most(model) <= 2
