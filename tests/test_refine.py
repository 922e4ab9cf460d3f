"""refine.py on a micro world: 13 pictures and captions, an SDXL of random weights in both of its formats.

    python -m pytest tests/test_refine.py
"""

import gzip
import json
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
)

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from golden_weights import GOLDEN, golden  # noqa: E402
from test_recon import IMAGES, NOISE_LEVELS, SUBJECT, make_data  # noqa: E402

import frozen  # noqa: E402
import model as m  # noqa: E402
import recon  # noqa: E402
import refine  # noqa: E402
import toy  # noqa: E402
import toy_networks  # noqa: E402

SIDE = 64  # pixels at which the micro SDXL works
WORDS = ["<pad>", "<start>", "<unknown>", "a", "red", "blue", "ball", "box", "on", "grass", "<end>"]
FAST = ["--steps", "6"]  # 3 of 6 are done; pictures of random weights are noise whatever their number
CAPTIONS = [f"a {colour} {shape} on grass" for colour in ("red", "blue") for shape in ("ball", "box", "a", "on")]
UNET = {
    "sample_size": SIDE // 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "attention_head_dim": 4, "cross_attention_dim": 32,
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 12 + 6 * 4, "use_linear_projection": True,
}
VAE = frozen.SD_VAE | {"block_out_channels": [4] * 4, "norm_num_groups": 2, "layers_per_block": 1, "sample_size": SIDE,
                       "scaling_factor": 0.5}


def make_tokenizer(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unknown>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", len(WORDS) - 1)])
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<start>", eos_token="<end>",
                            unk_token="<unknown>", model_max_length=12).save_pretrained(folder)


def make_sdxl(folder: Path) -> None:
    torch.manual_seed(0)
    common = {"vocab_size": len(WORDS), "max_position_embeddings": 12, "num_hidden_layers": 2, "intermediate_size": 16,
              "num_attention_heads": 2, "eos_token_id": len(WORDS) - 1, "initializer_factor": 5.0}
    CLIPTextModel(CLIPTextConfig(**common, hidden_size=12)).save_pretrained(folder / "text_encoder")
    second = CLIPTextConfig(**common, hidden_size=20, projection_dim=12)
    CLIPTextModelWithProjection(second).save_pretrained(folder / "text_encoder_2")
    diffusers.UNet2DConditionModel(**UNET).save_pretrained(folder / "unet")
    diffusers.AutoencoderKL(**VAE).save_pretrained(folder / "vae")
    diffusers.EulerDiscreteScheduler(**NOISE_LEVELS, timestep_spacing="trailing").save_pretrained(folder / "scheduler")
    for name in ("tokenizer", "tokenizer_2"):
        make_tokenizer(folder / name)
    kinds = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "scheduler": "EulerDiscreteScheduler"}
    kinds = {name: ["diffusers", kind] for name, kind in kinds.items()}
    kinds |= {"text_encoder": ["transformers", "CLIPTextModel"], "_class_name": "StableDiffusionXLPipeline",
              "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
              **{name: ["transformers", "PreTrainedTokenizerFast"] for name in ("tokenizer", "tokenizer_2")}}
    (folder / "model_index.json").write_text(json.dumps(kinds))


