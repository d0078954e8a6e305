"""Fetching a model from the Hub: only the files that are needed, never code, never pickles."""

from pathlib import Path

from ..errors import SourceError

WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.spm", "*.bpe", "*.vocab", "*.jinja", "*.tiktoken",
          "LICENSE*", "NOTICE*"]  # fmt: skip


def download(model: str, revision: str | None) -> tuple[Path, str]:
    """The local folder of a Hub model and the commit it is at.

    Raises SourceError for a repository that is missing, gated, private or unreachable.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=WANTED))
    except HFValidationError as error:
        raise SourceError(f"`{model}` is neither a folder nor a Hub id", "a Hub id looks like `org/name`") from error
    except GatedRepoError as error:
        raise SourceError(
            f"{model} is gated", "accept its terms on its Hub page, then log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise SourceError(f"{model} has no revision `{revision}`", "give a branch, a tag or a commit") from error
    except RepositoryNotFoundError as error:
        raise SourceError(
            f"{model} is not on the Hub, or private",
            "check the spelling; log in with `hf auth login` if it is yours",
        ) from error
    except (
        OfflineModeIsEnabled,
        LocalEntryNotFoundError,
        EntryNotFoundError,
        HfHubHTTPError,
        OSError,
    ) as error:
        raise SourceError(
            f"{model} is not a local folder and the Hub cannot be reached: {str(error).splitlines()[0]}",
            "give the path of a model folder, or check the connection",
        ) from error
    return folder, folder.name
