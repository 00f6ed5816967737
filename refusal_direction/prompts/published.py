"""The prompt splits of the method's reference repository: downloaded once, verified, then used offline."""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path

from torch.hub import download_url_to_file

from refusal_direction.errors import DownloadError
from refusal_direction.prompts.files import read_prompts
from refusal_direction.prompts.sets import SETS, SETS_FOR_SELECTION, Kind, Prompt, PromptSet, Split, set_name

__all__ = ["BASE_URL", "COMMIT", "SHA256", "published_splits"]

log = logging.getLogger(__name__)

COMMIT = "9d852fae1a9121c78b29142de733cb1340770cc3"
BASE_URL = f"https://raw.githubusercontent.com/andyrdt/refusal_direction/{COMMIT}/dataset/splits"
SHA256: dict[PromptSet, str] = {
    (Kind.HARMFUL, Split.TRAIN): "8f5c0eac0efd2a7f99084bbe8d0de2c465e31b1997184783c917969d9de9ece1",
    (Kind.HARMLESS, Split.TRAIN): "86623b1f8a25aa35df153fc97a556dbcebb6a7c881538ae43ee479ca17f2e002",
    (Kind.HARMFUL, Split.VALIDATION): "305f1d1e6dfa6c50a32d24a18ef815f42b5441eb83e6d7767d242107162fd9f4",
    (Kind.HARMLESS, Split.VALIDATION): "772010758e7d771ef4c7e5e4acdfd7598dcece1a6f383f20d382f640913a2a4d",
    (Kind.HARMFUL, Split.TEST): "5e12ae102c3791dee083a69ab6269a78e033411c629bc3f66f75d2fde196d9ef",
    (Kind.HARMLESS, Split.TEST): "1b5930ce5e855ada758b3116ce7c4aaea9b9d05f8cdd77b385511d4c84173b19",
}
_TRIES = 3
_PAUSE = 2.0


def published_splits(
    data_dir: Path, progress: bool = False, *, test: bool = True
) -> dict[PromptSet, tuple[Prompt, ...]]:
    """The published splits, fetched into `data_dir` where they are missing.

    Nothing that selects a direction depends on the test split, so a run without it goes on, with a warning.

    Args:
        data_dir: the folder of the files.
        progress: whether downloads show bars.
        test: whether to read the test split as well.

    Raises DownloadError where a train or validation file cannot be fetched, or a file is not the published one.
    """
    splits = {which: _read(which, data_dir, progress) for which in SETS_FOR_SELECTION}
    if test:
        try:
            splits |= {which: _read(which, data_dir, progress) for which in SETS if which not in splits}
        except DownloadError as error:
            log.warning("The run goes on without test prompts (--n_test 0 asks for none). %s", error)
    return splits


def _read(which: PromptSet, data_dir: Path, progress: bool) -> tuple[Prompt, ...]:
    return read_prompts(_fetched(set_name(which), SHA256[which], data_dir, progress))


def _fetched(name: str, digest: str, data_dir: Path, progress: bool) -> Path:
    path = data_dir / f"{name}.json"
    if path.exists():
        found = hashlib.sha256(_content(path)).hexdigest()
        if found != digest:
            raise DownloadError(
                f"{path} is not the published split (its SHA-256 is {found[:12]}..., not {digest[:12]}...). Delete it to have "
                "it downloaded again, or pass your own prompts with --harmful and --harmless."
            )
        return path
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(f"{data_dir} cannot be created ({error.strerror}). Choose another --data_dir.") from error
    _download(f"{BASE_URL}/{name}.json", path, digest, progress)
    return path


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DownloadError(
            f"{path} cannot be read ({error.strerror}). Delete it, or choose another --data_dir."
        ) from error


def _download(url: str, path: Path, digest: str, progress: bool) -> None:
    """Fetch a file atomically, so that one that exists is complete and verified."""
    for attempt in range(1, _TRIES + 1):
        try:
            download_url_to_file(url, str(path), hash_prefix=digest, progress=progress)
            return
        except RuntimeError as error:  # torch.hub raises it for a wrong hash, and a broken connection looks the same
            problem = DownloadError(
                f"{url} is not what was published: its SHA-256 differs from {digest[:12]}.... Nothing was kept. Try again "
                "later, or pass your own prompts with --harmful and --harmless."
            )
            problem.__cause__ = error
        except OSError as error:  # URLError is one
            problem = DownloadError(
                f"{url} could not be downloaded ({error}). Check the network, copy the file to {path} by hand, name "
                "a folder that holds the splits with --data_dir, pass your own prompts with --harmful and --harmless, or try "
                "--model_id demo, which needs no download."
            )
            problem.__cause__ = error
        if attempt == _TRIES:
            raise problem
        log.warning("Download of %s failed (%s); trying again.", path.name, problem.__cause__)
        time.sleep(_PAUSE * attempt)
