"""Files of the layouts that are public load, whole and safely; the networks agree with independent ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_clip import as_pil, pictures, registered, tiny_model, write_folder
from torch import nn

from diffplug.rewards import image_reward as image_reward_module
from diffplug.rewards.aesthetic import AestheticReward, read_head
from diffplug.rewards.hps import HpsReward
from diffplug.rewards.image_reward import Head, ImageRewardNetwork, ImageRewardReward
from diffplug.rewards.networks.blip import BlipConfig, TextEncoder, VisionTransformer
from diffplug.rewards.pickscore import PickScoreReward
from diffplug.testing.tokenizers import clip_tokenizer

PROMPTS = ["a red circle", "two dogs", "a cat"]
TINY = BlipConfig(
    image_size=32,
    vision_width=32,
    vision_layers=2,
    vision_heads=4,
    text_width=24,
    text_layers=2,
    text_heads=3,
    text_inner=48,
    vocabulary=40,
    positions=40,
)


def randomised(module: nn.Module, seed: int = 0, spread: float = 0.2) -> Any:
    """The module with every parameter moved, so that no part of it does nothing."""
    noise = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data += spread * torch.randn(parameter.shape, generator=noise)
    return module.eval()


# HPS


@pytest.mark.contract
def test_hps_reads_its_layout_and_pads(tmp_path: Path) -> None:
    open_clip = pytest.importorskip("open_clip")
    from open_clip.transform import PreprocessCfg, image_transform_v2

    model = tiny_model()
    file = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 0, "state_dict": {k: v.half() for k, v in model.state_dict().items()}}, file)
    model = model.half().float()
    images = pictures(3, 50, 30)
    transform = image_transform_v2(PreprocessCfg(size=32, resize_mode="longest"), is_train=False)
    with torch.no_grad():
        image = model.encode_image(torch.stack([transform(x) for x in as_pil(images)]), normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(registered())(PROMPTS), normalize=True)
    reward = HpsReward(file, model=registered())
    assert torch.allclose(reward(images, PROMPTS), (image * text).sum(-1).double(), atol=5e-3)
    assert reward.differentiable


def test_hps_names_the_file_of_another_model(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"HPS v2.1 .diffplug-tiny.: the file '.*other.safetensors' holds anot"
    ):
        HpsReward(tmp_path / "other.safetensors", model=registered())(pictures(), PROMPTS)


@pytest.mark.contract
def test_hps_has_the_public_keys() -> None:
    open_clip = pytest.importorskip("open_clip")
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, 1024),
        "text_projection": (1024, 1024),
        "logit_scale": (),
        "token_embedding.weight": (49408, 1024),
        "visual.class_embedding": (1280,),
        "visual.positional_embedding": (257, 1280),
        "visual.proj": (1280, 1024),
        "visual.conv1.weight": (1280, 3, 14, 14),
    }
    shapes |= layer("", [], {"ln_final": 1024, "visual.ln_pre": 1280, "visual.ln_post": 1280})
    for prefix, layers, w in (("", 24, 1024), ("visual.", 32, 1280)):
        linear = [("attn.out_proj", w, w), ("mlp.c_fc", 4 * w, w), ("mlp.c_proj", w, 4 * w)]
        for i in range(layers):
            block = f"{prefix}transformer.resblocks.{i}."
            shapes |= layer(block, linear, {"ln_1": w, "ln_2": w})
            shapes |= {f"{block}attn.in_proj_weight": (3 * w, w), f"{block}attn.in_proj_bias": (3 * w,)}
    with torch.device("meta"):
        model = open_clip.create_model("ViT-H-14", device="meta")
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == shapes


# PickScore


@pytest.fixture(scope="module")
def pick_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 515, "max_position_embeddings": 20, "bos_token_id": 0, "eos_token_id": 2}
    config = CLIPConfig(
        text_config={**text, "pad_token_id": 1},
        vision_config={**sizes, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    folder = tmp_path_factory.mktemp("pick")
    randomised(CLIPModel(config)).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.contract
def test_pickscore_is_the_models_own_logit(pick_folder: Path) -> None:
    from transformers import CLIPModel

    from diffplug.rewards.networks.preprocess import Preprocess

    images = pictures(3, 40, 32)
    reward = PickScoreReward(pick_folder)
    tokens = clip_tokenizer()(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        model = CLIPModel.from_pretrained(pick_folder).eval()
        theirs = model(pixel_values=Preprocess(size=(32, 32))(images), **tokens).logits_per_image.diagonal()
    assert torch.allclose(reward(images, PROMPTS), theirs.double(), atol=1e-4)
    assert theirs.std() > 0.05
    wanting = images.clone().requires_grad_()
    reward(wanting, PROMPTS).sum().backward()
    assert wanting.grad is not None and wanting.grad.abs().max() > 0


@pytest.mark.contract
def test_pickscore_reads_the_names_of_older_files(pick_folder: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file

    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "text_projection.weight": (16, 32),
        "visual_projection.weight": (16, 32),
        "text_model.embeddings.token_embedding.weight": (515, 32),
        "text_model.embeddings.position_embedding.weight": (20, 32),
        "vision_model.embeddings.class_embedding": (32,),
        "vision_model.embeddings.patch_embedding.weight": (32, 3, 16, 16),
        "vision_model.embeddings.position_embedding.weight": (5, 32),
    }
    norms = ["text_model.final_layer_norm", "vision_model.pre_layrnorm", "vision_model.post_layernorm"]
    shapes |= layer("", [], dict.fromkeys(norms, 32))
    linear = [(f"self_attn.{name}_proj", 32, 32) for name in ("q", "k", "v", "out")]
    linear += [("mlp.fc1", 48, 32), ("mlp.fc2", 32, 48)]
    for tower in ("text", "vision"):
        for i in range(2):
            prefix = f"{tower}_model.encoder.layers.{i}."
            shapes |= layer(prefix, linear, {"layer_norm1": 32, "layer_norm2": 32})
    state = load_file(pick_folder / "model.safetensors")
    assert {key: tuple(value.shape) for key, value in state.items()} == shapes
    old = Path(shutil.copytree(pick_folder, tmp_path / "old"))
    (old / "model.safetensors").unlink()
    rows = {"text_model": 20, "vision_model": 5}  # which files before transformers 4.31 have
    extra = {f"{tower}.embeddings.position_ids": torch.arange(n)[None] for tower, n in rows.items()}
    torch.save({**state, **extra}, old / "pytorch_model.bin")
    images = pictures(3)
    assert torch.equal(PickScoreReward(old)(images, PROMPTS), PickScoreReward(pick_folder)(images, PROMPTS))


def test_long_prompts_are_cut(pick_folder: Path) -> None:
    assert PickScoreReward(pick_folder)(pictures(1), ["word " * 100]).isfinite().all()


@pytest.mark.parametrize("damage", ["truncated", "missing", "shape", "no config"])
def test_pickscore_names_the_folder_that_does_not_fit(pick_folder: Path, tmp_path: Path, damage: str) -> None:
    import shutil

    from safetensors.torch import load_file

    folder = Path(shutil.copytree(pick_folder, tmp_path / "bad"))
    file = folder / "model.safetensors"
    state = load_file(file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-50])
    elif damage == "missing":
        save_file({k: v for k, v in state.items() if k != "visual_projection.weight"}, file)
    elif damage == "shape":
        save_file({**state, "visual_projection.weight": torch.zeros(3, 3)}, file)
    else:
        (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"PickScore: '.*bad' .*(give a folder|Run once)"):
        PickScoreReward(folder)(pictures(), PROMPTS)


# ImageReward


def public_keys(config: BlipConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in the public ImageReward.pt, written from its architecture."""
    v, t, inner = config.vision_width, config.text_width, config.text_inner
    shapes: dict[str, tuple[int, ...]] = {
        "visual_encoder.cls_token": (1, 1, v),
        "visual_encoder.pos_embed": (1, 1 + (config.image_size // config.patch) ** 2, v),
        "visual_encoder.patch_embed.proj.weight": (v, 3, config.patch, config.patch),
        "visual_encoder.patch_embed.proj.bias": (v,),
        "visual_encoder.norm.weight": (v,),
        "visual_encoder.norm.bias": (v,),
        "text_encoder.embeddings.position_ids": (1, config.positions),
        "text_encoder.embeddings.word_embeddings.weight": (config.vocabulary, t),
        "text_encoder.embeddings.position_embeddings.weight": (config.positions, t),
        "text_encoder.embeddings.LayerNorm.weight": (t,),
        "text_encoder.embeddings.LayerNorm.bias": (t,),
        "vision_proj.weight": (256, v),
        "vision_proj.bias": (256,),
        "text_proj.weight": (256, t),
        "text_proj.bias": (256,),
    }
    linear = [("attn.qkv", 3 * v, v), ("attn.proj", v, v), ("mlp.fc1", 4 * v, v), ("mlp.fc2", v, 4 * v)]
    for i in range(config.vision_layers):
        shapes |= layer(f"visual_encoder.blocks.{i}.", linear, {"norm1": v, "norm2": v})
    linear = [("intermediate.dense", inner, t), ("output.dense", t, inner)]
    norms = {"output.LayerNorm": t}
    for name, width in (("attention", t), ("crossattention", v)):
        linear += [
            (f"{name}.self.query", t, t),
            (f"{name}.self.key", t, width),
            (f"{name}.self.value", t, width),
        ]
        linear += [(f"{name}.output.dense", t, t)]
        norms[f"{name}.output.LayerNorm"] = t
    for i in range(config.text_layers):
        shapes |= layer(f"text_encoder.encoder.layer.{i}.", linear, norms)
    shapes = {f"blip.{key}": shape for key, shape in shapes.items()}
    return shapes | layer("mlp.layers.", head_layers(t), {})


def layer(
    prefix: str, linear: list[tuple[str, int, int]], norms: dict[str, int]
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rows, columns in linear:
        shapes |= {f"{prefix}{name}.weight": (rows, columns), f"{prefix}{name}.bias": (rows,)}
    for name, width in norms.items():
        shapes |= {f"{prefix}{name}.weight": (width,), f"{prefix}{name}.bias": (width,)}
    return shapes


def head_layers(width: int) -> list[tuple[str, int, int]]:
    return [("0", 1024, width), ("2", 128, 1024), ("4", 64, 128), ("6", 16, 64), ("7", 1, 16)]


@pytest.mark.contract
@pytest.mark.parametrize("config", [BlipConfig(), TINY], ids=["public size", "tiny"])
def test_image_reward_has_the_public_keys(config: BlipConfig) -> None:
    with torch.device("meta"):
        network = ImageRewardNetwork(config)
        public = {key: torch.empty(shape) for key, shape in public_keys(config).items()}
    extra = set(image_reward_module.unused(public))
    wanted = {key: tensor.shape for key, tensor in public.items() if key not in extra}
    assert {key: value.shape for key, value in network.state_dict().items()} == wanted
    assert len(extra) == 5


def bert_tokenizer(folder: Path) -> Path:
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "circle", "two", "dogs", "cat"]
    BertTokenizer(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return folder


@pytest.fixture
def image_reward_file(tmp_path: Path) -> Path:
    noise = torch.Generator().manual_seed(1)
    state = {key: 0.2 * torch.randn(shape, generator=noise) for key, shape in public_keys(TINY).items()}
    torch.save(state, tmp_path / "ImageReward.pt")
    return tmp_path / "ImageReward.pt"


def test_image_reward_loads_a_file_and_scores(image_reward_file: Path, tmp_path: Path) -> None:
    words = bert_tokenizer(tmp_path / "bert")
    reward = ImageRewardReward(image_reward_file, tokenizer=words, config=TINY)
    images = pictures(3)
    scores = reward(images, PROMPTS)
    assert scores.dtype == torch.float64 and scores.shape == (3,) and scores.std() > 0
    reward.batch = 1
    assert torch.allclose(reward(images, PROMPTS), scores, rtol=1e-4, atol=1e-4)
    other = reward(images, ["two cat", "a", "red"])
    assert (other - scores).abs().min() > 0  # the text counts
    wanting = images.clone().requires_grad_()
    reward(wanting, PROMPTS).sum().backward()
    assert wanting.grad is not None and wanting.grad.abs().max() > 0


def test_image_reward_refuses_what_does_not_fit(image_reward_file: Path, tmp_path: Path) -> None:
    state = torch.load(image_reward_file)
    torch.save({k: v for k, v in state.items() if "crossattention" not in k}, tmp_path / "plain-bert.pt")
    with pytest.raises(
        ValueError, match=r"ImageReward: the file '.*plain-bert.pt' holds another .*crossatten"
    ):
        ImageRewardReward(tmp_path / "plain-bert.pt", config=TINY)(pictures(), PROMPTS)
    with pytest.raises(ValueError, match="the tokenizer '.*nowhere' is not here and did not come"):
        ImageRewardReward(image_reward_file, tokenizer=tmp_path / "nowhere", config=TINY)(pictures(), PROMPTS)


@pytest.mark.contract
def test_the_vision_tower_is_the_common_vit() -> None:
    timm = pytest.importorskip("timm")
    theirs = randomised(
        timm.models.vision_transformer.VisionTransformer(
            img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=4, num_classes=0
        )
    )
    ours = VisionTransformer(TINY)
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("fc_norm")})
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(ours(x), theirs.forward_features(x), atol=1e-5)


@pytest.mark.contract
def test_the_text_tower_is_blips() -> None:
    from transformers import BlipTextConfig, BlipTextModel

    config = BlipTextConfig(
        vocab_size=TINY.vocabulary,
        hidden_size=TINY.text_width,
        encoder_hidden_size=TINY.vision_width,
        intermediate_size=TINY.text_inner,
        num_hidden_layers=TINY.text_layers,
        num_attention_heads=TINY.text_heads,
        max_position_embeddings=TINY.positions,
        is_decoder=True,  # only then are the layers made that look at the picture
        bos_token_id=2,
        sep_token_id=3,
    )
    theirs = randomised(BlipTextModel(config, add_pooling_layer=False))
    ours = TextEncoder(TINY)
    state = {k: v for k, v in theirs.state_dict().items() if not k.endswith("position_ids")}
    ours.load_state_dict(state)
    ids = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    image = torch.randn(2, 5, TINY.vision_width, generator=torch.Generator().manual_seed(0))
    out = theirs(ids, attention_mask=mask, encoder_hidden_states=image, is_decoder=False).last_hidden_state
    kept = mask.bool()
    assert torch.allclose(ours(ids, mask, image)[kept], out[kept], atol=1e-5)


# LAION's aesthetic heads


def test_both_layouts_of_the_aesthetic_head(tmp_path: Path) -> None:
    deep, flat = randomised(Head(768)), randomised(nn.Linear(768, 1))
    names = [f"layers.{i}.{kind}" for i in (0, 2, 4, 6, 7) for kind in ("weight", "bias")]
    assert list(deep.state_dict()) == names
    torch.save(deep.state_dict(), tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    torch.save(
        flat.state_dict(), tmp_path / "sa_0_4_vit_l_14_linear.pth", _use_new_zipfile_serialization=False
    )
    x = torch.randn(2, 768, generator=torch.Generator().manual_seed(0))
    for head, file in ((deep, "sac+logos+ava1-l14-linearMSE.pth"), (flat, "sa_0_4_vit_l_14_linear.pth")):
        assert torch.equal(read_head(tmp_path / file).eval()(x), head(x))


def test_the_aesthetic_score_reads_features_of_length_one(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    folder = write_folder(tmp_path / "clip", tiny_model())
    head = randomised(nn.Linear(16, 1))
    torch.save(head.state_dict(), tmp_path / "head.pth")
    reward: Any = AestheticReward(tmp_path / "head.pth", model=str(folder))
    images = pictures().requires_grad_()
    scores = reward(images, PROMPTS)
    features = reward.network().clip.image_features(images.detach())
    assert torch.allclose(features.norm(dim=-1), torch.ones(3))
    assert torch.allclose(scores, head(features)[:, 0].double())
    assert torch.equal(scores, reward(images, ["other"] * 3))
    scores.sum().backward()
    assert images.grad is not None and images.grad.abs().max() > 0


def test_aesthetic_heads_that_do_not_fit(tmp_path: Path) -> None:
    pytest.importorskip("open_clip")
    torch.save({"fc.weight": torch.zeros(1, 768)}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="odd.pth' has no matrix 'layers.0.weight'"):
        read_head(tmp_path / "odd.pth")
    torch.save({"weight": torch.zeros(2, 768), "bias": torch.zeros(2)}, tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"weight is \[2, 768\] instead of \[1, 768\]"):
        read_head(tmp_path / "two.pth")
    torch.save(nn.Linear(768, 1).state_dict(), tmp_path / "head.pth")
    folder = write_folder(tmp_path / "clip", tiny_model())
    with pytest.raises(ValueError, match="reads 768 features and .* gives 16: give the CLIP model"):
        AestheticReward(tmp_path / "head.pth", model=str(folder))(pictures(), PROMPTS)


@pytest.mark.parametrize("reward", [HpsReward, ImageRewardReward, AestheticReward])
def test_downloads_that_fail_say_what_to_do(reward: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    pytest.importorskip("open_clip")

    def no_connection(repository: str, name: str) -> str:
        raise OSError("no connection\nmore")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_connection)
    with pytest.raises(
        ValueError, match=r"is not here and did not come .no connection.. Run once with"
    ) as told:
        reward()(pictures(), PROMPTS)
    assert "\n" not in str(told.value)
