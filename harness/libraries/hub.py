"""huggingface_hub: how long a silent hub is waited for, and what its client's errors mean.

The classes of these errors have changed over the client's releases.
"""

from __future__ import annotations

TIMEOUT = 2.0  # seconds that a hub which does not answer is waited for


def refusal(error: Exception, revision: str = "revision") -> str | None:
    """What is wrong with a repository, to be said behind its id, and a way out.

    revision: what the sentence calls it. None where the error says nothing of the repository, as
    when the hub is out of reach.
    """
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # transformers raises errors of its own, with the client's behind them
    causes = [error, error.__cause__, error.__context__]
    # GatedRepoError is a RepositoryNotFoundError, so it is asked for first
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return "is gated: accept its licence on its hub page and set HF_TOKEN"
    if any(isinstance(cause, RevisionNotFoundError) for cause in causes):
        return f"has no {revision}"
    if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
        return "is not on the hub, or is private: check the name, or set HF_TOKEN"
    if isinstance(error, HFValidationError):
        return "is neither a folder here nor a hub id (owner/name)"
    return None
