"""One rank of a pair of processes that use torch's process groups over an authenticated connection: no vLLM.

`report` runs a function in a process of its own; the leader (rank 0) listens on 127.0.0.1 at the port that it is given.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection as Pipe
from typing import Any

import torch
import torch.distributed as dist

from vllm_spark.backend.process_group import BACKEND, connecting, instead_of_gloo
from vllm_spark.executor.channel.certificates import Role, tls_context
from vllm_spark.executor.channel.framing import Connection
from vllm_spark.executor.channel.tls import TlsConnection
from vllm_spark.executor.group_connection import GroupConnection
from vllm_spark.executor.store import INIT_METHOD, close_groups, open_groups

SECRET = b"one secret, long enough"
SECONDS = 60.0
ended: list[Exception] = []
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8)


def link(rank: int, port: int) -> GroupConnection:
    role: Role = "leader" if rank == 0 else "follower"
    if rank == 0:
        with socket.create_server(("127.0.0.1", port)) as server:
            server.settimeout(SECONDS)
            plain = server.accept()[0]
    else:
        plain = _connect(port)
    connection = TlsConnection(plain, tls_context(SECRET, role), server_side=rank == 0, timeout=SECONDS)
    return GroupConnection(Connection(connection, f"rank {1 - rank}", 1 << 30), ended.append)


def _connect(port: int) -> socket.socket:
    end = time.monotonic() + SECONDS
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
        except ConnectionRefusedError:
            if time.monotonic() > end:
                raise
            time.sleep(0.02)


def join(rank: int, opened: GroupConnection, timeout: float = SECONDS) -> None:
    open_groups(opened, rank)
    dist.init_process_group(
        BACKEND, init_method=INIT_METHOD, rank=rank, world_size=2, timeout=timedelta(seconds=timeout)
    )


def results(rank: int, group: Any, kind: torch.dtype) -> Iterator[torch.Tensor]:
    """What every operation gives this rank."""
    own = (torch.arange(12).reshape(3, 4) * (rank + 2) % 7).to(kind)
    for operation in (dist.ReduceOp.SUM, dist.ReduceOp.MIN, dist.ReduceOp.MAX, dist.ReduceOp.PRODUCT):
        reduced = own.clone()
        dist.all_reduce(reduced, operation, group=group)
        yield reduced
    for root in range(2):
        copied = own.clone()
        dist.broadcast(copied, src=root, group=group)
        yield copied
        reduced = own.clone()
        dist.reduce(reduced, dst=root, group=group)
        if rank == root:  # elsewhere torch says nothing of it
            yield reduced
        gathered = [torch.empty_like(own) for _ in range(2)] if rank == root else None
        dist.gather(own, gathered, dst=root, group=group)
        yield from gathered or ()
        part = torch.empty_like(own)
        dist.scatter(part, [own, own + 1] if rank == root else None, src=root, group=group)
        yield part
    parts = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(parts, own.t().contiguous().t(), group=group)
    yield from parts
    whole = torch.empty(6, 4, dtype=kind)
    dist.all_gather_into_tensor(whole, own, group=group)
    yield whole
    mine = torch.empty(6, dtype=kind)
    dist.reduce_scatter_tensor(mine, own.reshape(-1), group=group)
    yield mine
    dist.reduce_scatter(mine, list(own.reshape(-1).chunk(2)), group=group)
    yield mine
    uneven = torch.empty(4, dtype=kind) if rank else torch.empty(2, dtype=kind)
    dist.all_to_all_single(uneven, own[0, :3], [2, 2] if rank else [1, 1], [1, 2], group=group)
    yield uneven
    outgoing, incoming = list(own.reshape(-1).chunk(2)), [torch.empty(6, dtype=kind) for _ in range(2)]
    if group is None or dist.get_backend(group) != "gloo":  # gloo has no all_to_all of lists
        dist.all_to_all(incoming, outgoing, group=group)
        assert incoming[rank].equal(outgoing[rank])
    if rank == 0:
        sent = [dist.isend(own + tag, dst=1, group=group, tag=tag) for tag in (5, 3)]
        for work in sent:
            work.wait()
    else:
        for tag in (3, 5):  # another order than they were sent in
            received = torch.empty_like(own)
            assert dist.recv(received, src=0 if tag == 3 else None, group=group, tag=tag) == 0
            yield received
    sums = [own.clone() + number for number in range(3)]
    works = [dist.all_reduce(one, group=group, async_op=True) for one in sums]
    for work in reversed(works):
        work.wait()
        assert work.is_completed()
    yield from sums
    exchanged = torch.empty_like(own)
    requests = dist.batch_isend_irecv(
        [dist.P2POp(dist.irecv, exchanged, 1 - rank, group), dist.P2POp(dist.isend, own, 1 - rank, group)]
    )
    for request in requests:
        request.wait()
    yield exchanged
    empty = torch.empty(0, dtype=kind)
    dist.all_reduce(empty, group=group)
    yield empty
    scalar = torch.tensor(rank + 1, dtype=kind)
    dist.all_reduce(scalar, group=group)
    yield scalar
    with torch.inference_mode():
        inferred = own + 1
        dist.all_reduce(inferred, group=group)
    yield inferred.clone()
    objects: list[Any] = [None, None]
    dist.all_gather_object(objects, {"rank": rank, "text": "x" * (100 + rank)}, group=group)
    yield torch.tensor([one["rank"] * 1000 + len(one["text"]) for one in objects])
    told: list[Any] = [rank, "root"] if rank == 1 else [None, None]
    dist.broadcast_object_list(told, src=1, group=group)
    yield torch.tensor([told[0], len(told[1])])
    dist.barrier(group=group)


def same_as_gloo(rank: int, port: int) -> dict[str, Any]:
    """Every operation by this group and by gloo, which finds itself through the same store."""
    join(rank, link(rank, port))
    gloo = dist.new_group(backend="gloo")
    with instead_of_gloo():
        ours = dist.new_group(backend="gloo")
    assert (dist.get_backend(gloo), dist.get_backend(ours)) == ("gloo", BACKEND)
    count = 0
    for kind in TYPES:
        for group in (None, ours):
            theirs = list(results(rank, gloo, kind))
            for number, (mine, expected) in enumerate(zip(results(rank, group, kind), theirs, strict=True)):
                assert mine.dtype == expected.dtype
                assert torch.equal(mine, expected), (kind, number, mine, expected)
                count += 1
    return {"compared": count}


def alone(rank: int, port: int) -> dict[str, Any]:
    """Groups of one rank, as vLLM makes them for dimensions that it does not use."""
    join(rank, link(rank, port))
    groups = [dist.new_group([one], backend=BACKEND) for one in range(2)]
    mine = groups[rank]
    value = torch.arange(4)
    dist.all_reduce(value, group=mine)
    dist.broadcast(value, src=rank, group=mine)
    gathered = torch.empty(4, dtype=value.dtype)
    dist.all_gather_into_tensor(gathered, value, group=mine)
    parts = [torch.empty_like(value)]
    dist.all_gather(parts, value, group=mine)
    scattered = torch.empty(4, dtype=value.dtype)
    dist.reduce_scatter_tensor(scattered, value, group=mine)
    dist.all_to_all_single(scattered, value, group=mine)
    objects: list[Any] = [None]
    dist.all_gather_object(objects, "x", group=mine)
    dist.barrier(group=mine)
    assert all(one.tolist() == [0, 1, 2, 3] for one in (value, gathered, parts[0], scattered))
    found = {"objects": objects, "size": dist.get_world_size(mine), "rank": dist.get_rank(mine)}
    dist.barrier()
    dist.destroy_process_group(mine)
    dist.destroy_process_group()
    close_groups()
    assert not dist.is_initialized()
    return found


def both_send_much(rank: int, port: int) -> dict[str, Any]:
    """More than any socket's buffer, in both directions at once."""
    join(rank, link(rank, port))
    value = torch.full((24 << 20,), float(rank + 1))
    dist.all_reduce(value)
    return {"values": value.unique().tolist()}


