"""The laws of samplers: what any Diffusers scheduler has to hold to be trusted inside a pipeline.

    check_sampler(MyScheduler)                                     AssertionError names the law that broke
    check_sampler(lambda steps, **config: MyScheduler(table(steps), **config))
    @pytest.mark.parametrize("law", SAMPLER_LAWS, ids=lambda law: law.__name__)

Every law runs the sampler on `GaussianModel`, a closed-form network, on the CPU in well under a second (the
last one on a tiny pipeline). A law that does not concern a sampler (it has no `sigmas=`, no
`prediction_type`) passes.
"""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffplug.testing.closed_form.gaussian import is_flow
from diffplug.testing.sampler_runs import (
    ROWS,
    SHAPE,
    STEPS,
    Sampler,
    finish,
    first_sample,
    model,
    noise,
    permute_state,
    run,
    streams,
)

ROUNDING = 1e-6  # relative: rows of one batch may be added up in another order
Law = Callable[[Sampler], None]


def check_sampler(cls_or_factory: Callable[..., Any], laws: Iterable[Law] | None = None) -> None:
    """Run the laws (default: all) on a scheduler class or on a factory `make(steps, **config)`.

    Raises AssertionError that names the sampler and the law, also when the sampler itself raises.
    """
    name = getattr(cls_or_factory, "__name__", type(cls_or_factory).__name__)
    sampler = Sampler(cls_or_factory, name)
    for law in SAMPLER_LAWS if laws is None else laws:
        try:
            law(sampler)
        except Exception as error:
            reason = str(error) if isinstance(error, AssertionError) else f"{type(error).__name__}: {error}"
            raise AssertionError(f"{name} breaks the law {law.__name__!r}: {reason}") from error


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise AssertionError(sentence)


def _require_same(got: Tensor, wanted: Tensor, what: str, tolerance: float = 0.0) -> None:
    _require(got.shape == wanted.shape, f"{what}: shape {tuple(got.shape)} instead of {tuple(wanted.shape)}")
    off = float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())
    _require(off <= tolerance, f"{what}: relative difference {off:.3g}, allowed {tolerance:g}")


def asked_before_a_run(sampler: Sampler) -> None:
    """Before `set_timesteps` a scheduler scales its input all the same, or says what it needs."""
    scheduler, x = sampler.new(), noise()
    if not hasattr(scheduler, "scale_model_input"):
        return
    try:
        _require(scheduler.scale_model_input(x, 0).shape == x.shape, "scale_model_input changes the shape")
    except (ValueError, IndexError):
        return


def configuration_is_left_alone(sampler: Sampler) -> None:
    """A run writes nothing into the configuration, which copies, files and other pipelines share."""
    scheduler = sampler.new()
    before = copy.deepcopy(dict(scheduler.config))
    run(scheduler)
    changed = sorted(name for name, value in scheduler.config.items() if not _equal(value, before.get(name)))
    _require(not changed, f"a run changed the config of {', '.join(changed)}")


def _equal(value: Any, other: Any) -> bool:
    return bool(np.array_equal(value, other)) if isinstance(value, np.ndarray) else bool(value == other)


def flow_sigmas_end_at_one(sampler: Sampler) -> None:
    """No option of the grid tells a flow model a sigma above 1 or a time above that of pure noise."""
    if not is_flow(sampler.new()):
        return
    for option in ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        if not sampler.takes(option):
            continue
        try:
            scheduler = sampler.new(**{option: True})
            scheduler.set_timesteps(STEPS)
        except ValueError:
            continue
        highest, latest = float(scheduler.sigmas.max()), float(scheduler.timesteps.max())
        trained = scheduler.config.num_train_timesteps
        _require(highest <= 1 + 1e-6, f"{option}: sigma {highest:g}, flow models end at 1")
        _require(latest <= trained * (1 + 1e-6), f"{option}: time {latest:g} of {trained}")


def config_round_trip(sampler: Sampler) -> None:
    """Saving and loading, and from_config, give a scheduler with the same config and the same samples."""
    first = sampler.new()
    with tempfile.TemporaryDirectory() as folder:
        first.save_pretrained(folder)
        loaded = type(first).from_pretrained(folder)
    rebuilt = type(first).from_config(first.config)
    for name, copied in (("from_pretrained", loaded), ("from_config", rebuilt)):
        ours, theirs = ({k: v for k, v in s.config.items() if k[0] != "_"} for s in (first, copied))
        changed = sorted(k for k in ours if k not in theirs or theirs[k] != ours[k])
        _require(not changed, f"{name} changed the config of {', '.join(changed)}")
        _require_same(run(copied), run(sampler.new()), f"samples after {name}")


