"""The processes that torchrun starts: ranks, gathering, a user's errors printed once.

A program that does not call `join` is one process, whatever the environment says.
"""

import contextlib
import functools
import os
import signal
import sys

import torch
import torch.distributed as dist

from support import program
from support.program import Stopped, UserError, printable


def join(argv) -> None:
    """Join the process group of torchrun, if any: gloo for CPU tensors, nccl for those on GPUs.

    argv: the words of the command; --help needs no group. Raises UserError if the variables that
    torchrun sets are incomplete; the first rank prints it.
    """
    if program.wants_help(sys.argv[1:] if argv is None else argv):
        if program.is_later_rank() and 'TORCHELASTIC_RUN_ID' in os.environ:
            sys.exit(0)  # the first rank prints it
        return
    world = program.processes()
    if world == 1:
        return
    error = find_fault(world)
    if error and program.is_later_rank():
        program.end_quietly()
    if error:
        raise UserError(f'{error}: start it with torchrun, or unset WORLD_SIZE for one process')
    # It waits for up to half an hour, in which Python's own handlers are not called.
    heard = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) != signal.SIG_IGN]
    handlers = {s: signal.signal(s, signal.SIG_DFL) for s in heard}
    try:
        dist.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo')
    except (RuntimeError, ValueError) as e:
        at = f'{os.environ["MASTER_ADDR"]}:{os.environ["MASTER_PORT"]}'
        reason = str(e).splitlines()[0]
        raise UserError(f'cannot reach the other processes at {at}: {reason}', status=1) from e
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def find_fault(world: int) -> str:
    """What is wrong with the variables that torchrun sets for that many processes, '' if nothing
    is."""
    names = 'RANK', 'MASTER_ADDR', 'MASTER_PORT'
    variables = {name: os.environ.get(name, '').strip() for name in names}
    missing = [name for name, value in variables.items() if not value]
    if missing:
        return f'WORLD_SIZE={world}, but without {", ".join(missing)}'
    for name, limit in ('RANK', world), ('MASTER_PORT', 1 << 16):
        value = variables[name]
        if not value.isdecimal() or int(value) >= limit:
            return f'{name}={value}: not a number from 0 to {limit - 1}'
    return ''


def together(main):
    """main(argv), but the end of one rank is the end of all. The first one that ends prints why,
    the others leave with its exit status."""

    @functools.wraps(main)
    def joint(argv=None):
        try:
            main(argv)
        except (Exception, Stopped) as e:
            if world_size() == 1 or isinstance(e, UserError) and not str(e):
                raise
            if not is_first_end(e):
                wait_for_end()
                raise UserError('', status_of_end()) from e
            if is_lost(e):
                raise UserError(
                    'lost the connection to another process, which has ended or been killed; '
                    'the same command with --resume continues',
                    status=1,
                ) from e
            raise

    return joint


def is_first_end(e: BaseException) -> bool:
    """Note in the store of the group that this rank ends, and why. False if it does so because of
    another, or after another with an error to print."""
    status = getattr(e, 'status', 1)
    status = 128 + e.signum if isinstance(e, Stopped) else status
    own = f'{rank()} {status}'
    with contextlib.suppress(RuntimeError):  # the store is gone with its process
        first = store().compare_set('end', '', own).decode()
        return first == own or not (is_lost(e) or isinstance(e, (UserError, Stopped)))
    return True


def status_of_end() -> int:
    """The exit status of the rank that has ended first, 1 if the store is gone."""
    with contextlib.suppress(RuntimeError):
        return int(store().get('end').split()[1])
    return 1


def store():
    return dist.distributed_c10d._get_default_store()  # there is no public name for it


def is_lost(e: BaseException) -> bool:
    """Whether a collective operation failed, because the process at its other end has ended."""
    return isinstance(e, dist.DistError) or isinstance(e, RuntimeError) and 'gloo' in str(e)


def wait_for_end() -> None:
    """Wait until another rank, which has something to print, has ended."""
    program.ignore_signals()  # torchrun sends SIGTERM once a process has ended
    with contextlib.suppress(RuntimeError):  # the connection breaks
        while True:
            all_gather(torch.zeros(1))


def leave(status: int) -> None:
    """End the process with that exit status, past the teardown of torch.distributed.

    Its threads now and then abort a process that ends normally. All files are written.
    """
    if world_size() > 1:
        if status == 0:
            with contextlib.suppress(RuntimeError):  # another rank has failed since
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
    local, count = os.environ.get('LOCAL_RANK', ''), torch.cuda.device_count()
    if not local.isdecimal() and count > 1:
        raise UserError(f'LOCAL_RANK={local}: not the number of a GPU; start it with torchrun')
    device = torch.device('cuda', int(local or 0))
    if device.index >= count:
        raise UserError(f'torchrun: only {count} GPUs here; lower --nproc_per_node')
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
    wait_for_end()
    raise UserError('', status)


def print_first(text: str, file=None) -> None:
    """Print a line on the first rank only."""
    if rank() == 0:
        print(printable(text), file=file or sys.stdout, flush=True)
