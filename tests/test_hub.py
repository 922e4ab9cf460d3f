"""Tests of hub.py against a server on the loopback address that speaks as much of the hub's API as we use.

Run: python -m pytest tests/test_hub.py
"""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub
import nltk
import open_clip
import pytest
import torch

import frozen
import gnet
import hub as m
import judges
import refine
from model import UserError

ROOT = Path(__file__).parents[1]
CLIP, GIT = (m.NETWORKS[name][0] for name in ("clip", "git"))
BETAS = "betas_all_subj0{}_fp32_renorm.hdf5"
CONTENT = {  # what the dataset repository holds, as far as its users tell; contents are ours
    **{BETAS.format(s): f"betas {s} ".encode() * 5000 for s in range(1, 9)},
    **{f"wds/subj0{s}/{split}/0.tar": f"{split} {s}".encode() for s in range(1, 9) for split in ("train", "new_test")},
    "coco_images_224_float16.hdf5": bytes(range(256)) * 1000, "brain_region_masks.hdf5": b"masks",
    "COCO_73k_subj_indices.hdf5": b"indices", "README.md": b"small, kept by git itself",
    frozen.VAE_FILE: b"vae", frozen.CONVERTER_FILE: b"converter", frozen.UNCLIP_FILE: b"unclip", gnet.FILE: b"gnet",
    "convnext_xlarge_alpha0.75_fullckpt.pth": b"teacher", "human_trials_mindeye2.ipynb": b"notebook",
    "subj01_annots.npy": b"annotations", "shared1000.npy": b"shared",
    "evals/all_images.pt": b"images", "evals/all_captions.pt": b"captions",
    "evals/all_git_generated_captions.pt": b"git", "evals/other/other_all_recons.pt": b"another run's",
    "train_logs/final_subj01_pretrained_40sess_24bs/last.pth": b"weights" * 9000,
    "train_logs/final_subj01_pretrained_40sess_24bs/train_loss.png": b"curve",
    "train_logs/final_multisubject_subj01/last/zero_pp_rank_0_mp_rank_00_optim_states.pt": b"rank 0",
    "train_logs/final_multisubject_subj01/last/mp_rank_00_model_states.pt": b"model states",
}  # fmt: skip


