"""SIGHUP: settings read anew, while requests run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable

from glmd.api.state import AppState
from glmd.config import Settings
from glmd.errors import SettingsError

log = logging.getLogger("glmd")

RELOADABLE = frozenset(
    {
        "aliases", "keep_alive", "drain_timeout", "enable_thinking", "clear_thinking",
        "effort_budgets", "temperature", "top_p", "top_k", "min_p", "max_tokens", "profile",
        "profiles", "log_level", "slow_request", "queue_timeout", "first_token_timeout",
        "request_timeout",
    }
)  # fmt: skip
"""Settings that each request reads anew, and those that can be handed on. The others make things
once: the weights, the KV, the listening sockets."""


def reload(service: AppState, read: Callable[[], Settings]) -> None:
    """Put into effect what has changed and can change; say in the log what did and what cannot.

    Args:
        read: gives the settings as they are now. If they are bad, the old ones stay.
    """
    old = service.settings
    try:
        new = read()
    except SettingsError as error:
        log.error("The settings are as before; they could not be read anew: %s", error.message)
        return
    changed = {name for name in Settings.model_fields if getattr(new, name) != getattr(old, name)}
    values = {name: getattr(new, name) for name in changed & RELOADABLE}
    service.configure(old.model_copy(update=values))
    if "log_level" in values:
        logging.getLogger("glmd").setLevel(new.log_level)
        service.engine.set_log_level(new.log_level)
    log.info("Read the settings anew; changed: %s.", listed(values))
    if late := changed - RELOADABLE:
        log.warning("These settings change with the next start only: %s.", listed(late))


def listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def has_terminal() -> bool:
    """Whether this process has a terminal that is still there."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