def write_evals(folder: Path, name: str = "micro", count: int = len(IMAGES)) -> None:
    torch.manual_seed(3)
    recons = torch.nn.functional.interpolate(torch.rand(count, 3, 4, 4), (32, 32), mode="bilinear")
    (folder / name).mkdir(parents=True, exist_ok=True)
    torch.save(recons, folder / name / f"{name}_all_recons.pt")
    torch.save(np.array((CAPTIONS * 2)[:count]), folder / name / f"{name}_all_predcaptions.pt")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with data/ (its sdxl/ included) and evals/; `run` calls refine.main there."""
    folder = tmp_path_factory.mktemp("world")
    make_data(folder / "data")
    make_sdxl(folder / "data" / "sdxl")
    write_evals(folder / "evals")

    def arguments(*more):
        places = ["--data_path", folder / "data", "--evals", folder / "evals", "--model_name", "micro"]
        return [str(word) for word in [*places, "--subj", SUBJECT, *FAST, *more]]

    return SimpleNamespace(folder=folder, evals=folder / "evals" / "micro", arguments=arguments,
                           run=lambda *a: refine.main(arguments(*a)).get("enhancedrecons"))


# ---- the original's loop


@pytest.mark.parametrize("one_by_one", [False, True])
def test_the_loop_is_the_originals(one_by_one):
    """Its last 12 of 25 steps at guidance 5, recorded with a formula in place of the UNet."""
    g = golden("refine_loop")

    def unet(x, t, tokens, added_cond_kwargs):
        mean = 0.2 * tokens.mean((1, 2)) + 0.2 * added_cond_kwargs["text_embeds"].mean(1)
        eps = 0.5 * torch.einsum("bchw,cd->bdhw", x, g["fake_W"]) + 0.5 * x.tanh() + 0.1 * torch.sin(t.float() / 100)
        return SimpleNamespace(sample=eps + mean[:, None, None, None])

    unet.dtype = torch.float32
    scheduler = diffusers.EulerDiscreteScheduler(**NOISE_LEVELS)
    sdxl = SimpleNamespace(unet=unet, scheduler=scheduler, size=768, target=1024)
    prompt = {"tokens": torch.cat((g["crossattn_c"], g["crossattn_uc"])),
              "pooled": torch.cat((g["vector_c"], g["vector_uc"]))}
    out = refine.redraw(sdxl, g["z"], g["noise"], prompt, one_by_one=one_by_one)
    assert (out - g["out"]).abs().max() < 1e-4 and out.std() > 1
    # Which steps these are, too.
    timesteps, sigmas = (levels[25 - refine.kept_steps(25, 0.5) :] for levels in recon.noise_levels(scheduler, 25))
    assert timesteps.tolist() == g["timesteps"].tolist()
    assert (sigmas - g["sigmas"][0]).abs().max() < 1e-5


def test_size_numbers_are_the_originals():
    numbers = refine.size_numbers(768, 1024)
    embed = diffusers.UNet2DConditionModel(**UNET | {"addition_time_embed_dim": 256,
                                                     "projection_class_embeddings_input_dim": 12 + 1536})
    vector = embed.add_time_proj(numbers).reshape(1, 1536)
    assert (vector - golden("unclip_sampler")["vector_suffix_sdxl_refine"]).abs().max() < 1e-4


@pytest.mark.parametrize("steps, strength, kept", [(25, 0.5, 12), (25, 1, 25), (50, 0.58, 29), (10, 0.3, 3)])
def test_kept_steps(steps, strength, kept):
    assert refine.kept_steps(steps, strength) == kept


def test_diffusers_own_pipeline_draws_the_same(world):
    """Pictures from StableDiffusionXLImg2ImgPipeline at the paper's settings, given our random numbers."""
    out, sdxl = world.run("--num_images", 3, "--steps", 25), world.folder / "data" / "sdxl"
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(sdxl, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    recons = torch.load(world.evals / "micro_all_recons.pt", weights_only=True)[:3]
    for k in range(3):
        seed = np.random.SeedSequence([42, int(IMAGES[k]), refine.STREAM]).generate_state(1)
        picture = pipeline(
            CAPTIONS[k], image=recon.resized(recons[k : k + 1], SIDE), strength=0.5, num_inference_steps=25,
            guidance_scale=5.0, negative_prompt=refine.NEGATIVE, original_size=(SIDE, SIDE), target_size=(SIDE, SIDE),
            generator=torch.Generator().manual_seed(int(seed[0])), output_type="pt").images
        assert (picture[0] - out[k]).abs().max() < 1e-4
    assert out.std() > 0.01 and (out[0] - out[1]).abs().max() > 0.01


# ---- the stage


def test_files_shapes_and_order(world):
    before = {path.name for path in world.evals.iterdir()}
    out = world.run()
    names = {path.name for path in world.evals.iterdir()}
    assert names - before <= {"micro_all_enhancedrecons.pt", "micro_refined_grid.png"} and len(names) == 4
    assert torch.equal(torch.load(world.evals / "micro_all_enhancedrecons.pt", weights_only=True), out)
    assert out.shape == (len(IMAGES), 3, SIDE, SIDE) and out.dtype == torch.float32
    assert 0 <= out.min() and out.max() <= 1
    first = world.run("--num_images", 2)
    assert torch.allclose(first, out[:2], atol=1e-4)


def test_a_picture_does_not_depend_on_its_batch(world):
    one, eight, other = (world.run("--num_images", 9, *extra) for extra in
                         (["--batch_size", 1], ["--batch_size", 8], ["--seed", 1]))
    assert (one - eight).abs().max() < 1e-4 and (eight - other).abs().amax((1, 2, 3)).min() > 0.01


def test_strength_keeps_more_or_less_of_the_picture(world):
    recons = recon.resized(torch.load(world.evals / "micro_all_recons.pt", weights_only=True), SIDE)[:4]
    painter = refine.load_painter(refine.parse(world.arguments()), torch.device("cpu"))
    plain = frozen.decode_latents(painter.vae, frozen.encode_latents(painter.vae, recons))
    far = [(world.run("--num_images", 4, "--strength", s, "--guidance", 1, "--steps", 25) - plain).abs().mean().item()
           for s in (0.08, 0.5, 1.0)]
    assert far[0] < far[1] < far[2]


def test_prompts_from_captions_nothing_and_files(world, tmp_path):
    out = {name: world.run("--num_images", 4, "--prompt", name) for name in ("captions", "empty")}
    assert (out["captions"] - out["empty"]).abs().amax((1, 2, 3)).min() > 1e-3
    text, array = tmp_path / "own.txt", tmp_path / "own.pt"
    text.write_text("\n".join(reversed((CAPTIONS * 2)[: len(IMAGES)])) + "\n")
    torch.save(np.array((CAPTIONS * 2)[: len(IMAGES)]), array)
    from_text, from_array = (world.run("--num_images", 4, "--prompt", file) for file in (text, array))
    assert torch.equal(from_array, out["captions"]) and not torch.equal(from_text, out["captions"])
    text.write_text("\n" * len(IMAGES))
    assert torch.equal(world.run("--num_images", 4, "--prompt", text), out["empty"])
    told = world.run("--num_images", 4, "--negative_prompt", "a blue box")
    assert (told - out["captions"]).abs().max() > 1e-3


def test_texts_of_numpy_1_and_lists_are_read(tmp_path):
    """numpy 1, which the original used, named its functions otherwise."""
    torch.save(np.array(["a dog", "ö"]), tmp_path / "two.pt")
    with zipfile.ZipFile(tmp_path / "two.pt") as two, zipfile.ZipFile(tmp_path / "one.pt", "w") as one:
        for name in two.namelist():
            assert (b"numpy._core.multiarray" in two.read(name)) == name.endswith("data.pkl")
            one.writestr(name, two.read(name).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    torch.save(["a dog", "ö"], tmp_path / "list.pt")
    for name in ("two", "one", "list"):
        assert refine.read_texts(tmp_path / f"{name}.pt", "--prompt") == ["a dog", "ö"]


def test_low_memory_draws_the_same_in_smaller_batches(world, monkeypatch):
    seen, convolve = [], torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, x: seen.append(len(x)) or convolve(self, x))
    plain, largest = world.run("--num_images", 2), max(seen)
    seen.clear()
    frugal = world.run("--num_images", 2, "--low_memory")
    assert (largest, max(seen)) == (4, 2)  # both halves of guidance at once, or in turn
    assert (frugal - plain).abs().max() < 1e-4


def test_a_killed_run_goes_on_and_ends_the_same(world, monkeypatch):
    words = ["--batch_size", 3]
    whole, calls, original = world.run(*words), [], refine.refine
    (world.evals / "micro_all_enhancedrecons.pt").unlink()

    def killed_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(refine, "refine", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        world.run(*words)
    assert not (world.evals / "micro_all_enhancedrecons.pt").exists()
    monkeypatch.setattr(refine, "load_encoders", None)  # all prompts are encoded already
    assert torch.equal(world.run(*words), whole) and len(calls) == 3 + 3  # of 5 batches, two were done
    # Captions that changed since then are another run.
    monkeypatch.undo()
    captions = world.evals / "micro_all_predcaptions.pt"
    kept = captions.read_bytes()
    monkeypatch.setattr(refine, "save_grid", None)
    with pytest.raises(TypeError):
        world.run(*words)
    monkeypatch.undo()
    torch.save(np.array(["a red box on grass"] * len(IMAGES)), captions)
    assert not torch.equal(world.run(*words), whole)
    captions.write_bytes(kept)


def test_processes_share_the_batches(world, monkeypatch):
    """Two processes one after the other, as accelerate would number them: the second one's work is used, not redone."""
    words, drawn, original = ["--batch_size", 3], [], refine.refine
    whole = world.run(*words)
    monkeypatch.setattr(refine, "refine", lambda *a: drawn.append(a[2].tolist()) or original(*a))
    state = SimpleNamespace(num_processes=2, process_index=0, is_main_process=True, is_local_main_process=True,
                            device=torch.device("cpu"), wait_for_everyone=lambda: None)
    args = refine.parse(world.arguments(*words))
    inputs = [refine.output_file(args, "all_recons.pt"), refine.prompt_file(args)]
    inputs += sorted(Path(args.sdxl).rglob("*"))
    recon.open_parts(refine.output_file(args, "refine_parts"), args, state, inputs)
    monkeypatch.setattr(refine.processes, "start", lambda: state)
    vars(state).update(process_index=1, is_main_process=False)
    assert world.run(*words) is None and drawn == [IMAGES[3:6].tolist(), IMAGES[9:12].tolist()]
    vars(state).update(process_index=0, is_main_process=True)
    assert torch.allclose(world.run(*words), whole, atol=1e-5) and len(drawn) == 5


# ---- SDXL as one file in the original's format


def original_keys(part: str) -> dict[str, tuple[str, int]]:
    """The released decoder's keys, which are SDXL's: {name in diffusers: (key in the file, dimensions there)}."""
    prefix = refine.SDXL_PARTS[part][1]
    keys = json.loads(gzip.decompress((GOLDEN / "unclip_keys.json.gz").read_bytes()))
    return {name: (key, len(shape)) for key, (shape, name) in keys.items() if key.startswith(prefix)}


def as_original(part: str, state: dict) -> dict[str, torch.Tensor]:
    """UNet or VAE weights under the names and in the shapes that the original's file has for them."""
    keys, out = original_keys(part), {}
    for name, value in state.items():
        key, ndim = keys[name.replace("add_embedding", "class_embedding")]
        out[key] = value.reshape(*value.shape, *[1] * (ndim - value.ndim))  # the VAE's attention: convolutions, 1 x 1
    return out


def open_clip_text(width: int, layers: int, heads: int, dim: int) -> open_clip.CLIP:
    vision = {"image_size": 4, "patch_size": 4, "layers": 1, "width": 8, "head_width": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": width, "heads": heads, "layers": layers}
    return open_clip.CLIP(embed_dim=dim, vision_cfg=vision, text_cfg=text).eval()


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A small SDXL with the blocks of the true one: its file, its networks, and the constants that describe it."""
    torch.manual_seed(5)
    configs = {
        "SDXL_UNET": refine.SDXL_UNET | {
            "sample_size": SIDE // 8, "block_out_channels": [8, 16, 16], "transformer_layers_per_block": [1, 1, 2],
            "attention_head_dim": [2, 2, 2], "cross_attention_dim": 20, "norm_num_groups": 4,
            "addition_time_embed_dim": 4, "projection_class_embeddings_input_dim": 16 + 24},
        "SDXL_TEXT": refine.SDXL_TEXT | {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3,
                                         "num_attention_heads": 2, "projection_dim": 8},
        "SDXL_TEXT_2": refine.SDXL_TEXT_2 | {"hidden_size": 12, "intermediate_size": 48, "num_hidden_layers": 2,
                                             "num_attention_heads": 2, "projection_dim": 16},
    }
    vae = frozen.UNCLIP_VAE | {"block_out_channels": [4, 8, 16, 16], "norm_num_groups": 4, "sample_size": SIDE}
    nets = SimpleNamespace(unet=diffusers.UNet2DConditionModel(**configs["SDXL_UNET"]).eval(),
                           vae=diffusers.AutoencoderKL(**vae).eval(), second=open_clip_text(12, 2, 2, 16))
    nets.first = CLIPTextModel(CLIPTextConfig(**configs["SDXL_TEXT"], initializer_factor=5.0)).eval()
    state = as_original("unet", nets.unet.state_dict()) | as_original("vae", nets.vae.state_dict())
    for name, value in nets.first.state_dict().items():
        state[f"conditioner.embedders.0.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    state["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    for name, value in nets.second.state_dict().items():
        if not name.startswith("visual."):
            state[f"conditioner.embedders.1.model.{name}"] = value
    state["denoiser.sigmas"] = torch.zeros(1000)
    state = {name: value.clone().contiguous() for name, value in state.items()}
    file = tmp_path_factory.mktemp("single") / refine.SDXL_FILE
    save_file(state, file)
    return SimpleNamespace(file=file, nets=nets, configs=configs, vae=vae, state=state)


@pytest.fixture
def small(single, monkeypatch):
    for name, config in single.configs.items():
        monkeypatch.setattr(refine, name, config)
    monkeypatch.setattr(frozen, "UNCLIP_VAE", single.vae)
    return single


def test_a_file_gives_the_networks_that_it_was_made_of(small):
    refine.check_file(small.file)
    for part in ("unet", "vae"):
        ours, theirs = refine.load_part(small.file, part, "cpu").state_dict(), getattr(small.nets, part).state_dict()
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    texts = ["a dog! and a cat's tail, 2 of them", "", "word " * 100]
    encoders = refine.load_encoders(small.file, "cpu")
    out = refine.encode(encoders, texts)
    assert out["tokens"].shape == (3, 77, 20) and out["pooled"].shape == (3, 16)
    # The second encoder by open_clip itself: the state before its last block, and its final embedding.
    second, states = small.nets.second, []
    hook = second.transformer.resblocks[0].register_forward_hook(lambda block, args, out: states.append(out))
    with torch.no_grad():
        pooled = second.encode_text(open_clip.tokenize(texts))
        hidden = small.nets.first(encoders[0][0](texts), output_hidden_states=True).hidden_states
    hook.remove()
    assert (out["pooled"] - pooled).abs().max() < 1e-5 and pooled.std() > 0.1
    assert (out["tokens"][..., 8:] - states[0]).abs().max() < 1e-5
    assert len(hidden) == 4 and (out["tokens"][..., :8] - hidden[2]).abs().max() < 1e-5


def test_a_file_and_a_folder_of_the_same_draw_the_same(small, world, tmp_path):
    folder = tmp_path / "sdxl"
    for part in refine.SDXL_PARTS:
        refine.load_part(small.file, part, "cpu").save_pretrained(folder / part)
    refine.load_scheduler(small.file).save_pretrained(folder / "scheduler")
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        clip_tokenizer(tmp_path, pad).save_pretrained(folder / name)
    one, other = (world.run("--num_images", 2, "--sdxl", sdxl) for sdxl in (small.file, folder))
    assert (one - other).abs().max() < 1e-5 and one.std() > 0.01


def clip_tokenizer(folder: Path, pad: str) -> CLIPTokenizer:
    """The tokenizer of a released SDXL folder, built of the vocabulary that open_clip carries along."""
    lines = gzip.open(Path(open_clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")).read().decode().split("\n")
    words = open_clip.SimpleTokenizer().encoder
    special = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (folder / "vocab.json").write_text(json.dumps({special.get(word, word): i for word, i in words.items()}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *lines[1 : 49152 - 256 - 2 + 1]]))
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad)


def test_words_are_numbered_as_by_both_originals(tmp_path):
    texts = ["a man riding a wave on top of a surfboard", "", "Two dogs' tails; 3 x 4", "very " * 100, refine.NEGATIVE]
    for part, pad in (("text_encoder", "<|endoftext|>"), ("text_encoder_2", "!")):
        ours = refine.load_tokenizer(tmp_path / "a.safetensors", part, 77)(texts)
        theirs = clip_tokenizer(tmp_path, pad)(texts, padding="max_length", max_length=77, truncation=True,
                                               return_tensors="pt").input_ids
        assert torch.equal(ours, theirs)
        if part == "text_encoder_2":
            tokenize = refine.load_tokenizer(tmp_path / "a.safetensors", part, 77)
            assert torch.equal(ours, open_clip.tokenize(texts))
            # Here they differ: the folder's reads each ! as padding. The original's second tokenizer is open_clip's.
            assert torch.equal(tokenize(["Stop!"]), open_clip.tokenize(["Stop!"]))
        assert ours[4, -1] == (49407 if part == "text_encoder" else 0)  # the negative prompt fits


def test_every_key_of_the_true_sizes_finds_its_place(tmp_path):
    """Names and shapes of the published SDXL: its UNet's and VAE's as the release's decoder has them, apart from the
    prompt's and the vector's channels; open_clip's bigG. A file of the right names and no bytes has to do."""
    shapes = {}
    for part in ("unet", "vae"):
        names = {key: name for name, (key, _) in original_keys(part).items()}
        for key, (shape, _) in json.loads(gzip.decompress((GOLDEN / "unclip_keys.json.gz").read_bytes())).items():
            if key in names:
                shape = [2048 if n == 1664 else n for n in shape] if "attn2.to_" in key else shape
                shapes[key] = [1280, 2816] if key.endswith("label_emb.0.0.weight") else shape
    with torch.device("meta"):
        config = open_clip.get_model_config("ViT-bigG-14")
        config["vision_cfg"]["layers"] = 1
        second = open_clip.CLIP(**config).state_dict()
    shapes |= {f"conditioner.embedders.1.model.{name}": tuple(value.shape) for name, value in second.items()
               if not name.startswith("visual.")}
    first = "conditioner.embedders.0.transformer.text_model."
    for layer in range(12):
        for name, shape in {"layer_norm1": [768], "layer_norm2": [768], "mlp.fc1": [3072, 768], "mlp.fc2": [768, 3072],
                            **{f"self_attn.{x}_proj": [768, 768] for x in ("q", "k", "v", "out")}}.items():
            shapes[f"{first}encoder.layers.{layer}.{name}.weight"] = shape
            shapes[f"{first}encoder.layers.{layer}.{name}.bias"] = shape[:1]
    shapes |= {f"{first}embeddings.token_embedding.weight": [49408, 768], f"{first}final_layer_norm.weight": [768],
               f"{first}embeddings.position_embedding.weight": [77, 768], f"{first}final_layer_norm.bias": [768]}
    assert len(shapes) == 1680 + 248 + 390 + 196
    file = tmp_path / "sdxl.safetensors"
    write_sparse(file, shapes)
    refine.check_file(file)
    assert sum(p.numel() for p in refine.empty_part("unet").parameters()) == 2_567_463_684
    write_sparse(file, {key: shape for key, shape in shapes.items() if not key.endswith("ln_final.bias")})
    with pytest.raises(m.UserError, match="final_layer_norm.bias of the text_encoder_2 is missing"):
        refine.check_file(file)


def write_sparse(file: Path, shapes: dict) -> None:
    """A safetensors file of 7 GB of zeros, in float16, that takes no place on the disk."""
    header, end = {}, 0
    for key, shape in shapes.items():
        size = 2 * int(np.prod(shape, dtype=np.int64))
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(file, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)


@pytest.mark.parametrize("damage, sentence", [
    (lambda s: s.pop("model.diffusion_model.out.2.weight"), r"conv_out.weight of the unet is missing"),
    (lambda s: s.pop("model.diffusion_model.middle_block.0.in_layers.0.weight"), r"of the unet is missing"),
    (lambda s: s.pop("conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_bias"),
     r"proj.bias of the text_encoder_2 is missing"),
    (lambda s: s.pop("first_stage_model.encoder.conv_in.weight"), r"of the vae is missing"),
    (lambda s: s.update({"first_stage_model.encoder.conv_in.weight": torch.zeros(4, 9, 3, 3)}),
     r"conv_in.weight of the vae has shape \(4, 9, 3, 3\) instead of \(4, 3, 3, 3\)"),
    (lambda s: s.update({"conditioner.embedders.1.model.text_projection": torch.zeros(12, 15)}),
     r"text_projection.weight of the text_encoder_2 has shape"),
    (lambda s: s.update({"model.diffusion_model.extra": torch.zeros(1)}), r"diffusion_model.extra is unknown"),
    (lambda s: s.update({"v_pred": torch.zeros(1)}), r"v_pred is unknown"),
])  # fmt: skip
def test_another_file_is_refused_by_name(small, tmp_path, damage, sentence):
    file, state = tmp_path / "other.safetensors", dict(small.state)
    damage(state)
    save_file(state, file)
    with pytest.raises(m.UserError, match=f"other.safetensors is not an SDXL .*{sentence}.*--sdxl"):
        refine.check_file(file)


def test_half_a_file_is_refused(small, tmp_path):
    file = tmp_path / "half.safetensors"
    file.write_bytes(small.file.read_bytes()[:-5000])
    with pytest.raises(m.UserError, match="half.safetensors cannot be read"):
        refine.check_sdxl(file)


# ---- the toy's


@pytest.fixture(scope="module")
def toy_sdxl(tmp_path_factory) -> Path:
    """The toy's refiner after two steps of training, with its VAE where toy.copy_networks puts it."""
    folder, scenes = tmp_path_factory.mktemp("networks"), toy.draw_scenes(8, seed=1)
    (folder / "unclip").mkdir()
    (folder / "unclip" / "vae").symlink_to(toy.NETWORKS / "unclip" / "vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(toy_networks.BATCH, "sdxl", 4)
        toy_networks.train_sdxl(toy.render(scenes), scenes, folder, "cpu", scale=1e-6)
    assert sum(file.stat().st_size for file in (folder / "sdxl").rglob("*") if file.is_file()) < 5e6
    (folder / "sdxl" / "vae").symlink_to(toy.NETWORKS / "unclip" / "vae")
    return folder / "sdxl"


def test_the_toys_training_makes_a_pipeline_of_diffusers(toy_sdxl, world):
    refine.check_sdxl(toy_sdxl)
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(toy_sdxl, add_watermarker=False,
                                                                   torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline.text_encoder_2) is CLIPTextModelWithProjection
    picture = pipeline("a red ball on grass by day", num_inference_steps=2, output_type="pt").images
    assert picture.shape == (1, 3, 64, 64)
    out = world.run("--sdxl", toy_sdxl, "--num_images", 2)
    assert out.shape == (2, 3, 64, 64) and out.std() > 0.01


def test_the_toy_knows_no_word_of_the_negative_prompt(toy_sdxl):
    """So it means what `blank_prompts` taught: no prompt."""
    tokenize = refine.load_tokenizer(toy_sdxl, "text_encoder", 20)
    words = tokenize([refine.NEGATIVE, "a red ball on grass by day", *toy_networks.blank_prompts(18)])
    assert words.shape[1] == 20 and words[0].tolist() in words[2:].tolist()
    assert 2 not in words[1] and set(words[0, 1:-1].tolist()) == {2}  # <unknown>


# ---- mistakes


def broken_folder(world, path: Path, break_it) -> Path:
    """A copy of the micro SDXL to damage."""
    for file in (world.folder / "data" / "sdxl").rglob("*.*"):
        target = path / file.relative_to(world.folder / "data" / "sdxl")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    break_it(path)
    return path


def without_a_weight(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if name != "conv_out.bias"}, file)


@pytest.mark.parametrize("break_it, sentence", [
    (lambda f: (f / "text_encoder_2" / "config.json").unlink(), "it has no text_encoder_2/config.json.*--sdxl"),
    (lambda f: (f / "unet" / "config.json").write_text(json.dumps(UNET | {"cross_attention_dim": 31})),
     "is not a base SDXL"),
    (lambda f: (f / "unet" / "config.json").write_text("{"), "cannot be read .*JSONDecodeError"),
    (without_a_weight, "cannot be read .*conv_out.bias in unet"),
])  # fmt: skip
def test_broken_folders_are_refused(world, tmp_path, break_it, sentence):
    with pytest.raises(m.UserError, match=sentence):
        world.run("--num_images", 1, "--sdxl", broken_folder(world, tmp_path / "sdxl", break_it))


@pytest.mark.parametrize("words, sentence", [
    (["--model_name", "nobody"], "nobody_all_recons.pt does not exist: run recon.py first.*--model_name"),
    (["--model_name", "silent"], "silent_all_predcaptions.pt does not exist: run recon.py first.*--prompt=empty"),
    (["--model_name", "short"], "short_all_predcaptions.pt has 12 texts for 13 reconstructions.*--prompt"),
    (["--model_name", "long"], "long_all_recons.pt has 14 pictures for 13 test images.*--subj"),
    (["--model_name", "nan"], "nan_all_recons.pt holds NaN"),
    (["--model_name", "torn"], "torn_all_recons.pt cannot be read"),
    (["--model_name", "flat"], "flat_all_recons.pt does not hold pictures"),
    (["--model_name", "numbers"], "numbers_all_predcaptions.pt does not hold an array or a list of texts"),
    (["--prompt", "nowhere.txt"], "nowhere.txt does not exist.*--prompt"),
    (["--sdxl", "nowhere"], "nowhere does not exist.*--sdxl"),
    (["--cache_dir", "empty"], "empty/zavychromaxl_v30.safetensors does not exist, nor does empty/sdxl.*--cache_dir"),
    (["--steps", "1"], "leaves none of 1 steps: raise --steps"),
    (["--steps", "1000"], "--steps must be below 1000"),
    (["--strength", "1.5"], "--strength must be above 0 and at most 1"),
    (["--batch_size", "0"], "--batch_size must be at least 1"),
])  # fmt: skip
def test_mistakes_are_one_sentence_and_write_nothing(world, capsys, words, sentence):
    evals, name = world.folder / "evals", words[1]
    if words[0] == "--model_name" and name != "nobody":
        write_evals(evals, name, count=14 if name == "long" else 13)
        recons, captions = (evals / name / f"{name}_all_{kind}.pt" for kind in ("recons", "predcaptions"))
        pictures = torch.load(recons, weights_only=True)
        {"silent": lambda: captions.unlink(), "short": lambda: torch.save(np.array(["x"] * 12), captions),
         "long": lambda: None, "nan": lambda: torch.save(pictures / 0 - pictures / 0, recons),
         "torn": lambda: recons.write_bytes(recons.read_bytes()[:999]),
         "flat": lambda: torch.save(pictures[:, 0], recons),
         "numbers": lambda: torch.save(torch.zeros(13), captions)}[name]()
    there = sorted(evals.rglob("*"))
    with pytest.raises(SystemExit) as stop:
        m.run_main(lambda: world.run(*words))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and error.startswith("error: ") and error.endswith(".")
    assert sorted(evals.rglob("*")) == there
    with pytest.raises(m.UserError, match=sentence):
        world.run(*words)
