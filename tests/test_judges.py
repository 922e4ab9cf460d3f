"""Tests of judges.py on files of random weights, in the released files' names and layouts.

Run: python -m pytest tests/test_judges.py
"""

import json
import shutil
import sys
from functools import partial
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
import torchvision
from safetensors.torch import load_file, save_file
from torch_fidelity import feature_extractor_inceptionv3
from torchmetrics.image.fid import NoTrainInceptionV3
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

sys.path[:0] = [str(Path(__file__).parents[1])]
import huggingface_hub  # noqa: E402

import judges as m  # noqa: E402
import toy  # noqa: E402
import toy_networks  # noqa: E402
from model import UserError  # noqa: E402

PUBLISHED = {"alexnet": torchvision.models.alexnet, "efficientnet": torchvision.models.efficientnet_b1,
             "inception": partial(torchvision.models.inception_v3, init_weights=False),
             "swav": torchvision.models.resnet50}
CONV = tuple(PUBLISHED)


@pytest.fixture(autouse=True)
def nothing_downloaded_before(tmp_path, monkeypatch):
    """The libraries' own caches are empty, whatever the machine's are."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch_home"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def narrow_file(name: str, folder: Path, share: float = 1 / 16) -> tuple[torch.nn.Module, Path]:
    """A released file's narrow twin, and the network it was saved from."""
    torch.manual_seed(0)
    network = toy_networks.narrow(PUBLISHED[name](), share)
    for layer in network.modules():  # as if trained: signals that reach the end, and statistics of their own
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight)
        elif isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean.normal_(0, .1)
            layer.running_var.uniform_(.5, 1.5)
    torch.save({key: x.half() for key, x in network.state_dict().items()}, folder / m.file_name(name))
    return network.half().float().eval(), folder / m.file_name(name)


def normalised(images: torch.Tensor, size: int) -> torch.Tensor:
    """torchvision's own transforms of a tensor, as the original wrote them."""
    transforms = torchvision.transforms
    return transforms.Compose([
        transforms.Resize(size, antialias=False),
        transforms.Normalize((.485, .456, .406), (.229, .224, .225)),
    ])(images)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.std()).item()


# ---- pictures

def test_published_alexnet_gives_the_features_of_a_direct_computation(tmp_path):
    torch.manual_seed(0)
    alexnet = torchvision.models.alexnet().eval()
    alexnet.classifier = torch.nn.Linear(5, 5)  # what comes after the features is not read
    torch.save(alexnet.state_dict(), tmp_path / "alexnet-owt-7be5be79.pth")
    judge = m.load_vision("alexnet", tmp_path, "cpu")
    assert judge.description == "torchvision AlexNet"
    assert judge.files == [tmp_path / "alexnet-owt-7be5be79.pth"]
    images = torch.rand(2, 3, 300, 300)
    with torch.no_grad():
        second = alexnet.features[:5](normalised(images, 256))
        fifth = alexnet.features[5:12](second)
    features = judge.features(images)
    assert set(features) == {"alex2", "alex5"}
    assert features["alex2"].shape == (2, 192 * 31 * 31) and features["alex5"].shape == (2, 256 * 15 * 15)
    assert difference(features["alex2"], second.flatten(1)) < 1e-4
    assert difference(features["alex5"], fifth.flatten(1)) < 1e-4


@pytest.mark.parametrize(("name", "size", "head"), [("inception", 342, "fc"), ("efficientnet", 255, "classifier"),
                                                    ("swav", 224, "fc")])