def threads(rank: int, port: int) -> dict[str, Any]:
    """Several groups of the same two ranks, each used by a thread of its own."""
    join(rank, link(rank, port))
    groups = [dist.new_group(backend=BACKEND) for _ in range(4)]
    sums: list[float] = [0.0] * len(groups)

    def use(index: int) -> None:
        for number in range(100):
            value = torch.tensor([float(index + number * rank)])
            dist.all_reduce(value, group=groups[index])
            sums[index] += value.item()

    workers = [threading.Thread(target=use, args=(index,)) for index in range(len(groups))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(SECONDS)
    return {"sums": sums}


def store(rank: int, port: int) -> dict[str, Any]:
    """The store, through torch's own wrapper of it."""
    join(rank, link(rank, port))
    kept = dist.PrefixStore("p", dist.distributed_c10d._get_default_store())
    if rank == 0:
        kept.set("late", "no")
        dist.barrier()
        time.sleep(0.2)
        kept.set("key", b"\x00\xff")
    else:
        dist.barrier()
    seen = kept.get("key")
    for _ in range(50):
        kept.add("count", 1)
    dist.barrier()
    swapped = kept.compare_set("late", "no", "yes") if rank else b""
    dist.barrier()
    kept.append("both", str(rank))
    dist.barrier()
    kept.multi_set([f"m{rank}", f"d{rank}"], ["1", "2"])
    found = {
        "seen": list(seen),
        "count": kept.add("count", 0),
        "check": [kept.check(["key", "count"]), kept.check(["key", "nothing"])],
        "swapped": swapped.decode(),
        "late": kept.get("late").decode(),
        "both": sorted(kept.get("both").decode()),
        "multi": [one.decode() for one in kept.multi_get(["m0", "m1"])],
        "deleted": [kept.delete_key(f"d{rank}"), kept.delete_key("nothing")],
        "waited": _error(lambda: kept.wait(["nothing"], timedelta(seconds=0.5))),
    }
    dist.barrier()
    return found


def late(rank: int, port: int) -> dict[str, Any]:
    """One rank does not come to an operation."""
    join(rank, link(rank, port), timeout=1.0)
    answer = {"error": _error(dist.barrier)} if rank == 0 else {}
    time.sleep(0 if rank == 0 else 3)
    return answer


def different(rank: int, port: int) -> dict[str, Any]:
    """The ranks run different operations, or the same with other sizes."""
    join(rank, link(rank, port))
    operation = dist.barrier if rank else lambda: dist.all_reduce(torch.ones(3))
    first = _error(operation)
    second = _error(lambda: dist.all_reduce(torch.ones(3 + rank)))
    return {"errors": [first, second]}


def waited_for_again(rank: int, port: int) -> dict[str, Any]:
    """Operations that are waited for and looked at several times, before and after they have ended."""
    join(rank, link(rank, port))
    group = dist.distributed_c10d._get_default_group()
    if rank == 1:
        dist.barrier()
        dist.send(torch.full((2,), 7.0), dst=0, tag=1)
        dist.send(torch.full((2,), 8.0), dst=0, tag=2)
        dist.barrier()
        return {}
    waited, looked_at, never = torch.zeros(2), torch.zeros(2), torch.zeros(2)
    first, second = dist.irecv(waited, src=1, tag=1), dist.irecv(looked_at, src=1, tag=2)
    third = group.recv([never], 1, 3)
    before = [work.is_completed() for work in (first, second, third)]
    dist.barrier()
    waits = [first.wait(), first.wait()]
    end = time.monotonic() + SECONDS
    while not second.is_completed() and time.monotonic() < end:
        time.sleep(0.01)
    seen = looked_at.tolist()  # nobody has waited for it
    errors = [_error(lambda: third.wait(timedelta(seconds=1))), _error(third.wait)]
    dist.barrier()
    return {
        "before": before,
        "waits": waits,
        "waited": waited.tolist(),
        "seen": seen,
        "errors": errors,
        "completed": [work.is_completed() for work in (first, second, third)],
        "succeeded": [work.is_success() for work in (first, second, third)],
    }


def left_alone(rank: int, port: int) -> dict[str, Any]:
    """The other rank dies in the middle; who waits does not go on waiting, and who comes later does not begin."""
    join(rank, link(rank, port), timeout=1800)
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), 9)
    begun = time.monotonic()
    errors = [_error(dist.barrier), _error(lambda: dist.all_reduce(torch.ones(1)))]
    errors.append(_error(lambda: dist.distributed_c10d._get_default_store().get("nothing")))
    return {"errors": errors, "seconds": time.monotonic() - begun}


