"""What torchrun says of the processes that it has started."""

import os
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore

__all__ = ["meet_again", "processes"]

_PATIENCE = timedelta(minutes=5)
_held: list[TCPStore] = []  # a server goes with its last reference


def processes(devices: Any) -> dict[str, Any]:
    """``devices`` and ``num_nodes`` of the Trainer as torchrun has started the processes; empty without torchrun.

    With ``--nnodes 1:2`` the numbers may be others after each restart, so no configuration can know them.

    Args:
        devices: those asked for; a list of their numbers stays.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return {}
    world, each = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if world % each:
        return {}
    return {
        "devices": devices if isinstance(devices, list) or "," in str(devices) else each,
        "num_nodes": world // each,
    }


def meet_again() -> None:
    """Let the processes of one node find each other after a restart by torchrun.

    torchrun keeps its store over restarts, with the addresses of the processes that are gone (seen with torch 2.15),
    and a new process would wait for one of those. So the first process opens a store of its own, and tells the others
    through torchrun's. Several nodes count their restarts each for itself, and could not agree on such a message.
    """
    env = os.environ
    restart, world = env.get("TORCHELASTIC_RESTART_COUNT", "0"), env.get("WORLD_SIZE", "1")
    shared = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restart == "0" or world == "1" or world != env.get("LOCAL_WORLD_SIZE") or not shared:
        return
    address, key = env["MASTER_ADDR"], f"ddpm_lightning/port of restart {restart}"
    known = TCPStore(address, int(env["MASTER_PORT"]), is_master=False, timeout=_PATIENCE)
    if env["RANK"] == "0":
        _held.append(TCPStore(address, 0, is_master=True, wait_for_workers=False, multi_tenant=True))
        known.set(key, str(_held[-1].port))
    env |= {"MASTER_PORT": known.get(key).decode(), "TORCHELASTIC_USE_AGENT_STORE": "False"}
