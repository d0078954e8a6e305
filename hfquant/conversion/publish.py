"""A result that was pushed privately is let out into the open, once its owner has looked at it."""

from huggingface_hub import HfApi, constants

from ..errors import HubError
from ..model.remote import Token
from .retry import patiently


def publish(repo: str, commit: str, token: Token) -> None:
    """Make a private repository public; what was gated stays gated.  Nothing happens to one that is public already.

    commit: what its owner has seen.  Raises HubError if the repository holds something else by now, or is not this
    user's to open.
    """
    api, settings = HfApi(token=token), f"change it on its page: {constants.ENDPOINT}/{repo}/settings"
    found = patiently(lambda: api.model_info(repo))
    if found.sha != commit:
        raise HubError(f"{repo} holds another commit than this job pushed", f"look at it, then {settings}")
    if not found.private:
        return
    try:
        patiently(lambda: api.update_repo_settings(repo, private=False))
    except HubError as error:
        raise HubError(error.message, settings) from error
    if patiently(lambda: api.model_info(repo)).private:
        raise HubError(f"the Hub left {repo} private", settings)