def stuck(rank: int, port: int) -> dict[str, Any]:
    """What connects by itself takes too long, or does not."""
    opened = link(rank, port)
    join(rank, opened)
    dist.barrier()
    with connecting("NCCL", 60):
        in_time = len(ended)
    with connecting("NCCL", 0.2):
        end = time.monotonic() + SECONDS
        while not ended and time.monotonic() < end:
            time.sleep(0.01)
    dist.barrier()
    return {"in time": in_time, "errors": [str(error) for error in ended], "threads": threading.active_count()}


def closed(rank: int, port: int) -> dict[str, Any]:
    """This side ends the pair while another thread waits."""
    from vllm_spark.errors import PeerLostError

    opened = link(rank, port)
    join(rank, opened, timeout=1800)
    dist.barrier()
    if rank == 1:
        return {"error": _error(dist.barrier)}
    errors: list[str] = []
    waiting = threading.Thread(target=lambda: errors.append(_error(lambda: dist.recv(torch.ones(1), src=1))))
    waiting.start()
    time.sleep(0.3)
    opened.close(PeerLostError("the test is over"))
    close_groups()
    waiting.join(SECONDS)
    return {"errors": errors, "alive": waiting.is_alive(), "threads": [one.name for one in threading.enumerate()]}


def _error(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def report(answer: Pipe, function: str, rank: int, port: int) -> None:
    """Sends what a function of this module returns; its error is shown as that of the process."""
    answer.send(globals()[function](rank, port))
