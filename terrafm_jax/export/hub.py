"""To and from the Hugging Face hub, by its own client."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from terrafm_jax.weights import WeightsError


def push(folder: Path, repo: str, *, private: bool = True) -> str:
    """Uploads an exported folder as ``OWNER/NAME`` (made if missing, private unless told); returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repo, exist_ok=True, private=private)
    return str(api.upload_folder(folder_path=str(folder), repo_id=repo, commit_message="TerraFM weights"))


def download(repo: str) -> Any:
    """Fetches ``OWNER/NAME[@REVISION]`` and returns the local folder. Raises WeightsError."""
    try:
        from huggingface_hub import snapshot_download
    except ModuleNotFoundError as error:
        raise WeightsError(f"hf://{repo}: needs huggingface_hub; pip install 'terrafm_jax[export]'") from error
    name, _, revision = repo.partition("@")
    try:
        # The card and the weights; a .py of someone else's is neither needed nor run.
        return snapshot_download(name, revision=revision or None, allow_patterns=["*.json", "*.safetensors", "*.md"])
    except Exception as error:  # the client raises many kinds
        reason = str(error).strip().split("\n")[0][:160]
        raise WeightsError(f"hf://{repo}: cannot be fetched ({reason}); check the name and your access") from error
