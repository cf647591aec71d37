"""Pushing a saved adapter or model to the Hub: checked before, one commit, read back after.

    report = push("outputs/run", "our-team/our-adapter", private=True)

The repository changes by one commit that holds everything, or not at all. A connection that drops, a rate limit and an
error of the Hub's own are tried again; large files that arrived are not sent twice. The token is in no message and no log.
"""

from hf_moe_ext.hub.errors import HubError
from hf_moe_ext.hub.folder import FolderError
from hf_moe_ext.hub.pushing import PushReport, check_login, push

__all__ = ["FolderError", "HubError", "PushReport", "check_login", "push"]
