"""The processes that torchrun starts: ranks, gathering, a user's errors printed once.

A program that does not call `join` is one process, whatever the environment says.
"""

import contextlib
import os
import sys

import torch
import torch.distributed as dist

from support.program import UserError


def join() -> None:
    """Join the process group of torchrun, if any: gloo for CPU tensors, nccl for those on GPUs."""
    if int(os.environ.get('WORLD_SIZE', '1')) > 1:
        dist.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo')


def leave(status: int) -> None:
    """End the process with that exit status, past the teardown of torch.distributed.

    Its threads now and then abort a process that ends in the usual way. All files are written.
    """
    if world_size() > 1:
        if status == 0:
            dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def own_device(device: torch.device, device_ids: list) -> tuple[torch.device, list]:
    """(device, device_ids) of this process: under torchrun each has a GPU of its own, if any."""
    if world_size() == 1 or device.type != 'cuda':
        return device, device_ids
    device = torch.device('cuda', int(os.environ['LOCAL_RANK']))
    if device.index >= torch.cuda.device_count():
        raise UserError(f'torchrun: more processes here than GPUs, {torch.cuda.device_count()}')
    torch.cuda.set_device(device)
    return device, [device]


def broadcast(value):
    """The first rank's value, on every rank."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """[ranks, *]: the CPU tensors of all ranks, on each of them."""
    if world_size() == 1:
        return tensor[None]
    gathered = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(gathered, tensor)
    return torch.stack(gathered)


def all_gather_list(items) -> list:
    """The items of all ranks in one list, on each of them."""
    if world_size() == 1:
        return list(items)
    gathered = [None] * world_size()
    dist.all_gather_object(gathered, list(items))
    return [item for part in gathered for item in part]


def all_or_none(f, *arguments):
    """Call f(*arguments) on every rank. If any rank fails, the lowest one prints the error and all
    exit. f must not wait for another rank."""
    result = end = None
    try:
        result = f(*arguments)
    except (SystemExit, UserError) as e:  # SystemExit: --help
        end = e
    statuses = all_gather_list([None if end is None else getattr(end, 'status', 0)])
    for i, status in enumerate(statuses):
        if status is not None:
            end_all(end, i, status)
    return result


def end_all(end, teller: int = 0, status: int = 1) -> None:
    """Call on every rank: rank `teller` raises `end`, the others exit with that status."""
    if rank() == teller:
        raise end
    with contextlib.suppress(RuntimeError):  # the connection breaks once that rank has exited
        dist.barrier()
    sys.exit(status)


def print_first(text: str, file=None) -> None:
    """Print on the first rank only."""
    if rank() == 0:
        print(text, file=file or sys.stdout, flush=True)
