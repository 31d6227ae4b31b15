"""A Ray actor is one process of an engine."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from manylora.processes.peer_addresses import address_toward, free_port, interface_of


@dataclass(frozen=True, slots=True)
class ActorPlace:
    """An `ActorPlace` says where an actor is.

    Attributes:
        node: Ray's name of the machine.
        address: at which Ray knows it.
        host: as it calls itself.
        gpus: the devices that Ray gave the actor, by the machine's own numbers.
    """

    node: str
    address: str
    host: str
    gpus: tuple[str, ...]


def prepare(environment: Mapping[str, str], peer: str) -> None:
    """Let torch find its peers on the route toward `peer`, unless this machine is set up to use
    another."""
    os.environ.update(environment)
    interface = interface_of(address_toward(peer))
    if interface is not None:
        # Otherwise gloo takes what the machine's own name resolves to, often 127.0.1.1.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")


class RankActor:
    """An actor's methods run in the main thread of a process that belongs to it alone."""

    def place(self) -> ActorPlace:
        """Return where this is."""
        import ray

        context = ray.get_runtime_context()
        gpus = tuple(str(gpu) for gpu in context.get_accelerator_ids().get("GPU", ()))
        return ActorPlace(
            context.get_node_id(), ray.util.get_node_ip_address(), socket.gethostname(), gpus
        )

    def meeting_place(self, peer: str) -> tuple[str, int]:
        """Return an address and a port of this machine at which its peers can meet."""
        address = address_toward(peer)
        return address, free_port(address)

    def run(self, address: str, secret: str, environment: Mapping[str, str], peer: str) -> None:
        """Be a process of an engine until told to stop; see `member.run`.

        Args:
            environment: what torch's launcher would set.
            peer: a machine with which this one has to exchange tensors.

        Raises:
            Unreachable: no process answers at `address`.
        """
        prepare(environment, peer)
        # Not before: CUDA reads the environment when it is first imported.
        from manylora.processes import member

        member.run(address, bytes.fromhex(secret))
