"""Download: the data, the frozen networks and the released models, so that every later stage runs without the net.

Three sources, one command, two folders:

    Hugging Face dataset pscotti/mindeyev2     betas, wds, images, masks, evals          -> --data_path
        the networks at its top level          .pth, .pt, .ckpt, .safetensors            -> --cache_dir
        train_logs/NAME                        a released model, if asked for            -> --train_logs
    Hugging Face models                        OpenCLIP ViT-bigG/14, GIT-large           -> --cache_dir/clip, git
    the judges' own servers (judges.py)        AlexNet, .., and WordNet for METEOR       -> --cache_dir

    python data.py download --data_path nsd --subjects 1                      one subject; prints its size, then asks
    python data.py download --data_path nsd --subjects 1 2 5 7 --yes          the paper's four, without being asked
    python data.py download --data_path nsd --with_checkpoints final_subj01_pretrained_40sess_24bs
    HF_HUB_OFFLINE=1 python recon.py --data_path nsd ...                      then, on a node without internet

Killed, it goes on where it stopped, in the middle of a file too. A file gets its name only when its bytes have the
checksum that the repository lists, so what has its name is whole. {data_path}/download.json records the revision that
was taken and each file's checksum; later calls stay at that revision unless --revision says otherwise.

NSD is free but not ours to give: agree to its terms first (README.md). The repository holds over 100 GB; what the
original's README leaves out (other runs' evals and train_logs, two files of the authors' own) is left out here.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import nltk
import open_clip
from huggingface_hub import errors
from huggingface_hub.file_download import http_get
from tqdm import tqdm

import frozen
import judges
from files import is_disk_full, replacing
from model import UserError, run_main

REPOSITORY = "pscotti/mindeyev2"
ASK_ABOVE = 20e9  # bytes
TRIES = 3         # in a row without a byte, each of them with five of http_get's own, before we give up on a file
RECORD = "download.json"
NETWORK_ERRORS = (OSError, errors.HfHubHTTPError.__bases__[0])  # whichever HTTP library huggingface_hub is built on

# EXCLUDED is left out, as in the original's README (which leaves out shared1000.npy too, but `check` reads it);
# of it, INCLUDED is taken all the same.
EXCLUDED = ("train_logs/", "evals/", "human_trials_mindeye2.ipynb", "subj01_annots.npy")
INCLUDED = ("evals/all_images.pt", "evals/all_captions.pt", "evals/all_git_generated_captions.pt")
WEIGHTS = (".pth", ".pt", ".ckpt", ".safetensors")  # at the repository's top level: a frozen network

# The networks that other repositories hold: folder of cache_dir, repository, its weights (the first that is there),
# what else is needed. In these folders nothing asks the hub again, not even whether there is news.
NETWORKS = {
    "clip": (*frozen.BIGG, ()),
    "git": (*frozen.GIT, ("*.json", "*.txt")),
}
SDXL_FILE = "zavychromaxl_v30.safetensors"  # refine.py's
JUDGES_SIZE = 3e9  # bytes, all eight, nearly

RELEASED = (
    *(f"final_subj0{s}_pretrained_40sess_24bs" for s in (1, 2, 5, 7)),
    *(f"final_subj0{s}_pretrained_1sess_24bs" for s in (1, 2, 5, 7)),
    *(f"final_multisubject_subj0{s}" for s in (1, 2, 5, 7)),
    "multisubject_subj01_1024hid_nolow_300ep",
)
# Other subjects' models may be there, too: such a name is worth a look at the repository's list.
PERHAPS_RELEASED = re.compile(r"final_multisubject_subj0[1-8]|final_subj0[1-8]_pretrained_\d+sess_24bs|"
                              r"multisubject_subj0[1-8]_1024hid_nolow_300ep")


class File(NamedTuple):
    """One file of a repository, and where it goes."""
    url: str
    page: str     # for people
    path: str     # in the repository
    size: int     # bytes
    digest: str   # sha256 of a large file, git's sha1 of a small one
    target: Path

    @property
    def part(self) -> Path:
        """What has come so far: named for the content, so that another revision's leftovers are never gone on with."""
        return self.target.with_name(f"{self.target.name}.{self.digest[:12]}.part")


# ---------------------------------------------------------------------------------------------------------------------
# What there is, and what of it is wanted