def test_narrow_files_give_the_features_of_the_network_they_were_saved_from(tmp_path, name, size, head):
    network, file = narrow_file(name, tmp_path)
    judge = m.load_vision(name, tmp_path, "cpu")
    setattr(network, head, torch.nn.Identity())
    network.transform_input = name == "inception"  # torchvision sets it with the published weights
    images = torch.rand(3, 3, 64, 64)
    with torch.no_grad():
        expected = network(normalised(images, size))
    features = judge.features(images)[name]
    assert features.dtype == torch.float32 and difference(features, expected) < 1e-4
    assert difference(judge.features(images[:1])[name], features[:1]) < 1e-4  # no batch statistics
    count = sum(p.numel() for key, p in network.named_parameters() if not key.startswith(("AuxLogits", "fc")))
    published = {"inception": 21_785_568, "efficientnet": 6_513_184, "swav": 23_508_032}[name]
    assert judge.description.startswith("stand-in for ") and f"{count:,} weights instead of {published:,}" in \
        judge.description


def test_inception_turns_the_normalisation_into_its_own(tmp_path):
    """Its weights expect [-1, 1]: white and black must come to the first layer as 1 and -1."""
    narrow_file("inception", tmp_path)
    network, _, _ = m.load_convolutional("inception", tmp_path, "cpu")
    seen = []
    network.Conv2d_1a_3x3.conv.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    for value in (0., 1.):
        network(m.view(torch.full((1, 3, 8, 8), value), 96, m.IMAGENET_MEAN, m.IMAGENET_STD))
    assert (seen[0] + 1).abs().max() < 1e-5 and (seen[1] - 1).abs().max() < 1e-5


def test_pictures_are_made_smaller_without_antialias_unless_asked(tmp_path):
    stripes = torch.zeros(1, 3, 256, 256)
    stripes[..., ::2] = 1
    seen = [m.view(stripes, 64, (0, 0, 0), (1, 1, 1), antialias) for antialias in (False, True)]
    by_hand = stripes.unfold(3, 4, 4)[..., 1:3].mean(-1)[:, :, 1::4]  # bilinear reads only the two nearest
    assert torch.allclose(seen[0], by_hand.expand(1, 3, 64, 64)) and (seen[0] - seen[1]).abs().max() > .02
    wide = torch.zeros(1, 3, 256, 256)
    wide[..., ::4] = 1  # never among the nearest two: a resize without antialias does not see these lines at all
    assert m.view(wide, 64, (0, 0, 0), (1, 1, 1)).abs().max() < 1e-6
    assert m.view(wide, 64, (0, 0, 0), (1, 1, 1), antialias=True).mean() > .2
    narrow_file("alexnet", tmp_path, 1 / 32)
    judge = m.load_vision("alexnet", tmp_path, "cpu")
    big = wide.repeat_interleave(4, -1).repeat_interleave(4, -2)[..., ::1]  # 1024 px -> 256
    plain, smooth = (judge.features(big * torch.linspace(0, 1, 1024), antialias=a)["alex2"] for a in (False, True))
    assert torch.equal(judge.features(big * torch.linspace(0, 1, 1024))["alex2"], plain)
    assert (plain - smooth).abs().max() > 1e-4


def test_swav_keys_are_those_of_the_released_file(tmp_path):
    _, file = narrow_file("swav", tmp_path)
    plain = m.load_vision("swav", tmp_path, "cpu").features(torch.ones(1, 3, 32, 32))["swav"]
    state = {f"module.{key}": x for key, x in torch.load(file).items() if not key.startswith("fc.")}
    heads = {"projection_head.0.weight": torch.rand(8, 128), "projection_head.1.running_var": torch.ones(8),
             "prototypes.weight": torch.rand(30, 4)}
    heads = {f"module.{key}": x for key, x in heads.items()}
    torch.save(state | heads, file)
    assert torch.equal(m.load_vision("swav", tmp_path, "cpu").features(torch.ones(1, 3, 32, 32))["swav"], plain)
    torch.save(state | heads | {"module.layer5.weight": torch.rand(3)}, file)  # a larger network's file
    with pytest.raises(UserError, match="swav_800ep_pretrain.pth.tar cannot be read.*layer5"):
        m.load_vision("swav", tmp_path, "cpu")


