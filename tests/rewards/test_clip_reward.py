"""CLIP score equals open_clip's own, loads every kind of weights safely, and says what is missing."""

from __future__ import annotations

import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny_clip import as_pil, pictures, registered, tiny_model, write_folder

from diffplug import rewards
from diffplug.rewards.clip import ClipReward
from diffplug.rewards.networks import clip_network
from diffplug.rewards.networks.checkpoints import read_weights

open_clip = pytest.importorskip("open_clip")
PROMPTS = ["a red circle", "two dogs", "a red circle"]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, model: Any) -> Path:
    return write_folder(tmp_path_factory.mktemp("clip") / "tiny", model)


@pytest.fixture(scope="module")
def reward(folder: Path) -> ClipReward:
    return ClipReward(str(folder))


def open_clips_own(folder: Path, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    name = f"local-dir:{folder}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    with torch.no_grad():
        inputs = torch.stack([transform(picture) for picture in as_pil(images)])
        image = model.eval().encode_image(inputs, normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(name)(prompts), normalize=True)
    return (image * text).sum(-1)


@pytest.mark.contract
def test_it_is_open_clips_cosine(folder: Path, reward: ClipReward) -> None:
    images = pictures()
    scores = reward(images, PROMPTS)
    theirs = open_clips_own(folder, images, PROMPTS)
    assert scores.dtype == torch.float64 and scores.shape == (3,)
    assert torch.allclose(scores, theirs.double(), atol=5e-3)
    assert theirs.std() > 0.02  # or the comparison above would say nothing


@pytest.mark.law
@settings(max_examples=15, deadline=None)
@given(n=st.integers(0, 7), batch=st.integers(1, 8), seed=st.integers(0, 3))
def test_batches_do_not_matter(reward: ClipReward, n: int, batch: int, seed: int) -> None:
    images, prompts = pictures(max(n, 1), seed=seed)[:n], [f"thing {i % 3}" for i in range(n)]
    reward.batch = batch
    together = reward(images, prompts)
    alone = [reward(images[i : i + 1], prompts[i : i + 1]) for i in range(n)]
    assert together.shape == (n,)
    assert torch.allclose(together, torch.cat([*alone, torch.zeros(0, dtype=torch.float64)]), atol=1e-6)


def test_the_graph_is_kept_for_pictures_that_want_it(reward: ClipReward) -> None:
    images = pictures().requires_grad_()
    assert reward.differentiable
    reward(images, PROMPTS).sum().backward()
    assert images.grad is not None and images.grad.isfinite().all() and images.grad.abs().max() > 0
    assert not reward(pictures(), PROMPTS).requires_grad
    with torch.no_grad():
        assert not reward(images, PROMPTS).requires_grad
    assert all(p.grad is None and not p.requires_grad for p in reward.network().parameters())


@pytest.mark.law
def test_the_gradient_is_that_of_the_score(reward: ClipReward) -> None:
    images = (0.25 + 0.5 * pictures(1)).requires_grad_()  # nothing is clamped there
    direction = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    (slope,) = torch.autograd.grad(reward(images, ["a"]).sum(), images)
    step = 0.3 / direction.norm()
    ahead, behind = (reward(images.detach() + s * step * direction, ["a"]) for s in (1, -1))
    assert torch.allclose(
        (ahead - behind) / 2, (slope * direction).sum().double() * step, rtol=0.05, atol=1e-6
    )


def test_texts_are_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = ClipReward(str(folder), dtype="bfloat16")  # a network of its own, with nothing encoded yet
    network: Any = reward.network()
    encode, seen = network.text_features.encode, []
    monkeypatch.setattr(network.text_features, "encode", lambda texts: seen.append(texts) or encode(texts))
    with torch.inference_mode():
        reward(pictures(), PROMPTS)
    assert reward(pictures().requires_grad_(), PROMPTS).requires_grad
    assert seen == [["a red circle", "two dogs"]]


def test_equal_settings_share_one_network(folder: Path) -> None:
    first, second = ClipReward(str(folder)), ClipReward(str(folder), batch=3)
    assert first.network() is second.network()
    assert ClipReward(str(folder), dtype="float16").network() is not first.network()


def test_nothing_loads_before_the_first_score(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clip_network, "import_open_clip", lambda: pytest.fail("loaded too early"))
    assert rewards.get("clip:ViT-B-16/openai").differentiable


@pytest.mark.parametrize("kind", ["safetensors", "plain", "state_dict", "module", "legacy"])
def test_weights_from_a_file(tmp_path: Path, model: Any, reward: ClipReward, kind: str) -> None:
    state = {key: value.contiguous() for key, value in model.state_dict().items()}
    path = tmp_path / f"weights.{'safetensors' if kind == 'safetensors' else 'pt'}"
    if kind == "safetensors":
        save_file(state, path)
    elif kind in ("plain", "legacy"):
        torch.save(state, path, _use_new_zipfile_serialization=kind == "plain")
    else:
        prefix = "module." if kind == "module" else ""
        torch.save({"epoch": 3, "state_dict": {prefix + k: v for k, v in state.items()}}, path)
    loaded = rewards.get(f"clip:{registered()}/{path}")
    network, wanted = loaded.network(), reward.network()  # type: ignore[attr-defined]
    for key, value in wanted.model.state_dict().items():
        assert torch.equal(network.model.state_dict()[key], value)
    assert loaded(pictures(), PROMPTS).shape == (3,)


class Evil:
    """What a pickle can do when it is loaded carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def bad_file(kind: str, path: Path, state: dict[str, torch.Tensor]) -> None:
    if kind == "code":
        torch.save({**state, "evil": Evil(path.with_name("hacked"))}, path)
    elif kind == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-2000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "garbage":
        path.write_bytes(b"<html>not found</html>")
    elif kind == "list":
        torch.save([1, 2], path)
    elif kind == "layout":
        torch.save({"unet." + key: value for key, value in state.items()}, path)
    elif kind == "shape":
        torch.save({**state, "visual.proj": torch.zeros(3, 3)}, path)
    elif kind == "part":
        torch.save({key: value for key, value in state.items() if key != "ln_final.bias"}, path)


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("code", "cannot be read as plain weights"),
        ("truncated", "cannot be read as plain weights"),
        ("empty", "cannot be read as plain weights"),
        ("garbage", "cannot be read as plain weights"),
        ("list", "holds a list, expected tensors by name"),
        ("layout", "holds another layout.*missing.*unexpected"),
        ("shape", r"visual.proj is \[3, 3\] instead of \[32, 16\]"),
        ("part", "1 missing .ln_final.bias.*give the file of the public checkpoint"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, model: Any, kind: str, told: str) -> None:
    path = tmp_path / "bad.pt"
    bad_file(kind, path, model.state_dict())
    with pytest.raises(ValueError, match=told) as caught:
        ClipReward(registered(), str(path))(pictures(), PROMPTS)
    assert "bad.pt" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "hacked").exists()


@settings(max_examples=60, deadline=None)
@given(share=st.floats(0, 1, exclude_max=True), kind=st.sampled_from(["zip", "legacy", "safetensors"]))
def test_a_file_cut_anywhere_is_refused(share: float, kind: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"cut.{'safetensors' if kind == 'safetensors' else 'pt'}"
        state = {"a.weight": torch.ones(5, 7), "a.bias": torch.zeros(5)}
        if kind == "safetensors":
            save_file(state, path)
        else:
            torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match="cut[.].*cannot be read as plain weights"):
            read_weights(path, "test")


def test_a_truncated_safetensors_file(tmp_path: Path, model: Any) -> None:
    folder = write_folder(tmp_path / "cut", model)
    file = folder / "open_clip_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="open_clip_model.safetensors' cannot be read.*Download it again"):
        ClipReward(str(folder))(pictures(), PROMPTS)


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda f: (f / "open_clip_config.json").unlink(), "holds no open_clip_config.json"),
        (lambda f: (f / "open_clip_config.json").write_text("{}"), "has no 'model_cfg'"),
        (lambda f: (f / "open_clip_config.json").write_text("{"), "is not valid JSON"),
        (lambda f: (f / "open_clip_model.safetensors").unlink(), "holds no weights, expected one of"),
    ],
)
def test_a_folder_that_is_not_whole(tmp_path: Path, model: Any, spoil: Any, told: str) -> None:
    spoil(folder := write_folder(tmp_path / "part", model))
    with pytest.raises(ValueError, match=told):
        ClipReward(str(folder))(pictures(), PROMPTS)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("clip:ViT-B-23/openai", "unknown CLIP model 'ViT-B-23'. Did you mean"),
        ("clip:ViT-B-32/opnai", "unknown weights of CLIP model ViT-B-32: 'opnai'. Did you mean 'openai'"),
        ("clip:ViT-B-32", "CLIP model 'ViT-B-32' needs weights: add a tag .openai, "),
    ],
)
def test_unknown_models_and_tags(spec: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        rewards.get(spec)(pictures(), PROMPTS)


def test_a_tag_brings_the_activation_it_was_trained_with(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def create_model(name: str, **options: Any) -> Any:
        asked.append((name, options["pretrained"], options["force_quick_gelu"]))
        logging.error("no connection")
        raise RuntimeError("no connection")

    monkeypatch.setattr(open_clip, "create_model", create_model)
    for spec in ("clip:ViT-B-32/openai", "clip:ViT-B-32/laion2b_s34b_b79k"):
        with pytest.raises(ValueError, match="did not come .no connection.. Run once with a connection, or"):
            rewards.get(spec)(pictures(), PROMPTS)
        assert not caplog.records  # open_clip logs what it raises as well
    assert asked == [("ViT-B-32", "openai", True), ("ViT-B-32", "laion2b_s34b_b79k", False)]


def test_without_open_clip_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_clip", None)
    for name in ("clip", "hps"):
        with pytest.raises(ModuleNotFoundError, match=r'pip install "diffplug\[clip\]"'):
            rewards.get(name)(pictures(), PROMPTS)


def test_bad_pictures_and_settings(reward: ClipReward, folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"images must be floats \[n, 3, h, w\] in \[0, 1\], got torch.uint8"
    ):
        reward(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["a"])
    with pytest.raises(ValueError, match="1 images and 2 prompts"):
        reward(torch.zeros(1, 3, 8, 8), ["a", "b"])
    with pytest.raises(ValueError, match="batch is 0"):
        ClipReward(str(folder), batch=0)
    with pytest.raises(ValueError, match="dtype is 'int8': take one of float32, float16, bfloat16"):
        ClipReward(str(folder), dtype="int8")


def test_out_of_memory_halves_the_batch(reward: ClipReward) -> None:
    from diffplug.rewards.networks import in_batches

    sizes = []

    def network(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        sizes.append(len(images))
        if len(images) > 2:
            raise torch.OutOfMemoryError("full")
        return images.mean((1, 2, 3))

    images = pictures(5)
    assert torch.equal(in_batches(network, images, list("abcde"), 5), images.mean((1, 2, 3)))
    assert sizes == [5, 3, 2, 2, 1]


def test_making_a_network_leaves_random_numbers_alone(folder: Path) -> None:
    before = torch.manual_seed(3).get_state()
    ClipReward(str(folder), dtype="float16").network()
    assert torch.equal(torch.get_rng_state(), before)
