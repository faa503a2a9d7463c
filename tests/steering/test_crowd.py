"""A crowd in a loop of one's own: exact, equal to the plug, of any state, and strict about how it is used."""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffplug.noise.families import reading
from diffplug.plug import plug
from diffplug.seeds import Seeds
from diffplug.steering import (
    SVDD,
    Beam,
    BestOfN,
    Churn,
    Crowd,
    FeynmanKac,
    ImportanceSampling,
    ManySamples,
    MaskedDiffusionScheduler,
    MaskedSequencePipeline,
    Network,
    NoiseSearch,
    Scoring,
    TwoLevel,
)
from diffplug.steering.crowd.nest import Nest
from diffplug.steering.engine.history import Rows
from diffplug.testing.closed_form import mixed_chain as mixed
from diffplug.testing.tiny import tiny

STEPS = 10
Loop = Callable[[Crowd], tuple[Any, Any]]


def height(x: Tensor, prompts: list[Any]) -> Tensor:
    """Return the first coordinate."""
    return x[:, 0]


def walk(crowd: Crowd, clean: Any = None) -> Any:
    """Run a stationary chain of two coordinates, each row for itself; return the result."""
    x = crowd.normal(2)
    for i in range(crowd.steps):
        x, _ = crowd.at(i, x, clean=clean or (lambda x, out: x))
        x = 0.9 * x + 0.19**0.5 * crowd.normal(2)
    return crowd.finish(x)


def fk(**options: Any) -> FeynmanKac:
    return FeynmanKac(height, **{"particles": 8, "strength": 2.0, **options})


# ---- exactness


@pytest.mark.law
@pytest.mark.parametrize(
    "steerer",
    [
        fk(strength=0),
        FeynmanKac(lambda x, prompts: [1.0] * len(x), particles=8),
        BestOfN(height, particles=8),
    ],
    ids=["strength 0", "constant reward", "best of n"],
)
def test_what_selects_nothing_leaves_the_loop_bit_identical(steerer: Any) -> None:
    crowd = steerer.crowd(groups=3, steps=STEPS, seeds=5)
    free = SimpleNamespace(normal=steerer.crowd(groups=3, steps=STEPS, seeds=5).normal)
    x = free.normal(2)
    for _ in range(STEPS):
        x = 0.9 * x + 0.19**0.5 * free.normal(2)
    assert torch.equal(walk(crowd).state, x)


@pytest.mark.law
@pytest.mark.parametrize(
    "make",
    [
        fk,
        lambda: fk(potential="max", scoring=Scoring(at="every")),
        lambda: SVDD(height, particles=8, duplicates=4, strength=2.0),
        lambda: TwoLevel(height, particles=8, strength=2.0),
        lambda: Beam(height, particles=8),
    ],
    ids=["fk", "fk max", "svdd", "two-level", "beam"],
)
def test_groups_never_mix(make: Callable[[], Any]) -> None:
    together = walk(make().crowd(groups=3, steps=STEPS, seeds=[4, 9, 2]))
    apart = [walk(make().crowd(groups=1, steps=STEPS, seeds=[seed])) for seed in (4, 9, 2)]
    assert together.report.ancestors.ne(torch.arange(8)).any(), "nothing was selected"
    assert torch.equal(together.state, torch.cat([one.state for one in apart]))
    assert torch.equal(together.log_weights, torch.cat([one.log_weights for one in apart]))
    assert together.best_rows == [8 * g + one.best_rows[0] for g, one in enumerate(apart)]