def failure(error: Exception, what: str, page: str) -> UserError:
    """The one sentence for what went wrong between us and a server."""
    if isinstance(error, errors.OfflineModeIsEnabled):
        return UserError(f"{what} cannot be fetched while HF_HUB_OFFLINE is set: unset it for this command.")
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{page} has no such revision: leave out --revision, or copy one from the page's history.")
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return UserError(f"{page} does not let you in: agree to its terms there in a browser, then run `hf auth login` "
                         "with a token of the same account.")  # fmt: skip
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return UserError(f"{what} cannot be fetched ({reason}): run the same command again, it goes on where it stopped.")


def list_files(repository: str, repo_type: str, revision: str = "main") -> tuple[str, dict[str, File]]:
    """The commit that `revision` names, and {path: File} of all its files, still without a target. Raises UserError."""
    hub = huggingface_hub.HfApi(endpoint=endpoint())
    page = f"{endpoint()}/{'datasets/' if repo_type == 'dataset' else ''}{repository}"
    try:
        commit = hub.repo_info(repository, repo_type=repo_type, revision=revision).sha
        entries = list(hub.list_repo_tree(repository, recursive=True, revision=commit, repo_type=repo_type))
    except NETWORK_ERRORS as error:
        raise failure(error, f"the list of {repository}'s files", page) from None
    files = {}
    for entry in (entry for entry in entries if isinstance(entry, huggingface_hub.hf_api.RepoFile)):
        url = huggingface_hub.hf_hub_url(repository, entry.path, repo_type=repo_type, revision=commit,
                                         endpoint=endpoint())
        digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
        files[entry.path] = File(url, page, entry.path, entry.size, digest, Path())
    return commit, files


def endpoint() -> str:
    """The hub's address: HF_ENDPOINT, for a mirror, or huggingface.co."""
    return os.environ.get("HF_ENDPOINT", huggingface_hub.constants.ENDPOINT).rstrip("/")


def wanted(path: str, subjects: Iterable[int]) -> bool:
    """Is this file of the dataset repository needed for these subjects? (Checkpoints are another matter.)"""
    if path not in INCLUDED and any(name in path for name in EXCLUDED):
        return False
    owner = re.match(r"(?:wds/|betas_all_)subj0(\d)", path)
    return owner is None or int(owner[1]) in subjects


def model_files(files: dict[str, File], name: str, flag: str) -> list[File]:
    """The files of a released model: last.pth, or DeepSpeed's folder last/ where there is none. Raises UserError."""
    whole = f"train_logs/{name}/last.pth"
    found = [whole] if whole in files else [path for path in files if path.startswith(f"train_logs/{name}/last/")]
    if not found:
        there = sorted({path.split("/")[1] for path in files if path.startswith("train_logs/") and "/last" in path})
        raise UserError(f"{REPOSITORY} has no model {name}: choose {flag} from {', '.join(there) or 'none at all'}.")
    # The model's own file last: while it is missing, so is the model.
    return [files[path] for path in sorted(found, key=lambda path: ("model_states" in path, path))]


def dataset_files(args: argparse.Namespace, files: dict[str, File]) -> list[File]:
    """What is wanted of the dataset repository, each with its target."""
    chosen = [file for path, file in files.items() if wanted(path, args.subjects)]
    for subject in args.subjects:
        if not any(re.match(rf"betas_all_subj0{subject}", file.path) for file in chosen):
            raise UserError(f"{REPOSITORY} has no betas of subject {subject}: leave it out of --subjects.")
    folder = lambda path: args.cache_dir if "/" not in path and path.endswith(WEIGHTS) else args.data_path  # noqa: E731
    chosen = [file._replace(target=folder(file.path) / file.path) for file in chosen]
    for name in args.with_checkpoints:
        chosen += [file._replace(target=args.train_logs.joinpath(*Path(file.path).parts[1:]))
                   for file in model_files(files, name, "--with_checkpoints")]
    return chosen


def network_files(name: str, cache_dir: Path, files: dict[str, File]) -> list[File]:
    """What is wanted of one of NETWORKS, the weights last. Raises UserError if the repository has none that we know."""
    repository, weights, patterns = NETWORKS[name]
    found = next((path for path in weights if path in files), None)
    if found is None:
        raise UserError(f"{repository} has none of {', '.join(weights)}: bring {cache_dir / name} by other means, "
                        "and pass --no-networks.")  # fmt: skip
    others = [path for path in files if "/" not in path and any(fnmatch(path, pattern) for pattern in patterns)]
    return [files[path]._replace(target=cache_dir / name / path) for path in [*others, found]]


