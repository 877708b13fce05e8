"""What a rank needs of its machine before it connects with the others: open files, the network that gloo takes, a
driver that works, and the cores that are near its GPU."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import resource
import socket
from pathlib import Path

import psutil

INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"

_ELSEWHERE = "192.0.2.1"
"""An address that no machine has (RFC 5737): what is sent there would take the default route."""

_DRIVER = Path("/proc/driver/nvidia/version")


def prepare() -> None:
    """Raise the limit of open files as far as allowed, and choose the network of gloo where nobody has."""
    raise_open_files()
    choose_gloo_interface(os.environ.get("MASTER_ADDR"))


def raise_open_files(wanted: int | None = None) -> int | None:
    """Raise this process's limit of open files to `wanted`, or as far as it may; returns it (None = there is none).

    Sockets are open files, and 1024, the usual limit, is soon reached by the connections of a rank, the files of its
    data sets, and shared memory.

    Args:
        wanted: None = as many as the hard limit allows.
    """
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if wanted is None else wanted
    if limit == resource.RLIM_INFINITY or (wanted != resource.RLIM_INFINITY and limit >= wanted):
        return None if limit == resource.RLIM_INFINITY else limit
    raised = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
    with contextlib.suppress(OSError, ValueError):  # refused where the system has a lower limit of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, most))
        limit = raised
    return None if limit == resource.RLIM_INFINITY else limit


def choose_gloo_interface(master: str | None) -> None:
    """Set `GLOO_SOCKET_IFNAME` where gloo would listen on a loopback address that other machines cannot reach.

    Without it gloo takes the address that the host's name stands for, which on Debian and Ubuntu often is 127.0.1.1.
    Then the interface is taken through which this machine reaches `master`, the machine that the ranks meet on (None:
    they meet in a file); on that machine, the one of its default route. Nothing is set where all ranks meet at a
    loopback address, or where the user has set the variable.
    """
    if master is None or INTERFACE_VARIABLE in os.environ or not _name_is_loopback():
        return
    name = _interface_towards(master)
    if name is not None:
        os.environ[INTERFACE_VARIABLE] = name


def driver_fault() -> str | None:
    """Why torch cannot use the GPUs of this machine though it has a driver for them, in one line; None if it can.

    torch itself only warns, and a run would go on on the CPU. GPUs that are hidden on purpose (CUDA_VISIBLE_DEVICES="")
    are no fault; and a forked process cannot ask, so that it is for the one that forked it.
    """
    import torch

    from llada_megatron.parallel import device

    if torch.version.cuda is None or device.cuda_available() or not _DRIVER.exists():
        return None
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "" or torch.cuda._is_in_bad_fork():
        return None
    try:
        torch.cuda.init()
    except RuntimeError as error:
        said = str(error).splitlines()[0].split(". ")[0]
    else:
        return None
    if said.startswith(("No CUDA GPUs", "Found no NVIDIA driver")):
        return None
    return (
        f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, cannot use the GPUs: {said}; update the "
        'driver, install a torch built for a CUDA that it knows, or set CUDA_VISIBLE_DEVICES="" to run on the CPU'
    )


def bind_to_gpu(uuid: str, root: Path = Path("/")) -> None:
    """Keep this process on the cores of the socket that its GPU is attached to, where the system tells which these are.

    A launcher that has bound the process already is respected: only cores that it may run on are taken.

    Args:
        uuid: of the GPU, as torch gives it: `01234567-…`.
        root: where /proc and /sys are.
    """
    try:
        for described in root.glob("proc/driver/nvidia/gpus/*/information"):
            if uuid in described.read_text():
                device = root / "sys/bus/pci/devices" / described.parent.name.lower()
                cores = _numbers((device / "local_cpulist").read_text()) & os.sched_getaffinity(0)
                if cores:
                    os.sched_setaffinity(0, cores)
    except (OSError, ValueError, AttributeError):  # another system, or a container that hides it: all cores stay
        return


def _numbers(text: str) -> set[int]:
    """The numbers in a list of the kernel, such as `0-55,112-167`."""
    ends = (part.split("-") for part in text.strip().split(",") if part)
    return {number for pair in ends for number in range(int(pair[0]), int(pair[-1]) + 1)}


def _name_is_loopback() -> bool:
    try:
        found = socket.getaddrinfo(socket.gethostname(), None, family=socket.AF_INET)
    except OSError:
        return True  # gloo falls back to loopback
    return _is_loopback(str(found[0][4][0]))


def _interface_towards(host: str) -> str | None:
    """The name of the interface that reaches `host`; None where it is this machine alone, or cannot be found."""
    own = _address_towards(host)
    if _is_loopback(own) and not (host == "localhost" or _is_loopback(host)):
        own = _address_towards(_ELSEWHERE)  # the name of this machine, which the others reach otherwise
    interfaces = psutil.net_if_addrs().items()
    found = (name for name, addresses in interfaces if own in {each.address for each in addresses})
    return None if _is_loopback(own) else next(found, None)


def _address_towards(host: str) -> str | None:
    """This machine's address on the way to `host`."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # chooses a route; a datagram socket sends nothing for it
            return str(probe.getsockname()[0])
    except OSError:
        return None


def _is_loopback(address: str | None) -> bool:
    try:
        return address is not None and ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name
        return False