@pytest.mark.law
@pytest.mark.parametrize("k", [4, 8])
def test_the_normaliser_of_a_mixed_chain_is_unbiased(k: int) -> None:
    free = mixed_run(ImportanceSampling(the_reward, particles=60_000, strength=mixed.STRENGTH), 1)
    z, z_error = moments((mixed.STRENGTH * free.rewards).exp().reshape(-1))
    found = mixed_run(mixed_fk(k), 6000 // k * 4)
    mean, error = moments(found.log_z.exp())
    assert abs(mean / z - 1) < 4 * (error / mean + z_error / z)
    assert float(found.report.resampled.double().sum(0).mean()) > 0.3  # selections in a run


@pytest.mark.law
def test_a_chain_whose_types_stay_behind_is_biased() -> None:
    """The check above can fail: copies of the number without the category are no particles."""
    free = mixed_run(ImportanceSampling(the_reward, particles=60_000, strength=mixed.STRENGTH), 1)
    z, _ = moments((mixed.STRENGTH * free.rewards).exp().reshape(-1))
    mean, error = moments(mixed_run(mixed_fk(4), 6000, stay=True).log_z.exp())
    assert mean / z < 0.97 and (1 - mean / z) > 4 * error / z


def the_reward(seen: Any, prompts: list[Any]) -> Tensor:
    return mixed.reward(seen[:, 0], seen[:, 1].long())


def mixed_fk(k: int) -> FeynmanKac:
    from diffplug.steering import Resampling

    return FeynmanKac(
        the_reward,
        particles=k,
        strength=mixed.STRENGTH,
        scoring=Scoring(at="every"),
        selection=Resampling(ess_threshold=0.5, islands=1),
    )


def mixed_run(steerer: Any, groups: int, *, stay: bool = False) -> Any:
    """Run the mixed chain; one generator for all rows, which is quicker than one for each."""
    crowd = steerer.crowd(groups=groups, steps=mixed.STEPS)
    noise = torch.Generator().manual_seed(groups)
    n = crowd.rows
    state = mixed.start(torch.randn(n, generator=noise), torch.rand(n, generator=noise))

    def see(state: Any, out: Any) -> Tensor:
        return torch.stack([out.x, out.chances.argmax(-1).double()], -1)

    for i, t in enumerate(range(mixed.STEPS, 0, -1)):
        before, out = state, mixed.denoised(state, t)
        state, out = crowd.at(i, state, out, clean=see)
        if stay:
            state = mixed.Mixed(state.x, before.c)
        state = mixed.step(state, out, t, torch.randn(n, generator=noise), torch.rand(n, generator=noise))
    return crowd.finish(state, clean=lambda s: torch.stack([s.x, s.c.double()], -1))


def moments(x: Tensor) -> tuple[float, float]:
    return float(x.mean()), float(x.std() / len(x) ** 0.5)


# ---- the same as the plug


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 0].mean((1, 2)) * 50


@pytest.mark.pipe
@pytest.mark.parametrize(
    "make",
    [
        lambda: FeynmanKac(redness, particles=4, strength=3.0),
        lambda: SVDD(redness, particles=4, duplicates=2, strength=3.0),
        lambda: Beam(redness, particles=4),
    ],
    ids=["fk", "svdd", "beam"],
)
def test_a_crowd_equals_the_plug_bit_for_bit(make: Callable[[], Any]) -> None:
    pipe = tiny("ddim")
    steerer = make()
    with plug(pipe, Seeds(7), steerer):
        plugged = pipe(batch_size=1, num_inference_steps=STEPS, eta=1.0, output_type="np").images
    crowd = make().crowd(groups=1, steps=STEPS, seeds=7)
    size = pipe.unet.config.sample_size
    scheduler = pipe.scheduler
    scheduler.set_timesteps(STEPS)
    x = crowd.normal(pipe.unet.config.in_channels, size, size)

    def picture(x0: Tensor) -> Tensor:
        return (x0 / 2 + 0.5).clamp(0, 1)

    def see(x: Tensor, out: Tensor) -> Tensor:
        now = reading(scheduler, t)
        return picture(now.clip(now.raw(out, x)))

    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            out = pipe.unet(x, t).sample
            x, out = crowd.at(i, x, out, clean=see)
            x = scheduler.step(out, t, x, eta=1.0, generator=crowd.generators).prev_sample
    result = crowd.finish(picture(x))
    assert (steerer.report.ancestors != torch.arange(4)).any(), "nothing was selected"
    assert torch.equal(result.report.ancestors, steerer.report.ancestors)
    assert torch.equal(result.report.final_log_weights, steerer.report.final_log_weights)
    assert torch.equal(result.report.log_z.nan_to_num(), steerer.report.log_z.nan_to_num())
    assert np.array_equal(result.best[0].permute(1, 2, 0).numpy(), plugged[0])


@pytest.mark.pipe
def test_a_loop_of_tokens_equals_the_plugged_sequence_pipeline() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Embedding(4, 16), torch.nn.Linear(16, 3))
    scheduler = MaskedDiffusionScheduler(mask_token_id=3)
    steerer = FeynmanKac(zeros, particles=8, strength=1.0, seed=3)
    pipe = MaskedSequencePipeline(network, scheduler, length=12)
    with plug(pipe, steerer):
        plugged = pipe(num_inference_steps=STEPS, generator=torch.Generator().manual_seed(1)).images
    crowd = steerer.crowd(steps=STEPS)
    generator = torch.Generator().manual_seed(1)
    scheduler.set_timesteps(STEPS)
    x = torch.full((crowd.rows, 12), 3)
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            x, out = crowd.at(i, x, network(x), clean=lambda x, out: torch.where(x == 3, out.argmax(-1), x))
            x = scheduler.step(out, t, x, generator=generator).prev_sample
    result = crowd.finish(x)
    assert torch.equal(result.report.ancestors, steerer.report.ancestors)  # type: ignore[union-attr]
    assert torch.equal(result.best, plugged)