# ---------------------------------------------------------------------------------------------------------------------
# One file

def checksum(path: Path, digest: str) -> str:
    """The file's checksum of the kind that `digest` is: sha256 of 64 digits, or git's sha1 of 40."""
    size = path.stat().st_size
    total = hashlib.sha256() if len(digest) == 64 else hashlib.sha1(f"blob {size}\0".encode())
    bar = tqdm(total=size, desc=f"checking {path.name}", unit="B", unit_scale=True, leave=False, disable=size < 1e9)
    with open(path, "rb") as stream, bar:
        while block := stream.read(2**22):
            total.update(block)
            bar.update(len(block))
    return total.hexdigest()


def is_here(file: File, known: dict[str, str]) -> bool:
    """Is the file at its place, whole and of this revision? Looks into it only when download.json does not know."""
    if not file.target.is_file() or file.target.stat().st_size != file.size:
        return False
    return file.digest == (known.get(str(file.target.absolute())) or checksum(file.target, file.digest))


def transfer(file: File, title: str) -> None:
    """Bring file.part to its full size, from wherever it is: after a dropped connection, after a kill.

    (huggingface_hub's own hf_hub_download begins a file anew after a kill: a nuisance at 22 GB.)
    """
    headers, idle = huggingface_hub.utils.build_hf_headers(), 0
    while True:
        with open(file.part, "ab") as stream:
            before = stream.tell()
            if before >= file.size:
                return
            try:
                http_get(file.url, stream, resume_size=before, headers=headers, expected_size=file.size,
                         displayed_filename=title)  # fmt: skip
            except NETWORK_ERRORS as error:
                status = getattr(getattr(error, "response", None), "status_code", None)
                if is_disk_full(error):
                    raise
                if status == 416:  # nothing comes after what we have: the server's file is shorter than it listed
                    return
                idle = 0 if stream.tell() > before else idle + 1
                if idle == TRIES or status in (401, 403, 404):
                    raise failure(error, file.url, file.page) from None


def fetch(file: File, title: str) -> None:
    """Download one file to its place. Raises UserError, and leaves nothing under its name, unless it is whole."""
    file.target.parent.mkdir(parents=True, exist_ok=True)
    transfer(file, title)
    size = file.part.stat().st_size
    wrong = f"{size:,} bytes instead of {file.size:,}" if size != file.size else (
        "its checksum is not the listed one" if checksum(file.part, file.digest) != file.digest else None)
    if wrong:
        file.part.unlink()
        raise UserError(f"{file.path} arrived damaged from {file.page} ({wrong}) and was thrown away: run the same "
                        "command again to fetch it anew.")  # fmt: skip
    os.replace(file.part, file.target)
    for leftover in file.target.parent.glob(f"{file.target.name}.*.part"):
        leftover.unlink()  # of another revision


# ---------------------------------------------------------------------------------------------------------------------
# All of them

def check_room(files: list[File], extra: dict[Path, float]) -> None:
    """Raise UserError, before the first byte, if a disk is too small for the files (and `extra` bytes in folders)."""
    needs, places = {}, {}
    remaining = [(f.target, f.size - (f.part.stat().st_size if f.part.exists() else 0)) for f in files]
    for path, size in [*remaining, *((folder / "x", size) for folder, size in extra.items())]:
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        disk = folder.stat().st_dev
        needs[disk], places[disk] = needs.get(disk, 0) + size, places.get(disk, folder)
    for disk, needed in needs.items():
        free = shutil.disk_usage(places[disk]).free
        if needed > free:
            raise UserError(f"{places[disk]} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} GB are needed: free "
                            f"{(needed - free) / 1e9:.1f} GB, or name another disk with --data_path, --cache_dir or "
                            "--train_logs.")  # fmt: skip


def confirm(size: float, yes: bool) -> None:
    """Ask before a large download. Raises UserError unless the answer is yes."""
    if size <= ASK_ABOVE or yes:
        return
    try:
        answer = input(f"Fetch {size / 1e9:.1f} GB? [y/N] ")
    except EOFError:  # nobody there, as in a batch job
        answer = ""
    if answer.strip().lower() not in ("y", "yes"):
        raise UserError(f"nothing was fetched: pass --yes for all {size / 1e9:.1f} GB, or fewer --subjects.")


