"""Tests of frozen.py: loaders of the frozen networks, and the images that they see.

Run: python -m pytest tests/test_frozen.py
"""

import errno
import gzip
import json
import shutil
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import GitConfig, GitForCausalLM, PreTrainedTokenizerFast

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from golden_weights import GOLDEN, error, golden, golden_json, golden_tensor  # noqa: E402

import frozen as m  # noqa: E402
from model import UserError  # noqa: E402


@pytest.fixture(scope="module")
def clip_cache(tmp_path_factory):
    """cache_dir/clip: a tiny open_clip model whose image tower has the golden weights."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / "clip").mkdir()
    spec, seed = golden_json("clip_tokens_tiny"), int(golden("clip_tokens_tiny")["weight_seed"])
    config = spec["open_clip_model_config"]
    config["text_cfg"]["vocab_size"] = 49408  # so that captions can be tokenised; the image tower does not see it
    torch.manual_seed(0)
    clip = open_clip.CLIP(**config)
    state = clip.state_dict()
    for name, shape in spec["shapes"].items():
        if name.startswith("model.visual."):
            state[name.removeprefix("model.")] = golden_tensor(name, shape, seed)
    save_file(state, cache / "clip" / "open_clip_model.safetensors")
    (cache / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return cache


def test_clip_tokens(clip_cache):
    g, clip = golden("clip_tokens_tiny"), m.load_clip(clip_cache, "cpu")
    assert (clip.seq_dim, clip.emb_dim, clip.image_size) == (16, 32, 224)
    assert not clip.training and not any(p.requires_grad for p in clip.parameters())
    images = g["image01_blocks7x7"].repeat_interleave(32, -1).repeat_interleave(32, -2)
    assert error(clip.tokens(images), g["tokens"]) < 1e-5
    image, text = clip.embed(images), clip.embed_text(["a red house", "snow"])
    assert image.shape == (1, 24) and text.shape == (2, 24)
    assert error(image.norm(dim=-1), torch.ones(1)) < 1e-6 and error(text.norm(dim=-1), torch.ones(2)) < 1e-6
    assert (text[0] - text[1]).abs().max() > 1e-3


def test_clip_resize():
    g = golden("clip_preprocess_resize")
    ours = m.clip_preprocess(g["images256"], 56)
    plain = m.clip_preprocess(g["resized56"], 56)  # the same size: only the normalisation
    assert error(ours, plain) < 1e-5
    black = m.clip_preprocess(torch.zeros(1, 3, 4, 4), 4)  # washed out: black counts as .5
    assert black[0, 0, 0, 0].item() == pytest.approx((0.5 - 0.48145466) / 0.26862954, rel=1e-5)


def tiny_vae():
    return m.AutoencoderKL(block_out_channels=[8], norm_num_groups=4, latent_channels=4)


def test_vae_folder_and_latents(tmp_path):
    vae = tiny_vae()
    vae.save_pretrained(tmp_path / "vae")
    loaded = m.load_vae(tmp_path, "cpu")
    images = torch.rand(2, 3, 16, 16)
    expected = vae.eval().encode(2 * images - 1).latent_dist.mean * vae.config.scaling_factor
    latents = m.encode_latents(loaded, images)
    assert error(latents, expected) < 1e-6 and not latents.requires_grad
    pictures = m.decode_latents(loaded, 30 * latents)
    assert pictures.shape == images.shape and pictures.min() >= 0 and pictures.max() <= 1
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_vae_file_with_old_attention_names(tmp_path, monkeypatch):
    with torch.device("meta"):
        assert sum(p.numel() for p in m.AutoencoderKL(**m.SD_VAE).parameters()) == 83_653_863
    monkeypatch.setattr(m, "SD_VAE", m.SD_VAE | {"block_out_channels": [16, 32, 32, 32], "norm_num_groups": 8})
    vae = m.AutoencoderKL(**m.SD_VAE)
    old = {}
    for name, value in vae.state_dict().items():
        for new, former in (("to_q.", "query."), ("to_k.", "key."), ("to_v.", "value."), ("to_out.0.", "proj_attn.")):
            name = name.replace(new, former)
        old[name] = value
    assert sum(".query." in name for name in old) == 4 and set(old) != set(vae.state_dict())
    torch.save(old, tmp_path / "sd_image_var_autoenc.pth")
    loaded = m.load_vae(tmp_path, "cpu").state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in vae.state_dict().items())


def test_what_the_original_downloaded_is_not_fetched_again(monkeypatch):
    cached = set()
    monkeypatch.setattr(m.huggingface_hub, "try_to_load_from_cache",
                        lambda repository, file, cache_dir: "a path" if (cache_dir, file) in cached else None)
    for there, place in (((), "cache"), ((None, "b"), None), (("cache", "a"), "cache")):
        cached |= {there}
        assert m.hub_place("cache", "some/network", ("a", "b")) == place


def test_teacher_folder(tmp_path):
    config = m.ConvNextModel.config_class(hidden_sizes=[8, 16, 32, 512], depths=[1, 1, 1, 1])
    network = m.ConvNextModel(config).eval()
    network.save_pretrained(tmp_path / "teacher")
    teacher, images = m.load_teacher(tmp_path, "cpu"), torch.rand(2, 3, 64, 64)
    features = teacher(images)
    assert features.shape == (2, 4, 512) and not features.requires_grad
    x = (images - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.228, 0.224, 0.225]).view(3, 1, 1)
    expected = network(x).last_hidden_state
    assert error(features[:, 1], expected[:, :, 0, 1]) < 1e-5
    state = network.state_dict()
    name = state.popitem()[0]
    network.save_pretrained(tmp_path / "teacher", state_dict=state)
    with pytest.raises(UserError, match=f"teacher cannot be read .*no {name}.*--cache_dir"):
        m.load_teacher(tmp_path, "cpu")


def test_released_teacher_spec_and_arithmetic():
    with torch.device("meta"):
        state = m.ConvNeXtTeacher().state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == golden_json("convnext_xl_state_spec")
    # The arithmetic against the ConvNeXt of transformers, whose weights only have other names.
    config = m.ConvNextModel.config_class(
        hidden_sizes=[8, 16, 24, 32], depths=[1, 2, 1, 1], layer_scale_init_value=0.0, layer_norm_eps=1e-6
    )
    theirs, ours = m.ConvNextModel(config).eval(), m.ConvNeXtTeacher((1, 2, 1, 1), (8, 16, 24, 32)).eval()
    renamed = {}
    for name, value in theirs.state_dict().items():
        name = name.replace("embeddings.patch_embeddings", "downsample_layers.0.0")
        name = name.replace("embeddings.layernorm", "downsample_layers.0.1").replace(".layernorm", ".norm")
        parts = name.removeprefix("encoder.").split(".")
        if "downsampling_layer" in parts:
            parts = ["downsample_layers", parts[1], *parts[3:]]
        elif "layers" in parts:
            parts.remove("layers")
        renamed[".".join(parts)] = value.normal_(0, 0.1)
    renamed = {name.replace("layernorm.", "norm."): value for name, value in renamed.items()}
    ours.backbone.load_state_dict(renamed)
    x = torch.rand(2, 3, 64, 64)
    maps = theirs(x).last_hidden_state.permute(0, 2, 3, 1)
    expected = ours.maps_projector(ours.backbone["norm"](maps)).permute(0, 3, 1, 2)
    assert error(ours(x), expected) < 1e-5


def test_a_wrong_teacher_file_is_a_user_error(tmp_path):
    torch.save({"model": {"module.some": torch.zeros(1)}}, tmp_path / "convnext_xlarge_alpha0.75_fullckpt.pth")
    with pytest.raises(UserError, match=r"fullckpt.pth cannot be read.*--cache_dir"):
        m.load_teacher(tmp_path, "cpu")


def tiny_unclip(folder: Path, index: dict) -> None:
    unet = m.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=24, attention_head_dim=4,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    unet.save_pretrained(folder / "unet")
    tiny_vae().save_pretrained(folder / "vae")
    m.diffusers.EulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("index, scales", [({}, (0.8, 0.2)), ({"output_scale": 0.5, "output_shift": 0.5}, (0.5, 0.5))])
def test_unclip_folder(tmp_path, index, scales):
    tiny_unclip(tmp_path / "unclip", index)
    unclip = m.load_unclip(tmp_path / "unclip", "cpu", torch.float16)
    assert (unclip.output_scale, unclip.output_shift) == scales
    assert (unclip.unet.dtype, unclip.vae.dtype) == (torch.float16, torch.float32)
    assert type(unclip.scheduler).__name__ == "EulerDiscreteScheduler"
    assert not any(p.requires_grad for part in (unclip.unet, unclip.vae) for p in part.parameters())
    state = {name: value.half() for name, value in unclip.unet.state_dict().items() if name != "conv_in.bias"}
    save_file(state, tmp_path / "unclip/unet/diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="unclip cannot be read"):
        m.load_unclip(tmp_path / "unclip", "cpu")


def released_keys() -> dict[str, list]:
    """The released decoder's file: {key: [shape, name in diffusers, None for what is no part of it]}."""
    return json.loads(gzip.decompress((GOLDEN / "unclip_keys.json.gz").read_bytes()))