def zeros(tokens: Tensor, prompts: list[str]) -> Tensor:
    return (tokens == 0).sum(1).double()


# ---- any state


@dataclass
class Part:
    types: Tensor
    history: list[Tensor]


Pair = namedtuple("Pair", "first second")


@pytest.mark.law
@settings(max_examples=25, deadline=None)
@given(st.integers(2, 6), st.randoms(use_true_random=False))
def test_every_tensor_of_a_nest_moves(rows: int, random: Any) -> None:
    index = torch.tensor([random.randrange(rows) for _ in range(rows)])
    mark = torch.arange(rows)
    state = {
        "x": mark.double()[:, None],
        "deep": (Part(mark, [mark + 1, mark[:, None, None]]), None, 3.5, "text"),
        "pair": Pair(mark.numpy(), {"table": torch.zeros(99)}),
    }
    moved = Nest(rows, ("state.pair.1.table",)).moved(state, Rows(index), "state")
    assert torch.equal(moved["x"][:, 0].long(), index)
    part = moved["deep"][0]
    assert torch.equal(part.types, index) and torch.equal(part.history[0], index + 1)
    assert torch.equal(part.history[1][:, 0, 0], index) and moved["deep"][1:] == (None, 3.5, "text")
    assert np.array_equal(moved["pair"].first, index.numpy()) and len(moved["pair"].second["table"]) == 99
    assert torch.equal(state["x"][:, 0].long(), mark), "the old state was written into"


@pytest.mark.parametrize(
    ("state", "path"),
    [
        ({"x": torch.zeros(3, 2)}, "state.x has first size 3, but the crowd has 8 rows"),
        ((torch.zeros(8), [torch.zeros(())]), "state.1.0 has no first size"),
        ({"net": torch.nn.Linear(1, 1)}, "state.net is a Linear, which a crowd cannot move"),
        ({"names": {"a", "b"}}, "state.names is a set"),
    ],
)
def test_what_cannot_move_is_refused_with_its_path(state: Any, path: str) -> None:
    with pytest.raises(ValueError, match=path):
        fk().crowd(steps=3).at(0, state, clean=lambda s, o: s)


def test_shared_parts_stay_and_bad_paths_are_refused() -> None:
    crowd = fk().crowd(steps=1, shared=("state.table", "out"))
    x = {"x": torch.zeros(8, 1), "table": torch.zeros(3)}
    state, out = crowd.at(0, x, object(), clean=lambda s, o: s["x"])
    assert state["table"] is x["table"] and isinstance(out, object)
    with pytest.raises(ValueError, match="shared path 'table': begin with 'state' or 'out'"):
        fk().crowd(steps=1, shared=("table",))
    with pytest.raises(ValueError, match="give a list of paths"):
        fk().crowd(steps=1, shared="state.table")


# ---- graphs of different size


def graphs(sizes: list[int]) -> dict[str, Tensor]:
    """Return rings of these sizes, flat; nodes and edges carry the number of their graph and place."""
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    starts = np.cumsum([0, *sizes[:-1]])
    ring = [(s + i, s + (i + 1) % n) for s, n in zip(starts, sizes, strict=True) for i in range(n)]
    place = torch.cat([torch.arange(n) for n in sizes])
    return {
        "x": torch.stack([owner, place], -1).double(),
        "edge_index": torch.tensor(ring).T,
        "edge_attr": owner[torch.tensor(ring)[:, 0]],
        "y": torch.arange(len(sizes)),
        "batch": owner,
    }


@pytest.mark.law
def test_ragged_graphs_move_whole() -> None:
    crowd = fk(particles=4).crowd(steps=1)
    with pytest.warns(
        UserWarning, match="the graphs of group 0 have 2 to 5 nodes, so selection chooses sizes"
    ):
        state = crowd.ragged(graphs([3, 5, 2, 4]), graphs=("y",))
    moved = state.moved(torch.tensor([1, 1, 3, 0]))
    assert moved.sizes.tolist() == [5, 5, 4, 3] and moved["y"].tolist() == [1, 1, 3, 0]
    assert moved["x"][:, 0].tolist() == [1.0] * 10 + [3.0] * 4 + [0.0] * 3
    assert moved["edge_attr"].tolist() == [1] * 10 + [3] * 4 + [0] * 3
    starts = torch.tensor([0, 5, 10, 14])[moved.batch]
    assert torch.equal(moved["x"][:, 1].long(), torch.arange(17) - starts)
    one, other = moved.edges
    assert torch.equal(moved.batch[one], moved.batch[other])
    ahead = (moved["x"][one, 1] + 1) % moved.sizes[moved.batch[one]]
    assert torch.equal(ahead, moved["x"][other, 1])