def fetch_all(files: list[File], done: Callable[[File], None] = lambda file: None) -> None:
    """Fetch them in order; `done` is told of each. Raises UserError at the first that cannot be had."""
    for i, file in enumerate(files, 1):
        fetch(file, f"{i}/{len(files)} {file.path}")
        done(file)


def missing_judges(cache_dir: Path) -> list[str]:
    """Names of the judges that are not on this machine."""
    def there(name: str) -> bool:
        if name in (*judges.VISION, "fid"):
            try:
                return judges.find_file(name, cache_dir).exists()
            except judges.Missing:
                return False
        repository, file = ((judges.CLIPS[name].repository, judges.CLIP_FILE) if name in judges.CLIPS
                            else (judges.SENTENCE_REPOSITORY, "model.safetensors"))
        folder = judges.CLIPS[name].folder if name in judges.CLIPS else "sentence"
        return (cache_dir / folder).exists() or judges.in_hub_cache(repository, file, cache_dir) is not None

    return [name for name in judges.JUDGES if not there(name)]


def fetch_wordnet(cache_dir: Path) -> None:
    """METEOR's synonyms, into cache_dir/nltk_data. The one thing to do without: evaluate.py then says so."""
    folder = cache_dir / "nltk_data"
    if any((folder / "corpora").glob("wordnet*")):
        return
    folder.mkdir(parents=True, exist_ok=True)
    if not nltk.download("wordnet", download_dir=str(folder), quiet=True):
        print(f"METEOR's synonyms could not be fetched: put NLTK's wordnet into {folder}/corpora, or go without.")


def network_is_here(name: str, cache_dir: Path) -> bool:
    """Are the weights of one of NETWORKS in its folder, or where open_clip and transformers keep what they download?"""
    repository, weights, _ = NETWORKS[name]
    return any((cache_dir / name).glob("*.safetensors")) or any(
        (cache_dir / name / file).exists() or frozen.in_hub_cache(repository, file, cache_dir, None)
        for file in weights)


def read_record(path: Path) -> tuple[dict, dict]:
    """download.json: {repository: commit}, {file: checksum}; both empty when there is none. Raises UserError."""
    try:
        content = json.loads(path.read_text()) if path.exists() else {"revisions": {}, "files": {}}
        return content["revisions"], content["files"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}): delete it, all files are then checked again.") from None


def describe_clip(folder: Path) -> None:
    """open_clip's own description of ViT-bigG/14, by which it reads the weights in the folder."""
    with replacing(folder / "open_clip_config.json") as temporary:
        temporary.write_text(json.dumps({"model_cfg": open_clip.get_model_config("ViT-bigG-14"), "preprocess_cfg": {}}))


def plan(args: argparse.Namespace, revisions: dict[str, str]) -> list[File]:
    """All files of all repositories that are wanted; the commits that they are of go into `revisions`."""
    listings = [(REPOSITORY, "dataset", partial(dataset_files, args))]
    for name in NETWORKS if args.networks else ():
        if not network_is_here(name, args.cache_dir):
            listings.append((NETWORKS[name][0], "model", partial(network_files, name, args.cache_dir)))
    files = []
    for repository, repo_type, choose in listings:
        asked = args.revision if repository == REPOSITORY and args.revision else revisions.get(repository, "main")
        revisions[repository], found = list_files(repository, repo_type, asked)
        chosen = choose(found)
        size = sum(file.size for file in chosen)
        print(f"{repository} at {revisions[repository][:10]}: {len(chosen)} files, {size / 1e9:.2f} GB")
        files += chosen
    return files