def test_every_key_of_the_released_decoder_finds_its_place():
    keys, networks = released_keys(), m.unclip_networks()
    assert len(keys) == 1680 + 248 + 590 + 1 and sum(p.numel() for p in networks["unet"].parameters()) == 2_501_272_324
    plans = m.match_unclip({key: shape for key, (shape, _) in keys.items()}, networks, Path(m.UNCLIP_FILE))
    for part, prefix in (("unet", "model.diffusion_model."), ("vae", "first_stage_model.")):
        expected = {key: name for key, (_, name) in keys.items() if key.startswith(prefix)}
        assert {key: name for key, (name, _) in plans[part].items()} == expected
        own = {name: tuple(value.shape) for name, value in networks[part].state_dict().items()}
        assert dict(plans[part].values()) == own


@pytest.fixture(scope="module")
def released():
    """A small decoder as the release has it: configurations, and a state dict with the original names."""
    spec, unet_prefix = golden_json("tiny_unet_config"), "model.diffusion_model."
    seed = int(golden("tiny_unet_golden")["weight_seed"])
    state = {unet_prefix + key: golden_tensor(key, shape, seed) for key, shape in spec["shapes"].items()}
    vae_config = m.UNCLIP_VAE | {"block_out_channels": [4, 8, 16, 16], "norm_num_groups": 4}
    torch.manual_seed(0)
    vae = m.AutoencoderKL(**vae_config).state_dict()
    for key, (shape, name) in released_keys().items():
        if key.startswith("first_stage_model."):
            value = vae[name]
            state[key] = value[..., None, None] if len(shape) == 4 and value.ndim == 2 else value
    state["denoiser.sigmas"] = golden("unclip_sampler")["denoiser_sigmas1000"]
    state["conditioner.embedders.0.model.visual.proj"] = torch.zeros(3)
    return {"UNCLIP_UNET": spec["diffusers_config"], "UNCLIP_VAE": vae_config}, state


