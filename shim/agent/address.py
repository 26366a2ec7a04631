"""Where the agent's calls go: what agent and clients have in common."""

from __future__ import annotations

from pathlib import Path

from smr.shim.config import Config


def socket_path(config: Config, given: str = "") -> Path:
    """The path given, else the one configured, else agent.sock in the state directory."""
    return Path(given or config.agent_socket or config.run / "agent.sock").absolute()