def dtype_is_kept(sampler: Sampler) -> None:
    """float16, bfloat16, float32 and float64 samples keep their type, finite; without noise, about right."""
    exact = run(sampler.new())
    noisy = not torch.equal(exact, _with_other_streams(sampler.new()))
    for dtype, tolerance in (
        (torch.float16, 0.1),
        (torch.bfloat16, 0.5),
        (torch.float32, 0.01),
        (torch.float64, 0),
    ):
        x = run(sampler.new(), noise(dtype=dtype))
        _require(x.dtype == dtype, f"{dtype} samples became {x.dtype}")
        _require(bool(x.isfinite().all()), f"{dtype} samples are not finite")
        if not noisy:
            _require_same(x, exact, f"{dtype} against float64", tolerance)


def _with_other_streams(scheduler: Any) -> Tensor:
    """The standard run with every row's random generator replaced; differs if the sampler adds noise."""
    scheduler.set_timesteps(STEPS)
    return finish(scheduler, first_sample(scheduler, noise()), streams(2 * ROWS)[ROWS:])


def runs_are_independent(sampler: Sampler) -> None:
    """A second run, also one with another number of steps before it, equals the first."""
    scheduler = sampler.new()
    first = run(scheduler)
    _require_same(run(scheduler), first, "second run")


def interrupted_run_leaves_nothing(sampler: Sampler) -> None:
    """A run that is stopped half-way does not change the next one."""
    scheduler = sampler.new()
    run(scheduler, noise(rows=ROWS + 1, seed=5), stop=STEPS // 2)
    _require_same(run(scheduler), run(sampler.new()), "run after an interrupted one")


def deep_copy_continues(sampler: Sampler) -> None:
    """A deep copy taken in the middle of a run finishes it identically, and leaves the original alone."""
    scheduler, generators = sampler.new(), streams()
    scheduler.set_timesteps(STEPS)
    half = len(scheduler.timesteps) // 2
    x = finish(scheduler, first_sample(scheduler, noise()), generators, stop=half)
    states = [g.get_state() for g in generators]
    copied = finish(copy.deepcopy(scheduler), x, generators, start=half)
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)
    _require_same(copied, finish(scheduler, x, generators, start=half), "deep copy")


def rows_do_not_mix(sampler: Sampler) -> None:
    """A sample is the same alone and in a batch."""
    together = run(sampler.new())
    for row in range(ROWS):
        alone = finish_alone(sampler.new(), row)
        _require_same(alone, together[row : row + 1], f"row {row} alone", ROUNDING)


def finish_alone(scheduler: Any, row: int) -> Tensor:
    """The run of one row of the standard batch by itself."""
    scheduler.set_timesteps(STEPS)
    x = first_sample(scheduler, noise()[row : row + 1])
    return finish(scheduler, x, streams()[row : row + 1])


def permutation_commutes(sampler: Sampler) -> None:
    """Reordering the rows of the sample and of the scheduler's state in mid-run reorders the result.

    This is what particle methods do; hidden per-sample state breaks it.
    """
    rows = torch.tensor([2, 0, 3, 1])
    wanted = run(sampler.new())[rows]
    scheduler = sampler.new()
    scheduler.set_timesteps(STEPS)
    calls = len(scheduler.timesteps)
    for at in range(1, calls):

        def reorder(
            call: int, scheduler: Any, x: Tensor, generators: list[torch.Generator], at: int = at
        ) -> Tensor:
            if call != at:
                return x
            permute_state(scheduler, rows)
            generators[:] = [generators[i] for i in rows]
            return x[rows]

        _require_same(run(sampler.new(), before=reorder), wanted, f"permuted before call {at}", ROUNDING)


def prediction_types_agree(sampler: Sampler) -> None:
    """The same model as epsilon, v and clean prediction (flow: flow and clean) gives the same samples."""
    if not sampler.takes("prediction_type"):
        return
    flow = {"use_flow_sigmas": True} if sampler.takes("use_flow_sigmas") else {}
    families: list[tuple[dict[str, Any], tuple[str, ...]]] = []
    if not is_flow(sampler.new()):
        families.append(({}, ("epsilon", "v_prediction", "sample")))
    if flow:
        families.append((flow, ("flow_prediction", "sample")))
    for config, types in families:
        results = {kind: _run_as(sampler, prediction_type=kind, **config) for kind in types}
        known = {kind: x for kind, x in results.items() if x is not None}
        for kind, x in list(known.items())[1:]:
            _require_same(x, next(iter(known.values())), f"{kind} against {next(iter(known))}", 1e-3)