@pytest.fixture
def released_file(released, tmp_path, monkeypatch):
    """The small decoder's file in a folder of its own."""
    configs, state = released
    for name, config in configs.items():
        monkeypatch.setattr(m, name, config)
    monkeypatch.setattr(m, "UNCLIP_SHARD", 2_000_000)
    file = tmp_path / "cache" / m.UNCLIP_FILE
    file.parent.mkdir()
    torch.save({"state_dict": state, "global_step": 110000}, file)
    return file


def test_converted_decoder_computes_what_the_original_does(released, released_file):
    folder, g = released_file.parent / "unclip", golden("tiny_unet_golden")
    m.convert_unclip(released_file, folder, torch.float32)
    assert {f.name for f in released_file.parent.iterdir()} == {"unclip", m.UNCLIP_FILE}
    assert len(list((folder / "unet").glob("*.safetensors"))) > 2  # so the index over several files was read
    unclip = m.load_unclip(folder, "cpu")
    with torch.no_grad():
        out = unclip.unet(g["x"], g["t"], g["context"], class_labels=g["y"]).sample
    assert error(out, g["out_sgm"]) < 1e-5
    vae, state = unclip.vae.state_dict(), released[1]
    for key, (_, name) in released_keys().items():
        if key.startswith("first_stage_model."):
            assert torch.equal(vae[name].flatten(), state[key].flatten()), key
    assert unclip.vae.config.scaling_factor == 0.13025 and (unclip.output_scale, unclip.output_shift) == (0.8, 0.2)
    config = unclip.scheduler.config
    assert (config.beta_schedule, config.prediction_type, config.beta_end) == ("scaled_linear", "epsilon", 0.012)


