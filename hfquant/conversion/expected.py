"""How long a job will take from being asked for to its end, before it has begun: a range, for much of it is not known.

The work itself is arithmetic (`compress.estimate`).  Beside it two processes are begun, the original is fetched, the
result is pushed and read back; and whoever else is on the machine is not known at all.
"""

WORK = (0.7, 2.5)  # times what is reckoned
# seconds until a process has imported what it needs, of which a job has two: alone on the machine; measured 28 where
# others take every processor
START = (4.0, 30.0)
NETWORK = (100e6, 10e6)  # bytes per second from and to the Hub
AROUND = (3.0, 25.0)  # seconds: until a worker looks, the Hub's pages, writing and reading back small files


def expected(work: float, fetched: int, pushed: int) -> tuple[float, float]:
    """Seconds of a whole job: if all goes well, and what it will not often exceed.

    work: reckoned seconds of compressing and measuring.  fetched, pushed: bytes from and to the Hub; what was pushed is
    not read back but for its small files.
    """
    low, high = (
        work * spread + 2 * start + (fetched + pushed) / speed + around
        for spread, start, speed, around in zip(WORK, START, NETWORK, AROUND, strict=True)
    )
    return low, high