def _run_as(sampler: Sampler, **config: Any) -> Tensor | None:
    """A run with this config; None where the sampler says that it does not support it."""
    try:
        scheduler = sampler.new(**config)
    except ValueError:
        return None
    try:
        return run(scheduler)
    except NotImplementedError:
        return None


def few_steps_work(sampler: Sampler) -> None:
    """Runs of one, two and three steps are finite and use as many nodes as asked."""
    for steps in (1, 2, 3):
        scheduler = sampler.new(steps)
        x = run(scheduler, steps=steps)
        _require(bool(x.isfinite().all()), f"{steps} steps: not finite")
        calls = scheduler.order * steps
        _require(
            len(scheduler.timesteps) <= calls, f"{steps} steps: {len(scheduler.timesteps)} network calls"
        )


def given_sigmas_are_used(sampler: Sampler) -> None:
    """Sigmas that a person gives are the scheduler's, bit for bit in float32; lists and arrays alike."""
    if "sigmas" not in inspect.signature(sampler.new().set_timesteps).parameters:
        return
    values = (
        [0.957, 0.811, 0.553, 0.307, 0.113] if is_flow(sampler.new()) else [11.03, 4.57, 1.73, 0.61, 0.203]
    )
    for given in (values, np.array(values)):
        scheduler = sampler.new(len(values))
        try:
            scheduler.set_timesteps(sigmas=given)
        except ValueError:
            return
        used = scheduler.sigmas[: len(values)].float().cpu()
        _require(torch.equal(used, torch.tensor(values)), f"sigmas {values} became {used.tolist()}")
        x = finish(scheduler, first_sample(scheduler, noise()), streams())
        _require(bool(x.isfinite().all()), f"sigmas {values}: not finite")


def starts_anywhere(sampler: Sampler) -> None:
    """A run that starts at a later node (img2img) from a correctly noised point mass arrives at the point.

    A scheduler that reads the levels of another node, or an empty history, ends elsewhere.
    """
    network = model(variance=0.0)
    clean = network.mean.expand(ROWS, *SHAPE)
    for begin in range(1, STEPS):
        for by_index in (True, False):
            scheduler = sampler.new()
            scheduler.set_timesteps(STEPS)
            node = begin * scheduler.order
            if by_index and hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(node)
            add_noise = getattr(scheduler, "add_noise", None) or scheduler.scale_noise
            t = scheduler.timesteps[node : node + 1].repeat(ROWS)
            x = (
                add_noise(clean, noise(), t)
                if add_noise.__name__ == "add_noise"
                else add_noise(clean, t, noise())
            )
            x = finish(scheduler, x, streams(), start=node, network=network)
            off = float((x - clean).abs().max())
            _require(off < 0.25, f"start at node {begin}: ends {off:.3g} from the point mass")


def plug_and_undo(sampler: Sampler) -> None:
    """In a tiny pipeline it makes finite pictures; afterwards the pipeline is what it was, bit for bit."""
    from diffplug.plug import plug
    from diffplug.testing import tiny

    pipe = tiny("sd3" if is_flow(sampler.new()) else "sd15")
    schedule = ("beta_start", "beta_end", "beta_schedule", "shift")
    config = {k: v for k, v in pipe.scheduler.config.items() if k in schedule and sampler.takes(k)}

    def picture() -> Tensor:
        start = torch.Generator().manual_seed(0)
        result = pipe("a red circle", num_inference_steps=3, generator=start, output_type="latent")
        return torch.as_tensor(result.images)

    scheduler, pipe_config, before = pipe.scheduler, dict(pipe.config), picture()
    with plug(pipe, sampler.new(3, **config)):
        _require(bool(picture().isfinite().all()), "pictures are not finite")
    _require(pipe.scheduler is scheduler, "the pipeline's scheduler is another object after undo")
    _require(dict(pipe.config) == pipe_config, "the pipeline's config changed")
    _require_same(picture(), before, "picture after undo")


SAMPLER_LAWS: tuple[Law, ...] = (
    config_round_trip,
    dtype_is_kept,
    runs_are_independent,
    interrupted_run_leaves_nothing,
    deep_copy_continues,
    rows_do_not_mix,
    permutation_commutes,
    prediction_types_agree,
    few_steps_work,
    given_sigmas_are_used,
    starts_anywhere,
    asked_before_a_run,
    configuration_is_left_alone,
    flow_sigmas_end_at_one,
    plug_and_undo,
)