@pytest.mark.law
def test_a_ragged_loop_is_the_padded_loop() -> None:
    """Rings of one size, flat or as rows of a tensor, are steered alike."""
    rows = fk(particles=4).crowd(groups=2, steps=STEPS, seeds=3)
    padded = rows.normal(3)
    for i in range(STEPS):
        padded, _ = rows.at(i, padded, clean=lambda x, out: x)
        padded = 0.9 * padded + 0.4 * rows.normal(3)
    flat = fk(particles=4).crowd(groups=2, steps=STEPS, seeds=3)
    state = flat.ragged({"x": flat.normal(3).flatten(), "batch": torch.arange(8).repeat_interleave(3)})
    for i in range(STEPS):
        state, out = flat.at(
            i, state, state.like(twice=2 * state["x"]), clean=lambda s, out: s["x"].view(8, 3)
        )
        assert torch.equal(out["twice"], 2 * state["x"])
        state = state.updated(x=0.9 * state["x"] + 0.4 * flat.normal(3).flatten())
    found = flat.finish(state, clean=lambda s: s["x"].view(8, 3))
    assert torch.equal(found.all, padded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": None}, "a ragged state needs 'batch'"),
        ({"x": torch.zeros(3)}, "ragged 'x' has first size 3, but there are 14 nodes"),
        ({"edge_attr": torch.zeros(2)}, "ragged 'edge_attr' has first size 2, but there are 14 edges"),
        ({"batch": torch.arange(14)}, "counts graphs up to 13, but the crowd has 4 rows"),
        ({"batch": torch.tensor([0, 2] * 7)}, "must rise"),
        ({"smiles": ["C"] * 4}, "ragged 'smiles' is no tensor"),
        ({"edge_index": torch.tensor([[0] * 14, [13] * 14])}, "joins nodes of two graphs"),
    ],
)
def test_a_ragged_batch_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    batch = {k: v for k, v in (graphs([3, 5, 2, 4]) | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        fk(particles=4).crowd(steps=1).ragged(batch, graphs=("y",))


# ---- how it is used


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([0, 0], r"crowd.at\(0, ...\) comes twice"),
        ([0, 2], r"crowd.at\(2, ...\) skips step 1"),
        ([1], r"crowd.at\(1, ...\) skips step 0"),
        ([0, 1, 2, 3], r"crowd.at\(3, ...\) is past the end: the crowd was made for steps=3"),
    ],
)
def test_steps_come_once_and_in_order(order: list[int], message: str) -> None:
    crowd = fk().crowd(steps=3)
    with pytest.raises(ValueError, match=message):
        for i in order:
            crowd.at(i, crowd.normal(1), clean=lambda s, o: s)