class Hub(ThreadingHTTPServer):
    """Repositories by name, faults by path, and every request that came: (method, path, first byte, token)."""
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repositories, self.revisions, self.requests = {m.REPOSITORY: dict(CONTENT)}, {}, []
        self.drops, self.dead = {}, {}  # path: byte at which the connection is lost, once or always
        self.wrong, self.sizes = {}, {}  # path: other content than listed, other size than is true
        self.status = None  # answers everything

    def commit(self, repository: str) -> str:
        files = self.repositories[repository]
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()

    def asked(self, path: str) -> list[int]:
        """First byte of each request for a file."""
        return [start for _, asked, start, _ in self.requests if asked.endswith("/" + path) and "/resolve/" in asked]


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, body: bytes, status: int = 200, **headers):
        self.send_response(status)
        for name, value in ({"Content-Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        hub, path = self.server, unquote(urlsplit(self.path).path)
        start = int(re.search(r"\d+", self.headers.get("Range", "bytes=0-"))[0])
        hub.requests.append((self.command, path, start, self.headers.get("Authorization")))
        if hub.status:
            code = {"X_Error_Code": "GatedRepo"} if hub.status == 403 else {}
            return self.answer(b"{}", hub.status, **code)
        found = re.fullmatch(
            r"/(?:api/)?(?:datasets/|models/)?([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)/?(.*)", path)
        files = hub.repositories.get(found[1]) if found else None
        if files is None:
            return self.answer(b"{}", 404, X_Error_Code="RepoNotFound")
        if found[3] not in ("main", commit := hub.commit(found[1])):
            files = hub.revisions.get(found[3])
            commit = found[3]
            if files is None:
                return self.answer(b"{}", 404, X_Error_Code="RevisionNotFound")
        if found[2] == "revision":
            return self.answer(json.dumps({"id": found[1], "sha": commit, "siblings": []}).encode())
        if found[2] == "tree":
            return self.answer(json.dumps([self.entry(path, body) for path, body in files.items()]).encode())
        return self.file(found[4], hub.wrong.get(found[4], files[found[4]]), start)

    do_HEAD = do_GET

    def entry(self, path: str, body: bytes) -> dict:
        size, blob = self.server.sizes.get(path, len(body)), hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        large = {"lfs": {"oid": hashlib.sha256(body).hexdigest(), "size": size, "pointerSize": 130}}
        return {"type": "file", "path": path, "size": size, "oid": blob} | (large if path[-3:] != ".md" else {})

    def file(self, path: str, body: bytes, start: int):
        if start >= len(body):
            return self.answer(b"", 416)
        dead = self.server.dead.get(path) if len(self.server.asked(path)) < 60 else None  # or a test might hang
        end = self.server.drops.pop(path, dead)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        self.wfile.write(body[start:end])
        self.wfile.flush()
        if end is not None:
            self.close_connection = True
            self.connection.close()


@pytest.fixture
def server(monkeypatch, tmp_path):
    hub = Hub()
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": .01}, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "no_cache"))
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)  # 10 MB: what a lost connection costs
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # huggingface_hub waits before it tries again
    yield hub
    hub.shutdown()
    hub.server_close()


def get(folder: Path, *flags: str, networks: bool = False) -> list[m.File]:
    flags = flags if networks else (*flags, "--no-networks")
    return m.main(["download", "--data_path", str(folder / "nsd"), "--cache_dir", str(folder / "cache"),
                   "--train_logs", str(folder / "train_logs"), *flags])  # fmt: skip


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_brings_what_the_stages_read_for_the_chosen_subjects_only(server, tmp_path, capsys):
    get(tmp_path, "--subjects", "1", "7")
    shared = {"coco_images_224_float16.hdf5", "brain_region_masks.hdf5", "COCO_73k_subj_indices.hdf5", "README.md",
              "shared1000.npy", "evals/all_images.pt", "evals/all_captions.pt", "evals/all_git_generated_captions.pt"}
    own = {BETAS.format(s) for s in (1, 7)}
    own |= {f"wds/subj0{s}/{split}/0.tar" for s in (1, 7) for split in ("train", "new_test")}
    assert tree(tmp_path / "nsd") == shared | own | {m.RECORD}
    assert tree(tmp_path / "cache") == {frozen.VAE_FILE, frozen.CONVERTER_FILE, frozen.UNCLIP_FILE, gnet.FILE,
                                        "convnext_xlarge_alpha0.75_fullckpt.pth"}
    assert not (tmp_path / "train_logs").exists()
    for path in shared | own:
        assert (tmp_path / "nsd" / path).read_bytes() == CONTENT[path]
    printed = capsys.readouterr().out
    assert f"{m.REPOSITORY} at {server.commit(m.REPOSITORY)[:10]}: 19 files" in printed
    assert refine.SDXL_FILE in printed  # not in this repository: says from where


def test_a_second_call_fetches_nothing_and_a_lost_or_changed_file_again(server, tmp_path):
    get(tmp_path, "--subjects", "1")
    server.requests.clear()
    get(tmp_path, "--subjects", "1")
    assert [path for _, path, _, _ in server.requests if "/resolve/" in path] == []

    betas, masks = tmp_path / "nsd" / BETAS.format(1), tmp_path / "nsd" / "brain_region_masks.hdf5"
    betas.write_bytes(b"cut short")
    masks.unlink()
    get(tmp_path, "--subjects", "1")
    assert betas.read_bytes() == CONTENT[betas.name] and masks.read_bytes() == b"masks"
    assert server.asked(betas.name) == [0] and server.asked("coco_images_224_float16.hdf5") == []


def test_takes_over_files_of_the_originals_snippet_only_if_whole(server, tmp_path):
    (tmp_path / "nsd").mkdir()
    images, betas = "coco_images_224_float16.hdf5", BETAS.format(1)
    (tmp_path / "nsd" / images).write_bytes(CONTENT[images])
    (tmp_path / "nsd" / betas).write_bytes(b"x" * len(CONTENT[betas]))  # right size, wrong content
    get(tmp_path, "--subjects", "1")
    assert server.asked(images) == [] and server.asked(betas) == [0]
    assert (tmp_path / "nsd" / betas).read_bytes() == CONTENT[betas]


def test_goes_on_in_the_middle_of_a_file_after_a_dropped_connection(server, tmp_path):
    path = "coco_images_224_float16.hdf5"
    server.drops[path] = 100_000
    get(tmp_path, "--subjects", "1")
    assert server.asked(path) == [0, 100_000]
    assert (tmp_path / "nsd" / path).read_bytes() == CONTENT[path]
    assert not list(tmp_path.rglob("*.part"))


def test_gives_up_on_a_dead_connection_and_goes_on_next_time(server, tmp_path):
    path = "coco_images_224_float16.hdf5"
    server.dead[path] = 100_000
    with pytest.raises(UserError, match=f"{path} cannot be fetched .*again, it goes on where it stopped"):
        get(tmp_path, "--subjects", "1")
    assert len(server.asked(path)) <= 1 + 6 * (m.TRIES + 1) and set(server.asked(path)) == {0, 100_000}
    assert not (tmp_path / "nsd" / path).exists() and next(tmp_path.rglob("*.part")).stat().st_size == 100_000
    server.dead.clear()
    server.requests.clear()
    get(tmp_path, "--subjects", "1")
    assert server.asked(path) == [100_000] and server.asked(BETAS.format(1)) == []  # which came before it
    assert (tmp_path / "nsd" / path).read_bytes() == CONTENT[path]


def test_goes_on_in_the_middle_of_a_file_after_a_kill(server, tmp_path):
    path, body = "coco_images_224_float16.hdf5", CONTENT["coco_images_224_float16.hdf5"]
    digest = hashlib.sha256(body).hexdigest()
    (tmp_path / "nsd").mkdir()
    (tmp_path / "nsd" / f"{path}.{digest[:12]}.part").write_bytes(body[:70_000])
    (tmp_path / "nsd" / f"{path}.{'0' * 12}.part").write_bytes(b"of another revision")
    get(tmp_path, "--subjects", "1")
    assert server.asked(path) == [70_000]
    assert (tmp_path / "nsd" / path).read_bytes() == body
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize("name, wrong, reason", [
    ("coco_images_224_float16.hdf5", bytes(256_000), "checksum"),
    ("README.md", b"SMALL, kept by git itself", "checksum"),
    ("coco_images_224_float16.hdf5", bytes(300_000), "instead of 256,000"),
    ("coco_images_224_float16.hdf5", bytes(1000), "1,000 bytes instead of 256,000"),
])  # fmt: skip
def test_a_damaged_file_is_refused_in_one_sentence_and_comes_anew(server, tmp_path, name, wrong, reason):
    server.wrong[name] = wrong
    with pytest.raises(UserError, match=f"{name} arrived damaged .*{reason}.* run the same command again") as error:
        get(tmp_path, "--subjects", "1")
    assert str(error.value).count("\n") == 0
    assert not (tmp_path / "nsd" / name).exists() and not list(tmp_path.rglob("*.part"))
    server.wrong.clear()
    get(tmp_path, "--subjects", "1")
    assert (tmp_path / "nsd" / name).read_bytes() == CONTENT[name]


@pytest.mark.parametrize("status", [401, 403])
def test_who_may_not_enter_reads_which_page_to_agree_to(server, tmp_path, monkeypatch, status):
    server.status = status
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    with pytest.raises(UserError, match=f"{server.address}/datasets/{m.REPOSITORY} .*agree.*`hf auth login`"):
        get(tmp_path, "--subjects", "1")
    assert {token for *_, token in server.requests} == {"Bearer hf_mine"}
    assert tree(tmp_path) == set()


def test_the_token_goes_along_with_each_file(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_mine")
    get(tmp_path, "--subjects", "1")
    assert {token for *_, token in server.requests} == {"Bearer hf_mine"}


def test_a_full_disk_is_noticed_before_the_first_byte(server, tmp_path, monkeypatch):
    total = sum(file.size for file in get(tmp_path / "first", "--subjects", "1"))
    server.requests.clear()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=total - 1))
    with pytest.raises(UserError, match=r"GB free, .* GB are needed: free .* --data_path, --cache_dir"):
        get(tmp_path / "second", "--subjects", "1")
    assert not [path for _, path, *_ in server.requests if "/resolve/" in path] and tree(tmp_path / "second") == set()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=total))
    get(tmp_path / "second", "--subjects", "1")
    with pytest.raises(UserError, match="another disk"):  # 70 GB more, which nobody has here
        server.sizes["coco_images_224_float16.hdf5"] = 70 * 10**9
        get(tmp_path / "second", "--subjects", "1")


