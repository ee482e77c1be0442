"""What a Docker engine says of containers, networks and services, as endpoints and outsiders.

An endpoint is one interface: a container on one network has its name, each further network of it makes an
endpoint NAME@NETWORK. It keeps that name as long as it lives, whatever its container is called by then: only the
labels follow. The engine does not tell an interface's name inside: its MAC names it.

Labels are the container's own, and these, which stand for what the engine knows (a container's label of the
same name does not count):

    name, image, network            as `docker ps` and `docker network ls` show them
    compose.project, compose.service
    swarm.service, swarm.task
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import ip_address, ip_interface
from pathlib import Path
from typing import Any

from isolator.control.runtime import EXCLUDE, UNTOLD, RuntimeEndpoint, is_own
from isolator.core.identities import Address
from isolator.core.model import ENTITY, Outsider

GWBRIDGE = "docker_gwbridge"  # Swarm's bridge for the way out
INGRESS_SANDBOX = "ingress_sbox"  # and the mesh's own namespace

KNOWN = {
    "compose.project": "com.docker.compose.project",
    "compose.service": "com.docker.compose.service",
    "swarm.service": "com.docker.swarm.service.name",
    "swarm.task": "com.docker.swarm.task.name",
}
RESERVED = frozenset({"name", "image", "network", ENTITY, *KNOWN})

INHERITED = "isolator.inherited"  # our own addition to a description
Inspected = Mapping[str, Any]  # a container as GET /containers/{id}/json describes it


# -- what a container is -------------------------------------------------------------------------------------


def endpoints_of(container: Inspected) -> list[RuntimeEndpoint]:
    """Its interfaces, in the order of their networks' names."""
    if has_no_interface(container):
        return []
    name, own = name_of(container), first_network(container)
    return [
        RuntimeEndpoint(
            name if network == own else f"{name}@{network}",
            sandbox_of(container),
            attachment["MacAddress"],
            labels_of(container, name, network),
            addresses_in(attachment, "IPAddress", "GlobalIPv6Address"),
            exemption(container),
            inherited_by(container),
        )
        for network, attachment in sorted(attachments(container).items())
    ]


def name_of(container: Inspected) -> str:
    return str(container["Name"]).lstrip("/")


def sandbox_of(container: Inspected) -> Path:
    """Its network namespace, as the kernel's mounts name it (/var/run is a link)."""
    return Path(os.path.realpath(container["NetworkSettings"]["SandboxKey"]))


def addresses_in(attachment: Mapping[str, Any], *keys: str) -> tuple[Address, ...]:
    return tuple(ip_address(attachment[key]) for key in keys if attachment.get(key))


def attachments(container: Inspected) -> dict[str, Any]:
    """Network → what the engine says of the container's place in it; without networks that are not joined yet."""
    networks = container["NetworkSettings"]["Networks"] or {}
    return {name: each for name, each in networks.items() if each and each.get("MacAddress")}


def first_network(container: Inspected) -> str:
    """The one that it was made with: it stays when others are joined and left."""
    joined, mode = sorted(attachments(container)), container["HostConfig"]["NetworkMode"]
    mode = "bridge" if mode == "default" else mode
    return mode if mode in joined else joined[0] if joined else ""


def inherited_by(container: Inspected) -> frozenset[str]:
    """Keys of labels that are its image's (`without_image_labels` has put them there)."""
    return frozenset(container.get(INHERITED, ()))


def labels_of(container: Inspected, name: str, network: str) -> dict[str, str]:
    own = container["Config"]["Labels"] or {}
    labels = {key: value for key, value in own.items() if key not in RESERVED}
    labels |= {short: own[long] for short, long in KNOWN.items() if long in own}
    return {**labels, "name": name, "image": container["Config"]["Image"], "network": network}


def exemption(container: Inspected) -> str | None:
    """Why it is to be left alone, if it is."""
    if ((container["Config"]["Labels"] or {}).get(EXCLUDE) or "").lower() == "true":
        return f"it has the label {EXCLUDE}"
    hostname = os.environ.get("HOSTNAME", "")  # in a container: the beginning of its id
    if len(hostname) >= 12 and container["Id"].startswith(hostname):
        return "it is the agent's own"
    return None


def has_no_interface(container: Inspected) -> bool:
    """Of its own: one that shares another container's is protected with that."""
    mode = str(container["HostConfig"]["NetworkMode"])
    return mode == "host" or mode.startswith("container:")


def is_without(container: Inspected) -> bool:
    """Nothing of it has to be protected as it starts: it joins no network, or another container's or the host's."""
    return has_no_interface(container) or container["HostConfig"]["NetworkMode"] == "none"


def unprotectable(container: Inspected) -> str | None:
    """Why it has traffic that cannot be told from others', if it has."""
    if container["HostConfig"]["NetworkMode"] == "host" and exemption(container) is None:
        return "it is on the host's network: its traffic is the host's (the label entity=host)"
    return None


# -- who else is there ---------------------------------------------------------------------------------------


def gateways(containers: Iterable[Inspected]) -> list[Outsider]:
    """Of the networks that they are in. A published port and a hairpin show a server the gateway as its client."""
    found: dict[str, set[Address]] = {}
    for container in containers:
        for network, attachment in attachments(container).items():
            found.setdefault(network, set()).update(addresses_in(attachment, "Gateway", "IPv6Gateway"))
    return [
        Outsider(
            f"gateway of {network}",
            {ENTITY: "gateway", "network": network},
            tuple(sorted(addresses, key=lambda each: (each.version, int(each)))),
        )
        for network, addresses in sorted(found.items())
        if addresses
    ]


