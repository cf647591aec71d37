"""What a Hub's refusal means, and what to do about it."""

from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

# The HTTP client's own base of all errors, refusals and broken connections alike; the client changed its name once.
_HTTP_ERROR: type[Exception] = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
_RETRIED = (408, 429, 500, 502, 503, 504)
_ADVICE = {
    400: "The Hub does not take what was sent; its words are above. For a card, run `hf-moe card` on the folder.",
    401: "The token is missing, mistyped or revoked. Run `hf auth login` with a token that may write, or set HF_TOKEN.",
    402: "The Hub asks for payment, for instance for private storage. Push publicly, or make room.",
    403: "The token may not write there. Make one with the right to write, be admitted to the organisation, or push under "
    "your own name.",
    404: "There is no such repository or revision for this token. Check the name, and that the token may see it.",
    409: "Something else is changing the repository. Run the same command again.",
    412: "Somebody has committed meanwhile. Look at what, then run the same command again.",
    413: "The Hub finds it too large. Save the model in smaller shards.",
    429: "Too many requests. Wait some minutes, then run the same command again.",
}


class HubError(RuntimeError):
    """A push that did not end well; the message says why, what to do and what was done so far."""


def find_cause(error: BaseException) -> BaseException:
    """The Hub's answer or the broken connection behind an error, which huggingface_hub may have wrapped."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, _HTTP_ERROR | ConnectionError):
            return found
        found = found.__cause__
    return error


def may_pass(error: BaseException) -> bool:
    """Whether the same call may succeed later."""
    cause = find_cause(error)
    if isinstance(cause, OfflineModeIsEnabled):
        return False
    status = find_status(cause)
    return isinstance(cause, _HTTP_ERROR | ConnectionError) if status is None else status in _RETRIED


def find_status(error: BaseException) -> int | None:
    """Status of the Hub's answer; None where there was no answer."""
    return getattr(getattr(error, "response", None), "status_code", None)


def explain(error: BaseException, step: str, repo_id: str, endpoint: str) -> str:
    """A refusal or a broken connection in a sentence, and what to do.

    Args:
        error: As it was caught.
        step: What was being done.
        repo_id: To which repository.
        endpoint: On which Hub.
    """
    cause = find_cause(error)
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so no Hub can be reached. Unset it for a push."
    status = find_status(cause)
    if status is not None:
        said = getattr(cause, "server_message", None)
        advice = _ADVICE.get(status, "The Hub itself fails. Run the same command again later.")
        return f"The Hub answered {status} in the step '{step}' for {repo_id}{f' ({said})' if said else ''}. {advice}"
    if isinstance(cause, _HTTP_ERROR | ConnectionError):
        return (
            f"The connection to {endpoint} broke in the step '{step}' ({type(cause).__name__}), again and again. Check the "
            "network, then run the same command again."
        )
    return f"The step '{step}' for {repo_id} failed: {' '.join(str(error).split())}."