@pytest.mark.parametrize("answer, fetched", [("y", True), ("", False), (None, False)])
def test_asks_before_a_large_download(server, tmp_path, monkeypatch, answer, fetched):
    asked = []

    def typed(question: str) -> str:
        asked.append(question)
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**12, 0, 10**12))
    monkeypatch.setattr(m, "ASK_ABOVE", 250_000)
    if fetched:
        get(tmp_path, "--subjects", "1")
    else:
        with pytest.raises(UserError, match="pass --yes"):
            get(tmp_path, "--subjects", "1")
    assert len(asked) == 1 and "GB" in asked[0] and (tmp_path / "nsd" / BETAS.format(1)).exists() == fetched
    get(tmp_path, "--subjects", "1", "--yes")
    assert len(asked) == 1 and (tmp_path / "nsd" / BETAS.format(1)).exists()


def test_stays_at_the_revision_of_the_first_download(server, tmp_path):
    get(tmp_path, "--subjects", "1")
    old = server.commit(m.REPOSITORY)
    server.revisions[old] = dict(server.repositories[m.REPOSITORY])
    server.repositories[m.REPOSITORY]["brain_region_masks.hdf5"] = b"MASKS"  # same size, main has moved on
    masks = tmp_path / "nsd" / "brain_region_masks.hdf5"
    masks.unlink()
    get(tmp_path, "--subjects", "1")
    assert masks.read_bytes() == b"masks"
    assert json.loads((tmp_path / "nsd" / m.RECORD).read_text())["revisions"] == {m.REPOSITORY: old}
    get(tmp_path, "--subjects", "1", "--revision", "main")
    assert masks.read_bytes() == b"MASKS"
    with pytest.raises(UserError, match="no such revision: leave out --revision"):
        get(tmp_path, "--subjects", "1", "--revision", "v9")