def test_damaged_and_foreign_files_are_user_errors(tmp_path):
    _, file = narrow_file("alexnet", tmp_path, 1 / 32)
    whole = file.read_bytes()
    state = torch.load(file)
    damaged = {
        "half of it": whole[: len(whole) // 2],
        "another kernel": state | {"features.0.weight": torch.rand(2, 3, 7, 7)},
        "widths that do not fit each other": state | {"features.3.weight": torch.rand(6, 5, 5, 5)},
        "a missing layer": {key: x for key, x in state.items() if key != "features.8.bias"},
        "no weights": [1, 2],
    }
    for content in damaged.values():
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        with pytest.raises(UserError, match=r"alexnet-owt-7be5be79.pth cannot be read \(.*\).*--cache_dir\.$"):
            m.load_vision("alexnet", tmp_path, "cpu")


def test_what_torch_hub_downloaded_is_found(tmp_path):
    checkpoints = tmp_path / "torch_home" / "hub" / "checkpoints"
    checkpoints.mkdir(parents=True)
    _, file = narrow_file("alexnet", checkpoints, 1 / 32)
    assert m.load_vision("alexnet", tmp_path / "cache", "cpu").files == [file]
    (tmp_path / "cache").mkdir()
    mine = Path(shutil.copy(file, tmp_path / "cache"))
    assert m.load_vision("alexnet", tmp_path / "cache", "cpu").files == [mine]


# ---- captions

@pytest.fixture
def clip_cache(tmp_path):
    """clip_L/: a tiny CLIP of random weights, with the toy's tokenizer."""
    folder = tmp_path / "clip_L"
    folder.mkdir()
    tokenizer = toy_networks.build_tokenizer(folder)
    config = {"embed_dim": 24, "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 16,
                                              "head_width": 8},
              "text_cfg": {"context_length": 20, "vocab_size": len(tokenizer), "width": 16, "heads": 2, "layers": 1,
                           "hf_tokenizer_name": "clip"}}
    torch.manual_seed(0)
    clip = open_clip.CLIP(**config)
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    return clip.eval(), tokenizer, tmp_path


def test_clip_judges_pictures_and_captions(clip_cache):
    clip, tokenizer, cache = clip_cache
    judge, texts = m.load_vision("clip_l", cache, "cpu"), toy.draw_scenes(5, seed=1).captions()
    images = torch.rand(3, 3, 80, 80)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((.48145466, .4578275, .40821073),
                                                         (.26862954, .26130258, .27577711)))
    with torch.no_grad():
        seen = F.interpolate(images, (32, 32), mode="bilinear")  # not the washed-out, bicubic view of the target CLIP
        expected = clip.encode_image((seen - mean) / std)
        words = tokenizer(texts, padding="max_length", max_length=20, return_tensors="pt").input_ids
        expected_text = F.normalize(clip.encode_text(words), dim=-1)
    assert difference(judge.features(images)["clip_l"], expected) < 1e-5
    text = m.load_text("clip_l", cache, "cpu")
    assert difference(text.embed(texts), expected_text) < 1e-5
    assert text.description == judge.description and "stand-in for OpenAI's CLIP ViT-L/14" in text.description
    assert text.files == judge.files and cache / "clip_L" / "open_clip_model.safetensors" in text.files
    (cache / "clip_L" / "open_clip_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="clip_L cannot be read.*--cache_dir"):
        m.load_text("clip_l", cache, "cpu")


def test_openais_weights_get_openais_activation(tmp_path, monkeypatch):
    """In huggingface's cache there are only weights; open_clip's own config of ViT-L-14 has another GELU."""
    made = []

    def create_model(name, **options):
        made.append((name, options))
        return torch.nn.Linear(2, 2)

    monkeypatch.setattr(open_clip, "create_model", create_model)
    folder = tmp_path / "models--timm--vit_base_patch32_clip_224.openai"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc").mkdir(parents=True)
    file = folder / "snapshots" / "abc" / "open_clip_model.safetensors"
    file.write_bytes(b"weights")
    assert m.load_openai_clip("clip_b", tmp_path, "cpu").files == [file]
    assert made == [("ViT-B-32", {"pretrained": str(file), "force_quick_gelu": True, "require_pretrained": True})]


@pytest.fixture
def sentence_cache(tmp_path):
    """sentence/: a tiny BERT of random weights in SentenceTransformers' layout."""
    folder = tmp_path / "sentence"
    folder.mkdir()
    tokenizer = toy_networks.build_tokenizer(folder)
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                                intermediate_size=16, max_position_embeddings=32, initializer_range=.5))
    bert.save_pretrained(folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20}))
    return tmp_path