def test_the_end_comes_once_and_last() -> None:
    crowd = fk().crowd(steps=3)
    with pytest.raises(ValueError, match="crowd.finish after 0 of 3 steps"):
        crowd.finish(crowd.normal(1))
    for i in range(3):
        crowd.at(i, crowd.normal(1), clean=lambda s, o: s)
    crowd.finish(crowd.normal(1))
    with pytest.raises(ValueError, match="crowd.finish comes twice"):
        crowd.finish(crowd.normal(1))
    with pytest.raises(ValueError, match="this crowd has finished"):
        crowd.at(0, crowd.normal(1), clean=lambda s, o: s)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda x: x[:5], "clean returned 5 things at step 2 of 10, it must return 8"),
        (lambda x: (row for row in x), "clean returned generator at step 2 of 10, it must return 8"),
    ],
)
def test_clean_returns_one_thing_for_each_row(made: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        walk(fk(scoring=Scoring(at=(0.1,))).crowd(steps=STEPS), lambda x, out: made(x))


def test_the_reward_names_the_particle_that_breaks_it() -> None:
    def fragile(things: list[int], prompts: list[str]) -> list[float]:
        if 11 in things:
            raise RuntimeError("no such thing")
        return [0.0] * len(things)

    crowd = FeynmanKac(fragile, particles=8).crowd(groups=2, steps=STEPS)
    with pytest.raises(ValueError, match="at step 3 of 10, particle 3 of prompt 1: RuntimeError: no such"):
        walk(crowd, lambda x, out: list(range(16)))


def test_labels_reach_the_reward() -> None:
    seen: list[Any] = []

    def note(things: Any, labels: list[Any]) -> list[float]:
        seen.append(labels)
        return [0.0] * len(things)

    walk(FeynmanKac(note, particles=2).crowd(groups=2, steps=STEPS, prompts=[{"logp": 1}, "text"]))
    assert seen[0] == [{"logp": 1}] * 2 + ["text"] * 2


def test_a_step_without_noise_is_told_once_and_refused_by_svdd() -> None:
    def still(crowd: Crowd) -> None:
        x = crowd.normal(2)
        for i in range(STEPS):
            x, _ = crowd.at(i, x, clean=lambda x, out: x)
            x = 0.9 * x
        crowd.finish(x)

    with pytest.warns(
        UserWarning, match="the loop added no noise after a selection.*call crowd.at before"
    ) as said:
        still(fk(scoring=Scoring(at="every"), strength=9.0).crowd(steps=STEPS))
    assert len(said) == 1
    with pytest.raises(ValueError, match="all candidates of a group are the same"):
        still(SVDD(height, particles=4, strength=2.0).crowd(steps=STEPS))


def test_a_loop_that_adds_noise_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        walk(fk(scoring=Scoring(at="every"), strength=9.0).crowd(groups=2, steps=STEPS))


def test_a_floor_keeps_what_has_no_reward_yet_and_the_end_does_not() -> None:
    def upper(x: Tensor, prompts: list[str]) -> Tensor:
        return torch.where(x[:, 0] > 0, x[:, 0], torch.nan)

    steerer = FeynmanKac(upper, particles=8, strength=2.0)
    floored = walk(steerer.crowd(steps=STEPS, floor=-3.0))
    assert floored.report.rewards.min() == -3.0 and bool(torch.isfinite(floored.report.rewards).all())
    assert floored.log_weights[0].isinf().equal(floored.state[:, 0] <= 0)
    dead = walk(steerer.crowd(steps=STEPS))
    assert bool(dead.report.rewards.isinf().any())


def test_only_weights_can_be_drawn_by() -> None:
    assert walk(fk().crowd(groups=2, steps=STEPS)).sample.shape == (2, 2)
    for rule in (BestOfN(height, particles=4), Beam(height, particles=4)):
        with pytest.raises(ValueError, match="has no weights to draw by"):
            walk(rule.crowd(steps=STEPS)).sample  # noqa: B018


def test_samples_follow_the_weights() -> None:
    result = walk(ImportanceSampling(height, particles=500, strength=50.0).crowd(groups=4, steps=2))
    assert (result.sample[:, 0] > 2).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fk().crowd(steps=0), "steps=0: it must be a whole number"),
        (lambda: fk().crowd(groups=0, steps=1), "groups=0: it must be a whole number"),
        (lambda: fk().crowd(groups=3, steps=1, seeds=[1, 2]), "2 seeds for 3 groups"),
        (lambda: fk().crowd(steps=1, seeds=-1), "A seed is an integer from 0"),
        (lambda: fk().crowd(groups=2, steps=1, prompts=["one"]), "1 prompts for 2 groups"),
        (lambda: fk().crowd(steps=1, floor=float("nan")), "floor=nan: give a finite reward"),
        (
            lambda: fk(proposal=Churn(1.0)).crowd(steps=1),
            "changes a scheduler's step, and a loop makes its own",
        ),
        (lambda: fk(scoring=Scoring(value=ManySamples())).crowd(steps=1), "scoring.value is for pipelines"),
        (lambda: fk(network=Network(batch_size=2)).crowd(steps=1), "network=... is for pipelines"),
        (lambda: fk(returns="all").crowd(steps=1), "returns='all': a crowd's result has .best"),
        (lambda: NoiseSearch(height).crowd(steps=1), "NoiseSearch cannot steer a loop of one's own"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_idle_shared_paths_and_odd_numbers_of_groups() -> None:
    crowd = fk().crowd(steps=1, shared=("state.tabel",))
    state = {"x": crowd.normal(1), "table": 3}
    state, _ = crowd.at(0, state, clean=lambda state, out: state["x"])
    with pytest.warns(UserWarning, match="shared path 'state.tabel' named nothing"):
        crowd.finish(state, clean=lambda state: state["x"])
    for groups in (1.5, "2", 0):
        with pytest.raises(ValueError, match="groups=.*whole number"):
            fk().crowd(steps=1, groups=groups)  # type: ignore[arg-type]