def services(described: Iterable[Mapping[str, Any]], networks: Mapping[str, str]) -> list[Outsider]:
    """Swarm's services as their clients see them: a virtual address in each network (by id → name), with the labels
    of the service's tasks."""
    found = []
    for service in described:
        spec = service["Spec"]
        task = spec["TaskTemplate"].get("ContainerSpec") or {}
        labels = {key: value for key, value in (task.get("Labels") or {}).items() if key not in RESERVED}
        for each in service.get("Endpoint", {}).get("VirtualIPs") or ():
            network = networks.get(each["NetworkID"], "")
            found.append(
                Outsider(
                    f"service {spec['Name']}@{network}",
                    {
                        **labels,
                        "swarm.service": spec["Name"],
                        "image": task.get("Image", ""),
                        "network": network,
                    },
                    (ip_interface(each["Addr"]).ip,),
                )
            )
    return found


def gateway_endpoints(network: Mapping[str, Any], containers: Sequence[Inspected]) -> list[RuntimeEndpoint]:
    """A Swarm container's second interface, its way out of the overlay: no container's description tells of it, that
    of the network `docker_gwbridge` does, under the sandbox's id (libnetwork, default_gateway.go). The mesh's own is
    left alone."""
    known = ((each["NetworkSettings"].get("SandboxID") or "", each) for each in containers)
    sandboxes = {sandbox[:12]: each for sandbox, each in known if sandbox}
    found = []
    for attachment in (network.get("Containers") or {}).values():
        _, _, sandbox = str(attachment["Name"]).partition("gateway_")
        addresses = tuple(
            ip_interface(attachment[key]).ip for key in ("IPv4Address", "IPv6Address") if attachment.get(key)
        )
        if sandbox == INGRESS_SANDBOX and sandboxes:
            folder = sandbox_of(next(iter(sandboxes.values()))).parent
            labels = {ENTITY: "gateway", "network": network["Name"]}
            found.append(
                RuntimeEndpoint(
                    "ingress-sbox", folder / INGRESS_SANDBOX, attachment["MacAddress"], labels, addresses,
                    "it is Swarm's own",
                )
            )  # fmt: skip
        elif (container := sandboxes.get(sandbox)) is not None:
            name = name_of(container)
            found.append(
                RuntimeEndpoint(
                    f"{name}@{network['Name']}",
                    sandbox_of(container),
                    attachment["MacAddress"],
                    labels_of(container, name, network["Name"]),
                    addresses,
                    exemption(container),
                    inherited_by(container),
                )
            )
    return found


def bridge_of(network: Mapping[str, Any]) -> str:
    """The name of a network's bridge device (libnetwork, drivers/bridge/bridge.go)."""
    return str(
        (network.get("Options") or {}).get("com.docker.network.bridge.name") or f"br-{network['Id'][:12]}"
    )


def described(
    listed: Mapping[str, Any], image: str, network: Callable[[str], Mapping[str, Any]]
) -> Inspected:
    """A container that is about to run, as `GET /containers/{id}/json` would describe it, but for its sandbox.

    `image`: the reference that it was made with; the list shows an id where that is another image's by now."""
    networks = {}
    for name in listed["NetworkSettings"]["Networks"] or {}:
        attachment = (network(name).get("Containers") or {}).get(listed["Id"])
        if attachment is not None:
            address, six = (attachment[key].partition("/")[0] for key in ("IPv4Address", "IPv6Address"))
            mac = attachment["MacAddress"]
            networks[name] = {"MacAddress": mac, "IPAddress": address, "GlobalIPv6Address": six}
    return as_listed(listed, image, {"Networks": networks})


def as_listed(listed: Mapping[str, Any], image: str, settings: Mapping[str, Any]) -> Inspected:
    names = listed["Names"] or [f"/{listed['Id'][:12]}"]  # those with more than one slash are links' aliases
    return {
        "Id": listed["Id"],
        "Name": min(names, key=lambda name: name.count("/")),
        "Image": listed["ImageID"],
        "Config": {"Image": image, "Labels": listed["Labels"]},
        "HostConfig": listed["HostConfig"],
        "NetworkSettings": settings,
    }


# -- whose labels they are -----------------------------------------------------------------------------------


def own_labels(container: Inspected) -> dict[str, str]:
    """Its labels that are policy, or exclude it. The engine has put those of its image among them."""
    return {key: value for key, value in (container["Config"]["Labels"] or {}).items() if is_own(key)}


def without_image_labels(container: Inspected, image: Mapping[str, str] | None) -> Inspected:
    """The container without what its image carries of those: whoever makes an image decides about no policy.

    `image`: the image's labels. None: the engine does not know it any more. Then the container is not excluded, and
    its policy cannot be told from the image's: it is closed (`label_policy`). What else is the image's stays, and is
    told (`inherited_by`)."""
    labels, own = dict(container["Config"]["Labels"] or {}), own_labels(container)
    inherited = [key for key, value in labels.items() if image is None or image.get(key) == value]
    for key, value in own.items():
        if key == EXCLUDE if image is None else image.get(key) == value:
            del labels[key]
    if image is None and own.keys() - {EXCLUDE}:
        labels[UNTOLD] = (
            "its image is gone, so that nobody can tell its labels from the image's: make it anew"
        )
    return {**container, INHERITED: inherited, "Config": {**container["Config"], "Labels": labels}}
