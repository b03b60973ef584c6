"""Whether timm's pretrained weights can be had: asks the hub once, where its own client would retry for a minute."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

from .names import HUB

SECONDS = 5.0  # within which the hub must answer; a name that can't be resolved fails at once


@contextlib.contextmanager
def hub_or_cache(name: str) -> Iterator[None]:
    """Within the context the hub's client uses only its local cache if the hub doesn't answer.

    Raises ``ConnectionError`` if it doesn't answer and nothing of timm's model ``name`` is in the cache.
    """
    from huggingface_hub import constants

    offline = constants.HF_HUB_OFFLINE
    if not offline and answers():
        yield
        return
    if not is_cached(name):
        why = "HF_HUB_OFFLINE is set" if offline else f"{constants.ENDPOINT} can't be reached"
        raise ConnectionError(f"{why}, and they aren't in the local cache")
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


def answers() -> bool:
    """Whether the hub answers one request within `SECONDS`; which answer it gives doesn't matter."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    answered = []

    def ask() -> None:
        with contextlib.suppress(Exception):  # the client raises many exceptions
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
            answered.append(True)

    # In a thread, because the time to resolve a name can't be limited.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return bool(answered)


def is_cached(name: str) -> bool:
    """Whether the hub's local cache holds files of the model's repository, or the model's weights don't come from the hub."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    if name.startswith(HUB):
        repository = name.split(":", 1)[1]
    else:
        from timm.models import get_pretrained_cfg

        given = get_pretrained_cfg(name)
        repository = None if given is None or given.file or given.state_dict else given.hf_hub_id
    if not repository:
        return True
    folder = repo_folder_name(repo_id=repository.split("@")[0], repo_type="model")
    return Path(constants.HF_HUB_CACHE, folder, "snapshots").is_dir()