def test_padding_does_not_matter_to_sentences(sentence_cache):
    short, long = "a small red ball on sand at night", " and ".join(["a large blue box"] * 3) + " on mud in fog"
    judge = m.load_text("sentence", sentence_cache, "cpu")
    together, alone = judge.embed([short, long]), torch.cat([judge.embed([text]) for text in (short, long)])
    assert together.shape == (2, 16) and (together - alone).abs().max() < 1e-5
    assert (together.norm(dim=1) - 1).abs().max() < 1e-5 and together[0] @ together[1] < .99
    bert, tokenizer = (kind.from_pretrained(sentence_cache / "sentence") for kind in (AutoModel, AutoTokenizer))
    with torch.no_grad():
        vectors = bert(tokenizer(short, return_tensors="pt").input_ids).last_hidden_state[0]  # no padding, no mask
    assert (F.normalize(vectors.mean(0), dim=0) - together[0]).abs().max() < 1e-5
    assert (judge.embed([short] * 130) - together[0]).abs().max() < 1e-5  # more than one batch
    full = " ".join(["snow"] * 18)  # with the start and the end, the 20 words that the folder's settings allow
    cut = judge.embed([full, f"{full} ball"])
    assert (cut[0] - cut[1]).abs().max() < 1e-5
    assert "stand-in for SentenceTransformer all-MiniLM-L6-v2" in judge.description
    assert sentence_cache / "sentence" / "model.safetensors" in judge.files