def test_the_released_file_is_converted_once(released, released_file, monkeypatch):
    folder = released_file.parent / "unclip"
    (folder.parent / "unclip.building").mkdir()  # left by a run that was killed
    (folder.parent / "unclip.building" / "half").write_text("")
    unclip = m.load_unclip(folder, "cpu", torch.float16)
    assert (unclip.unet.dtype, unclip.vae.dtype) == (torch.float16, torch.float32)
    assert torch.equal(unclip.vae.decoder.conv_in.weight, released[1]["first_stage_model.decoder.conv_in.weight"])
    assert {f.name for f in folder.iterdir()} == {"model_index.json", "scheduler", "unet", "vae"}
    assert load_file(next((folder / "unet").glob("*.safetensors"))).popitem()[1].dtype == torch.float16
    assert m.load_unclip(folder, "cpu").unet.dtype == torch.float32

    def again(*args):
        raise AssertionError("converted twice")

    monkeypatch.setattr(m, "convert_unclip", again)
    m.load_unclip(folder, "cpu")
    released_file.unlink()
    m.load_unclip(folder, "cpu")


UNET, VAE = "model.diffusion_model.", "first_stage_model."


@pytest.mark.parametrize(
    "change, text",
    [
        ({"model_ema.decay": torch.zeros(1)}, "model_ema.decay is unknown"),
        ({UNET + "input_blocks.1.0.more": torch.zeros(1)}, "input_blocks.1.0.more is unknown"),
        ({UNET + "label_emb.0.2.bias": None}, "model.diffusion_model.label_emb.0.2.bias is missing"),
        ({UNET + "out.0.bias": None}, "what becomes conv_norm_out.bias of the unet is missing"),
        ({VAE + "decoder.mid.attn_1.k.bias": None}, "decoder.mid_block.attentions.0.to_k.bias of the vae is missing"),
        ({VAE + "encoder.conv_in.bias": torch.zeros(5)}, r"encoder.conv_in.bias has shape \(5,\) instead of \(4,\)"),
        ({"denoiser.sigmas": None}, "denoiser.sigmas are missing or others"),
        ({"denoiser.sigmas": torch.linspace(0.03, 14.6, 1000)}, "denoiser.sigmas are missing or others"),
    ],
)
def test_another_file_is_a_user_error_and_leaves_nothing(released, released_file, change, text):
    state = {key: value for key, value in (released[1] | change).items() if value is not None}
    torch.save({"state_dict": state}, released_file)
    with pytest.raises(UserError, match=rf"step110000.ckpt is not the released decoder \(.*{text}"):
        m.load_unclip(released_file.parent / "unclip", "cpu")
    assert list(released_file.parent.iterdir()) == [released_file]


def test_damaged_decoder_files_are_user_errors(released_file):
    whole, folder = released_file.read_bytes(), released_file.parent / "unclip"
    released_file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"step110000.ckpt cannot be read.*--cache_dir"):
        m.load_unclip(folder, "cpu")
    for content in ([1, 2], {"model": {}}, {"state_dict": {"step": 3}}):
        torch.save(content, released_file)
        with pytest.raises(UserError, match="step110000.ckpt is not the released decoder.*no state_dict of tensors"):
            m.load_unclip(folder, "cpu")
    released_file.unlink()
    with pytest.raises(UserError, match=r"cache/unclip does not exist, nor does .*step110000.ckpt.*--cache_dir"):
        m.load_unclip(folder, "cpu")
    assert list(folder.parent.iterdir()) == []


