"""The choice of weights: exact counts, the same as sorting, ties in order; and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sara_nets import batches, loss, network
from torch import nn

from diffplug.training import SaRA, SaRAAdamW, activation_score, gradient_score, probe_threshold
from diffplug.training.tuners.sara.scores import score_of
from diffplug.training.tuners.sara.select import choose, choose_per_layer, parse_budget

pytestmark = pytest.mark.law


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4),
    st.integers(0, 10**6),
    st.floats(0.01, 1.0),
    st.sampled_from(["magnitude", "largest", "random"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_choice_is_that_of_sorting(
    sizes: list[int], seed: int, share: float, name: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = {
        f"t{i}": (
            torch.randn(n, 3, generator=generator)
            * 10.0 ** float(torch.randint(-6, 3, (1,), generator=generator))
        ).to(dtype)
        for i, n in enumerate(sizes)
    }
    total = sum(v.numel() for v in weights.values())
    count, score = max(1, round(share * total)), score_of(name, seed)
    found = choose(weights, score, count=count)
    flat = torch.cat([score(n, v).float().reshape(-1) for n, v in weights.items()])
    wanted = flat.sort(stable=True).indices[:count].sort().values
    starts = torch.tensor([0, *(v.numel() for v in weights.values())]).cumsum(0)
    got = torch.cat([found.index[n].long() + starts[i] for i, n in enumerate(weights)])
    assert torch.equal(got, wanted) and found.count == count
    assert found.threshold == float(flat.sort().values[count - 1])


def test_a_threshold_is_strict_and_ties_are_filled_in_order() -> None:
    weights = {"a": torch.tensor([[0.5, -1.0, 2.0]]), "b": torch.tensor([[1.0, 1.0, -0.25]])}
    below = choose(weights, score_of("magnitude"), threshold=1.0)
    assert [below.index[n].tolist() for n in "ab"] == [[0], [2]] and below.count == 2
    four = choose(weights, score_of("magnitude"), count=4)
    assert [four.index[n].tolist() for n in "ab"] == [[0, 1], [0, 2]] and four.threshold == 1.0


def test_per_layer_has_one_density_everywhere() -> None:
    weights = dict(network(torch.float32).named_parameters())
    weights = {n: v for n, v in weights.items() if v.ndim > 1}
    choice, thresholds = choose_per_layer(weights, score_of("magnitude"), 0.1)
    for name, value in weights.items():
        assert len(choice.index[name]) == int(0.1 * value.numel())
        assert thresholds[name] == float(
            value.detach().abs().flatten().sort().values[len(choice.index[name]) - 1]
        )
    tuner = SaRA(network(torch.float32), density=0.1, per_layer=True)
    assert tuner.count == sum(int(0.1 * v.numel()) for v in weights.values())


def test_sizes() -> None:
    model = network(torch.float32)
    total = sum(v.numel() for v in model.parameters() if v.ndim > 1)
    assert SaRA(network(), budget="1k").count == 1000 == SaRA(network(), budget=1000).count
    assert SaRA(model, density=0.1).count == round(0.1 * total)
    assert SaRA(network()).density == pytest.approx(0.058, abs=1e-3)
    assert SaRA(network(), density=0.1, include_1d=True).total == sum(v.numel() for v in model.parameters())
    assert [parse_budget(x) for x in ("50M", "20k", 7, "1_000")] == [50_000_000, 20_000, 7, 1000]
    assert SaRA(network(), density=0.1, include="5").entries[0].name == "5.weight"
    assert {e.name for e in SaRA(network(), density=0.5, exclude=["5", "*.bias"]).entries} == {
        "0.weight",
        "2.weight",
        "7.weight",
    }
    rate = SaRA(network(), density=0.05).learning_rate
    assert rate == pytest.approx(5.49e-4, rel=1e-2)


def test_other_scores() -> None:
    model, x = network(torch.float32), batches(1, torch.float32)[0]
    pulled = gradient_score(model, lambda: loss(model, x))
    loss(model, x).backward()
    tuner = SaRA(model, density=0.1, score=pulled)
    model = network(torch.float32)
    grads = torch.autograd.grad(loss(model, x), [p for p in model.parameters() if p.ndim > 1])
    flat = torch.cat([g.abs().flatten() for g in grads])
    least = flat.sort(descending=True).values[tuner.count - 1]
    found = {
        n: g
        for (n, _), g in zip([(n, p) for n, p in model.named_parameters() if p.ndim > 1], grads, strict=True)
    }
    chosen = torch.cat([found[e.name].reshape(-1)[e.index.long()].abs() for e in tuner.entries])
    assert float(chosen.min()) >= float(least) * (1 - 1e-6)
    seen = activation_score(model, lambda: model(x))
    weight = model[5].weight
    inputs = model[:5](x).detach()
    assert torch.allclose(seen("5.weight", weight), weight.abs() * inputs.norm(dim=0), rtol=1e-4)
    assert torch.allclose(
        seen("0.weight", model[0].weight),
        model[0].weight.abs() * x.transpose(0, 1).flatten(1).norm(dim=1).view(1, 3, 1, 1),
    )


def test_probing_leaves_the_model_and_tells_the_change() -> None:
    model, x = network(torch.float32), batches(1, torch.float32)[0]
    before = [p.detach().clone() for p in model.parameters()]
    probes = probe_threshold(model, lambda: loss(model, x), densities=(0.01, 0.5, 1.0))
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    with torch.no_grad():
        base = float(loss(model, x))
        for p in model.parameters():
            if p.ndim > 1:
                p.zero_()
        assert probes[-1].loss == pytest.approx(float(loss(model, x)))
    assert probes[-1].change == pytest.approx(probes[-1].loss / base - 1)
    assert abs(probes[0].change) < abs(probes[1].change) and [p.density for p in probes][-1] == 1.0
    assert probe_threshold(network(), lambda: 1.0, thresholds=(1e-9,))[0].change == 0.0


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, "density must be above 0 and at most 1, got 0"),
        ({"density": 1.5}, "density must be above 0 and at most 1, got 1.5"),
        ({"budget": "many"}, "budget is 'many'"),
        ({"budget": 10**9}, "the model has"),
        ({"threshold": -1.0}, "threshold must be above 0"),
        ({"threshold": 1e-30}, "nothing would be trained"),
        ({"density": 0.1, "budget": 10}, "one of density, budget and threshold"),
        ({"score": "magnitud"}, "Did you mean 'magnitude'"),
        ({"include": "7.weigth"}, "unknown tensor or block '7.weigth'"),
        ({"exclude": "*"}, "leave no tensor"),
        ({"threshold": 0.1, "per_layer": True}, "per_layer takes a density"),
        ({"progressive": 0}, "progressive is 0"),
        ({"progressive": 5, "score": "random"}, "score 'magnitude'"),
        ({"rank": -1.0}, "above 0"),
    ],
)
def test_bad_options_are_one_line(options: dict, message: str) -> None:
    model = network(torch.float32)
    with pytest.raises(ValueError, match=message) as told:
        SaRA(model, **options)
    assert "\n" not in str(told.value)
    assert all(p.requires_grad for p in model.parameters())


def test_models_it_cannot_work_with() -> None:
    with pytest.raises(ValueError, match="meta device"):
        SaRA(nn.Linear(8, 8, device="meta"))
    quantised = nn.Linear(8, 8)
    quantised.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"quantised .*int8"):
        SaRA(quantised)
    narrow = nn.Linear(8, 8)
    narrow.weight = nn.Parameter(torch.zeros(8, 8).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        SaRA(narrow)
    fused = nn.Sequential(nn.Linear(8, 8))
    fused[0].merged = True
    with pytest.raises(ValueError, match="unfuse_lora"):
        SaRA(fused)
    wrapped = type("DistributedDataParallel", (nn.Linear,), {})(8, 8)
    with pytest.raises(ValueError, match="bare model"):
        SaRA(wrapped)
    broken = nn.Linear(8, 8)
    broken.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        SaRA(broken)
    with pytest.raises(ValueError, match="holds no weights"):
        SaRA(3)  # type: ignore[arg-type]


def test_an_optimiser_of_the_dense_parameters_is_refused() -> None:
    model = network(torch.float32)
    dense = torch.optim.AdamW(model.parameters())
    tuner = SaRA(model, density=0.1)
    with pytest.raises(ValueError, match=r"dense parameters: build it on tuner.parameters"):
        tuner.attach(dense)
    with pytest.raises(ValueError, match=r"lacks \d of the \d vectors"):
        tuner.attach(torch.optim.AdamW(tuner.parameters()[:1]))


def test_a_model_compiled_as_a_whole_is_warned_of() -> None:
    model = network(torch.float32)
    with pytest.warns(UserWarning, match="compile_repeated_blocks"):
        SaRA(torch.compile(model, backend="eager"), density=0.1).detach()
    model.compile(backend="eager")
    with pytest.warns(UserWarning, match="compiled as a whole"):
        SaRA(model, density=0.1)


def test_groups_of_the_one_line_form() -> None:
    optimizer = SaRAAdamW(network(), lr=1e-3, density=0.5, groups=[{"include": "5", "lr": 1e-5}])
    assert [(len(g["params"]), g["lr"]) for g in optimizer.param_groups] == [(1, 1e-5), (3, 1e-3)]
    with pytest.raises(ValueError, match="unknown group of tensors"):
        SaRAAdamW(network(), groups=[{"include": "nothing"}])