def test_a_sentence_model_without_a_weight_is_refused(sentence_cache):
    file, lost = sentence_cache / "sentence" / "model.safetensors", "encoder.layer.1.output.dense.weight"
    save_file({name: x for name, x in load_file(file).items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(UserError, match=f"no {lost} in sentence.*--cache_dir"):
        m.load_text("sentence", sentence_cache, "cpu")


# ---- what is not there

def test_missing_names_the_file_and_the_command(tmp_path, capsys):
    files = {"alexnet": "alexnet-owt-7be5be79.pth", "inception": "inception_v3_google-0cc3c7bd.pth",
             "efficientnet": "efficientnet_b1-c27df63c.pth", "swav": "swav_800ep_pretrain.pth.tar",
             "clip_l": "clip_L/", "clip_b": "clip_B/", "sentence": "sentence/"}
    loads = [(m.load_vision, name) for name in (*CONV, "clip_l")]
    loads += [(m.load_text, name) for name in ("clip_l", "clip_b", "sentence")]
    for load, name in loads:
        with pytest.raises(m.Missing, match=f"is not in {tmp_path}: .*`python judges.py.* --download`.$") as e:
            load(name, tmp_path, "cpu")
        assert files[name] in str(e.value) and (name not in CONV or m.VISION[name].url in str(e.value))
    narrow_file("alexnet", tmp_path, 1 / 32)
    assert m.main(["--cache_dir", str(tmp_path)]) == {name: name == "alexnet" for name in m.JUDGES}
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(m.JUDGES) and "stand-in" in printed[0] and "is not in" in printed[1]


def test_download_brings_what_is_missing_and_checks_it(tmp_path, monkeypatch):
    source, cache = tmp_path / "server", tmp_path / "cache"
    source.mkdir()
    _, file = narrow_file("alexnet", source, 1 / 32)
    cache.mkdir()
    called = []

    def fetch(url, place, digest):
        called.append((url, digest))
        shutil.copy(file, place)

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    m.download("alexnet", cache)
    assert called == [("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", "7be5be79")]
    assert m.load("alexnet", cache).files == [cache / file.name]
    m.download("swav", cache)
    assert called[1] == ("https://dl.fbaipublicfiles.com/deepcluster/swav_800ep_pretrain.pth.tar", None)

    def offline(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError, match="huggingface.co/sentence-transformers.*no route to host.*--cache_dir"):
        m.download("sentence", cache)


# ---- the toy's stand-ins

def test_training_writes_files_that_the_judges_read(tmp_path, monkeypatch):
    scenes = toy.draw_scenes(40, seed=5)
    scenes.count[:] = 2  # so that no batch is without second objects
    images = toy.render(scenes)
    for name in ("alexnet", "swav", "clip_B", "sentence"):
        monkeypatch.setitem(toy_networks.BATCH, name, 3)
    for name in ("alexnet", "swav"):
        toy_networks.train_convolutional(name, images, scenes, tmp_path, "cpu", scale=0)
        features = m.load_vision(name, tmp_path, "cpu").features(images[:3].float() / 255)
        assert all(x.isfinite().all() and x.std() > 0 for x in features.values())
    toy_networks.train_judge_clip("clip_B", images, scenes, tmp_path / "clip_B", "cpu", scale=0)
    toy_networks.train_sentence(scenes, tmp_path / "sentence", "cpu", scale=0)
    for name, width in (("clip_b", 32), ("sentence", 48)):
        vectors = m.load_text(name, tmp_path, "cpu").embed(scenes.captions())
        assert vectors.shape == (40, width) and vectors.isfinite().all()
    modules = json.loads((tmp_path / "sentence" / "modules.json").read_text())
    assert [part["path"] for part in modules] == ["", "1_Pooling", "2_Normalize"]


def test_shared_attributes_by_hand():
    caption = torch.tensor([[0, 1, 2, 3, 1, -100, -100, -100]])     # ground, sky, one object
    other_sky = torch.tensor([[0, 2, 2, 3, 1, -100, -100, -100]])
    with_another = torch.tensor([[0, 1, 7, 4, 0, 2, 3, 1]])         # the same object, now to the right of a second one
    share = toy_networks.shared_attributes
    assert share(caption, caption) == 1 and share(caption, other_sky) == 4 / 5
    assert share(caption, with_another) == share(with_another, caption) == 5 / 8
    both = torch.cat([other_sky, with_another])
    assert torch.equal(share(caption, both), torch.tensor([[4 / 5, 5 / 8]]))


def test_fid_inception_from_its_file(tmp_path, monkeypatch):
    with pytest.raises(m.Missing, match=f"FID's Inception .*{m.file_name('fid')}.* is not in"):
        m.load_fid(tmp_path, "cpu")
    with monkeypatch.context() as patch:  # a file in the released one's layout, of random weights
        patch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(NoTrainInceptionV3, "load_state_dict", lambda *_: None)
        state = NoTrainInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    file = tmp_path / m.file_name("fid")
    torch.save(state, file)
    judge = m.load_fid(tmp_path, "cpu")
    pictures = torch.randint(0, 255, (2, 3, 64, 64), dtype=torch.uint8)
    said = judge.network(pictures)
    assert said.shape == (2, 2048) and torch.isfinite(said).all() and judge.files == [file]
    del state["fc.bias"]
    torch.save(state, file)
    with pytest.raises(UserError, match="cannot be read"):
        m.load_fid(tmp_path, "cpu")
    torch.save({"code": Path}, file)
    with pytest.raises(UserError, match="UnpicklingError"):
        m.load_fid(tmp_path, "cpu")