def test_errors_name_the_mend(server, tmp_path, monkeypatch):
    del server.repositories[m.REPOSITORY][BETAS.format(4)]
    with pytest.raises(UserError, match="no betas of subject 4: leave it out of --subjects"):
        get(tmp_path, "--subjects", "1", "4")
    with pytest.raises(UserError, match="no model mine: choose --with_checkpoints from final_multisub"):
        get(tmp_path, "--subjects", "1", "--with_checkpoints", "mine")
    server.repositories[CLIP] = {"README.md": b""}
    server.repositories[GIT] = {}
    with pytest.raises(UserError, match="none of open_clip_model.safetensors.* --no-networks"):
        get(tmp_path, "--subjects", "1", networks=True)
    (tmp_path / "nsd").mkdir()
    (tmp_path / "nsd" / m.RECORD).write_text("{")
    with pytest.raises(UserError, match="download.json is damaged .*delete it"):
        get(tmp_path, "--subjects", "1")
    (tmp_path / "nsd" / m.RECORD).unlink()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="/file cannot be written .*another folder with --data_path, --cache_dir"):
        get(tmp_path, "--subjects", "1", "--cache_dir", str(tmp_path / "file"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")  # nobody listens
    with pytest.raises(UserError, match="cannot be fetched .*run the same command again"):
        get(tmp_path, "--subjects", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set: unset it"):
        get(tmp_path, "--subjects", "1")
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set: unset it"):
        m.fetch_model("final_multisubject_subj01", tmp_path)


def test_other_repositories_networks_are_read_without_the_net(server, tmp_path, monkeypatch, capsys):
    """A small CLIP and GIT in the repositories' places: after the download, the loaders of frozen.py need no hub."""
    toy = ROOT / "toy_networks"
    git = {path.name: path.read_bytes() for path in (toy / "git").iterdir()}
    clip = (toy / "clip" / "open_clip_model.safetensors").read_bytes()
    server.repositories[GIT] = git | {"pytorch_model.bin": b"the same again", "training/args.json": b"{}"}
    server.repositories[CLIP] = {"open_clip_model.safetensors": clip, "open_clip_pytorch_model.bin": b"the same again",
                                 "README.md": b""}  # fmt: skip
    server.repositories[m.REPOSITORY][frozen.CONVERTER_FILE] = (toy / frozen.CONVERTER_FILE).read_bytes()
    small = json.loads((toy / "clip" / "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: {"ViT-bigG-14": small}[name])
    brought, words = [], []
    monkeypatch.setattr(judges, "download", lambda name, cache_dir: brought.append(name))
    monkeypatch.setattr(judges, "find_file", lambda name, cache_dir: Path(ROOT) if name == "swav" else Path("/nowhere"))
    monkeypatch.setattr(nltk, "download", lambda name, download_dir, quiet: words.append((name, download_dir)))

    get(tmp_path, "--subjects", "1", "--yes", networks=True)
    cache = tmp_path / "cache"
    assert tree(cache / "git") == set(git)
    assert tree(cache / "clip") == {"open_clip_model.safetensors", "open_clip_config.json"}
    assert brought == ["alexnet", "inception", "efficientnet", "clip_l", "clip_b", "sentence", "fid"]
    assert words == [("wordnet", str(cache / "nltk_data"))] and "7 judges, 3.0" in capsys.readouterr().out

    for name in ("tokenizer.json", "tokenizer_config.json"):  # the toy's words; bigG's are open_clip's own
        shutil.copy(toy / "clip" / name, cache / "clip")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    tokens = frozen.load_clip(cache, "cpu").tokens(torch.rand(1, 3, 64, 64))
    assert isinstance(frozen.load_captioner(cache, "cpu").caption(tokens)[0], str)
    assert server.requests == []

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    get(tmp_path, "--subjects", "1", "--yes", networks=True)
    assert not [path for _, path, *_ in server.requests if CLIP in path or GIT in path]


def test_bigG_is_the_network_that_load_clip_would_download(tmp_path):
    m.describe_clip(tmp_path)
    described = json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]
    assert described == open_clip.get_model_config("ViT-bigG-14")
    assert described["vision_cfg"]["width"] == 1664 and described["vision_cfg"]["layers"] == 48
    assert open_clip.pretrained.get_pretrained_cfg("ViT-bigG-14", "laion2b_s39b_b160k")["hf_hub"].strip("/") == CLIP
    assert refine.SDXL_FILE == m.SDXL_FILE


def test_released_models_by_name(server, tmp_path):
    name = "final_subj01_pretrained_40sess_24bs"
    path = m.fetch_model(name, tmp_path)
    assert path == tmp_path / name / "last.pth" and path.read_bytes() == b"weights" * 9000
    assert tree(tmp_path) == {f"{name}/last.pth"}
    server.requests.clear()
    assert m.fetch_model(name, tmp_path) == path and server.requests == []
    get(tmp_path, "--subjects", "1", "--with_checkpoints", name)
    assert (tmp_path / "train_logs" / name / "last.pth").read_bytes() == b"weights" * 9000


def test_a_released_model_in_deepspeeds_form(server, tmp_path):
    name, states = "final_multisubject_subj01", "mp_rank_00_model_states.pt"
    server.wrong[f"train_logs/{name}/last/{states}"] = b"MODEL STATES"
    with pytest.raises(UserError, match="arrived damaged"):
        m.fetch_model(name, tmp_path)
    server.wrong.clear()
    server.requests.clear()
    m.fetch_model(name, tmp_path)  # half of it was there, which does not pass for the model
    assert server.asked(states) == [0] and server.asked("zero_pp_rank_0_mp_rank_00_optim_states.pt") == []
    assert tree(tmp_path / name / "last") == {states, "zero_pp_rank_0_mp_rank_00_optim_states.pt"}
    server.requests.clear()
    m.fetch_model(name, tmp_path)
    assert server.requests == []


def test_unknown_models_are_answered_with_the_known_ones(server, tmp_path):
    with pytest.raises(UserError, match="mine is no released model: .* choose --model_name from final_subj01"):
        m.fetch_model("mine", tmp_path)
    assert server.requests == []  # not even asked
    with pytest.raises(UserError, match="no model final_multisubject_subj03: choose --multisubject_ckpt from final"):
        m.fetch_model("final_multisubject_subj03", tmp_path, "--multisubject_ckpt")
    assert len(m.RELEASED) == 13 and all(m.PERHAPS_RELEASED.fullmatch(name) for name in m.RELEASED)
    assert not any(m.PERHAPS_RELEASED.fullmatch(name) for name in ("multisubject_subj01", "subj01_1sess", "testing"))


def test_as_a_command(server, tmp_path):
    """What a user types, in a process of its own: HF_ENDPOINT is heard, and a damaged file ends it with code 2."""
    server.wrong["brain_region_masks.hdf5"] = b"MASKS"
    command = [sys.executable, ROOT / "hub.py", "download", "--data_path", tmp_path, "--subjects", "1"]
    command += ["--no-networks"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.splitlines()[-1].startswith("error: brain_region_masks.hdf5 arrived damaged")
    assert "Traceback" not in run.stderr