@pytest.mark.parametrize(
    "raised, seen",
    [
        (OSError(errno.ENOSPC, "No space left on device"), OSError),
        (OSError(errno.EROFS, "Read-only file system"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_conversion_that_stops_leaves_nothing(released_file, monkeypatch, raised, seen):
    write, written = Path.write_bytes, []

    def stop_at_the_second(path, data):
        written.append(path)
        if len(written) == 2:
            raise raised
        return write(path, data)

    monkeypatch.setattr(Path, "write_bytes", stop_at_the_second)
    with pytest.raises(seen) as caught:
        m.load_unclip(released_file.parent / "unclip", "cpu")
    assert raised in (caught.value, caught.value.__cause__)
    assert seen is not UserError or "Read-only file system" in str(caught.value) and "--unclip" in str(caught.value)
    assert len(written) == 2 and list(released_file.parent.iterdir()) == [released_file]


def test_an_existing_decoder_folder_is_left_alone(released_file):
    folder = released_file.parent / "unclip"
    folder.mkdir()
    (folder / "mine").write_text("kept")
    with pytest.raises(UserError, match="unclip exists already.*--unclip"):
        m.convert_unclip(released_file, folder)
    assert [f.name for f in folder.iterdir()] == ["mine"]


@pytest.mark.parametrize("part", [
    "unet", "vae/config.json", "scheduler", "vae/diffusion_pytorch_model.safetensors",
    "unet/diffusion_pytorch_model-00002-of-00003.safetensors",
])
def test_a_half_written_decoder_folder_is_a_user_error(tmp_path, part):
    folder = tmp_path / "unclip"
    tiny_unclip(folder, {})
    if "00002" in part:
        network = m.UNet2DConditionModel.from_pretrained(folder / "unet")
        shutil.rmtree(folder / "unet")
        network.save_pretrained(folder / "unet", max_shard_size=network.num_parameters() * 4 // 2)
    m.load_unclip(folder, "cpu")
    assert (folder / part).exists()
    shutil.rmtree(folder / part) if (folder / part).is_dir() else (folder / part).unlink()
    with pytest.raises(UserError, match=rf"unclip cannot be read.*\b{part.split('/')[0]}\b.*--cache_dir"):
        m.load_unclip(folder, "cpu")


def test_unclip_vector():
    expected = golden("unclip_sampler")["vector_suffix_unclip"]
    # One bit of a frequency, which processors compute differently, is 5e-5 of an angle of 768.
    assert error(m.unclip_vector(1024, 768), expected) < 1e-4


def test_missing_files_are_user_errors(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"sd_image_var_autoenc.pth does not exist.*--cache_dir"):
        m.load_vae(tmp_path, "cpu")
    with pytest.raises(UserError, match=r"fullckpt.pth does not exist.*--cache_dir"):
        m.load_teacher(tmp_path, "cpu")
    with pytest.raises(UserError, match=r"unclip does not exist"):
        m.load_unclip(tmp_path / "unclip", "cpu")

    def offline(*args, **kwargs):
        raise FileNotFoundError("cannot reach the hub")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(UserError, match=r"cannot be read.*cannot reach the hub.*--cache_dir"):
        m.load_clip(tmp_path, "cpu")
    monkeypatch.undo()
    for name, load in (("clip", m.load_clip), ("vae", m.load_vae), ("teacher", m.load_teacher)):
        (tmp_path / name).mkdir()
        with pytest.raises(UserError, match=f"{name} cannot be read.*--cache_dir"):
            load(tmp_path, "cpu")
    (tmp_path / "unclip").mkdir()
    with pytest.raises(UserError, match="unclip cannot be read.*--cache_dir"):
        m.load_unclip(tmp_path / "unclip", "cpu")


# ---- captioner


def golden_git() -> GitForCausalLM:
    """The original's caption model at its smallest, with its recorded weights."""
    spec, seed = golden_json("git_caption_tiny"), int(golden("git_caption_tiny")["weight_seed"])
    git = GitForCausalLM(GitConfig(**spec["config"])).eval()
    state = git.state_dict()
    assert {k: list(v.shape) for k, v in state.items() if k in spec["shapes"]} == spec["shapes"]
    state |= {name: golden_tensor(name, shape, seed) for name, shape in spec["shapes"].items()}
    git.load_state_dict(state)
    return git


def same_tokens() -> m.CLIPConverter:
    """A converter that changes nothing: 5 tokens of 24 channels."""
    converter = m.CLIPConverter(5, 5, 24, 24)
    converter.load_state_dict({"linear1.weight": torch.eye(5), "linear1.bias": torch.zeros(5),
                               "linear2.weight": torch.eye(24), "linear2.bias": torch.zeros(24)})
    return converter


class Numbers:
    """A tokenizer whose words are their numbers."""
    def batch_decode(self, rows: torch.Tensor, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [" ".join(map(str, row)) + " " for row in rows.tolist()]


def test_captions_are_the_originals():
    g = golden("git_caption_tiny")
    captioner = m.Captioner(golden_git(), same_tokens(), Numbers()).eval()
    logits = captioner.git(input_ids=g["input_ids"], pixel_values=g["emb"][:, None]).logits
    assert error(logits, g["logits"]) < 1e-5
    expected = [" ".join(map(str, row)) for row in g["generated"].tolist()]
    assert captioner.caption(g["emb"]) == expected
    assert captioner.caption(g["emb"], max_length=5) == [" ".join(text.split()[:5]) for text in expected]
    assert captioner.caption(g["emb"][:1]) == expected[:1]


def test_converter_maps_tokens_then_channels():
    converter, x = m.CLIPConverter(256, 257, 1664, 1024), torch.randn(2, 256, 1664)
    assert {name: tuple(p.shape) for name, p in converter.named_parameters() if "weight" in name} == {
        "linear1.weight": (257, 256), "linear2.weight": (1024, 1664)}  # bigG_to_L_epoch8.pth
    tokens = torch.einsum("ts,bsd->btd", converter.linear1.weight, x) + converter.linear1.bias[:, None]
    expected = torch.einsum("cd,btd->btc", converter.linear2.weight, tokens) + converter.linear2.bias
    assert error(converter(x), expected) < 1e-4


def test_captioner_folder_and_errors(tmp_path):
    golden_git().save_pretrained(tmp_path / "git")
    vocabulary = Tokenizer(models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="w0", bos_token="w1",
                            eos_token="w2").save_pretrained(tmp_path / "git")
    with pytest.raises(UserError, match="bigG_to_L_epoch8.pth does not exist.*--no-captions"):
        m.load_captioner(tmp_path, "cpu")
    torch.save({"model_state_dict": {"linear1.weight": torch.eye(5)}}, tmp_path / "bigG_to_L_epoch8.pth")
    with pytest.raises(UserError, match="bigG_to_L_epoch8.pth cannot be read"):
        m.load_captioner(tmp_path, "cpu")
    torch.save({"model_state_dict": same_tokens().state_dict()}, tmp_path / "bigG_to_L_epoch8.pth")
    g = golden("git_caption_tiny")
    said = m.load_captioner(tmp_path, "cpu").caption(g["emb"])
    special = {0, 1, 2}
    assert said == [" ".join(f"w{i}" for i in row if i not in special) for row in g["generated"].tolist()]
    state = load_file(tmp_path / "git/model.safetensors")
    lost = next(name for name in state if "encoder" in name and name.endswith("weight"))
    save_file({name: x for name, x in state.items() if name != lost}, tmp_path / "git/model.safetensors",
              {"format": "pt"})
    with pytest.raises(UserError, match=f"no {lost} in git.*--no-captions"):
        m.load_captioner(tmp_path, "cpu")


def test_the_decoders_vae_is_never_rounded(tmp_path):
    """bfloat16 is for the UNet: the VAE's weights come out as they were saved, on the way through no half type."""
    vae = m.AutoencoderKL(block_out_channels=[8], norm_num_groups=4, latent_channels=4)
    vae.save_pretrained(tmp_path / "unclip" / "vae")
    m.UNet2DConditionModel(
        sample_size=4, block_out_channels=(8,), layers_per_block=1, cross_attention_dim=8, attention_head_dim=4,
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
    ).save_pretrained(tmp_path / "unclip" / "unet")
    m.EulerDiscreteScheduler(**m.UNCLIP_SCHEDULER).save_pretrained(tmp_path / "unclip" / "scheduler")
    unclip = m.load_unclip(tmp_path / "unclip", "cpu", torch.bfloat16)
    assert unclip.unet.dtype == unclip.vae.dtype == torch.bfloat16
    unclip = m.load_unclip(tmp_path / "unclip", "cpu")
    assert all(torch.equal(value, unclip.vae.state_dict()[name]) for name, value in vae.state_dict().items())