def download(args: argparse.Namespace) -> list[File]:
    """All that --data_path and --cache_dir need. Returns the repositories' files. Raises UserError."""
    revisions, known = read_record(args.data_path / RECORD)
    files = plan(args, revisions)
    missing = [file for file in files if not is_here(file, known)]
    absent = missing_judges(args.cache_dir) if args.networks else []
    extra = {args.cache_dir: JUDGES_SIZE} if absent else {}
    size = sum(file.size for file in missing) + sum(extra.values())
    print(f"to fetch: {len(missing)} of {len(files)} files, {len(absent)} judges, {size / 1e9:.2f} GB")
    check_room(missing, extra)
    confirm(size, args.yes)

    def note(*done: File) -> None:
        known.update({str(file.target.absolute()): file.digest for file in done})
        with replacing(args.data_path / RECORD) as temporary:
            temporary.write_text(json.dumps({"revisions": revisions, "files": known}, indent=1))

    note(*(file for file in files if file not in missing))  # before the first byte: from now on, this is the revision
    if any(file.target.parent == args.cache_dir / "clip" for file in missing):
        describe_clip(args.cache_dir / "clip")
    fetch_all(missing, note)
    for name in absent:
        judges.download(name, args.cache_dir)
    if args.networks:
        fetch_wordnet(args.cache_dir)
    if not any(file.target.name == SDXL_FILE for file in files):
        print(f"{REPOSITORY} has no {SDXL_FILE}: for refine.py, bring it (civitai.com) or SDXL's own file into "
              f"{args.cache_dir}, or name a file with --sdxl.")  # fmt: skip
    return files


def fetch_model(name: str, train_logs: str | Path = "train_logs", flag: str = "--model_name") -> Path:
    """{train_logs}/{name}/last.pth; a released model that is not there is fetched first.

    train_logs   folder of the checkpoints; `flag` is who named the model, for the error's sentence
    The path is what checkpoints.load_checkpoint wants, also where the release has DeepSpeed's folder last/ instead.
    With several processes, call it in one of them first. Raises UserError when it is neither there nor released.
    """
    folder = Path(train_logs) / name
    if (folder / "last.pth").exists() or list(folder.glob("last/*model_states.pt")):
        return folder / "last.pth"
    if not PERHAPS_RELEASED.fullmatch(name):  # no need to ask the hub for a name that cannot be there
        raise UserError(f"{folder / 'last.pth'} does not exist, and {name} is no released model: train it, or choose "
                        f"{flag} from {', '.join(RELEASED)}.")  # fmt: skip
    _, files = list_files(REPOSITORY, "dataset")
    chosen = [file._replace(target=Path(train_logs).joinpath(*Path(file.path).parts[1:]))
              for file in model_files(files, name, flag)]
    missing = [file for file in chosen if not is_here(file, {})]  # DeepSpeed's folder may be here in part
    print(f"{name} is not in {train_logs}: fetching {sum(file.size for file in missing) / 1e9:.2f} GB from "
          f"{REPOSITORY}")
    check_room(missing, {})
    fetch_all(missing)
    return folder / "last.pth"


def parse(argv: list[str] | None) -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("data.py", description=__doc__.split("\n\n")[0], formatter_class=formatter)
    parser.add_argument("command", choices=["download"], help="what to do")
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--data_path", type=Path, default="nsd", help="folder that gets the data")
    add("--cache_dir", type=Path, help="folder that gets the frozen networks, some 40 GB; None = --data_path")
    add("--train_logs", type=Path, default="train_logs", help="folder that gets the released models")
    add("--subjects", type=int, nargs="+", default=[1, 2, 5, 7], choices=range(1, 9), metavar="N",
        help="numbers of the subjects, about 2 GB each; 1 2 5 7 in the paper, 1 to 8 for its pretraining")
    add("--with_checkpoints", nargs="+", default=[], metavar="NAME",
        help="released models to get as well; recon.py --model_name gets them by itself when it needs them")
    add("--revision", help="commit, tag or branch of the dataset repository; None = that of the first download, as "
                           "download.json has it, or else main's newest")
    add("--networks", action=switch, default=True, help="also what other repositories hold: CLIP ViT-bigG/14 and GIT, "
                                                        "12 GB, and evaluate.py's judges, 3 GB")
    add("--yes", action="store_true", help=f"do not ask before more than {ASK_ABOVE / 1e9:.0f} GB")
    args = parser.parse_args(argv)
    args.cache_dir = args.cache_dir or args.data_path
    return args


def main(argv: list[str] | None = None) -> list[File]:
    """Download; return the files of the repositories. Raises UserError."""
    try:
        return download(parse(argv))
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"{error.filename} cannot be written ({error.strerror}): name another folder with --data_path, "
                        "--cache_dir or --train_logs.") from None  # fmt: skip


if __name__ == "__main__":
    run_main(main)
